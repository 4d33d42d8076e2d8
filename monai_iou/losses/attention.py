"""Losses that supervise attention maps, so that a network attends to the foreground and its surroundings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss
from typing_extensions import Unpack

from monai_iou import checks
from monai_iou.distributed import fails_together, is_synchronised
from monai_iou.losses.arguments import check_factors, explains_arguments
from monai_iou.losses.base import RegionOptions, with_region_arguments
from monai_iou.losses.iou import IoULoss
from monai_iou.losses.label_pooling import pool_labels
from monai_iou.losses.nested_instances import without_regions
from monai_iou.losses.pass_loss import call_loss
from monai_iou.spacing import check_spacing, image_spacings
from monai_iou.voxels.inputs import plain
from monai_iou.voxels.labels import checked_numbers, valid_voxels
from monai_iou.voxels.partly_labelled import Labelled, labelled_pairs

# Marks ignored voxels of a context map. The label's own `ignore_index` may be 0 or 1, which are values of the map.
_IGNORED = -1
# Distances in mm are equal if they differ by less than half of this share: float32 rounds sums of their squares.
_ROUNDING = 1e-5


def dilate(mask: Tensor, distance: float, spacing: Sequence[float]) -> Tensor:
    """Return the voxels whose Euclidean distance to a mask is at most `distance` mm, computed on the mask's device.

    The result is exact. The squared distance transform is computed axis by axis, as the minimum over shifted copies;
    no voxel further away than `distance` matters, so that a few shifts per axis suffice.

    Args:
        mask: (B, 1, *S) bool.
        distance: in mm; 0 returns the mask itself.
        spacing: voxel size in mm along each of the axes S.

    Returns:
        (B, 1, *S) bool.

    Example:
        >>> import torch
        >>> from monai_iou.losses.attention import dilate
        >>> dilate(torch.tensor([[[0, 0, 0, 1, 0, 0]]]) > 0, distance=2.0, spacing=[1.5]).int()
        tensor([[[0, 0, 1, 1, 1, 0]]], dtype=torch.int32)
    """
    squared = torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, torch.inf)
    for axis, size in enumerate(spacing, 2):
        reach = min(int(distance / size * (1 + _ROUNDING)), mask.shape[axis] - 1)
        nearest = squared.clone()
        for step in range(1, reach + 1):
            length = mask.shape[axis] - step
            cost = (step * size) ** 2
            before, after = squared.narrow(axis, 0, length), squared.narrow(axis, step, length)
            view = nearest.narrow(axis, step, length)
            torch.minimum(view, before + cost, out=view)
            view = nearest.narrow(axis, 0, length)
            torch.minimum(view, after + cost, out=view)
        squared = nearest
    return squared <= distance**2 * (1 + _ROUNDING)


class ContextAttentionLoss(_Loss):
    r"""IoU loss between attention maps and the foreground with a margin of context around it, at every scale.

    .. math:: \sum_k w_k \left(1 - \frac{\sum \min(a_k, t_k)}{\sum \max(a_k, t_k)}\right), \qquad
              t_k = \mathrm{area}_k\left[\mathrm{distance\ to\ foreground} \le d\right]

    The target t_k is the foreground of the label (all classes except 0), dilated by d mm according to the voxel size,
    and then averaged to the grid of the attention map a_k. Averaging preserves lesions that are smaller than a voxel of
    the map. A narrow margin emphasises the border of a lesion; a wide margin includes the tissue that distinguishes a
    lesion from similar structures. The overlap is that of the Jaccard metric loss (Wang et al. 2023,
    https://arxiv.org/abs/2302.05666), which accepts fractions.

    Args:
        context_mm: width d of the margin in mm; 0 supervises with the foreground itself.
        spacing: voxel size of the label in mm; by default that of a MetaTensor target, or else 1 mm.
        weights: one factor w_k per scale, finest first; by default equal factors with a sum of 1.
        **options: arguments of :class:`IoULoss`, such as `empty` and `sync_batch`; `soft_label` is always True.

    Raises:
        TypeError: as :class:`IoULoss`.
        ValueError: as :class:`IoULoss`, or if an argument is out of range, or a class was not annotated (its map is NaN
            everywhere).

    Example:
        >>> import torch
        >>> from monai_iou import ContextAttentionLoss
        >>> labels = torch.tensor([[[0, 0, 0, 1, 1, 0, 0, 0]]])
        >>> maps = [torch.tensor([[[0.0, 0, 1, 1, 1, 1, 0, 0]]]), torch.tensor([[[0.5, 1, 1, 0.5]]])]
        >>> round(ContextAttentionLoss(context_mm=1.0)(maps, labels).item(), 4)
        0.1667
    """

    @with_region_arguments
    def __init__(
        self,
        context_mm: float = 5.0,
        spacing: Sequence[float] | float | None = None,
        weights: Sequence[float] | None = None,
        **options: Unpack[RegionOptions],
    ) -> None:
        super().__init__()
        self.context_mm = checks.check_positive("context_mm", context_mm, allow_zero=True)
        self.spacing = check_spacing(spacing)
        self.weights = check_factors(weights, of="scale")
        options["soft_label"] = True
        self.ignore_index = checks.check_ignore_index(options.get("ignore_index"))
        options["ignore_index"] = None if self.ignore_index is None else _IGNORED
        self.region_loss = IoULoss(**options)

    def forward(self, input: Tensor | Sequence[Tensor], target: Tensor) -> Tensor:
        """Return the loss.

        Args:
            input: a list of maps (B, 1, *S_k) with values from 0 to 1, finest first, or a single map.
            target: label map (B, 1, *S), or per-class maps (B, C, *S) whose channel 0 is the background.

        Returns:
            A scalar, or (B, 1, 1, ...) with `reduction="none"`.

        Raises:
            TypeError: if a tensor has an unsuitable type.
            ValueError: if there is no map, a map has several channels or another batch size, `weights` do not fit, or
                the target holds values that are not classes.
        """
        maps = _as_list(input)
        weights = [1 / max(len(maps), 1)] * len(maps) if self.weights is None else self.weights
        with fails_together(self.region_loss.sync_batch, maps[0] if maps else None):
            _check_maps(maps, target, len(weights))
            foreground = self._context(target)
            labels = [self._pooled(foreground, values.shape[2:]) for values in maps]
        total = foreground.new_zeros(())
        for weight, values, label in zip(weights, maps, labels, strict=True):
            total = total + weight * self.region_loss(values, label)
        return total

    def _pooled(self, foreground: Tensor, size: Sequence[int]) -> Tensor:
        if tuple(size) == tuple(foreground.shape[2:]):
            return foreground
        return pool_labels(foreground, size, 1, "area", self.region_loss.ignore_index)

    def _context(self, target: Tensor) -> Tensor:
        """Return the dilated foreground (B, 1, *S) as 0 and 1, with ignored voxels marked."""
        space = target.ndim - 2
        spacings = image_spacings(None, target, self.spacing, len(target), space)
        label = plain(target)
        valid = valid_voxels(label, self.ignore_index)
        maps = label[:, 1:]
        # Whole numbers are compared with 0, because torch does not order unsigned types of 16 bits or more.
        mask = label != 0 if label.shape[1] == 1 else (maps >= 0.5 if maps.is_floating_point() else maps != 0)
        mask = mask.any(1, keepdim=True)
        mask = mask if valid is None else mask & valid
        parts = [dilate(mask[index : index + 1], self.context_mm, spacing) for index, spacing in enumerate(spacings)]
        context = torch.cat(parts).float() if parts else mask.float()
        context = checked_numbers(context, label, valid, self.ignore_index)
        return context if valid is None else context.masked_fill(~valid, _IGNORED)


def _as_list(input: Tensor | Sequence[Tensor]) -> list[Tensor]:
    if isinstance(input, Tensor):
        return [input]
    if not isinstance(input, (list, tuple)):
        message = (
            f"Expected `input` to be an attention map or a list of them, but got {type(input).__name__}: pass the maps "
            "that the network returns in training mode."
        )
        raise TypeError(message)
    return list(input)


def _check_maps(maps: Sequence[Tensor], target: Tensor, expected: int) -> None:
    checks.check_tensor("target", target)
    if not maps:
        message = (
            "Expected `input` to hold at least one attention map, but got none: pass the output of a network in "
            "training mode."
        )
        raise ValueError(message)
    if len(maps) != expected:
        message = (
            f"Expected `weights` to hold one factor per map ({len(maps)}), but got {expected}: give as many factors as "
            "the network returns maps, or leave `weights` out."
        )
        raise ValueError(message)
    for values in maps:
        checks.check_input(values)
        if values.shape[:2] != (target.shape[0], 1) or values.ndim != target.ndim:
            message = (
                f"Expected every attention map to have shape (B, 1, *S) with the batch and dimensions of the target "
                f"{tuple(target.shape)}, but got {tuple(values.shape)}: pass attention maps, not logits."
            )
            raise ValueError(message)
    annotated = labelled_pairs(target, target, None) if target.shape[1] > 1 else None
    if annotated is not None and not bool(annotated.all()):
        message = (
            "Expected every class of `target` to be annotated with ContextAttentionLoss, which cannot leave classes "
            "out, but got a map that is NaN everywhere: leave this image out, or train without this loss."
        )
        raise ValueError(message)


def _finest(logits: Tensor | Sequence[Tensor]) -> Tensor:
    """Return logits (B, C, *S), or the first of those at several scales."""
    first = logits[0] if isinstance(logits, (list, tuple)) and logits else logits
    if not isinstance(first, Tensor) or first.ndim < 2:
        given = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
        message = (
            f"Expected the first part of `input` to be logits (B, C, *S) or a list of them, but got {given}: use a "
            "network that returns (logits, maps) in training, such as AttentionMapUnet."
        )
        raise ValueError(message)
    return first


class AttentionSupervisionLoss(_Loss):
    r"""A segmentation loss plus a loss on the maps that the network returns in addition to its logits.

    .. math:: L(\mathrm{logits}, \mathrm{target}) + \lambda\, L_{attention}(\mathrm{maps}, \mathrm{target})

    For networks that return (logits, maps) in training and logits in evaluation, such as `AttentionMapUnet` with
    `ContextAttentionLoss`, or `ContextPriorHead` with `AffinityLoss`. MONAI's SupervisedTrainer passes the network's
    output to the loss unchanged, so that a config needs nothing but the network and this loss.

    Args:
        loss: the segmentation loss, called with (logits, target).
        attention: the loss on the maps, called with (maps, target).
        lambda_attention: factor of the loss on the maps.

    Attributes:
        last_terms: "segmentation" and, if the input had maps, "attention" at the last call, detached and not weighted.

    Raises:
        TypeError: if a loss is not a module, or the factor is not a number.
        ValueError: if the factor is negative.

    Example:
        >>> import torch
        >>> from monai_iou import AttentionMapUnet, AttentionSupervisionLoss, ContextAttentionLoss, IoUCELoss
        >>> network = AttentionMapUnet(2, 1, 2, channels=(4, 8, 16), strides=(2, 2))
        >>> loss = AttentionSupervisionLoss(IoUCELoss(softmax=True), ContextAttentionLoss(context_mm=3.0))
        >>> value = loss(network(torch.rand(2, 1, 16, 16)), torch.ones(2, 1, 16, 16))
        >>> sorted(loss.last_terms)
        ['attention', 'segmentation']
    """

    @explains_arguments
    def __init__(self, loss: nn.Module, attention: nn.Module, lambda_attention: float = 0.5) -> None:
        super().__init__()
        self.loss = checks.check_module("loss", loss)
        self.attention = checks.check_module("attention", attention)
        self.lambda_attention = checks.check_positive("lambda_attention", lambda_attention, allow_zero=True)
        self._synchronised = is_synchronised(loss), is_synchronised(attention)
        self.last_terms: dict[str, Tensor] = {}

    def forward(
        self,
        input: Tensor | tuple[Tensor | Sequence[Tensor], Tensor | Sequence[Tensor]],
        target: Tensor,
        labelled: Labelled = None,
    ) -> Tensor:
        """Return the weighted sum, or the segmentation loss alone if `input` holds only logits, as in evaluation.

        Args:
            input: (logits, maps) or logits, (B, C, *S). The logits may be a list of several scales if `loss` is a
                MultiScaleLoss.
            target: the label, (B, 1, *S) or (B, C, *S); it may contain the precomputed regions of an InstanceIoULoss
                in `loss`.
            labelled: (B, C) bool, False where a class was not annotated in an image; see :meth:`IoULoss.forward`. Only
                for plain logits, because maps of the whole foreground cannot be supervised by a part of its classes.

        Raises:
            TypeError: as the two losses do.
            ValueError: as the two losses do, if `input` is neither logits nor (logits, maps), or if it contains maps
                and some classes were not annotated.
        """
        if isinstance(input, Tensor):
            alone = call_loss(self.loss, input, target, labelled)
            self.last_terms = {"segmentation": alone.detach().clone()}  # `loss /= 2` is not to change it
            return alone
        if not isinstance(input, (tuple, list)) or len(input) != 2:
            message = (
                f"Expected `input` to be (logits, maps) or logits, but got {type(input).__name__}: use a network that "
                "returns its maps in training, such as AttentionMapUnet."
            )
            raise ValueError(message)
        finest = _finest(input[0])
        segmentation_sums, attention_sums = self._synchronised
        # A loss that sums nothing over the ranks would fail on one of them, while the others wait for its next sums.
        with fails_together(segmentation_sums and not attention_sums, finest):
            label = without_regions(self.loss, target, finest.shape[1])
            attention = call_loss(self.attention, input[1], label, labelled)
        with fails_together(attention_sums and not segmentation_sums, finest):
            segmentation = call_loss(self.loss, input[0], target, labelled)
        self.last_terms = {"segmentation": segmentation.detach(), "attention": attention.detach()}
        return segmentation + self.lambda_attention * attention
