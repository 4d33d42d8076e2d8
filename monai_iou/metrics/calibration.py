"""Calibration of probabilities: of the voxels that are given p, the share that is of the class should be p."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from monai.utils.enums import MetricReduction

from monai_iou import scores
from monai_iou.checks import check_choice
from monai_iou.metrics.probability import Activation, ProbabilityMetric

__all__ = ["CalibrationMetric", "ReliabilityDiagram"]

_MAX_BINS = 1000
# Nodes of the histogram: probabilities are rounded by at most 1 / 8000, and so move between bins only there.
_LEAST_RESOLUTION = 4000


@dataclass(frozen=True)
class ReliabilityDiagram:
    """What a reliability diagram draws, over the voxels of all images, for each class."""

    edges: torch.Tensor
    """Edges of the bins of probability, shape (bins + 1,)."""
    counts: torch.Tensor
    """Voxels in each bin, shape (C, bins), int64."""
    confidence: torch.Tensor
    """Their mean probability, shape (C, bins); NaN in an empty bin."""
    frequency: torch.Tensor
    """The share of them that is of the class, shape (C, bins); NaN in an empty bin."""


class CalibrationMetric(ProbabilityMetric):
    """Calibration error of every image and class, and the reliability diagram of all of them.

    Args:
        include_background: whether class 0 is scored; with a single map there is no background to leave out. None
            (default) leaves it out where it is a background: in label maps and one-hot maps, not among regions.
        reduction: MONAI's `MetricReduction` name; an average over nothing is NaN.
        get_not_nans: whether `aggregate` returns a tuple of the score and how many scores went into it.
        num_bins: number of equally wide bins of probability.
        kind: "expected" (ECE, the default), "average" (ACE) or "maximum" (MCE); see `monai_iou.scores`.
        return_with_label: with "mean_batch", return a dict by "label_0", "label_1", ... or by the names given.
        ignore_index: reference label whose voxels are left out of every class.
        activation: None (default) for probabilities, "softmax" or "sigmoid" for logits.

    Raises:
        ValueError: an argument is not one of the above.

    >>> metric = CalibrationMetric(num_bins=2)
    >>> metric(torch.tensor([[[0.9, 0.9, 0.1, 0.1]]]), torch.tensor([[[1, 0, 0, 0]]]))
    tensor([[0.2500]])
    >>> metric.reliability().frequency
    tensor([[0.0000, 0.5000]])
    """

    def __init__(
        self,
        include_background: bool | None = None,
        reduction: MetricReduction | str = MetricReduction.MEAN,
        get_not_nans: bool = False,
        num_bins: int = 20,
        kind: Literal["expected", "average", "maximum"] = "expected",
        return_with_label: bool | Sequence[str] = False,
        ignore_index: int | None = None,
        activation: Activation = None,
    ) -> None:
        if isinstance(num_bins, bool) or not isinstance(num_bins, int) or not 1 <= num_bins <= _MAX_BINS:
            message = (
                f"Expected `num_bins` to be a whole number from 1 to {_MAX_BINS}, but got {num_bins}: 10 to 20 "
                "are usual."
            )
            raise ValueError(message)
        check_choice("kind", kind, scores.CALIBRATION_ERRORS)
        resolution = 2 * num_bins * math.ceil(_LEAST_RESOLUTION / (2 * num_bins))  # the bins' edges are nodes
        super().__init__(
            include_background, reduction, get_not_nans, return_with_label, ignore_index, activation, resolution
        )
        self.num_bins = num_bins
        self.kind = kind

    def _row_of_histogram(self, counts: torch.Tensor) -> torch.Tensor:
        nodes = torch.arange(self.resolution + 1, device=counts.device)
        place = (nodes * self.num_bins).div(self.resolution, rounding_mode="floor").clamp_max(self.num_bins - 1)
        both = counts.sum(1).double()
        parts = torch.stack([both, both * (nodes / self.resolution), counts[:, 1].double()], dim=-1)
        bins = parts.new_zeros((len(counts), self.num_bins, 3)).index_add_(1, place, parts)
        return bins.flatten(1)

    def _scores(self, rows: torch.Tensor) -> torch.Tensor:
        return scores.calibration_error(*self._bins(rows), kind=self.kind).float()

    def _bins(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Voxels, sum of probabilities and voxels of the class in each bin, (..., bins) each."""
        counts, confidence, hits = rows.unflatten(-1, (self.num_bins, 3)).unbind(-1)
        return counts, confidence, hits

    def reliability(self) -> ReliabilityDiagram:
        """The reliability diagram of all voxels of all images and ranks; every rank must call it.

        Raises:
            ValueError: no rank has scored an image.
        """
        counts, confidence, hits = self._bins(self._all_rows().nansum(0))
        return ReliabilityDiagram(
            edges=torch.arange(self.num_bins + 1, device=counts.device) / self.num_bins,
            counts=counts.long(),
            confidence=scores.ratio(confidence, counts, empty=math.nan).float(),
            frequency=scores.ratio(hits, counts, empty=math.nan).float(),
        )

    def summary(self) -> list[dict[str, float]]:
        """Errors of the voxels of all images of all ranks together, one dict for each class; every rank must call it.

        Returns:
            "ece", "ace" and "mce", the expected, average and largest error; NaN without a voxel.

        Raises:
            ValueError: no rank has scored an image.
        """
        bins = self._bins(self._all_rows().nansum(0))
        errors = [scores.calibration_error(*bins, kind=kind).tolist() for kind in scores.CALIBRATION_ERRORS]
        return [dict(zip(("ece", "ace", "mce"), values, strict=True)) for values in zip(*errors, strict=True)]
