"""Sums by region of the Triton kernel: by Triton's interpreter (`.ci/triton`) or on a GPU."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from monai_iou import InstanceIoULoss, IoUCELoss, use_kernel, voxel_sums
from monai_iou.voxels import kernels, reference, tiled
from monai_iou.voxels.flat_voxels import flat_voxels
from monai_iou.voxels.inputs import Voxels
from monai_iou.voxels.passes import flatten_voxels, suited
from monai_iou.voxels.self_check import SelfChecks, find_fault
from monai_iou.voxels.spec import COUNT, PREDICTION, TARGET, PassSpec

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None
    or not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"),
    reason="needs Triton, and a GPU or TRITON_INTERPRET=1: run .ci/triton",
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REGIONS = 6  # the last of which is empty
SPEC = PassSpec(cross_entropy=True)
SPECS = [
    SPEC,
    PassSpec("softmax", "product", 2.0, cross_entropy=True, focal=2.0, label_smoothing=0.1, confidence=True),
    PassSpec("softmax", "min_max", cross_entropy=True, focal=1.5),
    PassSpec("sigmoid", "min_max", cross_entropy=True, focal=2.0, label_smoothing=0.1),
    PassSpec("sigmoid", "product", 1.5, cross_entropy=True, confidence=True),
    PassSpec(None, "product", 2.0, cross_entropy=True, focal=0.5, confidence=True),
]
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def case(
    classes: int, shape: tuple[int, ...], *, each: bool, soft: bool = False, images: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, target and region numbers, some of which are negative."""
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(images, classes, *shape, generator=generator) * 3
    labels = torch.randint(0, classes, (images, 1, *shape), generator=generator)
    groups = torch.randint(-1, REGIONS - 1, (images, classes if each else 1, *shape), generator=generator)
    return logits, torch.rand(logits.shape, generator=generator) if soft else labels, groups


def results(kernel: kernels.Kernel, voxels: Voxels, spec: PassSpec) -> tuple[Tensor, Tensor]:
    """Return the sums and the gradient of a random projection of them, in float64 on the CPU."""
    leaf = voxels.logits.detach().requires_grad_()
    rows = kernel(replace(voxels, logits=leaf), spec)
    pull = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(rows, leaf, pull.to(rows))
    assert gradient.dtype == voxels.logits.dtype
    return rows.detach().cpu().double(), gradient.cpu().double()


def on_device(voxels: Voxels) -> Voxels:
    parts = {name: getattr(voxels, name) for name in ("logits", "labels", "maps", "valid", "groups")}
    return replace(voxels, **{name: None if part is None else part.to(DEVICE) for name, part in parts.items()})


def assert_exact(voxels: Voxels, spec: PassSpec) -> tuple[Tensor, Tensor]:
    """Compare with the specification in float64, on the logits as they were rounded; two calls give the same bits."""
    from monai_iou.voxels import triton_kernels

    given = on_device(voxels)
    assert triton_kernels.covers(given)
    found, again = (results(triton_kernels.compute_sums, given, spec) for _ in range(2))
    assert all(torch.equal(first, second) for first, second in zip(found, again, strict=True))
    exact = results(reference.compute_sums, replace(voxels, logits=voxels.logits.double()), spec)
    torch.testing.assert_close(found[0], exact[0], rtol=1e-5, atol=1e-5)
    limit = GRADIENT_TOLERANCE[voxels.logits.dtype]
    torch.testing.assert_close(found[1], exact[1], rtol=limit, atol=limit * max(1.0, exact[1].abs().max().item()))
    return found


@pytest.mark.parametrize("each", [False, True], ids=["shared", "of each class"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_sums_and_gradient_against_the_specification(spec: PassSpec, each: bool) -> None:
    for soft in (False, True):
        logits, target, groups = case(3, (5, 9), each=each, soft=soft)
        if spec.activation is None:
            logits = logits.softmax(1)
        rows, _ = assert_exact(flat_voxels(logits, target, None, None, groups, REGIONS), spec)
        assert not rows[..., -1].any()


@pytest.mark.parametrize("each", [False, True], ids=["shared", "of each class"])
def test_ignored_voxels_mask_and_voxels_in_no_region(each: bool) -> None:
    logits, labels, groups = case(3, (45,), each=each)
    labels[..., ::4] = 200
    groups[..., ::11] = 2**32 + 1  # whose last bits are a region's number
    mask = torch.rand(2, 1, 45, generator=torch.Generator().manual_seed(2)) > 0.3
    counted = mask[:, 0] & (labels[:, 0] != 200) & ((groups >= 0) & (groups < REGIONS)).all(1)
    poisoned = torch.where(counted.unsqueeze(1), logits, math.nan)
    rows, gradient = assert_exact(flat_voxels(poisoned, labels, 200, mask, groups, REGIONS), SPEC)
    assert torch.equal(rows[COUNT, :, 0].sum(-1), counted.sum(-1).double())
    assert not gradient.masked_select(~counted.unsqueeze(1)).any()
    maps = torch.nn.functional.one_hot(labels[:, 0] % 3, 3).movedim(-1, 1)
    assert_exact(flat_voxels(poisoned, maps, None, mask & counted.unsqueeze(1), groups, REGIONS), SPEC)


@pytest.mark.parametrize("regions", [1, 24])
@pytest.mark.parametrize("classes", [1, 2, 16])
def test_one_region_and_as_many_as_voxels(classes: int, regions: int) -> None:
    logits, labels, _ = case(classes, (24,), each=False, images=1)
    spec = PassSpec("sigmoid" if classes == 1 else "softmax", cross_entropy=True)
    groups = (torch.arange(24) % regions).view(1, 1, 24)
    rows, _ = assert_exact(flat_voxels(logits, labels, None, None, groups, regions), spec)
    if regions == 1:
        whole = results(reference.compute_sums, flatten_voxels(logits, labels, None), spec)[0]
        torch.testing.assert_close(rows, whole, rtol=1e-5, atol=1e-5)
    else:
        assert (rows[COUNT] == 1).all()


@pytest.mark.parametrize("most", [1, 3])
def test_programs_that_walk_over_several_parts(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from monai_iou.voxels import triton_kernels

    monkeypatch.setattr(triton_kernels, "_MOST", most)
    monkeypatch.setattr(triton_kernels, "_FEWEST", 1)
    monkeypatch.setattr(triton_kernels, "_LEAST_PARTS", 1)
    logits, labels, _ = case(2, (2100,), each=False)
    groups = torch.stack([torch.arange(2100) // 500, torch.arange(2100) // 1200]).unsqueeze(1)
    voxels = flat_voxels(logits, labels, None, None, groups, 5)
    assert triton_kernels.region_programs(voxels) == most
    rows, _ = assert_exact(voxels, PassSpec())
    assert rows[COUNT, :, 0].tolist() == [[500, 500, 500, 500, 100], [1200, 900, 0, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_bfloat16_and_dtypes_of_the_numbers(dtype: torch.dtype) -> None:
    logits, labels, groups = case(4, (35,), each=True)
    groups = (groups + 1 if dtype == torch.uint8 else groups).to(dtype)
    assert_exact(flat_voxels(logits.bfloat16(), labels.to(dtype), None, None, groups, REGIONS), SPEC)


def test_channels_last_logits_and_strided_numbers_are_read_where_they_are() -> None:
    from monai_iou.voxels import triton_kernels

    logits, labels, groups = case(3, (3, 4, 5), each=True)
    expected = assert_exact(flat_voxels(logits, labels, None, None, groups, REGIONS), SPEC)
    logits = logits.to(DEVICE).to(memory_format=torch.channels_last_3d)
    wide = torch.zeros(2, 3, 60, 2, dtype=torch.int64, device=DEVICE)
    wide[..., 0] = groups.flatten(2)
    voxels = flat_voxels(logits, labels.to(DEVICE), None, None, groups.to(DEVICE), REGIONS)
    assert voxels.logits.data_ptr() == logits.data_ptr()
    found = results(triton_kernels.compute_sums, replace(voxels, groups=wide[..., 0]), SPEC)
    for result, other in zip(found, expected, strict=True):
        torch.testing.assert_close(result, other, rtol=1e-5, atol=1e-5)


def test_a_spoilt_voxel_stays_in_its_region() -> None:
    from monai_iou.voxels import triton_kernels

    logits, labels, groups = case(3, (40,), each=False, images=1)
    place = int((groups.flatten() == 2).nonzero()[0])
    spoilt = logits.clone()
    spoilt[:, 1, place] = math.nan
    clean, dirty = (
        triton_kernels.compute_sums(on_device(flat_voxels(part, labels, None, None, groups, REGIONS)), SPEC).cpu()
        for part in (logits, spoilt)
    )
    others = [region for region in range(REGIONS) if region != 2]
    assert torch.equal(clean[..., others], dirty[..., others])
    assert dirty[PREDICTION, ..., 2].isnan().all()
    assert torch.equal(clean[[TARGET, COUNT]], dirty[[TARGET, COUNT]])


def test_labels_and_numbers_are_neither_copied_nor_compacted() -> None:
    logits, labels, groups = (part.to(DEVICE) for part in case(3, (30,), each=True))
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), use_kernel("triton"):
        voxel_sums(logits.requires_grad_(), labels, groups=groups, num_groups=REGIONS)
    assert {labels.data_ptr(), groups.data_ptr()} <= set(kept)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_nothing_waits_for_the_gpu() -> None:
    logits, labels, groups = (part.to(DEVICE) for part in case(3, (30,), each=True))
    leaf = logits.requires_grad_()
    mode = torch.cuda.get_sync_debug_mode()
    with use_kernel("triton"):
        for setting in (mode, "error"):  # the first call compiles
            torch.cuda.set_sync_debug_mode(setting)
            try:
                rows = voxel_sums(leaf, labels, groups=groups, num_groups=REGIONS).rows
                torch.autograd.grad(rows, leaf, torch.ones_like(rows))
            finally:
                torch.cuda.set_sync_debug_mode(mode)


def test_wrong_values_are_named_within_a_region_and_ignored_outside() -> None:
    logits, labels, groups = (part.to(DEVICE) for part in case(3, (30,), each=False))
    groups[0, 0, :2] = torch.tensor([3, -1])
    for place in (0, 1):
        wrong = labels.clone()
        wrong[0, 0, place] = 2**32 + 1
        for name in ("tiled", "triton"):
            with use_kernel(name):
                if place == 1:
                    sums = voxel_sums(logits, wrong, groups=groups)
                    assert sums.target.isfinite().all()
                    continue
                if DEVICE == "cuda":
                    assert voxel_sums(logits, wrong, groups=groups).target.isnan().all()
                    torch.cuda.synchronize()
                with pytest.raises(ValueError, match=r"labels 0 to 2 .* but got 4294967297: "):
                    voxel_sums(logits, labels if DEVICE == "cuda" else wrong, groups=groups)


LOSSES: dict[str, dict[str, Any]] = {
    "IoU": {"softmax": True},
    "IoU + CE": {"softmax": True, "term": IoUCELoss()},
    "blob, sigmoid": {"sigmoid": True, "regions": "blob"},
    "ignored voxels": {"softmax": True, "ignore_index": 1, "cells": "both"},
}


@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("classes", [2, 3])
def test_instance_loss_as_by_the_reference(classes: int, options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(1, classes, 9, 8, generator=generator).to(DEVICE)
    labels = torch.zeros(1, 1, 9, 8, dtype=torch.long)
    labels[..., :2, :3], labels[..., 5:8, 4:], labels[..., 6:, :2] = 1, classes - 1, classes - 1
    found = []
    for name in ("triton", "reference"):
        leaf = logits.clone().requires_grad_()
        with use_kernel(name):
            value = InstanceIoULoss(**options)(leaf, labels.to(DEVICE))
        found.append((value.detach(), *torch.autograd.grad(value, leaf)))
    for result, expected in zip(*found, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


def test_what_it_does_not_cover_goes_to_tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    from monai_iou.voxels import triton_kernels

    logits, labels, groups = case(3, (30,), each=True)
    voxels = on_device(flat_voxels(logits, labels, None, None, groups, REGIONS))
    wide = on_device(flat_voxels(*case(17, (9,), each=False)[:2], None, None, groups[:, :1, :9], REGIONS))
    many = replace(voxels, regions=1 << 20)
    for part in (wide, many, replace(voxels, logits=voxels.logits.double())):
        assert not triton_kernels.covers(part)
    for part in (wide, replace(voxels, logits=voxels.logits.double())):
        expected = tiled.compute_sums(part, SPEC)
        torch.testing.assert_close(triton_kernels.compute_sums(part, SPEC), expected)
    monkeypatch.setattr(triton_kernels, "_TABLES", 4 * 7 * 2 * 3 * REGIONS)
    assert triton_kernels.region_programs(voxels) == 1
    assert triton_kernels.region_programs(replace(voxels, regions=REGIONS + 1)) == 0


@pytest.mark.parametrize(
    ("count", "regions", "expected"),
    [(128**3, 20, 256), (512**3, 20, 1024), (128**3, 4000, 256), (512**3, 2000, 0), (100, 5, 1), (2**31, 9, 16384)],
)
def test_programs_of_an_image_are_bounded(count: int, regions: int, expected: int) -> None:
    """By the memory of their tables, and by the additions to an entry, each of which is rounded."""
    from monai_iou.voxels import triton_kernels

    logits = torch.zeros(1).expand(1, 2, count)
    voxels = Voxels(logits, None, None, None, False, torch.zeros(1, dtype=torch.uint8).expand(1, 1, count), regions)
    assert triton_kernels.region_programs(voxels) == expected
    assert expected * 7 * 2 * regions * 4 <= 1 << 26


@pytest.mark.parametrize("each", [False, True], ids=["shared", "of each class"])
@pytest.mark.parametrize("soft", [False, True])
def test_the_self_check_takes_regions_and_refuses_wrong_ones(each: bool, soft: bool) -> None:
    from monai_iou.voxels import triton_kernels

    logits, target, groups = case(2, (30,), each=each, soft=soft)
    with use_kernel("triton"):
        voxels = suited(on_device(flat_voxels(logits, target, None, None, groups, REGIONS)))
    assert voxels.as_given == (not soft)
    spec = PassSpec()
    assert find_fault(triton_kernels.compute_sums, voxels, spec) is None

    def shifted(part: Voxels, of: PassSpec) -> Tensor:
        assert part.groups is not None
        return triton_kernels.compute_sums(replace(part, groups=part.groups.roll(1, -1)), of)

    fault = find_fault(shifted, voxels, spec)
    assert fault is not None
    assert fault.startswith("its largest error of a ")


def test_auto_checks_each_kind_of_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Voxels] = []

    def kernel(voxels: Voxels, spec: PassSpec) -> Tensor:
        calls.append(voxels)
        return tiled.compute_sums(voxels, spec)

    monkeypatch.setattr(kernels, "_checks", SelfChecks(lambda: kernel))
    monkeypatch.setattr(kernels, "_CHECKED_DEVICES", {"cpu", "cuda"})
    for each, dtype in ((False, torch.int32), (True, torch.int32), (False, torch.int64)):
        logits, labels, groups = case(3, (30,), each=each)
        for _ in range(2):
            voxels = on_device(flat_voxels(logits, labels, None, None, groups.to(dtype), REGIONS))
            assert kernels.pick_kernel(voxels, SPEC) is kernel
        sample = calls[-1].groups
        assert sample is not None
        assert (sample.dtype, sample.shape[1]) == (dtype, 3 if each else 1)
    assert len(calls) == 3
    monkeypatch.setattr(kernels, "_checks", SelfChecks(lambda: lambda voxels, spec: 1.01 * kernel(voxels, spec)))
    with pytest.warns(UserWarning, match="but its largest error of a sum is "):
        assert kernels.pick_kernel(voxels, SPEC) is tiled.compute_sums
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels.pick_kernel(voxels, SPEC) is tiled.compute_sums


# A program apart: under TRITON_INTERPRET=1 the kernels of a process cannot be compiled.
COMPILE = """
import json, re
from benchmarks.triton_offline import both_passes

found = []
for classes, logits, loss in CASES:
    *passes, _ = both_passes(90, classes, logits, loss)
    found.append([
        (len(re.findall(r"\\b(?:atom|red)\\.", each.asm["ptx"])), each.spilled, each.loaded, each.stored)
        for each in passes
    ])
print(json.dumps(found))
"""


def test_volumes_are_read_once_by_each_pass_and_nothing_spills() -> None:
    """Of the rest, forward's table weighs little, and backward loads a voxel's own entries of the gradient."""
    cases = [(2, "bf16", "IoU, cells"), (16, "fp32", "IoU + CE, cells"), (4, "bf16", "IoU + CE, cells of each class")]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", COMPILE.replace("CASES", repr(cases), 1)],
        env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    for (classes, logits, loss), (forward, backward) in zip(cases, json.loads(result.stdout), strict=True):
        of_logits = classes * (2 if logits == "bf16" else 4)
        volumes = of_logits + 1 + 4 * (classes if "each" in loss else 1)
        rows = 3 if "CE" in loss else 2
        assert forward[:2] == backward[:2] == [0, 0]
        assert volumes < forward[2] <= volumes + 8
        assert forward[3] <= 8
        assert backward[2:] == [volumes + 4 * rows * classes, of_logits]
