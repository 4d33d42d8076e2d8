"""The tables of the studies: rows are appended whole, and a run counts if the same settings made it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from evidence_rows import CASE, RUN, SUMMARY
from places import ROOT

from benchmarks.evidence import __main__ as command
from benchmarks.evidence import tables
from benchmarks.evidence.data import DATA
from benchmarks.evidence.studies import STUDIES, Run, Study, overrides, settings
from benchmarks.evidence.tables import (
    CASE_COLUMNS,
    add_run,
    append,
    cases_of,
    copy_runs_of_other_studies,
    key_of,
    locked,
    missing,
    read,
    runs_of,
)


def test_rows_are_appended_behind_the_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "table.csv"
    append(path, ("a", "b"), [{"a": 1, "b": "x, y"}])
    with path.open("a") as stream:
        stream.write("2,half of a li")
    append(path, ("a", "b"), [{"a": 3}])
    assert path.read_text() == 'a,b\n1,"x, y"\n3,\n'
    path.write_text("a,b")  # killed within the heading
    assert read(path) == []
    append(path, ("a", "b"), [{"a": 4, "b": 5}])
    assert read(path) == [{"a": "4", "b": "5"}]


def test_processes_that_append_at_once_lose_no_row(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from benchmarks.evidence.tables import append\n"
        "for i in range(40): append(Path(sys.argv[1]), ('who', 'i'), [{'who': sys.argv[2], 'i': i}])"
    )
    path = tmp_path / "table.csv"
    words = [sys.executable, "-c", code, str(path)]
    processes = [subprocess.Popen([*words, name], cwd=ROOT) for name in "ab"]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert sorted((row["who"], int(row["i"])) for row in read(path)) == [(who, i) for who in "ab" for i in range(40)]


def test_a_run_whose_row_is_missing_is_made_again_and_its_cases_count_once(tmp_path: Path) -> None:
    runs = STUDIES["compound"].runs()
    assert missing(tmp_path, runs) == runs
    append(tmp_path / "compound-cases.csv", CASE_COLUMNS, [{**dict(zip(CASE_COLUMNS, RUN.key, strict=False)), **CASE}])
    assert cases_of(tmp_path, "compound") == []  # killed between the two tables
    assert RUN in missing(tmp_path, runs)
    add_run(tmp_path, RUN, SUMMARY, [{**CASE, "iou": 0.75}])
    assert [row["iou"] for row in cases_of(tmp_path, "compound")] == ["0.75"]
    assert len(runs_of(tmp_path, "compound")) == 1
    assert set(runs) - set(missing(tmp_path, runs)) == {RUN}


@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["a1", "b1", "c1"], ["a1", "b1"]),
        (["a1", "b1", "c1"], ["a1"]),
        (["a1", "b1"], ["x1", "a1", "b1"]),
        (["a1", "b1"], ["x1", "y1"]),
        (["a1", "a2", "b1", "b2"], ["a1", "a2"]),
        (["b1", "b2", "a1", "a2"], ["b1", "b2", "c1", "c2"]),
        (["a1"], ["a1", "a2", "b1", "b2"]),
    ],
)
def test_only_the_cases_of_the_last_training_count(
    before: list[str], after: list[str], between: bool, tmp_path: Path
) -> None:
    """Other settings of the data may mean other cases: the tables are of those alone."""

    def add(run: Run, names: list[str], iou: float) -> None:
        cases = [{**CASE, "case": name[0], "label": name[1], "iou": iou} for name in names]
        add_run(tmp_path, run, {**SUMMARY, "cases": len({name[0] for name in names})}, cases)

    other = Run("compound", "phantoms", "iou", "voxels", 1, 0)
    add(RUN, before, 0.1)
    if between:
        add(other, ["q1"], 0.3)
    add(RUN, after, 0.9)
    own = [row for row in cases_of(tmp_path, "compound") if row["seed"] == "0"]
    assert [(row["case"] + row["label"], row["iou"]) for row in own] == [(name, "0.9") for name in after]
    assert [row["case"] for row in cases_of(tmp_path, "compound") if row["seed"] == "1"] == ["q"] * between


def test_a_run_of_another_study_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, other = (Run(study, "unequal", "iou+ce/3", "q=1/2", 2, 0) for study in ("choices", "sampler"))
    assert overrides(run) == overrides(other)
    monkeypatch.setattr(tables, "trains_as_now", lambda commit: commit == "abc")
    summary = {**SUMMARY, "cases": 2, "commit": "abc"}
    broken_ones = [{**summary, "commit": "abc+"}, {**summary, "commit": "older"}, {**summary, "cases": 3}]
    for number, broken in enumerate(broken_ones):
        add_run(tmp_path / f"{number}", other, broken, [CASE, {**CASE, "case": "d"}])
        copy_runs_of_other_studies(tmp_path / f"{number}", [run])
        assert missing(tmp_path / f"{number}", [run]) == [run]
    add_run(tmp_path, other, summary, [CASE, {**CASE, "case": "d"}])
    add_run(tmp_path, Run("sampler", "unequal", "iou+ce/3", "q=1/2", 1, 0), {**summary, "cases": 1}, [CASE])
    for _ in range(2):
        copy_runs_of_other_studies(tmp_path, [run])
        assert runs_of(tmp_path, "choices") == runs_of(tmp_path, "sampler")[:1]
        assert cases_of(tmp_path, "choices") == cases_of(tmp_path, "sampler")[:2]
    assert missing(tmp_path, [run]) == []


def test_code_before_the_oldest_that_trains_as_now_is_told_by_git() -> None:
    known = subprocess.run(["git", "cat-file", "-e", f"{tables.OLDEST}^"], cwd=ROOT, capture_output=True, check=False)
    if known.returncode:
        pytest.skip("needs the history of the repository")
    assert tables.trains_as_now(tables.OLDEST)
    assert tables.trains_as_now("HEAD")
    assert not tables.trains_as_now(f"{tables.OLDEST}^")
    assert not tables.trains_as_now("no commit")


def test_a_run_by_other_settings_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, other = (Run(study, "unequal", "iou+ce/3", "q=1/2", 2, 0) for study in ("choices", "sampler"))
    add_run(tmp_path, other, {**SUMMARY, "cases": 1, "commit": "abc"}, [CASE])
    assert missing(tmp_path, [other]) == []
    told = settings(run)
    for name in ("arguments", "settings"):
        monkeypatch.setattr(tables, "trains_as_now", lambda _: True)
        changed = {**getattr(DATA["unequal"], name), ("training" if name == "arguments" else "epochs"): 7}
        monkeypatch.setitem(DATA, "unequal", replace(DATA["unequal"], **{name: changed}))
        assert settings(run) != told
        assert missing(tmp_path, [other]) == [other]
        copy_runs_of_other_studies(tmp_path, [run])
        assert missing(tmp_path, [run]) == [run]
        monkeypatch.undo()
    assert settings(run) == told == settings(other)


def test_what_a_training_changes_in_its_overrides_changes_no_settings() -> None:
    run = Run("choices", "unequal", "copied lesions", "q=1/2", 1, 0)
    told = settings(run)
    chosen = overrides(run)
    chosen["copy_source"]["transform"].clear()
    chosen["loss"]["lambda_ce"] = 7
    assert settings(run) == told


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_every_row_was_made_by_the_settings_of_its_run(study: Study) -> None:
    planned = {run.key: settings(run) for run in study.runs()}
    made = {key_of(row): row["settings"] for row in runs_of(ROOT / "docs/results", study.name)}
    assert {key: told for key, told in made.items() if planned.get(key) != told} == {}


def test_a_lock_that_is_held_is_seen(tmp_path: Path) -> None:
    with locked(tmp_path / "x.lock") as first, locked(tmp_path / "x.lock", wait=False) as second:
        assert (first, second) == (True, False)
    with locked(tmp_path / "x.lock", wait=False) as third:
        assert third


def test_the_list_counts_what_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_run(tmp_path, RUN, SUMMARY, [CASE])
    assert command.main(["--list", "--results", str(tmp_path)]) == 0
    assert "1 of 45 runs" in capsys.readouterr().out
    assert command.main(["--study", "compound", "--only", "nothing", "--results", str(tmp_path)]) == 2
