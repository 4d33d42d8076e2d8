"""Losses that look at no value while they run, as a queue of work on a GPU demands: on a device without values."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from monai.losses import DiceCELoss
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from monai_iou import (
    AffinityLoss,
    AttentionSupervisionLoss,
    ComponentRegionsd,
    ContextAttentionLoss,
    FocalTverskyLoss,
    GeneralizedIoULoss,
    InstanceIoULoss,
    IoUCELoss,
    IoUFocalLoss,
    IoULoss,
    LogIoULoss,
    LovaszHingeLoss,
    LovaszSoftmaxLoss,
    MultiScaleLoss,
    WeightedCrossEntropyLoss,
    distributed,
)
from monai_iou.losses import pass_loss
from monai_iou.losses import weights as weights_of_losses
from monai_iou.losses.pass_loss import PassLoss
from monai_iou.losses.weights import weights_beside
from monai_iou.voxels import VoxelSums, late_checks
from monai_iou.voxels.histograms import ErrorHistograms
from monai_iou.voxels.late_checks import LateChecks
from monai_iou.voxels.passes import Reading

SHAPE = (6, 5, 4)
COPIES = {torch.tensor, torch.as_tensor, torch.from_numpy}
INDEXING = {Tensor.__getitem__, Tensor.__setitem__}


class NoCopies(TorchFunctionMode):
    """Refuse what waits until the GPU has its copy: of a tensor on the CPU, of numbers, of lists as indices."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        assert func not in COPIES or kwargs.get("device") == "cpu", f"a copy by {func}"
        if func is Tensor.to and args[0].device.type == "cpu":
            assert not any(getattr(other, "device", other) == torch.device("meta") for other in args[1:]), "a copy"
        if func in INDEXING:
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(map(has_to_be_read, parts)), f"indexing by {parts}"
        return func(*args, **kwargs)


def has_to_be_read(index: Any) -> bool:
    """Whether an index waits for the device: a list and a tensor on the CPU are copied, and a mask is counted."""
    is_mask = isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
    return isinstance(index, list) or is_mask or (isinstance(index, Tensor) and index.device.type == "cpu")


@pytest.mark.parametrize("index", [[0, 1], torch.tensor([0, 1]), torch.zeros(2, dtype=torch.bool, device="meta")])
def test_the_check_of_indices_can_fail(index: Any) -> None:
    values = torch.zeros(2, device="meta")
    with NoCopies():
        assert values[torch.zeros(2, dtype=torch.int64, device="meta")].shape == (2,)
        with pytest.raises(AssertionError, match=r"^indexing by"):
            values[index]


@pytest.fixture
def questions(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The checks of values that are asked late, which they are on the device without values as on a GPU."""
    asked: list[Tensor] = []
    monkeypatch.setattr(late_checks, "answers_late", lambda tensor: tensor.device.type == "meta")
    monkeypatch.setattr(late_checks, "ask", lambda bad, error: asked.append(bad))
    return asked


def run(loss: nn.Module, classes: int, channels: int = 1) -> Tensor:
    logits = torch.zeros(2, classes, *SHAPE, device="meta", requires_grad=True)
    target = torch.zeros(2, channels, *SHAPE, device="meta", dtype=torch.int16)
    with NoCopies():
        value: Tensor = loss(logits, target)
        value.backward()
    assert value.shape == ()
    assert logits.grad is not None
    assert logits.grad.shape == logits.shape
    return value


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(
    "loss",
    [
        IoULoss(softmax=True),
        IoULoss(softmax=True, batch=True, include_background=False, empty="suppress"),
        IoULoss(softmax=True, ignore_index=2),
        IoUCELoss(softmax=True, average="images"),
        LogIoULoss(softmax=True, empty="skip"),
        FocalTverskyLoss(softmax=True, alpha=0.3, beta=0.7),
        GeneralizedIoULoss(softmax=True),
        WeightedCrossEntropyLoss(softmax=True),
        LovaszSoftmaxLoss(softmax=True),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_label_maps_are_not_looked_at(loss: nn.Module, classes: int, questions: list[Tensor]) -> None:
    run(loss, classes)
    assert len(questions) == 1


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize(
    "loss",
    [
        IoULoss(sigmoid=True),
        IoUCELoss(sigmoid=True, pos_weight=5.0),
        IoULoss(sigmoid=True, soft_label=True),
        IoUFocalLoss(sigmoid=True),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_per_class_maps_are_not_looked_at(loss: nn.Module, classes: int, questions: list[Tensor]) -> None:
    run(copy.deepcopy(loss).to("meta"), classes, channels=classes)


WEIGHTS = [1.0, 4.0, 2.0]


@pytest.mark.parametrize(
    ("loss", "maps"),
    [
        (IoULoss(softmax=True, weight=WEIGHTS), False),
        (GeneralizedIoULoss(softmax=True, weight=WEIGHTS), False),
        (IoUCELoss(softmax=True, weight=WEIGHTS), False),
        (WeightedCrossEntropyLoss(sigmoid=True, weight=WEIGHTS, pos_weight=WEIGHTS), True),
        (LovaszSoftmaxLoss(softmax=True, weight=WEIGHTS), False),
        (InstanceIoULoss(softmax=True, weight=WEIGHTS, max_regions=9), True),
    ],
    ids=lambda each: type(each).__name__,
)
@pytest.mark.usefixtures("questions")
def test_weights_of_a_loss_that_is_never_moved_are_copied_once(loss: nn.Module, maps: bool) -> None:
    channels = 3 if maps else 1
    with pytest.raises(AssertionError, match=r"^a copy"):
        run(loss, 3, channels)
    values = torch.zeros(2, 3, *SHAPE, device="meta")
    loss(values, torch.zeros(2, channels, *SHAPE, device="meta", dtype=torch.int16))
    run(loss, 3, channels)
    logits, labels = torch.zeros(1, 3, 4), torch.tensor([[[0, 1, 2, 2]]])
    assert loss(logits, torch.eye(3)[labels[:, 0]].movedim(-1, 1) if maps else labels).isfinite()  # still on the CPU


def test_copies_of_weights_follow_the_weights_and_end_with_them() -> None:
    weights, values = torch.tensor([1.0, 2.0]), torch.zeros(2, device="meta")
    copied = weights_beside(weights, values)
    assert copied.device.type == "meta"
    assert weights_beside(weights, values) is copied
    assert weights_beside(weights, values.double()).dtype == torch.float64
    weights.data[1] = 5
    assert weights_beside(weights, values) is not copied
    assert weights in weights_of_losses._copies
    before = len(weights_of_losses._copies)
    del weights
    assert len(weights_of_losses._copies) == before - 1
    learnt = torch.ones(2, requires_grad=True)
    assert weights_beside(learnt, values) is not weights_beside(learnt, values)


def test_a_tracer_leaves_no_copies_behind() -> None:
    weights, values = torch.tensor([1.0, 2.0]), torch.zeros(2, device="meta")
    with FakeTensorMode(allow_non_fake_inputs=True):
        weights_beside(weights, values)
    assert weights not in weights_of_losses._copies
    assert type(weights_beside(weights, values)) is Tensor


def test_weights_that_a_validation_copied_first_serve_the_training() -> None:
    loss = IoULoss(softmax=True, weight=[1.0, 4.0])
    rows = torch.zeros(7, 1, 2, device="meta")
    with torch.inference_mode():
        loss.score(VoxelSums(rows), 3)
        made_there = torch.ones(2)
        assert weights_beside(made_there, rows).device.type == "meta"
    assert not weights_beside(made_there, rows).is_inference()
    loss.score(VoxelSums(rows.requires_grad_() * 1), 3).backward()
    assert rows.grad is not None


@pytest.mark.parametrize(
    "loss",
    [
        IoULoss(),
        LogIoULoss(empty="skip", average="classes"),
        GeneralizedIoULoss(empty="suppress"),
        LovaszSoftmaxLoss("all"),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_whether_another_rank_leaves_a_class_out_is_not_looked_at(
    loss: PassLoss, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.zeros(7, 1, 3, device="meta")
    counts = torch.zeros(1, 3, 2, 10, device="meta", dtype=torch.int64)
    answer = torch.zeros((), device="meta", dtype=torch.bool)
    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda tensor: tensor)
    with NoCopies():
        assert isinstance(distributed.sums_over_ranks(VoxelSums(rows)).partly_labelled, Tensor)
        sums = VoxelSums(rows) + VoxelSums(rows, partly_labelled=answer)
        reading = Reading(sums, ErrorHistograms(counts, torch.ones(1, 1, device="meta")))
        assert loss.score_reading(reading, 3).shape == ()


@pytest.mark.parametrize("classes", [1, 2, 3])
@pytest.mark.parametrize("regions", ["voronoi", "blob"])
@pytest.mark.parametrize(
    "options",
    [{}, {"batch": True}, {"term": IoUCELoss(), "empty": "suppress"}, {"global_loss": IoUCELoss(softmax=True)}],
    ids=["plain", "batch", "term", "global"],
)
def test_regions_within_a_largest_number_are_not_looked_at(
    regions: str, classes: int, options: dict[str, Any], questions: list[Tensor]
) -> None:
    activation = {"softmax": True} if classes > 1 else {"sigmoid": True}
    if classes == 1 and "global_loss" in options:
        options = {"global_loss": IoUCELoss(sigmoid=True)}
    run(InstanceIoULoss(regions, max_regions=9, **activation, **options), classes, channels=max(classes, 2))
    assert len(questions) >= 1  # whether a number is too large, and whether a value is no label
    with pytest.raises(RuntimeError, match=r"cannot be called on meta tensors"):
        run(InstanceIoULoss(regions, **activation, **options), classes, channels=max(classes, 2))


def lesions(classes: int) -> tuple[Tensor, Tensor]:
    """Return logits (2, C, 12, 6, 6) and a label map with the regions of three, and of no, lesions."""
    labels = torch.zeros(2, 1, 12, 6, 6, dtype=torch.int64)
    labels[0, 0, 1:4, 1:3, 1:3] = 1
    labels[0, 0, 6, 4, 4] = 1
    labels[0, 0, 9:11, 2:5, 2] = max(1, classes - 1)
    find = ComponentRegionsd("x", num_classes=max(2, classes))
    logits = torch.randn(2, classes, 12, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return logits, torch.stack([find({"x": label})["x"] for label in labels])


@pytest.mark.parametrize("classes", [1, 2, 3])
@pytest.mark.parametrize("regions", ["voronoi", "blob"])
@pytest.mark.parametrize(
    "options",
    [{}, {"batch": True}, {"cells": "both"}, {"term": IoUCELoss(empty="skip")}, {"cell_weight": "inverse"}],
    ids=["plain", "batch", "both", "term", "inverse"],
)
def test_a_largest_number_changes_no_value(regions: str, classes: int, options: dict[str, Any]) -> None:
    activation = {"softmax": True} if classes > 1 else {"sigmoid": True}
    logits, target = lesions(classes)
    results = []
    for largest in (None, 3, 1000):
        leaf = logits.clone().requires_grad_()
        value = InstanceIoULoss(regions, max_regions=largest, **activation, **options)(leaf, target)
        value.backward()
        results.append((value.detach(), leaf.grad))
    for value, gradient in results[1:]:
        torch.testing.assert_close(value, results[0][0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-12, atol=1e-12)


def test_a_label_map_without_regions_still_has_its_cells_found() -> None:
    """As the coarser maps of MultiScaleLoss have."""
    logits, target = lesions(3)
    loss = InstanceIoULoss(softmax=True, max_regions=1)
    torch.testing.assert_close(loss(logits, target[:, :1]), InstanceIoULoss(softmax=True)(logits, target[:, :1]))


@pytest.mark.parametrize("regions", ["voronoi", "blob"])
def test_more_regions_than_the_largest_number(regions: str, questions: list[Tensor]) -> None:
    logits, target = lesions(2)
    expected = (
        "Expected no more than max_regions=2 precomputed regions of a class in an image, but the target holds region "
        "3: raise `max_regions`, or leave it out to have the regions counted."
    )
    loss = InstanceIoULoss(regions, softmax=True, max_regions=2)
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        loss(logits, target)
    assert questions == []


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (
            0,
            ValueError,
            "Expected `max_regions` to be at least 1, but got 0: give the largest number of lesions of an ",
        ),
        (2.5, TypeError, "Expected `max_regions` to be an integer, but got float: give the largest number of lesions "),
        (True, TypeError, "Expected `max_regions` to be an integer, but got bool: give the largest number of lesions "),
    ],
)
def test_a_largest_number_that_is_none(value: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        InstanceIoULoss(softmax=True, max_regions=value)
    assert str(caught.value).startswith(text)


def outputs(classes: int = 2, channels: int | None = None, device: str = "meta") -> list[Tensor]:
    """What a network with two scales returns for images of 8 x 8 voxels, or its attention maps."""
    count = classes if channels is None else channels
    return [torch.zeros(2, count, side, side, device=device, requires_grad=True) for side in (8, 4)]


def affinities(device: str = "meta") -> Tensor:
    return torch.full((2, 16, 16), 0.5, device=device, requires_grad=True)


def labels(channels: int = 1, device: str = "meta") -> Tensor:
    return torch.zeros(2, channels, 8, 8, device=device, dtype=torch.int16)


MANY = MultiScaleLoss(IoUCELoss(softmax=True))
ATTENTION = ContextAttentionLoss(context_mm=1.0)
LARGEST = {"softmax": True, "max_regions": 9}


@pytest.mark.parametrize(
    ("loss", "given"),
    [
        (ATTENTION, lambda device: (outputs(1, device=device), labels(device=device))),
        (ATTENTION, lambda device: (outputs(1, device=device), labels(3, device))),
        (AffinityLoss(downsample="nearest"), lambda device: (affinities(device), labels(device=device))),
        (AffinityLoss(downsample="nearest", sigmoid=True), lambda device: (affinities(device), labels(device=device))),
        (
            AttentionSupervisionLoss(MANY, ATTENTION),
            lambda device: ((outputs(device=device), outputs(1, device=device)), labels(device=device)),
        ),
        (MANY, lambda device: (outputs(device=device), labels(device=device))),
        (
            MultiScaleLoss(LovaszSoftmaxLoss(softmax=True), downsample="max"),
            lambda device: (outputs(3, device=device), labels(device=device)),
        ),
        (
            MultiScaleLoss(DiceCELoss(softmax=True, to_onehot_y=True), [0.0, 1.0], "nearest"),
            lambda device: (outputs(device=device), labels(device=device).float()),
        ),
    ],
    ids=["attention", "maps", "affinity", "logits", "supervision", "scales", "max", "nearest"],
)
def test_maps_affinities_and_scales_are_not_looked_at(
    loss: nn.Module, given: Callable[[str], tuple[Any, Tensor]], questions: list[Tensor]
) -> None:
    loss(*given("cpu"))  # the first step looks whether an input without an activation holds probabilities
    values, target = given("meta")
    with NoCopies():
        loss(values, target).backward()
    assert len(questions) >= 1


@pytest.mark.parametrize(
    ("loss", "given"),
    [
        (AffinityLoss(), (affinities(), labels())),
        (InstanceIoULoss(cells="both", **LARGEST), (outputs()[0], labels(2))),
        (InstanceIoULoss(cells="prediction", **LARGEST), (outputs()[0], labels(2))),
        (InstanceIoULoss(cells="prediction", sigmoid=True, max_regions=9), (outputs()[0], labels(2))),
        (InstanceIoULoss(**LARGEST), (outputs()[0], labels())),
        (MultiScaleLoss(InstanceIoULoss(**LARGEST)), (outputs(), labels(2))),
        (InstanceIoULoss(softmax=True), (outputs()[0], labels(2))),
        (LovaszHingeLoss(), (outputs(1)[0], labels())),
        (LovaszSoftmaxLoss(softmax=True), (outputs()[0], labels(2))),
        (LovaszSoftmaxLoss(softmax=True), (outputs()[0], labels(2).float())),
        (IoULoss(), (outputs()[0], labels())),
    ],
    ids=[
        "affinity", "cells of both", "cells of the prediction", "cells of maps", "no regions", "coarser scales",
        "no largest number", "hinge", "maps", "soft maps", "first call",
    ],
)  # fmt: skip
@pytest.mark.usefixtures("questions")
def test_losses_that_docs_losses_names_look_at_values(
    loss: nn.Module, given: tuple[Any, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pass_loss, "_has_warned", False)
    with NoCopies(), pytest.raises((RuntimeError, NotImplementedError), match=r"[Mm]eta tensor"):
        loss(*given)


class Event:
    """Stands in for torch.cuda.Event: every answer is there."""

    def record(self) -> None: ...

    def query(self) -> bool:
        return True


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> LateChecks:
    """The questions of a process that checks labels as it does on a GPU."""
    checks = LateChecks(lambda: cast("Any", Event()), pinned=False)
    monkeypatch.setattr(late_checks, "answers_late", lambda _: True)
    monkeypatch.setattr(late_checks, "_alone", checks)
    return checks


ASKING = pytest.mark.parametrize(
    ("loss", "given"),
    [
        (IoULoss(softmax=True), lambda: outputs(device="cpu")[0]),
        (IoUCELoss(softmax=True), lambda: outputs(device="cpu")[0]),
        (WeightedCrossEntropyLoss(softmax=True), lambda: outputs(device="cpu")[0]),
        (LovaszSoftmaxLoss(softmax=True), lambda: outputs(device="cpu")[0]),
        (InstanceIoULoss(softmax=True), lambda: outputs(device="cpu")[0]),
        (MANY, lambda: outputs(device="cpu")),
        (MultiScaleLoss(DiceCELoss(softmax=True, to_onehot_y=True)), lambda: outputs(device="cpu")),
        (
            MultiScaleLoss(DiceCELoss(softmax=True, to_onehot_y=True), [0.0, 1.0], "max"),
            lambda: outputs(device="cpu"),
        ),
        (ATTENTION, lambda: outputs(1, device="cpu")),
        (AffinityLoss(), lambda: affinities("cpu")),
        (
            AttentionSupervisionLoss(DiceCELoss(softmax=True, to_onehot_y=True), AffinityLoss()),
            lambda: (outputs(device="cpu")[0], affinities("cpu")),
        ),
    ],
    ids=["iou", "iou_ce", "ce", "lovasz", "instance", "scales", "monais", "max", "attention", "affinity", "both"],
)


@ASKING
def test_questions_never_pile_up_and_keep_no_outputs(
    loss: nn.Module, given: Callable[[], Any], waiting: LateChecks
) -> None:
    outgoing: list[weakref.ref[Tensor]] = []
    for _ in range(20):
        values = given()
        first = values if isinstance(values, Tensor) else values[0]
        logits = first[0] if isinstance(first, list) else first
        outgoing.append(weakref.ref(logits))
        assert loss(values, labels(device="cpu").float()).isfinite()
        assert 1 <= len(waiting._questions) <= 2
        del values, first, logits
    gc.collect()
    assert all(reference() is None for reference in outgoing), "a question holds the graph of the network"


def error_within_two_calls(loss: nn.Module, values: Any, wrong: Tensor, right: Tensor) -> str:
    """A loss that asks several questions may have the answer to the first one when it asks the last one."""
    try:
        assert loss(values, wrong).isnan()
        loss(values, right)
    except ValueError as error:
        return str(error)
    pytest.fail("nothing was raised")


@ASKING
def test_a_wrong_label_is_raised_by_the_next_call(
    loss: nn.Module, given: Callable[[], Any], waiting: LateChecks
) -> None:
    right = labels(device="cpu").float()
    sentence = error_within_two_calls(loss, given(), right + 0.5, right)
    assert re.match(r"Expected .* but got 0.5: give a soft target one channel per class", sentence), sentence
    assert loss(given(), right).isfinite()
    assert 1 <= len(waiting._questions) <= 2


def test_a_wrong_label_is_raised_by_a_call_that_has_nothing_to_ask(waiting: LateChecks) -> None:
    loss, logits, right = IoULoss(softmax=True), torch.zeros(2, 2, 8, 8), torch.zeros(2, 2, 8, 8, dtype=torch.bool)
    wrong = torch.full((2, 1, 8, 8), 7)
    assert "but got 7" in error_within_two_calls(loss, logits, wrong, right)
    assert not waiting._questions


def test_a_label_map_without_its_channel_is_raised_by_the_next_call(waiting: LateChecks) -> None:
    loss, stack, slices = MultiScaleLoss(IoULoss(softmax=True)), torch.zeros(2, 3, 2, 8, 8), torch.ones(2, 2, 8, 8)
    assert "but got (2, 3, 2, 8, 8): add the channel dim" in error_within_two_calls(loss, stack, slices, slices / 2)
    reference = weakref.ref(stack)
    with late_checks.collected() as asked:
        loss(stack, slices / 2)
    assert len(asked) == 1 + stack.shape[1]
    del stack
    gc.collect()
    assert reference() is None
    assert not waiting._questions
