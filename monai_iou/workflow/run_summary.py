"""`summary.html`: a training on one page, with its curves, the scores of each class and the worst validation cases."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai_iou.evaluation.columns import COLUMNS
from monai_iou.evaluation.pictures import shown_pictures
from monai_iou.evaluation.rendering import number, render
from monai_iou.evaluation.results import Evaluation
from monai_iou.files import write_text
from monai_iou.workflow.extra_files import read_epochs

__all__ = ["write_summary"]

SCORES = ("iou", "dice", "precision", "recall", "hd95_mm", "lesion_f1")


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
    shown = evaluation and shown_pictures(evaluation)
    context = {
        "name": folder.resolve().name,
        "curves": _embedded(folder / "progress.png"),
        "best": _best(rows),
        "last": rows[-1] if rows else {},
        "columns": [name for name in (rows[-1] if rows else {}) if name.startswith("val_")],
        "pictures": [
            {"case": case, "data": _embedded(folder / "pictures" / file)}
            for case, file in (pictures or {path.stem: path.name for path in _drawn(folder)}).items()
        ],
        "scores": _scores(evaluation),
        "score_names": [COLUMNS[name].title for name in SCORES],
        "titles": evaluation and evaluation.summary["titles"],
        "viewers": shown or [],
        "cases": evaluation and len(evaluation.records),
        "notes": notes,
        "trained": trained,
        "report": evaluation and os.path.relpath(evaluation.request.output / "report.html", folder),
        "about": config.pop("about", {}),
        "keys": {name: json.dumps(value) for name, value in config.items() if not isinstance(value, (dict, list))},
    }
    path = folder / "summary.html"
    write_text(path, render("summary.html", context))
    return path


def _drawn(folder: Path) -> list[Path]:
    return sorted((folder / "pictures").glob("*.png"))


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return dict(content)


def _embedded(path: Path) -> str | None:
    """A picture as a data URI: the page is one file."""
    if not path.is_file():
        return None
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def _best(rows: Sequence[Mapping[str, str]]) -> Mapping[str, str]:
    """The epoch with the highest mean validation IoU."""
    scored = [row for row in rows if row.get("val_mean_iou")]
    return max(scored, key=lambda row: float(row["val_mean_iou"])) if scored else {}


def _scores(evaluation: Evaluation | None) -> list[dict[str, Any]]:
    """Means of each label over the held-out cases."""
    if evaluation is None:
        return []
    labels, titles = evaluation.summary["labels"], evaluation.summary["titles"]
    return [
        {"label": titles[label], "cells": [number(scores[name]["mean"]) for name in SCORES]}
        for label, scores in labels.items()
    ]
