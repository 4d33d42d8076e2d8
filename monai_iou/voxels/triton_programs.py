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

import triton
import triton.language as tl

from monai_iou.voxels.triton_formulas import focal_factor, power, probability, slope_of, times_log
from monai_iou.voxels.triton_reading import load, softmax_norm, taking_part, targets


@triton.jit
def add_sums(
    x, y, mask, sums, counts, N, C,
    x_image, x_class, x_voxel, y_image, y_class, y_voxel, mask_image, mask_voxel,
    ACTIVATION: tl.constexpr, OVERLAP: tl.constexpr, POWER: tl.constexpr, ENTROPY: tl.constexpr,
    FOCAL: tl.constexpr, KEEP: tl.constexpr, SHARE: tl.constexpr, CONFIDENT: tl.constexpr, SPLIT: tl.constexpr,
    MAPS: tl.constexpr, IGNORE: tl.constexpr, MASK: tl.constexpr,
    CLASSES: tl.constexpr, BLOCKS: tl.constexpr, VOXELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write the sums of the rows asked for, (rows, C), and the count of the voxels that are not ignored."""
    program = tl.program_id(0).to(tl.int64)
    image = tl.program_id(1).to(tl.int64)
    voxels = program * VOXELS + tl.arange(0, VOXELS)
    x += image * x_image
    y += image * y_image
    mask += image * mask_image
    exists = voxels < N
    HAS_IGNORED: tl.constexpr = MASK or (IGNORE is not None)
    label, inside = taking_part(y, mask, voxels, y_voxel, mask_voxel, exists, MAPS, IGNORE, MASK)
    share = inside.to(tl.float32)[None, :]
    part = load(x, tl.arange(0, CLASSES), voxels, x_class, x_voxel, C, exists, inside, HAS_IGNORED)
    peak = tl.zeros((VOXELS,), tl.float32)
    rest = peak
    if ACTIVATION == 0:
        peak, rest = softmax_norm(
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
            part = load(x, classes, voxels, x_class, x_voxel, C, exists, inside, HAS_IGNORED)
        target = targets(label, y, classes, voxels, y_class, y_voxel, C, exists, inside, MAPS, HAS_IGNORED)
        p, q, log_p, log_q = probability(part, real, peak, rest, ACTIVATION, ENTROPY)
        kept = p * share
        if OVERLAP != 2:
            both = kept * target
            if OVERLAP == 1:
                both = tl.minimum(kept, target)
            tl.store(row, tl.sum(both, 1), mask=real)
            tl.store(row + C, tl.sum(power(kept, POWER), 1), mask=real)
            row += 2 * C
        tl.store(row, tl.sum(power(target, POWER), 1), mask=real)
        row += C
        if ENTROPY:
            soft = KEEP * target + SHARE
            if ACTIVATION == 1:
                entropy = -times_log(soft, log_p * focal_factor(log_q, FOCAL))
                others = -times_log(1.0 - soft, log_q * focal_factor(log_p, FOCAL))
                if SPLIT:
                    tl.store(row + C, tl.sum(others * share, 1), mask=real)
                else:
                    entropy += others
            else:
                entropy = -times_log(soft, log_p * power(tl.maximum(q, 1e-30), FOCAL))
            tl.store(row, tl.sum(entropy * share, 1), mask=real)
            row += C
            if SPLIT:
                row += C
        if CONFIDENT:
            tl.store(row, tl.sum(kept * power(kept, POWER), 1), mask=real)


@triton.jit
def write_gradient(
    x, y, mask, gradient, out, N, C,
    x_image, x_class, x_voxel, y_image, y_class, y_voxel, mask_image, mask_voxel,
    out_image, out_class, out_voxel,
    ACTIVATION: tl.constexpr, OVERLAP: tl.constexpr, POWER: tl.constexpr, ENTROPY: tl.constexpr,
    FOCAL: tl.constexpr, KEEP: tl.constexpr, SHARE: tl.constexpr, CONFIDENT: tl.constexpr, SPLIT: tl.constexpr,
    MAPS: tl.constexpr, IGNORE: tl.constexpr, MASK: tl.constexpr,
    CLASSES: tl.constexpr, BLOCKS: tl.constexpr, VOXELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write d loss / d logits; `gradient` holds d loss / d statistics, (ROWS, C) of each image."""
    image = tl.program_id(1).to(tl.int64)
    voxels = tl.program_id(0).to(tl.int64) * VOXELS + tl.arange(0, VOXELS)
    x += image * x_image
    y += image * y_image
    mask += image * mask_image
    out += image * out_image
    gradient += image * ROWS * C
    exists = voxels < N
    HAS_IGNORED: tl.constexpr = MASK or (IGNORE is not None)
    label, inside = taking_part(y, mask, voxels, y_voxel, mask_voxel, exists, MAPS, IGNORE, MASK)
    part = load(x, tl.arange(0, CLASSES), voxels, x_class, x_voxel, C, exists, inside, HAS_IGNORED)
    peak = tl.zeros((VOXELS,), tl.float32)
    rest = peak
    total = peak
    p = part
    slope = part
    if ACTIVATION == 0:
        peak, rest = softmax_norm(
            part, x, voxels, x_class, x_voxel, C, exists, inside, HAS_IGNORED, CLASSES, BLOCKS, VOXELS
        )
        for block in range(BLOCKS):
            classes = block * CLASSES + tl.arange(0, CLASSES)
            if BLOCKS > 1:
                part = load(x, classes, voxels, x_class, x_voxel, C, exists, inside, HAS_IGNORED)
            target = targets(label, y, classes, voxels, y_class, y_voxel, C, exists, inside, MAPS, HAS_IGNORED)
            p, slope = slope_of(part, target, peak, rest, gradient, classes, C,
                              ACTIVATION, OVERLAP, POWER, ENTROPY, FOCAL, KEEP, SHARE, CONFIDENT, SPLIT)  # fmt: skip
            total += tl.sum(slope, 0)
    for block in range(BLOCKS):
        classes = block * CLASSES + tl.arange(0, CLASSES)
        if BLOCKS > 1:
            part = load(x, classes, voxels, x_class, x_voxel, C, exists, inside, HAS_IGNORED)
        if BLOCKS > 1 or ACTIVATION != 0:
            target = targets(label, y, classes, voxels, y_class, y_voxel, C, exists, inside, MAPS, HAS_IGNORED)
            p, slope = slope_of(part, target, peak, rest, gradient, classes, C,
                              ACTIVATION, OVERLAP, POWER, ENTROPY, FOCAL, KEEP, SHARE, CONFIDENT, SPLIT)  # fmt: skip
        if ACTIVATION == 0:
            slope -= p * total[None, :]
        slope = tl.where(inside[None, :], slope, 0.0)
        offsets = classes[:, None].to(tl.int64) * out_class + voxels[None, :] * out_voxel
        tl.store(out + offsets, slope.to(out.dtype.element_ty), mask=(classes[:, None] < C) & exists[None, :])
