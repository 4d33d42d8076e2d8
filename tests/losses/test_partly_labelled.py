"""Images in which some classes were not annotated: these pairs leave value and gradient, in every loss."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from monai.data.meta_tensor import MetaTensor
from monai.losses import DiceLoss
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.overrides import TorchFunctionMode

from monai_iou import (
    AttentionSupervisionLoss,
    ComponentRegionsd,
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
    WeightedCrossEntropyLoss,
    use_kernel,
)
from monai_iou.losses.pass_loss import call_loss

REGION: list[Callable[..., nn.Module]] = [
    IoULoss, LogIoULoss, FocalIoULoss, FocalTverskyLoss, lambda **o: IoULoss(empty="suppress", **o),
]  # fmt: skip
LOVASZ: list[Callable[..., nn.Module]] = [LovaszSoftmaxLoss, lambda **o: LovaszSoftmaxLoss("all", **o)]


def mixed(**options: Any) -> CompoundLoss:
    return CompoundLoss([LovaszSoftmaxLoss(**options), IoULoss(**options), WeightedCrossEntropyLoss(**options)])


ALL = [*REGION, *LOVASZ, GeneralizedIoULoss, WeightedCrossEntropyLoss, IoUCELoss, IoUFocalLoss, mixed]
LABELLED = torch.tensor([[True, True, False, True], [True, False, True, False], [True, True, True, True]])


def case() -> tuple[Tensor, Tensor]:
    """Return logits and labels, in which classes that were not annotated are background."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 6, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 4, (3, 1, 6, 5), generator=generator)
    return logits, torch.where(LABELLED.gather(1, labels.flatten(1)).view(labels.shape), labels, 0)


def gradient(loss: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    value = loss(leaf)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


@pytest.mark.parametrize("kernel", ["reference", "tiled"])
@pytest.mark.parametrize("make", REGION)
def test_independent_classes_leave_the_mean(make: Callable[..., nn.Module], kernel: str) -> None:
    logits, labels = case()
    with use_kernel(kernel):
        found = gradient(lambda x: make(sigmoid=True)(x, labels, LABELLED), logits)
        terms = make(sigmoid=True, reduction="none")
        expected = gradient(lambda x: terms(x, labels).flatten(1)[LABELLED].mean(), logits)
    torch.testing.assert_close(found, expected)
    assert not found[1][~LABELLED].any()


@pytest.mark.parametrize("make", ALL)
def test_what_was_not_annotated_has_no_effect(make: Callable[..., nn.Module]) -> None:
    logits, labels = case()
    maps = F.one_hot(labels[:, 0], 4).movedim(-1, 1).double()
    spoilt = torch.where(LABELLED.view(3, 4, 1, 1), logits, logits.flip(2) * 3)
    other = torch.where(LABELLED.view(3, 4, 1, 1), maps, 1 - maps)
    for batch in ({}, {"batch": True}) if make in REGION + LOVASZ else ({},):
        loss = make(sigmoid=True, **batch)
        found = gradient(lambda x, loss=loss: loss(x, maps, LABELLED), logits)
        changed = gradient(lambda x, loss=loss: loss(x, other, LABELLED), spoilt)
        torch.testing.assert_close(found, changed)
        assert not found[1][~LABELLED].any()
        missing = maps.masked_fill(~LABELLED.view(3, 4, 1, 1), torch.nan)
        torch.testing.assert_close(gradient(lambda x, loss=loss, y=missing: loss(x, y), logits), found)


@pytest.mark.parametrize("make", [IoULoss, FocalTverskyLoss, *LOVASZ])
def test_a_batch_adds_only_what_was_annotated(make: Callable[..., nn.Module]) -> None:
    """Class by class: the loss of the images that show it."""
    logits, labels = case()
    maps = F.one_hot(labels[:, 0], 4).movedim(-1, 1).double()
    loss = make(sigmoid=True, batch=True)
    parts = [loss(logits[LABELLED[:, c], c : c + 1], maps[LABELLED[:, c], c : c + 1]) for c in range(4)]
    torch.testing.assert_close(loss(logits, maps, LABELLED), torch.stack(parts).mean())


@pytest.mark.parametrize("kernel", ["reference", "tiled"])
@pytest.mark.parametrize("make", [IoULoss, LogIoULoss, FocalIoULoss, GeneralizedIoULoss, LovaszSoftmaxLoss])
def test_a_softmax_adds_missing_classes_to_the_background(make: Callable[..., nn.Module], kernel: str) -> None:
    logits, labels = case()
    if make is not LovaszSoftmaxLoss:
        probabilities = logits.softmax(1)
        away = (~LABELLED).view(3, 4, 1, 1)
        background = probabilities[:, :1] + torch.where(away, probabilities, 0).sum(1, keepdim=True)
        merged = torch.cat([background, torch.where(away, 0, probabilities)[:, 1:]], 1)
        with use_kernel(kernel):
            expected = make()(merged, F.one_hot(labels[:, 0], 4).movedim(-1, 1).double(), LABELLED)
            torch.testing.assert_close(make(softmax=True)(logits, labels, LABELLED), expected)
    for image in range(3):  # an image by itself, of the classes that it has
        kept = LABELLED[image].nonzero().flatten()
        own = logits[image : image + 1, kept].clone()
        own[:, 0] = torch.cat(
            [logits[image : image + 1, :1], logits[image : image + 1, ~LABELLED[image]]], 1
        ).logsumexp(1)
        order = torch.zeros(4, dtype=torch.long).index_put((kept,), torch.arange(len(kept)))
        loss = make(softmax=True)
        with use_kernel(kernel):
            found = loss(logits[image : image + 1], labels[image : image + 1], LABELLED[image : image + 1])
            torch.testing.assert_close(found, loss(own, order[labels[image : image + 1]]))


def test_the_marginal_cross_entropy() -> None:
    logits, labels = case()
    total = 0.0
    p = logits.softmax(1)
    for image in range(3):
        away = [c for c in range(1, 4) if not LABELLED[image, c]]
        for row in range(6):
            for column in range(5):
                label = int(labels[image, 0, row, column])
                classes = [0, *away] if label == 0 else [label]
                total -= p[image, classes, row, column].sum().log().item()
    found = WeightedCrossEntropyLoss()(logits, labels, LABELLED)
    assert found.item() == pytest.approx(total / labels.numel(), rel=1e-9)


@pytest.mark.parametrize("act", ["softmax", "sigmoid"])
@pytest.mark.parametrize("make", ALL)
def test_all_or_nothing(make: Callable[..., nn.Module], act: str) -> None:
    logits, labels = case()
    loss = make(**{act: True})
    everything = gradient(lambda x: loss(x, labels, torch.ones_like(LABELLED)), logits)
    torch.testing.assert_close(everything, gradient(lambda x: loss(x, labels), logits))
    value, slope = gradient(lambda x: loss(x, labels, torch.zeros_like(LABELLED)), logits)
    assert value == 0
    assert not slope.any()
    nothing = F.one_hot(labels[:, 0], 4).movedim(-1, 1).double() * torch.nan
    assert loss(logits, nothing) == 0


def test_averages_reductions_and_skipped_classes() -> None:
    logits, labels = case()
    terms = IoULoss(sigmoid=True, reduction="none")(logits, labels).flatten(1)
    summed = IoULoss(sigmoid=True, reduction="sum")(logits, labels, LABELLED)
    torch.testing.assert_close(summed, terms[LABELLED].sum())
    images = IoULoss(sigmoid=True, average="images")(logits, labels, LABELLED)
    torch.testing.assert_close(
        images, torch.stack([row[keep].mean() for row, keep in zip(terms, LABELLED, strict=True)]).mean()
    )
    foreground = IoULoss(sigmoid=True, include_background=False, empty="skip")(logits, labels, LABELLED)
    torch.testing.assert_close(foreground, terms[:, 1:][LABELLED[:, 1:]].mean())


def test_exact_lovasz_and_several_scales() -> None:
    logits, labels = case()
    maps = F.one_hot(labels[:, 0], 4).movedim(-1, 1).double()
    exact = LovaszSoftmaxLoss(bins=None, sigmoid=True)
    binned = LovaszSoftmaxLoss(bins=16384, sigmoid=True)
    torch.testing.assert_close(exact(logits, labels, LABELLED), binned(logits, labels, LABELLED), rtol=1e-4, atol=1e-4)
    missing = maps.masked_fill(~LABELLED.view(3, 4, 1, 1), torch.nan)
    scales = MultiScaleLoss(IoUCELoss(sigmoid=True))([logits, logits[..., ::2, ::2]], missing)
    assert scales.isfinite()


def test_what_cannot_be_left_out_is_refused() -> None:
    logits, labels = case()
    cases: list[tuple[type[Exception], str, Callable[[], Tensor]]] = [
        (TypeError, "Expected `labelled` to be bool, but got torch.int64: convert it to bool, True where a class was "
         "annotated.", lambda: IoULoss()(logits, labels, LABELLED.long())),
        (ValueError, "Expected `labelled` to have shape (3, 4), but got (3, 3): give one value per image and class.",
         lambda: IoUCELoss(softmax=True)(logits, labels, LABELLED[:, :3])),
        (ValueError, "Expected `labelled` to have shape (3, 4), but got rows of [3, 4] values: give one value per "
         "image and class.", lambda: IoUCELoss(softmax=True)(logits, labels, [*LABELLED[:2].tolist(), [True] * 3])),
        (ValueError, "Expected `labelled` to have shape (3, 4), but got rows of [3, 4] values: give one value per "
         "image and class.",
         lambda: MultiScaleLoss(IoULoss(softmax=True))(logits, labels, [*LABELLED[:2], LABELLED[2, :3]])),
        (ValueError, "Expected `labelled` to have shape (B, C), but got rows of [3, 4] values: give one value per "
         "image and class.", lambda: call_loss(DiceLoss(softmax=True), logits, labels, [[True] * 3, [True] * 4])),
        (ValueError, "Expected every class of every image to be annotated with bins=None and batch=True, but got False "
         "for some of them in `labelled`: set `bins`, for example to 2048, because sorting a batch cannot leave images",
         lambda: LovaszSoftmaxLoss(bins=None, batch=True, softmax=True)(logits, labels, LABELLED)),
        (ValueError, "Expected every image to be annotated for LovaszHingeLoss, which has one class, but got False for "
         "some of them in `labelled`: leave other images out of the batch, and `labelled` out of the call.",
         lambda: LovaszHingeLoss()(logits[:, :1], labels.clamp(0, 1), LABELLED[:, 1:2])),
        (ValueError, "Expected every class to be annotated with DiceLoss, which cannot leave classes out, but got "
         "False for some of them in `labelled`: use a loss that accepts `labelled`, such as IoUCELoss, or leave "
         "`labelled` out if every class was.",
         lambda: CompoundLoss([IoULoss(softmax=True), DiceLoss(softmax=True)])(logits, labels, LABELLED)),
    ]  # fmt: skip
    for kind, message, call in cases:
        with pytest.raises(kind, match=re.escape(message)):
            call()
    rows = IoULoss(softmax=True)(logits, labels, list(LABELLED))
    torch.testing.assert_close(rows, IoULoss(softmax=True)(logits, labels, LABELLED))
    partly = F.one_hot(labels[:, 0], 4).movedim(-1, 1).double()
    partly[0, 1, 2, 2] = torch.nan
    with pytest.raises(ValueError, match="per-class values between 0 and 1, but got nan"):
        IoULoss(sigmoid=True)(logits, partly)


@pytest.mark.parametrize("cells", ["reference", "prediction", "both"])
@pytest.mark.parametrize("regions", ["voronoi", "blob"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_instances_of_classes_that_were_not_annotated_are_no_cells(cells: str, regions: str, activation: str) -> None:
    """Each image's cells are those of a loss that knows the annotated classes alone, their mean over all images."""
    logits, labels = case()
    loss = InstanceIoULoss(regions, cells=cells, lambda_global=0, **{activation: True})
    value, slope = gradient(lambda leaf: loss(leaf, labels, LABELLED), logits)
    if activation == "sigmoid":
        assert not slope[~LABELLED].any()
    noise = torch.where(LABELLED.view(3, 4, 1, 1), logits, -1e9 if activation == "softmax" else 7.0)
    other = loss(noise, labels, LABELLED)
    if activation == "sigmoid":  # what is predicted of other classes has no part in it
        torch.testing.assert_close(other, value)
    whole, _ = gradient(lambda leaf: loss(leaf, labels, torch.ones_like(LABELLED)), logits)
    torch.testing.assert_close(whole, loss(logits, labels))


SMOOTHED: list[Callable[..., nn.Module]] = [
    IoUFocalLoss,
    lambda **o: IoUCELoss(gamma=0.5, **o),
    IoUCELoss,
    lambda **o: InstanceIoULoss(softmax=True, term=IoUCELoss(gamma=2.0, label_smoothing=o["label_smoothing"])),
    lambda **o: InstanceIoULoss(softmax=True, term=IoUCELoss(label_smoothing=o["label_smoothing"])),
]


def smoothed_case(classes: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, classes, 5, 6, generator=generator, dtype=torch.float64)
    labels = (torch.rand(2, 1, 5, 6, generator=generator) ** 3 * classes).long()
    labelled = torch.ones(2, classes, dtype=torch.bool)
    labelled[0, -1] = False
    return logits, labels, labelled


@pytest.mark.parametrize("make", SMOOTHED)
@pytest.mark.parametrize("classes", [2, 3])
def test_label_smoothing_gives_them_nothing(make: Callable[..., nn.Module], classes: int) -> None:
    """A class that is a part of the background has p = 0: a share of the label would cost infinity."""
    logits, labels, labelled = smoothed_case(classes)
    loss = make(softmax=True, label_smoothing=0.1)
    by_kernel = []
    for kernel in ("reference", "tiled"):
        with use_kernel(kernel):
            by_kernel.append(gradient(lambda leaf: loss(leaf, labels, labelled), logits))
            assert gradcheck(
                lambda leaf: loss(leaf, labels, labelled), (logits.clone().requires_grad_(),), fast_mode=True
            )
    torch.testing.assert_close(*by_kernel)


@pytest.mark.parametrize("make", SMOOTHED[:3])  # the components of an InstanceIoULoss break the graph
@pytest.mark.parametrize("classes", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_label_smoothing_gives_them_nothing_in_one_graph(make: Callable[..., nn.Module], classes: int) -> None:
    logits, labels, labelled = smoothed_case(classes)
    loss = make(softmax=True, label_smoothing=0.1)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    found, expected = (gradient(lambda leaf, f=f: f(leaf, labels, labelled), logits) for f in (compiled, loss))
    torch.testing.assert_close(found, expected)


def test_the_global_term_of_an_instance_loss_leaves_them_out_too() -> None:
    logits, labels = case()
    for global_loss in (None, IoUCELoss(softmax=True)):
        loss = InstanceIoULoss(softmax=True, global_loss=global_loss)
        loss(logits, labels, LABELLED)
        expected = (global_loss or IoULoss(softmax=True))(logits, labels, LABELLED)
        torch.testing.assert_close(loss.last_terms["global"], expected.detach())


def test_nothing_annotated_costs_nothing() -> None:
    logits, labels = case()
    for loss in (InstanceIoULoss(softmax=True), MultiScaleLoss(InstanceIoULoss(sigmoid=True, cells="both"))):
        value, slope = gradient(lambda leaf, loss=loss: loss(leaf, labels, torch.zeros_like(LABELLED)), logits)
        assert value == 0
        assert not slope.any()


@pytest.mark.parametrize("cells", ["reference", "prediction", "both"])
@pytest.mark.parametrize("classes", [1, 2, 4])
def test_no_image_at_all(classes: int, cells: str) -> None:
    logits = torch.zeros(0, classes, 6, 5, requires_grad=True)
    labels, labelled = torch.zeros(0, 1, 6, 5), torch.ones(0, classes, dtype=torch.bool)
    for loss in (InstanceIoULoss(sigmoid=True, cells=cells), InstanceIoULoss("blob", sigmoid=True, cells=cells)):
        for wrapped in (loss, MultiScaleLoss(loss)):
            value = wrapped(logits, labels, labelled)
            value.backward()
            assert value == 0


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("pairs", [[True, True, True], [False, True, True], [True, False, False], [True, True, False]])
def test_regions_in_the_target_are_no_maps_of_classes(pairs: list[bool], activation: str) -> None:
    """With three classes, a label map with the regions of two has the shape of per-class maps."""
    label = torch.zeros(1, 12, 12)
    label[0, 2:4, 2:4] = label[0, 6, 1] = 1
    label[0, 8:10, 8:10] = 2
    target = ComponentRegionsd(keys="label", num_classes=3)({"label": label})["label"][None].float()
    assert target.shape[1] == 3
    logits = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    coarse, labelled = logits[..., ::2, ::2], torch.tensor([pairs])
    loss = InstanceIoULoss(**{activation: True})
    expected = loss(logits, label[None], labelled)
    torch.testing.assert_close(loss(logits, target, labelled), expected)
    torch.testing.assert_close(MultiScaleLoss(loss)([logits], target, labelled), expected)
    for downsample in ("area", "max"):
        multi = MultiScaleLoss(loss, downsample=downsample)
        found, true = (multi([logits, coarse], given, labelled) for given in (target, label[None]))
        torch.testing.assert_close(found, true)


def test_every_scale_leaves_them_out() -> None:
    logits, labels = case()
    maps = F.one_hot(labels[:, 0], 4).movedim(-1, 1).double()
    maps[~LABELLED] = torch.nan
    coarse = F.avg_pool2d(logits, 2, ceil_mode=True)
    loss = MultiScaleLoss(IoULoss(sigmoid=True), weights=[0.5, 0.5])
    value, slope = gradient(lambda leaf: loss([leaf, coarse], maps), logits)
    torch.testing.assert_close(value, loss([logits, coarse], maps.nan_to_num(1), LABELLED))
    assert value.isfinite()
    assert not slope[~LABELLED].any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.uint16, torch.uint32, torch.uint64, torch.bfloat16])
def test_label_maps_of_any_type_lose_them(dtype: torch.dtype) -> None:
    logits, labels = case()
    labels[0, 0, 0] = 2  # which nobody annotated there
    for make in (IoUCELoss, LovaszSoftmaxLoss):
        expected = make(softmax=True)(logits, labels, LABELLED)
        torch.testing.assert_close(make(softmax=True)(logits, labels.to(dtype), LABELLED), expected)


class WithoutUnsigned(TorchFunctionMode):
    """Refuse in `torch.where` what torch before 2.12 refuses."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        bare = {torch.uint16, torch.uint32, torch.uint64}
        if func is torch.where and any(isinstance(each, Tensor) and each.dtype in bare for each in args):
            message = "\"where_cpu\" not implemented for 'UInt16'"
            raise NotImplementedError(message)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_torch_need_not_select_among_unsigned_labels(dtype: torch.dtype) -> None:
    logits, labels = case()
    maps = F.one_hot(labels[:, 0], 4).movedim(-1, 1)
    for act, target, ignore in itertools.product(("softmax", "sigmoid"), (labels, maps), (None, 3)):
        loss = IoUCELoss(**{act: True}, ignore_index=ignore)
        expected = loss(logits, target, LABELLED)
        with WithoutUnsigned():
            torch.testing.assert_close(loss(logits, target.to(dtype), LABELLED), expected)


def test_a_loss_that_cannot_leave_them_out_is_named() -> None:
    logits, labels = case()
    for loss in (MultiScaleLoss(DiceLoss(softmax=True)), InstanceIoULoss(softmax=True, global_loss=DiceLoss())):
        with pytest.raises(
            ValueError, match="Expected every class to be annotated with DiceLoss, which cannot leave classes out, but"
        ):
            loss(logits, labels, LABELLED)


def test_attention_is_supervised_only_where_every_class_was_annotated() -> None:
    logits, labels = case()
    loss = AttentionSupervisionLoss(IoULoss(softmax=True), ContextAttentionLoss())
    torch.testing.assert_close(loss(logits, labels, LABELLED), IoULoss(softmax=True)(logits, labels, LABELLED))
    maps = [torch.rand(2, 1, *logits.shape[2:])]
    with pytest.raises(ValueError, match="Expected every class to be annotated with ContextAttentionLoss, which"):
        loss((logits, maps), labels, LABELLED)


@pytest.mark.parametrize("classes", ["present", "all"])
@pytest.mark.parametrize("bins", [64, None])
@pytest.mark.parametrize("act", ["softmax", "sigmoid"])
def test_an_image_without_annotation_leaves_the_mean_of_lovasz(act: str, bins: int | None, classes: str) -> None:
    logits, labels = case()
    loss = LovaszSoftmaxLoss(classes, bins, **{act: True})
    found = gradient(lambda leaf: loss(leaf, labels, [[True] * 4, [False] * 4, [False] * 4]), logits)
    expected = gradient(lambda leaf: loss(leaf[:1], labels[:1]), logits)
    torch.testing.assert_close(found, expected)
    only_background = [[True] * 4, [True, False, False, False], [False] * 4]
    without = LovaszSoftmaxLoss(classes, bins, include_background=False, sigmoid=True)
    torch.testing.assert_close(without(logits, labels, only_background), without(logits[:1], labels[:1]))
    assert loss(logits, labels, torch.zeros_like(LABELLED)) == 0


SPARE = [
    *[(loss, act) for loss in ALL for act in ("softmax", "sigmoid")],
    *[(lambda **o: InstanceIoULoss(**o), act) for act in ("softmax", "sigmoid")],
    *[
        (lambda how=how, **o: MultiScaleLoss(IoULoss(**o), downsample=how), "softmax")
        for how in ("area", "max", "nearest")
    ],
]


@pytest.mark.parametrize("form", ["labels", "maps"])
@pytest.mark.parametrize("ignore", [2, 0, 255])
@pytest.mark.parametrize(("make", "act"), SPARE)
def test_ignored_voxels_have_no_effect_whatever_was_annotated(
    make: Callable[..., nn.Module], act: str, ignore: int, form: str
) -> None:
    """Also if the label to ignore is that of a class which was not annotated, or is no class at all."""
    logits, labels = case()
    generator = torch.Generator().manual_seed(1)
    where = torch.rand(labels.shape, generator=generator) < 0.3
    known = torch.ones(3, 4, dtype=torch.bool)
    known[:2, 2] = False
    maps = F.one_hot(labels[:, 0], 4).movedim(-1, 1).double()
    maps = torch.where(where, 0, maps)
    if ignore < 4:
        maps = torch.where(torch.arange(4).view(1, 4, 1, 1) == ignore, (where | (labels == ignore)).double(), maps)
        where = where | (labels == ignore)
    target = torch.where(where, ignore, labels) if form == "labels" else maps
    spoilt = torch.where(where, logits.flip(1) * 3 + 1, logits)
    loss = make(**{act: True}, ignore_index=ignore)
    first = gradient(lambda x: loss(x, target, known), logits)
    second = gradient(lambda x: loss(x, target, known), spoilt)
    torch.testing.assert_close(second[0], first[0])
    assert not first[1][where.expand_as(logits)].any()
    assert first[1].any()


@pytest.mark.parametrize("make", [IoULoss, IoUCELoss, LovaszSoftmaxLoss, InstanceIoULoss])
def test_labels_and_maps_agree_with_an_ignored_class(make: Callable[..., nn.Module]) -> None:
    logits, _ = case()
    labels = torch.randint(0, 4, (3, 1, 6, 5), generator=torch.Generator().manual_seed(2))
    maps = F.one_hot(labels[:, 0], 4).movedim(-1, 1).double()
    loss = make(softmax=True, ignore_index=3)
    torch.testing.assert_close(loss(logits, labels, LABELLED), loss(logits, maps, LABELLED))


@pytest.mark.parametrize("act", ["softmax", "sigmoid"])
@pytest.mark.parametrize("make", [*ALL, InstanceIoULoss])
def test_annotated_throughout_is_as_without_the_table_where_an_image_is_ignored(
    make: Callable[..., nn.Module], act: str
) -> None:
    """An image whose voxels are all ignored counts in the mean, as nobody has said that it was not annotated."""
    logits, labels = case()
    labels[1] = 255
    for batch in ({}, {"batch": True}) if make in REGION + LOVASZ else ({},):
        loss = make(**{act: True}, ignore_index=255, **batch)
        found = gradient(lambda x, loss=loss: loss(x, labels, torch.ones(3, 4, dtype=torch.bool)), logits)
        torch.testing.assert_close(found, gradient(lambda x, loss=loss: loss(x, labels), logits))


def test_an_ignored_image_counts_in_the_mean_and_one_without_annotation_does_not() -> None:
    loss, logits = IoULoss(softmax=True, ignore_index=255), torch.zeros(2, 2, 8)
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, *[255] * 8]).reshape(2, 1, 8)
    both = [[True, True], [True, True]]
    values = [loss(logits, labels, table).item() for table in (None, both, [both[0], [False, False]])]
    assert values == pytest.approx([1 / 3, 1 / 3, 2 / 3], abs=1e-5)


def test_voxels_of_a_class_that_was_not_annotated_count_for_the_others() -> None:
    """With maps and a label to ignore that is no class, they hold nothing else; they are not ignored."""
    logits, _ = case()
    labels = torch.randint(0, 4, (3, 1, 6, 5), generator=torch.Generator().manual_seed(2))
    maps = F.one_hot(labels[:, 0], 4).movedim(-1, 1).double()
    with_label, without = (IoULoss(sigmoid=True, ignore_index=index) for index in (255, None))
    torch.testing.assert_close(with_label(logits, maps, LABELLED), without(logits, maps, LABELLED))


@pytest.mark.parametrize("make", [*ALL, InstanceIoULoss])
def test_what_was_annotated_may_come_from_inference_mode(make: Callable[..., nn.Module]) -> None:
    """With the weights; torch saves no such tensor for a backward pass."""
    logits, labels = case()
    with torch.inference_mode():
        known, weight = LABELLED.clone(), torch.tensor([1.0, 2.0, 3.0, 4.0])
    options = {} if make in (InstanceIoULoss, mixed, *LOVASZ) else {"weight": weight}
    expected = gradient(lambda x: make(softmax=True, **options)(x, labels, LABELLED), logits)
    torch.testing.assert_close(gradient(lambda x: make(softmax=True, **options)(x, labels, known), logits), expected)


@pytest.mark.parametrize("make", [*ALL, InstanceIoULoss, lambda **o: MultiScaleLoss(IoUCELoss(**o))])
def test_the_loss_is_a_plain_tensor_also_where_what_was_annotated_is_none(make: Callable[..., nn.Module]) -> None:
    """MONAI's EnsureTyped makes a MetaTensor of each of its keys."""
    logits, labels = case()
    expected = make(softmax=True)(logits, labels, LABELLED)
    for known in (MetaTensor(LABELLED), [MetaTensor(row) for row in LABELLED]):
        value = make(softmax=True)(logits, labels, known)
        assert type(value) is Tensor
        assert torch.equal(value, expected)


@pytest.mark.parametrize("labelled", [torch.ones(3, 4, dtype=torch.bool), [[True] * 4] * 3], ids=["tensor", "list"])
def test_a_default_device_hides_nothing_from_a_loss_that_cannot_leave_out_classes(labelled: Any) -> None:
    logits, labels = case()
    loss = OwnLoss()
    with torch.device("meta"):  # as on a GPU, nobody would look at its values there
        value = call_loss(loss, logits, labels, labelled)
    assert torch.equal(value, loss(logits, labels))


class OwnLoss(nn.Module):
    """A loss of the user's that knows nothing of `labelled`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return (input - target.to(input.dtype)).abs().mean()


UNABLE: dict[str, Callable[[], nn.Module]] = {
    "hinge": LovaszHingeLoss,
    "hinge of a batch": lambda: LovaszHingeLoss(batch=True),
    "sorted hinge": lambda: LovaszHingeLoss(bins=None),
    "sorted batch": lambda: LovaszSoftmaxLoss(bins=None, batch=True, sigmoid=True),
    "compound": lambda: CompoundLoss([IoULoss(sigmoid=True), DiceLoss(sigmoid=True), OwnLoss()]),
    "scales": lambda: MultiScaleLoss(DiceLoss(sigmoid=True)),
    "global term": lambda: InstanceIoULoss(sigmoid=True, global_loss=DiceLoss(sigmoid=True)),
    "logits alone": lambda: AttentionSupervisionLoss(DiceLoss(sigmoid=True), ContextAttentionLoss()),
}


@pytest.mark.parametrize("name", UNABLE)
def test_where_every_class_was_annotated_every_loss_will_do(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 1, 8, 8, generator=generator)
    labels = torch.randint(0, 2, (2, 1, 8, 8), generator=generator).float()
    loss, known = UNABLE[name](), torch.ones(2, 1, dtype=torch.bool)
    expected = gradient(lambda x: loss(x, labels), logits)
    for labelled in (known, known.tolist()):
        torch.testing.assert_close(gradient(lambda x, rows=labelled: loss(x, labels, rows), logits), expected)
    with pytest.raises(ValueError, match=r"^Expected every .* to be annotated .*, but got False for some of them in"):
        loss(logits, labels, torch.tensor([[True], [False]]))


def test_attention_is_supervised_where_labelled_says_that_every_class_was_annotated() -> None:
    logits, labels = case()
    maps = [torch.rand(len(logits), 1, *logits.shape[2:], dtype=logits.dtype)]
    loss = AttentionSupervisionLoss(IoULoss(softmax=True), ContextAttentionLoss())
    torch.testing.assert_close(loss((logits, maps), labels, torch.ones_like(LABELLED)), loss((logits, maps), labels))


def test_what_excludes_classes_is_said_in_words() -> None:
    logits, labels = torch.randn(2, 1, 8, 8), torch.zeros(2, 1, 8, 8)
    labels[0] = torch.nan
    text = (
        "Expected every image to be annotated for LovaszHingeLoss, which has one class, but got a map that is NaN "
        "everywhere: leave other images out of the batch, and `labelled` out of the call."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        LovaszHingeLoss()(logits, labels)
    elsewhere = torch.ones(2, 1, dtype=torch.bool, device="meta")  # as on a GPU, nobody looks at its values
    text = (
        "Expected every class to be annotated with DiceLoss, which cannot leave classes out, but got `labelled` on "
        "meta, where its values are not read: use a loss that accepts `labelled`, such as IoUCELoss, or leave "
        "`labelled` out if every class was."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        call_loss(DiceLoss(), logits, labels, elsewhere)
