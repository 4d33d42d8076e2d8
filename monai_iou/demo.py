"""The demo: generate volumes, then train, evaluate and predict with the shipped bundle by MONAI's own workflows."""

from __future__ import annotations

import os
import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai_iou.bundle_files import copy_bundle
from monai_iou.datasets.phantoms import write_phantom_dataset
from monai_iou.evaluation.evaluate import evaluate_folders
from monai_iou.evaluation.request import Request
from monai_iou.files import prepare
from monai_iou.locks import folder_lock
from monai_iou.workflow.literal import with_literal_paths
from monai_iou.workflow.run_lock import release_unused

__all__ = ["DEMO_SETTINGS", "CaseScore", "DemoResult", "run_demo", "run_workflow"]

MARKER = ".monai-iou-demo"
WRITTEN = ("dataset", "bundle", "masks", "report")  # into the folder
PURPOSE = "a demo"
OF_WINDOWS = ("desktop.ini", "Thumbs.db")  # which file managers put into folders, as others do with hidden files

# Sized for two minutes on two cores; a GPU run would take the bundle's defaults.
DEMO_SETTINGS: dict[str, Any] = {
    "patch_size": [48, 48, 32],
    "epochs": 100,
    "val_interval": 25,
    "batch_size": 2,
    "num_samples": 2,
    "seed": 0,
}


@dataclass(frozen=True)
class CaseScore:
    """IoU and Dice of one held-out volume, for the trained and for the untrained network."""

    case: str
    iou: float
    dice: float
    untrained_iou: float
    untrained_dice: float


@dataclass(frozen=True)
class DemoResult:
    """The demo's results.

    Attributes:
        scores: of the held-out volumes.
        masks: folder of their masks.
        report: page of their scores.
        curves: picture of the training's curves.
        command: line that does the same training.
        seconds: that it all took.
    """

    scores: tuple[CaseScore, ...]
    masks: Path
    report: Path
    curves: Path
    command: str
    seconds: float

    @property
    def mean_iou(self) -> float:
        """Mean IoU of the held-out volumes."""
        return sum(score.iou for score in self.scores) / len(self.scores)

    @property
    def mean_dice(self) -> float:
        """Mean Dice of the held-out volumes."""
        return sum(score.dice for score in self.scores) / len(self.scores)


def run_demo(
    output: str | os.PathLike[str],
    say: Callable[[str], None] = lambda line: None,
    settings: Mapping[str, Any] | None = None,
    dataset: Mapping[str, Any] | None = None,
) -> DemoResult:
    """Generate a dataset, train on it, score the held-out volumes and write their masks.

    Args:
        output: a new or empty folder, or one that holds an earlier demo, which is replaced, and nothing else.
            Afterwards it contains `dataset`, `bundle` (with the trained model), `masks` and `report`.
        say: called with one line of text before each step.
        settings: overrides of the bundle's configs, which take precedence over `DEMO_SETTINGS`.
        dataset: arguments of `write_phantom_dataset`.

    Raises:
        ValueError: `output` contains files that no demo wrote.
        OutputError: another demo is running there, or a training of an earlier one.
    """
    start = time.monotonic()
    folder = Path(output).resolve()
    _check_folder(folder)  # before anything is written to it
    prepare(folder)
    with folder_lock(folder, PURPOSE):
        _fresh_folder(folder)
        say("1/5 Writing CT-like volumes with small lesions")
        data = write_phantom_dataset(folder / "dataset", **(dataset or {}))
        bundle = copy_bundle(folder / "bundle")
        overrides = {"bundle_root": str(bundle), "dataset_dir": str(data), **DEMO_SETTINGS, **(settings or {})}

        say("2/5 Scoring an untrained network on the held-out volumes")
        untrained = _scores(run_workflow(bundle, ["train", "evaluate"], {**overrides, "load_pretrain": False}))
        say("3/5 Training")
        run_workflow(bundle, ["train"], overrides)
        say("4/5 Scoring the trained network")
        trained = _scores(run_workflow(bundle, ["train", "evaluate"], overrides))
        say("5/5 Writing masks in the images' own geometry, and the report")
        masks, report = folder / "masks", folder / "report"
        run_workflow(
            bundle, ["inference"], {"bundle_root": str(bundle), "dataset_dir": str(data), "output_dir": str(masks)}
        )
        named = Path(output)  # as the user wrote it, also in the report
        shown = named / "dataset"
        evaluate_folders(Request(named / "masks", shown / "labelsTs", report, images=shown / "imagesTs"))
    scores = tuple(CaseScore(case, *trained[case], *untrained[case]) for case in trained)
    curves = bundle / "eval" / "progress.png"
    return DemoResult(
        scores, masks, report / "report.html", curves, _command(bundle, overrides), time.monotonic() - start
    )


def run_workflow(bundle: Path, configs: Sequence[str], overrides: Mapping[str, Any]) -> Any:
    """Run configs of a bundle as `python -m monai.bundle run` does, in this process; return the ConfigWorkflow."""
    from monai.bundle.workflows import ConfigWorkflow

    workflow = ConfigWorkflow(
        config_file=[str(bundle / "configs" / f"{name}.json") for name in configs],
        workflow_type="inference" if configs[0] == "inference" else "train",
        **with_literal_paths(overrides),
    )
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    return workflow


def _check_folder(folder: Path) -> None:
    if folder.exists():
        ours = folder.is_dir() and (folder / MARKER).is_file()
        present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        seen = {name for name in present if not name.startswith(".") and name not in OF_WINDOWS}
        if not ours and (seen or not folder.is_dir()):
            message = f"Expected `{folder}` to be a new folder or an earlier demo's, but it exists: name another one."
            raise ValueError(message)
        others = sorted(seen - {*WRITTEN})
        if others:
            message = (
                f"Expected `{folder}` to hold nothing but an earlier demo, which is replaced, but got `{others[0]}` in "
                "it: move that elsewhere, or name another folder."
            )
            raise ValueError(message)


def _fresh_folder(folder: Path) -> Path:
    _check_folder(folder)
    models = folder / "bundle" / "models"
    if models.is_dir():
        release_unused()  # what a demo of this process left that ended with an error
        with folder_lock(models, PURPOSE):  # refused while a training holds it, as that of the printed command may
            pass
    for path in (folder / name for name in WRITTEN):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    prepare(folder)
    (folder / MARKER).touch()
    return folder


def _scores(workflow: Any) -> dict[str, tuple[float, float]]:
    """Return case -> (IoU, Dice) of an evaluation, in its order."""
    details = workflow.evaluator.state.metric_details
    (part,) = {name.split("_")[0] for name in details}  # test, or val without test cases
    columns = [details[f"{part}_mean_{score}"].nanmean(dim=1).tolist() for score in ("iou", "dice")]
    cases = [item["case"] for item in workflow.val_dataset_data]
    return {case: (iou, dice) for case, iou, dice in zip(cases, *columns, strict=True)}


def _command(bundle: Path, overrides: Mapping[str, Any]) -> str:
    config = str(bundle / "configs" / "train.json")
    # Of a single path the command line would cut off what follows a `#`.
    words = ["python", "-m", "monai.bundle", "run", "--config_file", repr([config]) if "#" in config else config]
    # The demo's own training is in the folder, and a training is never replaced unasked.
    for name, value in {**with_literal_paths(overrides), "overwrite": "true"}.items():
        words += [f"--{name}", str(value)]
    return shlex.join(words)
