"""A backward whose own derivative is not written out: using it is an error that names the remedy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_MESSAGE = (
    "Expected one derivative of a loss on voxel sums, but got a request for the second: this kernel has none. "
    'Compute the loss inside `with monai_iou.use_kernel("reference"):`.'
)


def refuse_second_derivative() -> None:
    """Raise RuntimeError inside the `backward` of a Lovasz loss that is asked for a graph, by create_graph=True.

    A second derivative that is missing would pass for a zero.
    """
    if torch.is_grad_enabled():
        message = (
            "Expected a backward pass without create_graph=True, because a Lovasz loss with bins has no second "
            "derivative: take bins=None."
        )
        raise RuntimeError(message)


class _NoDerivative(torch.autograd.Function):
    """The identity; what flows back through it raises."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *_: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(_MESSAGE)


def once_differentiable(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., Any]:
    """Make a second derivative through a function's `backward` an error, as a missing one would pass for a zero.

    torch's decorator of this name stays silent where the incoming gradient is a constant. `backward` returns the
    gradient of its first input first; the others get none.
    """

    @functools.wraps(backward)
    def guarded(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradient, *others = backward(ctx, *gradients)
            assert gradient is not None
        if torch.is_grad_enabled():  # of create_graph=True
            # It depends on these: without them, torch would leave it out of a derivative by the input alone.
            causes = [each for each in (*ctx.saved_tensors, *gradients) if each is not None and each.requires_grad]
            gradient = _NoDerivative.apply(gradient.requires_grad_(), *causes)
        return gradient, *others

    return guarded
