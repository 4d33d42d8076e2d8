"""The weights of a loss on the device of its input: copied to a GPU once, and not at every step.

A loss is usually made on the CPU and never moved. A copy of its weights at every call would let the host wait for the
GPU each time, and could not be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# For each tensor of weights on the CPU: its values at the time of the copies, and a copy for each device.
_copies: WeakIdKeyDictionary = WeakIdKeyDictionary()


def weights_beside(weights: Tensor, values: Tensor) -> Tensor:
    """Return weights on the device and in the dtype of some values.

    Example:
        >>> import torch
        >>> from monai_iou.losses.weight_copies import weights_beside
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
