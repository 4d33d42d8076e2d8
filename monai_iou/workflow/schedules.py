"""Learning rate schedules: one that needs a score gets one, and one that goes on follows the curve of this run."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from monai.handlers.lr_schedule_handler import LrScheduleHandler
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from monai_iou.tables import counted
from monai_iou.workflow.failures import TrainingError
from monai_iou.workflow.optimization import PolynomialDecay
from monai_iou.workflow.settings import exit_with_message
from monai_iou.workflow.typed_words import switch_on

__all__ = ["check_schedule", "restore_schedule"]

logger = logging.getLogger(__name__)

# Of their classes, the rate depends on the number of steps alone: a new one is led to its place by as many steps.
BY_STEPS = ("torch.optim.lr_scheduler", "monai.optimizers.lr_scheduler", "monai_iou.workflow.optimization")
RUNNING = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch", "_last_lr")  # of ReduceLROnPlateau


def check_schedule(scheduler: LRScheduler, handlers: Iterable[Any]) -> None:
    """Check that MONAI's LrScheduleHandler gives a `ReduceLROnPlateau` the value that it watches, before any step.

    Args:
        scheduler: of the training.
        handlers: of the trainer.

    Raises:
        TrainingError: the handler has its default `step_transform`, which gives no value. Under
            `python -m monai.bundle` the program ends with that sentence.
    """
    if not isinstance(scheduler, ReduceLROnPlateau):
        return
    for handler in handlers:
        if isinstance(handler, LrScheduleHandler) and handler.lr_scheduler is scheduler:
            if getattr(handler.step_transform, "__module__", "") != LrScheduleHandler.__module__:
                continue
            message = (
                "Expected a `step_transform` that gives the ReduceLROnPlateau in `lr_scheduler` a value to watch, but "
                "LrScheduleHandler has none: set `train#handlers#0#step_transform` in a config, for instance to "
                "\"$lambda engine: float(engine.state.output[0]['loss'])\", with a `patience` of many steps."
            )
            with exit_with_message():
                raise TrainingError(message)


def restore_schedule(
    scheduler: LRScheduler, step: int, state: Mapping[str, Any], source: object, stored: int | None = None
) -> None:
    """Bring a new schedule, and the learning rate of its optimizer, to where a checkpoint was.

    The settings are those of this run: base rate, length, milestones. A `ReduceLROnPlateau` keeps the rate to which it
    has come, and a schedule of the user's own takes its whole state from the checkpoint; the log says so.

    Args:
        scheduler: as it was made for this run, before any step; its optimizer has this run's settings.
        step: of the training, counted in this run's epochs.
        state: of the checkpoint's schedule.
        source: the checkpoint's file, for messages.
        stored: the step as the checkpoint counts, whose epochs may have another length; by default `step`.

    Raises:
        ValueError: the schedule of this run ends before the checkpoint, or the state is of another kind of schedule.
    """
    if isinstance(scheduler, PolynomialDecay):
        scheduler.move_to(step)
        return
    try:
        if _is_by_steps(scheduler):
            taken = _steps(state)
            taken = round(taken * step / stored) if stored else taken
            _take(scheduler, taken - _steps(scheduler.state_dict()), source)
            return
        if isinstance(scheduler, ReduceLROnPlateau):
            state = {**scheduler.state_dict(), **{name: state[name] for name in RUNNING}}
    except KeyError as error:
        message = (
            f"Expected {source} to hold the state of a {type(scheduler).__name__}, the `lr_scheduler` of this run, but "
            f"it has no {error}: resume with the `lr_scheduler` of the training, or start anew with "
            f"{switch_on('overwrite')} and without --resume."
        )
        raise ValueError(message) from error
    scheduler.load_state_dict(dict(state))
    rates = scheduler.get_last_lr()
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    logger.info(
        "The learning rate goes on from %s of %s, as %s keeps it in its state, whatever `learning_rate` is.",
        ", ".join(f"{float(rate):g}" for rate in rates), source, type(scheduler).__name__,
    )  # fmt: skip


def _steps(state: Mapping[str, Any]) -> int:
    """The steps that a schedule has taken; a ChainedScheduler counts none itself, and its parts take all."""
    return int(state["last_epoch"]) if "last_epoch" in state else _steps(state["_schedulers"][0])


def _is_by_steps(scheduler: LRScheduler) -> bool:
    parts = getattr(scheduler, "_schedulers", ())
    known = type(scheduler).__module__ in BY_STEPS and not isinstance(scheduler, ReduceLROnPlateau)
    return known and all(_is_by_steps(part) for part in parts)


def _take(scheduler: LRScheduler, steps: int, source: object) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the optimizer took its steps before the checkpoint
            for _ in range(steps):
                scheduler.step()
    except ValueError as error:  # OneCycleLR has an end
        message = (
            f"Expected the `lr_scheduler` of this run, {type(scheduler).__name__}, to have at least the "
            f"{counted(steps, 'step')} after which {source} goes on, but got the error "
            f"'{str(error).rstrip('.')}': raise --epochs."
        )
        raise ValueError(message) from error
