r"""Two classes by region on a CPU: a voxel is one number and one cell, and the sums are a histogram of cells.

A softmax of two classes is the sigmoid of the difference u of their logits. With p = sigmoid(u) the probability of
class 1, a region g and a label y of 0 or 1, cell 2 g + y counts its voxels and adds up p and q = 1 - p, so that

.. code-block:: text

    I_1 = p of cell 2 g + 1,  P_1 = p of both,  T_1 = count of 2 g + 1          and of class 0 the same with q and 2 g
    dL/du = p q a,  a = g_P1 - g_P0 - g_I0 + y (g_I1 + g_I0)                    a table with a number for each cell
    dL/dx_1 = dL/du,  dL/dx_0 = -dL/du

Along the last axis a region goes on for some tens of voxels. So a tile is summed by runs of one region, and the voxels
with y = 1, of which there are few, by themselves; the others of a region and q are differences. Where runs are short,
and wherever a difference would be small, each cell is added up voxel by voxel.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monai_iou.voxels import huge_pages
from monai_iou.voxels.inputs import Voxels, sum_dtype, total_dtype
from monai_iou.voxels.single_backward import once_differentiable
from monai_iou.voxels.spec import COUNT, INTERSECTION, PREDICTION, ROWS, TARGET, PassSpec
from monai_iou.voxels.tiling import run_tasks, tile_tasks

_SIZE = 1 << 17  # voxels of a tile: few calls count for more than the cache of a core
_SMALLEST_SHARE = 1 / 16  # of a sum: what is left of it in a difference would lose more than a digit
_SHORTEST_RUN = 8  # voxels on average: shorter runs cost more than their voxels


def covers(voxels: Voxels, spec: PassSpec) -> bool:
    """Return whether this pass may compute what `spec` asks for; labels and logits themselves are looked at later."""
    logits, labels, groups = voxels.logits, voxels.labels, voxels.groups
    return (
        spec == PassSpec("softmax", "product")
        and labels is not None
        and not labels.is_floating_point()
        and groups is not None
        and groups.shape[1] == 1
        and logits.shape[1] == 2
        and logits.device.type == "cpu"
        and logits.dtype == sum_dtype(logits)
        and logits.numel() > 0
    )


def _margin(logits: Tensor) -> Tensor:
    return logits[1] - logits[0]


def _cell_sums(u: Tensor, p: Tensor, inside: Tensor, groups: Tensor, regions: int) -> Tensor:
    """Return the count and the sums of p and of q for each cell, (3, 2 R) in float64.

    Args:
        u: logits of class 1 against class 0, (n,).
        p: their probabilities.
        inside: whether the label is 1.
        groups: region numbers.
        regions: their number R.
    """
    cells = torch.add(inside, groups.long(), alpha=2)
    count = torch.bincount(cells, minlength=2 * regions).double()
    of_p = torch.bincount(cells, p.double(), 2 * regions)
    return torch.stack([count, of_p, torch.bincount(cells, torch.sigmoid(-u).double(), 2 * regions)])


def _run_sums(p: Tensor, inside: Tensor, groups: Tensor, regions: int) -> Tensor | None:
    """Return what :func:`_cell_sums` returns, q as a difference; None if runs of one region are short."""
    values, numbers, ones = p.numpy(), groups.numpy(), np.flatnonzero(inside.numpy())
    starts = np.flatnonzero(numbers[1:] != numbers[:-1]) + 1
    if _SHORTEST_RUN * len(starts) > len(numbers):
        return None
    starts = np.concatenate([[0], starts])
    of_runs, of_ones = numbers[starts], numbers[ones]
    count = np.bincount(of_runs, np.diff(starts, append=len(numbers)), regions)
    of_p = np.bincount(of_runs, np.add.reduceat(values, starts), regions)
    ones_count = np.bincount(of_ones, minlength=regions)
    ones_of_p = np.bincount(of_ones, values[ones], regions)
    zeros_of_p = np.where(count == ones_count, 0, of_p - ones_of_p)
    cells = np.stack([[count - ones_count, ones_count], [zeros_of_p, ones_of_p]]).swapaxes(1, 2).reshape(2, -1)
    return torch.from_numpy(np.concatenate([cells, cells[:1] - cells[1:]]))


def _keep_digits(total: Tensor) -> bool:
    """Return whether no sum of (B, 3, 2 R) that is a difference is much smaller than what it is a difference of."""
    count, of_p, of_q = total.unflatten(-1, (-1, 2)).unbind(1)
    background, region = of_q[..., 0], of_q.sum(-1)
    lost = (background < _SMALLEST_SHARE * count[..., 0]) | (region < _SMALLEST_SHARE * count.sum(-1))
    lost |= (background < _SMALLEST_SHARE * of_p.sum(-1)) & (count[..., 0] > 0)
    return not bool(lost.any())


def _rows(cells: Tensor) -> Tensor:
    """Return the statistics (7, B, 2, R) from the sums of the cells, (B, 3, 2 R)."""
    counts, inside, outside = cells.unflatten(-1, (-1, 2)).unbind(1)
    rows = cells.new_zeros((ROWS, len(cells), 2, counts.shape[1]))
    rows[INTERSECTION] = torch.stack([outside[..., 0], inside[..., 1]], 1)
    rows[PREDICTION] = torch.stack([outside.sum(-1), inside.sum(-1)], 1)
    rows[TARGET] = counts.transpose(1, 2)
    rows[COUNT] = counts.sum(-1).unsqueeze(1)
    return rows


def _slopes(gradient: Tensor) -> Tensor:
    """Return a of every cell, (2, B, R): of labels 0 and 1."""
    (background, lesion), (of_other, of_class) = (gradient[row].unbind(1) for row in (INTERSECTION, PREDICTION))
    constant = of_class - of_other - background
    return torch.stack([constant, constant + lesion + background])


def _tiles(logits: Tensor) -> list[tuple[int, slice]]:
    return [tile for run in tile_tasks(logits, _SIZE) for tile in run]


def _sums(voxels: Voxels, inside: Tensor, kept: Tensor | None, *, by_runs: bool) -> Tensor | None:
    """Return the sums of the cells, (B, 3, 2 R), and write which labels are 1; None if the numbers are others.

    Args:
        voxels: what :func:`covers` approves of.
        inside: where to write whether the label is 1, (B, N) bool.
        kept: where to write the probabilities of class 1, (B, 2, N), or None.
        by_runs: whether to take runs of one region at once where they are long.
    """
    logits, labels, groups = voxels.logits.detach(), voxels.labels, voxels.groups
    assert labels is not None
    assert groups is not None
    tasks = _tiles(logits)

    def work(task: tuple[int, slice]) -> Tensor | None:
        image, part = task
        low, high = labels[image, part].aminmax()
        u = _margin(logits[image, :, part])
        if not (low >= 0 and high <= 1 and math.isfinite(u.sum().item())):
            return None
        p = u.sigmoid() if kept is None else torch.sigmoid(u, out=kept[image, 1, part])
        tile = p, torch.ne(labels[image, part], 0, out=inside[image, part]), groups[image, 0, part], voxels.regions
        sums = _run_sums(*tile) if by_runs else None
        return _cell_sums(u, *tile) if sums is None else sums

    total = torch.zeros((len(logits), 3, 2 * voxels.regions), dtype=total_dtype(logits), device="cpu")
    for (image, _), sums in zip(tasks, run_tasks(work, logits, tasks), strict=True):
        if sums is None:
            return None
        total[image] += sums
    return total if not by_runs or _keep_digits(total) else _sums(voxels, inside, kept, by_runs=False)


class _RegionSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, voxels: Voxels, inside: Tensor, total: Tensor, kept: Tensor | None) -> Tensor:
        ctx.kept = kept
        ctx.save_for_backward(logits, inside, voxels.groups)
        return _rows(total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, inside, groups = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None  # the memory becomes the gradient; a further backward computes p again
        out = huge_pages.empty_like(logits) if kept is None else kept
        of_zeros, of_ones = _slopes(gradient).to(logits.dtype)

        def work(task: tuple[int, slice]) -> None:
            image, part = task
            of_background, place = out[image, :, part].unbind()
            p = torch.sigmoid(_margin(logits[image, :, part])) if kept is None else place
            numbers = groups[image, 0, part]
            slope = of_zeros[image].index_select(0, numbers if numbers.element_size() >= 4 else numbers.int())
            ones = np.flatnonzero(inside[image, part].numpy())
            slope.numpy()[ones] = of_ones[image].numpy()[numbers.numpy()[ones]]
            torch.ops.aten.sigmoid_backward.grad_input(slope, p, grad_input=place)
            torch.neg(place, out=of_background)

        run_tasks(work, logits, _tiles(logits))
        return out, None, None, None, None


def compute_sums(voxels: Voxels) -> Tensor | None:
    """Return the statistics (7, B, 2, R) of `voxels`; None if a label is not 0 or 1, or a logit is not finite."""
    assert voxels.labels is not None
    needs_gradient = torch.is_grad_enabled() and voxels.logits.requires_grad
    kept = huge_pages.empty_like(voxels.logits) if needs_gradient else None
    inside = torch.empty(voxels.labels.shape, dtype=torch.bool, device="cpu")
    total = _sums(voxels, inside, kept, by_runs=True)
    if total is None:
        return None
    result: Tensor = _RegionSums.apply(voxels.logits, voxels, inside, total, kept)
    return result
