"""Scores per lesion instead of per voxel: which lesions were found, how well each is outlined, and where it lies.

With TP matched pairs (r, p) of a reference and a predicted component, and FP predicted and FN reference components
without a match:

    SQ = sum IoU(r, p) / TP      RQ = F1 = TP / (TP + FP/2 + FN/2)      PQ = SQ * RQ      (Kirillov et al. 2019)

CC-IoU is the mean over the reference components of the IoU inside the component's Voronoi region, which contains the
voxels that are nearer to it than to any other component. It follows the CC-metrics of Jaus et al. (2024,
https://arxiv.org/abs/2410.18684), who defined CC-Dice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from monai_iou import scores
from monai_iou.metrics.components import Overlaps, find_overlaps, nearest_component
from monai_iou.metrics.detection import DetectionScores, Lesion, LesionCurve
from monai_iou.metrics.inputs import ArrayLike, spacing_tuple
from monai_iou.metrics.lesion_maps import LesionMaps, lesion_maps
from monai_iou.metrics.lesion_rules import LesionRule, Matching, Pairing, iou_threshold, lesion_rule, match_components
from monai_iou.scores import ratio

__all__ = ["LesionScores", "lesion_scores"]

_FloatArray = npt.NDArray[np.float64]
_TENTHS = tuple(i / 10 for i in range(11))


@dataclass(frozen=True)
class LesionScores(DetectionScores):
    """Scores of the connected components of one structure in one case, as returned by `lesion_scores`.

    Example:
        >>> reference = np.array([[1, 1, 1, 0, 0, 0, 1]]); prediction = np.array([[1, 1, 0, 0, 1, 0, 0]])
        >>> scores = lesion_scores(prediction, reference)
        >>> scores.tp, scores.fp, scores.fn, scores.recall_any, round(scores.at("any").sq, 3)
        (1, 1, 1, 0.5, 0.667)
        >>> [(lesion.outcome, lesion.centroid_voxel) for lesion in scores.lesions]
        [('tp', (0.0, 1.0)), ('fn', (0.0, 6.0)), ('fp', (0.0, 4.0))]
    """

    cc_iou: float
    """Mean IoU inside the Voronoi regions of the reference components; 0 if only the reference is empty."""
    cc_dice: float
    """Mean Dice inside the same regions; 0 if only the reference is empty."""
    recall_any: float
    """Share of reference components that share a voxel with the prediction; NaN if there are none."""
    precision_any: float
    """Share of predicted components that share a voxel with the reference; NaN if there are none."""
    fragments: int
    """Number of predicted components beyond the first that overlap the same reference component."""
    merges: int
    """Number of reference components beyond the first that overlap the same predicted component."""
    rule: LesionRule
    """The rule that decides when a lesion counts as found."""
    lesions: tuple[Lesion, ...] = field(repr=False)
    """One record for each reference component, followed by the false positives."""
    overlaps: Overlaps = field(repr=False, compare=False)

    def at(self, threshold: float | Literal["any"]) -> DetectionScores:
        """Return the detection scores at another threshold, from the same overlaps.

        Args:
            threshold: from 0 to 1, or "any". It applies to the measure of the rule, and to the IoU if the rule is
                "any".
        """
        limit = iou_threshold(threshold)
        measure: Literal["iou", "overlap"] = "overlap" if self.rule.measure == "overlap" else "iou"
        rule = LesionRule(measure, limit, self.rule.strict, self.rule.pairing)
        return _detection(self.overlaps, match_components(self.overlaps, rule))

    def curve(self, thresholds: Sequence[float] = _TENTHS) -> LesionCurve:
        """Return the detection scores at several thresholds; see `at`.

        Args:
            thresholds: ascending, from 0 to 1; 0 asks for one shared voxel.

        Raises:
            ValueError: there are fewer than two thresholds, they do not ascend, or one lies outside [0, 1].
        """
        t = np.asarray(thresholds, dtype=float)
        if len(t) < 2 or not ((np.diff(t) > 0).all() and t[0] >= 0 and t[-1] <= 1):
            message = (
                f"Expected `thresholds` to be two or more ascending numbers in [0, 1], but got {tuple(t.tolist())}: "
                "give the IoU from which on a pair counts."
            )
            raise ValueError(message)
        scores = [self.at(value) for value in t]
        f1, recall, pq = (np.array([getattr(s, name) for s in scores]) for name in ("f1", "recall", "pq"))
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
    match: str | None = None,
    pairing: Pairing = "one-to-one",
    strict: bool = False,
    min_volume_mm3: float = 0.0,
    dilation: int = 0,
    instances: bool = False,
) -> LesionScores:
    """Compare the connected components of two masks.

    By default, components are matched one to one where their IoU reaches `threshold`. The matching has as many pairs as
    possible and, among the matchings with that number, the largest sum of IoU. The rules of several challenges are in
    `monai_iou.metrics.challenges`.

    Args:
        prediction: mask of 0 and 1 or of bool, with 2 or 3 dimensions; with `instances`, a map of lesion numbers.
        reference: mask or map of the same shape.
        spacing: voxel size in mm along each axis; None takes it from `affine`, or 1 mm if there is none.
        threshold: smallest IoU at which a pair can match, from 0 to 1; "any" or 0 asks for one shared voxel.
        connectivity: 6, 18 or 26 neighbours in 3D, 4 or 8 in 2D; None takes the largest number.
        affine: matrix (D + 1, D + 1) from voxel indices to mm, used for the centroids; None multiplies the indices by
            `spacing`.
        label: label under which the lesions are recorded.
        match: "any", "iou:0.5" or "overlap:0.25" (the share of the reference component that is covered) instead of
            `threshold`; see `monai_iou.metrics.lesion_rules`.
        pairing: "one-to-one", or "many-to-one", where fragments and merged lesions count as found.
        strict: whether a pair must exceed the threshold, as in Kirillov et al. and MONAI, instead of reaching it. An
            IoU of exactly 0.5 is common among lesions of a few voxels.
        min_volume_mm3: smaller components are left out, together with the predicted components that touch only these.
        dilation: number of dilations; reference components that join when they are dilated so often count as one
            lesion.
        instances: whether the maps contain lesion numbers, so that connected components are not computed.

    Returns:
        The scores, one record per lesion, and the overlaps from which they were computed.

    Raises:
        TypeError: an input is neither an array nor a tensor, `min_volume_mm3` is not a number, or `dilation` is not an
            integer.
        ValueError: an input contains values other than 0 and 1, the shapes differ, or an argument is not one of the
            above.

    Example:
        >>> reference = np.zeros((8, 8), dtype=bool); reference[1:3, 1:3] = True; reference[6, 6] = True
        >>> prediction = np.zeros((8, 8), dtype=bool); prediction[1:3, 1:4] = True
        >>> scores = lesion_scores(prediction, reference)
        >>> scores.tp, scores.fp, scores.fn, round(scores.sq, 3), round(scores.pq, 3), round(scores.cc_iou, 3)
        (1, 0, 1, 0.667, 0.444, 0.333)
        >>> str(scores.rule)
        'IoU of at least 0.5, one to one'
    """
    rule = lesion_rule(match, threshold, strict, pairing)
    dimensions = np.ndim(reference)
    matrix = None if affine is None else _affine(affine, dimensions)
    if spacing is None and matrix is not None:
        spacing = np.linalg.norm(matrix[:-1, :-1], axis=0)
    size = spacing_tuple(spacing, dimensions)
    maps = lesion_maps(
        prediction,
        reference,
        size,
        connectivity=connectivity,
        min_volume_mm3=min_volume_mm3,
        dilation=dilation,
        instances=instances,
    )
    return _scores_of_maps(maps, rule, size, np.diag([*size, 1.0]) if matrix is None else matrix, label)


def _scores_of_maps(
    maps: LesionMaps, rule: LesionRule, size: tuple[float, ...], matrix: _FloatArray, label: int
) -> LesionScores:
    overlaps = find_overlaps(maps.reference, maps.prediction, maps.reference_count, maps.prediction_count)
    matching = match_components(overlaps, rule)
    outside = (maps.prediction > 0) & (maps.reference == 0)
    region_iou, region_dice = _region_scores(maps.reference, outside, overlaps, size)
    counted = ((maps.reference, maps.reference_count), (maps.prediction, maps.prediction_count))
    centroids = [_centroids(numbers, count, maps.offset) for numbers, count in counted]
    detection = _detection(overlaps, matching)
    empty_score = math.nan if detection.both_empty else 0.0
    touched, touching = len(np.unique(overlaps.reference)), len(np.unique(overlaps.prediction))
    return LesionScores(
        tp=detection.tp,
        fp=detection.fp,
        fn=detection.fn,
        iou_sum=detection.iou_sum,
        cc_iou=float(region_iou.mean()) if maps.reference_count else empty_score,
        cc_dice=float(region_dice.mean()) if maps.reference_count else empty_score,
        recall_any=ratio(touched, maps.reference_count, empty=math.nan),
        precision_any=ratio(touching, maps.prediction_count, empty=math.nan),
        fragments=len(overlaps.reference) - touched,
        merges=len(overlaps.prediction) - touching,
        rule=rule,
        lesions=_records(
            maps.numbers, overlaps, matching, region_iou, centroids, matrix, math.prod(size) / 1000, label
        ),
        overlaps=overlaps,
    )


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


def _detection(overlaps: Overlaps, matching: Matching) -> DetectionScores:
    tp = len(matching.pairs)
    return DetectionScores(
        tp=tp,
        fp=int(np.count_nonzero(~matching.right)),
        fn=len(overlaps.reference_sizes) - tp,
        iou_sum=float(overlaps.iou[matching.pairs].sum()),
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
    inside = np.flatnonzero(components > 0)
    voxels = np.unravel_index(inside, components.shape)
    number = components.reshape(-1)[inside].astype(np.int64) - 1
    sizes = np.bincount(number, minlength=count)
    sums = [np.bincount(number, weights=axis, minlength=count) for axis in voxels]
    means = [s / sizes + first for s, first in zip(sums, offset, strict=True)]
    return np.stack(means, axis=1)


def _records(
    numbers: tuple[npt.NDArray[Any], npt.NDArray[Any]],
    overlaps: Overlaps,
    matching: Matching,
    region_iou: _FloatArray,
    centroids: list[_FloatArray],
    affine: _FloatArray,
    voxel_ml: float,
    label: int,
) -> tuple[Lesion, ...]:
    iou = overlaps.iou
    predicted, true = (each.tolist() for each in numbers)
    partner = {int(overlaps.reference[m]): (int(overlaps.prediction[m]), float(iou[m])) for m in matching.pairs}

    def place(centroid: _FloatArray) -> tuple[tuple[float, ...], tuple[float, ...]]:
        in_mm = affine[:-1, :-1] @ centroid + affine[:-1, -1]
        return tuple(map(float, centroid)), tuple(map(float, in_mm))

    lesions = []
    for i, size in enumerate(overlaps.reference_sizes):
        match, shared = partner.get(i, (None, 0.0))
        number = None if match is None else predicted[match]
        outcome: Literal["tp", "fn"] = "fn" if match is None else "tp"
        where = place(centroids[0][i])
        lesions.append(Lesion(label, true[i], outcome, size * voxel_ml, *where, shared, float(region_iou[i]), number))
    for i, size in enumerate(overlaps.prediction_sizes):
        if not matching.right[i]:
            where = place(centroids[1][i])
            lesions.append(Lesion(label, predicted[i], "fp", size * voxel_ml, *where, 0.0, math.nan, None))
    return tuple(lesions)
