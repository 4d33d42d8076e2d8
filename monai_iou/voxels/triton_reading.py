"""What a program of the Triton kernels reads: logits, labels or maps, and a softmax's largest logit and norm."""

# Triton reads the bodies of its kernels by rules of its own; their arguments have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from monai_iou.voxels.triton_formulas import below


@triton.jit
def load(pointer, classes, voxels, class_stride, voxel_stride, C, exists, inside, HAS_IGNORED: tl.constexpr):
    """Return (CLASSES, VOXELS) in float32, 0 at ignored voxels."""
    # Ignored voxels are read with the others and cleared after: a mask with holes would split the wide loads.
    offsets = classes[:, None].to(tl.int64) * class_stride + voxels[None, :] * voxel_stride
    values = tl.load(pointer + offsets, mask=(classes[:, None] < C) & exists[None, :], other=0.0).to(tl.float32)
    if HAS_IGNORED:
        values = tl.where(inside[None, :], values, 0.0)
    return values


@triton.jit
def places(start, N, VOXELS: tl.constexpr, RUN: tl.constexpr):
    """Return the numbers of the voxels from `start`, and which of them exist; a thread takes `RUN` in a row."""
    # As many voxels as threads times runs: so a thread has all classes of its voxels, and no two ask for one label.
    voxels = tl.max_contiguous(tl.multiple_of(start + tl.arange(0, VOXELS), RUN), RUN)
    return voxels, voxels < N


@triton.jit
def _class_of(value, C):
    """Return class numbers in int32; -1 stands for a value that is out of range, fractional or NaN."""
    if value.dtype.is_floating() and value.dtype.primitive_bitwidth < 32:
        value = value.to(tl.float32)
    in_range = (value >= 0) & (value < C)
    number = tl.where(in_range, value, 0).to(tl.int32)  # cleared first: nothing wraps round
    return tl.where(in_range & (number.to(value.dtype) == value), number, -1)


@triton.jit
def taking_part(
    y, mask, voxels, label_stride, mask_stride, C, exists,
    MAPS: tl.constexpr, IGNORE: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Return the class numbers (VOXELS,), zeros where maps are given, and which voxels are not ignored."""
    inside = exists
    if MASK:
        inside = inside & (tl.load(mask + voxels * mask_stride, mask=exists, other=0) != 0)
    label = voxels.to(tl.int32) * 0
    if not MAPS:
        value = tl.load(y + voxels * label_stride, mask=exists, other=0)
        if IGNORE is not None:
            inside = inside & (value != IGNORE)
        label = _class_of(value, C)
    return label, inside


@triton.jit
def targets(
    label, y, classes, voxels, class_stride, voxel_stride, C, exists, inside,
    MAPS: tl.constexpr, HAS_IGNORED: tl.constexpr
):  # fmt: skip
    """Return targets (CLASSES, VOXELS), 0 at ignored voxels."""
    if MAPS:
        target = load(y, classes, voxels, class_stride, voxel_stride, C, exists, inside, HAS_IGNORED)
    else:
        target = tl.where((label[None, :] == classes[:, None]) & inside[None, :], 1.0, 0.0)
    return target


@triton.jit
def _rest(part, real, top):
    """Return exp(x - top) added up over a block of classes without one that is the largest."""
    shifted = below(part, real, top)  # NaN where all classes are ruled out by -inf, which then are all the largest
    is_top = tl.where(real[:, None], part, -float("inf")) >= top[None, :]
    ties = tl.sum(is_top.to(tl.float32), 0) - 1.0
    return tl.sum(tl.where(is_top, 0.0, tl.exp(shifted)), 0) + ties


@triton.jit
def _take_block(peak, rest, part, real):
    """Take a block of classes into the largest logit and `rest`, the others' exp(x - peak) added up.

    The softmax's norm is 1 + rest; it is never formed, because a confident voxel's rest has no digit in it.
    """
    top = tl.max(tl.where(real[:, None], part, -float("inf")), 0)
    own = _rest(part, real, top)
    first = peak >= top
    higher_rest = tl.where(first, rest, own)
    lower_rest = tl.where(first, own, rest)
    gap = tl.where(peak == top, 0.0, tl.abs(peak - top))  # both may be -inf
    return tl.maximum(peak, top), higher_rest + (1.0 + lower_rest) * tl.exp(-gap)


@triton.jit
def softmax_norm(
    part, x, voxels, class_stride, voxel_stride, C, exists, inside,
    HAS_IGNORED: tl.constexpr, CLASSES: tl.constexpr, BLOCKS: tl.constexpr, VOXELS: tl.constexpr,
):  # fmt: skip
    """Return peak and rest; `part` is the first block of classes."""
    real = tl.arange(0, CLASSES) < C
    peak = tl.max(tl.where(real[:, None], part, -float("inf")), 0)
    rest = _rest(part, real, peak)
    for block in range(1, BLOCKS):
        classes = block * CLASSES + tl.arange(0, CLASSES)
        part = load(x, classes, voxels, class_stride, voxel_stride, C, exists, inside, HAS_IGNORED)
        peak, rest = _take_block(peak, rest, part, classes < C)
    return peak, tl.where(peak == float("inf"), float("nan"), rest)  # +inf makes all classes NaN


@triton.jit
def read_logits(
    x, voxels, class_stride, voxel_stride, C, exists, inside,
    HAS_IGNORED: tl.constexpr, ACTIVATION: tl.constexpr, CLASSES: tl.constexpr, BLOCKS: tl.constexpr,
    VOXELS: tl.constexpr,
):  # fmt: skip
    """Return the first block of logits, and a softmax's peak and rest; zeros where there is none."""
    part = load(x, tl.arange(0, CLASSES), voxels, class_stride, voxel_stride, C, exists, inside, HAS_IGNORED)
    peak = tl.zeros((VOXELS,), tl.float32)
    rest = peak
    if ACTIVATION == 0:
        peak, rest = softmax_norm(
            part, x, voxels, class_stride, voxel_stride, C, exists, inside, HAS_IGNORED, CLASSES, BLOCKS, VOXELS
        )
    return part, peak, rest
