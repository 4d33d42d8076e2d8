from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_peak import needs_peak, peak_kb, reset_peak

from monai_iou.console import print_evaluation
from monai_iou.evaluation import penalties, results
from monai_iou.evaluation.columns import COLUMNS
from monai_iou.evaluation.compare import compare_folders
from monai_iou.evaluation.evaluate import evaluate_folders
from monai_iou.evaluation.penalties import penalised
from monai_iou.evaluation.report import HEADLINE
from monai_iou.evaluation.request import Request
from monai_iou.evaluation.rules import Rules, Structure
from monai_iou.evaluation.scoring import evaluate_case
from monai_iou.files import read_csv
from monai_iou.metrics import CHALLENGES
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


def box(start: tuple[int, int, int], size: int) -> np.ndarray:
    volume = np.zeros(SHAPE, np.uint8)
    volume[tuple(slice(a, a + size) for a in start)] = 1
    return volume


SMALL, LARGE = box((1, 1, 1), 1), box((6, 5, 4), 3)  # 3 mm3 and 81 mm3
NOTHING = np.zeros_like(SMALL)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        (SMALL, SMALL, math.nan),
        (NOTHING, SMALL, math.nan),
        (SMALL, NOTHING, math.nan),
        (NOTHING, LARGE, 0.0),
        (LARGE, NOTHING, 0.0),
        (SMALL, LARGE, 0.0),
        (LARGE, LARGE, 1.0),
    ],
)
def test_scores_of_lesions_are_of_those_that_are_counted(prediction, reference, expected):
    """Where all lesions are left out by their size, a perfect prediction missed none, and is not the worst."""
    row = evaluate_case(prediction, reference, GRID, ONE, rules=Rules(min_volume_mm3=10))[0][0]
    found = penalised(row)
    assert [found[name] for name in ("lesion_f1", "pq", "sq", "rq", "cc_iou")] == pytest.approx(
        [expected] * 5, nan_ok=True
    )
    assert found["iou"] == float(prediction is reference)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        (SMALL, SMALL, {"SensL": math.nan, "PPVL": math.nan, "F1_score": math.nan, "LTPR": 1.0, "Dice": 1.0}),
        (NOTHING, SMALL, {"SensL": math.nan, "PPVL": math.nan, "F1_score": math.nan, "LTPR": 0.0, "Dice": 0.0}),
        (SMALL, LARGE, {"SensL": 0.0, "PPVL": 0.0, "F1_score": 0.0, "LTPR": 0.0, "Dice": 0.0}),
        (NOTHING, LARGE, {"SensL": 0.0, "PPVL": 0.0, "F1_score": 0.0, "LTPR": 0.0, "Dice": 0.0}),
        (box((1, 1, 1), 3), LARGE, {"SensL": 0.0, "PPVL": 0.0, "F1_score": 0.0, "LTPR": 0.0, "Dice": 0.0}),
        (LARGE, LARGE, {"SensL": 1.0, "PPVL": 1.0, "F1_score": 1.0, "LTPR": 1.0, "Dice": 1.0}),
    ],
)
def test_lesions_that_a_challenge_leaves_out_are_not_missed(prediction, reference, expected):
    """MSSEG counts lesions above 3 mm3; a speck in the prediction makes no missed lesion nothing to find."""
    row = evaluate_case(prediction, reference, GRID, ONE, rules=Rules(like="ms"))[0][0]
    found = penalised(row, CHALLENGES["ms"])
    assert {name: found[name] for name in expected} == pytest.approx(expected, nan_ok=True)


def test_a_boundary_that_is_ignored_is_not_missed():
    """An ignored ring as wide as the band leaves no boundary of either mask, however well they agree."""
    core = box((4, 4, 3), 3)
    labels = np.where(core == 1, 1, 255 * np.pad(np.ones((9, 9, 8)), ((1, 4), (1, 2), (1, 1)))).astype(np.uint8)
    hollow = core.copy()
    hollow[5, 5, 4] = 0
    same, holed, empty = (
        penalised(evaluate_case(prediction, labels, GRID, ONE, ignore=255)[0][0])
        for prediction in (core, hollow, NOTHING)
    )
    assert math.isnan(same["boundary_iou"])
    assert (same["iou"], same["nsd"], same["hd95_mm"], same["assd_mm"], same["pq"]) == (1.0, 1.0, 0.0, 0.0, 1.0)
    assert holed["boundary_iou"] == empty["boundary_iou"] == 0.0
    assert all(math.isfinite(holed[name]) for name, column in COLUMNS.items() if column.better)


def test_a_structure_that_was_not_annotated_gets_no_penalty():
    row = penalised({**dict.fromkeys((*COLUMNS, *CHALLENGES["ms"].columns), math.nan)}, CHALLENGES["ms"])
    assert all(math.isnan(value) for value in row.values())


def test_a_failed_case_misses_the_lesions_that_the_other_folder_counted(tmp_path):
    """What `compare` takes for the score of a case that failed in one folder: that of an empty prediction."""
    for i, reference in enumerate((LARGE, LARGE, SMALL)):
        for kind in ("references", "predictions", "fewer"):
            (tmp_path / kind).mkdir(exist_ok=True)
            if (kind, i == 0) != ("fewer", False):
                nibabel.save(nibabel.Nifti1Image(reference, GRID.affine), tmp_path / kind / f"case{i}.nii.gz")
    for kind in ("predictions", "fewer"):
        evaluate_folders(Request(tmp_path / kind, tmp_path / "references", tmp_path / f"o-{kind}", min_volume_mm3=10))
    compared = compare_folders([tmp_path / "o-predictions", tmp_path / "o-fewer"], tmp_path / "compared")
    rows = {row["metric"]: row for row in compared}
    for name in ("lesion_f1", "pq", "sq", "cc_iou"):
        assert (rows[name]["n"], rows[name]["left_out"], rows[name]["other_mean"]) == (2, 1, 0.5), name
    assert (rows["iou"]["n"], rows["iou"]["other_mean"]) == (3, pytest.approx(1 / 3))


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


@pytest.mark.parametrize("missing", ["both", "exclude", "penalty"])
def test_the_printed_interval_stands_behind_its_own_mean(folders, capsys, missing):
    for i in range(6, 10):
        for kind in ("references", "predictions"):
            shutil.copy(folders / kind / f"case{i - 6}.nii.gz", folders / kind / f"case{i}.nii.gz")
    output = folders / "out"
    done = evaluate_folders(Request(folders / "predictions", folders / "references", output, missing=missing))
    print_evaluation(done, output)
    iou = done.summary["labels"]["1"]["iou"]
    interval = " (95 % interval {:.3f} to {:.3f})".format(*iou["mean_interval"])
    means = [f"{iou[name]:.3f}{interval * (iou[name] == iou['mean'])}" for name in ("mean_penalty", "mean_defined")]
    line = f"Label 1: mean IoU {means[0]}, counting 1 undefined or missing score as the worst; {means[1]} without it"
    assert line.count("interval") == 1
    assert line in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("missing", ["both", "exclude"])
def test_the_report_names_the_means_that_count_what_is_missing(folders, missing):
    summary, _ = evaluated(folders, missing=missing)
    page = (folders / "out0" / "report.html").read_text(encoding="utf-8")
    iou = summary["labels"]["1"]["iou"]
    assert f". IoU {iou['mean_penalty']:.3f} with 1 missing, {iou['mean_defined']:.3f} without it. Dice" in page
    warned = 'are left out of all scores below, except those marked "with ... missing".'
    assert (warned in page) == (missing == "exclude")
    assert (f"with 1 missing {iou['mean_penalty']:.3f}<" in page) == (missing == "exclude")


@pytest.mark.parametrize("missing", ["both", "exclude", "penalty"])
def test_each_row_is_penalised_once(folders, monkeypatch, missing):
    """Once per label and column again, hundreds of labels would take minutes."""
    rows = []

    def counted(row, *options):
        rows.append((row["case"], row["label"]))
        return penalised(row, *options)

    for module in (penalties, results):
        monkeypatch.setattr(module, "penalised", counted)
    evaluated(folders, missing=missing, labels=(1, 2, 3))
    assert sorted(rows) == [(f"case{i}", label) for i in range(6) for label in "123"]


@pytest.mark.parametrize("missing", ["both", "exclude", "penalty"])
@pytest.mark.parametrize("is_missing", [True, False])
def test_the_lesions_of_a_missing_case_are_missed_as_its_scores_count(tmp_path, missing, is_missing):
    """Three lesions, all found, and nine in a case without a prediction, of which each is larger than those three."""
    for case, (count, size) in enumerate([(3, 1), (9, 2)]):
        reference = np.zeros((40, 20, 20), np.uint8)
        for x in range(2, 2 + 4 * count, 4):
            reference[x : x + size, 5:7, 5:7] = 1
        for kind in ("references", "predictions"):
            (tmp_path / kind).mkdir(exist_ok=True)
            if kind == "references" or case == 0 or not is_missing:
                nibabel.save(nibabel.Nifti1Image(reference, GRID.affine), tmp_path / kind / f"case{case}.nii.gz")
    done = evaluate_folders(
        Request(tmp_path / "predictions", tmp_path / "references", tmp_path / "out", missing=missing)
    )
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    found = re.search("Lesions found</span><b>(.*?)</b><span>(.*?)</span>", page).groups()
    lesions = [row["case"] for row in read_csv(tmp_path / "out" / "lesions.csv") if row["kind"] == "reference"]
    listed = re.search('<section id="missed">.*?</section>', page, re.DOTALL)
    if not is_missing:
        assert found == ("12 of 12", "0 false positives")
        assert listed is None
    elif missing == "exclude":
        assert found == ("3 of 3", "0 false positives. With the missing cases 3 of 12")
        assert listed is None
    else:
        assert found == ("3 of 12", "0 false positives. Without the missing cases 3 of 3")
        assert listed[0].count('<td class="wrap">case1</td>') == listed[0].count('<td class="wrap">') == 9
    assert f"Lesions found, by their volume: {found[0]}<" in page
    assert lesions.count("case0") == 3
    assert lesions.count("case1") == (9 if not is_missing or missing == "penalty" else 0), "as cases.csv"
    # The same share as that of the mean numbers of lesions.
    means = {name: done.summary["labels"]["1"][f"lesion_{name}"]["mean"] for name in ("tp", "fn")}
    detected, total = map(int, found[0].split(" of "))
    assert detected / total == pytest.approx(means["tp"] / (means["tp"] + means["fn"]))


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


@needs_peak
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
    reset_peak()
    before = peak_kb()
    evaluated(tmp_path, like="brats-mets", images=tmp_path / "references")
    assert peak_kb() - before < 200_000
