"""Networks of two dimensions for volumes of one slice, so that everything around them stays the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["SliceNetwork"]


class SliceNetwork(nn.Module):
    """A 2D network that takes and returns volumes (B, C, *S) which are one voxel thick along an axis.

    Args:
        network: 2D; it may return several tensors, in lists and tuples.
        axis: spatial axis of the slice, 0 to 2.

    Raises:
        ValueError: on a volume that has more than one slice.

    Example:
        >>> import torch
        >>> network = SliceNetwork(nn.Conv2d(1, 2, 3, padding=1), axis=2)
        >>> network(torch.zeros(1, 1, 16, 12, 1)).shape
        torch.Size([1, 2, 16, 12, 1])
    """

    def __init__(self, network: nn.Module, axis: int) -> None:
        super().__init__()
        self.network, self.axis = network, axis

    def forward(self, image: Tensor) -> Any:
        """Return the network's output for the slices."""
        slices = image.shape[2 + self.axis]
        if slices != 1:
            message = (
                f"Expected volumes of one slice along axis {self.axis}, but got {slices} slices: give the patch one "
                "voxel along it, or train with spatial_dims 3."
            )
            raise ValueError(message)
        output = self.network(image.squeeze(2 + self.axis))
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            assert isinstance(output, Tensor)  # TorchScript wants to be told: no network gives several tensors there
            return output.unsqueeze(2 + self.axis)
        return self._thick(output)

    @torch.jit.unused
    def _thick(self, output: Any) -> Any:
        if isinstance(output, Tensor):
            # DynUNet stacks its scales behind the batch.
            return output.unsqueeze(output.ndim - 2 + self.axis)
        return type(output)(self._thick(each) for each in output)
