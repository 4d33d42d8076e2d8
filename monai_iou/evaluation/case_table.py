"""The report's table of all cases as data, from which the page makes the rows that are in sight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from monai_iou.evaluation.columns import Column
from monai_iou.evaluation.rendering import readable

__all__ = ["MOST_ROWS", "case_table"]

# Some 15 bytes a cell: more rows would make a page that is slow to send and to open.
MOST_ROWS = 20_000


def case_table(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Column], viewers: Mapping[tuple[str, str], int]
) -> dict[str, Any]:
    """Headings, and each row as the number of its picture or None, case, label and scores.

    Args:
        rows: of cases.csv.
        columns: of the scores.
        viewers: number of the picture of a case and label.

    Returns:
        `headings` with `title`, `definition` and `digits` (None for text); `rows`, at most `MOST_ROWS`, those of the
        lowest IoU if there are more; and `left_out`, how many are not among them.
    """
    headings = [
        {"title": "Case", "definition": "Name of the case.", "digits": None},
        {"title": "Label", "definition": "Label value or region.", "digits": None},
        *({"title": c.title, "definition": c.definition, "digits": c.digits} for c in columns.values()),
    ]
    chosen = rows if len(rows) <= MOST_ROWS else sorted(rows, key=_worst_first)[:MOST_ROWS]
    return {
        "headings": headings,
        "rows": [_row(row, columns, viewers.get((row["case"], row["label"]))) for row in chosen],
        "left_out": len(rows) - len(chosen),
    }


def _worst_first(row: Mapping[str, Any]) -> float:
    return 2.0 if math.isnan(row["iou"]) else float(row["iou"])


def _row(row: Mapping[str, Any], columns: Mapping[str, Column], viewer: int | None) -> list[Any]:
    scores = [_score(row[name], column.digits) for name, column in columns.items()]
    return [viewer, readable(row["case"]), row["label"], *scores]


def _score(value: float, digits: int) -> float | str | None:
    """A number as JSON can hold it, with three digits more than are shown, by which rows are sorted.

    >>> _score(1 / 3, 2), _score(float("inf"), 2), _score(float("nan"), 2), _score(7, 0)
    (0.33333, 'Infinity', None, 7)
    """
    if math.isnan(value):
        return None
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    rounded = round(float(value), digits + 3)
    return int(rounded) if rounded.is_integer() else rounded
