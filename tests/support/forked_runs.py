"""Runs of the bundle in a forked process, to be killed: without the seconds that imports take."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch


def fork(run: Callable[[], object], log: Path) -> int:
    """Start `run` in a process of its own, which writes to `log`; return its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)  # OpenMP's other threads did not survive the fork, and it does not know
        stream = log.open("a")
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        sys.stdout = sys.stderr = stream  # pytest has put its own in their place
        run()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)


def finish(child: int) -> int:
    """Wait for the process and return its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_after(child: int, seconds: float) -> int:
    """Kill the process after some seconds unless it ends before; return as `finish` does."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    return finish(child)


def kill_at_random(
    run: Callable[[], object], log: Path, kills: int, longest: float, check: Callable[[], None], seed: int = 0
) -> int:
    """Kill `run` that many times, each at a random moment, and check what it left; return how often it completed."""
    generator, killed, completed = random.Random(seed), 0, 0
    while killed < kills:
        assert completed <= 3 * kills, "there is nothing left to be killed"
        code = kill_after(fork(run, log), generator.uniform(0.05, longest))
        assert code in (0, -signal.SIGKILL), log.read_text()[-3000:]
        killed += code != 0
        completed += code == 0
        check()
    return completed
