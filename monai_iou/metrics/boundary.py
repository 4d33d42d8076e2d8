"""Boundary IoU (Cheng et al., CVPR 2021): the agreement of the outlines, regardless of the size of the structure.

    B(M) = voxels of M within `width` of a voxel outside M      Boundary IoU = |B(P) ∩ B(T)| / |B(P) ∪ B(T)|

Distances are measured between voxel centres in mm. By default they are Euclidean. The authors erode the mask with
squares of 3x3 voxels (cubes of 3x3x3), which gives the chessboard distance, and take a width of 2 % of the diagonal of
the image. A voxel with a face neighbour outside M always belongs to the band, so that the band is at least one voxel
thick even if the slices are further apart than `width`. Everything beyond the image counts as outside, as in the
authors' code, so that a structure that is cut off by the edge of the image has a boundary there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from monai_iou.checks import check_choice, check_ignore_empty
from monai_iou.metrics.inputs import ArrayLike, spacing_tuple
from monai_iou.metrics.iou import IgnoreEmpty
from monai_iou.metrics.overlap import (
    DISTANCE_ROUNDING,
    BoolMask,
    as_mask,
    bounding_box,
    mask_pair,
    overlap_from_counts,
    voxel_indices,
)

__all__ = ["DISTANCES", "BoundaryDistance", "boundary_counts", "boundary_iou", "parse_width"]

BoundaryDistance: TypeAlias = Literal["euclidean", "chessboard"]

DISTANCES = ("euclidean", "chessboard")
# Up to a cube of this many steps, shifting the box by each step is faster than a distance transform of it.
_MAX_STEPS = 300
# From this many voxels of the box for one of the mask on, looking up the mask's voxels is faster than shifting the box.
_SPARSE = 8


def boundary_iou(
    prediction: ArrayLike,
    reference: ArrayLike,
    *,
    width: float | str = 2.0,
    spacing: Any = None,
    ignore_empty: IgnoreEmpty = "both",
    ignored: ArrayLike | None = None,
    distance: BoundaryDistance = "euclidean",
) -> float:
    """Compute the boundary IoU of two masks (Cheng et al., CVPR 2021, https://arxiv.org/abs/2103.16562).

    Args:
        prediction: mask of 0 and 1 or of bool, with 1 to 3 dimensions.
        reference: mask of the same shape.
        width: thickness of the band in mm, or as a percentage of the diagonal of the whole image, such as "2%".
        spacing: voxel size in mm along each axis; None means 1 mm.
        ignore_empty: the score if the structure is absent; see `iou_from_counts`.
        ignored: mask of the ignored voxels, which belong to no band and form no boundary.
        distance: "euclidean", or "chessboard", the largest of the distances along the axes, which the authors use. With
            a percentage of the diagonal, the chessboard band is rounded to a whole number of voxels.

    Returns:
        A score from 0 to 1, or NaN.

    Raises:
        TypeError: an input is neither an array nor a tensor.
        ValueError: an input contains values other than 0 and 1, the shapes differ, or an argument is not one of the
            above.

    Example:
        >>> reference = np.zeros((9, 9), dtype=bool); reference[1:8, 1:8] = True
        >>> prediction = np.zeros((9, 9), dtype=bool); prediction[2:8, 1:8] = True
        >>> round(boundary_iou(prediction, reference, width=1), 3)
        0.586
    """
    check_ignore_empty(ignore_empty)
    counts = boundary_counts(prediction, reference, width=width, spacing=spacing, ignored=ignored, distance=distance)
    return overlap_from_counts(*counts, ignore_empty=ignore_empty).iou


def boundary_counts(
    prediction: ArrayLike,
    reference: ArrayLike,
    *,
    width: float | str = 2.0,
    spacing: Any = None,
    ignored: ArrayLike | None = None,
    distance: BoundaryDistance = "euclidean",
) -> tuple[int, int, int]:
    """Return the numbers of voxels in both bands, in that of the prediction and in that of the reference.

    Their IoU is the boundary IoU; see `boundary_iou` for the arguments and errors.

    Example:
        >>> boundary_counts(np.array([0, 1, 1, 1, 0]), np.array([0, 1, 1, 0, 0]), width=1)
        (1, 2, 2)
    """
    p, r = mask_pair(prediction, reference)
    rule = _band_rule(width, distance, p.shape, spacing_tuple(spacing, p.ndim))
    unknown = None if ignored is None else as_mask(ignored, "ignored")
    if unknown is not None and unknown.shape != r.shape:
        message = (
            f"Expected `ignored` to have the masks' shape {r.shape}, but got {unknown.shape}: mark voxels of the same "
            "image."
        )
        raise ValueError(message)
    p_band, r_band = (_band(mask, unknown, rule) for mask in (p, r))
    return _common(p_band, r_band), int(np.count_nonzero(p_band[0])), int(np.count_nonzero(r_band[0]))


class _Rule(NamedTuple):
    """How far a band reaches: `limit` in mm (None for chessboard distances), and `reach` in voxels along each axis.

    Face neighbours count in any case, also along an axis with a reach of 0.
    """

    limit: float | None
    reach: tuple[int, ...]
    spacing: tuple[float, ...]


def _band_rule(
    width: float | str, distance: BoundaryDistance, shape: tuple[int, ...], spacing: tuple[float, ...]
) -> _Rule:
    check_choice("distance", distance, DISTANCES)
    number, relative = parse_width(width)
    if relative:
        number *= math.hypot(*(n * s for n, s in zip(shape, spacing, strict=True)))
    rounds = relative and distance == "chessboard"
    if rounds:
        number = max(number, min(spacing))  # as the authors do, whose bands are at least one voxel thick
    limit = number * (1 + DISTANCE_ROUNDING)
    # The authors round half to even: a rounding error of mm must not decide of which kind a half is.
    voxels = [round(round(number / s, 6)) if rounds else math.floor(limit / s) for s in spacing]
    # No image reaches further than itself, however small its voxels.
    reach = tuple(min(count, n) for count, n in zip(voxels, shape, strict=True))
    return _Rule(limit if distance == "euclidean" else None, reach, spacing)


def parse_width(width: float | str) -> tuple[float, bool]:
    """The number in `width`: mm, or a share of the diagonal where the second is true."""
    relative = isinstance(width, str) and width.strip().endswith("%")
    try:
        number = float(str(width).strip().rstrip("%"))
    except ValueError:
        number = math.nan
    if isinstance(width, bool) or not (math.isfinite(number) and number > 0):
        message = (
            f"Expected `width` to be a positive number of mm, but got {width}: give one, or a share of the image's "
            'diagonal such as "2%".'
        )
        raise ValueError(message)
    return (number / 100, True) if relative else (number, False)


_Band = tuple[BoolMask, tuple[slice, ...]]


def _common(first: _Band, second: _Band) -> int:
    """Voxels in both bands, each given inside its own box."""
    shared = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(first[1], second[1], strict=True)]
    if any(s.stop <= s.start for s in shared):
        return 0
    parts = [
        band[tuple(slice(s.start - b.start, s.stop - b.start) for s, b in zip(shared, box, strict=True))]
        for band, box in (first, second)
    ]
    return int(np.count_nonzero(parts[0] & parts[1]))


def _band(mask: BoolMask, ignored: BoolMask | None, rule: _Rule) -> _Band:
    """The band of a mask inside the mask's bounding box, and that box."""
    known = mask if ignored is None else mask & ~ignored
    box = bounding_box(known)
    inside = known[box]
    if not inside.size:
        return inside, box
    by_steps = math.prod(2 * n + 1 for n in rule.reach) <= _MAX_STEPS
    if by_steps:
        margins = [(max(n, 1), max(n, 1)) for n in rule.reach]
    elif ignored is None:
        margins = [(1, 1)] * mask.ndim  # all around the box is outside, and nothing outside is nearer
    else:
        sides = zip((max(n, 1) for n in rule.reach), box, mask.shape, strict=True)
        margins = [(min(n, b.start + 1), min(n, length - b.stop + 1)) for n, b, length in sides]
    background = _background(mask, ignored, box, margins)
    starts = [low for low, _ in margins]
    if by_steps and np.count_nonzero(inside) * _SPARSE < inside.size:
        return _sparse_band(inside, background, starts, _steps(rule, True)), box
    near = np.zeros(inside.shape, dtype=bool)
    if not by_steps:
        near |= _near(background, rule)[_shifted(starts, (0,) * mask.ndim, near.shape)]
    for step in _steps(rule, by_steps):
        near |= background[_shifted(starts, step, near.shape)]
    return inside & near, box


def _sparse_band(
    inside: BoolMask, background: BoolMask, starts: Sequence[int], steps: set[tuple[int, ...]]
) -> BoolMask:
    """The band where the mask is a small part of its box (lesions far apart): its voxels are looked up one by one."""
    strides = [math.prod(background.shape[axis + 1 :]) for axis in range(background.ndim)]
    voxels = voxel_indices(inside)
    places = sum((index + low) * stride for index, low, stride in zip(voxels, starts, strides, strict=True))
    flat, near = background.reshape(-1), np.zeros(len(voxels[0]), dtype=bool)
    for step in steps:
        near |= flat[places + sum(n * stride for n, stride in zip(step, strides, strict=True))]
    band = np.zeros_like(inside)
    band[tuple(index[near] for index in voxels)] = True
    return band


def _steps(rule: _Rule, within_reach: bool) -> set[tuple[int, ...]]:
    """Steps to the face neighbours and, if asked for, to every voxel within reach."""
    axes = range(len(rule.reach))
    steps = {tuple(sign * (a == axis) for a in axes) for axis in axes for sign in (-1, 1)}
    if within_reach:
        limit = math.inf if rule.limit is None else rule.limit
        cube = itertools.product(*(range(-n, n + 1) for n in rule.reach))
        steps |= {o for o in cube if math.hypot(*(n * s for n, s in zip(o, rule.spacing, strict=True))) <= limit}
    return steps


def _near(background: BoolMask, rule: _Rule) -> BoolMask:
    """Voxels within reach of the background."""
    from scipy.ndimage import distance_transform_edt, maximum_filter1d

    if rule.limit is None:
        near = background.view(np.uint8)
        for axis, n in enumerate(rule.reach):
            near = maximum_filter1d(near, 2 * n + 1, axis=axis, mode="nearest")
        return near.view(np.bool_)
    if not background.any():
        return background
    close: BoolMask = distance_transform_edt(~background, sampling=rule.spacing) <= rule.limit
    return close


def _shifted(start: Sequence[int], step: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(n + o, n + o + length) for n, o, length in zip(start, step, shape, strict=True))


def _background(
    mask: BoolMask, ignored: BoolMask | None, box: tuple[slice, ...], margins: Sequence[tuple[int, int]]
) -> BoolMask:
    """What is known to lie outside the mask, in the box grown by the margins; beyond the image everything is."""
    grown = [
        (b.start - low, b.stop + high, length) for b, (low, high), length in zip(box, margins, mask.shape, strict=True)
    ]
    cut = tuple(slice(max(low, 0), min(high, length)) for low, high, length in grown)
    known = ~mask[cut] if ignored is None else ~(mask[cut] | ignored[cut])
    padding = [(max(-low, 0), max(high - length, 0)) for low, high, length in grown]
    return np.pad(known, padding, constant_values=True)
