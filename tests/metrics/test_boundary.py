"""Boundary IoU by the authors' distance and width, and what bands cost where voxels are tiny."""

from __future__ import annotations

import math
import re
import tracemalloc

import numpy as np
import pytest
import torch
from scipy import ndimage

from monai_iou import BoundaryIoUHandler
from monai_iou.metrics import BoundaryIoUMetric, boundary_counts, boundary_iou
from monai_iou.metrics import boundary as boundary_module


def blobs(seed: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(generator.normal(size=shape), 2)
    noise = ndimage.gaussian_filter(generator.normal(size=shape), 2)
    return field + noise / 2 > 0.02, field > 0.02


def eroded_band(mask: np.ndarray, times: int) -> np.ndarray:
    """Cheng et al.: the mask without what is left of it by eroding it `times` times by 3x3[x3]; 0 lies around."""
    square = np.ones((3,) * mask.ndim)
    return mask & ~ndimage.binary_erosion(mask, square, iterations=times, border_value=0)


@pytest.mark.parametrize("shape", [(80, 80), (30, 41), (18, 21, 16)])
@pytest.mark.parametrize("times", [1, 2, 5, 40])
@pytest.mark.parametrize("spacing", [1.0, 0.37])
def test_chessboard_bands_are_the_authors_erosions(shape, times, spacing):
    for seed in range(2):
        pair = blobs(seed, shape)
        bands = [eroded_band(mask, times) for mask in pair]
        expected = tuple(int(m.sum()) for m in (bands[0] & bands[1], *bands))
        assert boundary_counts(*pair, width=times * spacing, spacing=spacing, distance="chessboard") == expected


@pytest.mark.parametrize("shape", [(80, 80), (101, 37), (18, 21, 16)])
@pytest.mark.parametrize("share", [0.5, 2, 7.5])
def test_a_share_of_the_diagonal_is_the_authors_width(shape, share):
    pair = blobs(3, shape)
    times = max(1, round(share / 100 * math.sqrt(sum(n * n for n in shape))))
    bands = [eroded_band(mask, times) for mask in pair]
    expected = (bands[0] & bands[1]).sum() / (bands[0] | bands[1]).sum()
    for spacing in (1.0, 2.5):
        got = boundary_iou(*pair, width=f"{share}%", spacing=spacing, distance="chessboard")
        assert got == pytest.approx(expected)
    diagonal = math.hypot(*(n * 2.5 for n in shape))
    in_mm = boundary_iou(*pair, width=share / 100 * diagonal, spacing=2.5)
    assert boundary_iou(*pair, width=f" {share} %", spacing=2.5) == pytest.approx(in_mm)


@pytest.mark.parametrize("shape", [(75, 100), (125, 300), (135, 180), (30, 40)])  # 2.5, 6.5, 4.5 and 1 voxels
@pytest.mark.parametrize("spacing", [1.0, 0.7, 0.3333, 0.48828125])
def test_half_a_voxel_is_rounded_to_an_even_number_as_the_authors_do(shape, spacing):
    pair = blobs(3, shape)
    times = round(0.02 * math.sqrt(sum(n * n for n in shape)))
    bands = [eroded_band(mask, times) for mask in pair]
    expected = (bands[0] & bands[1]).sum() / (bands[0] | bands[1]).sum()
    assert boundary_iou(*pair, width="2%", spacing=spacing, distance="chessboard") == pytest.approx(expected)


def test_the_two_distances_are_a_square_and_a_disc():
    mask = np.ones((21, 21), dtype=bool)
    mask[10, 10] = False
    rim = 21 * 21 - 15 * 15
    assert boundary_counts(mask, mask, width=3, distance="chessboard")[1] == rim + 7 * 7 - 1
    assert boundary_counts(mask, mask, width=3)[1] == rim + 28


def test_ignored_voxels_hide_the_boundary_from_the_chessboard_too():
    p, r = blobs(5, (14, 15, 9))
    ignored = np.random.default_rng(5).random(p.shape) < 0.3
    for width in (1, 2, 9):
        bands = []
        for mask in (p, r):
            outside = np.pad(~mask & ~ignored, width, constant_values=True)
            near = ndimage.maximum_filter(outside, 2 * width + 1)[(slice(width, -width),) * 3]
            bands.append(mask & ~ignored & near)
        got = boundary_counts(p, r, width=width, ignored=ignored, distance="chessboard")
        assert got == tuple(int(m.sum()) for m in (bands[0] & bands[1], *bands))


@pytest.mark.parametrize("distance", ["euclidean", "chessboard"])
@pytest.mark.parametrize("hide", [False, True])
def test_tiny_voxels_cost_no_memory(distance, hide):
    """5 um voxels: 2 mm are 400 of them, and a box grown by that on every side has 500 million."""
    p, r = blobs(7, (24, 24, 24))
    ignored = np.random.default_rng(7).random(p.shape) < 0.1 if hide else None
    tracemalloc.start()
    counts = boundary_counts(p, r, width=2.0, spacing=0.005, distance=distance, ignored=ignored)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6
    inside = [m if ignored is None else m & ~ignored for m in (p, r)]
    assert counts == tuple(int(m.sum()) for m in (inside[0] & inside[1], *inside))  # all of it is near the outside


def test_metric_and_handler_take_both():
    p, r = blobs(9, (20, 22, 12))
    maps = [torch.from_numpy(m)[None, None] for m in (p, r)]
    expected = boundary_iou(p, r, width="5%", spacing=0.8, distance="chessboard")
    got = BoundaryIoUMetric(width="5%", distance="chessboard")(*maps, spacing=0.8)
    assert got.item() == pytest.approx(expected)
    handler = BoundaryIoUHandler(width="5%", distance="chessboard")
    assert (handler.metric_fn.width, handler.metric_fn.distance) == ("5%", "chessboard")


@pytest.mark.parametrize("width", ["2", "0%", "-1 %", "wide", "%", True, -1, math.inf])
def test_refused_widths(width):
    if width == "2":
        assert boundary_iou(*blobs(0, (9, 9)), width="2") == boundary_iou(*blobs(0, (9, 9)), width=2)
        return
    text = f"Expected `width` to be a positive number of mm, but got {width}: give one, or a share"
    with pytest.raises(ValueError, match=re.escape(text)):
        BoundaryIoUMetric(width=width)
    with pytest.raises(ValueError, match="Expected `distance` to be one of 'euclidean', 'chessboard', but got 'city'"):
        BoundaryIoUMetric(distance="city")


def band_by_axes(mask: np.ndarray, ignored: np.ndarray, width: float, spacing: tuple[float, ...]) -> np.ndarray:
    """The definition: something outside lies within the width along every axis, or beside a face."""
    reach = [int(width / size + 1e-6) for size in spacing]
    around = [(max(n, 1),) * 2 for n in reach]
    outside = np.pad(~mask & ~ignored, around, constant_values=True)
    near = ndimage.maximum_filter(outside, [2 * n + 1 for n in reach]) | ndimage.binary_dilation(outside)
    inner = tuple(slice(low, low + length) for (low, _), length in zip(around, mask.shape, strict=True))
    return mask & ~ignored & near[inner]


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (5.0, 1.0, 1.0), (1.0, 3.0, 0.5), (0.7, 0.7, 4.0)])
@pytest.mark.parametrize("width", [0.3, 1.0, 2.0, 3.5])
@pytest.mark.parametrize("most_steps", [300, 0])  # one by one, or by a filter as for wide bands
def test_a_chessboard_band_is_no_thicker_on_thick_slices(spacing, width, most_steps, monkeypatch):
    monkeypatch.setattr(boundary_module, "_MAX_STEPS", most_steps)
    pair = blobs(11, (16, 17, 15))
    hidden = np.random.default_rng(11).random(pair[0].shape) < 0.1
    for ignored in (np.zeros_like(hidden), hidden):
        bands = [band_by_axes(mask, ignored, width, spacing) for mask in pair]
        expected = tuple(int(m.sum()) for m in (bands[0] & bands[1], *bands))
        given = ignored if ignored.any() else None
        assert boundary_counts(*pair, width=width, spacing=spacing, ignored=given, distance="chessboard") == expected


def test_a_small_share_of_the_diagonal_is_one_voxel_in_the_slice():
    pair, spacing = blobs(12, (9, 30, 31)), (5.0, 1.0, 1.0)
    nothing = np.zeros_like(pair[0])
    bands = [band_by_axes(mask, nothing, 1.0, spacing) for mask in pair]
    expected = tuple(int(m.sum()) for m in (bands[0] & bands[1], *bands))
    assert boundary_counts(*pair, width="0.1%", spacing=spacing, distance="chessboard") == expected
