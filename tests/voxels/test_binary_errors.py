"""Lovasz of one and two classes on a CPU: histograms and gradient of the general path, by one line of errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from monai_iou import LovaszSoftmaxLoss
from monai_iou.voxels import binary_errors
from monai_iou.voxels.error_gradient import read_errors, with_slopes
from monai_iou.voxels.histograms import ErrorHistograms
from monai_iou.voxels.inputs import Voxels
from monai_iou.voxels.passes import flatten_voxels
from monai_iou.voxels.spec import COUNT, TARGET, PassSpec

SPECS = {1: PassSpec("sigmoid", None, bins=40), 2: PassSpec("softmax", None, bins=40)}


@pytest.fixture(autouse=True)
def short_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binary_errors, "_SIZE", 17)


def case(classes: int, labels: torch.dtype = torch.int64, dtype: torch.dtype = torch.float64) -> Voxels:
    """Two images of a size that tiles do not divide; some errors are exactly 0, 1/2 and 1."""
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(2, classes, 7, 19, generator=generator, dtype=torch.float64) * 3
    logits[0, :, 0, :9] = 0
    logits[:, -1, 1, :4], logits[:, -1, 1, 4:8] = 1000, -1000
    target = torch.randint(0, 2, (2, 1, 7, 19), generator=generator)
    return flatten_voxels(logits.to(dtype), target.to(labels), None)


def read(voxels: Voxels, repeat: int = 1) -> tuple[Tensor, ErrorHistograms, Tensor]:
    """Return statistics, histograms, and the gradient of some function of the Lovasz extensions."""
    spec = SPECS[voxels.logits.shape[1]]
    leaf = voxels.logits.clone().requires_grad_()
    rows, errors = read_errors(replace(voxels, logits=leaf), spec, leaf.new_ones((1, 1)))
    values = with_slopes(torch.zeros_like(errors.counts[:, :, 0, 0], dtype=leaf.dtype), errors)
    weights = torch.arange(1.0, values.numel() + 1, dtype=leaf.dtype).view(values.shape)
    for turn in range(repeat):
        (gradient,) = torch.autograd.grad((values * weights).sum(), leaf, retain_graph=turn + 1 < repeat)
    return rows, errors, gradient


def general(voxels: Voxels, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, ErrorHistograms, Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(binary_errors, "covers", lambda *_: False)
        return read(voxels)


@pytest.mark.parametrize("repeat", [1, 3])
@pytest.mark.parametrize("labels", [torch.int64, torch.int32, torch.uint8, torch.bool])
@pytest.mark.parametrize("classes", [1, 2])
def test_counts_and_gradients_are_those_of_the_general_path(
    classes: int, labels: torch.dtype, repeat: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    voxels = case(classes, labels)
    assert binary_errors.covers(voxels, SPECS[classes])
    rows, errors, gradient = read(voxels, repeat)
    exact_rows, exact, exact_gradient = general(voxels, monkeypatch)
    torch.testing.assert_close(errors.counts, exact.counts)
    torch.testing.assert_close(rows[[TARGET, COUNT]], exact_rows[[TARGET, COUNT]])
    torch.testing.assert_close(gradient, exact_gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("classes", [1, 2])
def test_half_of_the_digits_move_few_voxels_by_one_cell(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    voxels = case(classes, dtype=torch.float32)
    found, exact = read(voxels)[1].counts, general(case(classes), monkeypatch)[1].counts
    assert (found.cumsum(-1) - exact.cumsum(-1)).abs().max() <= 1
    assert torch.equal(found.sum(-1), exact.sum(-1))


def test_what_the_classes_share_is_mirrored() -> None:
    counts = read(case(2))[1].counts
    assert torch.equal(counts[:, 0], counts[:, 1].flip(1))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("classes", [1, 2])
def test_logits_that_are_not_finite_take_the_general_path(
    classes: int, poison: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    voxels = case(classes)
    voxels.logits[1, -1, 40] = poison
    assert binary_errors.read(voxels, 82, torch.ones(1, 1)) is None
    torch.testing.assert_close(read(voxels)[1].counts, general(voxels, monkeypatch)[1].counts)


def test_labels_that_are_not_classes_raise_the_usual_error() -> None:
    for value in (2, -1, 200, 2**40):
        labels = torch.ones(1, 1, 40, dtype=torch.long)
        labels[..., 7] = value
        with pytest.raises(ValueError, match=f"{value}"):
            LovaszSoftmaxLoss(softmax=True)(torch.randn(1, 2, 40), labels)


def test_other_inputs_take_the_general_path() -> None:
    assert not binary_errors.covers(case(2, dtype=torch.bfloat16), SPECS[2])
    assert not binary_errors.covers(case(2, torch.float32), SPECS[2])
    assert not binary_errors.covers(case(2), replace(SPECS[2], cross_entropy=True))
    ignored = flatten_voxels(torch.randn(1, 2, 9), torch.tensor([[[0, 1, 255] * 3]]), 255)
    assert not binary_errors.covers(ignored, SPECS[2])


@pytest.mark.parametrize("classes", [1, 2])
def test_a_loss_without_a_gradient_keeps_nothing(classes: int) -> None:
    voxels = case(classes)
    with torch.no_grad():
        found = binary_errors.read(voxels, 82, torch.ones(1, 1))
    assert found is not None
    assert found[1].slopes is None
    torch.testing.assert_close(found[1].counts, read(voxels)[1].counts)


def test_a_second_derivative_is_an_error() -> None:
    logits = torch.randn(1, 2, 30, requires_grad=True)
    value = LovaszSoftmaxLoss(softmax=True)(logits, torch.ones(1, 1, 30, dtype=torch.long))
    with pytest.raises(RuntimeError, match="bins=None"):
        torch.autograd.grad(value, logits, create_graph=True)
