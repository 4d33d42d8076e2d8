"""Whether a kernel may be trusted on a device: it is compared with the reference there before its first use.

A kernel that was compiled for a device is only as right as the compiler, the driver and the device. So "auto" asks here
once for each device, specification, dtype, class count, kind of target, kind of regions and layout in memory: the sums
and the gradient of a few random voxels have to agree with the reference in float64. What is compiled for that is what
the loss needs next, so the check costs little more than the first call would. After one failure the device keeps to
`tiled`, and a warning says why. Full memory is no failure: the check is made again, ever more rarely.

A check runs in a thread of its own. What the caller's thread is in the midst of (a default device, hooks for saved
tensors, torch.func, autocast, inference mode) says nothing of the kernel, and would only make the check fail.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from monai_iou.voxels import late_checks, reference
from monai_iou.voxels.check_samples import layout, sample_of
from monai_iou.voxels.error_gradient import TILED, ErrorKernel, error_spec
from monai_iou.voxels.inputs import Voxels, sum_dtype
from monai_iou.voxels.spec import PassSpec

Kernel = Callable[[Voxels, PassSpec], Tensor]
_Kernel = TypeVar("_Kernel")

_LARGEST_ERROR = 16.0  # of the hinge on such voxels
_OF_CELL = 0.1  # of the width of a cell
_SMALLEST = 1e-6  # gradient that errors are taken relative to
_OF_ROWS = 1e-4  # relative error of the sums; a faulty kernel is off by far more
_OF_GRADIENT = {torch.float16: 5e-3, torch.bfloat16: 3e-2}  # of the largest entry; other dtypes as the sums
_SAY_FULL = 3  # checks of one kind in vain, after which a warning comes


class SelfChecks:
    """The answers so far, by device.

    Args:
        load: returns the kernel; raises where there is none.
        load_errors: the same for the kernel of errors.
    """

    def __init__(self, load: Callable[[], Kernel], load_errors: Callable[[], ErrorKernel] | None = None) -> None:
        self._load, self._load_errors = load, load_errors
        self._passed: dict[torch.device, set[Any]] = {}
        self._refused: dict[torch.device, str] = {}
        self._calls: dict[torch.device, dict[Any, int]] = {}  # of each kind, until it has passed
        self._full: dict[torch.device, dict[Any, int]] = {}  # checks in vain of each kind, until it has passed
        self._said_full: set[torch.device] = set()
        self._lock = threading.Lock()

    def kernel(self, voxels: Voxels, spec: PassSpec) -> Kernel | None:
        """Return the kernel if it computes `spec` right for this kind of input, else None."""
        return self._checked(self._load, find_fault, voxels, spec)

    def error_kernel(self, voxels: Voxels, spec: PassSpec) -> ErrorKernel | None:
        """Return the kernel of errors if it computes `spec` right for this kind of input, else None."""
        assert self._load_errors is not None
        return self._checked(self._load_errors, find_error_fault, voxels, spec)

    def _checked(
        self, load: Callable[[], _Kernel], find: Callable[[_Kernel, Voxels, PassSpec], str | None],
        voxels: Voxels, spec: PassSpec,
    ) -> _Kernel | None:  # fmt: skip
        device = voxels.logits.device
        if device in self._refused:
            return None
        key = _kind(voxels, spec)
        if key not in self._passed.get(device, ()):
            if late_checks.is_captured(voxels.logits):
                return None  # nothing can be compared while a graph is captured, and nothing is said of later calls
            with self._lock:
                if self._is_due(device, key):
                    self._check(lambda: find(load(), voxels, spec), device, spec, key)
        return load() if key in self._passed.get(device, ()) else None

    def reason(self, device: torch.device) -> str | None:
        """Return why the kernel is not used on a device; None if it is, or if nobody has asked yet."""
        return self._refused.get(device)

    def passed(self, device: torch.device) -> int:
        """Return how many kinds of input have been checked on a device."""
        return len(self._passed.get(device, ()))

    def full(self, device: torch.device) -> int:
        """Return how many checks have found a device's memory full, of the kinds that have not passed since."""
        return sum(self._full.get(device, {}).values())

    def _is_due(self, device: torch.device, key: Any) -> bool:
        """Count a call, and return whether it checks: the 1st, 2nd, 4th, 8th and so on, since each costs an attempt."""
        if device in self._refused or key in self._passed.get(device, ()):
            return False  # by the thread that this one has waited for
        calls = self._calls.setdefault(device, {})
        calls[key] = calls.get(key, 0) + 1
        return calls[key] & (calls[key] - 1) == 0

    def _check(self, find: Callable[[], str | None], device: torch.device, spec: PassSpec, key: Any) -> None:
        try:
            fault = _apart(find, device)
        except Exception as error:  # whatever a compiler or a driver raises, the training goes on
            if _says_full(error):
                self._note_full(device, key)  # it says nothing of the kernel: a later call checks again
                return
            fault = f"it raised {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        if fault is None:
            self._passed.setdefault(device, set()).add(key)
            for counts in (self._full, self._calls):
                counts.get(device, {}).pop(key, None)
            return
        self._refused[device] = fault
        message = (
            f"Expected the Triton kernel to compute {spec} on {device} as the reference does, but {fault}: the kernel "
            "'tiled' is used on this device, which is slower but correct. See monai_iou.kernel_report()."
        )
        warnings.warn(message, stacklevel=2)

    def _note_full(self, device: torch.device, key: Any) -> None:
        full = self._full.setdefault(device, {})
        full[key] = full.get(key, 0) + 1
        if full[key] < _SAY_FULL or device in self._said_full:
            return
        self._said_full.add(device)
        message = (
            f"Expected room for the check of the Triton kernel on {device}, but got its memory full {full[key]} times: "
            "the kernel 'tiled' is used until a later check finds room, which is slower but correct; lower the size of "
            "the batch or the patch. See monai_iou.kernel_report()."
        )
        warnings.warn(message, stacklevel=2)


def _says_full(error: Exception) -> bool:
    """Return whether an error says that memory is full: torch has a class for it, Triton and the driver a text."""
    full = isinstance(error, RuntimeError) and "out of memory" in str(error).lower()
    return full or isinstance(error, torch.OutOfMemoryError)


def _kind(voxels: Voxels, spec: PassSpec) -> Any:
    """Return what the compiled form depends on."""
    target = voxels.maps if voxels.labels is None else voxels.labels
    assert target is not None
    ignores = voxels.has_ignored, voxels.valid is None, voxels.as_given, voxels.ignore_index
    regions = None if voxels.groups is None else (voxels.groups.dtype, voxels.groups.shape[1])
    kinds = spec, voxels.logits.dtype, voxels.logits.shape[1], voxels.labels is None, target.dtype
    return *kinds, *ignores, regions, layout(voxels)


def _apart(find: Callable[[], str | None], device: torch.device) -> str | None:
    """Let a check run as it would by itself, whatever modes the calling thread is in.

    Its gradient is computed in its own thread: the one in which autograd serves a GPU may be waiting for this check, as
    where checkpointing computes a loss again.
    """

    def work() -> str | None:
        with torch.autograd.set_multithreading_enabled(False), _on(device):
            return find()

    with ThreadPoolExecutor(1, "monai_iou_check") as thread:
        return thread.submit(work).result()


@contextlib.contextmanager
def _on(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    mode = torch.cuda.get_sync_debug_mode()  # of the whole process, not of a thread
    with torch.cuda.device(device):
        if mode:
            torch.cuda.set_sync_debug_mode(0)
        try:
            yield
        finally:
            if mode:
                torch.cuda.set_sync_debug_mode(mode)


def find_fault(kernel: Kernel, voxels: Voxels, spec: PassSpec) -> str | None:
    """Return in which way `kernel` differs from the reference on random voxels of the kind of `voxels`, or None."""
    sample = sample_of(voxels, spec)
    exact = _on_cpu(sample)
    rows, gradient = _sums_and_gradient(kernel, sample, spec)
    true_rows, true_gradient = _sums_and_gradient(reference.compute_sums, exact, spec)
    of_gradient = _OF_GRADIENT.get(voxels.logits.dtype, _OF_ROWS)
    return _difference("sum", rows, true_rows, _OF_ROWS, 1.0) or _difference(
        "gradient", gradient, true_gradient, of_gradient, _SMALLEST
    )


def _difference(name: str, computed: Tensor, true: Tensor, limit: float, least: float) -> str | None:
    """Return how far values are from the true ones if that is more than `limit` times the largest, at least `least`."""
    scale = max(least, float(true.abs().max()))
    error = float((computed.cpu().double() - true).abs().max())
    if error <= limit * scale:  # NaN is a fault
        return None
    return f"its largest error of a {name} is {error / scale:.1e} (allowed: {limit:.0e})"


def find_error_fault(kernel: ErrorKernel, voxels: Voxels, spec: PassSpec) -> str | None:
    """Return in which way `kernel` differs from torch's tiles on random voxels of the kind of `voxels`, or None.

    An error at the edge of a cell may fall to either side; so the mean cells of the errors and volumes are compared,
    and the gradient of tables that are continuous from cell to cell.
    """
    sample = _hard(sample_of(voxels, spec))
    found = _errors_and_gradient(kernel, sample, spec)
    true = _errors_and_gradient(TILED, _on_cpu(sample).compact(), spec)
    of_gradient = _OF_GRADIENT.get(voxels.logits.dtype, _OF_ROWS)
    kinds = [
        ("sum", _OF_ROWS, 1.0),
        ("volume", _OF_ROWS, 1.0),
        ("mean cell", _OF_CELL / error_spec(spec).cells, 1.0),
        ("gradient", of_gradient, _SMALLEST),
    ]
    for (name, limit, least), computed, exact in zip(kinds, found, true, strict=True):
        fault = _difference(name, computed, exact, limit, least)
        if fault is not None:
            return fault
    return None


def _hard(sample: Voxels) -> Voxels:
    return sample if sample.maps is None else replace(sample, maps=(sample.maps > 0.5).to(sample.maps.dtype))


def _errors_and_gradient(kernel: ErrorKernel, sample: Voxels, spec: PassSpec) -> tuple[Tensor, ...]:
    """Return statistics, volumes (B, C, 2) by side, mean cells of the errors from 0 to 1 (B, C, 2), and a gradient."""
    logits, cells = sample.logits, error_spec(spec).cells
    limit = torch.full((len(logits), 1), _LARGEST_ERROR, dtype=sum_dtype(logits), device=logits.device)
    histograms, rows = kernel.count(sample, spec, limit)
    counts = histograms.counts.double()
    volumes = counts.sum(-1)
    places = torch.linspace(0, 1, cells, dtype=torch.float64, device=counts.device)
    means = (counts * places).sum(-1) / volumes.clamp_min(1)
    starts = places.expand(counts.shape).to(limit.dtype).contiguous()
    out = torch.empty_like(logits)
    pulls = torch.linspace(-1, 1, rows.numel(), dtype=limit.dtype, device=limit.device).view(rows.shape)
    rises = torch.full_like(starts, 1 / (cells - 1))
    kernel.write_gradient(out, sample, spec, limit, torch.stack([starts, rises]), pulls)
    return rows, volumes, means, out


def _on_cpu(sample: Voxels) -> Voxels:
    parts = sample.labels, sample.maps, sample.valid, sample.groups
    labels, maps, valid, groups = (None if part is None else part.cpu() for part in parts)
    return replace(sample, logits=sample.logits.cpu().double(), labels=labels, maps=maps, valid=valid, groups=groups)


def _sums_and_gradient(kernel: Kernel, sample: Voxels, spec: PassSpec) -> tuple[Tensor, Tensor]:
    leaf = sample.logits.detach().clone().requires_grad_()
    rows = kernel(replace(sample, logits=leaf), spec)
    pull = torch.linspace(-1, 1, rows.numel(), dtype=torch.float64, device="cpu").view(rows.shape)
    (gradient,) = torch.autograd.grad(rows, leaf, pull.to(rows))
    return rows.detach(), gradient
