"""The device of a run that names none: the GPU of this rank, where there is one for each."""

from __future__ import annotations

import os

import torch

from monai_iou.tables import counted
from monai_iou.workflow.settings import exit_with_message

__all__ = ["ONE_FOR_EACH", "default_device", "own_gpu"]

ONE_FOR_EACH = (
    "start no more ranks than GPUs (--nproc_per_node of torchrun), or give each task of srun a GPU of its own "
    "(--gpus-per-task=1)"
)


def default_device() -> torch.device:
    """Return the GPU of this rank, which is the first one without other ranks, or the CPU where torch can use no GPU.

    Raises:
        ValueError: see `own_gpu`.
    """
    return torch.device("cuda", own_gpu()) if torch.cuda.is_available() else torch.device("cpu")


def own_gpu() -> int:
    """Return the number of this rank's GPU: its place on the machine, or 0 where a task sees none but its own.

    Raises:
        ValueError: the machine has fewer GPUs than ranks. Under `python -m monai.bundle` that one sentence ends the
            program.
    """
    place, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    # `srun --gpus-per-task=1` shows each task its own GPU as number 0; the ranks of torchrun all see the same GPUs.
    if count == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0
    if place >= count > 0:
        message = (
            f"Expected a GPU for each rank of this machine, but torch sees {counted(count, 'GPU')} and LOCAL_RANK, "
            f"which counts from 0, is {place}: {ONE_FOR_EACH}."
        )
        with exit_with_message():
            raise ValueError(message)
    return place
