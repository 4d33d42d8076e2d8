"""Gradients of losses by the Triton kernel against differences of their values; by its interpreter or on a GPU."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from torch import Tensor, nn

from monai_iou import FocalTverskyLoss, IoUCELoss, IoULoss, WeightedCrossEntropyLoss, use_kernel

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None
    or not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"),
    reason="needs Triton, and a GPU or TRITON_INTERPRET=1: run .ci/triton",
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEP = 1 / 64  # the kernel adds in float32: a smaller step would drown in its rounding

LOSSES: dict[str, tuple[nn.Module, int]] = {
    "one channel, weight": (IoUCELoss(sigmoid=True, weight=20.0), 1),
    "several channels, pos_weight": (IoUCELoss(sigmoid=True, pos_weight=[1.0, 5.0, 0.2]), 3),
    "cross-entropy, pos_weight": (WeightedCrossEntropyLoss(sigmoid=True, pos_weight=7.0), 3),
    "softmax, weight": (IoUCELoss(softmax=True, weight=[0.2, 1.0, 3.0]), 3),
    "focal, weight": (WeightedCrossEntropyLoss(weight=[0.2, 1.0, 3.0], gamma=2.0), 3),
    "Tversky": (FocalTverskyLoss(softmax=True), 3),
    "squared": (IoULoss(softmax=True, squared_pred=True), 3),
}


@pytest.mark.parametrize(("loss", "channels"), LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("soft", [False, True])
def test_gradient_is_the_slope_of_the_value(loss: nn.Module, channels: int, soft: bool) -> None:
    generator = torch.Generator().manual_seed(channels)
    shape = (1, channels, 2, 3)
    logits = torch.randn(shape, generator=generator).to(DEVICE)
    labels = torch.arange(6).view(1, 1, 2, 3) % max(channels, 2)
    target = torch.rand(shape, generator=generator) if soft or channels == 1 else labels
    if not soft and channels == 1:
        target = labels.float()
    target = target.to(DEVICE)

    def value(x: Tensor) -> Tensor:
        with use_kernel("triton"):
            result: Tensor = loss(x, target)
        return result

    leaf = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    slopes = torch.zeros_like(gradient)
    for index in range(logits.numel()):
        step = torch.zeros_like(logits)
        step.view(-1)[index] = STEP
        slopes.view(-1)[index] = (value(logits + step) - value(logits - step)) / (2 * STEP)
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close(gradient, slopes, rtol=2e-3, atol=2e-3 * float(gradient.abs().max()))
