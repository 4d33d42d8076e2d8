"""The voxel size in mm of the label of an InstanceIoULoss, also of a label that was downsampled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from monai_iou.spacing import image_spacings

# Of this thread alone: the loss itself may be at work on another label in another thread.
_finer: ContextVar[tuple[Tensor, Sequence[int]] | None] = ContextVar("monai_iou_finer_label", default=None)


@contextmanager
def downsampled_from(target: Tensor, size: Sequence[int]) -> Iterator[None]:
    """Let :func:`voxel_sizes` inside the `with` block be those of a label that was downsampled from `target` to `size`.

    A coarse voxel is as many times larger as there are fewer of them along an axis.
    """
    token = _finer.set((target, size))
    try:
        yield
    finally:
        _finer.reset(token)


def voxel_sizes(label: Tensor, spacing: Any) -> list[tuple[float, ...]]:
    """Return the voxel size in mm of each image of a label (B, C, *S).

    Args:
        label: the label, or what knows its voxel size.
        spacing: the voxel size of the label, or of the finer one; None takes that of a MetaTensor, or else 1 mm.
    """
    finer = _finer.get()
    if finer is None:
        return image_spacings(None, label, spacing, len(label), label.ndim - 2)
    target, size = finer
    factors = [full / coarse for full, coarse in zip(target.shape[2:], size, strict=True)]
    sizes = image_spacings(None, target, spacing, len(target), target.ndim - 2)
    return [tuple(mm * factor for mm, factor in zip(voxel, factors, strict=True)) for voxel in sizes]
