"""The choice among kernels of the voxel pass."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import Context, ContextVar

import torch
from torch import Tensor

from monai_iou.checks import check_choice
from monai_iou.voxels import compiled, numba_pass, reference, tiled
from monai_iou.voxels.error_gradient import ErrorKernel
from monai_iou.voxels.inputs import Voxels
from monai_iou.voxels.self_check import Kernel, SelfChecks
from monai_iou.voxels.spec import PassSpec

KERNELS = ("auto", "reference", "tiled", "compiled", "triton")
ENVIRONMENT_VARIABLE = "MONAI_IOU_KERNEL"
# That Triton's programs take: without regions and histograms of errors, and with one of them.
MOST_CLASSES, BLOCK_CLASSES = 256, 16

_chosen: ContextVar[str | None] = ContextVar("monai_iou_kernel", default=None)


@contextmanager
def use_kernel(name: str) -> Iterator[None]:
    """Use one kernel for the voxel passes made inside the `with` block, in this thread or task.

    The environment variable `MONAI_IOU_KERNEL` sets the choice for a whole process; this context manager wins over it.
    What a backward pass recomputes, as with checkpointing, uses the kernel chosen where `backward` is called. On a GPU,
    this needs a torch that passes the choice on to its backward threads, as 2.13 does; otherwise set the variable.

    Args:
        name: one of

            - "auto", the default: "triton" on CUDA, once it has been found to agree with the reference there, else
              "tiled" (:func:`kernel_report` says which, and why);
            - "reference": autograd over whole volumes, the specification; the only one with double backward. Gradients
              of the target, and derivatives by `torch.func`, take it whatever the choice (but not the histograms of
              Lovasz losses, nor `InstanceIoULoss`, which have none);
            - "tiled": a part of the volume at a time, on any device. On a CPU, loops that Numba compiles at their first
              call, which takes some seconds once; float64, `groups` whose regions change every few voxels, histograms
              of errors and probabilities take operations of torch;
            - "compiled": one fused loop, on a CPU with a C++ compiler; the first call takes some ten seconds. Inputs
              that it does not cover (`groups`, float64, above 16 classes, fewer than 4096 voxels) take "tiled";
            - "triton": one read and one write of the logits, on CUDA, unchecked. Inputs that it does not cover
              (float64; above 256 classes, or above 16 with `groups` or histograms of errors; thousands of regions) take
              "tiled".

    Raises:
        ValueError: if `name` is none of them.
        RuntimeError: by the losses, if the chosen kernel cannot run here.

    Example:
        >>> import torch
        >>> from monai_iou import IoULoss, use_kernel
        >>> logits, labels = torch.zeros(1, 2, 4, 4), torch.ones(1, 1, 4, 4, dtype=torch.long)
        >>> with use_kernel("reference"):
        ...     loss = IoULoss(softmax=True)(logits, labels)
        >>> round(loss.item(), 4)
        0.75
    """
    check_choice("kernel", name, KERNELS)
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def chosen_kernel() -> str:
    """Return the name asked for by :func:`use_kernel` or the environment, "auto" if by neither."""
    name = _chosen.get() or _chosen_for_backward()
    if name is None:
        name = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
        check_choice(ENVIRONMENT_VARIABLE, name, KERNELS)
    return name


def _chosen_for_backward() -> str | None:
    """Return the choice of the thread that called `backward`, where this is one of the threads that do its work."""
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
        return None
    if not torch._C._is_key_in_tls("context"):
        return None
    context = torch._C._get_obj_in_tls("context")  # of contextvars, a copy
    return context.get(_chosen) if isinstance(context, Context) else None


def pick_kernel(voxels: Voxels, spec: PassSpec) -> Kernel:
    """Return the kernel for this input."""
    if torch.compiler.is_compiling():
        return reference.compute_sums  # one graph, which the compiler fuses itself
    name = chosen_kernel()
    wants_target_gradient = voxels.maps is not None and voxels.maps.requires_grad
    if name == "reference" or wants_target_gradient or _is_transformed(voxels.logits):
        return reference.compute_sums
    if name == "triton":
        _check_choice(name, voxels.logits.device)
        return _load_triton()
    if name == "compiled":
        _check_choice(name, voxels.logits.device)
        return compiled.compute_sums
    covered = _is_covered(voxels, MOST_CLASSES if voxels.groups is None else BLOCK_CLASSES)
    if name == "auto" and covered and voxels.logits.device.type in _CHECKED_DEVICES:
        return _checks.kernel(voxels, spec) or tiled.compute_sums
    return tiled.compute_sums


def _is_transformed(logits: Tensor) -> bool:
    """Return whether `torch.func` differentiates the logits: it does not know the other kernels' derivatives."""
    is_wrapped = getattr(torch._C._functorch, "is_functorch_wrapped_tensor", None)
    return is_wrapped is not None and bool(is_wrapped(logits))


def pick_error_kernel(voxels: Voxels, spec: PassSpec) -> ErrorKernel | None:
    """Return Triton's kernel of errors if this input takes it; None if torch counts them, a tile at a time."""
    if torch.compiler.is_compiling():
        return None
    name = chosen_kernel()
    covered = _is_covered(voxels, BLOCK_CLASSES)
    if name == "triton":
        _check_choice(name, voxels.logits.device)
        return _load_triton_errors() if covered else None
    if name == "auto" and covered and voxels.logits.device.type in _CHECKED_DEVICES:
        return _checks.error_kernel(voxels, spec)
    return None


def _is_covered(voxels: Voxels, classes: int) -> bool:
    """Return whether Triton's programs take an input; what they leave to others says nothing of them."""
    return voxels.logits.shape[1] <= classes and voxels.logits.dtype != torch.float64


def takes_labels_as_given(voxels: Voxels) -> bool:
    """Return whether the kernel for this input may be Triton's, which reads labels in the dtype they have."""
    if torch.compiler.is_compiling():
        return False
    name, device = chosen_kernel(), voxels.logits.device
    return name == "triton" or (
        name == "auto" and device.type in _CHECKED_DEVICES and _has_triton() and _checks.reason(device) is None
    )


def kernel_report() -> dict[str, str]:
    """Return, for the CPU and every CUDA device, which kernel the losses use there and why.

    The answer is about this moment: "triton" is checked against the reference at a loss's first call on a device, for
    its specification, dtype, class count, kind of target, kind of regions and layout in memory; if a check fails, the
    device keeps to "tiled" from then on. A choice by :func:`use_kernel` or `MONAI_IOU_KERNEL` is not checked.

    Returns:
        A sentence for each device, by the device's name.

    Example:
        >>> from monai_iou import kernel_report
        >>> kernel_report()["cpu"]
        'tiled: the default on a CPU; its loops are compiled by Numba at their first call.'
    """
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return {device: _reported(torch.device(device)) for device in devices}


def _reported(device: torch.device) -> str:
    name = chosen_kernel()
    hindrance = _hindrance(name, device)
    if hindrance is not None:
        return f"none: {name}, chosen by use_kernel or {ENVIRONMENT_VARIABLE}, cannot run here. {hindrance}"
    if name != "auto":
        return f"{name}: chosen by use_kernel or {ENVIRONMENT_VARIABLE}."
    if device.type not in _CHECKED_DEVICES:
        reason = numba_pass.hindrance()
        if reason is not None:
            return f"tiled: the default on a CPU; its loops are operations of torch, because {reason}."
        return "tiled: the default on a CPU; its loops are compiled by Numba at their first call."
    reason = _checks.reason(device)
    if reason is not None:
        return f"tiled: the check of the Triton kernel on this device found that {reason}."
    if not _has_triton():
        return "tiled: Triton is not installed."
    return _reported_checks(_checks.passed(device), _checks.full(device))


def _reported_checks(passed: int, full: int) -> str:
    """Say what so many checks that Triton's kernel passed, and so many that found no memory, mean for the next loss."""
    if passed:
        sentence = f"triton: it agreed with the reference in {passed} of {passed} checks on this device."
        others = (
            " Other kinds of input take tiled for now, because the device's memory was full at their checks "
            f"({full} so far)."
        )
        return sentence + others if full else sentence
    if full:
        return (
            "triton: if it agrees with the reference at a later loss; tiled until then, because the device's memory "
            f"was full at the checks ({full} so far)."
        )
    return (
        "triton: if it agrees with the reference at the first loss on this device that it covers; nothing has been "
        "checked yet."
    )


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _hindrance(name: str, device: torch.device) -> str | None:
    """Return why a chosen kernel cannot run on a device, or None if it can."""
    if name == "compiled" and device.type != "cpu":
        return f"Expected a CPU tensor for the kernel 'compiled', but got one on {device.type}: choose 'auto'."
    if name == "compiled" and not compiled.is_available():
        return "Expected a C++ compiler for the kernel 'compiled', but found none: install g++ or choose 'auto'."
    if name == "triton" and not _has_triton():
        return "Expected Triton for the kernel 'triton', but it is not installed: install it or choose 'auto'."
    if name == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Expected a CUDA tensor for the kernel 'triton', but got one on {device.type}: choose 'auto'."
    return None


def _check_choice(name: str, device: torch.device) -> None:
    hindrance = _hindrance(name, device)
    if hindrance is not None:
        raise RuntimeError(hindrance)


def _load_triton() -> Kernel:
    if not _has_triton():
        message = "Triton is not installed"
        raise ImportError(message)
    from monai_iou.voxels import triton_kernels  # noqa: PLC0415 - it needs Triton

    return triton_kernels.compute_sums


def _load_triton_errors() -> ErrorKernel:
    _load_triton()
    from monai_iou.voxels import triton_error_pass  # noqa: PLC0415 - it needs Triton

    return triton_error_pass.KERNEL


_CHECKED_DEVICES = {"cuda"}  # where "auto" takes Triton's kernel after a check
_checks = SelfChecks(_load_triton, _load_triton_errors)
