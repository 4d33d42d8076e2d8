"""The tiled kernel: the reference's sums a few thousand voxels at a time, with the derivative written out.

What :class:`_TiledSums` does needs no compiler and runs on any device. It keeps the logits, the compact labels and
nothing else for backward; probabilities and one-hot labels exist for one tile at a time. See `formulas.py` for the
derivation. On a CPU the loops of `numba_pass.py` go first, where they cover an input.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from monai_iou.voxels import huge_pages, in_place, numba_pass
from monai_iou.voxels.general_tiles import add_tile, write_gradient
from monai_iou.voxels.inputs import Voxels, sum_dtype, total_dtype
from monai_iou.voxels.labels import narrowed
from monai_iou.voxels.single_backward import once_differentiable
from monai_iou.voxels.spec import ROWS, PassSpec
from monai_iou.voxels.tiling import Task, run_tasks, tile_size, tile_tasks


class _TiledSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, voxels: Voxels, spec: PassSpec) -> Tensor:
        batch, classes, _ = logits.shape
        total = torch.zeros((ROWS, batch, classes, voxels.regions), dtype=total_dtype(logits), device=logits.device)

        def work(task: Task) -> Tensor:
            share = torch.zeros_like(total)
            for image, part in task:
                add_tile(share, voxels, spec, image, part)
            return share

        if logits.numel() and in_place.covers(voxels, spec):
            total[..., 0] = in_place.sums(voxels, spec)
        else:
            for share in run_tasks(work, logits, tile_tasks(logits, tile_size(logits))):
                total += share
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
        out = huge_pages.empty_like(logits)

        def work(task: Task) -> None:
            for image, part in task:
                write_gradient(out, gradient, voxels, ctx.spec, image, part)

        if logits.numel() and in_place.covers(voxels, ctx.spec):
            in_place.write_gradients(out, gradient, voxels, ctx.spec)
        else:
            run_tasks(work, logits, tile_tasks(logits, tile_size(logits)))
        return out, None, None


def compute_sums(voxels: Voxels, spec: PassSpec) -> Tensor:
    """Return the statistics (7, B, C, R) of `voxels`."""
    voxels = voxels.compact()
    if spec.overlap == "min_max" and spec.activation is not None and voxels.labels is not None:
        spec = replace(spec, overlap="product")  # of a hard label y and p in [0, 1], min(p, y) = p y
    if numba_pass.covers(voxels, spec):
        return numba_pass.compute_sums(voxels, spec)
    result: Tensor = _TiledSums.apply(voxels.logits, voxels, spec)
    return result
