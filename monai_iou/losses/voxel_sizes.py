"""What an InstanceIoULoss knows of the label that its own was downsampled from: the voxel size in mm, and the form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from torch import Tensor

from monai_iou.spacing import image_spacings


class _Finer(NamedTuple):
    label: Tensor
    size: Sequence[int]  # of the coarse label
    is_label_map: bool


# Of this thread alone: the loss itself may be at work on another label in another thread.
_finer: ContextVar[_Finer | None] = ContextVar("monai_iou_finer_label", default=None)


@contextmanager
def downsampled_from(target: Tensor, size: Sequence[int], *, is_label_map: bool = False) -> Iterator[None]:
    """Let the functions below speak, inside the `with` block, of a label that was downsampled from `target` to `size`.

    A coarse voxel is as many times larger as there are fewer of them along an axis.

    Args:
        target: the finer label.
        size: the coarse shape.
        is_label_map: whether `target` holds class numbers. The coarse label may hold the fractions of these classes.
    """
    token = _finer.set(_Finer(target, size, is_label_map))
    try:
        yield
    finally:
        _finer.reset(token)


def is_downsampled() -> bool:
    """Return whether the label was downsampled, so that it contains no precomputed regions."""
    return _finer.get() is not None


def was_label_map() -> bool:
    """Return whether the label was downsampled from a label map, so that its maps share out the voxels."""
    finer = _finer.get()
    return finer is not None and finer.is_label_map


def voxel_sizes(label: Tensor, spacing: Any) -> list[tuple[float, ...]]:
    """Return the voxel size in mm of each image of a label (B, C, *S).

    Args:
        label: the label, or what knows its voxel size.
        spacing: the voxel size of the label, or of the finer one; None takes that of a MetaTensor, or else 1 mm.
    """
    finer = _finer.get()
    if finer is None:
        return image_spacings(None, label, spacing, len(label), label.ndim - 2)
    target, space = finer.label, finer.label.shape[2:]
    factors = [full / coarse if full and coarse else 1.0 for full, coarse in zip(space, finer.size, strict=True)]
    sizes = image_spacings(None, target, spacing, len(target), target.ndim - 2)
    return [tuple(mm * factor for mm, factor in zip(voxel, factors, strict=True)) for voxel in sizes]
