"""IoU: counts against a slow loop, scores against MONAI where MONAI is right, and every refusal."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.metrics import MeanIoU, compute_iou
from monai.networks.utils import one_hot

from monai_iou.metrics import (
    BoundaryIoUMetric,
    CalibrationMetric,
    IoUMetric,
    LesionIoUMetric,
    ThresholdIoUMetric,
    fine_grained_iou,
    iou_counts,
    iou_from_counts,
)

SHAPES = [(7,), (5, 6), (4, 5, 3)]


def label_maps(seed: int, shape: tuple[int, ...], classes: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size = (batch, 1, *shape)
    return torch.randint(0, classes, size, generator=generator), torch.randint(0, classes, size, generator=generator)


def slow_iou(
    pred: torch.Tensor, ref: torch.Tensor, classes: int, keep: torch.Tensor | None = None
) -> list[list[float]]:
    """Voxel by voxel, with sets."""
    rows = []
    for image in range(len(ref)):
        scores = []
        for c in range(classes):
            pairs = [
                (int(p) == c, int(r) == c)
                for p, r, k in zip(
                    pred[image].flatten(),
                    ref[image].flatten(),
                    torch.ones_like(ref[image]).flatten() if keep is None else keep[image].flatten(),
                    strict=True,
                )
                if bool(k)
            ]
            union = sum(p or r for p, r in pairs)
            scores.append(sum(p and r for p, r in pairs) / union if union else math.nan)
        rows.append(scores)
    return rows


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), classes=st.integers(2, 6), shape=st.sampled_from(SHAPES), drop=st.booleans())
def test_every_form_of_input_gives_the_slow_loop_value(seed, classes, shape, drop):
    pred, ref = label_maps(seed, shape, classes)
    expected = torch.tensor(slow_iou(pred, ref, classes))[:, 1 if drop else 0 :]
    pred_maps, ref_maps = one_hot(pred, classes), one_hot(ref, classes)
    forms = [
        (pred, ref),
        (pred_maps, ref_maps),
        (pred, ref_maps),
        (pred_maps.bool(), ref.to(torch.uint8)),
        (list(pred), list(ref_maps)),
        (MetaTensor(pred.float()), MetaTensor(ref.to(torch.int16))),
        (pred.numpy(), ref.numpy().astype(">u2")),
    ]
    for y_pred, y in forms:
        got = IoUMetric(include_background=not drop, num_classes=classes)(y_pred, y)
        assert type(got) is torch.Tensor
        torch.testing.assert_close(got, expected.float(), equal_nan=True)


@pytest.mark.parametrize("include_background", [True, False])
@pytest.mark.parametrize("ignore_empty", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_monai(shape, ignore_empty, include_background):
    pred, ref = label_maps(3, shape, 5, batch=3)
    ref[ref == 4] = 0  # an absent class, predicted in places
    pred[0][pred[0] == 4] = 0
    expected = compute_iou(one_hot(pred, 5), one_hot(ref, 5), include_background, ignore_empty)
    got = IoUMetric(include_background, ignore_empty=ignore_empty, num_classes=5)(pred, ref)
    torch.testing.assert_close(got, expected, equal_nan=True)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum", "mean_batch", "sum_batch", "mean_channel", "sum_channel"])
def test_reductions_equal_monai_where_something_is_averaged(reduction):
    pred, ref = label_maps(5, (6, 6), 4, batch=4)
    ref[1][ref[1] == 2] = 0
    ours = IoUMetric(reduction=reduction, num_classes=4, ignore_empty=True, get_not_nans=True)
    theirs = MeanIoU(reduction=reduction, get_not_nans=True)
    ours(pred, ref)
    theirs(one_hot(pred, 4), one_hot(ref, 4))
    for got, expected in zip(ours.aggregate(), theirs.aggregate(), strict=True):
        torch.testing.assert_close(got, expected, equal_nan=True)
    # MONAI's reduction overwrites NaN in its input; the second call shows whether ours does
    torch.testing.assert_close(ours.aggregate()[0], ours.aggregate()[0], equal_nan=True)


class AverageMeter:
    """The running mean of MONAI's BraTS tutorial."""

    def __init__(self):
        self.sum = self.count = 0

    def update(self, value, n):
        self.sum = self.sum + value * n
        self.count = self.count + n
        with np.errstate(invalid="ignore"):
            self.average = np.where(self.count > 0, self.sum / self.count, self.sum)


def test_a_running_mean_of_numbers_for_nan_is_monais():
    """The recipe of docs/losses.md: without it, NaN with n = 0 makes the running mean NaN for good."""
    meters = [AverageMeter() for _ in range(3)]
    metrics = [IoUMetric(reduction="mean_batch", ignore_empty=True, get_not_nans=True) for _ in range(2)]
    metrics.append(MeanIoU(reduction="mean_batch", get_not_nans=True))
    for case in range(4):
        pred, ref = (torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(case)) > s for s in (0.4, 0.5))
        if case in (0, 2):
            ref[:, 2] = False
        for index, (metric, meter) in enumerate(zip(metrics, meters, strict=True)):
            metric.reset()
            metric(pred.float(), ref.float())
            score, counted = metric.aggregate()
            meter.update((score.nan_to_num() if index == 0 else score).numpy(), n=counted.numpy())
    ours, as_it_is, theirs = (meter.average for meter in meters)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert np.isnan(as_it_is).tolist() == [False, False, True]


def test_ignore_empty_table():
    ref = torch.tensor([[[0, 0, 0, 0]], [[0, 0, 0, 0]], [[0, 1, 1, 0]]])
    pred = torch.tensor([[[0, 0, 0, 0]], [[0, 1, 0, 0]], [[0, 1, 0, 0]]])
    nan = math.nan
    for ignore_empty, expected in (("both", [nan, 0, 0.5]), (True, [nan, nan, 0.5]), (False, [1, 0, 0.5])):
        got = IoUMetric(False, ignore_empty=ignore_empty, num_classes=2)(pred, ref)
        torch.testing.assert_close(got[:, 0], torch.tensor(expected, dtype=torch.float32), equal_nan=True)


@pytest.mark.parametrize("reduction", ["mean", "mean_batch", "mean_channel"])
def test_average_over_nothing_is_nan_and_changes_nothing(reduction):
    metric = IoUMetric(False, reduction=reduction, num_classes=2)
    empty = torch.zeros((2, 1, 4, 4), dtype=torch.uint8)
    metric(empty, empty)
    assert metric.aggregate().isnan().all()
    assert metric.get_buffer().isnan().all()
    assert metric.aggregate().isnan().all()


def test_no_data_at_all():
    metric = IoUMetric(False, num_classes=3, reduction="mean_batch")
    assert metric.aggregate().isnan().all()
    assert metric.aggregate().shape == (2,)
    assert math.isnan(metric.aggregate("mean").item())
    assert metric.get_buffer().shape == (0, 2)
    with pytest.raises(ValueError, match="at least one image"):
        metric.summary()


@pytest.mark.parametrize("ignore_index", [2, 255, -1])
@pytest.mark.parametrize("dtype", [torch.int16, torch.float32, torch.int64])
def test_ignored_voxels_have_no_effect_at_all(ignore_index, dtype):
    pred, ref = label_maps(11, (6, 5, 4), 4)
    hidden = torch.rand(ref.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    if ignore_index == 2:
        hidden |= ref == 2
    expected = torch.tensor(slow_iou(pred, ref, 4, keep=~hidden))
    masked = ref.masked_fill(hidden, ignore_index).to(dtype)
    for fill in (0, 3):
        got = IoUMetric(num_classes=4, ignore_index=ignore_index)(pred.masked_fill(hidden, fill).to(dtype), masked)
        torch.testing.assert_close(got, expected.float(), equal_nan=True)
    if ignore_index != 2:
        # nor do values there have to be classes
        got = IoUMetric(num_classes=4, ignore_index=ignore_index)(pred.masked_fill(hidden, 77).to(dtype), masked)
        torch.testing.assert_close(got, expected.float(), equal_nan=True)


def test_ignore_index_does_not_wrap_around_in_uint8():
    # torch finds -1 in a uint8 map that holds 255
    ref = torch.tensor([[[0, 1, 1, 255]]], dtype=torch.uint8)
    pred = torch.tensor([[[0, 1, 0, 1]]], dtype=torch.uint8)
    with pytest.raises(ValueError, match="but got 255"):
        IoUMetric(num_classes=2, ignore_index=-1)(pred, ref)
    torch.testing.assert_close(IoUMetric(num_classes=2, ignore_index=255)(pred, ref), torch.tensor([[0.5, 0.5]]))


@pytest.mark.parametrize("ignore_index", [1, -1, 9])
def test_ignore_index_of_per_class_maps_has_monais_meaning(ignore_index):
    pred, ref = label_maps(17, (5, 5), 3)
    hidden = ref == 1 if ignore_index == 1 else torch.rand(ref.shape, generator=torch.Generator().manual_seed(2)) < 0.4
    maps = one_hot(ref, 3)
    if ignore_index != 1:
        maps = maps * ~hidden  # no channel claims the voxel
    expected = torch.tensor(slow_iou(pred, ref, 3, keep=~hidden))
    for y_pred in (pred, one_hot(pred, 3)):
        got = IoUMetric(num_classes=3, ignore_index=ignore_index)(y_pred, maps)
        torch.testing.assert_close(got, expected.float(), equal_nan=True)


def test_overlapping_regions_and_single_maps():
    ref = torch.tensor([[[1, 1, 1, 0], [0, 1, 1, 0]]])
    pred = torch.tensor([[[1, 1, 0, 0], [0, 1, 1, 1]]])
    torch.testing.assert_close(IoUMetric()(pred, ref), torch.tensor([[2 / 3, 2 / 3]]))
    # one channel of 0 and 1 is one map, as after a sigmoid; there is no background in it to leave out
    torch.testing.assert_close(IoUMetric(include_background=False)(pred[:, :1], ref[:, :1]), torch.tensor([[2 / 3]]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("classes", [2, 25, 120, 300])
def test_dtypes_and_many_classes(dtype, classes):
    limit = {torch.uint8: 256, torch.int8: 128, torch.bfloat16: 256}.get(dtype, 2048)
    pred, ref = label_maps(23, (9, 8, 7), min(classes, limit), batch=1)
    expected = compute_iou(one_hot(pred, classes), one_hot(ref, classes), ignore_empty=False)
    got = IoUMetric(num_classes=classes, ignore_empty=False)(pred.to(dtype), ref.to(dtype))
    torch.testing.assert_close(got, expected)


def test_more_voxels_than_a_chunk():
    pred, ref = label_maps(29, (90, 80, 83), 3, batch=1)
    expected = compute_iou(one_hot(pred, 3), one_hot(ref, 3))
    torch.testing.assert_close(IoUMetric(num_classes=3)(pred, ref), expected)
    torch.testing.assert_close(IoUMetric(num_classes=3)(pred.mT, ref.mT), expected)


def test_counts_add_over_parts():
    pred, ref = (t[0, 0] for t in label_maps(31, (8, 9), 4))
    whole = iou_counts(pred, ref, 4)
    parts = [iou_counts(pred[i : i + 3].numpy(), ref[i : i + 3].numpy(), 4) for i in range(0, 8, 3)]
    for total, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(total, sum(pieces))
    assert whole.union.equal(whole.prediction + whole.reference - whole.intersection)


def test_permuting_voxels_and_swapping_sides_change_nothing():
    pred, ref = label_maps(37, (50,), 4, batch=1)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    expected = IoUMetric(num_classes=4)(pred, ref)
    torch.testing.assert_close(IoUMetric(num_classes=4)(pred[..., order], ref[..., order]), expected)
    torch.testing.assert_close(IoUMetric(num_classes=4)(ref, pred), expected)


def test_summary_of_the_metric():
    pred, ref = label_maps(41, (6, 6), 3, batch=5)
    metric = IoUMetric(num_classes=3)
    metric(pred[:2], ref[:2])
    metric(pred[2:], ref[2:])
    summary = metric.summary(worst=(50,))
    assert summary["iou_i"] == pytest.approx(float(metric.aggregate("mean")), abs=1e-6)
    assert summary["iou_c"] == pytest.approx(float(metric.aggregate("mean_batch").mean()), abs=1e-6)
    joined = slow_iou(pred.reshape(1, -1), ref.reshape(1, -1), 3)[0]
    assert summary["iou_d_per_class"] == pytest.approx(joined, abs=1e-6)
    assert summary["iou_d"] == pytest.approx(np.mean(joined), abs=1e-6)
    assert summary["iou_i_worst_50"] <= summary["iou_i"]


def test_labels_in_the_result():
    pred, ref = label_maps(43, (6, 6), 3)
    metric = IoUMetric(False, "mean_batch", num_classes=3, return_with_label=True)
    metric(pred, ref)
    assert list(metric.aggregate()) == ["label_1", "label_2"]
    metric.return_with_label = ["edema", "core"]
    assert metric.aggregate()["core"] == pytest.approx(float(metric.get_buffer()[:, 1].mean()))
    metric.return_with_label = ["edema"]
    with pytest.raises(ValueError, match="name 2 classes, but got 1 name,"):
        metric.aggregate()


def test_reset_forgets():
    pred, ref = label_maps(47, (4, 4), 2)
    metric = IoUMetric(num_classes=2)
    metric(pred, ref)
    metric.aggregate()
    metric.reset()
    metric(ref, ref)
    assert metric.aggregate() == 1
    assert len(metric) == 2


LABELS = torch.tensor([[[0, 1, 2, 3]]])


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
@pytest.mark.parametrize("include_background", [True, False])
def test_without_num_classes_one_channel_is_one_binary_map_or_refused(dtype, include_background):
    pred, ref = torch.tensor([[[0, 1, 1, 0]]]).to(dtype), torch.tensor([[[0, 1, 0, 0]]]).to(dtype)
    torch.testing.assert_close(IoUMetric(include_background)(pred, ref), torch.tensor([[0.5]]))
    assert IoUMetric(include_background, num_classes=2)(pred, ref).shape == (1, 2 if include_background else 1)
    if dtype != torch.bool:
        labels = (LABELS * (LABELS < 3)).to(dtype)
        for pair in ((labels, ref), (pred, labels), (labels, labels)):
            with pytest.raises(ValueError, match="but got 2: pass `num_classes` if this is a label map"):
                IoUMetric(include_background)(*pair)


@pytest.mark.parametrize(
    ("arguments", "y_pred", "y", "text"),
    [
        (
            {},
            LABELS,
            LABELS,
            "Expected `y_pred` to hold 0 and 1 in its 1 channel, but got 2: pass `num_classes` if this is a label",
        ),
        (
            {},
            torch.full((1, 2, 4), 0.3),
            torch.ones((1, 2, 4)),
            "Expected `y_pred` to hold 0 and 1 in its 2 channels, but got 0.3: threshold it, or take the argmax",
        ),
        (
            {"num_classes": 4},
            LABELS * 0.5,
            LABELS,
            "Expected `y_pred` to hold whole class numbers, but got 0.5: take the argmax of probabilities first",
        ),
        (
            {"num_classes": 4},
            torch.tensor([[[0.0, math.nan, 1, 1]]]),
            LABELS,
            "Expected `y_pred` to hold whole class numbers, but got nan",
        ),
        (
            {"num_classes": 3},
            LABELS.clamp(max=2),
            LABELS,
            "Expected `y` to hold classes 0 to 2 (num_classes=3), but got 3: raise `num_classes`, or name the value as "
            "`ignore_index`",
        ),
        (
            {"num_classes": 4},
            LABELS - 1,
            LABELS,
            "Expected `y_pred` to hold classes 0 to 3 (num_classes=4), but got -1: map the value to one of these "
            "classes.",
        ),
        (
            {"num_classes": 3},  # an `ignore_index` leaves out labels of the reference alone
            LABELS,
            LABELS.clamp(max=2),
            "Expected `y_pred` to hold classes 0 to 2 (num_classes=3), but got 3: raise `num_classes`, or map the "
            "value to one of these classes.",
        ),
        (
            {"num_classes": 4},
            LABELS[..., :3],
            LABELS,
            "Expected `y_pred` and `y` to have the same spatial shape, but got (3,) and (4,): put them on one grid",
        ),
        (
            {},
            torch.ones((1, 2, 4)),
            torch.ones((1, 3, 4)),
            "Expected `y_pred` and `y` to have the same number of channels, but got 2 and 3",
        ),
        (
            {"num_classes": 4},
            torch.ones((1, 3, 4)),
            LABELS,
            "Expected `y_pred` and `y` to have 1 or num_classes=4 channels, but got 3 and 1",
        ),
        (
            {"num_classes": 4},
            torch.cat([LABELS, LABELS]),
            LABELS,
            "Expected `y_pred` and `y` to hold the same number of images, at least one, but got 2 and 1",
        ),
        (
            {"num_classes": 4},
            LABELS[0],
            LABELS,
            "Expected `y_pred` to have shape (B, C, *S) with 1 to 3 spatial dimensions, but got (1, 4)",
        ),
    ],
)
def test_refusals(arguments, y_pred, y, text):
    metric = IoUMetric(**arguments)
    with pytest.raises(ValueError, match=re.escape(text)):
        metric(y_pred, y)
    assert len(metric) == 0


def test_refused_arguments():
    with pytest.raises(ValueError, match='Expected `ignore_empty` to be True, False or "both", but got'):
        IoUMetric(ignore_empty="none")
    with pytest.raises(ValueError, match="Expected `num_classes` to be at least 1, but got 0"):
        IoUMetric(num_classes=0)
    with pytest.raises(ValueError, match="median"):
        IoUMetric(reduction="median")
    with pytest.raises(TypeError, match="Expected `y` to be a tensor, an array, or a list of them, but got NoneType"):
        IoUMetric()(torch.ones((1, 1, 4)))
    with pytest.raises(ValueError, match="percentages above 0 and up to 100"):
        fine_grained_iou(torch.ones(1, 1), torch.ones(1, 1), worst=(0,))
    with pytest.raises(ValueError, match=re.escape("the same shape (N, C)")):
        fine_grained_iou(torch.ones(1), torch.ones(1))
    with pytest.raises(ValueError, match="ignore_empty"):
        iou_from_counts(torch.ones(1), torch.ones(1), torch.ones(1), ignore_empty="nan")


@pytest.mark.parametrize("make", [IoUMetric, BoundaryIoUMetric, LesionIoUMetric, ThresholdIoUMetric, CalibrationMetric])
def test_images_of_one_call_with_other_classes_are_named(make):
    images = [torch.ones((channels, 4, 4)) for channels in (2, 3)]
    text = (
        "Expected every image to have the same classes, but got [2, 3] of them: set `include_background` and "
        "`num_classes`, or use one metric for each kind of image."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        make(include_background=True)(images, images)


def test_images_with_other_classes_are_named():
    metric = IoUMetric()
    metric(torch.ones((1, 2, 4)), torch.ones((1, 2, 4)))
    metric(torch.ones((1, 3, 4)), torch.ones((1, 3, 4)))
    with pytest.raises(ValueError, match=re.escape("Expected every image to have the same classes, but got [2, 3]")):
        metric.aggregate()
