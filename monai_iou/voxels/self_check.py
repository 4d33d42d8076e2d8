"""Whether a kernel may be trusted on a device: it is compared with the reference there before its first use.

A kernel that was compiled for a device is only as right as the compiler, the driver and the device. So "auto" asks here
once for each device, specification, dtype, class count and kind of target: the sums and the gradient of a few random
voxels have to agree with the reference in float64. What is compiled for that is what the loss needs next, so the check
costs little more than the first call would. After one failure the device keeps to `tiled`, and a warning says why.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from monai_iou.voxels import reference
from monai_iou.voxels.compact_labels import IGNORED, fits
from monai_iou.voxels.inputs import Voxels
from monai_iou.voxels.spec import PassSpec

Kernel = Callable[[Voxels, PassSpec], Tensor]

# More than a program reads and no multiple of it, but of 16 as usual volumes are, whose compiled form is then the same.
_VOXELS = 3 * 1024 + 272
_OF_ROWS = 1e-4  # relative error of the sums; a faulty kernel is off by far more
_OF_GRADIENT = {torch.float16: 5e-3, torch.bfloat16: 3e-2}  # of the largest entry; other dtypes as the sums


class SelfChecks:
    """The answers so far, by device.

    Args:
        load: returns the kernel; raises where there is none.
    """

    def __init__(self, load: Callable[[], Kernel]) -> None:
        self._load = load
        self._passed: dict[torch.device, set[Any]] = {}
        self._refused: dict[torch.device, str] = {}
        self._lock = threading.Lock()

    def kernel(self, voxels: Voxels, spec: PassSpec) -> Kernel | None:
        """Return the kernel if it computes `spec` right for this kind of input, else None."""
        device = voxels.logits.device
        if device in self._refused:
            return None
        key = _kind(voxels, spec)
        if key not in self._passed.get(device, ()):
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return None  # nothing can be compared while a graph is captured, and nothing is said of later calls
            with self._lock:
                self._check(voxels, spec, key)
        return None if device in self._refused else self._load()

    def reason(self, device: torch.device) -> str | None:
        """Return why the kernel is not used on a device; None if it is, or if nobody has asked yet."""
        return self._refused.get(device)

    def passed(self, device: torch.device) -> int:
        """Return how many kinds of input have been checked on a device."""
        return len(self._passed.get(device, ()))

    def _check(self, voxels: Voxels, spec: PassSpec, key: Any) -> None:
        device = voxels.logits.device
        try:
            with _apart(device):
                fault = find_fault(self._load(), voxels, spec)
        except Exception as error:  # whatever a compiler or a driver raises, the training goes on
            fault = f"it raised {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        if fault is None:
            self._passed.setdefault(device, set()).add(key)
            return
        self._refused[device] = fault
        message = (
            f"Expected the Triton kernel to compute {spec} on {device} as the reference does, but {fault}: the kernel "
            "'tiled' is used on this device, which is slower but correct. See monai_iou.kernel_report()."
        )
        warnings.warn(message, stacklevel=2)


def _kind(voxels: Voxels, spec: PassSpec) -> Any:
    """Return what the compiled form depends on."""
    target = voxels.maps if voxels.labels is None else voxels.labels
    assert target is not None
    ignores = voxels.has_ignored, voxels.valid is None, voxels.as_given, voxels.ignore_index
    return spec, voxels.logits.dtype, voxels.logits.shape[1], voxels.labels is None, target.dtype, *ignores


@contextlib.contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """Let a check run as it would by itself, whatever mode the caller is in."""
    mode = torch.cuda.get_sync_debug_mode() if device.type == "cuda" else 0
    with torch.inference_mode(False), torch.enable_grad():
        if mode:
            torch.cuda.set_sync_debug_mode(0)
        try:
            yield
        finally:
            if mode:
                torch.cuda.set_sync_debug_mode(mode)


def find_fault(kernel: Kernel, voxels: Voxels, spec: PassSpec) -> str | None:
    """Return in which way `kernel` differs from the reference on random voxels of the kind of `voxels`, or None."""
    sample = _sample(voxels, spec)
    exact = _on_cpu(sample)
    rows, gradient = _sums_and_gradient(kernel, sample, spec)
    true_rows, true_gradient = _sums_and_gradient(reference.compute_sums, exact, spec)
    for name, computed, true, limit in (
        ("sum", rows, true_rows, _OF_ROWS),
        ("gradient", gradient, true_gradient, _OF_GRADIENT.get(voxels.logits.dtype, _OF_ROWS)),
    ):
        scale = max(1.0, float(true.abs().max()))
        error = float((computed.cpu().double() - true).abs().max())
        if not error <= limit * scale:  # NaN is a fault
            return f"its largest error of a {name} is {error / scale:.1e} (allowed: {limit:.0e})"
    return None


def _sample(voxels: Voxels, spec: PassSpec) -> Voxels:
    """Return a few random voxels of the kind of `voxels`, on its device."""
    generator = torch.Generator().manual_seed(0)
    logits, classes = voxels.logits, voxels.logits.shape[1]
    values = torch.randn(1, classes, _VOXELS, generator=generator) * 3
    values = values.sigmoid() * 0.98 + 0.01 if spec.activation is None else values
    labels = maps = valid = None
    if voxels.labels is not None:
        labels = _sample_labels(voxels, generator).to(logits.device)
    else:
        assert voxels.maps is not None
        drawn = torch.rand(1, classes, _VOXELS, generator=generator)
        soft = voxels.maps.dtype.is_floating_point
        maps = (drawn if soft else drawn > 0.5).to(voxels.maps.dtype).to(logits.device)
    if voxels.valid is not None:
        valid = (torch.rand(1, _VOXELS, generator=generator) > 0.2).to(logits.device)
    values = values.to(logits.dtype).to(logits.device)
    return replace(voxels, logits=values, labels=labels, maps=maps, valid=valid, groups=None, regions=1)


def _sample_labels(voxels: Voxels, generator: torch.Generator) -> Tensor:
    """Return random class numbers, some of them ignored where that happens, one of them wrong where it can be."""
    assert voxels.labels is not None
    classes = voxels.logits.shape[1]
    labels = torch.randint(0, classes, (1, _VOXELS), generator=generator).to(voxels.labels.dtype)
    if voxels.as_given:
        if fits(labels.dtype, classes):
            labels[:, 1] = classes
        if voxels.ignore_index is not None and fits(labels.dtype, voxels.ignore_index):
            labels[:, ::5] = voxels.ignore_index
    elif voxels.has_ignored:
        labels[:, ::5] = IGNORED[labels.dtype]
    return labels


def _on_cpu(sample: Voxels) -> Voxels:
    labels, maps, valid = (None if part is None else part.cpu() for part in (sample.labels, sample.maps, sample.valid))
    return replace(sample, logits=sample.logits.cpu().double(), labels=labels, maps=maps, valid=valid)


def _sums_and_gradient(kernel: Kernel, sample: Voxels, spec: PassSpec) -> tuple[Tensor, Tensor]:
    leaf = sample.logits.detach().clone().requires_grad_()
    rows = kernel(replace(sample, logits=leaf), spec)
    pull = torch.linspace(-1, 1, rows.numel(), dtype=torch.float64).view(rows.shape)
    (gradient,) = torch.autograd.grad(rows, leaf, pull.to(rows))
    return rows.detach(), gradient
