"""The plan that training stores next to its model: read, and checked before anything relies on it."""

from __future__ import annotations

import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

from monai_iou.datasets.cases import DatasetError
from monai_iou.planning.plan import Plan
from monai_iou.tables import text_remedy

__all__ = ["load_plan"]

LATER = ("ignore", "soft_labels", "mean_of_raters", "partly_labelled", "spatial_dims")  # that old plans lack


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Read the plan that a training stored as `model.json`.

    Raises:
        DatasetError: the file is damaged or is not a plan.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        plan = Plan(
            modalities=tuple(content["modalities"]),
            labels={int(value): name for value, name in content["labels"].items()},
            pixdim=tuple(content["pixdim"]),
            patch_size=tuple(content["patch_size"]),
            channels=tuple(content["channels"]),
            strides=tuple(tuple(stride) for stride in content["strides"]),
            intensity=tuple(content["intensity"]),
            trained=tuple(content.get("trained", ())),
            trained_images=tuple(content.get("trained_images", ())),
            regions={name: tuple(values) for name, values in content.get("regions", {}).items()},
            regions_order=tuple(content.get("regions_order", ())),
            network=dict(content.get("network", {})),
            **{name: content[name] for name in LATER if name in content},
        )
        _check_values(plan)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        remedy = text_remedy(error, "train again")
        message = f"Expected {path} to be the plan that training stored, but it cannot be read ({error}): {remedy}."
        raise DatasetError(message) from error
    return plan


def _check_values(plan: Plan) -> None:
    """Raise ValueError if a number of a stored plan is none that training stores."""
    sides = [*plan.patch_size, *plan.channels, *itertools.chain(*plan.strides)]
    usable = {
        "pixdim": len(plan.pixdim) == 3 and all(_is_number(side) and side > 0 for side in plan.pixdim),
        "patch_size": len(plan.patch_size) == 3,
        "patch_size, channels and strides": all(isinstance(side, int) and side > 0 for side in sides),
        "strides": bool(plan.strides) and all(len(stride) == 3 for stride in plan.strides),
        "channels": len(plan.channels) == len(plan.strides) + 1,
        "intensity": len(plan.intensity) == len(plan.modalities) > 0 and all(map(_is_rule, plan.intensity)),
        "labels": len(plan.labels) > 1 and next(iter(plan.labels)) == 0,
        "spatial_dims": plan.spatial_dims == 3 or (plan.spatial_dims == 2 and 1 in plan.patch_size),
        "regions_order": len(plan.regions_order) == len(plan.regions),
        "network": [type(value) for value in plan.network.values()] in ([], [str, bool, bool], [str, bool, bool, dict]),
    }
    for name, right in usable.items():
        if not right:
            message = f"`{name}` has a value that no training stores"
            raise ValueError(message)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_rule(rule: dict[str, Any]) -> bool:
    """Whether this is how a channel can be normalised."""
    if rule["kind"] != "ct":
        return rule["kind"] in ("zscore", "none")
    numbers = all(_is_number(rule[name]) for name in ("lower", "upper", "mean", "std"))
    return numbers and rule["lower"] <= rule["upper"] and rule["std"] > 0
