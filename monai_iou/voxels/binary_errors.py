r"""Errors of one and two classes on a CPU: a voxel is one error and one cell, whichever class asks.

With u the logit of the one class, or the difference of the logits of two, p = sigmoid(u) and a hard label y of 0 or 1,
both classes of a softmax have the error :math:`|y - p|`, and what is inside one class is outside the other. So one
histogram of cells, first of the voxels with y = 0 and then of those with y = 1, serves both, and so does one table of
slopes:

.. code-block:: text

    1 - e = sigmoid((2 y - 1) u),   place = y (M + 2) + M sqrt(1 - e) + 1/2        cells as in `error_bins.py`
    dL/du = e (1 - e) a,            a = dL/dp_1 - dL/dp_0 of the place             dL/dx_1 = dL/du = -dL/dx_0

The forward pass writes 1 - e and, of two classes, the place where the gradient will stand; the first backward pass
turns them into it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from monai_iou.voxels import huge_pages
from monai_iou.voxels.histograms import ErrorHistograms
from monai_iou.voxels.inputs import Tile, Voxels, sum_dtype, total_dtype
from monai_iou.voxels.labels import narrowed
from monai_iou.voxels.scratch import Lines, Spare
from monai_iou.voxels.single_backward import refuse_second_derivative
from monai_iou.voxels.spec import COUNT, ROWS, TARGET, PassSpec
from monai_iou.voxels.tiling import in_threads

_SIZE = 1 << 17  # voxels of a tile: few calls count for more than the cache of a core

Counts = Tensor  # (2 (M + 2),) int64, or with one more dimension for the images


@dataclass(frozen=True)
class Part:
    """Some voxels of an image.

    Attributes:
        tile: logits and targets.
        image: number of the image.
        right: (n,), where 1 - e belongs; None if it is not kept.
        place: (n,), where the cells' places belong; None if they are not kept.
    """

    tile: Tile
    image: int
    right: Tensor | None
    place: Tensor | None


def covers(voxels: Voxels, spec: PassSpec) -> bool:
    """Return whether this pass may count what `spec` asks for; labels and logits themselves are looked at later."""
    logits, labels, maps = voxels.logits, voxels.labels, voxels.maps
    one = logits.shape[1] == 1 and spec.activation == "sigmoid" and maps is not None and voxels.valid is None
    two = logits.shape[1] == 2 and spec.activation == "softmax" and labels is not None and not voxels.has_ignored
    return (
        (one or (two and not labels.is_floating_point()))  # type: ignore[union-attr]
        and not spec.has_sums
        and logits.device.type == "cpu"
        and logits.dtype == sum_dtype(logits)
        and logits.numel() > 0
    )


def _parts(voxels: Voxels, kept: Tensor | None) -> list[Part]:
    parts = []
    for image, tiles in enumerate(voxels.tiles(_SIZE)):
        rows = [] if kept is None else [iter(row.split(_SIZE)) for row in kept[image].unbind()]
        for tile in tiles:
            places = [next(row) for row in rows]
            parts.append(Part(tile, image, places[-1] if places else None, places[0] if len(places) == 2 else None))
    return parts


def _read(part: Part, cells: int, lines: Lines) -> tuple[Tensor, Tensor] | None:
    """Write 1 - e and the places of a part's voxels; None if labels are not 0 and 1, or logits not finite."""
    tile = part.tile
    lines.length = tile.logits.shape[1]
    y = lines["y"].copy_((tile.maps if tile.labels is None else tile.labels)[0])  # type: ignore[index]
    low, high = y.aminmax()
    right = lines["right"] if part.right is None else part.right
    first, *second = tile.logits.unbind()
    against = torch.sub(first, second[0], out=lines["u"]) if second else torch.neg(first, out=lines["u"])
    torch.sigmoid(torch.addcmul(against, against, y, value=-2, out=right), out=right)
    if not (low >= 0 and high <= 1 and math.isfinite(right.sum().item())):
        return None
    return right, _write_places(right, y, cells, lines["place"] if part.place is None else part.place)


def _write_places(right: Tensor, y: Tensor, cells: int, out: Tensor) -> Tensor:
    """Write the place of each voxel before it is rounded down; `y` is overwritten."""
    offset = y.mul_(cells).add_(0.5)
    return torch.add(offset, torch.sqrt(right, out=out), alpha=cells - 2, out=out)


def _count(voxels: Voxels, cells: int, kept: Tensor | None) -> Counts | None:
    """Return the counts of every image, (B, 2 (M + 2)); None if a part is not as :func:`_read` wants it."""
    spare = Spare(voxels.logits, _SIZE)

    def work(part: Part) -> Counts | None:
        with spare.lines() as lines:
            found = _read(part, cells, lines)
            return None if found is None else torch.bincount(found[1].int(), minlength=2 * cells)

    parts = _parts(voxels, kept)
    counts = torch.zeros((len(voxels.logits), 2 * cells), dtype=torch.int64, device="cpu")
    for part, share in zip(parts, in_threads(work, parts), strict=True):
        if share is None:
            return None
        counts[part.image] += share
    return counts


def _of_classes(counts: Counts, classes: int) -> Tensor:
    """Return the counts of the classes, (B, C, 2, M + 2)."""
    of_class = counts.unflatten(1, (2, -1))
    return torch.stack([of_class.flip(1), of_class], 1) if classes == 2 else of_class.unsqueeze(1)


class _BinaryErrors(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, voxels: Voxels, counts: Tensor, kept: Tensor | None) -> Tensor:
        ctx.kept = kept
        ctx.save_for_backward(logits, narrowed(voxels.labels, 2), voxels.maps)
        return logits.new_zeros((2, *counts.shape))

    @staticmethod
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor, None, None, None]:
        refuse_second_derivative()
        logits, labels, maps = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None  # the memory becomes the gradient; a further backward computes it again
        voxels = Voxels(logits, labels, maps, None, False, None, 1)
        out = huge_pages.empty_like(logits) if kept is None else kept
        _write_gradient(out, voxels, slopes, are_kept=kept is not None)
        return out, None, None, None


def _write_gradient(out: Tensor, voxels: Voxels, slopes: Tensor, *, are_kept: bool) -> None:
    """Write the gradient; `slopes` is dL/dp at the large ends of the cells and its changes, (2, B, C, 2, M + 2)."""
    cells = slopes.shape[-1]
    by_class = slopes.unbind(2)
    table = by_class[0] if len(by_class) == 1 else by_class[1] - by_class[0].flip(-2)
    starts, changes = table.flatten(-2)

    spare = Spare(out, _SIZE)

    def work(part: Part) -> None:
        with spare.lines() as lines:
            right, place = _kept(part, cells, lines) if are_kept else _read_again(part, cells, lines)
            index = place.int()
            slope = torch.index_select(starts[part.image], 0, index, out=lines["slope"])
            change = torch.index_select(changes[part.image], 0, index, out=lines["y"])
            slope.addcmul_(change, place.frac_())
            assert part.right is not None
            torch.ops.aten.sigmoid_backward.grad_input(slope, right, grad_input=part.right)
            if part.place is not None:
                torch.neg(part.right, out=part.place)

    in_threads(work, _parts(voxels, out))


def _kept(part: Part, cells: int, lines: Lines) -> tuple[Tensor, Tensor]:
    assert part.right is not None
    lines.length = part.right.shape[0]
    if part.place is not None:
        return part.right, part.place
    assert part.tile.maps is not None
    y = lines["y"].copy_(part.tile.maps[0])
    return part.right, _write_places(part.right, y, cells, lines["place"])


def _read_again(part: Part, cells: int, lines: Lines) -> tuple[Tensor, Tensor]:
    found = _read(part, cells, lines)
    assert found is not None
    return found


def read(voxels: Voxels, cells: int, limit: Tensor) -> tuple[Tensor, ErrorHistograms] | None:
    """Return what :func:`error_gradient.read_errors` returns, or None if the numbers are not as they should be.

    Args:
        voxels: what :func:`covers` approves of.
        cells: M + 2.
        limit: 1, as (1, 1).
    """
    logits = voxels.logits
    needs_gradient = torch.is_grad_enabled() and logits.requires_grad
    kept = huge_pages.empty_like(logits) if needs_gradient else None
    counts = _count(voxels, cells, kept)
    if counts is None:
        return None
    of_classes = _of_classes(counts, logits.shape[1])
    slopes = _BinaryErrors.apply(logits, voxels, of_classes, kept) if needs_gradient else None
    histograms = ErrorHistograms(of_classes, limit, slopes)
    rows = torch.zeros((ROWS, *of_classes.shape[:2]), dtype=total_dtype(logits), device="cpu")
    rows[TARGET], rows[COUNT] = histograms.volume, of_classes.sum((2, 3))
    return rows.unsqueeze(-1), histograms
