"""The specification of the voxel pass: what it sums, and the derivative of it, in plain torch.

For one image, with logits :math:`x_{cv}` of class c at voxel v, and the label :math:`y_{cv}` (one-hot or soft):

.. code-block:: text

    p   = softmax_c(x), sigmoid(x) or x          probabilities
    I_c = sum_v p_cv y_cv                         intersection ("product"), or
          sum_v min(p_cv, y_cv)                   ("min_max", exact for soft labels)
    P_c = sum_v p_cv^q,  T_c = sum_v y_cv^q       prediction and target, q = power
    U_c = P_c + T_c - I_c                         union; for "min_max" it is sum_v max(p, y)
    E_c = sum_v y'_cv (1 - p_cv)^gamma (-ln p_cv) cross-entropy, y' = (1 - s) y + s / C, focal if gamma > 0;
          with sigmoid, and for probabilities of one channel, the binary form, y' = (1 - s) y + s / 2,
          plus the same of 1 - y' and 1 - p, in a row of its own if asked for
    Q_c = sum_v p_cv^(q+1),  N = sum_v 1          confidence and voxel count

Ignored voxels are excluded from every sum. U never cancels: I <= (P + T) / 2 for q from 1 to 2, so U >= (P + T) / 2.

Given g = d loss / d (I, P, E, Q), one voxel's derivative needs its own logits and label only. With

.. code-block:: text

    a_c = g_I dI/dp + g_P q p^(q-1) + g_Q (q+1) p^q     dI/dp = y ("product"), [p < y] ("min_max", half at a tie)
    softmax:  h_c = p_c a_c + g_E y'_c (gamma p (1-p)^(gamma-1) ln p - (1-p)^gamma)
              d loss / dx_c = h_c - p_c sum_k h_k
    sigmoid:  d loss / dx_c = p (1-p) a_c
              + g_E [  y'   (gamma p (1-p)^gamma ln p         - (1-p)^(gamma+1))
                     + (1-y') (p^(gamma+1) - gamma (1-p) p^gamma ln(1-p)) ]
    p of one channel: the same divided by p (1-p)

so a kernel may forget the probabilities after the sums and compute them again in backward.

:func:`statistics` (forward) is used by the reference kernel, through autograd, and by the tiled and compiled kernels;
:func:`class_slopes` is the derivative above, used by those two and tested against the reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from monai_iou.voxels.activations import TINY, Probabilities, is_binary, probabilities
from monai_iou.voxels.inputs import surely_finite
from monai_iou.voxels.spec import (
    BACKGROUND_ENTROPY,
    CONFIDENCE,
    CROSS_ENTROPY,
    INTERSECTION,
    PREDICTION,
    TARGET,
    PassSpec,
)

Sums = TypeVar("Sums", Tensor, NDArray[Any], float)

_LOWEST = -3e38  # stands for ln 0 = -inf, whose product with 0 would be NaN


def union(intersection: Sums, prediction: Sums, target: Sums) -> Sums:
    """Return U = P + T - I. No digits cancel, because I is at most (P + T) / 2 (for powers from 1 to 2)."""
    joined: Sums = prediction + target - intersection
    return joined


def _smoothed(target: Tensor, p: Probabilities, spec: PassSpec) -> Tensor:
    """Return y'. A softmax class that a logit of -inf excludes, and that is not the label, gets no share."""
    if spec.label_smoothing == 0:
        return target
    binary = is_binary(spec, p.classes)
    smoothed = target * (1 - spec.label_smoothing) + spec.label_smoothing / (2 if binary else p.classes)
    assert p.logarithm is not None
    if binary or surely_finite(p.logarithm):
        return smoothed
    return torch.where((target == 0) & (p.logarithm == -torch.inf), 0, smoothed)


def _power(value: Tensor, exponent: float) -> Tensor:
    if exponent == 1:
        return value
    if not float(exponent).is_integer():
        value = value.clamp_min(0)  # rounding gives probabilities such as -1e-8, which have no such power; NaN stays
    return value * value if exponent == 2 else value.pow(exponent)


def _counted_log(weight: Tensor, logarithm: Tensor) -> Tensor:
    """Return the logarithm with 0 in place of -inf where its weight is 0: their product would be NaN. NaN stays."""
    if surely_finite(logarithm):
        return logarithm
    return torch.where((weight == 0) & (logarithm == -torch.inf), 0, logarithm)


def _cross_entropy(p: Probabilities, target: Tensor, spec: PassSpec) -> tuple[Tensor, Tensor | None]:
    """Return the cross-entropy of the voxels of the class and, if it is binary, of the others."""
    log_p, log_q = p.logarithm, p.complement_logarithm
    assert log_p is not None
    target = _smoothed(target, p, spec)
    own = _counted_log(target, log_p)
    if log_q is not None:
        other = _counted_log(1 - target, log_q)
        if spec.focal:
            own, other = own * (spec.focal * log_q).exp(), other * (spec.focal * log_p).exp()
        return -target * own, (target - 1) * other
    if spec.focal:
        own = own * _power((-own.expm1()).clamp_min(TINY), spec.focal)
    return -target * own, None


def statistics(p: Probabilities, target: Tensor, valid: Tensor | None, spec: PassSpec) -> Iterator[tuple[int, Tensor]]:
    """Yield (row, map) pairs whose sums over voxels are the statistics; rows not asked for are left out.

    Args:
        p: probabilities of any shape, of all classes or of one.
        target: the same shape and dtype.
        valid: 1 and 0, broadcasting against `p`, or None if every voxel counts; the others have target 0.
        spec: what to compute.
    """
    value = p.value if valid is None else p.value * valid
    if spec.overlap is not None:
        yield INTERSECTION, torch.minimum(value, target) if spec.overlap == "min_max" else value * target
        yield PREDICTION, _power(value, spec.power)
    yield TARGET, _power(target, spec.power)
    if spec.cross_entropy:
        inside, outside = _cross_entropy(p, target, spec)
        if outside is not None and not spec.split:
            inside = inside + outside
        yield CROSS_ENTROPY, inside if valid is None else inside * valid
        if outside is not None and spec.split:
            yield BACKGROUND_ENTROPY, outside if valid is None else outside * valid
    if spec.confidence:
        yield CONFIDENCE, value * _power(value, spec.power)


def tile_maps(
    logits: Tensor, target: Tensor, valid: Tensor | None, groups: Tensor | None, spec: PassSpec
) -> Iterator[tuple[int, Tensor]]:
    """Yield the :func:`statistics` of a tile (:meth:`Voxels.tile`), as `groups` have them summed."""
    for row, values in statistics(probabilities(logits, spec), target, valid, spec):
        yield row, values.sum(-2, keepdim=True) if row == CROSS_ENTROPY and sums_entropy(groups, spec) else values


def reduce_map(values: Tensor, groups: Tensor | None, regions: int, dtype: torch.dtype) -> Tensor:
    """Sum (..., C, N) over voxels, a region of `groups` (..., 1 or C, N) at a time: (..., C, R)."""
    if groups is None:
        return values.sum(-1, keepdim=True, dtype=dtype)
    shape = (*values.shape[:-2], max(values.shape[-2], groups.shape[-2]), values.shape[-1])
    out = torch.zeros((*shape[:-1], regions), dtype=dtype, device=values.device)
    return out.scatter_add(-1, groups.long().expand(shape), values.to(dtype).expand(shape))


def sums_entropy(groups: Tensor | None, spec: PassSpec) -> bool:
    """Return whether E of a region is that of all classes: classes that exclude each other, each with its regions."""
    return groups is not None and groups.shape[-2] > 1 and spec.activation != "sigmoid"


def count_valid(like: Tensor, valid: Tensor | None, groups: Tensor | None, regions: int, dtype: torch.dtype) -> Tensor:
    """Count the voxels that are not ignored, (..., C, R), the same for every class."""
    if valid is None and groups is None:
        return torch.full((*like.shape[:-1], 1), like.shape[-1], dtype=dtype, device=like.device)
    ones = torch.ones_like(like[..., :1, :]) if valid is None else valid
    return reduce_map(ones, groups, regions, dtype).expand(*like.shape[:-1], regions)


def _region_slope(p: Tensor, target: Tensor, gradient: Tensor, spec: PassSpec) -> Tensor:
    """Return a_c of the derivation, the derivative by the probability."""
    if spec.overlap is None:
        return torch.zeros_like(p)
    if spec.overlap == "min_max":
        target = (p < target).to(p.dtype).add_((p == target).to(p.dtype), alpha=0.5)
    slope = torch.addcmul(gradient[PREDICTION] if spec.power == 1 else 0 * p, target, gradient[INTERSECTION])
    if spec.power != 1:
        slope.addcmul_(gradient[PREDICTION], _power(p, spec.power - 1), value=spec.power)
    if spec.confidence:
        slope.addcmul_(gradient[CONFIDENCE], _power(p, spec.power), value=spec.power + 1)
    return slope


def _binary_slopes(p: Probabilities, target: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Return dE/dx of a sigmoid's two parts, of the voxels of the class and of the others."""
    assert p.logarithm is not None
    assert p.complement_logarithm is not None
    log_p, log_q = (log.clamp_min(_LOWEST) for log in (p.logarithm, p.complement_logarithm))
    q = log_q.exp()
    if gamma == 0:
        return -target * q, (1 - target) * p.value
    inside = target * (gamma * log_q).exp_() * (gamma * p.value * log_p - q)
    return inside, (1 - target) * (gamma * log_p).exp_() * (p.value - gamma * q * log_q)


def _probability_slopes(p: Probabilities, target: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Return dE/dp of the two parts for probabilities of one channel; 0 where a logarithm is held at its least."""
    log_p, log_q = p.logarithm, p.complement_logarithm
    assert log_p is not None
    assert log_q is not None
    of_p, of_q = (torch.where(x <= TINY, 0, 1 / x.clamp_min(TINY)) for x in (p.value, 1 - p.value))
    inside = target * (gamma * log_q).exp_() * (gamma * log_p * of_q - of_p)
    return inside, (1 - target) * (gamma * log_p).exp_() * (of_q - gamma * log_q * of_p)


def _entropy_slope(p: Probabilities, target: Tensor, gradient: Tensor, spec: PassSpec) -> Tensor:
    """Return g_E times dE/dx before the softmax's coupling (softmax), dE/dx (sigmoid) or dE/dp (probabilities)."""
    target, gamma = _smoothed(target, p, spec), spec.focal
    value, log_p, of_class = p.value, p.logarithm, gradient[CROSS_ENTROPY]
    assert log_p is not None
    if p.complement_logarithm is not None:
        logits = spec.activation == "sigmoid"
        if logits and gamma == 0 and not spec.split:
            return (value - target) * of_class
        inside, outside = (_binary_slopes if logits else _probability_slopes)(p, target, gamma)
        return inside * of_class + outside * gradient[BACKGROUND_ENTROPY if spec.split else CROSS_ENTROPY]
    if gamma == 0:
        slope = -target
    else:
        q = (-log_p.expm1()).clamp_min_(TINY)
        slope = target * (gamma * value * log_p.clamp_min(_LOWEST) - q) * _power(q, gamma - 1)
    if spec.activation is None:
        slope = torch.where(value <= TINY, 0, slope / value.clamp_min(TINY))
    return slope * of_class


def class_slopes(p: Probabilities, target: Tensor, gradient: Tensor, spec: PassSpec) -> Tensor:
    """Return h of the derivation, the derivative by the logit but for the softmax's coupling of classes.

    Args:
        p: probabilities of any shape, of all classes or of one.
        target: the same shape and dtype.
        gradient: d loss / d statistics, seven rows that broadcast against `p`.
        spec: as in forward.
    """
    slope = _region_slope(p.value, target, gradient, spec)
    if spec.activation == "softmax":
        slope.mul_(p.value)
    elif spec.activation == "sigmoid":
        slope.mul_(torch.addcmul(p.value, p.value, p.value, value=-1))
    if spec.cross_entropy:
        slope.add_(_entropy_slope(p, target, gradient, spec))
    return slope


def tile_gradient(logits: Tensor, target: Tensor, valid: Tensor | None, gradient: Tensor, spec: PassSpec) -> Tensor:
    """Return d loss / d logits (C, N) of a tile (:meth:`Voxels.tile`).

    `gradient` is d loss / d statistics, (7, C, 1), or (7, C, N) with regions.
    """
    p = probabilities(logits, spec)
    slope = class_slopes(p, target, gradient, spec)
    if spec.activation == "softmax":
        slope.addcmul_(p.value, slope.sum(-2, keepdim=True), value=-1)
    return slope if valid is None else slope.mul_(valid)
