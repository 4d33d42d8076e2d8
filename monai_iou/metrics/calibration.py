"""Calibration of probabilities: of the voxels with a probability of p, a share of p should belong to the class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from monai.utils.enums import MetricReduction

from monai_iou import scores
from monai_iou.checks import check_choice, is_integer
from monai_iou.metrics.base import row_device
from monai_iou.metrics.probability import Activation, ProbabilityMetric

__all__ = ["CalibrationMetric", "ReliabilityDiagram"]

_MAX_BINS = 1000
# Nodes of the histogram: probabilities are rounded by at most 1 / 8000, and so move between bins only there.
_LEAST_RESOLUTION = 4000


@dataclass(frozen=True)
class ReliabilityDiagram:
    """The values of a reliability diagram of each class, over the voxels of all images."""

    edges: torch.Tensor
    """Edges of the bins of probability, shape (bins + 1,)."""
    counts: torch.Tensor
    """Number of voxels in each bin, (C, bins), int64."""
    confidence: torch.Tensor
    """Mean probability of the voxels in each bin, (C, bins); NaN in an empty bin."""
    frequency: torch.Tensor
    """Share of the voxels in each bin that belong to the class, (C, bins); NaN in an empty bin."""


class CalibrationMetric(ProbabilityMetric):
    """Calibration error of every image and class, (B, C), and the reliability diagram of all images.

    With n voxels in a bin, their mean probability and the share of them that belongs to the class, the gap of the bin
    is |mean - share|. The expected error (ECE, Guo et al. 2017, https://arxiv.org/abs/1706.04599) is the mean of the
    gaps weighted by n, the average error (ACE) is their mean over the bins that contain a voxel, and the maximum error
    (MCE) is the largest gap.

    Args:
        include_background: whether class 0 is scored; a single map has no background to leave out. None (default)
            leaves it out if it is a background, as in label maps and one-hot maps, but not in overlapping regions.
        reduction: name of one of MONAI's `MetricReduction`; an average over nothing is NaN.
        get_not_nans: whether `aggregate` returns a tuple of the score and the number of scores that were averaged.
        num_bins: number of bins of equal width between the probabilities 0 and 1.
        kind: "expected" (ECE, the default), "average" (ACE) or "maximum" (MCE).
        return_with_label: with "mean_batch", return a dict by "label_0", "label_1", ... or by the names given.
        ignore_index: reference label whose voxels are ignored.
        activation: None (default) for probabilities, "softmax" or "sigmoid" for logits.

    Raises:
        TypeError: `ignore_index` is not an integer.
        ValueError: an argument is not one of the above.

    Example:
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
        if not is_integer(num_bins) or not 1 <= num_bins <= _MAX_BINS:
            message = (
                f"Expected `num_bins` to be a whole number from 1 to {_MAX_BINS}, but got {num_bins!r}: choose "
                "for example 20."
            )
            raise ValueError(message)
        check_choice("kind", kind, scores.CALIBRATION_ERRORS)
        num_bins = int(num_bins)
        resolution = 2 * num_bins * math.ceil(_LEAST_RESOLUTION / (2 * num_bins))  # the bins' edges are nodes
        super().__init__(
            include_background, reduction, get_not_nans, return_with_label, ignore_index, activation, resolution
        )
        self.num_bins = num_bins
        self.kind = kind

    def _row_of_histogram(self, counts: torch.Tensor) -> torch.Tensor:
        counts = counts.to(row_device(counts))
        nodes = torch.arange(self.resolution + 1, device=counts.device)
        place = (nodes * self.num_bins).div(self.resolution, rounding_mode="floor").clamp_max(self.num_bins - 1)
        both = counts.sum(1).double()
        parts = torch.stack([both, both * (nodes / self.resolution), counts[:, 1].double()], dim=-1)
        bins = parts.new_zeros((len(counts), self.num_bins, 3)).index_add_(1, place, parts)
        return bins.flatten(1)

    def _scores(self, rows: torch.Tensor) -> torch.Tensor:
        return scores.calibration_error(*self._bins(rows), kind=self.kind).float()

    def _bins(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the number of voxels, the sum of their probabilities and the voxels of the class, (..., bins) each."""
        counts, confidence, hits = rows.unflatten(-1, (self.num_bins, 3)).unbind(-1)
        return counts, confidence, hits

    def reliability(self) -> ReliabilityDiagram:
        """Return the reliability diagram of the voxels of all images of all ranks; every rank must call it.

        Raises:
            ValueError: no rank has scored an image yet.
        """
        counts, confidence, hits = self._bins(self._all_rows().nansum(0))
        return ReliabilityDiagram(
            edges=torch.arange(self.num_bins + 1, device=counts.device) / self.num_bins,
            counts=counts.long(),
            confidence=scores.ratio(confidence, counts, empty=math.nan).float(),
            frequency=scores.ratio(hits, counts, empty=math.nan).float(),
        )

    def summary(self) -> list[dict[str, float]]:
        """Return the errors over the voxels of all images of all ranks together; every rank must call it.

        Returns:
            One dict for each class: "ece", "ace" and "mce", the expected, average and maximum error; NaN if there is no
            voxel.

        Raises:
            ValueError: no rank has scored an image yet.
        """
        bins = self._bins(self._all_rows().nansum(0))
        errors = [scores.calibration_error(*bins, kind=kind).tolist() for kind in scores.CALIBRATION_ERRORS]
        return [dict(zip(("ece", "ace", "mce"), values, strict=True)) for values in zip(*errors, strict=True)]
