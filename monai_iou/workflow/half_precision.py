"""Mixed precision: its data type on a device, and network outputs that are too large for float16."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist
from monai.inferers.inferer import Inferer
from torch import Tensor

from monai_iou.distributed import is_distributed
from monai_iou.workflow.finite_outputs import is_finite

__all__ = ["FullPrecisionFallback", "amp_type_of"]

logger = logging.getLogger(__name__)


def amp_type_of(device: str | torch.device) -> str:
    """Return the data type of mixed precision on a device: bfloat16, or float16 on a GPU that does not compute in it.

    bfloat16 has the range of float32. The largest float16 is 65504, and residual units, whose sums are not normalised,
    can exceed it after a few hundred steps: the output of the network is then NaN.

    Example:
        >>> amp_type_of("cpu")
        'bfloat16'
    """
    device = torch.device(device)
    if device.type != "cuda" or torch.cuda.device_count() == 0:  # its absence is said where it is used
        return "bfloat16"
    with torch.cuda.device(device):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


class FullPrecisionFallback(Inferer):
    """An inferer that computes an output again in float32 if it holds NaN or infinity in float16.

    Without autocast, and with bfloat16, whose range is that of float32, outputs are not looked at. In a training on
    several ranks, all of them compute again if one has to. The running statistics of a network, as those of batch
    normalisation, are then those of the second computation alone.

    Args:
        inferer: computes the output.

    Example:
        >>> from monai.inferers import SimpleInferer
        >>> layer = torch.nn.Conv2d(1, 1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(layer.weight, 1000)
        >>> image = torch.full((1, 1, 2, 2), 1000.0)
        >>> with torch.autocast("cpu", torch.float16):
        ...     SimpleInferer()(image, layer).max(), FullPrecisionFallback(SimpleInferer())(image, layer).max()
        (tensor(inf, dtype=torch.float16, grad_fn=<MaxBackward1>), tensor(1000000., grad_fn=<MaxBackward1>))
    """

    def __init__(self, inferer: Inferer) -> None:
        super().__init__()
        self.inferer = inferer
        self._has_warned = False

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the output of `inferer` for images (B, channels, *S)."""
        device = inputs.device.type
        if not (torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16):
            return self.inferer(inputs, network, *args, **kwargs)
        is_training = isinstance(network, torch.nn.Module) and network.training
        buffers = [(buffer, buffer.clone()) for buffer in network.buffers()] if is_training else []
        output = self.inferer(inputs, network, *args, **kwargs)
        has_overflow = not is_finite(output) and bool(inputs.isfinite().all())
        if is_training and is_distributed():
            together = torch.tensor(int(has_overflow), device=inputs.device)
            dist.all_reduce(together, dist.ReduceOp.MAX)
            has_overflow = bool(together)
        if not has_overflow:
            return output
        del output  # with all that its backward pass would need
        self._warn()
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        with torch.autocast(device, enabled=False):
            return self.inferer(inputs.float(), network, *args, **kwargs)

    def _warn(self) -> None:
        if not self._has_warned:
            logger.warning(
                "The network's output is too large for float16 and was computed again in float32. Later outputs will "
                "be too, without another message, and take more time: set `amp_dtype` to bfloat16 if the GPU computes "
                "in it, otherwise `amp` to false."
            )
        self._has_warned = True
