"""Pairs of binary masks: checked, cropped to where either has a voxel, and compared by volume."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from monai_iou import scores
from monai_iou.checks import check_ignore_empty
from monai_iou.metrics.inputs import ROUNDING, ArrayLike, as_plain_tensor, spacing_tuple
from monai_iou.metrics.iou import IgnoreEmpty

__all__ = ["BoolMask", "Crop", "OverlapScores", "crop_to_union", "overlap_from_counts", "overlap_scores"]


BoolMask: TypeAlias = npt.NDArray[np.bool_]

_MM3_PER_ML = 1000.0


class Crop(NamedTuple):
    """Both masks cut to the box that holds every voxel of either; `offset` is the box's first voxel in the image."""

    prediction: BoolMask
    reference: BoolMask
    offset: tuple[int, ...]


def as_mask(mask: ArrayLike, name: str) -> BoolMask:
    """Boolean array of a mask of 0 and 1.

    Raises:
        TypeError: `mask` is neither an array nor a tensor.
        ValueError: it holds other values.
    """
    if isinstance(mask, np.ndarray) and mask.dtype == np.bool_:
        return mask
    values: npt.NDArray[Any] = mask if isinstance(mask, np.ndarray) else as_plain_tensor(mask, name).cpu().numpy()
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
    """Both masks, checked.

    Raises:
        TypeError: one is neither an array nor a tensor.
        ValueError: they hold other values than 0 and 1, their shapes differ, or have an unexpected number of
            dimensions.
    """
    masks = as_mask(prediction, "prediction"), as_mask(reference, "reference")
    if masks[0].shape != masks[1].shape or masks[0].ndim not in dimensions:
        expected = " or ".join(map(str, dimensions))
        message = (
            f"Expected `prediction` and `reference` to have the same shape of {expected} dimensions, "
            f"but got {masks[0].shape} and {masks[1].shape}: put them on one grid, without batch and channels."
        )
        raise ValueError(message)
    return masks


def mask_counts(prediction: BoolMask, reference: BoolMask) -> tuple[int, int, int]:
    """Voxels in both masks, in the prediction and in the reference."""
    both, p, r = (int(np.count_nonzero(m)) for m in (prediction & reference, prediction, reference))
    return both, p, r


def bounding_box(mask: BoolMask) -> tuple[slice, ...]:
    """The smallest box that holds the mask; a box of no voxels for an empty mask."""
    box = []
    for axis in range(mask.ndim):
        hit = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        box.append(slice(int(hit[0]), int(hit[-1]) + 1) if hit.size else slice(0, 0))
    return tuple(box)


def crop_to_union(prediction: ArrayLike, reference: ArrayLike, *, margin: int = 0) -> Crop:
    """Cut two masks to the smallest box that holds every voxel of either.

    Args:
        prediction: mask of 0 and 1, or bool, of 1 to 3 dimensions.
        reference: mask of the same shape.
        margin: voxels added on every side, as far as the image goes.

    Returns:
        Views of the masks and the box's first voxel. Without a voxel in either, boxes of no voxels.

    Raises:
        TypeError: an input is neither an array nor a tensor.
        ValueError: values other than 0 and 1, different shapes, or more than three dimensions.

    >>> crop_to_union(np.array([0, 0, 1, 0, 0]), np.array([0, 0, 0, 1, 0])).offset
    (2,)
    """
    p, r = mask_pair(prediction, reference)
    box = bounding_box(p | r)
    cut = tuple(slice(max(s.start - margin, 0), s.stop + margin) if s.stop else s for s in box)
    return Crop(p[cut], r[cut], tuple(s.start for s in cut))


@dataclass(frozen=True)
class OverlapScores:
    """Voxel overlap and volumes of one structure."""

    iou: float
    """I / (P + T - I)."""
    dice: float
    """2 I / (P + T)."""
    precision: float
    """I / P: how much of the prediction is right; NaN without a prediction."""
    recall: float
    """I / T: how much of the reference is found; NaN without a reference."""
    reference_ml: float
    prediction_ml: float

    @property
    def volume_error_ml(self) -> float:
        """Prediction minus reference, in ml."""
        return self.prediction_ml - self.reference_ml

    @property
    def relative_volume_error(self) -> float:
        """(Prediction minus reference) / reference; NaN without a reference."""
        return scores.ratio(self.volume_error_ml, self.reference_ml, empty=math.nan)


def overlap_from_counts(
    intersection: int, prediction: int, reference: int, *, spacing: Any = None, ignore_empty: IgnoreEmpty = "both"
) -> OverlapScores:
    """Scores of one structure from its voxel counts.

    Args:
        intersection: I, voxels in both.
        prediction: P, voxels in the prediction.
        reference: T, voxels in the reference.
        spacing: voxel size in mm, three numbers, or one for all; two for images of one slice of 1 mm. None is 1 mm.
        ignore_empty: what IoU and Dice are without a reference; see `iou_from_counts`.

    Returns:
        The scores; volumes in ml.

    Raises:
        ValueError: `ignore_empty` or `spacing` is not one of the above.

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
    """IoU, Dice, precision, recall and volumes of two masks.

    Args:
        prediction: mask of 0 and 1, or bool, of 1 to 3 dimensions.
        reference: mask of the same shape.
        spacing: voxel size in mm along each axis; None is 1 mm. A missing axis counts as 1 mm in the volume.
        ignore_empty: what IoU and Dice are without a reference; see `iou_from_counts`.

    Returns:
        The scores; volumes in ml.

    Raises:
        TypeError: an input is neither an array nor a tensor.
        ValueError: values other than 0 and 1, different shapes, or an unfit `spacing`.
    """
    p, r = mask_pair(prediction, reference)
    return overlap_from_counts(*mask_counts(p, r), spacing=spacing_tuple(spacing, p.ndim), ignore_empty=ignore_empty)
