from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monai_iou.evaluation.columns import COLUMNS
from monai_iou.evaluation.compare import compare_folders
from monai_iou.evaluation.evaluate import evaluate_folders
from monai_iou.evaluation.penalties import penalised
from monai_iou.evaluation.report import HEADLINE
from monai_iou.evaluation.request import Request
from monai_iou.evaluation.rules import Structure
from monai_iou.evaluation.scoring import evaluate_case
from monai_iou.files import read_csv
from monai_iou.volumes.grid import Grid

SHAPE, SPACING = (14, 12, 10), (1.0, 2.0, 1.5)
GRID = Grid(SHAPE, np.diag([*SPACING, 1.0]))
DIAGONAL = float(np.linalg.norm(np.multiply(SHAPE, SPACING)))
ONE = [Structure("1", (1,))]


def blobs(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    volume = np.zeros(SHAPE, np.uint8)
    for _ in range(int(rng.integers(0, 4))):
        low = [int(rng.integers(0, size - 3)) for size in SHAPE]
        volume[tuple(slice(a, a + int(rng.integers(1, 5))) for a in low)] = 1
    return volume


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_an_empty_prediction_is_never_better_than_another_one(seed):
    """Where there is something to find, no column that ranks methods may gain from finding nothing."""
    prediction, reference = blobs(seed), blobs(seed + 1)
    if not reference.any():
        return
    rows = [penalised(evaluate_case(p, reference, GRID, ONE)[0][0]) for p in (prediction, np.zeros_like(prediction))]
    for name, column in COLUMNS.items():
        if column.better:
            found, empty = rows[0][name], rows[1][name]
            assert math.isfinite(found), name
            assert math.isfinite(empty), name
            assert empty <= found if column.better == "higher" else empty >= found, name


def test_what_is_in_neither_mask_stays_undefined():
    nothing = np.zeros(SHAPE, np.uint8)
    row = penalised(evaluate_case(nothing, nothing, GRID, ONE)[0][0])
    assert all(math.isnan(row[name]) for name, column in COLUMNS.items() if column.better)
    false = penalised(evaluate_case(blobs(2), nothing, GRID, ONE)[0][0])
    assert (false["iou"], false["hd95_mm"]) == (0.0, pytest.approx(DIAGONAL))
    assert math.isnan(false["recall"])


@pytest.fixture
def folders(tmp_path) -> Path:
    """Six cases; of case4 the prediction is empty, of case5 there is none."""
    for i in range(6):
        reference = np.zeros(SHAPE, np.uint8)
        reference[2:8, 2 : 5 + i, 3:7] = 1
        prediction = np.roll(reference, 1, axis=0) if i != 4 else np.zeros_like(reference)
        for kind, array in (("references", reference), ("predictions", prediction)):
            (tmp_path / kind).mkdir(exist_ok=True)
            if (kind, i) != ("predictions", 5):
                nibabel.save(nibabel.Nifti1Image(array, GRID.affine), tmp_path / kind / f"case{i}.nii.gz")
    return tmp_path


def evaluated(folder: Path, **options) -> tuple[dict, list[dict[str, str]]]:
    output = folder / f"out{len(list(folder.glob('out*')))}"
    evaluate_folders(Request(folder / "predictions", folder / "references", output, **options))
    return json.loads((output / "summary.json").read_text(encoding="utf-8")), read_csv(output / "cases.csv")


def test_both_means_are_in_the_summary_whatever_is_asked_for(folders):
    excluded, rows = evaluated(folders, missing="exclude")
    assert [row["case"] for row in rows] == [f"case{i}" for i in range(5)]
    assert rows[4]["hd95_mm"] == ""
    distances = [float(row["hd95_mm"]) for row in rows[:4]]
    scores = excluded["labels"]["1"]
    assert scores["hd95_mm"]["mean"] == scores["hd95_mm"]["mean_defined"] == pytest.approx(np.mean(distances))
    assert scores["hd95_mm"]["mean_penalty"] == pytest.approx(np.mean([*distances, DIAGONAL, DIAGONAL]))
    assert (scores["hd95_mm"]["n_defined"], scores["hd95_mm"]["n_penalty"]) == (4, 6)
    ious = [float(row["iou"]) for row in rows]
    assert scores["iou"]["mean"] == pytest.approx(np.mean(ious))
    assert scores["iou"]["mean_penalty"] == pytest.approx(np.mean([*ious, 0]))

    penalty, rows = evaluated(folders, missing="penalty")
    assert [row["case"] for row in rows] == [f"case{i}" for i in range(6)]
    assert [float(row["hd95_mm"]) for row in rows] == pytest.approx([*distances, DIAGONAL, DIAGONAL])
    assert (rows[5]["iou"], rows[5]["lesion_fn"], rows[5]["precision"]) == ("0.0", "1", "0.0")
    for name, column in penalty["labels"]["1"].items():
        for key in ("mean_defined", "mean_penalty", "n_defined", "n_penalty"):
            assert column[key] == scores[name][key]
    assert penalty["labels"]["1"]["hd95_mm"]["mean"] == pytest.approx(scores["hd95_mm"]["mean_penalty"])
    assert penalty["cases"] == excluded["cases"] == {"paired": 6, "evaluated": 5, "failed": 1, "reused": 0}
    assert penalty["dataset"]["iou_i"] == pytest.approx(penalty["labels"]["1"]["iou"]["mean"])

    default, measured = evaluated(folders)
    assert measured == read_csv(folders / "out0" / "cases.csv")
    assert default["labels"] == penalty["labels"]
    assert default["dataset"] == penalty["dataset"]
    assert default["dataset_defined"] == excluded["dataset"]


def test_a_missing_prediction_is_an_empty_one(folders):
    _, rows = evaluated(folders, missing="penalty")
    empty = nibabel.Nifti1Image(np.zeros(SHAPE, np.uint8), GRID.affine)
    nibabel.save(empty, folders / "predictions" / "case5.nii.gz")
    _, there = evaluated(folders, missing="penalty")
    assert rows == there
    (folders / "predictions" / "case5.nii.gz").write_bytes(b"broken")
    _, broken = evaluated(folders, missing="penalty")
    assert rows == broken


def test_patients_are_the_unit(folders):
    for i in range(6, 16):
        for kind in ("references", "predictions"):
            (folders / kind / f"case{i}.nii.gz").write_bytes((folders / kind / "case0.nii.gz").read_bytes())
    (folders / "patients.csv").write_text(
        "case,patient\n" + "".join(f"case{i},p{i // 2}\n" for i in range(16)), encoding="utf-8"
    )
    each, _ = evaluated(folders)
    by_patient, _ = evaluated(folders, groups=folders / "patients.csv")
    assert by_patient["options"]["unit"] == "patient"
    assert by_patient["options"]["patients"] == 8
    first, second = (found["labels"]["1"]["iou"] for found in (each, by_patient))
    assert first["mean"] == second["mean"]
    assert (first["units"], second["units"]) == (16, 8)
    assert first["mean_interval"] != second["mean_interval"]
    groups = {f"p{i}": [f"case{2 * i}", f"case{2 * i + 1}"] for i in range(1, 8)}
    (folders / "dataset.json").write_text(json.dumps({"patient_groups": groups}), encoding="utf-8")
    assert evaluated(folders)[0]["options"]["unit"] == "patient"


def test_an_empty_prediction_never_improves_a_mean(folders):
    """All means of columns that rank methods, in summary, report and comparison, with one more prediction emptied."""
    before = evaluated(folders)[0]
    nothing = nibabel.Nifti1Image(np.zeros(SHAPE, np.uint8), GRID.affine)
    nibabel.save(nothing, folders / "predictions" / "case3.nii.gz")
    after = evaluated(folders)[0]
    compare_folders([folders / "out0", folders / "out1"], folders / "compared")
    differences = {row["metric"]: row for row in read_csv(folders / "compared" / "comparison.csv")}
    for name, column in COLUMNS.items():
        if column.better:
            sign = 1 if column.better == "higher" else -1
            for mean in ("mean", "mean_penalty"):
                assert sign * after["labels"]["1"][name][mean] <= sign * before["labels"]["1"][name][mean], (name, mean)
            if name in differences:
                assert sign * float(differences[name]["difference"]) <= 0, name
    assert {"iou", "dice", "hd95_mm", "nsd", "precision"} <= differences.keys()
    for name, value in after["dataset"].items():
        if value is not None:
            assert value <= before["dataset"][name], name
    assert after["dataset"]["iou_d"] < before["dataset"]["iou_d"]
    page = (folders / "out1" / "report.html").read_text(encoding="utf-8")
    shown = re.search(r'<th scope="row" class="left">1</th>(.*?)</tr>', page, re.DOTALL)
    assert shown is not None
    means = re.findall(r"<td>([\d.]+)<small>", shown[1])
    for mean, name in zip(means, HEADLINE, strict=True):
        assert mean == f"{after['labels']['1'][name]['mean']:.{COLUMNS[name].digits}f}"
    assert f"IoU {after['labels']['1']['iou']['mean']:.3f}" in page


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak of memory")
def test_tiny_voxels_are_evaluated_in_little_memory(tmp_path):
    """24^3 masks with voxels of 5 um: bands and margins in mm are hundreds of voxels wide, but never allocated."""
    rng = np.random.default_rng(0)
    for kind in ("references", "predictions"):
        array = np.zeros((24, 24, 24), np.uint8)
        array[4:18, 5:19, 6:20] = 1
        array[rng.random(array.shape) < 0.05] = 2
        (tmp_path / kind).mkdir()
        nibabel.save(nibabel.Nifti1Image(array, np.diag([0.005, 0.005, 0.005, 1.0])), tmp_path / kind / "a.nii.gz")
    evaluate_folders(Request(tmp_path / "references", tmp_path / "references", tmp_path / "warm"))  # imports
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_kb()
    evaluated(tmp_path, like="brats-mets", images=tmp_path / "references")
    assert peak_kb() - before < 200_000


def peak_kb() -> int:
    """The peak of this process's memory since it was last reset."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return int(status["VmHWM"].split()[0])
