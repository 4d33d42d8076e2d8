"""The progress of a training run: the time left counts this run's steps alone."""

from __future__ import annotations

import logging
import re
import time

import pytest
import torch
from ignite.engine import Engine, Events

from monai_iou.workflow.progress import ProgressHandler


def test_time_left_after_resuming(caplog: pytest.LogCaptureFixture) -> None:
    def step(_: Engine, __: int) -> dict[str, float]:
        time.sleep(0.05)
        return {"loss": 1.0}

    trainer = Engine(step)
    trainer.state.rank = 0
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    ProgressHandler(optimizer).attach(trainer)

    @trainer.on(Events.STARTED)
    def restore(engine: Engine) -> None:
        engine.state.epoch, engine.state.iteration = 90, 900

    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: engine.terminate())
    with caplog.at_level(logging.INFO):
        trainer.run(range(10), max_epochs=200, epoch_length=10)
    line = next(record.message for record in caplog.records if record.message.startswith("epoch 91/200"))
    found = re.search(r", (\d+):(\d+):(\d+) left", line)
    assert found is not None
    hours, minutes, seconds = map(int, found.groups())
    # 1090 steps of 0.05 s; counted from iteration 0, the 10 steps done would pass for 910
    assert 3600 * hours + 60 * minutes + seconds > 50
