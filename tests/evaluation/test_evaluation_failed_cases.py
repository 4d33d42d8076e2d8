"""Cases that are missing, cannot be read or fail while they are scored: none improves a mean or leaves it unseen."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from monai_iou.evaluation import case_files
from monai_iou.evaluation.case_files import hash_files
from monai_iou.evaluation.columns import COLUMNS
from monai_iou.evaluation.compare import METRICS, compare_folders
from monai_iou.evaluation.evaluate import _score_empty, evaluate_folders
from monai_iou.evaluation.penalties import empty_prediction, penalised
from monai_iou.evaluation.request import Request
from monai_iou.evaluation.results import Evaluation
from monai_iou.evaluation.rules import Rules, Structure
from monai_iou.evaluation.scoring import evaluate_case, score_pair
from monai_iou.evaluation.summary import part_of
from monai_iou.evaluation.workers import Runner, TaskError
from monai_iou.files import read_csv
from monai_iou.metrics import CHALLENGES
from monai_iou.volumes.grid import Grid

SHAPE = (16, 15, 14)
NOTHING = np.zeros(SHAPE, np.uint8)


def box(low: int, size: int) -> np.ndarray:
    mask = np.zeros(SHAPE, np.uint8)
    mask[low : low + size, 3 : 3 + size, 3 : 3 + size] = 1
    return mask


def save(folder: Path, case: str, array: np.ndarray) -> None:
    folder.mkdir(exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / f"{case}.nii.gz")


def evaluated(folder: Path, name: str, **options: Any) -> Evaluation:
    return evaluate_folders(Request(folder / name, folder / "references", folder / f"out-{name}", **options))


@pytest.fixture
def healthy(tmp_path: Path) -> Path:
    """A sick case with Dice 0.8, three healthy ones without a prediction, and one of a speck without one."""
    save(tmp_path / "references", "sick", box(2, 5))
    save(tmp_path / "predictions", "sick", box(3, 5))
    for i in range(3):
        save(tmp_path / "references", f"healthy{i}", NOTHING)
    save(tmp_path / "references", "speck", box(5, 1))
    return tmp_path


BEST = {
    **dict.fromkeys(("dice", "lesion_f1_score", "dice_sc", "Dice", "SensL", "PPVL", "F1_score", "LTPR"), 1),
    **dict.fromkeys(("LesionWise_Score_Dice", "Legacy_Dice", "Sensitivity", "Specificity"), 1),
    **dict.fromkeys(("LesionWise_Score_HD95", "Legacy_HD95", "Num_FP", "LFPR"), 0),
    **dict.fromkeys(("absolute_volume_difference", "absolute_lesion_difference", "false_pos_vol", "false_neg_vol"), 0),
}


@pytest.mark.parametrize("challenge", CHALLENGES)
def test_no_case_without_a_prediction_has_a_perfect_score(healthy, challenge):
    done = evaluated(healthy, "predictions", like=challenge, missing="penalty")
    missing = [row for row in done.rows if row["case"] != "sick"]
    assert [row["case"] for row in missing] == ["healthy0", "healthy1", "healthy2", "speck"]
    for name, best in BEST.items():
        if name in CHALLENGES[challenge].columns:
            assert all(row[name] != best for row in missing), name
    for name, summary in done.summary["labels"]["1"].items():
        if BEST.get(name) == 1 and name != "Specificity" and summary["n_defined"]:
            assert summary["mean_penalty"] <= summary["mean_defined"], name


def test_a_missing_prediction_of_a_healthy_case_counts_as_the_worst_where_an_empty_one_is_perfect(healthy):
    isles = evaluated(healthy, "predictions", like="isles22").summary["labels"]["1"]
    assert (isles["dice"]["mean_defined"], isles["dice"]["mean"]) == (0.8, pytest.approx(0.8 / 5))
    assert (isles["lesion_f1_score"]["mean"], isles["lesion_f1_score"]["n"]) == (pytest.approx(1 / 5), 5)
    assert isles["absolute_volume_difference"]["n"] == 2
    assert isles["iou"]["n"] == 2, "in our own columns there is nothing to find in a healthy case"
    brats = evaluated(healthy, "predictions", like="brats-mets").summary["labels"]["1"]
    assert brats["LesionWise_Score_HD95"]["mean_defined"] == 1.0
    assert brats["LesionWise_Score_HD95"]["mean"] == pytest.approx((1 + 4 * 374) / 5), (
        "also of a speck that is too small"
    )
    assert brats["LesionWise_Score_Dice"]["mean"] == pytest.approx(0.8 / 5)
    assert (brats["Specificity"]["n"], brats["Num_FP"]["n"]) == (1, 1)
    autopet = evaluated(healthy, "predictions", like="autopet").summary["labels"]["1"]
    assert (autopet["dice_sc"]["n"], autopet["false_pos_vol"]["n"], autopet["false_neg_vol"]["n"]) == (2, 1, 2)
    excluded = evaluated(healthy, "predictions", like="isles22", missing="exclude")
    assert excluded.summary["labels"]["1"]["dice"]["mean"] == 0.8


def test_an_empty_prediction_of_a_healthy_case_stays_perfect(healthy):
    for i in range(3):
        save(healthy / "predictions", f"healthy{i}", NOTHING)
    found = evaluated(healthy, "predictions", like="isles22").summary["labels"]["1"]
    assert found["dice"]["mean"] == pytest.approx((0.8 + 3) / 5)


def test_a_sensitivity_is_of_lesions_that_are_there():
    """A false positive in a healthy case is no missed lesion, and neither is one beside a speck that is not counted."""
    grid, one = Grid(SHAPE, np.eye(4)), [Structure("1", (1,))]
    for reference, voxelwise in ((NOTHING, math.nan), (box(12, 1), 0.0)):
        row = evaluate_case(box(2, 5), reference, grid, one, rules=Rules(like="ms"))[0][0]
        found = penalised(row, CHALLENGES["ms"])
        expected = {"SensL": math.nan, "LTPR": voxelwise, "PPVL": 0.0, "F1_score": 0.0, "Dice": 0.0, "LFPR": 1.0}
        assert {name: found[name] for name in expected} == pytest.approx(expected, nan_ok=True)


@pytest.fixture
def three_folders(tmp_path: Path) -> Path:
    """Predictions `a` lack a sick and a healthy case; `b` has a false positive in the healthy one."""
    for i, reference in enumerate((box(2, 5), box(4, 4), NOTHING, box(3, 6))):
        save(tmp_path / "references", f"case{i}", reference)
        save(tmp_path / "b", f"case{i}", box(3, 5))
        if i in (0, 3):
            save(tmp_path / "a", f"case{i}", reference)
    return tmp_path


def test_missing_changes_nothing_that_is_compared(three_folders):
    tables = []
    for missing in ("both", "penalty", "exclude"):
        for name in "ab":
            evaluated(three_folders, name, missing=missing)
        folders = [three_folders / "out-a", three_folders / "out-b"]
        rows = compare_folders(folders, three_folders / "compared", METRICS)
        tables.append((rows, read_csv(three_folders / "compared" / "paired.csv")))
        assert {row["metric"]: row["baseline_mean"] for row in rows}["iou"] == 0.5
    assert tables[0] == tables[1] == tables[2]


@pytest.mark.parametrize("patients", [False, True])
@pytest.mark.parametrize("missing", ["both", "penalty"])
def test_a_failed_case_whose_name_is_no_text_counts_in_a_comparison(missing, patients, tmp_path):
    """Its table has the bytes as escapes, and where there are no patients, nothing else names it."""
    cases = "a\udcfc1", "a\udcfc2", r"a\udcfe", "b1", "b2"
    save(tmp_path, "reference", box(2, 5))
    save(tmp_path, "prediction", box(3, 5))
    for case in cases:
        for kind, source in (("references", "reference"), ("a", "prediction"), ("b", "prediction")):
            (tmp_path / kind).mkdir(exist_ok=True)
            (tmp_path / kind / f"{case}.nii.gz").write_bytes((tmp_path / f"{source}.nii.gz").read_bytes())
    (tmp_path / "b" / f"{cases[0]}.nii.gz").unlink()
    (tmp_path / "b" / f"{cases[1]}.nii.gz").write_bytes(b"broken")
    (tmp_path / "b" / f"{cases[2]}.nii.gz").unlink()
    (tmp_path / "groups.csv").write_text("case,patient\nb1,P\nb2,P\n", encoding="utf-8")
    for name in "ab":
        evaluated(tmp_path, name, missing=missing, groups=tmp_path / "groups.csv" if patients else None)
    notes: list[str] = []
    folders = [tmp_path / "out-a", tmp_path / "out-b"]
    row = compare_folders(folders, tmp_path / "compared", ["iou"], note=notes.append)[0]
    assert (row["n"], row["left_out"], notes) == (5, 0, [])
    assert row["other_mean"] == pytest.approx(row["baseline_mean"] * 2 / 5)


def test_a_comparison_shows_no_earlier_prediction_of_a_case_that_failed_since(three_folders):
    """Its record and pictures are kept, for the time when the prediction is as it was."""
    for name in "ab":
        evaluated(three_folders, name)
    folders, page = [three_folders / f"out-{name}" for name in "ab"], three_folders / "compared" / "comparison.html"
    shown = []
    for damaged in (None, "case0", "case3"):
        if damaged is not None:
            (three_folders / "b" / f"{damaged}.nii.gz").write_bytes(b"broken")
            assert damaged in {failure["case"] for failure in evaluated(three_folders, "b").failures}
        compare_folders(folders, three_folders / "compared", ["iou"])
        pictures = page.read_text(encoding="utf-8").partition("Cases that changed most")[2].split("<details")[1:]
        shown.append({text.partition("<summary>")[2][:5]: re.findall(r"<h4>out-(.)</h4>", text) for text in pictures})
    # The folder `a` never had a prediction of case1.
    assert shown[0] == {"case0": ["a", "b"], "case1": ["b"], "case3": ["a", "b"]}
    assert shown[1] == {"case0": ["a"], "case1": ["b"], "case3": ["a", "b"]}
    assert shown[2] == {"case0": ["a"], "case1": ["b"], "case3": ["a"]}


@pytest.mark.parametrize("missing", ["both", "penalty"])
def test_a_folder_in_which_every_case_failed_is_the_worst(three_folders, missing):
    for path in (three_folders / "a").iterdir():
        path.write_bytes(b"broken")
    for name in "ab":
        evaluated(three_folders, name, missing=missing)
    row = compare_folders([three_folders / "out-a", three_folders / "out-b"], three_folders / "compared", ["iou"])[0]
    assert (row["n"], row["baseline_mean"]) == (4, 0.0)
    assert row["other_mean"] > 0.3


def test_a_case_that_both_folders_failed_at_counts_where_a_row_or_another_folder_knows_it(three_folders):
    """The predictions `c` lack what those of `a` lack; only `b` has a score of these cases."""
    for case in ("case0", "case3"):
        save(three_folders / "c", case, box(3, 5))
    tables = {}
    for missing, others in (("both", ""), ("penalty", ""), ("both", "b")):
        for name in "acb":
            evaluated(three_folders, name, missing=missing)
        folders = [three_folders / f"out-{name}" for name in f"ac{others}"]
        notes: list[str] = []
        row = compare_folders(folders, three_folders / "compared", ["iou"], note=notes.append)[0]
        lines = read_csv(three_folders / "compared" / "paired.csv")
        paired = {line["case"]: (line["out-a"], line["out-c"]) for line in lines}
        tables[missing, others] = row["n"], row["left_out"], row["baseline_mean"], paired.get("case1"), len(notes)
    assert tables["both", ""] == (2, 2, 1.0, None, 1)
    assert tables["penalty", ""] == (3, 1, pytest.approx(2 / 3), ("0.0", "0.0"), 0), "and one with nothing to find"
    assert tables["both", "b"] == tables["penalty", ""]


@pytest.mark.parametrize("like", [None, "isles22"])
def test_a_failed_case_counts_in_a_comparison_as_in_the_evaluation(three_folders, like):
    """Both lack the healthy case2, whose Dice ISLES'22 defines: 0 where nobody predicted anything."""
    (three_folders / "b" / "case2.nii.gz").unlink()
    save(three_folders / "c", "case2", NOTHING)
    for i in (0, 1, 3):
        save(three_folders / "c", f"case{i}", box(3, 5))
    means = {
        name: evaluated(three_folders, name, like=like, missing="penalty").summary["labels"]["1"]["dice"]["mean"]
        for name in "abc"
    }
    folders = [three_folders / f"out-{name}" for name in "abc"]
    rows = compare_folders(folders, three_folders / "compared", ["dice"])
    for row in rows:
        first, second = (name.removeprefix("out-") for name in row["names"])
        assert (row["baseline_mean"], row["other_mean"]) == pytest.approx((means[first], means[second]))
        assert (row["n"], row["left_out"]) == ((3, 1) if like is None else (4, 0))
    paired = {line["case"]: line for line in read_csv(three_folders / "compared" / "paired.csv")}["case2"]
    assert [paired[f"out-{name}"] for name in "abc"] == (["", "", ""] if like is None else ["0.0", "0.0", "1.0"])


def test_a_failed_case_of_a_class_that_was_not_annotated_has_no_score():
    row = dict.fromkeys(COLUMNS, math.nan) | {"diagonal_mm": 30.0}
    assert math.isnan(penalised(empty_prediction(row, CHALLENGES["isles22"]))["dice"])


def test_the_pictures_of_empty_predictions_are_dropped_one_by_one():
    """Those of all cases at once would fill the memory."""
    made: list[dict[str, Any]] = []

    def run(_, tasks):
        for case in tasks:
            assert all("pictures" not in outcome for outcome in made)
            made.append({"case": case, "pictures": [{}]})
            yield case, made[-1]
        yield "bad", TaskError("broken")

    outcomes = _score_empty(Runner(run), {f"case{i}": () for i in range(3)})
    assert outcomes == {**{f"case{i}": {"case": f"case{i}"} for i in range(3)}, "bad": TaskError("broken")}


def fails_with(reference: np.ndarray):
    """`score_pair`, but without enough memory for what is predicted for one reference."""

    def scored(pair, *rest):
        if pair.prediction.any() and pair.reference.sum() == reference.sum():
            raise MemoryError
        return score_pair(pair, *rest)

    return scored


def test_a_case_that_fails_while_it_is_scored_counts_as_an_empty_prediction(tmp_path, monkeypatch):
    for case, reference in (("good", box(2, 4)), ("large", box(2, 6))):
        for kind in ("references", "predictions"):
            save(tmp_path / kind, case, reference)
    monkeypatch.setattr(case_files, "score_pair", fails_with(box(2, 6)))
    done = evaluated(tmp_path, "predictions", missing="penalty")
    score = done.summary["labels"]["1"]["iou"]
    assert (score["n_penalty"], score["mean"], score["n_defined"], score["mean_defined"]) == (2, 0.5, 1, 1.0)
    assert done.summary["cases"] == {"paired": 2, "evaluated": 1, "failed": 1, "reused": 0}
    assert [(row["case"], row["reason"]) for row in done.failures] == [("large", "MemoryError: ")]
    row = next(row for row in done.rows if row["case"] == "large")
    assert (row["iou"], row["reference_ml"], row["prediction_ml"], row["lesion_fn"]) == (0.0, 0.216, 0.0, 1)
    assert done.summary["dataset"]["iou_i"] == 0.5
    monkeypatch.undo()
    again = evaluated(tmp_path, "predictions", missing="penalty")
    assert again.summary["labels"]["1"]["iou"]["mean"] == 1.0, "what failed is tried again"
    assert (again.failures, again.reused) == ([], 1)


def test_a_label_that_only_a_failed_case_has_is_scored(tmp_path, monkeypatch):
    for case, reference in (("good", box(2, 4)), ("large", 2 * box(2, 6))):
        for kind in ("references", "predictions"):
            save(tmp_path / kind, case, reference)
    monkeypatch.setattr(case_files, "score_pair", fails_with(box(2, 6)))
    labels = evaluated(tmp_path, "predictions").summary["labels"]
    assert (labels["1"]["iou"]["mean"], labels["2"]["iou"]["mean"], labels["2"]["iou"]["n_defined"]) == (1.0, 0.0, 0)


def test_the_summary_has_the_hashes_of_failed_cases_too(tmp_path):
    for case in ("good", "broken", "lost", "missing"):
        for kind in ("references", "predictions"):
            save(tmp_path / kind, case, box(2, 4))
    for file in ("predictions/broken.nii.gz", "references/lost.nii.gz"):
        (tmp_path / file).write_bytes(b"broken")
    (tmp_path / "predictions" / "missing.nii.gz").unlink()
    done = evaluated(tmp_path, "predictions")
    assert sorted(row["case"] for row in done.failures) == ["broken", "lost", "missing"]
    names = ("good", "broken", "missing")
    files = {case: [tmp_path / kind / f"{case}.nii.gz" for kind in ("predictions", "references")] for case in names}
    files["missing"][0] = None
    expected = {case: hash_files(*files[case]) for case in names}
    assert done.summary["inputs"] == expected
    assert part_of(done, ["missing"]).summary["inputs"] == {"missing": expected["missing"]}


def test_a_reference_that_cannot_be_read_has_no_score(tmp_path):
    for kind in ("references", "predictions"):
        save(tmp_path / kind, "good", box(2, 4))
        save(tmp_path / kind, "bad", box(2, 4))
    (tmp_path / "references" / "bad.nii.gz").write_bytes(b"broken")
    done = evaluated(tmp_path, "predictions", missing="penalty")
    assert [row["case"] for row in done.rows] == ["good"]
    summary = json.loads((tmp_path / "out-predictions" / "summary.json").read_text(encoding="utf-8"))
    assert (summary["labels"]["1"]["iou"]["n_penalty"], summary["cases"]["failed"]) == (1, 1)


@pytest.mark.parametrize("missing", ["both", "penalty"])
@pytest.mark.parametrize("listed", [True, False], ids=["of today", "of an earlier version"])
def test_a_case_without_a_readable_reference_is_no_failure_of_the_method(tmp_path, missing, listed):
    """The same predictions, evaluated before the reference of `late` was drawn and while that of `torn` was broken."""
    cases = ["first", "late", "second", "torn"]
    for case in cases:
        for name in "ab":
            save(tmp_path / name, case, box(3, 5))
        if case != "late":
            save(tmp_path / "references", case, box(2, 5))
    (tmp_path / "references" / "torn.nii.gz").write_bytes(b"broken")
    early = evaluated(tmp_path, "b", missing=missing)
    assert [failure["case"] for failure in early.failures] == ["late", "torn"]
    for case in ("late", "torn"):
        save(tmp_path / "references", case, box(2, 5))
    assert evaluated(tmp_path, "a", missing=missing).failures == []
    a, b, again, output = (tmp_path / name for name in ("out-a", "out-b", "again", "compared"))
    if not listed:
        content = json.loads((b / "summary.json").read_text(encoding="utf-8"))
        assert content.pop("scored_as_empty") == []
        (b / "summary.json").write_text(json.dumps(content), encoding="utf-8")
    # The tables of an earlier version showed of `torn` only with `--missing penalty` that it had no score.
    left = ["late", "torn"] if listed or missing == "penalty" else ["late"]
    notes: list[str] = []
    row = compare_folders([a, b], output, ["iou"], note=notes.append)[0]
    assert (row["n"], row["left_out"], row["difference"] == 0) == (4 - len(left), 0, left[-1] == "torn")
    assert notes == [
        f"`{b}` has no score for {len(left)} of the 4 cases of `{a}`, such as `late`, not even as an empty prediction "
        f"(its failures.csv says why): {'it is' if len(left) == 1 else 'they are'} left out."
    ]
    paired = {line["case"]: line["out-b"] for line in read_csv(output / "paired.csv")}
    assert [case for case in cases if paired[case] == ""] == left
    for folder, neighbour in ((a, "c"), (b, "again")):
        shutil.copytree(folder, tmp_path / neighbour)
    compare_folders([a, b, tmp_path / "c"], output, ["iou"])
    ranking = read_csv(output / "ranking.csv")
    assert {line["n"] for line in ranking} == {str(4 - len(left))}
    assert (len({line["mean"] for line in ranking}) == 1) == (left[-1] == "torn")
    notes = []
    row = compare_folders([b, again], output, ["iou"], note=notes.append)[0]
    assert (row["n"], row["left_out"]) == (2, 2)
    assert notes == [
        f"Cases that both `{b}` and `{again}` failed at, and of which no compared folder has a score: 2, such as "
        "`late`. They are left out."
    ]


def test_the_summary_lists_the_failed_cases_that_count_as_empty_predictions(tmp_path):
    for case in ("good", "lost", "broken", "unknown"):
        save(tmp_path / "references", case, box(2, 4))
        save(tmp_path / "predictions", case, box(2, 4))
    (tmp_path / "predictions" / "lost.nii.gz").unlink()
    (tmp_path / "predictions" / "broken.nii.gz").write_bytes(b"broken")
    (tmp_path / "references" / "unknown.nii.gz").unlink()
    summary = evaluated(tmp_path, "predictions").summary
    assert [failure["case"] for failure in summary["failures"]] == ["broken", "lost", "unknown"]
    assert summary["scored_as_empty"] == ["broken", "lost"]
    assert summary["labels"]["1"]["iou"]["n"] == 3
