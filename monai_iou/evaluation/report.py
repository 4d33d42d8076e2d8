"""The report: one HTML file with everything in it, from an evaluation's rows and summary."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from monai_iou.evaluation import charts
from monai_iou.evaluation.case_table import case_table
from monai_iou.evaluation.columns import COLUMNS, columns_of
from monai_iou.evaluation.map_charts import probability_charts
from monai_iou.evaluation.pictures import MISSED_SHOWN, missed_lesions, shown_pictures
from monai_iou.evaluation.rendering import number, readable, render
from monai_iou.evaluation.results import Evaluation
from monai_iou.evaluation.statistics import MIN_UNITS
from monai_iou.evaluation.svg import MANY_DOTS, NAMED_DOTS, Point

__all__ = ["number", "render", "report_text"]

HEADLINE = ("iou", "dice", "precision", "recall", "boundary_iou", "nsd", "hd95_mm", "lesion_f1")
DISTRIBUTIONS = ("iou", "nsd", "hd95_mm", "lesion_f1")
# With more labels than this their charts are folded, and a heat map of cases and labels comes first.
MANY_LABELS = 8
TILES = 4


def report_text(evaluation: Evaluation) -> str:
    """The report as one file that needs no network.

    Args:
        evaluation: with its summary.
    """
    summary = evaluation.summary
    titles = summary["titles"]
    pictures = shown_pictures(evaluation)
    viewers = {(picture["case"], picture["label"]): i for i, picture in enumerate(pictures)}
    by_label = {name: [row for row in evaluation.rows if row["label"] == name] for name in titles}
    columns = columns_of(evaluation.request.rules.challenge)
    context = {
        "cases": summary["cases"],
        "titles": titles,
        "many": len(titles) > MANY_LABELS,
        "failures": summary["failures"],
        "notes": summary["notes"],
        "tiles": _tiles(evaluation, titles),
        "headline": [COLUMNS[name] for name in HEADLINE],
        "score_rows": [{"label": titles[name], "cells": _cells(summary["labels"][name])} for name in titles],
        "least_units": MIN_UNITS,
        "distributions": _distributions(by_label, titles),
        "heat": _heat(evaluation, titles),
        "labels": [
            {
                **_label(name, titles[name], by_label[name], evaluation.lesions),
                "curve": _f1_chart(summary["lesion_f1_curves"][name]),
            }
            for name in titles
        ],
        "maps": _maps(summary["probabilities"], titles),
        "rule": summary["options"]["lesion_rule"],
        "pictures": pictures,
        "missed": missed_lesions(evaluation, pictures),
        "missed_total": sum(row["status"] == "fn" for row in evaluation.lesions),
        "missed_shown": MISSED_SHOWN,
        "definitions": list(columns.values()),
        "table": case_table(evaluation.rows, columns, viewers),
        "many_dots": MANY_DOTS,
        "named_dots": NAMED_DOTS,
        "options": summary["options"],
        "command": summary["command"],
        "versions": summary["versions"],
    }
    return render("report.html", context)


def _tiles(evaluation: Evaluation, titles: Mapping[str, str]) -> list[dict[str, str]]:
    """Cases, then IoU and Dice of each label: regions overlap, and are never pooled with their parts."""
    summary = evaluation.summary
    cases, labels = summary["cases"], summary["labels"]
    failed = f"{cases['failed']} failed" if cases["failed"] else "none failed"
    tiles = [{"what": "Cases", "value": str(cases["evaluated"]), "note": f"of {cases['paired']}; {failed}"}]
    ranked = sorted(titles, key=lambda name: labels[name]["iou"]["mean"] or 0.0)
    chosen = list(titles) if len(titles) <= TILES else [ranked[0], ranked[len(ranked) // 2], ranked[-1]]
    kinds = ("",) * TILES if len(titles) <= TILES else ("lowest: ", "middle: ", "highest: ")
    for kind, name in zip(kinds, chosen, strict=False):
        iou, dice = labels[name]["iou"], labels[name]["dice"]
        tiles.append(
            {
                "what": f"{kind}{titles[name]}",
                "value": f"IoU {number(iou['mean'])}",
                "note": f"Dice {number(dice['mean'])}. {_interval(iou['mean_interval'], 3)}{_missing(iou)}",
            }
        )
    if len(titles) == 1:
        dataset, (name,) = summary["dataset"], titles
        worst = number(dataset["iou_i_worst_10"])
        tiles.append({"what": "Worst 10 % of cases", "value": f"IoU {worst}", "note": "mean of the lowest"})
        tiles.append(_lesion_tile(evaluation.lesions, name))
    return tiles


def _lesion_tile(lesions: Sequence[Mapping[str, Any]], name: str) -> dict[str, str]:
    status = [row["status"] for row in lesions if row["label"] == name]
    detected, missed, false = (status.count(kind) for kind in ("tp", "fn", "fp"))
    return {"what": "Lesions found", "value": f"{detected} of {detected + missed}", "note": f"{false} false positives"}


def _missing(score: Mapping[str, Any]) -> str:
    """Both means where something is missing."""
    missing = score["n_penalty"] - score["n_defined"]
    if not missing:
        return ""
    return f". With the {missing} missing {number(score['mean_penalty'])}, without them {number(score['mean_defined'])}"


def _other_mean(score: Mapping[str, Any], digits: int) -> str:
    """The mean that is not the main one, where something is missing."""
    missing = score["n_penalty"] - score["n_defined"]
    if not missing:
        return ""
    if score["n"] == score["n_penalty"]:
        return f"without {missing} missing {number(score['mean_defined'], digits)}"
    return f"with {missing} missing {number(score['mean_penalty'], digits)}"


def _interval(bounds: Sequence[float] | None, digits: int) -> str:
    if bounds is None:
        return f"No interval below {MIN_UNITS} cases"
    return f"95 % interval {number(bounds[0], digits)} to {number(bounds[1], digits)}"


def _cells(scores: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    cells = []
    for name in HEADLINE:
        score, digits = scores[name], COLUMNS[name].digits
        count = f", n = {score['n']}" if score["undefined"] else ""
        bounds = score["mean_interval"]
        cells.append(
            {
                "main": number(score["mean"], digits),
                "interval": "" if bounds is None else f"{number(bounds[0], digits)} to {number(bounds[1], digits)}",
                "median": f"median {number(score['median'], digits)}{count}",
                "other": _other_mean(score, digits),
            }
        )
    return cells


def _distributions(
    by_label: Mapping[str, Sequence[Mapping[str, Any]]], titles: Mapping[str, str]
) -> list[dict[str, Any]]:
    result = []
    for name in DISTRIBUTIONS:
        column = COLUMNS[name]
        points = [
            (
                titles[label],
                [
                    Point(row[name], 0.0, f"{row['case']}: {number(row[name], column.digits)}")
                    for row in rows
                    if math.isfinite(row[name])
                ],
            )
            for label, rows in by_label.items()
        ]
        # A chart must fit on a page.
        parts = [dict(points[i : i + MANY_LABELS]) for i in range(0, len(points), MANY_LABELS)]
        svgs = [charts.distribution(part, column.title, column.bounded) for part in parts]
        result.append({"title": column.title, "svgs": svgs})
    return result


def _heat(evaluation: Evaluation, titles: Mapping[str, str]) -> dict[str, Any] | None:
    """IoU of cases and labels in hundredths, None where it is undefined; for many labels."""
    if len(titles) <= MANY_LABELS:
        return None
    places = {name: i for i, name in enumerate(titles)}
    values: dict[str, list[int | None]] = {}
    for row in evaluation.rows:
        line = values.setdefault(row["case"], [None] * len(places))
        if not math.isnan(row["iou"]):
            line[places[row["label"]]] = round(100 * row["iou"])
    return {
        "cases": [readable(case) for case in values],
        "labels": list(titles.values()),
        "values": list(values.values()),
    }


def _label(
    name: str, title: str, rows: Sequence[Mapping[str, Any]], lesions: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The charts of one label: lesions found by volume, and agreement of volumes."""
    detection = [
        (row["volume_ml"] * 1000, row["status"] == "tp")
        for row in lesions
        if row["label"] == name and row["kind"] == "reference"
    ]
    points = [
        Point(
            (row["reference_ml"] + row["prediction_ml"]) / 2,
            row["prediction_ml"] - row["reference_ml"],
            f"{row['case']}: {row['prediction_ml'] - row['reference_ml']:+.3f} ml",
        )
        for row in rows
        if row["reference_ml"] > 0 or row["prediction_ml"] > 0
    ]
    return {
        "title": title,
        "recall": charts.recall_chart(detection, "Lesion volume, mm³"),
        "found": sum(hit for _, hit in detection),
        "total": len(detection),
        "agreement": charts.bland_altman(points),
    }


def _f1_chart(found: Mapping[str, Any]) -> str | None:
    """The F1 of lesions by the threshold from which on a lesion counts as found."""
    if found["f1"] is None:
        return None
    points = [Point(x, y, f"{y:.3f} from {x:g} on") for x, y in zip(found["thresholds"], found["f1"], strict=True)]
    measure = "IoU" if found["measure"] == "iou" else "Covered share"
    return charts.curve({"mean F1": points}, f"{measure} from which on a lesion is found", "Lesion F1", "Lesion F1")


def _maps(maps: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str]) -> list[dict[str, Any]]:
    """The figures of the probability maps, for each label."""
    names = ("best_threshold", "best_iou", "iou_at_half", "average_precision", "ece", "ace")
    return [
        {
            "title": titles[name],
            **{key: number(scores[key]) for key in names},
            "cases": scores["cases"],
            "froc": scores["froc"]["sensitivity_at"],
            "svgs": probability_charts(scores),
        }
        for name, scores in maps.items()
    ]
