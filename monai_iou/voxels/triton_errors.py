"""The Triton programs of the Lovasz losses: one read to count errors, one read and one write for their gradient.

The cells are those of `error_bins.py`. The sums that other losses need of the same voxels come from the same read, by
the formulas of `triton_programs.py`.

.. code-block:: text

    u = sqrt(1 - e),  1 - e = p of voxels of the class, 1 - p of others        each with its digits
    u = sqrt(max(0, 1 - e / limit)),  e = max(0, 1 - s x)                      hinge, s = 1 or -1
    place = M u + 1/2,  cell = floor(place),  M = cells - 2                    NaN: the cell behind the last
    dL/dp = start[cell] + (place - cell) rise[cell]

Several tables of counts share the work of adding: programs add whole numbers, which are the same in any order. The last
cell, where nearly all voxels of a trained network are, is counted in registers and added once.
"""

# Triton reads the bodies of its kernels by rules of its own; their arguments have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from monai_iou.voxels.triton_formulas import probability, pulls_of, slope_of
from monai_iou.voxels.triton_programs import store_gradient, store_rows, sums_of
from monai_iou.voxels.triton_reading import places, read_logits, taking_part, targets


@triton.jit
def _place_of(x, target, real, peak, rest, limit, ACTIVATION: tl.constexpr, CELLS: tl.constexpr):
    """Return which voxels are of the class, their place among the cells, and a factor of the gradient.

    The factor is p of a softmax, dp/dx of a sigmoid, and 1 or 0 of the hinge, where the error is above 0 or not.
    """
    own = target > 0.5
    factor = x * 0 + 1.0
    if ACTIVATION == 3:
        error = 1.0 - tl.where(own, x, -x)
        none = tl.where(error == error, 0.0, error)
        factor = tl.where(error > 0, 1.0, 0.0)
        u = 1.0 - tl.where(error > 0, error, none) / limit
        u = tl.where(u < 0, 0.0, u)
    else:
        p, q, _, _ = probability(x, real, peak, rest, ACTIVATION, False)
        u = tl.abs(tl.where(own, p, q))
        u = tl.where(u > 1, 1.0, u)  # a softmax in half precision may go beyond
        if ACTIVATION == 0:
            factor = p
        if ACTIVATION == 1:
            factor = p * q
    place = tl.sqrt_rn(u) * (CELLS - 2) + 0.5
    return own, tl.where(place == place, place, CELLS - 0.5), factor


@triton.jit
def count_errors(
    x, y, mask, limit, counts, sums, N, C, TABLES,
    x_image, x_class, x_voxel, y_image, y_class, y_voxel, mask_image, mask_voxel,
    ACTIVATION: tl.constexpr, OVERLAP: tl.constexpr, POWER: tl.constexpr, ENTROPY: tl.constexpr,
    FOCAL: tl.constexpr, KEEP: tl.constexpr, SHARE: tl.constexpr, CONFIDENT: tl.constexpr, SPLIT: tl.constexpr,
    MAPS: tl.constexpr, IGNORE: tl.constexpr, MASK: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
    BLOCKS: tl.constexpr, VOXELS: tl.constexpr, RUN: tl.constexpr, CHUNKS: tl.constexpr, CELLS: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    """Add a program's voxels to a table of counts (C, 2, CELLS), and write their sums, (ROWS, C), if asked."""
    program = tl.program_id(0).to(tl.int64)
    image = tl.program_id(1).to(tl.int64)
    x += image * x_image
    y += image * y_image
    mask += image * mask_image
    counts += (image * TABLES + program % TABLES) * C * 2 * CELLS
    sums += (image * tl.num_programs(0) + program) * ROWS * C
    largest = tl.load(limit + image)
    HAS_IGNORED: tl.constexpr = MASK or (IGNORE is not None)
    classes = tl.arange(0, CLASSES)
    real = classes < C
    first = classes[:, None] * 2 * CELLS
    rows = tl.zeros((8, CLASSES), tl.float32)
    last_of_others = tl.zeros((CLASSES,), tl.int32)
    last_of_class = tl.zeros((CLASSES,), tl.int32)
    start = program * VOXELS * CHUNKS
    end = tl.minimum(start + VOXELS * CHUNKS, N)
    while start < end:
        voxels, exists = places(start, N, VOXELS, RUN)
        label, inside = taking_part(y, mask, voxels, y_voxel, mask_voxel, C, exists, MAPS, IGNORE, MASK)
        part, peak, rest = read_logits(
            x, voxels, x_class, x_voxel, C, exists, inside, HAS_IGNORED, ACTIVATION, CLASSES, BLOCKS, VOXELS
        )
        target = targets(label, y, classes, voxels, y_class, y_voxel, C, exists, inside, MAPS, HAS_IGNORED)
        own, place, _ = _place_of(part, target, real, peak, rest, largest, ACTIVATION, CELLS)
        cell = place.to(tl.int32)
        counted = real[:, None] & inside[None, :]
        last = cell == CELLS - 2
        last_of_others += tl.sum((counted & last & (own == 0)).to(tl.int32), 1)
        last_of_class += tl.sum((counted & last & own).to(tl.int32), 1)
        tl.atomic_add(
            counts + first + own.to(tl.int32) * CELLS + cell, cell * 0 + 1, mask=counted & (last == 0), sem="relaxed"
        )
        if SUMS:
            rows += sums_of(part, target, inside.to(tl.float32), real, peak, rest,
                            ACTIVATION, OVERLAP, POWER, ENTROPY, FOCAL, KEEP, SHARE, CONFIDENT, SPLIT)  # fmt: skip
        start += VOXELS
    last_cells = counts + classes * 2 * CELLS + CELLS - 2
    tl.atomic_add(last_cells, last_of_others, mask=real, sem="relaxed")
    tl.atomic_add(last_cells + CELLS, last_of_class, mask=real, sem="relaxed")
    if SUMS:
        store_rows(sums, rows, classes, C, ROWS)


@triton.jit
def write_error_gradient(
    x, y, mask, limit, starts, rises, gradient, out, N, C,
    x_image, x_class, x_voxel, y_image, y_class, y_voxel, mask_image, mask_voxel,
    out_image, out_class, out_voxel,
    ACTIVATION: tl.constexpr, OVERLAP: tl.constexpr, POWER: tl.constexpr, ENTROPY: tl.constexpr,
    FOCAL: tl.constexpr, KEEP: tl.constexpr, SHARE: tl.constexpr, CONFIDENT: tl.constexpr, SPLIT: tl.constexpr,
    MAPS: tl.constexpr, IGNORE: tl.constexpr, MASK: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
    BLOCKS: tl.constexpr, VOXELS: tl.constexpr, RUN: tl.constexpr, CHUNKS: tl.constexpr, CELLS: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    """Write d loss / d logits from tables of dL/dp by cell, (C, 2, CELLS), and d loss / d statistics, (ROWS, C)."""
    image = tl.program_id(1).to(tl.int64)
    x += image * x_image
    y += image * y_image
    mask += image * mask_image
    out += image * out_image
    starts += image * C * 2 * CELLS
    rises += image * C * 2 * CELLS
    gradient += image * ROWS * C
    largest = tl.load(limit + image)
    HAS_IGNORED: tl.constexpr = MASK or (IGNORE is not None)
    classes = tl.arange(0, CLASSES)
    real = classes < C
    first = classes[:, None] * 2 * CELLS
    overlap, size, cross, confidence, background = pulls_of(gradient, classes, C, OVERLAP, ENTROPY, CONFIDENT, SPLIT)
    start = tl.program_id(0).to(tl.int64) * VOXELS * CHUNKS
    end = tl.minimum(start + VOXELS * CHUNKS, N)
    while start < end:
        voxels, exists = places(start, N, VOXELS, RUN)
        label, inside = taking_part(y, mask, voxels, y_voxel, mask_voxel, C, exists, MAPS, IGNORE, MASK)
        part, peak, rest = read_logits(
            x, voxels, x_class, x_voxel, C, exists, inside, HAS_IGNORED, ACTIVATION, CLASSES, BLOCKS, VOXELS
        )
        target = targets(label, y, classes, voxels, y_class, y_voxel, C, exists, inside, MAPS, HAS_IGNORED)
        own, place, factor = _place_of(part, target, real, peak, rest, largest, ACTIVATION, CELLS)
        counted = real[:, None] & inside[None, :]
        cell = place.to(tl.int32)
        index = first + own.to(tl.int32) * CELLS + cell
        slope = tl.load(starts + index, mask=counted, other=0.0)
        slope += (place - cell.to(tl.float32)) * tl.load(rises + index, mask=counted, other=0.0)
        slope = tl.where(real[:, None], slope * factor, 0.0)
        if SUMS:
            _, other = slope_of(
                part, target, peak, rest, real, overlap, size, cross, confidence, background,
                ACTIVATION, OVERLAP, POWER, ENTROPY, FOCAL, KEEP, SHARE, CONFIDENT, SPLIT,
            )  # fmt: skip
            slope += other
        if ACTIVATION == 0:  # the factor is p
            slope -= factor * tl.sum(slope, 0)[None, :]
        store_gradient(out, slope, classes, voxels, out_class, out_voxel, C, exists, inside)
        start += VOXELS
