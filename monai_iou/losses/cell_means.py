"""The mean over the cells of components, then over the images and classes that have cells, on all ranks together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from monai_iou.distributed import sum_over_ranks
from monai_iou.losses.base import RegionLoss
from monai_iou.losses.weights import scored_weights


def _class_weights(loss: RegionLoss, channels: int, values: Tensor) -> Tensor | None:
    """Return the weights of all classes beside `values`; one that is scored alone has none, as in the global term."""
    scored = channels if loss.include_background or channels == 1 else channels - 1
    if loss.class_weight is None or scored == 1:
        return None
    weights = scored_weights(loss.class_weight, values, scored, loss.include_background)
    return nn.functional.pad(weights.expand(scored), (channels - scored, 0))


def mean_over_cells(loss: RegionLoss, totals: Tensor, counts: Tensor, classes: Sequence[int], channels: int) -> Tensor:
    """Average over the cells, then over the images and classes that have cells.

    Args:
        loss: its options `batch`, `sync_batch`, `weight` and `include_background` apply.
        totals: the weighted sum over the cells of each image and foreground class, (B, F).
        counts: the sum of the weights, (B, F).
        classes: the F foreground classes.
        channels: number of channels C of the input.
    """
    weights = _class_weights(loss, channels, totals)
    if loss.batch or weights is not None:
        # Every class gets a column, because ranks must agree on the shape whatever form their targets have.
        both = nn.functional.pad(torch.stack([totals, counts]), (classes[0], channels - 1 - classes[-1]))
        if loss.batch:
            both = both.sum(1, keepdim=True)
            both = sum_over_ranks(both) if loss.sync_batch else both
        totals, counts = both
    means = totals / torch.where(counts > 0, counts, 1)
    if weights is not None:
        means = means * weights
    return means.sum() / (counts > 0).sum().clamp_min(1)
