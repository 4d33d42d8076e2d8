"""The bundle's own scores and those of `monai-iou evaluate` on the bundle's masks: the same numbers, case by case."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from bundle_runs import SMALL
from places import DATA

from monai_iou.bundle_files import copy_bundle
from monai_iou.cli import main
from monai_iou.demo import run_workflow

HIPPOCAMPUS = DATA / "Task904_Hippocampus"
CASES = 3

pytestmark = [
    pytest.mark.real_data,
    pytest.mark.skipif(not HIPPOCAMPUS.is_dir(), reason="the hippocampi are not beside the project"),
    pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning"),
]


def few_hippocampi(folder: Path) -> Path:
    """A Decathlon folder of the first cases for training and for the test."""
    content = json.loads((HIPPOCAMPUS / "dataset.json").read_text())
    for part in ("training", "test_labelled"):
        content[part] = content[part][:CASES]
        for entry in content[part]:
            for name in entry.values():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(HIPPOCAMPUS / name, folder / name)
    content |= {"test": [entry["image"] for entry in content["test_labelled"]], "numTraining": CASES, "numTest": CASES}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


# The network's spacing does not matter: both score on the grid of the reference's file.
@pytest.mark.parametrize("pixdim", [None, [1.5, 1.5, 2.0]])
def test_the_bundle_and_the_command_give_the_same_iou_for_every_case(tmp_path, pixdim):
    data, bundle = few_hippocampi(tmp_path / "data"), copy_bundle(tmp_path / "bundle")
    places = {"bundle_root": str(bundle), "dataset_dir": str(data)}
    overrides = {**places, **SMALL, "epochs": 1, "pixdim": pixdim}
    torch.manual_seed(0)
    run_workflow(bundle, ["train"], overrides)
    run_workflow(bundle, ["train", "evaluate"], overrides)
    masks, out = tmp_path / "masks", tmp_path / "out"
    run_workflow(bundle, ["inference"], {**places, "output_dir": str(masks)})
    assert main(["evaluate", f"--predictions={masks}", f"--references={data / 'labelsTs'}", f"--output={out}"]) == 0
    with (out / "cases.csv").open(newline="") as stream:
        ours = {(row["case"], row["label"]): row for row in csv.DictReader(stream)}
    assert len(ours) == CASES * 2
    for name, column in (("test_mean_iou", "iou"), ("test_mean_dice", "dice")):
        with (bundle / "eval" / f"{name}_raw.csv").open(newline="") as stream:
            theirs = list(csv.reader(stream))[1:]
        assert len(theirs) == CASES
        for file, *scores in theirs:
            case = Path(file).name.removesuffix(".nii.gz")
            mine = [float(ours[case, label][column]) for label in ("1", "2")]
            assert [float(score) for score in scores[:2]] == pytest.approx(mine, abs=6e-5)  # four digits are written
    assert all(float(row["iou"]) > 0 for row in ours.values())
