"""The terms of a loss: their weighted sum, and as numbers for logging."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn


def weighted_sum(weights: Sequence[float], terms: Sequence[Tensor]) -> Tensor:
    """Return the sum of terms of one shape, each times its weight, as a tensor of its own: `loss /= 2` changes no term.

    A weight of 1 costs no operation beside another term.
    """
    weighted = [term if weight == 1 else weight * term for weight, term in zip(weights, terms, strict=True)]
    if len(weighted) == 1 and weighted[0] is terms[0]:
        return weighted[0].clone()
    total = weighted[0]
    for term in weighted[1:]:
        total = total + term
    return total


def loss_and_terms(loss: nn.Module, tag: str = "train_loss") -> Callable[[Any], dict[str, float]]:
    """Return an `output_transform` for MONAI's TensorBoardStatsHandler that logs the loss and each of its terms.

    Args:
        loss: the trainer's loss. If it has `last_terms`, as compound, multi-scale, instance and attention losses do,
            those values, which are not weighted, are logged as well.
        tag: the name of the loss; the name of a term is appended to it.

    Returns:
        A function that maps the engine's output to a dictionary of floats.

    Example:
        >>> import torch
        >>> from monai_iou import IoUCELoss
        >>> from monai_iou.losses import loss_and_terms
        >>> loss = IoUCELoss(softmax=True)
        >>> value = loss(torch.zeros(1, 2, 4), torch.zeros(1, 1, 4))
        >>> sorted(loss_and_terms(loss)([{"loss": value}]))
        ['train_loss', 'train_loss_cross_entropy', 'train_loss_iou']
    """

    def transform(output: Any) -> dict[str, float]:
        first: Mapping[str, Any] = output[0] if isinstance(output, Sequence) else output
        terms: Mapping[str, Any] = getattr(loss, "last_terms", {})
        return {tag: float(first["loss"]), **{f"{tag}_{name}": float(term) for name, term in terms.items()}}

    return transform
