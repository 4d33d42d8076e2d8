"""How the ranks of the multi_gpu configs leave their process group, so that no thread of it outlives the interpreter.

A DistributedDataParallel imports `torch.distributed.nn`, whose functions keep the default group as an argument. If it
were imported after the group was made, they would hold the group for ever, and gloo's threads with it, which could
abort a rank that had trained to its end. So the module is imported here, before the configs make the group.
"""

from __future__ import annotations

import atexit
import gc

import torch.distributed as dist

if dist.is_available():
    import torch.distributed.nn  # noqa: F401

__all__ = ["leave_group"]


def leave_group() -> None:
    """Wait for the other ranks and destroy the process group, if there is one: the last thing of a workflow.

    The launcher ends all ranks as soon as one has left. The workflow still holds networks that hold the group; they are
    collected when the program ends, while its threads can still be joined.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        atexit.register(gc.collect)
