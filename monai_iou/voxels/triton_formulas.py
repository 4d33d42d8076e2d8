"""The formulas of the Triton kernel for a block of classes and voxels, as `triton_programs.py` derives them.

Logarithms and powers keep NaN, and the digits of voxels that are nearly certain.
"""

# Triton reads the bodies of its kernels by rules of its own; their arguments have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def power(value, exponent: tl.constexpr):
    """Return value^exponent of a value of at least 0."""
    if exponent == 0:
        result = value * 0 + 1
    elif exponent == 1:
        result = value
    elif exponent == 2:
        result = value * value
    else:
        result = tl.where(value > 0, tl.exp(exponent * tl.log(tl.maximum(value, 1e-30))), 0.0)
        result = tl.where(value != value, value, result)  # a maximum drops NaN
    return result


@triton.jit
def times_log(weight, log):
    """Return weight * log, 0 where the weight is 0 and the logarithm -inf; NaN stays."""
    return tl.where((weight == 0) & (log == -float("inf")), 0.0, weight * log)


@triton.jit
def focal_factor(log, FOCAL: tl.constexpr):
    """Return exp(FOCAL * log), NaN where `log` is."""
    result = tl.exp(FOCAL * log)
    if FOCAL == 0:  # 0 * -inf
        result = tl.where(log == log, 1.0, log)
    return result


@triton.jit
def log1p(t):
    """Return ln(1 + t) with the digits of a small t."""
    # 1 + t in float32 rounds a small t away. Below 1/4: 2 artanh(t / (2 + t)), whose next term is 3e-9 of the first.
    z = t / (2.0 + t)
    square = z * z
    series = 2.0 * z * (1.0 + square * (1.0 / 3 + square * (1.0 / 5 + square * (1.0 / 7))))
    return tl.where(t < 0.25, series, tl.log(1.0 + t))


@triton.jit
def probability(x, real, peak, rest, ACTIVATION: tl.constexpr, ENTROPY: tl.constexpr):
    """Return p, 1 - p, ln p and ln(1 - p), each with its digits; logarithms nobody asks for are zeros."""
    log_p = x * 0
    log_q = log_p
    if ACTIVATION == 0:
        shifted = tl.where(real[:, None], x - peak[None, :], 0.0)
        p = tl.exp(shifted) / (1.0 + rest)[None, :]
        q = tl.where(shifted >= 0, (rest / (1.0 + rest))[None, :], 1.0 - p)
        if ENTROPY:
            log_p = shifted - log1p(rest)[None, :]
    elif ACTIVATION == 1:
        tail = log1p(tl.exp(-tl.abs(x)))
        log_p = tl.minimum(x, 0.0) - tail
        log_q = tl.minimum(-x, 0.0) - tail
        p = tl.exp(log_p)
        q = tl.exp(log_q)
    else:
        p = x
        q = 1.0 - x
        if ENTROPY:
            log_p = tl.where(x == x, tl.log(tl.maximum(x, 1e-30)), x)
    return p, q, log_p, log_q


@triton.jit
def pulls_of(
    gradient, classes, C, OVERLAP: tl.constexpr, ENTROPY: tl.constexpr, CONFIDENT: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    """Return d loss / d (I, P, E, Q, entropy of the background) of a block of classes; zeros where nobody asks."""
    real = classes < C
    none = tl.zeros_like(classes).to(tl.float32)
    of_overlap, of_size, of_entropy, of_confidence, of_background = none, none, none, none, none
    if OVERLAP != 2:
        of_overlap = tl.load(gradient + classes, mask=real, other=0.0)
        of_size = tl.load(gradient + C + classes, mask=real, other=0.0)
        if CONFIDENT:
            of_confidence = tl.load(gradient + 4 * C + classes, mask=real, other=0.0)
    if ENTROPY:
        of_entropy = tl.load(gradient + 3 * C + classes, mask=real, other=0.0)
        if SPLIT:
            of_background = tl.load(gradient + 6 * C + classes, mask=real, other=0.0)
    return of_overlap, of_size, of_entropy, of_confidence, of_background


@triton.jit
def slope_of(
    x, target, peak, rest, real, of_overlap, of_size, of_entropy, of_confidence, of_background,
    ACTIVATION: tl.constexpr, OVERLAP: tl.constexpr, POWER: tl.constexpr, ENTROPY: tl.constexpr,
    FOCAL: tl.constexpr, KEEP: tl.constexpr, SHARE: tl.constexpr, CONFIDENT: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Return p and h of the derivation, given what :func:`pulls_of` returns."""
    p, q, log_p, log_q = probability(x, real, peak, rest, ACTIVATION, ENTROPY)
    slope = p * 0
    if OVERLAP != 2:
        region = target
        if OVERLAP == 1:
            region = tl.where(p < target, 1.0, 0.0) + tl.where(p == target, 0.5, 0.0)
        slope = region * of_overlap[:, None] + POWER * power(p, POWER - 1) * of_size[:, None]
        if CONFIDENT:
            slope += (POWER + 1) * power(p, POWER) * of_confidence[:, None]
        if ACTIVATION == 0:
            slope *= p
        if ACTIVATION == 1:
            slope *= p * q
    if ENTROPY:
        soft = KEEP * target + SHARE
        finite_p = tl.maximum(log_p, -3e38)  # 0 times ln 0 is 0
        finite_q = tl.maximum(log_q, -3e38)
        if ACTIVATION == 1:
            entropy = soft * focal_factor(log_q, FOCAL) * (FOCAL * p * finite_p - q)
            others = (1.0 - soft) * focal_factor(log_p, FOCAL) * (p - FOCAL * q * finite_q)
            if SPLIT:
                slope += others * of_background[:, None]
            else:
                entropy += others
        else:
            entropy = -soft
            if FOCAL != 0:
                q = tl.maximum(q, 1e-30)
                entropy = soft * (FOCAL * p * finite_p - q) * power(q, FOCAL - 1)
            if ACTIVATION == 2:
                entropy = tl.where(p > 1e-30, entropy / tl.maximum(p, 1e-30), 0.0)
        slope += entropy * of_entropy[:, None]
    return p, tl.where(real[:, None], slope, 0.0)
