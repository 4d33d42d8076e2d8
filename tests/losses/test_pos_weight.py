"""Weights of the foreground of sigmoid outputs: torch's and MONAI's meaning, in every kernel."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import monai
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from monai_iou import IoUCELoss, IoUFocalLoss, WeightedCrossEntropyLoss, use_kernel
from monai_iou.voxels import in_place, tiling

KERNELS = ["reference", "tiled", pytest.param("compiled", marks=pytest.mark.slow)]
Loss = Callable[[Tensor, Tensor], Tensor]


def case(channels: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(channels)
    logits = torch.randn(2, channels, 7, 6, 5, generator=generator, dtype=dtype) * 4
    return logits, (torch.rand(logits.shape, generator=generator) > 0.7).to(dtype)


def value_and_gradient(loss: Loss, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    value = loss(leaf, target)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("weight", [20.0, 0.05])
def test_one_channel_means_what_it_means_in_monais_dice_ce(kernel: str, weight: float) -> None:
    logits, labels = case(1)
    theirs = monai.losses.DiceCELoss(
        jaccard=True, sigmoid=True, weight=torch.tensor([weight]), smooth_nr=2e-5, smooth_dr=2e-5
    )
    expected = value_and_gradient(theirs, logits, labels)
    for options in ({"weight": weight}, {"weight": [weight]}, {"pos_weight": weight}):
        with use_kernel(kernel):
            found = value_and_gradient(IoUCELoss(sigmoid=True, **options), logits, labels)  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    default = monai.losses.DiceCELoss(jaccard=True, sigmoid=True, weight=torch.tensor([weight]))
    torch.testing.assert_close(IoUCELoss(sigmoid=True, weight=weight)(logits, labels), default(logits, labels))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("weights", [[1.0, 5.0, 0.2], 7.0, [0.0, 1.0, 2.0]], ids=str)
def test_multi_label_is_torchs(kernel: str, weights: Any) -> None:
    logits, maps = case(3)
    shape = (3, 1, 1, 1) if isinstance(weights, list) else (1,)
    theirs = nn.BCEWithLogitsLoss(pos_weight=torch.tensor(weights).view(shape))
    with use_kernel(kernel):
        found = value_and_gradient(WeightedCrossEntropyLoss(sigmoid=True, pos_weight=weights), logits, maps)
    torch.testing.assert_close(found, value_and_gradient(theirs, logits, maps), rtol=1e-5, atol=1e-8)


def test_soft_maps_and_half_precision_are_torchs_too() -> None:
    logits, maps = case(2)
    maps = maps * 0.8 + 0.1
    theirs = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([3.0, 9.0]).view(2, 1, 1, 1))
    loss = WeightedCrossEntropyLoss(sigmoid=True, pos_weight=[3.0, 9.0])
    torch.testing.assert_close(loss(logits, maps), theirs(logits, maps))
    half = logits.bfloat16()
    found = value_and_gradient(loss, half, maps)
    expected = value_and_gradient(theirs, half.float(), maps)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1].float(), expected[1], rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("kernel", ["reference", "tiled"])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(
    "options", [{}, {"gamma": 2.0}, {"gamma": 1.5, "label_smoothing": 0.1}, {"empty": "suppress"}], ids=str
)
def test_gradients(options: dict[str, Any], channels: int, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiling.TILE_ELEMENTS, "cpu", 40)
    monkeypatch.setattr(in_place, "FACTOR", {1: 1, 2: 1})
    logits, maps = (part[..., :2, :3] for part in case(channels, torch.float64))
    logits = logits.clone().requires_grad_()
    losses: list[Loss] = [IoUCELoss(sigmoid=True, pos_weight=5.0, **options)]
    if "empty" not in options:
        losses.append(WeightedCrossEntropyLoss(sigmoid=True, pos_weight=5.0, **options))
    for loss in losses:
        with use_kernel(kernel):
            assert gradcheck(lambda x, loss=loss: loss(x, maps), (logits,), fast_mode=True)
            found = loss(logits, maps)
        with use_kernel("reference"):
            torch.testing.assert_close(found, loss(logits, maps))


@pytest.mark.slow
def test_the_compiled_kernel_has_the_reference_gradient() -> None:
    logits, labels = case(2)
    logits, labels = (part.repeat(1, 1, 9, 9, 1) for part in (logits, labels))  # above its smallest size
    for options in ({}, {"gamma": 2.0}):
        loss = IoUCELoss(sigmoid=True, pos_weight=[4.0, 0.3], **options)  # type: ignore[arg-type]
        with use_kernel("reference"):
            expected = value_and_gradient(loss, logits.double(), labels)
        with use_kernel("compiled"):
            found = value_and_gradient(loss, logits, labels)
        torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-5, atol=0)
        torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-4, atol=1e-9)


def test_a_weight_of_one_changes_nothing() -> None:
    logits, labels = case(1)
    for make in (IoUCELoss, IoUFocalLoss, WeightedCrossEntropyLoss):
        plain = value_and_gradient(make(sigmoid=True), logits, labels)
        torch.testing.assert_close(value_and_gradient(make(sigmoid=True, pos_weight=1.0), logits, labels), plain)


def test_reductions_and_the_background() -> None:
    logits, maps = case(3)
    weights = torch.tensor([2.0, 5.0, 3.0])
    elements = nn.functional.binary_cross_entropy_with_logits(
        logits, maps, pos_weight=weights.view(3, 1, 1, 1), reduction="none"
    ).flatten(2)
    options: dict[str, Any] = {"sigmoid": True, "pos_weight": weights}
    torch.testing.assert_close(WeightedCrossEntropyLoss(reduction="sum", **options)(logits, maps), elements.sum())
    shares = WeightedCrossEntropyLoss(reduction="none", **options)(logits, maps)
    torch.testing.assert_close(shares.flatten(1), elements.mean(2) / 3)
    loss = WeightedCrossEntropyLoss(sigmoid=True, include_background=False, pos_weight=[5.0, 3.0])
    torch.testing.assert_close(loss(logits, maps), elements[:, 1:].mean())


def test_wrong_weights_are_explained() -> None:
    logits, maps = case(3)
    one, label = case(1)
    cases: list[tuple[nn.Module, Tensor, Tensor, str]] = [
        (WeightedCrossEntropyLoss(sigmoid=True, pos_weight=[1.0, 2.0]), logits, maps,
         "Expected `pos_weight` to hold 3 values, but got 2: give one weight per class."),
        (IoUCELoss(sigmoid=True, weight=[1.0, 2.0]), one, label,
         "Expected `weight` to hold 1 value with one channel, but got 2: give the weight of the foreground divided"),
        (IoUCELoss(sigmoid=True, weight=2.0, pos_weight=2.0), one, label,
         "Expected `weight` or `pos_weight` with one channel, but got both: keep one, because they mean the same."),
        (IoUCELoss(softmax=True, pos_weight=2.0), logits, maps,
         "Expected `pos_weight` to be None without a sigmoid, but got weights: set sigmoid=True, or give one `weight`"),
        (IoUCELoss(pos_weight=2.0), logits.softmax(1), maps,
         "Expected `pos_weight` to be None without a sigmoid, but got weights: set sigmoid=True"),
    ]  # fmt: skip
    for loss, input, target, message in cases:
        with pytest.raises(ValueError, match=re.escape(message)):
            loss(input, target)
    with pytest.raises(ValueError, match=r"Expected every `pos_weight` to be finite and at least 0, but got -1\.0"):
        IoUFocalLoss(sigmoid=True, pos_weight=-1.0)
