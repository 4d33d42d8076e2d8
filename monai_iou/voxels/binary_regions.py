r"""Two classes by region on a CPU: a voxel is one number and one cell, and the sums are a histogram of cells.

With p the probability of class 1 as in `binary.py`, a region g and a label y of 0 or 1, cell 2 g + y counts its voxels
and adds up p and q = 1 - p, so that

.. code-block:: text

    I_1 = p of cell 2 g + 1,  P_1 = p of both,  T_1 = count of 2 g + 1          and of class 0 the same with q and 2 g
    dL/du = p q a,  a = g_P1 - g_P0 - g_I0 + y (g_I1 + g_I0)                    a table with a number for each cell
    dL/dx_1 = dL/du,  dL/dx_0 = -dL/du

The sum of q is a difference where it is large; where it is small in a tile it is added up by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from monai_iou.voxels import huge_pages
from monai_iou.voxels.binary import SIZE, SMALLEST_SHARE
from monai_iou.voxels.inputs import Voxels, sum_dtype, total_dtype
from monai_iou.voxels.labels import narrowed
from monai_iou.voxels.single_backward import once_differentiable
from monai_iou.voxels.spec import COUNT, INTERSECTION, PREDICTION, ROWS, TARGET, PassSpec
from monai_iou.voxels.tiling import run_tasks, tile_tasks


def covers(voxels: Voxels, spec: PassSpec) -> bool:
    """Return whether this pass computes what `spec` asks for: every label is 0 or 1, and every logit finite."""
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
        and all(0 <= int(bound) <= 1 for bound in labels.aminmax())
        and bool(logits.detach().sum().isfinite())
    )


def _cells(labels: Tensor, groups: Tensor) -> Tensor:
    """Return 2 g + y of the voxels of a tile."""
    wide = groups if groups.element_size() >= 4 else groups.int()
    return torch.add(labels, wide, alpha=2)


def _margin(logits: Tensor) -> Tensor:
    return logits[1] - logits[0]


def _tile_sums(logits: Tensor, cells: Tensor, bins: int, p: Tensor | None) -> Tensor:
    """Return the count and the sums of p and of q for each cell, (3, bins) in float64; write the probabilities."""
    u = _margin(logits)
    p = u.sigmoid() if p is None else torch.sigmoid(u, out=p)
    counts = torch.bincount(cells, minlength=bins).double()
    inside = torch.bincount(cells, p.double(), bins)
    outside = counts - inside
    few = SMALLEST_SHARE * counts.view(-1, 2)
    of_labels = outside.view(-1, 2)
    if bool((of_labels[:, 0] < few[:, 0]).any() | (of_labels.sum(1) < few.sum(1)).any()):
        outside = torch.bincount(cells, u.neg_().sigmoid_().double(), bins)
    return torch.stack([counts, inside, outside])


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
    """Return a of every cell, (B, 2 R)."""
    (background, lesion), (of_other, of_class) = (gradient[row].unbind(1) for row in (INTERSECTION, PREDICTION))
    constant = of_class - of_other - background
    return torch.stack([constant, constant + lesion + background], -1).flatten(1)


class _RegionSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, voxels: Voxels) -> Tensor:
        labels, groups = voxels.labels, voxels.groups
        assert labels is not None
        assert groups is not None
        ctx.kept = kept = huge_pages.empty_like(logits) if ctx.needs_input_grad[0] else None
        tasks = _tiles(logits)

        def work(task: tuple[int, slice]) -> Tensor:
            image, part = task
            cells = _cells(labels[image, part], groups[image, 0, part])
            place = None if kept is None else kept[image, 1, part]
            return _tile_sums(logits[image, :, part], cells, 2 * voxels.regions, place)

        total = torch.zeros((len(logits), 3, 2 * voxels.regions), dtype=total_dtype(logits))
        for (image, _), sums in zip(tasks, run_tasks(work, logits, tasks), strict=True):
            total[image] += sums
        # Every label is a class here, so that a byte holds it.
        ctx.save_for_backward(logits, narrowed(labels, 2), groups)
        return _rows(total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, labels, groups = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None  # the memory becomes the gradient; a further backward computes p again
        out = huge_pages.empty_like(logits) if kept is None else kept
        slopes = _slopes(gradient).to(logits.dtype)

        def work(task: tuple[int, slice]) -> None:
            image, part = task
            of_background, place = out[image, :, part].unbind()
            p = torch.sigmoid(_margin(logits[image, :, part])) if kept is None else place
            slope = slopes[image].index_select(0, _cells(labels[image, part], groups[image, 0, part]))
            torch.ops.aten.sigmoid_backward.grad_input(slope, p, grad_input=place)
            torch.neg(place, out=of_background)

        run_tasks(work, logits, _tiles(logits))
        return out, None


def _tiles(logits: Tensor) -> list[tuple[int, slice]]:
    return [tile for run in tile_tasks(logits, SIZE) for tile in run]


def compute_sums(voxels: Voxels) -> Tensor:
    """Return the statistics (7, B, 2, R) of `voxels`."""
    result: Tensor = _RegionSums.apply(voxels.logits, voxels)
    return result
