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

from monai_iou.voxels import in_place, memory
from monai_iou.voxels.labels import narrowed
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

Result = TypeVar("Result")
Task = list[tuple[int, slice]]  # tiles, as (image, voxels)

# Elements (classes x voxels) of a tile: on a CPU a handful of temporaries of it stay inside the cache of a core.
TILE_ELEMENTS = {"cpu": 1 << 16}
_OTHER_TILE_ELEMENTS = 1 << 24
_TILES_A_TASK = 4


def tile_tasks(logits: Tensor, factor: int = 1) -> tuple[int, list[Task]]:
    """Return the most voxels of a tile, and runs of tiles; `factor` makes them larger."""
    batch, classes, voxels = logits.shape
    size = max(1, factor * TILE_ELEMENTS.get(logits.device.type, _OTHER_TILE_ELEMENTS) // classes)
    tiles = [(b, slice(start, start + size)) for b in range(batch) for start in range(0, voxels, size)]
    return size, [tiles[start : start + _TILES_A_TASK] for start in range(0, len(tiles), _TILES_A_TASK)]


def run_tasks(work: Callable[[Task], Result], logits: Tensor, tasks: list[Task]) -> list[Result]:
    """Return the results of `work`, in order; threads share it on a CPU."""
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
        lean = in_place.covers(voxels, spec)
        size, tasks = tile_tasks(logits, in_place.SUMS_FACTOR if lean else 1)

        def work(task: Task) -> Tensor:
            if not lean:
                share = torch.zeros_like(total)
                for image, part in task:
                    add_tile(share, voxels, spec, image, part)
                return share
            space = in_place.Workspace.for_sums(logits, spec, size)
            tiles = torch.zeros((len(task), ROWS, classes), dtype=space.maps.dtype, device=logits.device)
            for row, (image, part) in zip(tiles, task, strict=True):
                in_place.add_tile(row, voxels, spec, image, part, space)
            return tiles

        # The parts add up in the same order however many threads there are: sums keep their bits.
        for task, share in zip(tasks, run_tasks(work, logits, tasks), strict=True):
            if not lean:
                total += share
                continue
            for (image, _), tile in zip(task, share, strict=True):
                total[:, image, :, 0] += tile
        ctx.spec, ctx.has_ignored, ctx.regions = spec, voxels.has_ignored, voxels.regions
        # Wrong labels may wrap round here; their error follows the sums, and no backward does.
        ctx.save_for_backward(logits, narrowed(voxels.labels, classes), voxels.maps, voxels.valid, voxels.groups)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, labels, maps, valid_voxels, group_map = ctx.saved_tensors
        voxels = Voxels(logits, labels, maps, valid_voxels, ctx.has_ignored, group_map, ctx.regions)
        gradient = gradient.to(sum_dtype(logits))
        out = memory.empty_like(logits)
        lean = in_place.covers(voxels, ctx.spec)
        size, tasks = tile_tasks(logits, in_place.gradient_factor(logits, ctx.spec) if lean else 1)

        def work(task: Task) -> None:
            space = in_place.Workspace.for_gradient(logits, ctx.spec, size) if lean else None
            for image, part in task:
                if space is None:
                    write_gradient(out, gradient, voxels, ctx.spec, image, part)
                else:
                    in_place.write_gradient(out, gradient, voxels, ctx.spec, image, part, space)

        run_tasks(work, logits, tasks)
        return out, None, None


def sums(voxels: Voxels, spec: PassSpec) -> Tensor:
    """Return the statistics (6, B, C, R) of `voxels`."""
    result: Tensor = _TiledSums.apply(voxels.logits, voxels, spec)
    return result
