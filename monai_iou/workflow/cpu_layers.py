"""Layers that are fast on a CPU where channels lie last, as the convolutions like them.

torch's instance normalisation copies such an image into its usual layout, and what it returns back again; and the
backward pass of torch's PReLU is not vectorised. For convolutions that give few channels, see
`monai_iou.workflow.cpu_convolutions`. What that costs in a step is in docs/performance.md.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._jit_internal import is_scripting

from monai_iou.workflow.cpu_convolutions import LANES, FastConv3d, FastConvTranspose3d
from monai_iou.workflow.plain_images import as_output, has_last_channels, is_plain, is_several

__all__ = ["FAST_FORMS", "FastInstanceNorm3d", "FastPReLU", "use_fast_layers"]


class _Normalised(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) for each image and channel, with channels that lie last."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, eps: float) -> Tensor:
        rows, repeats = _rows(image)
        mean = _means(rows, repeats)
        centred = rows - mean
        scale = (_means(centred.square(), repeats) + eps).rsqrt()
        ctx.save_for_backward(image, mean, scale)
        ctx.eps = eps
        return as_output(_image(centred.mul_(scale), image))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        image, mean, scale = ctx.saved_tensors
        if torch.is_grad_enabled() or is_several(gradient):  # the former: a derivative of this one is asked for
            return _slow_gradient(gradient, image, ctx.eps), None
        rows, repeats = _rows(image)
        pull, _ = _rows(gradient.contiguous(memory_format=torch.channels_last_3d))
        centred = rows - mean
        slope = _means(pull * centred, repeats) * scale * scale * scale  # its cube alone may be 0 in float32
        result = (pull - _means(pull, repeats)).mul_(scale).addcmul_(centred, slope, value=-1)
        return _image(result, image), None


def _slow_gradient(gradient: Tensor, image: Tensor, eps: float) -> Tensor:
    """Return the gradient of an image by what autograd can differentiate, and compute for several gradients at once."""
    axes = (2, 3, 4)
    pull, numbers = (each.float() if each.dtype == torch.bfloat16 else each for each in (gradient, image))
    centred = numbers - numbers.mean(axes, keepdim=True)
    scale = (centred.square().mean(axes, keepdim=True) + eps).rsqrt()
    normalised = centred * scale
    slope = (pull * normalised).mean(axes, keepdim=True)
    return ((pull - pull.mean(axes, keepdim=True) - normalised * slope) * scale).to(image.dtype)


def _rows(image: Tensor) -> tuple[Tensor, int]:
    """Return an image as (B, rows, numbers), with so many voxels in a row that it fills a vector register, and these.

    A row has no fewer numbers than an image has channels, and no voxel is left over.
    """
    voxels = image.movedim(1, -1).flatten(1, 3)
    fitting = range(max(LANES // image.shape[1], 1), 0, -1)
    repeats = next(number for number in fitting if voxels.shape[1] % number == 0)
    rows = voxels.reshape(len(image), -1, repeats * image.shape[1])
    return rows.float() if image.dtype == torch.bfloat16 else rows, repeats


def _means(rows: Tensor, repeats: int) -> Tensor:
    """Return the mean over the voxels for each channel, repeated as the channels are in a row: (B, 1, numbers)."""
    means = rows.mean(1, keepdim=True)
    return means if repeats == 1 else means.unflatten(2, (repeats, -1)).mean(2).repeat(1, 1, repeats)


def _image(rows: Tensor, like: Tensor) -> Tensor:
    """Return rows as an image again."""
    return rows.to(like.dtype).view(len(like), *like.shape[2:], like.shape[1]).movedim(-1, 1)


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
        output: Tensor
        if not isinstance(input, Tensor):  # the stand-in of `torch.fx`, whose axes cannot be counted
            output = self._apply_instance_norm(input)
        elif not (is_plain(input) and self._is_covered(input)):
            output = super().forward(input)
        else:
            output = self._normalised(input)
        return output

    def _normalised(self, input: Tensor) -> Tensor:
        normalised: Tensor = _Normalised.apply(input, self.eps)
        if self.weight is None:
            return normalised
        shape = (-1, 1, 1, 1)
        weighted = torch.addcmul(self.bias.view(shape), normalised.to(self.weight.dtype), self.weight.view(shape))
        return weighted.to(input.dtype)

    def _is_covered(self, image: Tensor) -> bool:
        has_voxels = has_last_channels(image) and image.shape[2:].numel() > 1
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
        is_covered = is_plain(input) and self.weight.numel() == 1
        if not (is_covered and (self.weight.dtype == input.dtype or torch.is_autocast_enabled("cpu"))):
            output: Tensor = super().forward(input)
            return output
        result: Tensor = _Rectified.apply(input, self.weight)
        return result


FAST_FORMS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.Conv3d: FastConv3d,
    torch.nn.ConvTranspose3d: FastConvTranspose3d,
    torch.nn.InstanceNorm3d: FastInstanceNorm3d,
    torch.nn.PReLU: FastPReLU,
}


def use_fast_layers(network: torch.nn.Module) -> torch.nn.Module:
    """Give the instance normalisations, PReLUs and some 3D convolutions of a network their fast form; return it.

    It is changed in place. Names, weights and values stay as they are. Modules of classes that are derived from torch's
    are left alone, and so are convolutions that `FastConv3d` and `FastConvTranspose3d` would leave to torch.

    Example:
        >>> use_fast_layers(torch.nn.Sequential(torch.nn.Conv3d(1, 2, 1), torch.nn.PReLU()))
        Sequential(
          (0): Conv3d(1, 2, kernel_size=(1, 1, 1), stride=(1, 1, 1))
          (1): FastPReLU(num_parameters=1)
        )
    """
    for module in network.modules():
        fast = FAST_FORMS.get(type(module))
        suits = getattr(fast, "suits", None)  # of the convolutions
        if fast is not None and (suits is None or suits(module)):
            # Its class alone: the module keeps its hooks, and whoever holds it holds the fast one.
            module.__class__ = fast
    return network
