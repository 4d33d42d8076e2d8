"""The page of a comparison: tables with the folders' names, paired plots, and the cases that changed most."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from monai_iou.evaluation import charts, resume
from monai_iou.evaluation.columns import COLUMNS
from monai_iou.evaluation.paired_scores import Evaluated, paired_keys, scores_of
from monai_iou.evaluation.rendering import number, render
from monai_iou.evaluation.svg import Point, shortened
from monai_iou.evaluation.thumbnails import show_picture

CHANGED_MOST = 10


def comparison_page(
    rows: Sequence[dict[str, Any]],
    evaluated: Sequence[Evaluated],
    ranking: Sequence[Mapping[str, Any]],
    primary: str,
    notes: Sequence[str] = (),
) -> str:
    """The whole page as text.

    Args:
        rows: of comparison.csv.
        evaluated: the folders.
        ranking: of ranking.csv; empty for two folders.
        primary: the metric that decides.
        notes: what the reader should know of the folders.
    """
    groups = []
    for first, second in itertools.combinations(evaluated, 2):
        pair = [row for row in rows if (row["baseline"], row["other"]) == (str(first.folder), str(second.folder))]
        labels = list(dict.fromkeys(row["label"] for row in pair))
        group = {
            "names": (first.name, second.name),
            "labels": [_label(label, pair, first, second, primary) for label in labels],
            "changed": _changed(first, second, primary),
        }
        groups.append(group)
    context = {
        "folders": [{"name": one.name, "path": str(one.folder)} for one in evaluated],
        "notes": notes,
        "groups": groups,
        "ranking": [
            {**row, "mean": number(row["mean"]), "share": f"{100 * row['share_first']:.0f} %"} for row in ranking
        ],
        "primary": COLUMNS[primary].title,
        "unit": "patients" if any(one.patients for one in evaluated) else "cases",
    }
    return render("comparison.html", context)


def _label(
    label: str, pair: Sequence[dict[str, Any]], first: Evaluated, second: Evaluated, primary: str
) -> dict[str, Any]:
    chosen = [row for row in pair if row["label"] == label]
    points = [
        Point(x, y, f"{key[0]}: {number(x)} and {number(y)}")
        for key, x, y in _scores(first, second, primary)
        if key[1] == label
    ]
    plots = [charts.paired(points, first.name, second.name, COLUMNS[primary])] if points else []
    return {
        "label": first.titles.get(label, label),
        "rows": [_texts(row, first.name, second.name) for row in chosen],
        "plots": [*plots, *_forests(chosen, second.name, first.name)],
    }


def _scores(first: Evaluated, second: Evaluated, metric: str) -> list[tuple[tuple[str, str], float, float]]:
    pairs = [(key, scores_of((first, second), key, metric)) for key in paired_keys(first, second)]
    return [(key, x, y) for key, (x, y) in pairs if math.isfinite(x) and math.isfinite(y)]


def _changed(first: Evaluated, second: Evaluated, metric: str) -> list[dict[str, Any]]:
    """The cases whose primary score differs most, with both pictures."""
    ranked = sorted(_scores(first, second, metric), key=lambda item: -abs(item[2] - item[1]))
    chosen = [item for item in ranked if item[1] != item[2]][:CHANGED_MOST]
    return [
        {
            "case": case,
            "label": first.titles.get(label, label),
            "scores": (number(x), number(y)),
            "difference": f"{y - x:+.3f}",
            "views": [
                {"name": one.name, "crop": show_picture(picture, None)}
                for one in (first, second)
                if (picture := resume.read_picture(one.folder, case, label)) is not None
            ],
        }
        for (case, label), x, y in chosen
    ]


def _forests(rows: Sequence[dict[str, Any]], other: str, baseline: str) -> list[str]:
    """Scores from 0 to 1 and distances in mm have an axis each."""
    plots = []
    for bounded, unit in ((True, "scores"), (False, "mm (below zero is better)")):
        lines = [
            (COLUMNS[row["metric"]].title, row["difference"], row["low"], row["high"], _p(row))
            for row in rows
            if COLUMNS[row["metric"]].bounded == bounded and row["difference"] is not None
        ]
        plots += [charts.forest(lines, f"{shortened(other, 20)} - {shortened(baseline, 20)}, {unit}")] if lines else []
    return plots


def _texts(row: dict[str, Any], first: str, second: str) -> dict[str, Any]:
    column = COLUMNS[row["metric"]]
    interval = "" if row["low"] is None else f"{number(row['low'])} to {number(row['high'])}"
    winner = {"baseline": first, "other": second}.get(row["better"], "no evidence")
    return {
        "title": column.title,
        "definition": column.definition,
        "primary": row["family"] == "primary",
        "n": row["n"],
        "baseline": number(row["baseline_mean"]),
        "other": number(row["other_mean"]),
        "difference": "-" if row["difference"] is None else f"{row['difference']:+.3f}",
        "interval": interval or "fewer than 8",
        "p": number(row["p"], 4),
        "p_holm": number(row["p_holm"], 4) if row["family"] == "primary" else "",
        "better": winner if row["family"] == "primary" else "exploratory",
    }


def _p(row: Mapping[str, Any]) -> str:
    value = row["p_holm"] if row["family"] == "primary" else row["p"]
    return "" if value is None else f"p = {value:.3g}"
