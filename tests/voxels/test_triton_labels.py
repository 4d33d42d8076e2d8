"""Labels in the dtype they were given in: by Triton's interpreter or on a GPU, and by the kernels that compact them."""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from monai_iou import IoUCELoss, use_kernel
from monai_iou.voxels import compact_labels, kernels, reference, tiled
from monai_iou.voxels.flat_voxels import flat_voxels
from monai_iou.voxels.inputs import Voxels
from monai_iou.voxels.passes import flatten_voxels, suited
from monai_iou.voxels.self_check import SelfChecks
from monai_iou.voxels.spec import COUNT, TARGET, PassSpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs_here = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None
    or not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"),
    reason="needs Triton, and a GPU or TRITON_INTERPRET=1: run .ci/triton",
)
SPEC = PassSpec(cross_entropy=True)
DTYPES = [
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
]  # fmt: skip


def case(dtype: torch.dtype = torch.int64, ignored: int | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 7, 5, generator=generator)
    labels = torch.randint(0, 3, (2, 1, 7, 5), generator=generator)
    if ignored is not None:
        labels[..., ::2] = ignored
    return logits.to(DEVICE), labels.to(dtype).to(DEVICE)


def given(dtype: torch.dtype, ignored: int | None, mask: Tensor | None = None) -> Voxels:
    """Return voxels whose labels are as they were given, in a gap-toothed layout."""
    logits, labels = case(dtype, ignored)
    wide = torch.zeros(2, 1, 35, 2, dtype=dtype, device=DEVICE)
    wide[..., 0] = labels.flatten(2)
    with use_kernel("triton"):
        voxels = suited(flat_voxels(logits, labels, ignored, None if mask is None else mask.to(DEVICE)))
    assert voxels.as_given
    return replace(voxels, labels=wide[:, 0, :, 0])


def results(kernel: kernels.Kernel, voxels: Voxels) -> tuple[Tensor, Tensor]:
    leaf = voxels.logits.detach().clone().requires_grad_()
    rows = kernel(replace(voxels, logits=leaf), SPEC)
    pull = torch.linspace(-1, 1, rows.numel(), dtype=torch.float64).view(rows.shape).to(rows)
    return rows.detach(), torch.autograd.grad(rows, leaf, pull)[0]


@pytest.mark.parametrize("kernel", [reference.compute_sums, tiled.compute_sums], ids=["reference", "tiled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_kernels_compact_what_they_are_given(dtype: torch.dtype, kernel: kernels.Kernel) -> None:
    mask = torch.rand(2, 1, 7, 5, generator=torch.Generator().manual_seed(1)) > 0.3
    logits, labels = case(ignored=100)
    expected = results(kernel, flatten_voxels(logits, labels, 100, mask.to(DEVICE)))
    assert all(torch.equal(*pair) for pair in zip(results(kernel, given(dtype, 100, mask)), expected, strict=True))


@runs_here
@pytest.mark.parametrize(("ignored", "masked"), [(None, True), (1, False), (100, True), (-7, False)])
def test_every_dtype_gives_the_same_bits(ignored: int | None, masked: bool) -> None:
    from monai_iou.voxels import triton_kernels

    mask = torch.rand(2, 1, 7, 5, generator=torch.Generator().manual_seed(1)) > 0.3 if masked else None
    dtypes = [dtype for dtype in DTYPES if ignored != -7 or dtype != torch.uint8]
    found = [results(triton_kernels.compute_sums, given(dtype, ignored, mask)) for dtype in dtypes]
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(other, found[0], strict=True))
    expected = results(reference.compute_sums, given(torch.int64, ignored, mask))
    for value, right in zip(found[0], expected, strict=True):
        torch.testing.assert_close(value.double(), right.double(), rtol=1e-5, atol=1e-5)


@runs_here
def test_labels_are_neither_copied_nor_compacted(monkeypatch: pytest.MonkeyPatch) -> None:
    from monai_iou.voxels import inputs

    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(inputs, "compact_labels", refuse)
    logits, labels = case(torch.int64, -100)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), use_kernel("triton"):
        IoUCELoss(softmax=True, ignore_index=-100)(logits.requires_grad_(), labels).backward()
    assert labels.data_ptr() in kept


@runs_here
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wrong_values_are_in_the_count_and_in_no_class(dtype: torch.dtype) -> None:
    """Numbers whose last bits are a class's, or which a conversion would round to one, are wrong too."""
    from monai_iou.voxels import triton_kernels

    wrong: list[float] = [3, -1, 127, 254, 255, 256, 258, -256, 2**31, 2**32 + 1, 2**53, -(2**62)]
    if dtype.is_floating_point:
        wrong += [0.5, 1.9375, 1e-7, -1e-7, math.nan, math.inf, -math.inf]
    else:
        wrong = [value for value in wrong if compact_labels.fits(dtype, int(value))]
    voxels = given(dtype, 100)
    labels = voxels.labels
    assert labels is not None
    labels[0, : len(wrong)] = torch.tensor(wrong, dtype=dtype)
    rows = triton_kernels.compute_sums(voxels, SPEC)
    expected = reference.compute_sums(voxels, SPEC)
    assert torch.equal(rows[[COUNT, TARGET]], expected[[COUNT, TARGET]].to(rows))
    assert (rows[COUNT, 0, 0] - rows[TARGET, 0].sum()).item() == len(wrong)


@runs_here
@pytest.mark.parametrize(("dtype", "value"), [(torch.int64, 2**32 + 1), (torch.float32, 0.5), (torch.uint8, 255)])
def test_wrong_values_are_named_as_by_the_tiled_kernel(dtype: torch.dtype, value: float) -> None:
    logits, labels = case(dtype)
    wrong = labels.clone()
    wrong[1, 0, 4, 3] = value
    loss = IoUCELoss(softmax=True, ignore_index=200)
    messages = []
    for kernel in ("tiled", "triton"):
        with use_kernel(kernel):
            if DEVICE == "cuda":
                assert loss(logits, wrong).isnan()
                torch.cuda.synchronize()
            with pytest.raises(ValueError, match=f"labels 0 to 2 .* but got {value}: ") as raised:
                loss(logits, wrong if DEVICE == "cpu" else labels)
            messages.append(str(raised.value))
    assert messages[0] == messages[1]


def test_labels_are_compacted_at_once_where_no_kernel_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = case(ignored=100)
    assert not suited(flat_voxels(logits.cpu(), labels.cpu(), 100)).as_given
    monkeypatch.setattr(kernels, "_CHECKED_DEVICES", {"cpu"})
    monkeypatch.setattr(kernels, "_has_triton", lambda: True)
    checks = SelfChecks(lambda: tiled.compute_sums)
    monkeypatch.setattr(kernels, "_checks", checks)
    assert suited(flat_voxels(logits.cpu(), labels.cpu(), 100)).as_given
    with use_kernel("tiled"):
        assert not suited(flat_voxels(logits.cpu(), labels.cpu(), 100)).as_given
    checks._refused[torch.device("cpu")] = "it was wrong"
    assert not suited(flat_voxels(logits.cpu(), labels.cpu(), 100)).as_given
