"""`loss::_target_` over a plan, whose loss may have arguments that another class does not take."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai_iou.workflow.config_files import read_config

__all__ = ["with_whole_loss"]


def with_whole_loss(keys: Mapping[str, Any], configs: Sequence[Path]) -> dict[str, Any]:
    """Return keys in which a class that takes the place of the planned loss starts from the bundle's own arguments.

    Those are what every loss of the package takes: activation, classes, `ignore_index`, sums over batch and ranks.
    Single arguments that the user's own configs give follow them.

    Args:
        keys: of the command line.
        configs: the bundle's train.json, the plan, and the user's own; a whole `loss` of theirs is left as it is.
    """
    bundle, _, *own = configs
    given: dict[str, Any] = {}
    for path in own:
        given |= {key: value for key, value in read_config(path).items() if _parts(key)[0] == "loss"}
    names = [_parts(key) for key in (*given, *keys)]
    if ["loss", "_target_"] not in names or ["loss"] in names:
        return dict(keys)
    return {"loss": read_config(bundle).get("loss"), **given, **keys}


def _parts(key: str) -> list[str]:
    """The parts of a key, without the sign by which MONAI adds to a value or removes it."""
    return re.split("#|::", key.lstrip("+~"))
