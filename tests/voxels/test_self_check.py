"""The check of a kernel before its first use, on a CPU with kernels that are right, wrong or absent."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from monai_iou import IoUCELoss, kernel_report, use_kernel
from monai_iou.voxels import kernels, reference, tiled
from monai_iou.voxels.activations import probabilities
from monai_iou.voxels.check_samples import layout, sample_of
from monai_iou.voxels.flat_voxels import flat_voxels
from monai_iou.voxels.inputs import Voxels
from monai_iou.voxels.passes import flatten_voxels
from monai_iou.voxels.self_check import Kernel, SelfChecks, find_fault
from monai_iou.voxels.spec import PassSpec

SPEC = PassSpec(cross_entropy=True)
CPU = torch.device("cpu")


def voxels(classes: int = 3, dtype: torch.dtype = torch.float32) -> Voxels:
    return flatten_voxels(torch.randn(1, classes, 50).to(dtype), torch.randint(0, classes, (1, 1, 50)), None)


def wrong_sums(part: Voxels, spec: PassSpec) -> Tensor:
    return tiled.compute_sums(part, spec) * 1.01


def wrong_gradient(part: Voxels, spec: PassSpec) -> Tensor:
    rows = tiled.compute_sums(part, spec)
    return rows.detach() + 1.1 * (rows - rows.detach())


def broken(part: Voxels, spec: PassSpec) -> Tensor:
    message = "no kernel image is available for execution\nand more"
    raise RuntimeError(message)


class Counted:
    """A right kernel that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, part: Voxels, spec: PassSpec) -> Tensor:
        self.calls += 1
        return tiled.compute_sums(part, spec)


def checked_by(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> SelfChecks:
    """Let "auto" take `kernel` on the CPU as it takes Triton's on CUDA."""
    checks = SelfChecks(lambda: kernel)
    monkeypatch.setattr(kernels, "_checks", checks)
    monkeypatch.setattr(kernels, "_CHECKED_DEVICES", {"cpu"})
    monkeypatch.setattr(kernels, "_has_triton", lambda: True)
    return checks


def test_a_right_kernel_is_checked_once_for_each_kind_and_used(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Counted()
    checked_by(kernel, monkeypatch)
    assert kernel_report()["cpu"].startswith("triton: if it agrees")
    for _ in range(3):
        assert kernels.pick_kernel(voxels(), SPEC) is kernel
    assert kernel.calls == 1
    kernels.pick_kernel(voxels(classes=4), SPEC)
    kernels.pick_kernel(voxels(dtype=torch.bfloat16), SPEC)
    kernels.pick_kernel(voxels(), PassSpec())
    assert kernel.calls == 4
    assert kernel_report()["cpu"] == "triton: it agreed with the reference in 4 of 4 checks on this device."


@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        (wrong_sums, "its largest error of a sum is "),
        (wrong_gradient, "its largest error of a gradient is "),
        (broken, "it raised RuntimeError: no kernel image is available for execution"),
    ],
)
def test_a_wrong_kernel_gives_one_warning_and_right_values(
    kernel: Kernel, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked_by(kernel, monkeypatch)
    logits, labels = torch.randn(1, 3, 6, 5), torch.randint(0, 3, (1, 1, 6, 5))
    loss = IoUCELoss(softmax=True)
    with pytest.warns(UserWarning, match=rf"^Expected the Triton kernel .* but ({fault}).*kernel_report\(\)\.$"):
        found = loss(logits, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(logits, labels)
        loss(logits.double(), labels)
    with use_kernel("reference"):
        torch.testing.assert_close(found, loss(logits, labels))
    assert kernels.pick_kernel(voxels(), SPEC) is tiled.compute_sums
    assert kernel_report()["cpu"].startswith("tiled: the check of the Triton kernel on this device found that it")


def test_a_missing_triton_gives_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_has_triton", lambda: False)
    checks = SelfChecks(kernels._load_triton)
    with pytest.warns(UserWarning, match="it raised ImportError: Triton is not installed"):
        assert checks.kernel(voxels(), SPEC) is None
    assert checks.kernel(voxels(), SPEC) is None
    assert checks.reason(CPU) == "it raised ImportError: Triton is not installed"


def test_a_choice_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Counted()
    checked_by(kernel, monkeypatch)
    with use_kernel("tiled"):
        assert kernels.pick_kernel(voxels(), SPEC) is tiled.compute_sums
        assert kernel_report()["cpu"] == "tiled: chosen by use_kernel or MONAI_IOU_KERNEL."
    assert kernel.calls == 0


def test_the_check_neither_draws_nor_depends_on_the_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Counted()
    checked_by(kernel, monkeypatch)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    part = voxels()
    torch.set_rng_state(state)
    with torch.inference_mode():
        assert kernels.pick_kernel(part, SPEC) is kernel
    assert torch.equal(torch.get_rng_state(), state)


def refuse(tensor: Tensor) -> Tensor:
    message = "the caller's hook has no room for the check's tensors"
    raise RuntimeError(message)


def differentiated(part: Voxels) -> None:
    """Pick the kernel in the midst of torch.func's transformation of something else."""

    def picks(x: Tensor) -> Tensor:
        kernels.pick_kernel(part, SPEC)
        return x.sum()

    torch.func.grad(picks)(torch.ones(3))


@pytest.mark.parametrize(
    "mode",
    [
        lambda: torch.device("meta"),
        lambda: torch.autograd.graph.saved_tensors_hooks(refuse, refuse),
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        torch.no_grad,
        torch.inference_mode,
    ],
    ids=["default device", "hooks for saved tensors", "autocast", "no gradient", "inference"],
)
def test_the_caller_is_in_a_mode(mode: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Counted()
    checks, part = checked_by(kernel, monkeypatch), voxels()
    with mode():
        assert kernels.pick_kernel(part, SPEC) is kernel
    assert (kernel.calls, checks.passed(CPU)) == (1, 1)


def test_the_caller_is_being_transformed(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Counted()
    checks = checked_by(kernel, monkeypatch)
    differentiated(voxels())
    assert (kernel.calls, checks.passed(CPU)) == (1, 1)


def test_the_check_asks_no_thread_of_autograds_for_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside a backward pass on a GPU that thread is the one that waits for the check."""
    shared: list[bool] = []

    def kernel(part: Voxels, spec: PassSpec) -> Tensor:
        shared.append(torch._C._is_multithreading_enabled())
        return tiled.compute_sums(part, spec)

    checked_by(kernel, monkeypatch)
    assert kernels.pick_kernel(voxels(), SPEC) is kernel
    assert shared == [False]
    assert torch._C._is_multithreading_enabled()


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 MiB."),
        (torch.OutOfMemoryError, "no room"),
        (RuntimeError, "Triton Error [CUDA]: out of memory"),
        (getattr(torch, "AcceleratorError", RuntimeError), "CUDA error: out of memory\nand more"),
        (RuntimeError, "CUDA driver error: CUDA_ERROR: Out of Memory"),
    ],
)
def test_a_full_device_is_checked_again_later(
    kind: type[RuntimeError], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch has a class for it; what Triton and the driver ask for beside torch ends in a text."""
    kernel, is_full = Counted(), True

    def short(part: Voxels, spec: PassSpec) -> Tensor:
        if is_full:
            raise kind(text)
        return kernel(part, spec)

    checked_by(short, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels.pick_kernel(voxels(), SPEC) is tiled.compute_sums
    assert kernel_report()["cpu"].startswith("triton: if it agrees")
    is_full = False
    assert kernels.pick_kernel(voxels(), SPEC) is short


class Full:
    """A right kernel on a device whose memory is full."""

    def __init__(self) -> None:
        self.is_full, self.calls = True, 0

    def __call__(self, part: Voxels, spec: PassSpec) -> Tensor:
        self.calls += 1
        if self.is_full:
            message = "CUDA out of memory."
            raise torch.OutOfMemoryError(message)
        return tiled.compute_sums(part, spec)


def test_a_device_that_stays_full_is_asked_ever_more_rarely_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Full()
    checked_by(kernel, monkeypatch)
    asked, told = [], []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for classes, call in [*((3, call) for call in range(1, 21)), *((4, call) for call in range(1, 9))]:
            before = kernel.calls, len(said)
            assert kernels.pick_kernel(voxels(classes), SPEC) is tiled.compute_sums
            asked += [(classes, call)] * (kernel.calls - before[0])
            told += [(classes, call)] * (len(said) - before[1])
    assert asked == [*((3, call) for call in (1, 2, 4, 8, 16)), *((4, call) for call in (1, 2, 4, 8))]
    assert told == [(3, 4)]
    sentence = "Expected room for the check of the Triton kernel on cpu, but got its memory full 3 times: "
    assert str(said[0].message).startswith(sentence)
    assert kernel_report()["cpu"] == (
        "triton: if it agrees with the reference at a later loss; tiled until then, because the device's memory was "
        "full at the checks (9 so far)."
    )


def test_room_that_is_found_later_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Full()
    checked_by(kernel, monkeypatch)
    for classes in (3, 4):
        kernels.pick_kernel(voxels(classes), SPEC)
    kernel.is_full = False
    assert kernels.pick_kernel(voxels(), SPEC) is kernel
    assert kernel_report()["cpu"] == (
        "triton: it agreed with the reference in 1 of 1 checks on this device. Other kinds of input take tiled for "
        "now, because the device's memory was full at their checks (1 so far)."
    )
    assert kernels.pick_kernel(voxels(classes=4), SPEC) is kernel
    assert kernel_report()["cpu"] == "triton: it agreed with the reference in 2 of 2 checks on this device."


def test_what_the_kernel_leaves_to_others_is_no_check_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Counted()
    checks = checked_by(kernel, monkeypatch)
    regions = torch.zeros(1, 1, 50, dtype=torch.long)
    with_regions = flat_voxels(torch.randn(1, 17, 50), torch.zeros(1, 1, 50), None, None, regions, 1)
    for part in (voxels(dtype=torch.float64), voxels(classes=300), with_regions):
        assert kernels.pick_kernel(part, SPEC) is tiled.compute_sums
    assert (kernel.calls, checks.passed(CPU)) == (0, 0)
    assert kernel_report()["cpu"].startswith("triton: if it agrees")


def test_a_kernel_that_needs_more_than_a_program_may_have_is_refused() -> None:
    """Triton's OutOfResources is of the kernel, not of a moment."""

    class OutOfResources(Exception):  # noqa: N818 - as Triton calls it
        pass

    def large(part: Voxels, spec: PassSpec) -> Tensor:
        message = "out of resource: shared memory, Required: 262144, Hardware limit: 232448"
        raise OutOfResources(message)

    checks = SelfChecks(lambda: large)
    with pytest.warns(UserWarning, match="but it raised OutOfResources: out of resource: shared memory"):
        assert checks.kernel(voxels(), SPEC) is None
    assert checks.reason(CPU) is not None


def laid_out(name: str, count: int) -> Tensor:
    values = torch.rand(2, 3, count, 3)[..., 0] if name == "strided" else torch.rand(2, 3, count)
    return values.transpose(1, 2).contiguous().transpose(1, 2) if name == "channels last" else values


@pytest.mark.parametrize("count", [48, 50, 63])
@pytest.mark.parametrize("target_layout", ["contiguous", "channels last", "strided"])
@pytest.mark.parametrize("logits_layout", ["contiguous", "channels last", "strided"])
def test_the_sample_lies_in_memory_as_the_input_does(logits_layout: str, target_layout: str, count: int) -> None:
    """Triton compiles steps of 1 and multiples of 16 apart from others."""
    logits, maps = laid_out(logits_layout, count), laid_out(target_layout, count)
    mask, groups = torch.rand(2, 1, count) > 0.5, torch.zeros(2, 1, count, dtype=torch.long)
    for target in (maps, torch.zeros(2, 1, count, dtype=torch.long)):
        for regions in (None, groups, groups.expand(2, 3, count).contiguous()):
            part = flat_voxels(logits, target, None, mask, regions, 1)
            sample = sample_of(part, SPEC)
            assert layout(sample) == layout(part)
            assert find_fault(tiled.compute_sums, part, SPEC) is None
            assert find_fault(wrong_sums, part, SPEC) is not None


def test_the_sample_of_an_expanded_target_is_contiguous() -> None:
    part = flat_voxels(torch.rand(2, 3, 48), torch.rand(2, 1, 48).expand(2, 3, 48), None)
    maps = sample_of(part, SPEC).maps
    assert maps is not None
    assert maps.stride(2) == 1


def test_each_layout_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Counted()
    checked_by(kernel, monkeypatch)
    labels = torch.zeros(2, 1, 48, dtype=torch.long)
    layouts = [("contiguous", 48), ("channels last", 48), ("strided", 48), ("contiguous", 49), ("channels last", 49)]
    for calls, (name, count) in enumerate(layouts, 1):
        for more in (0, 16):
            long = labels.new_zeros(2, 1, count + more)
            kernels.pick_kernel(flat_voxels(laid_out(name, count + more), long, None), SPEC)
            assert kernel.calls == calls, (name, count + more)


@pytest.mark.parametrize("maps", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax", None])
def test_no_soft_target_of_the_sample_lies_at_the_kink_of_the_smaller_and_larger_one(
    activation: str | None, dtype: torch.dtype, maps: torch.dtype
) -> None:
    """The derivative jumps where p = y: there, rounding would decide whether a right kernel is refused."""
    spec = PassSpec(activation, "min_max")
    part = flatten_voxels(torch.rand(1, 25, 50).to(dtype), torch.rand(1, 25, 50).to(maps), None)
    sample = sample_of(part, spec)
    assert sample.maps is not None
    p = probabilities(sample.logits.double(), spec).value
    assert (p - sample.maps.double()).abs().min() > 9e-4
    assert sample.maps.min() >= 0
    assert sample.maps.max() <= 1
    assert find_fault(tiled.compute_sums, part, spec) is None


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("classes", [1, 2, 5])
def test_the_sample_is_of_the_kind_of_the_input(classes: int, ignored: bool) -> None:
    target = torch.randint(0, max(classes, 2), (1, 1, 50))
    mask = torch.rand(1, 1, 50) > 0.5 if ignored else None
    part = flatten_voxels(torch.randn(1, classes, 50), target, None, mask)
    spec = PassSpec("sigmoid", cross_entropy=True, focal=2.0, label_smoothing=0.1, split=True)
    assert find_fault(tiled.compute_sums, part, spec) is None
    assert find_fault(reference.compute_sums, part, spec) is None
    assert find_fault(wrong_sums, part, spec) is not None


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None
    or not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"),
    reason="needs Triton and a GPU, or TRITON_INTERPRET=1: run .ci/triton",
)
def test_tritons_kernel_passes_and_a_spoilt_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from monai_iou.voxels import triton_kernels

    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    part = voxels() if is_interpreted else on_gpu(voxels())
    assert find_fault(triton_kernels.compute_sums, part, SPEC) is None
    monkeypatch.setattr(triton_kernels, "program_options", _half_of_the_labels(triton_kernels.program_options))
    assert find_fault(triton_kernels.compute_sums, part, SPEC) is not None


def on_gpu(part: Voxels) -> Voxels:
    assert part.labels is not None
    return replace(part, logits=part.logits.cuda(), labels=part.labels.cuda())


def _half_of_the_labels(options: object) -> object:
    def spoilt(part: Voxels, spec: PassSpec) -> dict[str, object]:
        return {**options(part, spec), "KEEP": 0.5}  # type: ignore[operator]

    return spoilt
