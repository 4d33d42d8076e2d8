"""The Triton kernel: one read of logits and labels for the sums, one read and one write for the gradient.

A program handles `CHUNKS` times `VOXELS` voxels of one image. It walks over the classes in blocks, first for the
softmax's largest logit and norm (online: one walk), then for the sums; the second walk finds the logits in the cache.
Up to 16 classes there is one block: a thread holds all logits of its voxels in registers, so logits and labels are
asked for once, and sums over the classes need no other thread. Labels come in any dtype; ignored voxels and values that
are no class are found here, so nothing has to be copied before. Of a voxel with logits x_c and label y_c it needs

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

import triton
import triton.language as tl

from monai_iou.voxels.triton_formulas import pulls_of, slope_of, values_of
from monai_iou.voxels.triton_reading import load, places, read_logits, taking_part, targets


@triton.jit
def _in_row(row: tl.constexpr, values):
    """Return (8, CLASSES): the sums of `values` (CLASSES, VOXELS) over the voxels in a row, zeros in the others."""
    return tl.where((tl.arange(0, 8) == row)[:, None], tl.sum(values, 1)[None, :], 0.0)


@triton.jit
def rows_of(
    both, size, volume, entropy, confidence, counted, background,
    OVERLAP: tl.constexpr, ENTROPY: tl.constexpr, CONFIDENT: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Return (8, CLASSES), the sums over the voxels of what :func:`values_of` returns, and a row of zeros."""
    rows = _in_row(2, volume) + _in_row(5, counted)
    if OVERLAP != 2:
        rows += _in_row(0, both) + _in_row(1, size)
    if ENTROPY:
        rows += _in_row(3, entropy)
    if SPLIT:
        rows += _in_row(6, background)
    if CONFIDENT:
        rows += _in_row(4, confidence)
    return rows


@triton.jit
def sums_of(
    part, target, share, real, peak, rest,
    ACTIVATION: tl.constexpr, OVERLAP: tl.constexpr, POWER: tl.constexpr, ENTROPY: tl.constexpr,
    FOCAL: tl.constexpr, KEEP: tl.constexpr, SHARE: tl.constexpr, CONFIDENT: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Return the sums of a block of classes and voxels, (8, CLASSES): the rows of `spec.py`, and one of zeros."""
    share = share[None, :]
    both, size, volume, entropy, confidence, counted, background = values_of(
        part, target, share, real, peak, rest, ACTIVATION, OVERLAP, POWER, ENTROPY, FOCAL, KEEP, SHARE, CONFIDENT, SPLIT
    )
    return rows_of(both, size, volume, entropy, confidence, counted, background, OVERLAP, ENTROPY, CONFIDENT, SPLIT)


@triton.jit
def store_rows(sums, rows, classes, C, ROWS: tl.constexpr):
    """Write a program's sums to its place, (ROWS, C)."""
    number = tl.arange(0, 8)[:, None]
    tl.store(sums + number * C + classes[None, :], rows, mask=(number < ROWS) & (classes < C)[None, :])


@triton.jit
def store_gradient(out, slope, classes, voxels, class_stride, voxel_stride, C, exists, inside):
    """Write d loss / d logits (CLASSES, VOXELS) in the dtype of the logits, 0 at ignored voxels."""
    slope = tl.where(inside[None, :], slope, 0.0)
    offsets = classes[:, None].to(tl.int64) * class_stride + voxels[None, :] * voxel_stride
    tl.store(out + offsets, slope.to(out.dtype.element_ty), mask=(classes[:, None] < C) & exists[None, :])


@triton.jit
def add_sums(
    x, y, mask, sums, N, C,
    x_image, x_class, x_voxel, y_image, y_class, y_voxel, mask_image, mask_voxel,
    ACTIVATION: tl.constexpr, OVERLAP: tl.constexpr, POWER: tl.constexpr, ENTROPY: tl.constexpr,
    FOCAL: tl.constexpr, KEEP: tl.constexpr, SHARE: tl.constexpr, CONFIDENT: tl.constexpr, SPLIT: tl.constexpr,
    MAPS: tl.constexpr, IGNORE: tl.constexpr, MASK: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
    BLOCKS: tl.constexpr, VOXELS: tl.constexpr, RUN: tl.constexpr, CHUNKS: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """Write the sums of a program's voxels, (ROWS, C); rows that nobody asks for are zeros."""
    program = tl.program_id(0).to(tl.int64)
    image = tl.program_id(1).to(tl.int64)
    x += image * x_image
    y += image * y_image
    mask += image * mask_image
    sums += (image * tl.num_programs(0) + program) * ROWS * C
    HAS_IGNORED: tl.constexpr = MASK or (IGNORE is not None)
    # Sums stay with the threads until the end if a thread has room for them: to join them makes the threads wait.
    rows = tl.zeros((8, CLASSES), tl.float32)
    none = tl.zeros((CLASSES, VOXELS), tl.float32)
    both, size, volume, entropy, confidence, counted, background = none, none, none, none, none, none, none
    start = program * VOXELS * CHUNKS
    end = tl.minimum(start + VOXELS * CHUNKS, N)
    while start < end:
        voxels, exists = places(start, N, VOXELS, RUN)
        label, inside = taking_part(y, mask, voxels, y_voxel, mask_voxel, C, exists, MAPS, IGNORE, MASK)
        part, peak, rest = read_logits(
            x, voxels, x_class, x_voxel, C, exists, inside, HAS_IGNORED, ACTIVATION, CLASSES, BLOCKS, VOXELS
        )
        for block in range(BLOCKS):
            classes = block * CLASSES + tl.arange(0, CLASSES)
            if BLOCKS > 1:
                part = load(x, classes, voxels, x_class, x_voxel, C, exists, inside, HAS_IGNORED)
            target = targets(label, y, classes, voxels, y_class, y_voxel, C, exists, inside, MAPS, HAS_IGNORED)
            if APART:
                of_both, of_size, of_volume, of_entropy, of_confidence, of_count, of_background = values_of(
                    part, target, inside.to(tl.float32)[None, :], classes < C, peak, rest,
                    ACTIVATION, OVERLAP, POWER, ENTROPY, FOCAL, KEEP, SHARE, CONFIDENT, SPLIT,
                )  # fmt: skip
                both += of_both
                size += of_size
                volume += of_volume
                entropy += of_entropy
                confidence += of_confidence
                counted += of_count
                background += of_background
            else:
                found = sums_of(part, target, inside.to(tl.float32), classes < C, peak, rest,
                                ACTIVATION, OVERLAP, POWER, ENTROPY, FOCAL, KEEP, SHARE, CONFIDENT, SPLIT)  # fmt: skip
                if BLOCKS > 1:
                    store_rows(sums, found, classes, C, ROWS)
                else:
                    rows += found
        start += VOXELS
    if APART:
        rows = rows_of(
            both, size, volume, entropy, confidence, counted, background, OVERLAP, ENTROPY, CONFIDENT, SPLIT
        )  # fmt: skip
    if BLOCKS == 1:
        store_rows(sums, rows, tl.arange(0, CLASSES), C, ROWS)


@triton.jit
def write_gradient(
    x, y, mask, gradient, out, N, C,
    x_image, x_class, x_voxel, y_image, y_class, y_voxel, mask_image, mask_voxel,
    out_image, out_class, out_voxel,
    ACTIVATION: tl.constexpr, OVERLAP: tl.constexpr, POWER: tl.constexpr, ENTROPY: tl.constexpr,
    FOCAL: tl.constexpr, KEEP: tl.constexpr, SHARE: tl.constexpr, CONFIDENT: tl.constexpr, SPLIT: tl.constexpr,
    MAPS: tl.constexpr, IGNORE: tl.constexpr, MASK: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
    BLOCKS: tl.constexpr, VOXELS: tl.constexpr, RUN: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Write d loss / d logits; `gradient` holds d loss / d statistics, (ROWS, C) of each image."""
    image = tl.program_id(1).to(tl.int64)
    x += image * x_image
    y += image * y_image
    mask += image * mask_image
    out += image * out_image
    gradient += image * ROWS * C
    HAS_IGNORED: tl.constexpr = MASK or (IGNORE is not None)
    overlap, size, cross, confidence, background = pulls_of(
        gradient, tl.arange(0, CLASSES), C, OVERLAP, ENTROPY, CONFIDENT, SPLIT
    )
    start = tl.program_id(0).to(tl.int64) * VOXELS * CHUNKS
    end = tl.minimum(start + VOXELS * CHUNKS, N)
    while start < end:
        voxels, exists = places(start, N, VOXELS, RUN)
        label, inside = taking_part(y, mask, voxels, y_voxel, mask_voxel, C, exists, MAPS, IGNORE, MASK)
        part, peak, rest = read_logits(
            x, voxels, x_class, x_voxel, C, exists, inside, HAS_IGNORED, ACTIVATION, CLASSES, BLOCKS, VOXELS
        )
        total = tl.zeros((VOXELS,), tl.float32)
        p = part
        slope = part
        if ACTIVATION == 0:
            for block in range(BLOCKS):
                classes = block * CLASSES + tl.arange(0, CLASSES)
                if BLOCKS > 1:
                    part = load(x, classes, voxels, x_class, x_voxel, C, exists, inside, HAS_IGNORED)
                    overlap, size, cross, confidence, background = pulls_of(
                        gradient, classes, C, OVERLAP, ENTROPY, CONFIDENT, SPLIT
                    )
                target = targets(label, y, classes, voxels, y_class, y_voxel, C, exists, inside, MAPS, HAS_IGNORED)
                p, slope = slope_of(
                    part, target, peak, rest, classes < C, overlap, size, cross, confidence, background,
                    ACTIVATION, OVERLAP, POWER, ENTROPY, FOCAL, KEEP, SHARE, CONFIDENT, SPLIT,
                )  # fmt: skip
                total += tl.sum(slope, 0)
        for block in range(BLOCKS):
            classes = block * CLASSES + tl.arange(0, CLASSES)
            if BLOCKS > 1:
                part = load(x, classes, voxels, x_class, x_voxel, C, exists, inside, HAS_IGNORED)
                overlap, size, cross, confidence, background = pulls_of(
                    gradient, classes, C, OVERLAP, ENTROPY, CONFIDENT, SPLIT
                )
            if BLOCKS > 1 or ACTIVATION != 0:
                target = targets(label, y, classes, voxels, y_class, y_voxel, C, exists, inside, MAPS, HAS_IGNORED)
                p, slope = slope_of(
                    part, target, peak, rest, classes < C, overlap, size, cross, confidence, background,
                    ACTIVATION, OVERLAP, POWER, ENTROPY, FOCAL, KEEP, SHARE, CONFIDENT, SPLIT,
                )  # fmt: skip
            if ACTIVATION == 0:
                slope -= p * total[None, :]
            store_gradient(out, slope, classes, voxels, out_class, out_voxel, C, exists, inside)
        start += VOXELS
