"""3D convolutions that give few channels, on a CPU where channels lie last.

oneDNN computes 16 output channels of a voxel at once, one in each lane of a vector register. The last layers of a
network give a channel for each class, mostly two, so that 14 of 16 lanes compute nothing, at the full resolution.

Here the lanes are shared by neighbouring voxels: the 16 / C voxels of a piece of a row are the output channels of an
ordinary convolution, whose input channels are the piece and the voxels beside it. Its kernel holds that of the layer
once for each voxel of the piece, moved by one voxel each time, and zeros elsewhere. A transposed convolution with a
stride of 2 is an ordinary one of the small image, whose output channels are the voxels that an input voxel becomes.
The products that are summed are the same, and only their order may differ; but NaN or infinity in an image, times the
zeros, makes NaN of all voxels that share a register with one that it reaches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._jit_internal import is_scripting

from monai_iou.workflow.plain_images import as_output, has_last_channels, is_plain, is_several

__all__ = ["FastConv3d", "FastConvTranspose3d"]

LANES = 16  # numbers of float32 in a vector register with AVX-512
MOST_CHANNELS = 4  # with more, oneDNN's own form is as fast
MOST_PADDING = 1.25  # computed voxels for each one that the image has
LEAST_LENGTH = 16  # voxels of a row; with thinner volumes, oneDNN's own form is as fast
LEAST_VOXELS = 1 << 14  # of an image
MOST_WITHOUT_ONEDNN = 20480  # numbers (C, X, Y) of a single image that torch convolves itself, slowly for this form


def _in_full_precision(layer: torch.nn.Module, image: Tensor) -> bool:
    if not is_plain(image) or torch.is_autocast_enabled("cpu"):
        return False
    weights = [weights for weights in layer.parameters(recurse=False) if weights is not None]
    return all(each.dtype == torch.float32 for each in (image, *weights)) and has_last_channels(image)


class FastConv3d(torch.nn.Conv3d):
    """`torch.nn.Conv3d` with the same values, faster from few channels to few, if channels lie last.

    That is with at most `MOST_CHANNELS` channels in and out, a kernel of 3, a stride of 1, a padding of 1, float32 and
    images of at least `LEAST_VOXELS` voxels, `LEAST_LENGTH` of them along Z. Everything else is left to torch.

    Example:
        >>> layer, image = FastConv3d(2, 2, 3, padding=1), torch.rand(1, 2, 32, 32, 16)
        >>> image = image.contiguous(memory_format=torch.channels_last_3d)
        >>> torch.testing.assert_close(layer(image), torch.nn.Conv3d.forward(layer, image))
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolved image."""
        if is_scripting():  # which has no `super`
            output: Tensor = self._conv_forward(input, self.weight, self.bias)
            return output
        else:  # noqa: RET505  # or it would be scripted too
            return self._forward(input)

    @torch.jit.unused
    def _forward(self, input: Tensor) -> Tensor:
        if not (self.suits(self) and _in_full_precision(self, input) and self._is_covered(input)):
            output: Tensor = super().forward(input)
            return output
        result: Tensor = _FewChannels.apply(input, self.weight, self.bias)
        return result

    @torch.jit.unused
    def _is_covered(self, image: Tensor) -> bool:
        voxels = image.shape[4]
        shared = [_shared_by(channels) for channels in (self.in_channels, self.out_channels)]
        is_full = all(math.ceil(voxels / number) * number <= MOST_PADDING * voxels for number in shared)
        is_large = voxels >= LEAST_LENGTH and image.shape[2:].numel() >= LEAST_VOXELS
        return image.shape[1] == self.in_channels and is_full and is_large

    @staticmethod
    def suits(layer: torch.nn.Conv3d) -> bool:
        """Return whether a layer has what this class is for."""
        has_places = (layer.kernel_size, layer.stride, layer.padding) == ((3, 3, 3), (1, 1, 1), (1, 1, 1))
        is_usual = (layer.dilation, layer.groups, layer.padding_mode) == ((1, 1, 1), 1, "zeros")
        return has_places and is_usual and max(layer.in_channels, layer.out_channels) <= MOST_CHANNELS


class _FewChannels(torch.autograd.Function):
    """Convolve an image whose channels lie last with a kernel of 3."""

    @staticmethod
    def forward(image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return as_output(_convolve(image, weight, bias))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], inputs[1])
        ctx.sizes = None if inputs[2] is None else list(inputs[2].shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        image, weight = ctx.saved_tensors
        if torch.is_grad_enabled() or is_several(gradient):  # the former: a derivative of this one is asked for
            return _gradients(gradient, image, weight, ctx, [1, 1, 1])
        gradient = gradient.contiguous(memory_format=torch.channels_last_3d)
        of_image = of_weight = of_bias = None
        with torch.autocast("cpu", enabled=False):  # whoever calls `backward` may have it on
            if ctx.needs_input_grad[0]:
                of_image = _convolve(gradient, weight.transpose(0, 1).flip(2, 3, 4), None)
            if any(ctx.needs_input_grad[1:]):
                of_weight, of_bias = _gradients_of_kernel(image, gradient)
        return of_image, of_weight, of_bias if ctx.needs_input_grad[2] else None


def _gradients(
    gradient: Tensor, image: Tensor, weight: Tensor, ctx: Any, strides: list[int], *, transposed: bool = False
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return torch's own gradients of a convolution with a kernel of 3 and a padding of 1."""
    ones, extra = [1, 1, 1], [stride - 1 if transposed else 0 for stride in strides]
    of_image, of_weight, of_bias = torch.ops.aten.convolution_backward(
        gradient, image, weight, ctx.sizes, strides, ones, ones, transposed, extra, 1, list(ctx.needs_input_grad[:3])
    )
    return of_image, of_weight, of_bias


def _shared_by(channels: int) -> int:
    """Return how many voxels share the lanes of a vector register."""
    return LANES // channels


def _pieces(image: Tensor, voxels: int, *, beside: int) -> Tensor:
    """Return (B, C, X, Y, Z) as pieces (B, (voxels + 2 beside) C, X, Y, pieces) of its rows along Z, padded with zeros.

    A piece holds so many voxels beside its own on both sides; channels lie last in it.
    """
    channels, length = image.shape[1], image.shape[4]
    missing = -length % voxels
    rows = image.movedim(1, -1)
    if beside or missing:
        rows = F.pad(rows, (0, 0, beside, beside + missing))
    pieces = rows.flatten(3).unfold(3, (voxels + 2 * beside) * channels, voxels * channels)
    return pieces.movedim(-1, 1)


def _convolve(image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the convolution with a kernel (O, C, 3, 3, 3) of an image (B, C, X, Y, Z), padded with zeros."""
    channels, length = weight.shape[0], image.shape[4]
    shared = _shared_by(channels)
    taps = weight.permute(0, 4, 1, 2, 3)  # (O, Z, C, X, Y)
    moved = [F.pad(taps, (0, 0, 0, 0, 0, 0, place, shared - 1 - place)) for place in range(shared)]
    kernel = torch.stack(moved).flatten(2, 3).flatten(0, 1).unsqueeze(-1)  # (shared O, (shared + 2) C, X, Y, 1)
    kernel = kernel.contiguous(memory_format=torch.channels_last_3d)
    pieces = _pieces(image, shared, beside=1)
    output = F.conv3d(pieces, kernel, None if bias is None else bias.repeat(shared), padding=(1, 1, 0))
    rows = output.movedim(1, -1).unflatten(-1, (shared, channels)).flatten(3, 4)
    result: Tensor = rows[:, :, :, :length].movedim(-1, 1).contiguous(memory_format=torch.channels_last_3d)
    return result


def _gradients_of_kernel(image: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients (O, C, 3, 3, 3) of the kernel and (O,) of the bias, given that of the output."""
    channels, given = gradient.shape[1], image.shape[1]
    shared = _shared_by(channels)
    shape = (shared * channels, (shared + 2) * given, 3, 3, 1)
    like = image.new_empty(shape).contiguous(memory_format=torch.channels_last_3d)
    sizes, ones, padding = [shape[0]], [1, 1, 1], [1, 1, 0]
    pieces, of_pieces = _pieces(image, shared, beside=1), _pieces(gradient, shared, beside=0)
    wanted = [False, True, True]
    _, kernel, bias = torch.ops.aten.convolution_backward(
        of_pieces, pieces, like, sizes, ones, padding, ones, False, [0, 0, 0], 1, wanted
    )
    places = kernel.reshape(shared, channels, shared + 2, given, 3, 3)
    of_weight = torch.stack([places[place, :, place : place + 3] for place in range(shared)]).sum(0)
    return of_weight.permute(0, 2, 3, 4, 1), bias.view(shared, channels).sum(0)


class FastConvTranspose3d(torch.nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` with the same values, whose forward pass is faster to few channels that lie last.

    That is to at most `MOST_CHANNELS` channels with a kernel of 3, a padding of 1, float32, and, along each axis, a
    stride of 2 that doubles it or a stride of 1 that keeps it. Everything else, a single small image, and the backward
    pass, are left to torch.

    Example:
        >>> layer = FastConvTranspose3d(4, 2, 3, stride=2, padding=1, output_padding=1)
        >>> image = torch.rand(2, 4, 4, 4, 4).contiguous(memory_format=torch.channels_last_3d)
        >>> torch.testing.assert_close(layer(image), torch.nn.ConvTranspose3d.forward(layer, image))
    """

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Return the enlarged image."""
        if is_scripting():  # which has no `super`
            extra = self._output_padding(
                input,
                output_size,
                self.stride,  # type: ignore[arg-type]
                self.padding,  # type: ignore[arg-type]
                self.kernel_size,  # type: ignore[arg-type]
                3,
                self.dilation,  # type: ignore[arg-type]
            )
            return F.conv_transpose3d(
                input,
                self.weight,
                self.bias,
                self.stride,
                self.padding,  # type: ignore[arg-type]
                extra,
                self.groups,
                self.dilation,
            )
        else:  # noqa: RET505  # or it would be scripted too
            return self._forward(input, output_size)

    @torch.jit.unused
    def _forward(self, input: Tensor, output_size: list[int] | None) -> Tensor:
        is_covered = self.suits(self) and _in_full_precision(self, input) and self._is_covered(input)
        if output_size is not None or not is_covered:
            output: Tensor = super().forward(input, output_size)
            return output
        result: Tensor = _Enlarged.apply(input, self.weight, self.bias, self.stride)
        return result

    @torch.jit.unused
    def _is_covered(self, image: Tensor) -> bool:
        is_onednns = len(image) > 1 or math.prod(image.shape[1:4]) > MOST_WITHOUT_ONEDNN
        return image.shape[1] == self.in_channels and is_onednns

    @staticmethod
    def suits(layer: torch.nn.ConvTranspose3d) -> bool:
        """Return whether a layer has what this class is for."""
        has_places = (layer.kernel_size, layer.padding, layer.dilation) == ((3, 3, 3), (1, 1, 1), (1, 1, 1))
        sizes = zip(layer.output_padding, layer.stride, strict=True)
        is_whole = max(layer.stride) == 2 and all(extra == stride - 1 for extra, stride in sizes)
        return has_places and is_whole and layer.groups == 1 and layer.out_channels <= MOST_CHANNELS


class _Enlarged(torch.autograd.Function):
    """Enlarge an image by a transposed convolution with a kernel of 3 and strides of 1 or 2."""

    @staticmethod
    def forward(image: Tensor, weight: Tensor, bias: Tensor | None, strides: tuple[int, ...]) -> Tensor:
        return as_output(_enlarge(image, weight, bias, strides))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, tuple[int, ...]], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], inputs[1])
        ctx.sizes = None if inputs[2] is None else list(inputs[2].shape)
        ctx.strides = list(inputs[3])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        image, weight = ctx.saved_tensors
        return (*_gradients(gradient, image, weight, ctx, ctx.strides, transposed=True), None)


def _enlarge(image: Tensor, weight: Tensor, bias: Tensor | None, strides: Sequence[int]) -> Tensor:
    """Return the transposed convolution of (B, C, X, Y, Z) with a kernel (C, O, 3, 3, 3) and a padding of 1.

    Along an axis with stride 2, the voxel 2 i of the output is w1 x[i], and 2 i + 1 is w2 x[i] + w0 x[i + 1].
    """
    channels, parts = weight.shape[1], math.prod(strides)
    kernel = weight.transpose(0, 1)
    for axis, stride in zip((-3, -2, -1), strides, strict=True):
        if stride == 1:
            kernel = kernel.flip(axis).unsqueeze(0)
        else:
            first, middle, last = kernel.unbind(axis)
            even, odd = torch.stack([middle, torch.zeros_like(middle)], axis), torch.stack([last, first], axis)
            kernel = torch.stack([even, odd])
    kernel = kernel.permute(2, 1, 0, 3, 4, 5, 6, 7).flatten(0, 3)  # (parts of X, Y and Z, O) by (C, X, Y, Z)
    kernel = kernel.contiguous(memory_format=torch.channels_last_3d)
    output = F.conv3d(image, kernel, None if bias is None else bias.repeat(parts), padding=1)
    for axis, length in enumerate(image.shape[2:], start=2):
        output = output.narrow(axis, output.shape[axis] - length, length)
    voxels = output.movedim(1, -1).unflatten(-1, (*strides, channels))  # (B, X, Y, Z, parts of X, Y, Z, O)
    size = [length * stride for length, stride in zip(image.shape[2:], strides, strict=True)]
    rows = voxels.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(len(image), *size, channels)
    result: Tensor = rows.movedim(-1, 1).contiguous(memory_format=torch.channels_last_3d)
    return result
