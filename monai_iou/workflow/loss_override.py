"""`--loss::_target_` over a plan, whose loss may have arguments that another class does not take."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["with_whole_loss"]

TARGETS = ("loss::_target_", "loss#_target_")


def with_whole_loss(keys: Mapping[str, Any], configs: Sequence[Path]) -> dict[str, Any]:
    """Return keys in which a class that takes the place of the planned loss starts from the bundle's own arguments.

    Those are what every loss of the package takes: activation, classes, `ignore_index`, sums over batch and ranks.

    Args:
        keys: of the command line.
        configs: the bundle's train.json, the plan, and the user's own, whose `loss` is left as it is.
    """
    bundle, _, *own = configs
    if not any(target in keys for target in TARGETS) or any(_holds_loss(path) for path in own):
        return dict(keys)
    loss = json.loads(bundle.read_text(encoding="utf-8"))["loss"]
    return {"loss": loss, **keys}


def _holds_loss(path: Path) -> bool:
    return "loss" in json.loads(path.read_text(encoding="utf-8"))
