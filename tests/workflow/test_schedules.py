"""A resumed training follows the learning rates of its own settings, from the step of the checkpoint on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine
from monai.handlers.lr_schedule_handler import LrScheduleHandler
from torch.optim import lr_scheduler

from monai_iou.workflow.checkpoints import CheckpointHandler
from monai_iou.workflow.failures import TrainingError
from monai_iou.workflow.optimization import PolynomialDecay
from monai_iou.workflow.schedules import check_schedule, restore_schedule

Schedule = Callable[[torch.optim.Optimizer, int], Any]


def warm_up(optimizer: torch.optim.Optimizer, total: int) -> Any:
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2), PolynomialDecay(optimizer, total - 2)]
    return lr_scheduler.SequentialLR(optimizer, parts, [2])


def chained(optimizer: torch.optim.Optimizer, total: int) -> Any:
    return lr_scheduler.ChainedScheduler(
        [
            lr_scheduler.ConstantLR(optimizer, 0.5, total_iters=3),
            lr_scheduler.ExponentialLR(optimizer, 1 - 1 / total),
        ]
    )


SCHEDULES: dict[str, Schedule] = {
    "ours": PolynomialDecay,
    "cosine": lr_scheduler.CosineAnnealingLR,
    "one cycle": lambda optimizer, total: lr_scheduler.OneCycleLR(
        optimizer, optimizer.param_groups[0]["lr"], total_steps=total, cycle_momentum=True
    ),
    "steps": lambda optimizer, total: lr_scheduler.StepLR(optimizer, max(1, total // 4)),
    "warm-up": warm_up,
    "chained": chained,
}


class Mine(lr_scheduler.LambdaLR):
    """A schedule of a user's own, whose rate may depend on anything."""

    def __init__(self, optimizer: torch.optim.Optimizer, total: int) -> None:
        super().__init__(optimizer, lambda step: 1 - step / total)


def made(schedule: Schedule, rate: float, total: int) -> tuple[torch.nn.Module, torch.optim.SGD, Any]:
    torch.manual_seed(0)
    network = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9)
    return network, optimizer, schedule(optimizer, total)


def rates(
    schedule: Schedule, rate: float, total: int, epochs: int, folder: Path, *, resume: bool = False, length: int = 2
) -> list[Any]:
    """Train in epochs of `length` steps; return the settings of each step."""
    network, optimizer, scheduler = made(schedule, rate, total)
    used = []

    def step(*_: object) -> list[dict[str, float]]:
        used.append({name: optimizer.param_groups[0][name] for name in ("lr", "momentum")})
        optimizer.zero_grad()
        network(torch.ones(1, 1)).square().sum().backward()
        optimizer.step()
        scheduler.step()
        return [{"loss": 0.0}]

    engine = Engine(step)
    engine.state.rank = 0
    CheckpointHandler(str(folder), network, optimizer, scheduler, resume=resume).attach(engine)
    engine.run([0] * length, max_epochs=epochs)
    return used


@pytest.mark.parametrize(("rate", "total"), [(0.1, 8), (0.04, 16)], ids=["same", "changed"])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_curve_is_that_of_this_run_from_the_checkpoint_on(
    kind: str, rate: float, total: int, tmp_path: Path
) -> None:
    schedule = SCHEDULES[kind]
    rates(schedule, 0.1, 8, 2, tmp_path)
    resumed = rates(schedule, rate, total, total // 2, tmp_path, resume=True)
    assert resumed == rates(schedule, rate, total, total // 2, tmp_path / "whole")[4:]
    assert len({each["lr"] for each in resumed}) > 1


@pytest.mark.parametrize("kind", ["cosine", "one cycle"])
def test_a_checkpoint_of_longer_epochs_is_counted_in_this_runs(kind: str, tmp_path: Path) -> None:
    """As with a larger `batch_size`: the curve is as far as the epochs are, and does not run backwards at its end."""
    schedule = SCHEDULES[kind]
    rates(schedule, 0.1, 16, 2, tmp_path, length=4)
    resumed = rates(schedule, 0.1, 8, 4, tmp_path, resume=True)
    assert resumed == rates(schedule, 0.1, 8, 4, tmp_path / "whole")[4:]


def test_a_schedule_that_follows_scores_keeps_its_state_and_takes_new_settings(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def plateau(optimizer: torch.optim.Optimizer, patience: int) -> Any:
        return lr_scheduler.ReduceLROnPlateau(optimizer, "max", factor=0.5, patience=patience, cooldown=2)

    _, optimizer, before = made(plateau, 0.1, 1)
    for score in (0.5, 0.7, 0.6, 0.6, 0.6):
        before.step(score)
    assert optimizer.param_groups[0]["lr"] == 0.05
    _, optimizer, after = made(plateau, 0.3, 4)
    with caplog.at_level(logging.INFO, "monai_iou"):
        restore_schedule(after, 0, before.state_dict(), "last_epoch.pt")
    state = {name: value for name, value in after.state_dict().items() if name != "patience"}
    assert state == {name: value for name, value in before.state_dict().items() if name != "patience"}
    assert (after.patience, after.best, optimizer.param_groups[0]["lr"]) == (4, 0.7, 0.05)
    assert caplog.messages == [
        "The learning rate goes on from 0.05 of last_epoch.pt, as ReduceLROnPlateau keeps it in its state, whatever "
        "`learning_rate` is."
    ]


def test_a_schedule_of_ones_own_takes_its_whole_state(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = rates(Mine, 0.1, 8, 4, tmp_path / "whole")
    rates(Mine, 0.1, 8, 2, tmp_path)
    with caplog.at_level(logging.INFO, "monai_iou"):
        assert rates(Mine, 0.1, 8, 4, tmp_path, resume=True) == whole[4:]
    assert f"The learning rate goes on from 0.05 of {tmp_path / 'last_epoch.pt'}, as Mine keeps" in caplog.text


def test_a_schedule_that_cannot_go_on_says_why() -> None:
    _, _, long = made(SCHEDULES["one cycle"], 0.1, 8)
    with pytest.raises(ValueError, match=r"^Expected the `lr_scheduler` of this run, OneCycleLR, to have at least"):
        restore_schedule(made(SCHEDULES["one cycle"], 0.1, 4)[2], 5, {**long.state_dict(), "last_epoch": 5}, "a.pt")
    other = made(lambda optimizer, _: lr_scheduler.ReduceLROnPlateau(optimizer), 0.1, 4)[2]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - its whole text follows
        restore_schedule(other, 5, long.state_dict(), "a.pt")
    assert str(caught.value) == (
        "Expected a.pt to hold the state of a ReduceLROnPlateau, the `lr_scheduler` of this run, but it has no 'best': "
        "resume with the `lr_scheduler` of the training, or start anew with --overwrite and without --resume."
    )


def test_a_schedule_that_watches_a_value_is_refused_without_one() -> None:
    plateau = made(lambda optimizer, _: lr_scheduler.ReduceLROnPlateau(optimizer), 0.1, 1)[2]
    with pytest.raises(TrainingError, match=r"^Expected a `step_transform` that gives the ReduceLROnPlateau"):
        check_schedule(plateau, [LrScheduleHandler(plateau, epoch_level=False)])
    check_schedule(plateau, [LrScheduleHandler(plateau, step_transform=lambda engine: engine.state.output)])
    cosine = made(SCHEDULES["cosine"], 0.1, 4)[2]
    check_schedule(cosine, [LrScheduleHandler(cosine, epoch_level=False), object()])
