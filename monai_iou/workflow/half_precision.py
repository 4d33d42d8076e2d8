"""Mixed precision: its data type on a device, on a CPU as well, and network outputs that are too large for float16."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from monai.inferers.inferer import Inferer
from torch import Tensor
from torch.overrides import TorchFunctionMode

from monai_iou.distributed import is_distributed
from monai_iou.workflow.finite_outputs import is_finite
from monai_iou.workflow.settings import exit_with_message

__all__ = ["CpuAutocast", "FullPrecisionFallback", "SmallInFloat32", "amp_type_of", "in_mixed_precision"]

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


_CONVOLUTIONS = {
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
}


def _is_small(input: Tensor, weight: Tensor, *_: Any, **__: Any) -> bool:
    """Return whether an image is no larger than a kernel, along an axis on which the kernel has more than one voxel."""
    sizes = zip(reversed(input.shape), reversed(weight.shape[2:]), strict=False)
    return any(kernel > 1 and size <= kernel for size, kernel in sizes)


def _is_trainable(loss: Tensor) -> bool:
    return loss.numel() == 1 and loss.requires_grad


class SmallInFloat32(TorchFunctionMode):
    """Convolutions of images that are no larger than the kernel compute in float32, although autocast says bfloat16.

    In bfloat16, oneDNN 3.12 leaves some gradients of such kernels as the memory was, for instance with 3 voxels of the
    kernel and 2 of the image along the first axis; and for others it writes beyond its memory, which ends the program.

    `CpuAutocast` computes the output under it. A backward pass needs it as well if the network has gradient
    checkpointing, which computes parts of the network again there.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch."""
        kwargs = kwargs or {}
        if func is torch.Tensor.backward and kwargs.get("gradient") is None and _is_trainable(args[0]):
            return self._backward(*args, **kwargs)
        if func not in _CONVOLUTIONS or not torch.is_autocast_enabled("cpu") or not _is_small(*args, **kwargs):
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            numbers = [value.float() if isinstance(value, Tensor) else value for value in args]
            named = {name: value.float() if isinstance(value, Tensor) else value for name, value in kwargs.items()}
            return func(*numbers, **named).bfloat16()

    def _backward(
        self,
        loss: Tensor,
        gradient: None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        """Compute the gradients of a loss with this mode on, which torch turns off while a mode handles a call."""
        with self:
            # Of an edge of the graph, unlike a tensor, torch asks no mode to handle the call.
            edge = torch.autograd.graph.get_gradient_edge(loss)
            torch.autograd.backward(edge, torch.ones_like(loss), retain_graph, create_graph, inputs=inputs)


class CpuAutocast(Inferer):
    """An inferer that computes in bfloat16 on a CPU, as MONAI's engines do on a GPU alone.

    The convolutions are then faster on processors that compute in bfloat16 (docs/performance.md). Weights and their
    gradients stay in float32, and no gradient has to be scaled. Convolutions of images that are no larger than
    the kernel along an axis compute in float32, because torch's gradients of their kernels are wrong in bfloat16.

    Args:
        inferer: computes the output.
        dtype: bfloat16, as torch's type.

    Raises:
        ValueError: `dtype` is another; when called with gradients, if the network has parts of TorchScript, in which
            no convolution can be told to compute in float32. Under `python -m monai.bundle` the program ends with
            that sentence.

    Example:
        >>> from monai.inferers import SimpleInferer
        >>> CpuAutocast(SimpleInferer())(torch.rand(1, 1, 2, 2), torch.nn.Conv2d(1, 1, 1)).dtype
        torch.bfloat16
    """

    def __init__(self, inferer: Inferer, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        if dtype != torch.bfloat16:
            with exit_with_message():
                name = str(dtype).removeprefix("torch.")
                message = f"Expected `amp_dtype` to be bfloat16 on a CPU, but got {name}: write --amp_dtype bfloat16."
                raise ValueError(message)
        self.inferer = inferer

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the output of `inferer` for images (B, channels, *S)."""
        if torch.is_grad_enabled():
            _check_no_script(network)
        with torch.autocast("cpu", torch.bfloat16), SmallInFloat32():
            return self.inferer(inputs, network, *args, **kwargs)


def _check_no_script(network: Any) -> None:
    parts = network.modules() if isinstance(network, torch.nn.Module) else ()
    if any(isinstance(part, torch.jit.ScriptModule) for part in parts):
        message = (
            "Expected `amp` to be false in a training of a TorchScript network on a CPU, but got true: write "
            "--amp false, because torch computes wrong gradients of its convolutions of small images in bfloat16."
        )
        with exit_with_message():
            raise ValueError(message)


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
                "The network's output is too large for float16 and was computed again in float32, which takes more "
                "time. Later outputs that are too large are computed again without another message: set `amp_dtype` "
                "to bfloat16 if the GPU computes in it, otherwise `amp` to false."
            )
        self._has_warned = True


def in_mixed_precision(
    inferer: Inferer, device: str | torch.device, amp: bool, amp_kwargs: Mapping[str, Any]
) -> Inferer:
    """Return an inferer for an engine, whose own mixed precision is for a GPU alone."""
    if amp and torch.device(device).type == "cpu":
        return CpuAutocast(inferer, amp_kwargs.get("dtype", torch.bfloat16))
    return FullPrecisionFallback(inferer)
