"""Whose plan the file in a run's folder is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["command_report"]


def command_report(path: Path) -> dict[str, Any] | None:
    """Return the report of a plan that `monai-iou train` made, None for one of the user's own, or for no plan.

    >>> command_report(Path("no/such/plan.json")) is None
    True
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))["plan_report"]
        return report if isinstance(report["asked"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
