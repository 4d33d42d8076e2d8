"""Which of several methods is best by the primary metric, and how surely: ranks under resampling of the patients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monai_iou.evaluation.columns import COLUMNS
from monai_iou.evaluation.paired_scores import Evaluated, paired_keys, scores_of
from monai_iou.evaluation.statistics import MIN_UNITS, percentiles, resamples, unit_indices

RANKING_COLUMNS = ("label", "folder", "metric", "n", "mean", "rank", "rank_low", "rank_high", "share_first")


def rank_folders(evaluated: Sequence[Evaluated], metric: str) -> list[dict[str, Any]]:
    """Rank the folders by their mean over the cases that all have or failed at, for each label.

    A failed case counts as the worst score, and an empty prediction as the best where another folder predicts a
    structure that is absent, as in the comparison of two folders.

    Args:
        evaluated: three or more folders.
        metric: the primary metric.

    Returns:
        One row per label and folder, the best first: its mean, its rank, the 95 % interval of its rank and the share of
        2000 resamples of the patients in which it is first; None for both with fewer than `MIN_UNITS` patients. Ties
        share the better rank.
    """
    rows = []
    paired = paired_keys(*evaluated)
    for label in evaluated[0].labels:
        keys = [key for key in paired if key[1] == label]
        scores = np.array([scores_of(evaluated, key, metric) for key in keys]).reshape(-1, len(evaluated))
        kept = np.isfinite(scores).all(axis=1)
        if not kept.any():
            continue
        units = [evaluated[0].patient(case) for (case, _), there in zip(keys, kept, strict=True) if there]
        rows += _ranked(evaluated, label, metric, scores[kept], units)
    return rows


def _ranked(
    evaluated: Sequence[Evaluated], label: str, metric: str, scores: NDArray[np.float64], units: Sequence[str]
) -> list[dict[str, Any]]:
    sign = 1 if COLUMNS[metric].better == "lower" else -1
    means = scores.mean(axis=0)
    own, certainty = _ranks(sign * means[None])[0], _certainty(sign * scores, unit_indices(len(units), units))
    rows = [
        {
            "label": label,
            "folder": one.name,
            "metric": metric,
            "n": len(scores),
            "mean": float(means[i]),
            "rank": int(own[i]),
            **certainty[i],
        }
        for i, one in enumerate(evaluated)
    ]
    return sorted(rows, key=lambda row: row["rank"])


def _certainty(scores: NDArray[np.float64], which: NDArray[np.int64]) -> list[dict[str, float | None]]:
    """How sure the rank of each folder is, from the scores of the cases, (cases, folders), and their patients."""
    sizes = np.bincount(which)
    if len(sizes) < MIN_UNITS:  # resamples of one patient are all alike, and say nothing of others
        return [dict.fromkeys(("rank_low", "rank_high", "share_first"))] * scores.shape[1]
    sums = np.stack([np.bincount(which, weights=column) for column in scores.T], axis=1)
    drawn_means = np.concatenate([drawn @ sums / (drawn @ sizes)[:, None] for drawn in resamples(len(sums))])
    ranks = _ranks(drawn_means)
    low, high = np.percentile(ranks, percentiles(len(sums)), axis=0)
    first = (ranks == 1).mean(axis=0)
    return [
        {"rank_low": float(low[i]), "rank_high": float(high[i]), "share_first": float(first[i])}
        for i in range(scores.shape[1])
    ]


def _ranks(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Rank in each row, 1 the lowest: one more than the number of values that are lower."""
    lower = values[:, None, :] < values[:, :, None] - 1e-12
    ranks: NDArray[np.int64] = 1 + lower.sum(axis=2)
    return ranks
