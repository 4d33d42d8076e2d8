"""The form of a loss that accepts class fractions: a copy that follows the options and weights of the loss itself."""

from __future__ import annotations

import copy
import numbers
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from monai_iou.losses.base import RegionLoss

_PLAIN = (bool, numbers.Number, np.generic, np.ndarray, str, type(None), Tensor)
_ITS_OWN = {*vars(nn.Module()), "soft_label", "to_onehot_y"} - {"training"}  # what a copy does not take over
_STATELESS = ("monai_iou", "monai", "torch")  # whose losses keep nothing from call to call but for logging


def form_for_fractions(loss: nn.Module, made: nn.Module | None = None) -> nn.Module:
    """Return a copy of a loss that accepts class fractions: with soft-label forms, and without `to_onehot_y`.

    A copy, and not options set on the loss for a while, because other threads may use the loss meanwhile.

    Args:
        loss: the loss, which stays as it is.
        made: the copy that an earlier call returned. It takes over every option of the loss that is a number, text, an
            array or a tuple of these, and `other_act`, whoever changed it. The losses of this package, of MONAI and of
            torch also share their lists, weights and parameters with their copies; a loss of the user's own and what
            it contains do not, because these may be what it remembers of earlier calls. If the loss contains other
            modules by now, or `made` is the loss itself, a new copy is made.
    """
    parts = list(loss.modules())
    twins = [] if made is None or made is loss else list(made.modules())
    if [type(part) for part in parts] != [type(twin) for twin in twins]:
        with torch.inference_mode(False):  # where a copy of weights could serve no later training
            made = copy.deepcopy(loss)
        twins = list(made.modules())
    assert made is not None
    traced = torch.compiler.is_compiling()  # which compares no lists by `is`
    for part, twin, is_shared in zip(parts, twins, _without_state(loss), strict=True):
        if "_orig_mod" in part._modules:
            continue  # of torch.compile: it shows the options of the module in it, the next part
        if is_shared:
            _share(part._buffers, twin._buffers)
            _share(part._parameters, twin._parameters)
        options, known = dict(vars(part)), vars(twin)  # as another thread may add to them
        for name, value in options.items():
            if name in _ITS_OWN or (not traced and known.get(name) is value):
                continue
            if _is_option(name, value, is_shared):
                known[name] = value
        soft = part.soft_label or part.has_soft_form if isinstance(part, RegionLoss) else True
        for name, wanted in (("soft_label", soft), ("to_onehot_y", False)):
            if (name in known or hasattr(type(twin), name)) and getattr(twin, name) is not wanted:
                setattr(twin, name, wanted)
    return made


def _without_state(loss: nn.Module) -> list[bool]:
    """Return for each of `loss.modules()` whether it, and all that contains it, is of a known library."""
    own = [name for name, part in loss.named_modules() if type(part).__module__.partition(".")[0] not in _STATELESS]
    names = [name for name, _ in loss.named_modules()]
    return [not any(other in ("", name) or name.startswith(f"{other}.") for other in own) for name in names]


def _share(tensors: dict[str, Any], copies: dict[str, Any]) -> None:
    """Put tensors in the place of their copies; the dictionaries stay two, as torch exchanges what is in them."""
    for name in [name for name in copies if name not in tensors]:
        del copies[name]
    for name, tensor in list(tensors.items()):
        if copies.get(name) is not tensor:
            copies[name] = tensor


def _is_option(name: str, value: Any, is_shared: bool) -> bool:
    """Return whether a copy may share the value of an attribute: whether it cannot lead back to the loss itself."""
    if isinstance(value, tuple) or (is_shared and isinstance(value, list)):
        return all(isinstance(item, _PLAIN) for item in value)
    return isinstance(value, _PLAIN) or (name == "other_act" and callable(value))
