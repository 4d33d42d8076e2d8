"""Folders are compared only if they were scored by the same rules and against the same references."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from monai_iou.cli import main
from monai_iou.evaluation.columns import CASE_COLUMNS, FAILURE_COLUMNS
from monai_iou.evaluation.compare import METRICS, CompareError, compare_folders
from monai_iou.evaluation.evaluate import evaluate_folders
from monai_iou.evaluation.request import Request
from monai_iou.files import read_csv, write_csv, write_json

CASES = 9


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> None:
    path.parent.mkdir(exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    """Predictions that lie two voxels beside their references."""
    reference = np.zeros((12, 12, 12), np.uint8)
    reference[3:9, 3:9, 3:9] = 1
    for i in range(CASES):
        save(tmp_path / "references" / f"case{i}.nii.gz", reference)
        save(tmp_path / "predictions" / f"case{i}.nii.gz", np.roll(reference, 2, axis=0))
    return tmp_path


def scored(root: Path, name: str, references: str = "references", **options: Any) -> Path:
    evaluate_folders(Request(root / "predictions", root / references, root / name, **options))
    return root / name


def refusal(folders: list[Path], output: Path, metrics: tuple[str, ...] = METRICS) -> str:
    with pytest.raises(CompareError) as error:
        compare_folders(folders, output, metrics)
    assert not output.exists()
    return str(error.value)


def notes_of(folders: list[Path], output: Path, metrics: tuple[str, ...] = METRICS) -> list[str]:
    """The notes of a comparison, all of which its page shows."""
    notes: list[str] = []
    compare_folders(folders, output, metrics, note=notes.append)
    page = (output / "comparison.html").read_text(encoding="utf-8")
    shown = re.findall(r'<p class="warning">(.*?)</p>', page)
    assert [re.sub(r"&[^;]+;", "'", text) for text in shown] == notes
    return notes


def test_another_tolerance_does_not_make_a_method_better(masks: Path) -> None:
    folders = [scored(masks, "strict", tolerance=1), scored(masks, "lax", tolerance=3, missing="exclude")]
    assert refusal(folders, masks / "out") == (
        f"Expected `{folders[0]}` and `{folders[1]}` to be scored by the same rules, but got `1.0 mm` and `3.0 mm` for "
        "label 1 by `--tolerance`, on which nsd depends: evaluate both with the same `--tolerance`, or leave nsd out "
        "of `--metrics`."
    )
    assert "on which every score depends: evaluate both with the same `--tolerance`." in refusal(
        folders, masks / "out", ("nsd",)
    )
    assert notes_of(folders, masks / "out", ("iou", "dice")) == [
        f"`{folders[0]}` and `{folders[1]}` were evaluated with different `--tolerance` (`1.0 mm` and `3.0 mm` for "
        "label 1), on which no compared score depends."
    ]


def test_the_same_rules_in_other_words_are_the_same(masks: Path) -> None:
    first = scored(masks, "a", boundary="2mm", tolerance=2, present="either", labels=(1,))
    second = scored(masks, "b", boundary="2.0 mm", tolerances={"1": 2.0}, missing="penalty", regions={"1": (1,)})
    assert notes_of([first, second], masks / "out") == []


OPTIONS: dict[str, Any] = {
    "structures": {"1": [1, 2], "2": [2]},
    "ignore": None,
    "tolerance_mm": 1.0,
    "tolerances_mm": {"2": 2.0},
    "boundary": "2mm",
    "lesion_rule": "found: IoU of at least 0.5, one to one; components of 26 neighbours",
    "like": None,
    "resample": None,
}


def stored(folder: Path, options: dict[str, Any] | None = None, volume: float = 0.5, digest: str = "") -> Path:
    """A folder with a cases.csv of two labels, and the options and hashes of references in its summary.json."""
    folder.mkdir()
    rows = [
        dict.fromkeys(CASE_COLUMNS, 0.5) | {"case": f"case{i}", "label": label, "reference_ml": volume}
        for i in range(CASES)
        for label in "12"
    ]
    write_csv(folder / "cases.csv", CASE_COLUMNS, rows)
    inputs = {f"case{i}": {"prediction": f"p{i}", "reference": f"r{i}{digest if i > 1 else ''}"} for i in range(CASES)}
    if options is not None:
        write_json(folder / "summary.json", {"options": options, "inputs": inputs})
    return folder


@pytest.mark.parametrize(
    ("changed", "metrics", "message"),
    [
        (
            {"structures": {"1": [1, 2, 3], "2": [2]}},
            (),
            "got `1+2` and `1+2+3` for label 1 by `--labels` or `--regions`",
        ),
        (
            {"lesion_rule": "found: any; lesions as numbered"},
            (),
            "`labels` and `lesion numbers` for label 1",
        ),
        ({"ignore": 255}, (), "`nothing ignored` and `255 ignored` for label 1 by `--ignore`"),
        ({"tolerances_mm": {}}, ("nsd",), "`2.0 mm` and `1.0 mm` for label 2 by `--tolerance`"),
        ({"boundary": "2%"}, ("boundary_iou",), "`2.0 mm` and `2.0 %` for label 1 by `--boundary`"),
        (
            {"boundary_distance": "chessboard"},
            ("boundary_iou",),
            "`euclidean` and `chessboard` for label 1 by `--boundary-distance`",
        ),
        (
            {"lesion_rule": "found: any overlap, one to one; components of 26 neighbours"},
            ("lesion_f1", "pq", "sq", "rq"),
            "`IoU of at least 0.5, one to one` and `any overlap, one to one` for label 1 by `--match`",
        ),
        (
            {"lesion_rule": "found: IoU of at least 0.5, one to one; components of 6 neighbours of 3 mm³ or more"},
            ("lesion_f1", "pq", "sq", "rq", "cc_iou"),
            "`components of 26 neighbours` and `components of 6 neighbours of 3 mm³ or more` for label 1 by `--connec",
        ),
        ({"like": "isles22"}, ("dice",), "`our dice` and `the dice of isles22` for label 1 by `--like`"),
    ],
)
def test_every_rule_is_compared_where_a_score_depends_on_it(
    tmp_path: Path, changed: dict[str, Any], metrics: tuple[str, ...], message: str
) -> None:
    folders = [stored(tmp_path / "a", OPTIONS), stored(tmp_path / "b", {**OPTIONS, **changed})]
    every = (*METRICS, "rq")
    for metric in metrics or every:
        assert message in refusal(folders, tmp_path / "out", (metric,))
    others = tuple(metric for metric in every if metrics and metric not in metrics)
    if others:
        found = notes_of(folders, tmp_path / "out", others)
        assert len(found) == 1
        assert found[0].endswith(", on which no compared score depends.")


@pytest.mark.parametrize(
    "changed",
    [
        {"like": "autopet"},
        {"missing": "exclude"},
        {"present": "either"},
        {"boundary_distance": "euclidean"},
        {"lesion_rule": f"{OPTIONS['lesion_rule']} (8 in a slice)"},
    ],
)
def test_what_changes_no_compared_score_is_allowed(tmp_path: Path, changed: dict[str, Any]) -> None:
    folders = [stored(tmp_path / "a", OPTIONS), stored(tmp_path / "b", {**OPTIONS, **changed})]
    assert notes_of(folders, tmp_path / "out") == []


@pytest.mark.parametrize("known", [None, {}, {"structures": 1, "boundary": "wide", "like": "none", "lesion_rule": 0}])
def test_what_an_earlier_version_did_not_write_is_not_compared(tmp_path: Path, known: dict[str, Any] | None) -> None:
    folders = [stored(tmp_path / "a", OPTIONS), stored(tmp_path / "b", known), stored(tmp_path / "c", OPTIONS)]
    assert notes_of(folders, tmp_path / "out") == []
    (folders[1] / "summary.json").write_text('{"options": [], "inputs": {"case0": 1}}', encoding="utf-8")
    assert notes_of(folders, tmp_path / "other") == []


def test_the_second_and_third_folder_are_compared_too(tmp_path: Path) -> None:
    rules = (None, OPTIONS, {**OPTIONS, "boundary": "3mm"})
    folders = [stored(tmp_path / name, options) for name, options in zip("abc", rules, strict=True)]
    assert f"`{folders[1]}` and `{folders[2]}`" in refusal(folders, tmp_path / "out")


def test_other_references_are_refused(masks: Path) -> None:
    for path in (masks / "references").iterdir():
        array = np.asanyarray(nibabel.load(path).dataobj).copy()
        array[3, 3, 3 : 5 if path.name in ("case3.nii.gz", "case4.nii.gz") else 3] = 0
        save(masks / "corrected" / path.name, array)
    folders = [scored(masks, "a"), scored(masks, "b", "corrected")]
    assert refusal(folders, masks / "out") == (
        f"Expected `{folders[0]}` and `{folders[1]}` to be scored against the same references, but got 0.216 and "
        "0.214 ml in that of `case3`, label 1, and other volumes in 2 of 9 rows: evaluate both against the same "
        "references."
    )


def test_other_files_of_references_with_the_same_volumes_are_noted(tmp_path: Path) -> None:
    folders = [stored(tmp_path / "a", OPTIONS), stored(tmp_path / "b", OPTIONS, 0.5 * (1 + 1e-8), digest="x")]
    assert notes_of(folders, tmp_path / "out") == [
        f"`{folders[0]}` and `{folders[1]}` were scored against different files of references in 7 of 9 cases, such "
        "as `case2`, with the same volumes: make sure that they hold the same labels."
    ]


def test_predictions_that_one_folder_resampled_and_the_other_refused_are_noted(masks: Path) -> None:
    save(masks / "predictions" / "case0.nii.gz", np.ones((6, 6, 6), np.uint8), np.diag([2.0, 2.0, 2.0, 1.0]))
    folders = [scored(masks, "a", resample=True), scored(masks, "b")]
    assert notes_of(folders, masks / "out") == [
        f"Predictions on other grids are refused in `{folders[1]}`, where 1 of the cases failed, and resampled in "
        f"`{folders[0]}`: evaluate both with the same `--resample`."
    ]
    write_csv(folders[1] / "failures.csv", FAILURE_COLUMNS, [])
    write_csv(folders[1] / "cases.csv", CASE_COLUMNS, read_csv(folders[0] / "cases.csv"))
    summary = json.loads((folders[1] / "summary.json").read_text(encoding="utf-8"))
    write_json(folders[1] / "summary.json", {**summary, "failures": []})
    assert notes_of(folders, masks / "out") == []


def test_what_only_one_folder_was_asked_for_is_noted(tmp_path: Path) -> None:
    """A method that was evaluated on its easy cases alone must not be compared without a word."""
    first, second = stored(tmp_path / "a"), stored(tmp_path / "b")
    rows = read_csv(second / "cases.csv")
    write_csv(second / "cases.csv", CASE_COLUMNS, rows[:-2])
    add = {**rows[0], "label": "7"}
    write_csv(first / "cases.csv", CASE_COLUMNS, [*read_csv(first / "cases.csv"), add])
    assert notes_of([first, second], tmp_path / "out") == [
        f"`{first}` has label 7 and `{second}` does not: it is left out.",
        f"`{second}` was not asked for 1 of the 9 cases of `{first}`, such as `case8`: it is left out.",
    ]


def test_a_failed_case_that_the_other_was_not_asked_for_is_noted(tmp_path: Path) -> None:
    first, second = stored(tmp_path / "a"), stored(tmp_path / "b")
    write_csv(first / "failures.csv", FAILURE_COLUMNS, [{"case": "broken", "reason": "damaged"}])
    assert notes_of([first, second], tmp_path / "out") == [
        f"`{second}` was not asked for 1 of the 10 cases of `{first}`, such as `broken`: it is left out."
    ]


def test_the_command_refuses_and_notes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [stored(tmp_path / "a", OPTIONS), stored(tmp_path / "b", {**OPTIONS, "boundary": "3mm"})]
    arguments = ["compare", *map(str, folders), f"--output={tmp_path / 'out'}"]
    assert main(arguments) == 1
    assert "on which boundary_iou depends" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--metrics=iou"]) == 0
    assert "Note: " in capsys.readouterr().err
