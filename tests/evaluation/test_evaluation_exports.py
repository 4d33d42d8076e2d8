"""Lesion numbers as input, one pair of files, and the formats of others."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from monai_iou.cli import main
from monai_iou.evaluation.evaluate import evaluate_folders
from monai_iou.evaluation.exports import EXPORTS, PANOPTICA_KEYS
from monai_iou.evaluation.request import EXPORTED, Request, RequestError
from monai_iou.files import read_csv
from monai_iou.metrics import lesion_scores

SHAPE = (12, 11, 10)


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([1.0, 2.0, 1.5, 1.0])), path)
    return path


def touching_lesions(shift: int) -> np.ndarray:
    """Two lesions that touch each other, one apart, and one of a number beyond what labels may have."""
    numbers = np.zeros(SHAPE, np.int16)
    numbers[1 + shift : 4 + shift, 2:5, 2:5] = 7
    numbers[4 + shift : 7 + shift, 2:5, 2:5] = 3
    numbers[1:4, 7:10, 6:9] = 900
    return numbers


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(3):
        save(tmp_path / "references" / f"c{i}.nii.gz", touching_lesions(0))
        save(tmp_path / "predictions" / f"c{i}.nii.gz", touching_lesions(i % 2))
    return tmp_path


def evaluated(folder: Path, **options: Any) -> tuple[list[dict[str, str]], dict[str, Any]]:
    output = folder / f"out{len(list(folder.glob('out*')))}"
    evaluate_folders(Request(folder / "predictions", folder / "references", output, **options))
    return read_csv(output / "cases.csv"), json.loads((output / "summary.json").read_text(encoding="utf-8"))


def test_numbered_lesions_stay_apart_where_they_touch(folder: Path) -> None:
    rows, summary = evaluated(folder, instances=True)
    for i, row in enumerate(rows):
        prediction, reference = touching_lesions(i % 2), touching_lesions(0)
        found = lesion_scores(prediction, reference, instances=True, spacing=(1.0, 2.0, 1.5))
        assert (int(row["lesion_tp"]), int(row["lesion_fp"]), int(row["lesion_fn"])) == (found.tp, found.fp, found.fn)
        assert float(row["pq"]) == found.pq
        assert found.tp + found.fn == 3
        both, either = ((f(prediction > 0, reference > 0)).sum() for f in (np.logical_and, np.logical_or))
        assert float(row["iou"]) == both / either
    assert summary["options"]["lesion_rule"] == "found: IoU of at least 0.5, one to one; lesions as numbered"
    page = (folder / "out0" / "report.html").read_text(encoding="utf-8")
    rule = "(found: IoU of at least 0.5, one to one; lesions as numbered)"
    assert f"A lesion is what has one number in the reference {rule}." in page
    assert "connected component" not in page
    assert [row["label"] for row in rows] == ["1"] * 3


@pytest.mark.parametrize(
    ("option", "value"), [("labels", (1,)), ("regions", {"a": (1,)}), ("ignore", 2), ("like", "isles22")]
)
def test_numbers_are_not_labels(folder: Path, option: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"Expected `--instances` without `--{option}`, as files then hold lesion"):
        evaluated(folder, instances=True, **{option: value})


def test_a_slice_and_an_empty_prediction_have_numbered_lesions_too(tmp_path: Path) -> None:
    save(tmp_path / "references" / "a.nii.gz", touching_lesions(0)[:, :, 2:3])
    save(tmp_path / "predictions" / "a.nii.gz", touching_lesions(0)[:, :, 2:3])
    save(tmp_path / "references" / "b.nii.gz", touching_lesions(0))
    save(tmp_path / "predictions" / "b.nii.gz", np.zeros(SHAPE, np.uint8))
    rows, _ = evaluated(tmp_path, instances=True)
    assert [(row["lesion_tp"], row["lesion_fn"]) for row in rows] == [("2", "0"), ("0", "3")]


@pytest.mark.parametrize("least", [0.0, 30.0])
def test_lesions_have_the_numbers_of_their_files(folder: Path, least: float) -> None:
    """Also where some are left out: the lesions have 81 mm3, and a speck 3 mm3."""
    speck = touching_lesions(0)
    speck[10, 9, 1] = 5
    save(folder / "references" / "c0.nii.gz", speck)
    (folder / "predictions" / "c2.nii.gz").unlink()
    evaluated(folder, instances=True, min_volume_mm3=least, missing="penalty")
    lesions = read_csv(folder / "out0" / "lesions.csv")
    found = {case: {(row["lesion"], row["status"]) for row in lesions if row["case"] == case} for case in ("c0", "c2")}
    small = {("5", "fn")} if least == 0 else set()
    assert found == {
        "c0": {("3", "tp"), ("7", "tp"), ("900", "tp")} | small,
        "c2": {("3", "fn"), ("7", "fn"), ("900", "fn")},
    }


def test_one_pair_of_files_is_an_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask = (touching_lesions(0) > 0).astype(np.uint8)
    prediction = save(tmp_path / "mine" / "result.nii.gz", np.roll(mask, 1, axis=0))
    reference = save(tmp_path / "theirs" / "scan_07.nii.gz", mask)
    assert main(["evaluate", "-p", str(prediction), "-r", str(reference), "-o", str(tmp_path / "out")]) == 0
    assert "Evaluated 1 of 1 cases." in capsys.readouterr().out
    (row,) = read_csv(tmp_path / "out" / "cases.csv")
    assert row["case"] == "scan_07"
    assert float(row["iou"]) == (mask & np.roll(mask, 1, axis=0)).sum() / (mask | np.roll(mask, 1, axis=0)).sum()


def test_one_pair_of_files_needs_no_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("predictions", "references"):
        save(tmp_path / kind / "case.nii.gz", touching_lesions(0))
    (tmp_path / "pairs.csv").write_text("prediction,reference\n", encoding="utf-8")
    files = [f"--{kind}={tmp_path / kind / 'case.nii.gz'}" for kind in ("predictions", "references")]
    assert main(["evaluate", *files, f"--output={tmp_path / 'out'}", f"--pairs={tmp_path / 'pairs.csv'}"]) == 2
    assert (
        "Expected two folders with `--pairs`, whose paths start at them, but got two files, which are a pair: drop "
        "`--pairs`, or name the folders." in capsys.readouterr().err
    )


def test_a_file_and_a_folder_are_no_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = save(tmp_path / "r" / "a.nii.gz", np.ones(SHAPE, np.uint8))
    assert main(["evaluate", "-p", str(file), "-r", str(file.parent), "-o", str(tmp_path / "out")]) == 2
    assert f"but got the volume `{file}` and the folder `{file.parent}`: name" in capsys.readouterr().err


def test_the_export_has_the_layout_of_nnunet(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {}
    for i in range(3):
        for kind in ("references", "predictions"):
            arrays[kind, i] = rng.integers(0, 2 if i == 1 else 3, SHAPE).astype(np.uint8)
            save(tmp_path / kind / f"c{i}.nii.gz", arrays[kind, i])
    evaluated(tmp_path, export=("nnunet", "latex"))
    found = json.loads((tmp_path / "out0" / "nnunet_summary.json").read_text(encoding="utf-8"))
    assert list(found) == ["foreground_mean", "mean", "metric_per_case"]
    dices: dict[int, list[float]] = {1: [], 2: []}
    for i, case in enumerate(found["metric_per_case"]):
        assert case["prediction_file"] == str(tmp_path / "predictions" / f"c{i}.nii.gz")
        for label in (1, 2):
            p, t = (arrays[kind, i] == label for kind in ("predictions", "references"))
            counts = {"TP": p & t, "FP": p & ~t, "FN": ~p & t, "TN": ~p & ~t, "n_pred": p, "n_ref": t}
            metrics = case["metrics"][str(label)]
            for name, mask in counts.items():
                assert metrics[name] == mask.sum()
            if not (p | t).any():
                assert math.isnan(metrics["Dice"])
                assert math.isnan(metrics["IoU"])
                continue
            assert metrics["Dice"] == pytest.approx(2 * (p & t).sum() / (p.sum() + t.sum()))
            dices[label].append(metrics["Dice"])
    means = {label: np.mean(values) for label, values in dices.items()}
    assert {int(label): mean["Dice"] for label, mean in found["mean"].items()} == pytest.approx(means)
    assert found["foreground_mean"]["Dice"] == pytest.approx(np.mean(list(means.values())))

    with (tmp_path / "out0" / "latex.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["label"] for row in rows] == ["1", "2"]
    assert all(name.isalpha() for name in rows[0])
    assert float(rows[0]["dice"]) == pytest.approx(means[1], abs=1e-4)
    assert rows[0]["dicelow"] == ""  # three cases have no interval


@pytest.mark.parametrize("chosen", [{}, {"regions": {"whole": (1, 2), "alone": (2,)}}, {"labels": (1, 2)}])
def test_the_export_names_regions_as_nnunet_does(chosen: dict[str, Any], tmp_path: Path) -> None:
    """By the text of a tuple where dataset.json writes a list, also of one value (`LabelManager._get_regions`)."""
    for kind in ("labelsTr", "predictions"):
        save(tmp_path / kind / "a.nii.gz", np.arange(np.prod(SHAPE)).reshape(SHAPE).astype(np.uint8) % 3)
    labels = {"background": 0, "whole": [1, 2], "core": [2], "rim": 1}
    content = {"labels": labels, "regions_class_order": [1, 2, 1]}
    (tmp_path / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    request = Request(tmp_path / "predictions", tmp_path / "labelsTr", tmp_path / "out", export=("nnunet",), **chosen)
    evaluate_folders(request)
    found = json.loads((tmp_path / "out" / "nnunet_summary.json").read_text(encoding="utf-8"))
    theirs = {str(tuple(value) if isinstance(value, list) else value) for value in labels.values() if value != 0}
    expected = {"labels": {"1", "2"}, "regions": {"(1, 2)", "2"}}.get(next(iter(chosen), ""), theirs)
    assert theirs == {"(1, 2)", "(2,)", "1"}
    assert set(found["mean"]) == set(found["metric_per_case"][0]["metrics"]) == expected


def test_labels_are_text_for_latex(tmp_path: Path) -> None:
    for kind in ("references", "predictions"):
        save(tmp_path / kind / "a.nii.gz", touching_lesions(0))
    names = ("whole_tumour", "a & b", "50 % #1 $x$", "{x}~^2", r"a\b")
    evaluated(tmp_path, export=("latex",), regions=dict.fromkeys(names, (7,)))
    with (tmp_path / "out0" / "latex.csv").open(encoding="utf-8", newline="") as stream:
        labels = [row["label"] for row in csv.DictReader(stream)]
    assert labels == [
        r"whole\_tumour",
        r"a \& b",
        r"50 \% \#1 \$x\$",
        r"\{x\}\textasciitilde{}\textasciicircum{}2",
        r"a\textbackslash{}b",
    ]


def panoptica_scores(tp: int, predicted: int, referred: int, ious: list[float]) -> dict[str, float]:
    """Panoptica's scores by its own definitions, from instances and the IoU of each matched pair."""
    false, missed = predicted - tp, referred - tp
    if not predicted + referred:
        rq = sq = sq_dsc = math.nan
    else:
        rq = tp / (tp + false / 2 + missed / 2)
        sq = sum(ious) / tp if tp else 0.0
        sq_dsc = sum(2 * iou / (1 + iou) for iou in ious) / tp if tp else 0.0
    spread = math.sqrt(sum((iou - sq) ** 2 for iou in ious) / tp) if tp else math.nan
    return {
        **{"n_ref_instances": referred, "n_pred_instances": predicted, "tp": tp, "fp": false, "fn": missed},
        **{"prec": tp / predicted if predicted else math.nan, "rec": tp / referred if referred else math.nan},
        **{"rq": rq, "sq": sq, "pq": sq * rq, "sq_std": spread, "sq_dsc": sq_dsc, "pq_dsc": sq_dsc * rq},
    }


def test_the_export_has_the_columns_of_panoptica(tmp_path: Path) -> None:
    for i, shift in enumerate((0, 1, 3, 20, 40)):
        reference, prediction = np.zeros((40, 12, 12), np.uint8), np.zeros((40, 12, 12), np.uint8)
        if shift < 40:
            reference[2:6, 2:6, 2:6] = reference[12:16, 2:6, 2:6] = 1
            prediction[2 + shift : 6 + shift, 2:6, 2:6] = 1
            prediction[12 + shift // 2 : 16 + shift // 2, 2:6, 2:6] = 1
        save(tmp_path / "references" / f"c{i}.nii.gz", reference)
        save(tmp_path / "predictions" / f"c{i}.nii.gz", prediction)
    evaluated(tmp_path, export=("panoptica",), regions={"a-b": (1,)})
    with (tmp_path / "out0" / "panoptica.tsv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    assert [row["subject_name"] for row in rows] == [f"c{i}" for i in range(5)]
    box = 4 * 4 * 4
    expected = [
        panoptica_scores(2, 2, 2, [1.0, 1.0]),
        panoptica_scores(2, 2, 2, [3 / 5, 1.0]),
        panoptica_scores(1, 2, 2, [3 / 5]),
        panoptica_scores(0, 1, 2, []),
        panoptica_scores(0, 0, 0, []),
    ]
    for row, scores in zip(rows, expected, strict=True):
        for name, value in scores.items():
            cell = row[f"a_b-{name}"]
            assert (math.nan if cell == "" else float(cell)) == pytest.approx(value, nan_ok=True), name
    assert float(rows[1]["a_b-global_bin_volume_ref"]) == 2 * box
    assert float(rows[1]["a_b-global_bin_iou"]) == pytest.approx((box + 48) / (3 * box - 48))


def test_the_dice_of_the_exports_is_nans_where_both_masks_are_empty(tmp_path: Path) -> None:
    """The column of ISLES'22 is 1 there, and is called as ours; the formats of others have their own rule."""
    for i, shift in ((0, 1), (1, 0)):
        mask = np.zeros(SHAPE, np.uint8)
        mask[2:4, 2:4, 2:4] = 1 - i
        save(tmp_path / "references" / f"c{i}.nii.gz", mask)
        save(tmp_path / "predictions" / f"c{i}.nii.gz", np.roll(mask, shift, axis=0))
    for options in ({}, {"like": "isles22"}):
        rows, _ = evaluated(tmp_path, export=("nnunet", "panoptica"), **options)
        out = tmp_path / f"out{len(list(tmp_path.glob('out*'))) - 1}"
        assert rows[1]["dice"] == ("1.0" if options else "")
        found = json.loads((out / "nnunet_summary.json").read_text(encoding="utf-8"))
        assert math.isnan(found["metric_per_case"][1]["metrics"]["1"]["Dice"])
        assert (found["mean"]["1"]["Dice"], found["mean"]["1"]["IoU"]) == (0.5, pytest.approx(1 / 3))
        with (out / "panoptica.tsv").open(encoding="utf-8", newline="") as stream:
            cells = [row["1-global_bin_dsc"] for row in csv.DictReader(stream, delimiter="\t")]
        assert cells == ["0.5", ""]


def test_fragments_of_a_lesion_are_one_instance_as_in_panoptica(tmp_path: Path) -> None:
    """Panoptica 2.1.7 with `NaiveThresholdMatching(matching_threshold=0.01, allow_many_to_one=True)` says the same."""
    reference = np.zeros((20, 20, 20), np.uint8)
    reference[2:18, 4:8, 4:8] = 1
    prediction = reference.copy()
    prediction[[5, 9, 13]] = 0
    save(tmp_path / "references" / "c.nii.gz", reference)
    save(tmp_path / "predictions" / "c.nii.gz", prediction)
    evaluated(tmp_path, export=("panoptica",), match="any", pairing="many-to-one")
    with (tmp_path / "out0" / "panoptica.tsv").open(encoding="utf-8", newline="") as stream:
        (row,) = csv.DictReader(stream, delimiter="\t")
    expected = {"n_ref_instances": 1, "n_pred_instances": 1, "tp": 1, "fp": 0, "fn": 0, "prec": 1, "rec": 1, "rq": 1}
    assert {name: float(row[f"1-{name}"]) for name in expected} == expected


def test_panoptica_reads_the_export_and_finds_the_same(tmp_path: Path) -> None:
    panoptica = pytest.importorskip("panoptica", exc_type=ImportError)
    rng = np.random.default_rng(1)
    maps = {}
    for i in range(3):
        for kind in ("references", "predictions"):
            maps[kind, i] = (rng.random(SHAPE) < 0.04).astype(np.uint8)
        maps["predictions", i] |= maps["references", i] * (rng.random(SHAPE) < 0.8)
        for kind in ("references", "predictions"):
            save(tmp_path / kind / f"c{i}.nii.gz", maps[kind, i].astype(np.uint8))
    evaluated(tmp_path, export=("panoptica",))
    statistic = panoptica.Panoptica_Statistic.from_file(str(tmp_path / "out0" / "panoptica.tsv"))
    evaluator = panoptica.Panoptica_Evaluator(
        expected_input=panoptica.InputType.SEMANTIC,
        instance_approximator=panoptica.ConnectedComponentsInstanceApproximator(),
        instance_matcher=panoptica.NaiveThresholdMatching(matching_threshold=0.5),
    )
    assert set(PANOPTICA_KEYS) & set(statistic.metricnames) >= {"tp", "fp", "fn", "rq", "sq", "pq"}
    for i in range(3):
        theirs = evaluator.evaluate(maps["predictions", i], maps["references", i])["ungrouped"].to_dict()
        for name in PANOPTICA_KEYS:
            if theirs.get(name) is not None and name in statistic.metricnames:
                assert statistic.get("1", name)[i] == pytest.approx(theirs[name], nan_ok=True), name


def test_a_mistyped_export_is_refused_with_a_suggestion(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["-p", str(folder / "predictions"), "-r", str(folder / "references"), "-o", str(folder / "out")]
    assert main(["evaluate", *options, "--export=panoptika"]) == 2
    assert "Expected one of nnunet, panoptica, latex, but got 'panoptika': perhaps you meant panoptica." in (
        capsys.readouterr().err
    )
    assert main(["evaluate", *options, "--export=xyz"]) == 2
    assert "but got 'xyz': choose one." in capsys.readouterr().err
    assert not (folder / "out").exists()
    assert tuple(EXPORTS) == EXPORTED, "the same words as in the command, in their order"


def test_an_export_of_an_earlier_evaluation_does_not_stay(folder: Path) -> None:
    request = Request(folder / "predictions", folder / "references", folder / "out", instances=True, export=("nnunet",))
    evaluate_folders(request)
    assert (folder / "out" / "nnunet_summary.json").is_file()
    evaluate_folders(Request(folder / "predictions", folder / "references", folder / "out", instances=True))
    assert not (folder / "out" / "nnunet_summary.json").exists()
