"""The backward pass of `numba_cells.py`: the slopes, a number for each region and label, are written run by run."""

from __future__ import annotations

from typing import Any

import numpy as np

from monai_iou.voxels.numba_math import PADDING, WIDTH, Row, loop, summing_loop
from monai_iou.voxels.numba_vectors import fill

_F = np.float32


@summing_loop
def _below_zero(values: Row, n: int) -> Any:
    """Return how many values are below 0."""
    found = _F(0)
    for i in range(n):
        found += _F(1) if values[i] < _F(0) else _F(0)
    return found


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
def _read_pulls(pulls: Row, runs: Any, first: int, start: int, n: int, out: Row) -> int:
    """Write d loss / d a statistic for n voxels from `start` on, whose runs begin with the `first`.

    Returns the run that follows. `out` has at least LANES voxels more, of which some may be written to.
    """
    done, run = 0, first
    while done < n:
        end = runs[0, run] - start
        fill(out, done, end, pulls[runs[1, run]])
        done, run = end, run + 1
    return run


@loop
def write_regions(
    target: Any, signs: bool, runs: Any, two: bool, entropy: bool, pulls: Any, out: Any, out_other: Any
) -> None:
    """Turn p of :func:`add_regions`, with the runs that it kept, into d loss / d logits, in place.

    The other arguments are those of :func:`numba_usual.write_usual`.
    """
    table = np.empty((2, pulls.shape[2]), np.float32)  # of each region where y is 0, and where it is 1
    for region in range(pulls.shape[2]):
        of_i, of_p = pulls[0, 0, region], pulls[0, 1, region]
        of_other, of_q = pulls[1, 0, region] if two else _F(0), pulls[1, 1, region] if two else _F(0)
        table[0, region] = of_p - (of_other + of_q)
        table[1, region] = (of_i + of_p) - of_q
    rows = np.empty((4, min(WIDTH, out.shape[0]) + PADDING), np.float32)
    slopes = (rows[0], rows[1], rows[2], rows[3])
    outside, inside, lift, lower = slopes
    first = np.int64(0)  # a number of Python would be a type of its own
    for start in range(0, out.shape[0], WIDTH):
        n = min(WIDTH, out.shape[0] - start)
        place, y = out[start:], target[start:]
        has_class = not signs or _below_zero(place, n) != _F(0)  # most rows have no voxel of the class
        after = _read_pulls(table[0], runs, first, start, n, outside)
        if has_class:
            _read_pulls(table[1], runs, first, start, n, inside)
        if entropy:
            _read_pulls(pulls[1, 3], runs, first, start, n, lift)
            if has_class:
                _read_pulls(pulls[0, 3], runs, first, start, n, lower)
            _write_row_with_entropy(place, y, signs, has_class, n, slopes)
        else:
            _write_row(place, y, signs, has_class, n, outside, inside)
        first = after
        if two:
            second = out_other[start:]
            for i in range(n):
                second[i] = -place[i]
