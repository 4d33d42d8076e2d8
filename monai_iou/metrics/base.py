"""Averages that skip NaN, and the base class of this package's metrics, which gathers its rows from every rank.

MONAI's `do_metric_reduction` writes zeros into its input and turns an average over nothing into 0. The function here
does neither.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from monai.metrics.metric import CumulativeIterationMetric
from monai.utils.enums import MetricReduction

from monai_iou.checks import check_choice, check_count, check_ignore_index
from monai_iou.metrics.gathering import gather_rows, is_true_for_any, known_to_any
from monai_iou.metrics.inputs import ImagePair, image_spacings, pair_images
from monai_iou.tables import counted
from monai_iou.voxels.inputs import total_dtype

__all__ = ["PerClassMetric", "RowMetric", "known_rows", "reduce_scores", "row_device", "stacked_rows"]


def _checked_reduction(reduction: MetricReduction | str) -> MetricReduction:
    """Return one of MONAI's reductions, given as one or by its name; MONAI's own look-up answers in other words."""
    check_choice("reduction", str(getattr(reduction, "value", reduction)), [each.value for each in MetricReduction])
    return MetricReduction(reduction)


def reduce_scores(
    scores: torch.Tensor, reduction: MetricReduction | str = MetricReduction.MEAN
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reduce scores (N, C) in the orders of MONAI's `MetricReduction`, without the NaN among them.

    "mean" averages over the classes of an image, then over the images, (1,); "mean_batch" averages over the images
    only, (C,), and "mean_channel" over the classes only, (N,). The "sum" forms add instead. An average over nothing is
    NaN, and a sum over nothing is 0. The input is not changed.

    Args:
        scores: (N, C), NaN where an image has no score for a class.
        reduction: "none", "mean", "sum", "mean_batch", "sum_batch", "mean_channel" or "sum_channel".

    Returns:
        The reduced scores, and the number of values from which each was computed.

    Raises:
        ValueError: `reduction` is not one of the above.

    Example:
        >>> scores = torch.tensor([[0.5, float("nan")], [0.7, float("nan")]])
        >>> reduce_scores(scores, "mean_batch")
        (tensor([0.6000,    nan]), tensor([2., 0.]))
    """
    chosen = _checked_reduction(reduction)
    valid = ~torch.isnan(scores)
    if chosen == MetricReduction.NONE:
        return scores.clone(), valid.float()
    if chosen == MetricReduction.MEAN:
        image_scores = scores.nanmean(dim=1)
        # MONAI gives this one, and no other, the shape (1,)
        return image_scores.nanmean().reshape(1), (~torch.isnan(image_scores)).sum().float()
    dim = {"batch": [0], "channel": [1]}.get(chosen.value.rpartition("_")[2], [0, 1])
    count = valid.sum(dim=dim).float()
    if chosen.value.startswith("mean"):
        return scores.nanmean(dim=dim), count
    return scores.nansum(dim=dim), count


def row_device(images: torch.Tensor) -> torch.device:
    """Return where statistics of images are kept in float64: beside them, or on the CPU where a GPU has none (MPS)."""
    return images.device if total_dtype(images) == torch.float64 else torch.device("cpu")


def known_rows(row: torch.Tensor, pair: ImagePair, first_class: int) -> torch.Tensor:
    """Return the statistics of an image, with NaN for the classes that were not annotated in it."""
    if pair.labelled is None:
        return row
    return row.masked_fill(~pair.labelled[first_class:, None].to(row.device), math.nan)


def stacked_rows(rows: list[torch.Tensor]) -> torch.Tensor:
    """Return the rows of images as (B, C, K); raise ValueError if their numbers of classes differ."""
    if len({row.shape for row in rows}) > 1:
        message = (
            f"Expected every image to have the same classes, but got {sorted({len(row) for row in rows})} of them: set "
            "`include_background` and `num_classes`, or use one metric for each kind of image."
        )
        raise ValueError(message)
    return torch.stack(rows)


class RowMetric(CumulativeIterationMetric):
    """Base of the metrics that give one score for every image and class.

    The metric keeps and gathers the statistics of the images (rows) instead of their scores, so that other scores can
    be computed from them later. A subclass implements `_scores`, which computes scores from rows, and its own call,
    which adds rows.

    Args:
        include_background: whether class 0 is scored; a single map has no background to leave out. None leaves class 0
            out if it is a background; see `ImagePair.has_background`.
        reduction: name of one of MONAI's `MetricReduction`, used by `aggregate`.
        get_not_nans: whether `aggregate` also returns the number of scores from which the result was computed.
        num_classes: number of classes of label maps, including the background.
        return_with_label: with reduction "mean_batch", return a dict by "label_0", "label_1", ... or by the names
            given.
        ignore_index: reference label whose voxels are ignored.
    """

    def __init__(
        self,
        include_background: bool | None,
        reduction: MetricReduction | str,
        get_not_nans: bool,
        num_classes: int | None,
        return_with_label: bool | Sequence[str],
        ignore_index: int | None,
    ) -> None:
        super().__init__()
        if num_classes is not None:
            num_classes = check_count("num_classes", num_classes, "count the background too, or leave it out")
        self.include_background = include_background
        self.reduction = _checked_reduction(reduction)
        self.get_not_nans = get_not_nans
        self.num_classes = num_classes
        self.return_with_label = return_with_label
        # Of the scores, for their names: None until an image tells whether class 0 is a background.
        self._first_scored: int | None = None if include_background is None else int(not include_background)
        self.ignore_index = check_ignore_index(ignore_index)

    @abstractmethod
    def _scores(self, rows: torch.Tensor) -> torch.Tensor:
        """Return scores (N, C) computed from rows (N, C, K)."""

    def _first_class(self, pairs: list[ImagePair]) -> int:
        background = self.include_background
        if pairs[0].num_classes == 1:
            self._first_scored = 1 if background is None else self._first_scored  # "label_1", as of a label map
            return 0
        if background is None:
            telling = [pair for pair in pairs if pair.tells_background]
            if telling or self._first_scored is None or not any(self._buffers or []):  # else as in the images before
                self._first_scored = int(all(pair.has_background for pair in telling or pairs))
            return self._first_scored
        return 0 if background else 1

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        message = "Expected a call of the metric itself, but got one of its parts: call it with a batch or a list."
        raise NotImplementedError(message)

    def _sync(self, *, ask: bool = False) -> None:
        # Asked, a rank without new images answers as well: others may have some, and would wait for it. Who reads again
        # what has been collected may be alone, and asks nobody.
        if not is_true_for_any(not self._synced) if ask else self._synced:
            return
        rows = [row for buffer in self._buffers or [] for row in buffer]
        own = error = None
        try:
            own = stacked_rows(rows) if rows else None
        except ValueError as unlike:
            error = str(unlike)
        gathered = gather_rows(own, error=error)
        if self.include_background is None:  # on a rank without images, those of others tell
            known = known_to_any(self._first_scored if rows else None)
            self._first_scored = self._first_scored if known is None else known
        self._synced_tensors = None if gathered is None else [gathered]
        self._synced = True

    def get_rows(self) -> torch.Tensor | None:
        """Return the statistics of all images of all ranks, (N, C, K), or None; every rank must call it."""
        self._sync()
        return None if self._synced_tensors is None else self._synced_tensors[0]

    def _all_rows(self) -> torch.Tensor:
        rows = self.get_rows()
        if rows is None:
            message = "Expected at least one image before the summary is read, but got none: call the metric first."
            raise ValueError(message)
        return rows

    def get_buffer(self) -> torch.Tensor:
        """Return the scores of all images of all ranks, (N, C); every rank must call it."""
        rows = self.get_rows()
        if rows is None:
            if self.num_classes is None:
                return torch.zeros((0, len(self._named) or 1), device="cpu")
            first = 0 if self.include_background or self.num_classes == 1 else 1  # as of label maps
            return torch.zeros((0, self.num_classes - first), device="cpu")
        return self._scores(rows)

    def aggregate(self, reduction: MetricReduction | str | None = None) -> Any:
        """Reduce the scores of all images of all ranks; every rank must call it.

        Args:
            reduction: name of one of MONAI's `MetricReduction`; None takes that of the constructor.

        Returns:
            The reduced scores (an average over nothing is NaN); with `return_with_label` and "mean_batch", a dict by
            label; with `get_not_nans`, a tuple of the result and the number of scores from which it was computed.
        """
        chosen = _checked_reduction(reduction or self.reduction)
        self._sync(ask=True)
        value, not_nans = reduce_scores(self.get_buffer(), chosen)
        result: Any = value
        if self.return_with_label and chosen == MetricReduction.MEAN_BATCH:
            result = dict(zip(self._label_names(len(value)), value.tolist(), strict=True))
        return (result, not_nans) if self.get_not_nans else result

    @property
    def _named(self) -> list[str]:
        """The names of classes that the user gave."""
        return [] if isinstance(self.return_with_label, bool) else [str(name) for name in self.return_with_label]

    def _label_names(self, columns: int) -> list[str]:
        if self.return_with_label is True:
            return [f"label_{i + self._number_of_first(columns)}" for i in range(columns)]
        names = self._named
        if len(names) != columns:
            message = (
                f"Expected `return_with_label` to name {counted(columns, 'class', 'classes')}, but got "
                f"{counted(len(names), 'name')}, {names}: name those that are scored."
            )
            raise ValueError(message)
        return names

    def _number_of_first(self, columns: int) -> int:
        """Return the class of the first score."""
        if self._first_scored is None and columns > 1 and self._synced_tensors:
            message = (
                "Expected `include_background` to be True or False for the names of histograms that were counted "
                "elsewhere, but got None: say whether the first of them is that of class 0, or name the classes."
            )
            raise ValueError(message)
        return 1 if self._first_scored is None else self._first_scored


class PerClassMetric(RowMetric):
    """Base of the metrics of hard segmentations: a subclass implements `_image_row` and `_scores`."""

    spacing: Any = None  # what `spacing` is in a call without it
    _has_distances = True  # whether the voxel size matters, so that images without a known one are refused

    @abstractmethod
    def _image_row(self, pair: ImagePair, spacing: tuple[float, ...], first_class: int) -> torch.Tensor:
        """Return the statistics of one image for the classes from `first_class` on, (C, K)."""

    def __call__(
        self,
        y_pred: torch.Tensor | Sequence[torch.Tensor],
        y: torch.Tensor | Sequence[torch.Tensor] | None = None,
        spacing: Any = None,
        labelled: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Score a batch and keep its statistics.

        Args:
            y_pred: hard predictions: label maps (B, 1, *S), per-class maps of 0 and 1 (B, C, *S), or a list of such
                tensors without the batch dimension. S has 1 to 3 dimensions.
            y: the reference, in either form. In per-class maps, a class that is NaN throughout was not annotated.
            spacing: voxel size in mm: a number, one number per axis, or a list of these, one for each image of the
                batch; stack several tensors to (B, d), because torch's collate makes one per axis. None takes that of
                the constructor, or else of `y` or `y_pred` if they are MetaTensors, or else 1 mm. Scores without
                distances ignore it.
            labelled: (B, C) bool, which classes were annotated in each image, including the background; None means all.
                The score of a class that was not annotated is NaN and is left out of every average and sum.
            kwargs: no further keywords are accepted.

        Returns:
            Scores (B, C), NaN where an image has no score for a class.

        Raises:
            TypeError: an input is neither a tensor nor a list of tensors, or an unknown keyword is given.
            ValueError: the shapes differ, or values are not hard labels.
        """
        if kwargs:
            message = (
                f"Expected no further keywords, but got {sorted(kwargs)}: give the metric's options to its constructor."
            )
            raise TypeError(message)
        pairs = pair_images(y_pred, y, self.num_classes, self.ignore_index, labelled)
        spacing = self.spacing if spacing is None else spacing
        sized, reference = (y_pred, y) if self._has_distances else (None, None)
        spacings = image_spacings(sized, reference, spacing, len(pairs), pairs[0].spatial_dims if pairs else 3)
        first = self._first_class(pairs)
        rows = [known_rows(self._image_row(p, s, first), p, first) for p, s in zip(pairs, spacings, strict=True)]
        batch = stacked_rows(rows)
        self.extend(batch)
        return self._scores(batch)
