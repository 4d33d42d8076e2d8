"""The page of the commits that made the studies' runs, and the list of it on the page of results."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from evidence_rows import CASE, SUMMARY
from places import ROOT

from benchmarks.evidence import commits, report, tables
from benchmarks.evidence.commits import fill_list, history_is_here, page
from benchmarks.evidence.report import PAGE, RESULTS
from benchmarks.evidence.studies import Run
from benchmarks.evidence.tables import IN_HISTORY, add_run

NEEDS_HISTORY = pytest.mark.skipif(not history_is_here(), reason="needs the history of the repository")
MARKED = "Before.\n<!-- commits -->\nold\n<!-- end -->\nAfter.\n"


def add(folder: Path, run: Run, commit: str) -> None:
    add_run(folder, run, {**SUMMARY, "cases": 1, "commit": commit}, [CASE])


@pytest.fixture
def later_is_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let git know all commits but "lost", and let those that begin with "now" train as the present one."""
    monkeypatch.setattr(commits, "is_in", lambda commit, later: later != "lost" and commit != "lost")
    monkeypatch.setattr(commits, "trains_as_now", lambda commit: commit.startswith("now"))


@NEEDS_HISTORY
def test_the_page_of_commits_and_its_list_are_those_of_the_tables() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert "<!-- commits -->\n- Interpolated twice: `" in text
    assert fill_list(text, RESULTS) == text, "run: python -m benchmarks.evidence.report"
    assert (RESULTS / "commits.md").read_text(encoding="utf-8") == page(RESULTS)


@NEEDS_HISTORY
def test_a_commit_that_the_history_does_not_hold_has_the_code_of_the_one_that_it_holds() -> None:
    for lost, kept in IN_HISTORY.items():
        assert tables.is_in(kept, "HEAD"), kept
        changed = subprocess.run(
            ["git", "diff", "--name-only", lost, kept, "--"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        if not changed.returncode:  # only a clone in which the runs were made has both
            assert changed.stdout.split() == ["benchmarks/evidence/studies.py"], lost


@pytest.mark.usefixtures("later_is_now")
def test_seeds_of_one_choice_by_both_kinds_of_code_are_named(tmp_path: Path) -> None:
    for seed, commit in enumerate(("old", "old", "now1", "now2")):
        add(tmp_path, Run("compound", "phantoms", "iou", "voxels", seed, 0), commit)
    add(tmp_path, Run("compound", "phantoms", "dice", "voxels", 0, 0), "old")
    assert fill_list(MARKED, tmp_path) == (
        "Before.\n<!-- commits -->\n- Once in some runs, which are named where the other seeds of the same choice were "
        "interpolated twice:\n  - `compound`: 2 of 5 runs (seeds 2, 3 of 1 choice)\n<!-- end -->\nAfter.\n"
    )
    assert page(tmp_path).endswith(
        "| --- | --- | --- | --- | --- | --- | --- |\n"
        "| old | phantoms | 0, 1 | 2 | iou | twice | compiled |\n"
        "| old | phantoms | 0 | 1 | dice | twice | compiled |\n"
        "| now1 | phantoms | 2 | 1 | iou | once | compiled |\n"
        "| now2 | phantoms | 3 | 1 | iou | once | compiled |\n"
    )


@pytest.mark.usefixtures("later_is_now")
def test_data_with_the_same_seeds_of_both_kinds_share_one_line(tmp_path: Path) -> None:
    for data in ("3 %", "0.1 %"):
        for seed, commit in ((0, "old"), (3, "now")):
            for loss in ("ce", "iou"):
                add(tmp_path, Run("imbalance", data, loss, "q=1/2", seed, 0), commit)
    assert "  - `imbalance`: 4 of 8 runs (seeds 3 of 2 choices on 3 %; 0.1 %)\n" in fill_list(MARKED, tmp_path)


@pytest.mark.usefixtures("later_is_now")
def test_trainings_of_other_packages_have_no_patches_of_ours(tmp_path: Path) -> None:
    data = "task904, 30 min, 2 threads"
    for loss in ("ours", "bare loop", "nnU-Net, batch of 2"):
        add(tmp_path, Run("minutes", data, loss, "own", 0, 0), "old" if loss == "ours" else "now")
    add(tmp_path, Run("short", "task904, 468 steps", "iou+ce/3", "q=1/2", 0, 0), "now")
    text = page(tmp_path)
    assert f"| old | {data} | 0 | 1 | ours | twice | compiled |\n" in text
    assert f"| now | {data} | 0 | 2 | bare loop; nnU-Net, batch of 2 | not ours | compiled |\n" in text
    kept = "- Interpolated twice: `minutes`.\n- Interpolated once: `short`.\n<!-- end -->"
    assert kept in fill_list(MARKED, tmp_path)


@pytest.mark.usefixtures("later_is_now")
def test_a_commit_that_nothing_stands_for_is_refused(tmp_path: Path) -> None:
    add(tmp_path, Run("compound", "phantoms", "iou", "voxels", 0, 0), "lost")
    message = (
        "Expected rows of compound by commits that the history holds, but got lost: name for each a commit with the "
        "same code in IN_HISTORY of benchmarks/evidence/tables.py."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        page(tmp_path)


def test_without_the_history_the_commits_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = tmp_path / "results.md"
    monkeypatch.setattr(report, "PAGE", written)
    for known in (False, True):
        monkeypatch.setattr(report, "history_is_here", lambda known=known: known)
        written.write_text(MARKED)
        assert report.main(["--results", str(tmp_path)]) == 0
        assert ("\nold\n" in written.read_text()) != known
        assert (tmp_path / "commits.md").is_file() == known
