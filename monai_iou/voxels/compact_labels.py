"""Label maps as most kernels read them: one byte a voxel (two above 254 classes), ignored voxels marked."""

from __future__ import annotations

import torch
from torch import Tensor

from monai_iou.voxels.tiling import in_threads

IGNORED = {torch.uint8: 255, torch.int16: -1}  # the stored label of an ignored voxel
_BYTE_CLASSES = 254  # 254 marks a value that is not a class, 255 an ignored voxel
_PART = 1 << 16  # voxels at a time on a CPU, so that intermediate results stay in its cache


def fits(dtype: torch.dtype, value: int) -> bool:
    """Return whether a number is within an integer dtype; all are within a float."""
    if dtype == torch.bool:
        return value in (0, 1)
    return dtype.is_floating_point or torch.iinfo(dtype).min <= value <= torch.iinfo(dtype).max


def equals(labels: Tensor, value: int) -> Tensor:
    """Return labels == value; a value beyond the dtype of the labels equals none, where torch would let it wrap."""
    return labels == value if fits(labels.dtype, value) else torch.zeros_like(labels, dtype=torch.bool)


def compact_dtype(classes: int) -> torch.dtype:
    """Return the smallest dtype that holds `classes` class numbers and the mark."""
    return torch.uint8 if classes <= _BYTE_CLASSES else torch.int16


def compact_labels(labels: Tensor, classes: int, ignore_index: int | None, keep: Tensor | None) -> tuple[Tensor, bool]:
    """Return labels (B, N) in the kernels' form and whether ignored voxels are marked in them.

    With nothing to ignore, a CPU takes them as they are: its kernels widen a part at a time, which costs less than a
    copy of all. Otherwise they become uint8 (int16 above 254 classes). A value that is not a class stays or becomes a
    number that is not a class either; `report_bad_values` finds it by the sums.
    """
    dtype = compact_dtype(classes)
    has_ignored = ignore_index is not None or keep is not None
    if not has_ignored and (labels.dtype == dtype or (labels.device.type == "cpu" and labels.dtype != torch.float64)):
        return labels, False
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return _compacted(labels, classes, dtype, ignore_index, keep), has_ignored
    compact = torch.empty(labels.shape, dtype=dtype, device=labels.device)

    def fill(task: tuple[int, slice]) -> None:
        image, part = task
        kept = None if keep is None else keep[image, part]
        compact[image, part] = _compacted(labels[image, part], classes, dtype, ignore_index, kept)

    starts = range(0, labels.shape[1], _PART)
    in_threads(fill, [(image, slice(start, start + _PART)) for image in range(labels.shape[0]) for start in starts])
    return compact, has_ignored


def _compacted(
    labels: Tensor, classes: int, dtype: torch.dtype, ignore_index: int | None, keep: Tensor | None
) -> Tensor:
    compact = labels.to(dtype)
    if not _surely_clean(labels, compact):
        changed = compact != labels  # wrapped round, fractional or NaN
        reserved = (compact >= _BYTE_CLASSES) if dtype == torch.uint8 else (compact < 0)
        compact = compact.masked_fill(changed | reserved, classes)
    # Every bit set is the mark, in both dtypes; a CPU does this ten times as fast as masked_fill.
    if ignore_index is not None:
        compact = compact | equals(labels, ignore_index).to(dtype).neg_()
    if keep is not None:
        compact = compact | (~keep).to(dtype).neg_()
    return compact


def _surely_clean(labels: Tensor, compact: Tensor) -> bool:
    """Return whether no value changed or is reserved, where that is cheap to know: not on a GPU, which would wait."""
    if labels.dtype == torch.bool:
        return True
    if labels.device.type != "cpu" or torch.compiler.is_compiling() or compact.numel() == 0:
        return False
    low, high = (int(value) for value in compact.aminmax())
    inside = low >= 0 and (high < _BYTE_CLASSES or compact.dtype != torch.uint8)
    return inside and torch.equal(compact.to(labels.dtype), labels)
