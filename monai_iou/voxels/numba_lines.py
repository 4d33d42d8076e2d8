"""Loops over the voxels of one class against the others: a sigmoid, or a softmax of two classes.

A softmax of two classes is the sigmoid of the difference of their logits. With one number u for a voxel,

.. code-block:: text

    t = exp(-|u|),  r = 1 / (1 + t),  p = r or t r,  q = 1 - p = t r or r      the larger of them where u points to
    -ln p = ln(1 + t) + max(-u, 0),  -ln q = ln(1 + t) + max(u, 0)

so that p and q, and their logarithms, keep their digits, and nothing is subtracted. The sums and slopes are those of
`formulas.py`; with a = d loss / d p - d loss / d q, the latter of two classes,

.. code-block:: text

    d loss / d u = p q a + g_E y' q^gamma (gamma p ln p - q) + g_B (1 - y') p^gamma (p - gamma q ln q)

g_B being that of the cross-entropy of the other class, or of the voxels outside the class.
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
    add_region,
    exp,
    log1p,
    loop,
    not_shares,
    power,
    read_maps,
    read_valid,
    select_class,
    size,
    total,
)
from monai_iou.voxels.numba_regions import read_pulls, region_of, run_length, set_slope

_F = np.float32
_TEMPORARIES = 8  # rows: u, t, p, q, target, the other class's target, valid, slope


@loop
def _read(
    x: Row, other: Row, target: Row, number: int, mark: int, mask: Any, two: bool, n: int, space: tuple[Row, ...]
) -> tuple[Row, Row, bool]:
    """Return u and the targets of a row of n voxels, where they are or in temporaries, and whether voxels are ignored.

    Which voxels count is written if some do not, and so are the targets of the other class.
    """
    difference, _, _, _, selected, y_other, valid, _ = space
    u, y = x, target
    if two:
        u = difference
        for i in range(n):
            u[i] = x[i] - other[i]
    ignores = mask.shape[0] > 0 or mark != 0
    if ignores:
        read_valid(target, mark, mask, n, valid)
    if number >= 0:
        y = selected
        select_class(target, _F(number), n, y)
    elif ignores:
        y = selected
        read_maps(target, valid, n, y)
    if two:
        select_class(target, _F(0), n, y_other)
    return u, y, ignores


@loop
def _probabilities(u: Row, n: int, space: tuple[Row, ...]) -> None:
    """Write t, p and q, the latter 0 at ignored voxels."""
    _, t, p, q, _, _, valid, _ = space
    for i in range(n):
        t[i] = exp(-abs(u[i]))
        larger = _F(1) / (_F(1) + t[i])
        smaller = t[i] * larger
        p[i] = valid[i] * (larger if u[i] > _F(0) else smaller)
        q[i] = valid[i] * (smaller if u[i] > _F(0) else larger)


@loop
def _write_entropies(u: Row, y: Row, n: int, terms: Terms, space: tuple[Row, ...]) -> None:
    """Write the cross-entropies in place of t and the difference of logits: of the class, and of the others."""
    outside, inside, p, q, _, _, valid, _ = space
    gamma, kept, share = _F(terms.gamma), _F(1 - terms.smoothing), _F(terms.smoothing / 2)
    for i in range(n):
        tail, soft = log1p(inside[i]), kept * y[i] + share
        of_p, of_q = tail + max(-u[i], _F(0)), tail + max(u[i], _F(0))  # -ln p, -ln q
        inside[i] = valid[i] * soft * of_p
        outside[i] = valid[i] * (_F(1) - soft) * of_q
        if gamma != _F(0):
            inside[i] *= power(q[i], -of_q, gamma)
            outside[i] *= power(p[i], -of_p, gamma)


@loop
def _add_entropy_slope(
    slope: Row, u: Row, y: Row, n: int, inside: Row, outside: Row, terms: Terms, space: tuple[Row, ...]
) -> None:
    """Add the cross-entropies' part, `inside` and `outside` being d loss / d them."""
    _, t, p, q, _, _, _, _ = space
    gamma, kept, share = _F(terms.gamma), _F(1 - terms.smoothing), _F(terms.smoothing / 2)
    if gamma == _F(0):
        for i in range(n):
            soft = kept * y[i] + share
            slope[i] += outside[i] * (_F(1) - soft) * p[i] - inside[i] * soft * q[i]
        return
    for i in range(n):
        tail, soft = log1p(t[i]), kept * y[i] + share
        of_p, of_q = tail + max(-u[i], _F(0)), tail + max(u[i], _F(0))
        slope[i] -= inside[i] * soft * power(q[i], -of_q, gamma) * (gamma * p[i] * of_p + q[i])
        slope[i] += outside[i] * (_F(1) - soft) * power(p[i], -of_p, gamma) * (p[i] + gamma * q[i] * of_q)


@loop
def _write_slope(
    u: Row,
    y: Row,
    n: int,
    two: bool,
    terms: Terms,
    pulls: Any,
    regions: Any,
    space: tuple[Row, ...],
    spare: tuple[Row, Row, Row],
    out: Row,
) -> None:
    """Write d loss / d u of a row, whatever the terms."""
    _, _, p, q, _, y_other, _, slope = space
    if terms.region:
        set_slope(slope, p, y, n, terms, pulls[0], regions, spare)
        if two:
            set_slope(out, q, y_other, n, terms, pulls[1], regions, spare)
            for i in range(n):
                slope[i] -= out[i]
        for i in range(n):
            out[i] = slope[i] * p[i] * q[i]
    else:
        for i in range(n):
            out[i] = _F(0)
    if terms.entropy:
        inside, outside, _ = spare
        read_pulls(pulls[0, 3], regions, n, inside)
        read_pulls(pulls[1, 3], regions, n, outside)
        _add_entropy_slope(out, u, y, n, inside, outside, terms, space)


@loop
def _space(voxels: int) -> tuple[Row, Row, Row, Row, Row, Row, Row, Row]:
    rows = np.empty((_TEMPORARIES, min(WIDTH, voxels) + PADDING), np.float32)
    rows[6] = _F(1)  # every voxel counts, unless some are ignored
    return rows[0], rows[1], rows[2], rows[3], rows[4], rows[5], rows[6], rows[7]


@loop
def add_line(
    x: Any, other: Any, target: Any, number: int, mark: int, mask: Any, two: bool, terms: Terms, groups: Any, rows: Any
) -> bool:
    """Add the statistics of some voxels to `rows`, (2, R, 7) float64: of the class and of the other one, by region.

    Args:
        x: logits of the class, (n,) float32.
        other: of the other class; anything of that type if there is none.
        target: labels or maps, (n,) float32.
        number: of the class in labels; -1 for maps.
        mark: the label of ignored voxels; 0 if none is marked.
        mask: (n,) bool, False at ignored voxels; empty if none is.
        two: whether the classes are those of a softmax.
        terms: what to sum.
        groups: (n,) int32, the region of each voxel; empty if there is but one.
        rows: where to; the cross-entropy of the voxels outside a sigmoid's class is [1, :, 3], and [0, :, 6] the number
            of targets that are not from 0 to 1.

    Returns:
        Whether these formulas hold: all logits are numbers and not extreme. If not, `rows` mean nothing.
    """
    space = _space(x.shape[0])
    _, _, p, q, _, y_other, valid, _ = space
    for start in range(0, x.shape[0], WIDTH):
        n = min(WIDTH, x.shape[0] - start)
        sources = (x[start:], other[start:], target[start:])
        u, y, ignores = _read(*sources, number, mark, mask[start:], two, n, space)
        if not size(u, n) < LARGEST:
            return False
        _probabilities(u, n, space)
        if terms.entropy:
            _write_entropies(u, y, n, terms, space)
        done = 0
        while done < n:
            regions = groups[start + done :]
            m, region = run_length(regions, n - done), region_of(regions)
            row = rows[0, region]
            row[5] += total(valid[done:], m) if ignores else m
            add_region(row, p[done:], y[done:], m, terms)
            row[6] += not_shares(y[done:], m)
            if two:
                add_region(rows[1, region], q[done:], y_other[done:], m, terms)
            if terms.entropy:
                row[3] += total(space[1][done:], m)
                rows[1, region, 3] += total(space[0][done:], m)
            done += m
    return True


@loop
def write_line(
    x: Any,
    other: Any,
    target: Any,
    number: int,
    mark: int,
    mask: Any,
    two: bool,
    terms: Terms,
    groups: Any,
    pulls: Any,
    out: Any,
    out_other: Any,
) -> None:
    """Write d loss / d logits of some voxels of which :func:`add_line`, which has the same arguments, was True.

    `pulls` is d loss / d statistics, (2, 7, R) float32, that of the voxels outside a sigmoid's class being [1, 3];
    `out` and `out_other`, (n,) float32, take the gradients of the class and of the other one of two.
    """
    space = _space(x.shape[0])
    rows = np.empty((3, min(WIDTH, x.shape[0]) + PADDING), np.float32)
    spare = (rows[0], rows[1], rows[2])
    for start in range(0, x.shape[0], WIDTH):
        n = min(WIDTH, x.shape[0] - start)
        sources, place, place_other = (x[start:], other[start:], target[start:]), out[start:], out_other[start:]
        u, y, _ = _read(*sources, number, mark, mask[start:], two, n, space)
        _probabilities(u, n, space)
        _write_slope(u, y, n, two, terms, pulls, groups[start:], space, spare, place)
        if two:
            for i in range(n):
                place_other[i] = -place[i]
