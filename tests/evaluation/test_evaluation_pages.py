"""What the pages say of many labels, of many cases and of patients, and that they look at every score once."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from monai_iou.console import print_comparison, print_evaluation
from monai_iou.evaluation import compare_page, report
from monai_iou.evaluation.columns import CASE_COLUMNS
from monai_iou.evaluation.compare import compare_folders
from monai_iou.evaluation.evaluate import evaluate_folders
from monai_iou.evaluation.report import report_text
from monai_iou.evaluation.request import Request
from monai_iou.evaluation.results import Evaluation
from monai_iou.files import write_csv, write_json

LABELS, CASES = 9, 4


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """Four cases of nine labels, and a tenth one that no case holds; case i lacks 2 i voxels of each of them."""
    folder = tmp_path_factory.mktemp("many")
    for case in range(CASES):
        reference = np.zeros((12, 12, 4), np.uint8)
        for value in range(LABELS):
            x, y = 4 * (value % 3), 4 * (value // 3)
            reference[x : x + 3, y : y + 3] = value + 1
        prediction = reference.copy()
        prediction[:, :, :case] = 0
        save(folder / "references" / f"c{case}.nii", reference)
        save(folder / "predictions" / f"c{case}.nii", prediction)
    labels = (*range(1, LABELS + 1), 20)
    return evaluate_folders(Request(folder / "predictions", folder / "references", folder / "out", labels=labels))


def heat_of(page: str) -> dict[str, Any]:
    found = re.search(r'id="heat-data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    heat: dict[str, Any] = json.loads(found[1])
    return heat


def test_the_lowest_label_is_one_that_has_a_mean(many: Evaluation) -> None:
    tiles = re.findall(r'<span class="what">(.*?)</span><b>(.*?)</b>', report_text(many))
    assert many.summary["labels"]["20"]["iou"]["mean"] is None
    assert [what.split(":")[0] for what, _ in tiles] == ["Cases", "lowest", "middle", "highest"]
    assert all("20" not in what and "-" not in value for what, value in tiles)


def test_labels_without_a_mean_have_no_tile_among_many(many: Evaluation) -> None:
    undefined = {name: {"iou": {"mean": None}} for name in many.names}
    assert report._headed(undefined, many.names) == []
    assert report._headed({**undefined, "3": {"iou": {"mean": 0.5}}}, many.names) == [("", "3")]
    assert report._headed(undefined, ["1", "2"]) == [("", "1"), ("", "2")]


def test_a_heat_map_has_the_cases_of_the_lowest_means_and_says_so(
    many: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = heat_of(report_text(many))
    assert whole["cases"] == ["c3", "c2", "c1", "c0"]
    assert [line[0] for line in whole["values"]] == [25, 50, 75, 100]
    assert {line[-1] for line in whole["values"]} == {None}
    assert "cases.csv has all" not in report_text(many)
    for name, most in (("HEAT_CASES", 3), ("HEAT_CELLS", 3 * (LABELS + 1) + 1)):
        with monkeypatch.context() as patch:
            patch.setattr(report, name, most)
            page = report_text(many)
        assert heat_of(page)["cases"] == ["c3", "c2", "c1"]
        assert "The 3 cases with the lowest means are shown; cases.csv has all." in page


def test_a_heat_map_of_most_cases_is_a_canvas_that_browsers_draw() -> None:
    script = (Path(report.__file__).parent / "templates" / "heat.js").read_text(encoding="utf-8")
    sides, largest, area = (
        re.search(text, script, re.DOTALL)
        for text in (
            r"wide = side\((\d+), (\d+), (\d+),.*side\((\d+), (\d+), (\d+),",
            r"Math\.floor\((\d+) / cells\)",
            r"room = Math\.floor\((\d+) / wide",
        )
    )
    assert sides is not None
    assert largest is not None
    assert area is not None
    width, height = [int(side) for side in sides.groups()[:3]], [int(side) for side in sides.groups()[3:]]
    assert int(area[1]) == 1 << 24
    assert height[0] * report.HEAT_CASES <= int(largest[1]) == 16384
    assert width[0] * height[0] * report.HEAT_CELLS <= int(area[1])
    for labels in range(report.MANY_LABELS + 1, 2000):
        cases = min(report.HEAT_CASES, report.HEAT_CELLS // labels)
        wide = max(width[0], min(width[1], width[2] // labels))
        assert wide * labels * height[0] * cases <= int(area[1]), "no cell is made smaller than that"


def test_the_lesions_are_collected_once_however_many_labels_there_are(
    many: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect, asked = Evaluation.counted_lesions.fget, []
    assert collect is not None

    def counting(evaluation: Evaluation) -> list[dict[str, Any]]:
        asked.append(evaluation)
        return collect(evaluation)

    monkeypatch.setattr(Evaluation, "counted_lesions", property(counting))
    report_text(many)
    assert 1 <= len(asked) <= 2, "of the page, and of its list of missed lesions"


def compared(folder: Path, values: np.ndarray, patients: int | None = None) -> Path:
    """An evaluated folder with the IoU of cases and labels, (cases, labels); NaN where there is nothing to find."""
    folder.mkdir()
    rows = [
        dict.fromkeys(CASE_COLUMNS, 0.5)
        | {"case": f"case{case}", "label": str(label), "iou": value}
        | (dict.fromkeys(("reference_ml", "prediction_ml"), 0.0) if np.isnan(value) else {})
        for (case, label), value in np.ndenumerate(values)
    ]
    write_csv(folder / "cases.csv", CASE_COLUMNS, rows)
    groups = {f"case{case}": f"p{case % (patients or 1)}" for case in range(len(values))}
    write_json(folder / "summary.json", {"patients": groups if patients else None})
    return folder


def test_the_scores_of_two_folders_are_looked_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once for each label: a hundred of them would take minutes."""
    rng, asked, look_up = np.random.default_rng(0), [], compare_page.scores_of

    def counting(*arguments: Any) -> list[float]:
        asked.append(arguments)
        return look_up(*arguments)

    monkeypatch.setattr(compare_page, "scores_of", counting)
    folders = [compared(tmp_path / name, rng.random((5, 6))) for name in "ab"]
    compare_folders(folders, tmp_path / "out", ["iou", "dice"])
    assert len(asked) == 5 * 6
    page = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    assert page.count("<h3>Label ") == 6
    assert page.count("IoU of every case in both evaluations") == 6


def test_a_folder_that_is_compared_with_itself_has_its_own_section(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a, b = (compared(tmp_path / name, rng.random((5, 1))) for name in "ab")
    compare_folders([a, a, b], tmp_path / "out", ["iou"])
    page = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    assert page.count('<tr class="primary">') == 3


@pytest.mark.parametrize(("count", "patients", "said"), [(20, 5, "patients"), (5, 3, "patients"), (5, None, "cases")])
def test_a_comparison_says_whether_cases_or_patients_are_too_few(
    tmp_path: Path, count: int, patients: int | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    folders = [compared(tmp_path / name, rng.random((count, 1)), patients) for name in "abc"]
    rows = compare_folders(folders, tmp_path / "out", ["iou"])
    page = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    assert page.count(f"<td>fewer than 8 {said}</td>") == 6, "of three pairs, and of three ranks"
    assert page.count(f"<td>{f'{count} of {patients} patients' if patients else count}</td>") == 3 + 3, (
        "of the pairs, and of the ranking"
    )
    print_comparison(rows, tmp_path / "out")
    assert capsys.readouterr().out.count(f"(no interval with fewer than 8 {said})") == 3


def test_patients_are_counted_where_a_score_is_defined(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((20, 1))
    values[[0, 10]] = np.nan  # both cases of a patient
    folders = [compared(tmp_path / name, values, 10) for name in "ab"]
    rows = compare_folders(folders, tmp_path / "out", ["iou"])
    assert rows[0]["n"] == 18
    page = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    assert "<td>18 of 9 patients</td>" in page


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """Ten cases of two patients, one of them with nothing to find; the headers of all contradict themselves."""
    folder = tmp_path_factory.mktemp("grouped")
    for case in range(10):
        reference = np.zeros((6, 6, 4), np.uint8)
        reference[1:4, 1:4, 1:3] = case > 0
        for kind in ("references", "predictions"):
            (folder / kind).mkdir(exist_ok=True)
            image = nibabel.Nifti1Image(reference, np.eye(4))
            image.set_qform(np.diag([1.0, 1.0, 1.0, 1.0]) + np.eye(4, k=3) * (5 + case), code=1)
            nibabel.save(image, folder / kind / f"c{case}.nii")
    lines = "".join(f"c{case},{'PQ'[case % 2]}\n" for case in range(10))
    (folder / "patients.csv").write_text(f"case,patient\n{lines}", encoding="utf-8")
    request = Request(folder / "predictions", folder / "references", folder / "out", groups=folder / "patients.csv")
    return evaluate_folders(request)


def test_the_report_says_that_patients_are_too_few(grouped: Evaluation) -> None:
    page = report_text(grouped)
    assert "No interval with fewer than 8 patients" in page
    assert "fewer than 8 cases" not in page
    assert "of 10, from 2 patients; none failed" in page
    assert "median 1.000, n = 9 of 2 patients" in page
    alone = report._interval(None, 3, "case")
    assert alone == "No interval with fewer than 8 cases"


def test_what_is_noted_of_every_case_is_one_line_of_the_command_and_whole_on_the_page(
    grouped: Evaluation, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sum("qform (code 1) differ by up to" in note for note in grouped.summary["notes"]) == 20
    print_evaluation(grouped, grouped.request.output)
    lines = [line for line in capsys.readouterr().out.splitlines() if "qform" in line]
    assert len(lines) == 1
    assert lines[0].startswith(
        "Note: in 10 cases, such as c0: `c0.nii`: sform (code 2) and qform (code 1) differ by up"
    )
    assert lines[0].endswith(" (the report lists each)")
    page = report_text(grouped)
    assert all(f"c{case}: `c{case}.nii`: sform" in page for case in range(10))


def test_notes_are_alike_whatever_the_signs_of_their_numbers(
    grouped: Evaluation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    moves = ["-1.5", "2", "+0.5", "-3e-05", "0"]
    noted = [f"c{case}: moved by {move} mm." for case, move in enumerate(moves)]
    monkeypatch.setattr(Evaluation, "notes", property(lambda _: noted))
    print_evaluation(grouped, grouped.request.output)
    lines = [line for line in capsys.readouterr().out.splitlines() if "moved" in line]
    assert lines == ["Note: in 5 cases, such as c0: moved by -1.5 mm. (the report lists each)"]
