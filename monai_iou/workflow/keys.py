"""The bundle's keys as a command line gives them: a mistyped one is named."""

from __future__ import annotations

import difflib
import json
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai_iou.bundle_files import bundle_path
from monai_iou.workflow.bars import outlast_readers
from monai_iou.workflow.devices import INFERER_DEVICES, check_devices
from monai_iou.workflow.settings import exit_with_message, optional

__all__ = ["calling_parser", "calling_workflow", "check_keys"]

SHIPPED = ("train", "evaluate", "inference", "multi_gpu_train", "multi_gpu_evaluate")
BASE = "train.json"
CHANGED_BY = {"model_files": "evaluate.json", "world_size": "multi_gpu_train.json"}  # a key that only this file has
ANYWHERE = "load_pretrain"  # a key that users of MONAI give any workflow
LIKENESS = 0.75  # of two names, from which on one may be the other mistyped


def check_keys() -> None:
    """Check the keys of the workflow whose config is being resolved: the first thing that the configs initialize.

    MONAI takes any key that a command line names, and a mistyped one changes nothing.

    Raises:
        ValueError: nothing uses a key that is nearly one of the bundle's, or `start_from`, or a config that changes
            train.json is not named after it, or an inferer is to use a device that is not there.

    Warns:
        UserWarning: a training was given keys that only inference uses, or that its train.json of an earlier version
            does not.
    """
    outlast_readers()
    workflow = calling_workflow()
    if workflow is None:
        return
    config = dict(workflow.parser.get())
    with exit_with_message():
        _check_base(config, Path(workflow.config_root_path))
        _check_start_from(config)
        _warn_of_other_keys(config)
        _warn_of_later_keys(config)
        for name, meant in _mistyped(config, _known_keys(SHIPPED)).items():
            message = (
                f"Expected `{name}` to be a key of the bundle, but nothing uses it: write --{meant} if that was meant, "
                "or remove it."
            )
            raise ValueError(message)
        check_devices({name: _plain_value(workflow.parser, name) for name in INFERER_DEVICES})


def _plain_value(parser: Any, name: str) -> Any:
    """A key's value, or that of the key to which it refers; None for what MONAI has to resolve: it could take long."""
    value = parser.get(name)
    if str(value).startswith("@"):
        value = parser.get(str(value)[1:])
    return None if isinstance(value, (dict, list)) or str(value).startswith(("$", "@", "%")) else value


def _check_base(config: Mapping[str, Any], folder: Path) -> None:
    """Raise ValueError if the key `train.json` shows that a later config has nothing to change, or came too early."""
    base = config.get(BASE)
    if not isinstance(base, Mapping):  # of inference.json, or of another bundle
        return
    replaced = _replaced(list(config), _names_in(folder / BASE))
    if replaced:
        message = (
            f"Expected {BASE} to be the first of --config_file, but a config before it sets `{replaced[0]}`, which "
            f"{BASE} replaces: name that config after {BASE}."
        )
        raise ValueError(message)
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


def _replaced(names: Sequence[str], own: Sequence[str]) -> list[str]:
    """Return the keys that a config set before train.json set them again.

    Args:
        names: of the merged config, in its order.
        own: of train.json alone, in its own order, which a user may have changed.

    >>> _replaced(["_meta_", "epochs", "train.json", "imports"], ["train.json", "imports", "epochs"])
    ['epochs']
    >>> _replaced(["_meta_", "epochs", "train.json", "imports"], ["epochs", "train.json", "imports"])
    []
    """
    before = own[: own.index(BASE)] if BASE in own else []
    return [name for name in names[: names.index(BASE)] if name in own and name not in before]


def _names_in(path: Path) -> list[str]:
    try:
        return list(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # the configs may have other names
        return []


def _warn_of_other_keys(config: Mapping[str, Any]) -> None:
    """Warn of keys in the config of a training that mean something to inference alone."""
    if BASE not in config:
        return
    base = config[BASE]
    loaded = str(base.get("changed_by")) if isinstance(base, Mapping) else ""
    own = ("train", "multi_gpu_train", *(("evaluate", "multi_gpu_evaluate") if "evaluate" in loaded else ()))
    others = _known_keys(("inference",)) - _known_keys(own) - {ANYWHERE}
    unused = [name for name in config if name in others and not name.startswith("_") and not _is_used(name, config)]
    _warn_of_no_effect(unused, "on a training, because only inference.json uses {them}: give {them} to the prediction.")


def _warn_of_later_keys(config: Mapping[str, Any]) -> None:
    """Warn of settings that are given to a training whose train.json an earlier version made, without them."""
    if "train" not in config or not isinstance(config.get("settings"), Mapping):
        return
    shipped = json.loads((bundle_path() / "configs" / BASE).read_text(encoding="utf-8"))["settings"]
    unused = [name for name in shipped if name in config and not _is_used(name, config)]
    why = "because train.json was made by an earlier version, which did not know {them}"
    _warn_of_no_effect(unused, f"here, {why}: train in a new folder to use {{them}}.")


def _warn_of_no_effect(names: Sequence[str], why: str) -> None:
    if names:
        have, them = ("has", "it") if len(names) == 1 else ("have", "them")
        message = f"{', '.join(f'`{name}`' for name in names)} {have} no effect {why.format(them=them)}"
        warnings.warn(message, stacklevel=3)


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


def _known_keys(names: Sequence[str]) -> set[str]:
    files = [bundle_path() / "configs" / f"{name}.json" for name in names]
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
