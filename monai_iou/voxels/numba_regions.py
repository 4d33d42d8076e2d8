"""Loops over voxels by region: a row is cut into runs of voxels of one region, which are summed at once.

Along the last axis a region goes on for some tens of voxels. Where it does not, a run costs more than its voxels, and
the general formulas are as good.

For what most losses by region ask for (I, P and T of one class or of two), p is kept for the backward pass where the
gradient will stand, as in `numba_usual.py`. There a slope is read from a table with one number for each region and
label, as that takes less time than to find the runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from monai_iou.voxels.numba_math import (
    LARGEST,
    PADDING,
    WIDTH,
    Row,
    Terms,
    exp,
    loop,
    not_shares,
    select_class,
    size,
    summing_loop,
    total,
)

LEAST_MEAN = 1 / 1024  # of the other class's probability: a smaller 1 - p has lost three digits where p is kept

_F = np.float32
_SHORTEST_RUN = 8  # voxels on average
_LEAST = _F(1.1754944e-38)  # p of a voxel of the class as it is kept: -0 would not stay apart from 0


@loop
def has_long_runs(groups: Any, stride: int, maps: int, n: int) -> bool:
    """Return whether the regions of n voxels, int32, those of a map from its number * stride on, go on long enough."""
    runs = maps
    for c in range(maps):
        regions = groups[c * stride :]
        for i in range(1, n):
            runs += 1 if regions[i] != regions[i - 1] else 0
    return bool(runs * _SHORTEST_RUN <= maps * n)


@loop
def run_length(groups: Any, n: int) -> int:
    """Return how many of the next n voxels are of the region of the first; all of them if there are no regions."""
    for i in range(1, min(n, groups.shape[0])):
        if groups[i] != groups[0]:
            return i
    return n


@loop
def region_of(groups: Any) -> int:
    """Return the region of the next voxel."""
    return groups[0] if groups.shape[0] > 0 else 0


@loop
def add_total(rows: Any, entropy: Row, regions: Any, n: int) -> None:
    """Add the cross-entropies of n voxels to the regions of a class, (R, 7)."""
    done = 0
    while done < n:
        m = run_length(regions[done:], n - done)
        rows[region_of(regions[done:]), 3] += total(entropy[done:], m)
        done += m


@loop
def read_pulls(pulls: Row, regions: Any, n: int, out: Row) -> None:
    """Write d loss / d a statistic for the region of each voxel; `pulls`, (R,), has it for each region."""
    if regions.shape[0] == 0:
        for i in range(n):
            out[i] = pulls[0]
    else:
        for i in range(n):
            out[i] = pulls[regions[i]]


@loop
def set_slope(
    slope: Row, p: Row, y: Row, n: int, terms: Terms, pulls: Any, regions: Any, spare: tuple[Row, Row, Row]
) -> None:
    """Write the derivative of the sums of a class by p, each times the pull of its region; `pulls` is (7, R)."""
    of_i, of_p, of_q = spare
    read_pulls(pulls[1], regions, n, of_p)
    if terms.smaller or size(y, n) != _F(0):
        read_pulls(pulls[0], regions, n, of_i)
    else:  # most rows have no voxel of the class
        for i in range(n):
            of_i[i] = _F(0)
    if terms.smaller:  # [p < y], half of it at a tie
        for i in range(n):
            slope[i] = of_i[i] * (_F(1) if p[i] < y[i] else _F(0.5) if p[i] == y[i] else _F(0))
    else:
        for i in range(n):
            slope[i] = of_i[i] * y[i]
    if terms.squares:
        for i in range(n):
            slope[i] += _F(2) * of_p[i] * p[i]
    else:
        for i in range(n):
            slope[i] += of_p[i]
    if terms.confidence:
        read_pulls(pulls[4], regions, n, of_q)
        for i in range(n):
            slope[i] += of_q[i] * (_F(3) * p[i] * p[i] if terms.squares else _F(2) * p[i])


@loop
def signed(p: Any, y: Any) -> Any:
    """Return p of a voxel as it is kept: below 0 where the target is above 1/2."""
    return min(-p, -_LEAST) if y > _F(0.5) else p


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
def not_clear(y: Row, n: int) -> Any:
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
def _keep_digits(rows: Any) -> bool:
    """Return whether 1 - p has its digits in every region of `rows`, (2, R, 7): each has slopes of its own."""
    lost = 0
    for region in range(rows.shape[1]):
        lost += 1 if rows[1, region, 1] < LEAST_MEAN * rows[0, region, 5] else 0
    return lost == 0


@loop
def add_regions(
    x: Any, other: Any, target: Any, number: int, groups: Any, two: bool, keeps: bool, kept: Any, rows: Any
) -> int:
    """Add I, P, T of some voxels to `rows`, (2, R, 7) float64, as :func:`numba_lines.add_line` does.

    What it returns, and what it keeps, is as for :func:`numba_usual.add_usual`.
    """
    spare = np.empty((4, min(WIDTH, x.shape[0]) + PADDING), np.float32)
    difference, selected, p, q = spare[0], spare[1], spare[2], spare[3]
    unclear = _F(0)
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
        has_class = size(y, n) != _F(0)  # most rows have no voxel of the class
        if has_class and not two:
            rows[0, 0, 6] += not_shares(y, n)
            unclear += not_clear(y, n)
        done = 0
        while done < n:
            regions = groups[start + done :]
            m, region = run_length(regions, n - done), region_of(regions)
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
            row[5] += m
            done += m
        if keeps and has_class:
            for i in range(n):
                p[i] = signed(p[i], y[i])
    if not keeps or (two and not _keep_digits(rows)):
        return 1
    return 3 if unclear == _F(0) else 2


@loop
def write_regions(target: Any, signs: bool, groups: Any, two: bool, pulls: Any, out: Any, out_other: Any) -> None:
    """Turn p of :func:`add_regions` into d loss / d logits, in place; see :func:`numba_usual.write_usual`."""
    slopes = np.empty((2, pulls.shape[2]), np.float32)  # of each region where y is 0, and where it is 1
    outside, inside = slopes[0], slopes[1]
    for region in range(pulls.shape[2]):
        of_i, of_p = pulls[0, 0, region], pulls[0, 1, region]
        of_other, of_q = pulls[1, 0, region] if two else _F(0), pulls[1, 1, region] if two else _F(0)
        outside[region] = of_p - (of_other + of_q)
        inside[region] = (of_i + of_p) - of_q
    for start in range(0, out.shape[0], WIDTH):
        n = min(WIDTH, out.shape[0] - start)
        place, y, regions = out[start:], target[start:], groups[start:]
        if signs and _below_zero(place, n) == _F(0):  # most rows have no voxel of the class
            for i in range(n):
                place[i] = place[i] * (_F(1) - place[i]) * outside[regions[i]]
        elif signs:
            for i in range(n):
                slope = inside[regions[i]] if place[i] < _F(0) else outside[regions[i]]
                place[i] = abs(place[i]) * (_F(1) - abs(place[i])) * slope
        else:
            for i in range(n):
                slope = outside[regions[i]] * (_F(1) - y[i]) + inside[regions[i]] * y[i]
                place[i] = abs(place[i]) * (_F(1) - abs(place[i])) * slope
        if two:
            second = out_other[start:]
            for i in range(n):
                second[i] = -place[i]
