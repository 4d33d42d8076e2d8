"""Memory that a training keeps for its next step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from light_import import LIGHT_IMPORT

from monai_iou.workflow import freed_memory
from monai_iou.workflow.freed_memory import kept_memory

# Page faults of allocating, filling and freeing the same eight images, in a process of its own.
COUNT = f"""
{LIGHT_IMPORT}import contextlib, json, resource, sys
import torch
from monai_iou.workflow.freed_memory import kept_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        images = [torch.zeros(2 << 20) for _ in range(8)]
        del images
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def held():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() >> 20

torch.set_num_threads(1)
usual = faults()
with kept_memory():
    faults()
    kept = faults()
    during = held()
print(json.dumps([usual, kept, during, held()]))
"""


def count(**environment: str) -> list[int]:
    given = {name: value for name, value in os.environ.items() if name not in freed_memory._OWN_SETTINGS}
    command = [sys.executable, "-c", COUNT]
    result = subprocess.run(command, env={**given, **environment}, capture_output=True, text=True, check=True)
    numbers: list[int] = json.loads(result.stdout)
    return numbers


@pytest.mark.slow
@pytest.mark.skipif(freed_memory._library() is None, reason="needs glibc")
def test_a_step_clears_no_page_again_and_all_is_given_back() -> None:
    usual, kept, during, after = count()
    assert usual > 5000  # 5 times 8 images of 2048 pages
    assert kept < usual / 20
    assert after < during - 30  # MiB


@pytest.mark.slow
@pytest.mark.skipif(freed_memory._library() is None, reason="needs glibc")
def test_settings_of_the_user_are_left_alone() -> None:
    usual, kept, _, _ = count(MALLOC_TRIM_THRESHOLD_="1000000")
    assert kept > usual / 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_that_is_forked_keeps_no_more_than_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it keeps cannot be measured: any number at the end of the heap holds the rest."""
    calls: list[tuple[int, int]] = []
    library = SimpleNamespace(mallopt=lambda *given: calls.append(given), malloc_trim=lambda _: None)
    monkeypatch.setattr(freed_memory, "_library", lambda: library)
    reading, writing = os.pipe()
    with kept_memory():
        calls.clear()
        child = os.fork()
        if child == 0:
            os.write(writing, json.dumps([calls, freed_memory._users]).encode())
            os._exit(0)
        os.waitpid(child, 0)
        assert freed_memory._users == 1
    os.close(writing)
    with os.fdopen(reading) as file:
        assert json.load(file) == [[[freed_memory._TRIM_THRESHOLD, freed_memory._USUAL]], 0]


def test_nested_and_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    with kept_memory(), kept_memory():
        pass
    assert freed_memory._users == 0
    with pytest.raises(KeyError), kept_memory():
        raise KeyError
    assert freed_memory._users == 0

    def none(_: object) -> None:
        raise OSError

    monkeypatch.setattr(freed_memory.ctypes, "CDLL", none)
    with kept_memory():
        assert freed_memory._users == 0
