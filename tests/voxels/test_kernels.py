"""Every kernel of the voxel pass against the specification: autograd through the reference in float64."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_run import run
from torch import Tensor

from monai_iou.voxels import compiled, in_place, kernels, tiled, tiling
from monai_iou.voxels.inputs import Voxels
from monai_iou.voxels.passes import flatten_voxels
from monai_iou.voxels.reference import compute_sums as reference_sums
from monai_iou.voxels.spec import PassSpec

# Relative errors of sums and, against the largest entry, of gradients, by the logits' dtype.
TOLERANCE = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-5, 1e-5),
    torch.float16: (1e-5, 2e-3),
    torch.bfloat16: (1e-5, 1e-2),
}
SHAPES = [(1, 2, 1, 1, 1), (3, 7, 5, 1, 9), (2, 41, 17, 13), (2, 3, 77), (1, 1, 6, 5), (0, 3, 4, 4)]
SPECS = [
    PassSpec(activation, overlap, power, cross_entropy, focal, smoothing, confidence)
    for activation, (overlap, power), (cross_entropy, focal, smoothing), confidence in itertools.product(
        ("softmax", "sigmoid", None),
        (("product", 1.0), ("product", 2.0), ("product", 1.5), ("min_max", 1.0), (None, 1.0)),
        ((False, 0.0, 0.0), (True, 0.0, 0.0), (True, 2.0, 0.1), (True, 1.5, 0.0)),
        (False, True),
    )
    if (overlap is not None or cross_entropy) and not (overlap is None and confidence)
]
CORE = [
    PassSpec(),
    PassSpec(cross_entropy=True),
    PassSpec("sigmoid", cross_entropy=True),
    PassSpec("sigmoid", "min_max", cross_entropy=True, focal=2.0, label_smoothing=0.1),
    PassSpec("softmax", None, cross_entropy=True, focal=1.5),
    PassSpec("sigmoid", cross_entropy=True, split=True),
    PassSpec("sigmoid", None, cross_entropy=True, focal=2.0, label_smoothing=0.1, split=True),
    PassSpec(None, "product", 2.0, confidence=True),
]


def case(
    shape: tuple[int, ...], spec: PassSpec, *, ignore: bool = False, soft: bool = False, groups: bool = False
) -> Voxels:
    """Random float64 voxels; logits are probabilities where the pass applies no activation."""
    generator = torch.Generator().manual_seed(len(shape) + shape[1])
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) * 2
    if spec.activation is None:
        logits = logits.sigmoid()
    flat = (shape[0], 1, *shape[2:])
    soft = soft or shape[1] == 1
    target = torch.rand(shape, generator=generator) if soft else torch.randint(0, shape[1], flat, generator=generator)
    mask = torch.rand(flat, generator=generator) > 0.3 if ignore else None
    regions = torch.randint(-1, 3, flat, generator=generator) if groups else None
    return flatten_voxels(logits, target, None, mask, regions, 3 if groups else None)


def rounded(voxels: Voxels) -> Voxels:
    """The same voxels with logits that float32 holds: of a p near 1, it would leave another 1 - p."""
    return replace(voxels, logits=voxels.logits.float().double())


def assert_close(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    rows, gradient = TOLERANCE[dtype]
    assert found[1].dtype == dtype
    torch.testing.assert_close(found[0].double(), expected[0].double(), rtol=rows, atol=rows)
    scale = max(1.0, expected[1].abs().max().item() if expected[1].numel() else 0.0)
    torch.testing.assert_close(found[1].double(), expected[1].double(), rtol=gradient, atol=gradient * scale)


# Every two of the three switches in all their combinations; all eight are slow.
PAIRWISE = [(False, False, False), (False, True, True), (True, False, True), (True, True, False)]


@pytest.fixture
def tiny_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiling.TILE_ELEMENTS, "cpu", 7)
    monkeypatch.setattr(in_place, "FACTOR", {1: 1, 2: 1})
    monkeypatch.setattr(in_place, "MANY", 1)


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("spec", [*SPECS, *CORE[-3:]], ids=str)
@pytest.mark.parametrize(
    "switches",
    [
        pytest.param(PAIRWISE, id="pairwise"),
        pytest.param(list(itertools.product((False, True), repeat=3)), id="all", marks=pytest.mark.slow),
    ],
)
def test_tiled_equals_reference_in_every_branch(switches: list[tuple[bool, bool, bool]], spec: PassSpec) -> None:
    for ignore, soft, groups in switches:
        voxels = case((2, 3, 5, 3), spec, ignore=ignore, soft=soft, groups=groups)
        assert_close(run(tiled.compute_sums, voxels, spec), run(reference_sums, voxels, spec), torch.float64)


ONE_PROBABILITY = [
    PassSpec(None, overlap, 1.0, True, focal, smoothing, split=split)
    for overlap, (focal, smoothing), split in itertools.product(
        ("product", "min_max", None), ((0.0, 0.0), (2.0, 0.1), (0.5, 0.0)), (False, True)
    )
]


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("spec", ONE_PROBABILITY, ids=str)
def test_tiled_equals_reference_for_probabilities_of_one_channel(spec: PassSpec) -> None:
    for ignore, groups in itertools.product((False, True), repeat=2):
        voxels = case((2, 1, 5, 3), spec, ignore=ignore, groups=groups)
        assert_close(run(tiled.compute_sums, voxels, spec), run(reference_sums, voxels, spec), torch.float64)


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None
    or not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"),
    reason="needs Triton, and a GPU or TRITON_INTERPRET=1",
)
@pytest.mark.parametrize(
    ("shape", "spec"),
    [((3, 7, 5, 1, 9), spec) for spec in SPECS]
    + list(itertools.product([*SHAPES[:2], *SHAPES[3:5], (2, 41, 7)], CORE))
    + [((2, 1, 6, 5), spec) for spec in ONE_PROBABILITY],
    ids=str,
)
def test_triton_equals_reference_in_every_branch(spec: PassSpec, shape: tuple[int, ...]) -> None:
    from monai_iou.voxels import triton_kernels

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for ignore, soft in itertools.product((False, True), repeat=2):
        voxels = rounded(case(shape, spec, ignore=ignore, soft=soft))
        exact = run(reference_sums, voxels, spec)
        single = replace(voxels, logits=voxels.logits.float().to(device))
        moved = {
            name: None if value is None else value.to(device)
            for name, value in (("labels", voxels.labels), ("maps", voxels.maps), ("valid", voxels.valid))
        }
        found = run(triton_kernels.compute_sums, replace(single, **moved), spec)
        assert_close((found[0].cpu(), found[1].cpu()), exact, torch.float32)


needs_compiler = pytest.mark.skipif(not compiled.is_available(), reason="needs a C++ compiler")


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("case_of", ["labels", "ignored"])
def test_compiled_equals_reference(case_of: str) -> None:
    """Whole chunks, a last chunk, lines left over and voxels beyond the last line; several sizes, compiled once."""
    spec = PassSpec(cross_entropy=True)
    for batch, count in (
        (2, 4 * compiled.LINE + 77),
        (1, (2 * compiled.CHUNK + 1) * compiled.LINE),
        (1, 5 * compiled.LINE),
    ):
        voxels = case((batch, 3, count), spec, ignore=case_of == "ignored")
        exact = run(reference_sums, voxels, spec)
        single = replace(voxels, logits=voxels.logits.float())
        assert compiled.covers(single)
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert_close(run(compiled.compute_sums, single, spec), exact, torch.float32)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("classes", "spec"), [(3, spec) for spec in SPECS[::7]] + [(1, spec) for spec in ONE_PROBABILITY[::5]], ids=str
)
def test_compiled_equals_reference_in_many_branches(classes: int, spec: PassSpec) -> None:
    for ignore, soft in itertools.product((False, True), repeat=2):
        voxels = rounded(case((1, classes, 4 * compiled.LINE + 77), spec, ignore=ignore, soft=soft))
        exact = run(reference_sums, voxels, spec)
        assert_close(
            run(compiled.compute_sums, replace(voxels, logits=voxels.logits.float()), spec), exact, torch.float32
        )


def test_compiled_leaves_to_tiled_what_it_does_not_cover() -> None:
    for shape, groups in (((1, 17, 4096), False), ((1, 2, 100), False), ((1, 2, 4096), True)):
        voxels = case(shape, PassSpec(), groups=groups)
        single = replace(voxels, logits=voxels.logits.float())
        assert not compiled.covers(single)
        assert_close(
            run(compiled.compute_sums, single, PassSpec()), run(reference_sums, voxels, PassSpec()), torch.float32
        )


def test_choices_that_cannot_run_here_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    voxels = case((1, 2, 9), PassSpec())
    monkeypatch.setattr(compiled, "is_available", lambda: False)
    monkeypatch.setattr(kernels, "_has_triton", lambda: False)
    with kernels.use_kernel("compiled"), pytest.raises(RuntimeError, match=r"^Expected a C\+\+ compiler .* found none"):
        kernels.pick_kernel(voxels, PassSpec())
    with kernels.use_kernel("triton"), pytest.raises(RuntimeError, match=r"^Expected Triton .* not installed"):
        kernels.pick_kernel(voxels, PassSpec())
    for name in ("compiled", "triton"):
        with kernels.use_kernel(name):
            sentence = kernels.kernel_report()["cpu"]
            assert sentence.startswith(f"none: {name}, chosen by use_kernel or MONAI_IOU_KERNEL, cannot run here. ")
            with pytest.raises(RuntimeError) as raised:
                kernels.pick_kernel(voxels, PassSpec())
            assert sentence.endswith(str(raised.value))
    monkeypatch.setenv(kernels.ENVIRONMENT_VARIABLE, "reference")
    assert kernels.pick_kernel(voxels, PassSpec()) is reference_sums
    with kernels.use_kernel("auto"):
        assert kernels.pick_kernel(voxels, PassSpec()) is tiled.compute_sums
    with (
        pytest.raises(ValueError, match=r"^Expected `kernel` to be one of .*, but got 'fast': choose one of these\.$"),
        kernels.use_kernel("fast"),
    ):
        pass


class DeepBackward(torch.autograd.Function):
    """Calls backward inside backward so often that autograd goes on in a thread of its own, as it does for a GPU."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, left: int, seen: list[tuple[int, str]]) -> Tensor:
        ctx.left, ctx.seen = left, seen
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.seen.append((threading.get_ident(), kernels.chosen_kernel()))
        if ctx.left:
            with torch.enable_grad():
                leaf = torch.ones(1, requires_grad=True)
                DeepBackward.apply(leaf, ctx.left - 1, ctx.seen).backward()
        return gradient, None, None


def deep_backward() -> list[str]:
    """Return the choices seen by backward passes in other threads than this one."""
    seen: list[tuple[int, str]] = []
    DeepBackward.apply(torch.ones(1, requires_grad=True), 61, seen).backward()
    return [name for thread, name in seen if thread != threading.get_ident()]


@pytest.mark.skipif(
    '_stash_obj_in_tls("context"' not in inspect.getsource(torch.autograd.graph),
    reason="this torch tells its threads nothing of the one that calls backward",
)
def test_autograds_threads_see_the_choice_of_the_thread_that_calls_backward() -> None:
    with kernels.use_kernel("reference"):
        choices = deep_backward()
        with ThreadPoolExecutor(1) as other:
            elsewhere = other.submit(deep_backward).result()
    assert choices
    assert set(choices) == {"reference"}
    assert set(elsewhere) == {"auto"}, "a choice is of its thread alone"
    assert set(deep_backward()) == {"auto"}


def test_the_report_says_where_a_choice_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(compiled, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "_has_triton", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with kernels.use_kernel("compiled"):
        report = kernels.kernel_report()
    assert report["cpu"] == "compiled: chosen by use_kernel or MONAI_IOU_KERNEL."
    assert report["cuda:0"] == (
        "none: compiled, chosen by use_kernel or MONAI_IOU_KERNEL, cannot run here. Expected a CPU tensor for the "
        "kernel 'compiled', but got one on cuda: choose 'auto'."
    )
    with kernels.use_kernel("triton"):
        report = kernels.kernel_report()
    assert report["cpu"].endswith("Expected a CUDA tensor for the kernel 'triton', but got one on cpu: choose 'auto'.")
    assert report["cuda:0"] == "triton: chosen by use_kernel or MONAI_IOU_KERNEL."


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spec", CORE, ids=str)
def test_tiled_by_shape_and_dtype(spec: PassSpec, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    voxels = case(shape, spec)
    rounded = replace(voxels, logits=voxels.logits.to(dtype))
    exact = run(reference_sums, replace(voxels, logits=rounded.logits.double()), spec)
    first, second = run(tiled.compute_sums, rounded, spec), run(tiled.compute_sums, rounded, spec)
    assert_close(first, exact, dtype)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.overlap != "min_max"][::5], ids=str)
def test_gradcheck_of_tiled(spec: PassSpec) -> None:
    voxels = case((1, 3, 5), spec, ignore=True)
    assert torch.autograd.gradcheck(
        lambda logits: tiled.compute_sums(replace(voxels, logits=logits), spec), voxels.logits.detach().requires_grad_()
    )


@pytest.mark.parametrize("kernel", [tiled, pytest.param(compiled, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int64])
def test_strided_labels(dtype: torch.dtype, kernel: Any) -> None:
    logits = torch.randn(1, 2, 96, 96)
    labels = torch.randint(0, 2, (1, 1, 96, 96, 4)).to(dtype)[..., 1]
    expected = run(tiled.compute_sums, flatten_voxels(logits, labels.clone(), None), PassSpec())
    found = run(kernel.compute_sums, flatten_voxels(logits, labels, None), PassSpec())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_tile_is_never_too_large_to_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiling.TILE_ELEMENTS, "cpu", 1 << 26)
    assert tiling.tile_size(torch.empty(1, 2, 8), 5) == 1 << 24  # above, float32 leaves out odd numbers


def test_strided_logits_are_read_where_they_are() -> None:
    whole = torch.randn(2, 4, 6, 5, 8)
    labels = torch.randint(0, 4, (2, 1, 3, 5, 8))
    expected = run(tiled.compute_sums, flatten_voxels(whole[:, :, ::2].clone(), labels, None), PassSpec())
    for logits in (whole[:, :, ::2], whole[:, :, ::2].to(memory_format=torch.channels_last_3d)):
        found = run(tiled.compute_sums, flatten_voxels(logits, labels, None), PassSpec())
        torch.testing.assert_close(found, expected)
