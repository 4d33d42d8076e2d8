"""The Triton kernel by Triton's interpreter (`.ci/triton`) or on a GPU, and compiled for a GPU that may be absent."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from monai_iou import IoUCELoss, IoULoss, use_kernel, voxel_sums
from monai_iou.voxels import tiled
from monai_iou.voxels.inputs import Voxels
from monai_iou.voxels.passes import flatten_voxels
from monai_iou.voxels.reference import compute_sums as reference_sums
from monai_iou.voxels.spec import PassSpec

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: run .ci/triton"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs_here = pytest.mark.skipif(
    not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"),
    reason="needs a GPU or TRITON_INTERPRET=1",
)

SHAPES = [(1, 2, 1, 1, 1), (3, 7, 5, 1, 9), (2, 41, 17, 13), (2, 1, 6, 5), (1, 5, 70), (1, 118, 9), (1, 256, 3)]
SPECS = [
    PassSpec("softmax", cross_entropy=True),
    PassSpec("softmax", "product", 2.0, cross_entropy=True, focal=2.0, label_smoothing=0.1, confidence=True),
    PassSpec("softmax", "min_max", cross_entropy=True, focal=1.5),
    PassSpec("sigmoid", "min_max", cross_entropy=True, focal=2.0, label_smoothing=0.1),
    PassSpec("sigmoid", "product", 1.5, cross_entropy=True, confidence=True),
    PassSpec(None, "product", 2.0, cross_entropy=True, focal=0.5, confidence=True),
]
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def run(
    kernel: str, logits: Tensor, target: Tensor, spec: PassSpec, ignore: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the sums and the gradient of a random projection of them, by way of the public checks and preparation."""
    leaf = logits.detach().requires_grad_()
    options = {"ignore_index": ignore, "gamma": spec.focal, "label_smoothing": spec.label_smoothing}
    with use_kernel(kernel):
        stacked = voxel_sums(
            leaf, target, activation=spec.activation, overlap=spec.overlap or "product", power=spec.power,
            cross_entropy=spec.cross_entropy, confidence=spec.confidence, **options,
        ).rows  # fmt: skip
        pull = torch.randn(stacked.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(stacked)
        (gradient,) = torch.autograd.grad(stacked, leaf, pull)
    return stacked.detach(), gradient


def assert_exact(logits: Tensor, target: Tensor, spec: PassSpec, ignore: int | None = None) -> None:
    """Compare with the specification in float64, on the logits as they were rounded; two calls give the same bits."""
    found = run("triton", logits.to(DEVICE), target.to(DEVICE), spec, ignore)
    again = run("triton", logits.to(DEVICE), target.to(DEVICE), spec, ignore)
    assert all(torch.equal(first, second) for first, second in zip(found, again, strict=True))
    exact = run("reference", logits.double(), target, spec, ignore)
    assert found[1].dtype == logits.dtype
    torch.testing.assert_close(found[0].cpu().double(), exact[0], rtol=1e-5, atol=1e-5)
    limit = GRADIENT_TOLERANCE[logits.dtype]
    scale = max(1.0, exact[1].abs().max().item())
    torch.testing.assert_close(found[1].cpu().double(), exact[1], rtol=limit, atol=limit * scale)


def random_case(shape: tuple[int, ...], spec: PassSpec, dtype: torch.dtype, soft: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    logits = torch.randn(shape, generator=generator) * 3
    if spec.activation is None:
        logits = (logits / 3).sigmoid()  # 1 / p of a smaller p is beyond float16
    flat = (shape[0], 1, *shape[2:])
    soft = soft or shape[1] == 1
    target = torch.rand(shape, generator=generator) if soft else torch.randint(0, shape[1], flat, generator=generator)
    return logits.to(dtype), target


@runs_here
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_shapes_and_dtypes_against_the_specification(spec: PassSpec, shape: tuple[int, ...]) -> None:
    for dtype, soft in itertools.product(GRADIENT_TOLERANCE, (False, True)):
        logits, target = random_case(shape, spec, dtype, soft)
        assert_exact(logits, target, spec)


@runs_here
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool])
@pytest.mark.parametrize("ignore", [None, 1, 200])
def test_label_dtypes_and_ignored_voxels(dtype: torch.dtype, ignore: int | None) -> None:
    classes = 2 if dtype == torch.bool else 5
    logits, target = random_case((2, classes, 5, 9), SPECS[0], torch.float32, soft=False)
    if ignore == 200 and dtype != torch.bool:
        target[:, :, ::2] = 200
    target = target.to(dtype)
    assert_exact(logits, target, SPECS[0], ignore)
    if ignore is None or dtype == torch.bool:
        return
    poisoned = torch.where(
        target == ignore, torch.tensor([math.nan, math.inf, 1e4, -1e4, 0.0]).view(1, 5, 1, 1), logits
    )
    clean = run("triton", logits.to(DEVICE), target.to(DEVICE), SPECS[0], ignore)
    dirty = run("triton", poisoned.to(DEVICE), target.to(DEVICE), SPECS[0], ignore)
    assert all(torch.equal(first, second) for first, second in zip(clean, dirty, strict=True))
    assert not dirty[1].masked_select((target == ignore).to(DEVICE)).any()


@runs_here
def test_labels_above_254_classes_and_soft_maps_of_any_dtype() -> None:
    logits, target = random_case((1, 256, 5), SPECS[0], torch.float32, soft=False)
    target[..., 0] = 255
    assert_exact(logits, target, SPECS[0], ignore=3)
    logits, _ = random_case((2, 3, 7), SPECS[0], torch.float32, soft=True)
    for dtype in (torch.bool, torch.uint8, torch.float16, torch.float64, torch.int64):
        maps = torch.nn.functional.one_hot(torch.arange(14).view(2, 7) % 3, 3).movedim(-1, 1).to(dtype)
        assert_exact(logits, maps, SPECS[0], ignore=2)


@runs_here
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_confident_voxel_keeps_its_digits(dtype: torch.dtype) -> None:
    """At a margin of 17 the norm 1 + 4e-8 rounds to 1 in float32, and ln of it to 0."""
    from monai_iou.voxels import triton_kernels

    # 33 classes are three blocks; the winner is in the first, second and last, and tied.
    for classes, winner in ((2, 0), (5, 4), (33, 0), (33, 20), (33, 32)):
        logits = torch.zeros(1, classes, 3, dtype=torch.float64)
        logits[:, winner] = torch.tensor([17.0, 9.0, 40.0])
        for spec in (PassSpec(cross_entropy=True), PassSpec(cross_entropy=True, focal=2.0)):
            for label in {winner, 0}:
                labels = torch.full((1, 3), label, dtype=torch.uint8)
                exact = Voxels(logits, labels, None, None, False, None, 1)
                found = triton_kernels.compute_sums(
                    replace(exact, logits=logits.to(DEVICE, dtype), labels=labels.to(DEVICE)), spec
                )
                expected = reference_sums(exact, spec)
                torch.testing.assert_close(found.cpu(), expected, rtol=2e-6, atol=0)


@runs_here
@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning")  # 0 * -inf, not taken
@pytest.mark.parametrize("focal", [0.0, 2.0])
def test_a_class_ruled_out_by_minus_infinity_costs_nothing(focal: float) -> None:
    spec = PassSpec(cross_entropy=True, focal=focal, label_smoothing=0.3)
    logits, target = random_case((2, 3, 9), spec, torch.float32, soft=False)
    logits[:, 2] = -math.inf
    assert_exact(logits, target.clamp_max(1), spec)


@runs_here
@pytest.mark.filterwarnings("ignore:invalid value encountered in (multiply|subtract):RuntimeWarning")  # not taken
@pytest.mark.parametrize("excluded", [slice(0, 16), slice(16, 40), slice(3, 37)], ids=str)
def test_a_whole_block_of_classes_may_be_ruled_out(excluded: slice) -> None:
    spec = PassSpec(cross_entropy=True)
    logits, target = random_case((2, 40, 9), spec, torch.float32, soft=False)
    logits[:, excluded] = -math.inf
    kept = [number for number in range(40) if number not in range(40)[excluded]]
    assert_exact(logits, torch.tensor(kept)[target % len(kept)], spec)


@runs_here
def test_strided_and_channels_last_logits_are_read_and_written_where_they_are() -> None:
    from monai_iou.voxels import triton_kernels

    whole = torch.randn(2, 4, 6, 5, 8)
    labels = torch.randint(0, 4, (2, 1, 6, 5, 8))
    expected = run("triton", whole.to(DEVICE), labels.to(DEVICE), SPECS[0])
    for logits in (whole.to(memory_format=torch.channels_last_3d), whole.movedim(0, 1).contiguous().movedim(1, 0)):
        logits = logits.to(DEVICE)
        voxels = flatten_voxels(logits, labels.to(DEVICE), None)
        assert voxels.logits.data_ptr() == logits.data_ptr()
        leaf = voxels.logits.detach().requires_grad_()
        triton_kernels.compute_sums(replace(voxels, logits=leaf), SPECS[0]).sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.stride() == leaf.stride()
        torch.testing.assert_close(run("triton", logits, labels.to(DEVICE), SPECS[0]), expected)


@pytest.mark.skipif(DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") != "1", reason="a sparse file is on the CPU")
def test_offsets_beyond_32_bits(tmp_path: Path) -> None:
    """Logits whose classes, images and voxels lie more than 2^31 elements apart, in a file that is nearly all hole."""
    from monai_iou.voxels import triton_kernels

    image, classes, voxel = 7 * 2**31 + 11, 2**31 + 5, 2**30 + 3
    length = image + 2 * classes + 4 * voxel + 1
    store = np.memmap(tmp_path / "logits", dtype=np.float16, mode="w+", shape=(length,))
    logits = torch.from_numpy(store).as_strided((2, 3, 5), (image, classes, voxel))
    values = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).half()
    logits.copy_(values)
    labels = (torch.arange(10).view(2, 5) % 3).to(torch.uint8)
    spec = PassSpec(cross_entropy=True)
    voxels = Voxels(logits, labels, None, None, False, None, 1)
    found = triton_kernels.compute_sums(voxels, spec)
    torch.testing.assert_close(found, triton_kernels.compute_sums(replace(voxels, logits=values), spec), rtol=0, atol=0)


@runs_here
def test_what_it_does_not_cover_goes_to_tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    from monai_iou.voxels import triton_kernels

    spec = PassSpec(cross_entropy=True)
    logits, labels = torch.randn(2, 3, 11), torch.randint(0, 3, (2, 1, 11))
    plain = flatten_voxels(logits, labels, None)
    wide = flatten_voxels(torch.randn(1, 257, 4), torch.randint(0, 257, (1, 1, 4)), None)
    assert triton_kernels.covers(plain)
    for voxels in (replace(plain, logits=logits.double()), wide, flatten_voxels(logits[:0], labels[:0], None)):
        assert not triton_kernels.covers(voxels)
        torch.testing.assert_close(triton_kernels.compute_sums(voxels, spec), tiled.compute_sums(voxels, spec))
    monkeypatch.setattr(triton_kernels, "MAX_IMAGES", 1)
    assert not triton_kernels.covers(plain)


@runs_here
def test_losses_with_ignored_voxels_only() -> None:
    for loss in (IoULoss(softmax=True, ignore_index=2, empty="skip"), IoUCELoss(softmax=True, ignore_index=2)):
        logits = torch.randn(1, 3, 40, device=DEVICE, requires_grad=True)
        labels = torch.full((1, 1, 40), 2, device=DEVICE)
        with use_kernel("triton"):
            value = loss(logits, labels)
        (gradient,) = torch.autograd.grad(value, logits)
        assert math.isfinite(value.item())
        assert not gradient.any()


# A program apart: under TRITON_INTERPRET=1 the kernels of a process cannot be compiled.
COMPILE = """
import json, re
from benchmarks.triton_offline import BASE, ERRORS, SUMS, compiled
from monai_iou.voxels import triton_error_pass, triton_kernels
from monai_iou.voxels.spec import ROWS

found = []
for case in json.loads(CASES):
    arch, logits, labels, classes, wide = (case.pop(name) for name in ("arch", "logits", "labels", "classes", "wide"))
    size = triton_kernels.blocks(classes, 4 if "fp32" in (logits, labels) else 2)
    options = {**BASE, "ROWS": ROWS, **size, **case}
    options |= triton_error_pass.blocks(options) if "CELLS" in case else {}
    options["APART"] = triton_kernels.keeps_apart(options)
    for kernel in ERRORS if "CELLS" in case else SUMS:
        report = compiled(kernel, arch, logits, labels, options, "i64" if wide else "i32")
        found.append({
            "products": re.findall(r"arith\\.muli .*: (tensor<[^>]*i32>|i32) ", report.asm["ttir"]),
            "atomics": re.findall(r"\\b(?:atom|red)\\.[\\w.:]*", report.asm["ptx"]),
            "spilled": report.spilled, "loaded": report.loaded, "stored": report.stored,
        })
print(json.dumps(found))
"""


def compile_for_gpu(*cases: dict[str, object]) -> list[dict[str, Any]]:
    program = COMPILE.replace("CASES", repr(json.dumps([{**BASE, **case} for case in cases])), 1)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(result.stdout)
    return found


ROOT = Path(__file__).parents[2]
BASE: dict[str, object] = {
    "arch": 90, "logits": "bf16", "labels": "u8", "classes": 4, "wide": False, "ENTROPY": True,
}  # fmt: skip


def test_it_compiles_for_a_gpu_with_64_bit_offsets_and_no_atomics() -> None:
    """Every 32-bit product left is of the class count and a small number (rows, or classes a block)."""
    cases: list[dict[str, object]] = [
        {"IGNORE": 255},
        {"classes": 128, "labels": "i16", "IGNORE": -1, "wide": True},
        {"MAPS": True, "labels": "fp32", "MASK": True, "OVERLAP": 1, "FOCAL": 2.0, "SHARE": 0.1, "KEEP": 0.9},
        {"ACTIVATION": 1, "logits": "fp16", "POWER": 1.5, "CONFIDENT": True, "FOCAL": 1.5, "labels": "i64"},
        {"ACTIVATION": 2, "logits": "fp32", "OVERLAP": 2, "FOCAL": 0.5, "labels": "fp64", "IGNORE": 255.0},
        {"classes": 2, "ACTIVATION": 1, "SPLIT": True, "labels": "bf16", "MASK": True},
        {"classes": 1, "ACTIVATION": 4, "SPLIT": True, "FOCAL": 1.5, "MAPS": True, "labels": "fp32"},
    ]
    for index, result in enumerate(compile_for_gpu(*cases)):
        assert result["atomics"] == []
        assert result["spilled"] <= (0 if cases[index // 2].get("classes") != 128 else 16)
        assert set(result["products"]) <= {"i32", "tensor<8x1xi32>"}, "no product of a whole tile is 32 bits wide"


def test_errors_are_counted_by_atomic_additions_of_whole_numbers() -> None:
    cases: list[dict[str, object]] = [
        {"CELLS": 4098, "SUMS": False, "OVERLAP": 2, "ENTROPY": False, "IGNORE": 255, "classes": 2},
        {"CELLS": 4098, "SUMS": True, "labels": "i64", "IGNORE": -100, "wide": True, "classes": 4},
        {"CELLS": 130, "SUMS": True, "classes": 16},
        {"CELLS": 4098, "SUMS": False, "OVERLAP": 2, "ENTROPY": False, "classes": 16, "arch": 100},
        {"CELLS": 66, "SUMS": False, "OVERLAP": 2, "ENTROPY": False, "ACTIVATION": 3, "classes": 1, "MAPS": True},
    ]
    results = compile_for_gpu(*cases)
    for forward, backward in zip(results[::2], results[1::2], strict=True):
        assert forward["atomics"]
        assert all(re.search(r"\.add\.[su]32$", name) for name in forward["atomics"])
        assert backward["atomics"] == []
        assert forward["spilled"] + backward["spilled"] == 0


def test_logits_and_labels_are_asked_for_once() -> None:
    """What each program reads or writes besides, the sums and their gradient, adds at most 15 % to the bytes."""
    cases: list[dict[str, object]] = [
        {"classes": 2, "IGNORE": 255},
        {"classes": 3, "logits": "fp32", "labels": "i64", "IGNORE": -100},
        {"classes": 16, "IGNORE": 255},
    ]
    results = compile_for_gpu(*cases)
    widths = {"bf16": 2, "fp32": 4, "u8": 1, "i64": 8}
    for index, case in enumerate(cases):
        forward, backward = results[2 * index : 2 * index + 2]
        case = {**BASE, **case}
        classes = triton_classes(int(str(case["classes"])))
        logits, labels = widths[str(case["logits"])] * classes, widths[str(case["labels"])]
        assert forward["loaded"] == logits + labels
        moved = forward["loaded"] + forward["stored"] + backward["loaded"] + backward["stored"]
        assert backward["stored"] == logits
        assert moved <= 1.15 * (3 * logits + 2 * labels)


def triton_classes(classes: int) -> int:
    """Return how many classes a program has room for: those that do not exist are masked out, but in the PTX."""
    return 1 << (classes - 1).bit_length()
