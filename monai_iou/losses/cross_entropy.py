"""Class-weighted cross-entropy and focal loss, computed from the voxel sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from monai_iou import checks, scores
from monai_iou.losses.arguments import explains_arguments
from monai_iou.losses.pass_loss import SumsLoss
from monai_iou.losses.weights import as_weight, scored_weights
from monai_iou.voxels.spec import PassSpec, checked_spec
from monai_iou.voxels.sums import VoxelSums


class WeightedCrossEntropyLoss(SumsLoss):
    r"""Class-weighted cross-entropy, or focal loss if `gamma` > 0, for label maps or soft per-class maps.

    .. math:: \frac{\sum_c w_c E_c}{\sum_c w_c T_c}, \qquad
              E_c = \sum_v y_{cv} (1 - p_{cv})^\gamma (-\ln p_{cv})

    Here v runs over the voxels of the whole batch, p are the probabilities and y the labels (0, 1 or a fraction), and
    :math:`T_c = \sum_v y_{cv}`. For label maps and :math:`\gamma = 0` this is
    `torch.nn.functional.cross_entropy(weight=w)`. With `sigmoid` it is the binary cross-entropy of each class,
    :math:`\sum_c w_c E_c / \sum_c w_c N` over N voxels, which equals the mean of `binary_cross_entropy_with_logits` for
    equal weights; for probabilities of a single channel it is the mean of `binary_cross_entropy`, except that
    a probability below 1e-30 counts as 1e-30, without a gradient (torch: ln p is at least -100). The focal loss is
    that of Lin et al. 2017 (https://arxiv.org/abs/1708.02002), summed over the classes (MONAI's FocalLoss averages over
    them). See :class:`IoULoss` for the shapes.

    Args:
        weight: one number per class; see :func:`monai_iou.class_weights`. A single number has no effect on the mean.
            With one channel, `weight` is the `pos_weight`, as in MONAI's DiceCELoss.
        gamma: focal exponent; 0 for the plain cross-entropy.
        label_smoothing: fraction of each label that is distributed evenly over all classes, as in torch.
        include_background: whether the sums of class 0 are included.
        to_onehot_y: accepted for compatibility with MONAI; the shape of the target decides how it is read.
        sigmoid: whether the classes are independent (multi-label).
        softmax: whether the classes are mutually exclusive; the default unless `sigmoid` is set. A single channel uses
            a sigmoid instead. With False and no `sigmoid`, the input holds probabilities.
        other_act: must be None; accepted so that all losses have the same arguments.
        reduction: "mean"; "sum" for the weighted sum, without division; or "none" for the contribution of each image
            and class, (B, C, 1, ...), which add up over the classes to the mean of the image.
        ignore_index: label of ignored voxels.
        pos_weight: with `sigmoid` or one channel, the weight of the foreground voxels of a class relative to its
            background voxels: one number, or one per scored class, as in torch's BCEWithLogitsLoss. Values above 1
            favour recall. The denominator of the mean remains the number of voxels.
        sync_batch: add the sums over all ranks before dividing; requires `reduction="mean"`.

    Raises:
        TypeError: if an argument or tensor has an unsuitable type.
        ValueError: if an argument is out of range, shapes do not match, or the target holds values that are not
            classes.

    Example:
        >>> import torch
        >>> from monai_iou import WeightedCrossEntropyLoss
        >>> loss = WeightedCrossEntropyLoss(weight=[0.1, 0.9])
        >>> round(loss(torch.zeros(1, 2, 8), torch.ones(1, 1, 8)).item(), 4)
        0.6931
    """

    @explains_arguments
    def __init__(
        self,
        weight: Sequence[float] | float | Tensor | None = None,
        gamma: float = 0.0,
        label_smoothing: float = 0.0,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool | None = None,
        other_act: Callable[[Tensor], Tensor] | None = None,
        reduction: str = "mean",
        ignore_index: int | None = None,
        *,
        pos_weight: Sequence[float] | float | Tensor | None = None,
        sync_batch: bool = False,
    ) -> None:
        if other_act is not None:
            message = (
                "Expected `other_act` to be None for a cross-entropy, but got a function: pass logits, and set "
                "softmax=True or sigmoid=True."
            )
            raise ValueError(message)
        super().__init__(
            to_onehot_y=to_onehot_y,
            sigmoid=sigmoid,
            softmax=not sigmoid if softmax is None else softmax,
            other_act=None,
            reduction=reduction,
            ignore_index=ignore_index,
            sync_batch=sync_batch,
        )
        if sync_batch and self.reduction != "mean":
            message = (
                f"Expected `reduction` to be 'mean' with sync_batch=True, but got {self.reduction!r}: set "
                "reduction='mean', because only the mean is computed from sums over all ranks."
            )
            raise ValueError(message)
        spec = checked_spec(None, "product", 1.0, True, gamma, label_smoothing, confidence=False)
        self.gamma, self.label_smoothing = spec.focal, spec.label_smoothing
        self.include_background = include_background
        self.class_weight: Tensor | None
        self.register_buffer("class_weight", as_weight(weight))
        self.pos_weight: Tensor | None
        self.register_buffer("pos_weight", as_weight(pos_weight, "pos_weight"))

    def activation(self, channels: int) -> str | None:
        """Return the activation; a single channel uses a sigmoid."""
        if self.sigmoid or (channels == 1 and self.softmax):
            return "sigmoid"
        return "softmax" if self.softmax else None

    def pass_spec(self, channels: int) -> PassSpec:
        """Return what the loss needs from the voxel pass over an input with `channels` channels."""
        if channels == 1 and not self.include_background:
            checks.warn_ignored("include_background=False", stacklevel=4)
        return PassSpec(
            self.activation(channels),
            overlap=None,
            cross_entropy=True,
            focal=self.gamma,
            label_smoothing=self.label_smoothing,
            split=self._positive_weight(channels) is not None,
        )

    def _positive_weight(self, channels: int) -> Tensor | None:
        """Return the weight of foreground voxels relative to background voxels; with one channel that is `weight`."""
        if channels > 1 and self.activation(channels) != "sigmoid":
            if self.pos_weight is not None:
                message = (
                    "Expected `pos_weight` to be None without a sigmoid, but got weights: set sigmoid=True, or give "
                    "one `weight` per class."
                )
                raise ValueError(message)
            return None
        if channels > 1 or self.class_weight is None:
            return self.pos_weight
        if self.pos_weight is not None:
            message = (
                "Expected `weight` or `pos_weight` with one channel, but got both: keep one, because they mean the "
                "same."
            )
            raise ValueError(message)
        if self.class_weight.numel() != 1:
            message = (
                f"Expected `weight` to hold 1 value with one channel, but got {self.class_weight.numel()}: give the "
                "weight of the foreground divided by that of the background."
            )
            raise ValueError(message)
        return self.class_weight

    def score(self, sums: VoxelSums, space: int) -> Tensor:
        """Return the loss from voxel sums of shape (B, C)."""
        channels = sums.target.shape[1]
        one_channel = channels == 1
        multi_label = self.sigmoid or one_channel
        if not self.include_background and sums.target.shape[1] > 1:
            sums = sums.without_background()
        classes = sums.target.shape[1]
        weight = None if one_channel else self.class_weight
        pos_weight = self._positive_weight(channels)
        if pos_weight is not None:
            pos_weight = scored_weights(pos_weight, sums.target, classes, self.include_background, "pos_weight")
        if weight is not None:
            weight = scored_weights(weight, sums.target, classes, self.include_background).expand(classes)
        if self.reduction == "mean":
            return scores.cross_entropy(
                self.pooled(sums, batch=True), weight, multi_label=multi_label, pos_weight=pos_weight
            ).squeeze(0)
        entropy = scores.weighted_entropy(sums, pos_weight)
        weighted = entropy if weight is None else entropy * weight
        if self.reduction == "sum":
            return weighted.sum()
        volume = (sums.count if multi_label else sums.target) * (1 if weight is None else weight)
        total = volume.sum(1, keepdim=True)
        shares = scores.ratio(weighted, total.expand_as(weighted), empty=0.0)
        return shares.reshape(*shares.shape, *[1] * space)
