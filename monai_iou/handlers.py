"""Ignite handlers: the metrics for MONAI's engines and `MetricsSaver`, and a schedule for the weights of a loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from monai.handlers.ignite_metric import IgniteMetricHandler
from monai.utils.enums import MetricReduction

from monai_iou import checks
from monai_iou.losses.compound import CompoundLoss
from monai_iou.metrics.boundary import BoundaryDistance, BoundaryIoUMetric
from monai_iou.metrics.iou import IgnoreEmpty, IoUMetric
from monai_iou.metrics.lesion_metric import LesionIoUMetric
from monai_iou.metrics.lesion_rules import Pairing

__all__ = ["BoundaryIoUHandler", "IoUHandler", "LesionIoUHandler", "LossWeightSchedule"]

CURVES = ("constant", "linear", "cosine")


def _identity(output: Any) -> Any:
    return output


class IoUHandler(IgniteMetricHandler):
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

    Raises:
        ValueError: if an argument is out of range.

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
    """Compute `LesionIoUMetric` during an evaluation; see there for the definitions.

    The voxel size is read from the labels or the predictions if they are MetaTensors, and is 1 mm otherwise.

    Args:
        include_background: whether class 0 is scored; None leaves it out if it is a background.
        reduction, output_transform, save_details, ignore_empty, num_classes: see :class:`IoUHandler`.
        score: the lesion score to report.
        threshold: smallest IoU at which two components can match, or "any".
        connectivity: 6, 18 or 26 neighbours in 3D, 4 or 8 in 2D; None takes the largest number.
        ignore_index: reference label whose voxels belong to no lesion.
        match: "any", "iou:0.5" or "overlap:0.25" instead of `threshold`.
        pairing: "one-to-one" or "many-to-one".
        strict: whether a pair must exceed the threshold instead of reaching it.
        min_volume_mm3: smaller components are left out.
        dilation: reference components that touch after this number of dilations count as one lesion.

    Raises:
        ValueError: if an argument is out of range.

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
        output_transform: Callable[[Any], Any] = _identity,
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
        )
        super().__init__(metric_fn=metric, output_transform=output_transform, save_details=save_details)


class BoundaryIoUHandler(IgniteMetricHandler):
    """Compute `BoundaryIoUMetric` during an evaluation; see there for the definitions.

    The voxel size is read from the labels or the predictions if they are MetaTensors, and is 1 mm otherwise.

    Args:
        include_background: whether class 0 is scored; None leaves it out if it is a background.
        reduction, output_transform, save_details, ignore_empty, num_classes: see :class:`IoUHandler`.
        width: thickness of the band in mm, or as a percentage of the diagonal of the image, such as "2%".
        distance: "euclidean" or "chessboard".
        ignore_index: reference label whose voxels belong to no band.

    Raises:
        ValueError: if an argument is out of range.

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


class LossWeightSchedule:
    """Change the weights of a compound loss over the epochs of a training, for instance to phase in a term.

    The weight of a term is `start` up to `first_epoch` and `end` from `last_epoch` on. In between, with
    t = (epoch - first_epoch) / (last_epoch - first_epoch), it is start + (end - start) * s(t):

    - "linear": s(t) = t.
    - "cosine": s(t) = (1 - cos(pi t)) / 2.
    - "constant": no ramp; the weight is `start` before `first_epoch` and `end` from this epoch on.

    The weights depend on the epoch alone (the first is 1), so that a resumed training continues with the correct ones.

    Args:
        loss: the `CompoundLoss`, or a loss derived from it such as `IoUCELoss`, that the trainer uses. Its weights are
            changed in place; terms without a schedule keep their weights.
        terms: for each scheduled term, by its name in `loss.names`, a dictionary with `start`, `end`, `first_epoch` (1
            by default), `last_epoch` (not needed for "constant") and `curve` ("linear" by default).

    Raises:
        TypeError: if `loss` is not a compound loss, or a schedule has an unknown or a missing key.
        ValueError: if `loss` has no term of one of the names, or a weight, an epoch or a curve is out of range.

    Example:
        >>> from ignite.engine import Engine
        >>> from monai_iou import IoUCELoss, LossWeightSchedule
        >>> loss = IoUCELoss(softmax=True)
        >>> ramp = {"start": 1.0, "end": 0.2, "first_epoch": 1, "last_epoch": 5}
        >>> schedule = LossWeightSchedule(loss, {"cross_entropy": ramp})
        >>> trainer = Engine(lambda engine, batch: None)
        >>> schedule.attach(trainer)
        >>> _ = trainer.run([0], max_epochs=3)
        >>> [round(weight, 2) for weight in loss.weights]
        [1.0, 0.6]
    """

    def __init__(self, loss: CompoundLoss, terms: Mapping[str, Mapping[str, Any]]) -> None:
        if not isinstance(loss, CompoundLoss):
            message = (
                f"Expected `loss` to be a CompoundLoss, but got {type(loss).__name__}: list the terms in a "
                "CompoundLoss, or pass the CompoundLoss that this loss contains."
            )
            raise TypeError(message)
        unknown = [name for name in terms if name not in loss.names]
        if unknown or not terms:
            message = (
                f"Expected `terms` to name terms of the loss ({', '.join(loss.names)}), but got "
                f"{', '.join(map(str, unknown)) or 'none'}: choose among these names."
            )
            raise ValueError(message)
        self.loss = loss
        self.ramps = {name: _Ramp.from_options(name, options) for name, options in terms.items()}

    def attach(self, engine: Any) -> None:
        """Set the weights at the start of every epoch of `engine`, a trainer."""
        from ignite.engine import Events

        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Any) -> None:
        """Set the weights of the engine's current epoch."""
        for name, weight in self.weights(engine.state.epoch).items():
            self.loss.weights[self.loss.names.index(name)] = weight

    def weights(self, epoch: int) -> dict[str, float]:
        """Return the weights of the scheduled terms in an epoch, counted from 1."""
        return {name: ramp.weight(epoch) for name, ramp in self.ramps.items()}


@dataclass(frozen=True)
class _Ramp:
    """The weight of one term over the epochs."""

    start: float
    end: float
    first_epoch: int = 1
    last_epoch: int | None = None
    curve: str = "linear"

    @classmethod
    def from_options(cls, name: str, options: Mapping[str, Any]) -> _Ramp:
        """Return the checked schedule of the term `name`."""
        known = [field.name for field in fields(cls)]
        if not {"start", "end"} <= set(options) <= set(known):
            message = (
                f"Expected the schedule of {name!r} to have `start`, `end` and optionally {', '.join(known[2:])}, but "
                f"got {', '.join(map(str, options)) or 'nothing'}: correct the keys."
            )
            raise TypeError(message)
        ramp = cls(**options)
        checks.check_choice("curve", ramp.curve, CURVES)
        for key in ("start", "end"):
            checks.check_positive(key, getattr(ramp, key), allow_zero=True)
        last = ramp.first_epoch + 1 if ramp.curve == "constant" else ramp.last_epoch
        if last is None or not 1 <= ramp.first_epoch < last:
            message = (
                f"Expected the schedule of {name!r} to have 1 <= `first_epoch` < `last_epoch`, but got "
                f"{ramp.first_epoch} and {ramp.last_epoch}: give the epochs between which the weight changes."
            )
            raise ValueError(message)
        return ramp

    def weight(self, epoch: int) -> float:
        """Return the weight in an epoch, counted from 1."""
        if self.curve == "constant" or self.last_epoch is None:
            return self.start if epoch < self.first_epoch else self.end
        part = (epoch - self.first_epoch) / (self.last_epoch - self.first_epoch)
        part = min(1.0, max(0.0, part))
        share = part if self.curve == "linear" else (1 - math.cos(math.pi * part)) / 2
        return self.start + (self.end - self.start) * share
