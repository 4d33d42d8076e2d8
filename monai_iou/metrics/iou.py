"""IoU (Jaccard index) of hard segmentations, computed from voxel counts.

    IoU_c = I_c / (P_c + T_c - I_c)

where I_c, P_c and T_c are the numbers of voxels of class c in both maps, in the prediction and in the reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from monai.utils.enums import MetricReduction

from monai_iou import scores
from monai_iou.checks import check_choice, check_count, check_ignore_empty, check_ignore_index
from monai_iou.metrics.base import PerClassMetric, row_device
from monai_iou.metrics.fine_grained import as_counts, check_counts, fine_grained_iou
from monai_iou.metrics.inputs import ArrayLike, ImagePair, as_plain_tensor, pair_images

__all__ = ["ClassCounts", "IgnoreEmpty", "IoUMetric", "iou_counts", "iou_from_counts"]

IgnoreEmpty: TypeAlias = bool | Literal["both"]

# Voxels counted at a time: they stay in the cache, are all that counting allocates, and wake no threads.
_CHUNK = 1 << 15
# A class table beyond this size would leave the cache; three histograms are faster then.
_MAX_TABLE = 1 << 16


class ClassCounts(NamedTuple):
    """Numbers of voxels of each class, int64, (..., C): in both maps, in the prediction, and in the reference."""

    intersection: torch.Tensor
    prediction: torch.Tensor
    reference: torch.Tensor

    @property
    def union(self) -> torch.Tensor:
        """Number of voxels in either map, P + T - I."""
        return scores.union(self.intersection, self.prediction, self.reference)


def iou_counts(
    prediction: ArrayLike, reference: ArrayLike, num_classes: int, ignore_index: int | None = None
) -> ClassCounts:
    """Count the voxels of every class in two label maps, in one pass and without a one-hot copy.

    Args:
        prediction: label map with 1 to 3 dimensions, of an integer, bool or floating-point type with whole values.
        reference: label map of the same shape.
        num_classes: number of classes, including the background.
        ignore_index: voxels with this reference label are ignored; it need not be a class.

    Returns:
        Counts of shape (num_classes,).

    Raises:
        TypeError: an input is neither an array nor a tensor, or a number is no integer.
        ValueError: the shapes differ, or a value is not a class number.

    Example:
        >>> counts = iou_counts(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, 2]), num_classes=3)
        >>> counts.intersection, counts.union
        (tensor([1, 1, 1]), tensor([1, 2, 2]))
    """
    num_classes = check_count("num_classes", num_classes, "count the background too")
    names = ("prediction", "reference")
    maps = [as_plain_tensor(image, name) for image, name in zip((prediction, reference), names, strict=True)]
    for image, name in zip(maps, names, strict=True):
        if not 1 <= image.ndim <= 3:
            remedy = "pass it without batch and channel" if image.ndim else "pass one value per voxel"
            message = (
                f"Expected `{name}` to be a label map with 1 to 3 dimensions, but got shape {tuple(image.shape)}: "
                f"{remedy}."
            )
            raise ValueError(message)
    predictions, references = ([image[None]] for image in maps)
    ignored = check_ignore_index(ignore_index)
    return _count(pair_images(predictions, references, num_classes, ignored, names=names)[0])


def iou_from_counts(
    intersection: ArrayLike,
    prediction: ArrayLike,
    reference: ArrayLike,
    ignore_empty: IgnoreEmpty = "both",
) -> torch.Tensor:
    """Return IoU = I / (P + T - I) for counts of any shape.

    Args:
        intersection: I, number of voxels in both maps.
        prediction: P, number of voxels in the prediction.
        reference: T, number of voxels in the reference.
        ignore_empty: the score of an absent class. "both": NaN where both maps are empty, and 0 for a false positive.
            True: NaN where the reference is empty, so that false positives have no effect (MONAI's default). False: 1
            where both maps are empty, and 0 for a false positive.

    Returns:
        Float32 scores of the shape of the counts; NaN where a count is NaN.

    Raises:
        TypeError: the counts are not numbers.
        ValueError: `ignore_empty` is not one of the three, or I exceeds P or T.

    Example:
        >>> iou_from_counts(torch.tensor([2, 0, 0]), torch.tensor([3, 4, 0]), torch.tensor([3, 0, 0]))
        tensor([0.5000, 0.0000,    nan])
    """
    check_ignore_empty(ignore_empty)
    intersection = as_counts(intersection, "intersection")
    prediction, reference = as_counts(prediction, "prediction"), as_counts(reference, "reference")
    check_counts(intersection, torch.minimum(prediction, reference), "prediction` and `reference")
    nothing = 1.0 if ignore_empty is False else math.nan
    iou = scores.iou(intersection, prediction, reference, empty=nothing)
    if ignore_empty is True:
        iou = iou.masked_fill(reference == 0, math.nan)
    return iou.float()


def _count(pair: ImagePair, first_class: int = 0) -> ClassCounts:
    if pair.both_label_maps:
        counts = _count_label_maps(pair.prediction[0], pair.reference[0], pair.num_classes, pair.valid)
        return ClassCounts(*(c[first_class:] for c in counts))
    rows = [
        torch.stack([(p & r).count_nonzero(), p.count_nonzero(), r.count_nonzero()]) for p, r in pair.masks(first_class)
    ]
    return ClassCounts(*torch.stack(rows, dim=1))


def _count_label_maps(
    prediction: torch.Tensor, reference: torch.Tensor, num_classes: int, valid: torch.Tensor | None
) -> ClassCounts:
    """Histogram of the pairs (reference, prediction), chunk by chunk; the valid voxels are known to hold classes."""
    C = num_classes
    flat_prediction, flat_reference = prediction.reshape(-1), reference.reshape(-1)
    flat_ignored = None if valid is None else ~valid.reshape(-1)
    totals = torch.zeros((3, C), dtype=torch.int64, device=prediction.device)
    # a GPU wants few large launches
    step = _CHUNK if prediction.device.type == "cpu" else _CHUNK * 512
    table = torch.zeros(C * C if C * C <= _MAX_TABLE else 0, dtype=torch.int64, device=prediction.device)
    for start in range(0, prediction.numel(), step):
        p, r = flat_prediction[start : start + step], flat_reference[start : start + step]
        p, r = p.to(torch.int32), r.to(torch.int32, copy=True)
        ignored = None if flat_ignored is None else flat_ignored[start : start + step]
        if len(table):
            pair = r.mul_(C).add_(p)
            if ignored is not None:
                pair.masked_fill_(ignored, C * C)  # one more cell, cut off below
            table += torch.bincount(pair, minlength=C * C + 1)[: C * C]
        else:
            p, r = (p, r) if ignored is None else (p[~ignored], r[~ignored])
            totals[0] += torch.bincount(p[p == r], minlength=C)
            totals[1] += torch.bincount(p, minlength=C)
            totals[2] += torch.bincount(r, minlength=C)
    if len(table):
        square = table.reshape(C, C)
        totals = torch.stack([square.diagonal(), square.sum(dim=0), square.sum(dim=1)])
    return ClassCounts(*totals)


def _three(rows: torch.Tensor) -> ClassCounts:
    """The counts of rows of shape (..., 3)."""
    return ClassCounts(rows[..., 0], rows[..., 1], rows[..., 2])


class IoUMetric(PerClassMetric):
    """IoU of every image and class, I / (P + T - I), computed without a one-hot copy.

    The metric is called with predictions and references, label maps (B, 1, *S) or per-class maps (B, C, *S), and
    returns scores (B, C). It keeps the counts of every image, from which `summary` computes the IoU over the dataset,
    by image, by class and of the worst images.

    Args:
        include_background: whether class 0 is scored; a single binary map has no background to leave out.
        reduction: "mean", "sum", "mean_batch", "sum_batch", "mean_channel", "sum_channel" or "none", as in MONAI, but
            an average over nothing is NaN instead of 0.
        get_not_nans: whether `aggregate` returns a tuple of the score and the number of scores that were averaged.
        ignore_empty: "both" (default): NaN where a class is in neither map, and 0 for a false positive. True: NaN where
            the reference is empty (MONAI's default). False: 1 where both maps are empty, and 0 for a false positive.
        num_classes: number of classes, including the background; required if both inputs are label maps. Without it, a
            single channel is one binary map of 0 and 1, such as a thresholded prediction (B, 1, *S). It is scored as
            one class, and any other value is refused.
        return_with_label: with "mean_batch", return a dict by "label_0", "label_1", ... or by the names given.
        ignore_index: reference label whose voxels are ignored. For per-class maps, it is the number of a class or, if
            there is no class of that number, it stands for the voxels that belong to no channel.

    Raises:
        TypeError: `num_classes` or `ignore_index` is not an integer.
        ValueError: an argument is not one of the above.

    Example:
        >>> metric = IoUMetric(include_background=False, num_classes=3, reduction="mean_batch")
        >>> metric(torch.tensor([[[0, 1, 1, 0]]]), torch.tensor([[[0, 1, 0, 0]]]))
        tensor([[0.5000,    nan]])
        >>> metric.aggregate()
        tensor([0.5000,    nan])
        >>> IoUMetric()(torch.tensor([[[0, 1, 1, 0]]]), torch.tensor([[[0, 1, 0, 0]]]))  # one binary map, one score
        tensor([[0.5000]])
    """

    _has_distances = False

    def __init__(
        self,
        include_background: bool = True,
        reduction: MetricReduction | str = MetricReduction.MEAN,
        get_not_nans: bool = False,
        ignore_empty: IgnoreEmpty = "both",
        num_classes: int | None = None,
        return_with_label: bool | Sequence[str] = False,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(include_background, reduction, get_not_nans, num_classes, return_with_label, ignore_index)
        check_ignore_empty(ignore_empty)
        self.ignore_empty = ignore_empty

    def _image_row(self, pair: ImagePair, spacing: tuple[float, ...], first_class: int) -> torch.Tensor:
        counts = torch.stack(_count(pair, first_class), dim=-1)
        return counts.to(row_device(counts)).double()

    def _scores(self, rows: torch.Tensor) -> torch.Tensor:
        return iou_from_counts(*_three(rows), self.ignore_empty)

    def get_counts(self) -> ClassCounts:
        """Return the voxel counts of all images of all ranks, (N, C) each; every rank must call it.

        Where a class was not annotated in an image, all three counts are 0.

        Raises:
            ValueError: no rank has scored an image yet.
        """
        return ClassCounts(*_three(self._all_rows().nan_to_num(nan=0.0).long()))

    def summary(
        self, worst: Sequence[float] = (5, 10, 50), present: Literal["reference", "either"] = "reference"
    ) -> dict[str, Any]:
        """Return `fine_grained_iou` of all images of all ranks, and "iou_d_per_class"; every rank must call it.

        Args:
            worst: percentages of the worst images.
            present: when a class counts in an image. "reference": if it is in the reference, as in the paper.
                "either": if it is in either map, so that a false positive on an image without the class scores 0.

        Raises:
            ValueError: no rank has scored an image yet, or an argument is not one of the above.
        """
        check_choice("present", present, ("reference", "either"))
        counts = self.get_counts()
        labelled = ~self._all_rows()[..., 0].isnan()
        shown = counts.reference if present == "reference" else counts.union
        pooled = iou_from_counts(*ClassCounts(*(c.sum(dim=0) for c in counts)))
        means = fine_grained_iou(counts.intersection, counts.union, active=shown > 0, worst=worst, labelled=labelled)
        return {**means, "iou_d_per_class": pooled.tolist()}
