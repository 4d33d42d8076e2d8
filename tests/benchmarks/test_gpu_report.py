"""The report of `benchmarks.gpu`: no row of a table is lost, and the end of a part that failed is shown."""

from __future__ import annotations

import sys

import pytest

from benchmarks.gpu import Outcome, Part, report, run

ROWS = [f"| {number} | a row that is long enough to fill a page with its like: {'x' * 40} |" for number in range(200)]
TABLE = "\n".join(["a title", *ROWS])


def part(code: str) -> Part:
    return Part("Losses", [sys.executable, "-c", code], 1.0)


def shown(outcome: Outcome) -> list[str]:
    return report([outcome], "cpu", "name", quick=True).splitlines()


def test_every_row_of_a_long_table_is_reported() -> None:
    outcome = run(part(f"print({TABLE!r})"), 60)
    assert outcome.status == "passed"
    lines = shown(outcome)
    assert [line for line in lines if line in ROWS] == ROWS
    assert "a title" not in lines


def test_a_part_that_fails_shows_its_table_and_its_end() -> None:
    outcome = run(part(f"print({TABLE!r}, flush=True); raise RuntimeError('out of memory')"), 60)
    lines = shown(outcome)
    assert outcome.status == "failed with code 1"
    assert [line for line in lines if line in ROWS][: len(ROWS)] == ROWS
    assert lines[-2:] == ["RuntimeError: out of memory", "```"]


@pytest.mark.parametrize(("status", "count"), [("passed", 40), ("failed with code 1", 40)])
def test_without_a_table_the_end_is_shown(status: str, count: int) -> None:
    lines = shown(Outcome(part(""), status, 1.0, "\n".join(f"line {number}" for number in range(100))))
    assert [line for line in lines if line.startswith("line ")] == [
        f"line {number}" for number in range(100 - count, 100)
    ]
