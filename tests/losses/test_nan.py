"""NaN in is NaN out, in every loss and score; infinite logits count as their limit or give no number."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from monai_iou import (
    AffinityLoss,
    CompoundLoss,
    ContextAttentionLoss,
    FocalIoULoss,
    FocalTverskyLoss,
    GeneralizedIoULoss,
    InstanceIoULoss,
    IoUCELoss,
    IoUFocalLoss,
    IoULoss,
    LogIoULoss,
    LovaszHingeLoss,
    LovaszSoftmaxLoss,
    MultiScaleLoss,
    VoxelSums,
    WeightedCrossEntropyLoss,
    scores,
    use_kernel,
    voxel_sums,
)
from monai_iou.voxels import passes, sorted_errors

NAN, INF = math.nan, math.inf
REGION: list[Callable[..., nn.Module]] = [
    IoULoss,
    lambda **o: IoULoss(power=2.0, **o),
    lambda **o: IoULoss(power=1.5, **o),
    lambda **o: IoULoss(soft_label=True, **o),
    LogIoULoss,
    lambda **o: LogIoULoss(gamma=0.5, **o),
    FocalIoULoss,
    lambda **o: FocalIoULoss(gamma=0.5, **o),
    FocalTverskyLoss,
    GeneralizedIoULoss,
    lambda **o: GeneralizedIoULoss("simple", **o),
]
ENTROPY: list[Callable[..., nn.Module]] = [
    WeightedCrossEntropyLoss,
    lambda **o: WeightedCrossEntropyLoss(gamma=2.0, **o),
    lambda **o: WeightedCrossEntropyLoss(gamma=1.5, label_smoothing=0.1, **o),
    lambda **o: WeightedCrossEntropyLoss(reduction="none", **o),
    IoUCELoss,
    IoUFocalLoss,
    lambda **o: IoUCELoss(label_smoothing=0.1, **o),
]
HARD: list[Callable[..., nn.Module]] = [
    LovaszSoftmaxLoss,
    lambda **o: LovaszSoftmaxLoss(bins=None, **o),
    lambda **o: LovaszSoftmaxLoss("all", **o),
    lambda **o: CompoundLoss([LovaszSoftmaxLoss(**o), IoULoss(**o), WeightedCrossEntropyLoss(**o)]),
    lambda **o: MultiScaleLoss(IoUCELoss(**o)),
    InstanceIoULoss,
    lambda **o: InstanceIoULoss("blob", **o),
]
LOSSES = [*REGION, *ENTROPY, *HARD]
KERNELS = ["reference", "tiled", pytest.param("compiled", marks=pytest.mark.slow)]


def case(channels: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return logits and labels, all classes present."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, max(channels, 2), (2, 1, 6, 5), generator=generator)
    return torch.randn(2, channels, 6, 5, generator=generator), labels


def is_nan(value: Tensor) -> bool:
    return bool(value.isnan().any())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("make", LOSSES)
def test_one_nan_makes_the_loss_nan(make: Callable[..., nn.Module], kernel: str) -> None:
    with use_kernel(kernel):
        for act in ({"softmax": True}, {"sigmoid": True}, {"softmax": False}):
            logits, labels = case()
            logits = logits if any(act.values()) else logits.softmax(1)
            loss = make(**act)
            assert not is_nan(loss(logits, labels))
            logits[1, 1, 2, 3] = NAN
            labels[1, 0, 2, 3] = 1
            leaf = logits.requires_grad_()
            value = loss(leaf, labels)
            assert is_nan(value), act
            value.sum().backward()
            assert leaf.grad is not None


@pytest.mark.parametrize("empty", ["smooth", "skip", "suppress"])
@pytest.mark.parametrize("make", REGION)
def test_nan_shows_through_the_rules_for_absent_classes(make: Callable[..., nn.Module], empty: str) -> None:
    for kernel in ("reference", "tiled"):
        for batch in (False, True):
            logits, labels = case()
            labels.clamp_max_(1)  # class 2 is absent
            logits[0, 2, 0, 0] = NAN
            with use_kernel(kernel):
                assert is_nan(make(sigmoid=True, empty=empty, batch=batch)(logits, labels))
                nothing = torch.zeros_like(labels)
                logits[0, 2, 0, 0] = 0
                assert not is_nan(make(softmax=True, empty=empty, include_background=False)(logits, nothing))
                logits[0, :, 0, 0] = NAN
                assert is_nan(make(softmax=True, empty=empty, include_background=False)(logits, nothing))


@pytest.mark.parametrize("make", LOSSES)
def test_one_channel(make: Callable[..., nn.Module]) -> None:
    logits, labels = case(1)
    for kernel in ("reference", "tiled"):
        with use_kernel(kernel):
            assert not is_nan(make(sigmoid=True)(logits, labels))
            assert is_nan(make(sigmoid=True)(logits.masked_fill(labels == 1, NAN), labels))


@pytest.mark.parametrize("bins", [2048, None])
@pytest.mark.parametrize("batch", [False, True])
def test_the_hinge(bins: int | None, batch: bool) -> None:
    logits, labels = case(1)
    logits[0, 0, 1, 1] = NAN
    assert is_nan(LovaszHingeLoss(bins, batch)(logits, labels))


def test_attention_and_affinity() -> None:
    maps, labels = torch.rand(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    labels[..., 1:3, 1:3] = 1
    assert not is_nan(ContextAttentionLoss(1.0)(maps, labels))
    assert is_nan(ContextAttentionLoss(1.0)(maps.masked_fill(labels == 1, NAN), labels))
    affinity = torch.rand(1, 16, 16)
    loss = AffinityLoss((4, 4))
    assert not is_nan(loss(affinity, labels))
    affinity[0, 3, 4] = NAN
    assert is_nan(loss(affinity, labels))


def test_ignored_nan_stays_without_effect() -> None:
    logits, labels = case()
    spoilt = logits.masked_fill(labels == 2, NAN)
    labels[labels == 2] = 255
    for make in (IoULoss, IoUCELoss, LovaszSoftmaxLoss, GeneralizedIoULoss, WeightedCrossEntropyLoss):
        loss = make(softmax=True, ignore_index=255)
        torch.testing.assert_close(loss(spoilt, labels), loss(logits, labels))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("make", [*REGION, *ENTROPY[:2], *HARD[:3]])
def test_a_softmax_over_infinity_is_no_number(make: Callable[..., nn.Module], kernel: str) -> None:
    for value in (INF, -INF):
        logits, labels = case()
        logits[1, slice(1, 2) if value > 0 else slice(None), 2, 3] = value
        with use_kernel(kernel):
            assert not make(softmax=True)(logits, labels).isfinite().all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("options", [{}, {"gamma": 2.0}, {"gamma": 0.5}], ids=str)
def test_a_class_ruled_out_by_minus_infinity_costs_nothing(options: dict[str, Any], kernel: str) -> None:
    logits, labels = case()
    labels.clamp_max_(1)
    logits[:, 2] = -INF
    for make in (WeightedCrossEntropyLoss, IoUCELoss, IoUFocalLoss):
        results = []
        for values in (logits, logits.clamp_min(-1e4)):
            leaf = values.clone().requires_grad_()
            with use_kernel(kernel):
                value = make(softmax=True, **options)(leaf, labels)
            (gradient,) = torch.autograd.grad(value, leaf)
            results.append((value.detach(), gradient))
        torch.testing.assert_close(*results)
    if not options:
        leaf = logits.clone().requires_grad_()
        expected = F.cross_entropy(leaf, labels[:, 0])
        (slope,) = torch.autograd.grad(expected, leaf)
        leaf = logits.clone().requires_grad_()
        with use_kernel(kernel):
            value = WeightedCrossEntropyLoss()(leaf, labels)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(torch.autograd.grad(value, leaf)[0], slope)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_label_smoothing_gives_nothing_to_a_class_ruled_out(gamma: float, kernel: str) -> None:
    logits, labels = case()
    labels.clamp_max_(1)
    logits = logits.repeat(1, 1, 20, 30)  # large enough for the compiled kernel
    labels = labels.repeat(1, 1, 20, 30)
    logits[:, 2] = -INF
    leaf = logits.clone().requires_grad_()
    loss = WeightedCrossEntropyLoss(label_smoothing=0.3, gamma=gamma)
    with use_kernel(kernel):
        value = loss(leaf, labels)
    log_p, y = leaf[:, :2].log_softmax(1), F.one_hot(labels[:, 0], 2).movedim(-1, 1)
    expected = (-(y * 0.7 + 0.1) * (1 - log_p.exp()) ** gamma * log_p).sum(1).mean()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(*(torch.autograd.grad(part, leaf)[0] for part in (value, expected)))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_infinite_logits_of_a_sigmoid_are_their_limit(gamma: float, kernel: str) -> None:
    logits, labels = case()
    maps = F.one_hot(labels[:, 0], 3).movedim(-1, 1).float()
    certain = torch.where(maps > 0, INF, -INF)
    loss = WeightedCrossEntropyLoss(sigmoid=True, gamma=gamma)
    with use_kernel(kernel):
        for values in (certain, torch.where(logits > 0, certain, logits)):
            leaf = values.clone().requires_grad_()
            value = loss(leaf, maps)
            torch.testing.assert_close(value, loss(values.clamp(-1e4, 1e4), maps))
            value.backward()
            assert leaf.grad is not None
            assert leaf.grad.isfinite().all()
        assert not loss(-certain, maps).isfinite() or loss(-certain, maps) > 1e30


@given(
    logit=st.floats(allow_nan=False, allow_infinity=False, width=32),
    gap=st.floats(min_value=20, max_value=120, width=32),
    power=st.sampled_from([1.0, 1.5, 2.0, 3.0]),
    smooth=st.sampled_from([0.0, 1e-5]),
)
@settings(deadline=None, max_examples=60)
def test_suppress_has_finite_gradients(logit: float, gap: float, power: float, smooth: float) -> None:
    labels = torch.zeros(1, 1, 8)
    for values in (torch.full((1, 1, 8), logit), torch.tensor([0.0, -gap]).view(1, 2, 1).expand(1, 2, 8)):
        for kernel in ("reference", "tiled"):
            leaf = values.clone().requires_grad_()
            loss = IoULoss(sigmoid=values.shape[1] == 1, softmax=values.shape[1] == 2, empty="suppress", power=power,
                           smooth_nr=smooth, smooth_dr=smooth)  # fmt: skip
            with use_kernel(kernel):
                value = loss(leaf, labels)
            (gradient,) = torch.autograd.grad(value, leaf)
            assert value.isfinite()
            assert gradient.isfinite().all()


@pytest.mark.parametrize("bad", ["all moved", 255.0, 0.5, NAN, -1.0])
def test_torch_compile_gives_nan_for_wrong_labels(bad: Any) -> None:
    logits, labels = case()
    wrong = labels + 256 if bad == "all moved" else labels.float().index_fill(3, torch.tensor([2]), bad)
    for loss in (IoULoss(softmax=True), IoUCELoss(softmax=True), IoULoss(softmax=True, ignore_index=2)):
        compiled = torch.compile(loss, backend="eager", fullgraph=True)
        assert is_nan(compiled(logits, wrong))
        torch.testing.assert_close(compiled(logits, labels), loss(logits, labels))
    maps = torch.compile(IoULoss(softmax=True), backend="eager", fullgraph=True)
    assert is_nan(maps(logits, torch.full_like(logits, 2.0)))


@pytest.mark.parametrize("bins", [2048, None])
@pytest.mark.parametrize("shape", [(1, 2, 0, 4), (0, 2, 4, 4)])
def test_lovasz_of_no_voxels_is_zero(bins: int | None, shape: tuple[int, ...]) -> None:
    labels = torch.zeros(shape[0], 1, *shape[2:], dtype=torch.long)
    for batch in (False, True):
        leaf = torch.zeros(shape, requires_grad=True)
        value = LovaszSoftmaxLoss(bins=bins, batch=batch, softmax=True)(leaf, labels)
        value.backward()
        assert value == 0
        assert leaf.grad is not None
        hinge = LovaszHingeLoss(bins, batch)(torch.zeros(labels.shape), labels)
        assert hinge == 0
    leaf = torch.randn(1, 2, 4, requires_grad=True)
    loss = LovaszSoftmaxLoss(bins=bins, softmax=True, ignore_index=255)
    value = loss(leaf, torch.full((1, 1, 4), 255))
    value.backward()
    assert value == 0
    assert leaf.grad is not None
    assert not leaf.grad.any()


def test_histograms_refuse_a_target_that_needs_a_gradient() -> None:
    logits, labels = case()
    maps = F.one_hot(labels[:, 0], 3).movedim(-1, 1).float().requires_grad_()
    with pytest.raises(ValueError, match=r"^Expected `target` to need no gradient with `bins`, but got one with .*\.$"):
        LovaszSoftmaxLoss(softmax=True)(logits, maps)
    with pytest.raises(ValueError, match="`target` to need no gradient"):
        LovaszHingeLoss()(logits[:, :1], maps[:, :1])
    with torch.no_grad():
        LovaszSoftmaxLoss(softmax=True)(logits, maps)


def test_scores_of_nan_are_nan() -> None:
    sums = voxel_sums(*case())
    spoilt = VoxelSums(sums.rows * NAN)
    overlap = (spoilt.intersection, spoilt.prediction, spoilt.target)
    assert scores.iou(*overlap).isnan().all()
    assert scores.tversky(*overlap, 0.3, 0.7).isnan().all()
    assert scores.dice(*overlap).isnan().all()
    assert scores.cross_entropy(spoilt).isnan().all()
    assert scores.cross_entropy(spoilt, multi_label=True).isnan().all()
    for kind in scores.WEIGHT_TYPES:
        weights = scores.volume_weights(sums.target, kind)
        assert scores.generalized_iou(spoilt, weights).isnan().all()
    for exponent in (0.5, 1.0, 2.0):
        assert scores.power(torch.tensor(NAN), exponent).isnan()
    assert scores.ratio(torch.tensor([NAN, 1.0, NAN]), torch.tensor([1.0, NAN, 0.0])).isnan().all()
    assert scores.power(torch.tensor([0.0, INF]), 0.5).tolist() == [0.0, INF]


def test_functional_derivatives_by_the_reference_kernel() -> None:
    logits, labels = case()
    loss = IoUCELoss(softmax=True)
    leaf = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf, labels), leaf)
    with use_kernel("reference"):
        torch.testing.assert_close(torch.func.grad(lambda x: loss(x, labels))(logits), expected)
    exact = LovaszSoftmaxLoss(bins=None, softmax=True)
    assert torch.func.grad(lambda x: exact(x, labels))(logits).isfinite().all()
    instance = InstanceIoULoss(softmax=True)
    leaf = torch.randn(1, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    label = torch.tensor([[[1, 1, 0, 0, 0, 1]]])
    with use_kernel("reference"):
        assert torch.autograd.gradgradcheck(lambda x: instance(x, label), (leaf,))
        with pytest.raises(RuntimeError):  # its components are found outside of torch
            torch.func.grad(lambda x: instance(x, label))(leaf.detach())


LABELLED = [[True, True, False], [True, False, True]]
INSTANCE: list[Callable[..., nn.Module]] = [
    lambda **o: InstanceIoULoss(lambda_global=0, **o),
    lambda **o: InstanceIoULoss("blob", lambda_global=0, cell_weight="inverse", **o),
    lambda **o: InstanceIoULoss(lambda_global=0, term=IoULoss(empty="skip"), **o),
    lambda **o: InstanceIoULoss(lambda_global=0, cells="both", term=WeightedCrossEntropyLoss(), **o),
]


@pytest.mark.parametrize("kernel", ["reference", "tiled"])
@pytest.mark.parametrize("make", INSTANCE)
def test_nan_shows_where_no_cell_holds_it(make: Callable[..., nn.Module], kernel: str) -> None:
    logits, labels = case()
    labels.zero_()
    labels[0, 0, 1, 1:3] = 1  # the other image, and class 2, have no component
    for act in ("softmax", "sigmoid"):
        loss = make(**{act: True})
        with use_kernel(kernel):
            expected = loss(logits, labels)
            for place in ((1, 1, 2, 3), (0, 2, 5, 4)):
                spoilt = logits.clone()
                spoilt[place] = NAN
                leaf = spoilt.requires_grad_()
                value = loss(leaf, labels)
                assert is_nan(value)
                (slope,) = torch.autograd.grad(value, leaf)
                assert slope[place].isnan()
        assert not is_nan(expected)


@pytest.mark.parametrize("make", INSTANCE)
def test_what_is_infinite_ignored_or_not_annotated_is_no_nan(make: Callable[..., nn.Module]) -> None:
    logits, labels = case()
    labels.zero_()
    labels[0, 0, 1, 1:3] = 1
    away = torch.tensor([[True, True, True], [True, False, True]])
    spoilt = logits.clone()
    spoilt[1, 1] = NAN
    loss = make(sigmoid=True)
    torch.testing.assert_close(loss(spoilt, labels, away), loss(logits, labels, away))
    spoilt[1, 1], spoilt[0, 2] = -INF, -INF
    for act in ("softmax", "sigmoid"):
        assert loss(spoilt, labels).isfinite()
        ignored = labels.clone()
        ignored[1] = 255
        loss = make(ignore_index=255, **{act: True})
        torch.testing.assert_close(loss(torch.where(ignored == 255, NAN, logits), ignored), loss(logits, ignored))


@pytest.fixture
def wrong_labels_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the sums be what wrong labels leave of them on a GPU, where the error follows later."""

    def nothing(rows: Tensor, *_: object) -> Tensor:
        return rows * NAN

    monkeypatch.setattr(passes, "report_bad_values", nothing)
    monkeypatch.setattr(sorted_errors, "report_bad_values", nothing)


@pytest.mark.usefixtures("wrong_labels_on_a_gpu")
@pytest.mark.parametrize("make", [*LOSSES, *INSTANCE])
@pytest.mark.parametrize("labelled", [None, LABELLED])
def test_wrong_labels_make_the_loss_nan(make: Callable[..., nn.Module], labelled: list[list[bool]] | None) -> None:
    logits, labels = case()
    for act in ("softmax", "sigmoid"):
        assert is_nan(make(**{act: True})(logits, labels, labelled))


@pytest.mark.usefixtures("wrong_labels_on_a_gpu")
@pytest.mark.parametrize("empty", ["smooth", "skip", "suppress"])
@pytest.mark.parametrize("average", ["pairs", "images", "classes"])
@pytest.mark.parametrize("make", REGION)
def test_wrong_labels_show_through_every_mean(make: Callable[..., nn.Module], average: str, empty: str) -> None:
    logits, labels = case()
    for labelled in (None, LABELLED):
        for batch in (False, True):
            loss = make(softmax=True, empty=empty, average=average, batch=batch)
            assert is_nan(loss(logits, labels, labelled))


def test_sums_that_are_nan_are_not_taken_for_classes_without_annotation() -> None:
    sums = VoxelSums(torch.full((7, 1, 2), NAN), partly_labelled=True)
    assert sums.annotated.all()
    assert sums.present.all()
    assert is_nan(IoULoss(softmax=True).score(sums, 3))
