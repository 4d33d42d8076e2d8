"""What a loss around an InstanceIoULoss has to know of it: regions in the target, and what its labels come from."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn

from monai_iou.losses.voxel_sizes import downsampled_from, is_downsampled


class TakesRegions:
    """What InstanceIoULoss is derived from, so that the losses that it is built on can recognise it."""

    def carries_regions(self, target: Tensor, channels: int) -> bool:
        """Return whether the target of an input with `channels` channels contains precomputed regions."""
        raise NotImplementedError


def takers_of_regions(loss: nn.Module) -> list[TakesRegions]:
    """Return every InstanceIoULoss inside `loss`, itself included."""
    return [part for part in loss.modules() if isinstance(part, TakesRegions)]


def carries_regions(loss: nn.Module, target: Tensor, channels: int) -> bool:
    """Return whether the target contains the precomputed regions of an InstanceIoULoss inside `loss`.

    Args:
        loss: any loss.
        target: its target; one that was downsampled contains none.
        channels: number of channels of its input.
    """
    takers = takers_of_regions(loss)  # first, because torch.compile knows no context variable
    return bool(takers) and not is_downsampled() and any(part.carries_regions(target, channels) for part in takers)


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
    return downsampled_from(target, size, is_label_map=is_label_map) if takers_of_regions(loss) else nullcontext()
