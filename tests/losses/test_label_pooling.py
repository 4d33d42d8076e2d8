"""The classes of a label counted, and the rarest found, in one reading of the voxels that waits for no GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pretend_gpu import pretended_gpu
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from monai_iou import AffinityLoss, IoUCELoss, IoULoss, MultiScaleLoss
from monai_iou.losses.label_pooling import class_counts, pool_labels
from monai_iou.voxels import late_checks

DTYPES = [torch.bool, torch.uint8, torch.int8, torch.uint16, torch.uint64, torch.int64, torch.bfloat16, torch.float32]


class Operations(TorchDispatchMode):
    """Count the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def some_labels(shape: tuple[int, ...], classes: int, seed: int = 0) -> Tensor:
    odds = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return (odds**3 * classes).long()


def slow_loop(labels: Tensor, factor: int, ignore: int | None) -> Tensor:
    """The "max" labels of (B, 1, X, Y) label maps, block by block."""
    frequency = dict(zip(*(each.tolist() for each in np.unique(labels.numpy(), return_counts=True)), strict=True))
    result = labels[..., ::factor, ::factor].clone()
    for place in np.ndindex(*result.shape):
        x, y = (factor * side for side in place[2:])
        block = labels[place[0], 0, x : x + factor, y : y + factor].flatten().tolist()
        kept = [value for value in block if value != ignore]
        foreground = sorted({value for value in kept if value}, key=lambda value: (frequency[value], -value))
        result[place] = foreground[0] if foreground else 0 if kept else ignore
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 7), (3, 1, 40, 33), (2, 1, 40, 41, 43), (0, 1, 4, 4)])
def test_counts_are_those_of_numpy(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for classes in (2,) if dtype == torch.bool else (2, 3, 100):
        labels = some_labels(shape, classes)
        found = class_counts(labels.to(dtype), classes)
        assert found.dtype == torch.int64
        assert found.tolist() == np.bincount(labels.flatten().numpy(), minlength=classes).tolist()
    strided = some_labels((2, 1, 12, 14), 3)[..., ::2].transpose(2, 3)
    assert class_counts(strided, 3).tolist() == np.bincount(strided.flatten().numpy(), minlength=3).tolist()


def test_values_that_are_no_class_are_not_counted() -> None:
    labels = torch.tensor([[[0, 1, 1, 2, -1, 3, 255, 7]]])
    assert class_counts(labels, 3).tolist() == [1, 2, 1]
    numbers = torch.tensor([[[0, 1, torch.nan, torch.inf, -torch.inf, 1e30]]])
    assert class_counts(numbers, 3).tolist() == [1, 1, 0]
    assert class_counts(torch.tensor([[[2**64 - 1, 1]]], dtype=torch.uint64), 3).tolist() == [0, 1, 0]
    many = torch.tensor([[[0, 70_000, 70_000, 2**20]]])
    assert class_counts(many, 70_001)[[0, 70_000]].tolist() == [1, 2]


@pytest.mark.parametrize("ignore", [None, 0, 1, 7, 255, -1])
@pytest.mark.parametrize("classes", [2, 5, 40])
def test_the_rarest_class_is_that_of_a_slow_loop(classes: int, ignore: int | None) -> None:
    labels = some_labels((2, 1, 24, 20), classes, seed=classes)
    if ignore is not None:
        labels[:, :, :9, :7] = ignore
    for factor in (1, 2, 4):
        expected = slow_loop(labels, factor, ignore)
        size = tuple(expected.shape[2:])
        assert torch.equal(pool_labels(labels, size, classes, "max", ignore), expected)
        assert torch.equal(pool_labels(labels, size, None, "max", ignore), expected)


def test_reading_takes_as_many_operations_for_any_number_of_classes() -> None:
    found = []
    for classes in (3, 50):
        labels = some_labels((1, 1, 8, 8), classes)
        with Operations() as operations:
            pool_labels(labels, [4, 4], classes, "max", counts=class_counts(labels, classes))
        found.append(operations.count)
    assert found[0] == found[1]


def test_classes_are_counted_once_for_all_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def counting(*args: Any) -> Tensor:
        asked.append(args)
        return class_counts(*args)

    for module in ("multi_scale", "label_pooling"):
        monkeypatch.setattr(f"monai_iou.losses.{module}.class_counts", counting)
    labels = some_labels((1, 1, 16, 16), 3)
    outputs = [torch.zeros(1, 3, side, side) for side in (16, 8, 4, 2)]
    loss = MultiScaleLoss(IoULoss(softmax=True), downsample="max")
    loss(outputs, labels)
    assert len(asked) == 1
    loss(outputs[0], labels)
    assert len(asked) == 1, "in evaluation nothing is downsampled"
    MultiScaleLoss(IoULoss(sigmoid=True), downsample="max")([output[:, :1] for output in outputs], labels.clamp_max(1))
    assert len(asked) == 1, "the largest label of one class takes no counts"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
@pytest.mark.parametrize("ignore", [None, 255])
def test_no_gpu_is_waited_for(dtype: torch.dtype, ignore: int | None) -> None:
    labels = some_labels((2, 1, 12, 10), 4).to(dtype)
    expected = pool_labels(labels, [6, 5], 4, "max", ignore)
    with pretended_gpu() as waits:
        on_gpu = labels.to("cuda")
        waits.clear()
        counts = class_counts(on_gpu, 4)
        found = [pool_labels(on_gpu, [6, 5], 4, "max", ignore, given) for given in (None, counts)]
        assert not waits
        assert torch.equal(counts.cpu(), class_counts(labels, 4))
        assert all(torch.equal(each.cpu(), expected) for each in found)
        waits.clear()
        pool_labels(on_gpu, [6, 5], None, "max", ignore)
        assert waits, "without an output, the class numbers are looked for"


def test_the_loss_asks_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late_checks, "answers_late", lambda tensor: tensor.device.type == "meta")
    monkeypatch.setattr(late_checks, "ask", lambda bad, error: None)
    outputs = [torch.zeros(2, 3, side, side, device="meta", requires_grad=True) for side in (8, 4, 2)]
    loss = MultiScaleLoss(IoUCELoss(softmax=True, ignore_index=255), downsample="max")
    value = loss(outputs, torch.zeros(2, 1, 8, 8, dtype=torch.uint8, device="meta"))
    value.backward()
    assert value.shape == ()


def test_one_graph_of_torch_compile() -> None:
    torch.compiler.reset()
    labels = some_labels((2, 1, 8, 8), 3)
    outputs = [torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(side)) for side in (8, 4, 2)]
    loss = MultiScaleLoss(IoUCELoss(softmax=True), downsample="max")
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(outputs, labels), loss(outputs, labels))


@pytest.mark.parametrize("shape", [(37,), (23, 8), (7, 5, 11)], ids=str)
def test_nearest_is_that_of_torch(shape: tuple[int, ...]) -> None:
    labels = torch.randint(0, 99, (2, 3, *shape), generator=torch.Generator().manual_seed(0))
    for step in range(12):
        size = [1 + (step * 5 + axis) % full for axis, full in enumerate(shape)]
        expected = F.interpolate(labels.float(), size=size, mode="nearest-exact").long()
        assert torch.equal(pool_labels(labels, size, classes=3, mode="nearest"), expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint32, torch.float64])
def test_ids_that_float32_cannot_tell_apart_stay_two(dtype: torch.dtype) -> None:
    ids = (torch.arange(4).repeat_interleave(16).view(1, 1, 8, 8) + 2**24).to(dtype)
    found = pool_labels(ids, [4, 4], classes=None, mode="nearest")
    assert torch.equal(found, ids[..., 1::2, 1::2])
    small = (ids.long() - 2**24).to(dtype)
    affinity = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0))
    for downsample in ("nearest", "max"):
        loss = AffinityLoss((4, 4), downsample)
        torch.testing.assert_close(loss(affinity, ids), loss(affinity, small))
