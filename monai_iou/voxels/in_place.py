"""The passes that most losses ask for, on a tile whose temporaries are allocated once and written over.

A CPU pays for every fresh temporary with page faults, and for every broken formula with a further sweep through its
cache; for softmax and sigmoid, plain overlap and plain cross-entropy neither is needed. The formulas are those of
`formulas.py`, whose other branches `tiled` computes with temporaries of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from monai_iou.voxels.formulas import tile_maps
from monai_iou.voxels.inputs import Tile, Voxels, sum_dtype, total_dtype
from monai_iou.voxels.spec import (
    BACKGROUND_ENTROPY,
    COUNT,
    CROSS_ENTROPY,
    INTERSECTION,
    PREDICTION,
    ROWS,
    TARGET,
    PassSpec,
)
from monai_iou.voxels.tiling import in_runs, run_tasks, tile_size


def covers(voxels: Voxels, spec: PassSpec) -> bool:
    """Return whether this file computes what `spec` asks for."""
    return voxels.groups is None and is_usual(spec)


def is_usual(spec: PassSpec) -> bool:
    """Return whether this file has the formulas of `spec`."""
    return (
        spec.activation is not None
        and spec.overlap in (None, "product")
        and spec.power == 1
        and spec.focal == spec.label_smoothing == 0
        and not spec.confidence
    )


# How many times as large as `tiled`'s tiles: few calls count for more than the cache of a core. Beside a gradient,
# which is as large as the logits, the temporaries of a CPU's two threads are to stay below a tenth of it.
FACTOR = {1: 5, 2: 3}  # by the number of maps
MANY = 2


def sums_factor(spec: PassSpec) -> int:
    """Return the factor of :func:`add_tile`'s tiles."""
    return FACTOR.get(_sums_maps(spec), MANY)


def gradient_factor(logits: Tensor, spec: PassSpec) -> int:
    """Return the factor of :func:`write_gradient`'s tiles."""
    return FACTOR.get(_gradient_maps(logits, spec), MANY)


def _sums_maps(spec: PassSpec) -> int:
    return 3 if spec.cross_entropy else 2


def _gradient_maps(logits: Tensor, spec: PassSpec) -> int:
    # A gradient in the dtype of the sums is itself the first temporary.
    wide = logits.dtype == sum_dtype(logits)
    return 1 + (not wide) + (spec.cross_entropy and (spec.overlap is not None or spec.split))


@dataclass(frozen=True)
class Workspace:
    """Temporaries of one thread: some `maps` (C, n) and two `lines` (1, n)."""

    maps: Tensor
    lines: Tensor

    @classmethod
    def of(cls, logits: Tensor, size: int, maps: int, lines: int) -> Workspace:
        """Allocate for tiles of up to `size` voxels of logits (B, C, N)."""
        dtype = sum_dtype(logits)
        size = min(size, logits.shape[2])
        return cls(
            torch.empty((maps, logits.shape[1], size), dtype=dtype, device=logits.device),
            torch.empty((lines, 1, size), dtype=dtype, device=logits.device),
        )

    @classmethod
    def for_sums(cls, logits: Tensor, spec: PassSpec, size: int) -> Workspace:
        """Allocate what :func:`add_tile` needs."""
        return cls.of(logits, size, _sums_maps(spec), 2)

    @classmethod
    def for_gradient(cls, logits: Tensor, spec: PassSpec, size: int) -> Workspace:
        """Allocate what :func:`write_gradient` needs."""
        return cls.of(logits, size, _gradient_maps(logits, spec), 1)

    def parts(self, voxels: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return maps and lines for a tile of so many voxels."""
        if voxels == self.maps.shape[2]:
            return self.maps.unbind(), self.lines.unbind()
        return self.maps[..., :voxels].unbind(), self.lines[..., :voxels].unbind()


def softmax(logits: Tensor, p: Tensor, line: Tensor) -> None:
    """Write the softmax of logits (C, n) into `p`; `line` (1, n) is written over."""
    torch.amax(logits, 0, keepdim=True, out=line)
    torch.sub(logits, line, out=p)
    torch.sum(p.exp_(), 0, keepdim=True, out=line)
    p.mul_(line.reciprocal_())


def _softmax_entropy(logits: Tensor, target: Tensor, p: Tensor, spare: Tensor, line: Tensor, rest: Tensor) -> Tensor:
    """Write softmax into `p` and return E (C,).

    -ln p_c = ln(1 + rest) - (x_c - peak), rest being the sum of exp(x - peak) but for one class at the peak: both terms
    are positive, and `frac` drops the ones of the classes at the peak without a mask.
    """
    torch.amax(logits, 0, keepdim=True, out=line)
    torch.sub(logits, line, out=p)
    # On a CPU add_tile looks at the result. Elsewhere 0 * -inf is left out; of NaN logits the norm below is NaN.
    add = torch.sum if p.device.type == "cpu" else torch.nansum
    below = add(torch.mul(p, target, out=spare), 1)
    torch.sum(p.exp_(), 0, keepdim=True, out=line)
    torch.sum(torch.frac(p, out=spare), 0, keepdim=True, out=rest)
    at_peak = line.sub(rest).round_()
    rest.add_(at_peak.sub_(1)).log1p_()
    p.mul_(line.reciprocal_())
    return torch.mul(target, rest, out=spare).sum(1) - below


def _sigmoid_entropy(logits: Tensor, target: Tensor, valid: Tensor | None, p: Tensor, spare: Tensor) -> Tensor:
    """Write the sigmoid into `p` and return E (C,) = sum of max(x, 0) - x y + ln(1 + exp(-|x|)).

    The difference comes first: it is exact at hard labels, and what follows is positive.
    """
    logits = _limited(logits)
    torch.clamp_min(logits, 0, out=p)
    torch.mul(logits, target, out=spare)
    p.sub_(spare)
    torch.abs(logits, out=spare)
    p.add_(spare.neg_().exp_().log1p_())
    entropy = (p if valid is None else p.mul_(valid)).sum(1)
    torch.sigmoid(logits, out=p)
    return entropy


def _sigmoid_entropies(
    logits: Tensor, target: Tensor, valid: Tensor | None, p: Tensor, spare: Tensor
) -> tuple[Tensor, Tensor]:
    """Write the sigmoid into `p` and return E (C,) in two parts: sum of -y ln p, and of -(1 - y) ln(1 - p).

    Both logarithms are max(x, 0) + ln(1 + exp(-|x|)), of -x and of x: no difference, whose digits would cancel.
    """
    logits = _limited(logits)
    torch.abs(logits, out=p)
    p.neg_().exp_().log1p_()
    torch.neg(logits, out=spare).clamp_min_(0).add_(p).mul_(target)
    inside = (spare if valid is None else spare.mul_(valid)).sum(1)
    torch.clamp_min(logits, 0, out=spare).add_(p)
    spare.addcmul_(spare, target, value=-1)
    outside = (spare if valid is None else spare.mul_(valid)).sum(1)
    torch.sigmoid(logits, out=p)
    return inside, outside


def _limited(logits: Tensor) -> Tensor:
    """Return finite numbers for infinite ones where :func:`add_tile` cannot look at the result: not on a CPU."""
    if logits.device.type == "cpu":
        return logits
    limits = torch.finfo(logits.dtype)
    return logits.clamp(limits.min, limits.max)


def add_tile(total: tuple[Tensor, ...], tile: Tile, spec: PassSpec, space: Workspace) -> None:
    """Write the statistics of a tile into `total`, six rows (C,)."""
    (own, p, *more), (line, rest) = space.parts(tile.logits.shape[1])
    spare = more[0] if more else p
    logits, target, valid = tile.read(space.maps.dtype, out=own)
    if spec.activation == "sigmoid":
        if spec.split:
            inside, outside = _sigmoid_entropies(logits, target, valid, p, spare)
            total[CROSS_ENTROPY].copy_(inside)
            total[BACKGROUND_ENTROPY].copy_(outside)
        elif spec.cross_entropy:
            total[CROSS_ENTROPY].copy_(_sigmoid_entropy(logits, target, valid, p, spare))
        else:
            torch.sigmoid(logits, out=p)
    elif spec.cross_entropy:
        total[CROSS_ENTROPY].copy_(_softmax_entropy(logits, target, p, spare, line, rest))
    elif spec.overlap is not None:
        softmax(logits, p, line)
    if spec.cross_entropy and p.device.type == "cpu":
        _mend_entropy(total, logits, target, valid, spec)
    torch.sum(target, 1, out=total[TARGET])
    if spec.overlap is not None:
        if valid is not None:
            p.mul_(valid)
        torch.sum(p, 1, out=total[PREDICTION])
        torch.sum(p.mul_(target), 1, out=total[INTERSECTION])
    total[COUNT].fill_(target.shape[1] if valid is None else valid.sum())


def _mend_entropy(
    total: tuple[Tensor, ...], logits: Tensor, target: Tensor, valid: Tensor | None, spec: PassSpec
) -> None:
    """Compute the cross-entropy again where it is not finite: a class that is ruled out by -inf costs nothing."""
    rows = (CROSS_ENTROPY, BACKGROUND_ENTROPY) if spec.split else (CROSS_ENTROPY,)
    if all(math.isfinite(total[row].sum().item()) for row in rows):
        return
    for row, values in tile_maps(logits, target, valid, None, spec):
        if row in rows:
            total[row].copy_(values.sum(-1))


def write_gradient(place: Tensor, gradient: tuple[Tensor, ...], tile: Tile, spec: PassSpec, space: Workspace) -> None:
    """Write d loss / d logits of a tile into `place` (C, n); `gradient` is d loss / d statistics, six rows (C, 1)."""
    (p, *more), (line,) = space.parts(place.shape[1])
    slope = place if place.dtype == p.dtype else more.pop()
    # The slope begins as the target, 1 at the voxels of a class: a + y b is what every derivative here is made of.
    logits, target, valid = tile.read(p.dtype, out=slope)
    if target is not slope:
        slope.copy_(target)
    of_class, of_voxel, of_entropy = (gradient[row] for row in (INTERSECTION, PREDICTION, CROSS_ENTROPY))
    sigmoid = spec.activation == "sigmoid"
    if sigmoid:
        torch.sigmoid(logits, out=p)
    else:
        softmax(logits, p, line)
    entropy = None
    if sigmoid and spec.split:  # p (y (g_E - g_B) + g_B) - y g_E
        of_others = gradient[BACKGROUND_ENTROPY]
        entropy = torch.mul(slope, of_entropy - of_others, out=more[0]).add_(of_others).mul_(p)
        entropy.addcmul_(slope, of_entropy, value=-1)
    if spec.overlap is None and entropy is not None:
        slope.copy_(entropy)
    elif spec.overlap is None:  # sigmoid: (p - y) g_E; softmax: -y g_E
        (slope.sub_(p) if sigmoid else slope).mul_(-of_entropy)
    elif sigmoid:
        if spec.cross_entropy and entropy is None:
            entropy = torch.sub(p, slope, out=more[0]).mul_(of_entropy)
        slope.mul_(of_class).add_(of_voxel).mul_(p).mul_(p.neg_().add_(1))
        if entropy is not None:
            slope.add_(entropy)
    elif spec.cross_entropy:  # p g_P + y (p g_I - g_E)
        slope.mul_(torch.mul(p, of_class, out=more[0]).sub_(of_entropy))
        slope.add_(torch.mul(p, of_voxel, out=more[0]))
    else:
        slope.mul_(of_class).add_(of_voxel).mul_(p)
    if not sigmoid:
        torch.sum(slope, 0, keepdim=True, out=line)
        slope.sub_(p.mul_(line))
    if valid is not None:
        slope.mul_(valid)
    if slope is not place:
        place.copy_(slope)


def sums(voxels: Voxels, spec: PassSpec) -> Tensor:
    """Return the statistics (7, B, C), added up in the same order however many threads there are."""
    logits = voxels.logits
    size = tile_size(logits, sums_factor(spec))
    images = voxels.tiles(size)

    def work(task: list[Tile]) -> Tensor:
        space = Workspace.for_sums(logits, spec, size)
        rows = torch.zeros((len(task), ROWS, logits.shape[1]), dtype=space.maps.dtype, device=logits.device)
        for tile, total in zip(task, rows.unbind(), strict=True):
            add_tile(total.unbind(), tile, spec, space)
        return rows

    tasks = in_runs([tile for tiles in images for tile in tiles])
    empty = torch.zeros((0, ROWS, logits.shape[1]), dtype=sum_dtype(logits), device=logits.device)
    rows = torch.cat([empty, *run_tasks(work, logits, tasks)]).split([len(tiles) for tiles in images])
    return torch.stack([part.sum(0, dtype=total_dtype(logits)) for part in rows], 1)


def write_gradients(out: Tensor, gradient: Tensor, voxels: Voxels, spec: PassSpec) -> None:
    """Write the gradient of :func:`sums` into `out` (B, C, N); `gradient` is d loss / d statistics, (7, B, C, 1)."""
    size = tile_size(out, gradient_factor(out, spec))
    tiles = [
        (tile, place, rows.unbind())
        for image, tiles, rows in zip(out.unbind(), voxels.tiles(size), gradient.unbind(1), strict=True)
        for tile, place in zip(tiles, image.split(size, -1), strict=True)
    ]

    def work(task: list[tuple[Tile, Tensor, tuple[Tensor, ...]]]) -> None:
        space = Workspace.for_gradient(out, spec, size)
        for tile, place, rows in task:
            write_gradient(place, rows, tile, spec, space)

    run_tasks(work, out, in_runs(tiles))
