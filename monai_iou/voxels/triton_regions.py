"""The Triton kernel with regions: sums for every region number, and a gradient that looks its region up.

`groups` gives a voxel the number of its region, for all classes (CLASSES rows of one) or for each class. Regions are
contiguous as a rule, such as the cells of lesions, so the voxels that a program holds at a time lie in few of them. For
each number that occurs among them, the smallest first, it adds the voxels of that number up and adds the sums to the
region's place in a table of its own: no atomics, and the order is always the same, so the bits are too. torch adds the
programs' tables in float64. A voxel without a region, whose number is not one of 0, ..., R - 1, is ignored.

In backward the pull of a voxel, d loss / d statistics, is its region's: loads from a small table that neighbours share.
With regions for each class and classes that exclude each other (`JOINT`), the cross-entropy of a region is that of all
classes at its voxels; see `sums_entropy` in `formulas.py`. There is one block of classes.
"""

# Triton reads the bodies of its kernels by rules of its own; their arguments have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from monai_iou.voxels.triton_formulas import pulls_at, slope_of, values_of
from monai_iou.voxels.triton_programs import rows_of, store_gradient
from monai_iou.voxels.triton_reading import places, read_logits, taking_part, targets


@triton.jit
def _regions_of(
    groups, voxels, class_stride, voxel_stride, C, R, exists, inside, EACH: tl.constexpr, CLASSES: tl.constexpr
):  # fmt: skip
    """Return region numbers, (1, VOXELS), or (CLASSES, VOXELS) if `EACH` class has its own, and the voxels with one."""
    if EACH:
        classes = tl.arange(0, CLASSES)
        offsets = classes[:, None].to(tl.int64) * class_stride + voxels[None, :] * voxel_stride
        number = tl.load(groups + offsets, mask=(classes < C)[:, None] & exists[None, :], other=0)
        in_range = (number >= 0) & (number < R)
        inside = inside & (tl.min(in_range.to(tl.int32), 0) == 1)
        number = tl.where(in_range, number, 0).to(tl.int32)  # cleared first: nothing wraps round
    else:
        given = tl.load(groups + voxels * voxel_stride, mask=exists, other=0)
        in_range = (given >= 0) & (given < R)
        inside = inside & in_range
        number = tl.where(in_range, given, 0).to(tl.int32)[None, :]
    return number, inside


@triton.jit
def _add_rows(sums, region, rows, C, R, ROWS: tl.constexpr, CLASSES: tl.constexpr):
    """Add (8, CLASSES) to a region's place in the program's table (ROWS, C, R)."""
    row = tl.arange(0, 8)[:, None]
    classes = tl.arange(0, CLASSES)[None, :]
    own = sums + (row * C + classes) * R + region
    real = (row < ROWS) & (classes < C)
    tl.debug_barrier()  # another thread may have stored what this one loads
    tl.store(own, tl.load(own, mask=real, other=0.0) + rows, mask=real)


@triton.jit(do_not_specialize=["R"])  # another number in every batch must not compile anew
def add_region_sums(
    x, y, mask, groups, sums, N, C, R, span,
    x_image, x_class, x_voxel, y_image, y_class, y_voxel, mask_image, mask_voxel,
    group_image, group_class, group_voxel,
    ACTIVATION: tl.constexpr, OVERLAP: tl.constexpr, POWER: tl.constexpr, ENTROPY: tl.constexpr,
    FOCAL: tl.constexpr, KEEP: tl.constexpr, SHARE: tl.constexpr, CONFIDENT: tl.constexpr, SPLIT: tl.constexpr,
    MAPS: tl.constexpr, IGNORE: tl.constexpr, MASK: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
    VOXELS: tl.constexpr, RUN: tl.constexpr, EACH: tl.constexpr, JOINT: tl.constexpr,
):  # fmt: skip
    """Add the sums of the program's `span` voxels to its table (ROWS, C, R), which holds zeros."""
    program = tl.program_id(0).to(tl.int64)
    image = tl.program_id(1).to(tl.int64)
    x += image * x_image
    y += image * y_image
    mask += image * mask_image
    groups += image * group_image
    sums += (image * tl.num_programs(0) + program) * ROWS * C * R
    real = tl.arange(0, CLASSES) < C
    start = program * span
    end = tl.minimum(start + span, N)
    while start < end:
        voxels, exists = places(start, N, VOXELS, RUN)
        label, inside = taking_part(y, mask, voxels, y_voxel, mask_voxel, C, exists, MAPS, IGNORE, MASK)
        number, inside = _regions_of(groups, voxels, group_class, group_voxel, C, R, exists, inside, EACH, CLASSES)
        part, peak, rest = read_logits(
            x, voxels, x_class, x_voxel, C, exists, inside, True, ACTIVATION, CLASSES, 1, VOXELS
        )
        target = targets(
            label, y, tl.arange(0, CLASSES), voxels, y_class, y_voxel, C, exists, inside, MAPS, True
        )  # fmt: skip
        both, size, volume, entropy, confidence, counted, background = values_of(
            part, target, inside.to(tl.float32)[None, :], real, peak, rest,
            ACTIVATION, OVERLAP, POWER, ENTROPY, FOCAL, KEEP, SHARE, CONFIDENT, SPLIT,
        )  # fmt: skip
        if JOINT and ENTROPY:
            entropy = tl.zeros_like(entropy) + tl.sum(tl.where(real[:, None], entropy, 0.0), 0)[None, :]
        waiting = tl.where(inside[None, :] & (real[:, None] if EACH else True), number, R)
        region = tl.min(tl.min(waiting, 1), 0)
        while region < R:
            here = waiting == region
            rows = rows_of(
                tl.where(here, both, 0.0), tl.where(here, size, 0.0), tl.where(here, volume, 0.0),
                tl.where(here, entropy, 0.0), tl.where(here, confidence, 0.0), tl.where(here, counted, 0.0),
                tl.where(here, background, 0.0), OVERLAP, ENTROPY, CONFIDENT, SPLIT,
            )  # fmt: skip
            _add_rows(sums, region, rows, C, R, ROWS, CLASSES)
            waiting = tl.where(here, R, waiting)
            region = tl.min(tl.min(waiting, 1), 0)
        start += VOXELS


@triton.jit(do_not_specialize=["R"])  # another number in every batch must not compile anew
def write_region_gradient(
    x, y, mask, groups, gradient, out, N, C, R,
    x_image, x_class, x_voxel, y_image, y_class, y_voxel, mask_image, mask_voxel,
    group_image, group_class, group_voxel, out_image, out_class, out_voxel,
    ACTIVATION: tl.constexpr, OVERLAP: tl.constexpr, POWER: tl.constexpr, ENTROPY: tl.constexpr,
    FOCAL: tl.constexpr, KEEP: tl.constexpr, SHARE: tl.constexpr, CONFIDENT: tl.constexpr, SPLIT: tl.constexpr,
    MAPS: tl.constexpr, IGNORE: tl.constexpr, MASK: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
    VOXELS: tl.constexpr, RUN: tl.constexpr, EACH: tl.constexpr, JOINT: tl.constexpr,
):  # fmt: skip
    """Write d loss / d logits; `gradient` holds d loss / d statistics, (ROWS, C, R) of each image."""
    image = tl.program_id(1).to(tl.int64)
    x += image * x_image
    y += image * y_image
    mask += image * mask_image
    groups += image * group_image
    out += image * out_image
    gradient += image * ROWS * C * R
    classes = tl.arange(0, CLASSES)
    voxels, exists = places(tl.program_id(0).to(tl.int64) * VOXELS, N, VOXELS, RUN)
    label, inside = taking_part(y, mask, voxels, y_voxel, mask_voxel, C, exists, MAPS, IGNORE, MASK)
    number, inside = _regions_of(groups, voxels, group_class, group_voxel, C, R, exists, inside, EACH, CLASSES)
    part, peak, rest = read_logits(x, voxels, x_class, x_voxel, C, exists, inside, True, ACTIVATION, CLASSES, 1, VOXELS)
    target = targets(label, y, classes, voxels, y_class, y_voxel, C, exists, inside, MAPS, True)
    real = (classes < C)[:, None] & inside[None, :]
    overlap, size, cross, confidence, background = pulls_at(
        gradient, classes[:, None] * R + number, real, C * R, OVERLAP, ENTROPY, CONFIDENT, SPLIT
    )
    if JOINT:
        cross = tl.sum(cross, 0)[None, :]
    p, slope = slope_of(
        part, target, peak, rest, classes < C, overlap, size, cross, confidence, background,
        ACTIVATION, OVERLAP, POWER, ENTROPY, FOCAL, KEEP, SHARE, CONFIDENT, SPLIT,
    )  # fmt: skip
    if ACTIVATION == 0:
        slope -= p * tl.sum(slope, 0)[None, :]
    store_gradient(out, slope, classes, voxels, out_class, out_voxel, C, exists, inside)
