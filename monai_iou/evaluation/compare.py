"""Compare evaluated folders: paired differences per metric, intervals, permutation tests, a ranking and a page."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from monai_iou import files as out
from monai_iou.evaluation.columns import COLUMNS
from monai_iou.evaluation.compare_page import comparison_page
from monai_iou.evaluation.earlier import check_marks
from monai_iou.evaluation.paired_scores import (
    CompareError,
    Evaluated,
    is_in,
    paired_keys,
    read_evaluated,
    score_of,
    scores_of,
    unknown_cases,
)
from monai_iou.evaluation.ranking import RANKING_COLUMNS, rank_folders
from monai_iou.evaluation.same_rules import check_rules
from monai_iou.evaluation.statistics import holm, paired_test

__all__ = ["CHOICES", "COLUMNS_OUT", "METRICS", "CompareError", "UnknownMetricError", "compare_folders"]

# The columns that rank a method; counts and volumes do not.
CHOICES = tuple(name for name, column in COLUMNS.items() if column.better)
# RQ is lesion F1 by another name: testing it too would say the same twice.
METRICS = tuple(name for name in CHOICES if name != "rq")
PRIMARY = "iou"
COLUMNS_OUT = (
    "baseline", "other", "label", "metric", "family", "n", "left_out", "baseline_mean", "other_mean", "difference",
    "low", "high", "p", "p_holm", "better",
)  # fmt: skip
SIGNIFICANT = 0.05
MARKS = {
    "comparison.csv": b"baseline,other,label,",
    "paired.csv": b"case,label,",
    "comparison.html": b"<title>Comparison: ",
    "ranking.csv": ",".join(RANKING_COLUMNS).encode(),
}


class UnknownMetricError(CompareError):
    """A metric that is not compared: no column of cases.csv, or a count, a volume or a challenge's own."""


def compare_folders(
    folders: Sequence[Path],
    output: Path,
    metrics: Sequence[str] = METRICS,
    primary: str | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Compare evaluated folders in pairs, on all cases that both folders should contain.

    For each metric and label, the comparison reports the mean over the cases of (other - baseline), its 95 % bootstrap
    interval, and a paired permutation test. The p-values of the primary metric are corrected by Holm's method over
    labels and pairs of folders. The other metrics are exploratory: their p-values are not corrected, and no winner is
    named. A case that failed in one folder and a score that is undefined because a mask is empty count as the worst
    score (`monai_iou.evaluation.penalties`). If a structure is absent and only one of two folders predicts it, the
    score of the other one counts as the best; if neither predicts it, the case is left out. So is a case that both
    folders failed at, unless another one knows its reference, and a case of which one folder has no score at all, such
    as one without a reference there. The function writes comparison.csv, paired.csv (the primary scores, one column per
    folder), comparison.html and, for three or more folders, ranking.csv.

    Args:
        folders: outputs of `monai-iou evaluate`; the first folder is the baseline.
        output: folder for the results.
        metrics: columns of cases.csv to compare, among `CHOICES`.
        primary: the metric that decides; by default IoU, or the first of `metrics` if IoU is not among them. One that
            `metrics` lacks is compared as well, which a note says.
        note: called for each note on the folders, which the page shows too.

    Returns:
        One row per pair of folders, label and metric: the columns of comparison.csv, the folders' `names`, the `titles`
        of label and metric, and the `unit` of intervals and tests, "cases" or "patients".

    Raises:
        CompareError: fewer than two folders, no cases.csv in one, an unknown metric, no label or case in common, or
            folders that were scored by different rules or against different references.
        OutputError: the output folder cannot be written, or a file of something else would be replaced.
    """
    if len(folders) < 2:
        message = (
            f"Expected two or more evaluated folders, but got {len(folders)}: name a baseline and what to compare."
        )
        raise CompareError(message)
    chosen = _primary_first(metrics, primary)
    decisive = chosen[0]
    evaluated = read_evaluated(folders)
    notes = [*_added(metrics, decisive), *check_rules(evaluated, chosen)]
    check_marks(output, MARKS, "a comparison")
    out.prepare(output)
    for text in notes:
        note(text)
    rows = [row for pair in itertools.combinations(evaluated, 2) for row in _compare(*pair, chosen)]
    _correct(rows, decisive)
    ranking = rank_folders(evaluated, decisive) if len(evaluated) > 2 else []
    texts = {
        "comparison.csv": out.table_text(COLUMNS_OUT, rows),
        "paired.csv": out.csv_text(_paired_table(evaluated, decisive)),
        "comparison.html": comparison_page(rows, evaluated, ranking, decisive, notes),
    }
    if ranking:
        texts["ranking.csv"] = out.table_text(RANKING_COLUMNS, ranking)
    out.write_texts({output / name: text for name, text in texts.items()})
    if not ranking:  # of an earlier comparison of more folders
        (output / "ranking.csv").unlink(missing_ok=True)
    return rows


def _primary_first(metrics: Sequence[str], primary: str | None) -> list[str]:
    """The metrics to compare, the one that decides first."""
    named = dict.fromkeys((*metrics, PRIMARY if primary is None else primary))
    unknown = [metric for metric in named if metric not in CHOICES]
    if unknown or not metrics:
        message = (
            f"Expected `--metrics` and `--primary` to name scores among {', '.join(CHOICES)}, but got "
            f"{', '.join(unknown) or 'none'}: choose among these; counts, volumes and columns of a challenge are not "
            "compared."
        )
        raise UnknownMetricError(message)
    decisive = primary or (PRIMARY if PRIMARY in metrics else metrics[0])
    return list(dict.fromkeys((decisive, *metrics)))


def _added(metrics: Sequence[str], decisive: str) -> list[str]:
    """Say that a metric is compared which only `--primary` asked for; without `--metrics`, everybody expects it."""
    if decisive in metrics or tuple(metrics) == METRICS:
        return []
    return [f"{decisive} is compared as well as `--metrics`, because `--primary` names it."]


def _compare(first: Evaluated, second: Evaluated, metrics: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    keys = paired_keys(first, second)
    for label in [label for label in first.labels if label in second.labels]:
        own = [key for key in keys if key[1] == label]
        asked = len(own) + len(unknown_cases(first, second, label))
        for metric in metrics:
            values = np.array([scores_of((first, second), key, metric) for key in own]).reshape(-1, 2)
            kept = np.isfinite(values).all(axis=1)
            units = [first.patient(case) for (case, _), there in zip(own, kept, strict=True) if there]
            test = paired_test(values[kept, 0], values[kept, 1], units)
            low, high = test["interval"] or (None, None)
            rows.append(
                {
                    "names": (first.name, second.name),
                    "unit": first.unit,
                    "baseline": str(first.folder),
                    "other": str(second.folder),
                    "label": label,
                    "titles": (first.titles.get(label, label), COLUMNS[metric].title),
                    "metric": metric,
                    "family": "primary" if metric == metrics[0] else "exploratory",
                    "n": test["n"],
                    "left_out": asked - test["n"],
                    "baseline_mean": test["first_mean"],
                    "other_mean": test["second_mean"],
                    "difference": test["difference"],
                    "low": low,
                    "high": high,
                    "p": test["p"],
                }
            )
    return rows


def _correct(rows: Sequence[dict[str, Any]], primary: str) -> None:
    """Correct the primary metric's p-values over labels and pairs of folders, and say who is better."""
    family = [row for row in rows if row["metric"] == primary]
    for row in rows:
        row["p_holm"], row["better"] = None, ""
    for row, corrected in zip(family, holm([row["p"] for row in family]), strict=True):
        row["p_holm"] = corrected
        row["better"] = _better(row)


def _better(row: dict[str, Any]) -> str:
    """`baseline` or `other` where the corrected test finds a difference, else nothing."""
    if row["p_holm"] is None or row["p_holm"] >= SIGNIFICANT:
        return ""
    return "other" if (row["difference"] > 0) != (COLUMNS[row["metric"]].better == "lower") else "baseline"


def _paired_table(evaluated: Sequence[Evaluated], metric: str) -> list[list[Any]]:
    """The primary scores: a row per case and label, a column per folder; empty where a folder did not evaluate it."""
    table: list[list[Any]] = [["case", "label", *(one.name for one in evaluated)]]
    for key in sorted(evaluated[0].known):
        cells = [score_of(one, key, metric) if is_in(one, key) else None for one in evaluated]
        table.append([*key, *cells])
    return table
