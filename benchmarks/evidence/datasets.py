"""Folders of data for the studies, made once and kept below the runner's output folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence.data import DATA
from benchmarks.evidence.tables import locked

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("MONAI_IOU_SHARED", ROOT.parent / "shared" / "data"))

Builder = Callable[..., None]


def build(name: str, fold: int, folder: Path, *, quick: bool = False) -> Path:
    """Return the folder of one fold of a data set in the Decathlon layout, made if it is not there yet.

    Args:
        name: a key of `DATA`.
        fold: from 0.
        folder: where the data sets lie.
        quick: whether to test the first case alone; segmenting takes longer than a few epochs of training.
    """
    data = DATA[name]
    target = folder / f"{name}-{fold}"
    with locked(folder / f"{name}-{fold}.lock"):
        if not (target / "dataset.json").is_file():  # written last, so that a folder with it is complete
            shutil.rmtree(target, ignore_errors=True)
            BUILDERS[data.builder](target, fold, **data.arguments)
            if quick:
                keep_one_test_case(target)
    return target


def phantoms(folder: Path, fold: int, **arguments: Any) -> None:
    """Write the demo's volumes."""
    from monai_iou.datasets.phantoms import write_phantom_dataset

    write_phantom_dataset(folder, **arguments)


def task901(folder: Path, fold: int) -> None:
    """Copy the eight FLAIR scans so that every third of the six patients, by the order of their names, is left out."""
    source, content, entries = real_cases("Task901_MSLesionFLAIR")
    held_out = sorted({patient_of(entry["image"]) for entry in entries})[fold :: DATA["task901"].folds]
    copy_split(source, folder, content, entries, lambda entry: patient_of(entry["image"]) in held_out)


def task902(folder: Path, fold: int) -> None:
    """Copy the 21 CT crops so that every third one, by the order of their names, is left out."""
    source, content, entries = real_cases("Task902_STSTumourCT")
    held_out = sorted(entry["image"].rpartition("/")[2] for entry in entries)[fold :: DATA["task902"].folds]
    copy_split(source, folder, content, entries, lambda entry: entry["image"].rpartition("/")[2] in held_out)


def task904(folder: Path, fold: int, training: int) -> None:
    """Copy the first so many training volumes of the hippocampus and all that are to be tested."""
    source, content, _ = real_cases("Task904_Hippocampus")
    tested = content["test_labelled"]
    copy_split(source, folder, content, content["training"][:training] + tested, lambda entry: entry in tested)


def shapes(folder: Path, fold: int) -> None:
    """Make images around the 30 masks of as many patients; every third is tested."""
    from benchmarks.evidence.shapes import write

    entries = write(folder, SHARED / "Masks905_OpenMS" / "labels", SHARED / "Task901_MSLesionFLAIR")
    labels = {"0": "background", "1": "lesion"}
    content = {"name": "Shapes", "tensorImageSize": "3D", "modality": {"0": "MRI"}, "labels": labels}
    describe(folder, content, [entries[i] for i in range(30) if i % 3 < 2], entries[2::3])


def real_cases(task: str) -> tuple[Path, dict[str, Any], list[dict[str, str]]]:
    """Return the folder of a data set, its dataset.json, and all its labelled cases."""
    source = SHARED / task
    content = json.loads((source / "dataset.json").read_text(encoding="utf-8"))
    return source, content, content["training"] + content["test_labelled"]


def patient_of(path: str) -> str:
    """Return the patient that a case of Task901 or of the OpenMS masks shows; other names are patients themselves.

    >>> patient_of("./imagesTr/mslesseg_P14_T2.nii.gz"), patient_of("openms_07")
    ('mslesseg_P14', 'openms_07')
    """
    name = Path(path).name.partition(".")[0]
    return name.rsplit("_T", 1)[0] if name.startswith("mslesseg_") else name


def copy_split(
    source: Path,
    folder: Path,
    content: Mapping[str, Any],
    entries: Iterable[Mapping[str, str]],
    held_out: Callable[[Mapping[str, str]], bool],
) -> None:
    """Copy the files of a data set, and list those that `held_out` names as `test_labelled`, the others to train on."""
    parts: dict[bool, list[Mapping[str, str]]] = {False: [], True: []}
    for entry in entries:
        for path in entry.values():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, folder / path)
        parts[held_out(entry)].append(entry)
    describe(folder, content, parts[False], parts[True])


def describe(
    folder: Path, content: Mapping[str, Any], training: Sequence[Mapping[str, str]], tested: Sequence[Mapping[str, str]]
) -> None:
    """Write dataset.json in one step."""
    split = {"training": training, "test_labelled": tested, "test": [entry["image"] for entry in tested]}
    partial = folder / "dataset.tmp"
    text = json.dumps({**content, **split, "numTraining": len(training), "numTest": len(tested)}, indent=1)
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(folder / "dataset.json")


def keep_one_test_case(folder: Path) -> None:
    """Rewrite dataset.json so that it names the first test case alone."""
    content = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    describe(folder, content, content["training"], content["test_labelled"][:1])


BUILDERS: dict[str, Builder] = {
    "phantoms": phantoms,
    "shapes": shapes,
    "task901": task901,
    "task902": task902,
    "task904": task904,
}
