"""The report: one HTML file with everything in it, from an evaluation's rows and summary."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from monai_iou.evaluation import charts
from monai_iou.evaluation.case_table import case_table
from monai_iou.evaluation.columns import Column, columns_of
from monai_iou.evaluation.map_charts import probability_charts
from monai_iou.evaluation.pictures import MISSED_SHOWN, missed_lesions, shown_pictures
from monai_iou.evaluation.rendering import number, readable, render
from monai_iou.evaluation.results import Evaluation
from monai_iou.evaluation.statistics import MIN_UNITS, dataset_scores
from monai_iou.evaluation.svg import MANY_DOTS, NAMED_DOTS, Point
from monai_iou.tables import counted

__all__ = ["number", "render", "report_text"]

HEADLINE = ("iou", "dice", "precision", "recall", "boundary_iou", "nsd", "hd95_mm", "lesion_f1")
DISTRIBUTIONS = ("iou", "nsd", "hd95_mm", "lesion_f1")
# With more labels than this their charts are folded, and a heat map of cases and labels comes first.
MANY_LABELS = 8
TILES = 4
# Of a heat map: some browsers draw no canvas of more than 16,384 pixels in one direction, or 16,777,216 in all. A cell
# takes 6 by 3 of them or more.
HEAT_CASES, HEAT_CELLS = 5000, 900_000


def report_text(evaluation: Evaluation) -> str:
    """The report as one file that needs no network.

    Args:
        evaluation: with its summary.
    """
    summary = evaluation.summary
    titles = summary["titles"]
    pictures = shown_pictures(evaluation)
    viewers = {(picture["case"], picture["label"]): i for i, picture in enumerate(pictures)}
    by_label, lesions = _by_label(evaluation.rows, titles), _by_label(evaluation.counted_lesions, titles)
    columns = columns_of(evaluation.request.rules.challenge)
    context = {
        "cases": summary["cases"],
        "titles": titles,
        "many": len(titles) > MANY_LABELS,
        "failures": summary["failures"],
        "notes": summary["notes"],
        "tiles": _tiles(evaluation, titles, lesions),
        "headline": [columns[name] for name in HEADLINE],
        "score_rows": [
            {"label": titles[name], "cells": _cells(summary["labels"][name], columns, summary["options"]["unit"])}
            for name in titles
        ],
        "least_units": MIN_UNITS,
        "distributions": _distributions(by_label, columns, titles),
        "heat": _heat(evaluation, titles),
        "labels": [
            {
                **_label(titles[name], by_label[name], lesions[name]),
                "curve": _f1_chart(summary["lesion_f1_curves"][name]),
            }
            for name in titles
        ],
        "maps": _maps(summary["probabilities"], titles),
        "lesion": evaluation.request.rules.lesion_in_words,
        "rule": summary["options"]["lesion_rule"],
        "pictures": pictures,
        "missed": missed_lesions(evaluation, pictures),
        "missed_total": sum(row["status"] == "fn" for rows in lesions.values() for row in rows),
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


def _by_label(rows: Iterable[Mapping[str, Any]], titles: Iterable[str]) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of each label, in one pass over all of them."""
    found: dict[str, list[Mapping[str, Any]]] = {name: [] for name in titles}
    for row in rows:
        found[row["label"]].append(row)
    return found


def _tiles(
    evaluation: Evaluation, titles: Mapping[str, str], lesions: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[dict[str, str]]:
    """Cases, then IoU and Dice of each label: regions overlap, and are never pooled with their parts."""
    summary = evaluation.summary
    cases, labels, options = summary["cases"], summary["labels"], summary["options"]
    failed = f"{cases['failed']} failed" if cases["failed"] else "none failed"
    patients = f", from {counted(options['patients'], 'patient')}" if options["patients"] else ""
    tiles = [{"what": "Cases", "value": str(cases["evaluated"]), "note": f"of {cases['paired']}{patients}; {failed}"}]
    for kind, name in _headed(labels, titles):
        iou, dice = labels[name]["iou"], labels[name]["dice"]
        interval = _interval(iou["mean_interval"], 3, options["unit"])
        tiles.append(
            {
                "what": f"{kind}{titles[name]}",
                "value": f"IoU {number(iou['mean'])}",
                "note": f"{interval}{_missing(iou)}. Dice {number(dice['mean'])}",
            }
        )
    if len(titles) == 1:
        (name,) = titles
        # Not that of `dataset`, which may leave out false positives in cases without the label: the mean counts them.
        worst = number(dataset_scores(evaluation.averaged, present="either")["iou_i_worst_10"])
        tiles.append({"what": "Worst 10 % of cases", "value": f"IoU {worst}", "note": "mean of the lowest"})
        tiles.append(_lesion_tile(evaluation, lesions[name]))
    return tiles


def _headed(labels: Mapping[str, Any], titles: Iterable[str]) -> list[tuple[str, str]]:
    """The labels that have a tile, each with what it is called: all of a few; else the lowest, middle and highest."""
    names = list(titles)
    if len(names) > TILES:
        names = [name for name in names if labels[name]["iou"]["mean"] is not None]
    if len(names) <= TILES:
        return [("", name) for name in names]
    ranked = sorted(names, key=lambda name: labels[name]["iou"]["mean"])
    return [("lowest: ", ranked[0]), ("middle: ", ranked[len(ranked) // 2]), ("highest: ", ranked[-1])]


def _lesion_tile(evaluation: Evaluation, lesions: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The lesions found, and the same with or without those of missing cases where these have some."""
    status = [row["status"] for row in lesions]
    detected, missed, false = (status.count(kind) for kind in ("tp", "fn", "fp"))
    note, total, unseen = counted(false, "false positive"), detected + missed, len(evaluation.missing_lesions)
    if unseen and evaluation.request.missing == "exclude":
        note += f". With the missing cases {detected} of {total + unseen}"
    elif unseen:
        note += f". Without the missing cases {detected} of {total - unseen}"
    return {"what": "Lesions found", "value": f"{detected} of {total}", "note": note}


def _missing(score: Mapping[str, Any]) -> str:
    """Both means of the IoU where something is missing."""
    missing = score["n_penalty"] - score["n_defined"]
    if not missing:
        return ""
    with_worst, left_out = number(score["mean_penalty"]), number(score["mean_defined"])
    return f". IoU {with_worst} with {missing} missing, {left_out} without {'it' if missing == 1 else 'them'}"


def _other_mean(score: Mapping[str, Any], digits: int) -> str:
    """The mean that is not the main one, where something is missing."""
    missing = score["n_penalty"] - score["n_defined"]
    if not missing:
        return ""
    if score["n"] == score["n_penalty"]:
        return f"without {missing} missing {number(score['mean_defined'], digits)}"
    return f"with {missing} missing {number(score['mean_penalty'], digits)}"


def _interval(bounds: Sequence[float] | None, digits: int, unit: str) -> str:
    if bounds is None:
        return f"No interval with fewer than {MIN_UNITS} {unit}s"
    return f"95 % interval {number(bounds[0], digits)} to {number(bounds[1], digits)}"


def _cells(scores: Mapping[str, Mapping[str, Any]], columns: Mapping[str, Column], unit: str) -> list[dict[str, str]]:
    cells = []
    for name in HEADLINE:
        score, digits = scores[name], columns[name].digits
        patients = f" of {counted(score['units'], 'patient')}" if unit == "patient" else ""
        count = f", n = {score['n']}{patients}" if score["undefined"] else ""
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
    by_label: Mapping[str, Sequence[Mapping[str, Any]]], columns: Mapping[str, Column], titles: Mapping[str, str]
) -> list[dict[str, Any]]:
    result = []
    for name in DISTRIBUTIONS:
        column = columns[name]
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
    """IoU of cases and labels in hundredths, None where it is undefined, the lowest mean first; for many labels."""
    if len(titles) <= MANY_LABELS:
        return None
    places = {name: i for i, name in enumerate(titles)}
    values: dict[str, list[int | None]] = {}
    for row in evaluation.rows:
        line = values.setdefault(row["case"], [None] * len(places))
        if not math.isnan(row["iou"]):
            line[places[row["label"]]] = round(100 * row["iou"])
    ranked = sorted(values, key=lambda case: _mean_of(values[case]))
    shown = ranked[: min(HEAT_CASES, HEAT_CELLS // len(titles))]
    return {
        "cases": [readable(case) for case in shown],
        "labels": list(titles.values()),
        "values": [values[case] for case in shown],
        "left_out": len(ranked) - len(shown),
    }


def _mean_of(line: Sequence[int | None]) -> float:
    """The mean of what is defined; infinite where nothing is, so that it comes last."""
    known = [value for value in line if value is not None]
    return sum(known) / len(known) if known else math.inf


def _label(title: str, rows: Sequence[Mapping[str, Any]], lesions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The charts of one label: lesions found by volume, and agreement of volumes."""
    detection = [(row["volume_ml"] * 1000, row["status"] == "tp") for row in lesions if row["kind"] == "reference"]
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
