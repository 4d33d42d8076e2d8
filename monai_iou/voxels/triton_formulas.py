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
    # 1 + t in float32 rounds a small t away. Up to 1/4: 2 artanh(t / (2 + t)), whose next term is 2e-8 of the first.
    z = t / (2.0 + t)
    square = z * z
    series = 2.0 * z * (1.0 + square * (1.0 / 3 + square * (1.0 / 5 + square * (1.0 / 7))))
    return tl.where(tl.abs(t) < 0.25, series, tl.log(1.0 + t))


@triton.jit
def below(x, real, peak):
    """Return x - peak of each class, -inf beyond the last. It is written once, so that its exp is computed once."""
    return tl.where(real[:, None], x, -float("inf")) - peak[None, :]


@triton.jit
def probability(x, real, peak, rest, ACTIVATION: tl.constexpr, ENTROPY: tl.constexpr):
    """Return p, 1 - p, ln p and ln(1 - p), each with its digits; logarithms nobody asks for are zeros.

    `ACTIVATION` is 0 for softmax, 1 for sigmoid, 2 for probabilities, and 4 for those of one channel with a
    cross-entropy, which is binary as that of a sigmoid.
    """
    log_p = x * 0
    log_q = log_p
    if ACTIVATION == 0:
        inverse = 1.0 / (1.0 + rest)  # one division for all classes
        shifted = below(x, real, peak)
        p = tl.exp(shifted) * inverse[None, :]
        q = tl.where(shifted >= 0, (rest * inverse)[None, :], 1.0 - p)
        if ENTROPY:
            log_p = tl.where(real[:, None], shifted, 0.0) - log1p(rest)[None, :]
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
        if ACTIVATION == 4:
            log_q = tl.where(q <= 1e-30, -69.07755278982137, log1p(tl.where(q <= 1e-30, 0.0, -x)))  # ln 1e-30
    return p, q, log_p, log_q


@triton.jit
def smoothed(target, log_p, ACTIVATION: tl.constexpr, KEEP: tl.constexpr, SHARE: tl.constexpr):
    """Return y'; 0 of a class that a logit of -inf excludes from a softmax, and that the voxel does not have."""
    soft = KEEP * target + SHARE
    if ACTIVATION == 0 and SHARE != 0:
        soft = tl.where((target == 0) & (log_p == -float("inf")), 0.0, soft)
    return soft


@triton.jit
def values_of(
    x, target, share, real, peak, rest,
    ACTIVATION: tl.constexpr, OVERLAP: tl.constexpr, POWER: tl.constexpr, ENTROPY: tl.constexpr,
    FOCAL: tl.constexpr, KEEP: tl.constexpr, SHARE: tl.constexpr, CONFIDENT: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Return what each voxel adds to the seven rows of `spec.py`, in their order; zeros where nobody asks.

    `share`, 1 or 0, broadcasts against the logits `x` (CLASSES, VOXELS); targets are 0 where it is.
    """
    p, q, log_p, log_q = probability(x, real, peak, rest, ACTIVATION, ENTROPY)
    kept = p * share
    none = tl.zeros_like(kept)
    both, size, entropy, confidence, background = none, none, none, none, none
    if OVERLAP != 2:
        both = kept * target
        if OVERLAP == 1:
            both = tl.minimum(kept, target)
        size = power(kept, POWER)
    if ENTROPY:
        soft = smoothed(target, log_p, ACTIVATION, KEEP, SHARE)
        if ACTIVATION == 1 or ACTIVATION == 4:
            entropy = -times_log(soft, log_p * focal_factor(log_q, FOCAL))
            others = -times_log(1.0 - soft, log_q * focal_factor(log_p, FOCAL))
            if SPLIT:
                background = others * share
            else:
                entropy += others
        else:
            entropy = -times_log(soft, log_p * power(tl.maximum(q, 1e-30), FOCAL))
        entropy *= share
    if CONFIDENT:
        confidence = kept * power(kept, POWER)
    volume = power(target, POWER)
    return both, size, volume, entropy, confidence, volume * 0 + share, background


@triton.jit
def pulls_of(
    gradient, classes, C, OVERLAP: tl.constexpr, ENTROPY: tl.constexpr, CONFIDENT: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    """Return :func:`pulls_at` of a block of classes without regions, (CLASSES, 1) each."""
    overlap, size, entropy, confidence, background = pulls_at(
        gradient, classes, classes < C, C, OVERLAP, ENTROPY, CONFIDENT, SPLIT
    )  # in one dimension: (CLASSES, 1) would be loaded once for each voxel of a thread
    return overlap[:, None], size[:, None], entropy[:, None], confidence[:, None], background[:, None]


@triton.jit
def pulls_at(
    gradient, places, real, of_row,
    OVERLAP: tl.constexpr, ENTROPY: tl.constexpr, CONFIDENT: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    """Return d loss / d (I, P, E, Q, entropy of the background) at `places` of a row; zeros where nobody asks.

    `of_row` is the distance between rows; what is returned has the shape of `places`.
    """
    none = tl.zeros_like(places).to(tl.float32)
    of_overlap, of_size, of_entropy, of_confidence, of_background = none, none, none, none, none
    if OVERLAP != 2:
        of_overlap = tl.load(gradient + places, mask=real, other=0.0)
        of_size = tl.load(gradient + of_row + places, mask=real, other=0.0)
        if CONFIDENT:
            of_confidence = tl.load(gradient + 4 * of_row + places, mask=real, other=0.0)
    if ENTROPY:
        of_entropy = tl.load(gradient + 3 * of_row + places, mask=real, other=0.0)
        if SPLIT:
            of_background = tl.load(gradient + 6 * of_row + places, mask=real, other=0.0)
    return of_overlap, of_size, of_entropy, of_confidence, of_background


@triton.jit
def slope_of(
    x, target, peak, rest, real, of_overlap, of_size, of_entropy, of_confidence, of_background,
    ACTIVATION: tl.constexpr, OVERLAP: tl.constexpr, POWER: tl.constexpr, ENTROPY: tl.constexpr,
    FOCAL: tl.constexpr, KEEP: tl.constexpr, SHARE: tl.constexpr, CONFIDENT: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Return p and h of the derivation, given what :func:`pulls_of` or, voxel by voxel, :func:`pulls_at` returns."""
    p, q, log_p, log_q = probability(x, real, peak, rest, ACTIVATION, ENTROPY)
    slope = p * 0
    if OVERLAP != 2:
        region = target
        if OVERLAP == 1:
            region = tl.where(p < target, 1.0, 0.0) + tl.where(p == target, 0.5, 0.0)
        slope = region * of_overlap + POWER * power(p, POWER - 1) * of_size
        if CONFIDENT:
            slope += (POWER + 1) * power(p, POWER) * of_confidence
        if ACTIVATION == 0:
            slope *= p
        if ACTIVATION == 1:
            slope *= p * q
    if ENTROPY:
        soft = smoothed(target, log_p, ACTIVATION, KEEP, SHARE)
        finite_p = tl.maximum(log_p, -3e38)  # 0 times ln 0 is 0
        finite_q = tl.maximum(log_q, -3e38)
        if ACTIVATION == 1 or ACTIVATION == 4:
            if ACTIVATION == 1:
                inside = FOCAL * p * finite_p - q
                outside = p - FOCAL * q * finite_q
            else:
                of_p = tl.where(p <= 1e-30, 0.0, 1.0 / tl.maximum(p, 1e-30))
                of_q = tl.where(q <= 1e-30, 0.0, 1.0 / tl.maximum(q, 1e-30))
                inside = FOCAL * log_p * of_q - of_p
                outside = of_q - FOCAL * log_q * of_p
            entropy = soft * focal_factor(log_q, FOCAL) * inside
            others = (1.0 - soft) * focal_factor(log_p, FOCAL) * outside
            if SPLIT:
                slope += others * of_background
            else:
                entropy += others
        else:
            entropy = -soft
            if FOCAL != 0:
                q = tl.maximum(q, 1e-30)
                entropy = soft * (FOCAL * p * finite_p - q) * power(q, FOCAL - 1)
            if ACTIVATION == 2:
                entropy = tl.where(p > 1e-30, entropy / tl.maximum(p, 1e-30), 0.0)
        slope += entropy * of_entropy
    return p, tl.where(real[:, None], slope, 0.0)
