"""Values of targets: every dtype reads alike, marks do not wrap round, wrong values are named."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from monai_iou import IoULoss
from monai_iou.voxels import labels as label_checks
from monai_iou.voxels.labels import LateChecks, report_bad_values
from monai_iou.voxels.passes import flatten_voxels
from monai_iou.voxels.spec import COUNT, TARGET

LOGITS = torch.randn(1, 2, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([[[0, 0, 0, 1, 1, 1, 1, 1]]])
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


@pytest.mark.parametrize("dtype", [*INTEGERS, torch.bool, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("channels", [1, 2])
def test_every_dtype_reads_alike(dtype: torch.dtype, channels: int) -> None:
    loss = IoULoss(sigmoid=channels == 1, softmax=channels == 2)
    assert torch.equal(loss(LOGITS[:, :channels], LABELS.to(dtype)), loss(LOGITS[:, :channels], LABELS))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int64])
@pytest.mark.parametrize("ignore_index", [-1, -100, 255, 256, 257])
def test_an_absent_mark_ignores_nothing(dtype: torch.dtype, ignore_index: int) -> None:
    marked = IoULoss(softmax=True, ignore_index=ignore_index)(LOGITS, LABELS.to(dtype))
    assert torch.equal(marked, IoULoss(softmax=True)(LOGITS, LABELS))


@pytest.mark.parametrize(("value", "ignore_index"), [(255, -1), (156, -100), (254, None), (2, 255)])
def test_a_value_that_is_not_the_mark_is_named(value: int, ignore_index: int | None) -> None:
    labels = LABELS.clone()
    labels[0, 0, 3] = value
    for target in (labels, labels.to(torch.uint8)):
        with pytest.raises(ValueError, match=f"labels 0 to 1 of an input with 2 channels, but got {value}: "):
            IoULoss(softmax=True, ignore_index=ignore_index)(LOGITS, target)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (float("nan"), "got nan: replace it"),
        (float("inf"), "got inf: replace it"),
        (0.5, r"got 0.5: give a soft target one channel per class, shape \(B, 2, \*S\)"),
        (7.0, "got 7: map the labels to consecutive classes"),
    ],
)
def test_a_float_that_is_no_label_is_named(value: float, found: str) -> None:
    labels = LABELS.float()
    labels[0, 0, 0] = value
    with pytest.raises(ValueError, match=found):
        IoULoss(softmax=True)(LOGITS, labels)


def test_the_mark_of_a_single_map_is_not_blamed() -> None:
    target = torch.tensor([[[255, 0, 0, 1, 1, 0, 2, 0]]])
    with pytest.raises(ValueError, match="values between 0 and 1, but got 2: "):
        IoULoss(sigmoid=True, ignore_index=255)(LOGITS[:, :1], target)


def test_numpy_numbers_are_numbers() -> None:
    loss = IoULoss(softmax=True, ignore_index=np.int64(1), smooth_nr=np.float32(1))  # type: ignore[arg-type]
    assert loss.ignore_index == 1


def test_one_channel_takes_a_sigmoid_when_softmax_is_asked_for() -> None:
    with pytest.warns(UserWarning, match="single channel prediction, `softmax=True` ignored"):
        value = IoULoss(softmax=True)(LOGITS[:, :1], LABELS)
    assert torch.equal(value, IoULoss(sigmoid=True)(LOGITS[:, :1], LABELS))


@pytest.mark.parametrize("per_class", [False, True])
def test_nan_at_ignored_voxels_does_not_reach_another_activation(per_class: bool) -> None:
    def softmax(logits: Tensor) -> Tensor:
        return logits.softmax(1)

    logits, labels = LOGITS.clone(), LABELS.clone()
    logits[..., 0] = float("nan")
    labels[..., 0] = 255
    target = torch.cat([labels == 0, labels == 1], 1).float() if per_class else labels
    logits.requires_grad_()
    value = IoULoss(other_act=softmax, ignore_index=255)(logits, target)
    value.backward()
    assert logits.grad is not None
    assert torch.isfinite(value)
    assert torch.isfinite(logits.grad).all()
    assert not logits.grad[..., 0].any()


class Event:
    """Stands in for torch.cuda.Event: arrives when told to."""

    def __init__(self) -> None:
        self.recorded = self.arrived = False

    def record(self) -> None:
        self.recorded = True

    def query(self) -> bool:
        return self.arrived


def test_late_checks_give_nan_at_once_and_the_error_after_its_arrival() -> None:
    events: list[Event] = []

    def new_event() -> Any:
        events.append(Event())
        return events[-1]

    checks, rows = LateChecks(new_event, pinned=False), torch.arange(6.0)
    questions = ((False, "first"), (True, "second"), (True, "third"))
    answers = [checks.ask(torch.tensor(bad), rows, partial(ValueError, text)) for bad, text in questions]
    assert torch.equal(answers[0], rows)
    assert answers[1].isnan().all()
    assert answers[2].isnan().all()
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


def test_on_a_gpu_wrong_labels_are_asked_about_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch of a GPU, on rows that say they lie on one."""

    class Rows(Tensor):
        device = torch.device("cuda")

    event, captured = Event(), False
    monkeypatch.setattr(label_checks, "_late_checks", LateChecks(lambda: cast("Any", event), pinned=False))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured)
    labels = LABELS.clone()
    labels[0, 0, 0] = 9
    voxels = flatten_voxels(LOGITS, labels, None)
    right = torch.zeros(7, 1, 2, 1, dtype=torch.float64)
    right[COUNT], right[TARGET] = 8, 4
    wrong = right.clone()
    wrong[TARGET, 0, 0] = 3
    assert report_bad_values(wrong.as_subclass(Rows), labels, voxels, None).as_subclass(Tensor).isnan().all()
    assert torch.equal(report_bad_values(right.as_subclass(Rows), labels, voxels, None).as_subclass(Tensor), right)
    event.arrived = captured = True  # a graph asks for no answer, not even for those that have arrived, and sends none
    waiting = list(label_checks._late_checks._questions)
    for rows in (wrong, right):
        found = report_bad_values(rows.as_subclass(Rows), labels, voxels, None).as_subclass(Tensor)
        assert torch.equal(found, rows) if rows is right else found.isnan().all()
    assert list(label_checks._late_checks._questions) == waiting
    captured = False
    with pytest.raises(ValueError, match=r"labels 0 to 1 .* but got 9: "):
        report_bad_values(right, labels, voxels, None)
    assert torch.equal(report_bad_values(right, labels, voxels, None), right)
