"""Every loss and every kind of crop of the studies trains and is scored, on tiny volumes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.evidence import running
from benchmarks.evidence.choices import LOSSES, SAMPLERS
from benchmarks.evidence.data import DATA
from benchmarks.evidence.studies import Run
from benchmarks.evidence.tables import cases_of, runs_of

TINY = replace(
    DATA["phantoms"],
    arguments={"training": 3, "evaluation": 2, "shape": (40, 40, 24)},
    settings={"patch_size": [24, 24, 16], "epochs": 2, "base_channels": 4},
)


def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str, sampler: str) -> dict[str, str]:
    monkeypatch.setitem(DATA, "phantoms", TINY)
    run = Run("compound", "phantoms", loss, sampler, 0, 0)
    running.make_run(run, tmp_path / "results", tmp_path / "output", quick=False)
    assert not (tmp_path / "output" / run.folder).exists()  # the weights
    assert len(cases_of(tmp_path / "results", "compound")) == 2
    (row,) = runs_of(tmp_path / "results", "compound")
    return row


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains_and_is_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str) -> None:
    row = made(tmp_path, monkeypatch, loss, "q=1/2")
    assert (row["cases"], row["epochs"]) == ("2", "2")
    assert int(row["steps"]) >= 2
    assert 0 <= float(row["iou"]) <= float(row["dice"]) <= 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_kind_of_crop_trains_and_is_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str) -> None:
    row = made(tmp_path, monkeypatch, "iou+ce/3", sampler)
    assert float(row["last_loss"]) > 0
