"""What every test starts from."""

from __future__ import annotations

import locale
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# For the benchmarks, which are not installed; last, so that the installed package is what is tested.
sys.path.append(str(Path(__file__).parents[1]))


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
