"""What a loss around an InstanceIoULoss has to know of it: regions in the target, and the voxel size of its labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from monai_iou.losses.instance import InstanceIoULoss
from monai_iou.spacing import image_spacings


def _instances(loss: nn.Module) -> list[InstanceIoULoss]:
    return [part for part in loss.modules() if isinstance(part, InstanceIoULoss)]


def carries_regions(loss: nn.Module, target: Tensor, channels: int) -> bool:
    """Return whether the target contains the precomputed regions of an InstanceIoULoss inside `loss`.

    Args:
        loss: any loss.
        target: its target.
        channels: number of channels of its input.
    """
    return any(part.carries_regions(target, channels) for part in _instances(loss))


def without_regions(loss: nn.Module, target: Tensor, channels: int) -> Tensor:
    """Return the target without the precomputed regions of an InstanceIoULoss inside `loss`, if it contains any."""
    return target[:, :1] if carries_regions(loss, target, channels) else target


@contextmanager
def on_coarser_grid(loss: nn.Module, target: Tensor, size: Sequence[int]) -> Iterator[None]:
    """Let the InstanceIoULosses inside `loss` measure in mm on a label that was downsampled from `target` to `size`.

    A coarse voxel is as many times larger as there are fewer of them along an axis.
    """
    parts, space = _instances(loss), tuple(target.shape[2:])
    spacings = [part.spacing for part in parts]
    is_empty = target.numel() == 0 or 0 in size
    factors = [] if is_empty else [full / coarse for full, coarse in zip(space, size, strict=True)]
    for part in [] if is_empty else parts:
        sizes = image_spacings(None, target, part.spacing, len(target), len(space))
        part.spacing = [tuple(mm * factor for mm, factor in zip(voxel, factors, strict=True)) for voxel in sizes]
    try:
        yield
    finally:
        for part, spacing in zip(parts, spacings, strict=True):
            part.spacing = spacing
