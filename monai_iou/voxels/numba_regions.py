"""Loops over voxels by region: a row is cut into runs of voxels of one region, which are summed at once.

Along the last axis a region goes on for some tens of voxels. Where it does not, a run costs more than its voxels, and
the general formulas are as good.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from monai_iou.voxels.numba_math import Row, Terms, loop, size, total
from monai_iou.voxels.numba_vectors import COMPARED, LANES, change_bits, fill, lowest_bit, sum_between

LEAST_MEAN = 1 / 1024  # of the other class's probability: a smaller 1 - p has lost three digits where p is kept

_F = np.float32
SHORTEST_RUN = 8  # voxels on average
_LEAST = _F(1.1754944e-38)  # size of what is kept below 0: the sign of 0 would be lost


@loop
def has_long_runs(groups: Any, stride: int, maps: int, n: int) -> bool:
    """Return whether the regions of n voxels, int32, those of a map from its number * stride on, go on long enough."""
    runs = maps
    for c in range(maps):
        regions = groups[c * stride :]
        for i in range(1, n):
            runs += 1 if regions[i] != regions[i - 1] else 0
    return bool(runs * SHORTEST_RUN <= maps * n)


@loop
def run_length(groups: Any, n: int) -> int:
    """Return how many of the next n voxels are of the region of the first; all of them if there are no regions."""
    known = min(n, groups.shape[0])
    i = 1
    while i + COMPARED <= known:
        bits = change_bits(groups, i)
        if bits != 0:
            return int(i + lowest_bit(bits))
        i += COMPARED
    while i < known:
        if groups[i] != groups[i - 1]:
            return i
        i += 1
    return n


@loop
def find_runs(groups: Any, n: int, ends: Any) -> int:
    """Write where the runs of n voxels end, and return how many there are; one if there are no regions."""
    known = min(n, groups.shape[0])
    runs, i = 0, 1
    while i + COMPARED <= known:
        bits = change_bits(groups, i)
        while bits != 0:
            ends[runs] = i + lowest_bit(bits)
            runs += 1
            bits &= bits - np.uint64(1)
        i += COMPARED
    while i < known:
        if groups[i] != groups[i - 1]:
            ends[runs] = i
            runs += 1
        i += 1
    ends[runs] = n
    return runs + 1


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
def vectors_work() -> bool:
    """Return whether the vectors do here what they are for; where Numba cannot compile them, this raises."""
    groups, ends = np.zeros(3 * COMPARED, np.int32), np.empty(3 * COMPARED, np.int64)
    row = np.ones(5 * LANES, np.float32)
    groups[COMPARED + 3 :] = 1
    runs = find_runs(groups, groups.shape[0], ends)
    fill(row, 1, LANES + 2, _F(2))
    return bool(runs == 2 and ends[0] == COMPARED + 3 and sum_between(row, 0, LANES + 2) == _F(2 * LANES + 3))


@loop
def read_pulls(pulls: Row, regions: Any, n: int, out: Row) -> None:
    """Write d loss / d a statistic for the region of each voxel; `pulls`, (R,), has it for each region.

    `out` has at least LANES voxels more, of which some may be written to.
    """
    ends = np.empty(n, np.int64)
    done = 0
    for run in range(find_runs(regions, n, ends)):
        fill(out, done, ends[run], pulls[region_of(regions[done:])])
        done = ends[run]


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
