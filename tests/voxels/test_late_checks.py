"""Checks of a GPU's labels, whose answers nothing waits for: on a CPU, with events that arrive when told to."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from monai_iou.voxels import late_checks
from monai_iou.voxels.flat_voxels import flat_voxels
from monai_iou.voxels.inputs import Voxels
from monai_iou.voxels.labels import report_bad_values
from monai_iou.voxels.late_checks import LateChecks
from monai_iou.voxels.passes import flatten_voxels
from monai_iou.voxels.spec import COUNT, TARGET

LOGITS = torch.randn(1, 2, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([[[0, 0, 0, 1, 1, 1, 1, 1]]])
RIGHT, WRONG = torch.tensor(False), torch.tensor(True)


class Event:
    """Stands in for torch.cuda.Event: arrives when told to, or when it is waited for."""

    def __init__(self) -> None:
        self.recorded = self.arrived = False

    def record(self) -> None:
        self.recorded = True

    def query(self) -> bool:
        return self.arrived

    def synchronize(self) -> None:
        self.arrived = True


class Rows(Tensor):
    """Rows that say they lie on a GPU."""

    device = torch.device("cuda")


def checks_of(events: list[Event]) -> LateChecks:
    def new_event() -> Any:
        events.append(Event())
        return events[-1]

    return LateChecks(new_event, pinned=False)


def rows_of(target: Tensor, missing: int) -> Tensor:
    rows = torch.zeros(7, 1, 2, 1, dtype=torch.float64)
    rows[COUNT], rows[TARGET] = target.numel(), target.numel() / 2
    rows[TARGET, 0, 0] -= missing
    return rows


def test_the_error_is_raised_after_its_arrival() -> None:
    events: list[Event] = []
    checks = checks_of(events)
    for bad, text in ((RIGHT, "first"), (WRONG, "second"), (WRONG, "third")):
        checks.ask(bad, partial(ValueError, text))
    assert [event.recorded for event in events] == [True, True, True]
    checks.raise_arrived()  # nothing has arrived
    events[2].arrived = True
    checks.raise_arrived()  # answers are read in their order
    events[0].arrived = True
    checks.raise_arrived()  # the first was right
    events[1].arrived = True
    with pytest.raises(ValueError, match=r"^second$"):
        checks.raise_arrived()
    checks.raise_arrived()  # later questions of the same run are dropped with it


def test_settled_checks_are_waited_for_and_pending_ones_are_not() -> None:
    events: list[Event] = []
    checks = checks_of(events)
    for bad, text in ((RIGHT, "first"), (WRONG, "second"), (RIGHT, "third"), (RIGHT, "fourth")):
        checks.ask(bad, partial(ValueError, text))
        if text != "fourth":
            checks.raise_settled(2)
    assert [event.arrived for event in events] == [True, False, False, False]
    with pytest.raises(ValueError, match=r"^second$"):
        checks.raise_settled(2)
    checks.raise_settled(0)


def test_the_arrival_is_recorded_on_the_device_of_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The current device may be another GPU, whose stream does not copy the answer."""
    current: list[Tensor | None] = [None]
    recorded_on: list[Tensor | None] = []

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        current[0] = tensor
        yield
        current[0] = None

    class Recorder(Event):
        def record(self) -> None:
            recorded_on.append(current[0])

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    LateChecks(lambda: cast("Any", Recorder()), pinned=False).ask(WRONG, ValueError)
    assert recorded_on == [WRONG]
    captured_on: list[Tensor | None] = []

    def is_capturing() -> bool:
        captured_on.append(current[0])
        return False

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", is_capturing)
    rows = torch.zeros(1).as_subclass(Rows)
    assert not late_checks.is_captured(rows)
    assert captured_on[0] is rows


def test_on_a_gpu_wrong_labels_are_asked_about_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch of a GPU, on rows that say they lie on one."""
    event, captured = Event(), False
    monkeypatch.setattr(late_checks, "_alone", LateChecks(lambda: cast("Any", event), pinned=False))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured)
    labels = LABELS.clone()
    labels[0, 0, 0] = 9
    voxels, right, wrong = flatten_voxels(LOGITS, labels, None), rows_of(labels, 0), rows_of(labels, 1)
    assert report_bad_values(wrong.as_subclass(Rows), labels, voxels, None).as_subclass(Tensor).isnan().all()
    assert torch.equal(report_bad_values(right.as_subclass(Rows), labels, voxels, None).as_subclass(Tensor), right)
    event.arrived = captured = True  # a graph asks for no answer, not even for those that have arrived, and sends none
    waiting = list(late_checks._alone._questions)
    for rows in (wrong, right):
        found = report_bad_values(rows.as_subclass(Rows), labels, voxels, None).as_subclass(Tensor)
        assert torch.equal(found, rows) if rows is right else found.isnan().all()
    assert list(late_checks._alone._questions) == waiting
    captured = False
    with pytest.raises(ValueError, match=r"labels 0 to 1 .* but got 9: "):
        report_bad_values(right, labels, voxels, None)
    assert torch.equal(report_bad_values(right, labels, voxels, None), right)


def held(function: Callable[..., Any]) -> Iterator[Any]:
    """Everything that a function keeps alive, functions in its closure included."""
    for cell in function.__closure__ or ():
        yield cell.cell_contents
        if callable(cell.cell_contents) and hasattr(cell.cell_contents, "__closure__"):
            yield from held(cell.cell_contents)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("compact", [False, True])
def test_a_pending_check_holds_no_graph(monkeypatch: pytest.MonkeyPatch, compact: bool, soft: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    logits = LOGITS.clone().requires_grad_() * 2
    target = torch.cat([LABELS, 1 - LABELS], 1).float().requires_grad_() * 3 if soft else LABELS.clone()
    target.view(-1)[2:4] = 9
    mask, regions = torch.ones_like(LABELS), torch.zeros_like(LABELS)
    mask[..., 2] = 0
    voxels = flat_voxels(logits, target, 255, mask, regions, 1)
    voxels = voxels.compact() if compact else voxels
    with late_checks.collected() as asked:
        report_bad_values(rows_of(LABELS, 1).as_subclass(Rows), target, voxels, 255)
    ((_, error),) = asked
    things = list(held(error))
    assert any(isinstance(thing, Tensor) for thing in things)
    assert not any(isinstance(thing, Voxels) for thing in things)
    assert not any(isinstance(thing, Tensor) and thing.grad_fn is not None for thing in things)
    assert "but got 9" in str(error())


def test_questions_are_collected_in_one_thread_and_asked_in_others(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Event] = []
    monkeypatch.setattr(late_checks, "_alone", checks_of(events))
    late_checks.ask(WRONG, partial(ValueError, "alone"))
    events[0].arrived = True
    with late_checks.collected() as asked:
        late_checks.raise_arrived()  # on one rank alone: not while the ranks work together
        late_checks.ask(WRONG, partial(ValueError, "together"))
        other = threading.Thread(target=late_checks.ask, args=(RIGHT, ValueError))
        other.start()
        other.join()
    assert [str(error()) for _, error in asked] == ["together"]
    assert len(events) == 2
    with pytest.raises(ValueError, match=r"^alone$"):
        late_checks.raise_arrived()


def test_threads_take_every_question_once() -> None:
    class Slow(Event):
        def query(self) -> bool:
            threading.Event().wait(0.001)  # lets the other threads look at the same question
            return True

    checks, errors = LateChecks(lambda: cast("Any", Slow()), pinned=False), []
    for _ in range(20):
        checks.ask(RIGHT, ValueError)

    def look() -> None:
        try:
            checks.raise_arrived()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Event] = []
    checks = checks_of(events)
    for each in (late_checks._alone, late_checks.shared):
        monkeypatch.setattr(each, "_questions", checks._questions)
    checks.ask(WRONG, ValueError)
    with late_checks._alone._lock, late_checks.shared._lock:  # taken by another thread at that moment
        child = os.fork()
        if child == 0:
            late_checks.raise_arrived()
            late_checks.shared.raise_settled(0)
            os._exit(0 if not late_checks._alone._questions and not events[0].arrived else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(late_checks._alone._questions) == 1
