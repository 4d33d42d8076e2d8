"""Probabilities of one channel: their cross-entropy is binary, in every kernel and as a term of every loss."""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from monai_iou import (
    CompoundLoss,
    FocalTverskyLoss,
    InstanceIoULoss,
    IoUCELoss,
    IoUFocalLoss,
    IoULoss,
    WeightedCrossEntropyLoss,
    use_kernel,
    voxel_sums,
)

KERNELS = [
    "reference",
    "tiled",
    pytest.param("compiled", marks=pytest.mark.slow),
    pytest.param(
        "triton",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
            reason="needs Triton and TRITON_INTERPRET=1: run .ci/triton",
        ),
    ),
]


def case(
    *, soft: bool = False, shape: tuple[int, ...] = (2, 1, 7, 9), dtype: Any = torch.float32
) -> tuple[Tensor, Any]:
    """Return probabilities and a target; those that float32 holds near 0 and 1 are among them."""
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(shape, generator=generator, dtype=dtype) * 0.98 + 0.01
    p.view(-1)[:4] = torch.tensor([1e-11, 1e-7, 1 - 2**-23, 0.999])  # torch holds p (1 - p) at 1e-12
    y = torch.rand(shape, generator=generator, dtype=dtype)
    return p, y if soft else (y > 0.7).to(dtype)


def slope_of(loss: Any, p: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    leaf = p.clone().requires_grad_()
    value = loss(leaf, y)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("shape", [(2, 1, 7, 9), pytest.param((1, 1, 8400), marks=pytest.mark.slow)], ids=str)
def test_it_is_torchs_binary_cross_entropy(shape: tuple[int, ...], soft: bool, kernel: str) -> None:
    p, y = case(soft=soft, shape=shape)
    with use_kernel(kernel):
        found = slope_of(WeightedCrossEntropyLoss(softmax=False), p, y)
    torch.testing.assert_close(found, slope_of(F.binary_cross_entropy, p, y), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_certain_and_wrong_voxel_costs_the_least_logarithm_without_a_gradient(kernel: str) -> None:
    p, y = torch.tensor([[[0.0, 1, 1e-35, 0.3]]]), torch.tensor([[[1.0, 0, 1, 1]]])
    with use_kernel(kernel):
        value, slope = slope_of(WeightedCrossEntropyLoss(softmax=False), p, y)
    torch.testing.assert_close(value, torch.tensor((3 * 69.07755 - math.log(0.3)) / 4), rtol=1e-6, atol=0)
    torch.testing.assert_close(slope, torch.tensor([[[0, 0, 0, -1 / 1.2]]]))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("power", [1.25, 1.5, 2, 2.5, 3])
def test_rounding_beyond_0_and_1_does_not_matter_to_any_power(power: float, dtype: torch.dtype, kernel: str) -> None:
    p, y = case(dtype=dtype)
    rounded = p.clone()
    rounded.view(-1)[:3], p.view(-1)[:3] = (
        torch.tensor([-1e-8, -1e-7, 1 + 1.2e-7], dtype=dtype),
        torch.tensor([0, 0, 1]),
    )
    with use_kernel(kernel):
        found, expected = (slope_of(IoULoss(power=power), values, y) for values in (rounded, p))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        rounded.view(-1)[0] = torch.nan
        assert slope_of(IoULoss(power=power), rounded, y)[0].isnan()


@pytest.mark.parametrize("kernel", KERNELS)
def test_weights_smoothing_ignored_voxels_and_the_focal_exponent(kernel: str) -> None:
    p, y = case()
    marked = y.clone()
    marked[0, 0, :3] = 255
    valid = marked != 255

    def expected(x: Tensor, y: Tensor, weight: float, gamma: float, smoothing: float) -> Tensor:
        y = y * (1 - smoothing) + smoothing / 2
        inside, outside = -y * (1 - x) ** gamma * x.log(), -(1 - y) * x**gamma * (-x).log1p()
        return (weight * inside + outside)[valid].mean()

    for weight, gamma, smoothing in (
        (1.0, 0.0, 0.1),
        (5.0, 0.0, 0.0),
        (0.2, 2.0, 0.1),
        (1.0, 1.5, 0.0),
        (2.0, 0.5, 0.0),
    ):
        options: dict[str, Any] = {"gamma": gamma, "label_smoothing": smoothing, "ignore_index": 255, "softmax": False}
        true = slope_of(lambda x, y, w=weight, g=gamma, s=smoothing: expected(x, y, w, g, s), p.double(), y.double())
        for name in ("weight", "pos_weight"):
            with use_kernel(kernel):
                value, slope = slope_of(WeightedCrossEntropyLoss(**options, **{name: weight}), p, marked)
            torch.testing.assert_close(value, true[0].float(), rtol=1e-5, atol=0)
            torch.testing.assert_close(slope, true[1].float(), rtol=1e-4, atol=1e-9)
            assert not slope[~valid].any()


@pytest.mark.parametrize("kernel", ["reference", "tiled"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_certain_voxels_cost_a_finite_number(gamma: float, kernel: str) -> None:
    p = torch.tensor([0.0, 1.0, 0.0, 1.0]).view(1, 1, 4)
    y = torch.tensor([0.0, 1.0, 1.0, 0.0]).view(1, 1, 4)
    with use_kernel(kernel):
        value, slope = slope_of(WeightedCrossEntropyLoss(softmax=False, gamma=gamma), p, y)
    assert value.item() == pytest.approx(0.5 * 69.0776, rel=1e-5)  # -ln 1e-30
    assert slope.isfinite().all()
    nan = torch.full((1, 1, 4), torch.nan)
    with use_kernel(kernel):
        assert all(
            part.isnan().all() for part in slope_of(WeightedCrossEntropyLoss(softmax=False, gamma=gamma), nan, y)
        )


def test_false_positives_are_not_rewarded() -> None:
    """A network of one number, all of whose images have 1/32 foreground, learns 1/32 and not 1."""
    y = torch.zeros(1, 1, 4, 8)
    y[..., 0, 0] = 1
    for loss in (WeightedCrossEntropyLoss(softmax=False), IoUCELoss(lambda_iou=0.0)):
        bias = torch.zeros((), requires_grad=True)
        optimizer = torch.optim.Adam([bias], 0.3)
        for _ in range(60):
            optimizer.zero_grad()
            loss(bias.expand(1, 1, 4, 8).sigmoid(), y).backward()
            optimizer.step()
        assert bias.sigmoid().item() == pytest.approx(1 / 32, abs=0.005)


LOSSES: list[tuple[Any, Any]] = [
    (IoUCELoss(), IoUCELoss(sigmoid=True)),
    (IoUCELoss(weight=20.0), IoUCELoss(sigmoid=True, weight=20.0)),
    (IoUFocalLoss(label_smoothing=0.1), IoUFocalLoss(sigmoid=True, label_smoothing=0.1)),
    (IoUCELoss(reduction="none"), IoUCELoss(sigmoid=True, reduction="none")),
    (
        CompoundLoss([IoULoss(soft_label=True), WeightedCrossEntropyLoss(softmax=False)]),
        CompoundLoss([IoULoss(sigmoid=True, soft_label=True), WeightedCrossEntropyLoss(sigmoid=True)]),
    ),
    (InstanceIoULoss(term=IoUCELoss(gamma=2.0)), InstanceIoULoss(term=IoUCELoss(gamma=2.0), sigmoid=True)),
    (
        InstanceIoULoss("blob", term=WeightedCrossEntropyLoss(softmax=False), lambda_global=0),
        InstanceIoULoss("blob", term=WeightedCrossEntropyLoss(), sigmoid=True, lambda_global=0),
    ),
    (InstanceIoULoss(global_loss=IoUCELoss()), InstanceIoULoss(sigmoid=True, global_loss=IoUCELoss(sigmoid=True))),
]


@pytest.mark.parametrize("kernel", ["reference", "tiled"])
@pytest.mark.parametrize(("of_probabilities", "of_logits"), LOSSES)
def test_every_loss_agrees_with_the_one_of_logits(
    of_probabilities: nn.Module, of_logits: nn.Module, kernel: str
) -> None:
    p, y = case(dtype=torch.float64)
    p = p.clamp(1e-6, 1 - 1e-6)
    with use_kernel(kernel):
        found = slope_of(lambda x, y: of_probabilities(x.sigmoid(), y).sum(), p.logit(), y)
        true = slope_of(lambda x, y: of_logits(x, y).sum(), p.logit(), y)
    torch.testing.assert_close(found, true, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"gamma": 2.0, "label_smoothing": 0.1}, {"pos_weight": 3.0}], ids=str)
def test_derivatives_of_both_orders(options: dict[str, Any]) -> None:
    p, y = case(soft=True, shape=(1, 1, 2, 4), dtype=torch.float64)
    p = p.clamp(0.05, 0.95).requires_grad_()
    loss = IoUCELoss(**options)
    with use_kernel("tiled"):
        assert gradcheck(lambda x: loss(x, y), (p,))
    with use_kernel("reference"):
        assert gradcheck(lambda x: loss(x, y), (p,))
        assert gradgradcheck(lambda x: loss(x, y), (p,))


def test_voxel_sums_of_one_channel() -> None:
    p, y = case()
    sums = voxel_sums(p, y, activation=None)
    torch.testing.assert_close(sums.cross_entropy, F.binary_cross_entropy(p, y, reduction="none").sum((2, 3)))
    groups = (torch.arange(63) % 3).view(1, 1, 7, 9).expand(2, 1, 7, 9)
    torch.testing.assert_close(voxel_sums(p, y, activation=None, groups=groups).over_groups().rows, sums.rows)


WITHOUT_EFFECT = [
    *itertools.product(
        [IoULoss, IoUCELoss, FocalTverskyLoss],
        [{"softmax": True}, {"include_background": False}, {"to_onehot_y": True}],
    ),
    # whose default is softmax=True, which nobody chose
    *itertools.product([WeightedCrossEntropyLoss], [{"include_background": False}, {"to_onehot_y": True}]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "options"), WITHOUT_EFFECT, ids=str)
def test_options_without_effect_leave_one_graph_of_torch_compile(loss: Any, options: dict[str, bool]) -> None:
    torch.compiler.reset()
    chosen = loss(**{"sigmoid": "softmax" not in options, "softmax": False, **options})
    logits, labels = torch.randn(2, 1, 6, 5), torch.randint(0, 2, (2, 1, 6, 5))
    found = torch.compile(chosen, backend="eager", fullgraph=True)(logits, labels)
    name, value = next(iter(options.items()))
    with pytest.warns(UserWarning, match=rf"^single channel prediction, `{name}={value}` ignored\.$"):
        torch.testing.assert_close(found, chosen(logits, labels))
