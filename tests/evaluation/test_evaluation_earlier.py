"""What an output folder holds already: an earlier run's results are replaced, files of others never."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from monai_iou.evaluation.compare import CompareError, compare_folders
from monai_iou.evaluation.evaluate import evaluate_folders
from monai_iou.evaluation.exports import EXPORTS
from monai_iou.evaluation.request import RESULTS, Request, RequestError
from monai_iou.files import OutputError

CASES = 4


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("masks")
    for kind in ("predictions", "references"):
        (folder / kind).mkdir()
        for i in range(CASES):
            array = np.zeros((6, 5, 4), np.uint8)
            array[1 : 3 + i * (kind == "references"), 1:3, 1:3] = 1
            nib.save(nib.Nifti1Image(array, np.eye(4)), folder / kind / f"c{i}.nii")
    return folder


def evaluate(masks: Path, output: Path, **options: Any) -> None:
    evaluate_folders(Request(masks / "predictions", masks / "references", output, **options))


def texts(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("name", [*RESULTS, *(export.file for export in EXPORTS.values())])
@pytest.mark.parametrize("evaluated", [False, True], ids=["a folder of others", "a folder of results"])
def test_a_file_of_others_is_neither_replaced_nor_removed(
    name: str, evaluated: bool, masks: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    if evaluated:
        evaluate(masks, output)
    (output / name).write_text('{"foreground_mean": {"Dice": 0.9}}', encoding="utf-8")
    before = texts(output)
    expected = f"`{output / name}` there was not written by an evaluation and would be replaced: name another folder."
    with pytest.raises(RequestError, match=re.escape(expected)):
        evaluate(masks, output, export=tuple(EXPORTS))
    assert texts(output) == before
    if name not in RESULTS:  # nobody asks for it to be replaced
        evaluate(masks, output)
        assert (output / name).read_bytes() == before[name]


def test_a_folder_or_a_link_that_leads_nowhere_is_not_replaced(masks: Path, tmp_path: Path) -> None:
    (tmp_path / "one" / "lesions.csv").mkdir(parents=True)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "report.html").symlink_to(tmp_path / "absent")
    for name in ("one", "two"):
        with pytest.raises(RequestError, match="was not written by an evaluation"):
            evaluate(masks, tmp_path / name)


def test_exports_of_results_from_before_they_were_listed_are_replaced(masks: Path, tmp_path: Path) -> None:
    evaluate(masks, tmp_path, export=("panoptica", "latex"))
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    del summary["options"]["export"]
    (tmp_path / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    evaluate(masks, tmp_path, export=("panoptica",))
    assert texts(tmp_path).keys() == {*RESULTS, EXPORTS["panoptica"].file, EXPORTS["latex"].file}


def test_exports_are_those_of_the_last_evaluation(masks: Path, tmp_path: Path) -> None:
    for export in (("panoptica", "latex"), ("latex",), (), ("nnunet",), ("nnunet",)):
        evaluate(masks, tmp_path, export=export)
        assert json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))["options"]["export"] == list(export)
        assert texts(tmp_path).keys() == {*RESULTS, *(EXPORTS[kind].file for kind in export)}


def test_a_comparison_replaces_its_own_files_only(masks: Path, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        evaluate(masks, folder)
    output = tmp_path / "compared"
    compare_folders(folders, output)
    assert (output / "ranking.csv").is_file()
    compare_folders(folders[:2], output)
    assert texts(output).keys() == {"comparison.csv", "paired.csv", "comparison.html"}, "a ranking of another run"
    for name in ("ranking.csv", "paired.csv"):
        (output / name).write_text("mine\n", encoding="utf-8")
        with pytest.raises(OutputError, match=re.escape(f"`{output / name}` there was not written by a comparison")):
            compare_folders(folders[:2], output)
        assert (output / name).read_text(encoding="utf-8") == "mine\n"
        (output / name).unlink()


def save_from_a_spreadsheet(path: Path, separator: str, quoting: int) -> None:
    """As a program does where numbers have a decimal comma, after it has opened the table."""
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.reader(stream))
    with path.open("w", newline="", encoding="utf-8-sig") as stream:
        cells = ([re.sub(r"^(-?\d+)\.(\d+)$", r"\1,\2", cell) for cell in row] for row in rows)
        csv.writer(stream, delimiter=separator, quoting=quoting).writerows(cells)


@pytest.mark.parametrize(
    ("separator", "quoting"), [(";", csv.QUOTE_MINIMAL), ("\t", csv.QUOTE_MINIMAL), (";", csv.QUOTE_ALL)]
)
def test_tables_that_a_spreadsheet_has_saved_are_replaced(
    separator: str, quoting: int, masks: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        evaluate(masks, folder)
    before = texts(folders[1])
    for name in ("cases.csv", "lesions.csv", "failures.csv"):
        save_from_a_spreadsheet(folders[1] / name, separator, quoting)
    assert b"0,5" in (folders[1] / "cases.csv").read_bytes()
    output = tmp_path / "compared"
    with pytest.raises(CompareError) as error:
        compare_folders(folders, output)
    assert str(error.value) == (
        f"Expected `{folders[1] / 'cases.csv'}` as `monai-iou evaluate` wrote it, but got a table that another program "
        "has saved in a format of its own, as a spreadsheet with decimal commas does: evaluate into this folder again."
    )
    evaluate(masks, folders[1])
    assert {name: texts(folders[1])[name] for name in ("cases.csv", "lesions.csv", "failures.csv")} == {
        name: before[name] for name in ("cases.csv", "lesions.csv", "failures.csv")
    }
    for _ in range(2):  # and so are the tables of a comparison
        assert compare_folders(folders, output)[0]["difference"] == 0
        for name in ("comparison.csv", "paired.csv"):
            save_from_a_spreadsheet(output / name, separator, quoting)
