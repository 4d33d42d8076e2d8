"""Base of the metrics of probabilities: each image is read into histograms, which form one row of statistics."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from monai.utils.enums import MetricReduction

from monai_iou.checks import ACTIVATIONS, check_choice
from monai_iou.metrics.base import RowMetric, known_rows, stacked_rows
from monai_iou.metrics.inputs import (
    ImagePair,
    check_binary,
    check_labels,
    rounded,
    split_images,
)
from monai_iou.metrics.partly_labelled import annotated, labelled_rows
from monai_iou.voxels.labels import valid_voxels
from monai_iou.voxels.probability_bins import check_resolution, probability_histograms

__all__ = ["Activation", "ProbabilityMetric"]

Activation: TypeAlias = Literal["softmax", "sigmoid"] | None

# By which probabilities of a half-precision softmax may leave [0, 1].
_ROUNDING = 1e-3


class ProbabilityMetric(RowMetric):
    """Base of the metrics of probabilities: a subclass implements `_row_of_histogram` and `_scores`.

    Args:
        include_background: whether class 0 is scored; None leaves it out if it is a background.
        reduction: name of one of MONAI's `MetricReduction`, used by `aggregate`.
        get_not_nans: whether `aggregate` also returns the number of scores from which the result was computed.
        return_with_label: with reduction "mean_batch", return a dict by label.
        ignore_index: reference label whose voxels are ignored.
        activation: None for probabilities, "softmax" or "sigmoid" for logits.
        resolution: M, even; probabilities are rounded to the nearest k / M.
    """

    def __init__(
        self,
        include_background: bool | None,
        reduction: MetricReduction | str,
        get_not_nans: bool,
        return_with_label: bool | Sequence[str],
        ignore_index: int | None,
        activation: Activation,
        resolution: int,
    ) -> None:
        super().__init__(include_background, reduction, get_not_nans, None, return_with_label, ignore_index)
        check_choice("activation", activation, ACTIVATIONS)
        self.activation = activation
        if activation == "softmax" and include_background is None:
            self._first_scored = 1  # a softmax shares out the voxels, whatever was annotated
        self.resolution = check_resolution(resolution)

    @abstractmethod
    def _row_of_histogram(self, counts: torch.Tensor) -> torch.Tensor:
        """Return the statistics (C, K) computed from the counts (C, 2, M + 1) of one image."""

    def __call__(
        self,
        y_pred: torch.Tensor | Sequence[torch.Tensor],
        y: torch.Tensor | Sequence[torch.Tensor] | None = None,
        labelled: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Score a batch and keep its statistics.

        Args:
            y_pred: probabilities, or logits if `activation` is set, (B, C, *S) with 1 to 3 spatial dimensions, or a
                list of (C, *S). A single channel is the probability of a single class.
            y: the reference: label maps (B, 1, *S), per-class maps (B, C, *S), or a list without the batch dimension.
                In per-class maps, a class that is NaN throughout was not annotated.
            labelled: (B, C) bool, which classes were annotated in each image; None means all.
            kwargs: no further keywords are accepted.

        Returns:
            Scores (B, C), NaN where an image has no score for a class.

        Raises:
            TypeError: an input is neither a tensor nor a list of tensors, or an unknown keyword is given.
            ValueError: the shapes differ, or values are NaN, not labels or not probabilities.
        """
        if kwargs:
            message = (
                f"Expected no further keywords, but got {sorted(kwargs)}: give the metric's options to its constructor."
            )
            raise TypeError(message)
        predictions, references = split_images(y_pred, "y_pred"), split_images(y, "y")
        if len(predictions) != len(references) or not predictions:
            message = (
                f"Expected `y_pred` and `y` to hold the same number of images, at least one, but got "
                f"{len(predictions)} and {len(references)}: pass each prediction with its reference."
            )
            raise ValueError(message)
        known = labelled_rows(labelled, len(references))
        pairs = [self._pair(p, r, row) for p, r, row in zip(predictions, references, known, strict=True)]
        first = self._first_class(pairs)
        batch = stacked_rows([known_rows(self._row(pair, first), pair, first) for pair in pairs])
        self.extend(batch)
        return self._scores(batch)

    def add_histograms(self, counts: torch.Tensor) -> None:
        """Keep images that were counted elsewhere, by `probability_histograms` on other machines for instance.

        With `include_background=None` they do not tell whether their first class is a background, as images do, so that
        `return_with_label` has to name the classes.

        Args:
            counts: numbers of voxels outside and inside each class that is scored, (B, C, 2, `resolution` + 1). Without
                an image, B = 0, nothing is kept.

        Raises:
            ValueError: the shape is another one.
        """
        if counts.ndim != 4 or counts.shape[2:] != (2, self.resolution + 1):
            message = (
                f"Expected `counts` to have shape (B, C, 2, {self.resolution + 1}), but got {tuple(counts.shape)}: "
                f"count at the resolution of the metric, {self.resolution}."
            )
            raise ValueError(message)
        if len(counts):  # a machine may have had no image to count
            self.extend(torch.stack([self._row_of_histogram(image) for image in counts]))

    def _first_class(self, pairs: list[ImagePair]) -> int:
        if self.activation == "softmax" and self.include_background is None and pairs[0].num_classes > 1:
            return 1
        return super()._first_class(pairs)

    def _pair(self, prediction: torch.Tensor, reference: torch.Tensor, labelled: torch.Tensor | None) -> ImagePair:
        classes = len(prediction)
        if prediction.shape[1:] != reference.shape[1:] or len(reference) not in (1, classes):
            message = (
                f"Expected `y` to be a label map or per-class maps for `y_pred` {tuple(prediction.shape)}, but got "
                f"{tuple(reference.shape)}: put them on one grid, with one or {classes} channels."
            )
            raise ValueError(message)
        _check_floats(prediction)
        given = rounded(reference.to(prediction.device))
        reference, labelled = annotated(given, classes, labelled, self.ignore_index)
        kept = valid_voxels(reference[None], self.ignore_index)
        valid = None if kept is None else kept[0, 0]
        if self.activation is None:
            _check_probabilities(prediction, valid)
        if len(reference) == classes:
            check_binary(reference, valid, "y", given=classes)
        else:
            check_labels(reference[0], classes, valid, "y")
        return ImagePair(prediction, reference, classes, valid, labelled, None if labelled is None else given)

    def _row(self, pair: ImagePair, first_class: int) -> torch.Tensor:
        histograms = probability_histograms(
            pair.prediction[None],
            pair.reference[None],
            activation=self.activation,
            resolution=self.resolution,
            ignore_index=self.ignore_index,
        )
        if bool((histograms.undefined > 0).any()):
            message = (
                f"Expected `y_pred` to hold numbers, but got NaN in {int(histograms.undefined.max())} voxels: find out "
                "where it comes from, NaN is no probability."
            )
            raise ValueError(message)
        return self._row_of_histogram(histograms.counts[0, first_class:])


def _check_floats(image: torch.Tensor) -> None:
    if not image.is_floating_point():
        message = (
            f"Expected `y_pred` to hold probabilities, but got {image.dtype}: pass the output of the network "
            "before the argmax or the threshold."
        )
        raise TypeError(message)


def _check_probabilities(image: torch.Tensor, valid: torch.Tensor | None) -> None:
    if not image.numel():
        return
    low, high = (value.item() for value in (image if valid is None else torch.where(valid, image, 0)).aminmax())
    if low < -_ROUNDING or high > 1 + _ROUNDING:
        message = (
            f"Expected `y_pred` to hold probabilities between 0 and 1, but got {low if low < -_ROUNDING else high:.6g}"
            ': for logits set activation="softmax" or "sigmoid".'
        )
        raise ValueError(message)
