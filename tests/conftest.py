"""What every test starts from."""

from __future__ import annotations

import locale
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _same_locale() -> Iterator[None]:
    """Undo what ITK's DICOM writer does: it leaves the process in the C locale, where Python reads text as ASCII."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)
