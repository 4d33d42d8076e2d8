"""IoU over a data set, by image, by class, and of the worst images (Wang et al., NeurIPS Datasets and Benchmarks 2023).

With IoU_ic of class c in image i, over the pairs of image and class that count:

    D = mean_c (sum_i I_ic / sum_i U_ic)      I = mean_i mean_c IoU_ic      C = mean_c mean_i IoU_ic

I_q is the mean over the lowest q % of the images only, and C_q over the lowest q % of the images of each class; IQ and
CQ are the means of I_q and C_q over q = 10, 20, ... 100. https://arxiv.org/abs/2310.19252
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from monai_iou import checks, scores
from monai_iou.metrics.inputs import ArrayLike, as_plain_tensor
from monai_iou.voxels.inputs import total_dtype

__all__ = ["fine_grained_iou"]

_REMEDY = "pass a list, such as (10,) for the worst tenth"
_QUANTILES = tuple(range(10, 101, 10))
# Counts that were averaged or stored as float32 may miss an inequality by less than this share.
_ROUNDING = 1e-6


def fine_grained_iou(
    intersection: ArrayLike,
    union: ArrayLike,
    *,
    active: ArrayLike | None = None,
    worst: Sequence[float] = (5, 10, 50),
    reference: ArrayLike | None = None,
    labelled: ArrayLike | None = None,
) -> dict[str, float]:
    """Compute the mean IoU over the dataset, by image, by class and of the worst images.

    D adds I and U over the images before it divides, and averages over the classes; large structures dominate it. I
    averages over the classes of an image, then over the images. C averages over the images of a class, then over the
    classes. The worst-case scores average over the lowest q % of the images only, and over at least one: by their mean
    (I), or by their score for each class (C). Source: Wang et al., NeurIPS Datasets and Benchmarks 2023,
    https://arxiv.org/abs/2310.19252

    Which pairs of image and class count in I and C is decided by `active`. Without it, a pair counts if the class is in
    the reference, as in the paper. Without `reference` either, a pair counts if U > 0, so that a false positive on an
    image without the class scores 0.

    Args:
        intersection: I, (N, C), numbers of voxels in both maps.
        union: U, (N, C), numbers of voxels in either map.
        active: which pairs of image and class count in I and C, (N, C) bool; a pair with U = 0 never does.
        worst: the percentages q.
        reference: T, (N, C), numbers of voxels in the reference.
        labelled: which pairs were annotated, (N, C) bool; the others are left out of all scores, including D.

    Returns:
        "iou_d", "iou_i", "iou_c", "iou_iq", "iou_cq" and, for each q, "iou_i_worst_q" and "iou_c_worst_q"; NaN if
        nothing counts, or if a count that is used is NaN.

    Raises:
        TypeError: the counts, or a percentage, are not numbers.
        ValueError: the shapes differ or are not (N, C), I exceeds U, a count is negative, or a percentage is outside
            (0, 100].

    Example:
        >>> means = fine_grained_iou(torch.tensor([[9], [0]]), torch.tensor([[10], [1]]), worst=(50,))
        >>> list(means)
        ['iou_d', 'iou_i', 'iou_c', 'iou_iq', 'iou_cq', 'iou_i_worst_50', 'iou_c_worst_50']
        >>> [round(value, 3) for value in means.values()]
        [0.818, 0.45, 0.45, 0.045, 0.045, 0.0, 0.0]
    """
    worst = [checks.check_number("worst", q) for q in checks.check_list("worst", worst, _REMEDY)]
    intersection, union = as_counts(intersection, "intersection"), as_counts(union, "union")
    true = None if reference is None else as_counts(reference, "reference")
    chosen = None if active is None else _as_tensor(active, "active") != 0
    known = torch.ones_like(union, dtype=torch.bool) if labelled is None else _as_tensor(labelled, "labelled") != 0
    _check(intersection, union, worst, active=chosen, reference=true, labelled=known)
    present = union != 0 if true is None else true != 0
    counted = (present if chosen is None else chosen) & known & (union != 0)
    values = scores.ratio(intersection, union, empty=math.nan)
    pooled_union = torch.where(known, union, 0).sum(dim=0)
    pooled = scores.ratio(torch.where(known, intersection, 0).sum(dim=0), pooled_union, empty=math.nan)
    images = _mean(values, counted, dim=1)[counted.any(dim=1)]
    classes = [column[use] for column, use in zip(values.T, counted.T, strict=True) if use.any()]
    result = {
        "iou_d": _plain_mean(pooled[pooled_union != 0]),
        "iou_i": _plain_mean(images),
        "iou_c": _plain_mean(_worst_of_classes(classes, 100)),
        "iou_iq": _plain_mean(_on_cpu([_worst_mean(images, q) for q in _QUANTILES])),
        "iou_cq": _plain_mean(torch.stack([_worst_of_classes(classes, q) for q in _QUANTILES])),
    }
    for q in worst:
        result[f"iou_i_worst_{q:g}"] = _worst_mean(images, q)
        result[f"iou_c_worst_{q:g}"] = _plain_mean(_worst_of_classes(classes, q))
    return result


def _mean(values: torch.Tensor, counted: torch.Tensor, dim: int) -> torch.Tensor:
    """Mean of the values that count; unlike nanmean it does not pass over a NaN that does."""
    return scores.ratio(torch.where(counted, values, 0).sum(dim=dim), counted.sum(dim=dim), empty=math.nan)


def _plain_mean(values: torch.Tensor) -> float:
    return float(values.to(total_dtype(values)).mean()) if values.numel() else math.nan


def _worst_of_classes(classes: Sequence[torch.Tensor], percent: float) -> torch.Tensor:
    return _on_cpu([_worst_mean(column, percent) for column in classes])


def _on_cpu(means: list[float]) -> torch.Tensor:
    """Return means as float64, whatever torch's default device is: MPS has no float64."""
    return torch.tensor(means, dtype=torch.float64, device="cpu")


def _worst_mean(values: torch.Tensor, percent: float) -> float:
    """Mean of the lowest `percent` % of the values, at least of one; NaN without any, or with a NaN among all."""
    if not len(values) or bool(values.isnan().any()):
        return math.nan
    number = int(round(percent * len(values) / 100, 6))  # 70 / 100 * 90 is below 63 by a rounding error
    return float(values.sort().values[: max(1, number)].mean())


def _check(
    intersection: torch.Tensor, union: torch.Tensor, worst: Sequence[float], **others: torch.Tensor | None
) -> None:
    named = {"union": union, **{name: other for name, other in others.items() if other is not None}}
    for name, other in named.items():
        if intersection.ndim != 2 or intersection.shape != other.shape:
            message = (
                f"Expected `intersection` and `{name}` to have the same shape (N, C), but got "
                f"{tuple(intersection.shape)} and {tuple(other.shape)}: give a row per image and a column per class."
            )
            raise ValueError(message)
    if not all(0 < q <= 100 for q in worst):
        message = f"Expected `worst` to hold percentages above 0 and up to 100, but got {tuple(worst)}: {_REMEDY}."
        raise ValueError(message)
    check_counts(intersection, union, "union")


def _as_tensor(values: Any, name: str) -> torch.Tensor:
    try:
        return as_plain_tensor(values if isinstance(values, torch.Tensor) else np.asarray(values), name)
    except (TypeError, ValueError) as error:
        message = (
            f"Expected `{name}` to hold numbers, but got {getattr(values, 'dtype', type(values).__name__)}: pass a "
            "tensor, an array or a list of numbers."
        )
        raise TypeError(message) from error


def as_counts(values: Any, name: str) -> torch.Tensor:
    """Return counts as a plain tensor; integers as int64, which holds their sums. Raise TypeError for no numbers."""
    if isinstance(values, torch.Tensor) and values.is_floating_point():  # soft counts keep their gradient
        return values.as_subclass(torch.Tensor)
    counts = _as_tensor(values, name)
    return counts if counts.is_floating_point() else counts.long()


def check_counts(intersection: torch.Tensor, limit: torch.Tensor, name: str) -> None:
    """Raise ValueError if an intersection is negative or larger than its limit; NaN is accepted."""
    wrong = (intersection > limit * (1 + _ROUNDING)) | (intersection < 0)
    if bool(wrong.any()):
        message = (
            f"Expected `intersection` to be at least 0 and at most `{name}`, but got {intersection[wrong][0].item():g} "
            f"beside {limit[wrong][0].item():g}: count both over the same voxels."
        )
        raise ValueError(message)
