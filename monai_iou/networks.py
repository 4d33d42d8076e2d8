"""Networks that also return, in training, the attention maps or affinities that the attention losses supervise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from monai.networks.blocks.convolutions import Convolution
from monai.networks.nets.attentionunet import AttentionLayer, AttentionUnet
from torch import Tensor, nn

from monai_iou import checks
from monai_iou.spacing import check_grid

__all__ = ["AttentionMapUnet", "ContextPriorHead"]


class AttentionMapUnet(AttentionUnet):
    """MONAI's AttentionUnet (Oktay et al. 2018, https://arxiv.org/abs/1804.03999) that also returns its attention maps.

    In training, the output is (logits, maps): logits (B, C, *S) and, for every scale, finest first, a map (B, 1, *S_k)
    with values from 0 to 1. In evaluation, the output is the logits, so that sliding windows, TorchScript and MONAI's
    `ckpt_export` work as usual. Weights can be exchanged with an AttentionUnet. Use it with
    :class:`monai_iou.AttentionSupervisionLoss`.

    Args:
        spatial_dims, in_channels, out_channels, channels, strides, kernel_size, up_kernel_size, dropout: as for
            `monai.networks.nets.AttentionUnet`.
        coarse_outputs: number of coarser scales with logits of their own in training, for deep supervision; the output
            is then ([logits, coarser logits, ...], maps). Their layers are not part of an AttentionUnet.
        returns_maps: whether maps are returned; if not, the output in training is the logits, or the list of logits.

    Raises:
        TypeError: if `coarse_outputs` is not an integer.
        ValueError: if `coarse_outputs` is negative or exceeds the number of coarser scales.

    Example:
        >>> import torch
        >>> from monai_iou import AttentionMapUnet
        >>> network = AttentionMapUnet(2, 1, 2, channels=(4, 8, 16), strides=(2, 2))
        >>> logits, maps = network(torch.zeros(2, 1, 16, 16))
        >>> [tuple(map.shape) for map in maps]
        [(2, 1, 16, 16), (2, 1, 8, 8)]
        >>> network.eval()(torch.zeros(2, 1, 16, 16)).shape
        torch.Size([2, 2, 16, 16])
    """

    def __init__(self, *args: Any, coarse_outputs: int = 0, returns_maps: bool = True, **options: Any) -> None:
        super().__init__(*args, **options)
        checks.check_integer("coarse_outputs", coarse_outputs, "give the number of coarser scales, or 0 for none")
        if not 0 <= coarse_outputs < len(self.strides):
            message = (
                f"Expected `coarse_outputs` to be from 0 to {len(self.strides) - 1}, the scales below the finest, but "
                f"got {coarse_outputs}: give more channels and strides, or fewer outputs."
            )
            raise ValueError(message)
        self.returns_maps = returns_maps
        self.heads = nn.ModuleList(
            Convolution(self.dimensions, channels, self.out_channels, kernel_size=1, conv_only=True)
            for channels in self.channels[1 : coarse_outputs + 1]
        )

    def forward(self, x: Tensor) -> Tensor | list[Tensor] | tuple[Any, list[Tensor]]:  # type: ignore[override]
        """Return logits (B, C, *S) for an image (B, in_channels, *S), and further outputs in training; see above."""
        if torch.jit.is_scripting() or not self.training:  # type: ignore[attr-defined]
            logits: Tensor = self.model(x)
            return logits
        return self._with_maps(x)

    @torch.jit.unused
    def _with_maps(self, x: Tensor) -> Tensor | list[Tensor] | tuple[Any, list[Tensor]]:
        layers = [module for module in self.modules() if isinstance(module, AttentionLayer)]  # finest first
        maps: dict[int, Tensor] = {}
        features: dict[int, Tensor] = {}

        def keep(
            kept: dict[int, Tensor], scale: int, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
        ) -> None:
            kept[scale] = output

        hooks = [
            part.register_forward_hook(partial(keep, kept, scale))
            for scale, layer in enumerate(layers)
            for kept, part in ((maps, layer.attention.psi), (features, layer))
        ]
        try:
            logits: Tensor = self.model(x)
        finally:
            for hook in hooks:
                hook.remove()
        coarse = [head(features[scale]) for scale, head in enumerate(self.heads, 1)]
        output = [logits, *coarse] if coarse else logits
        return (output, [maps[scale] for scale in sorted(maps)]) if self.returns_maps else output


class ContextPriorHead(nn.Module):
    """Segmentation head with a context prior (Yu et al. 2020, https://arxiv.org/abs/2004.01547) in 1 to 3 dimensions.

    The features X (B, C, *S) are averaged to a coarse grid of N positions. From these, a convolution predicts the
    affinity P (B, N, N), the probability that two positions belong to the same class. P X is the context of the same
    class, and (1 - P) X that of other classes; a convolution combines both with X, and the result is resampled to *S
    and added to X. In training, the output is (logits, affinity), for :class:`monai_iou.AffinityLoss`; in evaluation,
    it is the logits.

    P takes 4 N^2 bytes per image, which is 67 MB for 16x16x16 positions, and the convolution that predicts it has C N
    weights.

    Args:
        in_channels: number of channels C of the features.
        out_channels: number of classes.
        size: shape of the coarse grid, one number per spatial dimension, with at most 4096 (16^3) positions.
        kernel_size: odd kernel size of the convolution that aggregates the neighbourhood of a position.

    Raises:
        TypeError: if `size` does not hold integers, or a number of channels or `kernel_size` is no integer.
        ValueError: if the grid has more than 4096 positions, a number of channels is below 1, or `kernel_size` is not
            odd and positive.

    Example:
        >>> import torch
        >>> from monai_iou import ContextPriorHead
        >>> head = ContextPriorHead(8, 2, size=(4, 4, 4))
        >>> logits, affinity = head(torch.zeros(1, 8, 16, 16, 16))
        >>> logits.shape, affinity.shape
        (torch.Size([1, 2, 16, 16, 16]), torch.Size([1, 64, 64]))
    """

    def __init__(self, in_channels: int, out_channels: int, size: Sequence[int], kernel_size: int = 3) -> None:
        super().__init__()
        self.size = check_grid("size", size)
        positions = math.prod(self.size)
        for name, count in (("in_channels", in_channels), ("out_channels", out_channels)):
            checks.check_count(name, count, "give the number of channels")
        checks.check_integer("kernel_size", kernel_size, "give an odd number, such as 3")
        if kernel_size < 1 or kernel_size % 2 == 0:
            message = (
                f"Expected `kernel_size` to be an odd number of at least 1, but got {kernel_size}: use "
                f"{max(kernel_size, 0) + 1}, because only an odd kernel preserves the shape of the grid."
            )
            raise ValueError(message)
        dims = len(self.size)
        self.mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[dims]
        self.gather = Convolution(dims, in_channels, in_channels, kernel_size=kernel_size, act="relu", norm="batch")
        self.affinity = Convolution(dims, in_channels, positions, kernel_size=1, conv_only=True)
        self.mix = Convolution(dims, 3 * in_channels, in_channels, kernel_size=1, act="relu", norm="batch")
        self.classify = Convolution(dims, in_channels, out_channels, kernel_size=1, conv_only=True)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits (B, out_channels, *S) for features (B, C, *S), and in training also the affinity (B, N, N)."""
        coarse = nn.functional.interpolate(x, size=self.size, mode="area")
        gathered = self.gather(coarse)
        scores = self.affinity(gathered).flatten(2).transpose(1, 2)
        # The loss takes logarithms of it: in half precision, it would be exactly 1 from a score of 8 on.
        affinity = (scores if scores.dtype == torch.float64 else scores.float()).sigmoid()
        values = gathered.flatten(2).transpose(1, 2)
        shares = values / values.shape[1]  # before the sums, which float16 might not hold
        same, other = affinity.to(values.dtype) @ shares, (1 - affinity).to(values.dtype) @ shares
        context = [part.transpose(1, 2).reshape(coarse.shape) for part in (same, other)]
        mixed = self.mix(torch.cat([coarse, context[0], context[1]], 1))
        fine = nn.functional.interpolate(mixed, size=x.shape[2:], mode=self.mode, align_corners=False)
        logits: Tensor = self.classify(x + fine)
        if torch.jit.is_scripting() or not self.training:  # type: ignore[attr-defined]
            return logits
        return logits, affinity
