"""Scores as functions of sums over voxels, shared by losses and metrics.

The overlap scores accept the sums I, P and T as tensors (from a loss, with gradients), NumPy arrays or plain numbers
(from a metric). Integers are divided in double precision, so that counts up to 2^53 are exact.
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
    """Return numerator / denominator, elementwise; `empty` where the denominator is 0, NaN where either is NaN.

    Losses use the default: a class that is neither present nor predicted is correct, and no gradient is NaN. Metrics
    use `empty=math.nan`, so that undefined scores are left out of averages.

    Example:
        >>> import math
        >>> from monai_iou.scores import ratio
        >>> ratio(1, 4), ratio(0, 0), ratio(0, 0, empty=math.nan)
        (0.25, 1.0, nan)
    """
    if isinstance(denominator, Tensor):
        numerator, denominator = _floating(numerator), _floating(denominator)
        undefined = denominator == 0
        quotient = numerator / (denominator + undefined)
        return quotient.masked_fill(undefined & (numerator == numerator), empty)  # a NaN differs from itself
    if isinstance(denominator, np.ndarray):
        undefined = denominator == 0
        return np.where(undefined & ~np.isnan(numerator), empty, numerator / np.where(undefined, 1, denominator))
    return numerator / denominator if denominator != 0 else empty if numerator == numerator else numerator


def _floating(tensor: Tensor) -> Tensor:
    """Convert integers to double precision where there is one: torch would divide them in single precision."""
    return tensor if tensor.is_floating_point() else tensor.to(total_dtype(tensor))


def power(base: Tensor, exponent: float) -> Tensor:
    """Return base^exponent for base >= 0, with a gradient of 0, instead of infinity, where the base is 0."""
    if exponent == 1:
        return base
    positive = ~(base <= _TINY)  # True for NaN, which must be kept
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
    """Return the IoU (Jaccard index), (I + smooth_nr) / (P + T - I + smooth_dr), and `empty` if that divides by 0.

    The sums I, P and T, in voxels, have the same shape, which is that of the result.

    Example:
        >>> import torch
        >>> from monai_iou import voxel_sums
        >>> from monai_iou.scores import iou
        >>> labels = torch.tensor([[[0, 0, 1, 1]]])
        >>> probabilities = torch.tensor([[[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]])
        >>> sums = voxel_sums(probabilities, labels, activation=None)
        >>> iou(sums.intersection, sums.prediction, sums.target)
        tensor([[1., 1.]])
        >>> iou(1, 2, 3)
        0.25
    """
    smoothed = union(intersection, prediction, target) + smooth_dr
    return (intersection + smooth_nr) / smoothed if smooth_dr > 0 else ratio(intersection + smooth_nr, smoothed, empty)


def dice(intersection: Sums, prediction: Sums, target: Sums, *, empty: float = 1.0) -> Sums:
    """Return the Dice coefficient, 2 I / (P + T), of the shape of the sums, and `empty` where both P and T are 0.

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
    """Return the Tversky index, (I + smooth_nr) / (I + alpha FP + beta FN + smooth_dr), of the shape of the sums.

    FP = P - I and FN = T - I. alpha = beta = 1 is the IoU, alpha = beta = 1/2 is Dice (Salehi et al. 2017,
    https://arxiv.org/abs/1706.05721).

    Example:
        >>> from monai_iou.scores import tversky
        >>> tversky(1, 2, 4, alpha=0.5, beta=0.5)
        0.3333333333333333
    """
    mixed = intersection + alpha * (prediction - intersection) + beta * (target - intersection) + smooth_dr
    return (intersection + smooth_nr) / mixed if smooth_dr > 0 else ratio(intersection + smooth_nr, mixed)


def mean_of_terms(terms: Tensor, counted: Tensor | None, average: str = "pairs") -> Tensor:
    """Return the mean of the terms of all images and classes, a scalar; 0 if no term counts.

    Args:
        terms: one term per image and class, (B, C), 0 where it does not count.
        counted: which terms count, (B, C) bool, or None for all.
        average: "pairs": over all pairs of image and class that count. "images": over the classes of each image, then
            over the images. "classes": over the images of each class, then over the classes. The last two correspond
            to mIoU-I and mIoU-C of Wang et al. (NeurIPS 2023, Datasets and Benchmarks,
            https://arxiv.org/abs/2310.19252) if a term is 1 - IoU and counts where the image contains the class.

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
    """Return one weight per image and class, (B, C), from the reference volumes T: 1 / T^2, 1 / T or 1.

    `w_type` is "square", "simple" or "uniform" (Sudre et al. 2017, https://arxiv.org/abs/1707.03237). A class that is
    absent from an image takes the largest finite weight of this image, as in MONAI's generalised Dice; if all classes
    are absent, the weights are 1. They have derivatives by T, which soft labels may ask for.

    Example:
        >>> import torch
        >>> from monai_iou.scores import volume_weights
        >>> volume_weights(torch.tensor([[8.0, 2.0, 0.0]]), "simple")
        tensor([[0.1250, 0.5000, 0.5000]])
    """
    check_choice("w_type", w_type, WEIGHT_TYPES)
    if w_type == "uniform":
        return torch.ones_like(target)
    present = target > 0
    # A class of a soft label may be so small that 1 / T^2, or its slope unless 1 / T is squared, would overflow.
    inverse = 1 / torch.where(present, target, 1).clamp_min(_MIN_VOLUME)
    weights = inverse * inverse if w_type == "square" else inverse
    largest = torch.where(present, weights, 0).amax(1, keepdim=True)
    return torch.where(present, weights, torch.where(largest > 0, largest, 1))


def generalized_iou(sums: VoxelSums, weights: Tensor, smooth_nr: float = 0.0, smooth_dr: float = 0.0) -> Tensor:
    """Return the generalised IoU of each image, (sum_c w_c I_c + smooth_nr) / (sum_c w_c U_c + smooth_dr), (B,).

    It is the generalised Dice coefficient of Sudre et al. 2017 (https://arxiv.org/abs/1707.03237) with the IoU instead
    of Dice. The sums have shape (B, C), as have the weights w_c, for which see `volume_weights`.

    Example:
        >>> from monai_iou import voxel_sums
        >>> sums = voxel_sums(torch.zeros(1, 2, 4), torch.tensor([[[0, 0, 0, 1]]]))
        >>> generalized_iou(sums, volume_weights(sums.target, "simple"))
        tensor([0.2727])
    """
    # Dividing numerator and denominator by the largest weight keeps both near 1 and does not change the ratio.
    largest = weights.detach().amax(1, keepdim=True)
    largest = torch.where(largest > 0, largest, 1)
    weights, scale = weights / largest, 1 / largest.squeeze(1)
    overlap, union = (weights * sums.intersection).sum(1), (weights * sums.union).sum(1)
    return ratio(overlap + smooth_nr * scale, union + smooth_dr * scale)


def weighted_entropy(sums: VoxelSums, pos_weight: Tensor | None) -> Tensor:
    """Return the cross-entropy sums E, (B, C), with the part of the foreground voxels multiplied by `pos_weight`.

    With `pos_weight`, the sums must contain the two parts of E separately.
    """
    if pos_weight is None:
        return sums.cross_entropy
    return pos_weight.to(sums.target) * sums.foreground_entropy + sums.background_entropy


def cross_entropy(
    sums: VoxelSums, weight: Tensor | None = None, *, multi_label: bool = False, pos_weight: Tensor | None = None
) -> Tensor:
    """Return the class-weighted cross-entropy of each image, sum_c w_c E_c / sum_c w_c T_c, (B,); 0 without voxels.

    The sums have shape (B, C); `weight`, w_c, has shape (C,) or is a scalar. With `multi_label`, for independent
    classes, the number of voxels N replaces T_c. `pos_weight` is that of torch's BCEWithLogitsLoss.
    """
    volume, entropy = sums.count if multi_label else sums.target, weighted_entropy(sums, pos_weight)
    if weight is not None:
        weight = weight.to(volume).expand(volume.shape[1])
        volume, entropy = weight * volume, weight * entropy
    return ratio(entropy.sum(1), volume.sum(1), empty=0.0)


def lovasz(histograms: ErrorHistograms) -> Tensor:
    r"""Return the Lovasz extension of the Jaccard loss from error histograms, (B, C); 0 without voxels.

    The extension is the integral of J({error >= t}) over t. For a set with f of the G voxels of the class and b other
    voxels, J = (f + b) / (G + b) (Berman et al. 2018, https://arxiv.org/abs/1705.08790). The result is within
    limit / (2 bins) of the exact value, because the extension changes at most by the largest change of an error. It is
    differentiable with respect to the logits from which the histograms were counted.

    Example:
        >>> import torch
        >>> from monai_iou.scores import lovasz
        >>> from monai_iou.voxels.passes import error_histograms
        >>> probabilities = torch.tensor([[[1.0, 1.0, 0.0, 0.0]]])
        >>> lovasz(error_histograms(probabilities, torch.tensor([[[1, 0, 0, 0]]]), activation=None))  # 1 - IoU
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
    """Return the calibration error from bins of probabilities, (...); NaN without voxels.

    The gap of a bin is the absolute difference between the mean probability of its n voxels and the fraction of them
    that belong to the class. "expected" is the mean of the gaps weighted by n (ECE, Guo et al. 2017,
    https://arxiv.org/abs/1706.04599), "average" the mean over all bins with voxels (ACE), and "maximum" the largest gap
    (MCE).

    Args:
        counts: n, the number of voxels in each bin, (..., bins).
        confidence: the sum of their probabilities, (..., bins).
        hits: the number of them that belong to the class, (..., bins).
        kind: "expected", "average" or "maximum".

    Raises:
        ValueError: if `kind` is not one of the three.

    Example:
        >>> import torch
        >>> from monai_iou.scores import calibration_error
        >>> counts, confidence, hits = torch.tensor([4.0, 1.0]), torch.tensor([1.0, 0.9]), torch.tensor([2.0, 1.0])
        >>> [round(calibration_error(counts, confidence, hits, kind).item(), 4) for kind in ("expected", "maximum")]
        [0.22, 0.25]
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
