"""Ignite handlers of the metrics, for the `key_metric` of MONAI's engines and for `MetricsSaver`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from monai.handlers.ignite_metric import IgniteMetricHandler
from monai.utils.enums import MetricReduction

from monai_iou.metrics.boundary import BoundaryDistance, BoundaryIoUMetric
from monai_iou.metrics.iou import IgnoreEmpty, IoUMetric
from monai_iou.metrics.lesion_metric import LesionIoUMetric

__all__ = ["BoundaryIoUHandler", "IoUHandler", "LesionIoUHandler"]


def _identity(output: Any) -> Any:
    return output


class IoUHandler(IgniteMetricHandler):
    """Run `IoUMetric` over an evaluation; see there for the arguments.

    Args:
        include_background: whether class 0 is scored.
        reduction: MONAI's `MetricReduction` name for the value in `engine.state.metrics`.
        output_transform: makes `(y_pred, y)` of the engine's output, for example `from_engine(["pred", "label"])`.
        save_details: whether the scores, one row an image and one column a class, go to
            `engine.state.metric_details`, from where `MetricsSaver` writes them.
        ignore_empty: "both", True or False.
        num_classes: number of classes of label maps, background included.
        ignore_index: reference label whose voxels are left out.

    >>> import torch
    >>> from ignite.engine import Engine
    >>> engine = Engine(lambda engine, batch: batch)
    >>> IoUHandler(num_classes=2, include_background=False).attach(engine, "iou")
    >>> label = torch.tensor([[[0, 1, 1]]])
    >>> engine.run([(label, label)]).metrics["iou"]
    1.0
    """

    def __init__(
        self,
        include_background: bool = True,
        reduction: MetricReduction | str = MetricReduction.MEAN,
        output_transform: Callable[[Any], Any] = _identity,
        save_details: bool = True,
        *,
        ignore_empty: IgnoreEmpty = "both",
        num_classes: int | None = None,
        ignore_index: int | None = None,
    ) -> None:
        metric = IoUMetric(
            include_background=include_background,
            reduction=reduction,
            ignore_empty=ignore_empty,
            num_classes=num_classes,
            ignore_index=ignore_index,
        )
        super().__init__(metric_fn=metric, output_transform=output_transform, save_details=save_details)


class LesionIoUHandler(IgniteMetricHandler):
    """Run `LesionIoUMetric` over an evaluation; see there for the arguments.

    The voxel size is read from the labels, or the predictions, where they are MetaTensors, and is 1 mm else.

    Args:
        include_background: whether class 0 is scored; None leaves it out where it is a background.
        reduction: MONAI's `MetricReduction` name for the value in `engine.state.metrics`.
        output_transform: makes `(y_pred, y)` of the engine's output.
        save_details: whether the scores go to `engine.state.metric_details` for `MetricsSaver`.
        score: the lesion score to report.
        threshold: IoU from which on two components can match, or "any".
        connectivity: 6, 18 or 26 neighbours in 3D, 4 or 8 in 2D; None takes the most.
        ignore_empty: "both", True or False.
        num_classes: number of classes of label maps, background included.
        ignore_index: reference label whose voxels are left out.
    """

    def __init__(
        self,
        include_background: bool | None = None,
        reduction: MetricReduction | str = MetricReduction.MEAN,
        output_transform: Callable[[Any], Any] = _identity,
        save_details: bool = True,
        *,
        score: str = "pq",
        threshold: float | Literal["any"] = 0.5,
        connectivity: int | None = None,
        ignore_empty: IgnoreEmpty = "both",
        num_classes: int | None = None,
        ignore_index: int | None = None,
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
        )
        super().__init__(metric_fn=metric, output_transform=output_transform, save_details=save_details)


class BoundaryIoUHandler(IgniteMetricHandler):
    """Run `BoundaryIoUMetric` over an evaluation; see there for the arguments.

    The voxel size is read from the labels, or the predictions, where they are MetaTensors, and is 1 mm else.

    Args:
        include_background: whether class 0 is scored; None leaves it out where it is a background.
        reduction: MONAI's `MetricReduction` name for the value in `engine.state.metrics`.
        output_transform: makes `(y_pred, y)` of the engine's output.
        save_details: whether the scores go to `engine.state.metric_details` for `MetricsSaver`.
        width: thickness of the band, in mm, or as a share of the image's diagonal: "2%".
        distance: "euclidean" or "chessboard".
        ignore_empty: "both", True or False.
        num_classes: number of classes of label maps, background included.
        ignore_index: reference label whose voxels are left out.
    """

    def __init__(
        self,
        include_background: bool | None = None,
        reduction: MetricReduction | str = MetricReduction.MEAN,
        output_transform: Callable[[Any], Any] = _identity,
        save_details: bool = True,
        *,
        width: float | str = 2.0,
        distance: BoundaryDistance = "euclidean",
        ignore_empty: IgnoreEmpty = "both",
        num_classes: int | None = None,
        ignore_index: int | None = None,
    ) -> None:
        metric = BoundaryIoUMetric(
            include_background=include_background,
            reduction=reduction,
            width=width,
            distance=distance,
            ignore_empty=ignore_empty,
            num_classes=num_classes,
            ignore_index=ignore_index,
        )
        super().__init__(metric_fn=metric, output_transform=output_transform, save_details=save_details)
