"""Boundary IoU (Cheng et al., CVPR 2021) in mm: how well the outline fits, whatever the size of the structure.

    B(M) = voxels of M within `width` mm of a voxel outside M      Boundary IoU = |B(P) ∩ B(T)| / |B(P) ∪ B(T)|

Distances run between voxel centres and know the spacing of every axis. A voxel with a face neighbour outside M is
always in the band, so that the band is at least one voxel thick where slices lie further apart than `width`. What
lies beyond the image counts as outside, as in the authors' code, so that a structure cut off by the image has a
boundary there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from monai.utils.enums import MetricReduction

from monai_iou.metrics.base import PerClassMetric
from monai_iou.metrics.inputs import ArrayLike, ImagePair, spacing_tuple
from monai_iou.metrics.iou import IgnoreEmpty, check_ignore_empty, iou_from_counts
from monai_iou.metrics.overlap import BoolMask, as_mask, bounding_box, mask_pair, overlap_from_counts

__all__ = ["BoundaryIoUMetric", "boundary_counts", "boundary_iou"]

# Up to a cube of this many steps, shifting the box by each step is faster than a distance transform of it.
_MAX_STEPS = 300
# Sums of squares of spacings miss round distances by less than this share.
_ROUNDING = 1e-6


def boundary_iou(
    prediction: ArrayLike,
    reference: ArrayLike,
    *,
    width: float = 2.0,
    spacing: Any = None,
    ignore_empty: IgnoreEmpty = "both",
    ignored: ArrayLike | None = None,
) -> float:
    """Boundary IoU of two masks.

    Args:
        prediction: mask of 0 and 1, or bool, of 1 to 3 dimensions.
        reference: mask of the same shape.
        width: thickness of the band in mm.
        spacing: voxel size in mm along each axis; None is 1 mm.
        ignore_empty: what an absent structure scores; see `iou_from_counts`.
        ignored: mask of voxels that are neither inside nor outside: they are in no band and make no boundary.

    Returns:
        A score in [0, 1], or NaN.

    Raises:
        TypeError: an input is neither an array nor a tensor.
        ValueError: values other than 0 and 1, different shapes, or `width` or `spacing` is not positive.

    >>> reference = np.zeros((9, 9), dtype=bool); reference[1:8, 1:8] = True
    >>> prediction = np.zeros((9, 9), dtype=bool); prediction[2:8, 1:8] = True
    >>> round(boundary_iou(prediction, reference, width=1), 3)
    0.586
    """
    check_ignore_empty(ignore_empty)
    both, p, r = boundary_counts(prediction, reference, width=width, spacing=spacing, ignored=ignored)
    return overlap_from_counts(both, p, r, ignore_empty=ignore_empty).iou


def boundary_counts(
    prediction: ArrayLike,
    reference: ArrayLike,
    *,
    width: float = 2.0,
    spacing: Any = None,
    ignored: ArrayLike | None = None,
) -> tuple[int, int, int]:
    """Voxels in both bands, in the prediction's and in the reference's; see `boundary_iou`."""
    p, r = mask_pair(prediction, reference)
    size = spacing_tuple(spacing, p.ndim)
    _check_width(width)
    unknown = None if ignored is None else as_mask(ignored, "ignored")
    if unknown is not None and unknown.shape != r.shape:
        message = f"Expected `ignored` to have the masks' shape {r.shape}, but got {unknown.shape}"
        raise ValueError(message)
    p_band, r_band = (_band(mask, unknown, width, size) for mask in (p, r))
    return _common(p_band, r_band), int(np.count_nonzero(p_band[0])), int(np.count_nonzero(r_band[0]))


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


def _band(mask: BoolMask, ignored: BoolMask | None, width: float, spacing: tuple[float, ...]) -> _Band:
    """The band of a mask inside the mask's bounding box, and that box."""
    known = mask if ignored is None else mask & ~ignored
    box = bounding_box(known)
    inside = known[box]
    if not inside.size:
        return inside, box
    limit = width * (1 + _ROUNDING)
    reach = [max(1, math.floor(limit / s)) for s in spacing]
    background = _background(mask, ignored, box, reach)
    steps = {tuple(sign * (a == axis) for a in range(mask.ndim)) for axis in range(mask.ndim) for sign in (-1, 1)}
    near = np.zeros(inside.shape, dtype=bool)
    if math.prod(2 * n + 1 for n in reach) <= _MAX_STEPS:
        cube = itertools.product(*(range(-n, n + 1) for n in reach))
        steps |= {o for o in cube if math.hypot(*(n * s for n, s in zip(o, spacing, strict=True))) <= limit}
    elif background.any():
        from scipy.ndimage import distance_transform_edt

        close = distance_transform_edt(~background, sampling=spacing) <= limit
        near |= close[_shifted(reach, (0,) * mask.ndim, near.shape)]
    for step in steps:
        near |= background[_shifted(reach, step, near.shape)]
    return inside & near, box


def _shifted(start: Sequence[int], step: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(n + o, n + o + length) for n, o, length in zip(start, step, shape, strict=True))


def _background(mask: BoolMask, ignored: BoolMask | None, box: tuple[slice, ...], reach: Sequence[int]) -> BoolMask:
    """What is known to lie outside the mask, in the box grown by `reach`; beyond the image everything is."""
    grown = [(b.start - n, b.stop + n, length) for b, n, length in zip(box, reach, mask.shape, strict=True)]
    cut = tuple(slice(max(low, 0), min(high, length)) for low, high, length in grown)
    known = ~mask[cut] if ignored is None else ~(mask[cut] | ignored[cut])
    padding = [(max(-low, 0), max(high - length, 0)) for low, high, length in grown]
    return np.pad(known, padding, constant_values=True)


class BoundaryIoUMetric(PerClassMetric):
    """Boundary IoU of every image and class; see `boundary_iou`.

    Args:
        include_background: whether class 0 is scored; with a single map there is no background to leave out.
        reduction: MONAI's `MetricReduction` name; an average over nothing is NaN.
        get_not_nans: whether `aggregate` returns a tuple of the score and how many scores went into it.
        width: thickness of the band in mm.
        ignore_empty: "both" (default): NaN where a class is in neither map, 0 for a false positive. True: NaN where the
            reference is empty. False: 1 where both are empty.
        num_classes: needed where both inputs are label maps; background included.
        return_with_label: with "mean_batch", return a dict by "label_0", "label_1", ... or by the names given.
        ignore_index: reference label whose voxels are in no band and make no boundary.

    Raises:
        ValueError: an argument is not one of the above.

    >>> metric = BoundaryIoUMetric(width=1.0, num_classes=2)
    >>> metric(torch.tensor([[[0, 1, 1, 1, 1, 0, 0]]]), torch.tensor([[[0, 1, 1, 1, 1, 1, 0]]]), spacing=1.0)
    tensor([[0.3333]])
    """

    def __init__(
        self,
        include_background: bool = False,
        reduction: MetricReduction | str = MetricReduction.MEAN,
        get_not_nans: bool = False,
        width: float = 2.0,
        ignore_empty: IgnoreEmpty = "both",
        num_classes: int | None = None,
        return_with_label: bool | Sequence[str] = False,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(include_background, reduction, get_not_nans, num_classes, return_with_label, ignore_index)
        check_ignore_empty(ignore_empty)
        _check_width(width)
        self.width = width
        self.ignore_empty = ignore_empty

    def _image_row(self, pair: ImagePair, spacing: tuple[float, ...], first_class: int) -> torch.Tensor:
        ignored = None if pair.valid is None else ~pair.valid.cpu().numpy()
        rows = [
            boundary_counts(p.cpu().numpy(), r.cpu().numpy(), width=self.width, spacing=spacing, ignored=ignored)
            for p, r in pair.masks(first_class)
        ]
        return torch.tensor(rows, dtype=torch.float64, device=pair.reference.device)

    def _scores(self, rows: torch.Tensor) -> torch.Tensor:
        return iou_from_counts(rows[..., 0], rows[..., 1], rows[..., 2], self.ignore_empty)


def _check_width(width: float) -> None:
    if not (math.isfinite(width) and width > 0):
        message = f"Expected `width` to be a positive number of mm, but got {width}"
        raise ValueError(message)
