"""The network of a training, from the bundle's keys; stored with the plan for evaluation and inference."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from monai_iou.planning.plan import Plan
from monai_iou.workflow.settings import exit_with_message, is_true, optional

__all__ = ["NETWORKS", "switch", "with_network"]

NETWORKS = ("unet", "segresnet", "dynunet", "attention_unet", "resenc", "mednext", "swin_unetr")
ONE_OUTPUT = ("unet", "swin_unetr")
HALVING = ("segresnet", "resenc", "mednext")  # all axes alike, as often as the patch can be halved
BUILD_NETWORK = "monai_iou.workflow.variants.build_network"  # which builds all of them
OWN = "own"  # the name of a network that is none of these

logger = logging.getLogger(__name__)


def with_network(
    plan: Plan,
    network: str | None = None,
    deep_supervision: bool | str | None = None,
    attention: bool | str | None = None,
    definition: Mapping[str, Any] | None = None,
) -> Plan:
    """Return a plan with its network, by the bundle's keys; that of a trained model has one already.

    Args:
        plan: of a training that begins, or of a trained model.
        network: one of `NETWORKS`. None selects that of a trained model; without one, attention_unet with `attention`,
            else segresnet with `deep_supervision`, else unet.
        deep_supervision: whether the network returns outputs at several scales in training. None selects that of a
            trained model, else false.
        attention: whether it returns its attention maps in training. None as for `deep_supervision`.
        definition: of the user's own network, see `own_network.definition`. None selects that of a trained model, else
            one of `NETWORKS`.

    The patch of a network that halves all axes alike is rounded up, so that few thick slices cost it no levels: that of
    swin_unetr, which halves every axis five times, to multiples of 32, and that of `HALVING` to what the plan divides
    its most halved axis by.

    Raises:
        ValueError: the keys do not go together, or are not those of the trained model. Under `python -m monai.bundle`
            the program ends with that sentence.

    Example:
        >>> from monai_iou.planning.plan import make_plan
        >>> with_network(make_plan(None, [], [32, 32, 32]), deep_supervision=True).network
        {'network': 'segresnet', 'deep_supervision': True, 'attention': False}
    """
    deep, maps = switch(deep_supervision, "deep_supervision"), switch(attention, "attention")
    given = {"network": optional(network), "deep_supervision": deep, "attention": maps}
    with exit_with_message():
        if plan.network:
            _check_trained({**given, "network_def": definition}, plan.network)
            return plan
        name = given["network"] or ("attention_unet" if maps else "segresnet" if deep else "unet")
        if definition is not None and _is_own(definition):
            _check_no_name(given["network"])
            name = OWN
        else:
            _check_network(name, bool(deep), bool(maps))
    chosen = {"network": name, "deep_supervision": bool(deep), "attention": bool(maps)}
    stored = replace(plan, network=chosen if definition is None else {**chosen, "definition": dict(definition)})
    return _with_whole_halvings(stored)


def _with_whole_halvings(plan: Plan) -> Plan:
    name = plan.network["network"]
    if name not in (*HALVING, "swin_unetr"):
        return plan
    sides = list(plan.patch_size)
    inside = [axis for axis in range(len(sides)) if axis != plan.flat_axis]
    totals = [math.prod(stride[axis] for stride in plan.strides) for axis in inside]
    factor = max(totals) if name in HALVING else 32
    for axis in inside:
        sides[axis] = -(-sides[axis] // factor) * factor
    if name == "swin_unetr" and max(sides) == 32:
        # Its coarsest level would be one voxel, of which no mean can be taken.
        sides[int(plan.flat_axis == 0)] = 64
    if tuple(sides) != plan.patch_size:
        rule = f"{factor}, and one side of at least 64" if name == "swin_unetr" else f"{factor}"
        logger.info(
            "The patch of %s becomes %s: %s takes multiples of %s, as it halves all axes alike. unet, dynunet and "
            "attention_unet halve each axis as its spacing allows.",
            plan.patch_size,
            tuple(sides),
            name,
            rule,
        )
    return replace(plan, patch_size=tuple(sides))


def switch(value: bool | str | None, key: str) -> bool | None:
    """Return the value of a switch that may be left open; null arrives as text from a command line.

    Example:
        >>> switch("null", "attention"), switch("true", "attention")
        (None, True)
    """
    return None if optional(value) is None else is_true(value, key)


def _check_trained(given: Mapping[str, Any], trained: Mapping[str, Any]) -> None:
    known = {**trained, "network_def": trained.get("definition")}
    for key, value in given.items():
        if value is not None and value != known[key]:
            found = f"{known[key]!r}, with which the model was trained, but got {value!r}"
            remedy = f"leave --{key} out, or name another model"
            if key == "network_def":  # either may be a whole program
                found = "that with which the model was trained, but got another one"
                remedy += ", or give an exported network, such as one of TorchScript, as `evaluator#network` instead"
            message = f"Expected `{key}` to be {found}: {remedy}."
            raise ValueError(message)


def _is_own(definition: Mapping[str, Any]) -> bool:
    """Whether it is more than other arguments of one of `NETWORKS`."""
    network = definition["network_def"]
    return not isinstance(network, Mapping) or network.get("_target_") != BUILD_NETWORK


def _check_no_name(name: str | None) -> None:
    if name is not None:
        message = (
            f"Expected either `network` or a `network_def` of your own, but got both, `network` as {name!r}: keep one."
        )
        raise ValueError(message)


def _check_network(name: str, deep: bool, maps: bool) -> None:
    if name not in NETWORKS:
        message = f"Expected `network` to be one of {', '.join(NETWORKS)}, but got {name!r}: choose one of these."
        raise ValueError(message)
    if maps and name != "attention_unet":
        message = (
            f"Expected `network` to be attention_unet with --attention true, but got {name!r}, which has no attention "
            "maps to supervise: leave --network out."
        )
        raise ValueError(message)
    if deep and name in ONE_OUTPUT:
        *others, last = (each for each in NETWORKS if each not in ONE_OUTPUT)
        message = (
            f"Expected `network` to be {', '.join(others)} or {last} with --deep_supervision true, but got {name!r}, "
            "which has one output: leave --network out for segresnet."
        )
        raise ValueError(message)
