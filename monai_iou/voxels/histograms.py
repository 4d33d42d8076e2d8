"""Histograms of per-class errors over voxels: the statistics that the Lovasz losses are functions of.

Counts are integers: they add over images and ranks without rounding, and in any order. See `error_bins.py` for cells.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from monai_iou.voxels import in_place
from monai_iou.voxels.error_bins import (
    ErrorSpace,
    ErrorSpec,
    numbered_tiles,
    tile_errors,
    tile_voxels,
)
from monai_iou.voxels.inputs import Tile, Voxels, sum_dtype, total_dtype
from monai_iou.voxels.label_errors import map_error
from monai_iou.voxels.spec import COUNT, ROWS, TARGET, PassSpec
from monai_iou.voxels.tiling import in_runs, run_tasks

_ROUNDING = 1e-3  # by which probabilities of a half-precision softmax may leave [0, 1]


@dataclass(frozen=True, eq=False)
class ErrorHistograms:
    """Counts of voxels by error, per image and class. They add: over images, over ranks.

    Attributes:
        counts: (B, C, 2, M + 2) int64, M = 2 bins: [..., 0, :] of voxels outside the class, [..., 1, :] of voxels of
            it; cell 0 holds the largest errors, cell M the smallest, cell M + 1 errors that are NaN.
        limit: the largest error, (1, 1), or (B, 1) if each image has its own.
        slopes: zeros (2, B, C, 2, M + 2) through which a loss of the counts hands its derivative by the voxels' errors
            to the pass (:func:`monai_iou.voxels.error_gradient.with_slopes`); None without gradients.

    Example:
        >>> import torch
        >>> from monai_iou.voxels.passes import error_histograms
        >>> prediction = torch.tensor([[[1.0, 1.0, 0.0, 0.0]]])
        >>> histograms = error_histograms(prediction, torch.tensor([[[1, 0, 0, 0]]]), activation=None, bins=1)
        >>> histograms.background, histograms.foreground  # one false positive; errors 1, 3/4 and 0
        (tensor([[[1, 0, 2]]]), tensor([[[0, 0, 1]]]))
        >>> (histograms + histograms).foreground
        tensor([[[0, 0, 2]]])
    """

    counts: Tensor
    limit: Tensor
    slopes: Tensor | None = None

    @property
    def background(self) -> Tensor:
        """Counts of voxels outside the class, (B, C, M + 1)."""
        return self.counts[:, :, 0, :-1]

    @property
    def foreground(self) -> Tensor:
        """Counts of voxels of the class, (B, C, M + 1)."""
        return self.counts[:, :, 1, :-1]

    @property
    def undefined(self) -> Tensor:
        """Number of voxels whose error is NaN, (B, C)."""
        return self.counts[..., -1].sum(-1)

    @property
    def volume(self) -> Tensor:
        """Number of voxels of the class, (B, C)."""
        return self.counts[:, :, 1].sum(-1)

    def __add__(self, other: ErrorHistograms) -> ErrorHistograms:
        if not isinstance(other, ErrorHistograms):
            return NotImplemented
        if self.counts.shape[-1] != other.counts.shape[-1] or not torch.equal(self.limit, other.limit):
            message = "Expected histograms with the same bins and limit, but got different ones: count both alike."
            raise ValueError(message)
        return ErrorHistograms(self.counts + other.counts, self.limit)

    def only(self, labelled: Tensor) -> ErrorHistograms:
        """Leave out the pairs of image and class that were not annotated; `labelled` is (B, C) bool."""
        pairs = labelled[..., None, None]
        slopes = None if self.slopes is None else torch.where(pairs, self.slopes, 0)
        return ErrorHistograms(torch.where(pairs, self.counts, 0), self.limit, slopes)

    def over_batch(self) -> ErrorHistograms:
        """Add over the images, which must share one limit: (1, C)."""
        return ErrorHistograms(self.counts.sum(0, keepdim=True), self.limit, self.slopes)


def count_errors_and_sums(
    voxels: Voxels, spec: ErrorSpec, limit: Tensor, beside: PassSpec | None
) -> tuple[ErrorHistograms, Tensor]:
    """Return the histograms and, of the same reading, the statistics (7, B, C, 1) that `beside` asks for.

    Volumes and counts, which the histograms hold, are always among them.
    """
    beside = None if beside is None or not beside.has_sums else beside
    batch, classes, _ = voxels.logits.shape
    length = 2 * classes * spec.cells + 1  # the last place takes the ignored voxels
    counts = torch.zeros((batch, length), dtype=torch.int64, device=voxels.logits.device)
    limits, one = limit.expand(batch, 1), counts.new_ones(1)
    table = threading.Lock()

    def work(task: list[tuple[int, Tile]]) -> list[Tensor]:
        space, rows = ErrorSpace.of(voxels.logits), []
        size = tile_voxels(voxels.logits)
        workspace = None if beside is None else in_place.Workspace.for_sums(voxels.logits, beside, size)
        for image, tile in task:
            index = tile_errors(tile, spec, limits[image], space).index
            few = index.device.type == "cpu" and length <= len(index)
            share = torch.bincount(index, minlength=length) if few else None
            with table:  # integers: the same in any order
                if share is not None:
                    counts[image] += share
                else:
                    counts[image].index_add_(0, index, one.expand(len(index)))
            if beside is not None and workspace is not None:
                rows.append(torch.zeros((ROWS, classes), dtype=workspace.maps.dtype, device=index.device))
                in_place.add_tile(rows[-1].unbind(), tile, beside, workspace)
        return rows

    tiles = numbered_tiles(voxels)
    rows = [row for task in run_tasks(work, voxels.logits, in_runs(tiles)) for row in task]
    statistics = torch.zeros((ROWS, batch, classes), dtype=total_dtype(voxels.logits), device=counts.device)
    for (image, _), row in zip(tiles, rows, strict=beside is not None):
        statistics[:, image] += row
    histograms = ErrorHistograms(counts[:, :-1].view(batch, classes, 2, spec.cells), limit)
    statistics[TARGET], statistics[COUNT] = histograms.volume, histograms.counts.sum((2, 3))
    return histograms, statistics.unsqueeze(-1)


def check_constant_maps(voxels: Voxels) -> None:
    """Raise ValueError if the target asks for a gradient, which counts do not have."""
    if voxels.maps is not None and voxels.maps.requires_grad and torch.is_grad_enabled():
        message = (
            "Expected `target` to need no gradient with `bins`, but got one with requires_grad=True: take bins=None or "
            "target.detach()."
        )
        raise ValueError(message)


def check_hard_maps(voxels: Voxels, target: Tensor) -> None:
    """Raise ValueError if per-class maps hold anything but 0 and 1 at a voxel that is not ignored.

    On a GPU this waits for the device, unless the maps are bool.
    """
    if voxels.maps is None or voxels.maps.dtype == torch.bool:
        return
    for image, maps in enumerate(voxels.maps):
        soft = (maps != 0) & (maps != 1)
        if voxels.valid is not None:
            soft &= voxels.valid[image]
        if not bool(soft.any()):
            continue
        value = maps[soft][0].item()
        if not 0 <= value <= 1:
            raise map_error(target, voxels.valid)
        message = (
            f"Expected `target` to hold hard per-class maps of 0 and 1, but got {value}: the Lovasz extension is "
            "defined for hard labels; threshold the maps, or take IoULoss(soft_label=True)."
        )
        raise ValueError(message)


def check_probabilities(voxels: Voxels) -> None:
    """Raise ValueError if an input that no activation is applied to leaves [0, 1]. On a GPU this waits for it."""
    for _, tile in numbered_tiles(voxels):
        values, _, valid = tile.read(sum_dtype(voxels.logits))
        if valid is not None:
            values = values * valid
        low, high = (end.item() for end in values.detach().aminmax())
        if low < -_ROUNDING or high > 1 + _ROUNDING:
            message = (
                "Expected `input` to hold probabilities between 0 and 1, because no activation is set, "
                f"but got {low if low < -_ROUNDING else high:.6g}: for logits set softmax=True or sigmoid=True."
            )
            raise ValueError(message)
