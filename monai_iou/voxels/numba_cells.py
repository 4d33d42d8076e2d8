"""The loops of `numba_usual.py` by region: I, P, T and the cross-entropy of one class, or of two.

Here too p is kept for the backward pass where the gradient will stand, as -p where the target is above 1/2. Sums are
taken over runs of voxels of one region. In a row that holds the background alone, only the probabilities and the
cross-entropy of the background are summed.

The runs are kept for the backward pass, too: `numba_cell_slopes.py` neither reads the regions nor looks for runs again.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from monai_iou.voxels.numba_math import (
    LARGEST,
    PADDING,
    WIDTH,
    Row,
    exp,
    log1p,
    loop,
    not_shares,
    select_class,
    size,
    summing_loop,
)
from monai_iou.voxels.numba_regions import LEAST_MEAN, SHORTEST_RUN, find_runs, region_of, signed
from monai_iou.voxels.numba_vectors import LANES, sum_between

_F = np.float32


@summing_loop
def _probabilities(u: Row, p: Row, n: int) -> Any:
    """Write p, and return the size of u."""
    found = _F(0)
    for i in range(n):
        t = exp(-abs(u[i]))
        larger = _F(1) / (_F(1) + t)
        p[i] = larger if u[i] > _F(0) else t * larger
        found += abs(u[i])
    return found


@summing_loop
def _probabilities_of_two(u: Row, p: Row, q: Row, n: int) -> Any:
    """Write p and q = 1 - p, and return the size of u."""
    found = _F(0)
    for i in range(n):
        t = exp(-abs(u[i]))
        larger = _F(1) / (_F(1) + t)
        p[i] = larger if u[i] > _F(0) else t * larger
        q[i] = t * larger if u[i] > _F(0) else larger
        found += abs(u[i])
    return found


@loop
def _read_whole(numbers: Any, n: int, out: Row) -> None:
    """Write n whole numbers as float32."""
    for i in range(n):
        out[i] = _F(numbers[i])


@loop
def _multiply(first: Row, second: Row, n: int, out: Row) -> None:
    for i in range(n):
        out[i] = first[i] * second[i]


@summing_loop
def _soft_targets(y: Row, n: int) -> Any:
    """Return how many targets are neither 0 nor 1."""
    found = _F(0)
    for i in range(n):
        found += _F(0) if (y[i] == _F(0)) | (y[i] == _F(1)) else _F(1)
    return found


@loop
def _entropies(u: Row, y: Row, n: int, inside: Row, outside: Row) -> None:
    """Write the cross-entropies of the class, and of the others."""
    for i in range(n):
        tail = log1p(exp(-abs(u[i])))
        inside[i] = y[i] * (tail + max(-u[i], _F(0)))
        outside[i] = (_F(1) - y[i]) * (tail + max(u[i], _F(0)))


@loop
def _keep_digits(rows: Any) -> bool:
    """Return whether 1 - p has its digits in every region of `rows`, (2, R, 7): each has slopes of its own."""
    lost = 0
    for region in range(rows.shape[1]):
        lost += 1 if rows[1, region, 1] < LEAST_MEAN * rows[0, region, 5] else 0
    return lost == 0


@loop
def _keep(p: Row, y: Row, has_class: bool, n: int, kept: Row) -> None:
    """Write p as it is kept."""
    if has_class:
        for i in range(n):
            kept[i] = signed(p[i], y[i])
    else:
        for i in range(n):
            kept[i] = p[i]


@loop
def _add_runs(values: Row, ends: Any, runs: int, groups: Any, statistic: Any) -> None:
    """Add the sums of the runs to those of their regions, (R,)."""
    done = 0
    for run in range(runs):
        statistic[region_of(groups[done:])] += sum_between(values, done, ends[run])
        done = ends[run]


@loop
def _add_runs_and_counts(values: Row, ends: Any, runs: int, groups: Any, statistic: Any, counts: Any) -> None:
    """Add the sums of the runs and, to `counts`, their voxels."""
    done = 0
    for run in range(runs):
        region = region_of(groups[done:])
        statistic[region] += sum_between(values, done, ends[run])
        counts[region] += ends[run] - done
        done = ends[run]


def most_runs(voxels: int) -> int:
    """Return how many runs :func:`add_regions` keeps at most: those of regions that are long enough, cut by rows."""
    return voxels // SHORTEST_RUN + -(-voxels // WIDTH)


@loop
def add_regions(
    x: Any,
    other: Any,
    target: Any,
    whole: Any,
    number: int,
    groups: Any,
    two: bool,
    entropy: bool,
    keeps: bool,
    kept: Any,
    kept_runs: Any,
    rows: Any,
) -> tuple[int, int]:
    """Add I, P, T and, if asked for, the cross-entropy of some voxels to `rows`, (2, R, 7) float64.

    They are added as by :func:`numba_lines.add_line`; what is returned, and what is kept, is as for
    :func:`numba_usual.add_usual`, but for 0 where regions change too often for these loops. `whole`, (n,) int32, holds
    the target's values instead of `target`, unless it is empty. If it `keeps` the probabilities, it writes where
    each run ends, and its region, to `kept_runs`, (2, :func:`most_runs`) int32, and also returns how many there are.
    """
    spare = np.empty((7, min(WIDTH, x.shape[0]) + PADDING), np.float32)
    difference, selected, p, q, product = spare[0], spare[1], spare[2], spare[3], spare[4]
    inside, outside = spare[5], spare[6]
    ends, soft, changes, known = np.empty(WIDTH, np.int64), _F(0), 0, 0
    for start in range(0, x.shape[0], WIDTH):
        n = min(WIDTH, x.shape[0] - start)
        u, y, labels, regions = x[start:], target[start:], target[start:], groups[start:]
        runs = find_runs(regions, n, ends)
        changes += runs - 1
        if (changes + 1) * SHORTEST_RUN > x.shape[0]:
            return 0, 0
        if keeps:
            done = 0
            for run in range(runs):
                kept_runs[0, known + run] = start + ends[run]
                kept_runs[1, known + run] = region_of(regions[done:])
                done = ends[run]
            known += runs
        if number >= 0:
            y = selected
            select_class(labels, _F(number), n, y)
        elif whole.shape[0] > 0:
            y = selected
            _read_whole(whole[start:], n, y)
        has_class = size(labels if two else y, n) != _F(0)  # most rows hold the background alone
        p = spare[2]
        if keeps and not has_class and start + n + LANES <= kept.shape[0]:
            p = kept[start:]  # as it is kept
        if two:
            u, first, second = difference, x[start:], other[start:]
            for i in range(n):
                u[i] = first[i] - second[i]
            found = _probabilities_of_two(u, p, q, n)
        else:
            found = _probabilities(u, p, n)
        if not found < LARGEST:
            return 0, 0
        _add_runs_and_counts(p, ends, runs, regions, rows[0, :, 1], rows[0, :, 5])
        if two:
            _add_runs(q, ends, runs, regions, rows[1, :, 1])
            if not has_class:
                _add_runs_and_counts(q, ends, runs, regions, rows[1, :, 0], rows[1, :, 2])
        if has_class:
            if not two:
                rows[0, 0, 6] += not_shares(y, n)
                soft += _soft_targets(y, n)
            if number < 0 and whole.shape[0] == 0:
                for i in range(n):
                    selected[i] = y[i]
            _multiply(p, selected, n, product)
            _add_runs(product, ends, runs, regions, rows[0, :, 0])
            _add_runs(selected, ends, runs, regions, rows[0, :, 2])
        if entropy:
            _entropies(u, y, n, inside, outside)
            _add_runs(outside, ends, runs, regions, rows[1, :, 3])
            if has_class:
                _add_runs(inside, ends, runs, regions, rows[0, :, 3])
        if has_class and two:
            others = inside
            select_class(labels, _F(0), n, others)
            _multiply(q, others, n, product)
            _add_runs(product, ends, runs, regions, rows[1, :, 0])
            _add_runs(others, ends, runs, regions, rows[1, :, 2])
        if keeps and (has_class or start + n + LANES > kept.shape[0]):
            _keep(p, y, has_class, n, kept[start:])
    if not keeps or (two and not _keep_digits(rows)):
        return 1, 0
    return (3 if soft == _F(0) else 2), known
