"""The pass of `binary.py` and `binary_gradient.py` over a whole batch, in threads.

The probabilities are as large as one class's logits, and the gradient as all of them. So the forward pass writes the
probabilities where the gradient will stand, and the first backward pass turns them into it: a third of the arithmetic
is saved, at no more memory at the peak. A further backward pass (`retain_graph=True`) computes them again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from monai_iou.voxels import binary, binary_gradient, huge_pages
from monai_iou.voxels.inputs import Tile, Voxels, sum_dtype, total_dtype
from monai_iou.voxels.labels import narrowed
from monai_iou.voxels.scratch import Spare
from monai_iou.voxels.single_backward import once_differentiable
from monai_iou.voxels.spec import PassSpec
from monai_iou.voxels.tiling import in_runs, lengths_of_tiles, run_large_tasks

_TILES_PER_TASK = 2  # few enough that the last thread to end is not waited for


def covers(voxels: Voxels, spec: PassSpec) -> bool:
    """Return whether this pass computes what `spec` asks for."""
    logits = voxels.logits
    one = logits.shape[1] == 1 and spec.activation == "sigmoid" and voxels.maps is not None
    two = logits.shape[1] == 2 and spec.activation == "softmax" and voxels.labels is not None
    return (
        (one or two)
        and logits.device.type == "cpu"
        and logits.numel() > 0
        and voxels.groups is None
        and (spec.power == 1 or (spec.power == 2 and not spec.confidence))
    )


def _sums(voxels: Voxels, spec: PassSpec, kept: Tensor | None) -> tuple[Tensor, list[list[bool]]]:
    """Return the statistics (7, B, C), and of each tile whether p in the last class of `kept` serves the gradient."""
    size = binary.tile_size(spec, voxels.logits.shape[1])
    cuts = lengths_of_tiles(voxels.logits.shape[2], size)
    images = voxels.tiles(cuts)
    tiles: list[tuple[Tile, Tensor | None]] = []
    for image, parts in enumerate(images):
        places: Iterable[Tensor | None] = itertools.repeat(None) if kept is None else kept[image, -1].split(cuts)
        tiles += zip(parts, places, strict=False)

    spare = Spare(voxels.logits, size)

    def work(task: list[tuple[Tile, Tensor | None]]) -> list[tuple[binary.Rows, bool]]:
        rows_of_tiles = []
        with spare.lines() as lines:
            for tile, place in task:
                lines.length = tile.logits.shape[1]
                rows_of_tiles.append(binary.add_tile(tile, spec, lines["p"] if place is None else place, lines))
        return rows_of_tiles

    tile_results = [pair for task in run_large_tasks(work, in_runs(tiles, _TILES_PER_TASK)) for pair in task]
    lengths = [len(tiles) for tiles in images]
    rows = torch.tensor([rows for rows, _ in tile_results], dtype=total_dtype(voxels.logits), device="cpu").split(
        lengths
    )
    serve = iter([serves for _, serves in tile_results])
    return torch.stack([part.sum(0) for part in rows], 1), [[next(serve) for _ in range(n)] for n in lengths]


def _write_gradient(
    out: Tensor, gradient: Tensor, voxels: Voxels, spec: PassSpec, serve: list[list[bool]], *, kept: bool
) -> None:
    """Write the gradient into `out`, which holds the probabilities of the tiles if they are `kept`."""
    size = binary.tile_size(spec, out.shape[1])
    cuts = lengths_of_tiles(out.shape[2], size)
    pulls = gradient.squeeze(-1).transpose(0, 1).tolist()
    tiles = [
        (pull, *part)
        for pull, image, place, serves in zip(pulls, voxels.tiles(cuts), out.unbind(), serve, strict=True)
        for part in zip(image, place.split(cuts, -1), serves, strict=True)
    ]

    spare = Spare(out, size)

    def work(task: list[tuple[binary.Rows, Tile, Tensor, bool]]) -> None:
        with spare.lines() as lines:
            for pull, tile, place, serves in task:
                lines.length = place.shape[1]
                p = place[-1] if kept and serves else None
                binary_gradient.write_gradient(place, pull, tile, spec, p, lines, by_smaller=not serves)

    run_large_tasks(work, in_runs(tiles, _TILES_PER_TASK))


class _BinarySums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, voxels: Voxels, spec: PassSpec, keeps: bool) -> Tensor:
        ctx.kept = huge_pages.empty_like(logits) if keeps else None
        total, ctx.serve = _sums(voxels, spec, ctx.kept)
        ctx.spec, ctx.has_ignored = spec, voxels.has_ignored
        # Wrong labels may wrap round here; their error follows the sums, and no backward does.
        ctx.save_for_backward(logits, narrowed(voxels.labels, logits.shape[1]), voxels.maps, voxels.valid)
        return total.unsqueeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        logits, labels, maps, valid = ctx.saved_tensors
        voxels = Voxels(logits, labels, maps, valid, ctx.has_ignored, None, 1)
        kept, ctx.kept = ctx.kept, None
        out = huge_pages.empty_like(logits) if kept is None else kept
        _write_gradient(out, gradient, voxels, ctx.spec, ctx.serve, kept=kept is not None)
        return out, None, None, None


def compute_sums(voxels: Voxels, spec: PassSpec) -> Tensor:
    """Return the statistics (7, B, C, 1) of `voxels`."""
    logits = voxels.logits
    keeps = torch.is_grad_enabled() and logits.requires_grad and logits.dtype == sum_dtype(logits)
    result: Tensor = _BinarySums.apply(logits, voxels, spec, keeps)
    return result
