"""`loss::_target_` over a plan, whose loss may have arguments that another class does not take."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from pydoc import ErrorDuringImport, locate
from typing import Any

from monai_iou.workflow.config_errors import ConfigError
from monai_iou.workflow.config_files import read_config

__all__ = ["check_loss", "with_whole_loss"]

PACKAGE = "monai_iou"
# A loss of the package without these takes soft labels as they come or refuses them, and always adds over the batch.
NEEDLESS = ("batch", "soft_label")


def with_whole_loss(keys: Mapping[str, Any], configs: Sequence[Path]) -> dict[str, Any]:
    """Return keys in which a class that takes the place of the planned loss starts from the bundle's own arguments.

    Those are what most losses of the package take: activation, classes, `ignore_index`, sums over batch and ranks. For
    a loss of the package, those of `NEEDLESS` are left out that it does not take. Single arguments that the user's own
    configs give follow them.

    Args:
        keys: of the command line.
        configs: the bundle's train.json, the plan, and the user's own; a whole `loss` of theirs is left as it is.
    """
    given = _given(keys, configs)
    if given is None:
        return dict(keys)
    whole = read_config(configs[0]).get("loss")
    takes = _arguments(given)
    if isinstance(whole, Mapping) and takes is not None and takes[0].__module__.partition(".")[0] == PACKAGE:
        whole = {name: value for name, value in whole.items() if name not in NEEDLESS or name in takes[1]}
    return {"loss": whole, **given, **keys}


def check_loss(keys: Mapping[str, Any], configs: Sequence[Path]) -> None:
    """Check that a class that is to replace the planned loss takes the bundle's own arguments.

    Args:
        keys: see `with_whole_loss`.
        configs: likewise.

    Raises:
        ConfigError: it does not.
    """
    given = _given(keys, configs)
    takes = None if given is None else _arguments(given)
    loss = with_whole_loss(keys, configs).get("loss")
    if takes is None or not isinstance(loss, Mapping):
        return
    removed = {_parts(key)[-1] for key in given or () if key.startswith("~")}
    others = [name for name in loss if name[0] != "_" and name not in {*takes[1], *removed}]
    if others:
        message = (
            f"Expected the class of --loss::_target_ to take the arguments of the bundle's own loss, but "
            f"{takes[0].__name__} does not take {', '.join(others)}: write that loss with its own arguments as the "
            "whole `loss` into a JSON file, and give the file with --config."
        )
        raise ConfigError(message)


def _given(keys: Mapping[str, Any], configs: Sequence[Path]) -> dict[str, Any] | None:
    """What keys and the user's own configs say of the loss, None unless they name a class alone or with single keys."""
    given: dict[str, Any] = {}
    for path in configs[2:]:
        given |= {key: value for key, value in read_config(path).items() if _parts(key)[0] == "loss"}
    given |= {key: value for key, value in keys.items() if _parts(key)[0] == "loss"}
    names = [_parts(key) for key in given]
    return given if ["loss", "_target_"] in names and ["loss"] not in names else None


def _arguments(given: Mapping[str, Any]) -> tuple[Any, Collection[str]] | None:
    """The class that keys name and the arguments that it takes; None if it takes any, or cannot be told."""
    from monai.bundle.config_item import ComponentLocator

    name = [str(value) for key, value in given.items() if _parts(key) == ["loss", "_target_"]][-1]
    modules = [] if "." in name else ComponentLocator().get_component_module_name(name)
    module = modules[0] if isinstance(modules, list) and modules else modules
    try:
        found = locate(f"{module}.{name}" if module else name)
        parameters = inspect.signature(found).parameters  # type: ignore[arg-type]
    except (ErrorDuringImport, TypeError, ValueError):
        return None  # whoever makes the loss says so
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return None
    return found, parameters


def _parts(key: str) -> list[str]:
    """The parts of a key, without the sign by which MONAI adds to a value or removes it."""
    return re.split("#|::", key.lstrip("+~"))
