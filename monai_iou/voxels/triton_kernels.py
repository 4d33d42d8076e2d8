"""The Triton kernel: one read of logits and labels for the sums, one read and one write for the gradient.

A program handles `VOXELS` voxels of one image. It walks over the classes in blocks, first for the softmax's largest
logit and norm (online: one walk), then for the sums; the second walk finds the logits in the cache, or in registers if
one block holds all classes. Of a voxel with logits x_c and label y_c it needs

.. code-block:: text

    peak = max_c x_c,  rest = sum_c exp(x_c - peak) - 1      two blocks (m, r), (n, s) with m >= n join as
                                                             m,  r + (1 + s) exp(n - m)
    p_c = exp(x_c - peak) / (1 + rest),  ln p_c = x_c - peak - ln(1 + rest)
    I += p y,  P += p^q,  T += y^q,  E -= y' (1 - p)^gamma ln p,  Q += p^(q+1),  N += 1
    a_c = g_I y + g_P q p^(q-1) + g_Q (q+1) p^q              given g = d loss / d (I, P, E, Q)
    h_c = p_c a_c + g_E y'_c (gamma p (1-p)^(gamma-1) ln p - (1-p)^gamma)
    d loss / dx_c = h_c - p_c sum_k h_k                      one more walk for the sum, one for the gradient

with "min_max" and sigmoid as `formulas.py` derives them. Each program writes its partial sums to a place of its own and
torch adds them in float64: no atomics, so the same bits on every call. Logits and gradient are addressed by strides, so
channels-last volumes are read where they are, and all offsets are 64 bits wide.
"""

# Triton reads the bodies of its kernels by rules of its own; their arguments have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from monai_iou.voxels import tiled
from monai_iou.voxels.inputs import IGNORED, Voxels
from monai_iou.voxels.single_backward import once_differentiable
from monai_iou.voxels.spec import COUNT, ROWS, TARGET, PassSpec

MAX_CLASSES = 256
MAX_IMAGES = 65535  # of a batch: the limit of a launch grid's second axis
CLASS_BLOCK = 16
TILE = 4096  # elements (classes x voxels) in the registers of a program
_WARPS = 8
_ACTIVATIONS = {"softmax": 0, "sigmoid": 1, None: 2}
_OVERLAPS = {"product": 0, "min_max": 1, None: 2}


def covers(voxels: Voxels) -> bool:
    """Return whether this kernel handles the input; `tiled` does the rest."""
    logits = voxels.logits
    return (
        logits.dtype != torch.float64
        and logits.shape[0] <= MAX_IMAGES
        and logits.shape[1] <= MAX_CLASSES
        and logits.numel() > 0
        and voxels.groups is None
    )


@triton.jit
def _power(value, exponent: tl.constexpr):
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
def _times_log(weight, log):
    """Return weight * log, 0 where the weight is 0 and the logarithm -inf; NaN stays."""
    return tl.where((weight == 0) & (log == -float("inf")), 0.0, weight * log)


@triton.jit
def _focal(log, FOCAL: tl.constexpr):
    """Return exp(FOCAL * log), NaN where `log` is."""
    result = tl.exp(FOCAL * log)
    if FOCAL == 0:  # 0 * -inf
        result = tl.where(log == log, 1.0, log)
    return result


@triton.jit
def _load(pointer, classes, voxels, class_stride, voxel_stride, C, exists, inside, HAS_IGNORED: tl.constexpr):
    # Ignored voxels are read with the others and cleared after: a mask with holes would split the wide loads.
    offsets = classes[:, None].to(tl.int64) * class_stride + voxels[None, :] * voxel_stride
    values = tl.load(pointer + offsets, mask=(classes[:, None] < C) & exists[None, :], other=0.0).to(tl.float32)
    if HAS_IGNORED:
        values = tl.where(inside[None, :], values, 0.0)
    return values


@triton.jit
def _log1p(t):
    # 1 + t in float32 rounds a small t away. Below 1/4: 2 artanh(t / (2 + t)), whose next term is 3e-9 of the first.
    z = t / (2.0 + t)
    square = z * z
    series = 2.0 * z * (1.0 + square * (1.0 / 3 + square * (1.0 / 5 + square * (1.0 / 7))))
    return tl.where(t < 0.25, series, tl.log(1.0 + t))


@triton.jit
def _take_block(peak, rest, part, real):
    """Take a block of classes into the largest logit and `rest`, the others' exp(x - peak) added up.

    The softmax's norm is 1 + rest; it is never formed, because a confident voxel's rest has no digit in it.
    """
    part = tl.where(real[:, None], part, -float("inf"))
    top = tl.max(part, 0)
    is_top = part >= top[None, :]
    ties = tl.sum(is_top.to(tl.float32), 0) - 1.0
    below = tl.sum(tl.where(is_top, 0.0, tl.exp(part - top[None, :])), 0) + ties
    first = peak >= top
    higher_rest = tl.where(first, rest, below)
    lower_rest = tl.where(first, below, rest)
    gap = tl.where(peak == top, 0.0, tl.abs(peak - top))  # both may be -inf
    return tl.maximum(peak, top), higher_rest + (1.0 + lower_rest) * tl.exp(-gap)


@triton.jit
def _softmax_norm(
    part, x, voxels, class_stride, voxel_stride, C, exists, inside,
    HAS_IGNORED: tl.constexpr, CLASSES: tl.constexpr, BLOCKS: tl.constexpr, VOXELS: tl.constexpr,
):  # fmt: skip
    """Return peak and rest; `part` is the first block of classes."""
    peak = tl.full((VOXELS,), -float("inf"), tl.float32)
    classes = tl.arange(0, CLASSES)
    peak, rest = _take_block(peak, tl.full((VOXELS,), -1.0, tl.float32), part, classes < C)
    for block in range(1, BLOCKS):
        classes = block * CLASSES + tl.arange(0, CLASSES)
        part = _load(x, classes, voxels, class_stride, voxel_stride, C, exists, inside, HAS_IGNORED)
        peak, rest = _take_block(peak, rest, part, classes < C)
    return peak, tl.where(peak == float("inf"), float("nan"), rest)  # +inf makes all classes NaN


@triton.jit
def _probability(x, real, peak, rest, ACTIVATION: tl.constexpr, ENTROPY: tl.constexpr):
    """Return p, 1 - p, ln p and ln(1 - p), each with its digits; logarithms nobody asks for are zeros."""
    log_p = x * 0
    log_q = log_p
    if ACTIVATION == 0:
        shifted = tl.where(real[:, None], x - peak[None, :], 0.0)
        p = tl.exp(shifted) / (1.0 + rest)[None, :]
        q = tl.where(shifted >= 0, (rest / (1.0 + rest))[None, :], 1.0 - p)
        if ENTROPY:
            log_p = shifted - _log1p(rest)[None, :]
    elif ACTIVATION == 1:
        tail = _log1p(tl.exp(-tl.abs(x)))
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
def _taking_part(
    y, mask, voxels, label_stride, mask_stride, exists,
    MAPS: tl.constexpr, IGNORE: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Return the labels (VOXELS,), zeros where maps are given, and which voxels are not ignored."""
    inside = exists
    if MASK:
        inside = inside & (tl.load(mask + voxels * mask_stride, mask=exists, other=0) != 0)
    label = voxels.to(tl.int32) * 0
    if not MAPS:
        label = tl.load(y + voxels * label_stride, mask=exists, other=0).to(tl.int32)
        if IGNORE is not None:
            inside = inside & (label != IGNORE)
    return label, inside


@triton.jit
def _targets(
    label, y, classes, voxels, class_stride, voxel_stride, C, exists, inside,
    MAPS: tl.constexpr, HAS_IGNORED: tl.constexpr
):  # fmt: skip
    """Return targets (CLASSES, VOXELS), 0 at ignored voxels."""
    if MAPS:
        target = _load(y, classes, voxels, class_stride, voxel_stride, C, exists, inside, HAS_IGNORED)
    else:
        target = tl.where((label[None, :] == classes[:, None]) & inside[None, :], 1.0, 0.0)
    return target


@triton.jit
def _forward(
    x, y, mask, sums, counts, N, C,
    x_image, x_class, x_voxel, y_image, y_class, y_voxel, mask_image, mask_voxel,
    ACTIVATION: tl.constexpr, OVERLAP: tl.constexpr, POWER: tl.constexpr, ENTROPY: tl.constexpr,
    FOCAL: tl.constexpr, KEEP: tl.constexpr, SHARE: tl.constexpr, CONFIDENT: tl.constexpr, SPLIT: tl.constexpr,
    MAPS: tl.constexpr, IGNORE: tl.constexpr, MASK: tl.constexpr,
    CLASSES: tl.constexpr, BLOCKS: tl.constexpr, VOXELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    image = tl.program_id(1).to(tl.int64)
    voxels = program * VOXELS + tl.arange(0, VOXELS)
    x += image * x_image
    y += image * y_image
    mask += image * mask_image
    exists = voxels < N
    HAS_IGNORED: tl.constexpr = MASK or (IGNORE is not None)
    label, inside = _taking_part(y, mask, voxels, y_voxel, mask_voxel, exists, MAPS, IGNORE, MASK)
    share = inside.to(tl.float32)[None, :]
    part = _load(x, tl.arange(0, CLASSES), voxels, x_class, x_voxel, C, exists, inside, HAS_IGNORED)
    peak = tl.zeros((VOXELS,), tl.float32)
    rest = peak
    if ACTIVATION == 0:
        peak, rest = _softmax_norm(
            part, x, voxels, x_class, x_voxel, C, exists, inside, HAS_IGNORED, CLASSES, BLOCKS, VOXELS
        )
    place = image * tl.num_programs(0) + program
    tl.store(counts + place, tl.sum(inside.to(tl.float32)))
    sums += place * ROWS * C
    for block in range(BLOCKS):
        classes = block * CLASSES + tl.arange(0, CLASSES)
        real = classes < C
        row = sums + classes
        if BLOCKS > 1:
            part = _load(x, classes, voxels, x_class, x_voxel, C, exists, inside, HAS_IGNORED)
        target = _targets(label, y, classes, voxels, y_class, y_voxel, C, exists, inside, MAPS, HAS_IGNORED)
        p, q, log_p, log_q = _probability(part, real, peak, rest, ACTIVATION, ENTROPY)
        kept = p * share
        if OVERLAP != 2:
            both = kept * target
            if OVERLAP == 1:
                both = tl.minimum(kept, target)
            tl.store(row, tl.sum(both, 1), mask=real)
            tl.store(row + C, tl.sum(_power(kept, POWER), 1), mask=real)
            row += 2 * C
        tl.store(row, tl.sum(_power(target, POWER), 1), mask=real)
        row += C
        if ENTROPY:
            soft = KEEP * target + SHARE
            if ACTIVATION == 1:
                entropy = -_times_log(soft, log_p * _focal(log_q, FOCAL))
                others = -_times_log(1.0 - soft, log_q * _focal(log_p, FOCAL))
                if SPLIT:
                    tl.store(row + C, tl.sum(others * share, 1), mask=real)
                else:
                    entropy += others
            else:
                entropy = -_times_log(soft, log_p * _power(tl.maximum(q, 1e-30), FOCAL))
            tl.store(row, tl.sum(entropy * share, 1), mask=real)
            row += C
            if SPLIT:
                row += C
        if CONFIDENT:
            tl.store(row, tl.sum(kept * _power(kept, POWER), 1), mask=real)


@triton.jit
def _slope(
    x, target, peak, rest, gradient, classes, C,
    ACTIVATION: tl.constexpr, OVERLAP: tl.constexpr, POWER: tl.constexpr, ENTROPY: tl.constexpr,
    FOCAL: tl.constexpr, KEEP: tl.constexpr, SHARE: tl.constexpr, CONFIDENT: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Return p and h of the derivation."""
    real = classes < C
    p, q, log_p, log_q = _probability(x, real, peak, rest, ACTIVATION, ENTROPY)
    slope = p * 0
    if OVERLAP != 2:
        region = target
        if OVERLAP == 1:
            region = tl.where(p < target, 1.0, 0.0) + tl.where(p == target, 0.5, 0.0)
        slope = region * tl.load(gradient + classes, mask=real, other=0.0)[:, None]
        slope += POWER * _power(p, POWER - 1) * tl.load(gradient + C + classes, mask=real, other=0.0)[:, None]
        if CONFIDENT:
            pull = tl.load(gradient + 4 * C + classes, mask=real, other=0.0)[:, None]
            slope += (POWER + 1) * _power(p, POWER) * pull
        if ACTIVATION == 0:
            slope *= p
        if ACTIVATION == 1:
            slope *= p * q
    if ENTROPY:
        soft = KEEP * target + SHARE
        finite_p = tl.maximum(log_p, -3e38)  # 0 times ln 0 is 0
        finite_q = tl.maximum(log_q, -3e38)
        if ACTIVATION == 1:
            entropy = soft * _focal(log_q, FOCAL) * (FOCAL * p * finite_p - q)
            others = (1.0 - soft) * _focal(log_p, FOCAL) * (p - FOCAL * q * finite_q)
            if SPLIT:
                slope += others * tl.load(gradient + 6 * C + classes, mask=real, other=0.0)[:, None]
            else:
                entropy += others
        else:
            entropy = -soft
            if FOCAL != 0:
                q = tl.maximum(q, 1e-30)
                entropy = soft * (FOCAL * p * finite_p - q) * _power(q, FOCAL - 1)
            if ACTIVATION == 2:
                entropy = tl.where(p > 1e-30, entropy / tl.maximum(p, 1e-30), 0.0)
        slope += entropy * tl.load(gradient + 3 * C + classes, mask=real, other=0.0)[:, None]
    return p, tl.where(real[:, None], slope, 0.0)


@triton.jit
def _backward(
    x, y, mask, gradient, out, N, C,
    x_image, x_class, x_voxel, y_image, y_class, y_voxel, mask_image, mask_voxel,
    out_image, out_class, out_voxel,
    ACTIVATION: tl.constexpr, OVERLAP: tl.constexpr, POWER: tl.constexpr, ENTROPY: tl.constexpr,
    FOCAL: tl.constexpr, KEEP: tl.constexpr, SHARE: tl.constexpr, CONFIDENT: tl.constexpr, SPLIT: tl.constexpr,
    MAPS: tl.constexpr, IGNORE: tl.constexpr, MASK: tl.constexpr,
    CLASSES: tl.constexpr, BLOCKS: tl.constexpr, VOXELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    voxels = tl.program_id(0).to(tl.int64) * VOXELS + tl.arange(0, VOXELS)
    x += image * x_image
    y += image * y_image
    mask += image * mask_image
    out += image * out_image
    gradient += image * ROWS * C
    exists = voxels < N
    HAS_IGNORED: tl.constexpr = MASK or (IGNORE is not None)
    label, inside = _taking_part(y, mask, voxels, y_voxel, mask_voxel, exists, MAPS, IGNORE, MASK)
    part = _load(x, tl.arange(0, CLASSES), voxels, x_class, x_voxel, C, exists, inside, HAS_IGNORED)
    peak = tl.zeros((VOXELS,), tl.float32)
    rest = peak
    total = peak
    p = part
    slope = part
    if ACTIVATION == 0:
        peak, rest = _softmax_norm(
            part, x, voxels, x_class, x_voxel, C, exists, inside, HAS_IGNORED, CLASSES, BLOCKS, VOXELS
        )
        for block in range(BLOCKS):
            classes = block * CLASSES + tl.arange(0, CLASSES)
            if BLOCKS > 1:
                part = _load(x, classes, voxels, x_class, x_voxel, C, exists, inside, HAS_IGNORED)
            target = _targets(label, y, classes, voxels, y_class, y_voxel, C, exists, inside, MAPS, HAS_IGNORED)
            p, slope = _slope(part, target, peak, rest, gradient, classes, C,
                              ACTIVATION, OVERLAP, POWER, ENTROPY, FOCAL, KEEP, SHARE, CONFIDENT, SPLIT)  # fmt: skip
            total += tl.sum(slope, 0)
    for block in range(BLOCKS):
        classes = block * CLASSES + tl.arange(0, CLASSES)
        if BLOCKS > 1:
            part = _load(x, classes, voxels, x_class, x_voxel, C, exists, inside, HAS_IGNORED)
        if BLOCKS > 1 or ACTIVATION != 0:
            target = _targets(label, y, classes, voxels, y_class, y_voxel, C, exists, inside, MAPS, HAS_IGNORED)
            p, slope = _slope(part, target, peak, rest, gradient, classes, C,
                              ACTIVATION, OVERLAP, POWER, ENTROPY, FOCAL, KEEP, SHARE, CONFIDENT, SPLIT)  # fmt: skip
        if ACTIVATION == 0:
            slope -= p * total[None, :]
        slope = tl.where(inside[None, :], slope, 0.0)
        offsets = classes[:, None].to(tl.int64) * out_class + voxels[None, :] * out_voxel
        tl.store(out + offsets, slope.to(out.dtype.element_ty), mask=(classes[:, None] < C) & exists[None, :])


def _options(voxels: Voxels, spec: PassSpec) -> dict[str, Any]:
    classes = voxels.logits.shape[1]
    smoothing = spec.label_smoothing
    block = min(CLASS_BLOCK, triton.next_power_of_2(classes))
    ignores = voxels.labels is not None and voxels.has_ignored
    return {
        "ACTIVATION": _ACTIVATIONS[spec.activation],
        "OVERLAP": _OVERLAPS[spec.overlap],
        "POWER": spec.power,
        "ENTROPY": spec.cross_entropy,
        "FOCAL": spec.focal,
        "KEEP": 1 - smoothing,
        "SHARE": smoothing / 2 if spec.activation == "sigmoid" else smoothing / classes,
        "CONFIDENT": spec.confidence,
        "SPLIT": spec.split,
        "MAPS": voxels.labels is None,
        "IGNORE": IGNORED[voxels.labels.dtype] if ignores and voxels.labels is not None else None,
        "MASK": voxels.valid is not None,
        "CLASSES": block,
        "BLOCKS": triton.cdiv(classes, block),
        "VOXELS": min(TILE // block, 1024),
        "num_warps": _WARPS,
    }


def _inputs(voxels: Voxels) -> tuple[list[Tensor], list[int]]:
    """Return logits, targets and mask as the kernels take them, and their strides."""
    logits = voxels.logits
    target = voxels.maps if voxels.labels is None else voxels.labels.unsqueeze(1)
    assert target is not None
    target = target.view(torch.uint8) if target.dtype == torch.bool else target
    mask = logits if voxels.valid is None else voxels.valid.view(torch.uint8)
    strides = [*logits.stride(), *target.stride(), mask.stride(0), mask.stride(-1)]
    return [logits, target, mask], strides


class _TritonSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, voxels: Voxels, spec: PassSpec) -> Tensor:
        batch, classes, count = logits.shape
        options = _options(voxels, spec)
        tensors, strides = _inputs(voxels)
        programs, rows = triton.cdiv(count, options["VOXELS"]), spec.rows()
        sums = torch.empty((batch, programs, len(rows), classes), dtype=torch.float32, device=logits.device)
        counts = torch.empty((batch, programs, 1), dtype=torch.float32, device=logits.device)
        with torch.cuda.device_of(logits):
            _forward[(programs, batch)](*tensors, sums, counts, count, classes, *strides, ROWS=len(rows), **options)
        ctx.spec, ctx.has_ignored = spec, voxels.has_ignored
        ctx.save_for_backward(logits, voxels.labels, voxels.maps, voxels.valid)
        totals = dict(zip(rows, sums.sum(1, dtype=torch.float64).unbind(1), strict=True))
        totals[COUNT] = counts.sum(1, dtype=torch.float64).expand(batch, classes)
        unasked = torch.zeros_like(totals[TARGET])
        return torch.stack([totals.get(row, unasked) for row in range(ROWS)]).unsqueeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, labels, maps, valid = ctx.saved_tensors
        batch, classes, count = logits.shape
        voxels = Voxels(logits, labels, maps, valid, ctx.has_ignored, None, 1)
        gradient = gradient.squeeze(-1).transpose(0, 1).to(torch.float32).contiguous()
        options = _options(voxels, ctx.spec)
        tensors, strides = _inputs(voxels)
        out = torch.empty_like(logits)
        programs = triton.cdiv(count, options["VOXELS"])
        with torch.cuda.device_of(logits):
            strides += out.stride()
            _backward[(programs, batch)](*tensors, gradient, out, count, classes, *strides, ROWS=ROWS, **options)
        return out, None, None


def compute_sums(voxels: Voxels, spec: PassSpec) -> Tensor:
    """Return the statistics (7, B, C, 1) of `voxels`; by the tiled kernel where this one does not apply."""
    if not covers(voxels):
        return tiled.compute_sums(voxels, spec)
    result: Tensor = _TritonSums.apply(voxels.logits, voxels, spec)
    return result
