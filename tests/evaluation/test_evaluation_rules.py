from __future__ import annotations

import html
import json
import math
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy.integrate import trapezoid

from monai_iou.cli import main
from monai_iou.evaluation.columns import columns_of
from monai_iou.evaluation.compare import compare_folders
from monai_iou.evaluation.evaluate import evaluate_folders
from monai_iou.evaluation.request import Request, RequestError
from monai_iou.evaluation.rules import Rules, Structure, split_width
from monai_iou.evaluation.scoring import evaluate_case
from monai_iou.files import read_csv
from monai_iou.metrics import CHALLENGES, boundary_iou, challenge_scores, lesion_scores, surface_scores
from monai_iou.volumes.grid import Grid

SPACING = (1.0, 1.5, 2.0)
GRID = Grid((40, 36, 20), np.diag([*SPACING, 1.0]))
ONE = [Structure("1", (1,))]


def masks() -> tuple[np.ndarray, np.ndarray]:
    """Lesions found well, found by a corner, split in two, missed, and invented."""
    reference, prediction = np.zeros(GRID.shape, np.uint8), np.zeros(GRID.shape, np.uint8)
    for corner in ((4, 4, 4), (4, 20, 4), (20, 4, 4), (20, 20, 12)):
        reference[tuple(slice(c, c + 6) for c in corner)] = 1
    prediction[5:10, 4:10, 4:10] = 1
    prediction[9:14, 25:30, 9:14] = 1
    prediction[20:22, 4:10, 4:10] = prediction[24:26, 4:10, 4:10] = 1
    prediction[32:35, 30:33, 2:5] = 1
    prediction[38, 34, 18] = 1
    return prediction, reference


@pytest.mark.parametrize(
    "options",
    [
        {"match": "any"},
        {"match": "iou:0.1", "pairing": "many-to-one"},
        {"match": "overlap:0.25", "connectivity": 6},
        {"min_volume_mm3": 5.0, "connectivity": 18},
    ],
)
def test_lesion_columns_follow_the_rule(options):
    prediction, reference = masks()
    row = evaluate_case(prediction, reference, GRID, ONE, rules=Rules(**options))[0][0]
    expected = lesion_scores(prediction, reference, spacing=SPACING, **options)
    assert (row["lesion_tp"], row["lesion_fp"], row["lesion_fn"]) == (expected.tp, expected.fp, expected.fn)
    assert row["lesion_f1"] == expected.f1
    assert (row["fragments"], row["merges"]) == (1, 0), "whatever the rule, one lesion is split in two"
    assert row["lesion_f1"] != evaluate_case(prediction, reference, GRID, ONE)[0][0]["lesion_f1"]


def test_fragments_and_merges_are_counted_where_they_count_as_found(tmp_path):
    """A lesion that is predicted in three pieces, and two lesions that are predicted as one."""
    reference, prediction = np.zeros((12, 10, 8), np.uint8), np.zeros((12, 10, 8), np.uint8)
    reference[1:10, 1:3, 1:3] = prediction[1:3, 1:3, 1:3] = prediction[4:6, 1:3, 1:3] = prediction[7:10, 1:3, 1:3] = 1
    reference[1:4, 6:8, 1:3] = reference[6:9, 6:8, 1:3] = prediction[1:9, 6:8, 1:3] = 1
    for kind, array in (("references", reference), ("predictions", prediction)):
        (tmp_path / kind).mkdir()
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / kind / "a.nii.gz")
    folders = tmp_path / "predictions", tmp_path / "references", tmp_path / "out"
    done = evaluate_folders(Request(*folders, match="any", pairing="many-to-one"))
    row = read_csv(tmp_path / "out" / "cases.csv")[0]
    names = ("lesion_tp", "lesion_fp", "lesion_fn", "fragments", "merges")
    assert [row[name] for name in names] == ["3", "0", "0", "2", "1"]
    assert [done.summary["labels"]["1"][name]["mean"] for name in names] == [3, 0, 0, 2, 1]
    assert "<dt>Fragments</dt>" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_exact_halves_and_near_components_are_the_users_choice(tmp_path):
    reference = np.zeros((12, 10, 8), np.uint8)
    reference[1:3, 1, 1] = 1
    reference[6:8, 5, 5] = reference[9, 5, 5] = 1
    prediction = np.zeros_like(reference)
    prediction[1, 1, 1] = prediction[6:10, 5, 5] = 1
    for kind, array in (("references", reference), ("predictions", prediction)):
        (tmp_path / kind).mkdir()
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / kind / "a.nii.gz")
    found = {}
    for name, options in (("default", []), ("strict", ["--strict"]), ("joined", ["--strict", "--dilation=1"])):
        paths = [f"--{kind}={tmp_path / kind}" for kind in ("references", "predictions")]
        assert main(["evaluate", *paths, f"--output={tmp_path / name}", *options]) == 0
        row = read_csv(tmp_path / name / "cases.csv")[0]
        rule = json.loads((tmp_path / name / "summary.json").read_text(encoding="utf-8"))["options"]["lesion_rule"]
        found[name] = [*(int(row[f"lesion_{kind}"]) for kind in ("tp", "fp", "fn")), rule]
        joined = ", or several that are joined by 1 dilation" if name == "joined" else ""
        lesion = f"A lesion is a connected component of the reference{joined} ({rule})."
        assert lesion in (tmp_path / name / "report.html").read_text(encoding="utf-8")
    near = "components of 26 neighbours (8 in a slice)"
    assert found["default"] == [2, 0, 1, f"found: IoU of at least 0.5, one to one; {near}"]
    assert found["strict"] == [0, 2, 3, f"found: IoU above 0.5, one to one; {near}"]
    assert found["joined"][:3] == [1, 1, 1]
    assert found["joined"][3].endswith(f"{near}, joined by 1 dilation")


def test_the_curve_of_f1_is_the_mean_of_the_cases(tmp_path):
    prediction, reference = masks()
    cases = {"a": (prediction, reference), "b": (reference, reference), "c": (0 * prediction, 0 * reference)}
    for name, pair in cases.items():
        for kind, array in zip(("predictions", "references"), pair, strict=True):
            (tmp_path / kind).mkdir(exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(array, GRID.affine), tmp_path / kind / f"{name}.nii.gz")
    nibabel.save(nibabel.Nifti1Image(reference, GRID.affine), tmp_path / "references" / "missing.nii.gz")
    request = Request(tmp_path / "predictions", tmp_path / "references", tmp_path / "out")
    found = evaluate_folders(request).summary["lesion_f1_curves"]["1"]
    curve = lesion_scores(prediction, reference, spacing=SPACING).curve()
    expected = (curve.f1 + 1.0 + 0.0) / 3  # nothing to find in c; without a prediction nothing is found
    assert found["thresholds"] == pytest.approx(curve.thresholds)
    assert found["f1"] == pytest.approx(expected)
    assert found["area"] == pytest.approx(trapezoid(expected, curve.thresholds))
    assert "Lesion F1 by threshold" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert evaluate_folders(request).summary["lesion_f1_curves"]["1"] == found
    excluded = evaluate_folders(replace(request, missing="exclude")).summary["lesion_f1_curves"]["1"]
    assert excluded["f1"] == pytest.approx((curve.f1 + 1.0) / 2)


def test_a_slice_has_fewer_neighbours():
    reference = np.zeros((8, 8, 1), np.uint8)
    reference[2, 2] = reference[3, 3] = 1
    grid = Grid(reference.shape, np.eye(4))
    counts = [
        evaluate_case(reference, reference, grid, ONE, rules=Rules(connectivity=n))[0][0]["lesion_tp"]
        for n in (6, 18, 26)
    ]
    assert counts == [2, 1, 1]
    words = [Rules(connectivity=n).in_words.partition("; ")[2] for n in (6, 18, 26)]
    assert words == [f"components of {n} neighbours ({flat} in a slice)" for n, flat in ((6, 4), (18, 8), (26, 8))]


@pytest.mark.parametrize("like", sorted(CHALLENGES))
def test_challenge_columns_are_the_challenges_own(tmp_path, like):
    prediction, reference = masks()
    for case, predicted in (("both", prediction), ("none", np.zeros_like(prediction))):
        for kind, array in (("references", reference), ("predictions", predicted)):
            (tmp_path / kind).mkdir(exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(array, GRID.affine), tmp_path / kind / f"{case}.nii.gz")
    evaluate_folders(Request(tmp_path / "predictions", tmp_path / "references", tmp_path / "out", like=like))
    rows = read_csv(tmp_path / "out" / "cases.csv")
    expected = challenge_scores(like, prediction == 1, reference == 1, spacing=SPACING)
    assert tuple(rows[0])[-len(CHALLENGES[like].columns) :] == CHALLENGES[like].columns or like == "isles22"
    assert set(CHALLENGES[like].columns) <= set(rows[0])
    for name, value in expected.items():
        assert (float(rows[0][name]) if rows[0][name] else math.nan) == pytest.approx(value, nan_ok=True)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert summary["options"]["like_rule"] == CHALLENGES[like].rule
    assert set(expected) <= set(summary["labels"]["1"])
    assert CHALLENGES[like].rule in (tmp_path / "out" / "report.html").read_text(encoding="utf-8").replace("&#39;", "'")


@pytest.mark.parametrize("like", [None, "isles22"])
def test_pages_explain_the_dice_that_they_show(tmp_path, like):
    mask = np.zeros(GRID.shape, np.uint8)
    mask[2:6, 2:6, 2:6] = 1
    for kind in ("predictions", "references"):
        (tmp_path / kind).mkdir()
        nibabel.save(nibabel.Nifti1Image(mask, GRID.affine), tmp_path / kind / "a.nii.gz")
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        evaluate_folders(Request(tmp_path / "predictions", tmp_path / "references", folder, like=like))
    compare_folders(folders, tmp_path / "compared", ["dice"], "dice")
    shown = columns_of(None if like is None else CHALLENGES[like])["dice"].definition
    other = columns_of(CHALLENGES["isles22"] if like is None else None)["dice"].definition
    for page in (folders[0] / "report.html", tmp_path / "compared" / "comparison.html"):
        text = html.unescape(page.read_text(encoding="utf-8"))
        assert shown in text
        assert other not in text


def test_summary_and_report_name_the_rule_in_words(tmp_path):
    prediction, reference = masks()
    for kind, array in (("references", reference), ("predictions", prediction)):
        (tmp_path / kind).mkdir()
        nibabel.save(nibabel.Nifti1Image(array, GRID.affine), tmp_path / kind / "a.nii.gz")
    request = Request(
        tmp_path / "predictions", tmp_path / "references", tmp_path / "out", match="any", tolerances={"1": 3.0}
    )
    done = evaluate_folders(request)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert summary["options"]["lesion_rule"].startswith("found: any overlap, one to one")
    assert "found: any overlap, one to one" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    masks_ = prediction == 1, reference == 1
    assert done.rows[0]["nsd"] == surface_scores(*masks_, tolerances=(3.0,), spacing=SPACING).nsd[0]


def test_tolerances_of_single_labels():
    both = np.array(masks()[1])
    both[20:26] *= 2
    moved = np.roll(both, 1, axis=0)
    structures = [Structure("1", (1,)), Structure("2", (2,))]
    rows = evaluate_case(moved, both, GRID, structures, rules=Rules(1.5, {"2": 0.25}))[0]
    for row, tolerance in zip(rows, (1.5, 0.25), strict=True):
        value = int(row["label"])
        expected = surface_scores(moved == value, both == value, tolerances=(tolerance,), spacing=SPACING)
        assert row["nsd"] == expected.nsd[0]
    assert rows[1]["nsd"] < 1


@pytest.mark.parametrize(("text", "width"), [("3mm", 3.0), ("2%", 0.02 * np.linalg.norm([40, 54, 40]))])
def test_boundary_width_in_mm_or_of_the_diagonal(text, width):
    prediction, reference = masks()
    row = evaluate_case(prediction, reference, GRID, ONE, rules=Rules(boundary=text))[0][0]
    assert row["boundary_iou"] == boundary_iou(prediction, reference, width=width, spacing=SPACING)


@pytest.mark.parametrize(("text", "width"), [("3mm", 3.0), ("4%", "4%")])
def test_the_authors_distance_of_the_boundary_is_an_option(tmp_path, text, width):
    """Of the whole image, although masks are cut to their structure; the distances differ in the corner of an L."""
    reference = np.zeros(GRID.shape, np.uint8)
    reference[4:16, 4:16, 4:12] = 1
    reference[10:16, 10:16] = 0
    prediction = np.roll(reference, 1, axis=0)
    for kind, array in (("references", reference), ("predictions", prediction)):
        (tmp_path / kind).mkdir()
        nibabel.save(nibabel.Nifti1Image(array, GRID.affine), tmp_path / kind / "a.nii.gz")
    command = ["evaluate", *(f"--{kind}={tmp_path / kind}" for kind in ("references", "predictions"))]
    found = {}
    for distance in ("euclidean", "chessboard"):  # into one folder, where the finished case is scored again
        options = [f"--output={tmp_path / 'out'}", f"--boundary={text}"]
        options += [f"--boundary-distance={distance}"] if distance == "chessboard" else []
        assert main([*command, *options]) == 0
        found[distance] = float(read_csv(tmp_path / "out" / "cases.csv")[0]["boundary_iou"])
        expected = boundary_iou(prediction, reference, width=width, spacing=SPACING, distance=distance)
        assert found[distance] == pytest.approx(expected, abs=1e-12)
        rules = Rules(boundary=text, boundary_distance=distance)
        assert evaluate_case(prediction, reference, GRID, ONE, rules=rules)[0][0]["boundary_iou"] == found[distance]
        summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
        assert summary["options"]["boundary_distance"] == distance
        shown = f"wide, {distance.replace('euclid', 'Euclid')} distance</dd>"
        assert shown in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert found["chessboard"] != found["euclidean"]


@pytest.mark.parametrize("text", ["2", "mm", "0mm", "-1mm", "2 px", "1.2.3mm", "."])
def test_other_widths_are_refused(text):
    with pytest.raises(ValueError, match="Expected `--boundary` to be a width such as 2mm or 2%, but got"):
        split_width(text)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"boundary": "2"}, "Expected `--boundary` to be a width such as 2mm or 2%, but got 2: correct it."),
        (
            {"boundary_distance": "city"},
            "Expected `--boundary-distance` to be among euclidean, chessboard, but got city: choose one.",
        ),
        ({"match": "dice:0.5"}, 'Expected `match` to be "any", "iou:0.5" or "overlap:0.25", but got'),
        ({"connectivity": 8}, "Expected `--connectivity` to be 6, 18 or 26, but got 8: choose one."),
        ({"like": "kits"}, "Expected `--like` to be among brats-mets, isles22, autopet, ms, but got kits: choose one."),
        ({"dilation": -1}, "Expected `--dilation` to be 0 or more, but got -1: give 1 for BraTS-METS."),
        ({"min_volume_mm3": -1.0}, "Expected `--min-volume` to be 0 mm3 or more, but got -1.0: give a volume."),
        ({"pictures": "some"}, "Expected `--pictures` to be all, worst or a number, but got some: choose one."),
        ({"missing": "zero"}, "Expected `--missing` to be among both, exclude, penalty, but got zero: choose one."),
        (
            {"export": ("nnunets",)},
            "Expected `--export` to be among nnunet, panoptica, latex, but got nnunets: perhaps",
        ),
    ],
)
def test_wrong_rules_are_refused_before_any_work(tmp_path: Path, options, text):
    with pytest.raises(RequestError) as error:
        evaluate_folders(Request(tmp_path, tmp_path, tmp_path / "out", **options))
    assert str(error.value).startswith(text)
