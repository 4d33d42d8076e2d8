"""Targets that contain precomputed regions: a label map with the regions of its components as further channels."""

from __future__ import annotations

import torch
from torch import Tensor

from monai_iou.components import FIRST_REGION
from monai_iou.losses.cells import Cells
from monai_iou.voxels.flat_voxels import computable
from monai_iou.voxels.labels import raised_or_marked
from monai_iou.voxels.sums import VoxelSums


def holds_regions(target: Tensor, channels: int, *, may_be_empty: bool) -> bool:
    """Return whether a target is a label map with precomputed regions, (B, 1 + F, *S) for F foreground classes.

    With several channels, such a target has the shape of per-class maps (B, C, *S). It differs from these by values
    above 1, which a map of regions always contains.

    Args:
        target: the target of a loss.
        channels: number of channels C of the input.
        may_be_empty: whether a target of zeros is an empty label map with regions rather than empty per-class maps.
    """
    if not isinstance(target, Tensor) or target.ndim < 2 or target.shape[1] != max(channels, 2):
        return False
    if channels == 1:
        return True  # one channel means one foreground class, and per-class maps would have one channel
    values = computable(target.as_subclass(Tensor))
    corner = (slice(None), slice(1, None), *[slice(1)] * (values.ndim - 2))
    if bool((values[corner] > 1).any()):  # the usual case, at no reading of the whole
        return True
    low, high = values.aminmax() if values.numel() else (0, 1)
    return bool(high > 1 or (may_be_empty and low == high == 0))


def split_regions(target: Tensor) -> tuple[Tensor, Cells]:
    """Return the label map (B, 1, *S) of a target with precomputed regions, and the regions as cells.

    On a CPU, these are the numbers in the target itself if its dtype is uint8 or a signed integer and no region is
    negative; so the target must stay unchanged until the backward pass has ended. Otherwise they are a copy.
    """
    values, label = target.as_subclass(Tensor), target[:, :1]
    regions, channels = values[:, 1:], values.shape[1]
    highest = _highest_number(regions)
    if highest is None:
        return label, Cells(regions.to(torch.int32).clamp_min(FIRST_REGION - 1).sub_(FIRST_REGION - 1))
    highest_label = _highest_number(values[:, :1]) if channels > 2 else None  # with two, one map of regions serves both
    has_classes = highest_label is not None and highest_label < channels
    known = max(highest + 1, channels)  # of labels too, which are the region numbers of class 0 in the whole target
    return label, Cells(regions, None, known, FIRST_REGION, values if has_classes else None, in_range=True)


def _highest_number(values: Tensor) -> int | None:
    """Return the largest of integers from 0 on; None if one is negative, and where integers cannot be used as given."""
    if values.device.type != "cpu" or values.numel() == 0 or torch.compiler.is_compiling() or values.is_inference():
        return None
    if values.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        return None
    low, high = values.aminmax()
    return int(high) if low >= 0 else None


def check_numbers(sums: VoxelSums, cells: Cells, largest: int) -> VoxelSums:
    """Return the sums in the regions after checking their numbers; on a GPU, wrong numbers make all sums NaN.

    Raises:
        ValueError: if a number is above `largest`; on a GPU, a later call raises it.
    """
    if not cells.numbers.numel():
        return sums
    highest = cells.numbers.amax().long() - (cells.first - 1)  # in a narrow dtype, 0 - 1 and `largest` would wrap

    def error() -> ValueError:
        message = (
            f"Expected no more than max_regions={largest} precomputed regions of a class in an image, but the target "
            f"holds region {int(highest)}: raise `max_regions`, or leave it out to have the regions counted."
        )
        return ValueError(message)

    return VoxelSums(raised_or_marked(sums.rows, highest > largest, lambda: error))
