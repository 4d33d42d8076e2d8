"""The bundle's network and loss from its keys: `network`, `deep_supervision`, `attention`, `instance`.

The keys are independent of each other: every combination trains, or is refused in one sentence before anything is read.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from monai_iou.components import REGIONS
from monai_iou.losses.attention import AttentionSupervisionLoss, ContextAttentionLoss
from monai_iou.losses.instance import InstanceIoULoss
from monai_iou.losses.iou_ce import IoUCELoss
from monai_iou.losses.multi_scale import MultiScaleLoss, needs_hard_labels
from monai_iou.planning.loss_rules import CROSS_ENTROPY_WEIGHT
from monai_iou.planning.plan import Plan
from monai_iou.workflow.architecture import NETWORKS, switch, with_network
from monai_iou.workflow.flat import SliceNetwork
from monai_iou.workflow.labelled import PartlyLabelledLoss
from monai_iou.workflow.named_networks import named_network
from monai_iou.workflow.own_network import build_definition
from monai_iou.workflow.settings import exit_with_message, optional

__all__ = ["NETWORKS", "build_loss", "build_network", "check_cells", "default_loss", "without_cells"]

DEFAULT_REGIONS, DEFAULT_CONTEXT_MM = "voronoi", 5.0

logger = logging.getLogger(__name__)


def build_network(
    plan: Plan,
    network: str | None = None,
    deep_supervision: bool | str | None = None,
    attention: bool | str | None = None,
    **options: Any,
) -> nn.Module:
    """Return the network of a plan: of the user's own definition, if it holds one, else of MONAI's networks.

    Args:
        plan: its channels, strides and patch.
        network: see `with_network`.
        deep_supervision: see `with_network`.
        attention: see `with_network`.
        options: further arguments of MONAI's network, in the place of those that follow from the plan.

    Raises:
        ValueError: the keys do not go together. Under `python -m monai.bundle` that one sentence ends the program.

    Example:
        >>> import torch
        >>> from monai_iou.planning.plan import make_plan
        >>> from monai_iou.workflow.variants import build_network
        >>> network = build_network(make_plan(None, [], [32, 32, 32], base_channels=4), deep_supervision=True)
        >>> [tuple(output.shape) for output in network(torch.zeros(1, 1, 32, 32, 32))]
        [(1, 2, 32, 32, 32), (1, 2, 16, 16, 16)]
    """
    plan = with_network(plan, network, deep_supervision, attention)
    if "definition" in plan.network and not options:
        return build_definition(plan)
    built = named_network(plan, options)
    return built if plan.flat_axis is None else SliceNetwork(built, plan.flat_axis)


def default_loss(**options: Any) -> IoUCELoss:
    """Return the loss of the bundle: IoUCELoss with a cross-entropy of weight 1/3.

    A function and not `lambda_ce` in the config, so that `--loss::_target_ monai_iou.IoULoss` changes the loss alone.

    Args:
        options: arguments of IoUCELoss; `lambda_ce` is 1/3 by default, an opinion: the study `compound` of
            docs/results.md found no weight that is better.

    Raises:
        TypeError, ValueError: as `IoUCELoss`.

    Example:
        >>> from monai_iou.workflow.variants import default_loss
        >>> [round(weight, 2) for weight in default_loss(softmax=True).weights]
        [1.0, 0.33]
    """
    return IoUCELoss(**{"lambda_ce": CROSS_ENTROPY_WEIGHT, **options})


def build_loss(
    loss: nn.Module,
    plan: Plan,
    instance: bool | str | None = None,
    deep_supervision: bool | str | None = False,
    attention: bool | str | None = False,
    downsample: str | None = None,
    regions: str = DEFAULT_REGIONS,
    context_mm: float = DEFAULT_CONTEXT_MM,
) -> nn.Module:
    """Return the loss that training minimises: the bundle's `loss` at every scale, in every cell, beside attention.

    Args:
        loss: the bundle's `loss`.
        plan: its voxel size, also for an InstanceIoULoss or ContextAttentionLoss in `loss` that has no `spacing`.
        instance: true adds the mean of IoU over the lesions' cells, with `loss` as the global term. A `loss` that
            holds an InstanceIoULoss stays as it is: there, true only lets the bundle's train.json find the cells of
            whole volumes once (`component_regions`) instead of those of each patch. false and None leave `loss` as it
            is: what false means in the bundle's train.json, `without_cells` does before.
        deep_supervision: take the weighted sum over the network's outputs.
        attention: supervise the network's attention maps too.
        downsample: see `MultiScaleLoss`; None for "area", or "max" where a Lovasz loss needs hard labels.
        regions: see `InstanceIoULoss`; one that `loss` holds has its own.
        context_mm: see `ContextAttentionLoss`.

    Raises:
        ValueError: `regions`, `downsample` or `context_mm` is out of its range or without effect, or `loss` does not
            fit the labels. Under `python -m monai.bundle` that one sentence ends the program.

    Example:
        >>> from monai_iou import IoUCELoss
        >>> from monai_iou.planning.plan import make_plan
        >>> from monai_iou.workflow.variants import build_loss
        >>> plan = make_plan(None, [], [32, 32, 32], base_channels=4)
        >>> loss = build_loss(IoUCELoss(softmax=True), plan, instance=True, deep_supervision=True)
        >>> type(loss).__name__, type(loss.loss).__name__
        ('MultiScaleLoss', 'InstanceIoULoss')
    """
    with exit_with_message():
        cells, scales, maps = (
            switch(value, key)
            for key, value in (("instance", instance), ("deep_supervision", deep_supervision), ("attention", attention))
        )
        _check_fits(loss, plan)
        own = [part for part in loss.modules() if isinstance(part, InstanceIoULoss)]
        _check_regions(regions, own)
        check_cells(regions)
        _check_idle("regions", regions, DEFAULT_REGIONS, "instance", is_used=bool(own or cells))
        _check_idle("downsample", optional(downsample), None, "deep_supervision", is_used=bool(scales))
        _check_idle("context_mm", context_mm, DEFAULT_CONTEXT_MM, "attention", is_used=bool(maps))
        _check_own("downsample", optional(downsample), None, loss, MultiScaleLoss)
        _check_own("context_mm", context_mm, DEFAULT_CONTEXT_MM, loss, AttentionSupervisionLoss)
        _measure_in_mm(loss, plan)
        if cells and not own:
            loss = _with_cells(loss, plan, regions)
        if scales and not isinstance(loss, MultiScaleLoss):
            how = optional(downsample) or ("max" if needs_hard_labels(loss) else "area")
            loss = MultiScaleLoss(loss, downsample=how)
        if maps and not isinstance(loss, AttentionSupervisionLoss):
            supervised = ContextAttentionLoss(
                context_mm, tuple(plan.pixdim), ignore_index=plan.ignore_index, batch=True, sync_batch=True
            )
            loss = AttentionSupervisionLoss(loss, supervised, lambda_attention=0.5)
        if plan.partly_labelled and any(isinstance(part, AttentionSupervisionLoss) for part in loss.modules()):
            message = (
                "Expected every class to be annotated in every case to supervise attention maps, but got cases without "
                "some (`labelled` in dataset.json): leave --attention out, or these cases."
            )
            raise ValueError(message)
        return PartlyLabelledLoss(loss) if plan.partly_labelled else loss


def without_cells(loss: nn.Module, instance: bool | str | None = None) -> nn.Module:
    """Return a loss without its cells if `instance` is false: of an InstanceIoULoss, as plans have it, the global term.

    A function of its own and not a part of `build_loss`, because in copies of the bundle whose train.json has no call
    of it, `instance` is false by default and leaves `loss` as it is.

    Args:
        loss: the bundle's `loss`.
        instance: the bundle's key; true and None return `loss`.

    Raises:
        ValueError: `instance` is false, and the cells are only a part of `loss` or all of it. Under
            `python -m monai.bundle` that one sentence ends the program.

    Example:
        >>> from monai_iou import InstanceIoULoss, IoUCELoss
        >>> from monai_iou.workflow.variants import without_cells
        >>> planned = InstanceIoULoss(softmax=True, global_loss=IoUCELoss(softmax=True))
        >>> [type(without_cells(planned, instance)).__name__ for instance in (None, True, False)]
        ['InstanceIoULoss', 'InstanceIoULoss', 'IoUCELoss']
    """
    with exit_with_message():
        if switch(instance, "instance") is not False or not _has_cells(loss):
            return loss
        if isinstance(loss, InstanceIoULoss) and loss.lambda_global:
            alone = loss.region_loss if loss.global_loss is None else loss.global_loss
            if not _has_cells(alone):
                logger.warning(
                    "`instance` is false, so that the loss is %s, the global term of the InstanceIoULoss in `loss`.",
                    type(alone).__name__,
                )
                return alone
        message = (
            "Expected `instance` to be null or true for a `loss` that holds an InstanceIoULoss but is not one with a "
            f"global term, but got false with {type(loss).__name__}: leave --instance out, or give another `loss`."
        )
        raise ValueError(message)


def _has_cells(loss: nn.Module) -> bool:
    return any(isinstance(part, InstanceIoULoss) for part in loss.modules())


def _with_cells(loss: nn.Module, plan: Plan, regions: str) -> InstanceIoULoss:
    return InstanceIoULoss(
        regions,
        softmax=plan.exclusive,
        sigmoid=not plan.exclusive,
        soft_label=plan.soft,
        ignore_index=plan.ignore_index,
        include_background=False,
        global_loss=loss,
        spacing=tuple(plan.pixdim),
    )


def _check_idle(key: str, value: object, default: object, needs: str, *, is_used: bool) -> None:
    """Raise ValueError if a key is given although nothing reads it."""
    if not is_used and value != default:
        message = (
            f"Expected `{key}` to be left out without --{needs} true, but got {value!r}: add --{needs} true, or "
            f"leave --{key} out."
        )
        raise ValueError(message)


def _check_own(key: str, value: object, default: object, loss: nn.Module, kind: type[nn.Module]) -> None:
    """Raise ValueError if a key is given for what a loss of the user's does in a way of its own."""
    if value != default and isinstance(loss, kind):
        a_kind = f"{'an' if kind.__name__[0] in 'AEIO' else 'a'} {kind.__name__}"
        message = (
            f"Expected `{key}` to be left out, because `loss` is already {a_kind}, but got {value!r}: leave --{key} "
            "out, and change that loss in a config."
        )
        raise ValueError(message)


def _measure_in_mm(loss: nn.Module, plan: Plan) -> None:
    """Give the parts of a loss that measure distances the voxel size, as far as they have none of their own."""
    for part in loss.modules():
        if isinstance(part, (InstanceIoULoss, ContextAttentionLoss)) and part.spacing is None:
            part.spacing = tuple(plan.pixdim)


def check_cells(regions: object) -> None:
    """Raise ValueError if the key `regions` names no cells; an expression of MONAI's is for whoever resolves it."""
    if regions not in REGIONS and not str(regions).startswith(("$", "@", "%")):
        message = (
            f"Expected `regions` to be {' or '.join(REGIONS)}, the cells of lesions, but got {regions!r}: choose one; "
            "unions of labels are named in `regions` of dataset.json."
        )
        raise ValueError(message)


def _check_regions(regions: str, own: Sequence[InstanceIoULoss]) -> None:
    """Raise ValueError if the key `regions` asks for other cells than those of a loss that has its own."""
    other = next((part.regions for part in own if part.regions != regions), None)
    if other is not None and regions != DEFAULT_REGIONS:
        message = (
            f"Expected `regions` to be {other!r}, as the InstanceIoULoss in `loss` has its own `regions`, but got "
            f"{regions!r}: leave --regions out, and change `regions` in a config's `loss`."
        )
        raise ValueError(message)


def _check_fits(loss: nn.Module, plan: Plan) -> None:
    """Raise ValueError if the loss contradicts the labels: it would train without a sign of it."""
    own = [part for part in loss.modules() if not isinstance(part, (nn.CrossEntropyLoss, nn.NLLLoss))]
    if not plan.exclusive and any(getattr(part, "softmax", False) is True for part in own):
        message = (
            f"Expected `loss` to have sigmoid=True for regions that overlap, but got softmax=True in "
            f'{type(loss).__name__}: write "sigmoid": "$not @plan.exclusive" in it, or leave --loss out.'
        )
        raise ValueError(message)
    if plan.exclusive and all(map(_leaves_background_out, (part for part in loss.modules() if not [*part.children()]))):
        message = (
            f"Expected `loss` to train the background too, because the largest output decides between classes that "
            f"exclude each other, but got sigmoid=True and include_background=False in {type(loss).__name__}: write "
            '"softmax": "$@plan.exclusive", "sigmoid": "$not @plan.exclusive" in it, or leave --loss out.'
        )
        raise ValueError(message)
    ignoring = [part for part in own if hasattr(part, "ignore_index")]
    indices = [getattr(part, "ignore_index", None) for part in ignoring] or [None]
    if plan.ignore_index is not None and any(index != plan.ignore_index for index in indices):
        unfit = next(index for index in indices if index != plan.ignore_index)
        message = (
            f"Expected `loss` to have ignore_index={plan.ignore_index}, the number of the value {plan.ignore} that "
            f"dataset.json ignores, but got {unfit} in {type(loss).__name__}: write "
            '"ignore_index": "$@plan.ignore_index" in it, or leave --loss out.'
        )
        raise ValueError(message)


def _leaves_background_out(part: nn.Module) -> bool:
    """Whether the background's output has no part in a loss: with a softmax it would have one."""
    return getattr(part, "sigmoid", False) is True and getattr(part, "include_background", True) is False
