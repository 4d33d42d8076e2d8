"""`summary.html`: a training on one page, with its curves, the scores of each class and the worst validation cases."""

from __future__ import annotations

import base64
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai_iou.evaluation.columns import COLUMNS
from monai_iou.evaluation.pictures import shown_pictures
from monai_iou.evaluation.rendering import number, render
from monai_iou.evaluation.results import Evaluation
from monai_iou.files import write_text
from monai_iou.workflow.extra_files import read_epochs

__all__ = ["has_scored_page", "write_summary"]

SCORED = "the full report is"  # in a page with the scores of the held-out cases

SCORES = ("iou", "dice", "precision", "recall", "hd95_mm", "lesion_f1")
KEY_SCORE = "val_mean_iou"
DIGITS = 4  # of the scores in training, as in the log


def write_summary(
    folder: Path,
    pictures: Mapping[str, str] | None = None,
    evaluation: Evaluation | None = None,
    *,
    notes: Sequence[str] = (),
    trained: bool = False,
) -> Path:
    """Write the page from what lies in a run's folder.

    Args:
        folder: of the run, with `epochs.csv`, `progress.png` and `config.json` as far as they are there.
        pictures: case -> file in its `pictures`; None takes those that are there.
        evaluation: of the held-out cases on their own grids, if it is done: their scores, and the worst cases slice by
            slice.
        notes: what the reader should know before these scores.
        trained: whether the training trained on these cases as well, as with a single patient.

    Returns:
        The page's path.
    """
    rows = read_epochs(folder / "epochs.csv")[0] if (folder / "epochs.csv").is_file() else []
    config = _config(folder)
    about = config.pop("about", {})
    shown = evaluation and shown_pictures(evaluation)
    last, best = rows[-1] if rows else {}, _best(rows)
    context = {
        "name": folder.resolve().name,
        "curves": _embedded(folder / "progress.png"),
        "epochs": _epoch(last),
        "best": {"epoch": _epoch(best), "iou": number(_value(best, KEY_SCORE), DIGITS)} if best else None,
        "validations": [
            {"name": name, "last": number(_value(last, name), DIGITS), "best": number(_value(best, name), DIGITS)}
            for name in last
            if name.startswith("val_")
        ],
        "pictures": [
            {"case": case, "data": _embedded(folder / "pictures" / file)}
            for case, file in (pictures or {path.stem: path.name for path in _drawn(folder)}).items()
        ],
        "scores": _scores(evaluation),
        "score_names": [COLUMNS[name].title for name in SCORES],
        "titles": evaluation and evaluation.summary["titles"],
        "viewers": shown or [],
        "cases": len({row["case"] for row in evaluation.averaged} if evaluation else ()),
        "paired": len(evaluation.pairs if evaluation else ()),
        "failures": evaluation.failures if evaluation else [],
        "notes": notes,
        "trained": trained,
        "report": evaluation and os.path.relpath(evaluation.request.output / "report.html", folder),
        "about": about,
        "keys": {
            name: json.dumps(_as_typed(value, about.get("command", "")))
            for name, value in config.items()
            if not isinstance(value, (dict, list))
        },
    }
    path = folder / "summary.html"
    write_text(path, render("summary.html", context))
    return path


def has_scored_page(folder: Path) -> bool:
    """Return whether a training's page has the scores of its held-out cases; without `epochs.csv` there is no page."""
    try:
        return not (folder / "epochs.csv").is_file() or SCORED in (folder / "summary.html").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def _drawn(folder: Path) -> list[Path]:
    return sorted((folder / "pictures").glob("*.png"))


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return dict(content)


def _as_typed(value: Any, command: str) -> Any:
    """A path without the working folder, of which the page's reader need not know, unless the command line has it.

    >>> whole = str(Path("data").absolute())
    >>> [_as_typed(whole, f"monai-iou train {name}") == name for name in ("data", whole)]
    [True, True]
    """
    if not isinstance(value, str) or value in command:
        return value
    here = str(Path.cwd())
    return "." if value == here else re.sub(rf"(?<![\w./\\-]){re.escape(here + os.sep)}", "", value)


def _embedded(path: Path) -> str | None:
    """A picture as a data URI: the page is one file."""
    if not path.is_file():
        return None
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def _best(rows: Sequence[Mapping[str, str]]) -> Mapping[str, str]:
    """The epoch with the highest mean validation IoU; empty where none is defined."""
    scored = [row for row in rows if not math.isnan(_value(row, KEY_SCORE))]
    return max(scored, key=lambda row: _value(row, KEY_SCORE), default={})


def _value(row: Mapping[str, str], column: str) -> float:
    """A number of `epochs.csv`; NaN where the cell is empty, as in an epoch without a validation."""
    return float(row.get(column) or "nan")


def _epoch(row: Mapping[str, str]) -> int | None:
    return int(float(row["epoch"])) if row else None


def _scores(evaluation: Evaluation | None) -> list[dict[str, Any]]:
    """Means of each label over the held-out cases."""
    if evaluation is None:
        return []
    labels, titles = evaluation.summary["labels"], evaluation.summary["titles"]
    return [
        {"label": titles[label], "cells": [number(scores[name]["mean"]) for name in SCORES]}
        for label, scores in labels.items()
    ]
