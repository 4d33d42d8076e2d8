"""Reading the JSON configs of a run: an object of keys, or a sentence that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from monai_iou.workflow.config_errors import ConfigError

__all__ = ["check_configs", "read_config"]

OF_A_RUN = ("train.json", "plan.json", "inference.json")
MARK = "\ufeff"  # editors of Windows may put it before a text; MONAI refuses such a file, and does not name it


def read_config(path: Path) -> dict[str, Any]:
    """Read a config.

    Raises:
        ConfigError: it cannot be read, or is no JSON object.
    """
    content, why = None, "it holds no object, {...}"
    try:
        text = path.read_text(encoding="utf-8")
        content = None if text.startswith(MARK) else json.loads(text)
        why = "it begins with a byte-order mark" if text.startswith(MARK) else why
    except (OSError, ValueError) as error:
        why = f"it cannot be read ({error})"
    if isinstance(content, dict):
        return content
    message = f"Expected {path} to be a JSON file of the bundle's keys in UTF-8, but {why}: correct it."
    raise ConfigError(message)


def check_configs(folder: Path) -> None:
    """Check the configs of a run's folder, as far as they are there: MONAI names no file, and the plan is asked first.

    Raises:
        ConfigError: one of them is damaged.
    """
    for path in (folder / "configs" / name for name in OF_A_RUN):
        if path.is_file():
            read_config(path)
