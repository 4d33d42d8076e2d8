"""What every test starts from."""

from __future__ import annotations

import gc
import locale
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import hypothesis
import pytest

# For the benchmarks, which are not installed; last, so that the installed package is what is tested.
sys.path.append(str(Path(__file__).parents[1]))


# The workers of pytest-xdist share the cores, with the processes that their tests start too. Before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    cores = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores)))


# No test depends on the speed of the machine.
hypothesis.settings.register_profile("without deadline", deadline=None)
hypothesis.settings.load_profile("without deadline")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep the garbage collector from walking through imports and collected tests, which stay to the end."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True)
def _same_locale() -> Iterator[None]:
    """Undo what ITK's DICOM writer does: it leaves the process in the C locale, where Python reads text as ASCII."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A copy of the shipped bundle."""
    from monai_iou.bundle_files import copy_bundle  # imports MONAI, which takes seconds

    return copy_bundle(tmp_path / "bundle")
