"""The choice among kernels of the voxel pass."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from monai_iou.checks import check_choice
from monai_iou.voxels import reference, tiled
from monai_iou.voxels.reference import PassSpec, Voxels

KERNELS = ("auto", "reference", "tiled")
ENVIRONMENT_VARIABLE = "MONAI_IOU_KERNEL"

Kernel = Callable[[Voxels, PassSpec], Tensor]

_chosen: ContextVar[str | None] = ContextVar("monai_iou_kernel", default=None)


@contextmanager
def use_kernel(name: str) -> Iterator[None]:
    """Use one kernel for the voxel passes made inside the `with` block, in this thread or task.

    The environment variable `MONAI_IOU_KERNEL` sets the choice for a whole process; this context manager wins over it.

    Args:
        name: "auto" (the default: the fastest that is known to work for the device), "reference" (autograd over whole
            volumes, the specification; allows double backward and gradients of the target) or "tiled".

    Raises:
        ValueError: if `name` is none of them.

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
    name = _chosen.get()
    if name is None:
        name = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
        check_choice(ENVIRONMENT_VARIABLE, name, KERNELS)
    return name


def pick_kernel(voxels: Voxels) -> Kernel:
    """Return the kernel for this input."""
    name = chosen_kernel()
    if torch.compiler.is_compiling():
        return reference.sums  # one graph, which the compiler fuses itself
    wants_target_gradient = voxels.maps is not None and voxels.maps.requires_grad
    if name == "reference" or wants_target_gradient:
        return reference.sums
    return tiled.sums
