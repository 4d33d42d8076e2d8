"""The devices of a run: those that its keys name, and without one the GPU of this rank."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from monai_iou.tables import counted
from monai_iou.workflow.settings import check_device, exit_with_message, optional

__all__ = ["INFERER_DEVICES", "ONE_FOR_EACH", "check_devices", "default_device", "own_gpu"]

ONE_FOR_EACH = (
    "start no more ranks than GPUs (--nproc_per_node of torchrun), or give each task of srun a GPU of its own "
    "(--gpus-per-task=1)"
)
# Of MONAI's sliding window: where it keeps the output of the network, and where it computes. Null is the image's.
INFERER_DEVICES = tuple(
    f"{place}#{name}" for place in ("inferer", "validate#inferer") for name in ("device", "sw_device")
)
DEVICES = ("device", "transform_device", *INFERER_DEVICES)


def check_devices(given: Mapping[str, Any]) -> None:
    """Refuse a device among a run's keys as `check_device` does, before anything is planned, read or trained.

    Args:
        given: key -> plain value, `validate#inferer#device` also as `validate::inferer::device`; other keys are none of
            its business.

    Example:
        >>> check_devices({"device": "cpu", "validate::inferer::device": "null", "epochs": 3})

    Raises:
        ValueError: one cannot be used here.
    """
    for name, value in given.items():
        key = name.lstrip("+~").replace("::", "#")
        if key in DEVICES and not (key in INFERER_DEVICES and optional(value) is None):
            check_device(value, key)


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
