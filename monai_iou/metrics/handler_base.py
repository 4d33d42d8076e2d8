"""What the Ignite handlers share: a value for a mean over nothing, and a word about a first score that is NaN."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from monai.handlers.ignite_metric import IgniteMetricHandler
from monai.metrics.metric import CumulativeIterationMetric

from monai_iou import checks

if TYPE_CHECKING:
    from ignite.engine import Engine

__all__ = ["MetricHandler", "identity"]


def identity(output: Any) -> Any:
    """Return what is given, as the default `output_transform`."""
    return output


class MetricHandler(IgniteMetricHandler):
    """An Ignite handler of one of our metrics.

    Args:
        metric: computes the scores.
        output_transform: converts the engine's output to `(y_pred, y)`.
        save_details: whether the scores are stored in `engine.state.metric_details`, where NaN stays NaN.
        undefined: value in `engine.state.metrics` in place of NaN, the mean over nothing.

    Raises:
        TypeError: if `undefined` is not a number.
    """

    worst = 0.0  # the worst score of the metric

    def __init__(
        self,
        metric: CumulativeIterationMetric,
        output_transform: Callable[[Any], Any],
        save_details: bool,
        undefined: float,
    ) -> None:
        self.undefined = checks.check_number("undefined", undefined)
        super().__init__(metric_fn=metric, output_transform=output_transform, save_details=save_details)

    def compute(self) -> Any:
        """Return the value for `engine.state.metrics`; every rank must call it."""
        value = super().compute()
        if isinstance(value, torch.Tensor):
            return value.masked_fill(value.isnan(), self.undefined)  # a copy: it may be the scores themselves
        return self.undefined if math.isnan(value) else value

    def completed(self, engine: Engine, name: str) -> None:
        """Write the value, and warn if it is NaN and would remain the best key metric of one of MONAI's engines."""
        super().completed(engine, name)
        state: Any = engine.state
        is_better = getattr(engine, "metric_cmp_fn", None)  # of MONAI's engines
        if is_better is None or state.key_metric_name != name or state.best_metric_epoch != -1:
            return  # a NaN after the first score replaces no best
        value = state.metrics[name]
        # The comparison of the bundle lets every score beat NaN; MONAI's own never does.
        if isinstance(value, float) and math.isnan(value) and not is_better(1.0 - self.worst, value):
            message = (
                f"Expected the first value of the key metric `{name}` to be a number, but got NaN, a mean over "
                "nothing, which no later score replaces as the best of this engine and of MONAI's CheckpointSaver: "
                f"pass `undefined={self.worst}`, its worst value, to {type(self).__name__}."
            )
            warnings.warn(message, UserWarning, stacklevel=2)
