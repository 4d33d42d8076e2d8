"""The loops of `numba_usual.py` by region: I, P, T and the cross-entropy of one class, or of two.

Here too p is kept for the backward pass where the gradient will stand, as -p where the target is above 1/2. Sums are
taken over runs of voxels of one region. In a row that holds the background alone, only the probabilities and the
cross-entropy of the background are summed.

The slopes of the backward pass are read from tables with one number for each region and label, as that takes less time
than to find the runs.
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
    total,
)
from monai_iou.voxels.numba_regions import LEAST_MEAN, find_runs, region_of, signed

_F = np.float32


@loop
def _probabilities(u: Row, p: Row, q: Row, n: int) -> None:
    """Write p and q = 1 - p."""
    for i in range(n):
        t = exp(-abs(u[i]))
        larger = _F(1) / (_F(1) + t)
        p[i] = larger if u[i] > _F(0) else t * larger
        q[i] = t * larger if u[i] > _F(0) else larger


@summing_loop
def _sums(p: Row, y: Row, n: int) -> tuple[Any, ...]:
    """Return I, P and T."""
    both, whole, of_y = _F(0), _F(0), _F(0)
    for i in range(n):
        both += p[i] * y[i]
        whole += p[i]
        of_y += y[i]
    return both, whole, of_y


@summing_loop
def _sums_of_two(p: Row, q: Row, y: Row, labels: Row, n: int) -> tuple[Any, ...]:
    """Return I, P and T of the class, and of the other one."""
    both, whole, of_y, both_other, rest, others = _F(0), _F(0), _F(0), _F(0), _F(0), _F(0)
    for i in range(n):
        other = _F(1) if labels[i] == _F(0) else _F(0)
        both += p[i] * y[i]
        whole += p[i]
        of_y += y[i]
        both_other += q[i] * other
        rest += q[i]
        others += other
    return both, whole, of_y, both_other, rest, others


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
def add_regions(
    x: Any,
    other: Any,
    target: Any,
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
    :func:`numba_usual.add_usual`.
    """
    spare = np.empty((6, min(WIDTH, x.shape[0]) + PADDING), np.float32)
    difference, selected, p, q, inside, outside = spare[0], spare[1], spare[2], spare[3], spare[4], spare[5]
    ends, soft = np.empty(WIDTH, np.int64), _F(0)
    for start in range(0, x.shape[0], WIDTH):
        n = min(WIDTH, x.shape[0] - start)
        u, y, labels = x[start:], target[start:], target[start:]
        if keeps:
            p = kept[start:]
        if number >= 0:
            y = selected
            select_class(labels, _F(number), n, y)
        if two:
            u, first, second = difference, x[start:], other[start:]
            for i in range(n):
                u[i] = first[i] - second[i]
        if not size(u, n) < LARGEST:
            return 0
        _probabilities(u, p, q, n)
        has_class = size(labels if two else y, n) != _F(0)  # most rows hold the background alone
        if has_class and not two:
            rows[0, 0, 6] += not_shares(y, n)
            soft += _soft_targets(y, n)
        if entropy:
            _entropies(u, y, n, inside, outside)
        done, runs = 0, find_runs(groups[start:], n, ends)
        for run in range(runs):
            m, region = ends[run] - done, region_of(groups[start + done :])
            row, row_other = rows[0, region], rows[1, region]
            if not has_class:
                row[1] += total(p[done:], m)
                if two:
                    rest = total(q[done:], m)
                    row_other[0] += rest
                    row_other[1] += rest
                    row_other[2] += m
            elif two:
                sums = _sums_of_two(p[done:], q[done:], y[done:], labels[done:], m)
                both, whole, of_y, both_other, rest, others = sums
                row[0] += both
                row[1] += whole
                row[2] += of_y
                row_other[0] += both_other
                row_other[1] += rest
                row_other[2] += others
            else:
                both, whole, of_y = _sums(p[done:], y[done:], m)
                row[0] += both
                row[1] += whole
                row[2] += of_y
            if entropy:
                row_other[3] += total(outside[done:], m)
                if has_class:
                    row[3] += total(inside[done:], m)
            row[5] += m
            done = ends[run]
        if keeps and has_class:
            for i in range(n):
                p[i] = signed(p[i], y[i])
    if not keeps or (two and not _keep_digits(rows)):
        return 1
    return 3 if soft == _F(0) else 2


@loop
def _write_row(kept: Row, y: Row, signs: bool, regions: Any, n: int, outside: Row, inside: Row) -> None:
    """Turn p of n voxels into the gradient by I and P; slopes are of each region where y is 0, and where it is 1."""
    if signs and _below_zero(kept, n) == _F(0):  # most rows have no voxel of the class
        for i in range(n):
            kept[i] = kept[i] * (_F(1) - kept[i]) * outside[regions[i]]
    elif signs:
        for i in range(n):
            slope = inside[regions[i]] if kept[i] < _F(0) else outside[regions[i]]
            kept[i] = abs(kept[i]) * (_F(1) - abs(kept[i])) * slope
    else:
        for i in range(n):
            slope = outside[regions[i]] * (_F(1) - y[i]) + inside[regions[i]] * y[i]
            kept[i] = abs(kept[i]) * (_F(1) - abs(kept[i])) * slope


@loop
def _write_row_with_entropy(
    kept: Row, y: Row, signs: bool, regions: Any, n: int, outside: Row, inside: Row, lift: Row, lower: Row
) -> None:
    """The same with the cross-entropy: `lift` and `lower` are its pulls outside of the class, and inside."""
    if signs and _below_zero(kept, n) == _F(0):
        for i in range(n):
            region = regions[i]
            kept[i] = kept[i] * ((_F(1) - kept[i]) * outside[region] + lift[region])
    elif signs:
        for i in range(n):
            region, p, q = regions[i], abs(kept[i]), _F(1) - abs(kept[i])
            at_class, elsewhere = q * (p * inside[region] - lower[region]), p * (q * outside[region] + lift[region])
            kept[i] = at_class if kept[i] < _F(0) else elsewhere
    else:
        for i in range(n):
            region, p, q = regions[i], abs(kept[i]), _F(1) - abs(kept[i])
            at_class, elsewhere = q * (p * inside[region] - lower[region]), p * (q * outside[region] + lift[region])
            kept[i] = at_class * y[i] + elsewhere * (_F(1) - y[i])


@loop
def write_regions(
    target: Any, signs: bool, groups: Any, two: bool, entropy: bool, pulls: Any, out: Any, out_other: Any
) -> None:
    """Turn p of :func:`add_regions` into d loss / d logits, in place; see :func:`numba_usual.write_usual`."""
    slopes = np.empty((2, pulls.shape[2]), np.float32)  # of each region where y is 0, and where it is 1
    outside, inside, lift, lower = slopes[0], slopes[1], pulls[1, 3], pulls[0, 3]
    for region in range(pulls.shape[2]):
        of_i, of_p = pulls[0, 0, region], pulls[0, 1, region]
        of_other, of_q = pulls[1, 0, region] if two else _F(0), pulls[1, 1, region] if two else _F(0)
        outside[region] = of_p - (of_other + of_q)
        inside[region] = (of_i + of_p) - of_q
    for start in range(0, out.shape[0], WIDTH):
        n = min(WIDTH, out.shape[0] - start)
        place, y, regions = out[start:], target[start:], groups[start:]
        if entropy:
            _write_row_with_entropy(place, y, signs, regions, n, outside, inside, lift, lower)
        else:
            _write_row(place, y, signs, regions, n, outside, inside)
        if two:
            second = out_other[start:]
            for i in range(n):
                second[i] = -place[i]
