"""The weights of a loss: as a tensor, checked against the classes, and on the device of its input.

A loss is usually made on the CPU and never moved. A copy of its weights at every call would let the host wait for the
GPU each time, and could not be captured in a CUDA graph: they are copied once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from monai_iou.losses.arguments import check_constant
from monai_iou.tables import counted
from monai_iou.voxels.inputs import plain

# For each tensor of weights on the CPU: its values at the time of the copies, and a copy for each device.
_copies: WeakIdKeyDictionary = WeakIdKeyDictionary()


def as_weight(weight: Sequence[float] | float | Tensor | None, name: str = "weight") -> Tensor | None:
    """Return `weight` as a scalar or one-dimensional float tensor, or None.

    Raises:
        TypeError: if `weight` holds no numbers.
        ValueError: if a weight is negative, not finite or requires a gradient, or `weight` has more than one dimension.
    """
    if weight is None:
        return None
    check_constant(name, weight)
    try:
        with torch.inference_mode(False):  # also where a loss is made before the training in which it is used
            tensor = plain(torch.as_tensor(weight, dtype=torch.get_default_dtype())).clone()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        kind = type(weight).__name__
        message = (
            f"Expected `{name}` to be a number or one number per class, but got {kind} {weight!r}: pass a number or a "
            "list of numbers."
        )
        raise TypeError(message) from error
    if tensor.ndim > 1:
        shape = tuple(tensor.shape)
        message = f"Expected `{name}` to be a number or one number per class, but got shape {shape}: flatten it."
        raise ValueError(message)
    bad = tensor[~(tensor >= 0) | torch.isinf(tensor)] if tensor.numel() else tensor
    if bad.numel():
        message = (
            f"Expected every `{name}` to be finite and at least 0, but got {float(bad.reshape(-1)[0])}: correct it, or "
            "give 0 to leave a class out."
        )
        raise ValueError(message)
    return tensor


def scored_weights(
    weights: Tensor, values: Tensor, classes: int, include_background: bool, name: str = "weight"
) -> Tensor:
    """Return weights beside some values; raise ValueError unless they are one number or one per scored class."""
    if weights.ndim == 1 and weights.shape[0] != classes:
        remedy = (
            "give one weight per class"
            if include_background
            else "with include_background=False, give no weight for the background"
        )
        message = f"Expected `{name}` to hold {counted(classes, 'value')}, but got {weights.shape[0]}: {remedy}."
        raise ValueError(message)
    return weights_beside(weights, values)


def weights_beside(weights: Tensor, values: Tensor) -> Tensor:
    """Return weights on the device and in the dtype of some values.

    Example:
        >>> import torch
        >>> from monai_iou.losses.weights import weights_beside
        >>> weights_beside(torch.tensor([1.0, 3.0]), torch.zeros(1, 2, dtype=torch.float64))
        tensor([1., 3.], dtype=torch.float64)
    """
    if weights.device.type != "cpu" or values.device.type == "cpu" or torch.compiler.is_compiling():
        return weights.to(values)
    # With a graph of its own at each call, or of a tracer, which must not outlive it.
    if weights.requires_grad or not type(weights) is type(values.detach()) is type(weights.clone()) is Tensor:
        return weights.to(values)
    before, copies = _copies.get(weights, (None, {}))
    if before is None or not torch.equal(before, weights):  # whoever changed them
        before, copies = weights.clone(), {}
        _copies[weights] = before, copies
    copy: Tensor | None = copies.get(values.device)
    if copy is None:
        with torch.inference_mode(False):  # where a copy could serve no later training
            copy = before.to(values.device)
        if type(copy) is Tensor:
            copies[values.device] = copy
    return copy.to(values.dtype)
