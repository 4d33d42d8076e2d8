"""The Triton kernel: one read of logits and labels for the sums, one read and one write for the gradient.

A program handles `VOXELS` voxels of one image. It walks over the classes in blocks, first for the softmax's largest
logit and norm (online: one walk), then for the sums; the second walk finds the logits in the cache. Each program writes
its partial sums to a place of its own and torch adds them in float64: no atomics, so the same bits on every call.
Logits and gradient are addressed by strides, so channels-last volumes are read where they are, and all
offsets are 64 bits wide. See `reference.py` for the derivation.
"""

# Triton reads the bodies of its kernels by rules of its own; their arguments have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from monai_iou.voxels import tiled
from monai_iou.voxels.reference import (
    IGNORED,
    ROWS,
    PassSpec,
    Voxels,
)

MOST_CLASSES = 256
CLASS_BLOCK = 16
TILE = 4096  # elements (classes x voxels) in the registers of a program
_WARPS = 4
_ACTIVATIONS = {"softmax": 0, "sigmoid": 1, None: 2}
_OVERLAPS = {"product": 0, "min_max": 1, None: 2}


def covers(voxels: Voxels) -> bool:
    """Return whether this kernel handles the input; `tiled` does the rest."""
    logits = voxels.logits
    return (
        logits.dtype != torch.float64
        and logits.shape[1] <= MOST_CLASSES
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
    return result


@triton.jit
def _load(pointer, classes, voxels, class_stride, voxel_stride, C, inside, other):
    offsets = classes[:, None].to(tl.int64) * class_stride + voxels[None, :] * voxel_stride
    return tl.load(pointer + offsets, mask=(classes[:, None] < C) & inside[None, :], other=other).to(tl.float32)


@triton.jit
def _softmax_norm(
    x,
    voxels,
    class_stride,
    voxel_stride,
    C,
    inside,
    CLASSES: tl.constexpr,
    VOXELS: tl.constexpr,
):
    peak = tl.full((VOXELS,), -3.0e38, tl.float32)
    norm = tl.zeros((VOXELS,), tl.float32)
    for first in range(0, C, CLASSES):
        classes = first + tl.arange(0, CLASSES)
        part = _load(x, classes, voxels, class_stride, voxel_stride, C, inside, 0.0)
        part = tl.where(classes[:, None] < C, part, -float("inf"))
        higher = tl.maximum(peak, tl.max(part, 0))
        norm = norm * tl.exp(peak - higher) + tl.sum(tl.exp(part - higher[None, :]), 0)
        peak = higher
    return peak, norm


@triton.jit
def _log_sigmoid(x):
    # e^-|x| below 2^-12: ln(1 + t) = t - t^2 / 2, which 1 + t in float32 would round away.
    t = tl.exp(-tl.abs(x))
    tail = tl.where(t < 2.4e-4, t - t * t * 0.5, tl.log(1.0 + t))
    return tl.minimum(x, 0.0) - tail, tl.minimum(-x, 0.0) - tail


@triton.jit
def _probability(x, peak, norm, ACTIVATION: tl.constexpr, ENTROPY: tl.constexpr):
    """Return p, ln p and ln(1 - p); the logarithms are zeros where they are not asked for."""
    log_p = x * 0
    log_q = log_p
    if ACTIVATION == 0:
        shifted = x - peak[None, :]
        p = tl.exp(shifted) / norm[None, :]
        if ENTROPY:
            log_p = shifted - tl.log(norm)[None, :]
    elif ACTIVATION == 1:
        log_p, log_q = _log_sigmoid(x)
        p = tl.exp(log_p)
    else:
        p = x
        if ENTROPY:
            log_p = tl.log(tl.maximum(x, 1e-30))
    return p, log_p, log_q


@triton.jit
def _targets(
    y,
    classes,
    voxels,
    class_stride,
    voxel_stride,
    C,
    inside,
    MAPS: tl.constexpr,
):
    """Return targets (CLASSES, VOXELS)."""
    if MAPS:
        target = _load(y, classes, voxels, class_stride, voxel_stride, C, inside, 0.0)
    else:
        label = tl.load(y + voxels * voxel_stride, mask=inside, other=-1).to(tl.int32)
        target = tl.where(label[None, :] == classes[:, None], 1.0, 0.0)
    return target


@triton.jit
def _taking_part(
    y,
    mask,
    voxels,
    label_stride,
    mask_stride,
    inside,
    IGNORE: tl.constexpr,
    MASK: tl.constexpr,
):
    if MASK:
        inside = inside & (tl.load(mask + voxels * mask_stride, mask=inside, other=0) != 0)
    if IGNORE is not None:
        inside = inside & (tl.load(y + voxels * label_stride, mask=inside, other=0).to(tl.int32) != IGNORE)
    return inside


@triton.jit
def _forward(
    x, y, mask, sums, N, C,
    x_image, x_class, x_voxel, y_image, y_class, y_voxel, mask_image, mask_voxel,
    ACTIVATION: tl.constexpr, OVERLAP: tl.constexpr, POWER: tl.constexpr, ENTROPY: tl.constexpr,
    FOCAL: tl.constexpr, KEEP: tl.constexpr, SHARE: tl.constexpr, CONFIDENT: tl.constexpr,
    MAPS: tl.constexpr, IGNORE: tl.constexpr, MASK: tl.constexpr, CLASSES: tl.constexpr, VOXELS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    image = tl.program_id(1).to(tl.int64)
    voxels = block * VOXELS + tl.arange(0, VOXELS)
    x += image * x_image
    y += image * y_image
    mask += image * mask_image
    inside = _taking_part(y, mask, voxels, y_voxel, mask_voxel, voxels < N, IGNORE, MASK)
    share = inside.to(tl.float32)[None, :]
    count = tl.sum(inside.to(tl.float32))
    peak = tl.zeros((VOXELS,), tl.float32)
    norm = peak
    if ACTIVATION == 0:
        peak, norm = _softmax_norm(x, voxels, x_class, x_voxel, C, inside, CLASSES, VOXELS)
    sums += (image * tl.num_programs(0) + block) * 6 * C
    for first in range(0, C, CLASSES):
        classes = first + tl.arange(0, CLASSES)
        real = classes < C
        part = _load(x, classes, voxels, x_class, x_voxel, C, inside, 0.0)
        target = _targets(y, classes, voxels, y_class, y_voxel, C, inside, MAPS)
        target = target * share
        p, log_p, log_q = _probability(part, peak, norm, ACTIVATION, ENTROPY)
        if ENTROPY:
            soft = KEEP * target + SHARE
            if ACTIVATION == 1:
                entropy = -soft * log_p * tl.exp(FOCAL * log_q) - (1 - soft) * log_q * tl.exp(FOCAL * log_p)
            else:
                entropy = -soft * log_p * _power(tl.maximum(1 - p, 1e-30), FOCAL)
            tl.store(sums + 3 * C + classes, tl.sum(entropy * share, 1), mask=real)
        p = p * share
        if OVERLAP == 0:
            tl.store(sums + classes, tl.sum(p * target, 1), mask=real)
        if OVERLAP == 1:
            tl.store(sums + classes, tl.sum(tl.minimum(p, target), 1), mask=real)
        if OVERLAP != 2:
            tl.store(sums + C + classes, tl.sum(_power(p, POWER), 1), mask=real)
        tl.store(sums + 2 * C + classes, tl.sum(_power(target, POWER), 1), mask=real)
        if CONFIDENT:
            tl.store(sums + 4 * C + classes, tl.sum(p * _power(p, POWER), 1), mask=real)
        tl.store(sums + 5 * C + classes, tl.zeros((CLASSES,), tl.float32) + count, mask=real)


@triton.jit
def _slope(
    p, log_p, log_q, target, gradient, classes, C,
    ACTIVATION: tl.constexpr, OVERLAP: tl.constexpr, POWER: tl.constexpr, ENTROPY: tl.constexpr,
    FOCAL: tl.constexpr, KEEP: tl.constexpr, SHARE: tl.constexpr, CONFIDENT: tl.constexpr,
):  # fmt: skip
    """Return h of the derivation."""
    real = classes < C
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
            slope *= p * tl.exp(log_q)
    if ENTROPY:
        soft = KEEP * target + SHARE
        if ACTIVATION == 1:
            q = tl.exp(log_q)
            entropy = soft * tl.exp(FOCAL * log_q) * (FOCAL * p * log_p - q)
            entropy += (1 - soft) * tl.exp(FOCAL * log_p) * (p - FOCAL * q * log_q)
        else:
            entropy = -soft
            if FOCAL != 0:
                q = tl.maximum(1 - p, 1e-30)
                entropy = soft * (FOCAL * p * log_p - q) * _power(q, FOCAL - 1)
            if ACTIVATION == 2:
                entropy = tl.where(p > 1e-30, entropy / tl.maximum(p, 1e-30), 0.0)
        slope += entropy * tl.load(gradient + 3 * C + classes, mask=real, other=0.0)[:, None]
    return tl.where(real[:, None], slope, 0.0)


@triton.jit
def _backward(
    x, y, mask, gradient, out, N, C,
    x_image, x_class, x_voxel, y_image, y_class, y_voxel, mask_image, mask_voxel,
    out_image, out_class, out_voxel,
    ACTIVATION: tl.constexpr, OVERLAP: tl.constexpr, POWER: tl.constexpr, ENTROPY: tl.constexpr,
    FOCAL: tl.constexpr, KEEP: tl.constexpr, SHARE: tl.constexpr, CONFIDENT: tl.constexpr,
    MAPS: tl.constexpr, IGNORE: tl.constexpr, MASK: tl.constexpr, CLASSES: tl.constexpr, VOXELS: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    voxels = tl.program_id(0).to(tl.int64) * VOXELS + tl.arange(0, VOXELS)
    x += image * x_image
    y += image * y_image
    mask += image * mask_image
    out += image * out_image
    gradient += image * 6 * C
    exists = voxels < N
    inside = _taking_part(y, mask, voxels, y_voxel, mask_voxel, exists, IGNORE, MASK)
    peak = tl.zeros((VOXELS,), tl.float32)
    norm = peak
    total = peak
    if ACTIVATION == 0:
        peak, norm = _softmax_norm(x, voxels, x_class, x_voxel, C, inside, CLASSES, VOXELS)
        for first in range(0, C, CLASSES):
            classes = first + tl.arange(0, CLASSES)
            part = _load(x, classes, voxels, x_class, x_voxel, C, inside, 0.0)
            target = _targets(y, classes, voxels, y_class, y_voxel, C, inside, MAPS)
            p, log_p, log_q = _probability(part, peak, norm, ACTIVATION, ENTROPY)
            total += tl.sum(
                _slope(p, log_p, log_q, target, gradient, classes, C,
                       ACTIVATION, OVERLAP, POWER, ENTROPY, FOCAL, KEEP, SHARE, CONFIDENT), 0)  # fmt: skip
    for first in range(0, C, CLASSES):
        classes = first + tl.arange(0, CLASSES)
        part = _load(x, classes, voxels, x_class, x_voxel, C, inside, 0.0)
        target = _targets(y, classes, voxels, y_class, y_voxel, C, inside, MAPS)
        p, log_p, log_q = _probability(part, peak, norm, ACTIVATION, ENTROPY)
        slope = _slope(p, log_p, log_q, target, gradient, classes, C,
                       ACTIVATION, OVERLAP, POWER, ENTROPY, FOCAL, KEEP, SHARE, CONFIDENT)  # fmt: skip
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
        "MAPS": voxels.labels is None,
        "IGNORE": IGNORED[voxels.labels.dtype] if ignores and voxels.labels is not None else None,
        "MASK": voxels.valid is not None,
        "CLASSES": block,
        "VOXELS": min(TILE // block, 1024),
        "num_warps": _WARPS,
    }


def _inputs(voxels: Voxels) -> tuple[list[Tensor], list[int]]:
    """Return logits, targets and mask as the kernels take them, and their strides."""
    logits = voxels.logits
    target = voxels.maps if voxels.labels is None else voxels.labels.unsqueeze(1)
    assert target is not None
    target = target.to(torch.uint8) if target.dtype == torch.bool else target
    target = target.to(torch.float32) if target.dtype == torch.float64 else target
    mask = logits if voxels.valid is None else voxels.valid.view(torch.uint8)
    strides = [*logits.stride(), *target.stride(), mask.stride(0), mask.stride(-1)]
    return [logits, target, mask], strides


class _TritonSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, voxels: Voxels, spec: PassSpec) -> Tensor:
        batch, classes, count = logits.shape
        options = _options(voxels, spec)
        tensors, strides = _inputs(voxels)
        blocks = triton.cdiv(count, options["VOXELS"])
        sums = torch.zeros((batch, blocks, ROWS, classes), dtype=torch.float32, device=logits.device)
        with torch.cuda.device_of(logits):
            _forward[(blocks, batch)](*tensors, sums, count, classes, *strides, **options)
        ctx.spec, ctx.has_ignored = spec, voxels.has_ignored
        ctx.save_for_backward(logits, voxels.labels, voxels.maps, voxels.valid)
        return sums.sum(1, dtype=torch.float64).transpose(0, 1).unsqueeze(-1)

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
        blocks = triton.cdiv(count, options["VOXELS"])
        with torch.cuda.device_of(logits):
            _backward[(blocks, batch)](*tensors, gradient, out, count, classes, *strides, *out.stride(), **options)
        return out, None, None


def sums(voxels: Voxels, spec: PassSpec) -> Tensor:
    """Return the statistics (6, B, C, 1) of `voxels`; by the tiled kernel where this one does not apply."""
    if not covers(voxels):
        return tiled.sums(voxels, spec)
    result: Tensor = _TritonSums.apply(voxels.logits, voxels, spec)
    return result
