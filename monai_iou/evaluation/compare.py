"""Compare evaluated folders: paired differences per metric, intervals, corrected permutation tests and a plot."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from monai_iou import files as out
from monai_iou.evaluation import charts
from monai_iou.evaluation.report import COLUMNS, number, render
from monai_iou.evaluation.statistics import holm, paired_test

# The columns that rank a method; counts and volumes do not.
CHOICES = tuple(
    name for name in COLUMNS if not name.endswith("_ml") and name not in {"lesion_tp", "lesion_fp", "lesion_fn"}
)
# RQ is lesion F1 by another name: testing it too would only make the correction harsher.
METRICS = tuple(name for name in CHOICES if name != "rq")
LOWER_IS_BETTER = ("hd95_mm", "assd_mm")
COLUMNS_OUT = (
    "baseline", "other", "label", "metric", "n", "left_out", "baseline_mean", "other_mean", "difference", "low", "high",
    "p", "p_holm", "better",
)  # fmt: skip
SIGNIFICANT = 0.05

Scores = dict[tuple[str, str], dict[str, float]]


class CompareError(ValueError):
    """The folders cannot be compared; the message says why."""


def compare_folders(folders: Sequence[Path], output: Path, metrics: Sequence[str] = METRICS) -> list[dict[str, Any]]:
    """Compare the first evaluated folder with each of the others, on the cases that both have.

    Per metric and label: the mean over cases of other - baseline, its bootstrap 95 % interval, and a paired permutation
    test whose p-values are corrected by Holm's method over the metrics of one label and folder. Writes
    comparison.csv and comparison.html.

    Args:
        folders: outputs of `monai-iou evaluate`; the first is the baseline.
        output: where to write.
        metrics: columns of cases.csv.

    Returns:
        One row per folder, label and metric, as in comparison.csv.

    Raises:
        CompareError: fewer than two folders, no cases.csv in one, an unknown metric, or no case in common.
        OutputError: the output folder cannot be written.
    """
    if len(folders) < 2:
        message = (
            f"Expected two or more evaluated folders, but got {len(folders)}: name a baseline and what to compare."
        )
        raise CompareError(message)
    unknown = [metric for metric in metrics if metric not in CHOICES]
    if unknown or not metrics:
        message = f"Expected `--metrics` to be among {', '.join(CHOICES)}, but got {', '.join(unknown) or 'none'}."
        raise CompareError(message)
    tables = [read_scores(folder) for folder in folders]
    out.prepare(output)
    rows = []
    for folder, table in zip(folders[1:], tables[1:], strict=True):
        common = sorted(tables[0].keys() & table.keys())
        if not common:
            message = (
                f"Expected cases in common, but got none in `{folders[0]}` and `{folder}`: evaluate the same cases."
            )
            raise CompareError(message)
        rows += _compare(str(folders[0]), str(folder), tables[0], table, metrics)
    out.write_csv(output / "comparison.csv", COLUMNS_OUT, rows)
    out.write_text(output / "comparison.html", _page(rows, folders, tables))
    return rows


def read_scores(folder: Path) -> Scores:
    """The scores in a folder's cases.csv by case and label; empty cells are NaN.

    Raises:
        CompareError: there is no such table.
    """
    path = folder / "cases.csv"
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        return {
            (row["case"], row["label"]): {name: float(row[name]) if row[name] else math.nan for name in CHOICES}
            for row in rows
        }
    except (OSError, KeyError, ValueError, TypeError) as error:
        message = (
            f"Expected the output of `monai-iou evaluate` in `{folder}`, but got no readable cases.csv: evaluate first."
        )
        raise CompareError(message) from error


def _compare(baseline: str, other: str, first: Scores, second: Scores, metrics: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    common = sorted(first.keys() & second.keys())
    for label in sorted({label for _, label in common}):
        keys = [key for key in common if key[1] == label]
        family = []
        for metric in metrics:
            pairs = np.array([(first[key][metric], second[key][metric]) for key in keys])
            kept = pairs[np.isfinite(pairs).all(axis=1)]
            test = paired_test(kept[:, 0], kept[:, 1])
            low, high = test["interval"] or (None, None)
            family.append(
                {
                    "baseline": baseline,
                    "other": other,
                    "label": label,
                    "metric": metric,
                    "n": test["n"],
                    "left_out": len(keys) - test["n"],
                    "baseline_mean": test["first_mean"],
                    "other_mean": test["second_mean"],
                    "difference": test["difference"],
                    "low": low,
                    "high": high,
                    "p": test["p"],
                }
            )
        for row, corrected in zip(family, holm([row["p"] for row in family]), strict=True):
            row["p_holm"] = corrected
            row["better"] = _better(row)
        rows += family
    return rows


def _better(row: dict[str, Any]) -> str:
    """`baseline` or `other` where the corrected test finds a difference, else nothing."""
    if row["p_holm"] is None or row["p_holm"] >= SIGNIFICANT:
        return ""
    return "other" if (row["difference"] > 0) != (row["metric"] in LOWER_IS_BETTER) else "baseline"


def _page(rows: Sequence[dict[str, Any]], folders: Sequence[Path], tables: Sequence[Scores]) -> str:
    groups = []
    for other, table in zip(folders[1:], tables[1:], strict=True):
        labels = sorted({row["label"] for row in rows if row["other"] == str(other)})
        for label in labels:
            chosen = [row for row in rows if row["other"] == str(other) and row["label"] == label]
            groups.append(
                {"other": str(other), "label": label, "rows": [_texts(row) for row in chosen], **_forests(chosen)}
            )
        missing = len(tables[0].keys() ^ table.keys())
        if missing:
            groups[-1]["missing"] = missing
    return render("comparison.html", {"baseline": str(folders[0]), "groups": groups})


def _forests(rows: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Scores from 0 to 1 and distances in mm have an axis each."""
    plots = []
    for bounded, title in ((True, "Other - baseline, scores"), (False, "Other - baseline, mm (below zero is better)")):
        lines = [
            (COLUMNS[row["metric"]].title, row["difference"], row["low"], row["high"], _p(row["p_holm"]))
            for row in rows
            if COLUMNS[row["metric"]].bounded == bounded and row["difference"] is not None
        ]
        plots += [charts.forest(lines, title)] if lines else []
    return {"plots": plots}


def _texts(row: dict[str, Any]) -> dict[str, Any]:
    interval = "" if row["low"] is None else f"{number(row['low'])} to {number(row['high'])}"
    return {
        "title": COLUMNS[row["metric"]].title,
        "n": row["n"],
        "baseline": number(row["baseline_mean"]),
        "other": number(row["other_mean"]),
        "difference": "-" if row["difference"] is None else f"{row['difference']:+.3f}",
        "interval": interval,
        "p": number(row["p"], 4),
        "p_holm": number(row["p_holm"], 4),
        "better": row["better"] or "no evidence",
    }


def _p(value: float | None) -> str:
    return "" if value is None else f"p = {value:.3g}"
