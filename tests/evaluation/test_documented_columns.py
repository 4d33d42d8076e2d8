"""Every column of every table that is written, and every field and score of the metrics, stands on its page."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from places import DOCS

from monai_iou import IoUMetric, LesionIoUMetric, lesion_scores
from monai_iou.evaluation.compare import compare_folders
from monai_iou.evaluation.evaluate import evaluate_folders
from monai_iou.evaluation.request import EXPORTED, Request
from monai_iou.metrics import CHALLENGES
from monai_iou.workflow.score_files import CaseScoresSaver

FOLDERS = ("first", "second", "third")


def in_backticks(text: str) -> set[str]:
    return set(re.findall(r"`([^`\n]+)`", text.replace("```", "")))


def documented() -> dict[str, set[str]]:
    """The columns of each file in the tables of evaluation.md, where a file stands in the first of its rows only."""
    columns: dict[str, set[str]] = defaultdict(set)
    header, file = "", ""
    for line in (DOCS / "evaluation.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not line.startswith("| "):
            header = ""
        elif not header:
            header, file = line, ""
        elif cells[0] == "---":
            continue
        elif header.startswith("| file | column | unit "):
            file = cells[0].strip("`| ") or file
            columns[file] |= in_backticks(cells[1])
        elif header.startswith("| column | unit "):
            columns["cases.csv"] |= in_backticks(cells[0])
    ends = {name for name in columns["latex.csv"] if name.startswith("...")}
    means = columns["latex.csv"] - ends - {"label", "cases"}
    columns["latex.csv"] -= ends
    columns["latex.csv"] |= {f"{name}{end.removeprefix('...')}" for name in means for end in ends}
    columns["paired.csv"] |= set(FOLDERS)  # "name of each folder"
    return columns


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The columns of the tables of evaluations, of which one has a failed case, and of their comparison."""
    folder = tmp_path_factory.mktemp("tables")
    reference = np.zeros((8, 8, 4), np.uint8)
    reference[1:4, 1:4, 1:3] = 1
    for case in ("a", "b"):
        save(folder / "references" / f"{case}.nii", reference)
        for shift, name in enumerate(FOLDERS):
            if (name, case) != ("third", "b"):
                save(folder / f"masks-{name}" / f"{case}.nii", np.roll(reference, shift, axis=0))
    for name in FOLDERS:
        evaluate_folders(Request(folder / f"masks-{name}", folder / "references", folder / name, export=EXPORTED))
    compare_folders([folder / name for name in FOLDERS], folder / "comparison")
    tables = [path for output in ("third", "comparison") for path in (folder / output).glob("*.?sv")]
    lines = {path: path.read_text(encoding="utf-8").splitlines()[0] for path in tables}
    found = {path.name: set(re.split(r"[,\t]", line)) for path, line in lines.items()}
    found["panoptica.tsv"] = {re.sub("^1-", "LABEL-", name) for name in found["panoptica.tsv"]}
    return found


def test_every_column_of_every_table_is_on_the_page_and_no_other(headers):
    assert documented() == headers


def test_the_columns_of_challenges_are_on_the_page_of_metrics():
    named = in_backticks((DOCS / "metrics.md").read_text(encoding="utf-8"))
    assert [name for challenge in CHALLENGES.values() for name in challenge.columns if name not in named] == []


def test_every_field_of_a_lesion_and_every_score_is_on_the_page_of_metrics():
    named = in_backticks((DOCS / "metrics.md").read_text(encoding="utf-8"))
    (lesion,) = lesion_scores(np.eye(2) > 1, np.eye(2) > 0).lesions
    fields = {field.name for field in dataclasses.fields(lesion)}
    metric = IoUMetric(num_classes=2)
    metric(torch.tensor([[[0, 1]]]), torch.tensor([[[1, 1]]]))
    dataset = {re.sub(r"_\d+$", "_q", name) for name in metric.summary()}
    with pytest.raises(ValueError, match="Expected `score` to be one of") as error:
        LesionIoUMetric(score="")
    scores = {f'"{name}"' for name in re.findall(r"'(\w+)'", str(error.value))}
    assert '"f1_area"' in scores
    assert (fields | dataset | scores) - named == set()


def test_without_an_affine_a_centroid_is_the_index_times_the_spacing():
    mask = np.zeros((4, 4), bool)
    mask[1, 2] = True
    (plain,), (placed,) = (
        lesion_scores(mask, mask, spacing=(2, 3), affine=affine).lesions
        for affine in (None, np.array([[2, 0, 50], [0, 3, 60], [0, 0, 1]]))
    )
    assert (plain.centroid_voxel, plain.centroid_mm, placed.centroid_mm) == ((1, 2), (2, 6), (52, 66))


def test_every_column_of_the_bundles_scores_is_on_its_page(tmp_path):
    saver = CaseScoresSaver(str(tmp_path), metrics="*", metric_details="*", summary_ops="*", class_labels=["LABEL"])
    saver._filenames = ["a", "b"]
    values = torch.tensor([[0.0], [1.0]])
    saver(SimpleNamespace(state=SimpleNamespace(metrics={"iou": 0.5}, metric_details={"iou": values})))
    columns = {name for path in tmp_path.glob("*.csv") for name in path.read_text().splitlines()[0].split(",")}
    page = (DOCS / "bundle.md").read_text(encoding="utf-8")
    section = re.sub(r"\s+", " ", page.split("## What evaluation writes")[1].split("\n## ")[0])
    assert columns - in_backticks(section) == {"LABEL"}
    assert "standard deviation (`std`, divided by n)" in section
    assert (tmp_path / "iou_summary.csv").read_text().splitlines()[1] == (
        "LABEL,0.5000,0.5000,1.0000,0.0000,0.9000,0.5000,2.0000"
    )
