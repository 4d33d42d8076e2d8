"""The config lines of docs/losses.md build losses that take a step."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine
from monai.bundle import ConfigParser
from places import DOCS
from torch import Tensor

from monai_iou.bundle_files import bundle_path

PAGE = DOCS / "losses.md"
BLOCKS = re.findall(r"^```json\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_every_loss_has_a_config_line() -> None:
    shown = {name for block in BLOCKS for name in re.findall(r"monai_iou\.(\w+)", block)}
    sections = re.findall(r"^## (.*Loss.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    for section in sections:
        assert shown & set(re.findall(r"\w+", section)) or section == "Lovasz losses"


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: re.findall(r"monai_iou\.(\w+)", block)[0])
def test_config_line(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("class_weights.json").write_text(json.dumps({"weights": [0.2, 1.8]}))
    content = json.loads(block)
    parser = ConfigParser()
    parser.read_config({"loss": content.get("loss") if "_target_" not in content else content})
    loss = parser.get_parsed_content("loss")
    torch.manual_seed(0)
    logits = torch.randn(1, 2, 8, 8, 8, requires_grad=True)
    labels = torch.zeros(1, 1, 8, 8, 8)
    labels[..., 2:5, 2:5, 2:5] = 1
    value: Tensor = loss(_output(block, logits), labels)
    value.backward()
    assert value.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad.abs().sum() > 0


def test_the_schedule_joins_the_bundles_handlers_and_moves_the_loss(tmp_path: Path) -> None:
    block = next(block for block in BLOCKS if "LossWeightSchedule" in block)
    recipe, train = tmp_path / "schedule.json", bundle_path() / "configs" / "train.json"
    recipe.write_text(block)
    handlers = ConfigParser.load_config_file(train)["train"]["handlers"]
    config = ConfigParser.load_config_files([train, recipe])
    assert config["train"]["handlers"][:-1] == handlers
    parser = ConfigParser({"loss": config["loss"], "schedule": config["train"]["handlers"][-1]})
    schedule, loss = parser.get_parsed_content("schedule"), parser.get_parsed_content("loss")
    assert schedule.loss is loss
    trainer = Engine(lambda engine, batch: None)
    schedule.attach(trainer)
    for epoch, weight in ((50, 0.0), (100, 0.25), (150, 0.5), (300, 0.5)):
        trainer.load_state_dict({"epoch": epoch - 1, "max_epochs": epoch, "epoch_length": 1})
        trainer.run([0], max_epochs=epoch)
        assert loss.weights == pytest.approx([1.0, weight])


def _output(block: str, logits: Tensor) -> Any:
    """Return what a network would hand to the loss."""
    if "ContextAttentionLoss" in block:
        return logits, [torch.rand(1, 1, 8, 8, 8), torch.rand(1, 1, 4, 4, 4)]
    if "AffinityLoss" in block:
        return logits, torch.rand(1, 64, 64)
    return [logits, logits[..., ::2, ::2, ::2]] if "MultiScaleLoss" in block else logits
