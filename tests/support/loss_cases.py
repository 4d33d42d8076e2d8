"""The losses with their options and promises, and random inputs, that several test modules share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from monai_iou import (
    CompoundLoss,
    FocalIoULoss,
    FocalTverskyLoss,
    GeneralizedIoULoss,
    InstanceIoULoss,
    IoUCELoss,
    IoUFocalLoss,
    IoULoss,
    LogIoULoss,
    LogTverskyLoss,
    LovaszSoftmaxLoss,
    WeightedCrossEntropyLoss,
)


@dataclass(frozen=True)
class Case:
    """A loss with arguments of its own, and which promises its formula makes."""

    make: Callable[..., nn.Module]
    options: dict[str, Any] = field(default_factory=dict)
    bounded: bool = True  # by 1
    zero_when_perfect: bool = True
    hard_is_iou: bool = False  # of a hard prediction it is 1 - IoU
    region: bool = True  # takes IoULoss's arguments
    smoothing: bool = True  # takes smooth_nr and smooth_dr
    exact: bool = True  # the gradient is that of the value, and 0 at a perfect prediction, to rounding
    local: bool = False  # looks at neighbours, so that moving or removing voxels changes it

    def __call__(self, **options: Any) -> nn.Module:
        return self.make(**{**self.options, **options})


def compound(**options: Any) -> CompoundLoss:
    entropy = {name: options[name] for name in ("softmax", "sigmoid", "ignore_index", "weight") if name in options}
    return CompoundLoss([LogIoULoss(**options), WeightedCrossEntropyLoss(gamma=2.0, **entropy)], [0.5, 2.0])


CASES = {
    "iou": Case(IoULoss, hard_is_iou=True),
    "iou_batch": Case(IoULoss, {"batch": True}),
    "iou_power": Case(IoULoss, {"power": 1.5}, hard_is_iou=True),
    "iou_squared": Case(IoULoss, {"squared_pred": True}, hard_is_iou=True),
    "iou_soft_label": Case(IoULoss, {"soft_label": True}, hard_is_iou=True),
    "iou_skip": Case(IoULoss, {"empty": "skip"}, hard_is_iou=True),
    "iou_suppress": Case(IoULoss, {"empty": "suppress"}, hard_is_iou=True),
    "log_iou": Case(LogIoULoss, bounded=False),
    "log_iou_root": Case(LogIoULoss, {"gamma": 0.3}, bounded=False),
    "focal_iou": Case(FocalIoULoss),
    "focal_iou_root": Case(FocalIoULoss, {"gamma": 0.5}),
    "focal_tversky": Case(FocalTverskyLoss),
    "log_tversky": Case(LogTverskyLoss, bounded=False),
    "tversky_as_iou": Case(FocalTverskyLoss, {"alpha": 1.0, "beta": 1.0, "gamma": 1.0}, hard_is_iou=True),
    "generalized_square": Case(GeneralizedIoULoss),
    "generalized_simple": Case(GeneralizedIoULoss, {"w_type": "simple"}),
    "generalized_suppress": Case(GeneralizedIoULoss, {"empty": "suppress"}),
    "cross_entropy": Case(WeightedCrossEntropyLoss, bounded=False, region=False),
    "focal": Case(WeightedCrossEntropyLoss, {"gamma": 2.0}, bounded=False, region=False),
    "smoothed": Case(
        WeightedCrossEntropyLoss, {"label_smoothing": 0.1}, bounded=False, zero_when_perfect=False, region=False
    ),
    "iou_ce": Case(IoUCELoss, bounded=False),
    "iou_focal": Case(IoUFocalLoss, bounded=False),
    "compound": Case(compound, bounded=False),
    "lovasz": Case(LovaszSoftmaxLoss, {"bins": None}, hard_is_iou=True, region=False, smoothing=False),
    "lovasz_histogram": Case(LovaszSoftmaxLoss, {"bins": 512}, region=False, smoothing=False, exact=False),
    "instance": Case(InstanceIoULoss, bounded=False, local=True),
    "instance_blob": Case(InstanceIoULoss, {"regions": "blob"}, bounded=False, local=True),
}
GLOBAL = {name: case for name, case in CASES.items() if not case.local}
EXACT = {name: case for name, case in CASES.items() if case.exact}
REGION = {name: case for name, case in CASES.items() if case.region}
HARD = {name: case for name, case in CASES.items() if case.hard_is_iou}


def over(cases: dict[str, Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases.values(), ids=cases.keys())


every_loss = over(CASES)
SHAPE = (2, 3, 5, 4, 3)


def pair(shape: tuple[int, ...] = SHAPE, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return random logits and a label map in which the higher classes are rare."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator, dtype=dtype) * 2
    odds = torch.rand((shape[0], 1, *shape[2:]), generator=generator)
    return logits, (odds**3 * shape[1]).long()


def one_hot(labels: Tensor, classes: int) -> Tensor:
    return (labels == torch.arange(classes).reshape(1, -1, *[1] * (labels.ndim - 2))).float()


def gradient(loss: nn.Module, logits: Tensor, target: Tensor) -> Tensor:
    logits = logits.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(logits, target), logits)
    return slope
