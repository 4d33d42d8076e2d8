"""Lesion scores: by hand, against slow definitions of matching and regions, and unmoved by what must not matter."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.metrics import DiceMetric, compute_panoptic_quality
from scipy import ndimage

from monai_iou.metrics import DetectionScores, LesionIoUMetric, lesion_scores, recall_by_volume
from monai_iou.metrics.components import find_overlaps, match_one_to_one

SPACING = (0.9137, 1.1731, 2.5157)


def blobs(seed: int, shape: tuple[int, ...] = (24, 22, 14), count: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Reference boxes, and a prediction that moves, drops, grows and invents some."""
    generator = np.random.default_rng(seed)
    reference, prediction = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    for _ in range(count):
        low = generator.integers(0, np.array(shape) - 4)
        size = generator.integers(1, 5, len(shape))
        kind = generator.integers(0, 5)
        if kind != 0:
            reference[tuple(slice(a, a + n) for a, n in zip(low, size, strict=True))] = True
        if kind != 1:
            moved = np.maximum(low + generator.integers(-1, 2, len(shape)), 0)
            prediction[tuple(slice(a, a + n) for a, n in zip(moved, size + (kind == 2), strict=True))] = True
    return prediction, reference


def neighbours(dimensions: int, connectivity: int | None) -> np.ndarray:
    reach = {4: 1, 8: 2, 6: 1, 18: 2, 26: 3, None: dimensions}[connectivity]
    return ndimage.generate_binary_structure(dimensions, reach)


def best_matching(iou: np.ndarray, threshold: float) -> tuple[int, float]:
    """Every one-to-one choice of pairs, by recursion over the rows."""
    if not len(iou):
        return 0, 0.0
    choices = [best_matching(iou[1:], threshold)]
    for column in np.flatnonzero((iou[0] > 0) & (iou[0] >= threshold)):
        rest = iou[1:].copy()
        rest[:, column] = 0
        count, total = best_matching(rest, threshold)
        choices.append((count + 1, total + float(iou[0, column])))
    return max(choices)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    connectivity=st.sampled_from([6, 18, 26, None]),
    threshold=st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7]),
)
def test_detection_equals_the_slow_definition(seed, connectivity, threshold):
    prediction, reference = blobs(seed)
    structure = neighbours(3, connectivity)
    r_map, r_count = ndimage.label(reference, structure)
    p_map, p_count = ndimage.label(prediction, structure)
    iou = np.zeros((r_count, p_count))
    for i, j in itertools.product(range(r_count), range(p_count)):
        r, p = r_map == i + 1, p_map == j + 1
        iou[i, j] = (r & p).sum() / (r | p).sum()
    tp, total = best_matching(iou, threshold)
    scores = lesion_scores(prediction, reference, connectivity=connectivity, threshold=threshold)
    assert (scores.tp, scores.fp, scores.fn) == (tp, p_count - tp, r_count - tp)
    assert scores.iou_sum == pytest.approx(total)
    if r_count:
        assert scores.recall_any == (iou > 0).any(axis=1).mean()
    if p_count and r_count:
        assert scores.precision_any == (iou > 0).any(axis=0).mean()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), spacing=st.sampled_from([SPACING, (1.0, 1.0, 1.0)]))
def test_region_scores_equal_distance_transforms_of_every_component(seed, spacing):
    prediction, reference = blobs(seed)
    reference[3, 4, 5] = True
    r_map, count = ndimage.label(reference, neighbours(3, None))
    # one transform of the whole volume a component, uncropped; argmin takes the lower number of a tie
    distances = [ndimage.distance_transform_edt(r_map != i + 1, sampling=spacing) for i in range(count)]
    region = np.argmin(np.round(distances, 9), axis=0) + 1
    iou, dice = [], []
    for i in range(1, count + 1):
        p, r = prediction[region == i], (r_map == i)[region == i]
        iou.append((p & r).sum() / (p | r).sum())
        dice.append(2 * (p & r).sum() / (p.sum() + r.sum()))
    scores = lesion_scores(prediction, reference, spacing=spacing)
    assert scores.cc_iou == pytest.approx(np.mean(iou))
    assert scores.cc_dice == pytest.approx(np.mean(dice))
    assert [lesion.region_iou for lesion in scores.lesions if lesion.outcome != "fp"] == pytest.approx(iou)


@pytest.mark.filterwarnings("ignore:Voronoi computation is running on CPU")
def test_cc_dice_equals_monais_per_component_dice():
    # two components far apart, so that ties and MONAI's unit spacing do not matter
    reference, prediction = np.zeros((20, 20, 12), dtype=bool), np.zeros((20, 20, 12), dtype=bool)
    reference[2:5, 2:6, 2:5] = reference[14:18, 13:15, 6:9] = True
    prediction[3:6, 2:6, 2:5] = prediction[14:17, 12:15, 6:8] = True
    maps = [torch.from_numpy(np.stack([~m, m])[None].astype(np.float32)) for m in (prediction, reference)]
    expected = DiceMetric(include_background=False, per_component=True)(*maps)
    assert lesion_scores(prediction, reference).cc_dice == pytest.approx(float(expected), abs=1e-6)


def test_panoptic_quality_equals_monais():
    for seed in range(6):
        prediction, reference = blobs(seed)
        structure = neighbours(3, 6)
        maps = [torch.from_numpy(ndimage.label(m, structure)[0]) for m in (prediction, reference)]
        for name in ("sq", "rq", "pq"):
            expected = float(compute_panoptic_quality(*maps, metric_name=name, match_iou_threshold=0.5))
            # MONAI asks for more than the threshold, we for no less
            scores = lesion_scores(prediction, reference, connectivity=6, threshold=0.5 + 1e-9)
            assert getattr(scores, name) == pytest.approx(expected, abs=1e-5)


def test_most_matches_come_first_below_one_half():
    # taking the best pair (0, 0) first would leave row 1 and column 1 without a partner
    row = np.zeros((3, 40), dtype=bool)
    reference, prediction = row.copy(), row.copy()
    reference[0, 0:6], reference[0, 7:12] = True, True
    prediction[0, 2:10], prediction[0, 0:1] = True, True
    scores = lesion_scores(prediction, reference, threshold="any")
    assert (scores.tp, scores.fp, scores.fn) == (2, 0, 0)
    assert scores.at(0.1).tp == 2
    assert scores.at(0.4).tp == 1
    assert scores.at(0.5).tp == 0


def test_every_way_of_splitting_into_groups_gives_the_same():
    generator = np.random.default_rng(1)
    for _ in range(40):
        r, p = generator.integers(0, 6, 60), generator.integers(0, 7, 60)
        overlaps = find_overlaps(r, p, 5, 6)
        iou = np.zeros((5, 6))
        iou[overlaps.reference, overlaps.prediction] = overlaps.iou
        matches = match_one_to_one(overlaps, np.flatnonzero(overlaps.iou >= 0.05))
        assert len(set(overlaps.reference[matches])) == len(set(overlaps.prediction[matches])) == len(matches)
        assert (len(matches), pytest.approx(overlaps.iou[matches].sum())) == best_matching(iou, 0.05)


def test_empty_cases():
    lesion, nothing = np.zeros((6, 6, 6), dtype=bool), np.zeros((6, 6, 6), dtype=bool)
    lesion[2:4, 2:4, 2] = True
    nan = pytest.approx(math.nan, nan_ok=True)
    names = ("precision", "recall", "f1", "sq", "rq", "pq", "cc_iou", "cc_dice", "recall_any", "precision_any")
    table = {
        "both": (nothing, nothing, [nan] * 10),
        "false positive": (lesion, nothing, [0, nan, 0, 0, 0, 0, 0, 0, nan, 0]),
        "missed": (nothing, lesion, [nan, 0, 0, 0, 0, 0, 0, 0, 0, nan]),
        "perfect": (lesion, lesion, [1] * 10),
    }
    for name, (prediction, reference, expected) in table.items():
        scores = lesion_scores(prediction, reference)
        assert [getattr(scores, n) for n in names] == expected, name
        assert scores.both_empty is (name == "both")
        area = scores.curve().f1_area
        assert area == (nan if name == "both" else float(name == "perfect"))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), before=st.integers(0, 5), axis=st.integers(0, 2))
def test_padding_and_flipping_move_only_the_centroids(seed, before, axis):
    prediction, reference = blobs(seed)
    scores = lesion_scores(prediction, reference, spacing=SPACING)
    wider = [np.pad(m, [(before, 3), (0, before), (1, 1)]) for m in (prediction, reference)]
    padded = lesion_scores(*wider, spacing=SPACING)
    flipped = lesion_scores(np.flip(prediction, axis), np.flip(reference, axis), spacing=SPACING)
    for name in ("tp", "fp", "fn", "iou_sum"):
        assert getattr(flipped, name) == pytest.approx(getattr(scores, name))
    for name in ("tp", "fp", "fn", "iou_sum", "cc_iou", "cc_dice"):
        assert getattr(padded, name) == pytest.approx(getattr(scores, name), nan_ok=True)
    for lesion, moved in zip(scores.lesions, padded.lesions, strict=True):
        assert moved.centroid_voxel == pytest.approx(np.array(lesion.centroid_voxel) + np.array([before, 0, 1]))
        assert (moved.outcome, moved.component, moved.volume_ml) == (lesion.outcome, lesion.component, lesion.volume_ml)


def test_records():
    reference, prediction = np.zeros((10, 12, 8), dtype=bool), np.zeros((10, 12, 8), dtype=bool)
    reference[1:3, 1:3, 1:3] = reference[6, 8, 5] = True
    prediction[1:3, 1:3, 1:4] = prediction[9, 0, 7] = True
    affine = np.array([[0, -2.0, 0, 10], [3.0, 0, 0, -5], [0, 0, 4.0, 7], [0, 0, 0, 1]])
    scores = lesion_scores(prediction, reference, affine=affine, label=4)
    found, missed, false = scores.lesions
    assert [(x.label, x.component, x.outcome, x.matched_component) for x in scores.lesions] == [
        (4, 1, "tp", 1),
        (4, 2, "fn", None),
        (4, 2, "fp", None),
    ]
    assert found.volume_ml == pytest.approx(8 * 24 / 1000)  # 3 x 2 x 4 mm, from the affine
    assert found.iou == pytest.approx(8 / 12)
    assert found.centroid_voxel == (1.5, 1.5, 1.5)
    assert found.centroid_mm == pytest.approx((10 - 3.0, -5 + 4.5, 7 + 6.0))
    assert missed.centroid_mm == pytest.approx((10 - 16.0, -5 + 18.0, 7 + 20.0))
    assert (missed.iou, false.iou, math.isnan(false.region_iou)) == (0, 0, True)
    without = lesion_scores(prediction, reference, spacing=(3, 2, 4)).lesions[0]
    assert without.centroid_mm == pytest.approx((4.5, 3.0, 6.0))


def test_scores_add_over_cases():
    cases = [lesion_scores(*blobs(seed)) for seed in range(4)]
    total = sum(cases, DetectionScores(0, 0, 0, 0.0))
    assert (total.tp, total.fn) == (sum(c.tp for c in cases), sum(c.fn for c in cases))
    assert total.pq == pytest.approx(sum(c.iou_sum for c in cases) / (total.tp + (total.fp + total.fn) / 2))


def test_curve_and_recall_by_volume():
    scores = lesion_scores(*blobs(3))
    curve = scores.curve(thresholds=(0.0, 0.25, 0.5, 1.0))
    expected = [lesion_scores(*blobs(3), threshold=t).f1 for t in (0, 0.25, 0.5, 1)]
    assert curve.f1.tolist() == expected
    assert (np.diff(curve.recall) <= 0).all()
    by_hand = (expected[0] + expected[1]) / 8 + (expected[1] + expected[2]) / 8 + (expected[2] + expected[3]) / 4
    assert curve.f1_area == pytest.approx(by_hand)
    bins = recall_by_volume(scores.lesions, edges_ml=(0, 0.01, 0.02, math.inf))
    assert sum(b.count for b in bins) == scores.tp + scores.fn
    assert sum(b.found for b in bins) == scores.tp
    assert math.isnan(recall_by_volume(scores.lesions, edges_ml=(50, 60))[0].recall)


@pytest.mark.parametrize("angle", [0.0, 0.01, 0.3, 1.2])
def test_a_volume_on_an_edge_is_in_the_upper_bin_however_the_patient_lay(angle):
    mask = np.zeros((12, 12, 12), dtype=bool)
    mask[1, 1, 1:11] = True  # 10 voxels of 1 mm^3
    affine = np.eye(4, dtype=np.float32)
    affine[:2, :2] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    (lesion,) = lesion_scores(mask, mask, affine=affine.astype(np.float64)).lesions
    for edges in ((0.0, 0.01, 0.1), (0.01, 0.1, math.inf)):
        assert [b.low_ml for b in recall_by_volume([lesion], edges) if b.count] == [0.01]
    assert [b.low_ml for b in recall_by_volume([lesion], (0.0, 0.01002)) if b.count] == [0.0]


@pytest.mark.parametrize("score", ["pq", "sq", "rq", "f1", "precision", "recall", "cc_iou", "cc_dice"])
def test_metric_equals_the_function(score):
    cases = [blobs(seed) for seed in range(3)]
    empty = np.zeros_like(cases[0][0])
    cases += [(empty, empty), (cases[0][0], empty), (empty, cases[0][1])]
    maps = [torch.from_numpy(np.stack(m).astype(np.int16)[:, None]) for m in zip(*cases, strict=True)]
    metric = LesionIoUMetric(score=score, threshold=0.3, num_classes=2)
    got = metric(*maps, spacing=SPACING)
    expected = [getattr(lesion_scores(*c, spacing=SPACING, threshold=0.3), score) for c in cases]
    torch.testing.assert_close(got[:, 0], torch.tensor(expected, dtype=torch.float32), equal_nan=True)
    summary = metric.summary()[0]
    assert (summary["both_empty"], summary["images"]) == (1, 6)
    total = sum((lesion_scores(*c, threshold=0.3) for c in cases), DetectionScores(0, 0, 0, 0.0))
    assert summary["pq"] == pytest.approx(total.pq)
    assert metric.aggregate().item() == pytest.approx(np.nanmean(expected), abs=1e-6)


def test_metric_ignore_empty_and_two_dimensions():
    lesion = torch.zeros((1, 1, 8, 8), dtype=torch.uint8)
    lesion[..., 2:4, 2:4] = 1
    batch = torch.cat([lesion * 0, lesion, lesion]), torch.cat([lesion * 0, lesion * 0, lesion])
    nan = math.nan
    for ignore_empty, expected in (("both", [nan, 0, 1]), (True, [nan, nan, 1]), (False, [1, 0, 1])):
        for score in ("pq", "cc_iou", "f1_area"):
            got = LesionIoUMetric(score=score, ignore_empty=ignore_empty)(*batch)
            torch.testing.assert_close(got[:, 0], torch.tensor(expected, dtype=torch.float32), equal_nan=True)


def test_metric_reads_the_spacing_of_metatensors_and_skips_ignored_voxels():
    prediction, reference = blobs(20, count=12)
    expected = [lesion_scores(prediction, reference, spacing=s).cc_iou for s in (SPACING, (1, 1, 9))]
    assert expected[0] != pytest.approx(expected[1])
    maps = [torch.from_numpy(m[None].astype(np.uint8)) for m in (prediction, reference)]
    metas = [MetaTensor(maps[1], affine=torch.diag(torch.tensor([*s, 1.0]))) for s in (SPACING, (1.0, 1.0, 9.0))]
    got = LesionIoUMetric(score="cc_iou")([maps[0]] * 2, metas)
    torch.testing.assert_close(got[:, 0], torch.tensor(expected, dtype=torch.float32))
    ignored = maps[1].clone()
    ignored[:, :4] = 255
    got = LesionIoUMetric(score="cc_iou", num_classes=2, ignore_index=255)([maps[0]], [ignored], spacing=SPACING)
    rest = lesion_scores(prediction[4:], reference[4:], spacing=SPACING).cc_iou
    assert got.item() == pytest.approx(rest, abs=1e-6)


MASK = np.ones((4, 4, 4), dtype=bool)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: lesion_scores(MASK, MASK[1:]),
            "to have the same shape of 2 or 3 dimensions, but got (4, 4, 4) and (3, 4",
        ),
        (
            lambda: lesion_scores(MASK[0, 0], MASK[0, 0]),
            "to have the same shape of 2 or 3 dimensions, but got (4,) and (4,)",
        ),
        (
            lambda: lesion_scores(MASK * 3, MASK),
            "Expected `prediction` to be a mask of 0 and 1, but got 3: compare a label",
        ),
        (lambda: lesion_scores(MASK, MASK * 0.5), "Expected `reference` to be a mask of 0 and 1, but got 0.5"),
        (
            lambda: lesion_scores(MASK, MASK, threshold=1.5),
            'Expected `threshold` to be an IoU in [0, 1] or "any", but got 1.5',
        ),
        (lambda: lesion_scores(MASK, MASK, threshold="all"), "but got 'all'"),
        (
            lambda: lesion_scores(MASK, MASK, connectivity=8),
            "Expected `connectivity` to be one of (6, 18, 26) for 3 dimensions, but got 8",
        ),
        (
            lambda: lesion_scores(MASK, MASK, spacing=(1, 2)),
            "Expected `spacing` to be 3 positive numbers in mm, but got (1, 2)",
        ),
        (lambda: lesion_scores(MASK, MASK, spacing=0), "Expected `spacing` to be 3 positive numbers in mm, but got 0"),
        (lambda: lesion_scores(MASK, MASK, affine=np.eye(3)), "Expected `affine` to have shape (4, 4), but got (3, 3)"),
        (
            lambda: lesion_scores(MASK, MASK).curve((0.5, 0.2)),
            "Expected `thresholds` to be two or more ascending numbers in [0, 1], but got (0.5, 0.2)",
        ),
        (lambda: recall_by_volume([], (1,)), "Expected `edges_ml` to be at least two ascending volumes, but got (1,)"),
        (lambda: LesionIoUMetric(score="dice"), "Expected `score` to be one of 'pq', 'sq'"),
        (
            lambda: LesionIoUMetric()([torch.ones(1, 4, 4)] * 2, [torch.ones(1, 4, 4)] * 2, spacing=[(1, 1)]),
            "Expected `spacing` to be one voxel size for each of 2 images, but got 1",
        ),
    ],
)
def test_refusals(call, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        call()
