"""The settings of a run, kept in its checkpoint, so that who resumes it with others is told which."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monai_iou.workflow.keys import calling_workflow
from monai_iou.workflow.own_network import FROM_FILE

__all__ = ["config_record", "other_settings"]

# Where a run reads and writes, how fast it is, and what comes before, beside or after the steps.
BESIDE = (
    "_meta_", "about", "bundle_root", "cache_dir", "cache_rate", "cache_workers", "calibration", "ckpt_dir",
    "dataset_dir", "device", "finalize", "imports", "initialize", "memory_format", "num_workers", "output_dir",
    "overwrite", "pictures", "plan_report", "rank", "resume", "run", "start_from", "sw_batch_size", "train.json",
    "transform_device", "tune_postprocessing", "world_size",
)  # fmt: skip
# Components for scores that decide nothing, which configs of earlier versions lack.
FOR_CALIBRATION = "$not @settings.calibration"
WORDS = {"true": True, "false": False, "null": None, "none": None}  # which arrive as text from a command line
MISSING = "not given"
MOST_SHOWN, MOST_NAMED = 60, 5


def config_record() -> dict[str, Any]:
    """Return the keys of the workflow whose config is being resolved, plain values; {} if there is none."""
    workflow = calling_workflow()
    return {} if workflow is None else _flat({k: v for k, v in workflow.parser.get().items() if k not in BESIDE})


def other_settings(stored: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """Say in words which keys of two records differ; "" if none does, or if one record is empty.

    Example:
        >>> other_settings({"epochs": 2, "loss#batch": True}, {"epochs": 3, "loss#batch": True, "seed": 1})
        '`epochs` was 2 and is 3; `seed` was not given and is 1'
        >>> other_settings({}, {"epochs": 3})
        ''
    """
    if not stored or not current:
        return ""
    lines = []
    for name in dict.fromkeys([*stored, *current]):
        before, now = stored.get(name, MISSING), current.get(name, MISSING)
        if MISSING in (before, now) and f"@{name.removeprefix('settings#')}" in (before, now):
            continue  # checks a key, which is compared by itself, as another version does not
        if before != now and json.dumps(before, sort_keys=True) != json.dumps(now, sort_keys=True):  # NaN is not NaN
            was, given = (value if isinstance(value, str) else json.dumps(value) for value in (before, now))
            short = max(len(was), len(given)) <= MOST_SHOWN
            lines.append(f"`{name}` was {was} and is {given}" if short else f"`{name}` is another one")
    more = [f"{len(lines) - MOST_NAMED} more keys differ"] if len(lines) > MOST_NAMED else []
    return "; ".join(lines[:MOST_NAMED] + more)


def _flat(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """The values by their path, `loss#batch`, in which MONAI's configs write it, and hashes of the user's own files.

    >>> _flat({"loss": {"batch": "true", "w": [1, 2]}})
    {'loss#batch': True, 'loss#w': [1, 2]}
    """
    file = Path(str(config.get("file")))
    own = config.get("_target_") == FROM_FILE and file.is_file()
    flat: dict[str, Any] = {f"{above}source": hashlib.sha256(file.read_bytes()).hexdigest()} if own else {}
    for name, value in config.items():
        if _is_beside(value):
            continue
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{above}{name}#")
        else:
            flat[f"{above}{name}"] = _plain(value)
    return flat


def _is_beside(value: Any) -> bool:
    return isinstance(value, Mapping) and value.get("_disabled_") == FOR_CALIBRATION


def _plain(value: Any) -> Any:
    """A value as JSON has it; of an object what it says of itself, but for the place in memory."""
    if isinstance(value, list):
        value = [each for each in value if not _is_beside(each)]
    if isinstance(value, str):
        return WORDS.get(value.lower(), value)
    try:
        return json.loads(json.dumps(value, default=_text))
    except TypeError:  # keys that JSON does not have
        return _text(value)


def _text(value: Any) -> str:
    return re.sub(r" at 0x\w+", "", str(value))
