"""SIGTERM ends a command in order: what it was writing is removed, and what it replaces is as it was."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
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
            signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        run(work)
    assert caught.value.code == 143
    assert capsys.readouterr().err == "Terminated.\n"
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_command_that_loses_the_exception_ends_with_the_code_of_the_signal(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "a second one acts at once"

    assert run(work) == 143
    assert capsys.readouterr().err == "Terminated.\n"
    assert run(lambda: None) == 0, "the next command knows nothing of it"


PROGRAM = """
import click, contextlib, multiprocessing, signal, sys, time
from monai_iou_command import main
main(["--version"])
from monai_iou_commands.group import cli

def imports():
    with contextlib.suppress(BaseException):
        import ended_module
    print("it went on")

def forks():
    def endless():
        while True:
            with contextlib.suppress(BaseException):
                time.sleep(60)
    child = multiprocessing.get_context("fork").Process(target=endless)
    child.start()
    child.terminate()
    child.join(30)
    print("exit code of the child:", child.exitcode)

cli.add_command(click.Command("imports", callback=imports))
cli.add_command(click.Command("forks", callback=forks))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends a program without a signal, and forks none")
@pytest.mark.parametrize(
    ("command", "code", "said"),
    [("imports", -signal.SIGTERM, ""), ("forks", 0, f"exit code of the child: {-signal.SIGTERM}\n")],
)
def test_imports_and_forked_processes_end_at_once(command: str, code: int, said: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    (tmp_path / "ended_module.py").write_text("import signal; signal.raise_signal(signal.SIGTERM)", encoding="utf-8")
    words = [sys.executable, str(tmp_path / "program.py"), command]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout.partition("\n")[2], done.stderr) == (code, said, "")


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
