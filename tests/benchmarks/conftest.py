"""What several tests of the studies share."""

from __future__ import annotations

import functools

import pytest

from benchmarks.evidence import statistics


@pytest.fixture
def drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the seeds and patients of all resamples once for each shape of table, which is all that they depend on."""
    monkeypatch.setattr(statistics, "_drawn", functools.lru_cache(maxsize=8)(statistics._drawn))
