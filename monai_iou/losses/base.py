"""The base class of the region losses: their options, and the reduction of per-class terms."""

from __future__ import annotations

import functools
import inspect
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypedDict, TypeVar, cast

import torch
from torch import Tensor

from monai_iou import checks, scores
from monai_iou.losses.arguments import bound_arguments, explains_arguments
from monai_iou.losses.pass_loss import SumsLoss
from monai_iou.losses.weights import as_weight, scored_weights
from monai_iou.voxels.spec import PassSpec, checked_spec
from monai_iou.voxels.sums import VoxelSums

_MIN_VOLUME = 1e-30  # the inverse of a smaller volume would overflow in the gradient


class RegionOptions(TypedDict, total=False):
    """The arguments that every region loss accepts, with MONAI's names and defaults; see :class:`IoULoss`."""

    include_background: bool
    to_onehot_y: bool
    sigmoid: bool
    softmax: bool
    other_act: Callable[[Tensor], Tensor] | None
    squared_pred: bool
    reduction: str
    smooth_nr: float
    smooth_dr: float
    batch: bool
    weight: Sequence[float] | float | Tensor | None
    soft_label: bool
    ignore_index: int | None
    power: float
    empty: str
    average: str
    sync_batch: bool


def check_average(average: str, reduction: str) -> None:
    """Raise ValueError for an `average` without a mean."""
    if average != "pairs" and reduction != "mean":
        message = (
            f"Expected `reduction` to be 'mean' with average={average!r}, but got {reduction!r}: `average` "
            "says how a mean is taken, so leave one of the two at its default."
        )
        raise ValueError(message)


class RegionLoss(SumsLoss):
    """A loss with one term per image and class; it handles the background, weights, absent classes and reduction.

    A subclass implements :meth:`class_terms`. For the arguments and the errors see :class:`IoULoss`.
    """

    _known_spec: tuple[tuple[Any, ...], PassSpec] | None = None  # the last one, and the options that it is made of

    @explains_arguments
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
        average: str = "pairs",
        sync_batch: bool = False,
    ) -> None:
        super().__init__(
            to_onehot_y=to_onehot_y,
            sigmoid=sigmoid,
            softmax=softmax,
            other_act=other_act,
            reduction=reduction,
            ignore_index=ignore_index,
            sync_batch=sync_batch,
        )
        checks.check_choice("average", average, scores.AVERAGES)
        check_average(average, self.reduction)
        if sync_batch and not batch:
            message = (
                "Expected `batch` to be True with sync_batch=True, but got False: set batch=True, because summing over "
                "ranks joins their batches."
            )
            raise ValueError(message)
        self.include_background = include_background
        self.power = power
        if squared_pred:
            self.squared_pred = True
        self.smooth_nr = checks.check_positive("smooth_nr", smooth_nr, allow_zero=True)
        self.smooth_dr = checks.check_positive("smooth_dr", smooth_dr, allow_zero=True)
        self.batch = batch
        self.soft_label = soft_label
        self.empty = empty
        self.average = average
        self.power = self._checked_spec(None).power
        self.class_weight: Tensor | None
        self.register_buffer("class_weight", as_weight(weight))

    @property
    def squared_pred(self) -> bool:
        """Whether `power` is 2; setting it sets `power`."""
        return self.power == 2

    @squared_pred.setter
    def squared_pred(self, squared: bool) -> None:
        if squared and self.power not in (1, 2):
            message = (
                f"Expected `power` to be left at 1 with squared_pred=True, but got {self.power}: set `power` alone, "
                "because squared_pred=True means power=2."
            )
            raise ValueError(message)
        if squared or self.squared_pred:
            self.power = 2.0 if squared else 1.0

    @property
    def has_soft_form(self) -> bool:
        """Whether `soft_label` can be set: not with a power strictly between 1 and 2."""
        return self.power in (1, 2)

    def _checked_spec(self, activation: str | None) -> PassSpec:
        """Return what the options need from the pass; they are checked here, as they may have been changed."""
        asked, traced = (activation, self.soft_label, self.power, self.empty), torch.compiler.is_compiling()
        known = None if traced else self._known_spec
        if known is not None and known[0] == asked:
            return known[1]
        # With q = 2 the product form already is 0 only at p = y, because U - I = sum (p - y)^2.
        overlap = "min_max" if self.soft_label and self.power != 2 else "product"
        checks.check_choice("empty", self.empty, checks.EMPTY_RULES)
        spec = checked_spec(activation, overlap, self.power, False, 0.0, 0.0, confidence=self.empty == "suppress")
        if not traced:
            self._known_spec = asked, spec
        return spec

    def pass_spec(self, channels: int) -> PassSpec:
        """Return what the loss needs from the voxel pass over an input with `channels` channels."""
        if channels == 1 and not self.include_background:
            checks.warn_ignored("include_background=False", stacklevel=4)
        return self._checked_spec(self.activation(channels))

    @abstractmethod
    def class_terms(self, sums: VoxelSums) -> Tensor:
        """Return the loss of each image and class, (B, C), before the rule for absent classes is applied."""

    def score(self, sums: VoxelSums, space: int) -> Tensor:
        """Return the loss from voxel sums of shape (B, C)."""
        if not self.include_background and sums.target.shape[1] > 1:
            sums = sums.without_background()
        sums = self.pooled(sums, self.batch)
        terms, counted = self.with_empty_rule(self.class_terms(sums), sums)
        labelled = sums.labelled
        if labelled is not None:
            terms, counted = self.only_labelled(terms, counted, labelled)
        if self.class_weight is not None and terms.shape[1] > 1:
            terms = terms * scored_weights(self.class_weight, terms, terms.shape[1], self.include_background)
        return self.reduced(terms, counted, space)

    def with_empty_rule(self, terms: Tensor, sums: VoxelSums) -> tuple[Tensor, Tensor | None]:
        """Apply the rule `empty` to the terms of absent classes; also return which terms count (None means all)."""
        if self.empty == "smooth":
            return terms, None
        if self.empty == "skip":
            return torch.where(sums.present | terms.isnan(), terms, 0), sums.present
        return torch.where(sums.present, terms, suppression(sums, self.power)), None

    def only_labelled(self, terms: Tensor, counted: Tensor | None, labelled: Tensor) -> tuple[Tensor, Tensor]:
        """Set the terms of classes that were not annotated to 0; also return which terms count."""
        if terms.shape[1] != labelled.shape[1]:
            labelled = labelled.any(1, keepdim=True)  # all classes of an image share one term
        return torch.where(labelled, terms, 0), labelled if counted is None else counted & labelled

    def reduced(self, terms: Tensor, counted: Tensor | None, space: int) -> Tensor:
        """Apply `reduction` to terms of shape (B, C), or (1, C) with batch=True."""
        if self.reduction == "sum":
            return terms.sum()
        if self.reduction == "none":
            shape = terms.shape[1:] if self.batch else terms.shape
            return terms.reshape(*shape, *[1] * space)
        return scores.mean_of_terms(terms, counted, self.average)


def suppression(sums: VoxelSums, power: float) -> Tensor:
    """Return the term of an absent class, (B, C): the mean probability weighted by itself, sum p^(q+1) / sum p^q.

    The term is 0 when nothing is predicted, and at most 1. With the denominator held constant, its derivative with
    respect to one probability is p^q / sum p^q, which never exceeds 1: confident false positives are pushed down first,
    and the gradient does not jump near p = 0. With q = 1, value and gradient are those of equation (3) of BiCC
    ("detached", https://github.com/TIO-IKIM/BiCC-Loss).

    Args:
        sums: voxel sums of shape (B, C), whose `confidence` is sum p^(q+1).
        power: the exponent q.
    """
    volume = sums.prediction.detach().clamp_min(_MIN_VOLUME)
    share = sums.confidence / volume
    return (share + power * share.detach()) / (power + 1)


_Init = TypeVar("_Init", bound=Callable[..., None])
_KINDS = inspect.Parameter


def with_region_arguments(init: _Init) -> _Init:
    """Give a constructor `(self, own, *args, own_by_keyword, **options)` the signature of a region loss.

    The new signature lists the constructor's own positional arguments, then the arguments of `IoULoss` in MONAI's
    order, and last the keyword-only arguments of both. If the constructor has no `*args`, the arguments of `IoULoss`
    are keyword-only as well. The constructor receives every argument by name: those of `IoULoss`, if they were given,
    in `options`. A call that does not fit raises a TypeError that names the class.
    """
    own = list(inspect.signature(init).parameters.values())
    shared = list(inspect.signature(RegionLoss.__init__).parameters.values())[1:]
    if not any(parameter.kind is _KINDS.VAR_POSITIONAL for parameter in own):
        shared = [parameter.replace(kind=_KINDS.KEYWORD_ONLY) for parameter in shared]
    merged = [
        *[parameter for parameter in own if parameter.kind is _KINDS.POSITIONAL_OR_KEYWORD],
        *shared,
        *[parameter for parameter in own if parameter.kind is _KINDS.KEYWORD_ONLY],
    ]
    signature = inspect.Signature(merged, return_annotation=None)

    @functools.wraps(init)
    def construct(self: Any, *args: Any, **options: Any) -> None:
        init(self, **bound_arguments(signature, self, args, options))

    construct.__signature__ = signature  # type: ignore[attr-defined]
    return cast("_Init", construct)
