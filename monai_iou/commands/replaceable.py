"""Whether a command may write a JSON file: to a new one, or over one that it wrote itself."""

from __future__ import annotations

import json
from pathlib import Path

import click

from monai_iou.files import OutputError

__all__ = ["JSON_SUFFIXES", "check_replaceable"]

JSON_SUFFIXES = (".json", ".yaml", ".yml")


def check_replaceable(path: Path, key: str, option: str = "--output") -> None:
    """Check that a JSON file can be written without overwriting a file of another kind.

    Args:
        path: the file to write.
        key: a key that only files of this kind have.
        option: the name of the option that gives the file, for the error message.

    Raises:
        click.UsageError: if the extension is not one of `JSON_SUFFIXES`.
        OutputError: if `path` is a file without `key`, such as the dataset.json of a dataset.
    """
    if path.suffix not in JSON_SUFFIXES:
        message = (
            f"Expected `{option}` to be a .json file, but got `{path}`: add the extension, by which MONAI selects the "
            "format."
        )
        raise click.UsageError(message)
    if not path.exists():
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict) or key not in content:
        message = (
            f"Expected `{option}` to be a new file or one that this command wrote, but `{path}` is a file of another "
            "kind: name another path."
        )
        raise OutputError(message)
