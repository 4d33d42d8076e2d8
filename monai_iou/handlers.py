"""Ignite handlers: the metrics for MONAI's engines and `MetricsSaver`, and a schedule for the weights of a loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from monai.utils.enums import MetricReduction

from monai_iou.losses.weight_schedule import LossWeightSchedule
from monai_iou.metrics.boundary import BoundaryDistance
from monai_iou.metrics.boundary_metric import BoundaryIoUMetric
from monai_iou.metrics.handler_base import MetricHandler, identity
from monai_iou.metrics.iou import IgnoreEmpty, IoUMetric
from monai_iou.metrics.lesion_metric import LesionIoUMetric
from monai_iou.metrics.lesion_rules import Pairing
from monai_iou.metrics.probability_handlers import CalibrationHandler, ThresholdIoUHandler

__all__ = [
    "BoundaryIoUHandler",
    "CalibrationHandler",
    "DiceHandler",
    "IoUHandler",
    "LesionIoUHandler",
    "LossWeightSchedule",
    "ThresholdIoUHandler",
]


class IoUHandler(MetricHandler):
    """Compute `IoUMetric` during an evaluation; see there for the definitions.

    Args:
        include_background: whether class 0 is scored.
        reduction: name of one of MONAI's `MetricReduction`, for the value in `engine.state.metrics`.
        output_transform: converts the engine's output to `(y_pred, y)`, for example `from_engine(["pred", "label"])`.
        save_details: whether the scores, one row per image and one column per class, are stored in
            `engine.state.metric_details`, from which `MetricsSaver` writes them.
        ignore_empty: which absent classes are left out, "both", True or False; see the metric.
        num_classes: number of classes of label maps, including the background.
        ignore_index: reference label whose voxels are ignored.
        undefined: value in `engine.state.metrics` in place of NaN, a mean over nothing; the details keep NaN.

    Raises:
        ValueError: if an argument is out of range.
        TypeError: if `undefined` is not a number.

    Example:
        >>> import torch
        >>> from ignite.engine import Engine
        >>> engine = Engine(lambda engine, batch: batch)
        >>> IoUHandler(num_classes=2, include_background=False).attach(engine, "iou")
        >>> label = torch.tensor([[[0, 1, 1]]])
        >>> engine.run([(label, label)]).metrics["iou"]
        1.0
    """

    _metric_type: type[IoUMetric] = IoUMetric

    def __init__(
        self,
        include_background: bool = True,
        reduction: MetricReduction | str = MetricReduction.MEAN,
        output_transform: Callable[[Any], Any] = identity,
        save_details: bool = True,
        *,
        ignore_empty: IgnoreEmpty = "both",
        num_classes: int | None = None,
        ignore_index: int | None = None,
        undefined: float = math.nan,
    ) -> None:
        metric = self._metric_type(
            include_background=include_background,
            reduction=reduction,
            ignore_empty=ignore_empty,
            num_classes=num_classes,
            ignore_index=ignore_index,
        )
        super().__init__(metric, output_transform, save_details, undefined)


class _DiceOfIoU(IoUMetric):
    """`IoUMetric` with each score as Dice."""

    def _scores(self, rows: torch.Tensor) -> torch.Tensor:
        iou = super()._scores(rows)
        return 2 * iou / (1 + iou)


class DiceHandler(IoUHandler):
    """Dice, 2 I / (P + T), over the same cases and by the same rule for absent classes as `IoUHandler`.

    It is 2 IoU / (1 + IoU) of each image and class, averaged after that. MONAI's `MeanDice` leaves out images whose
    reference lacks the class; a false positive in them has no effect there, and is 0 here.

    Args:
        include_background: whether class 0 is scored.
        reduction: MONAI's `MetricReduction` name for the value in `engine.state.metrics`.
        output_transform: converts the engine's output to `(y_pred, y)`.
        save_details: whether the scores go to `engine.state.metric_details` for `MetricsSaver`.
        ignore_empty: "both", True or False, see `IoUMetric`.
        num_classes: number of classes of label maps, background included.
        ignore_index: reference label whose voxels are left out.
        undefined: value in `engine.state.metrics` in place of NaN, a mean over nothing.

    Raises:
        ValueError: if an argument is out of range.
        TypeError: if `undefined` is not a number.

    Example:
        >>> import torch
        >>> from ignite.engine import Engine
        >>> engine = Engine(lambda engine, batch: batch)
        >>> DiceHandler(num_classes=2, include_background=False).attach(engine, "dice")
        >>> batch = torch.tensor([[[0, 1, 1]]]), torch.tensor([[[0, 1, 0]]])
        >>> round(engine.run([batch]).metrics["dice"], 4)
        0.6667
    """

    _metric_type = _DiceOfIoU


class LesionIoUHandler(MetricHandler):
    """Compute `LesionIoUMetric` during an evaluation; see there for the definitions.

    Without `spacing`, the voxel size is read from the labels or the predictions if they are MetaTensors, and is 1 mm
    otherwise: a config whose transforms drop the metadata, as those of the bundle's training do, must give it.

    Args:
        include_background: whether class 0 is scored; None leaves it out if it is a background.
        reduction, output_transform, save_details, ignore_empty, num_classes, undefined: see :class:`IoUHandler`.
        score: the lesion score to report.
        threshold: smallest IoU at which two components can match, or "any".
        connectivity: 6, 18 or 26 neighbours in 3D, 4 or 8 in 2D; None takes the largest number.
        ignore_index: reference label whose voxels belong to no lesion.
        match: "any", "iou:0.5" or "overlap:0.25" instead of `threshold`.
        pairing: "one-to-one" or "many-to-one".
        strict: whether a pair must exceed the threshold instead of reaching it.
        min_volume_mm3: smaller components are left out.
        dilation: reference components that touch after this number of dilations count as one lesion.
        spacing: voxel size in mm of all images.

    Raises:
        ValueError: if an argument is out of range.
        TypeError: if `undefined` is not a number.

    Example:
        >>> import torch
        >>> from ignite.engine import Engine
        >>> engine = Engine(lambda engine, batch: batch)
        >>> LesionIoUHandler(num_classes=2, score="f1").attach(engine, "lesion_f1")
        >>> predicted, label = torch.tensor([[[[0, 1, 1, 0, 0]]]]), torch.tensor([[[[0, 1, 1, 0, 1]]]])
        >>> round(engine.run([(predicted, label)]).metrics["lesion_f1"], 3)
        0.667
    """

    def __init__(
        self,
        include_background: bool | None = None,
        reduction: MetricReduction | str = MetricReduction.MEAN,
        output_transform: Callable[[Any], Any] = identity,
        save_details: bool = True,
        *,
        score: str = "pq",
        threshold: float | Literal["any"] = 0.5,
        connectivity: int | None = None,
        ignore_empty: IgnoreEmpty = "both",
        num_classes: int | None = None,
        ignore_index: int | None = None,
        match: str | None = None,
        pairing: Pairing = "one-to-one",
        strict: bool = False,
        min_volume_mm3: float = 0.0,
        dilation: int = 0,
        spacing: Sequence[float] | float | None = None,
        undefined: float = math.nan,
    ) -> None:
        metric = LesionIoUMetric(
            include_background=include_background,
            reduction=reduction,
            score=score,
            threshold=threshold,
            connectivity=connectivity,
            ignore_empty=ignore_empty,
            num_classes=num_classes,
            ignore_index=ignore_index,
            match=match,
            pairing=pairing,
            strict=strict,
            min_volume_mm3=min_volume_mm3,
            dilation=dilation,
            spacing=spacing,
        )
        super().__init__(metric, output_transform, save_details, undefined)


class BoundaryIoUHandler(MetricHandler):
    """Compute `BoundaryIoUMetric` during an evaluation; see there for the definitions.

    Without `spacing`, the voxel size is read from the labels or the predictions if they are MetaTensors, and is 1 mm
    otherwise: a config whose transforms drop the metadata, as those of the bundle's training do, must give it.

    Args:
        include_background: whether class 0 is scored; None leaves it out if it is a background.
        reduction, output_transform, save_details, ignore_empty, num_classes, undefined: see :class:`IoUHandler`.
        width: thickness of the band in mm, or as a percentage of the diagonal of the image, such as "2%".
        distance: "euclidean" or "chessboard".
        ignore_index: reference label whose voxels belong to no band.
        spacing: voxel size in mm of all images.

    Raises:
        ValueError: if an argument is out of range.
        TypeError: if `undefined` is not a number.

    Example:
        >>> import torch
        >>> from ignite.engine import Engine
        >>> engine = Engine(lambda engine, batch: batch)
        >>> BoundaryIoUHandler(num_classes=2, width=1.0).attach(engine, "boundary_iou")
        >>> predicted, label = torch.tensor([[[0, 1, 1, 1, 1, 0, 0]]]), torch.tensor([[[0, 1, 1, 1, 1, 1, 0]]])
        >>> round(engine.run([(predicted, label)]).metrics["boundary_iou"], 4)
        0.3333
    """

    def __init__(
        self,
        include_background: bool | None = None,
        reduction: MetricReduction | str = MetricReduction.MEAN,
        output_transform: Callable[[Any], Any] = identity,
        save_details: bool = True,
        *,
        width: float | str = 2.0,
        distance: BoundaryDistance = "euclidean",
        ignore_empty: IgnoreEmpty = "both",
        num_classes: int | None = None,
        ignore_index: int | None = None,
        spacing: Sequence[float] | float | None = None,
        undefined: float = math.nan,
    ) -> None:
        metric = BoundaryIoUMetric(
            include_background=include_background,
            reduction=reduction,
            width=width,
            distance=distance,
            ignore_empty=ignore_empty,
            num_classes=num_classes,
            ignore_index=ignore_index,
            spacing=spacing,
        )
        super().__init__(metric, output_transform, save_details, undefined)
