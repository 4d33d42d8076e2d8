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

    Differentiable; equal errors are taken in the order that the sort leaves them in. Of n errors of which f lie in the
    class's G voxels, J = n / (G + n - f); its steps are small differences of numbers near 1, which need float64.
    """
    if errors.numel() == 0:
        return errors.sum()
    errors, order = errors.sort(descending=True)
    steps = _steps(foreground[order].to(total_dtype(errors))).to(errors.dtype)
    return (errors * steps).sum()  # a product of vectors would be rounded under autocast


def _steps(foreground: Tensor) -> Tensor:
    """Return by how much each voxel raises J."""
    # Whole numbers but for a target with a gradient: torch's deterministic algorithms cumulate no others on a GPU.
    counted = foreground if foreground.requires_grad else foreground.long()
    missed = (counted.sum() - counted.cumsum(0)).to(foreground.dtype)
    number = torch.arange(1, len(foreground) + 1, dtype=foreground.dtype, device=foreground.device)
    jaccard = number / missed.add_(number)
    return jaccard.diff(prepend=jaccard.new_zeros(1))


def volumes(classes: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sums over voxels of maps (B, C, N), (B, C); a class at a time, whose wider copy is all it takes."""
    return torch.stack([values.sum(-1, dtype=dtype) for values in classes.unbind(1)], 1)


def sorted_extension(
    voxels: Voxels, target: Tensor, activation: str | None, ignore_index: int | None, *, batch: bool
) -> tuple[Tensor, Tensor]:
    """Return the values and the classes' volumes, (B, C), or (1, C) over the batch, exactly."""
    logits, classes, valid = voxels.tile(slice(None), slice(None), sum_dtype(voxels.logits))
    precise = total_dtype(voxels.logits)
    volume = volumes(classes, precise)
    count = torch.full_like(volume, classes.shape[-1]) if valid is None else volumes(valid, precise).expand_as(volume)
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
    """Return `volume` (B, C), NaN or with an error where the labels hold values that are not classes."""
    if voxels.labels is None:
        return volume  # maps are checked before
    rows = volume.new_zeros((ROWS, *volume.shape, 1))
    rows[TARGET], rows[COUNT] = volume.unsqueeze(-1), count.unsqueeze(-1)
    return report_bad_values(rows, target, voxels, ignore_index)[TARGET, ..., 0]
