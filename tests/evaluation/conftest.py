"""What several tests of evaluations share."""

from __future__ import annotations

import multiprocessing
from types import SimpleNamespace

import pytest


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the worker processes from a server that has imported the package once: importing MONAI takes seconds each.

    How a spawned one starts is tested where an evaluation with two workers writes the same bytes as one with none.
    """
    from gloo_ranks import PRELOADED

    from monai_iou.evaluation import workers

    multiprocessing.set_forkserver_preload(PRELOADED)
    names = {**vars(multiprocessing), "get_context": lambda _: multiprocessing.get_context("forkserver")}
    monkeypatch.setattr(workers, "multiprocessing", SimpleNamespace(**names))
