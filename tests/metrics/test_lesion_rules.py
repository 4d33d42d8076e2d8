"""Rules of matching, grouping and leaving out lesions, against loops over pairs of components."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import compute_panoptic_quality
from scipy import ndimage

from monai_iou import LesionIoUHandler
from monai_iou.metrics import LesionIoUMetric, lesion_scores
from monai_iou.metrics.lesion_rules import lesion_rule

FULL = np.ones((3, 3, 3))


def random_blobs(seed: int, shape: tuple[int, ...] = (20, 18, 12), count: int = 9) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    masks = [np.zeros(shape, dtype=bool) for _ in range(2)]
    for _ in range(count):
        low = generator.integers(0, np.array(shape) - 4)
        size = generator.integers(1, 5, len(shape))
        for mask in masks:
            if generator.random() < 0.8:
                start = np.maximum(low + generator.integers(-2, 3, len(shape)), 0)
                mask[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))] = True
    return masks[0], masks[1]


def tables(p_map: np.ndarray, r_map: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """IoU, share of the reference covered and share of the prediction covered, of every pair."""
    shape = (r_map.max(), p_map.max())
    iou, r_share, p_share = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for i, j in itertools.product(range(shape[0]), range(shape[1])):
        r, p = r_map == i + 1, p_map == j + 1
        both = (r & p).sum()
        iou[i, j], r_share[i, j], p_share[i, j] = both / (r | p).sum(), both / r.sum(), both / p.sum()
    return iou, r_share, p_share


def reached(values: np.ndarray, limit: float, strict: bool) -> np.ndarray:
    return (values > limit) if strict else (values >= limit) & (values > 0)


RULES = [("any", 0.0), ("iou", 0.5), ("iou", 0.1), ("iou", 0.34), ("overlap", 0.25), ("overlap", 1.0)]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), rule=st.sampled_from(RULES), strict=st.booleans())
def test_many_to_one_equals_the_loop(seed, rule, strict):
    prediction, reference = random_blobs(seed)
    p_map, r_map = (ndimage.label(m, FULL)[0] for m in (prediction, reference))
    iou, r_share, p_share = tables(p_map, r_map)
    measure, limit = rule
    if measure == "any":
        found, right = (iou > 0).any(1), (iou > 0).any(0)
    elif measure == "iou":
        found, right = reached(iou, limit, strict).any(1), reached(iou, limit, strict).any(0)
    else:
        total = [np.round(s, 12) for s in (r_share.sum(1), p_share.sum(0))]
        found, right = reached(total[0], limit, strict), reached(total[1], limit, strict)
    match = measure if measure == "any" else f"{measure}:{limit}"
    got = lesion_scores(prediction, reference, match=match, strict=strict, pairing="many-to-one")
    assert (got.tp, got.fn, got.fp) == (found.sum(), (~found).sum(), (~right).sum())
    assert got.iou_sum == pytest.approx(iou.max(1, initial=0)[found].sum())
    assert got.fragments == sum(max(0, n - 1) for n in (iou > 0).sum(1))
    assert got.merges == sum(max(0, n - 1) for n in (iou > 0).sum(0))
    outcomes = [lesion.outcome for lesion in got.lesions]
    assert [o == "tp" for o in outcomes[: len(found)]] == found.tolist()
    assert outcomes[len(found) :] == ["fp"] * int((~right).sum())


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), limit=st.sampled_from([0.25, 0.6]))
def test_one_to_one_by_overlap_pairs_as_many_as_can_be(seed, limit):
    prediction, reference = random_blobs(seed)
    p_map, r_map = (ndimage.label(m, FULL)[0] for m in (prediction, reference))
    allowed = tables(p_map, r_map)[1] >= limit

    def most(row: int, free: frozenset[int]) -> int:
        if row == len(allowed):
            return 0
        taken = [1 + most(row + 1, free - {j}) for j in free if allowed[row, j]]
        return max([most(row + 1, free), *taken])

    got = lesion_scores(prediction, reference, match=f"overlap:{limit}")
    assert got.tp == most(0, frozenset(range(allowed.shape[1])))
    assert got.tp + got.fp == allowed.shape[1]


def test_a_fragmented_and_a_merged_lesion():
    reference, prediction = np.zeros((5, 20), dtype=bool), np.zeros((5, 20), dtype=bool)
    reference[2, 1:8] = reference[2, 12:14] = reference[2, 16:19] = True
    prediction[2, 1:3] = prediction[2, 5:8] = prediction[2, 12:19] = True
    single = lesion_scores(prediction, reference, match="any")
    many = lesion_scores(prediction, reference, match="any", pairing="many-to-one")
    assert (single.tp, single.fp, single.fn) == (2, 1, 1)
    assert (many.tp, many.fp, many.fn, many.f1) == (3, 0, 0, 1)
    assert (many.fragments, many.merges) == (single.fragments, single.merges) == (1, 1)
    assert [lesion.matched_component for lesion in many.lesions] == [2, 3, 3]


def test_exact_halves_are_the_users_choice():
    reference, prediction = np.zeros((3, 8), dtype=bool), np.zeros((3, 8), dtype=bool)
    reference[1, 1:3], prediction[1, 1] = True, True
    assert lesion_scores(prediction, reference).tp == 1
    assert lesion_scores(prediction, reference, strict=True).tp == 0
    for seed in range(4):
        pair = random_blobs(seed, shape=(18, 22), count=8)
        maps = [torch.from_numpy(ndimage.label(m)[0]) for m in pair]
        for name in ("sq", "rq", "pq"):
            theirs = float(compute_panoptic_quality(*maps, metric_name=name, match_iou_threshold=0.5))
            ours = getattr(lesion_scores(*pair, connectivity=4, strict=True), name)
            assert ours == pytest.approx(theirs, abs=1e-5)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), least=st.sampled_from([0.0, 2.0, 9.0]), connectivity=st.sampled_from([6, 18, 26]))
def test_small_components_are_left_out_on_both_sides(seed, least, connectivity):
    spacing = (0.5, 1.0, 2.5)
    prediction, reference = random_blobs(seed)
    structure = ndimage.generate_binary_structure(3, {6: 1, 18: 2, 26: 3}[connectivity])
    p_map, r_map = (ndimage.label(m, structure)[0] for m in (prediction, reference))
    volume = math.prod(spacing)
    large = [i for i in range(1, r_map.max() + 1) if (r_map == i).sum() * volume >= least]
    kept = []
    for j in range(1, p_map.max() + 1):
        touched = set(np.unique(r_map[p_map == j])) - {0}
        if (p_map == j).sum() * volume >= least and (not touched or touched & set(large)):
            kept.append(j)
    expected = lesion_scores(np.isin(p_map, kept), np.isin(r_map, large), connectivity=connectivity, threshold=0.2)
    got = lesion_scores(
        prediction, reference, spacing=spacing, connectivity=connectivity, threshold=0.2, min_volume_mm3=least
    )
    assert (got.tp, got.fp, got.fn) == (expected.tp, expected.fp, expected.fn)
    assert got.iou_sum == pytest.approx(expected.iou_sum)


@pytest.mark.parametrize("times", [1, 2, 3])
def test_dilation_joins_near_lesions_anywhere_in_the_image(times):
    for seed in range(4):
        prediction, reference = random_blobs(seed)
        shape = ndimage.binary_dilation(reference, ndimage.generate_binary_structure(3, 2), iterations=times)
        joined = ndimage.label(shape, FULL)[0] * reference
        got = lesion_scores(prediction, reference, dilation=times, match="any", pairing="many-to-one")
        assert got.tp + got.fn == len(np.unique(joined[reference]))
        assert got.tp == len(np.unique(joined[reference & prediction]))
        sizes = np.unique(joined[reference], return_counts=True)[1]
        assert sorted(got.overlaps.reference_sizes) == sorted(sizes)


def test_instances_are_taken_as_they_are():
    prediction, reference = random_blobs(6)
    maps = [ndimage.label(m, FULL)[0] for m in (prediction, reference)]
    plain = lesion_scores(prediction, reference, threshold=0.3)
    odd = [np.where(m > 0, m * 7 + 3, 0).astype(np.float32) for m in maps]
    for pair, factor, first in ((maps, 1, 0), (odd, 7, 3), ([torch.from_numpy(m) for m in maps], 1, 0)):
        got = lesion_scores(*pair, threshold=0.3, instances=True)
        assert (got.tp, got.fp, got.fn, got.cc_iou) == (plain.tp, plain.fp, plain.fn, plain.cc_iou)
        assert got.lesions == tuple(
            replace(
                lesion,
                component=lesion.component * factor + first,
                matched_component=None if lesion.outcome != "tp" else lesion.matched_component * factor + first,
            )
            for lesion in plain.lesions
        )
    touching = np.zeros((4, 9), dtype=int)
    touching[1:3, 1:4], touching[1:3, 4:8] = 5, 2
    assert lesion_scores(touching, touching, instances=True).tp == 2
    assert lesion_scores(touching > 0, touching > 0).tp == 1
    assert lesion_scores(touching * 0, touching * 0, instances=True).both_empty
    assert lesion_scores(np.full((3, 3), 9), np.full((3, 3), 9), instances=True).tp == 1


@pytest.mark.parametrize("least", [0, 5])
def test_lesions_keep_the_numbers_of_their_map(least):
    """Whatever their order in the image, and whichever are left out for their volume."""
    reference, prediction = np.zeros((12, 12), dtype=int), np.zeros((12, 12), dtype=int)
    reference[1:4, 1:4], reference[8:11, 8:11], reference[6, 1] = 7, 2, 5
    prediction[1:4, 1:4], prediction[8:11, 1:4], prediction[6, 6] = 40, 30, 35
    scores = lesion_scores(prediction, reference, instances=True, min_volume_mm3=least)
    found = {(lesion.component, lesion.outcome, lesion.matched_component) for lesion in scores.lesions}
    small = {(5, "fn", None), (35, "fp", None)}
    assert found == {(7, "tp", 40), (2, "fn", None), (30, "fp", None)} | (small if least == 0 else set())


def test_the_curve_follows_the_rule():
    pair = random_blobs(11)
    for options in ({"pairing": "many-to-one"}, {"strict": True}, {"match": "overlap:0.5"}):
        scores = lesion_scores(*pair, **options)
        measure = "overlap" if "match" in options else "iou"
        rest = {name: value for name, value in options.items() if name != "match"}
        curve = scores.curve((0.2, 0.4, 0.8))
        assert curve.f1.tolist() == [lesion_scores(*pair, match=f"{measure}:{t}", **rest).f1 for t in (0.2, 0.4, 0.8)]
        assert (np.diff(curve.f1) <= 0).all()


def test_rules_in_words():
    assert str(lesion_rule("iou:0.1", strict=True)) == "IoU above 0.1, one to one"
    assert str(lesion_rule(None, "any", pairing="many-to-one")) == "any overlap, many to one"
    assert str(lesion_rule("overlap:0.25")) == "share of the reference lesion covered of at least 0.25, one to one"
    assert str(lesion_scores(*random_blobs(0)).rule) == "IoU of at least 0.5, one to one"


def test_metric_and_handler_take_the_rules():
    pair = random_blobs(5)
    options = {
        "match": "overlap:0.3",
        "pairing": "many-to-one",
        "strict": True,
        "min_volume_mm3": 4.0,
        "dilation": 1,
        "connectivity": 6,
    }
    maps = [torch.from_numpy(m)[None, None] for m in pair]
    expected = lesion_scores(*pair, spacing=1.5, **options)
    metric = LesionIoUMetric(score="f1", **options)
    assert metric(*maps, spacing=1.5).item() == pytest.approx(expected.f1)
    assert metric.summary()[0]["fp"] == expected.fp
    handler = LesionIoUHandler(score="f1", **options)
    assert handler.metric_fn.options == metric.options
    assert str(handler.metric_fn.rule) == str(expected.rule)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"match": "dice:0.5"},
            'Expected `match` to be "any", "iou:0.5" or "overlap:0.25", but got \'dice:0.5\': name',
        ),
        ({"match": "iou:2"}, "but got 'iou:2'"),
        ({"match": "iou"}, "but got 'iou'"),
        ({"match": "any:0.1"}, "but got 'any:0.1'"),
        ({"match": "overlap:x"}, "but got 'overlap:x'"),
        ({"pairing": "many"}, "Expected `pairing` to be one of 'one-to-one', 'many-to-one', but got 'many'"),
        ({"min_volume_mm3": -1}, "Expected `min_volume_mm3` to be a finite number at least 0, but got -1"),
        (
            {"dilation": 1.5},
            "Expected `dilation` to be an integer, but got float: give the width in voxels: 0 for none, or 1 as in "
            "BraTS-METS.",
        ),
        ({"instances": True, "dilation": -1}, "Expected `dilation` to be at least 0, but got -1"),
    ],
)
def test_refused_rules(options, text):
    with pytest.raises((ValueError, TypeError), match=re.escape(text)):
        lesion_scores(*random_blobs(0), **options)


def test_precision_is_undefined_where_a_right_component_finds_no_lesion():
    """Many to one, TP counts lesions and FP counts predicted components: here neither has one."""
    reference, prediction = np.zeros((20, 20), dtype=bool), np.zeros((20, 20), dtype=bool)
    reference[5:15, 5:15] = prediction[6:8, 6:8] = True
    options = {"match": "overlap:0.25", "pairing": "many-to-one"}
    scores = lesion_scores(prediction, reference, **options)
    assert (scores.tp, scores.fp, scores.fn, scores.f1, scores.pq, scores.precision_any) == (0, 0, 1, 0, 0, 1)
    assert math.isnan(scores.precision)
    metric = LesionIoUMetric(score="precision", reduction="mean", get_not_nans=True, **options)
    maps = [torch.from_numpy(mask)[None, None] for mask in (prediction, reference)]
    assert metric(*maps).isnan().all()
    mean, count = metric.aggregate()
    assert mean.isnan().all()
    assert count == 0
    metric(maps[1], maps[1])
    assert metric.aggregate()[0] == metric.summary()[0]["precision"] == 1  # the first case adds nothing to either


@pytest.mark.parametrize("factor", [0.99999994, 1.0000001, 1.00004, 0.99996])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numbers_of_lesions_that_a_scale_factor_moved_are_rounded(factor, dtype):
    reference = np.zeros((9, 9), dtype=dtype)
    reference[:2, :2], reference[4, 4:7], reference[8, 0] = 1, 2, 2
    prediction = reference.copy()
    prediction[4, 4:7] = 0
    scaled = (reference * dtype(factor)).astype(dtype)
    scaled[7, 7] = -5e-5
    assert (scaled != reference).any()
    expected = lesion_scores(prediction, reference, instances=True)
    found = lesion_scores(prediction, scaled, instances=True)
    assert (found.tp, found.fp, found.fn, found.f1, found.pq) == (
        expected.tp,
        expected.fp,
        expected.fn,
        expected.f1,
        expected.pq,
    )
    for wrong in (1.0002, 0.5, np.inf, -np.inf):
        scaled[7, 7] = wrong
        text = (
            "Expected `reference` to hold lesion numbers, 0 for none, in 2 or 3 dimensions, but got "
            f"{scaled[7, 7]!s}: with instances=False pass a mask."
        )
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            lesion_scores(prediction, scaled, instances=True)


def test_refused_instances():
    with pytest.raises(ValueError, match=r"Expected `reference` to hold lesion numbers, 0 for none, .* but got -2"):
        lesion_scores(np.zeros((3, 3)), np.full((3, 3), -2), instances=True)
    with pytest.raises(ValueError, match=r"Expected `prediction` to hold lesion numbers, 0 for none, .* but got nan"):
        lesion_scores(np.full((3, 3), np.nan), np.zeros((3, 3)), instances=True)
