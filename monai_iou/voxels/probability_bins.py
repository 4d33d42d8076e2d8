"""Histograms of probabilities, of the voxels of a class and of the others: errors are |y - p|, so they count these.

With M + 1 nodes p_k = k / M each voxel counts at the node nearest to its probability. Counts are integers: they add
over images and ranks without rounding, and in any order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from monai_iou import checks
from monai_iou.voxels.error_bins import ErrorSpec
from monai_iou.voxels.histograms import check_hard_maps, check_probabilities, count_errors_and_sums
from monai_iou.voxels.inputs import sum_dtype
from monai_iou.voxels.label_errors import label_error
from monai_iou.voxels.passes import flatten_voxels

MAX_RESOLUTION = 1 << 14


@dataclass(frozen=True, eq=False)
class ProbabilityHistograms:
    """Counts of voxels by probability, per image and class.

    Attributes:
        counts: (B, C, 2, M + 1) int64; [..., 0, k] of voxels outside the class whose probability is nearest to k / M,
            [..., 1, k] of voxels of the class.
        undefined: number of voxels whose probability is NaN, (B, C).

    Example:
        >>> import torch
        >>> from monai_iou.voxels.probability_bins import probability_histograms
        >>> prediction = torch.tensor([[[1.0, 0.9, 0.2, 0.0]]])
        >>> probability_histograms(prediction, torch.tensor([[[1, 0, 1, 0]]]), activation=None, resolution=2).counts
        tensor([[[[1, 0, 1],
                  [1, 0, 1]]]])
    """

    counts: Tensor
    undefined: Tensor


def check_resolution(resolution: int) -> int:
    """Return `resolution`; raise unless it is an even integer from 2 to 16384."""
    if not checks.is_integer(resolution) or resolution % 2 or not 2 <= resolution <= MAX_RESOLUTION:
        message = (
            f"Expected `resolution` to be an even whole number from 2 to {MAX_RESOLUTION}, but got {resolution!r}: "
            "choose for example 1000, which tells probabilities apart that differ by 0.001."
        )
        raise ValueError(message)
    return int(resolution)


def probability_histograms(
    input: Tensor,
    target: Tensor,
    *,
    activation: str | None = "softmax",
    resolution: int = 1000,
    ignore_index: int | None = None,
) -> ProbabilityHistograms:
    """Count voxels by the probability of each class, in one reading and without a copy of the probabilities.

    Args:
        input: logits (B, C, *S), 1 to 3 spatial dimensions; probabilities with `activation=None`.
        target: label map (B, 1, *S), or per-class maps (B, C, *S) of 0 and 1.
        activation: "softmax" (sigmoid if there is one channel), "sigmoid" or None.
        resolution: M, even: probabilities are rounded by at most 1 / (2 M).
        ignore_index: label of ignored voxels.

    Returns:
        :class:`ProbabilityHistograms`: `counts` of shape (B, C, 2, M + 1), of the voxels outside and inside of each
        class by probability, from 0 to 1, and `undefined`, the numbers of voxels whose probability is NaN.

    Raises:
        TypeError: if a tensor has an unsuitable type.
        ValueError: if shapes do not match, maps are soft, probabilities leave [0, 1], labels are not classes, or
            `activation` or `resolution` is out of range.

    Example:
        >>> import torch
        >>> from monai_iou.voxels.probability_bins import probability_histograms
        >>> logits = torch.tensor([[[-9.0, 0.0, 9.0, 9.0]]])
        >>> probability_histograms(logits, torch.tensor([[[0, 0, 1, 0]]]), resolution=2).counts
        tensor([[[[1, 1, 1],
                  [0, 0, 1]]]])
    """
    checks.check_input(input)
    checks.check_target(input, target)
    checks.check_choice("activation", activation, checks.ACTIVATIONS)
    if activation == "softmax" and input.shape[1] == 1:
        activation = "sigmoid"
    voxels = flatten_voxels(input.detach(), target, ignore_index)
    check_hard_maps(voxels, target)
    if activation is None:
        check_probabilities(voxels)
    limit = voxels.logits.new_ones((1, 1), dtype=sum_dtype(input))
    spec = ErrorSpec(activation, check_resolution(resolution) // 2, even=True)
    counts = count_errors_and_sums(voxels, spec, limit, None)[0].counts
    if voxels.labels is not None and bool((counts[:, :, 1].sum((1, 2)) != counts[:, 0].sum((1, 2))).any()):
        raise label_error(target, input.shape[1], ignore_index)
    undefined = counts[..., -1].sum(-1)
    # The errors of voxels outside the class are p itself: node j of 1 - e is the probability 1 - j / M.
    return ProbabilityHistograms(torch.stack([counts[:, :, 0, :-1].flip(-1), counts[:, :, 1, :-1]], dim=2), undefined)
