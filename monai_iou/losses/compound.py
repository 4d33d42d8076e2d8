"""Weighted sums of losses that share one pass over the voxels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from monai_iou import checks
from monai_iou.distributed import fails_together
from monai_iou.losses.base import SumsLoss
from monai_iou.losses.lovasz import LovaszSoftmaxLoss
from monai_iou.voxels.inputs import sum_dtype
from monai_iou.voxels.spec import PassSpec
from monai_iou.voxels.sums import VoxelSums, run_pass


def joined(first: PassSpec, second: PassSpec, *, hard: bool) -> PassSpec | None:
    """Return a specification that serves both, or None if no pass can.

    With `hard` labels y^q = y, so that a cross-entropy, which divides by the sum of y, accepts any power.
    """
    if first.activation != second.activation:
        return None
    region, other = (first, second) if first.overlap is not None else (second, first)
    if other.overlap is not None:
        if (region.overlap, region.power) != (other.overlap, other.power):
            return None
    elif region.power != 1 and not hard:
        return None
    entropy = first if first.cross_entropy else second
    if (
        first.cross_entropy
        and second.cross_entropy
        and (first.focal, first.label_smoothing) != (second.focal, second.label_smoothing)
    ):
        return None
    return replace(
        region,
        cross_entropy=entropy.cross_entropy,
        focal=entropy.focal,
        label_smoothing=entropy.label_smoothing,
        confidence=first.confidence or second.confidence,
    )


_Pass = tuple[PassSpec, list[tuple[int, SumsLoss]]]  # what is summed, and the numbered losses that ask for it


class CompoundLoss(_Loss):
    """Weighted sum of losses, with one pass over the voxels for all that are functions of voxel sums.

    A `LovaszSoftmaxLoss` with bins reads them in the same pass. Terms that cannot share (different activations or
    `ignore_index`, two focal exponents, two powers) and losses of another kind (MONAI's) make passes of their own.

    Args:
        losses: the terms; modules that map (input, target) to a scalar, or all to tensors of one shape.
        weights: one factor a term, 1 by default.

    Attributes:
        last_terms: the terms' values at the last call by name, detached, before weighting; for logging.

    Raises:
        TypeError: if a term is no module.
        ValueError: if there are no terms, or the weights do not fit; when called, if the terms differ in shape.

    Example:
        >>> import torch
        >>> from monai_iou import CompoundLoss, IoULoss, WeightedCrossEntropyLoss
        >>> loss = CompoundLoss([IoULoss(softmax=True), WeightedCrossEntropyLoss()], weights=[1.0, 0.5])
        >>> value = loss(torch.zeros(1, 2, 4, 4), torch.ones(1, 1, 4, 4))
        >>> {name: round(term.item(), 4) for name, term in loss.last_terms.items()}
        {'iou': 0.75, 'weighted_cross_entropy': 0.6931}
    """

    def __init__(self, losses: Sequence[nn.Module], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        losses = list(losses)
        if not losses:
            message = "Expected `losses` to hold at least one loss, but got none: list the terms to add."
            raise ValueError(message)
        for loss in losses:
            if not isinstance(loss, nn.Module):
                message = f"Expected every one of `losses` to be a torch module, but got {type(loss).__name__}."
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

    def terms(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return every term's value by name, unweighted, with gradients."""
        values: dict[int, Tensor] = {}
        passes: list[_Pass] = []
        shared = [(index, loss) for index, loss in enumerate(self.losses) if isinstance(loss, SumsLoss)]
        joins = any(getattr(loss, "sync_batch", False) for loss in self.losses)
        statistics: list[tuple[VoxelSums, list[tuple[int, SumsLoss]]]] = []
        with fails_together(joins, input):
            if shared:
                checks.check_input(input)
                checks.check_target(input, target)
                hard = input.shape[1] > 1 and target.shape[1] == 1
                for index, loss in shared:
                    checks.check_onehot_request(input, target, loss.to_onehot_y)
                    _join_a_pass(passes, index, loss, loss.pass_spec(input.shape[1]), hard)
            lovasz = self._lovasz_beside(passes, input, target)
            for position, (spec, members) in enumerate(passes):
                first = members[0][1]
                if position not in lovasz:
                    rows = run_pass(first.activated(input, target), target, spec, first.ignore_index)
                    statistics.append((VoxelSums(rows.squeeze(-1)), members))
        for position, (index, other) in lovasz.items():  # outside, because it may wait for the ranks
            spec, members = passes[position]
            values[index], rows = other.forward_with_sums(input, target, spec)
            statistics.append((VoxelSums(rows.to(sum_dtype(input))), members))
        for sums, members in statistics:
            values |= {index: member.score(sums, input.ndim - 2) for index, member in members}
        for index, term in enumerate(self.losses):
            if index not in values:
                # MONAI's losses hand a MetaTensor through, whose bookkeeping a loss has no use for.
                values[index] = torch.as_tensor(term(input, target)).as_subclass(Tensor)
        terms = {name: values[index] for index, name in enumerate(self.names)}
        _check_shapes(terms)
        return terms

    def _lovasz_beside(
        self, passes: list[_Pass], input: Tensor, target: Tensor
    ) -> dict[int, tuple[int, LovaszSoftmaxLoss]]:
        """Return the Lovasz losses that can make a pass, by its position: at most one a pass."""
        found: dict[int, tuple[int, LovaszSoftmaxLoss]] = {}
        if torch.compiler.is_compiling() or target.requires_grad:
            return found
        for index, loss in enumerate(self.losses):
            if not isinstance(loss, LovaszSoftmaxLoss):
                continue
            for position, (spec, members) in enumerate(passes):
                first = members[0][1]
                usable = first.other_act is None and loss.can_share_pass(spec, first.ignore_index, input.shape[1])
                if usable and position not in found:
                    found[position] = (index, loss)
                    break
        return found

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the weighted sum; see the terms for shapes and errors."""
        terms = self.terms(input, target)
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


def _join_a_pass(passes: list[_Pass], index: int, loss: SumsLoss, spec: PassSpec, hard: bool) -> None:
    """Add a loss to the first pass that can serve it, or to a new one."""
    for position, (other, members) in enumerate(passes):
        first = members[0][1]
        if loss.ignore_index == first.ignore_index and loss.other_act is first.other_act:
            both = joined(other, spec, hard=hard)
            if both is not None:
                passes[position] = (both, [*members, (index, loss)])
                return
    passes.append((spec, [(index, loss)]))


def _term_names(losses: Sequence[nn.Module]) -> list[str]:
    """Name terms after their classes, `IoULoss` -> "iou"; a number tells equal ones apart."""
    names: list[str] = []
    for loss in losses:
        plain = type(loss).__name__.removesuffix("Loss").replace("IoU", "Iou")
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", plain).lower() or "loss"
        count = sum(other == name or other.startswith(f"{name}_#") for other in names)
        names.append(f"{name}_#{count + 1}" if count else name)
    return names
