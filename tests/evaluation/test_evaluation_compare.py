from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import permutation_test

from monai_iou.evaluation.compare import METRICS, CompareError, compare_folders
from monai_iou.evaluation.scoring import CASE_COLUMNS


def evaluated(folder: Path, scores: dict[str, list[float | None]], cases: int = 12, label: str = "1") -> Path:
    """A folder with a cases.csv: the given columns, 0.5 in all others."""
    folder.mkdir()
    with (folder / "cases.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, CASE_COLUMNS)
        writer.writeheader()
        for i in range(cases):
            row = dict.fromkeys(CASE_COLUMNS, 0.5) | {name: values[i] for name, values in scores.items()}
            writer.writerow(row | {"case": f"case{i}", "label": label})
    return folder


@pytest.fixture
def scores() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    first = rng.random(12)
    return first, first + rng.normal(0.05, 0.02, 12)


def test_differences_intervals_and_p_values(tmp_path, scores):
    first, second = scores
    a = evaluated(tmp_path / "a", {"iou": first.tolist(), "hd95_mm": first.tolist()})
    b = evaluated(tmp_path / "b", {"iou": second.tolist(), "hd95_mm": second.tolist()})
    rows = {row["metric"]: row for row in compare_folders([a, b], tmp_path / "out")}
    assert tuple(rows) == METRICS
    iou = rows["iou"]
    assert iou["difference"] == pytest.approx((second - first).mean())
    assert iou["low"] < iou["difference"] < iou["high"]
    expected = permutation_test(
        (second, first), lambda x, y: (x - y).mean(), permutation_type="samples", n_resamples=9999
    )
    assert iou["p"] == pytest.approx(expected.pvalue, abs=0.002)
    assert iou["p_holm"] == pytest.approx(min(1.0, iou["p"] * len(METRICS)))
    assert rows["dice"]["difference"] == 0
    assert rows["dice"]["p"] == rows["dice"]["p_holm"] == 1
    assert (iou["better"], rows["hd95_mm"]["better"], rows["dice"]["better"]) == ("other", "baseline", "")


def test_the_correction_counts_the_metrics_asked_for(tmp_path, scores):
    a, b = (evaluated(tmp_path / name, {"iou": values.tolist()}) for name, values in zip("ab", scores, strict=True))
    row = compare_folders([a, b], tmp_path / "out", ["iou"])[0]
    assert row["p_holm"] == row["p"]


def test_undefined_scores_and_lone_cases_are_left_out(tmp_path, scores):
    first, second = (values.tolist() for values in scores)
    a = evaluated(tmp_path / "a", {"iou": first}, cases=10)
    b = evaluated(tmp_path / "b", {"iou": [None, *second[1:]]})
    row = compare_folders([a, b], tmp_path / "out", ["iou"])[0]
    assert (row["n"], row["left_out"]) == (9, 1)
    page = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    assert "2 rows (case and label) are in only one of the two folders" in page


def test_files_are_written_and_names_escaped(tmp_path, scores):
    a, b = (
        evaluated(tmp_path / name, {"iou": values.tolist()}) for name, values in zip(("a", "<b>"), scores, strict=True)
    )
    rows = compare_folders([a, b], tmp_path / "out")
    with (tmp_path / "out" / "comparison.csv").open(newline="") as stream:
        written = list(csv.DictReader(stream))
    assert [float(row["difference"]) for row in written] == [row["difference"] for row in rows]
    page = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert page.count("<svg") == 2
    assert "http" not in page.replace("http-equiv", "")


def test_what_cannot_be_compared_is_refused(tmp_path, scores):
    a = evaluated(tmp_path / "a", {})
    b = evaluated(tmp_path / "b", {}, label="2")
    with pytest.raises(CompareError, match="Expected two or more evaluated folders, but got 1"):
        compare_folders([a], tmp_path / "out")
    with pytest.raises(CompareError, match=r"Expected cases in common, but got none in `.*a` and `.*b`"):
        compare_folders([a, b], tmp_path / "out")
    with pytest.raises(CompareError, match=r"but got no readable cases\.csv: evaluate first\."):
        compare_folders([a, tmp_path], tmp_path / "out")
    with pytest.raises(CompareError, match=r"`--metrics` to be among iou, dice, .* but got speed"):
        compare_folders([a, a], tmp_path / "out", ["speed"])
