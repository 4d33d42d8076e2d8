"""What the metrics read: no NaN, no probabilities, labels within rounding, regions and backgrounds, partial labels."""

from __future__ import annotations

import ast
import math
import re

import numpy as np
import pytest
import torch
from monai.data.meta_tensor import MetaTensor
from monai.networks.utils import one_hot
from places import ROOT

from monai_iou import handlers
from monai_iou.metrics import (
    BoundaryIoUMetric,
    CalibrationMetric,
    IoUMetric,
    LesionIoUMetric,
    ThresholdIoUMetric,
    boundary_iou,
    iou_counts,
    lesion_scores,
    overlap_scores,
    surface_scores,
)
from monai_iou.metrics.partly_labelled import annotated, labelled_rows

METRICS = [IoUMetric, LesionIoUMetric, BoundaryIoUMetric]
PAIR_FUNCTIONS = [overlap_scores, lesion_scores, boundary_iou, surface_scores]


def label_maps(seed: int = 0, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randint(0, classes, (2, 1, 9, 8), generator=generator) for _ in range(2)]
    return maps[0], maps[1]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("side", ["y_pred", "y"])
@pytest.mark.parametrize("form", ["labels", "maps"])
def test_one_nan_voxel_is_refused(metric, side, form):
    pair = dict(zip(("y_pred", "y"), (m.float() for m in label_maps()), strict=True))
    if form == "maps":
        pair = {name: one_hot(m, 3) for name, m in pair.items()}
    pair[side][1, 0, 4, 4] = math.nan
    with pytest.raises(ValueError, match=rf"Expected `{side}` to hold .*, but got nan: .*\.$"):
        metric(num_classes=3)(**pair)


@pytest.mark.parametrize("function", PAIR_FUNCTIONS)
@pytest.mark.parametrize("value", [math.nan, math.inf, 0.4, 0.999, -3.2])
def test_functions_of_masks_refuse_what_is_no_mask(function, value):
    mask = np.zeros((6, 6, 6), dtype=np.float32)
    mask[2:4, 2:4, 2:4] = 1
    wrong = mask.copy()
    wrong[3, 3, 3] = value
    for pair, name in (((wrong, mask), "prediction"), ((mask, wrong), "reference")):
        with pytest.raises(ValueError, match=rf"Expected `{name}` to be a mask of 0 and 1, but got {value:g}: .*\.$"):
            function(*pair)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("wrong", [torch.rand(2, 3, 9, 8), torch.randn(2, 3, 9, 8) * 9, torch.rand(2, 1, 9, 8)])
def test_probabilities_and_logits_are_refused(metric, wrong):
    with pytest.raises(ValueError, match=r"(argmax|threshold).*\.$"):
        metric(num_classes=3)(wrong, label_maps()[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("metric", METRICS)
def test_labels_within_rounding_are_those_labels(metric, dtype):
    pred, ref = label_maps()
    ref[0, 0, :3] = 255
    off = [(m.to(dtype) / 255 * (1 + 1e-7)) * 255 for m in (pred, ref)]
    assert not all(torch.equal(m, m.round()) for m in off)
    expected = metric(num_classes=3, ignore_index=255)(pred, ref)
    torch.testing.assert_close(metric(num_classes=3, ignore_index=255)(*off), expected, equal_nan=True)
    maps = [one_hot(m.clamp(max=2), 3) for m in (pred, ref)]
    expected = metric()(*maps)
    torch.testing.assert_close(metric()(*(m.to(dtype) * (1 - 1e-6) for m in maps)), expected, equal_nan=True)


def test_masks_within_rounding_are_masks():
    mask = np.zeros((6, 6, 6), dtype=np.float32)
    mask[2:4, 2:4, 2:4] = 1
    assert lesion_scores(mask * np.float32(0.99999), mask + np.float32(1e-6)).tp == 1
    counts = iou_counts(mask.astype(np.float64) * (1 - 1e-9), mask, 2)
    assert counts.intersection.tolist() == [208, 8]


REGIONS = torch.zeros(2, 3, 8, 8, 8)
REGIONS[:, 0, 1:7, 1:7, 1:7] = REGIONS[:, 1, 2:6, 2:6, 2:6] = REGIONS[:, 2, 3:5, 3:5, 3:5] = 1


@pytest.mark.parametrize("metric", METRICS)
def test_region_0_of_overlapping_maps_counts_alike_in_all_metrics(metric):
    predicted = REGIONS.clone()
    predicted[:, 0, 1] = 0
    got = metric()(predicted, REGIONS)
    assert got.shape == (2, 3)
    assert (got[:, 0] < 1).all()
    assert (got[:, 1:] == 1).all()
    assert metric()(predicted * 0, REGIONS * 0).shape == (2, 3)
    assert metric(include_background=False)(predicted, REGIONS).shape == (2, 2)


@pytest.mark.parametrize("metric", [LesionIoUMetric, BoundaryIoUMetric])
def test_a_background_is_left_out_by_default(metric):
    pred, ref = label_maps()
    maps = [one_hot(m, 3) for m in (pred, ref)]
    for pair in ((pred, ref), maps, (maps[0], ref), (pred, maps[1]), ([*maps[0]], [*maps[1].bool()])):
        assert metric(num_classes=3)(*pair).shape == (2, 2)
        assert metric(num_classes=3, include_background=True)(*pair).shape == (2, 3)
    hidden = maps[1] * (ref != 2)
    assert metric(ignore_index=9)(maps[0], hidden).shape == (2, 2)
    named = metric(reduction="mean_batch", return_with_label=True)
    named(*maps)
    assert list(named.aggregate()) == ["label_1", "label_2"]
    named.reset()
    named(REGIONS, REGIONS)
    assert list(named.aggregate()) == ["label_0", "label_1", "label_2"]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("reduction", ["mean", "mean_batch", "sum_channel"])
def test_classes_that_were_not_annotated_take_no_part(metric, reduction):
    pred, ref = label_maps()
    labelled = torch.tensor([[True, True, False], [True, False, True]])
    full = metric(include_background=True, num_classes=3, reduction=reduction)
    scores = full(pred, ref)
    assert not scores.isnan().any()
    expected = scores.masked_fill(~labelled, math.nan)
    maps = one_hot(ref, 3).masked_fill(~labelled[:, :, None, None], math.nan)
    calls = [
        {"y_pred": pred, "y": ref, "labelled": labelled},
        {"y_pred": [*pred], "y": [*ref], "labelled": labelled.tolist()},
        {"y_pred": pred, "y": maps},
        {"y_pred": one_hot(pred, 3), "y": maps, "labelled": np.ones((2, 3), dtype=bool)},
    ]
    for call in calls:
        partly = metric(include_background=True, num_classes=3, reduction=reduction)
        torch.testing.assert_close(partly(**call), expected, equal_nan=True)
        full._synced_tensors, full._synced = None, False
        aggregate = partly.aggregate()
        wanted = {
            "mean": expected.nanmean(1).nanmean().reshape(1),
            "mean_batch": expected.nanmean(0),
            "sum_channel": expected.nansum(1),
        }[reduction]
        torch.testing.assert_close(aggregate, wanted)


@pytest.mark.parametrize("labelled", [None, [[True, False, True]], torch.tensor([[True, False, True]])])
def test_a_default_device_does_not_part_what_was_annotated(labelled):
    maps = one_hot(label_maps()[1], 3).float()[:1]
    if labelled is None:
        maps[:, 1] = torch.nan
    with torch.device("meta"):
        known = labelled_rows(labelled, 1)[0]
        left, found = annotated(maps[0], 3, known, None)
    assert left.device.type == found.device.type == "cpu"
    assert found.tolist() == [True, False, True]
    assert not left[1].any()


@pytest.mark.parametrize("metric", METRICS)
def test_a_default_device_takes_no_part_in_scores(metric):
    """That of a Mac has no float64, in which scores are averaged."""
    pred, ref = ([MetaTensor(image, affine=torch.eye(4)) for image in images] for images in label_maps())

    def scores():
        scored = metric(num_classes=3)
        found = [scored(pred, ref), scored.aggregate(), metric(num_classes=3).aggregate()]
        return [*found, scored.summary()] if hasattr(scored, "summary") else found

    expected = scores()
    with torch.device("meta"):
        found = scores()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_summaries_leave_out_what_was_not_annotated():
    pred, ref = label_maps()
    labelled = torch.tensor([[True, False, True], [True, True, True]])
    metric = IoUMetric(num_classes=3)
    metric(pred, ref, labelled=labelled)
    alone = IoUMetric(num_classes=3)
    alone(pred[1:], ref[1:])
    counts, second = metric.get_counts(), alone.get_counts()
    assert counts.union[0, 1] == 0
    assert metric.summary()["iou_d_per_class"][1] == pytest.approx(alone.summary()["iou_d_per_class"][1])
    assert counts.union[1].equal(second.union[0])
    lesions = LesionIoUMetric(num_classes=3, threshold=0.1)
    lesions(pred, ref, labelled=labelled)
    one = LesionIoUMetric(num_classes=3, threshold=0.1)
    one(pred[1:], ref[1:])
    assert lesions.summary()[0] == pytest.approx(one.summary()[0], nan_ok=True)
    assert lesions.summary()[1]["images"] == 2


def test_nothing_was_annotated():
    pred, ref = label_maps()
    metric = IoUMetric(num_classes=3, ignore_empty=False)
    assert metric(pred, ref, labelled=torch.zeros(2, 3, dtype=torch.bool)).isnan().all()
    assert metric.aggregate().isnan().all()
    assert math.isnan(metric.summary()["iou_d"])


@pytest.mark.parametrize(
    ("labelled", "text"),
    [
        (torch.ones(2, 3), "Expected `labelled` to be bool of shape (2, C), one row per image, but got torch.float32"),
        (torch.ones(1, 3) > 0, "but got torch.bool of shape (1, 3): say for each image which classes were annotated."),
        (torch.ones(2, 2) > 0, "Expected `labelled` to have 3 columns, one per class, but got 2: count the background"),
        (
            [[True, True, True], [True, False]],
            "Expected `labelled` to have shape (2, C), but got rows of [2, 3] values: give one value per image and "
            "class.",
        ),
        (
            [["yes"] * 3, ["no"] * 3],
            "Expected `labelled` to have shape (2, C), but got list of other values: give one value per image and "
            "class.",
        ),
    ],
)
def test_refused_labelled(labelled, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        IoUMetric(num_classes=3)(*label_maps(), labelled=labelled)


@pytest.mark.parametrize("make", [IoUMetric, LesionIoUMetric, BoundaryIoUMetric, CalibrationMetric, ThresholdIoUMetric])
@pytest.mark.parametrize("index", [255.0, 2.5, "255", True, [1]])
def test_the_ignored_label_is_an_integer_before_any_image_is_read(make, index):
    with pytest.raises(TypeError, match="Expected `ignore_index` to be None or an integer, but got"):
        make(ignore_index=index)
    with pytest.raises(TypeError, match="Expected `ignore_index` to be None or an integer, but got"):
        iou_counts(torch.zeros(4), torch.zeros(4), 2, ignore_index=index)


@pytest.mark.parametrize("make", METRICS)
def test_the_number_of_classes_is_an_integer_before_any_image_is_read(make):
    for number in (2.5, "3", True):
        with pytest.raises(TypeError, match="Expected `num_classes` to be an integer, but got"):
            make(num_classes=number)
        with pytest.raises(TypeError, match="Expected `num_classes` to be an integer, but got"):
            iou_counts(torch.zeros(4), torch.zeros(4), number)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"connectivity": 5}, "Expected `connectivity` to be 6, 18 or 26 in 3D, or 4 or 8 in 2D, but got 5: choose"),
        ({"connectivity": True}, "but got True: choose one of these, or None for the largest."),
        ({"min_volume_mm3": math.nan}, "Expected `min_volume_mm3` to be a finite number at least 0, but got nan: "),
        (
            {"dilation": -1},
            "Expected `dilation` to be at least 0, but got -1: give the width in voxels: 0 for none, or 1 as in "
            "BraTS-METS.",
        ),
        ({"threshold": None}, 'Expected `threshold` to be an IoU in [0, 1] or "any", but got None: '),
    ],
)
def test_lesion_options_are_checked_before_a_training_and_not_at_its_first_validation(options, text):
    for make in (LesionIoUMetric, handlers.LesionIoUHandler):
        with pytest.raises(ValueError, match=re.escape(text)):
            make(**options)


def test_a_line_is_scored_as_an_image_of_one_row():
    reference, prediction = torch.tensor([[[0, 1, 1, 0, 1, 0]]]), torch.tensor([[[1, 1, 1, 0, 0, 0]]])
    for score in ("f1", "pq", "cc_iou"):
        line, row = (LesionIoUMetric(score=score, num_classes=2) for _ in range(2))
        assert line(prediction, reference, spacing=2.0) == row(
            prediction[..., None, :], reference[..., None, :], spacing=(1.0, 2.0)
        )


@pytest.mark.parametrize("function", PAIR_FUNCTIONS)
def test_masks_of_bfloat16_are_scored_like_others(function):
    prediction, reference = (maps[0, 0] == 1 for maps in label_maps())
    assert function(prediction.bfloat16(), reference.bfloat16()) == function(prediction, reference)
    numbers = [mask.int() for mask in (prediction, reference)]
    expected = lesion_scores(*numbers, instances=True)
    assert lesion_scores(*(number.bfloat16() for number in numbers), instances=True) == expected


def test_tolerances_are_a_list_of_numbers():
    mask = np.ones((3, 3), dtype=bool)
    for wrong in (1.0, None, ("1",)):
        with pytest.raises(ValueError, match="Expected `tolerances` to be a list of distances of at least 0 mm, but"):
            surface_scores(mask, mask, tolerances=wrong)


def messages(source: str) -> list[str]:
    """The text of every message that a function puts together, with braces for what it fills in."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "message":
            parts = node.value.values if isinstance(node.value, ast.JoinedStr) else [node.value]
            found.append("".join(str(p.value) if isinstance(p, ast.Constant) else "{}" for p in parts))
    return found


def incomplete(text: str) -> bool:
    return re.fullmatch(r"Expected .*, but got .*: .*\.", text) is None


def test_every_message_of_the_metrics_has_a_remedy_and_ends_in_a_period():
    found = [text for path in (ROOT / "monai_iou/metrics").glob("*.py") for text in messages(path.read_text())]
    assert len(found) > 25
    assert [text for text in found if incomplete(text)] == []


def test_the_check_of_messages_can_fail():
    source = 'message = f"Expected `x` to be 1, but got {x}"\nmessage = "Expected `x`: take 2."'
    assert [incomplete(text) for text in messages(source)] == [True, True]


def test_handlers_leave_the_background_to_the_metric():
    for name in ("LesionIoUHandler", "BoundaryIoUHandler"):
        assert getattr(handlers, name)().metric_fn.include_background is None


ALL_METRICS = [*METRICS, ThresholdIoUMetric, CalibrationMetric]


def made_metric(metric, **options):
    """A metric of hard masks, or of probabilities, for three classes."""
    return metric(**options) if metric in (ThresholdIoUMetric, CalibrationMetric) else metric(num_classes=3, **options)


@pytest.mark.parametrize("metric", ALL_METRICS)
@pytest.mark.parametrize("form", ["labels", "maps"])
@pytest.mark.parametrize("ignore", [2, 255])
def test_ignored_voxels_count_nowhere_whatever_was_annotated(metric, form, ignore):
    """Also if the label to ignore is that of a class which was not annotated, or is no class at all."""
    prediction, labels = label_maps(4)
    labelled = torch.tensor([[True, True, False], [True, True, True]])
    where = labels == 2
    labels = torch.where(where, ignore, labels)
    classes = torch.arange(3).view(1, 3, 1, 1)
    reference = labels if form == "labels" else (labels == classes).float()
    spoilt = torch.where(where, (prediction + 1) % 3, prediction)
    found = [
        made_metric(metric, ignore_index=ignore, include_background=True)(one_hot(p, 3), reference, labelled=labelled)
        for p in (prediction, spoilt)
    ]
    assert found[0].isfinite().any()
    torch.testing.assert_close(*found, equal_nan=True)
    by_labels = made_metric(metric, ignore_index=ignore, include_background=True)
    torch.testing.assert_close(by_labels(one_hot(prediction, 3), labels, labelled=labelled), found[0], equal_nan=True)


@pytest.mark.parametrize("metric", [LesionIoUMetric, BoundaryIoUMetric, ThresholdIoUMetric, CalibrationMetric])
def test_the_background_of_one_hot_references_is_left_out_however_much_was_annotated(metric):
    """The prediction, thresholded outputs of a sigmoid, has none that could tell."""
    prediction = (torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    reference = one_hot(torch.randint(0, 3, (2, 1, 12, 12), generator=torch.Generator().manual_seed(1)), 3)
    for labelled in (None, torch.tensor([[True, True, False], [True, True, True]])):
        assert metric()(prediction, reference, labelled=labelled).shape == (2, 2)


@pytest.mark.parametrize("metric", [ThresholdIoUMetric, CalibrationMetric])
def test_named_classes_are_nan_before_the_first_image(metric):
    found = metric(reduction="mean_batch", return_with_label=["a", "b"]).aggregate()
    assert list(found) == ["a", "b"]
    assert all(math.isnan(value) for value in found.values())


@pytest.mark.parametrize("metric", [LesionIoUMetric, BoundaryIoUMetric, ThresholdIoUMetric, CalibrationMetric])
@pytest.mark.parametrize("together", [True, False])
def test_images_with_all_maps_tell_of_those_without_if_there_is_a_background(metric, together):
    """A map that is NaN, or missing, cannot; the thresholded outputs of a sigmoid say the contrary."""
    prediction = (torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    reference = one_hot(torch.randint(0, 3, (2, 1, 12, 12), generator=torch.Generator().manual_seed(1)), 3)
    reference[1, 2] = math.nan
    scorer = metric()
    if together:
        assert scorer(prediction, reference).shape == (2, 2)
    else:
        assert [scorer(prediction[[i]], reference[[i]]).shape for i in range(2)] == [(1, 2), (1, 2)]
    scorer.aggregate()
