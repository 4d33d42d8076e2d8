"""The page of a comparison: tables with the folders' names, paired plots, and the cases that changed most."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from monai_iou.evaluation import charts, resume
from monai_iou.evaluation.columns import COLUMNS, columns_of
from monai_iou.evaluation.paired_scores import Evaluated, paired_keys, scores_of
from monai_iou.evaluation.rendering import number, render
from monai_iou.evaluation.statistics import MIN_UNITS
from monai_iou.evaluation.svg import Point, shortened
from monai_iou.evaluation.thumbnails import show_picture
from monai_iou.tables import counted

CHANGED_MOST = 10
_Key = tuple[str, str]  # case and label
_Rows = Sequence[dict[str, Any]]


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
    by_pair: defaultdict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_pair[row["names"]].append(row)
    groups = [
        _group(by_pair[first.name, second.name], first, second, primary)
        for first, second in itertools.combinations(evaluated, 2)
    ]
    everywhere = _by_label(paired_keys(*evaluated)) if ranking else {}
    context = {
        "folders": [{"name": one.name, "path": str(one.folder)} for one in evaluated],
        "notes": notes,
        "groups": groups,
        "ranking": [
            {
                **row,
                "label": evaluated[0].titles.get(row["label"], row["label"]),
                "mean": number(row["mean"]),
                **_certainty(row, evaluated[0].unit),
                "n": _counted(row["n"], everywhere[row["label"]], evaluated, primary),
            }
            for row in ranking
        ],
        "primary": COLUMNS[primary].title,
        "unit": evaluated[0].unit,
        "least_units": MIN_UNITS,
    }
    return render("comparison.html", context)


def _certainty(row: Mapping[str, Any], unit: str) -> dict[str, str]:
    """How sure a rank is, as the page says it."""
    if row["rank_low"] is None:
        return {"ranks": f"fewer than {MIN_UNITS} {unit}", "share": ""}
    return {"ranks": f"{row['rank_low']:g} to {row['rank_high']:g}", "share": f"{100 * row['share_first']:.0f} %"}


def _group(rows: _Rows, first: Evaluated, second: Evaluated, primary: str) -> dict[str, Any]:
    """The section of two folders; every case's scores are looked up once, for all labels."""
    by_label: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_label.setdefault(row["label"], []).append(row)
    keys = _by_label(paired_keys(first, second))
    scores = {label: _scores(keys[label], first, second, primary) for label in keys}
    return {
        "names": (first.name, second.name),
        "labels": [
            {
                "label": first.titles.get(label, label),
                "rows": [_texts(row, keys[label], first, second) for row in chosen],
                "plots": [
                    *_paired_plots(scores.get(label, {}), first, second, primary),
                    *_forests(chosen, second.name, first.name),
                ],
            }
            for label, chosen in by_label.items()
        ],
        "changed": _changed(scores, first, second),
    }


def _by_label(keys: Iterable[_Key]) -> defaultdict[str, list[_Key]]:
    """The cases of each label; none of a label that they lack."""
    found: defaultdict[str, list[_Key]] = defaultdict(list)
    for key in keys:
        found[key[1]].append(key)
    return found


def _counted(n: int, keys: Sequence[_Key], evaluated: Sequence[Evaluated], metric: str) -> str:
    """How many cases were compared, and of how many patients where these are the unit."""
    if evaluated[0].unit == "cases":
        return str(n)
    if n < len(keys):
        keys = [key for key in keys if all(map(math.isfinite, scores_of(evaluated, key, metric)))]
    return f"{n} of {counted(len({evaluated[0].patient(case) for case, _ in keys}), 'patient')}"


def _paired_plots(
    scores: Mapping[_Key, tuple[float, float]], first: Evaluated, second: Evaluated, primary: str
) -> list[str]:
    points = [Point(x, y, f"{case}: {number(x)} and {number(y)}") for (case, _), (x, y) in scores.items()]
    return [charts.paired(points, first.name, second.name, COLUMNS[primary])] if points else []


def _scores(keys: Sequence[_Key], first: Evaluated, second: Evaluated, metric: str) -> dict[_Key, tuple[float, float]]:
    """The scores of both folders where both are defined."""
    pairs = {key: scores_of((first, second), key, metric) for key in keys}
    return {key: (x, y) for key, (x, y) in pairs.items() if math.isfinite(x) and math.isfinite(y)}


def _changed(
    scores: Mapping[str, Mapping[_Key, tuple[float, float]]], first: Evaluated, second: Evaluated
) -> list[dict[str, Any]]:
    """The cases whose primary score differs most, with both pictures."""
    every = sorted((key, x, y) for of_label in scores.values() for key, (x, y) in of_label.items() if x != y)
    chosen = sorted(every, key=lambda item: -abs(item[2] - item[1]))[:CHANGED_MOST]
    return [
        {
            "case": case,
            "label": first.titles.get(label, label),
            "scores": (number(x), number(y)),
            "difference": f"{y - x:+.3f}",
            "views": [
                {"name": one.name, "crop": show_picture(picture, None)}
                for one in (first, second)
                # Where it failed, the kept picture is of an earlier prediction.
                if case not in one.failed and (picture := resume.read_picture(one.folder, case, label)) is not None
            ],
        }
        for (case, label), x, y in chosen
    ]


def _forests(rows: _Rows, other: str, baseline: str) -> list[str]:
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


def _texts(row: dict[str, Any], keys: Sequence[_Key], first: Evaluated, second: Evaluated) -> dict[str, Any]:
    column, pair = columns_of(first.challenge or second.challenge)[row["metric"]], (first, second)
    interval = "" if row["low"] is None else f"{number(row['low'])} to {number(row['high'])}"
    winner = {"baseline": first.name, "other": second.name}.get(row["better"], "no evidence")
    return {
        "title": column.title,
        "definition": column.definition,
        "primary": row["family"] == "primary",
        "n": _counted(row["n"], keys, pair, row["metric"]),
        "baseline": number(row["baseline_mean"]),
        "other": number(row["other_mean"]),
        "difference": "-" if row["difference"] is None else f"{row['difference']:+.3f}",
        "interval": interval or f"fewer than {MIN_UNITS} {row['unit']}",
        "p": number(row["p"], 4),
        "p_holm": number(row["p_holm"], 4) if row["family"] == "primary" else "",
        "better": winner if row["family"] == "primary" else "exploratory",
    }


def _p(row: Mapping[str, Any]) -> str:
    value = row["p_holm"] if row["family"] == "primary" else row["p"]
    return "" if value is None else f"p = {value:.3g}"
