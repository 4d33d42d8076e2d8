"""IoU and Dice at every threshold of the probability, from one pass over the voxels.

A voxel is predicted at threshold t if its probability is at least t. Let h_1 be the histogram of the probabilities of
the voxels of a class and h_0 that of the other voxels, both on the nodes t_k = k / M. Then

    I(t_k) = sum_{j >= k} h_1[j]      P(t_k) = I(t_k) + sum_{j >= k} h_0[j]      T = sum_j h_1[j]

and one pass gives the whole curve, the best threshold and the average precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from monai.utils.enums import MetricReduction

from monai_iou import scores
from monai_iou.checks import check_choice, check_fraction, check_ignore_empty
from monai_iou.metrics.base import row_device
from monai_iou.metrics.iou import IgnoreEmpty, iou_from_counts
from monai_iou.metrics.probability import Activation, ProbabilityMetric

__all__ = ["ThresholdCurves", "ThresholdIoUMetric"]

SCORES = ("iou", "average_precision")


@dataclass(frozen=True)
class ThresholdCurves:
    """Scores of each class at every threshold, over all images."""

    thresholds: torch.Tensor
    """t_k = k / M, shape (M + 1,)."""
    iou: torch.Tensor
    """Mean IoU over the images at each threshold, (C, M + 1); NaN where no image has a score."""
    dice: torch.Tensor
    """Mean Dice over the images at each threshold, (C, M + 1); NaN where no image has a score."""
    pooled_iou: torch.Tensor
    """IoU over the voxels of all images together, (C, M + 1)."""
    best_threshold: torch.Tensor
    """Threshold with the largest mean IoU, (C,); if several are equal, the one nearest to 0.5."""
    best_iou: torch.Tensor
    """Mean IoU at the best threshold, (C,)."""
    average_precision: torch.Tensor
    """sum_k (recall_k - recall_(k+1)) precision_k over the voxels of all images, (C,); NaN if the class is absent."""


class ThresholdIoUMetric(ProbabilityMetric):
    """IoU of every image and class at one threshold, (B, C), and at all other thresholds from the same statistics.

    The statistics take 16 (M + 1) bytes per image and class, which is 3 kB with the default resolution of 200.

    Args:
        include_background: whether class 0 is scored; a single map has no background to leave out. None (default)
            leaves it out if it is a background, as in label maps and one-hot maps, but not in overlapping regions.
        reduction: name of one of MONAI's `MetricReduction`; an average over nothing is NaN.
        get_not_nans: whether `aggregate` returns a tuple of the score and the number of scores that were averaged.
        threshold: threshold of the IoU that a call and `aggregate` return, rounded to the nearest k / M.
        ignore_empty: the score of an absent class; see `iou_from_counts`. At a threshold of 0 all voxels are predicted.
        return_with_label: with "mean_batch", return a dict by "label_0", "label_1", ... or by the names given.
        ignore_index: reference label whose voxels are ignored.
        activation: None (default) for probabilities, "softmax" or "sigmoid" for logits.
        resolution: M, an even number. The thresholds are k / M, and probabilities are rounded to the nearest of them.
        score: what a call and `aggregate` return: "iou" at `threshold` (default), or "average_precision" of each image
            and class over all thresholds, NaN where the reference lacks the class.

    Raises:
        TypeError: `threshold` is not a number, or `ignore_index` is not an integer.
        ValueError: an argument is not one of the above.

    Example:
        >>> metric = ThresholdIoUMetric(resolution=10)
        >>> metric(torch.tensor([[[0.9, 0.4, 0.3, 0.1]]]), torch.tensor([[[1, 1, 0, 0]]]))
        tensor([[0.5000]])
        >>> curves = metric.curves()
        >>> curves.best_threshold, curves.best_iou
        (tensor([0.4000]), tensor([1.]))
    """

    def __init__(
        self,
        include_background: bool | None = None,
        reduction: MetricReduction | str = MetricReduction.MEAN,
        get_not_nans: bool = False,
        threshold: float = 0.5,
        ignore_empty: IgnoreEmpty = "both",
        return_with_label: bool | Sequence[str] = False,
        ignore_index: int | None = None,
        activation: Activation = None,
        resolution: int = 200,
        score: Literal["iou", "average_precision"] = "iou",
    ) -> None:
        super().__init__(
            include_background, reduction, get_not_nans, return_with_label, ignore_index, activation, resolution
        )
        check_ignore_empty(ignore_empty)
        check_choice("score", score, SCORES)
        self.score = score
        self.threshold = check_fraction(
            "threshold", threshold, allow_one=True, remedy="give a probability, such as 0.5"
        )
        self.ignore_empty = ignore_empty

    def _row_of_histogram(self, counts: torch.Tensor) -> torch.Tensor:
        return counts.flatten(1).to(row_device(counts)).double()

    def _scores(self, rows: torch.Tensor) -> torch.Tensor:
        if self.score == "average_precision":
            return _average_precision(*_counts(rows)).float()
        node = round(self.threshold * self.resolution)
        both, predicted, true = (number[..., node] for number in _counts(rows))
        return iou_from_counts(both, predicted, true, self.ignore_empty)

    def curves(self) -> ThresholdCurves:
        """Return the scores of all images of all ranks at every threshold; every rank must call it.

        Raises:
            ValueError: no rank has scored an image yet.
        """
        rows = self._all_rows()
        both, predicted, true = _counts(rows)
        iou = iou_from_counts(both, predicted, true, self.ignore_empty).nanmean(0)
        nothing = 1.0 if self.ignore_empty is False else math.nan
        dice = scores.dice(both, predicted, true, empty=nothing)
        if self.ignore_empty is True:
            dice = dice.masked_fill(true == 0, math.nan)
        pooled = _counts(rows.nansum(0))
        thresholds = torch.arange(self.resolution + 1, device=rows.device) / self.resolution
        best = _best(iou, thresholds)
        return ThresholdCurves(
            thresholds=thresholds,
            iou=iou,
            dice=dice.nanmean(0).float(),
            pooled_iou=iou_from_counts(*pooled, self.ignore_empty),
            best_threshold=thresholds[best].masked_fill(iou.isnan().all(1), math.nan),
            best_iou=iou.gather(1, best[:, None])[:, 0],
            average_precision=_average_precision(*pooled).float(),
        )


def _counts(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """I, P and T at every threshold, shape (..., M + 1), from rows of both histograms, (..., 2 (M + 1))."""
    # On a CPU: torch's deterministic algorithms do not cumulate floating-point numbers on a GPU.
    above = rows.cpu().unflatten(-1, (2, -1)).flip(-1).cumsum(-1).flip(-1).to(rows.device)
    outside, inside = above.unbind(-2)
    return inside, inside + outside, inside[..., :1].expand_as(inside)


def _best(iou: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """The threshold of the largest score of each class, of equal ones the nearest to 0.5."""
    known = iou.nan_to_num(nan=-1.0)
    largest = known == known.amax(1, keepdim=True)
    return (largest * (1 - (thresholds - 0.5).abs())).argmax(1)


def _average_precision(both: torch.Tensor, predicted: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    recall = scores.ratio(both, true, empty=math.nan)
    steps = recall - torch.cat([recall[..., 1:], torch.zeros_like(recall[..., :1])], dim=-1)
    return (steps * scores.ratio(both, predicted, empty=0.0)).sum(-1)
