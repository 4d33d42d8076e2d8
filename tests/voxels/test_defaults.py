"""A default device or dtype of the caller's changes nothing: temporaries lie where the tensors are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from default_dtype import default_dtype
from torch import Tensor, nn

from monai_iou import (
    AffinityLoss,
    CompoundLoss,
    ContextAttentionLoss,
    FocalIoULoss,
    GeneralizedIoULoss,
    InstanceIoULoss,
    IoUCELoss,
    IoUFocalLoss,
    IoULoss,
    LovaszHingeLoss,
    LovaszSoftmaxLoss,
    MultiScaleLoss,
    WeightedCrossEntropyLoss,
    voxel_sums,
)
from monai_iou.voxels import self_check, tiled
from monai_iou.voxels.error_gradient import TILED
from monai_iou.voxels.flat_voxels import flat_voxels
from monai_iou.voxels.spec import PassSpec

LOSSES: list[Callable[..., nn.Module]] = [
    IoULoss,
    lambda **o: IoULoss(power=2.0, empty="suppress", weight=[1.0, 2.0, 3.0][: o.pop("channels", 3)], **o),
    FocalIoULoss,
    GeneralizedIoULoss,
    IoUCELoss,
    IoUFocalLoss,
    lambda **o: WeightedCrossEntropyLoss(label_smoothing=0.1, **o),
    LovaszSoftmaxLoss,
    lambda **o: LovaszSoftmaxLoss(bins=None, **o),
    lambda **o: CompoundLoss([LovaszSoftmaxLoss(**o), IoULoss(**o), WeightedCrossEntropyLoss(**o)]),
    lambda **o: MultiScaleLoss(IoUCELoss(**o)),
    InstanceIoULoss,
    lambda **o: InstanceIoULoss("blob", cells="both", **o),
]


DEFAULTS = [
    lambda: torch.device("meta"),
    lambda: default_dtype(torch.bfloat16),
    lambda: default_dtype(torch.float64),
]


def case(channels: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(channels)
    labels = torch.randint(0, max(channels, 2), (2, 1, 9, 7), generator=generator)
    return torch.randn(2, channels, 9, 7, generator=generator), labels


def result(loss: nn.Module, logits: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    value = loss(leaf, *others)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def assert_same(loss: nn.Module, logits: Tensor, *others: Any) -> None:
    expected = result(loss, logits, *others)
    for default in DEFAULTS:
        with default():
            found = result(loss, logits, *others)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("make", LOSSES)
def test_losses(make: Callable[..., nn.Module]) -> None:
    for channels, act in ((3, "softmax"), (3, "sigmoid"), (2, "softmax"), (1, "sigmoid")):
        logits, labels = case(channels)
        weighted = {"channels": channels} if make is LOSSES[1] else {}
        loss = make(**{act: True}, **weighted)
        assert_same(loss, logits, labels)
        if channels == 3:
            assert_same(loss, logits, labels, [[True, True, False], [True, False, True]])


def test_losses_with_inputs_of_their_own() -> None:
    logits, labels = case(1)
    assert_same(LovaszHingeLoss(), logits, labels)
    assert_same(LovaszHingeLoss(bins=None), logits, labels)
    assert_same(ContextAttentionLoss(2.0), logits.sigmoid(), labels)
    assert_same(AffinityLoss(size=[3, 3]), torch.rand(2, 9, 9), labels)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", None])
def test_sums_of_infinite_logits_and_of_regions(activation: str | None) -> None:
    """Numbers that are not finite take the general formulas, and regions a pass of their own."""
    logits, labels = case(2)
    logits = logits if activation else logits.softmax(1)
    regions = (torch.arange(63) // 11).view(1, 1, 9, 7).expand(2, 1, 9, 7)

    class Sums(nn.Module):
        def forward(self, input: Tensor, groups: Tensor | None, cross_entropy: bool) -> Tensor:
            return voxel_sums(input, labels, activation=activation, groups=groups, cross_entropy=cross_entropy).rows

    for cross_entropy in (False, True):
        assert_same(Sums(), logits, regions, cross_entropy)
        if activation:
            assert_same(Sums(), logits.masked_fill(labels == 1, torch.inf), None, cross_entropy)


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("soft", [False, True])
def test_the_check_of_a_kernel(default: Callable[[], Any], soft: bool) -> None:
    logits, labels = case(3)
    target = torch.rand(2, 3, 9, 7) if soft else labels
    regions = torch.zeros_like(labels)
    mask = torch.ones_like(labels)
    spec = PassSpec(cross_entropy=True)
    with default():
        for groups in (None, regions):
            voxels = flat_voxels(logits, target, 255, mask, groups, 1)
            assert self_check.find_fault(tiled.compute_sums, voxels, spec) is None
        if not soft:
            voxels = flat_voxels(logits, target, None).compact()
            assert self_check.find_error_fault(TILED, voxels, PassSpec(overlap=None, bins=64)) is None
