"""Weighted sums of losses that share one pass over the voxels."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss
from typing_extensions import Unpack

from monai_iou import checks
from monai_iou.distributed import fails_together
from monai_iou.losses.arguments import with_region_arguments
from monai_iou.losses.base import RegionOptions, SumsLoss
from monai_iou.losses.cross_entropy import WeightedCrossEntropyLoss
from monai_iou.losses.iou import IoULoss
from monai_iou.losses.lovasz import LovaszSoftmaxLoss
from monai_iou.voxels.reference import PassSpec, sum_dtype
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
                    statistics.append((VoxelSums.from_stacked(rows.squeeze(-1)), members))
        for position, (index, other) in lovasz.items():  # outside, because it may wait for the ranks
            spec, members = passes[position]
            values[index], rows = other.with_sums(input, target, spec)
            statistics.append((VoxelSums.from_stacked(rows.to(sum_dtype(input))), members))
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
                usable = first.other_act is None and loss.can_give(spec, first.ignore_index, input.shape[1])
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


class IoUCELoss(CompoundLoss):
    r"""IoU loss plus cross-entropy in one pass: lambda_iou * IoULoss + lambda_ce * cross-entropy.

    Args:
        lambda_iou: factor of the IoU loss.
        lambda_ce: factor of the cross-entropy.
        gamma: focal exponent of the cross-entropy, 0 for none.
        label_smoothing: label smoothing of the cross-entropy.
        weight: one number, or one a class including the background; used by both terms (the IoU term leaves out the
            background's with `include_background=False`).
        **options: the arguments of :class:`IoULoss`. Class 0 always takes part in the cross-entropy. Without an
            activation the input holds probabilities for both terms.

    Raises:
        TypeError: as the terms do.
        ValueError: as the terms do.

    Example:
        >>> import torch
        >>> from monai_iou import IoUCELoss
        >>> loss = IoUCELoss(softmax=True, include_background=False)
        >>> round(loss(torch.zeros(1, 2, 4, 4), torch.ones(1, 1, 4, 4)).item(), 4)
        1.1931
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        squared_pred: bool = False,
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        weight: Sequence[float] | float | Tensor | None = None,
        soft_label: bool = False,
        ignore_index: int | None = None,
        *,
        power: float = 1.0,
        empty: str = "smooth",
        sync_batch: bool = False,
        lambda_iou: float = 1.0,
        lambda_ce: float = 1.0,
        gamma: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> None:
        if other_act is not None:
            message = (
                "Expected `other_act` to be None with a cross-entropy, but got a function: use softmax or sigmoid."
            )
            raise ValueError(message)
        if getattr(reduction, "value", reduction) == "none" and (batch or not include_background):
            message = (
                "Expected `reduction` to be 'mean' or 'sum' with batch=True or include_background=False, but got "
                "'none': the cross-entropy has a value for every image and class, the IoU term would not."
            )
            raise ValueError(message)
        weight = checks.as_weight(weight)
        region = IoULoss(
            include_background, to_onehot_y, sigmoid, softmax, None, squared_pred, reduction, smooth_nr, smooth_dr,
            batch, weight if weight is None or weight.ndim == 0 or include_background else weight[1:],
            soft_label, ignore_index, power=power, empty=empty, sync_batch=sync_batch,
        )  # fmt: skip
        entropy = WeightedCrossEntropyLoss(
            weight, gamma, label_smoothing, True, to_onehot_y, sigmoid, softmax,
            None, reduction, ignore_index, sync_batch=sync_batch,
        )  # fmt: skip
        super().__init__([region, entropy], [lambda_iou, lambda_ce])
        self.names = ["iou", "focal" if gamma else "cross_entropy"]


class IoUFocalLoss(IoUCELoss):
    """IoU loss plus focal loss in one pass.

    Args:
        gamma: focal exponent (Lin et al. 2017).
        *args: the arguments of :class:`IoULoss`, in its order.
        **options: the same, by name. `weight` is as in :class:`IoUCELoss`.
        lambda_iou: factor of the IoU loss.
        lambda_focal: factor of the focal loss.
        label_smoothing: label smoothing of the focal loss.

    Raises:
        TypeError: as the terms do.
        ValueError: as the terms do.

    Example:
        >>> import torch
        >>> from monai_iou import IoUFocalLoss
        >>> loss = IoUFocalLoss(softmax=True, lambda_focal=0.5)
        >>> round(loss(torch.zeros(1, 2, 4, 4), torch.ones(1, 1, 4, 4)).item(), 4)
        0.8366
    """

    @with_region_arguments
    def __init__(
        self,
        gamma: float = 2.0,
        *args: Any,
        lambda_iou: float = 1.0,
        lambda_focal: float = 1.0,
        label_smoothing: float = 0.0,
        **options: Unpack[RegionOptions],
    ) -> None:
        super().__init__(
            *args,
            gamma=gamma,
            lambda_iou=lambda_iou,
            lambda_ce=lambda_focal,
            label_smoothing=label_smoothing,
            **options,
        )
