"""The gradient of the sums of `binary.py`.

With g = d loss / d statistics, and a slope by the probability p of the class that is linear in its target y and in p,

.. code-block:: text

    a = c + b y + d p           of both classes' I, P and Q, as P_0 = sum of 1 - p and I_0 = sum of (1 - y)(1 - p)
    dL/du = p q a + g_E y' q^gamma (gamma p ln p - q) + g_B (1 - y') p^gamma (p - gamma q ln q)
    dL/dx_1 = dL/du,  dL/dx_0 = -dL/du

g_B being that of the entropy of the other class, or of the part of the voxels outside the class.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from monai_iou.voxels.binary import Line, Rows, multiply_power, read_line, smaller_probability, smoothed, takes
from monai_iou.voxels.formulas import tile_gradient
from monai_iou.voxels.inputs import Tile
from monai_iou.voxels.scratch import Lines
from monai_iou.voxels.spec import (
    BACKGROUND_ENTROPY,
    CONFIDENCE,
    CROSS_ENTROPY,
    INTERSECTION,
    PREDICTION,
    PassSpec,
)

# A share below which little is left of a sum: of a class in no voxel, the slope of the intersection, 1 / smoothing,
# must cancel.
CANCELS = 1 / 16


def write_gradient(
    place: Tensor, gradient: Rows, tile: Tile, spec: PassSpec, p: Tensor | None, lines: Lines, *, by_smaller: bool
) -> None:
    """Write d loss / d logits of a tile into `place` (C, n).

    Args:
        place: where the gradient belongs; it may hold `p` in its last row.
        gradient: d loss / d statistics.
        tile: the voxels.
        spec: as in forward.
        p: the probabilities (n,), if they have been kept.
        lines: temporaries.
        by_smaller: whether to take p (1 - p) from the smaller of the two, as :func:`binary.add_tile` said.
    """
    line, two = read_line(tile, lines, with_logits=p is None or spec.focal > 0), place.shape[0] == 2
    if p is None and not takes(line, spec, place.shape[0]):
        logits, target, valid = tile.read(tile.classes.dtype)
        pull = torch.tensor(gradient, dtype=logits.dtype, device="cpu").unsqueeze(-1)
        place.copy_(tile_gradient(logits, target, valid, pull, spec))
        return
    if two:  # the first row takes the slope of the background
        gradient = [[-value for value in row] for row in gradient]
    if p is None and spec.cross_entropy:  # as in forward, to the last bit
        step, m = torch.gt(line.u, 0, out=lines["p"]), smaller_probability(line.u, lines["a"])
        p = step.sub_(m).abs_()
    elif p is None:
        p = torch.sigmoid(line.u, out=lines["p"])
    factor = smaller_probability(line.u, lines["m"]) if by_smaller else p
    first, *second = place.unbind()
    slope = first if first.dtype == p.dtype and first.stride(0) == 1 else lines["slope"]
    entropy = _entropy_slope(line, p, gradient, spec, lines) if spec.cross_entropy else None
    if spec.overlap is not None:
        region = _region_slope(line, p, gradient, spec, lines["a"])
        torch.ops.aten.sigmoid_backward.grad_input(region, factor, grad_input=slope)
        if entropy is not None:
            slope.add_(entropy[0], alpha=entropy[1])
    elif entropy is not None:
        torch.mul(*entropy, out=slope)
    if line.valid is not None:
        slope.mul_(line.valid)
    if slope is not first:
        first.copy_(slope)
    for other in second:
        torch.neg(first, out=other)


def _region_slope(line: Line, p: Tensor, gradient: Rows, spec: PassSpec, out: Tensor) -> Tensor:
    """Return a."""
    two = len(gradient[PREDICTION]) == 2
    of_class, of_voxel = gradient[INTERSECTION][-1], gradient[PREDICTION][-1]
    constant, linear = (of_voxel, 0.0) if spec.power == 1 else (0.0, 2 * of_voxel)
    linear += 2 * gradient[CONFIDENCE][-1] if spec.confidence else 0.0
    if two:
        of_other, of_voxel = gradient[INTERSECTION][0], gradient[PREDICTION][0]
        square = (2 * of_voxel if spec.power == 2 else 0.0) + (2 * gradient[CONFIDENCE][0] if spec.confidence else 0.0)
        constant -= of_other + square + (of_voxel if spec.power == 1 else 0.0)
        linear += square
        of_class += of_other
    if spec.overlap == "min_max" and not two:  # [p < y], half of it at a tie
        torch.sub(line.y, p, out=out).sign_()
        torch.sub(_scalar(constant + of_class / 2, p.dtype), out, alpha=-of_class / 2, out=out)
    elif abs(constant + of_class) < CANCELS * abs(constant):  # slower, and exact at a label of 0 or 1
        torch.lerp(_scalar(constant, p.dtype), _scalar(constant + of_class, p.dtype), line.y, out=out)
    else:
        torch.sub(_scalar(constant, p.dtype), line.y, alpha=-of_class, out=out)
    return out.add_(p, alpha=linear) if linear else out


@functools.lru_cache(maxsize=16)
def _scalar(value: float, dtype: torch.dtype) -> Tensor:
    """Return a number that all tiles of an image share."""
    return torch.tensor(value, dtype=dtype, device="cpu")


def _entropy_slope(line: Line, p: Tensor, gradient: Rows, spec: PassSpec, lines: Lines) -> tuple[Tensor, float]:
    """Return the cross-entropy's part of dL/du but for a factor, and the factor."""
    of_class = gradient[CROSS_ENTROPY][-1]
    apart = spec.split and len(gradient[CROSS_ENTROPY]) == 1
    of_others = gradient[BACKGROUND_ENTROPY if apart else CROSS_ENTROPY][0]
    y = smoothed(line.y, spec, lines["smooth"]) if spec.label_smoothing else line.y
    if spec.focal:
        return _focal_slope(line, p, y, (of_class, of_others), spec.focal, lines), 1.0
    if of_class == of_others:
        return torch.sub(p, y, out=lines["b"]), of_class
    slope = torch.mul(p, of_class - of_others, out=lines["b"]).sub_(of_class).mul_(y)  # g_B p (1 - y) - g_E q y
    return slope.add_(p, alpha=of_others), 1.0


def _focal_slope(line: Line, p: Tensor, y: Tensor, gradient: tuple[float, float], gamma: float, lines: Lines) -> Tensor:
    tail = torch.log1p(smaller_probability(line.u, lines["c"]).neg_(), out=lines["c"])  # ln max(p, q)
    q = torch.sigmoid(torch.neg(line.u, out=lines["q"]), out=lines["q"])
    inside = torch.clamp_max(line.u, 0, out=lines["b"]).add_(tail)  # ln p
    multiply_power(inside.mul_(p).mul_(gamma).sub_(q), q, gamma).mul_(y).mul_(gradient[0])
    outside = torch.clamp_min(line.u, 0, out=lines["a"]).sub_(tail)  # -ln q
    multiply_power(outside.mul_(q).mul_(gamma).add_(p), p, gamma)
    return inside.add_(outside.addcmul_(outside, y, value=-1), alpha=gradient[1])
