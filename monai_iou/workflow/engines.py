"""An evaluator that refuses a case whose network output is not finite, and goes on with the others."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Events
from monai.engines.evaluator import SupervisedEvaluator
from monai.engines.utils import IterationEvents

from monai_iou.distributed import is_distributed

__all__ = ["CaseEvaluator"]

logger = logging.getLogger(__name__)


class _NotFiniteError(Exception):
    """The network's output of this case holds NaN or infinity."""


class CaseEvaluator(SupervisedEvaluator):
    """MONAI's `SupervisedEvaluator` which does not accept NaN as an answer.

    A case whose output holds NaN or infinity is neither postprocessed, nor written, nor scored; its sentence is logged
    and kept in `state.failed_cases`, and `monai_iou.workflow.failures.run` ends with it once the other cases are done.

    Args:
        args, kwargs: as for `monai.engines.SupervisedEvaluator`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.state.failed_cases = []
        self._finished = 0
        self._has_failed = False
        self.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._check_output)

    def run(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Evaluate all cases."""
        self.state.failed_cases, self._finished = [], 0
        super().run(*args, **kwargs)

    def _iteration(self, engine: Any, batchdata: Any) -> Any:
        self._has_failed = False
        try:
            result = super()._iteration(engine, batchdata)
            self._finished += 1
        except _NotFiniteError as error:
            self._has_failed = True
            self.state.failed_cases.append(str(error))
            logger.error("%s", error)  # noqa: TRY400  # a sentence, not a traceback
            return None
        return result

    def _check_output(self, engine: Any) -> None:
        prediction = engine.state.output["pred"]
        tensors = prediction if isinstance(prediction, (list, tuple)) else [prediction]
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
            message = (
                f"Expected a finite network output for {_file(engine.state.batch)}, but it has NaN or infinity: look "
                "at its intensities, or set `amp` to false; no mask is written and no score is given."
            )
            raise _NotFiniteError(message)

    def _fire_event(self, event_name: Any, *event_args: Any, **event_kwargs: Any) -> None:
        # Metrics, writers of scores and masks all listen to a completed iteration.
        if event_name == Events.ITERATION_COMPLETED and self._has_failed:
            return
        if event_name in (Events.EPOCH_COMPLETED, Events.COMPLETED) and self._nothing_to_score():
            return
        super()._fire_event(event_name, *event_args, **event_kwargs)

    def _nothing_to_score(self) -> bool:
        """Whether some rank has failed cases alone: metrics of an empty rank would wait for the others for ever."""
        counts = [(len(self.state.failed_cases), self._finished)]
        if is_distributed():
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, counts[0])
            counts = gathered
        return any(failed and not finished for failed, finished in counts)


def _file(batch: Any) -> str:
    image = batch.get("image") if isinstance(batch, dict) else None
    name = getattr(image, "meta", {}).get("filename_or_obj") or (batch.get("case") if isinstance(batch, dict) else None)
    names = name if isinstance(name, (list, tuple)) else [name]
    return " and ".join(str(each) for each in names if each) or "a volume without a name"
