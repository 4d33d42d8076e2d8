"""The peak of this process's memory since it was last reset, which Linux can do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

CAN_RESET = os.access("/proc/self/clear_refs", os.W_OK)
needs_peak = pytest.mark.skipif(not CAN_RESET, reason="needs Linux's peak of memory")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_kb() -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return int(status["VmHWM"].split()[0])
