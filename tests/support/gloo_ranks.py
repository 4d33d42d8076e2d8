"""What the tests that start gloo ranks share."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

PRELOADED = ["monai_iou", "monai_iou.metrics"]  # by the server from which processes are forked


def run_ranks(work: Callable[..., None], ranks: int, *arguments: Any) -> None:
    """Run `work(rank, *arguments)` in that many processes; an error in one of them is raised here.

    The processes are forked from a server that has imported the package once: importing MONAI takes seconds per rank.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    start_processes(work, arguments, ranks, start_method="forkserver")


def join_group(rank: int, world: int, folder: str, backend: str = "gloo") -> None:
    """Make the group of a test's ranks, which meet at a file in its folder: a port may be taken before they bind it."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meet"
    dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    assert dist.get_world_size() == world


def leave_group() -> NoReturn:
    """End a rank's process once all ranks are done, without the destructors.

    torch's gloo group can deadlock in its destructor: the main thread holds the interpreter's lock and waits for the
    group's thread, which waits for that lock to release what its last call kept.
    """
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
