"""One number for a list, text for a number and complex values are answered in a sentence that names the argument."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from monai_iou import (
    AttentionMapUnet,
    CalibrationMetric,
    ComponentRegionsd,
    CompoundLoss,
    ContextAttentionLoss,
    InstanceIoULoss,
    IoUMetric,
    LovaszSoftmaxLoss,
    MultiScaleLoss,
    ThresholdIoUMetric,
    class_weights,
    fine_grained_iou,
    iou_counts,
)
from monai_iou.losses import IoULoss
from monai_iou.metrics.base import reduce_scores
from monai_iou.transforms import LesionIndicesd, RandCopyLesionsd, RandCropByLesions, RandCropByLesionsd

ONE = torch.ones(1, 1, dtype=torch.long)
COMPLEX = torch.zeros(1, 1, 4, 4, dtype=torch.complex64)
FACTORS = "Expected `weights` to be a list, but got {}: give one factor for each {}, such as weights=[1.0, 0.5]."
REDUCTIONS = "'none', 'mean', 'sum', 'mean_batch', 'sum_batch', 'mean_channel', 'sum_channel'"
KINDS: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    (
        "a loss for a list of losses",
        lambda: CompoundLoss(IoULoss()),
        TypeError,
        "Expected `losses` to be a list, but got IoULoss: list the terms of the sum, such as [IoULoss(), DiceLoss()].",
    ),
    ("factors of a sum", lambda: CompoundLoss([IoULoss()], weights=1), TypeError, FACTORS.format("int", "loss")),
    (
        "a factor as a tensor",
        lambda: CompoundLoss([IoULoss()], torch.tensor(1.0)),
        TypeError,
        FACTORS.format("Tensor", "loss"),
    ),
    ("factors of scales", lambda: MultiScaleLoss(IoULoss(), weights=0.5), TypeError, FACTORS.format("float", "scale")),
    ("factors as text", lambda: ContextAttentionLoss(weights="1, 2"), TypeError, FACTORS.format("str", "scale")),
    (
        "percentages",
        lambda: fine_grained_iou(ONE, ONE, worst=5),
        TypeError,
        "Expected `worst` to be a list, but got int: pass a list, such as (10,) for the worst tenth.",
    ),
    (
        "a percentage",
        lambda: fine_grained_iou(ONE, ONE, worst=("5",)),
        TypeError,
        "Expected `worst` to be a number, but got str: pass an int or a float.",
    ),
    (
        "outputs",
        lambda: AttentionMapUnet(2, 1, 2, channels=(4, 8), strides=(2,), coarse_outputs="1"),
        TypeError,
        "Expected `coarse_outputs` to be an integer, but got str: give the number of coarser scales, or 0 for none.",
    ),
    (
        "classes",
        lambda: ComponentRegionsd("label", num_classes="3"),
        TypeError,
        "Expected `num_classes` to be an integer, but got str: give the number of classes with the background, such "
        "as 2.",
    ),
    (
        "complex labels",
        lambda: iou_counts(COMPLEX, COMPLEX, num_classes=2),
        TypeError,
        "Expected `prediction` to hold labels, but got torch.complex64: pass integers, booleans or fractions.",
    ),
    (
        "complex counts",
        lambda: class_weights(np.array([1 + 0j, 2])),
        TypeError,
        "Expected `counts` to be numbers of shape (C,) or (N, C), but got ndarray (Cannot cast array data from "
        "dtype('complex128') to dtype('float64') according to the rule 'safe'): pass a list, an array or a tensor.",
    ),
    (
        "a reduction",
        lambda: IoUMetric(reduction="average"),
        ValueError,
        f"Expected `reduction` to be one of {REDUCTIONS}, but got 'average': choose one of these.",
    ),
    (
        "a reduction of a metric of probabilities",
        lambda: CalibrationMetric(reduction=2),
        ValueError,
        f"Expected `reduction` to be one of {REDUCTIONS}, but got '2': choose one of these.",
    ),
    (
        "a reduction of scores",
        lambda: reduce_scores(torch.zeros(1, 1), "median"),
        ValueError,
        f"Expected `reduction` to be one of {REDUCTIONS}, but got 'median': choose one of these.",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), [case[1:] for case in KINDS], ids=[case[0] for case in KINDS])
def test_the_sentence_names_the_argument(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        call()


def test_whole_numbers_of_numpy_will_do() -> None:
    number = np.int64(20)
    assert CalibrationMetric(num_bins=number).num_bins == 20
    assert ThresholdIoUMetric(resolution=number).resolution == 20
    assert LovaszSoftmaxLoss(bins=number).bins == 20
    kinds: list[tuple[Callable[..., Any], str]] = [
        (CalibrationMetric, "num_bins"),
        (ThresholdIoUMetric, "resolution"),
        (LovaszSoftmaxLoss, "bins"),
    ]
    for construct, name in kinds:
        for wrong in (True, 20.0):
            with pytest.raises((TypeError, ValueError), match=rf"^Expected `{name}` to be an? "):
                construct(**{name: wrong})


def test_any_list_will_do() -> None:
    for weights in ([1.0, 0.5], torch.tensor([1.0, 0.5]), np.array([1, 0.5])):
        assert CompoundLoss((IoULoss(softmax=True) for _ in range(2)), weights=weights).weights == [1.0, 0.5]
        assert MultiScaleLoss(IoULoss(softmax=True), weights=weights).weights == [1.0, 0.5]


@pytest.mark.parametrize("wrong", ["1", True, [1.0], None])
def test_every_factor_is_a_number(wrong: Any) -> None:
    for of, construct in (
        ("loss", lambda weights: CompoundLoss([IoULoss(softmax=True)] * 2, weights=weights)),
        ("scale", lambda weights: MultiScaleLoss(IoULoss(softmax=True), weights=weights)),
    ):
        with pytest.raises(TypeError) as caught:
            construct([1.0, wrong])
        assert str(caught.value) == (
            f"Expected every one of `weights` to be a number, but got {type(wrong).__name__}: give one factor for each "
            f"{of}, such as weights=[1.0, 0.5]."
        )


@pytest.mark.parametrize(
    "construct",
    [
        lambda spacing: InstanceIoULoss(softmax=True, spacing=spacing),
        lambda spacing: ContextAttentionLoss(spacing=spacing),
        lambda spacing: ComponentRegionsd("label", spacing=spacing),
    ],
    ids=["instances", "context", "regions"],
)
def test_a_voxel_size_is_checked_before_a_training_starts(construct: Callable[[Any], Any]) -> None:
    for good in (None, 0.5, (1.0, 2.0), [3, 1, 1], torch.ones(3), [(1, 1, 1), (2, 2, 2)]):
        construct(good)
    for bad in (-1, "1 mm", (), (1, 0), (1, 2, float("nan")), (1, 1, 1, 1)):
        with pytest.raises(ValueError, match=r"^Expected") as caught:
            construct(bad)
        assert str(caught.value) == (
            "Expected `spacing` to be a positive number in mm, or one for each of up to 3 axes, but got "
            f"{bad!r}: give the voxel size along each axis, or None for 1 mm."
        )


@pytest.mark.parametrize(
    "construct",
    [
        lambda labels: RandCropByLesions(4, labels=labels).labels,
        lambda labels: RandCropByLesionsd(["label"], "label", 4, labels=labels).cropper.labels,
        lambda labels: LesionIndicesd("label", labels=labels).labels,
        lambda labels: RandCopyLesionsd(["image", "label"], "label", [{}], labels=labels).labels,
    ],
    ids=["crop", "crop of a dictionary", "indices", "copy"],
)
def test_classes_are_a_list_of_numbers(construct: Callable[[Any], Any]) -> None:
    assert construct(None) is None
    for good in ([1, 2], (1, 2), range(1, 3), np.array([1, 2]), torch.tensor([1, 2])):
        assert construct(good) == [1, 2]
    for bad, found in (
        ("1", "str"),
        (1, "int"),
        ({1: "lesion"}, "dict"),
        (torch.tensor(1), "int"),
        (np.array(1), "ndarray"),
        (["1"], "'1' in it"),
        ([1, 2.0], "2.0 in it"),
        ([None], "None in it"),
        ([True], "True in it"),
    ):
        text = (
            f"Expected `labels` to be a list of class numbers, but got {found}: name the classes by their numbers, "
            "such as labels=[1, 2]."
        )
        with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
            construct(bad)
