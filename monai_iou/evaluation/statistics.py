"""Means, intervals and tests over cases. The unit of resampling is the case."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2000
PERMUTATIONS = 9999
SEED = 0
WORST_PERCENT = (5, 10, 50)

Statistic = Callable[..., Any]


def describe(values: ArrayLike) -> dict[str, Any]:
    """Count, mean and median with bootstrap 95 % intervals, least and largest value.

    Args:
        values: one number a case; NaN (undefined) and infinite ones (a distance to nothing) are left out and counted.

    Returns:
        `n`, `undefined`, `infinite`, `mean`, `mean_interval`, `median`, `median_interval`, `min`, `max`; None where
        nothing is left.

    >>> describe([0.5, 0.7, float("nan")])["mean"]
    0.6
    """
    every = np.asarray(values, dtype=float).ravel()
    finite = every[np.isfinite(every)]
    counts = {
        "n": int(finite.size),
        "undefined": int(np.isnan(every).sum()),
        "infinite": int(np.isinf(every).sum()),
    }
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
        first: one number a case, shape (n,), finite.
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
    """IoU over the data set in three ways, and the mean of the worst images (Wang et al. 2023, fine-grained mIoU).

    IoU-D adds intersections and unions over all cases before it divides, per label, then averages the labels: large
    objects count most. IoU-I averages the labels of each case, then the cases. IoU-C averages the cases of each label,
    then the labels. An IoU is left out where both masks are empty. `worst` is the mean of the lowest q % of the
    per-case scores of IoU-I, at least one case.

    Args:
        rows: one mapping a case and label with `case`, `label`, `iou`, `intersection` and `union` (voxels).

    Returns:
        `iou_d`, `iou_i`, `iou_c` and `worst` by percent; None where nothing is defined.

    >>> rows = [
    ...     {"case": "a", "label": "1", "iou": 0.5, "intersection": 50, "union": 100},
    ...     {"case": "b", "label": "1", "iou": 0.0, "intersection": 0, "union": 4},
    ... ]
    >>> scores = dataset_scores(rows)
    >>> round(scores["iou_d"], 4), scores["iou_i"], scores["worst"]["50"]
    (0.4808, 0.25, 0.0)
    """
    by_label = _groups(rows, "label")
    pooled = [_ratio(group) for group in by_label.values()]
    images = np.sort(_defined([_mean([row["iou"] for row in group]) for group in _groups(rows, "case").values()]))
    worst = {
        str(percent): _mean(images[: max(1, int(percent / 100 * images.size))].tolist()) for percent in WORST_PERCENT
    }
    return {
        "iou_d": _mean(pooled),
        "iou_i": _mean(images.tolist()),
        "iou_c": _mean([_mean([row["iou"] for row in group]) for group in by_label.values()]),
        "worst": worst,
    }


def _groups(rows: Sequence[Mapping[str, Any]], key: str) -> dict[Any, list[Mapping[str, Any]]]:
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def _ratio(rows: Sequence[Mapping[str, Any]]) -> float | None:
    union = sum(int(row["union"]) for row in rows)
    return sum(int(row["intersection"]) for row in rows) / union if union else None


def _defined(values: Sequence[float | None]) -> NDArray[np.float64]:
    array = np.array([np.nan if value is None else value for value in values], dtype=float)
    finite: NDArray[np.float64] = array[np.isfinite(array)]
    return finite


def _mean(values: Sequence[float | None]) -> float | None:
    defined = _defined(values)
    return float(defined.mean()) if defined.size else None
