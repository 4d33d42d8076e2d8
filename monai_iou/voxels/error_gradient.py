r"""The gradient of the Lovasz extension of the Jaccard loss, read from histograms of errors.

With the errors :math:`e_v` of a class sorted from large to small, f voxels of the class's G and b others before it, a
voxel's derivative is the step of J = (f + b) / (G + b) that it causes (Berman et al. 2018):

.. code-block:: text

    dL/de = 1 / (G + b)                       for a voxel of the class
            (G - f) / ((G + b) (G + b + 1))   for another

so all it needs to know of the other voxels is f and b at its error, which cumulated histograms hold at the cells'
edges. Inside a cell with n_f and n_b voxels, f and b rise from one edge to the other as if the voxels were spread
evenly (of the n_b others a voxel meets n_b - 1: it is not before itself); the derivative is taken at both edges and
interpolated. In a cell with one voxel that is exact.

:func:`read_errors` counts; :func:`with_slopes` gives a loss of (pooled) counts that derivative. Between them runs a
tensor of zeros, `ErrorHistograms.slopes`, whose gradient is the table of dL/dp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_iou.voxels import binary_errors, huge_pages, in_place
from monai_iou.voxels.error_bins import ErrorSpace, ErrorSpec, ErrorTile, numbered_tiles, tile_errors, tile_voxels
from monai_iou.voxels.histograms import ErrorHistograms, count_errors_and_sums
from monai_iou.voxels.inputs import Tile, Voxels, total_dtype
from monai_iou.voxels.labels import narrowed
from monai_iou.voxels.single_backward import refuse_second_derivative
from monai_iou.voxels.spec import PassSpec
from monai_iou.voxels.tiling import in_runs, run_tasks


def error_slopes(histograms: ErrorHistograms) -> tuple[Tensor, Tensor]:
    """Return dL/dp at the large end of each cell and its change across the cell, both shaped as the counts.

    An error falls as the output of the voxel's own class rises: of voxels of the class it is -dL/de, of others dL/de.
    """
    dtype = total_dtype(histograms.counts)
    # Cumulated as whole numbers: with floating ones, torch's deterministic algorithms fail on a GPU.
    f, b = (counts.cumsum(-1) - counts for counts in (histograms.foreground, histograms.background))  # before the cell
    inside, outside, f, b = (counts.to(dtype) for counts in (histograms.foreground, histograms.background, f, b))
    volume = inside.sum(-1, keepdim=True)

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
    """The identity on values computed from histograms, whose derivative by the voxels' errors is read from tables."""

    @staticmethod
    def forward(ctx: Any, slopes: Tensor, value: Tensor, histograms: ErrorHistograms) -> Tensor:
        ctx.shape = slopes.shape
        ctx.save_for_backward(histograms.counts, histograms.limit)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        tables = torch.stack(error_slopes(ErrorHistograms(*ctx.saved_tensors)))
        return (tables * gradient.to(tables.dtype)[..., None, None]).expand(ctx.shape), None, None


def with_slopes(value: Tensor, histograms: ErrorHistograms) -> Tensor:
    """Return `value`, the Lovasz extension (B, C) of histograms, differentiable by the logits that were counted.

    Of histograms of a whole batch, (1, C), every image's voxels take their derivative.
    """
    if histograms.slopes is None or not histograms.slopes.requires_grad:
        return value
    result: Tensor = _WithSlopes.apply(histograms.slopes, value, histograms)
    return result


@dataclass(frozen=True)
class ErrorKernel:
    """What reads the voxels, once each way.

    Attributes:
        count: returns the histograms up to a limit, (1, 1) or (B, 1), and the statistics (7, B, C, 1).
        write_gradient: writes d loss / d logits from the tables of dL/dp by cell and d loss / d statistics.
    """

    count: Callable[[Voxels, PassSpec, Tensor], tuple[ErrorHistograms, Tensor]]
    write_gradient: Callable[[Tensor, Voxels, PassSpec, Tensor, Tensor, Tensor], None]


class _ErrorPass(torch.autograd.Function):
    """Statistics (7, B, C, 1), histograms, and the zeros whose gradient is dL/dp by cell: one reading each way."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, voxels: Voxels, spec: PassSpec, limit: Tensor, kernel: ErrorKernel
    ) -> tuple[Tensor, Tensor, Tensor]:
        histograms, rows = kernel.count(voxels, spec, limit)
        ctx.spec, ctx.kernel, ctx.marks = spec, kernel, (voxels.has_ignored, voxels.as_given, voxels.ignore_index)
        labels = voxels.labels if voxels.as_given else narrowed(voxels.labels, logits.shape[1])
        ctx.save_for_backward(logits, labels, voxels.maps, voxels.valid, limit)
        ctx.mark_non_differentiable(histograms.counts)
        slopes = limit.new_zeros((2, *histograms.counts.shape)) if ctx.needs_input_grad[0] else limit.new_zeros(0)
        return rows, slopes, histograms.counts

    @staticmethod
    def backward(ctx: Any, of_rows: Tensor, slopes: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        refuse_second_derivative()
        logits, labels, maps, valid, limit = ctx.saved_tensors
        has_ignored, as_given, ignore_index = ctx.marks
        voxels = Voxels(logits, labels, maps, valid, has_ignored, None, 1, as_given, ignore_index)
        out = huge_pages.empty_like(logits)
        limits = limit.expand(len(logits), 1)
        ctx.kernel.write_gradient(out, voxels, ctx.spec, limits, slopes, of_rows.to(limit.dtype))
        return out, None, None, None, None


def error_spec(spec: PassSpec) -> ErrorSpec:
    """Return the part of a specification that concerns errors."""
    assert spec.bins is not None
    return ErrorSpec(spec.activation, spec.bins)


def read_errors(
    voxels: Voxels, spec: PassSpec, limit: Tensor, kernel: ErrorKernel | None = None
) -> tuple[Tensor, ErrorHistograms]:
    """Return the statistics (7, B, C, 1) and the histograms of errors up to `limit`, (1, 1) or (B, 1).

    Differentiable: the statistics as they are, the histograms by :func:`with_slopes`. Without `kernel`, torch reads the
    voxels a tile at a time; they then have to be compact.
    """
    if kernel is None and binary_errors.covers(voxels, spec):
        found = binary_errors.read(voxels, error_spec(spec).cells, limit)
        if found is not None:
            return found
    rows, slopes, counts = _ErrorPass.apply(voxels.logits, voxels, spec, limit, kernel or TILED)
    return rows, ErrorHistograms(counts, limit, slopes if slopes.requires_grad else None)


def _count(voxels: Voxels, spec: PassSpec, limit: Tensor) -> tuple[ErrorHistograms, Tensor]:
    return count_errors_and_sums(voxels, error_spec(spec), limit, spec)


def _write_gradient(
    out: Tensor, voxels: Voxels, spec: PassSpec, limits: Tensor, slopes: Tensor, of_rows: Tensor
) -> None:
    """Write the gradient of the logits; `slopes` is (2, B, C, 2, M + 2), `of_rows` (7, B, C, 1), `limits` (B, 1)."""
    logits, errors = voxels.logits, error_spec(spec)
    starts, rises = F.pad(slopes.flatten(2), (0, 1))  # the last place, of ignored voxels, is read as 0
    size = tile_voxels(logits)
    places = [place for image in out.unbind() for place in image.split(size, -1)] if out.numel() else []
    tiles = [(*tile, place) for tile, place in zip(numbered_tiles(voxels), places, strict=True)]
    of_images = of_rows.unbind(1)

    def work(task: list[tuple[int, Tile, Tensor]]) -> None:
        space = ErrorSpace.of(logits)
        workspace = in_place.Workspace.for_gradient(logits, spec, size) if spec.has_sums else None
        for image, part, place in task:
            tile = tile_errors(part, errors, limits[image], space)
            slope, change = (space.map(number, tile.p.shape[1]) for number in (3, 4))
            torch.index_select(starts[image], 0, tile.index, out=slope.view(-1))
            torch.index_select(rises[image], 0, tile.index, out=change.view(-1))
            slope.add_(change.mul_(tile.position.frac_()))
            slope = _logit_gradient(tile, slope, space.line, errors)
            if workspace is not None:
                in_place.write_gradient(change, of_images[image].unbind(), part, spec, workspace)
                slope.add_(change)
            place.copy_(slope)

    run_tasks(work, logits, in_runs(tiles))


TILED = ErrorKernel(_count, _write_gradient)


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
