"""SIGTERM ends a command in order: what it was writing is removed, and what it replaces is as it was."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from monai_iou.cli import cli, main
from monai_iou.files import temporary_file


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], int]:
    """Runs a command with this work."""

    def run_work(work: Callable[[], None]) -> int:
        monkeypatch.setitem(cli.commands, "work", click.Command("work", callback=work))
        return main(["work"])

    return run_work


def test_sigterm_leaves_no_temporary_file(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        with temporary_file(tmp_path):
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(signal.SIGTERM)  # a scheduler repeats it, while the command cleans up

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        run(work)
    assert caught.value.code == 143
    assert capsys.readouterr().err == "Terminated.\n"
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_program_that_handles_sigterm_keeps_its_own_way(run: Callable[..., int]) -> None:
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        assert run(lambda: signal.raise_signal(signal.SIGTERM)) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]


def test_a_command_runs_in_any_thread(run: Callable[..., int]) -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(run(lambda: None)))
    thread.start()
    thread.join()
    assert codes == [0]
