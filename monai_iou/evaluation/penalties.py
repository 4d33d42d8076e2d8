"""What is missing counts as the worst score there is, so that leaving a structure out can never improve a mean.

A score is undefined where a mask is empty: a distance has nothing to run to, a precision no prediction to judge. Where
the structure is in one of the two masks, the penalty is the image's diagonal for a distance and 0 for a score. Where it
is in neither there is nothing to find, and the score stays undefined. So do scores of lesions where none is counted on
either side (all are smaller than asked for), the boundary IoU of two masks whose boundaries are both ignored, and
everything about a structure that was not annotated.

A case without a usable prediction counts as one whose prediction is empty. Where a challenge gives an empty prediction
the perfect score, such a case gets the worst one: nobody has predicted that there is nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from monai_iou.evaluation.columns import COLUMNS
from monai_iou.metrics import Challenge

OF_LESIONS = ("lesion_f1", "pq", "sq", "rq", "cc_iou")


def penalised(row: Mapping[str, Any], challenge: Challenge | None = None) -> dict[str, Any]:
    """A row of cases.csv with a penalty for every score that is undefined because one mask is empty.

    Args:
        row: the columns of cases.csv, with `reference_ml`, `prediction_ml`, `diagonal_mm` and the numbers of lesions.
        challenge: whose columns take the challenge's own penalties.

    >>> row = dict.fromkeys(COLUMNS, math.nan) | {"reference_ml": 2.0, "prediction_ml": 0.0, "diagonal_mm": 300.0}
    >>> row_with_penalty = penalised(row)
    >>> row_with_penalty["hd95_mm"], row_with_penalty["precision"], row_with_penalty["relative_volume_error"]
    (300.0, 0.0, nan)
    """
    result = dict(row)
    if not (row["reference_ml"] > 0 or row["prediction_ml"] > 0):  # NaN where nobody annotated the structure
        return result
    for name, column in COLUMNS.items():
        if column.better and math.isnan(row[name]) and _is_missed(name, row):
            result[name] = row["diagonal_mm"] if column.better == "lower" else 0.0
    if challenge is not None:
        no_lesions = all(math.isnan(row[name]) for name in challenge.of_lesions)
        for name, worst in challenge.missing.items():
            if math.isnan(row[name]) and not (no_lesions and name in challenge.of_lesions):
                result[name] = worst
    return result


def _is_missed(name: str, row: Mapping[str, Any]) -> bool:
    """Whether a score is undefined because something is missing, and not because there is nothing to find."""
    if name in OF_LESIONS:
        return bool(row["lesion_tp"] + row["lesion_fp"] + row["lesion_fn"] > 0)
    if name == "boundary_iou":  # bands may be empty although the masks are not, where their boundaries are ignored
        return not (row["reference_ml"] > 0 and row["prediction_ml"] > 0)
    return bool(name != "recall" or row["reference_ml"] > 0)


def without_prediction(row: Mapping[str, Any], challenge: Challenge | None) -> dict[str, Any]:
    """The row of a case that has no usable prediction, from the row of an empty one.

    Where a challenge scores an empty prediction, the case has the worst score instead. The challenge's other columns
    are undefined if there is nothing to find, and those that judge only what is predicted always.

    >>> from monai_iou.metrics import CHALLENGES
    >>> row = {"reference_ml": 0.0, "dice": 1.0, "lesion_f1_score": 1.0, "absolute_volume_difference": 0.0}
    >>> found = without_prediction(row, CHALLENGES["isles22"])
    >>> found["dice"], found["lesion_f1_score"], found["absolute_volume_difference"]
    (0.0, 0.0, nan)
    """
    if challenge is None:
        return dict(row)
    undefined = challenge.columns if row["reference_ml"] == 0 else challenge.of_prediction
    worst = {name: value for name, value in challenge.missing.items() if not math.isnan(row[name])}
    return {**row, **dict.fromkeys(undefined, math.nan), **worst}


def empty_prediction(row: Mapping[str, Any], challenge: Challenge | None = None) -> dict[str, Any]:
    """The row of a case without a usable prediction, from one of the same reference.

    Args:
        row: of any prediction.
        challenge: whose score may take the place of a column. It is defined for every empty prediction, so that the
            case has the worst one, as in `without_prediction`, also where there is nothing to find.

    >>> row = dict.fromkeys(COLUMNS, 1.0) | {"lesion_tp": 2.0}
    >>> penalised(empty_prediction(row))["pq"], empty_prediction(row)["lesion_fn"]
    (0.0, 3.0)
    """
    known = {name: row[name] for name in ("reference_ml", "diagonal_mm")}
    lesions = {"lesion_tp": 0.0, "lesion_fp": 0.0, "lesion_fn": row["lesion_tp"] + row["lesion_fn"]}
    worst = {} if challenge is None or math.isnan(row["reference_ml"]) else challenge.missing
    return {**dict.fromkeys(COLUMNS, math.nan), **known, **lesions, **worst, "prediction_ml": 0.0}


def with_and_without(
    measured: Sequence[Mapping[str, Any]], every: Sequence[Mapping[str, Any]], column: str
) -> dict[str, Any]:
    """The mean of a column over the defined scores, and over all with the penalties.

    Args:
        measured: rows of the cases that were evaluated.
        every: rows of all cases with the penalties, those without a usable prediction as empty predictions.
        column: its name.

    Returns:
        `mean_defined`, `n_defined`, `mean_penalty` and `n_penalty`; a mean of nothing is None.
    """
    defined, all_defined = ([row[column] for row in rows if math.isfinite(row[column])] for rows in (measured, every))
    return {
        "mean_defined": math.fsum(defined) / len(defined) if defined else None,
        "n_defined": len(defined),
        "mean_penalty": math.fsum(all_defined) / len(all_defined) if all_defined else None,
        "n_penalty": len(all_defined),
    }
