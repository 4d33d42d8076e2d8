"""The page of results: tables and pictures of the studies' rows."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import evidence_rows
import pytest
from evidence_rows import RUN, SUMMARY
from places import DOCS

from benchmarks.evidence.curves import COLOURS
from benchmarks.evidence.pictures import Line, Scale, draw
from benchmarks.evidence.report import PAGE, RESULTS, block, circumstances, curves, fill, main, picture, pictures, table
from benchmarks.evidence.studies import STUDIES, Run
from benchmarks.evidence.tables import RUN_COLUMNS, add_run, cases_of, runs_of

CASE = {**evidence_rows.CASE, "lesions": 4, "found": 3, "invented": 1}


def tables(folder: Path, seeds: int = 3) -> None:
    """Write a study whose second choice, the baseline, is better by 0.1."""
    shared = {**dict.fromkeys(RUN_COLUMNS[5:], "1"), "cases": "3"}
    for loss, shift in (("dice+ce", 0.0), ("iou+ce/3", 0.1)):
        for seed in range(seeds):
            cases = [{**CASE, "case": name, "patient": name, "iou": 0.5 + shift + 0.01 * seed} for name in "xyz"]
            add_run(folder, Run("compound", "phantoms", loss, "voxels", seed, 0), {**shared, "commit": "abc"}, cases)


def test_the_report_has_a_row_a_choice_and_says_when_seeds_are_few(tmp_path: Path) -> None:
    tables(tmp_path, 3)
    text = block(STUDIES["compound"], tmp_path)
    assert "6 of 45 runs are done" in text
    assert "Python 1. [Commits](results/commits.md#compound).\n" in text
    assert "| dice+ce | 0.500, 0.510, 0.520 | 0.510 | 0.010 | 0.667 | 1.000 | 75 % | 1.0 | -0.100 (" in text
    assert "| iou+ce/3 | 0.600, 0.610, 0.620 | 0.610 | 0.010 | 0.667 | 1.000 | 75 % | 1.0 | baseline |  |  |  |" in text
    assert "| -0.100 (-0.100 to -0.100) |  | below 0.001 | worse |" in text  # no effect without a spread of patients
    assert "Fewer than" not in text
    tables(tmp_path / "two", 2)
    text = block(STUDIES["compound"], tmp_path / "two")
    assert "too few seeds" in text
    assert "Fewer than 3 seeds" in text


def test_marked_volumes_are_added_over_the_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        {**CASE, "case": name, "predicted_voxels": marked, "reference_voxels": 10}
        for name, marked in (("a", 3), ("b", 4))
    ]
    add_run(tmp_path, RUN, {**SUMMARY, "lesion_f1": 0.25}, cases)
    assert main(["--study", "compound", "--volumes", "--results", str(tmp_path)]) == 0
    line = "| phantoms | iou | voxels | 0 | 0 | 0.500 | 0.250 | 6 | 0.35 | 8 | 90 | 70 | 15 |\n"
    assert capsys.readouterr().out.endswith(line)
    with pytest.raises(SystemExit):
        main(["--volumes"])


def test_the_score_of_a_patient_is_the_mean_over_seeds_and_cases(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, scores in ((0, (0.2, 0.4)), (1, (0.6, 0.8))):
        cases = [{**CASE, "case": str(score), "iou": score} for score in scores]
        add_run(tmp_path, Run("compound", "phantoms", "iou", "voxels", seed, 0), SUMMARY, cases)
    assert main(["--study", "compound", "--patients", "--results", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "| --- " * 6 + "|",
        "| phantoms | iou | voxels | p | 0.300, 0.700 | 0.500 |",
    ]


def test_rows_that_other_settings_made_are_neither_done_nor_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables(tmp_path, 2)
    page, study = tmp_path / "compound.csv", STUDIES["compound"]
    lines = page.read_text().splitlines()
    changed = lines[-1].rpartition(",")[0] + ",ffffffffff"
    page.write_text("\n".join([*lines[:-1], changed, ""]))
    text = block(study, tmp_path)
    assert "3 of 45 runs are done" in text
    assert "| iou+ce/3 | 0.600 | 0.600 |" in text
    assert ">iou+ce/3</text>" in picture(study, tmp_path)
    assert main(["--study", "compound", "--any-settings", "--results", str(tmp_path)]) == 0
    assert "| iou+ce/3 | 0.600, 0.610 | 0.605 |" in capsys.readouterr().out
    page.write_text("\n".join([lines[0], changed, ""]))
    assert "Not run yet (45 runs)" in block(study, tmp_path)
    assert pictures(study, tmp_path) == {}


def test_a_table_is_printed_against_another_baseline_and_of_some_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables(tmp_path, 4)
    shown = ["--study", "compound", "--results", str(tmp_path)]
    assert main([*shown, "--baseline", "dice+ce", "voxels", "--seeds", "0", "1", "2"]) == 0
    text = capsys.readouterr().out
    assert "| dice+ce | 0.500, 0.510, 0.520 | 0.510 | 0.010 | 0.667 | 1.000 | 75 % | 1.0 | baseline |" in text
    assert "| iou+ce/3 | 0.600, 0.610, 0.620 | 0.610 |" in text
    assert "| +0.100 (+0.100 to +0.100) |" in text
    with pytest.raises(SystemExit):
        main([*shown, "--baseline", "dice+ce", "q=1"])
    assert "--baseline must be a choice of compound, but is dice+ce q=1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--seeds", "0"])


def test_a_study_without_rows_is_named_with_its_command(tmp_path: Path) -> None:
    page = "Before.\n<!-- study: compound -->\nold\n<!-- end -->\nAfter.\n"
    filled = fill(page, tmp_path)
    assert "Not run yet (45 runs)" in filled
    assert "python -m benchmarks.evidence --study compound" in filled
    assert filled.startswith("Before.\n")
    assert filled.endswith("<!-- end -->\nAfter.\n")
    assert "old" not in filled
    assert fill(filled, tmp_path) == filled


def test_a_choice_is_not_called_the_baseline_where_the_baseline_is_missing(tmp_path: Path) -> None:
    add_run(tmp_path, RUN, SUMMARY, [CASE])
    line = "| iou | 0.500 | 0.500 |  | 0.667 | 1.000 | 75 % | 1.0 | no baseline yet |  |  |  |"
    assert line in block(STUDIES["compound"], tmp_path)


def test_shares_of_lesions_are_of_all_cases_and_left_out_where_dice_decides(tmp_path: Path) -> None:
    cases = [{**CASE, "case": "a"}, {**CASE, "case": "b", "lesions": 0, "found": 0, "invented": 4}]
    add_run(tmp_path, RUN, SUMMARY, cases)
    assert "| 75 % | 2.5 |" in table(STUDIES["compound"], tmp_path)
    add_run(tmp_path, Run("minutes", "task904, 30 min, 2 threads", "ours", "own", 0, 0), SUMMARY, [CASE])
    assert "lesions found" not in table(STUDIES["minutes"], tmp_path)


def test_false_lesions_are_those_of_all_labels_by_the_number_of_cases(tmp_path: Path) -> None:
    """A case has a row for each label: 3 cases, one of another seed, have 1 + 2 + 1 + 4 + 1 + 0 false lesions."""
    invented = {(0, "a"): (1, 2), (0, "b"): (1, 4), (1, "a"): (1, 0)}
    for seed in (0, 1):
        cases = [
            {**CASE, "case": case, "label": label, "invented": count}
            for (of_seed, case), counts in invented.items()
            if of_seed == seed
            for label, count in enumerate(counts, 1)
        ]
        add_run(tmp_path, Run("compound", "phantoms", "iou", "voxels", seed, 0), SUMMARY, cases)
    assert "| 75 % | 3.0 |" in table(STUDIES["compound"], tmp_path)


def test_the_picture_has_a_circle_a_seed_and_a_whisker_a_difference(tmp_path: Path) -> None:
    import xml.etree.ElementTree as ElementTree

    tables(tmp_path)
    text = picture(STUDIES["compound"], tmp_path)
    ElementTree.fromstring(text)
    assert text.count('class="seed"') == 6
    assert text.count('class="whisker"') == text.count('class="dot"') == 1
    assert ">iou+ce/3</text>" in text
    ElementTree.fromstring(draw([Line("a < b & c", [0.5])], "IoU", "a"))


def test_the_curves_have_a_point_an_amount_and_a_band_of_the_interval(tmp_path: Path) -> None:
    import xml.etree.ElementTree as ElementTree

    study = STUDIES["imbalance"]
    for seed in (0, 1, 2):
        for data, iou in (("3 %", 0.8), ("0.03 %", 0.4)):
            for loss in ("ce", "dice+ce")[: 2 - seed // 2]:
                cases = [{**CASE, "case": name, "patient": name, "iou": iou + 0.1 * seed} for name in "xyz"]
                add_run(tmp_path, Run("imbalance", data, loss, "q=1/2", seed, 0), SUMMARY, cases)
    picture = ElementTree.fromstring(curves(study, tmp_path))
    lines = [tag for tag in picture.iter() if tag.get("class") == "curve"]
    bands = [tag for tag in picture.iter() if tag.get("class") == "band"]
    assert len(lines) == 4  # two losses in two panels
    assert len(bands) == 2  # one of them with two seeds, which are too few for a band
    circles = [tag.get("fill") for tag in picture.iter() if tag.tag.endswith("circle")]
    assert circles == 2 * [COLOURS[0], COLOURS[0], "#fff", "#fff"]
    left, up = ([float(place.split(",")[i]) for place in lines[0].get("points", "").split()] for i in (0, 1))
    assert left == sorted(left)  # from 0.03 % to 3 %
    assert len(left) == 2
    top, floor = 40, 300  # of scores of 1 and 0, with a margin of a twentieth
    assert up == pytest.approx([floor - (floor - top) * (value + 0.05) / 1.1 for value in (0.5, 0.9)], abs=0.06)
    band = [float(place.split(",")[1]) for place in bands[0].get("points", "").split()]
    assert band[0] > up[0] > band[3]
    assert band[1] > up[1] > band[2]  # low, then high backwards
    names = [tag.text for tag in picture.iter() if tag.tag.endswith("text")]
    assert {"IoU", "lesion F1", "ce", "dice+ce", "0.03", "3"} <= set(names)


def test_every_curve_has_a_colour_and_every_amount_a_data_set() -> None:
    for study in STUDIES.values():
        if study.amounts:
            assert len(study.losses) <= len(COLOURS)
            assert len(study.amounts) == len(study.data)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.61, 0.72), (-0.031, 0.031), (0.016, 0.906), (0.5, 0.5)])
def test_ticks_lie_on_the_axis(low: float, high: float) -> None:
    scale = Scale(low, high, 100, 300)
    assert 2 <= len(scale.ticks()) <= 5 or low == high
    assert all(100 <= scale(tick) <= 300 for tick in scale.ticks())
    assert scale(low) < scale(high) or low == high


@pytest.mark.usefixtures("drawn_once")
def test_the_page_of_results_and_its_pictures_are_those_of_the_tables() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert fill(text, RESULTS) == text, "run: python -m benchmarks.evidence.report"
    assert {name for name in STUDIES if f"<!-- study: {name} -->" in text} == set(STUDIES)
    drawn: dict[str, str] = {}
    for study in STUDIES.values():
        drawn |= pictures(study, RESULTS)
    assert {path.name: path.read_text(encoding="utf-8") for path in (DOCS / "results").glob("*.svg")} == drawn
    assert all(f"(results/{name})" in text for name in drawn)


def test_the_committed_tables_hold_planned_runs_from_a_clean_commit_with_all_their_cases() -> None:
    for study in STUDIES.values():
        rows = runs_of(RESULTS, study.name)
        planned = {run.key for run in study.runs()}
        cases_of_run: dict[tuple[str, ...], list[dict[str, str]]] = defaultdict(list)
        for case in cases_of(RESULTS, study.name):
            cases_of_run[tuple([case[k] for k in rows[0] if k in case][:5])].append(dict(case))
        for row in rows:
            key = (row["data"], row["loss"], row["sampler"], int(row["seed"]), int(row["fold"]))
            assert key in planned, key
            assert not row["commit"].endswith("+"), "made with files that were not committed"
            cases = cases_of_run[tuple(map(str, key))]
            assert len({case["case"] for case in cases}) == int(row["cases"])
            defined = [float(case["iou"]) for case in cases if case["iou"] != "nan"]
            assert float(row["iou"]) == pytest.approx(sum(defined) / len(defined), abs=1e-5)
        if rows:
            with (RESULTS / f"{study.name}.csv").open(newline="") as stream:
                assert tuple(next(csv.reader(stream))) == RUN_COLUMNS
            assert circumstances(rows)
