"""Class-weighted cross-entropy and focal loss over the voxel sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from monai_iou import checks, scores
from monai_iou.losses.arguments import explains_arguments
from monai_iou.losses.pass_loss import SumsLoss
from monai_iou.voxels.spec import PassSpec, checked_spec
from monai_iou.voxels.sums import VoxelSums


class WeightedCrossEntropyLoss(SumsLoss):
    r"""Class-weighted cross-entropy, focal for `gamma` > 0, of label maps or soft per-class maps.

    .. math:: \frac{\sum_c w_c E_c}{\sum_c w_c T_c}, \qquad
              E_c = \sum_v y_{cv} (1 - p_{cv})^\gamma (-\ln p_{cv})

    which is `torch.nn.functional.cross_entropy(weight=w)` for label maps and :math:`\gamma = 0`. With `sigmoid`, the
    binary form of each class: :math:`\sum_c w_c E_c / \sum_c w_c N` over N voxels, the mean of
    `binary_cross_entropy_with_logits` for equal weights. Focal: Lin et al. 2017, https://arxiv.org/abs/1708.02002,
    summed over classes (MONAI's FocalLoss averages over them).

    Args:
        weight: one number per class; see :func:`monai_iou.class_weights`. One number changes nothing. On one channel it
            is `pos_weight`, as in MONAI's DiceCELoss.
        gamma: focal exponent, 0 for plain cross-entropy.
        label_smoothing: share of each label that is given to all classes alike, as in torch.
        include_background: whether the sums of class 0 are included.
        to_onehot_y: accepted for drop-in use; the target's shape decides how it is read.
        sigmoid: classes are independent (multi-label).
        softmax: classes exclude each other; the default unless `sigmoid` is set. One channel always takes a sigmoid.
        other_act: None; accepted so that all losses take the same arguments.
        reduction: "mean"; "sum" of the weighted sums, not divided; "none", the shares of each image and class that add
            up over classes to the image's mean, (B, C, 1, ...).
        ignore_index: label of ignored voxels.
        pos_weight: with `sigmoid`, how often the voxels of a class count against the others, one number or one per
            scored class, as in torch's BCEWithLogitsLoss: above 1 for more recall. The mean is still over all voxels.
        sync_batch: add the sums over all ranks before dividing; with the reduction "mean".

    Raises:
        TypeError: if a tensor has an unsuitable type.
        ValueError: if an option is out of its range, shapes do not match, or labels are outside the classes.

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
            message = "Expected `other_act` to be None for a cross-entropy, but got a function: it takes logits."
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
                f"Expected `reduction` to be 'mean' with sync_batch=True, but got {self.reduction!r}: only a mean over "
                "voxels has sums to add over the ranks."
            )
            raise ValueError(message)
        spec = checked_spec(None, "product", 1.0, True, gamma, label_smoothing, confidence=False)
        self.gamma, self.label_smoothing = spec.focal, spec.label_smoothing
        self.include_background = include_background
        self.class_weight: Tensor | None
        self.register_buffer("class_weight", checks.as_weight(weight))
        self.pos_weight: Tensor | None
        self.register_buffer("pos_weight", checks.as_weight(pos_weight, "pos_weight"))

    def activation(self, channels: int) -> str | None:
        """Return the activation; one channel takes a sigmoid."""
        if self.sigmoid or (channels == 1 and self.softmax):
            return "sigmoid"
        return "softmax" if self.softmax else None

    def pass_spec(self, channels: int) -> PassSpec:
        """Return what the loss needs of the voxel pass."""
        return PassSpec(
            self.activation(channels),
            overlap=None,
            cross_entropy=True,
            focal=self.gamma,
            label_smoothing=self.label_smoothing,
            split=self._positive_weight(channels) is not None,
        )

    def _positive_weight(self, channels: int) -> Tensor | None:
        """Return the weight of the voxels of a class against the others; on one channel `weight` means it too."""
        if self.activation(channels) != "sigmoid":
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
                "Expected `weight` or `pos_weight` on one channel, but got both: they mean the same there, keep one."
            )
            raise ValueError(message)
        if self.class_weight.numel() != 1:
            message = (
                f"Expected `weight` to hold 1 value on one channel, but got {self.class_weight.numel()}: give the "
                "weight of the foreground divided by that of the background."
            )
            raise ValueError(message)
        return self.class_weight

    def score(self, sums: VoxelSums, space: int) -> Tensor:
        """Return the loss from sums (B, C)."""
        channels = sums.target.shape[1]
        one_channel = channels == 1
        multi_label = self.sigmoid or one_channel
        if not self.include_background and sums.target.shape[1] > 1:
            sums = sums.without_background()
        classes = sums.target.shape[1]
        weight = None if one_channel else self.class_weight
        pos_weight = self._positive_weight(channels)
        if pos_weight is not None:
            checks.check_weight_length(pos_weight, classes, self.include_background, "pos_weight")
        if weight is not None:
            checks.check_weight_length(weight, classes, self.include_background)
            weight = weight.to(sums.target).expand(classes)
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
