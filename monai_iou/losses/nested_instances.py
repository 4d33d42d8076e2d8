"""What a loss around an InstanceIoULoss has to know of it: regions in the target, and what its labels come from."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn

from monai_iou.losses.instance import InstanceIoULoss
from monai_iou.losses.voxel_sizes import downsampled_from


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


def on_coarser_grid(
    loss: nn.Module, target: Tensor, size: Sequence[int], *, is_label_map: bool = False
) -> AbstractContextManager[None]:
    """Tell the InstanceIoULosses inside `loss` that their label was downsampled from `target` to `size`.

    They then measure in mm, look for no regions in the label and, if `target` is a label map, have the same classes as
    in it, also where the label holds the fractions of its classes.
    """
    return downsampled_from(target, size, is_label_map=is_label_map) if _instances(loss) else nullcontext()
