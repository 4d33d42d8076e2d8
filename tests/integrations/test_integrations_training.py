"""Losses and metrics in other packages' training loops."""

from __future__ import annotations

import math

import pytest
from integration_environment import TORCHVISION, recipe

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


def test_lightning_trains_and_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    exec(TORCHVISION, {})
    lightning = pytest.importorskip("lightning", reason="needs lightning, which .ci/integrations installs")
    lightning.seed_everything(0)
    names: dict[str, object] = {}
    exec(compile(recipe("Lightning", "py")[0], "Lightning", "exec"), names)
    trainer = names["trainer"]
    assert isinstance(trainer, lightning.Trainer)
    assert trainer.current_epoch == 3
    # a threshold at 2: one convolution learns a good part of it in 12 steps
    assert 0.1 < trainer.callback_metrics["val_iou"].item() <= 1
    assert math.isfinite(trainer.callback_metrics["train_loss"].item())
