"""The loss of a context prior, which predicts which positions of a volume belong to the same class."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from monai_iou import checks
from monai_iou.losses.arguments import explains_arguments
from monai_iou.losses.label_pooling import DOWNSAMPLINGS, pool_labels
from monai_iou.spacing import check_grid, check_positions
from monai_iou.tables import counted
from monai_iou.voxels.compact_labels import equals
from monai_iou.voxels.inputs import plain
from monai_iou.voxels.labels import checked_numbers, valid_voxels


class AffinityLoss(_Loss):
    r"""Affinity loss of a context prior (CPNet, Yu et al. 2020) in 1 to 3 dimensions.

    With the true affinity :math:`a_{ij} = [y_i = y_j]` of N positions and the predicted affinity p:

    .. math:: L = \frac{\lambda_u}{N^2} \sum_{ij} \mathrm{BCE}(p_{ij}, a_{ij}) - \frac{\lambda_g}{N} \sum_i \left(
              \ln \frac{\sum_j a_{ij} p_{ij}}{\sum_j p_{ij}} + \ln \frac{\sum_j a_{ij} p_{ij}}{\sum_j a_{ij}} +
              \ln \frac{\sum_j (1 - a_{ij}) (1 - p_{ij})}{\sum_j (1 - a_{ij})} \right)

    The three logarithms are those of the precision, recall and specificity of row i. If all positions have the class of
    position i, its specificity is undefined and left out.

    This is the formula of the paper (https://arxiv.org/abs/2004.01547). The authors' code differs: it leaves out the
    pairs i = j, and adds 100 for an undefined specificity.

    Args:
        size: shape of the grid of positions, one number per spatial dimension; by default, the shape of the target
            divided by the same whole number along every axis.
        downsample: how the label is downsampled to the grid. "max": a position takes the rarest class that any of its
            voxels has. "nearest": it takes the class of its middle voxel, as in the paper, which loses small
            structures.
        lambda_unary: factor of the binary cross-entropy, :math:`\lambda_u`.
        lambda_global: factor of precision, recall and specificity, :math:`\lambda_g`.
        sigmoid: whether the input holds logits.
        ignore_index: label of ignored voxels.

    Raises:
        TypeError: if `size` does not hold integers, or an argument or tensor has an unsuitable type.
        ValueError: if an argument is out of range; when called, if shapes do not match, or the target holds values that
            are not class numbers.

    Example:
        >>> import torch
        >>> from monai_iou import AffinityLoss
        >>> labels = torch.tensor([[[0, 0, 1, 1]]])
        >>> perfect = (labels == labels.transpose(1, 2)).float()
        >>> AffinityLoss()(perfect, labels).item()
        0.0
        >>> round(AffinityLoss()(torch.full((1, 4, 4), 0.5), labels).item(), 4)
        2.7726
    """

    @explains_arguments
    def __init__(
        self,
        size: Sequence[int] | None = None,
        downsample: str = "max",
        lambda_unary: float = 1.0,
        lambda_global: float = 1.0,
        sigmoid: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        checks.check_choice("downsample", downsample, [mode for mode in DOWNSAMPLINGS if mode != "area"])
        self.size = None if size is None else check_grid("size", size)
        self.downsample, self.sigmoid = downsample, sigmoid
        self.lambda_unary = checks.check_positive("lambda_unary", lambda_unary, allow_zero=True)
        self.lambda_global = checks.check_positive("lambda_global", lambda_global, allow_zero=True)
        self.ignore_index = checks.check_ignore_index(ignore_index)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss.

        Args:
            input: predicted affinity (B, N, N): probabilities, or logits with `sigmoid`. N is at most 4096.
            target: label map (B, 1, *S).

        Returns:
            A scalar, float32 or float64.

        Raises:
            TypeError: if `input` is not a floating-point tensor, or `target` is not a tensor.
            ValueError: if shapes do not match, or the target holds values that are not class numbers.
        """
        size = self._grid(input, target)
        labels = plain(target)
        whole, kept = labels, valid_voxels(labels, self.ignore_index)
        if size != tuple(target.shape[2:]):
            labels = pool_labels(labels, size, None, self.downsample, self.ignore_index)
        flat = labels.flatten(1)
        values = plain(input)
        values = values if values.dtype == torch.float64 else values.float()
        values = checked_numbers(values, whole, kept, self.ignore_index)
        same = (flat.unsqueeze(2) == flat.unsqueeze(1)).to(values)
        valid = (
            torch.ones_like(flat, dtype=torch.bool) if self.ignore_index is None else ~equals(flat, self.ignore_index)
        )
        pairs = valid.unsqueeze(2) & valid.unsqueeze(1)
        values = torch.where(pairs, values, 0)
        terms = [self.lambda_unary * self._unary(values, same, pairs)] if self.lambda_unary else []
        if self.lambda_global:
            p = values.sigmoid() if self.sigmoid else values
            terms.append(self.lambda_global * _global_terms(p, same, pairs, valid))
        return torch.stack(terms).sum() if terms else values.sum() * 0

    def _unary(self, values: Tensor, same: Tensor, pairs: Tensor) -> Tensor:
        if self.sigmoid:
            entropy = nn.functional.binary_cross_entropy_with_logits(values, same, reduction="none")
        else:
            entropy = -(same * _log(values) + (1 - same) * _log(1 - values))
        return torch.where(pairs, entropy, 0).sum() / pairs.sum().clamp_min(1)

    def _grid(self, input: Tensor, target: Tensor) -> tuple[int, ...]:
        """Return the shape of the grid after checking input and target against it."""
        if not isinstance(input, Tensor) or not input.is_floating_point():
            kind = getattr(input, "dtype", type(input).__name__)
            message = (
                f"Expected `input` to be floating point, but got {kind}: pass predicted probabilities or, "
                "with sigmoid=True, logits."
            )
            raise TypeError(message)
        if input.ndim != 3 or input.shape[1] != input.shape[2]:
            message = (
                f"Expected `input` to be an affinity (B, N, N), but got {tuple(input.shape)}: pass one row and one "
                "column for each position of the grid."
            )
            raise ValueError(message)
        checks.check_tensor("target", target)
        if target.ndim < 3 or target.shape[1] != 1 or target.shape[0] != input.shape[0]:
            remedy = (
                "convert per-class maps with argmax(1, keepdim=True), or add a missing channel, target.unsqueeze(1)"
            )
            if target.ndim < 3:
                remedy = "add the batch dimension, the channel dimension or both"
            elif target.shape[1] == 1:
                remedy = "pass both with the same batch"
            message = (
                f"Expected `target` to be a label map (B, 1, *S) of {counted(input.shape[0], 'image')}, "
                f"but got {tuple(target.shape)}: {remedy}."
            )
            raise ValueError(message)
        checks.check_device("target", target, input)
        space, positions = tuple(target.shape[2:]), input.shape[1]
        check_positions("input", (positions,))
        factor = round((math.prod(space) / positions) ** (1 / len(space))) if positions else 0
        size = self.size or tuple(side // max(factor, 1) for side in space)
        if math.prod(size) != positions or len(size) != len(space):
            remedy = f"give `size`, the shape of the grid for a target of shape {space}"
            if self.size and len(size) == len(space):
                remedy = "give AffinityLoss and ContextPriorHead the same `size`"
            elif self.size:
                remedy = f"give `size` one number for each spatial dimension of a target of shape {space}"
            message = (
                f"Expected `input` to have one row for each position of the grid {size}, but got "
                f"{counted(positions, 'row')}: {remedy}."
            )
            raise ValueError(message)
        return size


def _log(values: Tensor) -> Tensor:
    """Return the logarithm; values below 1e-30 count as 1e-30 and get no gradient, as in the voxel pass."""
    return values.clamp_min(1e-30).log()


def _global_terms(p: Tensor, same: Tensor, pairs: Tensor, valid: Tensor) -> Tensor:
    """Return -ln precision - ln recall - ln specificity, averaged over the rows."""
    other = (1 - same) * pairs
    p, same = p * pairs, same * pairs
    hit = (same * p).sum(2)
    rejected, others = (other * (1 - p)).sum(2), other.sum(2)
    precision = _log(hit) - _log(p.sum(2))
    recall = _log(hit) - _log(same.sum(2))
    specificity = torch.where(others > 0, _log(rejected) - _log(torch.where(others > 0, others, 1)), 0)
    return -torch.where(valid, precision + recall + specificity, 0).sum() / valid.sum().clamp_min(1)
