"""The scores of challenges for one case, with the organisers' definitions, names, units and penalties.

Each function takes two masks of one structure on the same grid and returns the columns of the challenge. The functions
are written from the definitions in the papers and in the organisers' evaluation scripts; they contain none of their
code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from monai_iou import scores
from monai_iou.checks import check_choice
from monai_iou.metrics.brats import brats_mets
from monai_iou.metrics.components import Overlaps, find_overlaps
from monai_iou.metrics.inputs import ArrayLike, spacing_tuple
from monai_iou.metrics.lesion import lesion_scores
from monai_iou.metrics.lesion_maps import ROUNDING, large_components
from monai_iou.metrics.overlap import check_voxels, crop_to_union, mask_counts, mask_pair

__all__ = ["CHALLENGES", "Challenge", "autopet", "brats_mets", "challenge_scores", "isles22", "ms"]

_MM3_PER_ML = 1000.0


def isles22(prediction: ArrayLike, reference: ArrayLike, *, spacing: Any = None) -> dict[str, float]:
    """The four scores of ISLES'22 (Hernandez Petzsche et al. 2022): Dice, volume, lesion count, lesion-wise F1.

    A lesion (26 neighbours) is found if it contains a predicted voxel. A predicted component is a false positive if it
    contains no reference voxel. F1 = TP / (TP + (FP + FN) / 2). Dice and F1 are 1 if both masks are empty.
    Source: https://github.com/ezequieldlrosa/isles22

    Args:
        prediction: mask of 0 and 1 or of bool, with 3 dimensions.
        reference: mask of the same shape.
        spacing: voxel size in mm along each axis; None means 1 mm.

    Returns:
        "dice"; "absolute_volume_difference" in ml; "absolute_lesion_difference", a count; "lesion_f1_score".

    Raises:
        TypeError: an input is neither an array nor a tensor.
        ValueError: an input contains values other than 0 and 1, the shapes differ, or `spacing` does not fit them.

    Example:
        >>> reference = np.zeros((6, 6, 12), dtype=bool); reference[1:3, 1:3, 1:4] = reference[1:3, 1:3, 8:11] = True
        >>> scores = isles22(reference & (np.arange(12) < 6), reference, spacing=10)
        >>> scores["absolute_volume_difference"], scores["absolute_lesion_difference"]
        (12.0, 1.0)
    """
    p, r = mask_pair(prediction, reference, dimensions=(3,))
    size = spacing_tuple(spacing, 3)
    lesions = lesion_scores(p, r, spacing=size, connectivity=26, match="any", pairing="many-to-one")
    both, predicted, true = mask_counts(p, r)
    counts = len(lesions.overlaps.prediction_sizes), len(lesions.overlaps.reference_sizes)
    return {
        "dice": scores.dice(both, predicted, true),
        "absolute_volume_difference": abs(predicted - true) * math.prod(size) / _MM3_PER_ML,
        "absolute_lesion_difference": float(abs(counts[0] - counts[1])),
        "lesion_f1_score": 1.0 if lesions.both_empty else lesions.f1,
    }


def autopet(prediction: ArrayLike, reference: ArrayLike, *, spacing: Any = None) -> dict[str, float]:
    """The scores of autoPET (Gatidis et al. 2022): Dice, and the volumes of false positives and false negatives.

    Components are connected by 18 neighbours. A predicted component is a false positive if it contains no reference
    voxel, and a reference component is a false negative if it contains no predicted voxel; their whole volume counts.
    Dice is NaN if both masks are empty. Source: https://github.com/lab-midas/autoPET

    Args:
        prediction: mask of 0 and 1 or of bool, with 3 dimensions.
        reference: mask of the same shape.
        spacing: voxel size in mm along each axis; None means 1 mm.

    Returns:
        "dice_sc"; "false_pos_vol" and "false_neg_vol" in ml.

    Raises:
        TypeError: an input is neither an array nor a tensor.
        ValueError: an input contains values other than 0 and 1, the shapes differ, or `spacing` does not fit them.

    Example:
        >>> reference = np.zeros((6, 6, 12), dtype=bool); reference[1:3, 1:3, 1:4] = reference[1:3, 1:3, 8:11] = True
        >>> autopet(reference, reference & (np.arange(12) < 6), spacing=10)["false_pos_vol"]
        12.0
    """
    p, r = mask_pair(prediction, reference, dimensions=(3,))
    size = spacing_tuple(spacing, 3)
    overlaps = lesion_scores(p, r, spacing=size, connectivity=18, match="any", pairing="many-to-one").overlaps
    voxel_ml = math.prod(size) / _MM3_PER_ML
    return {
        "dice_sc": scores.dice(*mask_counts(p, r), empty=math.nan),
        "false_pos_vol": float(np.delete(overlaps.prediction_sizes, overlaps.prediction).sum() * voxel_ml),
        "false_neg_vol": float(np.delete(overlaps.reference_sizes, overlaps.reference).sum() * voxel_ml),
    }


def ms(prediction: ArrayLike, reference: ArrayLike, *, spacing: Any = None) -> dict[str, float]:
    """Lesion-wise scores of multiple sclerosis: of MSSEG 2016 and 2021, and of the longitudinal challenge of 2015.

    MSSEG (Commowick et al. 2018, https://doi.org/10.1038/s41598-018-31911-7; Anima's animaSegPerfAnalyzer): lesions are
    connected by 6 neighbours and larger than 3 mm3. A lesion is found if more than 10 % of it is covered, and if none
    of the components that cover it lies by more than 70 % outside all lesions. Only the components with the largest
    overlaps are checked for this, of equal ones the larger component first, until they make up 65 % of the covered
    part. SensL is the share of the reference lesions that are found, PPVL is the share of the predicted lesions that
    are correct by the same rule with the two maps exchanged, and F1_score is their harmonic mean. As in Anima, PPVL is
    0 where no lesion is predicted, and F1_score where none is found; but where neither map has a lesion, both are NaN.

    ISBI 2015 (Carass et al. 2017, https://doi.org/10.1016/j.neuroimage.2016.12.064): lesions are connected by 18
    neighbours. LTPR is the share of the reference lesions that contain a predicted voxel, and LFPR is the share of the
    predicted lesions that contain no reference voxel.

    Args:
        prediction: mask of 0 and 1 or of bool, with 3 dimensions.
        reference: mask of the same shape.
        spacing: voxel size in mm along each axis; None means 1 mm.

    Returns:
        "Dice", "SensL", "PPVL", "F1_score", "LTPR" and "LFPR"; the others are NaN where their denominator is 0.

    Raises:
        TypeError: an input is neither an array nor a tensor.
        ValueError: an input contains values other than 0 and 1, the shapes differ, or `spacing` does not fit them.

    Example:
        >>> reference = np.zeros((6, 6, 12), dtype=bool); reference[1:3, 1:3, 1:4] = reference[1:3, 1:3, 8:11] = True
        >>> scores = ms(reference & (np.arange(12) < 6), reference)
        >>> scores["SensL"], scores["PPVL"], scores["LTPR"], scores["LFPR"]
        (0.5, 1.0, 0.5, 0.0)
    """
    p, r = mask_pair(prediction, reference, dimensions=(3,))
    size = spacing_tuple(spacing, 3)
    crop = crop_to_union(p, r)
    least = math.floor(3.0 * (1 + ROUNDING) / math.prod(size)) + 1
    (p_map, p_count), (r_map, r_count) = (large_components(m, 6, least) for m in crop[:2])
    overlaps = find_overlaps(r_map, p_map, r_count, p_count)
    found, correct = _msseg_found(overlaps), _msseg_found(_exchanged(overlaps))
    sensitivity, precision = scores.ratio(found, r_count, empty=math.nan), scores.ratio(correct, p_count, empty=0.0)
    f1 = 2 * sensitivity * precision / (sensitivity + precision) if found and correct else 0.0
    nothing = not (r_count or p_count)
    any_overlap = lesion_scores(p, r, spacing=size, connectivity=18, match="any", pairing="many-to-one")
    return {
        "Dice": scores.dice(*mask_counts(p, r), empty=math.nan),
        "SensL": sensitivity,
        "PPVL": math.nan if nothing else precision,
        "F1_score": math.nan if nothing else f1,
        "LTPR": any_overlap.recall_any,
        "LFPR": 1 - any_overlap.precision_any,
    }


def _msseg_found(overlaps: Overlaps, alpha: float = 0.10, beta: float = 0.70, gamma: float = 0.65) -> int:
    """Return the number of reference lesions that are found by MSSEG's rule."""
    inside = np.bincount(overlaps.prediction, weights=overlaps.intersection, minlength=len(overlaps.prediction_sizes))
    outside = scores.ratio(overlaps.prediction_sizes - inside, overlaps.prediction_sizes)
    detected = 0
    for lesion, voxels in enumerate(overlaps.reference_sizes):
        own = overlaps.reference == lesion
        shares, others = overlaps.intersection[own], overlaps.prediction[own]
        covered = shares.sum()
        if covered <= alpha * voxels:
            continue
        order = np.lexsort((-outside[others], -overlaps.prediction_sizes[others], -shares))  # in any orientation
        before = (np.cumsum(shares[order]) - shares[order]) / covered
        detected += not (outside[others[order]][before < gamma] > beta).any()
    return detected


def _exchanged(overlaps: Overlaps) -> Overlaps:
    return Overlaps(
        reference=overlaps.prediction,
        prediction=overlaps.reference,
        intersection=overlaps.intersection,
        reference_sizes=overlaps.prediction_sizes,
        prediction_sizes=overlaps.reference_sizes,
    )


@dataclass(frozen=True)
class Challenge:
    """The scores of a challenge: the function that computes them, their names and their source.

    Example:
        >>> CHALLENGES["isles22"].title, CHALLENGES["isles22"].rule
        ("ISLES'22", 'any overlap, many to one, 26 neighbours')
    """

    title: str
    """Name of the challenge."""
    source: str
    """Address of the definition."""
    rule: str
    """When a lesion counts as found, in words."""
    score: Callable[..., dict[str, float]]
    """Function of a prediction and a reference that returns the columns."""
    columns: tuple[str, ...]
    """The organisers' names of the scores."""
    missing: dict[str, float]
    """The worst values of the columns, which a missing case has wherever they are defined for an empty prediction."""
    of_lesions: tuple[str, ...] = ()
    """The columns that are all undefined where neither map contains a lesion of the size that the challenge counts."""
    of_prediction: tuple[str, ...] = ()
    """The columns that judge only what is predicted, and that therefore no missing case has."""
    counts_background: bool = False
    """Whether the function takes `voxels`, the number of voxels that count."""


CHALLENGES: dict[str, Challenge] = {
    "brats-mets": Challenge(
        title="BraTS 2023 metastases",
        source="https://github.com/rachitsaluja/BraTS-2023-Metrics",
        rule="a predicted component touches the lesion dilated by one voxel; at most 2 mm3 is left out; missed lesions "
        "and false positives count with Dice 0 and HD95 374 mm",
        score=brats_mets,
        columns=(
            "Num_TP", "Num_FP", "Num_FN", "Sensitivity", "Specificity", "Legacy_Dice", "Legacy_HD95",
            "GT_Complete_Volume", "LesionWise_Score_Dice", "LesionWise_Score_HD95",
        ),
        missing={
            "LesionWise_Score_Dice": 0.0, "LesionWise_Score_HD95": 374.0, "Legacy_Dice": 0.0, "Legacy_HD95": 374.0,
        },
        of_prediction=("Num_FP", "Specificity"),
        counts_background=True,
    ),
    "isles22": Challenge(
        title="ISLES'22",
        source="https://github.com/ezequieldlrosa/isles22",
        rule="any overlap, many to one, 26 neighbours",
        score=isles22,
        columns=("dice", "absolute_volume_difference", "absolute_lesion_difference", "lesion_f1_score"),
        missing={"dice": 0.0, "lesion_f1_score": 0.0},
    ),
    "autopet": Challenge(
        title="autoPET",
        source="https://github.com/lab-midas/autoPET",
        rule="any overlap, many to one, 18 neighbours; volumes of whole components in ml",
        score=autopet,
        columns=("dice_sc", "false_pos_vol", "false_neg_vol"),
        missing={"dice_sc": 0.0},
        of_prediction=("false_pos_vol",),
    ),
    "ms": Challenge(
        title="MSSEG and ISBI 2015",
        source="https://doi.org/10.1038/s41598-018-31911-7",
        rule="more than 10 % covered by components that lie by at most 70 % outside, 6 neighbours, above 3 mm3 (SensL, "
        "PPVL, F1_score); any overlap, 18 neighbours (LTPR, LFPR)",
        score=ms,
        columns=("Dice", "SensL", "PPVL", "F1_score", "LTPR", "LFPR"),
        # Not SensL and LTPR: they are undefined only where the reference has no lesion to find.
        missing={"Dice": 0.0, "PPVL": 0.0, "F1_score": 0.0},
        of_lesions=("SensL", "PPVL", "F1_score"),
    ),
}  # fmt: skip


def challenge_scores(
    challenge: str, prediction: ArrayLike, reference: ArrayLike, *, spacing: Any = None, voxels: int | None = None
) -> dict[str, float]:
    """Compute the scores of a case by the rules of a challenge.

    Args:
        challenge: "brats-mets", "isles22", "autopet" or "ms".
        prediction: mask of 0 and 1 or of bool, with 3 dimensions.
        reference: mask of the same shape.
        spacing: voxel size in mm along each axis; None means 1 mm.
        voxels: number of voxels that count; the others are ignored and in neither mask. None means all.

    Returns:
        One value for each of the challenge's columns, in the organisers' units; see the function of the challenge.

    Raises:
        TypeError: an input is neither an array nor a tensor, or `voxels` is not an integer.
        ValueError: the challenge is unknown, an input contains values other than 0 and 1, the shapes differ, or
            `spacing` or `voxels` does not fit them.

    Example:
        >>> mask = np.zeros((5, 5, 5), dtype=bool); mask[2, 2, 1:4] = True
        >>> challenge_scores("autopet", mask, mask, spacing=2)
        {'dice_sc': 1.0, 'false_pos_vol': 0.0, 'false_neg_vol': 0.0}
    """
    check_choice("challenge", challenge, CHALLENGES)
    rules = CHALLENGES[challenge]
    if rules.counts_background:
        return rules.score(prediction, reference, spacing=spacing, voxels=voxels)
    if voxels is not None:  # changes no score of this challenge, but a wrong number is a mistake here too
        check_voxels(voxels, *mask_pair(prediction, reference, dimensions=(3,)))
    return rules.score(prediction, reference, spacing=spacing)
