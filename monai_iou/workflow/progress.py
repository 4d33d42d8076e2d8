"""Handlers that show a bundle's progress: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING, Any

import torch

from monai_iou.streams import is_terminal
from monai_iou.workflow.bars import start_above_log, stop_above_log
from monai_iou.workflow.failures import batch_loss

if TYPE_CHECKING:
    from monai.engines.evaluator import Evaluator
    from monai.engines.trainer import Trainer

__all__ = ["CaseProgressHandler", "ProgressHandler"]


LINE_INTERVAL_SECONDS = 60.0

logger = logging.getLogger(__name__)


class ProgressHandler:
    """Show epoch, loss, learning rate, validation score and time left: a bar on a terminal, plain lines in a log.

    Args:
        optimizer: for its learning rate.
        evaluator: for its scores, None without validation.
        interval: seconds between two lines inside an epoch, when there is no terminal.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        evaluator: Evaluator | None = None,
        interval: float = LINE_INTERVAL_SECONDS,
    ) -> None:
        self.optimizer, self.evaluator, self.interval = optimizer, evaluator, interval
        self._bar: Any = None
        self._task: Any = None
        self._start = self._last_line = 0.0
        self._first_iteration: int | None = None
        self._losses: list[float] = []

    def attach(self, engine: Trainer) -> None:
        """Register on the trainer; only its rank 0 shows anything."""
        from ignite.engine import Events

        if engine.state.rank != 0:
            return
        engine.add_event_handler(Events.STARTED, self._started)
        engine.add_event_handler(Events.ITERATION_STARTED, self._iteration_started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)
        engine.add_event_handler(Events.COMPLETED, self._ended)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._failed)

    def _started(self, _: Trainer) -> None:
        self._start = self._last_line = time.monotonic()
        self._first_iteration = None
        self._losses = []

    def _iteration_started(self, engine: Trainer) -> None:
        # Not in _started: a handler may restore a checkpoint, and so set the iteration, after it.
        if self._first_iteration is not None:
            return
        self._first_iteration = engine.state.iteration - 1
        if is_terminal(sys.stderr):
            self._open_bar(engine, self._first_iteration)

    def _open_bar(self, engine: Trainer, completed: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=Console(stderr=True),
        )
        start_above_log(self._bar)
        total = engine.state.max_epochs * engine.state.epoch_length
        self._task = self._bar.add_task("training", total=total, completed=completed, loss="-")

    def _iteration_completed(self, engine: Trainer) -> None:
        self._losses.append(batch_loss(engine.state.output))
        recent = sum(self._losses[-20:]) / len(self._losses[-20:])
        if self._bar is not None:
            epoch = f"epoch {engine.state.epoch}/{engine.state.max_epochs}"
            self._bar.update(self._task, completed=engine.state.iteration, description=epoch, loss=f"{recent:.4f}")
        elif time.monotonic() - self._last_line >= self.interval:
            self._last_line = time.monotonic()
            step = (engine.state.iteration - 1) % engine.state.epoch_length + 1
            logger.info(
                "epoch %d/%d step %d/%d loss %.4f, %s left",
                engine.state.epoch,
                engine.state.max_epochs,
                step,
                engine.state.epoch_length,
                recent,
                self._time_left(engine),
            )

    def _epoch_completed(self, engine: Trainer) -> None:
        line = f"epoch {engine.state.epoch}/{engine.state.max_epochs}"
        if self._losses:
            line += f" loss {sum(self._losses) / len(self._losses):.4f}"
        line += f" lr {self.optimizer.param_groups[0]['lr']:.2e}{self._scores(engine)}"
        if self._first_iteration is not None:  # a resumed run may validate before its first step
            line += f", {self._time_left(engine)} left"
        self._losses = []
        self._last_line = time.monotonic()
        logger.info("%s", line)

    def _scores(self, engine: Trainer) -> str:
        state = self.evaluator.state if self.evaluator is not None else None
        if state is None or state.epoch != engine.state.epoch:
            return ""
        shown = "".join(f" {name} {value:.4f}" for name, value in state.metrics.items() if isinstance(value, float))
        if state.best_metric_epoch < 1:  # every score was NaN
            return shown
        return f"{shown} (best {state.best_metric:.4f} of epoch {state.best_metric_epoch})"

    def _time_left(self, engine: Trainer) -> str:
        done = engine.state.iteration - (self._first_iteration or 0)
        total = engine.state.max_epochs * engine.state.epoch_length
        seconds = (time.monotonic() - self._start) / max(1, done) * (total - engine.state.iteration)
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d}"

    def _ended(self, *_: Any) -> None:
        if self._bar is not None:
            stop_above_log(self._bar)
            self._bar = None

    def _failed(self, _: Any, error: BaseException) -> None:
        self._ended()
        raise error  # Ignite takes an exception as handled as soon as one handler is registered for it.


class CaseProgressHandler:
    """Show how many volumes are done, and at the end the scores: a bar on a terminal, plain lines in a log.

    Args:
        total: number of volumes.
        interval: seconds between two lines, when there is no terminal.
    """

    def __init__(self, total: int, interval: float = 10.0) -> None:
        self.total, self.interval = total, interval
        self._bar: Any = None
        self._task: Any = None
        self._last_line = 0.0

    def attach(self, engine: Evaluator) -> None:
        """Register on an evaluator; only its rank 0 shows anything."""
        from ignite.engine import Events

        if engine.state.rank != 0:
            return
        engine.add_event_handler(Events.STARTED, self._started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._case_completed)
        engine.add_event_handler(Events.COMPLETED, self._completed)
        engine.add_event_handler(Events.COMPLETED, self._ended)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._failed)

    def _started(self, _: Evaluator) -> None:
        self._last_line = time.monotonic()
        if is_terminal(sys.stderr):
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(stderr=True))
            start_above_log(self._bar)
            self._task = self._bar.add_task("volumes", total=self.total)

    def _case_completed(self, engine: Evaluator) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=engine.state.iteration)
        elif time.monotonic() - self._last_line >= self.interval:
            self._last_line = time.monotonic()
            logger.info("volume %d/%d", engine.state.iteration, self.total)

    def _completed(self, engine: Evaluator) -> None:
        scores = "".join(f", {name} {value:.4f}" for name, value in engine.state.metrics.items())
        logger.info("%d volumes done%s", self.total, scores)

    def _ended(self, *_: Any) -> None:
        if self._bar is not None:
            stop_above_log(self._bar)
            self._bar = None

    def _failed(self, _: Any, error: BaseException) -> None:
        self._ended()
        raise error  # Ignite takes an exception as handled as soon as one handler is registered for it.
