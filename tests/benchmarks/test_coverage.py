"""The simulation of intervals: it prints what it measured, and can tell a good interval from a narrow one."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import coverage


@pytest.mark.parametrize("name", coverage.SCORES)
def test_the_true_values_are_those_of_many_draws(name: str) -> None:
    draw, mean, median = coverage.SCORES[name]
    values = draw(np.random.default_rng(0), 200_000)
    assert np.mean(values) == pytest.approx(mean, abs=0.01)
    assert np.median(values) == pytest.approx(median, abs=0.01)


def test_the_usual_percentiles_cover_less(capsys: pytest.CaptureFixture[str]) -> None:
    assert coverage.main(["--studies", "200", "--cases", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:-1]]
    assert [row[0] for row in rows] == [name for name in coverage.SCORES for _ in range(2)]
    assert all(float(row[3]) > float(row[4]) + 3 for row in rows)
    assert lines[-1].startswith("No difference, 8 cases: the interval excludes 0 in ")
