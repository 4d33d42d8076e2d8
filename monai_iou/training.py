"""Handler of the bundle's training: checkpoints that survive a kill, and resuming from them."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from monai_iou.bundles import one_sentence
from monai_iou.planning import Plan

if TYPE_CHECKING:
    from monai.engines.evaluator import Evaluator
    from monai.engines.trainer import Trainer

__all__ = ["CheckpointHandler", "is_better", "last_epoch", "write_atomically"]

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
