"""Boundary IoU, surface distances and overlap: against voxel loops and MONAI, on uneven spacing."""

from __future__ import annotations

import itertools
import math
import re
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.metrics import (
    DiceMetric,
    compute_average_surface_distance,
    compute_hausdorff_distance,
    compute_surface_dice,
)

from monai_iou.metrics import (
    BoundaryIoUMetric,
    boundary_counts,
    boundary_iou,
    crop_to_union,
    overlap_from_counts,
    overlap_scores,
    surface_scores,
)
from monai_iou.metrics import boundary as boundary_module
from monai_iou.metrics import surface as surface_module

NAN = pytest.approx(math.nan, nan_ok=True)


def shapes(seed: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Two overlapping unions of boxes, some at the border of the image."""
    generator = np.random.default_rng(seed)
    masks = np.zeros((2, *shape), dtype=bool)
    for _ in range(3):
        low = generator.integers(0, np.maximum(np.array(shape) - 3, 1))
        size = generator.integers(2, 8, len(shape))
        for mask in masks:
            start = np.maximum(low + generator.integers(-1, 2, len(shape)), 0)
            mask[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))] = True
    return masks[0], masks[1]


def slow_band(
    mask: np.ndarray, width: float, spacing: tuple[float, ...], ignored: np.ndarray | None = None
) -> np.ndarray:
    """Every voxel of the mask against every voxel around it, one by one."""
    if ignored is None:
        ignored = np.zeros_like(mask)
    band = np.zeros_like(mask)
    reach = [max(1, int(width / s + 1)) for s in spacing]
    for voxel in np.argwhere(mask & ~ignored):
        for step in itertools.product(*(range(-n, n + 1) for n in reach)):
            other = tuple(int(v + o) for v, o in zip(voxel, step, strict=True))
            beside = sum(map(abs, step)) == 1
            if not beside and math.sqrt(sum((o * s) ** 2 for o, s in zip(step, spacing, strict=True))) > width + 1e-5:
                continue
            in_image = all(0 <= o < n for o, n in zip(other, mask.shape, strict=True))
            if not in_image or not (mask[other] or ignored[other]):
                band[tuple(voxel)] = True
                break
    return band


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    case=st.sampled_from(
        [
            ((17,), (0.7,)),
            ((11, 13), (1.0, 1.0)),
            ((11, 13), (0.5, 2.0)),
            ((8, 9, 7), (1.0, 1.0, 1.0)),
            ((8, 9, 7), (0.6, 0.9, 3.0)),
        ]
    ),
    width=st.sampled_from([0.3, 1.0, 1.5, 2.0, 3.1]),
    transform=st.booleans(),
    hide=st.booleans(),
)
def test_boundary_iou_equals_the_slow_loop(seed, case, width, transform, hide):
    shape, spacing = case
    prediction, reference = shapes(seed, shape)
    ignored = np.random.default_rng(seed).random(shape) < 0.2 if hide else None
    bands = [slow_band(m, width, spacing, ignored) for m in (prediction, reference)]
    expected = tuple(int(m.sum()) for m in (bands[0] & bands[1], *bands))
    with pytest.MonkeyPatch.context() as patch:
        if transform:  # the way that wide bands go
            patch.setattr(boundary_module, "_MAX_STEPS", 0)
        got = boundary_counts(prediction, reference, width=width, spacing=spacing, ignored=ignored)
    assert got == expected


def test_boundary_iou_of_a_wide_band_is_the_iou():
    prediction, reference = shapes(4, (10, 11, 9))
    expected = (prediction & reference).sum() / (prediction | reference).sum()
    assert boundary_iou(prediction, reference, width=50) == pytest.approx(expected)


def test_boundary_iou_empties():
    mask, nothing = np.zeros((6, 6), dtype=bool), np.zeros((6, 6), dtype=bool)
    mask[2:4, 2:4] = True
    assert boundary_iou(nothing, nothing) == NAN
    assert boundary_iou(nothing, nothing, ignore_empty=False) == 1
    assert boundary_iou(mask, nothing) == boundary_iou(nothing, mask) == 0
    assert boundary_iou(mask, nothing, ignore_empty=True) == NAN
    assert boundary_iou(mask, mask) == 1
    assert boundary_iou(mask, mask, ignored=np.ones((6, 6))) == NAN
    far = np.zeros((6, 6), dtype=bool)
    far[0, 0] = True
    assert boundary_iou(mask, far) == 0


def test_boundary_metric_equals_the_function_and_reads_spacing():
    prediction, reference = shapes(6, (12, 10, 9))
    spacings = [(1.0, 1.0, 1.0), (0.5, 0.7, 4.0)]
    expected = [[boundary_iou(prediction, reference, width=1.5, spacing=s)] for s in spacings]
    assert expected[0] != expected[1]
    y_pred = torch.from_numpy(np.stack([prediction] * 2)[:, None].astype(np.uint8))
    y = torch.from_numpy(np.stack([reference] * 2)[:, None].astype(np.int64))
    want = torch.tensor(expected, dtype=torch.float32)
    metric = BoundaryIoUMetric(width=1.5, num_classes=2)
    torch.testing.assert_close(metric(y_pred, y, spacing=spacings), want)
    affines = [torch.diag(torch.tensor([*s, 1.0])) for s in spacings]
    metas = [MetaTensor(image, affine=a) for image, a in zip(y, affines, strict=True)]
    torch.testing.assert_close(metric(list(y_pred), metas), want)
    batched = MetaTensor(y[:1], affine=affines[1])
    torch.testing.assert_close(metric(y_pred[:1], batched), want[1:])
    from monai.data import list_data_collate

    torch.testing.assert_close(metric(y_pred, list_data_collate(metas)), want)
    hidden = y.clone()
    hidden[:, :, :3] = 7
    got = BoundaryIoUMetric(width=1.5, num_classes=2, ignore_index=7)(y_pred, hidden)
    assert got[0, 0] == pytest.approx(boundary_iou(prediction, reference, width=1.5, ignored=(hidden[0, 0] == 7)))


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy")  # MONAI passes its own deprecated argument
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    case=st.sampled_from(
        [((14, 12), (1.0, 1.0)), ((14, 12), (0.5, 2.0)), ((10, 12, 9), (1.0, 1.0, 1.0)), ((10, 12, 9), (0.6, 0.9, 3.0))]
    ),
)
def test_surface_scores_equal_monai(seed, case):
    shape, spacing = case
    prediction, reference = shapes(seed, shape)
    maps = [torch.from_numpy(m)[None, None].float() for m in (prediction, reference)]
    tolerances = (0.0, 0.8, 2.0)
    scores = surface_scores(prediction, reference, tolerances=tolerances, spacing=spacing)
    keywords = {"include_background": True, "spacing": list(spacing)}
    assert scores.hd95_mm == pytest.approx(
        float(compute_hausdorff_distance(*maps, percentile=95, **keywords)), rel=1e-5
    )
    assert scores.assd_mm == pytest.approx(
        float(compute_average_surface_distance(*maps, symmetric=True, **keywords)), rel=1e-5
    )
    for tolerance, nsd in zip(tolerances, scores.nsd, strict=True):
        expected = compute_surface_dice(*maps, class_thresholds=[tolerance], use_subvoxels=True, **keywords)
        assert nsd == pytest.approx(float(expected), rel=1e-5)


def test_surface_scores_do_not_change_with_padding_and_know_tensors():
    prediction, reference = shapes(8, (10, 12, 9))
    scores = surface_scores(prediction, reference, spacing=(1, 2, 3))
    padded = [torch.from_numpy(np.pad(m, 4).astype(np.uint8)) for m in (prediction, reference)]
    assert surface_scores(*padded, spacing=(1, 2, 3)) == scores
    swapped = surface_scores(reference, prediction, spacing=(1, 2, 3))
    assert (swapped.hd95_mm, swapped.nsd) == (scores.hd95_mm, scores.nsd)
    assert swapped.assd_mm == pytest.approx(scores.assd_mm)


def test_surface_empties():
    mask, nothing = np.zeros((6, 6, 6), dtype=bool), np.zeros((6, 6, 6), dtype=bool)
    mask[2:4, 2:4, 2:4] = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both, extra, missed = (
            surface_scores(p, r, tolerances=(1, 2)) for p, r in ((nothing,) * 2, (mask, nothing), (nothing, mask))
        )
    assert (both.hd95_mm, both.assd_mm, *both.nsd) == (NAN, NAN, NAN, NAN)
    assert (extra.hd95_mm, extra.assd_mm, *extra.nsd) == (NAN, NAN, 0, 0)
    assert (missed.hd95_mm, missed.assd_mm, *missed.nsd) == (NAN, NAN, 0, 0)
    perfect = surface_scores(mask, mask, tolerances=(0,))
    assert (perfect.hd95_mm, perfect.assd_mm, *perfect.nsd) == (0, 0, 1)


def test_overlap_scores():
    prediction, reference = shapes(10, (10, 12, 9))
    scores = overlap_scores(prediction, reference, spacing=(1, 2, 3))
    both, p, r = (int(m.sum()) for m in (prediction & reference, prediction, reference))
    maps = [torch.from_numpy(m)[None, None].float() for m in (prediction, reference)]
    assert scores.dice == pytest.approx(float(DiceMetric()(*maps)))
    assert scores.iou == pytest.approx(both / (p + r - both))
    assert (scores.precision, scores.recall) == (both / p, both / r)
    assert (scores.prediction_ml, scores.reference_ml) == pytest.approx((p * 0.006, r * 0.006))
    assert scores.volume_error_ml == pytest.approx((p - r) * 0.006)
    assert scores.relative_volume_error == pytest.approx((p - r) / r)
    assert overlap_from_counts(both, p, r, spacing=(1, 2, 3)) == scores
    nothing = overlap_from_counts(0, 0, 0)
    assert (nothing.iou, nothing.dice, nothing.precision, nothing.recall) == (NAN,) * 4
    assert nothing.relative_volume_error == NAN
    assert overlap_from_counts(0, 0, 0, ignore_empty=False).dice == 1
    assert (overlap_from_counts(0, 5, 0).iou, overlap_from_counts(0, 5, 0, ignore_empty=True).iou) == (0, NAN)


@pytest.mark.parametrize("margin", [0, 2])
def test_crop_to_union(margin):
    prediction, reference = np.zeros((9, 9, 9), dtype=bool), np.zeros((9, 9, 9), dtype=np.uint8)
    prediction[1, 4, 8] = reference[3, 2, 7] = True
    crop = crop_to_union(prediction, reference, margin=margin)
    assert crop.offset == tuple(max(n - margin, 0) for n in (1, 2, 7))
    assert crop.prediction.shape == crop.reference.shape == ((3, 3, 2) if margin == 0 else (6, 7, 4))
    assert (crop.prediction.sum(), crop.reference.sum()) == (1, 1)
    assert crop_to_union(reference * 0, reference * 0, margin=margin).prediction.size == 0


MASK = np.ones((4, 4, 4), dtype=bool)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: boundary_iou(MASK, MASK, width=0), "Expected `width` to be a positive number of mm, but got 0"),
        (lambda: BoundaryIoUMetric(width=math.nan), "Expected `width` to be a positive number of mm, but got nan"),
        (
            lambda: boundary_iou(MASK, MASK, ignored=MASK[0]),
            "Expected `ignored` to have the masks' shape (4, 4, 4), but got (4, 4)",
        ),
        (
            lambda: surface_scores(MASK, MASK, tolerances=(-1,)),
            "Expected `tolerances` to be a list of distances of at least 0 mm, but got (-1,): pass for "
            "example (1.0, 2.0), one for each NSD.",
        ),
        (
            lambda: surface_scores(MASK, MASK, spacing=(1, -1, 1)),
            "Expected `spacing` to be 3 positive numbers in mm, but got (1, -1",
        ),
        (lambda: overlap_scores(MASK, MASK * 2), "Expected `reference` to be a mask of 0 and 1, but got 2"),
        (
            lambda: crop_to_union(MASK, MASK[:2]),
            "to have the same shape of 1 to 3 dimensions, but got (4, 4, 4) and (2, 4, 4)",
        ),
    ],
)
def test_refusals(call, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        call()


def test_refuses_what_is_no_array():
    with pytest.raises(
        TypeError, match="Expected `prediction` to be a tensor, an array, or a list of them, but got str"
    ):
        overlap_scores("mask.nii.gz", MASK)


def test_surface_scores_do_not_depend_on_the_number_of_threads():
    """Workers have fewer threads than the process that starts them, and torch's sums would tell."""
    rng = np.random.default_rng(3)
    reference = rng.random((60, 60, 40)) > 0.5
    threads = torch.get_num_threads()
    try:
        found = []
        for number in (1, 4):
            torch.set_num_threads(number)
            found.append(surface_scores(np.roll(reference, 1, axis=0), reference, spacing=(0.7, 1.1, 2.3)))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]


def test_the_95th_percentile_of_more_distances_than_torch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    distances = torch.rand(1001, generator=torch.Generator().manual_seed(0)) * 30
    expected = surface_module._percentile95(distances)
    monkeypatch.setattr(surface_module, "_MOST_OF_TORCH", 1000)
    assert surface_module._percentile95(distances) == pytest.approx(expected, rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy")
@pytest.mark.parametrize("size", [0.1, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.1, 1.2, 2.4])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_distance_of_exactly_the_tolerance_counts(size: float, steps: int) -> None:
    """Rounded to float32, as distances are, 0.6 is above 0.6, and so are voxel sizes of headers."""
    reference = np.zeros((14, 12, 12), dtype=bool)
    reference[3:8, 3:8, 3:8] = True
    prediction = np.roll(reference, steps, axis=0)
    maps = [torch.from_numpy(m)[None, None].float() for m in (prediction, reference)]
    tolerance = steps * size
    keywords = {"include_background": True, "spacing": [size] * 3, "use_subvoxels": True}
    expected = float(compute_surface_dice(*maps, class_thresholds=[tolerance], **keywords))
    assert expected == pytest.approx(1)
    for spacing in (size, float(np.float32(size))):
        nsd = surface_scores(prediction, reference, tolerances=(tolerance, 0.999 * tolerance), spacing=spacing).nsd
        assert nsd[0] == pytest.approx(expected)
        assert nsd[1] < 0.99
