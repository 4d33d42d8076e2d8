"""The Lovasz extension of the Jaccard loss from sorted errors: exact, differentiated by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from monai_iou.voxels.error_bins import errors_of
from monai_iou.voxels.inputs import Voxels, sum_dtype, total_dtype
from monai_iou.voxels.labels import report_bad_values
from monai_iou.voxels.spec import COUNT, ROWS, TARGET


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


def sorted_extension(
    voxels: Voxels, target: Tensor, activation: str | None, ignore_index: int | None, *, batch: bool
) -> tuple[Tensor, Tensor]:
    """Return the values and the classes' volumes, (B, C), or (1, C) over the batch, exactly."""
    logits, classes, valid = voxels.tile(slice(None), slice(None), sum_dtype(voxels.logits))
    volume = classes.sum(-1)
    count = torch.full_like(volume, classes.shape[-1]) if valid is None else valid.sum(-1).expand_as(volume)
    volume = _reported(volume, count, target, voxels, ignore_index)
    errors = errors_of(logits, classes, activation)[1]
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


def _reported(volume: Tensor, count: Tensor, target: Tensor, voxels: Voxels, ignore_index: int | None) -> Tensor:
    """Return `volume` (B, C) in float64, NaN or with an error where the labels hold values that are not classes."""
    if voxels.labels is None:
        return volume.to(total_dtype(voxels.logits))  # maps are checked before
    rows = torch.zeros((ROWS, *volume.shape, 1), dtype=total_dtype(voxels.logits), device=volume.device)
    rows[TARGET], rows[COUNT] = volume.unsqueeze(-1), count.unsqueeze(-1)
    return report_bad_values(rows, target, voxels, ignore_index)[TARGET, ..., 0]
