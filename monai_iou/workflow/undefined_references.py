"""References of a config, such as `@epochs`, to keys that it does not have: named before anything runs."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai_iou.workflow.config_errors import ConfigError
from monai_iou.workflow.config_files import METADATA, read_config

__all__ = ["check_inference_references", "check_references", "check_takes_images"]

STAGES = ("initialize", "run", "finalize")  # the keys whose expressions MONAI evaluates, in this order
DEFINE = "define it"
# It is the file that people copy a line of train.json into.
DEFINE_IN_INFERENCE = "define it there, because train.json and plan.json are not read with that file"


def check_references(parser: Any, files: Sequence[Path], define: str = DEFINE) -> None:
    """Check that every reference that a run would resolve is to a key of its config.

    MONAI finds such a mistake when it comes to it, which may be after the training, and names neither place nor file.

    Args:
        parser: MONAI's ConfigParser of the merged configs, parsed.
        files: the configs, later ones over earlier ones, to name the one in which the reference stands.
        define: what else to do than to correct the name.

    Raises:
        ConfigError: a reference is to no key.
    """
    resolver = parser.ref_resolver
    if resolver.allow_missing_reference:  # MONAI warns then
        return
    todo = [stage for stage in STAGES if stage in resolver.items]
    seen = set(todo)
    while todo:
        key = todo.pop(0)
        for place, text in _texts(resolver, key, resolver.items[key].get_config()):
            for name in resolver.match_refs_pattern(text):
                if name not in resolver.items:
                    raise ConfigError(_undefined(name, place, files, resolver.items, define))
                if name not in seen:
                    seen.add(name)
                    todo.append(name)


def check_inference_references(config: Path, given: Iterable[str]) -> None:
    """Check the references of an inference.json, by which the masks of a training's held-out cases are to be made.

    Args:
        config: of the file; it need not be there.
        given: keys that the command will add to it.

    Raises:
        ConfigError: it cannot be read, or a reference is to no key.
    """
    if not config.is_file():
        return
    from monai.bundle.config_parser import ConfigParser

    metadata = config.with_name(METADATA)
    content = {"_meta_": read_config(metadata) if metadata.is_file() else {}, **dict.fromkeys(given)}
    parser = ConfigParser({**content, **read_config(config)})
    try:
        parser.parse()
    except Exception:  # a macro may read a file that the training is to write, and raises anything
        return
    check_references(parser, [config], DEFINE_IN_INFERENCE)


def check_takes_images(config: Path) -> None:
    """Check that an inference.json segments the images that a command names, and not those of `dataset_dir`.

    Args:
        config: of the file; it need not be there.

    Raises:
        ConfigError: it cannot be read, or does not refer to `images`, as those of earlier versions.
    """
    if not config.is_file() or re.search(r"[@%](::|#)*images\b", json.dumps(read_config(config))):
        return
    message = (
        f"Expected {config} to refer to the key `images`, but it does not, perhaps because an earlier version wrote "
        "it: replace it by the configs/inference.json of a new copy of the bundle (`monai-iou init`)."
    )
    raise ConfigError(message)


def _texts(resolver: Any, key: str, config: Any) -> Iterator[tuple[str, str]]:
    """The texts in a part of a config, with their places."""
    if isinstance(config, str):
        yield key, config
    elif isinstance(config, (dict, list)):
        for _, below, value in resolver.iter_subconfigs(key, config):
            yield from _texts(resolver, below, value)


def _undefined(name: str, place: str, files: Sequence[Path], known: Mapping[str, Any], define: str) -> str:
    name, place = (each.replace("::", "#") for each in (name, place))
    near = difflib.get_close_matches(name, [key.replace("::", "#") for key in known], n=1)
    remedy = f"write `@{near[0]}` if that was meant, or {define}" if near else f"correct its name, or {define}"
    file = next((path for path in reversed(files) if _is_in(name, path)), None)
    where = f"`{place}`" if file is None else f"`{place}` of {file}"
    return f"Expected `@{name}` in {where} to refer to a key, but the config has none of that name: {remedy}."


def _is_in(name: str, file: Path) -> bool:
    """Whether a reference stands in a file, in either of the two spellings."""
    spelt = re.escape(f"@{name}").replace(r"\#", "(?:#|::)")
    return file.is_file() and re.search(rf"{spelt}(?!\w)", file.read_text(encoding="utf-8")) is not None
