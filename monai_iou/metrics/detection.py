"""Results of comparing connected components: counts that can be added over cases, and one record per lesion."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from monai_iou.metrics.lesion_maps import ROUNDING
from monai_iou.scores import ratio

__all__ = ["DetectionScores", "Lesion", "LesionCurve", "VolumeBin", "recall_by_volume"]

_FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class DetectionScores:
    """Numbers of matched and unmatched components, which can be added over cases.

    Every score is NaN if neither side has a component.

    Example:
        >>> first = DetectionScores(tp=2, fp=1, fn=0, iou_sum=1.5)
        >>> second = DetectionScores(tp=0, fp=0, fn=1, iou_sum=0.0)
        >>> (first + second).f1, first.sq, first.pq
        (0.6666666666666666, 0.75, 0.6000000000000001)
    """

    tp: int
    """Number of reference components with a match."""
    fp: int
    """Number of predicted components without a match."""
    fn: int
    """Number of reference components without a match."""
    iou_sum: float
    """Sum of the IoU of the matched pairs."""

    def __add__(self, other: DetectionScores) -> DetectionScores:
        return DetectionScores(self.tp + other.tp, self.fp + other.fp, self.fn + other.fn, self.iou_sum + other.iou_sum)

    @property
    def both_empty(self) -> bool:
        """Whether neither side has a component; such cases are counted separately."""
        return self.tp + self.fp + self.fn == 0

    @property
    def precision(self) -> float:
        """TP / (TP + FP); NaN if both are 0.

        This is the case if there is no predicted component. With the rule "overlap", many to one, it is also the case
        if predicted components lie in lesions but cover too little of each: these are missed, yet none is a false
        positive. Such a case adds nothing to the precision of pooled counts.
        """
        return ratio(self.tp, self.tp + self.fp, empty=math.nan)

    @property
    def recall(self) -> float:
        """TP / (TP + FN); NaN if there is no reference component."""
        return ratio(self.tp, self.tp + self.fn, empty=math.nan)

    @property
    def f1(self) -> float:
        """TP / (TP + FP/2 + FN/2); 0 if the reference is empty and the prediction is not."""
        return ratio(self.tp, self.tp + (self.fp + self.fn) / 2, empty=math.nan)

    @property
    def rq(self) -> float:
        """Recognition quality, the same as F1."""
        return self.f1

    @property
    def sq(self) -> float:
        """Segmentation quality, the mean IoU of the matched pairs; 0 if there are components but no match."""
        if self.both_empty:
            return math.nan
        return ratio(self.iou_sum, self.tp, empty=0.0)

    @property
    def pq(self) -> float:
        """Panoptic quality, SQ * RQ (Kirillov et al. 2019, https://arxiv.org/abs/1801.00868)."""
        return self.sq * self.rq


@dataclass(frozen=True)
class Lesion:
    """One reference component ("tp" found, "fn" missed), or one predicted component without a match ("fp")."""

    label: int
    """Label under which the lesion is recorded."""
    component: int
    """Number of the component in its own mask, from 1, in scan order; in a map of lesion numbers, its own."""
    outcome: Literal["tp", "fn", "fp"]
    """Found, missed or false positive."""
    volume_ml: float
    """Volume in ml."""
    centroid_voxel: tuple[float, ...]
    """Centroid as voxel indices of the whole image."""
    centroid_mm: tuple[float, ...]
    """Centroid in mm, in the coordinates of the affine matrix that was given."""
    iou: float
    """IoU with the matched component; 0 if there is none."""
    region_iou: float
    """IoU inside the component's Voronoi region; NaN for "fp"."""
    matched_component: int | None
    """Number of the matched component in the prediction, counted likewise; None if there is none."""


class LesionCurve(NamedTuple):
    """F1, recall and PQ at each IoU threshold, and the areas under F1 and PQ.

    The areas are computed by the trapezoidal rule and divided by the range of the thresholds.
    """

    thresholds: _FloatArray
    f1: _FloatArray
    recall: _FloatArray
    pq: _FloatArray
    f1_area: float
    pq_area: float


@dataclass(frozen=True)
class VolumeBin:
    """The reference lesions with a volume of at least `low_ml` and less than `high_ml`, and how many were found.

    See :func:`recall_by_volume` for the precision.
    """

    low_ml: float
    high_ml: float
    found: int
    count: int

    @property
    def recall(self) -> float:
        """`found` / `count`; NaN if the bin contains no lesion."""
        return ratio(self.found, self.count, empty=math.nan)


def recall_by_volume(
    lesions: Iterable[Lesion], edges_ml: Sequence[float] = (0.0, 0.01, 0.1, 1.0, 10.0, math.inf)
) -> list[VolumeBin]:
    """Count the reference lesions that were found, by volume; the lesions of many cases can be given together.

    Args:
        lesions: records of `lesion_scores`; false positives are left out.
        edges_ml: two or more edges of the bins in ml, ascending. A bin includes its lower edge and excludes its upper
            edge. As with `min_volume_mm3` of `lesion_scores`, a volume that misses an edge by 0.01 % is on it, because
            the affine of an oblique scan is rounded.

    Returns:
        One bin between each pair of consecutive edges.

    Raises:
        ValueError: `edges_ml` is not ascending, or has fewer than two edges.

    Example:
        >>> from monai_iou.metrics import lesion_scores
        >>> reference = np.zeros((4, 9), dtype=bool); reference[1, 1] = reference[1:3, 4:8] = True
        >>> scores = lesion_scores(reference & (np.arange(9) > 2), reference, spacing=10).lesions
        >>> [(b.low_ml, b.count, b.recall) for b in recall_by_volume(scores, edges_ml=(0, 0.5, 5))]
        [(0, 1, 0.0), (0.5, 1, 1.0)]
    """
    if len(edges_ml) < 2 or not (np.diff(np.asarray(edges_ml, dtype=float)) > 0).all():
        message = (
            f"Expected `edges_ml` to be at least two ascending volumes, but got {tuple(edges_ml)}: give the "
            "bounds of the bins in ml."
        )
        raise ValueError(message)
    known = [(lesion.volume_ml, lesion.outcome == "tp") for lesion in lesions if lesion.outcome != "fp"]
    bins = []
    for low, high in itertools.pairwise(edges_ml):
        hits = [hit for volume, hit in known if low * (1 - ROUNDING) <= volume < high * (1 - ROUNDING)]
        bins.append(VolumeBin(low, high, sum(hits), len(hits)))
    return bins
