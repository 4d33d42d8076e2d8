"""`--overwrite` of `monai-iou train`: earlier results are set aside, and removed only once there are new ones.

A training that ends before its first checkpoint, because its data or keys are wrong or the memory is full, gives them
back.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from monai_iou.files import OutputError, write_json
from monai_iou.locks import folder_lock
from monai_iou.workflow.extra_files import UNREADABLE
from monai_iou.workflow.plan_of_run import command_report
from monai_iou.workflow.run_state import STATE_NAME, RunState, can_go_on, mask_files
from monai_iou.workflow.trained_models import ASIDE, COMPLETE
from monai_iou.workflow.training_runs import ENSEMBLE, PLAN, SCORES, TrainingRun

__all__ = ["recover", "replaced"]

LOG = "log.txt"
# What a training writes into its folder.
WRITTEN = (
    "models", "tensorboard", "pictures", STATE_NAME, "config.json", LOG, "epochs.csv", UNREADABLE,
    "progress.png", "summary.html",
)  # fmt: skip


@contextlib.contextmanager
def replaced(run: TrainingRun) -> Iterator[None]:
    """Set aside what a run is to replace: of a single fold, its own results and masks, and the report of all folds.

    The plan is among it unless another training in the folder follows it, or it is the user's own. The caller holds
    the run's folders.

    Raises:
        OutputError: a training that this command did not start is using one of the models' folders, or the
            results cannot be set aside, or are a link to a folder elsewhere.
    """
    for models in (training.folder / "models" for training in run.trainings):
        if models.is_dir():
            with folder_lock(models, "replacement"):
                pass
    _check_links([*_results(run), *_scores(run), run.masks])
    aside = _aside(run)
    if os.path.lexists(aside):
        message = (
            f"Expected {aside} not to exist, but it holds results of an earlier --overwrite that could not be put "
            "back: move them to another place."
        )
        raise OutputError(message)
    try:
        _set_aside(run, aside)
        yield
    finally:
        _recover(run, aside)


def recover(run: TrainingRun) -> None:
    """Undo or complete the replacements of commands that were killed, in the folders of the run and its trainings.

    If the new trainings have a checkpoint, what was set aside is removed; otherwise it is put back. The caller holds
    the run's folders.
    """
    for folder in dict.fromkeys((run.folder, *run.own_folders)):
        _recover(run, folder / ASIDE)


def _check_links(paths: Iterable[Path]) -> None:
    """Refuse to put a folder in the place of a link, whose disk may have been chosen for its room."""
    for path in paths:
        if path.is_symlink() and not path.is_file():
            message = (
                f"Expected {path} to be a folder that --overwrite can replace, but got a link to {path.readlink()}: "
                "move that folder to the place of the link, or choose another folder with --output, such as one on "
                "the disk to which the link leads."
            )
            raise OutputError(message)


def _set_aside(run: TrainingRun, aside: Path) -> None:
    path = run.folder
    try:
        aside.mkdir()
        for path in [*_results(run), *_scores(run)]:
            target = aside / path.relative_to(run.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
    except OSError as error:  # such as a fold's folder that is a link to another file system
        message = (
            f"Expected to set {path} aside in {aside}, but got the error '{error.strerror}', and everything is where "
            "it was: choose another folder with --output, or remove the earlier results yourself."
        )
        raise OutputError(message) from error
    write_json(aside / COMPLETE, [str(training.folder.relative_to(run.folder)) for training in run.trainings])


def _recover(run: TrainingRun, aside: Path) -> None:
    if not aside.is_dir():
        return
    complete = aside / COMPLETE
    if complete.is_file():
        folders = [run.folder / name for name in json.loads(complete.read_text(encoding="utf-8"))]
        earlier = replace(run, trainings=tuple(replace(run.trainings[0], folder=folder) for folder in folders))
        if any(map(can_go_on, folders)):  # else there is nothing, or what a broken first checkpoint left
            with contextlib.suppress(OSError):  # the next command tries again
                for path in aside.iterdir():
                    if path != complete:  # it goes last, so that the next command knows that the rest is to go
                        _remove(path)
                shutil.rmtree(aside)
        else:
            _put_all_back(earlier, aside)
    else:  # the command was killed while it set the results aside, or put them back: nothing is new
        _put_back(aside, run.folder)


def _put_all_back(run: TrainingRun, aside: Path) -> None:
    logs = _logs(run)
    for path in _results(run):
        _remove(path)
    (aside / COMPLETE).unlink()  # from here on, the results in the folder are the earlier ones
    _put_back(aside, run.folder)
    for path, text in logs.items():  # a traceback that the user was told of
        # On a full disk, the error that ended the training is the one to tell.
        with contextlib.suppress(OSError), path.open("a", encoding="utf-8") as stream:
            stream.write(text)
    shutil.rmtree(aside, ignore_errors=True)


def _aside(run: TrainingRun) -> Path:
    return (run.trainings[0].folder if run.is_job else run.folder) / ASIDE


def _results(run: TrainingRun) -> list[Path]:
    """The files and folders that a run's trainings have written, and what they follow and others do not."""
    places = [training.folder / name for training in run.trainings for name in WRITTEN]
    keeps_plan = run.others_started or command_report(run.folder / PLAN) is None
    shared = [ENSEMBLE] if keeps_plan else [ENSEMBLE, PLAN]
    return [path for path in (*places, *(run.folder / name for name in shared)) if os.path.lexists(path)]


def _scores(run: TrainingRun) -> list[Path]:
    """The masks of the cases that the run held out, and all that was computed of the masks."""
    scores = run.folder / SCORES
    if not run.is_job:
        return [scores] if os.path.lexists(scores) else []
    states = [RunState.read(training.folder) for training in run.trainings]
    masks = [path for state in states if state is not None for path in mask_files(state, run.masks)]
    others = [path for path in scores.glob("*") if path != run.masks]
    return [path for path in (*masks, *others) if os.path.lexists(path)]


def _logs(run: TrainingRun) -> dict[Path, str]:
    paths = [training.folder / LOG for training in run.trainings]
    return {path: path.read_text(encoding="utf-8", errors="replace") for path in paths if path.is_file()}


def _put_back(aside: Path, folder: Path) -> None:
    """Move what lies in a folder to where it was, except where a job beside this one has written anew."""
    for path in list(aside.iterdir()):
        target = folder / path.name
        if not os.path.lexists(target):
            path.rename(target)
        elif target.is_dir() and path.is_dir() and not path.is_symlink():
            _put_back(path, target)
    with contextlib.suppress(OSError):  # what has no place stays
        aside.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
