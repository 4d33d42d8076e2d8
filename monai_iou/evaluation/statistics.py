"""Means, intervals and tests over cases. The unit of resampling is the patient, or the case if patients are not known.

Two scans of one patient are not independent, and resampling them as if they were makes intervals too narrow. If the
patients are known, whole patients are drawn, and the mean is still the mean over the cases that were drawn.

Resamples of few patients vary less than samples do, so that their percentiles 2.5 and 97.5 cover the mean too seldom.
Intervals are expanded percentile intervals instead (Hesterberg, What Teachers Should Know About the Bootstrap, 2015).
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from monai_iou.metrics import fine_grained_iou
from monai_iou.scores import ratio

RESAMPLES = 2000
PERMUTATIONS = 9999
SEED = 0
# The interval of fewer values is little more than their range: it covers the mean less often than it says.
MIN_UNITS = 8
_TABLE_BYTES = 1 << 24  # of the resamples that are held at a time: drawn in parts, they are the same
_LEAST_ROWS = 8  # that are held, and what the rows of a part are a multiple of: sums then round the same
_KEPT_BYTES = 1 << 28  # of the resamples that are kept for the next column: to draw them takes seconds

Statistic = Literal["mean", "median"]
_Floats = NDArray[np.float64]


def describe(values: ArrayLike, units: Sequence[str] | None = None) -> dict[str, Any]:
    """Return count, mean, standard deviation and quartiles, with 95 % bootstrap intervals of mean and median.

    Args:
        values: one number per case; undefined values (NaN) are left out and counted.
        units: the patient of each case.

    Returns:
        `n`, `undefined`, `units`, `mean`, `mean_interval`, `sd` (with n - 1), `median`, `median_interval`, `quartiles`,
        `min` and `max`; None if no value is defined, and None instead of intervals for fewer than `MIN_UNITS` patients.

    >>> summary = describe([0.5, 0.7, float("nan")])
    >>> summary["mean"], round(summary["sd"], 4), np.round(summary["quartiles"], 4).tolist(), summary["mean_interval"]
    (0.6, 0.1414, [0.55, 0.65], None)
    """
    every = np.asarray(values, dtype=float).ravel()
    kept = np.isfinite(every)
    finite = every[kept]
    drawn = None if units is None else [unit for unit, there in zip(units, kept, strict=True) if there]
    counts = {
        "n": int(finite.size),
        "undefined": int(every.size - finite.size),
        "units": int(finite.size) if drawn is None else len(set(drawn)),
    }
    if not finite.size:
        names = ("mean", "mean_interval", "sd", "median", "median_interval", "quartiles", "min", "max")
        return {**counts, **dict.fromkeys(names)}
    intervals = _intervals(finite, ("mean", "median"), drawn)
    low, middle, high = (float(value) for value in np.percentile(finite, [25, 50, 75]))
    return {
        **counts,
        "mean": float(finite.mean()),
        "mean_interval": intervals["mean"],
        "sd": float(finite.std(ddof=1)) if finite.size > 1 else None,
        "median": middle,
        "median_interval": intervals["median"],
        "quartiles": [low, high],
        "min": float(finite.min()),
        "max": float(finite.max()),
    }


def interval(values: _Floats, statistic: Statistic = "mean", units: Sequence[str] | None = None) -> list[float] | None:
    """Return the 95 % bootstrap interval of the mean or median; None for fewer than `MIN_UNITS` patients.

    It ends at the `percentiles`, and so within the range of the values. BCa is undefined if all values except one are
    equal, as for perfect cases.

    Args:
        values: one finite number per case.
        statistic: `mean` or `median`.
        units: the patient of each case; None counts each case as one.

    >>> interval(np.ones(8)), interval(np.ones(7))
    ([1.0, 1.0], None)
    """
    return _intervals(values, (statistic,), units)[statistic]


def _intervals(
    values: _Floats, wanted: Sequence[Statistic], units: Sequence[str] | None
) -> dict[Statistic, list[float] | None]:
    which = unit_indices(values.size, units)
    number = int(which.max()) + 1 if which.size else 0
    if number < MIN_UNITS:
        return dict.fromkeys(wanted)
    sums, sizes = np.bincount(which, weights=values), np.bincount(which)
    found: dict[Statistic, list[_Floats]] = {statistic: [] for statistic in wanted}
    for drawn in resamples(number):
        for statistic, parts in found.items():
            mean = statistic == "mean"
            parts.append(drawn @ sums / (drawn @ sizes) if mean else _medians(values, which, drawn))
    ends = percentiles(number)
    bounds = {name: np.percentile(np.concatenate(parts), ends) for name, parts in found.items()}
    return {name: [float(bound) for bound in both] for name, both in bounds.items()}


def percentiles(number: int) -> list[float]:
    """Return the percentiles of the resamples at which a 95 % interval over some units ends.

    They lie as far out as Student's t interval of the mean does, if the values are normal.

    >>> [[round(each, 2) for each in percentiles(number)] for number in (8, 30, 1000)]
    [[0.57, 99.43], [1.88, 98.12], [2.48, 97.52]]
    """
    from scipy.special import ndtr, stdtrit  # imported here: not every command that imports this needs scipy

    low = 100 * float(ndtr(stdtrit(number - 1, 0.025) * math.sqrt(number / (number - 1))))
    return [low, 100 - low]


def unit_indices(size: int, units: Sequence[str] | None) -> NDArray[np.int64]:
    """The number of each case's patient, from 0."""
    if units is None:
        return np.arange(size)
    indices: NDArray[np.int64] = np.unique(np.asarray(units, dtype=object).astype(str), return_inverse=True)[1]
    return indices.reshape(-1)


def _rows(width: int, most: int) -> int:
    """Return how many of `most` rows of float64 are held at a time."""
    rows = _TABLE_BYTES // (8 * width)
    return most if rows >= most else max(_LEAST_ROWS, rows // _LEAST_ROWS * _LEAST_ROWS)


def resamples(number: int) -> Iterator[_Floats]:
    """Yield how often each of some units is drawn, (resamples, units), as many resamples at a time as memory takes."""
    rows, table = _rows(number, RESAMPLES), _KEPT.get(number)
    if table is not None:
        yield from (table[start : start + rows].astype(float) for start in range(0, RESAMPLES, rows))
        return
    # A unit is drawn some ten times at most, so that a byte holds it.
    table = np.empty((RESAMPLES, number), np.uint8) if RESAMPLES * number <= _KEPT_BYTES else None
    generator = np.random.default_rng(SEED)
    for start in range(0, RESAMPLES, rows):
        drawn = _drawn(generator, number, min(rows, RESAMPLES - start))
        if table is not None:
            table[start : start + rows] = drawn
        yield drawn.astype(float)
    if table is not None:
        _KEPT.add(number, table)


def _drawn(generator: np.random.Generator, number: int, count: int) -> NDArray[np.int64]:
    return generator.multinomial(number, np.full(number, 1 / number), size=count)


class _KeptTables:
    """The resamples of the numbers of units that were asked for last, as many as fit into `_KEPT_BYTES`.

    The columns of a label have only a few numbers of defined scores.
    """

    def __init__(self) -> None:
        self._tables: OrderedDict[int, NDArray[np.uint8]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, number: int) -> NDArray[np.uint8] | None:
        with self._lock:
            if number in self._tables:
                self._tables.move_to_end(number)
            return self._tables.get(number)

    def add(self, number: int, table: NDArray[np.uint8]) -> None:
        with self._lock:
            self._tables[number] = table
            while sum(kept.nbytes for kept in self._tables.values()) > _KEPT_BYTES:
                self._tables.popitem(last=False)


_KEPT = _KeptTables()


def _medians(values: _Floats, which: NDArray[np.int64], drawn: _Floats) -> _Floats:
    """The median of each resample, in which value i stands `drawn[:, which[i]]` times."""
    order, rows = np.argsort(values, kind="stable"), _rows(values.size, len(drawn))
    ranked, places = values[order], which[order]
    medians = np.empty(len(drawn))
    for start in range(0, len(drawn), rows):
        part = slice(start, start + rows)
        below = np.cumsum(drawn[part, places], axis=1)
        total = below[:, -1:]
        low, high = ((below >= np.floor((total + step) / 2)).argmax(axis=1) for step in (1, 2))
        medians[part] = (ranked[low] + ranked[high]) / 2
    return medians


def paired_test(first: _Floats, second: _Floats, units: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the mean of `second - first` over the cases, its bootstrap interval and a two-sided permutation p-value.

    The test exchanges the two results of each patient at random (or in all 2^n ways if there are few patients), which
    is exact under the hypothesis that the two methods are exchangeable.

    Args:
        first: one finite number per case, (n,).
        second: the numbers of the other method for the same cases.
        units: the patient of each case; None treats each case as a patient.

    Returns:
        `n`, `first_mean`, `second_mean`, `difference`, `interval` and `p`; None without cases, `p` also for one case.
    """
    n = int(first.size)
    if n == 0:
        return {"n": n, "first_mean": None, "second_mean": None, "difference": None, "interval": None, "p": None}
    difference = second - first
    sums: _Floats = np.bincount(unit_indices(n, units), weights=difference).astype(float)
    return {
        "n": n,
        "first_mean": float(first.mean()),
        "second_mean": float(second.mean()),
        "difference": float(difference.mean()),
        "interval": interval(difference, "mean", units),
        "p": _sign_flip_p(sums) if n > 1 else None,
    }


def _sign_flip_p(sums: _Floats) -> float:
    """Share of the sign flips whose sum is at least as far from 0 as the observed one."""
    observed = abs(float(sums.sum())) - 1e-12 * float(np.abs(sums).sum())  # other orders round the terms otherwise
    ways = 2**sums.size  # a whole number, because a float overflows from 1024 patients on
    if ways <= PERMUTATIONS:
        bits = np.arange(ways)[:, None] >> np.arange(sums.size) & 1
        return float((np.abs((2 * bits - 1) @ sums) >= observed).mean())
    generator, rows, extreme = np.random.default_rng(SEED), _rows(sums.size, PERMUTATIONS), 0
    for start in range(0, PERMUTATIONS, rows):
        shape = (min(rows, PERMUTATIONS - start), sums.size)
        signs = generator.integers(0, 2, shape, dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ sums) >= observed).sum())
    return (1 + extreme) / (1 + PERMUTATIONS)


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


def dataset_scores(
    rows: Sequence[Mapping[str, Any]], patients: Mapping[str, str] | None = None, present: str = "reference"
) -> dict[str, Any]:
    """Return the IoU over the dataset: `monai_iou.metrics.fine_grained_iou` of the rows, and the interval of IoU-I.

    Args:
        rows: one mapping per case and label with `case`, `label`, and the numbers of voxels `intersection`, `union` and
            `voxels_fn` (of the reference alone); every case must have every label. Without rows, every score is NaN.
        patients: the patient of each case.
        present: a label counts in a case for IoU-I and IoU-C where the "reference" contains it, as in the paper; or
            where "either" mask does, so that a false positive on a case without the label scores 0.

    Returns:
        `iou_d`, `iou_i`, `iou_i_interval`, `iou_c`, and the means of the worst 5, 10 and 50 %; NaN if nothing is
        defined.

    >>> rows = [
    ...     {"case": "a", "label": "1", "intersection": 50, "union": 100, "voxels_fn": 50},
    ...     {"case": "b", "label": "1", "intersection": 0, "union": 4, "voxels_fn": 4},
    ... ]
    >>> scores = dataset_scores(rows)
    >>> round(scores["iou_d"], 4), scores["iou_i"], scores["iou_i_worst_50"], scores["iou_i_interval"]
    (0.4808, 0.25, 0.0, None)
    """
    names = list(dict.fromkeys(row["case"] for row in rows))
    labels = len({row["label"] for row in rows})
    read = [[row[name] for name in ("intersection", "union", "voxels_fn")] for row in rows]
    counts = np.nan_to_num(np.array(read, dtype=float)).astype(np.int64)  # NaN was not annotated, and counts nowhere
    intersection, union, missed = counts.reshape(len(names), labels, 3).transpose(2, 0, 1)
    counted = union > 0 if present == "either" else intersection + missed > 0
    defined = np.where(counted, ratio(intersection, union, empty=np.nan), np.nan)
    kept = [i for i, row in enumerate(defined) if np.isfinite(row).any()]
    images = np.array([np.nanmean(defined[i]) for i in kept])
    units = None if patients is None else [patients[names[i]] for i in kept]
    tables = [torch.from_numpy(table.copy()) for table in (intersection, union, counted)]
    scores = fine_grained_iou(*tables[:2], active=tables[2])
    return {**scores, "iou_i_interval": interval(images, "mean", units)}
