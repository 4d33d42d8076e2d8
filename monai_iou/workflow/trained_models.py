"""The models of a run's folder: its own, or those of its folds, and which of these are complete."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai_iou.bundle_files import bundle_path
from monai_iou.datasets.cases import DatasetError
from monai_iou.workflow.run_state import MODEL, RunState, can_go_on, folds_in

__all__ = ["ASIDE", "COMPLETE", "TrainedModels", "ensemble", "find_models", "fold_notes", "is_unfinished", "why_none"]

ASIDE = ".monai_iou-replaced"  # in a training's folder: the earlier results, until `--overwrite` has a new model
COMPLETE = "complete.json"  # in it, once everything is set aside: the folders of the trainings that are replaced


@dataclass(frozen=True)
class TrainedModels:
    """The models of a run folder.

    Attributes:
        files: a `model.pt` for each model.
        config: the bundle's inference.json.
    """

    files: tuple[Path, ...]
    config: Path

    @property
    def keys(self) -> dict[str, Any]:
        """The keys that tell the bundle of the models."""
        if len(self.files) == 1:
            return {"ckpt_dir": str(self.files[0].parent), "models": None}
        return {"models": [str(path.parent) for path in self.files]}


def find_models(run: Path, folds: str | None = None) -> TrainedModels:
    """Find the models of a run folder: its own, or those of its folds.

    Args:
        run: what `monai-iou train` or `monai-iou init` wrote, one fold of it, or a folder with `model.pt`.
        folds: "all", or numbers such as "0,2"; None takes all folds of a folder that has no model of its own. Of all
            folds, those that are not trained to the end are left out, unless there are no others.

    Raises:
        DatasetError: there are no such models, or `folds` are asked of a single training; the message says what to do.
    """
    single, trained = _single(run), _of_folds(run)
    if folds is not None and single is not None and not trained:
        message = (
            f"Expected {run} to hold the models of folds for `--folds`, but it has a single model, {single}: leave "
            "--folds out."
        )
        raise DatasetError(message)
    files = [single] if folds is None and single is not None else _chosen(run, trained, folds or "all")
    if not files:
        none = "it has none", "train one by `monai-iou train`, or name the folder of its training"
        why, remedy = why_none(run, *none)
        message = (
            f"Expected {run} to hold a trained model (models/model.pt, or fold0/models/model.pt), but {why}: {remedy}."
        )
        raise DatasetError(message)
    bundle = next((folder for folder in (run, run.parent) if _config(folder).is_file()), bundle_path())
    return TrainedModels(tuple(files), _config(bundle))


def why_none(path: Path, why: str, remedy: str) -> tuple[str, str]:
    """Return why there is no model, and the remedy: a command that was killed may have set it aside.

    Args:
        path: of the model, or of the folder of its training or run.
        why: the reason where none was set aside.
        remedy: likewise.
    """
    folders = (path, *path.parents[:3], *folds_in(path))  # RUN/fold0/models/model.pt is the longest
    aside = next((folder / ASIDE for folder in folders if (folder / ASIDE).is_dir()), None)
    if aside is None:
        return why, remedy
    result = "goes on with the new training" if _has_begun(aside) else "puts them back"
    return (
        f"--overwrite has set the earlier results aside in {aside}, and is running or was interrupted",
        f"if it was interrupted, the same `monai-iou train` command without --overwrite {result}",
    )


def _has_begun(aside: Path) -> bool:
    """Whether a training that replaces what was set aside has a checkpoint, with which the earlier results go."""
    try:
        names = json.loads((aside / COMPLETE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    run = aside.parent if any((aside.parent / name).is_dir() for name in names) else aside.parent.parent
    return any(can_go_on(run / name) for name in names)


def ensemble(folders: Iterable[Path]) -> dict[str, list[str]]:
    """Return the models of those folds that are trained to the end, as a config that inference takes after its own."""
    trained = [path for path in folders if (path / "models" / MODEL).is_file() and not is_unfinished(path)]
    return {"models": [f"$@bundle_root + '/{path.name}/models'" for path in trained]}


def is_unfinished(training: Path) -> bool:
    """Return whether a training's folder says that it is not trained to the end."""
    state = RunState.read(training)
    return state is not None and "trained" not in state.done


def fold_notes(run: Path, folds: str | None = None) -> list[str]:
    """Say which models a prediction lacks, and which it has although they are not trained to the end.

    Of folds that were chosen, say that they are not all: in `monai-iou train --folds 2`, the number is that of all.

    Args:
        run: its folder.
        folds: as for `find_models`.
    """
    trained, single = _of_folds(run), _single(run)
    if folds is None and single is not None:
        folder = single.parents[1] if single.parent.name == "models" else single.parent
        notes = [f"Note: the model in {run} is not trained to the end."] if is_unfinished(folder) else []
        if trained:
            numbers = ", ".join(map(str, sorted(trained)))
            notes.append(
                f"Note: {run} has a model of its own, {single}, which alone is used, and models of folds ({numbers}): "
                "to use these, add --folds all."
            )
        return notes
    states = [RunState.read(path.parents[1]) for path in trained.values()]
    asked = [state.request.get("folds") or 0 for state in states if state is not None]
    count = max([len(trained), *asked])
    unfinished = {fold for fold, path in trained.items() if is_unfinished(path.parents[1])}
    if folds in (None, "all"):
        told = "is used, as no fold is" if len(unfinished) == len(trained) else "is left out, because it is not"
        notes = [f"Note: the model of fold {fold} in {run} {told} trained to the end." for fold in sorted(unfinished)]
        missing = [fold for fold in range(count) if fold not in trained] if trained else []
        return [*notes, *(f"Note: fold {fold} of the {count} in {run} has no model yet." for fold in missing)]
    chosen = [*dict.fromkeys(int(fold) for fold in str(folds).split(","))]
    notes = [
        f"Note: the model of fold {fold} in {run} is used although it is not trained to the end."
        for fold in chosen
        if fold in unfinished
    ]
    return [*_note_of_chosen(run, chosen, count), *notes]


def _note_of_chosen(run: Path, chosen: Sequence[int], count: int) -> list[str]:
    if len(chosen) >= count:
        return []
    numbers = ", ".join(map(str, chosen))
    used = f"model of fold {numbers} alone is" if len(chosen) == 1 else f"models of folds {numbers} alone are"
    return [f"Note: of the {count} folds in {run}, the {used} used; to use all, leave --folds out."]


def _single(run: Path) -> Path | None:
    """The model of a run without folds."""
    return next((path for path in (run / "models" / MODEL, run / MODEL) if path.is_file()), None)


def _of_folds(run: Path) -> dict[int, Path]:
    """The model of each fold that has one."""
    found = {int(path.name.removeprefix("fold")): path / "models" / MODEL for path in folds_in(run)}
    return {fold: path for fold, path in found.items() if path.is_file()}


def _config(bundle: Path) -> Path:
    return bundle / "configs" / "inference.json"


def _chosen(run: Path, trained: Mapping[int, Path], folds: str) -> list[Path]:
    if folds == "all":
        complete = [fold for fold, path in trained.items() if not is_unfinished(path.parents[1])]
        return [trained[fold] for fold in sorted(complete or trained)]
    if not re.fullmatch(r"\d+(,\d+)*", folds):
        message = f"Expected `--folds` to be all or numbers of folds, but got {folds!r}: write for instance 0,1,2."
        raise DatasetError(message)
    wanted = [*dict.fromkeys(int(fold) for fold in folds.split(","))]
    missing = next((fold for fold in wanted if fold not in trained), None)
    if missing is not None:
        known = ", ".join(map(str, sorted(trained))) or "none"
        why, remedy = why_none(run / f"fold{missing}", f"it has {known}", "train it or leave it out")
        message = f"Expected {run} to hold a model of fold {missing}, but {why}: {remedy}."
        raise DatasetError(message)
    return [trained[fold] for fold in wanted]
