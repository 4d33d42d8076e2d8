"""The network of a training, from the bundle's keys; stored with the plan for evaluation and inference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from monai_iou.planning.plan import Plan
from monai_iou.workflow.settings import exit_with_message, is_true, optional

__all__ = ["NETWORKS", "switch", "with_network"]

NETWORKS = ("unet", "segresnet", "dynunet", "attention_unet")


def with_network(
    plan: Plan,
    network: str | None = None,
    deep_supervision: bool | str | None = None,
    attention: bool | str | None = None,
) -> Plan:
    """Return a plan with its network, by the bundle's keys; that of a trained model has one already.

    Args:
        plan: of a training that begins, or of a trained model.
        network: one of `NETWORKS`. None selects that of a trained model; without one, attention_unet with `attention`,
            else segresnet with `deep_supervision`, else unet.
        deep_supervision: whether the network returns outputs at several scales in training. None selects that of a
            trained model, else false.
        attention: whether it returns its attention maps in training. None as for `deep_supervision`.

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
            _check_trained(given, plan.network)
            return plan
        name = given["network"] or ("attention_unet" if maps else "segresnet" if deep else "unet")
        _check_network(name, bool(deep), bool(maps))
    return replace(plan, network={"network": name, "deep_supervision": bool(deep), "attention": bool(maps)})


def switch(value: bool | str | None, key: str) -> bool | None:
    """Return the value of a switch that may be left open; null arrives as text from a command line.

    Example:
        >>> switch("null", "attention"), switch("true", "attention")
        (None, True)
    """
    return None if optional(value) is None else is_true(value, key)


def _check_trained(given: Mapping[str, Any], trained: Mapping[str, Any]) -> None:
    for key, value in given.items():
        if value is not None and value != trained[key]:
            message = (
                f"Expected `{key}` to be {trained[key]!r}, with which the model was trained, but got {value!r}: leave "
                f"--{key} out, or name another model."
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
    if deep and name == "unet":
        message = (
            "Expected `network` to be segresnet, dynunet or attention_unet with --deep_supervision true, but got "
            "'unet', which has one output: leave --network out for segresnet."
        )
        raise ValueError(message)
