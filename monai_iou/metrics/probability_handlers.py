"""Ignite handlers for the metrics of probabilities; `monai_iou.handlers` has them beside those of label maps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

from monai.utils.enums import MetricReduction

from monai_iou.metrics.calibration import CalibrationMetric, ReliabilityDiagram
from monai_iou.metrics.handler_base import MetricHandler, identity
from monai_iou.metrics.iou import IgnoreEmpty
from monai_iou.metrics.probability import Activation
from monai_iou.metrics.threshold import ThresholdCurves, ThresholdIoUMetric

__all__ = ["CalibrationHandler", "ThresholdIoUHandler"]


class ThresholdIoUHandler(MetricHandler):
    """Compute `ThresholdIoUMetric` during an evaluation; see there for the definitions.

    The predictions are probabilities (B, C, *S), or a list of (C, *S), from before the argmax. After an evaluation,
    `curves` has IoU and Dice at every threshold, the best threshold and the average precision of each class over all
    images; it is None before the first one.

    Args:
        include_background: whether class 0 is scored; None leaves it out if it is a background.
        reduction: name of one of MONAI's `MetricReduction`, for the value in `engine.state.metrics`.
        output_transform: converts the engine's output to `(y_pred, y)`.
        save_details: whether the scores, one row per image and one column per class, are stored in
            `engine.state.metric_details`, from which `MetricsSaver` writes them.
        score: "average_precision" (default) of each image and class, or "iou" at `threshold`.
        threshold, ignore_empty, ignore_index, activation, resolution: see the metric.
        undefined: value in `engine.state.metrics` in place of NaN, a mean over nothing; the details keep NaN.

    Raises:
        ValueError: if an argument is out of range.
        TypeError: if `undefined` is not a number.

    Example:
        >>> import torch
        >>> from ignite.engine import Engine
        >>> engine = Engine(lambda engine, batch: batch)
        >>> handler = ThresholdIoUHandler(resolution=10)
        >>> handler.attach(engine, "average_precision")
        >>> batch = torch.tensor([[[0.9, 0.4, 0.3, 0.1]]]), torch.tensor([[[1, 1, 0, 0]]])
        >>> engine.run([batch]).metrics["average_precision"], handler.curves.best_threshold
        (1.0, tensor([0.4000]))
    """

    def __init__(
        self,
        include_background: bool | None = None,
        reduction: MetricReduction | str = MetricReduction.MEAN,
        output_transform: Callable[[Any], Any] = identity,
        save_details: bool = True,
        *,
        score: Literal["average_precision", "iou"] = "average_precision",
        threshold: float = 0.5,
        ignore_empty: IgnoreEmpty = "both",
        ignore_index: int | None = None,
        activation: Activation = None,
        resolution: int = 200,
        undefined: float = math.nan,
    ) -> None:
        self.metric = ThresholdIoUMetric(
            include_background=include_background,
            reduction=reduction,
            threshold=threshold,
            ignore_empty=ignore_empty,
            ignore_index=ignore_index,
            activation=activation,
            resolution=resolution,
            score=score,
        )
        self.curves: ThresholdCurves | None = None
        super().__init__(self.metric, output_transform, save_details, undefined)

    def compute(self) -> Any:
        """Return the value for `engine.state.metrics`, and keep the curves; every rank must call it."""
        value = super().compute()  # first, as it asks all ranks for new images
        self.curves = None if self.metric.get_rows() is None else self.metric.curves()
        return value


class CalibrationHandler(MetricHandler):
    """Compute `CalibrationMetric` during an evaluation; see there for the definitions.

    The predictions are probabilities (B, C, *S), or a list of (C, *S), from before the argmax. After an evaluation,
    `diagram` is the reliability diagram of each class over all images, and `errors` holds a dict for each class, its
    "ece", "ace" and "mce"; they are None and empty before the first one.

    Args:
        include_background, reduction, output_transform, save_details, undefined: see :class:`ThresholdIoUHandler`.
        num_bins: number of bins of equal width between the probabilities 0 and 1.
        kind: "expected" (ECE, the default), "average" (ACE) or "maximum" (MCE), of each image and class.
        ignore_index: reference label whose voxels are ignored.
        activation: None for probabilities, "softmax" or "sigmoid" for logits.

    Raises:
        ValueError: if an argument is out of range.
        TypeError: if `undefined` is not a number.

    Example:
        >>> import torch
        >>> from ignite.engine import Engine
        >>> engine = Engine(lambda engine, batch: batch)
        >>> handler = CalibrationHandler(num_bins=2)
        >>> handler.attach(engine, "ece")
        >>> batch = torch.tensor([[[0.9, 0.9, 0.1, 0.1]]]), torch.tensor([[[1, 0, 0, 0]]])
        >>> round(engine.run([batch]).metrics["ece"], 4), handler.diagram.frequency
        (0.25, tensor([[0.0000, 0.5000]]))
    """

    worst = 1.0

    def __init__(
        self,
        include_background: bool | None = None,
        reduction: MetricReduction | str = MetricReduction.MEAN,
        output_transform: Callable[[Any], Any] = identity,
        save_details: bool = True,
        *,
        num_bins: int = 20,
        kind: Literal["expected", "average", "maximum"] = "expected",
        ignore_index: int | None = None,
        activation: Activation = None,
        undefined: float = math.nan,
    ) -> None:
        self.metric = CalibrationMetric(
            include_background=include_background,
            reduction=reduction,
            num_bins=num_bins,
            kind=kind,
            ignore_index=ignore_index,
            activation=activation,
        )
        self.diagram: ReliabilityDiagram | None = None
        self.errors: list[dict[str, float]] = []
        super().__init__(self.metric, output_transform, save_details, undefined)

    def compute(self) -> Any:
        """Return the value for `engine.state.metrics`, and keep diagram and errors; every rank must call it."""
        value = super().compute()  # first, as it asks all ranks for new images
        is_empty = self.metric.get_rows() is None
        self.diagram = None if is_empty else self.metric.reliability()
        self.errors = [] if is_empty else self.metric.summary()
        return value
