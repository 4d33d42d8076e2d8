"""The report of `benchmarks.gpu`: no row of a table is lost, the end of a failed part is shown, and no part goes on."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu
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


def is_running(number: int) -> bool:
    """Whether a process is there and has not ended: one whose parent has not asked for it yet is a zombie."""
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux for the state of a process")
@pytest.mark.parametrize(
    ("after", "status"),
    [
        pytest.param("time.sleep(60)", "stopped after its 5 s", marks=pytest.mark.slow),
        ("sys.exit(2)", "failed with code 2"),
    ],
)
def test_what_a_part_started_ends_with_it(after: str, status: str, tmp_path: Path) -> None:
    """A child that goes on would be measured with the next part."""
    note = tmp_path / "pid"
    child = "import time; time.sleep(60)"
    code = (
        "import pathlib, subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.DEVNULL, "
        "stderr=subprocess.DEVNULL)\n"
        f"pathlib.Path({str(note)!r}).write_text(str(child.pid)); print('started', flush=True); {after}"
    )
    outcome = run(part(code), 5.0)
    assert (outcome.status, outcome.output) == (status, "started\n")
    until = time.monotonic() + 10
    while is_running(int(note.read_text())) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_running(int(note.read_text()))


def test_only_a_page_of_its_own_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "parts", lambda *_: [part("print('| a row |')")])
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--quick", "--output", str(tmp_path)])
    assert [gpu.main(), gpu.main()] == [0, 0]
    (page,) = tmp_path.iterdir()
    assert "| a row |" in page.read_text()
    capsys.readouterr()
    page.write_text("# Written by hand\n")
    assert gpu.main() == 1
    assert page.read_text() == "# Written by hand\n"
    assert capsys.readouterr() == (
        "", f"Expected {page} to be written by this command, but got another page: move it, or set --output.\n"
    )  # fmt: skip
