"""The base class of the Lovasz losses: options, pooling of histograms over images and ranks, and the reduction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from monai_iou import scores
from monai_iou.distributed import errors_over_ranks, sums_over_ranks
from monai_iou.losses.pass_loss import PassLoss
from monai_iou.voxels.error_bins import check_bins
from monai_iou.voxels.passes import Reading


class LovaszLoss(PassLoss):
    """Base class of the Lovasz losses: values from a reading with histograms of errors, or from sorted errors."""

    def __init__(
        self,
        bins: int | None,
        batch: bool,
        *,
        to_onehot_y: bool,
        reduction: str,
        ignore_index: int | None,
        sync_batch: bool,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(
            to_onehot_y=to_onehot_y,
            sigmoid=sigmoid,
            softmax=softmax,
            other_act=other_act,
            reduction=reduction,
            ignore_index=ignore_index,
            sync_batch=sync_batch,
        )
        self.bins = None if bins is None else check_bins(bins)
        self.batch = batch
        if sync_batch and not batch:
            message = (
                "Expected `batch` to be True with sync_batch=True, but got False: set batch=True, because summing over "
                "ranks joins their batches."
            )
            raise ValueError(message)
        if sync_batch and bins is None:
            message = (
                "Expected `bins` to be a number with sync_batch=True, but got None: give one, such as 2048, because "
                "only histograms can be summed over ranks."
            )
            raise ValueError(message)

    def pooled(self, reading: Reading) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the Lovasz extension of each class, its volume in voxels, and whether it is labelled (None: all are).

        Each tensor has shape (B, C), or (1, C) with `batch`.
        """
        errors, sums = reading.errors, replace(reading.sums, rows=reading.sums.rows.detach())
        assert errors is not None
        sums = sums.with_marks() if self.sync_batch else sums
        if self.batch:
            errors, sums = errors.over_batch(), sums.over_batch()
        if self.sync_batch:
            errors, sums = errors_over_ranks(errors), sums_over_ranks(sums)
        # Where labels are wrong, volumes are NaN, and so must be the values.
        values = (scores.lovasz(errors) + 0 * sums.target).to(sums.target.dtype)
        return values, sums.target, sums.labelled

    def reduced(self, terms: Tensor, counted: Tensor | None, space: int, labelled: Tensor | None = None) -> Tensor:
        """Apply `reduction` to terms (B, C) or (1, C); the mean runs over the counted terms of each image first.

        Images in which no class was annotated, by `labelled`, (B, C) bool, are left out of the mean.
        """
        if self.reduction == "sum":
            return terms.sum()
        if self.reduction == "none":
            return terms.reshape(*(terms.shape[1:] if self.batch else terms.shape), *[1] * space)
        if counted is None:
            counted = torch.ones_like(terms, dtype=torch.bool)
        images = terms.sum(1) / counted.sum(1).clamp_min(1)
        if labelled is not None:
            return images.sum() / labelled.any(1).sum().clamp_min(1)
        return images.sum() / max(1, len(images))
