"""The loops of `numba_lines.py` for what most losses ask for: I, P and T, and the cross-entropy.

All numbers of a voxel stay in registers, and p is kept for the backward pass, where the gradient will stand: it takes
neither an exponential nor the logits. It is kept as -p where the target is above 1/2, so that a target of zeros and
ones is not read a second time either. No voxel is ignored. The derivative is that of `numba_lines.py` with

.. code-block:: text

    a = g_I y + g_P - (g'_I (1 - y) + g'_P)      of the class, and of the other one of two
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
    log1p,
    loop,
    products,
    select_class,
    summing_loop,
)
from monai_iou.voxels.numba_regions import LEAST_MEAN, set_slope, signed

_F = np.float32


@loop
def is_usual(terms: Terms, two: bool) -> bool:
    """Return whether these loops sum what is asked for; two classes have no probabilities of their own to square."""
    return not (terms.confidence or terms.gamma > 0 or (two and (terms.smaller or terms.squares)))


@summing_loop
def _sums(u: Row, y: Row, kept: Row) -> tuple[Any, ...]:
    """Write p as it is kept, see :func:`signed`.

    Returns:
        I, P, T, the size of u, how many targets are not from 0 to 1, and 0 only if all others are 0 or 1.
    """
    both, whole, of_y, found, wrong, soft = _F(0), _F(0), _F(0), _F(0), _F(0), _F(0)
    for i in range(u.shape[0]):
        t = exp(-abs(u[i]))
        larger = _F(1) / (_F(1) + t)
        p = larger if u[i] > _F(0) else t * larger
        kept[i] = signed(p, y[i])
        both += p * y[i]
        whole += p
        of_y += y[i]
        found += abs(u[i])
        gap = y[i] * (_F(1) - y[i])  # 0 at 0 and 1, positive between them, else below 0 or NaN
        wrong += _F(0) if gap >= _F(0) else _F(1)
        soft += abs(gap)
    return both, whole, of_y, found, wrong, soft


@summing_loop
def _sums_of_two(u: Row, y: Row, kept: Row) -> tuple[Any, ...]:
    """Write p as it is kept; return I and P of the class, I and P of the other one, T and the size of u."""
    both, whole, both_other, rest, of_y, found = _F(0), _F(0), _F(0), _F(0), _F(0), _F(0)
    for i in range(u.shape[0]):
        t = exp(-abs(u[i]))
        larger = _F(1) / (_F(1) + t)
        p = larger if u[i] > _F(0) else t * larger
        q = t * larger if u[i] > _F(0) else larger
        kept[i] = signed(p, y[i])
        both += p * y[i]
        whole += p
        both_other += q * (_F(1) - y[i])
        rest += q
        of_y += y[i]
        found += abs(u[i])
    return both, whole, both_other, rest, of_y, found


@summing_loop
def _minima(kept: Row, y: Row) -> Any:
    """Return the sum of the smaller ones of p and y."""
    found = _F(0)
    for i in range(y.shape[0]):
        found += min(abs(kept[i]), y[i])
    return found


@summing_loop
def _entropies(u: Row, y: Row, smoothing: float) -> tuple[Any, Any]:
    """Return the cross-entropies of the voxels of the class, and of the others."""
    kept, share = _F(1 - smoothing), _F(smoothing / 2)
    inside, outside = _F(0), _F(0)
    for i in range(u.shape[0]):
        tail, soft = log1p(exp(-abs(u[i]))), kept * y[i] + share
        inside += soft * (tail + max(-u[i], _F(0)))
        outside += (_F(1) - soft) * (tail + max(u[i], _F(0)))
    return inside, outside


@loop
def add_usual(
    x: Any, other: Any, target: Any, number: int, two: bool, terms: Terms, keeps: bool, kept: Any, rows: Any
) -> int:
    """Add the statistics of some voxels to `rows`, (2, 7) float64, as :func:`numba_lines.add_line` does.

    If it `keeps` them, the probabilities are written to `kept`, (n,) float32; if not, that may be any such array.

    Returns:
        0 if these formulas do not hold: a logit is not a number, or extreme. 2 if p has been kept and serves the
        gradient, 3 if, in addition, the signs of p are the targets, else 1.
    """
    spare = np.empty((3, min(WIDTH, x.shape[0]) + PADDING), np.float32)
    rest_of_all, soft_targets = 0.0, _F(0)
    for start in range(0, x.shape[0], WIDTH):
        stop = min(start + WIDTH, x.shape[0])
        u, y, labels = x[start:stop], target[start:stop], target[start:stop]
        p = kept[start:stop] if keeps else spare[2][: stop - start]
        if number >= 0:
            y = spare[1][: stop - start]
            select_class(labels, _F(number), stop - start, y)
        if two:
            u, first, second, none = spare[0][: stop - start], x[start:stop], other[start:stop], _F(0)
            for i in range(u.shape[0]):
                u[i] = first[i] - second[i]
                none += _F(1) if labels[i] == _F(0) else _F(0)
            rows[1, 2] += none
            both, whole, both_other, rest, of_y, found = _sums_of_two(u, y, p)
            rest_of_all += rest
            if terms.region:
                rows[1, 0] += both_other
                rows[1, 1] += rest
        else:
            both, whole, of_y, found, wrong, soft = _sums(u, y, p)
            rows[0, 6] += wrong
            soft_targets += soft
            if terms.smaller:
                both = _minima(p, y)
            if terms.squares:
                whole, of_y = products(p, p, stop - start), products(y, y, stop - start)
        if not found < LARGEST:
            return 0
        if terms.region:
            rows[0, 0] += both
            rows[0, 1] += whole
        rows[0, 2] += of_y
        rows[0, 5] += stop - start
        if terms.entropy:
            inside, outside = _entropies(u, y, terms.smoothing)
            rows[0, 3] += inside
            rows[1, 3] += outside
    if not keeps or (two and rest_of_all < LEAST_MEAN * x.shape[0]):
        return 1
    return 3 if soft_targets == _F(0) else 2


@loop
def _write(p: Row, y: Row, pulls: tuple[Any, ...], entropies: tuple[Any, ...]) -> None:
    """Turn p into the gradient; `pulls` are g_I, g_P, g'_I and g'_P, `entropies` those of :func:`_entropies`."""
    of_i, of_p, of_other, of_q = pulls
    inside, outside, kept, share = entropies
    for i in range(p.shape[0]):
        q, soft = _F(1) - p[i], kept * y[i] + share
        entropy = outside * (_F(1) - soft) * p[i] - inside * soft * q
        slope = (of_i * y[i] + of_p) - (of_other * (_F(1) - y[i]) + of_q)
        p[i] = p[i] * q * slope + entropy


@loop
def _write_signed(kept: Row, pulls: tuple[Any, ...], entropies: tuple[Any, ...]) -> None:
    """Turn p, whose signs are the targets, into the gradient; see :func:`_write`."""
    of_i, of_p, of_other, of_q = pulls
    inside, outside, most, share = entropies
    in_class, elsewhere = (of_i + of_p) - of_q, of_p - (of_other + of_q)
    lift, lower = outside * (_F(1) - (most + share)), inside * (most + share)
    lift_elsewhere, lower_elsewhere = outside * (_F(1) - share), inside * share
    for i in range(kept.shape[0]):
        p, is_class = abs(kept[i]), kept[i] < _F(0)
        q = _F(1) - p
        slope = in_class if is_class else elsewhere
        entropy = (lift if is_class else lift_elsewhere) * p - (lower if is_class else lower_elsewhere) * q
        kept[i] = p * q * slope + entropy


@loop
def _write_from_slopes(p: Row, y: Row, slopes: Row, entropies: tuple[Any, ...]) -> None:
    """Turn p into the gradient, given the slopes of the region."""
    inside, outside, kept, share = entropies
    for i in range(p.shape[0]):
        q, soft = _F(1) - p[i], kept * y[i] + share
        entropy = outside * (_F(1) - soft) * p[i] - inside * soft * q
        p[i] = p[i] * q * slopes[i] + entropy


@loop
def write_usual(target: Any, signs: bool, two: bool, terms: Terms, pulls: Any, out: Any, out_other: Any) -> None:
    """Turn p of :func:`add_usual` into d loss / d logits, in place.

    `out` holds p and `out_other` takes the gradient of the other class of two. If the `signs` of p are the targets,
    `target` is not read; otherwise it holds those of the class. All else is as for :func:`numba_lines.write_line`.
    """
    # What was not summed has no slope, whatever stands in `pulls`.
    of_i, of_p, of_other, of_q, inside, outside = _F(0), _F(0), _F(0), _F(0), _F(0), _F(0)
    if terms.region:
        of_i, of_p = pulls[0, 0, 0], pulls[0, 1, 0]
    if terms.region and two:
        of_other, of_q = pulls[1, 0, 0], pulls[1, 1, 0]
    if terms.entropy:
        inside, outside = pulls[0, 3, 0], pulls[1, 3, 0]
    of_region = (of_i, of_p, of_other, of_q)
    entropies = (inside, outside, _F(1 - terms.smoothing), _F(terms.smoothing / 2))
    by_slopes = terms.region and (terms.smaller or terms.squares)
    rows = np.empty((5, min(WIDTH, out.shape[0]) + PADDING), np.float32)
    # To unpack `rows` itself would give rows of any stride, which have no vectors.
    spare, slopes, more, regions = rows[0], rows[1], (rows[2], rows[3], rows[4]), np.empty(0, np.int32)
    for start in range(0, out.shape[0], WIDTH):
        stop = min(start + WIDTH, out.shape[0])
        place, y = out[start:stop], target[start:stop]
        if signs and not by_slopes:
            _write_signed(place, of_region, entropies)
        else:
            if signs:
                y = spare[: stop - start]
                for i in range(place.shape[0]):
                    y[i] = _F(1) if place[i] < _F(0) else _F(0)
            for i in range(place.shape[0]):
                place[i] = abs(place[i])
            if by_slopes:
                set_slope(slopes, place, y, stop - start, terms, pulls[0], regions, more)
                _write_from_slopes(place, y, slopes, entropies)
            else:
                _write(place, y, of_region, entropies)
        if two:
            second = out_other[start:stop]
            for i in range(place.shape[0]):
                second[i] = -place[i]
