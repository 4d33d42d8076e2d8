"""Folders of data for the studies, made once and kept below the runner's output folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.evidence.studies import DATA
from benchmarks.evidence.tables import locked

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("MONAI_IOU_SHARED", ROOT.parent / "shared" / "data"))

Builder = Callable[..., None]


def build(name: str, fold: int, folder: Path) -> Path:
    """Return the folder of one fold of a data set in the Decathlon layout, made if it is not there yet.

    Args:
        name: a key of `DATA`.
        fold: from 0.
        folder: where the data sets of all studies lie.
    """
    data = DATA[name]
    target = folder / f"{name}-{fold}"
    with locked(folder / f"{name}-{fold}.lock"):
        if not (target / "dataset.json").is_file():  # written last, so that a folder with it is complete
            shutil.rmtree(target, ignore_errors=True)
            BUILDERS[data.builder](target, fold, **data.arguments)
    return target


def phantoms(folder: Path, fold: int, **arguments: Any) -> None:
    """Write the demo's volumes."""
    from monai_iou.datasets.phantoms import write_phantom_dataset

    write_phantom_dataset(folder, **arguments)


def task901(folder: Path, fold: int) -> None:
    """Copy the eight FLAIR scans so that one of the six patients is left out."""
    source = SHARED / "Task901_MSLesionFLAIR"
    content = json.loads((source / "dataset.json").read_text(encoding="utf-8"))
    entries = content["training"] + content["test_labelled"]
    patients = sorted({patient_of(entry["image"]) for entry in entries})
    held_out = patients[fold]
    copy_split(source, folder, content, entries, lambda entry: patient_of(entry["image"]) == held_out)


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
    split = {"training": parts[False], "test_labelled": parts[True], "test": [entry["image"] for entry in parts[True]]}
    sizes = {"numTraining": len(parts[False]), "numTest": len(parts[True])}
    write_description(folder, {**content, **split, **sizes})


def write_description(folder: Path, content: Mapping[str, Any]) -> None:
    """Write dataset.json in one step."""
    partial = folder / "dataset.tmp"
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / "dataset.json")


BUILDERS: dict[str, Builder] = {"phantoms": phantoms, "task901": task901}
