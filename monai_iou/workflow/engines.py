"""MONAI's engines, for a network output that is not finite.

One that is too large for float16 is computed again in float32. Where that does not help, evaluators refuse the case and
go on with the others.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Events
from monai.engines.evaluator import SupervisedEvaluator
from monai.engines.trainer import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.handlers.checkpoint_loader import CheckpointLoader
from monai.utils.misc import ensure_tuple

from monai_iou.distributed import from_all_ranks, is_distributed
from monai_iou.metrics.base import RowMetric
from monai_iou.workflow.finite_outputs import is_finite, not_finite
from monai_iou.workflow.freed_memory import kept_memory
from monai_iou.workflow.half_precision import CpuAutocast, SmallInFloat32, in_mixed_precision
from monai_iou.workflow.optimization import inner_module, is_parallel
from monai_iou.workflow.stopping import quiet_stop

__all__ = ["CaseEvaluator", "Trainer", "ValidationEvaluator"]

logger = logging.getLogger(__name__)


class _NotFiniteError(Exception):
    """The network's output of this case holds NaN or infinity."""


def _takes_empty_ranks(metric: Any) -> bool:
    """Whether a rank without scores takes part in a metric: of MONAI's it stays away, and the others wait for ever."""
    return isinstance(getattr(metric, "metric_fn", None), RowMetric)


def _take_buffers_of_first_rank(network: torch.nn.Module) -> None:
    for buffer in network.buffers() if is_distributed() else ():
        shared = buffer.detach().clone(memory_format=torch.contiguous_format)
        dist.broadcast(shared, 0)
        buffer.data.copy_(shared)


@contextlib.contextmanager
def _on_gpu_alone(engine: Any) -> Iterator[None]:
    """Turn MONAI's own mixed precision off on a CPU, where it does nothing, but for warnings; the inferer has another.

    To the outside, `engine.amp` stays what was asked for.
    """
    amp = engine.amp
    engine.amp = amp and engine.state.device.type != "cpu"
    try:
        yield
    finally:
        engine.amp = amp


class _MixedPrecision:
    """What an engine of MONAI's gets for `amp`: see `monai_iou.workflow.half_precision`."""

    inferer: Any

    def __init__(
        self,
        device: str | torch.device,
        *args: Any,
        amp: bool = False,
        amp_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        device = torch.device(device)
        super().__init__(device, *args, amp=amp, amp_kwargs=amp_kwargs, **kwargs)  # type: ignore[call-arg]
        self.inferer = in_mixed_precision(self.inferer, device, amp, amp_kwargs or {})


class _First:
    """What a handler does before all others."""

    def __init__(self, handler: Any) -> None:
        self.handler = handler

    def attach(self, engine: Any) -> None:
        self.handler.attach_first(engine)


class Trainer(_MixedPrecision, SupervisedTrainer):
    """MONAI's `SupervisedTrainer`, whose mixed precision works on a CPU too and survives what float16 cannot hold.

    See `monai_iou.workflow.half_precision`.

    Args:
        device: to train on.
        args, kwargs: as for `monai.engines.SupervisedTrainer`.
        train_handlers: likewise; a `CheckpointLoader` acts first, so that a resumed training keeps its own weights, and
            then the handlers that have a method `attach_first`: a validation at the start is of the restored network.
        amp: mixed precision.
        amp_kwargs: with its `dtype`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        handlers = ensure_tuple(kwargs.pop("train_handlers", None) or ())
        if handlers:
            loaders = [each for each in handlers if isinstance(each, CheckpointLoader)]
            early = [_First(each) for each in handlers if hasattr(each, "attach_first")]
            kwargs["train_handlers"] = [*loaders, *early, *(each for each in handlers if each not in loaders)]
        super().__init__(*args, **kwargs)
        self._backward = contextlib.ExitStack()
        if isinstance(self.inferer, CpuAutocast):
            # Gradient checkpointing computes parts of the network again in the backward pass.
            self.add_event_handler(
                IterationEvents.LOSS_COMPLETED, lambda _: self._backward.enter_context(SmallInFloat32())
            )
            self.add_event_handler(IterationEvents.BACKWARD_COMPLETED, lambda _: self._backward.close())

    def run(self) -> None:  # type: ignore[override]
        """Train."""
        with kept_memory(), _on_gpu_alone(self):
            super().run()

    def _iteration(self, engine: Any, batchdata: Any) -> Any:
        with self._backward:  # left also where the backward pass ends with an error
            return super()._iteration(engine, batchdata)


class CaseEvaluator(_MixedPrecision, SupervisedEvaluator):
    """MONAI's `SupervisedEvaluator` which does not accept NaN as an answer.

    Its mixed precision works on a CPU too and survives what float16 cannot hold, see
    `monai_iou.workflow.half_precision`.

    A case whose output holds NaN or infinity is neither postprocessed, nor written, nor scored; its sentence is logged
    and kept in `state.failed_cases`, and `monai_iou.workflow.failures.run` ends with it once the other cases are done.

    Args:
        device: to evaluate on.
        args, kwargs: as for `monai.engines.SupervisedEvaluator`.
        amp: mixed precision.
        amp_kwargs: with its `dtype`.
    """

    remedy = "or set `amp` to false; no mask is written and no score is given"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # A DistributedDataParallel may wait in a call for the other ranks, whose volumes have other numbers of patches.
        if is_parallel(self.network):
            self.network = inner_module(self.network)
        self.logger.addFilter(quiet_stop)
        self.state.failed_cases = []
        self._finished = 0
        self._has_failed = False
        metrics = {**(kwargs.get("key_val_metric") or {}), **(kwargs.get("additional_metrics") or {})}
        self._names = list(metrics)
        self._takes_empty_ranks = all(_takes_empty_ranks(metric) for metric in metrics.values())
        self.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._check_output)

    def run(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Evaluate all cases."""
        self.state.failed_cases, self._finished = [], 0
        self.state.metrics, self.state.metric_details = {}, {}
        with kept_memory():
            super().run(*args, **kwargs)

    def _iteration(self, engine: Any, batchdata: Any) -> Any:
        self._has_failed = False
        try:
            with _on_gpu_alone(self):
                result = super()._iteration(engine, batchdata)
            self._finished += 1
        except _NotFiniteError as error:
            self._has_failed = True
            self.state.failed_cases.append(str(error))
            logger.error("%s", error)  # noqa: TRY400  # a sentence, not a traceback
            return None
        return result

    def _check_output(self, engine: Any) -> None:
        if not is_finite(engine.state.output["pred"]):
            raise _NotFiniteError(not_finite(engine.state.batch, self.remedy))

    def _fire_event(self, event_name: Any, *event_args: Any, **event_kwargs: Any) -> None:
        # Metrics, writers of scores and masks all listen to a completed iteration.
        if event_name == Events.ITERATION_COMPLETED and self._has_failed:
            return
        if event_name in (Events.EPOCH_COMPLETED, Events.COMPLETED):
            counts = from_all_ranks((len(self.state.failed_cases), self._finished))
            if self._has_no_score(counts):
                self.state.metrics, self.state.metric_details = dict.fromkeys(self._names, math.nan), {}
                return
        super()._fire_event(event_name, *event_args, **event_kwargs)

    def _has_no_score(self, counts: list[tuple[int, int]]) -> bool:
        """Whether no score can be given, from the numbers of failed and of finished cases on each rank."""
        if not any(failed for failed, _ in counts):
            return False
        finished = [number for _, number in counts]
        return not any(finished) or not (self._takes_empty_ranks or all(finished))


class ValidationEvaluator(CaseEvaluator):
    """A `CaseEvaluator` for the validations of a training: one with a failed case has no score, so that none is best.

    The mean over the other cases is one over other cases than before, and not to be compared: all metrics are NaN.

    Args:
        args, kwargs: as for `monai.engines.SupervisedEvaluator`.
    """

    remedy = "lower `learning_rate` or set `amp` to false; this validation gives no score and chooses no model"

    def run(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Validate the network as rank 0 has it and stores it, whose buffers are not those of the other ranks."""
        _take_buffers_of_first_rank(self.network)
        super().run(*args, **kwargs)
        self.state.output = None  # ignite keeps the last case until the next validation, on a GPU in its memory

    def _has_no_score(self, counts: list[tuple[int, int]]) -> bool:
        return any(failed for failed, _ in counts)
