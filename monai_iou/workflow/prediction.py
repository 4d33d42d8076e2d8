"""`monai-iou predict`: which models of a run folder, which images, and where their masks go."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai_iou.bundle_files import bundle_path
from monai_iou.datasets.cases import Case, DatasetError
from monai_iou.files import OutputError, check_outputs, prepare
from monai_iou.planning.stored import load_plan
from monai_iou.volumes.names import PREVIEW_ENDING
from monai_iou.workflow.images import find_images, image_cases
from monai_iou.workflow.mask_formats import mask_ending
from monai_iou.workflow.running import run_configs

__all__ = ["Prediction", "Predictions", "TrainedModels", "check_new", "find_models", "plan_predictions", "run_all"]

BESIDE = "mask"  # behind an image's name, where its mask lies beside it


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
            return {"ckpt_dir": str(self.files[0].parent)}
        return {"models": [str(path.parent) for path in self.files]}


@dataclass(frozen=True)
class Prediction:
    """One image and the file that its mask goes to."""

    case: Case
    mask: Path

    @property
    def probabilities(self) -> Path:
        """The file of its probabilities."""
        return self._beside_mask("_probabilities.nii.gz")

    @property
    def preview(self) -> Path:
        """The file of its picture."""
        return self._beside_mask(PREVIEW_ENDING)

    def _beside_mask(self, ending: str) -> Path:
        name = self.mask.name.removesuffix(mask_ending(self.mask.name)).removesuffix(f"_{BESIDE}")
        return self.mask.with_name(name + ending)


@dataclass(frozen=True)
class Predictions:
    """A run of inference: the images whose masks go to one folder in one format."""

    models: TrainedModels
    output: Path
    suffix: str
    ending: str
    items: tuple[Prediction, ...]

    def keys(self, extra: Mapping[str, Any]) -> dict[str, Any]:
        """The bundle's keys of this run."""
        images = [_entry(item.case) for item in self.items]
        named = {"mask_suffix": self.suffix} if self.suffix else {}
        ending = {} if self.ending == ".nii.gz" else {"mask_format": self.ending}
        return {"images": images, **self.models.keys, "output_dir": str(self.output), **named, **ending, **extra}

    def run(self, extra: Mapping[str, Any]) -> None:
        """Write the masks.

        Raises:
            ValueError: an image cannot be segmented.
            OutputError: a mask cannot be written.
        """
        run_configs([self.models.config], self.keys(extra), "inference")


def _entry(case: Case) -> Any:
    """A case as the bundle's key `images` names it, by its files alone where they give its name."""
    item = case.as_item()
    return item["image"] if image_cases([item["image"]])[0].name == case.name else item


def find_models(run: Path, folds: str | None = None) -> TrainedModels:
    """Find the models of a run folder: its own, or those of its folds.

    Args:
        run: what `monai-iou train` or `monai-iou init` wrote, one fold of it, or a folder with `model.pt`.
        folds: "all", or numbers such as "0,2"; None takes all folds of a folder that has no model of its own.

    Raises:
        DatasetError: there are no such models; the message says what to do.
    """
    single = next((path for path in (run / "models" / "model.pt", run / "model.pt") if path.is_file()), None)
    trained = {int(path.parent.parent.name[4:]): path for path in run.glob("fold[0-9]*/models/model.pt")}
    files = [single] if folds is None and single is not None else _chosen(run, trained, folds or "all")
    if not files:
        message = (
            f"Expected {run} to hold a trained model (models/model.pt, or fold0/models/model.pt), but it has none: "
            "train one by `monai-iou train`, or name the folder of its training."
        )
        raise DatasetError(message)
    bundle = next((folder for folder in (run, run.parent) if _config(folder).is_file()), bundle_path())
    return TrainedModels(tuple(files), _config(bundle))


def _config(bundle: Path) -> Path:
    return bundle / "configs" / "inference.json"


def _chosen(run: Path, trained: Mapping[int, Path], folds: str) -> list[Path]:
    if folds == "all":
        return [trained[fold] for fold in sorted(trained)]
    if not re.fullmatch(r"\d+(,\d+)*", folds):
        message = f"Expected `--folds` to be all or numbers of folds, but got {folds!r}: write for instance 0,1,2."
        raise DatasetError(message)
    wanted = [int(fold) for fold in folds.split(",")]
    missing = next((fold for fold in wanted if fold not in trained), None)
    if missing is not None:
        known = ", ".join(map(str, sorted(trained))) or "none"
        message = f"Expected {run} to hold a model of fold {missing}, but it has {known}: train it or leave it out."
        raise DatasetError(message)
    return [trained[fold] for fold in wanted]


def plan_predictions(
    models: TrainedModels, images: Sequence[Path], output: Path | None, ending: str
) -> list[Predictions]:
    """Decide where each mask goes.

    Args:
        models: decide how many channels an image has.
        images: see `find_images`.
        output: folder of the masks, called as the images; None puts each beside its image, with `_mask` behind its
            name.
        ending: of the masks' names, which decides their format; "same" takes the image's, where it can be written.

    Returns:
        A run for each folder and format.

    Raises:
        DatasetError: an image is missing.
        OutputError: a mask would replace an image.
    """
    plan = load_plan(models.files[0].with_suffix(".json"))
    cases = find_images(images, plan.in_channels)
    groups: dict[tuple[Path, str], list[Case]] = {}
    for case in cases:
        folder = output if output is not None else case.image.parent
        wanted = mask_ending(case.image.name) if ending == "same" else ending
        groups.setdefault((folder, wanted), []).append(case)
    suffix = "" if output is not None else BESIDE
    runs = []
    for (folder, wanted), members in groups.items():
        named = [_named(case, beside=output is None) for case in members]
        paths = [folder / f"{case.name}{'_' if suffix else ''}{suffix}{wanted}" for case in named]
        items = tuple(Prediction(case, path) for case, path in zip(named, paths, strict=True))
        runs.append(Predictions(models, folder, suffix, wanted, items))
    _check(runs)
    return runs


def _named(case: Case, *, beside: bool) -> Case:
    """Beside its image a mask needs no folder in its name."""
    return Case(Path(case.name).name, case.image, None, case.channels) if beside else case


def _check(runs: Sequence[Predictions]) -> None:
    images = [path for run in runs for item in run.items for path in item.case.images]
    for run in runs:
        prepare(run.output)
        if run.suffix:
            masks = {f"the mask of {item.case.name}": item.mask for item in run.items}
            check_outputs(masks, {"the images": images})
        else:
            check_outputs({"--output": run.output}, {"the images": images})


def check_new(paths: Iterable[Path]) -> None:
    """Refuse to replace a file: a mask that lies there may be somebody's work.

    Raises:
        OutputError: one is there.
    """
    for path in paths:
        if os.path.lexists(path):
            message = (
                f"Expected no file at {path}, where a result is to be written, but there is one: add --overwrite to "
                "replace it, or name another folder by --output."
            )
            raise OutputError(message)


def run_all(
    runs: Sequence[Predictions], extra: Mapping[str, Any], done: Callable[[Prediction], None] = lambda _: None
) -> None:
    """Run inference for each folder and format, and tell each mask that was written."""
    for run in runs:
        run.run(extra)
        for item in run.items:
            done(item)
