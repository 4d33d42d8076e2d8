"""The form of a loss that accepts class fractions: a copy that follows the options and weights of the loss itself."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from monai_iou.losses.base import RegionLoss

_PLAIN = (bool, int, float, str, type(None), Tensor)
_ITS_OWN = {*vars(nn.Module()), "soft_label", "to_onehot_y"} - {"training"}  # what a copy does not take over


def form_for_fractions(loss: nn.Module, made: nn.Module | None = None) -> nn.Module:
    """Return a copy of a loss that accepts class fractions: with soft-label forms, and without `to_onehot_y`.

    The copy shares its parameters and buffers with the loss, also after `loss.to(...)`. A copy, and not options set on
    the loss for a while, because other threads may use the loss meanwhile.

    Args:
        loss: the loss, which stays as it is.
        made: the copy that an earlier call returned. It takes over every option of the loss that is a number, text, a
            tensor, a function or a list of these, whoever changed it. If the loss contains other modules by now, or
            `made` is the loss itself, a new copy is made.
    """
    parts = list(loss.modules())
    twins = [] if made is None or made is loss else list(made.modules())
    if [type(part) for part in parts] != [type(twin) for twin in twins]:
        made = copy.deepcopy(loss)
        twins = list(made.modules())
    assert made is not None
    traced = torch.compiler.is_compiling()  # which compares no lists by `is`
    for part, twin in zip(parts, twins, strict=True):
        if "_orig_mod" in part._modules:
            continue  # of torch.compile: it shows the options of the module in it, the next part
        if twin._buffers is not part._buffers:
            twin._buffers = part._buffers
        if twin._parameters is not part._parameters:
            twin._parameters = part._parameters
        options, known = vars(part), vars(twin)
        for name, value in options.items():
            if name in _ITS_OWN or (not traced and known.get(name) is value):
                continue
            if _is_option(name, value):
                known[name] = value
        # A power strictly between 1 and 2 has no soft-label form.
        soft = part.soft_label or part.power in (1, 2) if isinstance(part, RegionLoss) else True
        for name, wanted in (("soft_label", soft), ("to_onehot_y", False)):
            if (name in known or hasattr(type(twin), name)) and getattr(twin, name) is not wanted:
                setattr(twin, name, wanted)
    return made


def _is_option(name: str, value: Any) -> bool:
    """Return whether a copy may share the value of an attribute: whether it cannot lead back to the loss itself."""
    if isinstance(value, (list, tuple)):
        return all(isinstance(item, _PLAIN) for item in value)
    return isinstance(value, _PLAIN) or (name == "other_act" and callable(value))
