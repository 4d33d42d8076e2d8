"""Scores as functions of sums over voxels: a few lines of algebra each, for losses and metrics alike.

The overlap scores take the three numbers I, P, T of any one kind: tensors (of a loss, with gradients), NumPy arrays
or plain numbers (of a metric). Whole numbers are divided in double precision, so that counts up to 2^53 are exact.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from monai_iou.checks import check_choice
from monai_iou.voxels import VoxelSums
from monai_iou.voxels.error_gradient import with_slopes
from monai_iou.voxels.formulas import Sums, union
from monai_iou.voxels.histograms import ErrorHistograms
from monai_iou.voxels.inputs import total_dtype

__all__ = [
    "AVERAGES",
    "CALIBRATION_ERRORS",
    "WEIGHT_TYPES",
    "calibration_error",
    "cross_entropy",
    "dice",
    "generalized_iou",
    "iou",
    "lovasz",
    "mean_of_terms",
    "power",
    "ratio",
    "tversky",
    "union",
    "volume_weights",
    "weighted_entropy",
]

AVERAGES = ("pairs", "images", "classes")
CALIBRATION_ERRORS = ("expected", "average", "maximum")
WEIGHT_TYPES = ("square", "simple", "uniform")
_TINY = 1e-12
_MIN_VOLUME = 1e-15


def ratio(numerator: Sums, denominator: Sums, empty: float = 1.0) -> Sums:
    """Return numerator / denominator, and `empty` where the denominator is 0; NaN where either is NaN.

    Losses take the default: nothing there and nothing found is right, and no gradient is NaN. Metrics say
    `empty=math.nan`: what is not defined is left out of their averages.

    Example:
        >>> import math
        >>> from monai_iou.scores import ratio
        >>> ratio(1, 4), ratio(0, 0), ratio(0, 0, empty=math.nan)
        (0.25, 1.0, nan)
    """
    if isinstance(denominator, Tensor):
        numerator, denominator = _floating(numerator), _floating(denominator)
        undefined = denominator == 0
        quotient = numerator / torch.where(undefined, 1, denominator)
        return torch.where(undefined & ~numerator.isnan(), empty, quotient)
    if isinstance(denominator, np.ndarray):
        undefined = denominator == 0
        return np.where(undefined & ~np.isnan(numerator), empty, numerator / np.where(undefined, 1, denominator))
    return numerator / denominator if denominator != 0 else empty if numerator == numerator else numerator


def _floating(tensor: Tensor) -> Tensor:
    """Return counts in double precision, where torch would divide them in single; other tensors as they are."""
    return tensor if tensor.is_floating_point() else tensor.double()


def power(base: Tensor, exponent: float) -> Tensor:
    """Return base^exponent for base >= 0, with the gradient 0 instead of infinity where base is 0."""
    if exponent == 1:
        return base
    positive = ~(base <= _TINY)  # true of NaN, which stays
    return torch.where(positive, torch.where(positive, base, 1).pow(exponent), 0)


def iou(
    intersection: Sums,
    prediction: Sums,
    target: Sums,
    smooth_nr: float = 0,
    smooth_dr: float = 0,
    *,
    empty: float = 1.0,
) -> Sums:
    """Return (I + smooth_nr) / (P + T - I + smooth_dr), shaped as the sums; `empty` where the denominator is 0.

    Example:
        >>> import torch
        >>> from monai_iou import voxel_sums
        >>> from monai_iou.scores import iou
        >>> labels = torch.tensor([[[0, 0, 1, 1]]])
        >>> found = torch.tensor([[[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]])
        >>> sums = voxel_sums(found, labels, activation=None)
        >>> iou(sums.intersection, sums.prediction, sums.target)
        tensor([[1., 1.]])
        >>> iou(1, 2, 3)
        0.25
    """
    return ratio(intersection + smooth_nr, union(intersection, prediction, target) + smooth_dr, empty)


def dice(intersection: Sums, prediction: Sums, target: Sums, *, empty: float = 1.0) -> Sums:
    """Return 2 I / (P + T), shaped as the sums; `empty` where both P and T are 0.

    Example:
        >>> from monai_iou.scores import dice
        >>> dice(1, 2, 3)
        0.4
    """
    return ratio(2 * intersection, prediction + target, empty)


def tversky(
    intersection: Sums,
    prediction: Sums,
    target: Sums,
    alpha: float,
    beta: float,
    smooth_nr: float = 0,
    smooth_dr: float = 0,
) -> Sums:
    """Return (I + s) / (I + alpha FP + beta FN + s) (Salehi et al. 2017, https://arxiv.org/abs/1706.05721).

    alpha = beta = 1 is the IoU, alpha = beta = 1/2 is Dice.
    """
    mixed = intersection + alpha * (prediction - intersection) + beta * (target - intersection)
    return ratio(intersection + smooth_nr, mixed + smooth_dr)


def mean_of_terms(terms: Tensor, counted: Tensor | None, average: str = "pairs") -> Tensor:
    """Return the mean of terms (B, C) of images and classes; 0 if nothing counts.

    Args:
        terms: one term per image and class, 0 where it does not count.
        counted: which terms count, (B, C) bool, or None for all.
        average: "pairs", over all that count alike; "images", over the classes of each image, then over the images;
            "classes", over the images of each class, then over the classes. The last two are mIoU-I and mIoU-C of Wang
            et al. (NeurIPS 2023, Datasets and Benchmarks, https://arxiv.org/abs/2310.19252) if a term is 1 - IoU and
            counts where the image holds the class.

    Example:
        >>> import torch
        >>> from monai_iou.scores import mean_of_terms
        >>> terms, counted = torch.tensor([[0.5, 0.0], [0.25, 1.0]]), torch.tensor([[True, False], [True, True]])
        >>> [round(mean_of_terms(terms, counted, average).item(), 4) for average in ("pairs", "images", "classes")]
        [0.5833, 0.5625, 0.6875]
    """
    if counted is None:
        return terms.mean() if terms.numel() else terms.sum()
    if average == "pairs":
        return terms.sum() / counted.sum().clamp_min(1)
    axis = 1 if average == "images" else 0
    number = counted.sum(axis)
    return (terms.sum(axis) / number.clamp_min(1)).sum() / (number > 0).sum().clamp_min(1)


def volume_weights(target: Tensor, w_type: str) -> Tensor:
    """Return one weight per class, (B, C), from reference volumes T: 1/T^2, 1/T or 1.

    A class that is absent from an image takes the image's largest finite weight (MONAI's choice for Dice); if all are
    absent, 1.
    """
    check_choice("w_type", w_type, WEIGHT_TYPES)
    if w_type == "uniform":
        return torch.ones_like(target)
    present = target > 0
    # A soft label may hold next to nothing of a class, whose 1/T^2 would overflow.
    volume = torch.where(present, target, 1).detach().clamp_min(_MIN_VOLUME)
    weights = 1 / (volume * volume if w_type == "square" else volume)
    largest = torch.where(present, weights, 0).amax(1, keepdim=True)
    return torch.where(present, weights, torch.where(largest > 0, largest, 1))


def generalized_iou(sums: VoxelSums, weights: Tensor, smooth_nr: float = 0.0, smooth_dr: float = 0.0) -> Tensor:
    """Return (sum_c w_c I_c + s) / (sum_c w_c U_c + s), (B,); the generalised Dice of Sudre et al. 2017, for IoU."""
    # Both sides are divided by the largest weight, which changes nothing but keeps their numbers near 1.
    largest = weights.amax(1, keepdim=True)
    largest = torch.where(largest > 0, largest, 1)
    weights, scale = weights / largest, 1 / largest.squeeze(1)
    overlap, union = (weights * sums.intersection).sum(1), (weights * sums.union).sum(1)
    return ratio(overlap + smooth_nr * scale, union + smooth_dr * scale)


def weighted_entropy(sums: VoxelSums, pos_weight: Tensor | None) -> Tensor:
    """Return E, in which the voxels of a class count `pos_weight` times (of sums whose E is in two parts)."""
    if pos_weight is None:
        return sums.cross_entropy
    return pos_weight.to(sums.target) * sums.foreground_entropy + sums.background_entropy


def cross_entropy(
    sums: VoxelSums, weight: Tensor | None = None, *, multi_label: bool = False, pos_weight: Tensor | None = None
) -> Tensor:
    """Return sum_c w_c E_c / sum_c w_c T_c, (B,); 0 over no voxels. With `multi_label`, N voxels stand for T_c.

    `pos_weight` is that of torch's BCEWithLogitsLoss; see :func:`weighted_entropy`.
    """
    volume = sums.count if multi_label else sums.target
    weight = torch.ones_like(volume[:1]) if weight is None else weight.to(volume).expand(volume.shape[1])
    total = (weight * volume).sum(1)
    return ratio((weight * weighted_entropy(sums, pos_weight)).sum(1), total, empty=0.0)


def lovasz(histograms: ErrorHistograms) -> Tensor:
    r"""Return the Lovasz extension of the Jaccard loss from error histograms, (B, C); 0 over no voxels.

    It is the integral of J({error >= t}) over t, J = (f + b) / (G + b) with f of the class's G voxels and b others in
    the set (Berman et al. 2018, https://arxiv.org/abs/1705.08790). Within limit / (2 bins) of the exact value, because
    the extension moves at most as far as the largest change of an error. Differentiable by the counted
    logits.

    Example:
        >>> import torch
        >>> from monai_iou.scores import lovasz
        >>> from monai_iou.voxels.passes import error_histograms
        >>> found = torch.tensor([[[1.0, 1.0, 0.0, 0.0]]])
        >>> lovasz(error_histograms(found, torch.tensor([[[1, 0, 0, 0]]]), activation=None))  # 1 - IoU
        tensor([[0.5000]], dtype=torch.float64)
    """
    dtype = total_dtype(histograms.counts)
    volume = histograms.volume.unsqueeze(-1)
    wrong_inside = histograms.foreground[..., :-1].cumsum(-1)  # the last cell holds no error
    wrong_outside = histograms.background[..., :-1].cumsum(-1)
    jaccard = (wrong_inside + wrong_outside).to(dtype) / (volume + wrong_outside).clamp_min(1)
    nodes = jaccard.shape[-1]
    width = torch.arange(1, 2 * nodes, 2, dtype=dtype, device=jaccard.device) / nodes**2  # t_j - t_(j+1)
    value = (jaccard * width).sum(-1) * histograms.limit.to(dtype)
    return with_slopes(torch.where(histograms.undefined > 0, torch.nan, value), histograms)


def calibration_error(counts: Tensor, confidence: Tensor, hits: Tensor, kind: str = "expected") -> Tensor:
    """Return the calibration error of bins of probabilities, (...), NaN without a voxel.

    With n voxels in a bin, their mean probability and the share of them that is of the class, the gap of the bin is
    |mean - share|. "expected" weights the gaps by n (ECE, Guo et al. 2017, https://arxiv.org/abs/1706.04599), "average"
    takes all bins that hold a voxel alike (ACE), "maximum" the largest gap (MCE).

    Args:
        counts: n, voxels in each bin, (..., bins).
        confidence: sums of their probabilities.
        hits: how many of them are of the class.
        kind: "expected", "average" or "maximum".

    Raises:
        ValueError: if `kind` is none of the three.
    """
    check_choice("kind", kind, CALIBRATION_ERRORS)
    if kind == "expected":
        return ratio((confidence - hits).abs().sum(-1), counts.sum(-1), empty=torch.nan)
    gaps = ratio((confidence - hits).abs(), counts, empty=torch.nan)
    used = counts != 0
    if kind == "average":
        return ratio(torch.where(used, gaps, 0).sum(-1), used.sum(-1), empty=torch.nan)
    largest = torch.where(used, gaps, -torch.inf).amax(-1)
    return torch.where(used.any(-1), largest, torch.nan)
