"""The gradient by a soft target that requires one: it is that of the value, the weights by volume included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_cases import CASES, Case, gradient, one_hot, over, pair
from torch import Tensor

from monai_iou import GeneralizedIoULoss, IoUCELoss, LovaszSoftmaxLoss, MultiScaleLoss, scores

DERIVABLE = {name: case for name, case in CASES.items() if not case.local and not name.startswith("lovasz")}
W_TYPES = ("square", "simple", "uniform")


def soft_case(shape: tuple[int, ...] = (2, 3, 4)) -> tuple[Tensor, Tensor]:
    """Return logits and soft maps, in which no class is absent, as float64 leaves."""
    generator = torch.Generator().manual_seed(0)
    logits, maps = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return logits.requires_grad_(), maps.softmax(1).requires_grad_()


@over(DERIVABLE)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_it_is_that_of_the_value(case: Case, activation: str) -> None:
    assert torch.autograd.gradcheck(case(**{activation: True}), soft_case())


@pytest.mark.parametrize("w_type", W_TYPES)
@pytest.mark.parametrize(
    "options",
    [
        {"batch": True},
        {"empty": "skip", "include_background": False},
        {"weight": [1.0, 2.0, 3.0], "empty": "suppress"},
        {"soft_label": True},
        {"squared_pred": True, "reduction": "none"},
        {"smooth_nr": 0.0, "smooth_dr": 0.0},
    ],
    ids=str,
)
def test_volume_weights_take_part(w_type: str, options: dict[str, Any]) -> None:
    loss = GeneralizedIoULoss(w_type, softmax=True, **options)
    assert torch.autograd.gradcheck(loss, soft_case())
    assert torch.autograd.gradgradcheck(loss, soft_case((1, 3, 2)))


@pytest.mark.parametrize("w_type", W_TYPES)
@pytest.mark.parametrize("absent", [False, True])
def test_it_is_that_of_the_formula_written_out(w_type: str, absent: bool) -> None:
    logits, maps = soft_case()
    maps = (maps.detach() * torch.tensor([1.0, 1.0, float(not absent)]).view(1, 3, 1)).requires_grad_()
    found = torch.autograd.grad(GeneralizedIoULoss(w_type, softmax=True)(logits, maps), (logits, maps))
    total = torch.zeros((), dtype=torch.float64)
    for x, y in zip(logits.softmax(1).flatten(2), maps.flatten(2), strict=True):
        volumes = [each.sum() for each in y]
        weights = [1 / volume ** {"square": 2, "simple": 1, "uniform": 0}[w_type] for volume in volumes]
        if absent:
            weights[2] = max(weights[:2], key=lambda weight: float(weight.detach()))
        above = sum((w * (p * t).sum() for w, p, t in zip(weights, x, y, strict=True)), start=torch.tensor(1e-5))
        below = sum(
            (w * (p + t - p * t).sum() for w, p, t in zip(weights, x, y, strict=True)), start=torch.tensor(1e-5)
        )
        total = total + (1 - above / below) / 2
    torch.testing.assert_close(found, torch.autograd.grad(total, (logits, maps)), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("w_type", W_TYPES)
def test_labels_that_need_no_gradient_leave_that_of_the_logits(w_type: str) -> None:
    logits, labels = pair()
    loss, maps = GeneralizedIoULoss(w_type, softmax=True), one_hot(labels, 3)
    expected = gradient(loss, logits, labels)
    torch.testing.assert_close(gradient(loss, logits, maps), expected)
    torch.testing.assert_close(gradient(loss, logits, maps.requires_grad_()), expected)


@pytest.mark.parametrize("share", [1e-3, 1e-6, 1e-12, 1e-18, 1e-30, 1e-45, 0.0])
@pytest.mark.parametrize("w_type", W_TYPES)
def test_it_is_finite_for_a_class_of_nearly_no_volume(w_type: str, share: float) -> None:
    logits = torch.randn(1, 3, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    maps = torch.zeros(1, 3, 6)
    maps[:, 0], maps[0, 1, 0] = 1.0, share
    maps.requires_grad_()
    value = GeneralizedIoULoss(w_type, softmax=True, smooth_nr=0, smooth_dr=0)(logits, maps)
    assert all(slope.isfinite().all() for slope in torch.autograd.grad(value, (logits, maps)))


def test_weights_have_the_derivative_of_the_inverse_volume() -> None:
    volumes = torch.tensor([[8.0, 2.0, 0.0]], dtype=torch.float64, requires_grad=True)
    for w_type, slopes in {"simple": [-1 / 64, -1 / 4], "square": [-2 / 512, -2 / 8], "uniform": [0, 0]}.items():
        weights = scores.volume_weights(volumes, w_type)
        for index, slope in enumerate(slopes):
            found = (
                torch.autograd.grad(weights[0, index], volumes, retain_graph=True)[0] if weights.requires_grad else 0
            )
            expected = torch.zeros(1, 3, dtype=torch.float64)
            expected[0, index] = slope
            torch.testing.assert_close(found + torch.zeros_like(expected), expected)


def test_torch_func_gives_the_same() -> None:
    logits, maps = soft_case()
    loss = GeneralizedIoULoss(softmax=True)
    (expected,) = torch.autograd.grad(loss(logits, maps), maps)
    torch.testing.assert_close(torch.func.grad(lambda y: loss(logits.detach(), y))(maps.detach()), expected)


def test_it_passes_through_the_coarser_labels_of_area() -> None:
    logits, maps = soft_case((1, 2, 4, 4))
    loss = MultiScaleLoss(IoUCELoss(softmax=True))
    half = torch.randn(1, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(lambda x, y: loss([x, half], y), (logits, maps), atol=1e-4, rtol=1e-3, eps=1e-4)


def test_histograms_of_errors_refuse_a_target_that_requires_one() -> None:
    logits, labels = pair()
    with pytest.raises(ValueError, match="`target` to need no gradient"):
        LovaszSoftmaxLoss(softmax=True)(logits, one_hot(labels, 3).requires_grad_())
