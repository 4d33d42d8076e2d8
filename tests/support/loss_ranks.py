"""The losses that share statistics over ranks, and how a test's ranks find each other."""

from __future__ import annotations

import socket
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from monai_iou import (
    CompoundLoss,
    FocalTverskyLoss,
    GeneralizedIoULoss,
    InstanceIoULoss,
    IoUCELoss,
    IoULoss,
    LogIoULoss,
    LovaszSoftmaxLoss,
    WeightedCrossEntropyLoss,
)

JOIN = {"softmax": True, "batch": True, "sync_batch": True}


def make_losses() -> dict[str, nn.Module]:
    return {
        "iou": IoULoss(**JOIN, weight=[0.5, 1.0, 2.0]),
        "suppress": IoULoss(**JOIN, empty="suppress"),
        "skip": FocalTverskyLoss(**JOIN, empty="skip"),
        "log": LogIoULoss(**JOIN),
        "generalized": GeneralizedIoULoss(**JOIN),
        "cross_entropy": WeightedCrossEntropyLoss(weight=[0.1, 1.0, 1.0], sync_batch=True),
        "iou_ce": IoUCELoss(**JOIN, include_background=False),
        "compound": CompoundLoss([LogIoULoss(**JOIN), WeightedCrossEntropyLoss(gamma=2.0, sync_batch=True)]),
        "lovasz_ce": CompoundLoss([LovaszSoftmaxLoss(**JOIN), WeightedCrossEntropyLoss(sync_batch=True)]),
        "voronoi": InstanceIoULoss(**JOIN),
        "blob": InstanceIoULoss("blob", **JOIN),
    }


def join_group(rank: int, world: int, port: int) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    assert dist.get_world_size() == world


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
