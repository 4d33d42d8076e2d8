"""The comparison of choices on the scans of Task904 of which neither hippocampus was trained on."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.evidence.hippocampi import differences_on_new_scans
from benchmarks.evidence.statistics import interval_of
from benchmarks.evidence.studies import Study

STUDY = Study("made up", "Which?", ("task904",), ("ours", "theirs"), ("ours", "own"), ("own",), primary="dice")


def rows(loss: str, table: list[list[float]]) -> list[dict[str, str]]:
    """Return the rows of cases 1, 3, 5, ... (of scans 1, 2, 3, ...), with a line of scores for each seed."""
    return [
        {"data": "task904", "loss": loss, "sampler": "own", "seed": str(seed), "dice": str(dice)}
        | {"patient": f"hippocampus_{2 * scan + 1:03d}", "case": f"hippocampus_{2 * scan + 1:03d}"}
        for seed, scores in enumerate(table)
        for scan, dice in enumerate(scores)
    ]


def test_only_scans_of_which_no_side_was_trained_on_are_compared() -> None:
    ours, theirs = [[0.9, 0.5, 0.6, 0.7], [0.9, 0.6, 0.6, 0.8]], [[0.1, 0.4, 0.4, 0.7], [0.1, 0.4, 0.6, 0.7]]
    both = rows("ours", ours) + rows("theirs", theirs)
    found = differences_on_new_scans(STUDY, both, {"task904": [1, 7]})  # scan 1 is the first column, 7 is not tested

    table = np.array(theirs)[:, 1:] - np.array(ours)[:, 1:]
    low, high = interval_of(table)
    assert found[("task904", "ours", "own")] == "baseline"
    assert found[("task904", "theirs", "own")] == f"{table.mean():+.3f} ({low:+.3f} to {high:+.3f}), 2 seeds"


def test_a_choice_without_its_baseline_is_not_compared() -> None:
    assert differences_on_new_scans(STUDY, rows("theirs", [[0.1, 0.2]]), {"task904": []}) == {}


def test_a_choice_is_compared_on_the_seeds_that_the_baseline_has() -> None:
    both = rows("ours", [[0.5, 0.6]]) + rows("theirs", [[0.5, 0.8], [0.0, 0.0]])
    found = differences_on_new_scans(STUDY, both, {"task904": []})
    assert found[("task904", "theirs", "own")].startswith("+0.100 (")
    assert found[("task904", "theirs", "own")].endswith(", 1 seed")


@pytest.mark.parametrize("trained", [[1, 2], [1, 2, 3]])
def test_nothing_is_compared_where_every_scan_was_trained_on(trained: list[int]) -> None:
    both = rows("ours", [[0.5, 0.6]]) + rows("theirs", [[0.5, 0.8]])
    assert differences_on_new_scans(STUDY, both, {"task904": trained}) == {}
