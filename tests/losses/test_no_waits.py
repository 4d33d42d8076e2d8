"""Losses that look at no value while they run, as a queue of work on a GPU demands: on a device without values."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from monai_iou import (
    ComponentRegionsd,
    FocalTverskyLoss,
    GeneralizedIoULoss,
    InstanceIoULoss,
    IoUCELoss,
    IoUFocalLoss,
    IoULoss,
    LogIoULoss,
    LovaszSoftmaxLoss,
    WeightedCrossEntropyLoss,
    distributed,
)
from monai_iou.losses import weights as weights_of_losses
from monai_iou.losses.pass_loss import PassLoss
from monai_iou.losses.weights import weights_beside
from monai_iou.voxels import VoxelSums, late_checks
from monai_iou.voxels.histograms import ErrorHistograms
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
            assert not any(isinstance(part, (list, Tensor)) for part in parts), f"indexing by {parts}"
        return func(*args, **kwargs)


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
