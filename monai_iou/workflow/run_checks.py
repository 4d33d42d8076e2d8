"""What `monai-iou train` refuses of a folder that holds trainings, before anything in it changes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from monai_iou.files import OutputError
from monai_iou.workflow.run_state import FILES, LAST_EPOCH, RunState

__all__ = ["check_nothing_is_replaced", "check_one_plan"]


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


def check_nothing_is_replaced(trainings: Iterable[_Training], *, is_finished: bool) -> None:
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


def check_one_plan(trainings: Sequence[_Training], others: Iterable[Path]) -> None:
    """Refuse a fold whose train.json or plan.json is not what the folds of other commands follow: one report joins all.

    Args:
        trainings: of this command.
        others: folders of the other folds.

    Raises:
        OutputError: one of the two was edited since another fold's training began.
    """
    files = {name: value for name, value in trainings[0].asked.items() if name in FILES}
    for folder in others:
        state = RunState.read(folder)
        different = state.differences({**state.request, **files}) if state is not None else []
        if different and (folder / "models" / LAST_EPOCH).is_file():
            message = (
                f"Expected all folds in {folder.parent} to follow one train.json and one plan.json, but got others "
                f"than those of {folder.name} ({'; '.join(different)}): write the earlier values into train.json and "
                "plan.json, choose another folder with --output, or use these nevertheless with --resume."
            )
            raise OutputError(message)
