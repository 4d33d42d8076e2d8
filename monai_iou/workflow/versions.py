"""What a run was made by: the command line, the versions, the machine."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from monai_iou.versions import version_of

__all__ = ["about_this_run"]

PACKAGES = ("monai-iou", "monai", "torch", "numpy", "pytorch-ignite")


def about_this_run(command: Sequence[str]) -> dict[str, Any]:
    """Return the command line, when it started, and the versions of what computes.

    Example:
        >>> about_this_run(["/home/alice/.venv/bin/monai-iou", "train", "my data"])["command"]
        "monai-iou train 'my data'"
    """
    return {
        "command": shlex.join([*_program(*command[:1]), *command[1:]]),
        "started": datetime.now(timezone.utc).astimezone().isoformat(timespec="seconds"),
        "versions": {"python": sys.version.split()[0], **{name: version_of(name) for name in PACKAGES}},
        "machine": platform.platform(),
    }


def _program(path: str = "") -> list[str]:
    """The program as a user calls it: where it lies is in nobody's command line.

    >>> _program("/usr/lib/python3/site-packages/monai/bundle/__main__.py"), _program("/home/alice/my.py"), _program()
    (['python', '-m', 'monai.bundle'], ['my.py'], [])
    """
    if Path(path).parts[-3:] == ("monai", "bundle", "__main__.py"):
        return ["python", "-m", "monai.bundle"]
    return [Path(path).name] if path else []
