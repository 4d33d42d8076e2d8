"""One case: two label maps on one grid -> a row of scores per label, and a row per lesion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from monai_iou.evaluation.columns import SCORE_COLUMNS
from monai_iou.evaluation.masks import MaskPair, counted_voxels, mask_pairs
from monai_iou.evaluation.rules import Rules, Structure
from monai_iou.metrics import (
    Lesion,
    LesionScores,
    boundary_iou,
    challenge_scores,
    crop_to_union,
    lesion_scores,
    overlap_from_counts,
    surface_scores,
)
from monai_iou.metrics.overlap import Crop
from monai_iou.scores import union
from monai_iou.volumes.grid import Grid

__all__ = ["CURVE", "diagonal_mm", "evaluate_case", "lesion_volume_scale", "score_pair"]

# Thresholds at which the lesions' F1 is kept; at 0 one shared voxel is asked for.
CURVE = tuple(i / 10 for i in range(11))

Rows: TypeAlias = tuple[list[dict[str, Any]], list[dict[str, Any]]]


def evaluate_case(
    prediction: NDArray[Any],
    reference: NDArray[Any],
    grid: Grid,
    structures: Sequence[Structure],
    ignore: int | None = None,
    tolerance: float = 1.0,
    rules: Rules | None = None,
) -> Rows:
    """Score two label maps on the same grid.

    Args:
        prediction: labels of any integer dtype, (X, Y, Z).
        reference: labels of the same shape.
        grid: position of the voxels, from which volumes and distances are computed; distances assume perpendicular
            axes.
        structures: the structures to score.
        ignore: reference voxels with this value are excluded from all scores.
        tolerance: tolerance of the normalised surface Dice (NSD) in mm.
        rules: all rules of scoring; replaces `tolerance`.

    Returns:
        One row per structure (`label`, the columns `SCORE_COLUMNS`, the voxel counts `intersection` and
        `union`, and `f1_curve`, the F1 of lesions at each threshold of `CURVE`),
        and one row per lesion: each component of the reference (`tp` or `fn`) and each unmatched component of the
        prediction (`fp`). Undefined scores, such as all scores if both masks are empty, are NaN.

    >>> reference = np.zeros((8, 8, 8), np.uint8)
    >>> reference[2:6, 2:6, 2:6] = 1
    >>> rows, lesions = evaluate_case(reference, reference, Grid((8, 8, 8), np.eye(4)), [Structure("1", (1,))])
    >>> rows[0]["iou"], rows[0]["reference_ml"], lesions[0]["status"]
    (1.0, 0.064, 'tp')
    """
    rules = rules or Rules(tolerance)
    rows: list[dict[str, Any]] = []
    lesions: list[dict[str, Any]] = []
    for pair in mask_pairs(prediction, reference, structures, ignore, rules.whole):
        row, pair_lesions = score_pair(pair, grid, counted_voxels(reference, ignore), rules)
        rows.append(row)
        lesions += pair_lesions
    return rows, lesions


def score_pair(
    pair: MaskPair,
    grid: Grid,
    voxels: int,
    rules: Rules,
    numbers: Sequence[NDArray[Any]] | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The row of one structure and the rows of its lesions.

    Args:
        pair: its masks.
        grid: of the whole volume.
        voxels: of the whole volume that are not ignored.
        rules: of scoring.
        numbers: of the lesions, in prediction and reference, both of the whole volume; None looks for components.
    """
    plane = _plane(grid)
    whole = pair.prediction.squeeze(plane), pair.reference.squeeze(plane)
    hidden = None if pair.ignored is None else pair.ignored.squeeze(plane)
    spacing = tuple(np.delete(grid.spacing, plane))
    width = rules.boundary_width(np.delete(grid.shape, plane).tolist(), spacing)
    crop = crop_to_union(*whole)
    masks = crop.prediction, crop.reference
    numbered = None if numbers is None else [_cut(array[pair.box].squeeze(plane), crop) for array in numbers]
    volume = lesion_volume_scale(grid, spacing)
    lesion = _lesions(masks, numbered, spacing, replace(rules, min_volume_mm3=rules.min_volume_mm3 / volume))
    surface = surface_scores(*masks, tolerances=(rules.tolerance_of(pair.structure),), spacing=spacing)
    row = {
        "label": pair.structure.name,
        **_overlap(pair, grid, voxels),
        "boundary_iou": boundary_iou(
            *whole, width=width, spacing=spacing, ignored=hidden, distance=rules.boundary_distance
        ),
        "hd95_mm": surface.hd95_mm,
        "nsd": surface.nsd[0],
        "assd_mm": surface.assd_mm,
        "lesion_tp": lesion.tp,
        "lesion_fp": lesion.fp,
        "lesion_fn": lesion.fn,
        "lesion_f1": lesion.f1,
        **{name: getattr(lesion, name) for name in ("pq", "sq", "rq", "cc_iou", "fragments", "merges")},
        "f1_curve": lesion.curve(CURVE).f1.tolist(),
    }
    if rules.like is not None:
        row |= challenge_scores(rules.like, pair.prediction, pair.reference, spacing=grid.spacing, voxels=voxels)
    first = np.delete(pair.offset, plane) + crop.offset
    rows = [_lesion_row(lesion_score, volume, first, plane, grid) for lesion_score in lesion.lesions]
    return row, [{"label": pair.structure.name, **lesion} for lesion in rows]


def lesion_volume_scale(grid: Grid, spacing: Sequence[float]) -> float:
    """Return what the volumes of lesions are to be multiplied by: they are of voxels with right angles, 1 mm thick.

    Args:
        grid: of the whole volume; in a slice, the voxels have its thickness.
        spacing: what the lesions are scored with: of a slice, the spacing in its plane.
    """
    return grid.voxel_ml * 1000 / math.prod(spacing)


def _lesions(
    masks: Sequence[NDArray[Any]], numbers: Sequence[NDArray[Any]] | None, spacing: Sequence[float], rules: Rules
) -> LesionScores:
    """The lesions of prediction and reference: those that are numbered, or else the components of the masks."""
    return lesion_scores(
        *(masks if numbers is None else numbers),
        instances=numbers is not None,
        spacing=spacing,
        match=rules.match,
        pairing=rules.pairing,
        connectivity=rules.neighbours(len(spacing)),
        min_volume_mm3=rules.min_volume_mm3,
        strict=rules.strict,
        dilation=rules.dilation,
    )


def _cut(numbers: NDArray[Any], crop: Crop) -> NDArray[Any]:
    sides = zip(crop.offset, crop.reference.shape, strict=True)
    return numbers[tuple(slice(low, low + size) for low, size in sides)]


def _overlap(pair: MaskPair, grid: Grid, voxels: int) -> dict[str, Any]:
    """What the voxels' counts give."""
    predicted, referred = int(np.count_nonzero(pair.prediction)), int(np.count_nonzero(pair.reference))
    both = int(np.count_nonzero(pair.prediction & pair.reference))
    overlap = overlap_from_counts(both, predicted, referred)
    either = union(both, predicted, referred)
    return {
        **{name: getattr(overlap, name) for name in SCORE_COLUMNS[:4]},
        "reference_ml": referred * grid.voxel_ml,
        "prediction_ml": predicted * grid.voxel_ml,
        "voxels_tp": both,
        "voxels_fp": predicted - both,
        "voxels_fn": referred - both,
        "voxels_tn": voxels - either,
        "relative_volume_error": overlap.relative_volume_error,
        "diagonal_mm": diagonal_mm(grid),
        "intersection": both,
        "union": either,
    }


def diagonal_mm(grid: Grid) -> float:
    """Return the diagonal of the image in mm, between the outer corners of its voxels."""
    signs = np.array([(1, 1, 1), (1, 1, -1), (1, -1, 1), (1, -1, -1)])
    return float(np.linalg.norm(signs * grid.shape @ grid.affine[:3, :3].T, axis=1).max())


def _plane(grid: Grid) -> tuple[int, ...]:
    """The axis of a single slice, which is scored as the 2D image it is; nothing for volumes."""
    return tuple(axis for axis, size in enumerate(grid.shape) if size == 1)[:1]


def _lesion_row(
    lesion: Lesion, volume: float, first: NDArray[Any], plane: tuple[int, ...], grid: Grid
) -> dict[str, Any]:
    """A lesion as a row; `volume` scales its volume, `first` is the first voxel of what it was found in."""
    index = np.asarray(lesion.centroid_voxel) + first
    for axis in plane:
        index = np.insert(index, axis, 0.0)
    x, y, z = (float(value) for value in grid.affine[:3, :3] @ index + grid.affine[:3, 3])
    return {
        "lesion": lesion.component,
        "kind": "prediction" if lesion.outcome == "fp" else "reference",
        "status": lesion.outcome,
        "volume_ml": lesion.volume_ml * volume,
        "centroid_x_mm": x,
        "centroid_y_mm": y,
        "centroid_z_mm": z,
        "matched_iou": lesion.iou,
    }
