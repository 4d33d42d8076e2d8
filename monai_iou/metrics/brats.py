"""The lesion-wise scores of BraTS 2023, by the organisers' definition; see `monai_iou.metrics.challenges`."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from monai_iou import scores
from monai_iou.metrics.components import find_overlaps, label_components
from monai_iou.metrics.inputs import ArrayLike, spacing_tuple
from monai_iou.metrics.lesion_maps import ROUNDING, dilated
from monai_iou.metrics.overlap import BoolMask, check_voxels, crop_to_union, mask_counts, mask_pair
from monai_iou.metrics.surface import robust_hausdorff

__all__ = ["brats_mets"]

_PENALTY_MM = 374.0


def brats_mets(
    prediction: ArrayLike,
    reference: ArrayLike,
    *,
    spacing: Any = None,
    dilation: int = 1,
    min_volume_mm3: float = 2.0,
    voxels: int | None = None,
) -> dict[str, float]:
    """Compute the lesion-wise Dice and HD95 of BraTS 2023 for one region (whole tumour, core or enhancing tumour).

    Reference components that join when they are dilated count as one lesion. A predicted component (26 neighbours) is
    assigned to every lesion whose dilated form it overlaps, and the Dice and HD95 of a lesion compare it with all
    components that are assigned to it. A predicted component that is assigned to no lesion is a false positive. Lesions
    of at most `min_volume_mm3` are left out together with the components that are assigned only to them; these are not
    false positives. Missed lesions and false positives count with Dice 0 and HD95 374 mm:

        LesionWise_Score_Dice = sum over lesions of Dice / (lesions + FP)
        LesionWise_Score_HD95 = (sum over lesions of HD95 + 374 FP) / (lesions + FP)

    Without a lesion and without a false positive, they are 1 and 0. The defaults are those for metastases; gliomas use
    dilation=3 and min_volume_mm3=50. Source: https://github.com/rachitsaluja/BraTS-2023-Metrics

    Args:
        prediction: mask of 0 and 1 or of bool, with 3 dimensions.
        reference: mask of the same shape.
        spacing: voxel size in mm along each axis; None means 1 mm.
        dilation: how many times the reference is dilated with 18 neighbours.
        min_volume_mm3: lesions of up to this volume are left out.
        voxels: number of voxels that count for the specificity; the others are ignored and in neither mask. None means
            all.

    Returns:
        The columns of "brats-mets" in `CHALLENGES`; distances in mm and the volume in mm3.

    Raises:
        TypeError: an input is neither an array nor a tensor, or `voxels` is not an integer.
        ValueError: an input contains values other than 0 and 1, the shapes differ, or `spacing` or `voxels` does not
            fit them.

    Example:
        >>> reference = np.zeros((9, 9, 9), dtype=bool); reference[1:3, 1:3, 1:3] = reference[6:8, 6:8, 6:8] = True
        >>> scores = brats_mets(reference & (np.arange(9) < 5), reference)
        >>> scores["LesionWise_Score_Dice"], scores["LesionWise_Score_HD95"]
        (0.5, 187.0)
    """
    p, r = mask_pair(prediction, reference, dimensions=(3,))
    size = spacing_tuple(spacing, 3)
    counting = p.size if voxels is None else check_voxels(voxels, p, r)
    crop = crop_to_union(p, r, margin=dilation)
    p_map, p_count = label_components(crop.prediction, 26)
    zones, r_count = label_components(dilated(crop.reference, dilation), 26)
    touching = find_overlaps(zones, p_map, r_count, p_count)
    lesions = [
        _brats_lesion(crop.reference & (zones == k + 1), p_map, touching.prediction[touching.reference == k] + 1, size)
        for k in range(r_count)
    ]
    false_positives = p_count - len(np.unique(touching.prediction))
    volumes = np.bincount(zones[crop.reference], minlength=r_count + 1)[1:] * math.prod(size)
    least = min_volume_mm3 * (1 + ROUNDING)
    large = [lesion for lesion, volume in zip(lesions, volumes, strict=True) if volume > least]
    counted = float(len(large) + false_positives)
    distances = sum(hd for _, hd, _ in large) + _PENALTY_MM * false_positives
    detected = sum(hit for _, _, hit in large)
    return {
        "Num_TP": float(detected),
        "Num_FP": float(false_positives),
        "Num_FN": float(len(large) - detected),
        **_brats_whole(crop.prediction, crop.reference, counting, size),
        "LesionWise_Score_Dice": scores.ratio(sum(dice for dice, _, _ in large), counted, empty=1.0),
        "LesionWise_Score_HD95": scores.ratio(distances, counted, empty=0.0),
    }


def _brats_lesion(
    lesion: BoolMask, components: npt.NDArray[Any], own: npt.NDArray[np.int64], spacing: tuple[float, ...]
) -> tuple[float, float, bool]:
    """Return Dice and HD95 of a lesion and the components assigned to it, and whether there are any."""
    if not len(own):
        return 0.0, _PENALTY_MM, False
    p, r, _ = crop_to_union(np.isin(components, own), lesion)
    dice = scores.dice(*mask_counts(p, r))
    return dice, robust_hausdorff(p, r, spacing, 95), True


def _brats_whole(p: BoolMask, r: BoolMask, voxels: int, spacing: tuple[float, ...]) -> dict[str, float]:
    """Return the scores of the masks as a whole, of an image of so many voxels."""
    both, predicted, true = mask_counts(p, r)
    negative = voxels - scores.union(both, predicted, true)
    distance = robust_hausdorff(p, r, spacing, 95) if predicted + true else 0.0
    return {
        "Sensitivity": both / (true + sys.float_info.min) if predicted + true else 1.0,
        "Specificity": negative / (voxels - true + sys.float_info.min),
        "Legacy_Dice": scores.dice(both, predicted, true),
        "Legacy_HD95": distance if math.isfinite(distance) else _PENALTY_MM,
        "GT_Complete_Volume": true * math.prod(spacing),
    }
