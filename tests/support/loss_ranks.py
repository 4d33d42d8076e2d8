"""The losses that share statistics over ranks."""

from __future__ import annotations

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
