r"""One and two classes on a CPU: a voxel is one number, and a tile a few lines of them.

A softmax of two classes is the sigmoid of the difference of their logits. With one line of numbers u, instead of one
for each class, everything that a pass sums follows from

.. code-block:: text

    u = x_1 - x_0 (softmax of two classes) or x (one channel),   p = 1 / (1 + exp(-u)),   q = 1 - p
    P_0 = N - P_1,  I_0 = N - P_1 - T_1 + I_1,  T_0 = N - T_1     of two classes with labels
    m = min(p, q) = sigmoid(-|u|),  s = [u > 0],  p = |s - m|,  q = |1 - s - m|
    t = -ln max(p, q) = -ln(1 - m)
    -ln p = t + max(-u, 0),  -ln q = t + max(u, 0)
    -ln (p if y else q) = t + u (s - y)                           of a hard y: 0 or |u| is added

so that the smaller of p and q keeps its digits. Differences of sums stand only where they are large; a background that
is small in a tile (:data:`SMALLEST_SHARE`) is summed by itself. Numbers that are not finite take the general formulas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from monai_iou.voxels.formulas import tile_maps
from monai_iou.voxels.inputs import Tile
from monai_iou.voxels.scratch import Lines, sum_of, sum_of_products, sum_of_squares
from monai_iou.voxels.spec import (
    BACKGROUND_ENTROPY,
    CONFIDENCE,
    COUNT,
    CROSS_ENTROPY,
    INTERSECTION,
    PREDICTION,
    ROWS,
    TARGET,
    PassSpec,
)
from monai_iou.voxels.tiling import one_thread

SIZE = 1 << 17  # voxels of a tile: few calls count for more than the cache of a core
SIZE_OF_ONE = 2 * SIZE  # of one class without a cross-entropy, which needs a single temporary
SIZE_WITH_ENTROPY = SIZE + SIZE // 2  # of one class: torch splits a logarithm of a quarter of it, but not of less
SIZE_OF_FOCAL = SIZE // 2  # with twice the temporaries
SMALLEST_MEAN = 1 / 1024  # of the background's probability: a smaller 1 - p has lost three digits where p is kept
SMALLEST_SHARE = 1 / 16  # of a tile's voxels: of a smaller background a difference would lose more than a digit

Term = tuple[Tensor, Tensor | None]  # what is summed (n,), a temporary, and what it is multiplied by
Terms = list[Term]
Rows = list[list[float]]  # statistics of a tile: ROWS lists of one number for each class


def tile_size(spec: PassSpec, classes: int) -> int:
    """Return the voxels of a tile at most, the same for any number of threads, so that the sums are."""
    if spec.focal:
        return SIZE_OF_FOCAL
    return SIZE if classes == 2 else SIZE_WITH_ENTROPY if spec.cross_entropy else SIZE_OF_ONE


@dataclass(frozen=True)
class Line:
    """The voxels of a tile, (n,) each.

    Attributes:
        u: logits of the one class, against the other if there are two.
        y: its targets.
        valid: 1 and 0, or None if every voxel counts.
    """

    u: Tensor
    y: Tensor
    valid: Tensor | None

    def others(self, out: Tensor) -> Tensor:
        """Return the targets of the other class, 0 at ignored voxels."""
        return torch.sub(1, self.y, out=out) if self.valid is None else torch.sub(self.valid, self.y, out=out)


def read_line(tile: Tile, lines: Lines, *, with_logits: bool = True) -> Line:
    """Return a tile as a line, as it is in the tile where that is possible; without logits if nobody asks for them."""
    logits, labels, valid = tile.logits, tile.labels, None
    if labels is not None and is_whole(tile):
        y = lines["y"].copy_(labels[0])
    elif labels is None and tile.valid is None:
        assert tile.maps is not None
        y = _plain_row(tile.maps[0], lines, "y")
    else:
        logits, target, valid = tile.read(tile.classes.dtype)
        y, valid = target[-1], None if valid is None else valid[0]
    return Line(_margin(logits, lines) if with_logits else logits[0], y, valid)


def _margin(logits: Tensor, lines: Lines) -> Tensor:
    if logits.shape[0] == 1:
        return _plain_row(logits[0], lines, "u")
    u = lines["u"]
    wide = logits if logits.dtype == u.dtype else logits.to(u.dtype)
    return torch.sub(wide[1], wide[0], out=u)


def _plain_row(row: Tensor, lines: Lines, name: str) -> Tensor:
    return row if row.dtype == lines.dtype and row.stride(0) == 1 else lines[name].copy_(row)


def is_whole(tile: Tile) -> bool:
    """Return whether the labels are whole numbers that all count."""
    return tile.labels is not None and not tile.labels.is_floating_point() and not tile.has_ignored


def takes(line: Line, spec: PassSpec, classes: int) -> bool:
    """Return whether these formulas hold for the numbers.

    A sigmoid alone has the right limits; but infinite logits have no difference, and no product with 0.
    """
    return (classes == 1 and not spec.cross_entropy) or math.isfinite(line.u.sum().item())


def add_tile(tile: Tile, spec: PassSpec, p: Tensor, lines: Lines) -> tuple[Rows, bool]:
    """Return the statistics of a tile, and whether `p` holds its probabilities as the gradient needs them."""
    line, classes = read_line(tile, lines), tile.logits.shape[0]
    if not (spec.cross_entropy or takes(line, spec, classes)):
        return _general_sums(tile, spec), False
    entropies: tuple[Terms, Terms] = ([], [])
    if spec.cross_entropy:
        entropies = _entropies(line, spec, p, lines, two=classes == 2)
    else:
        torch.sigmoid(line.u, out=p)
    if line.valid is not None:
        p.mul_(line.valid)
    smaller = None
    if spec.overlap == "min_max" and classes == 1:  # of a hard label the smaller of p and y is their product
        smaller = torch.minimum(p, line.y, out=lines["smaller"])
    with one_thread():  # at once for all sums: torch takes its time to change the number
        outside, inside = (sum(_summed(term) for term in terms) for terms in reversed(entropies))
        if not math.isfinite(inside + outside):  # as :func:`takes` would have said, at no reading of its own
            return _general_sums(tile, spec), False
        rows = [[0.0] * classes for _ in range(ROWS)]
        if classes == 2:
            rows[CROSS_ENTROPY] = [outside, inside]
        else:
            rows[CROSS_ENTROPY], rows[BACKGROUND_ENTROPY] = [inside], [outside]
        rows[COUNT] = [float(lines.length) if line.valid is None else sum_of(line.valid)] * classes
        rows[TARGET] = _volumes(tile, line, spec, lines)
        background = 0.0 if spec.overlap is None else _add_region(rows, line, spec, p, smaller, lines)
    enough = classes == 1 or spec.overlap is None or background >= SMALLEST_MEAN * rows[COUNT][0]
    return rows, enough


def _summed(term: Term) -> float:
    values, factors = term
    return sum_of(values) if factors is None else sum_of_products(values, factors, out=values)


def _general_sums(tile: Tile, spec: PassSpec) -> Rows:
    """Return the statistics of a tile by the general formulas."""
    logits, target, valid = tile.read(tile.classes.dtype)
    rows = [[0.0] * logits.shape[0] for _ in range(ROWS)]
    with one_thread():
        for row, values in tile_maps(logits, target, valid, None, spec):
            rows[row] = values.sum(-1).tolist()
    rows[COUNT] = [logits.shape[1] if valid is None else valid.sum().item()] * logits.shape[0]
    return rows


def _volumes(tile: Tile, line: Line, spec: PassSpec, lines: Lines) -> list[float]:
    """Return T of the classes. Voxels whose labels are not classes are missing in both."""
    y = line.y
    if tile.labels is None:
        return [sum_of_products(y, y, out=lines["a"]) if spec.power == 2 else sum_of(y)]
    if is_whole(tile):  # y^2 - y is 0 of the labels 0 and 1, and at least 2 of other whole numbers
        return [lines.length - sum_of_squares(y), sum_of(y)]
    return [sum_of(torch.eq(tile.labels[0], 0, out=lines["a"])), sum_of(y)]


def _add_region(rows: Rows, line: Line, spec: PassSpec, p: Tensor, smaller: Tensor | None, lines: Lines) -> float:
    """Write I, P and Q of the class, and of the background if there are two; return the sum of 1 - p, 0 if not."""
    two, squares = len(rows[COUNT]) == 2, spec.power == 2 or spec.confidence
    both = sum_of_products(p, line.y, out=lines["a"]) if smaller is None else sum_of(smaller)
    whole, square = sum_of(p), sum_of_products(p, p, out=lines["a"]) if squares else 0.0
    _write_region(rows, -1, both, whole, square, spec)
    if not two:
        return 0.0
    both, whole = both + rows[COUNT][0] - whole - rows[TARGET][1], rows[COUNT][0] - whole
    if squares or both < SMALLEST_SHARE * rows[COUNT][0]:
        q = torch.sigmoid(torch.neg(line.u, out=lines["b"]), out=lines["b"])
        if line.valid is not None:
            q.mul_(line.valid)
        others = line.others(lines["a"])
        both, whole = sum_of_products(q, others, out=others), sum_of(q)
        square = sum_of_products(q, q, out=q) if squares else 0.0
    _write_region(rows, 0, both, whole, square, spec)
    return whole


def _write_region(rows: Rows, index: int, both: float, whole: float, square: float, spec: PassSpec) -> None:
    rows[INTERSECTION][index] = both
    rows[PREDICTION][index] = square if spec.power == 2 else whole
    rows[CONFIDENCE][index] = square if spec.confidence else 0.0


def smaller_probability(u: Tensor, out: Tensor) -> Tensor:
    """Write m, the smaller of p and 1 - p."""
    return torch.sigmoid(torch.abs(u, out=out).neg_(), out=out)


def _entropies(line: Line, spec: PassSpec, p: Tensor, lines: Lines, *, two: bool) -> tuple[Terms, Terms]:
    """Write p, and return the terms of the cross-entropy of the class and of the others.

    One channel whose two parts nobody asks for apart has both in the first.
    """
    m, step = smaller_probability(line.u, lines["a"]), torch.gt(line.u, 0, out=lines["b"])
    torch.sub(step, m, out=p).abs_()
    if spec.focal or spec.label_smoothing or (spec.split and not two):
        q = torch.sub(1, step, out=step).sub_(m).abs_()
        inside, outside = _parted_entropies(line, spec, p, q, torch.log1p(m.neg_(), out=m).neg_(), lines)
        return ([inside], [outside]) if two or spec.split else ([inside, outside], [])
    wrong = step.sub_(line.y)
    if line.valid is not None:
        wrong.mul_(line.valid)
        m.mul_(line.valid)
    if not two:
        return [(wrong, line.u), *_log_complements(m)], []
    tail = torch.log1p(m.neg_(), out=m)
    loss = torch.addcmul(tail.neg_(), line.u, wrong, out=tail)
    return [(loss, line.y)], [(line.others(wrong), loss)]  # the latter is summed first, the former overwrites the loss


def _log_complements(m: Tensor) -> Terms:
    """Return terms of the sum of -ln(1 - m), m at most 1/2; `m` is overwritten.

    A logarithm costs more than all the rest. As ln(1 - a) + ln(1 - b) = ln(1 - (a + b - a b)), one serves four voxels,
    whose product is at least 1/16, so that no digits are lost.
    """
    terms: Terms = []
    for _ in range(2):
        half = m.shape[0] // 2
        a, b, odd = m[:half], m[half : 2 * half], m[2 * half :]
        if odd.shape[0]:
            terms.append((odd.neg().log1p_().neg_(), None))
        m = b.addcmul_(a, b, value=-1).add_(a)
    return [*terms, (torch.log1p(m.neg_(), out=m).neg_(), None)]


def smoothed(y: Tensor, spec: PassSpec, out: Tensor) -> Tensor:
    """Return y' of the cross-entropy; of two classes and of a sigmoid half the smoothing is a class's share."""
    share = spec.label_smoothing
    return torch.mul(y, 1 - share, out=out).add_(share / 2)


def multiply_power(values: Tensor, base: Tensor, exponent: float) -> Tensor:
    """Multiply `values` by base^exponent, in place."""
    if exponent == 2:
        return values.mul_(base).mul_(base)
    return values.mul_(base if exponent == 1 else base.pow(exponent)) if exponent else values


def _parted_entropies(
    line: Line, spec: PassSpec, p: Tensor, q: Tensor, tail: Tensor, lines: Lines
) -> tuple[Term, Term]:
    """Return the terms -y' q^gamma ln p and -(1 - y') p^gamma ln q; `q` and `tail` are overwritten."""
    smooth = smoothed(line.y, spec, lines["smooth"]) if spec.label_smoothing else line.y
    inside = torch.sub(tail, torch.clamp_max(line.u, 0, out=lines["c"]), out=lines["c"])
    multiply_power(inside, q, spec.focal)
    outside = multiply_power(torch.clamp_min(line.u, 0, out=q).add_(tail), p, spec.focal)
    if line.valid is not None:
        inside.mul_(line.valid)
        outside.mul_(line.valid)
    return (inside, smooth), (outside, torch.sub(1, smooth, out=tail))
