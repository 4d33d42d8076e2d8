"""The bundle's keys on a command line, `--epochs 3` or `--epochs=3`: a mistyped one is refused with a suggestion."""

from __future__ import annotations

import ast
import difflib
import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import click

__all__ = ["known_keys", "read_keys"]

PACKAGE = Path(__file__).resolve().parent.parent
CONFIG = Path("bundles") / "small_foreground_segmentation" / "configs" / "train.json"
# Decided by the command's own options.
OURS = {
    "bundle_root": "--output", "ckpt_dir": "--output", "output_dir": "--output", "dataset_dir": "DATASET",
}  # fmt: skip


def known_keys(configs: Sequence[Path]) -> set[str]:
    """The keys of the shipped training config, and of the user's own configs.

    The files are read as they lie: importing the package to ask for them takes seconds.
    """
    shipped = next(path for path in (PACKAGE / CONFIG, PACKAGE.parent / CONFIG) if path.is_file())
    keys: set[str] = set()
    for path in (shipped, *configs):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            message = (
                f"Expected `--config` to be a JSON file of the bundle's keys, but got `{path}` ({error}): correct it."
            )
            raise click.UsageError(message) from error
        keys |= {_root(key.lstrip("+~")) for key in content} if isinstance(content, dict) else set()
    return keys


def read_keys(words: Sequence[str], known: Collection[str], options: Collection[str]) -> dict[str, Any]:
    """The keys that a command line gives beyond the command's own options.

    Args:
        words: what is left of the command line.
        known: keys of the bundle.
        options: names of the command's own options, without dashes.

    Returns:
        Key -> value, read as MONAI's own command line reads it: Python's literals, and text.

    >>> read_keys(["--batch_size", "2", "--loss::_target_=IoULoss"], {"batch_size", "loss"}, [])
    {'batch_size': 2, 'loss::_target_': 'IoULoss'}
    """
    keys: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            message = f"Expected options and keys with their values, but got {word!r}: write --key {word}."
            raise click.UsageError(message)
        name, equals, value = word[2:].partition("=")
        _check(name, known, options)
        if not equals and not rest:
            message = f"Expected a value after --{name}, but the command line ends: add it."
            raise click.UsageError(message)
        keys[name] = _value(value if equals else rest.pop(0))
    return keys


def _check(name: str, known: Collection[str], options: Collection[str]) -> None:
    root = _root(name.lstrip("+~"))
    if root in OURS:
        message = f"Expected a key that the command leaves to you, but it sets `{root}` itself: use {OURS[root]}."
        raise click.UsageError(message)
    if root in known:
        return
    near = difflib.get_close_matches(root, sorted({*known, *options}), n=1)
    remedy = f"perhaps you meant --{near[0]}" if near else "docs/bundle.md lists the keys"
    message = f"Expected an option or a key of the bundle, but got --{name}: {remedy}."
    raise click.UsageError(message)


def _root(name: str) -> str:
    return re.split("#|::", name)[0]


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
