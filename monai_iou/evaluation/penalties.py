"""What is missing counts as the worst score there is, so that leaving a structure out can never improve a mean.

A score is undefined where a mask is empty: a distance has nothing to run to, a precision no prediction to judge. Where
the structure is in one of the two masks, the penalty is the image's diagonal for a distance and 0 for a score. Where it
is in neither there is nothing to find, and the score stays undefined.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from monai_iou.evaluation.columns import COLUMNS
from monai_iou.metrics import Challenge


def penalised(row: Mapping[str, Any], challenge: Challenge | None = None) -> dict[str, Any]:
    """A row of cases.csv with a penalty for every score that is undefined because one mask is empty.

    Args:
        row: the columns of cases.csv, with `reference_ml`, `prediction_ml` and `diagonal_mm`.
        challenge: whose columns take the challenge's own penalties.

    >>> row = dict.fromkeys(COLUMNS, math.nan) | {"reference_ml": 2.0, "prediction_ml": 0.0, "diagonal_mm": 300.0}
    >>> row_with_penalty = penalised(row)
    >>> row_with_penalty["hd95_mm"], row_with_penalty["precision"], row_with_penalty["relative_volume_error"]
    (300.0, 0.0, nan)
    """
    result = dict(row)
    if not (row["reference_ml"] or row["prediction_ml"]):
        return result
    for name, column in COLUMNS.items():
        if not math.isnan(row[name]) or not column.better:
            continue
        if column.better == "lower":
            result[name] = row["diagonal_mm"]
        elif row["reference_ml"] or name != "recall":  # without a reference there is nothing to recall
            result[name] = 0.0
    for name, worst in challenge.missing.items() if challenge is not None else ():
        if math.isnan(result[name]):
            result[name] = worst
    return result


def with_and_without(
    measured: Sequence[Mapping[str, Any]],
    missing: Sequence[Mapping[str, Any]],
    column: str,
    challenge: Challenge | None = None,
) -> dict[str, Any]:
    """The mean of a column over the defined scores, and over all with the penalties.

    Args:
        measured: rows of the cases that were evaluated.
        missing: rows of the cases without a usable prediction, scored as empty predictions.
        column: its name.
        challenge: whose columns are there.

    Returns:
        `mean_defined`, `n_defined`, `mean_penalty` and `n_penalty`; a mean of nothing is None.
    """
    defined = [row[column] for row in measured if math.isfinite(row[column])]
    every = [value for row in (*measured, *missing) if math.isfinite(value := penalised(row, challenge)[column])]
    return {
        "mean_defined": math.fsum(defined) / len(defined) if defined else None,
        "n_defined": len(defined),
        "mean_penalty": math.fsum(every) / len(every) if every else None,
        "n_penalty": len(every),
    }
