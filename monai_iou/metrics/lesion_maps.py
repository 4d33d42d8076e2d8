"""The components of two masks as numbered maps, in the box that holds them: connected, grouped, or given."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from monai_iou.checks import check_connectivity, check_count, check_positive, label_tolerance
from monai_iou.metrics.components import label_components
from monai_iou.metrics.inputs import ArrayLike, as_plain_array
from monai_iou.metrics.overlap import BoolMask, crop_to_union, mask_pair

__all__ = ["LesionMaps", "dilated", "large_components", "lesion_maps"]

_IntMap = npt.NDArray[Any]
# The volume of a voxel of an oblique affine is off by some digits.
ROUNDING = 1e-4


class LesionMaps(NamedTuple):
    """Component number of each voxel, 0 for none, and how many there are; `offset` is the box's first voxel.

    `prediction_numbers` and `reference_numbers` are those that the components have in maps of lesion numbers.
    """

    prediction: _IntMap
    prediction_count: int
    reference: _IntMap
    reference_count: int
    offset: tuple[int, ...]
    prediction_numbers: _IntMap | None = None
    reference_numbers: _IntMap | None = None

    @property
    def numbers(self) -> tuple[_IntMap, _IntMap]:
        """The number of each predicted and of each reference component; from 1 where the maps gave none."""
        given = (self.prediction_numbers, self.prediction_count), (self.reference_numbers, self.reference_count)
        predicted, true = (np.arange(1, count + 1) if known is None else known for known, count in given)
        return predicted, true


def check_components(connectivity: int | None, min_volume_mm3: float, dilation: int) -> float:
    """Return `min_volume_mm3` as a float after checking which components are wanted.

    Raises:
        TypeError: `min_volume_mm3` is not a number, or `dilation` is not an integer.
        ValueError: an argument is out of its range.
    """
    check_connectivity(connectivity)
    check_count("dilation", dilation, "give the width in voxels: 0 for none, or 1 as in BraTS-METS", least=0)
    return check_positive("min_volume_mm3", min_volume_mm3, allow_zero=True)


def lesion_maps(
    prediction: ArrayLike,
    reference: ArrayLike,
    spacing: tuple[float, ...],
    *,
    connectivity: int | None = None,
    min_volume_mm3: float = 0.0,
    dilation: int = 0,
    instances: bool = False,
) -> LesionMaps:
    """Number the components of two masks.

    Args:
        prediction: mask of 0 and 1, or, with `instances`, map of lesion numbers, of 2 or 3 dimensions.
        reference: the same of the reference.
        spacing: voxel size in mm.
        connectivity: 6, 18 or 26 neighbours in 3D, 4 or 8 in 2D; None takes the largest.
        min_volume_mm3: smaller components are left out, and predicted ones that touch only such as well.
        dilation: reference components that join when dilated so many times by their 18 (in 2D 8) neighbours are one.
        instances: whether the maps hold lesion numbers.

    Raises:
        TypeError: an input is neither an array nor a tensor.
        ValueError: shapes differ, values are not as described, or an argument is out of its range.
    """
    smallest = check_components(connectivity, min_volume_mm3, dilation)
    if instances:
        maps = _given(prediction, reference)
    else:
        p, r = mask_pair(prediction, reference, dimensions=(2, 3))
        crop = crop_to_union(p, r, margin=int(dilation))
        p_map, p_count = label_components(crop.prediction, connectivity)
        r_map, r_count = grouped_components(crop.reference, int(dilation), connectivity)
        maps = LesionMaps(p_map, p_count, r_map, r_count, crop.offset)
    return maps if smallest == 0 else _without_small(maps, smallest * (1 - ROUNDING) / math.prod(spacing))


def grouped_components(mask: BoolMask, dilation: int, connectivity: int | None) -> tuple[_IntMap, int]:
    """Components of a mask, those that join when dilated counting as one, numbered from 1."""
    if dilation == 0 or not mask.any():
        return label_components(mask, connectivity)
    numbers, count = label_components(dilated(mask, dilation), connectivity)
    return np.where(mask, numbers, 0), count


def large_components(mask: BoolMask, connectivity: int | None, voxels: int) -> tuple[_IntMap, int]:
    """Components of at least so many voxels, numbered from 1."""
    numbers, count = label_components(mask, connectivity)
    return _kept(numbers, np.bincount(numbers.ravel(), minlength=count + 1) >= voxels)


def dilated(mask: BoolMask, times: int) -> BoolMask:
    """The mask dilated by its 18 neighbours in 3D, 8 in 2D."""
    from scipy.ndimage import binary_dilation, generate_binary_structure

    if times == 0:
        return mask
    result: BoolMask = binary_dilation(mask, generate_binary_structure(mask.ndim, 2), iterations=times)
    return result


def _given(prediction: ArrayLike, reference: ArrayLike) -> LesionMaps:
    numbers = [_lesion_numbers(m, name) for m, name in ((prediction, "prediction"), (reference, "reference"))]
    crop = crop_to_union(numbers[0] > 0, numbers[1] > 0)
    box = tuple(slice(o, o + n) for o, n in zip(crop.offset, crop.prediction.shape, strict=True))
    (p_map, p_known), (r_map, r_known) = (_renumbered(m[box]) for m in numbers)
    return LesionMaps(p_map, len(p_known), r_map, len(r_known), crop.offset, p_known, r_known)


def _lesion_numbers(image: ArrayLike, name: str) -> _IntMap:
    values: _IntMap = as_plain_array(image, name)
    whole = np.rint(values) if values.dtype.kind == "f" else values
    known = whole >= 0
    if values.dtype.kind == "f":
        with np.errstate(invalid="ignore"):  # infinity minus infinity
            known &= np.abs(values - whole) <= label_tolerance(values)
    wrong = values[~known]
    if wrong.size or values.ndim not in (2, 3):
        problem = str(wrong.flat[0]) if wrong.size else f"shape {values.shape}"
        message = (
            f"Expected `{name}` to hold lesion numbers, 0 for none, in 2 or 3 dimensions, but got {problem}: with "
            "instances=False pass a mask."
        )
        raise ValueError(message)
    return whole.astype(np.int64)


def _renumbered(numbers: _IntMap) -> tuple[_IntMap, _IntMap]:
    """The map with the numbers from 1 without gaps, and the number that each had."""
    known = np.unique(numbers)
    known = known[known != 0]
    return np.where(numbers == 0, 0, np.searchsorted(known, numbers) + 1), known


def _without_small(maps: LesionMaps, voxels: float) -> LesionMaps:
    """Leave out the components of fewer voxels, and the predicted ones that touch only such reference components."""
    p_kept = np.bincount(maps.prediction.ravel(), minlength=maps.prediction_count + 1) >= voxels
    r_kept = np.bincount(maps.reference.ravel(), minlength=maps.reference_count + 1) >= voxels
    scored, small = (maps.reference > 0) & r_kept[maps.reference], (maps.reference > 0) & ~r_kept[maps.reference]
    touches = [np.bincount(maps.prediction[m], minlength=maps.prediction_count + 1) > 0 for m in (scored, small)]
    p_kept &= touches[0] | ~touches[1]
    numbers = ((maps.prediction_numbers, p_kept), (maps.reference_numbers, r_kept))
    left = [None if known is None else known[kept[1:]] for known, kept in numbers]
    return LesionMaps(*_kept(maps.prediction, p_kept), *_kept(maps.reference, r_kept), maps.offset, *left)


def _kept(numbers: _IntMap, keep: npt.NDArray[np.bool_]) -> tuple[_IntMap, int]:
    keep = keep.copy()
    keep[0] = False
    new = np.where(keep, np.cumsum(keep), 0)
    return new[numbers], int(keep.sum())
