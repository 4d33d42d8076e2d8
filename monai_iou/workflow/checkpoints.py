"""Checkpoints that survive a kill, a full disk and a diverged step, and resuming from them."""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from monai_iou.distributed import is_distributed
from monai_iou.planning.plan import Plan
from monai_iou.workflow.checkpoint_files import has_its_model, is_with_model, load_state, write_together
from monai_iou.workflow.failures import StepGuard
from monai_iou.workflow.finite_outputs import check_weights
from monai_iou.workflow.optimization import (
    WeightAverage,
    averages_of,
    has_updated,
    inner_module,
    load_averages,
    restore_weights,
)
from monai_iou.workflow.records import differences
from monai_iou.workflow.schedules import restore_schedule
from monai_iou.workflow.settings import exit_with_message
from monai_iou.workflow.starting_weights import start_from, with_seen
from monai_iou.workflow.stopping import quiet_stop, stop_signal
from monai_iou.workflow.typed_words import switch_on

if TYPE_CHECKING:
    from monai.engines.evaluator import Evaluator
    from monai.engines.trainer import Trainer

    from monai_iou.workflow.data import BundleCases
    from monai_iou.workflow.event_files import EventFolder

__all__ = ["CheckpointHandler"]

logger = logging.getLogger(__name__)


class CheckpointHandler:
    """Write `model.json` (the plan), `model.pt` (its best weights) and `last_epoch.pt` (all that resuming needs).

    Where an epoch is the best so far, the three are written together: on a full disk, all earlier ones stay. If a kill
    comes between `last_epoch.pt` and the others, which follow it, resuming writes these again.

    Attach it after the `ValidationHandler`, so that a checkpoint knows its epoch's score. `last_epoch.pt` holds only
    tensors and plain values and loads with `weights_only=True`. If no validation chose a best model, or `keep` is
    "last", the final weights are stored as `model.pt` when training is complete. Weights that are NaN or infinite
    are never stored.

    Under `monai_iou.workflow.failures.run`, SIGTERM and SIGINT end the training after the current step, with MONAI's
    `accumulation_steps` the next that changes the weights: `last_epoch.pt` gets the state of that step, and the program
    ends with exit code 128 + the signal's number. A signal during validation ends it after the current volume (with
    several ranks: after the validation). Resuming does what was left of the epoch, its steps or its validation.

    Args:
        ckpt_dir: folder of the three files.
        network: the trained module; of a DistributedDataParallel its inner module is stored.
        optimizer: its state is in `last_epoch.pt`.
        lr_scheduler: its place is in `last_epoch.pt`; a resumed run follows its own `learning_rate` and length, see
            `restore_schedule`.
        evaluator: gives the best score; None for a run without validation.
        plan: stored beside the best weights.
        average: stored as `model.pt` instead of the network, where it averages weights.
        items: of the training data, to name the files of a batch whose loss is NaN.
        cases: the data; what they are is kept in `last_epoch.pt`, for whoever resumes. None keeps nothing.
        keep: "best", the weights with the best validation score; or "last", until training is complete the same, then
            the final ones.
        resume: continue after the epoch of `last_epoch.pt`; start from the beginning if there is none.
        start: a trained model from whose weights a training that is not resumed starts, see `model_file`.
        events: TensorBoard's files; those of an earlier training go when the first checkpoint replaces its own.

    Raises:
        ValueError: `keep` is something else; when training starts, if `last_epoch.pt` fits another network or is
            damaged.
        TrainingError: in training, if the loss is NaN or infinite, or there is no room for a checkpoint. The files of
            the last good epoch stay.
    """

    def __init__(
        self,
        ckpt_dir: str,
        network: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
        evaluator: Evaluator | None = None,
        plan: Plan | None = None,
        average: WeightAverage | None = None,
        items: Sequence[Mapping[str, Any]] = (),
        cases: BundleCases | None = None,
        *,
        keep: str = "best",
        resume: bool = False,
        start: str | None = None,
        events: EventFolder | None = None,
    ) -> None:
        if keep not in ("best", "last"):
            message = f'Expected `keep_weights` to be "best" or "last", but got {keep!r}: leave it out for "best".'
            with exit_with_message():
                raise ValueError(message)
        self.keep = keep
        self.folder = Path(ckpt_dir)
        self.network, self.optimizer, self.lr_scheduler = network, optimizer, lr_scheduler
        self.evaluator, self.plan, self.resume, self.cases = evaluator, plan, resume, cases
        self.events, self.start = events, start
        self.average = average if average is not None else WeightAverage(network, optimizer)
        self._guard = StepGuard(items)
        self._chosen_before: int | None = -1
        self._has_started = self._has_model = self._is_final = self._is_behind = False

    def attach_first(self, engine: Trainer) -> None:
        """Register the restoring of weights, before any other handler acts at the start."""
        from ignite.engine import Events

        engine.add_event_handler(Events.STARTED, self._started)

    def attach(self, engine: Trainer) -> None:
        """Register on the trainer."""
        from ignite.engine import Events

        if not engine.has_event_handler(self._started, Events.STARTED):
            self.attach_first(engine)
        for each in (engine, self.evaluator):
            if each is not None:
                each.logger.addFilter(quiet_stop)
        engine.add_event_handler(Events.STARTED, self._catch_up)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        if self.evaluator is not None and not is_distributed():  # ranks score different numbers of volumes
            volume_completed = Events.ITERATION_COMPLETED
            self.evaluator.add_event_handler(volume_completed, lambda _: self._stop(engine, stop_signal(engine)))
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)
        engine.add_event_handler(Events.COMPLETED, self._completed)

    def _started(self, engine: Trainer) -> None:
        is_torn = self._prepare(engine)
        self._chosen_before = None if is_torn else self._best_epoch

    def _prepare(self, engine: Trainer) -> bool:
        """Return whether a kill came after `last_epoch.pt` and before the `model.pt` that belongs to it."""
        if self._has_started and engine.state.epoch > 0:  # a further run, such as a federated round, goes on as it is
            return False
        self._has_started, self._has_model, self._is_final = True, False, False
        if self.plan is not None and self.cases is not None:  # a given plan names the cases of another training
            self.plan = self.cases.trained_on(self.plan)
        path = self.folder / "last_epoch.pt"
        if not self.resume or not path.is_file():
            if self.resume:
                logger.info("No checkpoint at %s: training starts from the beginning.", path)
            self.plan = start_from(self.start, self.network, self.average, self.plan)
            return False
        if self.start is not None:
            logger.info("`start_from` has no effect on a training that is resumed from %s.", path)
        state = load_state(path)
        with exit_with_message():
            self._restore(engine, state, path)
        self._is_behind = not state.get("validated", True)
        return is_with_model(state) and not self._has_model

    def _catch_up(self, engine: Trainer) -> None:
        if self._is_behind:
            # The run ended between the epoch's last step and what follows it: whatever that is, by its own interval.
            from ignite.engine import Events

            self._is_behind = False
            engine.fire_event(Events.EPOCH_COMPLETED)
        elif engine.state.rank == 0 and self._chosen_before != self._best_epoch == engine.state.epoch:
            # A validation at the start chose the weights that training starts from, or a kill left no `model.pt`.
            self._write_state(engine, validated=True, with_model=True)

    def _restore(self, engine: Trainer, state: Mapping[str, Any], path: Path) -> None:
        restore_weights(self.network, self.average, state, path)
        load_averages(self.optimizer, state["optimizer"], path)
        scaler = getattr(engine, "scaler", None)
        if scaler is not None and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        self._restore_position(engine, state, path)
        self._restore_best_score(state)
        self._is_final = state.get("final", False)
        # A file alone may be of an earlier training in this folder, or the final weights of fewer epochs.
        was_chosen = state["best_metric_epoch"] >= 0 and not math.isnan(state["best_metric"])
        self._has_model = (self._is_final or was_chosen) and has_its_model(state, self.folder / "model.pt")
        if self.plan is not None:  # what an earlier part of this training saw, on another split, stays seen
            self.plan = with_seen(self.plan, state.get("trained", ()), state.get("trained_images", ()))
        logger.info(
            "Resumed from %s after epoch %d%s%s.",
            path,
            state["epoch"],
            f" and {state['step']} steps" if state.get("step", 0) else "",
            f"; best score {state['best_metric']:.4f} of epoch {state['best_metric_epoch']}"
            if state["best_metric_epoch"] > 0
            else "",
        )
        if state.get("validated", True) and state["epoch"] >= int(engine.state.max_epochs or 0):
            logger.info(
                "Nothing is left to train, as `epochs` is %d and %d are done: a larger --epochs continues.",
                engine.state.max_epochs, state["epoch"],
            )  # fmt: skip

    def _restore_position(self, engine: Trainer, state: Mapping[str, Any], path: Path) -> None:
        """Go to the epoch and step of the checkpoint, and the learning rate with them."""
        engine.state.epoch = state["epoch"]
        # The number of batches may have changed since: count in this run's epochs.
        length = int(engine.state.epoch_length or 0)
        if state.get("epoch_length", length) != length:
            logger.warning(
                "%s counts epochs of %d steps, this run epochs of %d: its `epochs` are of another length.",
                path, state["epoch_length"], length,
            )  # fmt: skip
        engine.state.iteration = state["epoch"] * length + min(state.get("step", 0), max(0, length - 1))
        stored = state["epoch"] * state.get("epoch_length", length) + state.get("step", 0)
        restore_schedule(self.lr_scheduler, engine.state.iteration, state["lr_scheduler"], path, stored)

    def _restore_best_score(self, state: Mapping[str, Any]) -> None:
        """Take over the score to beat, unless it was measured on other cases and so says nothing of these."""
        cases, plan = self.cases, self.plan
        if cases is not None and plan is not None and differences(state.get("data", {}), cases.record(plan)):
            return
        if self.evaluator is not None:
            self.evaluator.state.best_metric = state["best_metric"]
            self.evaluator.state.best_metric_epoch = state["best_metric_epoch"]

    def _iteration_completed(self, engine: Trainer) -> None:
        if self._is_final:
            # `model.pt` has the final weights of a training that goes on: the best score is of weights that are gone.
            self._is_final = self._has_model = False
            if self.evaluator is not None:
                self.evaluator.state.best_metric, self.evaluator.state.best_metric_epoch = -1, -1
        elif self._best_epoch < 0:
            self._has_model = False  # it was chosen on other cases, and this run now has weights of its own
        self._stop(engine, self._guard.check(engine))

    def _stop(self, engine: Trainer, number: int) -> None:
        if not number or not has_updated(engine):
            return
        if engine.state.rank == 0:
            self._write_state(engine, validated=False)
            logger.info(
                "%s: stopped in epoch %d; %s has the weights of this step, and %s continues from there.",
                signal.Signals(number).name, engine.state.epoch, self.folder / "last_epoch.pt", switch_on("resume"),
            )  # fmt: skip
        if is_distributed():
            dist.barrier()  # the launcher ends all ranks as soon as one has left
        raise SystemExit(128 + number)

    def _epoch_completed(self, engine: Trainer) -> None:
        if engine.state.rank == 0:
            self._write_state(engine, validated=True, with_model=self._best_epoch == engine.state.epoch)

    def _write_state(self, engine: Trainer, *, validated: bool, with_model: bool = False) -> None:
        check_weights(self.network, self.folder)
        best = self.evaluator.state if self.evaluator is not None else None
        scaler = getattr(engine, "scaler", None)
        epoch, step = divmod(engine.state.iteration, int(engine.state.epoch_length or 1))
        state = {
            "epoch": epoch,
            "step": step,
            "epoch_length": int(engine.state.epoch_length or 0),
            "final": self._is_final,
            "trained": list(self.plan.trained) if self.plan is not None else [],
            "trained_images": list(self.plan.trained_images) if self.plan is not None else [],
            "data": self.cases.record(self.plan) if self.cases is not None and self.plan is not None else {},
            "validated": validated or step > 0,  # of the completed epoch
            "model": inner_module(self.network).state_dict(),
            "average": self.average.state_dict(),
            "optimizer": averages_of(self.optimizer),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else {},
            "best_metric": float(best.best_metric) if best is not None else -1.0,
            "best_metric_epoch": int(best.best_metric_epoch) if best is not None else -1,
        }
        # All are on the disk before the first takes its place, which is the state: a training that is killed after it
        # goes on from it, and writes the model again. The plan comes before the weights, which need it.
        files: dict[Path, Any] = {self.folder / "last_epoch.pt": state}
        if with_model:
            files |= {} if self.plan is None else {self.folder / "model.json": self.plan.to_json()}
            # A bare state dictionary, as in the model zoo: `monai.bundle.load` and CheckpointLoader take it as it is.
            files[self.folder / "model.pt"] = inner_module(self.average.network).state_dict()
        # What was tuned for earlier weights does not fit these.
        write_together(files, without=self.folder / "postprocessing.json" if with_model else None)
        self._has_model = self._has_model or with_model
        if self.events is not None:
            self.events.remove_earlier()

    @property
    def _best_epoch(self) -> int:
        """The epoch whose weights a validation of this training chose, -1 for none: a score of NaN chooses nothing."""
        best = self.evaluator.state if self.evaluator is not None else None
        return -1 if best is None or math.isnan(best.best_metric) else int(best.best_metric_epoch)

    def _completed(self, engine: Trainer) -> None:
        if engine.state.rank == 0 and (not self._has_model or (self.keep == "last" and not self._is_final)):
            self._is_final = True
            self._write_state(engine, validated=True, with_model=True)
