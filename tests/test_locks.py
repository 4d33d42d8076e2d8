"""The lock of a run's folder: one holder, named; it ends with its process."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from light_import import LIGHT_IMPORT

from monai_iou import locks
from monai_iou.files import OutputError
from monai_iou.locks import LOCK_NAME, folder_lock, is_locked

HOLD = f"""
{LIGHT_IMPORT}
import os, sys, time
from pathlib import Path
from monai_iou.locks import folder_lock
with folder_lock(Path(sys.argv[1]), "training"):
    if len(sys.argv) > 2 and os.fork() == 0:
        time.sleep(60)
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(folder: Path, *more: str) -> subprocess.Popen[str]:
    """A process that holds the folder, once this returns, until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), *more], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    process.wait(timeout=30)
    process.stdout.close()


def test_the_second_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    process = hold(tmp_path)
    for _ in range(2):  # a refusal leaves the lock as it is
        with pytest.raises(OutputError) as caught, folder_lock(tmp_path, "evaluation"):
            pass
        pattern = (
            rf"Expected `{tmp_path}` to be used by one run at a time, but training by process {process.pid} on "
            rf"{socket.gethostname()} has been using it since \d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d: wait "
            "until that run has ended, or name another folder."
        )
        assert re.fullmatch(pattern, str(caught.value))
    end(process)
    assert list(tmp_path.iterdir()) == []
    with folder_lock(tmp_path, "evaluation"):
        assert (tmp_path / LOCK_NAME).is_file()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_holder_blocks_nobody_even_if_its_children_live(tmp_path: Path) -> None:
    process = hold(tmp_path, "with a child")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    try:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (tmp_path / LOCK_NAME).is_file()
        with folder_lock(tmp_path, "training"):
            pass
        assert list(tmp_path.iterdir()) == []
    finally:
        for child in children:
            os.kill(int(child), signal.SIGKILL)
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            stream.close()


def test_a_short_holder_is_waited_for(tmp_path: Path) -> None:
    process, told = hold(tmp_path), list[str]()

    def end_when_told(line: str) -> None:
        told.append(line)
        end(process)

    assert is_locked(tmp_path)
    with pytest.raises(OutputError, match="training by process"), folder_lock(tmp_path, "planning", ["planning"]):
        pass
    with folder_lock(tmp_path, "planning", ["training"], end_when_told):
        assert is_locked(tmp_path)
        with pytest.raises(OutputError), folder_lock(tmp_path, "planning", ["planning"]):
            pass  # waiting for itself it would wait forever
    assert not is_locked(tmp_path)
    (line,) = told
    assert line.startswith(f"Waiting for {tmp_path}: training by process {process.pid} on ")


def others_try(folder: Path) -> str:
    """What another process finds that tries to lock a folder, without the waits and messages of this package."""
    code = (
        "import fcntl, os, sys\n"
        "try:\n"
        "    fcntl.lockf(os.open(sys.argv[1], os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "    print('entered')\n"
        "except OSError:\n"
        "    print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, folder / LOCK_NAME], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_one_process_holds_a_folder_once(tmp_path: Path) -> None:
    with folder_lock(tmp_path, "training"):
        for _ in range(2):
            with pytest.raises(OutputError, match="but another run is using it"), folder_lock(tmp_path, "evaluation"):
                pass
        (tmp_path / "other").mkdir()
        with folder_lock(tmp_path / "other", "training"):
            pass
        assert others_try(tmp_path) == "refused", "the refusals have released the lock"
    with folder_lock(tmp_path, "training"):
        pass


def test_one_thread_of_a_process_holds_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_holder, start, leave = locks._write_holder, threading.Barrier(4), threading.Event()

    def slowly(*arguments: Any) -> None:
        time.sleep(0.1)  # the others come meanwhile
        write_holder(*arguments)

    def enter() -> str:
        start.wait()
        try:
            with folder_lock(tmp_path, "training"):
                leave.wait(30)
                return "held"
        except OutputError as error:
            return str(error)

    monkeypatch.setattr(locks, "_write_holder", slowly)
    with ThreadPoolExecutor(4) as pool:
        threads = [pool.submit(enter) for _ in range(4)]
        try:
            refused = [done.result() for done in islice(as_completed(threads, timeout=10), 3)]
            assert others_try(tmp_path) == "refused", "the refusals have released the lock"
        finally:
            leave.set()
    assert all("used by one run at a time, but another run is using it" in text for text in refused)
    assert sorted(thread.result() == "held" for thread in threads) == [False, False, False, True]
    assert list(tmp_path.iterdir()) == []


def test_a_check_by_another_thread_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for enter in (lambda: contextlib.nullcontext(is_locked(tmp_path)), lambda: folder_lock(tmp_path, "training")):
        check = folder_lock(tmp_path, locks.CHECK)
        check.__enter__()
        clock = Clock(monkeypatch, second_2=lambda check=check: check.__exit__(None, None, None))
        with enter() as found:
            assert clock.seconds == 2
            assert not found


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with folder_lock(tmp_path, "training"):
        text = (tmp_path / LOCK_NAME).read_text()
    lock = tmp_path / LOCK_NAME
    lock.write_text(text.replace(str(os.getpid()), str(os.getppid())))  # a process that is running
    with pytest.raises(OutputError, match=f"training by process {os.getppid()} on"), folder_lock(tmp_path, "x"):
        pass
    lock.write_text(text)  # this process has released the lock, but could not remove the file
    Clock(monkeypatch, second_1=not_expected)
    with folder_lock(tmp_path, "training", ["training"]):
        pass
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    lock.write_text(text.replace(str(os.getpid()), str(dead.pid)))
    with folder_lock(tmp_path, "training"):
        pass
    elsewhere = text.replace(str(os.getpid()), str(dead.pid)).replace(socket.gethostname(), "elsewhere")
    lock.write_text(elsewhere)
    with pytest.raises(OutputError, match="on elsewhere has been using it since"), folder_lock(tmp_path, "training"):
        pass


def not_expected(*_: object) -> None:
    pytest.fail("waits for nobody")


def test_a_system_that_removes_no_open_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unlink = Path.unlink

    def refuse_if_open(self: Path, missing_ok: bool = False) -> None:
        if any(each.samefile(self) for each in open_files()):
            raise PermissionError(13, "The process cannot access the file")
        unlink(self, missing_ok)

    monkeypatch.setattr(locks, "fcntl", None)
    monkeypatch.setattr(locks, "is_running", lambda _: True)  # as on Windows
    Clock(monkeypatch, second_1=not_expected)
    monkeypatch.setattr(Path, "unlink", refuse_if_open)
    with folder_lock(tmp_path, "training"), pytest.raises(OutputError), folder_lock(tmp_path, "planning"):
        pass
    assert list(tmp_path.iterdir()) == []
    with folder_lock(tmp_path, "training"):
        reader = os.open(tmp_path / LOCK_NAME, os.O_RDONLY)
    assert (tmp_path / LOCK_NAME).read_text() == "", "it names nobody"
    os.close(reader)


def open_files() -> list[Path]:
    return [each for each in Path("/proc/self/fd").iterdir() if each.exists()]


class Clock:
    """A time at which a second passes in each sleep, with something to do in the sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **steps: Callable[[], None]) -> None:
        self.seconds, self.steps = 0, steps
        clock = SimpleNamespace(monotonic=lambda: float(self.seconds), sleep=self.sleep)
        monkeypatch.setattr(locks, "time", clock)

    def sleep(self, _: float) -> None:
        self.seconds += 1
        self.steps.get(f"second_{self.seconds}", lambda: None)()


@pytest.mark.parametrize("wait_for", [[], ["training"]])
def test_a_holder_without_a_name_is_waited_for_for_some_seconds(
    wait_for: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = hold(tmp_path)
    (tmp_path / LOCK_NAME).write_text("")
    clock = Clock(monkeypatch, second_100=not_expected)
    with pytest.raises(OutputError, match="but another run is using it"), folder_lock(tmp_path, "planning", wait_for):
        pass
    assert clock.seconds == locks.BRIEF_SECONDS
    end(process)


def test_the_seconds_for_a_name_begin_when_the_name_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process, lock = hold(tmp_path), tmp_path / LOCK_NAME
    text = lock.read_text()
    clock = Clock(
        monkeypatch,
        second_100=lambda: write(lock, ""),
        second_105=lambda: write(lock, text),
        second_110=lambda: end(process),
    )
    with folder_lock(tmp_path, "planning", ["training"]):
        assert clock.seconds == 110


def write(path: Path, text: str) -> None:
    path.write_text(text)


def test_a_long_wait_is_told_again_once_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process, told = hold(tmp_path), list[tuple[int, str]]()
    clock = Clock(monkeypatch, second_1000=lambda: end(process))
    with folder_lock(tmp_path, "planning", ["training"], lambda line: told.append((clock.seconds, line))):
        pass
    (first, line), (second, reminder) = told
    assert (first, second) == (0, locks.REMINDER_SECONDS)
    assert reminder == f"Still w{line[1:]} If that process is dead, delete `{tmp_path / LOCK_NAME}`."


def test_a_holder_that_lets_go_while_it_is_looked_up_is_no_other_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder is gone as soon as it has been found to be running."""
    process, is_brief, told = hold(tmp_path), locks._is_brief, list[str]()
    Clock(monkeypatch, second_10=not_expected)

    def decide_and_end(*arguments: Any) -> bool:
        decision = is_brief(*arguments)
        if process.poll() is None:
            end(process)
        return decision

    monkeypatch.setattr(locks, "_is_brief", decide_and_end)
    with folder_lock(tmp_path, "planning", ["training"], told.append):
        pass
    assert len(told) == 1
    assert f"training by process {process.pid}" in told[0]


def test_a_check_refuses_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process, lock = hold(tmp_path), tmp_path / LOCK_NAME
    lock.write_text(lock.read_text().replace("training", locks.CHECK))
    clock, told = Clock(monkeypatch, second_2=lambda: end(process)), list[str]()
    with folder_lock(tmp_path, "training", tell=told.append):
        assert clock.seconds == 2
    assert told == [], "it is not worth a line"
    process = hold(tmp_path)
    lock.write_text(lock.read_text().replace("training", locks.CHECK))
    Clock(monkeypatch, second_2=lambda: end(process))
    assert not is_locked(tmp_path), "two checks at once find nobody"


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_NAME).symlink_to(victim)
    with pytest.raises(OutputError, match="Expected to lock the folder"), folder_lock(tmp_path / "run", "training"):
        pass
    assert victim.read_text() == "mine"


def test_what_an_unreadable_lock_says(tmp_path: Path) -> None:
    process = hold(tmp_path)
    (tmp_path / LOCK_NAME).write_text('{"purpose": "training"}')
    message = "training by process an unknown process on an unknown host has been using"
    with pytest.raises(OutputError, match=message), folder_lock(tmp_path, "x"):
        pass
    end(process)
