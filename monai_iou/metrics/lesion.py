"""Scores of lesions instead of voxels: found or missed, how well each is outlined, and where.

With TP matched pairs (r, p) of reference and predicted components, FP predicted and FN reference components left over:

    SQ = sum IoU(r, p) / TP      RQ = F1 = TP / (TP + FP/2 + FN/2)      PQ = SQ * RQ      (Kirillov et al. 2019)

CC-IoU is the mean over the reference components of the IoU inside the component's Voronoi region, the voxels that are
nearer to it than to any other component (after the CC-metrics of Jaus et al. 2024; CC-Dice is theirs).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from monai_iou import scores
from monai_iou.metrics.components import (
    Overlaps,
    find_overlaps,
    label_components,
    match_one_to_one,
    nearest_component,
)
from monai_iou.metrics.detection import DetectionScores, Lesion, LesionCurve
from monai_iou.metrics.inputs import ArrayLike, spacing_tuple
from monai_iou.metrics.overlap import crop_to_union, mask_pair
from monai_iou.scores import ratio

__all__ = ["LesionScores", "lesion_scores"]

_FloatArray = npt.NDArray[np.float64]
_TENTHS = tuple(i / 10 for i in range(11))


@dataclass(frozen=True)
class LesionScores(DetectionScores):
    """Scores of the components of one structure in one case."""

    cc_iou: float
    """Mean IoU inside the reference components' Voronoi regions; 0 for false positives on an empty reference."""
    cc_dice: float
    """The same with Dice."""
    recall_any: float
    """Share of reference components that any predicted voxel touches; NaN without one."""
    precision_any: float
    """Share of predicted components that touch any reference voxel; NaN without one."""
    lesions: tuple[Lesion, ...] = field(repr=False)
    """The reference components, then the false positives."""
    overlaps: Overlaps = field(repr=False, compare=False)

    def at(self, threshold: float | Literal["any"]) -> DetectionScores:
        """The detection scores at another IoU threshold, from the same overlaps."""
        return _detection(self.overlaps, match_one_to_one(self.overlaps, iou_threshold(threshold)))

    def curve(self, thresholds: Sequence[float] = _TENTHS) -> LesionCurve:
        """Detection scores over IoU thresholds; 0 asks for one shared voxel.

        Raises:
            ValueError: fewer than two thresholds, not ascending, or outside [0, 1].
        """
        t = np.asarray(thresholds, dtype=float)
        if len(t) < 2 or not ((np.diff(t) > 0).all() and t[0] >= 0 and t[-1] <= 1):
            message = (
                f"Expected `thresholds` to be two or more ascending numbers in [0, 1], but got {tuple(t.tolist())}: "
                "give the IoU from which on a pair counts."
            )
            raise ValueError(message)
        found = [self.at(value) for value in t]
        f1, recall, pq = (np.array([getattr(s, name) for s in found]) for name in ("f1", "recall", "pq"))
        width = t[-1] - t[0]
        areas = [float(((y[1:] + y[:-1]) / 2 * np.diff(t)).sum() / width) for y in (f1, pq)]
        return LesionCurve(t, f1, recall, pq, *areas)


def lesion_scores(
    prediction: ArrayLike,
    reference: ArrayLike,
    *,
    spacing: Any = None,
    threshold: float | Literal["any"] = 0.5,
    connectivity: int | None = None,
    affine: npt.ArrayLike | None = None,
    label: int = 1,
) -> LesionScores:
    """Compare the connected components of two masks.

    Components are matched one to one where their IoU reaches `threshold`: as many pairs as can be, and among those
    choices the largest sum of IoU. Everything comes from one histogram of overlapping components inside the box that
    holds both masks.

    Args:
        prediction: mask of 0 and 1, or bool, of 2 or 3 dimensions.
        reference: mask of the same shape.
        spacing: voxel size in mm along each axis; None takes it from `affine`, or 1 mm.
        threshold: IoU from which on a pair can match, in [0, 1]; "any" or 0 asks for one shared voxel.
        connectivity: 6, 18 or 26 neighbours in 3D, 4 or 8 in 2D; None takes the most.
        affine: (D+1, D+1) matrix from voxel indices to mm, for the centroids; None multiplies by `spacing`.
        label: the label that the lesions are recorded under.

    Returns:
        Scores, one record per lesion, and the overlaps behind them.

    Raises:
        TypeError: an input is neither an array nor a tensor.
        ValueError: values other than 0 and 1, different shapes, or an argument that is none of the above.

    >>> reference = np.zeros((8, 8), dtype=bool); reference[1:3, 1:3] = True; reference[6, 6] = True
    >>> prediction = np.zeros((8, 8), dtype=bool); prediction[1:3, 1:4] = True
    >>> scores = lesion_scores(prediction, reference)
    >>> scores.tp, scores.fp, scores.fn, round(scores.sq, 3), round(scores.pq, 3), round(scores.cc_iou, 3)
    (1, 0, 1, 0.667, 0.444, 0.333)
    """
    p_mask, r_mask = mask_pair(prediction, reference, dimensions=(2, 3))
    limit = iou_threshold(threshold)
    matrix = None if affine is None else _affine(affine, p_mask.ndim)
    if spacing is None and matrix is not None:
        spacing = np.linalg.norm(matrix[:-1, :-1], axis=0)
    size = spacing_tuple(spacing, p_mask.ndim)
    if matrix is None:
        matrix = np.diag([*size, 1.0])
    crop = crop_to_union(p_mask, r_mask)
    r_map, r_count = label_components(crop.reference, connectivity)
    p_map, p_count = label_components(crop.prediction, connectivity)
    overlaps = find_overlaps(r_map, p_map, r_count, p_count)
    matches = match_one_to_one(overlaps, limit)
    region_iou, region_dice = _region_scores(r_map, crop.prediction & ~crop.reference, overlaps, size)
    centroids = [_centroids(m, n, crop.offset) for m, n in ((r_map, r_count), (p_map, p_count))]
    detection = _detection(overlaps, matches)
    empty_score = math.nan if detection.both_empty else 0.0
    return LesionScores(
        tp=detection.tp,
        fp=detection.fp,
        fn=detection.fn,
        iou_sum=detection.iou_sum,
        cc_iou=float(region_iou.mean()) if r_count else empty_score,
        cc_dice=float(region_dice.mean()) if r_count else empty_score,
        recall_any=ratio(len(np.unique(overlaps.reference)), r_count, empty=math.nan),
        precision_any=ratio(len(np.unique(overlaps.prediction)), p_count, empty=math.nan),
        lesions=_records(overlaps, matches, region_iou, centroids, matrix, math.prod(size) / 1000, label),
        overlaps=overlaps,
    )


def iou_threshold(threshold: float | Literal["any"]) -> float:
    """The IoU that a pair must reach; 0 for "any"."""
    if threshold == "any":
        return 0.0
    if isinstance(threshold, str) or not 0 <= threshold <= 1:
        message = (
            f'Expected `threshold` to be an IoU in [0, 1] or "any", but got {threshold!r}: 0.5 is the usual IoU, "any" '
            "asks for one shared voxel."
        )
        raise ValueError(message)
    return float(threshold)


def _affine(affine: npt.ArrayLike, dimensions: int) -> _FloatArray:
    matrix = np.asarray(affine, dtype=float)
    if matrix.shape != (dimensions + 1, dimensions + 1):
        expected = f"({dimensions + 1}, {dimensions + 1})"
        message = (
            f"Expected `affine` to have shape {expected}, but got {matrix.shape}: give the matrix from voxel indices "
            "to mm of an image of these dimensions."
        )
        raise ValueError(message)
    return matrix


def _detection(overlaps: Overlaps, matches: npt.NDArray[np.int64]) -> DetectionScores:
    tp = len(matches)
    return DetectionScores(
        tp=tp,
        fp=len(overlaps.prediction_sizes) - tp,
        fn=len(overlaps.reference_sizes) - tp,
        iou_sum=float(overlaps.iou[matches].sum()),
    )


def _region_scores(
    components: npt.NDArray[Any], outside: npt.NDArray[np.bool_], overlaps: Overlaps, spacing: tuple[float, ...]
) -> tuple[_FloatArray, _FloatArray]:
    """IoU and Dice inside each reference component's region.

    A component lies in its own region, so only the predicted voxels outside every component have to be given to one.
    """
    count = len(overlaps.reference_sizes)
    inside = np.bincount(overlaps.reference, weights=overlaps.intersection, minlength=count)
    predicted = inside
    if count and outside.any():
        predicted = inside + np.bincount(nearest_component(components, outside, spacing), minlength=count + 1)[1:]
    sizes = overlaps.reference_sizes.astype(float)
    return scores.iou(inside, predicted, sizes), scores.dice(inside, predicted, sizes)


def _centroids(components: npt.NDArray[Any], count: int, offset: tuple[int, ...]) -> _FloatArray:
    """Mean voxel index of each component in the whole image, shape (count, D)."""
    voxels = np.nonzero(components)
    number = components[voxels].astype(np.int64) - 1
    sizes = np.bincount(number, minlength=count)
    sums = [np.bincount(number, weights=axis, minlength=count) for axis in voxels]
    means = [s / sizes + first for s, first in zip(sums, offset, strict=True)]
    return np.stack(means, axis=1)


def _records(
    overlaps: Overlaps,
    matches: npt.NDArray[np.int64],
    region_iou: _FloatArray,
    centroids: list[_FloatArray],
    affine: _FloatArray,
    voxel_ml: float,
    label: int,
) -> tuple[Lesion, ...]:
    partner = {int(overlaps.reference[m]): (int(overlaps.prediction[m]), float(overlaps.iou[m])) for m in matches}

    def place(centroid: _FloatArray) -> tuple[tuple[float, ...], tuple[float, ...]]:
        in_mm = affine[:-1, :-1] @ centroid + affine[:-1, -1]
        return tuple(map(float, centroid)), tuple(map(float, in_mm))

    lesions = []
    for i, size in enumerate(overlaps.reference_sizes):
        match, iou = partner.get(i, (None, 0.0))
        number = None if match is None else match + 1
        outcome: Literal["tp", "fn"] = "fn" if match is None else "tp"
        where = place(centroids[0][i])
        lesions.append(Lesion(label, i + 1, outcome, size * voxel_ml, *where, iou, float(region_iou[i]), number))
    found = {match for match, _ in partner.values()}
    for i, size in enumerate(overlaps.prediction_sizes):
        if i not in found:
            where = place(centroids[1][i])
            lesions.append(Lesion(label, i + 1, "fp", size * voxel_ml, *where, 0.0, math.nan, None))
    return tuple(lesions)
