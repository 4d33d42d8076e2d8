"""The bundle's keys as a command line gives them: a mistyped one is named."""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monai_iou.bundle_files import bundle_path
from monai_iou.workflow.settings import exit_with_message, optional

__all__ = ["calling_parser", "calling_workflow", "check_keys"]

SHIPPED = ("train", "evaluate", "inference", "multi_gpu_train", "multi_gpu_evaluate")
BASE = "train.json"
CHANGED_BY = {"model_files": "evaluate.json", "world_size": "multi_gpu_train.json"}  # a key that only this file has
LIKENESS = 0.75  # of two names, from which on one may be the other mistyped


def check_keys() -> None:
    """Check the keys of the workflow whose config is being resolved: the first thing that the configs initialize.

    MONAI takes any key that a command line names, and a mistyped one changes nothing.

    Raises:
        ValueError: nothing uses a key that is nearly one of the bundle's, or `start_from`, or a config that changes
            train.json is not named after it.
    """
    workflow = calling_workflow()
    if workflow is None:
        return
    config = dict(workflow.parser.get())
    with exit_with_message():
        _check_base(config, Path(workflow.config_root_path))
        _check_start_from(config)
        for name, meant in _mistyped(config, _known_keys()).items():
            message = (
                f"Expected `{name}` to be a key of the bundle, but nothing uses it: write --{meant} if that was meant, "
                "or remove it."
            )
            raise ValueError(message)


def _check_base(config: Mapping[str, Any], folder: Path) -> None:
    """Raise ValueError if the key `train.json` shows that a later config has nothing to change, or came too early."""
    base = config.get(BASE)
    if not isinstance(base, Mapping):  # of inference.json, or of another bundle
        return
    last = base.get("changed_by")
    early = next((file for key, file in CHANGED_BY.items() if key in config), None) if last is None else None
    if "note" in base and early is None:
        return
    name = str(early or last)
    files = [BASE, *(["evaluate.json"] if name == "multi_gpu_evaluate.json" else []), name]
    state = "there is none" if early is None else "it comes before that"
    paths = ",".join(f"'{(folder / file).as_posix()}'" for file in files)
    message = (
        f"Expected {BASE} before {name} in --config_file, because {name} changes keys of it, but {state}: write "
        f'--config_file "[{paths}]".'
    )
    raise ValueError(message)


def _check_start_from(config: Mapping[str, Any]) -> None:
    """Raise ValueError if a training would pass over `start_from`, as a train.json of an earlier version does."""
    if "train" in config and optional(config.get("start_from")) is not None and not _is_used("start_from", config):
        message = (
            "Expected train.json to know `start_from`, but it is of an earlier version: copy the bundle anew with "
            "`monai-iou init`, or choose a new --output."
        )
        raise ValueError(message)


def _is_used(name: str, config: Mapping[str, Any]) -> bool:
    return re.search(rf"@{re.escape(name)}\b", json.dumps(config, default=str)) is not None


def _known_keys() -> set[str]:
    files = [bundle_path() / "configs" / f"{name}.json" for name in SHIPPED]
    return {
        re.split("#|::", key.lstrip("+"))[0] for file in files for key in json.loads(file.read_text(encoding="utf-8"))
    }


def _mistyped(config: dict[str, Any], known: set[str]) -> dict[str, str]:
    """Return what each unused key may have been meant to be.

    Example:
        >>> _mistyped({"epoch": 3, "epochs": 300, "mine": 1, "epochs2": 5, "sum": "$@epochs2 + 1"}, {"epochs"})
        {'epoch': 'epochs'}
    """
    mistyped = {}
    for name in config:
        if name in known or name.startswith("_") or _is_used(name, config):
            continue
        near = difflib.get_close_matches(name, sorted(known), 1, LIKENESS)
        if near:
            mistyped[name] = near[0]
    return mistyped


def calling_workflow() -> Any:
    """Return the ConfigWorkflow whose config is being resolved, None if there is none.

    MONAI gives a config no way to learn of it; so it is looked for among the callers.
    """
    from monai.bundle.workflows import ConfigWorkflow

    return _calling(ConfigWorkflow)


def calling_parser() -> Any:
    """Return the ConfigParser that is resolving its config, None if there is none; not only workflows have one."""
    from monai.bundle.config_parser import ConfigParser

    return _calling(ConfigParser)


def _calling(kind: type[Any]) -> Any:
    frame = sys._getframe(2)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, kind):
            return caller
        if frame.f_back is None:
            break
        frame = frame.f_back
    return None
