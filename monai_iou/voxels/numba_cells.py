"""The loops of `numba_usual.py` by region: I, P, T and the cross-entropy of one class, or of two.

Here too p is kept for the backward pass where the gradient will stand, as -p where the target is above 1/2. Sums are
taken over runs of voxels of one region. In a row that holds the background alone, only the probabilities and the
cross-entropy of the background are summed.

The slopes of the backward pass, one number for each region and label, are written to a row run by run as well.
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
from monai_iou.voxels.numba_regions import LEAST_MEAN, SHORTEST_RUN, find_runs, read_pulls, region_of, signed
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


@summing_loop
def _below_zero(values: Row, n: int) -> Any:
    """Return how many values are below 0."""
    found = _F(0)
    for i in range(n):
        found += _F(1) if values[i] < _F(0) else _F(0)
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
def _add_counts(ends: Any, runs: int, groups: Any, statistic: Any) -> None:
    """Add the voxels of the runs."""
    done = 0
    for run in range(runs):
        statistic[region_of(groups[done:])] += ends[run] - done
        done = ends[run]


@loop
def _add_runs_and_counts(values: Row, ends: Any, runs: int, groups: Any, statistic: Any, counts: Any) -> None:
    """Do both at once."""
    done = 0
    for run in range(runs):
        region = region_of(groups[done:])
        statistic[region] += sum_between(values, done, ends[run])
        counts[region] += ends[run] - done
        done = ends[run]


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
    rows: Any,
) -> int:
    """Add I, P, T and, if asked for, the cross-entropy of some voxels to `rows`, (2, R, 7) float64.

    They are added as by :func:`numba_lines.add_line`; what is returned, and what is kept, is as for
    :func:`numba_usual.add_usual`, but for 0 where regions change too often for these loops. `whole`, (n,) int32, holds
    the target's values instead of `target`, unless it is empty.
    """
    spare = np.empty((7, min(WIDTH, x.shape[0]) + PADDING), np.float32)
    difference, selected, p, q, product = spare[0], spare[1], spare[2], spare[3], spare[4]
    inside, outside = spare[5], spare[6]
    ends, soft, changes = np.empty(WIDTH, np.int64), _F(0), 0
    for start in range(0, x.shape[0], WIDTH):
        n = min(WIDTH, x.shape[0] - start)
        u, y, labels, regions = x[start:], target[start:], target[start:], groups[start:]
        runs = find_runs(regions, n, ends)
        changes += runs - 1
        if (changes + 1) * SHORTEST_RUN > x.shape[0]:
            return 0
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
            return 0
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
        return 1
    return 3 if soft == _F(0) else 2


@loop
def _write_row(kept: Row, y: Row, signs: bool, has_class: bool, n: int, outside: Row, inside: Row) -> None:
    """Turn p of n voxels into the gradient by I and P; each voxel has its slopes where y is 0, and where it is 1."""
    if not has_class:
        for i in range(n):
            kept[i] = kept[i] * (_F(1) - kept[i]) * outside[i]
    elif signs:
        for i in range(n):
            slope = inside[i] if kept[i] < _F(0) else outside[i]
            kept[i] = abs(kept[i]) * (_F(1) - abs(kept[i])) * slope
    else:
        for i in range(n):
            slope = outside[i] * (_F(1) - y[i]) + inside[i] * y[i]
            kept[i] = abs(kept[i]) * (_F(1) - abs(kept[i])) * slope


@loop
def _write_row_with_entropy(
    kept: Row, y: Row, signs: bool, has_class: bool, n: int, slopes: tuple[Row, Row, Row, Row]
) -> None:
    """The same with the cross-entropy: `lift` and `lower` are its pulls outside of the class, and inside."""
    outside, inside, lift, lower = slopes
    if not has_class:
        for i in range(n):
            kept[i] = kept[i] * ((_F(1) - kept[i]) * outside[i] + lift[i])
    elif signs:
        for i in range(n):
            p, q = abs(kept[i]), _F(1) - abs(kept[i])
            at_class, elsewhere = q * (p * inside[i] - lower[i]), p * (q * outside[i] + lift[i])
            kept[i] = at_class if kept[i] < _F(0) else elsewhere
    else:
        for i in range(n):
            p, q = abs(kept[i]), _F(1) - abs(kept[i])
            at_class, elsewhere = q * (p * inside[i] - lower[i]), p * (q * outside[i] + lift[i])
            kept[i] = at_class * y[i] + elsewhere * (_F(1) - y[i])


@loop
def write_regions(
    target: Any, signs: bool, groups: Any, two: bool, entropy: bool, pulls: Any, out: Any, out_other: Any
) -> None:
    """Turn p of :func:`add_regions` into d loss / d logits, in place; see :func:`numba_usual.write_usual`."""
    table = np.empty((2, pulls.shape[2]), np.float32)  # of each region where y is 0, and where it is 1
    for region in range(pulls.shape[2]):
        of_i, of_p = pulls[0, 0, region], pulls[0, 1, region]
        of_other, of_q = pulls[1, 0, region] if two else _F(0), pulls[1, 1, region] if two else _F(0)
        table[0, region] = of_p - (of_other + of_q)
        table[1, region] = (of_i + of_p) - of_q
    rows = np.empty((4, min(WIDTH, out.shape[0]) + PADDING), np.float32)
    slopes = (rows[0], rows[1], rows[2], rows[3])
    outside, inside, lift, lower = slopes
    for start in range(0, out.shape[0], WIDTH):
        n = min(WIDTH, out.shape[0] - start)
        place, y, regions = out[start:], target[start:], groups[start:]
        has_class = not signs or _below_zero(place, n) != _F(0)  # most rows have no voxel of the class
        read_pulls(table[0], regions, n, outside)
        if has_class:
            read_pulls(table[1], regions, n, inside)
        if entropy:
            read_pulls(pulls[1, 3], regions, n, lift)
            if has_class:
                read_pulls(pulls[0, 3], regions, n, lower)
            _write_row_with_entropy(place, y, signs, has_class, n, slopes)
        else:
            _write_row(place, y, signs, has_class, n, outside, inside)
        if two:
            second = out_other[start:]
            for i in range(n):
                second[i] = -place[i]
