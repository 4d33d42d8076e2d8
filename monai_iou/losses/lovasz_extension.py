r"""The Lovasz extension of the Jaccard loss and its gradient, from histograms of errors or from sorted errors.

With the errors :math:`e_v` of a class sorted from large to small, f voxels of the class's G and b others before it, a
voxel's derivative is the step of J = (f + b) / (G + b) that it causes (Berman et al. 2018):

.. code-block:: text

    dL/de = 1 / (G + b)                       for a voxel of the class
            (G - f) / ((G + b) (G + b + 1))   for another

so all it needs to know of the other voxels is f and b at its error, which cumulated histograms hold at the cells'
edges. Inside a cell with n_f and n_b voxels, f and b rise from one edge to the other as if the voxels were spread
evenly (of the n_b others a voxel meets n_b - 1: it is not before itself); the derivative is taken at both edges and
interpolated. In a cell with one voxel that is exact.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from monai_iou import scores
from monai_iou.distributed import fails_together, is_distributed, sum_over_ranks
from monai_iou.voxels import histograms as hist
from monai_iou.voxels import huge_pages, in_place
from monai_iou.voxels.error_bins import (
    ErrorSpace,
    ErrorSpec,
    ErrorTile,
    errors_of,
    largest_error,
    numbered_tiles,
    tile_errors,
    tile_voxels,
)
from monai_iou.voxels.histograms import ErrorHistograms
from monai_iou.voxels.inputs import Tile, Voxels, sum_dtype, total_dtype
from monai_iou.voxels.labels import narrowed
from monai_iou.voxels.spec import PassSpec
from monai_iou.voxels.tiling import in_runs, run_tasks


def error_slopes(histograms: ErrorHistograms) -> tuple[Tensor, Tensor]:
    """Return dL/dp at the large end of each cell and its change across the cell, both shaped as the counts.

    An error falls as the output of the voxel's own class rises: of voxels of the class it is -dL/de, of others dL/de.
    """
    dtype = total_dtype(histograms.counts)
    inside, outside = histograms.foreground.to(dtype), histograms.background.to(dtype)
    volume = inside.sum(-1, keepdim=True)
    f, b = inside.cumsum(-1) - inside, outside.cumsum(-1) - outside  # before the cell

    def at(f: Tensor, b: Tensor, others: Tensor) -> Tensor:
        of_class = -1 / (volume + b).clamp_min(1)
        met = volume + others
        return torch.stack([(volume - f) / (met * (met + 1)).clamp_min(1), of_class], dim=2)

    start = at(f, b, b)
    rise = at(f + inside, b + outside, b + (outside - 1).clamp_min(0)) - start
    # An absent class: L is the largest error, whose voxels share the derivative.
    first = (volume == 0) & (b == 0) & (outside > 0)
    start[:, :, 0] = torch.where(first, 1 / outside.clamp_min(1), start[:, :, 0])
    nan_cell = start.new_zeros((*start.shape[:-1], 1))
    dtype = histograms.limit.dtype
    return torch.cat([start, nan_cell], -1).to(dtype), torch.cat([rise, nan_cell], -1).to(dtype)


class _WithSlopes(torch.autograd.Function):
    """The identity on values computed from histograms, whose derivative by the logits is read from tables, and on sums.

    Every rank that shares the histograms computes the same loss of them. DistributedDataParallel divides the sum of the
    ranks' gradients by their number W; `scale` = W makes up for it, so no collective is needed here.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        value: Tensor,
        rows: Tensor,
        voxels: Voxels,
        spec: ErrorSpec,
        sums: PassSpec | None,
        histograms: ErrorHistograms,
        scale: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.spec, ctx.sums, ctx.has_ignored, ctx.scale = spec, sums, voxels.has_ignored, scale
        start, rise = error_slopes(histograms)
        labels = narrowed(voxels.labels, logits.shape[1])
        ctx.save_for_backward(logits, labels, voxels.maps, voxels.valid, start, rise, histograms.limit)
        return value.clone(), rows.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, of_rows: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # of create_graph=True; a missing second derivative would pass for a zero
            message = (
                "Expected a backward pass without create_graph=True, because a Lovasz loss with bins has no second "
                "derivative: take bins=None."
            )
            raise RuntimeError(message)
        logits, labels, maps, valid, start, rise, limit = ctx.saved_tensors
        voxels = Voxels(logits, labels, maps, valid, ctx.has_ignored, None, 1)
        batch = len(logits)
        factor = (gradient * ctx.scale).to(start.dtype)[:, :, None, None]
        # the last place, of ignored voxels, is read as 0
        start, rise = (F.pad((table * factor).flatten(1), (0, 1)) for table in (start, rise))
        start, rise, limit = (table.expand(batch, -1) for table in (start, rise, limit))
        out = huge_pages.empty_like(logits)
        size = tile_voxels(logits)
        places = [place for image in out.unbind() for place in image.split(size, -1)] if out.numel() else []
        tiles = [(*tile, place) for tile, place in zip(numbered_tiles(voxels), places, strict=True)]

        sums, of_images = ctx.sums, of_rows.to(start.dtype).unsqueeze(-1).unbind(1)

        def work(task: list[tuple[int, Tile, Tensor]]) -> None:
            space = ErrorSpace.of(logits)
            beside = None if sums is None else in_place.Workspace.for_gradient(logits, sums, size)
            for image, part, place in task:
                tile = tile_errors(part, ctx.spec, limit[image], space)
                slope, change = (space.map(number, tile.p.shape[1]) for number in (3, 4))
                torch.index_select(start[image], 0, tile.index, out=slope.view(-1))
                torch.index_select(rise[image], 0, tile.index, out=change.view(-1))
                slope.add_(change.mul_(tile.position.frac_()))
                slope = _logit_gradient(tile, slope, space.line, ctx.spec)
                if sums is not None and beside is not None:
                    in_place.write_gradient(change, of_images[image].unbind(), part, sums, beside)
                    slope.add_(change)
                place.copy_(slope)

        run_tasks(work, logits, in_runs(tiles))
        return out, *[None] * 7


def _logit_gradient(tile: ErrorTile, slope: Tensor, line: Tensor, spec: ErrorSpec) -> Tensor:
    """Return dL / d logits (C, n) of a tile from dL / dp; slope, line and the tile are overwritten."""
    p = tile.p
    if spec.activation == "softmax":
        total = torch.sum(slope.mul_(p), 0, keepdim=True, out=line[:, : p.shape[1]])
        slope.sub_(p.mul_(total))
    elif spec.activation == "sigmoid":
        slope.mul_(p).mul_(p.neg_().add_(1))
    elif tile.active is not None:
        slope.mul_(tile.active)
    return slope if tile.valid is None else slope.mul_(tile.valid)


def histogram_lovasz(
    voxels: Voxels,
    spec: ErrorSpec,
    target: Tensor,
    ignore_index: int | None,
    *,
    batch: bool,
    sync: bool,
    sums: PassSpec | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the values and the classes' volumes, (B, C), or (1, C) over the batch, and the `sums` (6, B, C) beside."""
    sync = sync and is_distributed()
    logits = voxels.logits
    with torch.no_grad():
        limit = logits.new_ones((1, 1), dtype=sum_dtype(logits))
        if spec.activation == "hinge":
            limit = largest_error(voxels, spec)
            if batch:
                limit = torch.cat([limit, limit.new_zeros((1, 1))]).amax(0, keepdim=True)
            if sync:
                dist.all_reduce(limit, op=dist.ReduceOp.MAX)
        with fails_together(sync, logits):
            histograms, rows = hist.count_errors_and_sums(voxels, spec, limit, sums)
            count = histograms.counts.sum((2, 3))
            volume = hist.report_bad_targets(histograms.volume, count, target, voxels, ignore_index)
        if batch:
            histograms, volume = histograms.over_batch(), volume.sum(0, keepdim=True)
        if sync:
            histograms = ErrorHistograms(sum_over_ranks(histograms.counts), limit)
            volume = sum_over_ranks(volume)
        value = (scores.lovasz(histograms) + 0 * volume).to(limit.dtype)  # volumes are NaN where labels are wrong
    if torch.is_grad_enabled() and logits.requires_grad:
        scale = dist.get_world_size() if sync else 1
        value, rows = _WithSlopes.apply(logits, value, rows, voxels, spec, sums, histograms, scale)
    return value, volume, rows


def lovasz_extension(errors: Tensor, foreground: Tensor) -> Tensor:
    """Return the Lovasz extension of the Jaccard loss at `errors` (N,), exactly, by sorting; `foreground` is 0 or 1.

    Differentiable; equal errors are taken in the order that the sort leaves them in.
    """
    if errors.numel() == 0:
        return errors.sum()
    errors, order = errors.sort(descending=True)
    foreground = foreground[order]
    union = foreground.sum() + (1 - foreground).cumsum(0)
    jaccard = 1 - (foreground.sum() - foreground.cumsum(0)) / union
    steps = torch.cat([jaccard[:1], jaccard[1:] - jaccard[:-1]])
    return (errors * steps).sum()  # a product of vectors would be rounded under autocast


def sorted_lovasz(
    voxels: Voxels, spec: ErrorSpec, target: Tensor, ignore_index: int | None, *, batch: bool
) -> tuple[Tensor, Tensor]:
    """Return what `histogram_lovasz` does, exactly."""
    logits, classes, valid = voxels.tile(slice(None), slice(None), sum_dtype(voxels.logits))
    voxel_count = torch.full_like(classes[..., 0], classes.shape[-1])
    count = voxel_count if valid is None else valid.sum(-1).expand_as(voxel_count)
    volume = hist.report_bad_targets(classes.sum(-1), count, target, voxels, ignore_index)
    errors = errors_of(logits, classes, spec.activation)[1]
    if batch:
        errors, classes = (rows.transpose(0, 1).flatten(1).unsqueeze(0) for rows in (errors, classes))
        valid = None if valid is None else valid.transpose(0, 1).flatten(1).unsqueeze(0)
        volume = volume.sum(0, keepdim=True)
    values = errors.new_zeros(volume.shape)
    rows = []
    for image, (image_errors, image_classes) in enumerate(zip(errors, classes, strict=True)):
        keep = slice(None) if valid is None else valid[image, 0] != 0
        pairs = zip(image_errors, image_classes, strict=True)
        rows.append(torch.stack([lovasz_extension(error[keep], label[keep]) for error, label in pairs]))
    return (torch.stack(rows) if rows else values + errors.sum()) + 0 * volume.to(errors.dtype), volume
