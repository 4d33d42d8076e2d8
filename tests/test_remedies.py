"""The remedies of errors fit what was given: they add a dimension or remove one, and name what the callee takes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import monai_iou
from monai_iou import (
    AffinityLoss,
    ComponentRegionsd,
    ContextPriorHead,
    InstanceIoULoss,
    IoUCELoss,
    IoULoss,
    IoUMetric,
    LesionIoUMetric,
    LovaszHingeLoss,
    LovaszSoftmaxLoss,
    MultiScaleLoss,
    ThresholdIoUMetric,
    WeightedCrossEntropyLoss,
    iou_counts,
    voxel_sums,
)
from monai_iou.losses import arguments
from monai_iou.transforms import LesionIndicesd, RandCoarseElasticd, RandCopyLesionsd, RandCropByLesions

WRAP = "wrap the loss in a MultiScaleLoss for the stacked outputs of a DynUNet"
BOTH = "add the batch dimension, the channel dimension or both"
CHANNEL, BATCH = "add the channel dimension", "remove the batch dimension"
OF_LIST = "pass the batch itself, or the images without the batch dimension"
MISSING_OR_MAPS = "convert per-class maps with argmax(1, keepdim=True), or add a missing channel, target.unsqueeze(1)"


def loss_of(*shape: int) -> Callable[[], Any]:
    return lambda: IoUCELoss(softmax=True)(torch.zeros(shape), torch.zeros(1, 1, *shape[-3:]))


def metric_of(shape: tuple[int, ...], kind: Any = IoUMetric, *, listed: bool = False) -> Callable[[], Any]:
    image = torch.zeros(shape)
    return lambda: kind()(*([[image]] * 2 if listed else [image] * 2))


def transform_of(make: Any, *shape: int) -> Callable[[], Any]:
    return lambda: make({"image": torch.zeros(shape), "label": torch.zeros(shape)})


def affinity_of(*shape: int) -> Callable[[], Any]:
    return lambda: AffinityLoss()(torch.rand(2, 16, 16), torch.zeros(shape))


copy = RandCopyLesionsd(
    ["image", "label"], "label", [{name: torch.ones(1, 1, 4, 4, 4) for name in ("image", "label")}], 1
)
warp = RandCoarseElasticd(["image"], (3, 5), (20, 80), prob=1.0)
regions = ComponentRegionsd("label")
DIMENSIONS: list[tuple[str, Callable[[], Any], str]] = [
    ("a loss without batch", loss_of(8, 8), BOTH),
    ("a stack in 3D", loss_of(1, 3, 2, 4, 4, 4), f"{WRAP}, or remove a dimension"),
    ("a stack in 2D", lambda: IoULoss(softmax=True)(torch.zeros(2, 3, 2, 8, 8), torch.zeros(2, 1, 8, 8)), WRAP),
    (
        "a stack, or no channel",
        lambda: IoULoss(softmax=True)(torch.zeros(2, 3, 2, 8, 8), torch.zeros(2, 2, 8, 8)),
        f"add the channel dimension, target.unsqueeze(1), or {WRAP}",
    ),
    ("a metric without batch", metric_of((8, 8)), BOTH),
    ("a metric of six", metric_of((1, 1, 1, 4, 4, 4)), "remove a dimension"),
    ("a list without channels", metric_of((8,), listed=True), CHANNEL),
    ("a list of batches", metric_of((1, 1, 4, 4, 4), listed=True), OF_LIST),
    ("a list of lesions", metric_of((1, 1, 4, 4, 4), LesionIoUMetric, listed=True), OF_LIST),
    ("a list of probabilities", metric_of((1, 1, 4, 4, 4), ThresholdIoUMetric, listed=True), OF_LIST),
    ("regions of a line", transform_of(regions, 8), CHANNEL),
    ("regions of a batch", transform_of(regions, 1, 1, 4, 4, 4), BATCH),
    (
        "regions of maps",
        transform_of(regions, 2, 8, 8),
        "add a missing channel with label[None], convert per-class maps with argmax(0, keepdim=True), and append "
        "regions only once",
    ),
    ("lesions of a line", transform_of(LesionIndicesd("label"), 8), CHANNEL),
    ("lesions of a batch", transform_of(LesionIndicesd("label"), 1, 1, 4, 4, 4), BATCH),
    ("a copy into a batch", transform_of(copy, 1, 1, 4, 4, 4), BATCH),
    ("a warped image", transform_of(warp, 1, 8, 8), f"{CHANNEL}, or an axis of one voxel to 2D data"),
    ("a warped batch", transform_of(warp, 1, 1, 4, 4, 4), BATCH),
    (
        "a patch of other axes",
        lambda: RandCropByLesions((4, 4, 4))(*[torch.ones(8, 8, 8)] * 2),
        "correct it, or add the channel dimension if the image and the label lack it",
    ),
    ("affinities without batch", affinity_of(8, 8), BOTH),
    ("affinities of maps", affinity_of(2, 3, 8, 8), MISSING_OR_MAPS),
    ("affinities of other images", affinity_of(1, 1, 8, 8), "pass both with the same batch"),
    (
        "counts of a batch",
        lambda: iou_counts(np.zeros((1, 1, 2, 2, 2)), np.zeros((1, 1, 2, 2, 2)), 2),
        "pass it without batch and channel",
    ),
]


@pytest.mark.parametrize(("call", "remedy"), [case[1:] for case in DIMENSIONS], ids=[case[0] for case in DIMENSIONS])
def test_the_remedy_suits_the_number_of_dimensions(call: Callable[[], Any], remedy: str) -> None:
    with pytest.raises(ValueError, match=r"^Expected .* but got [^:]*\([\d, ]+\): " + re.escape(f"{remedy}.") + "$"):
        call()


def test_a_stack_is_taken_by_the_loss_that_the_remedy_names() -> None:
    loss = MultiScaleLoss(IoUCELoss(softmax=True))
    for space in ((4, 4), (4, 4, 4)):
        assert loss(torch.zeros(1, 3, 2, *space), torch.zeros(1, 1, *space)).isfinite()


def test_the_counts_of_two_label_maps_name_their_own_arguments() -> None:
    cases: list[tuple[Any, Any, str]] = [
        ([[0.5]], [[1]], "Expected `prediction` to hold whole class numbers, but got 0.5: take the argmax of "),
        ([[0]], [[1, 1]], "Expected `prediction` and `reference` to have the same spatial shape, but got (1, 1) and "),
        ([[3]], [[1]], "raise `num_classes`, or map the value to one of these classes."),
        ([[1]], [[3]], "raise `num_classes`, or name the value as `ignore_index`."),
        (1, 1, "to be a label map with 1 to 3 dimensions, but got shape (): pass one value per voxel."),
    ]
    for prediction, reference, text in cases:
        with pytest.raises(ValueError, match=re.escape(text)):
            iou_counts(np.array(prediction), np.array(reference), num_classes=2)


@pytest.mark.parametrize("loss", [IoULoss(sigmoid=True), InstanceIoULoss(sigmoid=True), LovaszHingeLoss()], ids=repr)
@pytest.mark.parametrize("label", [255, 2])
def test_a_mask_of_other_numbers_is_mended_as_the_error_says(loss: nn.Module, label: int) -> None:
    logits, mask = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    mask[..., 2:4] = label
    with pytest.raises(ValueError, match=r"^Expected") as caught:
        loss(logits, mask)
    assert str(caught.value) == (
        f"Expected `target` to hold values between 0 and 1 for an input with one channel, but got {label}: pass "
        f"`target > 0`, `target == {label}` for this label alone, or ignore_index={label} to leave it out."
    )
    for target in (mask > 0, mask == label):
        assert loss(logits, target).isfinite()
    options = {} if isinstance(loss, LovaszHingeLoss) else {"sigmoid": True}
    assert type(loss)(**options, ignore_index=label)(logits, mask).isfinite()


@pytest.mark.parametrize(
    ("channels", "value", "remedy"),
    [
        (1, -0.5, "clip the values to 0"),
        (1, 1.5, "divide the values by the largest one"),
        (2, 1.5, "divide the values by the largest one"),
        (2, 2.0, "pass maps of 0 and 1, such as `target > 0`, or class numbers as one channel, shape (B, 1, *S)"),
        (2, torch.inf, "replace it by the share of the class"),
    ],
)
def test_values_that_are_no_shares(channels: int, value: float, remedy: str) -> None:
    target = torch.zeros(1, channels, 8)
    target[..., 3] = value
    with pytest.raises(
        ValueError,
        match=re.escape(
            f"between 0 and 1{' for an input with one channel' * (channels == 1)}, but got {value}: {remedy}."
        ),
    ):
        IoULoss(sigmoid=True)(torch.zeros(1, channels, 8), target)


LOSSES = [
    loss
    for loss in (getattr(monai_iou.losses, name) for name in dir(monai_iou.losses))
    if isinstance(loss, type) and issubclass(loss, nn.Module)
]
NAMES = sorted({*arguments._EXPLAINED, *arguments._RENAMED, *arguments._WRITTEN})
VALUES = {"batch": False, "softmax": True, "sigmoid": True, "weight": 1.0, "weights": [1.0]}


def remedy_of(make: Any, name: str, given: dict[str, Any]) -> str:
    with pytest.raises(TypeError, match=rf"but got an unexpected keyword argument '{name}': ") as caught:
        make(**given, **{name: 1})
    return str(caught.value).partition(f"argument '{name}': ")[2]


@pytest.mark.parametrize("make", LOSSES, ids=lambda make: make.__name__)
def test_what_an_error_recommends_is_accepted(make: Any) -> None:
    names = list(inspect.signature(make).parameters)
    given = {
        name: IoULoss() if name != "losses" else [IoULoss()]
        for name in ("loss", "losses", "attention")
        if name in names
    }
    for name in sorted(set(NAMES) - set(names)):
        remedy = remedy_of(make, name, given)
        if "always computes the IoU" in remedy:
            assert make.__name__ not in (
                "FocalTverskyLoss",
                "LogTverskyLoss",
                "WeightedCrossEntropyLoss",
                "AffinityLoss",
            )
        others = re.findall(r"\b(\w+Loss)\b", remedy)
        assert all(hasattr(monai_iou, other) for other in others)
        for other in (
            others[:1] if name in ("alpha", "beta", "gamma", "pos_weight", "lambda_focal", "lambda_ce") else ()
        ):
            assert name in inspect.signature(getattr(monai_iou, other)).parameters
        if not remedy.startswith("write "):
            continue
        written = re.findall(r"`(\w+)(?:=[^`]*)?`", remedy)
        assert written
        options: list[dict[str, Any]] = [{each: VALUES.get(each, 1)} for each in written]
        if name == "jaccard":
            options = [dict.fromkeys(written, 1)]
        for option in options:
            make(**given, **option)


@pytest.mark.parametrize(
    ("make", "name", "remedy"),
    [
        (monai_iou.FocalTverskyLoss, "jaccard", "write `alpha=1` and `beta=1` for the IoU (Jaccard)."),
        (WeightedCrossEntropyLoss, "jaccard", "leave it out, because this loss has no such option."),
        (LovaszSoftmaxLoss, "jaccard", "leave it out, because this loss always computes the IoU (Jaccard)."),
        (LovaszSoftmaxLoss, "smooth", "leave it out, because this loss has no such option."),
        (WeightedCrossEntropyLoss, "per_image", "leave it out, because this loss has no such option."),
        (AffinityLoss, "from_logits", "write `sigmoid=True` for logits."),
        (AffinityLoss, "mode", "leave it out, because this loss has no such option."),
    ],
)
def test_a_remedy_for_an_argument_of_another_library(make: Any, name: str, remedy: str) -> None:
    assert remedy_of(make, name, {}) == remedy


def test_a_wrapper_points_to_the_losses_inside() -> None:
    remedy = "choose among these arguments, and give options of the losses inside to these."
    assert remedy_of(MultiScaleLoss, "softmax", {"loss": IoULoss()}) == remedy
    assert remedy_of(monai_iou.CompoundLoss, "smooth", {"losses": [IoULoss()]}) == remedy


def test_alpha_and_beta_of_1_are_the_iou() -> None:
    logits, labels = torch.randn(1, 2, 8, 8), torch.ones(1, 1, 8, 8)
    tversky = monai_iou.FocalTverskyLoss(alpha=1, beta=1, gamma=1, softmax=True)
    torch.testing.assert_close(tversky(logits, labels), IoULoss(softmax=True, empty=tversky.empty)(logits, labels))


def sums_of(groups: Tensor) -> Any:
    return voxel_sums(torch.zeros(1, 3, 4, 4), torch.zeros(1, 1, 4, 4), groups=groups)


MESSAGES: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (
        lambda: sums_of(torch.zeros(1, 2, 4, 4, dtype=torch.long)),
        ValueError,
        "Expected `groups` to have shape (1, 1, 4, 4) or (1, 3, 4, 4), but got (1, 2, 4, 4): give one value per voxel "
        "in a single channel, or in one for each class.",
    ),
    (
        lambda: AffinityLoss(size=(4, 4))(torch.rand(1, 9, 9), torch.zeros(1, 1, 8, 8)),
        ValueError,
        "Expected `input` to have one row for each position of the grid (4, 4), but got 9 rows: give AffinityLoss and "
        "ContextPriorHead the same `size`.",
    ),
    (
        lambda: AffinityLoss(size=(4, 4))(torch.rand(1, 16, 16), torch.zeros(1, 1, 8, 8, 8)),
        ValueError,
        "Expected `input` to have one row for each position of the grid (4, 4), but got 16 rows: give `size` one "
        "number for each spatial dimension of a target of shape (8, 8, 8).",
    ),
    (
        lambda: ContextPriorHead(8, 2, (4, 4), kernel_size=-3),
        ValueError,
        "Expected `kernel_size` to be an odd number of at least 1, but got -3: use 1, because only an odd kernel "
        "preserves the shape of the grid.",
    ),
    (
        lambda: ContextPriorHead("8", 2, (4, 4)),  # type: ignore[arg-type]
        TypeError,
        "Expected `in_channels` to be an integer, but got str: give the number of channels.",
    ),
    (
        lambda: ContextPriorHead(8, 2, (4, 4), kernel_size="3"),  # type: ignore[arg-type]
        TypeError,
        "Expected `kernel_size` to be an integer, but got str: give an odd number, such as 3.",
    ),
    (
        lambda: LesionIoUMetric(score="dice"),
        ValueError,
        "Expected `score` to be one of 'pq', 'sq', 'rq', 'f1', 'precision', 'recall', 'cc_iou', 'cc_dice', 'f1_area', "
        "but got 'dice': choose one of these.",
    ),
    (
        lambda: RandCropByLesions(4, num_samples="2"),  # type: ignore[arg-type]
        TypeError,
        "Expected `num_samples` to be an integer, but got str: give the number of patches to crop from each volume.",
    ),
    (
        lambda: RandCropByLesions(4, image_threshold="2"),  # type: ignore[arg-type]
        TypeError,
        "Expected `image_threshold` to be a number, but got str: pass an int or a float.",
    ),
    (
        lambda: RandCopyLesionsd(["image", "label"], "label", [{}], max_lesions=1.5),  # type: ignore[arg-type]
        TypeError,
        "Expected `max_lesions` to be an integer, but got float: set prob=0 to paste none.",
    ),
    (
        lambda: RandCoarseElasticd(["image"], (3, 5), (20, 80), prob=2),
        ValueError,
        "Expected `prob` to be from 0 to 1, but got 2: choose a value in this range.",
    ),
    (
        lambda: IoULoss(weight="a"),  # type: ignore[arg-type]
        TypeError,
        "Expected `weight` to be a number or one number per class, but got str 'a': pass a number or a list of "
        "numbers.",
    ),
    (
        lambda: IoULoss(power=0.5)(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4)),
        ValueError,
        "Expected `power` to be at least 1, but got 0.5: choose 1 or more, because below 1 the gradient is infinite at "
        "p = 0.",
    ),
    (
        lambda: ThresholdIoUMetric(threshold=1.5),
        ValueError,
        "Expected `threshold` to be from 0 to 1, but got 1.5: give a probability, such as 0.5.",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), MESSAGES, ids=[str(number) for number in range(len(MESSAGES))])
def test_the_sentence_says_what_to_do(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        call()
