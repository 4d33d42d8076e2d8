"""A loss that is NaN because labels are wrong, which a GPU's check says late: the run names them, and not its rate."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from gloo_ranks import join_group, leave_group, run_ranks

from monai_iou import IoULoss
from monai_iou.voxels import late_checks
from monai_iou.voxels.late_checks import LateChecks
from monai_iou.workflow.failures import StepGuard, TrainingError, run

RIGHT = torch.zeros(1, 1, 6, 6, dtype=torch.long)
WRONG = torch.full((1, 1, 6, 6), 7)


class Event:
    """Stands in for torch.cuda.Event: the answer arrives when it is waited for."""

    def __init__(self) -> None:
        self.arrived = False

    def record(self) -> None: ...

    def synchronize(self) -> None:
        self.arrived = True

    def query(self) -> bool:
        return self.arrived


def late() -> LateChecks:
    return LateChecks(lambda: cast("Any", Event()), pinned=False)


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late_checks, "answers_late", lambda _: True)
    monkeypatch.setattr(late_checks, "_alone", late())
    monkeypatch.setattr(late_checks, "shared", late())


def engine_after(target: torch.Tensor, loss: float | None = None, **options: Any) -> Any:
    """Return a trainer after a step on a batch with this target."""
    value = float(IoULoss(softmax=True, **options)(torch.zeros(1, 3, 6, 6), target)) if loss is None else loss
    state = SimpleNamespace(output={"loss": value}, batch={"case": "a"}, epoch=2, device=torch.device("cpu"))
    return SimpleNamespace(state=state)


def test_wrong_labels_are_named() -> None:
    engine = engine_after(WRONG)
    assert engine.state.output["loss"] != engine.state.output["loss"], "the loss is NaN"
    with pytest.raises(TrainingError, match=r"^Expected .*labels 0 to 2.* but got 7") as caught:
        StepGuard().check(engine)
    assert "learning_rate" not in str(caught.value)


def test_right_labels_leave_it_to_the_files_and_the_rate() -> None:
    with pytest.raises(TrainingError, match=r"^Expected a finite loss, but got nan .* of a: .*`learning_rate`"):
        StepGuard().check(engine_after(RIGHT, torch.nan))
    assert StepGuard().check(engine_after(RIGHT)) == 0


def test_a_finite_loss_waits_for_nothing() -> None:
    StepGuard().check(engine_after(RIGHT))
    assert not late_checks._alone._questions[0].arrival.query()


def guard_of_one_rank(rank: int, world: int, folder: str, sync: bool) -> None:
    join_group(rank, world, folder)
    late_checks.answers_late = lambda _: True
    late_checks._alone, late_checks.shared = late(), late()
    engine = engine_after(WRONG if rank == 1 else RIGHT, batch=sync, sync_batch=sync)
    try:
        StepGuard().check(engine)
    except TrainingError as error:
        (Path(folder) / f"{rank}.txt").write_text(str(error))
    leave_group()


@pytest.mark.parametrize("sync", [pytest.param(False, marks=pytest.mark.slow), True])
def test_every_rank_names_the_labels_of_one(sync: bool, tmp_path: Path) -> None:
    run_ranks(guard_of_one_rank, 2, 2, str(tmp_path), sync)
    first, second = ((tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    assert first == second
    assert "but got 7" in first


def end_of_one_rank(rank: int, world: int, folder: str) -> None:
    """A training of two ranks, of which one gets a signal at its very end."""
    join_group(rank, world, folder)
    engine = SimpleNamespace(state=SimpleNamespace(rank=rank, device=torch.device("cpu")), optimizer=None)
    engine.run = lambda: signal.raise_signal(signal.SIGTERM) if rank == 1 else None
    try:
        run(engine)
    except SystemExit as stop:
        (Path(folder) / f"{rank}.txt").write_text(str(stop.code))
    leave_group()


def test_all_ranks_end_after_a_training_at_whose_end_one_got_a_signal(tmp_path: Path) -> None:
    run_ranks(end_of_one_rank, 2, 2, str(tmp_path))
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == ["143", "143"]
