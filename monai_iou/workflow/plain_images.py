"""What the fast layers for a CPU ask of an image, and what they return."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["as_output", "has_last_channels", "is_plain", "is_several"]


def is_plain(image: Tensor) -> bool:
    """Return whether an image is a float tensor on a CPU, and nothing but its values and gradient are asked for.

    `torch.fx` traces a network with a stand-in that is no tensor; `torch.export`, a count of operations and the like
    see each operation of torch: for them, a layer is torch's own.
    """
    if torch.compiler.is_compiling() or not isinstance(image, Tensor):
        return False
    is_transformed = getattr(torch._C, "_are_functorch_transforms_active", bool)() or forward_ad._current_level >= 0
    is_recorded = torch.jit._trace.is_tracing() or _is_watched(image)
    is_usual = image.device.type == "cpu" and image.dtype in (torch.float32, torch.float64, torch.bfloat16)
    return is_usual and not is_recorded and not is_transformed


def _is_watched(image: Tensor) -> bool:
    """Return whether a mode of torch's dispatcher sees each operation, or the class of the image does."""
    modes = getattr(torch._C, "_len_torch_dispatch_stack", int)()
    early_modes = getattr(torch._ops, "_len_torch_dispatch_stack_pre_dispatch", int)()
    is_own = type(image).__torch_dispatch__ is not Tensor.__torch_dispatch__
    return bool(modes or early_modes or is_own)


def has_last_channels(image: Tensor) -> bool:
    """Return whether an image is (B, C, X, Y, Z) with channels that lie last, and holds a voxel.

    Example:
        >>> has_last_channels(torch.rand(1, 2, 3, 3, 3))
        False
    """
    return image.dim() == 5 and image.numel() > 0 and image.is_contiguous(memory_format=torch.channels_last_3d)


def is_several(gradient: Tensor) -> bool:
    """Return whether a gradient stands for several at once, as those do that `is_grads_batched` or a vmap asks for.

    The ways to lay out the memory of a tensor are not defined for it.
    """
    of_transforms = torch._C._functorch
    return of_transforms.is_batchedtensor(gradient) or of_transforms.is_legacy_batchedtensor(gradient)


def as_output(image: Tensor) -> Tensor:
    """Return what a function of autograd's computed as a tensor of its own, where it is a view of another.

    Layers that follow may work in place, which autograd refuses for a view that a function made.
    """
    return image.data
