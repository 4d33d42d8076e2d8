"""Histograms of errors and the Lovasz losses by Triton, by its interpreter (`.ci/triton`) or on a GPU."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from monai_iou import CompoundLoss, IoUCELoss, IoULoss, LovaszHingeLoss, LovaszSoftmaxLoss, use_kernel
from monai_iou.voxels import kernels
from monai_iou.voxels.error_gradient import TILED, ErrorKernel
from monai_iou.voxels.flat_voxels import flat_voxels
from monai_iou.voxels.histograms import ErrorHistograms
from monai_iou.voxels.inputs import Voxels
from monai_iou.voxels.passes import error_histograms
from monai_iou.voxels.self_check import SelfChecks, find_error_fault
from monai_iou.voxels.spec import PassSpec

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None
    or not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"),
    reason="needs Triton, and a GPU or TRITON_INTERPRET=1: run .ci/triton",
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 2, 1), (2, 3, 5, 7), (1, 5, 3, 4, 5), (2, 16, 9), (1, 1, 40)]


def case(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    logits = 3 * torch.randn(shape, generator=generator)
    labels = torch.randint(0, max(2, shape[1]), (shape[0], 1, *shape[2:]), generator=generator)
    return logits.to(dtype).to(DEVICE), labels.to(DEVICE)


def slow_counts(logits: Tensor, labels: Tensor, activation: str, bins: int) -> Tensor:
    """Count voxel by voxel in float64, as the definition of the cells says."""
    logits = logits.double().flatten(2)
    p = logits.softmax(1) if activation == "softmax" and logits.shape[1] > 1 else logits.sigmoid()
    counts = torch.zeros(*p.shape[:2], 2, 2 * bins + 2, dtype=torch.int64)
    for image, label in enumerate(labels.flatten(1).tolist()):
        for c in range(p.shape[1]):
            for voxel, number in enumerate(label):
                own = number == (c if p.shape[1] > 1 else 1)
                good = p[image, c, voxel] if own else 1 - p[image, c, voxel]
                counts[image, c, int(own), int(2 * bins * good.sqrt() + 0.5)] += 1
    return counts


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("shape", SHAPES)
def test_counts_are_those_of_a_slow_loop(shape: tuple[int, ...], activation: str) -> None:
    logits, labels = case(shape)
    with use_kernel("triton"):
        found = error_histograms(logits, labels, activation=activation, bins=8)
    assert torch.equal(found.counts.cpu(), slow_counts(logits.cpu(), labels.cpu(), activation, 8))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.float32, torch.bool])
def test_labels_in_any_dtype_with_ignored_voxels(dtype: torch.dtype) -> None:
    logits, labels = case((2, 2, 6, 5))
    labels, ignored = labels.to(dtype), None if dtype == torch.bool else 9
    if ignored is not None:
        labels[:, :, ::3] = ignored
    results = []
    for kernel in ("triton", "tiled"):
        with use_kernel(kernel):
            results.append(error_histograms(logits, labels, bins=16, ignore_index=ignored).counts)
    assert torch.equal(*results)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_undefined_and_infinite_logits() -> None:
    logits, labels = case((1, 3, 12))
    logits[0, 1, 2], logits[0, 0, 4], logits[0, 2, 7] = torch.nan, torch.inf, -torch.inf
    results = []
    for kernel in ("triton", "tiled"):
        with use_kernel(kernel):
            results.append(error_histograms(logits, labels, bins=16))
    assert torch.equal(results[0].counts, results[1].counts)
    assert int(results[0].undefined.sum()) == 6


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("loss", [LovaszSoftmaxLoss(softmax=True), LovaszHingeLoss()], ids=["softmax", "hinge"])
def test_gradients_of_undefined_logits(loss: nn.Module) -> None:
    logits, labels = case((1, 3 if isinstance(loss, LovaszSoftmaxLoss) else 1, 12))
    logits[0, 0, 2], logits[0, 0, 5] = torch.nan, -torch.inf
    gradients = []
    for kernel in ("triton", "tiled"):
        leaf = logits.detach().requires_grad_()
        with use_kernel(kernel):
            loss(leaf, labels).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, equal_nan=True)


def test_the_block_of_classes_is_the_one_that_the_choice_assumes() -> None:
    from monai_iou.voxels import triton_kernels

    assert kernels.BLOCK_CLASSES == triton_kernels.CLASS_BLOCK
    assert kernels.MOST_CLASSES == triton_kernels.MAX_CLASSES


def test_wrong_labels_are_named() -> None:
    logits, labels = case((1, 3, 12))
    labels[0, 0, 5] = 7
    loss = use_kernel("triton")(LovaszSoftmaxLoss(softmax=True))
    if DEVICE == "cuda":  # where a later call raises the error
        assert loss(logits, labels).isnan()
        torch.cuda.synchronize()
    with pytest.raises(ValueError, match="7"):
        loss(logits, labels)


LOSSES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "softmax": (LovaszSoftmaxLoss(softmax=True), (2, 3, 5, 7)),
    "present classes over the batch": (LovaszSoftmaxLoss(softmax=True, batch=True), (2, 4, 30)),
    "sigmoid": (LovaszSoftmaxLoss(sigmoid=True), (2, 3, 5, 7)),
    "one channel": (LovaszSoftmaxLoss(sigmoid=True), (2, 1, 5, 7)),
    "hinge": (LovaszHingeLoss(), (2, 1, 5, 7)),
    "hinge over the batch": (LovaszHingeLoss(batch=True), (2, 1, 5, 7)),
    "ignored voxels": (LovaszSoftmaxLoss(softmax=True, ignore_index=2), (2, 3, 40)),
    "with IoU and cross-entropy": (
        CompoundLoss([LovaszSoftmaxLoss(softmax=True), IoUCELoss(softmax=True)]),
        (2, 3, 5, 7),
    ),
    "sigmoid with IoU": (CompoundLoss([LovaszSoftmaxLoss(sigmoid=True), IoULoss(sigmoid=True)]), (1, 3, 30)),
    "more classes than a block": (LovaszSoftmaxLoss(softmax=True), (1, 20, 9)),
}


@pytest.mark.parametrize(("loss", "shape"), LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_those_of_torch(loss: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits, labels = case(shape, dtype)
    values, gradients = [], []
    for kernel in ("triton", "triton", "tiled"):
        leaf = logits.detach().requires_grad_()
        with use_kernel(kernel):
            value = loss(leaf, labels)
            value.backward()
        assert leaf.grad is not None
        values.append(value.detach())
        gradients.append(leaf.grad)
    assert torch.equal(values[0], values[1])
    assert torch.equal(gradients[0], gradients[1])
    torch.testing.assert_close(values[0], values[2], rtol=1e-5, atol=1e-6)
    scale = float(gradients[2].abs().max())
    limit = (1e-4 if dtype == torch.float32 else 1e-2) * scale
    torch.testing.assert_close(gradients[0], gradients[2], rtol=0, atol=limit)


def test_a_channels_last_batch_gives_the_same_gradient() -> None:
    logits, labels = case((2, 3, 4, 5, 6))
    strided = logits.to(memory_format=torch.channels_last_3d)
    gradients = []
    for given in (logits, strided):
        leaf = given.detach().requires_grad_()
        with use_kernel("triton"):
            LovaszSoftmaxLoss(softmax=True)(leaf, labels).backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)  # type: ignore[arg-type]


def flat(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, ignore: int | None = None) -> Voxels:
    return flat_voxels(*case(shape, dtype), ignore)


LOVASZ = PassSpec("softmax", overlap=None, bins=2048)
KINDS = {
    "softmax": (PassSpec("softmax", overlap=None, bins=64), (1, 3, 9), None),
    "beside IoU and cross-entropy": (PassSpec("softmax", cross_entropy=True, bins=64), (1, 3, 9), 1),
    "sigmoid": (PassSpec("sigmoid", cross_entropy=True, bins=64), (1, 1, 9), None),
    "hinge": (PassSpec("hinge", overlap=None, bins=64), (1, 1, 9), None),
    "probabilities": (PassSpec(None, overlap=None, bins=64), (1, 3, 9), None),
}


@pytest.mark.parametrize(("spec", "shape", "ignore"), KINDS.values(), ids=KINDS)
def test_the_self_check_takes_a_right_kernel(spec: PassSpec, shape: tuple[int, ...], ignore: int | None) -> None:
    kernel = kernels._load_triton_errors()
    assert find_error_fault(kernel, flat(shape, ignore=ignore), spec) is None
    assert find_error_fault(kernel, flat(shape, torch.bfloat16, ignore), spec) is None


def lost(voxels: Voxels, spec: PassSpec, limit: Tensor) -> tuple[ErrorHistograms, Tensor]:
    histograms, rows = TILED.count(voxels.compact(), spec, limit)
    return ErrorHistograms(histograms.counts - (histograms.counts > 3).long(), limit), rows


def moved(voxels: Voxels, spec: PassSpec, limit: Tensor) -> tuple[ErrorHistograms, Tensor]:
    histograms, rows = TILED.count(voxels.compact(), spec, limit)
    return ErrorHistograms(histograms.counts.roll(1, -1), limit), rows


def halved(out: Tensor, *arguments: Any) -> None:
    TILED.write_gradient(out, arguments[0].compact(), *arguments[1:])
    out.mul_(0.5)


def plain(out: Tensor, *arguments: Any) -> None:
    TILED.write_gradient(out, arguments[0].compact(), *arguments[1:])


@pytest.mark.parametrize(
    ("count", "write", "fault"),
    [(lost, plain, "volume"), (moved, plain, "mean cell"), (TILED.count, halved, "gradient")],
)
def test_the_self_check_refuses_a_wrong_kernel(
    count: Callable[..., Any], write: Callable[..., None], fault: str
) -> None:
    wrong = ErrorKernel(lambda voxels, *rest: count(voxels.compact(), *rest), write)
    checks = SelfChecks(kernels._load_triton, lambda: wrong)
    voxels = replace(flat((1, 3, 9)), logits=torch.zeros(1, 3, 9))
    with pytest.warns(UserWarning, match=f"^Expected the Triton kernel .* its largest error of a {fault} is "):
        assert checks.error_kernel(voxels, PassSpec("softmax", overlap=None, bins=64)) is None
    assert checks.reason(voxels.logits.device) is not None


def test_auto_takes_the_kernel_of_errors_after_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device(DEVICE)
    monkeypatch.setattr(kernels, "_CHECKED_DEVICES", {device.type})
    monkeypatch.setattr(kernels, "_checks", SelfChecks(kernels._load_triton, kernels._load_triton_errors))
    logits, labels = case((1, 3, 30))
    found = LovaszSoftmaxLoss(softmax=True)(logits, labels)
    assert kernels._checks.passed(logits.device) == 1
    voxels = flat_voxels(logits, labels, None)
    assert kernels.pick_error_kernel(voxels, LOVASZ) is kernels._load_triton_errors()
    assert kernels.pick_error_kernel(replace(voxels, logits=logits.double().flatten(2)), LOVASZ) is None
    assert kernels.pick_error_kernel(flat((1, 17, 9)), LOVASZ) is None
    with use_kernel("tiled"):
        torch.testing.assert_close(found, LovaszSoftmaxLoss(softmax=True)(logits, labels))
