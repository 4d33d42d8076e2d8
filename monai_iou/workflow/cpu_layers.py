"""Instance normalisation and PReLU that are fast on a CPU where channels lie last, as the convolutions like them.

torch's instance normalisation copies such an image into its usual layout, and what it returns back again; and the
backward pass of torch's PReLU is not vectorised. What that costs in a step is in docs/performance.md.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._jit_internal import is_scripting
from torch.autograd import forward_ad

__all__ = ["FastInstanceNorm3d", "FastPReLU", "use_fast_layers"]


def _is_plain(image: Tensor) -> bool:
    """Return whether an image is a float tensor on a CPU, and nothing but its values and gradient are asked for."""
    is_transformed = getattr(torch._C, "_are_functorch_transforms_active", bool)() or forward_ad._current_level >= 0
    is_recorded = torch.compiler.is_compiling() or torch.jit._trace.is_tracing()
    is_usual = image.device.type == "cpu" and image.dtype in (torch.float32, torch.float64, torch.bfloat16)
    return is_usual and not is_recorded and not is_transformed


class FastInstanceNorm3d(torch.nn.InstanceNorm3d):
    """`torch.nn.InstanceNorm3d` with the same values, faster for images (B, C, X, Y, Z) whose channels lie last.

    (x - mean) / sqrt(variance + eps) for each image and channel, where the variance is the mean square of x - mean.
    Everything else (other layouts, a GPU, half precision, a single voxel, running statistics) is left to torch.

    Example:
        >>> image = torch.rand(1, 2, 3, 3, 3).contiguous(memory_format=torch.channels_last_3d)
        >>> torch.testing.assert_close(FastInstanceNorm3d(2)(image), torch.nn.InstanceNorm3d(2)(image))
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised image."""
        if is_scripting():  # which has no `super`
            is_single = input.dim() == self._get_no_batch_dim()
            output: Tensor = self._handle_no_batch_input(input) if is_single else self._apply_instance_norm(input)
            return output
        else:  # noqa: RET505  # or it would be scripted too
            return self._forward(input)

    @torch.jit.unused
    def _forward(self, input: Tensor) -> Tensor:
        if not (_is_plain(input) and self._is_covered(input)):
            output: Tensor = super().forward(input)
            return output
        voxels = input.movedim(1, -1).flatten(1, 3)  # a view (B, voxels, C)
        voxels = voxels.float() if input.dtype == torch.bfloat16 else voxels
        centred = voxels - voxels.mean(1, keepdim=True)
        normalised: Tensor = centred * (centred.square().mean(1, keepdim=True) + self.eps).rsqrt()
        if self.weight is not None:
            normalised = torch.addcmul(self.bias, normalised, self.weight)
        image: Tensor = normalised.to(input.dtype).unflatten(1, input.shape[2:])
        return image.movedim(-1, 1)

    def _is_covered(self, image: Tensor) -> bool:
        is_last = image.dim() == 5 and image.is_contiguous(memory_format=torch.channels_last_3d)
        has_voxels = is_last and image.shape[0] > 0 and image.shape[2:].numel() > 1
        is_own = image.shape[1] == self.num_features or self.weight is None
        has_both = (self.weight is None) == (self.bias is None)
        return has_voxels and is_own and has_both and not self.track_running_stats


class _Rectified(torch.autograd.Function):
    """x where x > 0, and weight * x elsewhere, for one weight."""

    @staticmethod
    def forward(image: Tensor, weight: Tensor) -> Tensor:
        return F.leaky_relu(image, weight.item())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        image, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # a derivative of this one is asked for
            is_positive = image > 0
            of_image = torch.where(is_positive, gradient, weight.to(gradient.dtype) * gradient)
            return of_image, torch.where(is_positive, 0, image * gradient).sum(dtype=weight.dtype).view(1)
        of_image = torch.ops.aten.leaky_relu_backward(gradient, image, weight.item(), False)
        return of_image, (image.clamp_max(0) * gradient).sum(dtype=weight.dtype).view(1)


class FastPReLU(torch.nn.PReLU):
    """`torch.nn.PReLU` with the same values; with one weight on a CPU, its backward pass is vectorised.

    Example:
        >>> FastPReLU()(torch.tensor([-2.0, 2.0])).tolist()
        [-0.5, 2.0]
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the image with its negative values multiplied by the weight."""
        if is_scripting():  # which has no `super`
            return F.prelu(input, self.weight)
        else:  # noqa: RET505  # or it would be scripted too
            return self._forward(input)

    @torch.jit.unused
    def _forward(self, input: Tensor) -> Tensor:
        has_type = self.weight.dtype == input.dtype or torch.is_autocast_enabled("cpu")
        if not (_is_plain(input) and self.weight.numel() == 1 and has_type):
            output: Tensor = super().forward(input)
            return output
        result: Tensor = _Rectified.apply(input, self.weight)
        return result


_FAST = {torch.nn.InstanceNorm3d: FastInstanceNorm3d, torch.nn.PReLU: FastPReLU}


def use_fast_layers(network: torch.nn.Module) -> torch.nn.Module:
    """Give every instance normalisation and PReLU of a network its fast form, in place; return the network.

    Names, weights and values stay as they are. Modules of classes that are derived from torch's are left alone.

    Example:
        >>> use_fast_layers(torch.nn.Sequential(torch.nn.Conv3d(1, 2, 1), torch.nn.PReLU()))[1]
        FastPReLU(num_parameters=1)
    """
    for module in network.modules():
        if type(module) in _FAST:
            # Its class alone: the module keeps its hooks, and whoever holds it holds the fast one.
            module.__class__ = _FAST[type(module)]
    return network
