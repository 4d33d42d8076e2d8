"""Weighted sums of losses that share one pass over the voxels."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from monai_iou import checks
from monai_iou.distributed import fails_together
from monai_iou.losses.arguments import explains_arguments
from monai_iou.losses.pass_loss import PassLoss, call_loss
from monai_iou.voxels.partly_labelled import Labelled, labelled_pairs
from monai_iou.voxels.passes import Reading, run_passes


class CompoundLoss(_Loss):
    """Weighted sum of losses, with one pass over the voxels for all that are functions of voxel sums.

    A `LovaszSoftmaxLoss` with bins shares the pass of the usual sums. Terms that cannot share (different activations or
    `ignore_index`, two focal exponents, two powers) and losses of another kind (MONAI's) make passes of their own.

    Args:
        losses: the terms; modules that map (input, target) to a scalar, or all to tensors of one shape.
        weights: one factor per term, 1 by default.

    Attributes:
        last_terms: the terms' values at the last call by name, detached, before weighting; for logging.

    Raises:
        TypeError: if a term is not a module.
        ValueError: if there are no terms, or the weights do not fit; when called, if the terms differ in shape.

    Example:
        >>> import torch
        >>> from monai_iou import CompoundLoss, IoULoss, WeightedCrossEntropyLoss
        >>> loss = CompoundLoss([IoULoss(softmax=True), WeightedCrossEntropyLoss()], weights=[1.0, 0.5])
        >>> value = loss(torch.zeros(1, 2, 4, 4), torch.ones(1, 1, 4, 4))
        >>> {name: round(term.item(), 4) for name, term in loss.last_terms.items()}
        {'iou': 0.75, 'weighted_cross_entropy': 0.6931}
    """

    @explains_arguments
    def __init__(self, losses: Sequence[nn.Module], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        losses = list(losses)
        if not losses:
            message = "Expected `losses` to hold at least one loss, but got none: list the terms to add."
            raise ValueError(message)
        for loss in losses:
            if not isinstance(loss, nn.Module):
                message = (
                    f"Expected every one of `losses` to be a torch module, but got {type(loss).__name__}: list losses."
                )
                raise TypeError(message)
        weights = [1.0] * len(losses) if weights is None else list(weights)
        if len(weights) != len(losses):
            message = (
                f"Expected `weights` to hold one factor a loss ({len(losses)}), but got {len(weights)}: give as many, "
                "or leave `weights` out for a factor of 1 each."
            )
            raise ValueError(message)
        self.losses = nn.ModuleList(losses)
        self.weights = [checks.check_positive("weights", weight, allow_zero=True) for weight in weights]
        self.names = _term_names(losses)
        self.last_terms: dict[str, Tensor] = {}

    def terms(self, input: Tensor, target: Tensor, labelled: Labelled = None) -> dict[str, Tensor]:
        """Return every term's value by name, unweighted, with gradients."""
        pairs = None
        values: dict[int, Tensor] = {}
        readings: dict[int, Reading] = {}
        with fails_together(any(getattr(loss, "sync_batch", False) for loss in self.losses), input):
            for members in self._alike():
                checks.check_input(input)
                checks.check_target(input, target)
                for loss in members.values():
                    checks.check_onehot_request(input, target, loss.to_onehot_y)
                specs = [loss.pass_spec(input.shape[1]) for loss in members.values()]
                first = next(iter(members.values()))
                pairs = labelled_pairs(input, target, labelled)
                found = run_passes(first.activated(input, target), target, specs, first.ignore_index, pairs)
                readings |= dict(zip(members, found, strict=True))
        for index, term in enumerate(self.losses):
            if index in readings:
                assert isinstance(term, PassLoss)
                values[index] = term.score_reading(readings[index], input.ndim - 2)
            else:
                missing = labelled if pairs is None else pairs
                # MONAI's losses hand a MetaTensor through, whose bookkeeping a loss has no use for.
                values[index] = torch.as_tensor(call_loss(term, input, target, missing)).as_subclass(Tensor)
        terms = {name: values[index] for index, name in enumerate(self.names)}
        _check_shapes(terms)
        return terms

    def _alike(self) -> list[dict[int, PassLoss]]:
        """Return the terms that read the voxels, by their positions, those of one input and one target together."""
        groups: list[dict[int, PassLoss]] = []
        for index, loss in enumerate(self.losses):
            if not (isinstance(loss, PassLoss) and loss.shares_passes()):
                continue
            for members in groups:
                other = next(iter(members.values()))
                if loss.ignore_index == other.ignore_index and loss.other_act is other.other_act:
                    members[index] = loss
                    break
            else:
                groups.append({index: loss})
        return groups

    def forward(self, input: Tensor, target: Tensor, labelled: Labelled = None) -> Tensor:
        """Return the weighted sum; see the terms for shapes and errors, and :class:`IoULoss` for `labelled`."""
        terms = self.terms(input, target, labelled)
        self.last_terms = {name: term.detach() for name, term in terms.items()}
        weighted = [weight * term for weight, term in zip(self.weights, terms.values(), strict=True)]
        total = weighted[0]
        for term in weighted[1:]:
            total = total + term
        return total


def _check_shapes(terms: dict[str, Tensor]) -> None:
    """Raise unless the terms can be added without one being spread over another."""
    shapes = {name: tuple(term.shape) for name, term in terms.items()}
    if len(set(shapes.values())) > 1 and any(term.numel() != 1 for term in terms.values()):
        listed = ", ".join(f"{shape} of {name}" for name, shape in shapes.items())
        message = (
            f'Expected `losses` to give terms of one shape, but got {listed}: take reduction="mean" or "sum" in all.'
        )
        raise ValueError(message)


def _term_names(losses: Sequence[nn.Module]) -> list[str]:
    """Name terms after their classes, `IoULoss` -> "iou"; a number tells equal ones apart."""
    names: list[str] = []
    for loss in losses:
        plain = type(loss).__name__.removesuffix("Loss").replace("IoU", "Iou")
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", plain).lower() or "loss"
        count = sum(other == name or other.startswith(f"{name}_#") for other in names)
        names.append(f"{name}_#{count + 1}" if count else name)
    return names
