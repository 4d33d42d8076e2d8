"""A training without data: its single weight grows by 1 in each step, so that a file's weights name their step."""

from __future__ import annotations

from typing import Any

import torch
from ignite.engine import Engine


def growing_weight(start: float = 0.0) -> tuple[list[Any], Engine, Engine]:
    """Return network, optimizer and schedule as `CheckpointHandler` takes them, and the engines of both parts."""
    network = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(network.weight, start)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)

    def step(*_: Any) -> list[dict[str, float]]:
        with torch.no_grad():
            network.weight.add_(1)
        return [{"loss": 0.0}]

    trainer, evaluator = Engine(step), Engine(lambda *_: None)
    trainer.state.rank = evaluator.state.rank = 0
    return [network, optimizer, schedule], trainer, evaluator
