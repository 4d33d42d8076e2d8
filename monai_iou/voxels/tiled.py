"""The tiled kernel: the reference's sums a few thousand voxels at a time, with the derivative written out.

It needs no compiler and runs on any device. It keeps the logits, the compact labels and nothing else for backward;
probabilities and one-hot labels exist for one tile at a time. See `reference.py` for the derivation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from monai_iou.voxels.reference import (
    COUNT,
    ROWS,
    PassSpec,
    Voxels,
    count_voxels,
    reduce_map,
    sum_dtype,
    tile_gradient,
    tile_maps,
    total_dtype,
)

# Elements (classes x voxels) of a tile: a handful of float32 temporaries of it stay inside the cache of a CPU core,
# and a GPU is kept busy by larger ones.
TILE_ELEMENTS = {"cpu": 3 << 16}
_OTHER_TILE_ELEMENTS = 1 << 24


def _tiles(logits: Tensor) -> list[tuple[int, slice]]:
    batch, classes, voxels = logits.shape
    size = max(1, TILE_ELEMENTS.get(logits.device.type, _OTHER_TILE_ELEMENTS) // classes)
    return [(b, slice(start, start + size)) for b in range(batch) for start in range(0, voxels, size)]


def add_tile(total: Tensor, voxels: Voxels, spec: PassSpec, image: int, part: slice) -> None:
    """Add the statistics of some voxels of an image to `total` (6, B, C, R)."""
    dtype = sum_dtype(voxels.logits)
    tile, target, valid = voxels.tile(image, part, dtype)
    groups = None if voxels.groups is None else voxels.groups[image, part]
    for row, values in tile_maps(tile, target, valid, spec):
        total[row, image] += reduce_map(values, groups, voxels.regions, dtype)
    total[COUNT, image] += count_voxels(tile, valid, groups, voxels.regions, dtype)


def write_gradient(out: Tensor, gradient: Tensor, voxels: Voxels, spec: PassSpec, image: int, part: slice) -> None:
    """Write d loss / d logits of some voxels of an image into `out` (B, C, N); `gradient` is (6, B, C, R)."""
    tile, target, valid = voxels.tile(image, part, gradient.dtype)
    slope = gradient[:, image]
    if voxels.groups is not None:
        slope = slope[:, :, voxels.groups[image, part].long()]
    out[image, :, part] = tile_gradient(tile, target, valid, slope, spec)


class _TiledSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, voxels: Voxels, spec: PassSpec) -> Tensor:
        batch, classes, _ = logits.shape
        total = torch.zeros((ROWS, batch, classes, voxels.regions), dtype=total_dtype(logits), device=logits.device)
        for image, part in _tiles(logits):
            add_tile(total, voxels, spec, image, part)
        ctx.spec, ctx.has_ignored, ctx.regions = spec, voxels.has_ignored, voxels.regions
        ctx.save_for_backward(logits, voxels.labels, voxels.maps, voxels.valid, voxels.groups)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, labels, maps, valid_voxels, group_map = ctx.saved_tensors
        voxels = Voxels(logits, labels, maps, valid_voxels, ctx.has_ignored, group_map, ctx.regions)
        gradient = gradient.to(sum_dtype(logits))
        out = torch.empty_like(logits)
        for image, part in _tiles(logits):
            write_gradient(out, gradient, voxels, ctx.spec, image, part)
        return out, None, None


def sums(voxels: Voxels, spec: PassSpec) -> Tensor:
    """Return the statistics (6, B, C, R) of `voxels`."""
    result: Tensor = _TiledSums.apply(voxels.logits, voxels, spec)
    return result
