"""Handlers of the bundle's training: checkpoints that survive a kill, resuming, and progress with the time left."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from monai_iou.bundles import one_sentence
from monai_iou.planning import Plan

if TYPE_CHECKING:
    from monai.engines.evaluator import Evaluator
    from monai.engines.trainer import Trainer

__all__ = ["CaseProgressHandler", "CheckpointHandler", "ProgressHandler", "is_better", "last_epoch", "write_atomically"]

LINE_INTERVAL_SECONDS = 60.0

logger = logging.getLogger(__name__)


def is_better(current: float, best: float) -> bool:
    """Return whether a validation score beats the best so far; NaN (nothing to score) never does, and is always beaten.

    MONAI's own comparison keeps a first NaN as the best for ever.

    Example:
        >>> is_better(0.5, float("nan")), is_better(float("nan"), 0.5)
        (True, False)
    """
    return current > best or (math.isnan(best) and not math.isnan(current))


def last_epoch(path: str | os.PathLike[str]) -> int:
    """Return the epoch that the last checkpoint completed, 0 if there is none."""
    if not Path(path).is_file():
        return 0
    return int(torch.load(path, map_location="cpu", weights_only=True)["epoch"])


def write_atomically(content: Any, path: Path) -> None:
    """Save with torch.save (text as it is) so that `path` is always the old file or the new one, whole.

    The data reach the disk under a temporary name before the rename: after a kill or a power cut there is at most a
    stale temporary file, which the next save replaces.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as stream:
            if isinstance(content, str):
                stream.write(content.encode())
            else:
                torch.save(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class CheckpointHandler:
    """Write `model.pt` (best weights), `model.json` (their plan) and `last.pt` (all that resuming needs).

    Attach it after the `ValidationHandler`, so that a checkpoint knows its epoch's score. `last.pt` holds only tensors
    and plain values and loads with `weights_only=True`. If no validation chose a best model, the final weights are
    stored as `model.pt`.

    Args:
        ckpt_dir: folder of the three files.
        network: the trained module; of a DistributedDataParallel its inner module is stored.
        optimizer: its state is in `last.pt`.
        lr_scheduler: likewise; `total_iters` is not restored, so that a resumed run may be made longer.
        evaluator: gives the best score; None for a run without validation.
        plan: stored beside the best weights.
        resume: continue after the epoch of `last.pt`; start from the beginning if there is none.

    Raises:
        ValueError: when training starts, if `last.pt` fits another network.
    """

    def __init__(
        self,
        ckpt_dir: str,
        network: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
        evaluator: Evaluator | None = None,
        plan: Plan | None = None,
        *,
        resume: bool = False,
    ) -> None:
        self.folder = Path(ckpt_dir)
        self.network, self.optimizer, self.lr_scheduler = network, optimizer, lr_scheduler
        self.evaluator, self.plan, self.resume = evaluator, plan, resume
        self._has_model = False

    def attach(self, engine: Trainer) -> None:
        """Register on the trainer."""
        from ignite.engine import Events

        engine.add_event_handler(Events.STARTED, self._started)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)
        engine.add_event_handler(Events.COMPLETED, self._completed)

    @property
    def _module(self) -> torch.nn.Module:
        module = getattr(self.network, "module", None)
        return module if isinstance(module, torch.nn.Module) else self.network

    def _started(self, engine: Trainer) -> None:
        self._has_model = False
        if not self.resume:
            return
        path = self.folder / "last.pt"
        if not path.is_file():
            logger.info("No checkpoint at %s: training starts from the beginning.", path)
            return
        with one_sentence():
            self._restore(engine, torch.load(path, map_location="cpu", weights_only=True), path)

    def _restore(self, engine: Trainer, state: Mapping[str, Any], path: Path) -> None:
        try:
            self._module.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            message = (
                f"Expected {path} to hold the network that this run trains, but its weights do not fit: "
                "resume with the same data, patch_size and network_def, or set --resume false."
            )
            raise ValueError(message) from error
        total = getattr(self.lr_scheduler, "total_iters", None)
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if total is not None:
            self.lr_scheduler.total_iters = total  # type: ignore[attr-defined]
        scaler = getattr(engine, "scaler", None)
        if scaler is not None and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        engine.state.epoch = state["epoch"]
        # The number of batches may have changed since: count in this run's epochs.
        engine.state.iteration = state["epoch"] * int(engine.state.epoch_length or 0)
        if self.evaluator is not None:
            self.evaluator.state.best_metric = state["best_metric"]
            self.evaluator.state.best_metric_epoch = state["best_metric_epoch"]
        self._has_model = (self.folder / "model.pt").is_file()
        logger.info(
            "Resumed from %s after epoch %d; best score %.4f of epoch %d.",
            path,
            state["epoch"],
            state["best_metric"],
            state["best_metric_epoch"],
        )

    def _epoch_completed(self, engine: Trainer) -> None:
        if engine.state.rank != 0:
            return
        best = self.evaluator.state if self.evaluator is not None else None
        if best is not None and best.best_metric_epoch == engine.state.epoch and not math.isnan(best.best_metric):
            self._write_model()
        scaler = getattr(engine, "scaler", None)
        state = {
            "epoch": int(engine.state.epoch),
            "model": self._module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else {},
            "best_metric": float(best.best_metric) if best is not None else -1.0,
            "best_metric_epoch": int(best.best_metric_epoch) if best is not None else -1,
        }
        write_atomically(state, self.folder / "last.pt")

    def _completed(self, engine: Trainer) -> None:
        if engine.state.rank == 0 and not self._has_model:
            self._write_model()

    def _write_model(self) -> None:
        # A bare state dictionary, as in the model zoo: `monai.bundle.load` and CheckpointLoader take it as it is.
        write_atomically(self._module.state_dict(), self.folder / "model.pt")
        if self.plan is not None:
            write_atomically(self.plan.to_json(), self.folder / "model.json")
        self._has_model = True


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
        self._first_iteration = 0
        self._losses: list[float] = []

    def attach(self, engine: Trainer) -> None:
        """Register on the trainer; only its rank 0 shows anything."""
        from ignite.engine import Events

        if engine.state.rank != 0:
            return
        engine.add_event_handler(Events.STARTED, self._started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)
        engine.add_event_handler(Events.COMPLETED, self._ended)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._failed)

    def _started(self, engine: Trainer) -> None:
        self._start = self._last_line = time.monotonic()
        self._first_iteration = engine.state.iteration
        self._losses = []
        if sys.stderr.isatty():
            self._open_bar(engine)

    def _open_bar(self, engine: Trainer) -> None:
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
        self._bar.start()
        total = engine.state.max_epochs * engine.state.epoch_length
        self._task = self._bar.add_task("training", total=total, completed=engine.state.iteration, loss="-")

    def _iteration_completed(self, engine: Trainer) -> None:
        self._losses.append(_loss(engine.state.output))
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
        loss = sum(self._losses) / max(1, len(self._losses))
        self._losses = []
        line = (
            f"epoch {engine.state.epoch}/{engine.state.max_epochs} loss {loss:.4f} "
            f"lr {self.optimizer.param_groups[0]['lr']:.2e}{self._scores(engine)}, {self._time_left(engine)} left"
        )
        self._last_line = time.monotonic()
        if self._bar is not None:
            self._bar.console.print(line, highlight=False)
        else:
            logger.info("%s", line)

    def _scores(self, engine: Trainer) -> str:
        state = self.evaluator.state if self.evaluator is not None else None
        if state is None or state.epoch != engine.state.epoch:
            return ""
        shown = "".join(f" {name} {value:.4f}" for name, value in state.metrics.items() if isinstance(value, float))
        return f"{shown} (best {state.best_metric:.4f} of epoch {state.best_metric_epoch})"

    def _time_left(self, engine: Trainer) -> str:
        done = engine.state.iteration - self._first_iteration
        total = engine.state.max_epochs * engine.state.epoch_length
        seconds = (time.monotonic() - self._start) / max(1, done) * (total - engine.state.iteration)
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d}"

    def _ended(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
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
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(stderr=True))
            self._bar.start()
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
            self._bar.stop()
            self._bar = None

    def _failed(self, _: Any, error: BaseException) -> None:
        self._ended()
        raise error  # Ignite takes an exception as handled as soon as one handler is registered for it.


def _loss(output: Any) -> float:
    # MONAI decollates the output: every item of the batch carries the same loss.
    first = output[0] if isinstance(output, list) else output
    return float(first["loss"])
