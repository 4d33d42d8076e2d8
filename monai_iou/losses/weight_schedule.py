"""Weights of the terms of a compound loss that change over the epochs of a training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from monai_iou import checks
from monai_iou.losses.compound import CompoundLoss

__all__ = ["LossWeightSchedule"]

CURVES = ("constant", "linear", "cosine")


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
        named = isinstance(terms, Mapping)
        unknown = [name for name in terms if name not in loss.names] if named else [type(terms).__name__]
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
        given = options if isinstance(options, Mapping) else {}
        if not {"start", "end"} <= set(given) <= set(known):
            message = (
                f"Expected the schedule of {name!r} to have `start`, `end` and optionally {', '.join(known[2:])}, but "
                f"got {', '.join(map(str, given)) or 'nothing'}: correct the keys."
            )
            raise TypeError(message)
        ramp = cls(**options)
        checks.check_choice("curve", ramp.curve, CURVES)
        for key in ("start", "end"):
            checks.check_positive(key, getattr(ramp, key), allow_zero=True)
        for key in ("first_epoch", "last_epoch"):
            if key in options and (key, options[key]) != ("last_epoch", None):
                checks.check_number(key, options[key])
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
