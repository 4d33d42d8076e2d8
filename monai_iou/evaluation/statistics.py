"""Means, intervals and tests over cases. The unit of resampling is the case."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from monai_iou.metrics import fine_grained_iou
from monai_iou.scores import ratio

RESAMPLES = 2000
PERMUTATIONS = 9999
SEED = 0

Statistic = Callable[..., Any]


def describe(values: ArrayLike) -> dict[str, Any]:
    """Count, mean and median with bootstrap 95 % intervals, least and largest value.

    Args:
        values: one number per case; undefined ones (NaN) are left out and counted.

    Returns:
        `n`, `undefined`, `mean`, `mean_interval`, `median`, `median_interval`, `min`, `max`; None where
        nothing is left.

    >>> describe([0.5, 0.7, float("nan")])["mean"]
    0.6
    """
    every = np.asarray(values, dtype=float).ravel()
    finite = every[np.isfinite(every)]
    counts = {"n": int(finite.size), "undefined": int(every.size - finite.size)}
    if not finite.size:
        empty = dict.fromkeys(("mean", "mean_interval", "median", "median_interval", "min", "max"))
        return {**counts, **empty}
    return {
        **counts,
        "mean": float(finite.mean()),
        "mean_interval": interval(finite, np.mean),
        "median": float(np.median(finite)),
        "median_interval": interval(finite, np.median),
        "min": float(finite.min()),
        "max": float(finite.max()),
    }


def interval(values: NDArray[np.float64], statistic: Statistic = np.mean) -> list[float] | None:
    """The percentile bootstrap 95 % interval of `statistic`, or None for fewer than two values.

    Percentiles rather than BCa: BCa is undefined where all values but one are equal, which perfect cases are.

    >>> interval(np.array([1.0, 1.0, 1.0]))
    [1.0, 1.0]
    """
    from scipy.stats import bootstrap

    if values.size < 2:
        return None
    result = bootstrap(
        (values,), statistic, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(SEED)
    )
    return [float(result.confidence_interval.low), float(result.confidence_interval.high)]


def paired_test(first: NDArray[np.float64], second: NDArray[np.float64]) -> dict[str, Any]:
    """The mean of `second - first` over cases, its bootstrap interval and a two-sided permutation p-value.

    The test swaps the two results of a case at random (all 2^n ways where they are few), which is exact under the
    hypothesis that the two methods are exchangeable.

    Args:
        first: one number per case, shape (n,), finite.
        second: the other method's numbers of the same cases.

    Returns:
        `n`, `first_mean`, `second_mean`, `difference`, `interval` and `p`; None where there are fewer than two cases.
    """
    from scipy.stats import permutation_test

    n = int(first.size)
    if n < 2:
        return {"n": n, "first_mean": None, "second_mean": None, "difference": None, "interval": None, "p": None}
    difference = second - first
    test = permutation_test(
        (second, first),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=PERMUTATIONS,
        rng=np.random.default_rng(SEED),
    )
    return {
        "n": n,
        "first_mean": float(first.mean()),
        "second_mean": float(second.mean()),
        "difference": float(difference.mean()),
        "interval": interval(difference),
        "p": float(test.pvalue),
    }


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction of the p-values that are there (Holm 1979).

    >>> holm([0.01, None, 0.04, 0.03])
    [0.03, None, 0.06, 0.06]
    """
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        corrected[i] = largest
    return corrected


def dataset_scores(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """IoU over the data set: `monai_iou.metrics.fine_grained_iou` of the rows, and the interval of IoU-I.

    Args:
        rows: one mapping a case and label with `case`, `label`, `intersection` and `union` (voxels); every case has
            every label. Without rows every score is NaN.

    Returns:
        `iou_d`, `iou_i`, `iou_i_interval`, `iou_c`, and the means of the worst 5, 10 and 50 %; NaN where nothing is
        defined.

    >>> rows = [
    ...     {"case": "a", "label": "1", "intersection": 50, "union": 100},
    ...     {"case": "b", "label": "1", "intersection": 0, "union": 4},
    ... ]
    >>> scores = dataset_scores(rows)
    >>> round(scores["iou_d"], 4), scores["iou_i"], scores["iou_i_worst_50"], scores["iou_i_interval"]
    (0.4808, 0.25, 0.0, [0.0, 0.5])
    """
    cases, labels = (len({row[name] for row in rows}) for name in ("case", "label"))
    counts = np.array([[row["intersection"], row["union"]] for row in rows], dtype=np.int64)
    intersection, union = counts.reshape(cases, labels, 2).transpose(2, 0, 1)
    defined = ratio(intersection, union, empty=np.nan)
    images = np.array([row[np.isfinite(row)].mean() for row in defined if np.isfinite(row).any()])
    scores = fine_grained_iou(torch.from_numpy(intersection.copy()), torch.from_numpy(union.copy()))
    return {**scores, "iou_i_interval": interval(images)}
