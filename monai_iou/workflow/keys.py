"""The bundle's keys as a command line gives them: a mistyped one is named."""

from __future__ import annotations

import difflib
import json
import re
import sys
from typing import Any

from monai_iou.bundle_files import bundle_path
from monai_iou.workflow.settings import exit_with_message

__all__ = ["calling_workflow", "check_keys"]

SHIPPED = ("train", "evaluate", "inference", "multi_gpu_train", "multi_gpu_evaluate")
LIKENESS = 0.75  # of two names, from which on one may be the other mistyped


def check_keys() -> None:
    """Check the keys of the workflow whose config is being resolved: the first thing that the configs initialize.

    MONAI takes any key that a command line names, and a mistyped one changes nothing.

    Raises:
        ValueError: nothing uses a key that is nearly one of the bundle's.
    """
    workflow = calling_workflow()
    if workflow is None:
        return
    config = dict(workflow.parser.get())
    with exit_with_message():
        for name, meant in _mistyped(config, _known_keys()).items():
            message = (
                f"Expected `{name}` to be a key of the bundle, but nothing uses it: write --{meant} if that was meant, "
                "or remove it."
            )
            raise ValueError(message)


def _known_keys() -> set[str]:
    files = [bundle_path() / "configs" / f"{name}.json" for name in SHIPPED]
    return {re.split("#|::", key)[0] for file in files for key in json.loads(file.read_text(encoding="utf-8"))}


def _mistyped(config: dict[str, Any], known: set[str]) -> dict[str, str]:
    """Return what each unused key may have been meant to be.

    Example:
        >>> _mistyped({"epoch": 3, "epochs": 300, "mine": 1, "epochs2": 5, "sum": "$@epochs2 + 1"}, {"epochs"})
        {'epoch': 'epochs'}
    """
    text = json.dumps(config, default=str)
    mistyped = {}
    for name in config:
        if name in known or name.startswith("_") or re.search(rf"@{re.escape(name)}\b", text):
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

    frame = sys._getframe(1)
    while frame is not None:
        workflow = frame.f_locals.get("self")
        if isinstance(workflow, ConfigWorkflow):
            return workflow
        if frame.f_back is None:
            break
        frame = frame.f_back
    return None
