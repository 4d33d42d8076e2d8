"""The tiled kernel: the reference's sums a few thousand voxels at a time, with the derivative written out.

It needs no compiler and runs on any device. It keeps the logits, the compact labels and nothing else for backward;
probabilities and one-hot labels exist for one tile at a time. See `reference.py` for the derivation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

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
from monai_iou.voxels.threads import in_threads

_Result = TypeVar("_Result")

# Elements (classes x voxels) of a tile: on a CPU a handful of temporaries of it stay inside the cache of a core.
TILE_ELEMENTS = {"cpu": 1 << 16}
_OTHER_TILE_ELEMENTS = 1 << 24
_TILES_A_TASK = 16


def _tasks(logits: Tensor) -> list[list[tuple[int, slice]]]:
    """Return runs of (image, voxels), cut the same way however many threads there are: sums keep their bits."""
    batch, classes, voxels = logits.shape
    size = max(1, TILE_ELEMENTS.get(logits.device.type, _OTHER_TILE_ELEMENTS) // classes)
    tiles = [(b, slice(start, start + size)) for b in range(batch) for start in range(0, voxels, size)]
    return [tiles[start : start + _TILES_A_TASK] for start in range(0, len(tiles), _TILES_A_TASK)]


def _run(work: Callable[[list[tuple[int, slice]]], _Result], logits: Tensor) -> list[_Result]:
    tasks = _tasks(logits)
    return in_threads(work, tasks) if logits.device.type == "cpu" else [work(task) for task in tasks]


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

        def work(task: list[tuple[int, slice]]) -> Tensor:
            share = torch.zeros_like(total)
            for image, part in task:
                add_tile(share, voxels, spec, image, part)
            return share

        for share in _run(work, logits):
            total += share
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

        def work(task: list[tuple[int, slice]]) -> None:
            for image, part in task:
                write_gradient(out, gradient, voxels, ctx.spec, image, part)

        _run(work, logits)
        return out, None, None


def sums(voxels: Voxels, spec: PassSpec) -> Tensor:
    """Return the statistics (6, B, C, R) of `voxels`."""
    result: Tensor = _TiledSums.apply(voxels.logits, voxels, spec)
    return result
