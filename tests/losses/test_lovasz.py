"""Lovasz losses: against the paper's definition, against each other, and what they promise."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gloo_ranks import join_group, leave_group, run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.losses import DeepSupervisionLoss
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from monai_iou.losses.lovasz import LovaszHingeLoss, LovaszSoftmaxLoss
from monai_iou.scores import lovasz
from monai_iou.voxels import sorted_errors
from monai_iou.voxels.passes import error_histograms
from monai_iou.voxels.sorted_errors import lovasz_extension

BINS = [64, None]


def jaccard_loss(wrong: Tensor, foreground: Tensor) -> float:
    """J of a set of wrongly predicted voxels: 1 - IoU of the prediction that is wrong there."""
    union = (foreground | wrong).sum().item()
    return 1 - (foreground & ~wrong).sum().item() / union if union else 0.0


def extension(errors: Tensor, foreground: Tensor) -> float:
    """Definition 1 of the paper, set by set: sum of m_i (J({1..i}) - J({1..i-1})) over errors m in falling order."""
    wrong, before, total = torch.zeros_like(foreground), 0.0, 0.0
    for voxel in errors.argsort(descending=True).tolist():
        wrong[voxel] = True
        after = jaccard_loss(wrong, foreground)
        total, before = total + errors[voxel].item() * (after - before), after
    return total


def integral(errors: Tensor, foreground: Tensor) -> float:
    """The integral of J({errors >= t}), exactly: J is constant between neighbouring errors."""
    levels = [0.0, *errors.double().unique().tolist()]
    return sum(
        (high - low) * jaccard_loss(errors >= high, foreground) for low, high in itertools.pairwise(levels)
    )  # fmt: skip


def slow_softmax(probabilities: Tensor, labels: Tensor, classes: str = "present") -> float:
    """The mean over images of the mean over classes, of (B, C, N) and (B, N)."""
    images = []
    for p, label in zip(probabilities, labels, strict=True):
        terms = [
            extension(((label == c).to(p) - p[c]).abs(), label == c)
            for c in range(len(p))
            if classes == "all" or (label == c).any()
        ]
        images.append(sum(terms) / len(terms))
    return sum(images) / len(images)


def case(*shape: int, seed: int = 0, scale: float = 2.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, max(2, shape[1]), (shape[0], 1, *shape[2:]), generator=generator)
    return logits.requires_grad_(), labels


def gradient(loss: nn.Module, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    value = loss(logits, target)
    return value.detach(), torch.autograd.grad(value, logits)[0]


@st.composite
def error_sets(draw):
    """Errors where rounding hurts most: on cell edges, equal, at the ends, crowded, or anywhere."""
    bins = draw(st.sampled_from([1, 2, 3, 16, 100]))
    edges = [1 - ((j + 0.5) / (2 * bins)) ** 2 + shift for j in range(2 * bins) for shift in (-1e-9, 0, 1e-9)]
    level = st.one_of(st.sampled_from(edges), st.floats(0, 1), st.sampled_from([0.0, 1.0, 0.5, 1e-7, 1 - 1e-7]))
    few = draw(st.lists(level, min_size=1, max_size=3))
    values = draw(st.lists(st.one_of(st.sampled_from(few), level), min_size=1, max_size=40))
    mostly = draw(st.sampled_from([0.02, 0.5, 0.98]))
    count = len(values)
    foreground = draw(st.lists(st.floats(0, 1).map(lambda u: u < mostly), min_size=count, max_size=count))
    return bins, torch.tensor(values, dtype=torch.float64).clamp(0, 1), torch.tensor(foreground)


@given(error_sets())
@settings(max_examples=150, deadline=None)
def test_value_within_half_a_bin_of_the_paper(drawn):
    bins, errors, foreground = drawn
    p = torch.where(foreground, 1 - errors, errors)[None, None]
    target = foreground[None, None]
    exact = extension(errors, foreground)
    assert integral(errors, foreground) == pytest.approx(exact, abs=1e-9)
    assert LovaszSoftmaxLoss("all", None)(p, target).item() == pytest.approx(exact, abs=1e-9)
    assert abs(LovaszSoftmaxLoss("all", bins)(p, target).item() - exact) <= 1 / (2 * bins) + 1e-9


@given(error_sets(), st.floats(0.01, 100))
@settings(max_examples=150, deadline=None)
def test_hinge_within_half_a_bin_of_its_range(drawn, scale):
    bins, errors, foreground = drawn
    errors = errors * 3 - 1  # of which those below 0 cost nothing
    signs = 2 * foreground.double() - 1
    logits = ((1 - errors) * signs * scale)[None, None]
    hinge = (1 - signs * logits[0, 0]).clamp_min(0)
    exact = extension(hinge, foreground)
    target = foreground[None, None].float()
    assert LovaszHingeLoss(None)(logits, target).item() == pytest.approx(exact, rel=1e-9, abs=1e-9)
    error = abs(LovaszHingeLoss(bins)(logits, target).item() - exact)
    assert error <= hinge.max().item() * (1 / (2 * bins) + 1e-9)


@pytest.mark.parametrize("shape", [(2, 3, 40), (1, 2, 1, 1, 1), (3, 7, 5, 1, 9), (2, 5, 17, 13)])
@pytest.mark.parametrize("classes", ["present", "all"])
def test_softmax_matches_the_paper(shape, classes):
    logits, labels = case(*shape, dtype=torch.float64)
    slow = slow_softmax(logits.detach().softmax(1).flatten(2), labels.flatten(1), classes)
    assert LovaszSoftmaxLoss(classes, None, softmax=True)(logits, labels).item() == pytest.approx(slow, abs=1e-9)
    assert LovaszSoftmaxLoss(classes, softmax=True)(logits, labels).item() == pytest.approx(slow, abs=1 / 4096)


@pytest.mark.parametrize("bins", BINS)
def test_sigmoid_channels_are_classes_of_their_own(bins):
    logits, _ = case(2, 3, 6, 7, dtype=torch.float64)
    maps = torch.rand(2, 3, 6, 7, generator=torch.Generator().manual_seed(1)) < 0.3
    p = logits.detach().sigmoid()
    pairs = zip(maps.flatten(0, 1), p.flatten(0, 1), strict=True)
    terms = [extension((y.double() - q).abs().flatten(), y.flatten()) for y, q in pairs]
    for target in (maps, maps.float(), maps.to(torch.uint8)):
        found = LovaszSoftmaxLoss(bins=bins, sigmoid=True)(logits, target).item()
        assert found == pytest.approx(sum(terms) / 6, abs=1 / 128 if bins else 1e-9)


@pytest.mark.parametrize("bins", [1, 64, 2048, 100, None])
def test_hard_predictions_give_one_minus_iou(bins):
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 4, (2, 1, 9, 8, 7), generator=generator)
    found = torch.randint(0, 4, (2, 9, 8, 7), generator=generator)
    hard = F.one_hot(found, 4).movedim(-1, 1).float()
    truth = F.one_hot(labels[:, 0], 4).movedim(-1, 1)
    iou = torch.minimum(hard, truth).flatten(2).sum(-1) / torch.maximum(hard, truth).flatten(2).sum(-1)
    terms = LovaszSoftmaxLoss(bins=bins, reduction="none")(hard, labels)
    assert terms.shape == (2, 4, 1, 1, 1)
    torch.testing.assert_close(terms.flatten(1), 1 - iou, rtol=0, atol=2e-7)
    hinge = LovaszHingeLoss(bins, reduction="none")(2 * hard[:, 1:2] - 1, labels == 1)
    torch.testing.assert_close(hinge.flatten(), 2 * (1 - iou[:, 1]), rtol=0, atol=4e-7)  # errors are 0 or 2


@pytest.mark.parametrize("bins", BINS)
def test_all_wrong_costs_one(bins):
    """Kornia 0.8 sorts class numbers in place of errors and gives 0.5 here."""
    labels = torch.tensor([[[0, 1, 0, 1, 1, 0]]])
    wrong = F.one_hot(1 - labels[:, 0], 2).movedim(-1, 1).float() * 40 - 20
    assert LovaszSoftmaxLoss(bins=bins, softmax=True)(wrong, labels).item() == pytest.approx(1.0, abs=1e-6)
    assert LovaszSoftmaxLoss(bins=bins, softmax=True)(-wrong, labels).item() == pytest.approx(0.0, abs=1e-6)


def lesion(volume: int) -> tuple[Tensor, Tensor]:
    """A ball of so many voxels in 128^3: label map and squared distance from its centre."""
    axis = torch.arange(128.0)
    distance = (axis[:, None, None] - 60.3) ** 2 + (axis[:, None] - 71.2) ** 2 + (axis - 50.6) ** 2
    threshold = distance.flatten().kthvalue(volume).values
    return (distance <= threshold)[None, None], distance


def prediction(kind: str, volume: int, distance: Tensor, seed: int) -> Tensor:
    """Foreground logits that are blurred and noisy, as after some training, or random."""
    noise = torch.randn(1, 1, 128, 128, 128, generator=torch.Generator().manual_seed(seed))
    if kind == "random":
        return noise[0, 0] * 2**0.5
    radius = (3 * volume / 12.566) ** (1 / 3)
    smooth = 3 * F.avg_pool3d(noise, 3, 1, 1)[0, 0]
    return (radius + (0.7 if kind == "blurred" else -1.0) - distance.sqrt()).clamp_min(-6) * 1.2 + smooth


@pytest.mark.parametrize("volume", [20, pytest.param(400, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["blurred", "shrunk", "random"])
def test_gradient_direction(kind, volume):
    label, distance = lesion(volume)
    assert label.sum() == volume
    foreground = prediction(kind, volume, distance, seed=volume)
    logits = torch.stack([torch.zeros_like(foreground), foreground]).unsqueeze(0).requires_grad_()
    exact_value, exact = gradient(LovaszSoftmaxLoss(bins=None, softmax=True), logits, label)
    value, found = gradient(LovaszSoftmaxLoss(softmax=True), logits, label)
    assert abs(value - exact_value) < 1 / 4096
    exact, found = exact.double().flatten(), found.double().flatten()
    assert F.cosine_similarity(exact, found, 0) > 0.999
    assert (found.norm() / exact.norm()).item() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("options", [{"softmax": True}, {"sigmoid": True}, {"softmax": True, "batch": True}])
def test_directional_derivative_is_that_of_the_exact_value(options):
    logits, labels = case(2, 3, 30, 30, dtype=torch.float64)
    exact = LovaszSoftmaxLoss(bins=None, **options)
    _, slope = gradient(LovaszSoftmaxLoss(bins=4096, **options), logits, labels)
    for seed in range(3):
        direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        direction = direction + 5 * slope / slope.abs().max()
        step = 1e-4 * direction
        with torch.no_grad():
            rise = (exact(logits + step, labels) - exact(logits - step, labels)) / 2e-4
        assert (slope * direction).sum().item() == pytest.approx(rise.item(), rel=0.01, abs=1e-4)


def test_hinge_gradient_and_margin():
    logits, labels = case(2, 1, 40, 40, dtype=torch.float64)
    _, exact = gradient(LovaszHingeLoss(None), logits, labels)
    _, found = gradient(LovaszHingeLoss(), logits, labels)
    assert F.cosine_similarity(exact.flatten(), found.flatten(), 0) > 0.999
    right = (logits.detach() > 0) == (labels == 1)
    assert not found[right & (logits.detach().abs() > 1)].any()
    value, still = gradient(LovaszHingeLoss(), (5.0 * (2 * labels - 1)).requires_grad_(), labels)
    assert value == 0
    assert not still.any()


@pytest.mark.parametrize("ignore_index", [None, 2])
def test_exact_form_passes_gradcheck(ignore_index):
    logits, labels = case(2, 3, 11, dtype=torch.float64)
    for options in ({"softmax": True}, {"sigmoid": True, "batch": True}, {"softmax": True, "classes": "all"}):
        loss = LovaszSoftmaxLoss(bins=None, ignore_index=ignore_index, **options)
        assert torch.autograd.gradcheck(lambda x, loss=loss: loss(x, labels), logits)
    binary = (labels > 0).float()
    assert torch.autograd.gradcheck(lambda x: LovaszHingeLoss(None)(x, binary), logits[:, :1].detach().requires_grad_())


def test_an_absent_class_costs_its_largest_probability():
    logits, _ = case(1, 1, 5, 5, dtype=torch.float64)
    empty = torch.zeros(1, 1, 5, 5)
    largest = logits.detach().sigmoid().max().item()
    assert LovaszSoftmaxLoss("all", None, sigmoid=True)(logits, empty).item() == pytest.approx(largest)
    value, slope = gradient(LovaszSoftmaxLoss("all", 512, sigmoid=True), logits, empty)
    assert value.item() == pytest.approx(largest, abs=1 / 1024)
    top = slope.flatten().nonzero().flatten()
    assert logits.flatten().argmax() in top
    assert slope.sum().item() == pytest.approx(largest * (1 - largest), rel=1e-2)
    for bins in BINS:
        value, slope = gradient(LovaszSoftmaxLoss(bins=bins, sigmoid=True), logits, empty)
        assert value == 0
        assert not slope.any()


@pytest.mark.parametrize("bins", BINS)
def test_present_is_a_subset_mean_per_image_or_batch(bins):
    logits, _ = case(2, 3, 50, dtype=torch.float64)
    labels = torch.zeros(2, 1, 50, dtype=torch.long)
    labels[0, 0, :20] = 1
    loss = LovaszSoftmaxLoss(bins=bins, softmax=True)
    slow = slow_softmax(logits.detach().softmax(1), labels[:, 0])
    assert loss(logits, labels).item() == pytest.approx(slow, abs=1 / 128 if bins else 1e-9)
    joined, joined_labels = logits.detach().transpose(0, 1).flatten(1).unsqueeze(0), labels.flatten()[None, None]
    together = LovaszSoftmaxLoss(bins=bins, softmax=True, batch=True)(logits, labels)
    torch.testing.assert_close(together, loss(joined, joined_labels))
    without = LovaszSoftmaxLoss(bins=bins, softmax=True, include_background=False, reduction="none")(logits, labels)
    assert without.shape == (2, 2, 1)
    assert without.flatten()[1:].tolist() == [0, 0, 0]  # absent: class 2, and both of the second image
    mean = LovaszSoftmaxLoss(bins=bins, softmax=True, include_background=False)(logits, labels)
    assert mean.item() == pytest.approx(without.sum().item() / 2)


@pytest.mark.parametrize("bins", BINS)
@pytest.mark.parametrize("batch", [False, True])
def test_targets_of_every_kind_agree(bins, batch):
    logits, labels = case(2, 4, 6, 5, 3)
    loss = LovaszSoftmaxLoss(bins=bins, softmax=True, batch=batch)
    value, slope = gradient(loss, logits, labels)
    onehot = F.one_hot(labels[:, 0], 4).movedim(-1, 1)
    for target in (
        labels.to(torch.uint8),
        labels.float(),
        labels.to(torch.int16),
        onehot,
        onehot.float(),
        onehot.bool(),
    ):
        other, other_slope = gradient(loss, logits, target)
        assert torch.equal(other, value)
        assert torch.equal(other_slope, slope)
    plain = loss(MetaTensor(logits.detach()), MetaTensor(labels))
    assert type(plain) is Tensor
    assert torch.equal(plain, value)


@pytest.mark.parametrize("bins", BINS)
def test_order_of_voxels_and_classes_does_not_matter(bins):
    logits, labels = case(1, 4, 200)
    loss = LovaszSoftmaxLoss(bins=bins, softmax=True)
    value, slope = gradient(loss, logits, labels)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    other, other_slope = gradient(loss, logits.detach()[..., order].requires_grad_(), labels[..., order])
    torch.testing.assert_close(other, value)
    torch.testing.assert_close(other_slope, slope[..., order])
    swap = torch.tensor([2, 0, 3, 1])
    swapped = loss(logits.detach()[:, swap], swap.argsort()[labels])
    torch.testing.assert_close(swapped, value)
    strided = logits.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    other, other_slope = gradient(loss, strided, labels)
    torch.testing.assert_close(other_slope, slope)


@pytest.mark.parametrize("bins", BINS)
@pytest.mark.parametrize("form", ["labels", "maps", "hinge"])
def test_ignored_voxels_have_no_effect(bins, form):
    logits, labels = case(2, 1 if form == "hinge" else 3, 8, 9)
    ignored = torch.rand(2, 1, 8, 9, generator=torch.Generator().manual_seed(4)) < 0.3
    if form == "maps":
        target = torch.where(ignored, 0, F.one_hot(labels[:, 0], 3).movedim(-1, 1))
        loss: nn.Module = LovaszSoftmaxLoss(bins=bins, softmax=True, batch=True, ignore_index=255)
    else:
        target = torch.where(ignored, 255, labels)
        loss = LovaszSoftmaxLoss(bins=bins, softmax=True, batch=True, ignore_index=255)
        loss = LovaszHingeLoss(bins, batch=True, ignore_index=255) if form == "hinge" else loss
    value, slope = gradient(loss, logits, target)
    keep = ~ignored[:, 0]
    less = logits.detach().movedim(1, -1)[keep].T.unsqueeze(0).requires_grad_()
    other, other_slope = gradient(copy.deepcopy(loss), less, labels[:, 0][keep][None, None])
    torch.testing.assert_close(value, other)
    torch.testing.assert_close(slope.movedim(1, -1)[keep].T.unsqueeze(0), other_slope)
    assert not slope[ignored.expand_as(slope)].any()
    for junk in (float("nan"), float("inf"), 1e30):
        spoiled = torch.where(ignored, junk, logits.detach()).requires_grad_()
        other, other_slope = gradient(loss, spoiled, target)
        assert torch.equal(other, value)
        assert torch.equal(other_slope, slope)


@pytest.mark.parametrize("bins", BINS)
def test_nothing_to_score_is_a_zero_with_a_zero_gradient(bins):
    logits, labels = case(2, 3, 4, 4)
    ignored = torch.full_like(labels, 9)
    losses = [
        LovaszSoftmaxLoss(classes, bins, softmax=True, batch=batch, ignore_index=9)
        for classes in ("present", "all")
        for batch in (False, True)
    ]
    for loss in losses:
        value, slope = gradient(loss, logits, ignored)
        assert value.shape == ()
        assert value == 0
        assert not slope.any()
        value, slope = gradient(loss, logits[:0].detach().requires_grad_(), labels[:0])
        assert value.shape == ()
        assert value == 0
    value, slope = gradient(LovaszHingeLoss(bins, ignore_index=9), logits[:, :1].detach().requires_grad_(), ignored)
    assert value == 0
    assert not slope.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_single(dtype):
    logits, labels = case(1, 3, 16, 16, 16)
    half = logits.detach().to(dtype).requires_grad_()
    loss = LovaszSoftmaxLoss(softmax=True)
    value, slope = gradient(loss, half, labels)
    full, full_slope = gradient(loss, half.detach().float().requires_grad_(), labels)
    assert value.dtype == torch.float32
    assert slope.dtype == dtype
    assert torch.equal(value, full)
    torch.testing.assert_close(slope.float(), full_slope, rtol=1e-2, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(half, labels), full)
    hinge = LovaszHingeLoss()(half[:, :1] * 100, labels > 0)
    assert torch.isfinite(hinge)


def test_same_bits_again_and_scaled_upstream():
    logits, labels = case(2, 5, 20, 20, 20)
    loss = LovaszSoftmaxLoss(softmax=True, batch=True)
    value, slope = gradient(loss, logits, labels)
    again, again_slope = gradient(loss, logits, labels)
    assert torch.equal(value, again)
    assert torch.equal(slope, again_slope)
    scaled = torch.autograd.grad(-3 * loss(logits, labels), logits)[0]
    torch.testing.assert_close(scaled, -3 * slope)
    terms = LovaszSoftmaxLoss(softmax=True, reduction="none")(logits, labels)
    first = torch.autograd.grad(terms[0, 1].sum(), logits)[0]
    assert first[0].any()
    assert not first[1].any()


def test_second_derivatives_exist_for_the_sort_only():
    logits, labels = case(1, 2, 9, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="has no second derivative: take bins=None"):
        torch.autograd.grad(LovaszSoftmaxLoss(softmax=True)(logits, labels), logits, create_graph=True)
    loss = LovaszSoftmaxLoss(bins=None, softmax=True)
    assert torch.autograd.gradgradcheck(lambda x: loss(x, labels), logits)


@pytest.mark.parametrize("bins", BINS)
def test_nan_in_gives_nan_out(bins):
    logits, labels = case(1, 3, 20)
    spoiled = logits.detach().clone()
    spoiled[0, 1, 3] = float("nan")
    assert LovaszSoftmaxLoss(bins=bins, softmax=True)(spoiled, labels).isnan()
    assert LovaszHingeLoss(bins)(spoiled[:, 1:2], labels > 0).isnan()


def test_weights_and_reductions():
    logits, labels = case(2, 3, 30)
    terms = LovaszSoftmaxLoss(softmax=True, reduction="none")(logits, labels).squeeze(-1)
    weight = torch.tensor([0.0, 1.0, 4.0])
    torch.testing.assert_close(LovaszSoftmaxLoss(softmax=True)(logits, labels), terms.mean())
    torch.testing.assert_close(LovaszSoftmaxLoss(softmax=True, reduction="sum")(logits, labels), terms.sum())
    weighted = LovaszSoftmaxLoss(softmax=True, weight=[0.0, 1.0, 4.0])
    torch.testing.assert_close(weighted(logits, labels), (terms * weight).mean())
    assert "class_weight" in weighted.state_dict()
    scored = LovaszSoftmaxLoss(softmax=True, weight=[1.0, 4.0], include_background=False)(logits, labels)
    torch.testing.assert_close(scored, (terms[:, 1:] * weight[1:]).mean())
    batched = LovaszSoftmaxLoss(softmax=True, reduction="none", batch=True)(logits, labels)
    assert batched.shape == (3, 1)
    act = LovaszSoftmaxLoss(other_act=lambda x: x.softmax(1))
    expected = gradient(LovaszSoftmaxLoss(softmax=True), logits, labels)
    torch.testing.assert_close(gradient(act, logits, labels), expected)


def test_histograms_add_over_images():
    logits, labels = case(3, 4, 50)
    histograms = error_histograms(logits, labels, bins=32)
    parts = [error_histograms(logits[i : i + 1], labels[i : i + 1], bins=32) for i in range(3)]
    joined = parts[0] + parts[1] + parts[2]
    assert torch.equal(histograms.over_batch().counts, joined.counts)
    assert torch.equal(histograms.volume, F.one_hot(labels[:, 0], 4).sum(1))
    loss = LovaszSoftmaxLoss("all", 32, softmax=True, batch=True, reduction="none")(logits, labels)
    torch.testing.assert_close(lovasz(joined).float(), loss.squeeze(-1)[None])
    with pytest.raises(ValueError, match="Expected histograms with the same bins and limit"):
        parts[0] + error_histograms(logits[:1], labels[:1], bins=16)


def network() -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(2, 3, 3, padding=1).double()


RANK_LOSSES = {
    "softmax": lambda sync: LovaszSoftmaxLoss(softmax=True, batch=True, sync_batch=sync, ignore_index=9),
    "all": lambda sync: LovaszSoftmaxLoss("all", sigmoid=True, batch=True, sync_batch=sync),
    "hinge": lambda sync: LovaszHingeLoss(batch=True, sync_batch=sync),
}


def rank_case(name: str) -> tuple[Tensor, Tensor]:
    images, _ = case(5, 2, 7, 6, seed=1, dtype=torch.float64)
    _, labels = case(5, 3, 7, 6, seed=2)
    if name == "softmax":
        labels[1, 0, :3] = 9
    return images.detach(), (labels > 1).long() if name == "hinge" else labels


def step(name: str, model: nn.Module, images: Tensor, labels: Tensor, sync: bool) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    logits = model(images)
    loss = RANK_LOSSES[name](sync)(logits[:, :1] if name == "hinge" else logits, labels)
    (2.5 * loss).backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


def train_share(rank: int, world: int, shares: list[list[int]], folder: str) -> None:
    join_group(rank, world, folder)
    results = {}
    for name in RANK_LOSSES:
        images, labels = rank_case(name)
        model = DistributedDataParallel(network())
        results[name] = step(name, model, images[shares[rank]], labels[shares[rank]], sync=True)
    torch.save(results, Path(folder) / f"{rank}.pt")
    leave_group()


@pytest.mark.parametrize("shares", [[[0, 1, 2, 4], [3]], pytest.param([[0, 2], [], [4, 1, 3]], marks=pytest.mark.slow)])
def test_ranks_equal_one_process_on_the_joined_batch(shares, tmp_path):
    world = len(shares)
    run_ranks(train_share, world, world, shares, str(tmp_path))
    for name in RANK_LOSSES:
        images, labels = rank_case(name)
        value, slopes = step(name, network(), images, labels, sync=True)  # no ranks: sync does nothing
        for rank in range(world):
            found, found_slopes = torch.load(tmp_path / f"{rank}.pt")[name]
            torch.testing.assert_close(found, value)
            torch.testing.assert_close(found_slopes, slopes)


LOSSES = {
    "softmax": (LovaszSoftmaxLoss(softmax=True, weight=[1.0, 2.0, 3.0]), 3),
    "exact": (LovaszSoftmaxLoss(bins=None, softmax=True), 3),
    "hinge": (LovaszHingeLoss(), 1),
}


@pytest.mark.parametrize("name", LOSSES)
def test_copies_pickles_and_saves(name):
    loss, channels = LOSSES[name]
    logits, labels = case(1, channels, 5, 5)
    value = loss(logits, labels)
    torch.testing.assert_close(copy.deepcopy(loss)(logits, labels), value)
    torch.testing.assert_close(pickle.loads(pickle.dumps(loss))(logits, labels), value)
    memory = io.BytesIO()
    torch.save(loss.state_dict(), memory)
    memory.seek(0)
    loss.load_state_dict(torch.load(memory))


@pytest.mark.parametrize("name", LOSSES)
def test_works_inside_torch_compile(name):
    loss, channels = LOSSES[name]
    logits, labels = case(1, channels, 6, 6)
    value, slope = gradient(loss, logits, labels)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: loss(2 * x, labels), backend="aot_eager")
    found = compiled((logits / 2).detach().requires_grad_())
    torch.testing.assert_close(found, value)
    half = (logits / 2).detach().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(compiled(half), half)[0], 2 * slope)


def test_under_monai():
    logits, labels = case(2, 3, 16, 16)
    config = {"loss": {"_target_": "LovaszSoftmaxLoss", "softmax": True, "to_onehot_y": True}}
    loss = ConfigParser(config).get_parsed_content("loss")
    assert type(loss) is LovaszSoftmaxLoss
    deep = DeepSupervisionLoss(loss)
    small = F.avg_pool2d(logits, 2)
    value = deep([logits, small], labels.float())
    nearest = F.interpolate(labels.float(), size=(8, 8), mode="nearest-exact")
    torch.testing.assert_close(value, loss(logits, labels) + 0.5 * loss(small, nearest))
    value.backward()
    assert torch.isfinite(logits.grad).all()


def test_single_channel_warnings():
    logits, labels = case(1, 1, 5)
    with pytest.warns(UserWarning, match="single channel prediction, `softmax=True` ignored."):
        LovaszSoftmaxLoss(softmax=True)(logits.sigmoid(), labels)
    with pytest.warns(UserWarning, match="single channel prediction, `include_background=False` ignored."):
        LovaszSoftmaxLoss(sigmoid=True, include_background=False)(logits, labels)
    with pytest.warns(UserWarning, match="single channel prediction, `to_onehot_y=True` ignored."):
        LovaszHingeLoss(to_onehot_y=True)(logits, labels)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (
            lambda: LovaszSoftmaxLoss("some"),
            ValueError,
            "Expected `classes` to be one of 'present', 'all', but got 'some': choose one of these.",
        ),
        (
            lambda: LovaszSoftmaxLoss(bins=0),
            ValueError,
            "Expected `bins` to be from 1 to 16384, or None to sort exactly, but got 0: choose for example 2048.",
        ),
        (
            lambda: LovaszHingeLoss(bins=-4),
            ValueError,
            "Expected `bins` to be from 1 to 16384, or None to sort exactly, but got -4: choose for example 2048.",
        ),
        (
            lambda: LovaszSoftmaxLoss(bins=64.0),
            TypeError,
            "Expected `bins` to be an integer, or None to sort exactly, but got float: choose for example 2048.",
        ),
        (
            lambda: LovaszSoftmaxLoss(sigmoid=True, softmax=True),
            ValueError,
            "Expected at most one of `sigmoid`, `softmax` and `other_act`, but got sigmoid and softmax: "
            "keep the one that your classes need.",
        ),
        (
            lambda: LovaszSoftmaxLoss(sync_batch=True),
            ValueError,
            "Expected `batch` to be True with sync_batch=True, but got False: set batch=True, because summing over "
            "ranks joins their batches.",
        ),
        (
            lambda: LovaszHingeLoss(None, batch=True, sync_batch=True),
            ValueError,
            "Expected `bins` to be a number with sync_batch=True, but got None: give one, such as 2048, because only "
            "histograms can be summed over ranks.",
        ),
        (
            lambda: LovaszSoftmaxLoss(reduction="max"),
            ValueError,
            "Expected `reduction` to be one of 'mean', 'sum', 'none', but got 'max': choose one of these.",
        ),
        (
            lambda: LovaszSoftmaxLoss(sigmoid=True)(torch.zeros(1, 2, 4), torch.full((1, 2, 4), 0.25)),
            ValueError,
            "Expected `target` to hold hard per-class maps of 0 and 1, but got 0.25: the Lovasz extension is defined "
            "for hard labels; threshold the maps, or take IoULoss(soft_label=True).",
        ),
        (
            lambda: LovaszHingeLoss()(torch.zeros(1, 1, 4), torch.full((1, 1, 4), 3)),
            ValueError,
            "Expected `target` to hold values between 0 and 1 for an input with one channel, but got 3: pass "
            "`target > 0`, `target == 3` for this label alone, or ignore_index=3 to leave it out.",
        ),
        (
            lambda: LovaszHingeLoss()(torch.zeros(1, 2, 4), torch.zeros(1, 1, 4)),
            ValueError,
            "Expected `input` to have one channel of logits, but got 2: use LovaszSoftmaxLoss for several classes.",
        ),
        (
            lambda: LovaszSoftmaxLoss()(torch.full((1, 2, 4), -7.5), torch.zeros(1, 1, 4)),
            ValueError,
            "Expected `input` to hold probabilities between 0 and 1, because no activation is set, but got -7.5: "
            "for logits set softmax=True or sigmoid=True.",
        ),
        (
            lambda: LovaszSoftmaxLoss(softmax=True)(torch.zeros(1, 2, 4), torch.full((1, 1, 4), 2)),
            ValueError,
            "Expected `target` to hold the labels 0 to 1 of an input with 2 channels, but got 2: "
            "map the labels to consecutive classes, or set `ignore_index` to the value to leave out.",
        ),
        (
            lambda: LovaszSoftmaxLoss(bins=None, softmax=True)(torch.zeros(1, 2, 4), torch.full((1, 1, 4), 0.5)),
            ValueError,
            "Expected `target` to hold the labels 0 to 1 of an input with 2 channels, but got 0.5: "
            "give a soft target one channel per class, shape (B, 2, *S).",
        ),
        (
            lambda: LovaszSoftmaxLoss(weight=[1.0])(torch.zeros(1, 2, 4), torch.zeros(1, 1, 4)),
            ValueError,
            "Expected `weight` to hold 2 values, but got 1: give one weight per class.",
        ),
        (
            lambda: error_histograms(torch.zeros(1, 2, 4), torch.zeros(1, 1, 4), activation="relu"),
            ValueError,
            "Expected `activation` to be one of 'softmax', 'sigmoid', None, but got 'relu': choose one of these.",
        ),
    ],
)
def test_error_texts(make, error, text):
    with warnings.catch_warnings(), pytest.raises(error) as raised:
        make()
    assert str(raised.value) == text


def test_wrong_labels_behind_ignored_ones_are_found():
    labels = torch.tensor([[[0, 255, 1, 5]]])
    for bins in BINS:
        with pytest.raises(ValueError, match="but got 5"):
            LovaszSoftmaxLoss(bins=bins, softmax=True, ignore_index=255)(torch.zeros(1, 2, 4), labels)


@pytest.mark.parametrize("volume", [1, 30, 5000])
def test_sorting_in_float32_loses_no_digits_of_the_gradient(volume: int) -> None:
    """Against the steps of J in closed form, which are differences of no large numbers."""
    count = 100_000
    generator = torch.Generator().manual_seed(volume)
    order = torch.randperm(count, generator=generator)
    errors = ((1 + order.double()) / (1 + count)).float().requires_grad_()
    foreground = torch.zeros(count)
    foreground[torch.randperm(count, generator=generator)[:volume]] = 1
    (found,) = torch.autograd.grad(lovasz_extension(errors, foreground), errors)
    falling = order.argsort(descending=True)
    inside = foreground.double()[falling]
    f, b = inside.cumsum(0) - inside, (1 - inside).cumsum(0) - (1 - inside)
    steps = torch.where(inside == 1, 1 / (volume + b), (volume - f) / ((volume + b) * (volume + b + 1)))
    torch.testing.assert_close(found[falling].double(), steps, rtol=1e-4, atol=0)


def test_right_labels_of_more_voxels_than_float32_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sorted_errors, "lovasz_extension", lambda errors, foreground: errors[0] + foreground[0])
    labels = torch.zeros(1, 1, 2**24 + 3, dtype=torch.uint8)
    labels[..., 5] = 1
    logits = torch.zeros(1, 2, 1).expand(1, 2, labels.shape[2])
    assert LovaszSoftmaxLoss("all", bins=None, softmax=True)(logits, labels) == 1


class _Cumulated(TorchDispatchMode):
    """Record the dtypes of what is cumulated: floating-point numbers fail on a GPU with deterministic algorithms."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.cumsum.default:
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "loss", [LovaszSoftmaxLoss(sigmoid=True), LovaszSoftmaxLoss(sigmoid=True, bins=None), LovaszHingeLoss()]
)
def test_only_whole_numbers_are_cumulated(loss: nn.Module) -> None:
    logits = torch.randn(2, 1, 40, requires_grad=True)
    with _Cumulated() as seen:
        loss(logits, torch.arange(80).reshape(2, 1, 40) % 3 == 0).backward()
    assert set(seen.dtypes) == {torch.int64}
