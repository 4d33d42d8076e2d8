"""What `monai-iou train` does before it trains: it locks its folders, copies the bundle, and plans.

Jobs that train one fold each may start at the same moment: one of them copies and plans, and the others wait for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai_iou.bundle_files import copy_bundle
from monai_iou.datasets.cases import DatasetError
from monai_iou.datasets.folder import SegmentationFolder, read_folder
from monai_iou.datasets.found_folders import SPLITS, held_out_twice
from monai_iou.files import OutputError, check_outputs, prepare
from monai_iou.locks import folder_lock
from monai_iou.workflow.config_files import check_configs, read_config
from monai_iou.workflow.inference_keys import INFERENCE, OF_COMMANDS, check_preprocessing
from monai_iou.workflow.literal import literal
from monai_iou.workflow.log_file import close_log
from monai_iou.workflow.loss_override import check_loss
from monai_iou.workflow.plan_of_run import command_report
from monai_iou.workflow.replacement import recover, replaced
from monai_iou.workflow.settings import optional
from monai_iou.workflow.starting_weights import model_file
from monai_iou.workflow.training_runs import PLAN, PLANNING, SHORT, TRAINING, Training, TrainingRun
from monai_iou.workflow.undefined_references import check_inference_references, check_takes_images

__all__ = ["is_run", "plan_request", "prepared"]

OPTIONS = ("minutes", "memory_gb", "device")  # that a command line may leave out


def is_run(folder: Path) -> bool:
    """Whether a folder holds the configs of this package's bundle, complete; other bundles have a train.json too."""
    try:
        return "monai_iou" in (folder / "configs" / "train.json").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


@contextlib.contextmanager
def prepared(
    run: TrainingRun,
    asked: Mapping[str, Any],
    plan: Callable[[Path], None],
    tell: Callable[[str], None],
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> Iterator[None]:
    """Make the run folder or take one that is there, plan, and hold it while the trainings run.

    Args:
        run: the trainings.
        asked: see `plan_request`.
        plan: writes the plan to a file.
        tell: called with a line where the user must wait, or an option has no effect.
        resume: go on with trainings, by whatever plan they have.
        overwrite: replace the trainings; beside `resume`, nothing is replaced.

    Raises:
        OutputError: the folder holds something else, is the dataset's or another run's, or has another plan, or its
            inference prepares images in another way than the training.
        ConfigError: a config in the folder is damaged, or inference.json refers to a key that it does not have, or
            takes no images from a command.
        ValueError: likewise, or the dataset cannot be used; nothing in the folder has changed then.
    """
    check_outputs({"--output": run.folder}, {"the dataset": [run.dataset / "dataset.json", run.dataset]})
    if is_run(run.folder):
        check_configs(run.folder)
    run.check(resume=resume, overwrite=overwrite)
    if overwrite and not resume:
        _check_start(run)
    _check_folds(run, read_folder(run.dataset))
    prepare(run.folder)
    with contextlib.ExitStack() as held, contextlib.ExitStack() as preparing:
        held.callback(close_log)
        lock = folder_lock(run.folder, PLANNING if run.is_job else TRAINING, SHORT, tell)
        (preparing if run.is_job else held).enter_context(lock)
        if not is_run(run.folder):
            copy_bundle(run.folder)
        check_preprocessing(run.trainings[0].configs, run.trainings[0].keys)
        check_loss(run.trainings[0].keys, run.trainings[0].configs)
        check_takes_images(run.folder / "configs" / INFERENCE)
        check_inference_references(run.folder / "configs" / INFERENCE, OF_COMMANDS)
        for folder in run.own_folders:
            prepare(folder)
            held.enter_context(folder_lock(folder, TRAINING))
        recover(run)
        run.check(resume=resume, overwrite=overwrite)  # again, as another command may have ended meanwhile
        if overwrite and not resume:
            held.enter_context(replaced(run))
        if _is_to_be_planned(run, asked, tell, resume=resume, overwrite=overwrite):
            plan(run.folder / PLAN)
            run.check(resume=resume, overwrite=overwrite)  # the plan of a training that has begun may be gone
        preparing.close()
        yield


def _check_start(run: TrainingRun) -> None:
    """Refuse to start from a model that the training replaces: it is put aside before it could be read."""
    start = _start_of(run.trainings[0])
    if start is None:
        return
    path = model_file(start).resolve()
    if any((training.folder / "models").resolve() in path.parents for training in run.trainings):
        message = (
            f"Expected `start_from` to be outside of what --overwrite replaces, but got {start}: choose another folder "
            "with --output, or copy that model, with its model.json, and start from the copy."
        )
        raise OutputError(message)


def _start_of(training: Training) -> str | None:
    """The `start_from` of a training's keys, or else of the last config that has it; None also for an expression."""
    if "start_from" in training.keys:
        start = optional(training.keys["start_from"])
    else:
        given = [read_config(path) for path in training.configs if path.is_file()]
        start = optional(next((each["start_from"] for each in reversed(given) if "start_from" in each), None))
        start = None if str(start).startswith(("$", "@", "%")) else start
    return None if start is None else str(start)


def _check_folds(run: TrainingRun, folder: SegmentationFolder) -> None:
    """Raise DatasetError if folds that are to be scored together hold out a case twice."""
    if run.is_job or len(folder.splits) != run.folds:
        return
    twice = held_out_twice([held_out for _, held_out in folder.splits])
    if twice is not None:
        name, first, second = twice
        message = (
            f"Expected {folder.root / SPLITS} to hold out each case once, as one report joins all folds, but got "
            f"{name} in folds {first} and {second}: correct the file, or train its folds one by one with --fold."
        )
        raise DatasetError(message)


def plan_request(run: TrainingRun, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a plan is made for, to be stored with it.

    Args:
        run: its dataset, folds, and number of trainings, which share `minutes`.
        options: `minutes`, `device` and `memory_gb` of the command line.

    Raises:
        DatasetError: the dataset cannot be used.
    """
    return {
        "dataset": literal(str(run.dataset.resolve())),
        "folds": run.folds,
        "minutes": options["minutes"] and options["minutes"] / len(run.trainings),
        "memory_gb": options["memory_gb"],
        "device": None if options["device"] == "auto" else options["device"],
        "cases": _cases(run.dataset),
    }


def _cases(dataset: Path) -> list[Any]:
    """How many labelled cases a dataset has, and a hash of their names: those of a large one fill a config."""
    names = sorted(case.name for case in read_folder(dataset).labelled)
    return [len(names), hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]]


def _is_to_be_planned(
    run: TrainingRun, asked: Mapping[str, Any], tell: Callable[[str], None], *, resume: bool, overwrite: bool
) -> bool:
    """Whether the plan is to be made, or made again because none of the trainings has begun by it.

    Raises:
        OutputError: a training has begun, and the command asks for another plan.
    """
    path = run.folder / PLAN
    if not path.is_file():
        return True
    started = run.any_started
    before = _stored_request(path, started=started)
    given = [name for name in OPTIONS if asked[name] is not None]
    if before is None:
        if given:
            words = " and ".join(f"--{name.replace('_', '-')}" for name in given)
            tell(f"Note: {path} was made by another command and is kept, without regard to {words}.")
        return False
    before = {"cases": asked["cases"], **before}  # which earlier versions did not note
    # A training resumes on another device too, and the bundle compares its data.
    fixed = [name for name in given if name != "device"] if resume else ["dataset", "folds", *given]
    if resume and run.others_started:
        fixed.append("folds")
    if not resume and not all(training.has_started for training in run.trainings):
        fixed.append("cases")
    different = [name for name in (fixed if started else asked) if asked[name] != before.get(name)]
    if started and different:
        raise OutputError(_refusal(run, before, asked, different, overwrite=overwrite))
    return bool(different)


def _change(name: str, before: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    if name == "folds":
        return f"{_folds(asked[name])} instead of {_folds(before.get(name))}"
    if name == "cases":
        now, then = asked[name][0], before[name][0]
        return f"{now} labelled cases instead of {then}" if now != then else "labelled cases of other names"
    shown = "minutes for each training" if name == "minutes" else name
    return f"{shown} {asked[name]} instead of {before.get(name)}"


def _folds(count: int | None) -> str:
    return "a single training" if count is None else f"{count} folds"


def _refusal(
    run: TrainingRun,
    before: Mapping[str, Any],
    asked: Mapping[str, Any],
    different: Sequence[str],
    *,
    overwrite: bool,
) -> str:
    remedies = []
    if "folds" in different:
        remedies.append(f"leave --folds {'out' if before.get('folds') is None else 'at ' + str(before['folds'])}")
    if {*OPTIONS} & {*different}:
        remedies += ["leave the option out", "train longer with --epochs"]
    if "cases" in different:
        remedies.append("restore the earlier cases")
    if {"cases", "dataset"} & {*different} and {*different} <= {"cases", "dataset", "device"} and not overwrite:
        remedies.append("use this dataset nevertheless with --resume")
    if run.is_job:
        remedies.append("replace all folds with --overwrite without --fold")
    elif overwrite:  # what is left are not this command's trainings
        remedies.append(f"remove the other trainings in {run.folder}")
    else:
        remedies.append("replace all trainings there with --overwrite")
    return (
        f"Expected the plan {run.folder / PLAN}, which a training there follows, to be what is asked for, but got "
        f"{'; '.join(_change(name, before, asked) for name in different)}: {', '.join(remedies)}, or choose another "
        "folder with --output."
    )


def _stored_request(path: Path, *, started: bool) -> dict[str, Any] | None:
    """What a plan was made for, the device as it was found if one has trained there; None for a plan of the user's."""
    report = command_report(path)
    if report is None:
        return None
    return {**report["asked"], **({"device": report.get("device")} if started else {})}
