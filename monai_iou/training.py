"""Handler of the bundle's training: checkpoints that survive a kill, and resuming from them."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from monai_iou.bundles import one_sentence
from monai_iou.planning import Plan

if TYPE_CHECKING:
    from monai.engines.evaluator import Evaluator
    from monai.engines.trainer import Trainer

__all__ = ["CheckpointHandler", "PolynomialDecay", "check_settings", "is_better", "last_epoch", "write_atomically"]

logger = logging.getLogger(__name__)


def is_better(current: float, best: float) -> bool:
    """Return whether a validation score beats the best so far; NaN (nothing to score) never does, and is always beaten.

    MONAI's own comparison keeps a first NaN as the best for ever.

    Example:
        >>> is_better(0.5, float("nan")), is_better(float("nan"), 0.5)
        (True, False)
    """
    return current > best or (math.isnan(best) and not math.isnan(current))


def check_settings(**settings: object) -> None:
    """Check numbers of a training run before anything is read.

    Args:
        settings: `learning_rate`, a positive number; every other name a positive integer, `num_workers` also 0.

    Raises:
        ValueError: one of them is something else.

    Example:
        >>> check_settings(epochs=10, learning_rate=1e-3, num_workers=0)
    """
    for name, value in settings.items():
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
        if name == "learning_rate":
            kind, usable = "a positive number", 0 < number < math.inf
        else:
            least = 0 if name == "num_workers" else 1
            kind, usable = f"an integer of at least {least}", least <= number < math.inf and number == int(number)
        if not usable:
            with one_sentence():
                message = f"Expected `{name}` to be {kind}, but got {value!r}: leave --{name} out for the default."
                raise ValueError(message)


class PolynomialDecay(torch.optim.lr_scheduler.LambdaLR):
    """Learning rate `base * (1 - step / total_iters) ** power`, 0 from `total_iters` on.

    torch's PolynomialLR multiplies the last rate, so that a run that ended at 0 could never be made longer.

    Args:
        optimizer: its learning rate is the base.
        total_iters: steps of the whole run.
        power: of the polynomial.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        >>> PolynomialDecay(optimizer, total_iters=4, power=1.0).move_to(3)
        >>> optimizer.param_groups[0]["lr"]
        0.025
    """

    def __init__(self, optimizer: torch.optim.Optimizer, total_iters: int, power: float = 0.9) -> None:
        self.total_iters, self.power = total_iters, power
        super().__init__(optimizer, self.factor)

    def factor(self, step: int) -> float:
        """Return what the base is multiplied by at a step."""
        return float(max(0.0, 1 - step / self.total_iters) ** self.power)

    def move_to(self, step: int) -> None:
        """Set the step, and the optimizer's learning rate to that of this step."""
        self.last_epoch = step
        self._last_lr = [base * self.factor(step) for base in self.base_lrs]
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate


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
    """Write `model.json` (the plan), `model.pt` (its best weights) and `last_epoch.pt` (all that resuming needs).

    Attach it after the `ValidationHandler`, so that a checkpoint knows its epoch's score. `last_epoch.pt` holds only
    tensors and plain values and loads with `weights_only=True`. If no validation chose a best model, the final weights
    are stored as `model.pt`.

    Args:
        ckpt_dir: folder of the three files.
        network: the trained module; of a DistributedDataParallel its inner module is stored.
        optimizer: its state is in `last_epoch.pt`.
        lr_scheduler: likewise; a `PolynomialDecay` is only moved to the step, so that a resumed run follows its own
            `learning_rate` and length.
        evaluator: gives the best score; None for a run without validation.
        plan: stored beside the best weights.
        resume: continue after the epoch of `last_epoch.pt`; start from the beginning if there is none.

    Raises:
        ValueError: when training starts, if `last_epoch.pt` fits another network.
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
        path = self.folder / "last_epoch.pt"
        if not path.is_file():
            logger.info("No checkpoint at %s: training starts from the beginning.", path)
            return
        with one_sentence():
            self._restore(engine, torch.load(path, map_location="cpu", weights_only=True), path)

    def _restore(self, engine: Trainer, state: Mapping[str, Any], path: Path) -> None:
        try:
            self._module.load_state_dict(state["model"])
            _load_averages(self.optimizer, state["optimizer"])
        except (RuntimeError, ValueError) as error:
            message = (
                f"Expected {path} to hold the network that this run trains, but its weights do not fit: "
                "resume with the same data, patch_size and network_def, or set --resume false."
            )
            raise ValueError(message) from error
        scaler = getattr(engine, "scaler", None)
        if scaler is not None and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        engine.state.epoch = state["epoch"]
        # The number of batches may have changed since: count in this run's epochs.
        engine.state.iteration = state["epoch"] * int(engine.state.epoch_length or 0)
        self._restore_schedule(engine.state.iteration, state["lr_scheduler"])
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

    def _restore_schedule(self, step: int, state: dict[str, Any]) -> None:
        if isinstance(self.lr_scheduler, PolynomialDecay):
            self.lr_scheduler.move_to(step)
            return
        self.lr_scheduler.load_state_dict(state)
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

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
        write_atomically(state, self.folder / "last_epoch.pt")

    def _completed(self, engine: Trainer) -> None:
        if engine.state.rank == 0 and not self._has_model:
            self._write_model()

    def _write_model(self) -> None:
        # The plan first: a kill in between must not leave weights without it.
        if self.plan is not None:
            write_atomically(self.plan.to_json(), self.folder / "model.json")
        # A bare state dictionary, as in the model zoo: `monai.bundle.load` and CheckpointLoader take it as it is.
        write_atomically(self._module.state_dict(), self.folder / "model.pt")
        self._has_model = True


def _load_averages(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    # The moving averages come from the checkpoint; learning rate, decay and the like are this run's own.
    own = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)
