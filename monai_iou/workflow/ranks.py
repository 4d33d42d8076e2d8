"""How the ranks of the multi_gpu configs join their process group and leave it.

A DistributedDataParallel imports `torch.distributed.nn`, whose functions keep the default group as an argument. If it
were imported after the group was made, they would hold the group for ever, and gloo's threads with it, which could
abort a rank that had trained to its end. So the module is imported here, before the group is made.
"""

from __future__ import annotations

import atexit
import gc
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from monai_iou.workflow.devices import ONE_FOR_EACH, own_gpu
from monai_iou.workflow.settings import exit_with_message

if dist.is_available():
    import torch.distributed.nn

__all__ = ["LONGEST_WAIT", "join_group", "leave_group"]

# For a rank that works while the others wait for it: rank 0 tunes the post-processing alone, and of an evaluation's
# volumes some are larger than others. torch would end the others after 10 minutes (NCCL) or 30 (gloo). The launcher
# ends them at once if the rank has died.
LONGEST_WAIT = timedelta(hours=24)
LETTING_GO = 0.5  # seconds


def join_group(device: torch.device | str) -> None:
    """Make the process group of all ranks for the device that this rank runs on, unless there is one.

    Args:
        device: as the config or the command line gives it; a GPU without a number is that of `own_gpu`, and becomes
            the current one. GPUs communicate by NCCL, CPUs by gloo.

    Raises:
        ValueError: there are more ranks than GPUs. Under `python -m monai.bundle` that one sentence ends the program.
    """
    device = torch.device(device)
    is_gpu = device.type == "cuda"
    if is_gpu:
        torch.cuda.set_device(own_gpu() if device.index is None else device.index)
    if not dist.is_initialized():
        # NCCL would guess a rank's GPU from its number among all ranks, which is wrong on machines with unequal GPUs.
        gpu = torch.device("cuda", torch.cuda.current_device()) if is_gpu else None
        try:
            dist.init_process_group(backend="nccl" if is_gpu else "gloo", timeout=LONGEST_WAIT, device_id=gpu)
        except RuntimeError as error:
            if "Duplicate GPU" not in str(error):
                raise
            message = f"Expected a GPU for each rank, but NCCL finds two ranks on the same one: {ONE_FOR_EACH}."
            with exit_with_message():
                raise ValueError(message) from error


def leave_group() -> None:
    """Wait for the other ranks and destroy the process group, if there is one: the last thing of a workflow.

    The launcher ends all ranks as soon as one has left. The workflow still holds networks that hold the group; they are
    collected when the program ends, while its threads can still be joined.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        # A thread of gloo has yet to let go of the last tensors, for which it holds a mutex and needs the interpreter's
        # lock. If the group were collected meanwhile, each would wait for the other for ever.
        time.sleep(LETTING_GO)
        dist.destroy_process_group()
        atexit.register(gc.collect)
