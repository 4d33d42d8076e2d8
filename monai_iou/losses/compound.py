"""Weighted sums of losses that share one pass over the voxels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from monai_iou import checks
from monai_iou.distributed import fails_together, is_synchronised
from monai_iou.losses.arguments import check_factors, explains_arguments
from monai_iou.losses.nested_instances import takers_of_regions, without_regions
from monai_iou.losses.pass_loss import PassLoss, call_loss
from monai_iou.losses.terms import weighted_sum
from monai_iou.voxels.partly_labelled import Labelled, labelled_pairs
from monai_iou.voxels.passes import Reading, run_passes


class CompoundLoss(_Loss):
    r"""Weighted sum of losses; all terms that are functions of voxel sums share one pass over the voxels.

    .. math:: \sum_k w_k L_k(\mathrm{input}, \mathrm{target})

    A `LovaszSoftmaxLoss` with `bins` shares the pass as well. Terms that cannot share a pass (because of different
    activations, values of `ignore_index`, focal exponents or powers) and other losses, such as MONAI's, make passes of
    their own. See :class:`IoULoss` for the shapes.

    Args:
        losses: the terms: modules that map (input, target) to scalars, or all of them to tensors of the same shape.
        weights: one factor per term; 1 by default.

    Attributes:
        last_terms: the values of the terms at the last call by name, detached and not weighted, for logging.

    Raises:
        TypeError: if `losses` or `weights` is not a list, a term is not a module, or a factor is not a number.
        ValueError: if there are no terms, or the number of weights differs from that of the terms; when called, if the
            terms differ in shape.

    Example:
        >>> import torch
        >>> from monai_iou import CompoundLoss, IoULoss, WeightedCrossEntropyLoss
        >>> loss = CompoundLoss([IoULoss(softmax=True), WeightedCrossEntropyLoss()], weights=[1.0, 0.5])
        >>> value = loss(torch.zeros(1, 2, 4, 4), torch.ones(1, 1, 4, 4))
        >>> {name: round(term.item(), 4) for name, term in loss.last_terms.items()}
        {'iou': 0.75, 'weighted_cross_entropy': 0.6931}
    """

    @explains_arguments
    def __init__(self, losses: Sequence[nn.Module], weights: Sequence[float] | Tensor | None = None) -> None:
        super().__init__()
        losses = checks.check_list("losses", losses, "list the terms of the sum, such as [IoULoss(), DiceLoss()]")
        if not losses:
            message = "Expected `losses` to hold at least one loss, but got none: list the terms of the sum."
            raise ValueError(message)
        for loss in losses:
            if not isinstance(loss, nn.Module):
                message = (
                    f"Expected every one of `losses` to be a torch module, but got {type(loss).__name__}: pass losses "
                    "such as IoULoss()."
                )
                raise TypeError(message)
        factors = check_factors(weights, of="loss")
        self.weights = [1.0] * len(losses) if factors is None else factors
        if len(self.weights) != len(losses):
            message = (
                f"Expected `weights` to hold one factor per loss ({len(losses)}), but got {len(self.weights)}: give "
                "as many factors as losses, or leave `weights` out for a factor of 1 each."
            )
            raise ValueError(message)
        self.losses = nn.ModuleList(losses)
        self.names = _term_names(losses)
        self.last_terms: dict[str, Tensor] = {}

    def terms(self, input: Tensor, target: Tensor, labelled: Labelled = None) -> dict[str, Tensor]:
        """Return the value of every term by name, not weighted, with gradients.

        Args:
            input: (B, C, *S).
            target: (B, 1, *S) or (B, C, *S). Only terms that contain an InstanceIoULoss get precomputed regions.
            labelled: (B, C) bool; see :meth:`IoULoss.forward`.

        Raises:
            TypeError: as the terms do.
            ValueError: as the terms do, or if the terms differ in shape.
        """
        pairs, label = None, target
        values: dict[int, Tensor] = {}
        readings: dict[int, Reading] = {}
        synchronised = [is_synchronised(loss) for loss in self.losses]
        with fails_together(any(synchronised), input):
            label = _label_of(self, input, target)
            for members in self._groups():
                checks.check_input(input)
                checks.check_target(input, label)
                for loss in members.values():
                    checks.check_onehot_request(input, label, loss.to_onehot_y)
                specs = [loss.pass_spec(input.shape[1]) for loss in members.values()]
                # One without an activation, if there is one, as it looks whether the input is logits.
                without = [loss for loss in members.values() if not (loss.sigmoid or loss.softmax)]
                first = (without or list(members.values()))[0]
                pairs = labelled_pairs(input, label, labelled)
                shared = run_passes(first.activated(input, label), label, specs, first.ignore_index, pairs)
                readings |= dict(zip(members, shared, strict=True))
        known = labelled if pairs is None else pairs
        targets = [target if label is target or takers_of_regions(loss) else label for loss in self.losses]
        alone = [index for index, synced in enumerate(synchronised) if not (synced or index in readings)]
        # Such as MONAI's: on a CPU, an error of theirs on one rank would leave the others waiting for its sums.
        with fails_together(bool(alone) and any(synchronised), input):
            for index in alone:
                values[index] = call_loss(self.losses[index], input, targets[index], known)
        for index, term in enumerate(self.losses):
            if index in readings:
                assert isinstance(term, PassLoss)
                values[index] = term.score_reading(readings[index], input.ndim - 2)
            elif index not in values:
                values[index] = call_loss(term, input, targets[index], known)
        terms = {name: values[index] for index, name in enumerate(self.names)}
        _check_shapes(terms)
        return terms

    def _groups(self) -> list[dict[int, PassLoss]]:
        """Group the terms that are computed from passes by `ignore_index` and `other_act`; keys are positions."""
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
        """Return the weighted sum; see :meth:`terms` for arguments and errors."""
        terms = self.terms(input, target, labelled)
        self.last_terms = {name: term.detach() for name, term in terms.items()}
        return weighted_sum(self.weights, list(terms.values()))


def _label_of(loss: nn.Module, input: Any, target: Tensor) -> Tensor:
    """Return the target without its precomputed regions, which the channels of the (finest) input tell from classes."""
    while isinstance(input, (list, tuple)) and input:
        input = input[0]
    if not (isinstance(input, Tensor) and isinstance(target, Tensor) and input.ndim > 1):
        return target  # the terms refuse it
    stacked = input.ndim == target.ndim + 1  # as DynUNet stacks its outputs
    if target.is_complex() or target.shape[2:] != input.shape[3 if stacked else 2 :]:
        return target  # likewise
    return without_regions(loss, target, input.shape[2 if stacked else 1])


def _check_shapes(terms: dict[str, Tensor]) -> None:
    """Raise a ValueError if adding the terms would broadcast one over another."""
    shapes = {name: tuple(term.shape) for name, term in terms.items()}
    if len(set(shapes.values())) > 1 and any(term.numel() != 1 for term in terms.values()):
        listed = ", ".join(f"{shape} of {name}" for name, shape in shapes.items())
        message = (
            f'Expected `losses` to give terms of one shape, but got {listed}: set reduction="mean" or "sum" in all.'
        )
        raise ValueError(message)


def _term_names(losses: Sequence[nn.Module]) -> list[str]:
    """Name the terms after their classes, such as "iou" for `IoULoss`; repeated names are numbered."""
    names: list[str] = []
    for loss in losses:
        plain = type(loss).__name__.removesuffix("Loss").replace("IoU", "Iou")
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", plain).lower() or "loss"
        count = sum(other == name or other.startswith(f"{name}_#") for other in names)
        names.append(f"{name}_#{count + 1}" if count else name)
    return names
