"""What `monai-iou train` refuses of a folder that holds trainings, before anything in it changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from monai_iou.files import OutputError
from monai_iou.locks import is_locked
from monai_iou.planning.timing import TIMED_KEYS
from monai_iou.workflow.run_state import CONTENT, FILES, LAST_EPOCH, RunState, folds_in, has_checkpoint

__all__ = ["check_none_replaced", "check_one_kind", "check_one_plan", "others_in", "unlike_notes"]

# Keys by which the folds of one report may differ: where and how fast each is trained, and its random numbers.
FREE = (
    "device", "num_workers", "cache_rate", "cache_workers", "cache_dir", "transform_device", "memory_format",
    *TIMED_KEYS, "pictures", "calibration", "seed", "overwrite",
)  # fmt: skip


class _Training(Protocol):
    """What the checks read of a `monai_iou.workflow.training_runs.Training`."""

    @property
    def folder(self) -> Path: ...
    @property
    def asked(self) -> dict[str, Any]: ...
    @property
    def has_started(self) -> bool: ...
    @property
    def state(self) -> RunState: ...


def others_in(folder: Path, trainings: Iterable[_Training]) -> list[Path]:
    """Return the folders of the trainings in a run's folder, stopped or running, that are not among a command's own."""
    own = [training.folder for training in trainings]
    others = [path for path in (folder, *folds_in(folder)) if path not in own]
    return [path for path in others if has_checkpoint(path) or (path != folder and is_locked(path))]


def check_one_kind(folder: Path, folds: int | None, trainings: Iterable[_Training]) -> None:
    """Refuse a single training beside folds, and folds beside a single training, whose masks and report they replace.

    Args:
        folder: of the run.
        folds: number of folds that the command asks for, None for a single training.
        trainings: of the command.

    Raises:
        OutputError: the folder holds trainings of the other kind.
    """
    others = others_in(folder, trainings)
    of_folds = [path for path in others if path != folder]
    if (folds is None and not of_folds) or (folds is not None and folder not in others):
        return
    if has_checkpoint(folder) and any(has_checkpoint(path) for path in folds_in(folder)):
        got, remedy = "both", f"move one of them, together with {folder / 'validation'}, to another place"
    elif folds is None:
        count = _fold_count(of_folds)
        got, remedy = f"a single training instead of {count} folds", f"give --folds {count} as before"
    else:
        got, remedy = f"{folds} folds instead of a single training", "leave --folds out"
    message = (
        f"Expected {folder} to hold either a single training or the folds of a cross-validation, but got {got}: "
        f"{remedy}, or choose another folder with --output."
    )
    raise OutputError(message)


def _fold_count(folders: Sequence[Path]) -> int:
    """The number of folds that their commands asked for, as far as it was noted."""
    states = [RunState.read(path) for path in folders]
    noted = [state.request.get("folds") or 0 for state in states if state is not None]
    return max([2, *noted, *(int(path.name.removeprefix("fold")) + 1 for path in folders)])


def check_none_replaced(trainings: Iterable[_Training], *, is_finished: bool) -> None:
    """Refuse a finished training, and one that asked for something else.

    Args:
        trainings: of a run.
        is_finished: whether the run is.

    Raises:
        OutputError: the run's folder holds one; the message names what differs.
    """
    for training in trainings:
        if not training.has_started:
            continue
        different = training.state.differences(training.asked)
        known = RunState.read(training.folder) is not None
        if not known or different or is_finished:
            why = f" ({'; '.join(different)})" if known and different else ""
            message = (
                f"Expected {training.folder} to be without a training, but it has one{why}: continue it with "
                "--resume, replace it with --overwrite, or choose another folder with --output."
            )
            raise OutputError(message)


def check_one_plan(trainings: Sequence[_Training], folders: Iterable[Path], *, overwrite: bool) -> None:
    """Refuse a fold that is not trained as those of other commands are: one report joins all.

    A fold that has begun with options of its own goes on, one that is replaced may get others, as where jobs replace
    all folds one after the other; the report says how folds differ.

    Args:
        trainings: of this command.
        folders: of all folds.
        overwrite: whether the command begins its trainings anew.

    Raises:
        OutputError: train.json or plan.json was edited since another fold's training began, or that has other options.
    """
    own, asked = [training.folder for training in trainings], trainings[0].asked
    is_new = not overwrite and not trainings[0].has_started
    for folder in folders:
        state = None if folder in own else RunState.read(folder)
        if state is None or not (folder / "models" / LAST_EPOCH).is_file():
            continue
        if different := _differences_of_files(state, asked):
            message = (
                f"Expected all folds in {folder.parent} to follow one train.json and one plan.json, but got others "
                f"than those of {folder.name} ({'; '.join(different)}): write the earlier values into train.json and "
                "plan.json, choose another folder with --output, or use these nevertheless with --resume."
            )
            raise OutputError(message)
        if is_new and (different := _differences_of_keys(state.request, asked)):
            message = (
                f"Expected all folds in {folder.parent} to be trained with the same options and configs, but got "
                f"others than those of {folder.name} ({'; '.join(different)}): give those of {folder.name}, choose "
                "another folder with --output, or use these nevertheless with --resume."
            )
            raise OutputError(message)


def unlike_notes(states: Sequence[RunState]) -> list[str]:
    """Say which folds of one report were not trained as the first one was.

    >>> first, second = (RunState(Path(f"fold{fold}"), {"keys": {"epochs": 2 + fold}}) for fold in (0, 1))
    >>> unlike_notes([first, second])
    ['Not trained alike: fold1 differs from fold0 (epochs was 2 and is 3).']
    """
    notes = []
    for state in states[1:]:
        first, request = states[0], state.request
        different = [*_differences_of_files(first, request), *_differences_of_keys(first.request, request)]
        if different:
            names = f"{state.folder.name} differs from {first.folder.name}"
            notes.append(f"Not trained alike: {names} ({'; '.join(different)}).")
    return notes


def _differences_of_files(state: RunState, request: Mapping[str, Any]) -> list[str]:
    files = {name: value for name, value in request.items() if name in FILES}
    return state.differences({**state.request, **files})


def _differences_of_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say what two requests have of keys that decide what becomes of a training, wherever they were given."""
    places = ("keys",) if any(CONTENT not in each for each in (before, now)) else (CONTENT, "keys")

    def keys(request: Mapping[str, Any]) -> dict[str, Any]:
        given = {name: value for place in places for name, value in request.get(place, {}).items()}
        spelt = {name.replace("::", "#"): value for name, value in given.items()}
        return {name: value for name, value in spelt.items() if not _is_free(name.lstrip("+~"))}

    return RunState(Path(), {"keys": keys(before)}).differences({"keys": keys(now)})


def _is_free(name: str) -> bool:
    return name in FREE or name.partition("#")[0] in FREE
