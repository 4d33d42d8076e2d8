"""Loops over the voxels of a softmax of any number of classes.

With d_c = x_c - max x, and R the sum of exp(d_c) but for one largest class,

.. code-block:: text

    p_c = exp(d_c) / (1 + R),   -ln p_c = ln(1 + R) - d_c,   1 - p_c = R / (1 + R) of the largest

so that -ln p and 1 - p keep their digits where one class is nearly certain. With h_c of `formulas.py`, the derivative
by the logit but for the coupling of classes,

.. code-block:: text

    h_c = p_c a_c + g_E y'_c (1 - p_c)^(gamma - 1) (gamma p_c ln p_c - (1 - p_c)),   d loss / d x_c = h_c - p_c sum of h
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
from monai_iou.voxels.numba_regions import add_total, read_pulls, region_of, run_length, set_slope

_F = np.float32
_ELEMENTS = 1 << 14  # of the probabilities of a row: 64 KiB
_NARROWEST = 128
_TINY = np.float32(1e-30)  # as 1 - p is held in `formulas.py`, where a power of it is negative
# Rows that all classes share: 1 / (1 + R), R, ties, ln(1 + R), max x, valid, target, slope, a sum over the classes.
_TEMPORARIES = 9


@loop
def _space(classes: int) -> tuple[Row, Row, Row, Row, Row, Row, Row, Row, Row]:
    width = max(_NARROWEST, min(WIDTH, _ELEMENTS // classes))
    rows = np.empty((_TEMPORARIES, width + PADDING), np.float32)
    return rows[0], rows[1], rows[2], rows[3], rows[4], rows[5], rows[6], rows[7], rows[8]


@loop
def _read(
    x: Any, stride: int, target: Any, mark: int, mask: Any, n: int, p: Any, terms: Terms, space: tuple[Row, ...]
) -> Any:
    """Write the probabilities of the classes to `p` (C, n), 0 at ignored voxels, and what they share to `space`.

    Return the size of the logits.
    """
    share, rest, ties, tail, peak, valid, _, _, _ = space
    for i in range(n):
        peak[i] = x[i]
        rest[i], ties[i], valid[i] = _F(0), _F(-1), _F(1)
    found = _F(0)
    for c in range(p.shape[0]):
        row = x[c * stride :]
        found += size(row, n)
        for i in range(n):
            peak[i] = max(peak[i], row[i])
    for c in range(p.shape[0]):
        row, own = x[c * stride :], p[c]
        for i in range(n):
            own[i] = exp(row[i] - peak[i])
            rest[i] += own[i] if row[i] < peak[i] else _F(0)
            ties[i] += _F(0) if row[i] < peak[i] else _F(1)
    for i in range(n):
        rest[i] += ties[i]
        share[i] = _F(1) / (_F(1) + rest[i])
    if terms.entropy:
        for i in range(n):
            tail[i] = log1p(rest[i])
    if mark != 0 or mask.shape[0] > 0:
        read_valid(target, mark, mask, n, valid)
        for i in range(n):
            share[i] *= valid[i]
    for c in range(p.shape[0]):
        own = p[c]
        for i in range(n):
            own[i] *= share[i]
    return found


@loop
def _read_target(target: Any, map_stride: int, number: int, c: int, n: int, space: tuple[Row, ...]) -> None:
    """Write the targets of a class."""
    _, _, _, _, _, valid, y, _, _ = space
    if number >= 0:
        select_class(target, _F(c), n, y)
    else:
        read_maps(target[c * map_stride :], valid, n, y)


@loop
def _log(value: Any) -> Any:
    """Return ln of a value from TINY to 1."""
    return -log1p((_F(1) - value) / value)


@loop
def _negative_log(tail: Any, peak: Any, logit: Any) -> Any:
    """Return -ln p, a sum of two numbers of which none is negative."""
    return tail + (peak - logit)


@loop
def _write_entropy(row: Any, p: Any, classes: int, n: int, terms: Terms, space: tuple[Row, ...]) -> None:
    """Write the cross-entropy of a class where its slope will stand."""
    share, rest, _, tail, peak, valid, y, entropy, _ = space
    gamma, kept, spread = _F(terms.gamma), _F(1 - terms.smoothing), _F(terms.smoothing / classes)
    for i in range(n):
        entropy[i] = (kept * y[i] + spread * valid[i]) * _negative_log(tail[i], peak[i], row[i])
    if gamma != _F(0):
        for i in range(n):
            q = max(rest[i] * share[i] if row[i] >= peak[i] else _F(1) - p[i], _TINY)
            entropy[i] *= power(q, _log(q), gamma)


@loop
def _add_entropy_slope(
    row: Any, p: Any, classes: int, pulls: Row, n: int, terms: Terms, space: tuple[Row, ...]
) -> None:
    share, rest, _, tail, peak, valid, y, slope, _ = space
    gamma, kept, spread = _F(terms.gamma), _F(1 - terms.smoothing), _F(terms.smoothing / classes)
    if gamma == _F(0):
        for i in range(n):
            slope[i] -= pulls[i] * (kept * y[i] + spread * valid[i])
        return
    for i in range(n):
        q = max(rest[i] * share[i] if row[i] >= peak[i] else _F(1) - p[i], _TINY)
        of_p = _negative_log(tail[i], peak[i], row[i])
        soft = pulls[i] * (kept * y[i] + spread * valid[i])
        slope[i] -= soft * (gamma * p[i] * of_p + q) * power(q, _log(q), gamma - _F(1))


@loop
def _set_zero(row: Row, n: int) -> None:
    for i in range(n):
        row[i] = _F(0)


@loop
def add_classes(
    x: Any,
    stride: int,
    classes: int,
    target: Any,
    map_stride: int,
    number: int,
    mark: int,
    mask: Any,
    count: int,
    terms: Terms,
    groups: Any,
    group_stride: int,
    rows: Any,
) -> bool:
    """Add the statistics of some voxels to `rows`, (C, R, 7) float64.

    Args:
        x: logits, those of class c from c * stride on, float32.
        stride: between classes.
        classes: C.
        target: labels or maps, float32.
        map_stride: between classes of the maps.
        number: 0 for labels; -1 for maps.
        mark: the label of ignored voxels; 0 if none is marked.
        mask: (n,) bool, False at ignored voxels; empty if none is.
        count: n, the voxels.
        terms: what to sum.
        groups: int32, the region of each voxel, those of class c from c * group_stride on; empty if there is but one.
        group_stride: between classes, 0 if all share their regions. If not, the cross-entropy of a region is that of
            all classes.
        rows: where to; [c, :, 6] is the number of targets that are not from 0 to 1.

    Returns:
        Whether these formulas hold: all logits are numbers and not extreme. If not, `rows` mean nothing.
    """
    space = _space(classes)
    _, _, _, _, _, valid, y, entropy, whole = space
    width = valid.shape[0] - PADDING
    p = np.empty((classes, width + PADDING), np.float32)
    for start in range(0, count, width):
        n = min(width, count - start)
        found = _read(x[start:], stride, target[start:], mark, mask[start:], n, p, terms, space)
        if not found < LARGEST:
            return False
        counted = total(valid, n)
        _set_zero(whole, n)
        for c in range(classes):
            own = p[c]
            _read_target(target[start:], map_stride, number, c, n, space)
            regions, done = groups[start + c * group_stride :], 0
            while done < n:
                m = run_length(regions[done:], n - done)
                row = rows[c, region_of(regions[done:])]
                add_region(row, own[done:], y[done:], m, terms)
                if number < 0:
                    row[6] += not_shares(y[done:], m)
                row[5] += counted if m == n else total(valid[done:], m)
                done += m
            if terms.entropy:
                _write_entropy(x[start + c * stride :], own, classes, n, terms, space)
                if group_stride == 0:
                    add_total(rows[c], entropy, regions, n)
                else:
                    for i in range(n):
                        whole[i] += entropy[i]
        if terms.entropy and group_stride != 0:
            for c in range(classes):
                add_total(rows[c], whole, groups[start + c * group_stride :], n)
    return True


@loop
def write_classes(
    x: Any,
    stride: int,
    classes: int,
    target: Any,
    map_stride: int,
    number: int,
    mark: int,
    mask: Any,
    count: int,
    terms: Terms,
    groups: Any,
    group_stride: int,
    pulls: Any,
    out: Any,
    out_stride: int,
) -> None:
    """Write d loss / d logits of some voxels of which :func:`add_classes`, which has the same arguments, was True.

    `pulls` is d loss / d statistics, (C, 7, R) float32; `out`, float32, takes the gradient of class c from
    c * out_stride on.
    """
    space = _space(classes)
    _, _, _, _, _, _, y, slope, whole = space
    rows = np.empty((4, y.shape[0]), np.float32)
    of_entropy, spare = rows[3], (rows[0], rows[1], rows[2])
    width = y.shape[0] - PADDING
    p = np.empty((classes, width + PADDING), np.float32)
    for start in range(0, count, width):
        n = min(width, count - start)
        _read(x[start:], stride, target[start:], mark, mask[start:], n, p, terms, space)
        _set_zero(whole, n)
        if terms.entropy and group_stride != 0:
            _set_zero(of_entropy, n)
            for c in range(classes):
                read_pulls(pulls[c, 3], groups[start + c * group_stride :], n, slope)
                for i in range(n):
                    of_entropy[i] += slope[i]
        for c in range(classes):
            own, place, regions = p[c], out[start + c * out_stride :], groups[start + c * group_stride :]
            _read_target(target[start:], map_stride, number, c, n, space)
            if terms.region:
                set_slope(slope, own, y, n, terms, pulls[c], regions, spare)
                for i in range(n):
                    slope[i] *= own[i]
            else:
                _set_zero(slope, n)
            if terms.entropy:
                if group_stride == 0:
                    read_pulls(pulls[c, 3], regions, n, of_entropy)
                _add_entropy_slope(x[start + c * stride :], own, classes, of_entropy, n, terms, space)
            for i in range(n):
                whole[i] += slope[i]
                place[i] = slope[i]
        for c in range(classes):
            own, place = p[c], out[start + c * out_stride :]
            for i in range(n):
                place[i] -= own[i] * whole[i]
