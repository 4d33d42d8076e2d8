"""Every loss against kornia and torchmetrics, where they have the same one, in value, gradient and ignored voxels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from monai_iou import (
    FocalTverskyLoss,
    GeneralizedIoULoss,
    IoULoss,
    LovaszHingeLoss,
    LovaszSoftmaxLoss,
    WeightedCrossEntropyLoss,
)

kornia = pytest.importorskip("kornia.losses", reason="kornia is not installed")
classification = pytest.importorskip("torchmetrics.functional.classification", reason="torchmetrics is not installed")
segmentation = pytest.importorskip("torchmetrics.functional.segmentation", reason="torchmetrics is not installed")

IGNORED = 255
WEIGHT = [0.25, 0.75, 2.0]  # of mean 1: kornia divides by the sum of the weights, MONAI and we by the number of classes
Call = Callable[[Tensor], Tensor]


def pair(seed: int = 0, shape: tuple[int, ...] = (2, 3, 9, 8)) -> tuple[Tensor, Tensor]:
    """Return logits and a label map (B, 1, *S) in which every image has every class and some ignored voxels."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) * 2
    labels = (torch.rand((shape[0], 1, *shape[2:]), generator=generator) ** 2 * shape[1]).long()
    assert all((labels[image] == c).any() for image in range(shape[0]) for c in range(shape[1]))
    labels[..., ::5] = IGNORED
    return logits, labels


def assert_same(ours: Call, theirs: Call, logits: Tensor) -> None:
    """Compare values and gradients, in float64 and in float32."""
    for x in (logits, logits.float()):
        results = []
        for call in (ours, theirs):
            leaf = x.detach().clone().requires_grad_()
            value = call(leaf)
            results.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
        (value, slope), (expected, expected_slope) = results
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(slope, expected_slope, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("alpha", "beta"), [(0.3, 0.7), (0.5, 0.5), (1.0, 1.0), (0.0, 1.0)])
def test_tversky_is_kornias(alpha: float, beta: float) -> None:
    logits, labels = pair()
    ours = FocalTverskyLoss(
        alpha=alpha, beta=beta, gamma=1.0, softmax=True, smooth_nr=0.0, smooth_dr=1e-8, ignore_index=IGNORED
    )
    assert_same(
        lambda x: ours(x, labels),
        lambda x: kornia.tversky_loss(x, labels[:, 0], alpha, beta, ignore_index=IGNORED),
        logits,
    )


def test_skip_is_kornias_mean_over_the_classes_that_are_there() -> None:
    logits, labels = pair()
    labels = labels[:1].where(labels[:1] != 2, 0)
    ours = IoULoss(softmax=True, smooth_nr=0.0, smooth_dr=1e-8, ignore_index=IGNORED, empty="skip")
    assert_same(
        lambda x: ours(x, labels),
        lambda x: kornia.tversky_loss(x, labels[:, 0], 1.0, 1.0, ignore_index=IGNORED),
        logits[:1],
    )


def test_class_weights_are_kornias() -> None:
    logits, labels = pair()
    ours = FocalTverskyLoss(
        0.5, 0.5, 1.0, softmax=True, smooth_nr=0.0, smooth_dr=1e-8, weight=WEIGHT, ignore_index=IGNORED
    )

    def theirs(x: Tensor) -> Tensor:
        weight = torch.tensor(WEIGHT, dtype=x.dtype)
        value: Tensor = kornia.dice_loss(x, labels[:, 0], "macro", weight=weight, ignore_index=IGNORED)
        return value

    assert_same(lambda x: ours(x, labels), theirs, logits)


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_uniform_generalised_iou_is_kornias_micro_dice(weight: list[float] | None) -> None:
    logits, labels = pair()
    options: dict[str, Any] = {"smooth_nr": 0.0, "smooth_dr": 0.0, "ignore_index": IGNORED, "reduction": "none"}
    ours = GeneralizedIoULoss("uniform", softmax=True, weight=weight, **options)

    def as_dice(x: Tensor) -> Tensor:
        iou = 1 - ours(x, labels)
        return 1 - (2 * iou / (1 + iou)).mean()

    def theirs(x: Tensor) -> Tensor:
        factors = None if weight is None else torch.tensor(weight, dtype=x.dtype)
        value: Tensor = kornia.dice_loss(x, labels[:, 0], "micro", 0.0, factors, IGNORED)
        return value

    assert_same(as_dice, theirs, logits)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_focal_is_kornias(gamma: float, weight: list[float] | None) -> None:
    logits, labels = pair()
    ours = WeightedCrossEntropyLoss(weight, gamma, reduction="sum", ignore_index=IGNORED)

    def theirs(x: Tensor) -> Tensor:
        factors = None if weight is None else torch.tensor(weight, dtype=x.dtype)
        value: Tensor = kornia.focal_loss(x, labels[:, 0], None, gamma, "sum", factors, IGNORED)
        return value

    assert_same(lambda x: ours(x, labels), theirs, logits)
    kept = int((labels != IGNORED).sum())
    mean = WeightedCrossEntropyLoss(gamma=gamma, ignore_index=IGNORED)
    expected = kornia.focal_loss(logits, labels[:, 0], None, gamma, "sum", None, IGNORED) / kept
    torch.testing.assert_close(mean(logits, labels), expected, rtol=1e-5, atol=1e-6)


def test_alpha_of_kornias_focal_loss_is_a_class_weight() -> None:
    logits, labels = pair()
    ours = WeightedCrossEntropyLoss([0.75, 0.25, 0.25], 2.0, reduction="sum", ignore_index=IGNORED)
    assert_same(
        lambda x: ours(x, labels),
        lambda x: kornia.focal_loss(x, labels[:, 0], 0.25, 2.0, "sum", None, IGNORED),
        logits,
    )


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_binary_focal_is_kornias(gamma: float) -> None:
    logits, labels = pair()
    maps = torch.cat([labels == 1, labels > 0, labels == 0], 1).double()  # multi-label
    ours = WeightedCrossEntropyLoss(gamma=gamma, sigmoid=True)
    assert_same(
        lambda x: ours(x, maps),
        lambda x: kornia.binary_focal_loss_with_logits(x, maps.to(x), None, gamma, "mean"),
        logits,
    )


def test_sorted_lovasz_losses_are_kornias() -> None:
    logits, labels = pair()
    labels = labels.clamp_max(2)
    softmax = LovaszSoftmaxLoss(classes="all", bins=None, softmax=True, weight=WEIGHT)

    def theirs(x: Tensor) -> Tensor:
        value: Tensor = kornia.lovasz_softmax_loss(x, labels[:, 0], torch.tensor(WEIGHT, dtype=x.dtype))
        return value

    assert_same(lambda x: softmax(x, labels), theirs, logits)
    hinge, binary = LovaszHingeLoss(bins=None), labels.clamp_max(1)
    assert_same(
        lambda x: hinge(x, binary), lambda x: kornia.lovasz_hinge_loss(x, binary[:, 0].to(x.dtype)), logits[:, :1]
    )


def test_lovasz_of_histograms_is_kornias_within_half_a_bin() -> None:
    logits, labels = pair()
    labels = labels.clamp_max(2)
    expected = kornia.lovasz_softmax_loss(logits, labels[:, 0]).item()
    for bins in (64, 512):
        value = LovaszSoftmaxLoss(classes="all", bins=bins, softmax=True)(logits, labels).item()
        assert value == pytest.approx(expected, abs=1 / (2 * bins))


def hard(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return class numbers found (B, *S), the same as maps (B, C, *S), and a label map (B, 1, *S)."""
    logits, labels = pair(seed, (3, 3, 7, 6, 5))
    found = logits.argmax(1)
    return found, torch.nn.functional.one_hot(found, 3).movedim(-1, 1).float(), labels


@pytest.mark.parametrize("average", ["macro", "none"])
def test_a_hard_prediction_costs_one_minus_torchmetrics_jaccard_index(average: str) -> None:
    found, maps, labels = hard(1)
    jaccard = classification.multiclass_jaccard_index(found, labels[:, 0], 3, average=average, ignore_index=IGNORED)
    options: dict[str, Any] = {"batch": True, "reduction": "none" if average == "none" else "mean"}
    region = IoULoss(smooth_nr=0.0, smooth_dr=0.0, ignore_index=IGNORED, **options)
    for loss in (region, LovaszSoftmaxLoss(bins=None, ignore_index=IGNORED, **options)):
        torch.testing.assert_close(loss(maps, labels).squeeze(), 1 - jaccard, rtol=1e-5, atol=1e-6)


def test_a_hard_prediction_costs_one_minus_torchmetrics_scores_of_each_image() -> None:
    found, maps, labels = hard(2)
    labels = labels.clamp_max(2)
    iou = segmentation.mean_iou(found, labels[:, 0], 3, per_class=True, input_format="index")
    ours = IoULoss(smooth_nr=0.0, smooth_dr=0.0, reduction="none")(maps, labels)
    torch.testing.assert_close(ours.flatten(1), 1 - iou, rtol=1e-5, atol=1e-6)
    dice = segmentation.dice_score(found, labels[:, 0], 3, average="macro", input_format="index")
    tversky = FocalTverskyLoss(0.5, 0.5, 1.0, smooth_nr=0.0, smooth_dr=0.0)
    torch.testing.assert_close(tversky(maps, labels), 1 - dice.mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("w_type", "theirs"), [("square", "square"), ("simple", "simple"), ("uniform", "linear")])
def test_generalised_iou_of_a_hard_prediction_is_torchmetrics_generalised_dice(w_type: str, theirs: str) -> None:
    found, maps, labels = hard(3)
    labels = labels.clamp_max(2)
    dice = segmentation.generalized_dice_score(found, labels[:, 0], 3, weight_type=theirs, input_format="index")
    iou = 1 - GeneralizedIoULoss(w_type, smooth_nr=0.0, smooth_dr=0.0, reduction="none")(maps, labels).flatten()
    torch.testing.assert_close(2 * iou / (1 + iou), dice, rtol=1e-5, atol=1e-6)
