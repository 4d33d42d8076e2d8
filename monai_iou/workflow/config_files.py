"""Reading the JSON configs of a run: an object of keys, or a sentence that names the file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai_iou.tables import text_remedy
from monai_iou.workflow.config_errors import ConfigError

__all__ = ["OF_INFERENCE", "check_configs", "read_config"]

METADATA = "metadata.json"  # which MONAI reads with every config beside it
OF_INFERENCE = ("inference.json", METADATA)
OF_A_RUN = ("train.json", "plan.json", *OF_INFERENCE)
MARK = "\ufeff"  # editors of Windows may put it before a text; MONAI refuses such a file, and does not name it


def read_config(path: Path) -> dict[str, Any]:
    """Read a config.

    Raises:
        ConfigError: it cannot be read, or is no JSON object.
    """
    content, why, remedy = None, "it holds no object, {...}", "correct it"
    try:
        text = path.read_text(encoding="utf-8")
        if text.startswith(MARK):
            why, remedy = "it begins with a byte-order mark", "save it without the mark"
        else:
            content = json.loads(text)
    except (OSError, ValueError) as error:
        why, remedy = f"it cannot be read ({error})", text_remedy(error, remedy)
    if isinstance(content, dict):
        return content
    what = "metadata" if path.name == METADATA else "keys"
    message = f"Expected {path} to be a JSON file of the bundle's {what} in UTF-8, but {why}: {remedy}."
    raise ConfigError(message)


def check_configs(folder: Path, names: Sequence[str] = OF_A_RUN) -> None:
    """Check the configs of a run's folder, as far as they are there: MONAI names no file, and the plan is asked first.

    Args:
        folder: of the run.
        names: of those that are to be read.

    Raises:
        ConfigError: one of them is damaged.
    """
    for path in (folder / "configs" / name for name in names):
        if path.is_file():
            read_config(path)
