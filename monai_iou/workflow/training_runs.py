"""`monai-iou train`: one training, or the folds of a cross-validation, each stage done once and resumed where it ended.

A training's folder gets its models, its log and curves, and the masks and scores of the cases that it held out. Of a
cross-validation, the masks of all folds are scored together: every case once, by a model that has not seen it.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from monai_iou.evaluation.evaluate import evaluate_folders
from monai_iou.evaluation.request import Progress
from monai_iou.evaluation.results import Evaluation
from monai_iou.files import write_json
from monai_iou.locks import folder_lock
from monai_iou.workflow.held_out import (
    failure_notes,
    has_scores,
    held_out_facts,
    left_out_notes,
    remove_scores,
    report_failures,
    score_request,
    scored_cases,
    seen_before,
    seen_notes,
    tell_removed,
    to_stderr,
    write_summaries,
)
from monai_iou.workflow.inference_keys import check_written, inference_identity, keys_for_masks, of_training
from monai_iou.workflow.joint_report import why_no_report
from monai_iou.workflow.loss_override import with_whole_loss
from monai_iou.workflow.run_checks import check_none_replaced, check_one_kind, check_one_plan, others_in, unlike_notes
from monai_iou.workflow.run_state import (
    RunState,
    begin_masks,
    file_keys,
    has_checkpoint,
    has_masks,
    mask_files,
    model_identity,
    no_longer_held_out,
)
from monai_iou.workflow.run_summary import has_scored_page
from monai_iou.workflow.running import run_configs
from monai_iou.workflow.trained_models import ensemble, find_models

__all__ = ["Training", "TrainingRun"]

Tell = Callable[[str], None]

PLAN = "configs/plan.json"
ENSEMBLE = "configs/ensemble.json"
SCORES = "validation"
STAGES = ("trained", "predicted")
# What holds a run's folder. Jobs that train one fold each do not while they train; the rest they do one after another.
TRAINING, PLANNING, PREDICTING, SCORING = "training", "planning", "prediction", "scoring"
SHORT = (PLANNING, PREDICTING, SCORING)


@dataclass(frozen=True)
class Training:
    """One training: its folder, and the bundle's keys of it.

    Attributes:
        folder: of its results.
        configs: the bundle's configs, later ones over earlier ones.
        keys: over them.
        request: what was asked for, by which a later start knows it again.
        about: command line and versions.
    """

    folder: Path
    configs: tuple[Path, ...]
    keys: Mapping[str, Any]
    request: Mapping[str, Any]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bundle_keys(self) -> dict[str, Any]:
        """The keys of the run as it is to be started now."""
        places = {"ckpt_dir": str(self.folder / "models"), "output_dir": str(self.folder)}
        resumes = (self.folder / "models" / "last_epoch.pt").is_file() or self.keys.get("overwrite", False)
        resume = {"resume": True} if resumes else {}
        return {**with_whole_loss(self.keys, self.configs), **places, **resume}

    @property
    def asked(self) -> dict[str, Any]:
        """The request, with what train.json and plan.json of the run say now."""
        return {**self.request, **file_keys(self.configs[:2])}

    @property
    def has_started(self) -> bool:
        """Whether the folder holds a training."""
        return has_checkpoint(self.folder)

    @cached_property
    def state(self) -> RunState:
        """What is done of it."""
        return RunState.read(self.folder) or RunState(self.folder, dict(self.request), about=dict(self.about))

    def read_again(self) -> None:
        """Forget the state, which another command may have changed."""
        self.__dict__.pop("state", None)

    def is_done(self, stage: str) -> bool:
        """Whether a stage is complete, of this very request."""
        return stage in self.state.done and not self.state.differences(self.asked)

    def is_predicted(self, masks: Path) -> bool:
        """Whether the masks of the cases that were held out are done, and still there."""
        now = inference_identity(self.configs)
        is_same = self.state.facts.get("inference", now) == now
        return self.is_done("predicted") and is_same and has_masks(self.state, masks)

    def train(self) -> None:
        """Train, or go on with it, and note which cases it held out."""
        if self.is_done("trained"):
            return
        if self.state.differences(self.asked):  # resumed with other keys: what came after is to be done again
            self.state.done = []
        self.state.request, self.state.about = self.asked, dict(self.about)
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.state.written_for_training():
            workflow = run_configs(self.configs, self.bundle_keys)
        cases, plan, keys = (workflow.parser.get_parsed_content(name) for name in ("cases", "plan", "settings"))
        seen = seen_before(cases, plan, self.folder / "models" / "model.json") if keys.validates else []
        facts = held_out_facts(cases, keys, seen, workflow.parser.get_parsed_content("keep_weights", default="best"))
        facts["earlier"] = no_longer_held_out(self.state, facts["held_out"])
        self.state.finish("trained", **facts, labels=list(plan.label_values[1:]))
        del workflow, cases
        gc.collect()

    def predict(self, masks: Path) -> None:
        """Write the masks of the cases that were held out; masks of another model or config, and scores, go before."""
        if self.is_predicted(masks):
            return
        made_by = {"inference": inference_identity(self.configs), "model": model_identity(self.folder)}
        remove_scores(masks.parent)
        if left := begin_masks(self.state, masks, made_by):
            config = self.configs[0].with_name("inference.json")
            keys = keys_for_masks(config, left, masks, find_models(self.folder).keys, self.configs, self.keys)
            run_configs([config], keys, "inference")
            check_written(config, mask_files(self.state, masks))
        self.state.finish("predicted", **made_by)
        gc.collect()


@dataclass(frozen=True)
class TrainingRun:
    """All trainings of a command.

    Attributes:
        folder: of the run.
        dataset: the dataset's folder.
        trainings: those that this command does.
        folds: number of folds, None for a single training.
    """

    folder: Path
    dataset: Path
    trainings: tuple[Training, ...]
    folds: int | None = None

    @property
    def fold_folders(self) -> list[Path]:
        """The folders of all folds, also of those that another command trains."""
        return [self.folder / f"fold{fold}" for fold in range(self.folds or 0)]

    @property
    def is_job(self) -> bool:
        """Whether this command trains some of the folds, and other commands the others, perhaps now."""
        return self.folds is not None and len(self.trainings) < self.folds

    @property
    def own_folders(self) -> list[Path]:
        """The folders of the trainings, where these are not the run's folder itself."""
        return [training.folder for training in self.trainings if training.folder != self.folder]

    @property
    def others_started(self) -> bool:
        """Whether the run's folder holds trainings, stopped or running, that are not of this command."""
        return bool(others_in(self.folder, self.trainings))

    @property
    def any_started(self) -> bool:
        """Whether the run's folder holds a training, of this command or of another."""
        return self.others_started or any(training.has_started for training in self.trainings)

    @property
    def is_finished(self) -> bool:
        """Whether everything that the command asks for is done."""
        done = all(training.is_done("trained") and training.is_predicted(self.masks) for training in self.trainings)
        return done and has_scores(self.masks.parent) and all(map(has_scored_page, self.fold_folders or [self.folder]))

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Refuse to replace a training; nothing is changed.

        An unfinished run that is started again by the same command goes on. To `resume` and to `overwrite` means to
        continue, even if the data have changed.

        Raises:
            OutputError: the folder holds a finished training, or one that asked for something else or has another plan;
                or a single training beside folds.
        """
        for training in self.trainings:
            training.read_again()
        check_one_kind(self.folder, self.folds, self.trainings)
        if resume:
            for training in self.trainings if overwrite else ():
                training.state.done = []
            return
        if not overwrite:
            check_none_replaced(self.trainings, is_finished=self.is_finished)
        if self.is_job:
            check_one_plan(self.trainings, self.fold_folders, overwrite=overwrite)

    def run(self, tell: Tell, progress: Callable[[Progress], None], warn: Tell = to_stderr) -> Evaluation | None:
        """Do what is not done yet; the caller holds the folders.

        Args:
            tell: called with a line before each stage.
            progress: called after each case that is scored.
            warn: called with a line for what is left out, or could not be made.

        Returns:
            The scores over all held-out cases, None if some are still to be trained elsewhere or none is held out.
        """
        failed: dict[Path, str] = {}
        had_scores = has_scores(self.folder / SCORES)
        for number, training in enumerate(self.trainings, start=1):
            if training.is_done("trained") and training.is_predicted(self.masks):
                tell(f"Done before: {training.folder}")
                continue
            tell(f"Training {number} of {len(self.trainings)}: {training.folder}")
            training.train()
            for note in (*left_out_notes([training.state]), *seen_notes([training.state])):
                warn(note)
            with self._turn(PREDICTING, tell):
                failed |= self._predict(training, tell)
        with self._turn(SCORING, tell):
            if self.folds:
                write_json(self.folder / ENSEMBLE, ensemble(self.fold_folders))
            scores = self._score(tell, progress, failed)
            everyone = self.fold_folders if scores is not None else []
            write_summaries(everyone or [training.folder for training in self.trainings], scores)
        tell_removed(self.folder / SCORES, had_scores, warn)
        report_failures(failed, scores, warn)
        return scores

    def _predict(self, training: Training, tell: Tell) -> dict[Path, str]:
        """Write the masks of a training; its folder and the reason if not all could be made, which may take memory."""
        try:
            training.predict(self.masks)
        except (ValueError, RuntimeError, OSError) as error:  # which end the command in one sentence
            failed = {training.folder: of_training(str(error))}
        else:
            return {}
        gc.collect()  # what the traceback held
        tell(*failure_notes(failed, self.dataset))
        return failed

    def _turn(self, purpose: str, tell: Tell) -> contextlib.AbstractContextManager[None]:
        """Hold the run's folder while a job writes what all folds share."""
        # A command that is to train all folds ends soon, because this fold is in use.
        return folder_lock(self.folder, purpose, (*SHORT, TRAINING), tell) if self.is_job else contextlib.nullcontext()

    @property
    def masks(self) -> Path:
        """Folder of the masks of all held-out cases."""
        return self.folder / SCORES / "masks"

    def _score(self, tell: Tell, progress: Callable[[Progress], None], failed: Mapping[Path, str]) -> Evaluation | None:
        folders = self.fold_folders or [self.folder]
        states = [RunState.read(path) for path in folders]
        # The cases without a mask are failures of the report; a fold that is a job of its own is to be started again.
        without = [] if self.is_job else [number for number, path in enumerate(folders) if path in failed]
        if self.folds and (reason := why_no_report(states, self.masks, without)):
            remove_scores(self.folder / SCORES)
            tell(reason)
            return None
        known = [state for state in states if state is not None]
        masks = [path for state in known for path in mask_files(state, self.masks)]
        notes = left_out_notes(known)
        if not any(path.is_file() for path in masks):
            if notes and not masks:
                tell(f"There is no report in {self.folder / SCORES}: all held-out cases were trained on before.")
            remove_scores(self.folder / SCORES)
            return None
        tell(f"Scoring the {scored_cases(known)}")
        notes += [*unlike_notes(known), *seen_notes(known), *failure_notes(failed, self.dataset)]
        request = score_request(self.dataset, self.trainings[0].folder, self.masks, self.folder / SCORES, known)
        return evaluate_folders(request, progress, notes=notes)
