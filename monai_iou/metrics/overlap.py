"""Pairs of binary masks: checks, cropping to their common bounding box, and overlap and volume scores."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from monai_iou import scores
from monai_iou.checks import ROUNDING, check_ignore_empty, check_integer
from monai_iou.metrics.inputs import ArrayLike, as_plain_array, spacing_tuple
from monai_iou.metrics.iou import IgnoreEmpty

__all__ = ["BoolMask", "Crop", "OverlapScores", "crop_to_union", "overlap_from_counts", "overlap_scores"]


BoolMask: TypeAlias = npt.NDArray[np.bool_]

_MM3_PER_ML = 1000.0
# Distances in mm are equal if they differ by less than this share: float32 and sums of squares of spacings round them.
DISTANCE_ROUNDING = 1e-6


class Crop(NamedTuple):
    """Two masks, cropped to their common bounding box; `offset` holds the indices of the first voxel of the box."""

    prediction: BoolMask
    reference: BoolMask
    offset: tuple[int, ...]


def as_mask(mask: ArrayLike, name: str) -> BoolMask:
    """Return a mask of 0 and 1 as a boolean array of the same shape.

    Raises:
        TypeError: `mask` is neither an array nor a tensor.
        ValueError: it contains other values.
    """
    if isinstance(mask, np.ndarray) and mask.dtype == np.bool_:
        return mask
    values = as_plain_array(mask, name)
    result: BoolMask = values == 1
    other = values[~result & (values != 0)]
    if other.size and values.dtype.kind == "f":
        result = np.abs(values - 1) <= ROUNDING
        other = values[~result & ~(np.abs(values) <= ROUNDING)]
    if other.size:
        message = (
            f"Expected `{name}` to be a mask of 0 and 1, but got {other.flat[0]:g}: compare a label map with one label "
            "first, `labels == 2`, and probabilities with a threshold."
        )
        raise ValueError(message)
    return result


def mask_pair(
    prediction: ArrayLike, reference: ArrayLike, dimensions: tuple[int, ...] = (1, 2, 3)
) -> tuple[BoolMask, BoolMask]:
    """Return both masks as boolean arrays, after checking them.

    Raises:
        TypeError: one of them is neither an array nor a tensor.
        ValueError: they contain values other than 0 and 1, their shapes differ, or their number of dimensions is not
            one of `dimensions`.
    """
    masks = as_mask(prediction, "prediction"), as_mask(reference, "reference")
    if masks[0].shape != masks[1].shape or masks[0].ndim not in dimensions:
        expected = "1 to 3" if len(dimensions) == 3 else " or ".join(map(str, dimensions))
        message = (
            f"Expected `prediction` and `reference` to have the same shape of {expected} dimensions, "
            f"but got {masks[0].shape} and {masks[1].shape}: put them on one grid, without batch and channels."
        )
        raise ValueError(message)
    return masks


def check_voxels(voxels: Any, prediction: BoolMask, reference: BoolMask) -> int:
    """Return the number of voxels of an image that count; it has at least those of both masks.

    Raises:
        TypeError: `voxels` is not an integer.
        ValueError: the masks have more voxels of 1, or fewer voxels in all.
    """
    remedy = "count all voxels that are not ignored"
    count = check_integer("voxels", voxels, remedy)
    least = int(np.count_nonzero(prediction | reference))
    if not least <= count <= prediction.size:
        message = (
            f"Expected `voxels` to be between {least}, the voxels of either mask, and {prediction.size}, those of the "
            f"image, but got {count}: {remedy}."
        )
        raise ValueError(message)
    return count


def mask_counts(prediction: BoolMask, reference: BoolMask) -> tuple[int, int, int]:
    """Return the numbers of voxels in both masks (I), in the prediction (P) and in the reference (T)."""
    both, p, r = (int(np.count_nonzero(m)) for m in (prediction & reference, prediction, reference))
    return both, p, r


def bounding_box(mask: BoolMask) -> tuple[slice, ...]:
    """Return the bounding box of the mask, one slice per axis; an empty mask has a box without voxels."""
    box: list[slice] = []
    shadow: BoolMask = mask
    # From the last axis on, each in the shadow that is left: a row at a time in memory, and ever less of it.
    for axis in reversed(range(mask.ndim)):
        hit = np.flatnonzero(np.any(shadow, axis=tuple(range(axis))))
        box.insert(0, slice(int(hit[0]), int(hit[-1]) + 1) if hit.size else slice(0, 0))
        shadow = np.any(shadow, axis=axis)
    return tuple(box)


def edge_voxels(mask: BoolMask) -> npt.NDArray[np.int64]:
    """Return the flat indices of the mask's voxels that have a face neighbour outside of it, ascending.

    Args:
        mask: without a voxel at the border of the array: only the mask's own voxels are looked at.
    """
    flat, inside = mask.reshape(-1), np.flatnonzero(mask)
    neighbours = [stride for one in flat_strides(mask.shape) for stride in (one, -one)]
    interior = np.logical_and.reduce([flat[inside + stride] for stride in neighbours])
    edge: npt.NDArray[np.int64] = inside[~interior]
    return edge


def voxel_indices(mask: BoolMask) -> tuple[npt.NDArray[np.int64], ...]:
    """Return the mask's voxels as `np.nonzero` does, which takes ten times as long for more than one axis."""
    return tuple(np.unravel_index(np.flatnonzero(mask), mask.shape))


def flat_strides(shape: tuple[int, ...]) -> list[int]:
    """Return the distance between neighbours along each axis in flat indices."""
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def crop_to_union(prediction: ArrayLike, reference: ArrayLike, *, margin: int = 0) -> Crop:
    """Crop two masks to their common bounding box.

    Args:
        prediction: mask of 0 and 1 or of bool, with 1 to 3 dimensions.
        reference: mask of the same shape.
        margin: number of voxels added on every side, clipped at the border of the image.

    Returns:
        Views of the masks, and the index of the first voxel of the box. If both masks are empty, the views have no
        voxels.

    Raises:
        TypeError: an input is neither an array nor a tensor.
        ValueError: an input contains values other than 0 and 1, the shapes differ, or there are more than three
            dimensions.

    Example:
        >>> crop_to_union(np.array([0, 0, 1, 0, 0]), np.array([0, 0, 0, 1, 0])).offset
        (2,)
    """
    p, r = mask_pair(prediction, reference)
    box = bounding_box(p | r)
    cut = tuple(slice(max(s.start - margin, 0), s.stop + margin) if s.stop else s for s in box)
    return Crop(p[cut], r[cut], tuple(s.start for s in cut))


@dataclass(frozen=True)
class OverlapScores:
    """Voxel overlap and volumes of one structure, with I, P and T voxels in both masks, prediction and reference.

    Example:
        >>> scores = overlap_scores(np.array([1, 1, 0]), np.array([0, 1, 1]), spacing=10)
        >>> round(scores.iou, 3), scores.dice, scores.reference_ml, scores.volume_error_ml
        (0.333, 0.5, 0.02, 0.0)
    """

    iou: float
    """I / (P + T - I)."""
    dice: float
    """2 I / (P + T)."""
    precision: float
    """I / P, the share of the prediction that is correct; NaN if the prediction is empty."""
    recall: float
    """I / T, the share of the reference that is found; NaN if the reference is empty."""
    reference_ml: float
    """Volume of the reference in ml."""
    prediction_ml: float
    """Volume of the prediction in ml."""

    @property
    def volume_error_ml(self) -> float:
        """Volume of the prediction minus volume of the reference, in ml."""
        return self.prediction_ml - self.reference_ml

    @property
    def relative_volume_error(self) -> float:
        """`volume_error_ml` divided by the volume of the reference; NaN if the reference is empty."""
        return scores.ratio(self.volume_error_ml, self.reference_ml, empty=math.nan)


def overlap_from_counts(
    intersection: int, prediction: int, reference: int, *, spacing: Any = None, ignore_empty: IgnoreEmpty = "both"
) -> OverlapScores:
    """Compute the overlap scores of one structure from its voxel counts.

    Args:
        intersection: I, number of voxels in both masks.
        prediction: P, number of voxels in the prediction.
        reference: T, number of voxels in the reference.
        spacing: voxel size in mm: three numbers, one number for all axes, or two numbers for a single slice of 1 mm.
            None means 1 mm.
        ignore_empty: the values of IoU and Dice if the reference is empty; see `iou_from_counts`.

    Returns:
        The scores, with volumes in ml.

    Raises:
        ValueError: `ignore_empty` or `spacing` is not one of the above, or the counts contradict each other.

    Example:
        >>> scores = overlap_from_counts(50, 100, 100, spacing=2)
        >>> round(scores.iou, 3), scores.dice, scores.reference_ml
        (0.333, 0.5, 0.8)
    """
    check_ignore_empty(ignore_empty)
    if not 0 <= intersection <= min(prediction, reference):
        message = (
            f"Expected `intersection` to be at least 0 and at most `prediction` and `reference`, but got "
            f"{intersection} beside {min(prediction, reference)}: count all three over the same voxels."
        )
        raise ValueError(message)
    dimensions = 3 if spacing is None or np.ndim(spacing) == 0 else len(spacing)
    voxel_ml = math.prod(spacing_tuple(spacing, dimensions)) / _MM3_PER_ML
    nothing = 1.0 if ignore_empty is False else math.nan
    iou = scores.iou(intersection, prediction, reference, empty=nothing)
    dice = scores.dice(intersection, prediction, reference, empty=nothing)
    if reference == 0 and ignore_empty is True:
        iou = dice = math.nan
    return OverlapScores(
        iou=iou,
        dice=dice,
        precision=scores.ratio(intersection, prediction, empty=math.nan),
        recall=scores.ratio(intersection, reference, empty=math.nan),
        reference_ml=reference * voxel_ml,
        prediction_ml=prediction * voxel_ml,
    )


def overlap_scores(
    prediction: ArrayLike, reference: ArrayLike, *, spacing: Any = None, ignore_empty: IgnoreEmpty = "both"
) -> OverlapScores:
    """Compute IoU, Dice, precision, recall and the volumes of two masks.

    With I, P and T voxels in both masks, in the prediction and in the reference, IoU = I / (P + T - I), Dice =
    2 I / (P + T), precision = I / P and recall = I / T.

    Args:
        prediction: mask of 0 and 1 or of bool, with 1 to 3 dimensions.
        reference: mask of the same shape.
        spacing: voxel size in mm along each axis; None means 1 mm. For masks with fewer than three dimensions, the
            missing axes count as 1 mm in the volume.
        ignore_empty: the values of IoU and Dice if the reference is empty; see `iou_from_counts`.

    Returns:
        The scores, with volumes in ml.

    Raises:
        TypeError: an input is neither an array nor a tensor.
        ValueError: an input contains values other than 0 and 1, the shapes differ, or `spacing` does not fit them.

    Example:
        >>> scores = overlap_scores(np.array([[1, 1, 0]]), np.array([[0, 1, 1]]), spacing=(10, 10))
        >>> round(scores.iou, 3), scores.precision, scores.recall, scores.prediction_ml
        (0.333, 0.5, 0.5, 0.2)
    """
    p, r = mask_pair(prediction, reference)
    return overlap_from_counts(*mask_counts(p, r), spacing=spacing_tuple(spacing, p.ndim), ignore_empty=ignore_empty)
