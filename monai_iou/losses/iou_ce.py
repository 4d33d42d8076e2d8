"""The IoU loss with a cross-entropy, plain or focal: the compounds that most trainings start with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from monai_iou import checks
from monai_iou.losses.base import RegionOptions, with_region_arguments
from monai_iou.losses.compound import CompoundLoss
from monai_iou.losses.cross_entropy import WeightedCrossEntropyLoss
from monai_iou.losses.iou import IoULoss

# The arguments of a region loss that a cross-entropy takes as well.
_SHARED = ("to_onehot_y", "sigmoid", "softmax", "reduction", "ignore_index", "sync_batch")


class IoUCELoss(CompoundLoss):
    r"""IoU loss plus cross-entropy in one pass: lambda_iou * IoULoss + lambda_ce * cross-entropy.

    Args:
        lambda_iou: factor of the IoU loss.
        lambda_ce: factor of the cross-entropy.
        gamma: focal exponent of the cross-entropy, 0 for none.
        label_smoothing: label smoothing of the cross-entropy.
        weight: one number, or one per class including the background; used by both terms (the IoU term leaves out the
            background's with `include_background=False`). On one channel it is the cross-entropy's `pos_weight`, as in
            MONAI's DiceCELoss.
        pos_weight: with `sigmoid`, how often the voxels of a class count against the others in the cross-entropy; see
            :class:`WeightedCrossEntropyLoss`.
        *args: the arguments of :class:`IoULoss`, in its order.
        **options: the same, by name. Class 0 is always included in the cross-entropy. Without an
            activation the input holds probabilities for both terms.

    Raises:
        TypeError: as the terms do.
        ValueError: as the terms do.

    Example:
        >>> import torch
        >>> from monai_iou import IoUCELoss
        >>> loss = IoUCELoss(softmax=True, include_background=False)
        >>> round(loss(torch.zeros(1, 2, 4, 4), torch.ones(1, 1, 4, 4)).item(), 4)
        1.1931
    """

    @with_region_arguments
    def __init__(
        self,
        *args: Any,
        lambda_iou: float = 1.0,
        lambda_ce: float = 1.0,
        gamma: float = 0.0,
        label_smoothing: float = 0.0,
        pos_weight: Sequence[float] | float | Tensor | None = None,
        **options: Unpack[RegionOptions],
    ) -> None:
        _check_terms_fit(options)
        weight = checks.as_weight(options.pop("weight", None))
        shared: dict[str, Any] = {name: value for name, value in options.items() if name in _SHARED}
        shared = {"softmax": False, "pos_weight": pos_weight, **shared}
        entropy = WeightedCrossEntropyLoss(weight, gamma, label_smoothing, **shared)
        if weight is not None and weight.ndim == 1 and not options.get("include_background", True):
            weight = weight[1:]
        region: RegionOptions = {**options, "weight": weight}
        super().__init__([IoULoss(*args, **region), entropy], [lambda_iou, lambda_ce])
        self.names = ["iou", "focal" if gamma else "cross_entropy"]


def _check_terms_fit(options: RegionOptions) -> None:
    if options.get("other_act") is not None:
        message = "Expected `other_act` to be None with a cross-entropy, but got a function: use softmax or sigmoid."
        raise ValueError(message)
    reduction = options.get("reduction")
    apart = options.get("batch", False) or not options.get("include_background", True)
    if getattr(reduction, "value", reduction) == "none" and apart:
        message = (
            "Expected `reduction` to be 'mean' or 'sum' with batch=True or include_background=False, but got "
            "'none': the cross-entropy has a value for every image and class, the IoU term would not."
        )
        raise ValueError(message)


class IoUFocalLoss(IoUCELoss):
    """IoU loss plus focal loss in one pass.

    Args:
        gamma: focal exponent (Lin et al. 2017).
        *args: the arguments of :class:`IoULoss`, in its order.
        **options: the same, by name. `weight` is as in :class:`IoUCELoss`.
        lambda_iou: factor of the IoU loss.
        lambda_focal: factor of the focal loss.
        label_smoothing: label smoothing of the focal loss.
        pos_weight: as in :class:`IoUCELoss`.

    Raises:
        TypeError: as the terms do.
        ValueError: as the terms do.

    Example:
        >>> import torch
        >>> from monai_iou import IoUFocalLoss
        >>> loss = IoUFocalLoss(softmax=True, lambda_focal=0.5)
        >>> round(loss(torch.zeros(1, 2, 4, 4), torch.ones(1, 1, 4, 4)).item(), 4)
        0.8366
    """

    @with_region_arguments
    def __init__(
        self,
        gamma: float = 2.0,
        *args: Any,
        lambda_iou: float = 1.0,
        lambda_focal: float = 1.0,
        label_smoothing: float = 0.0,
        pos_weight: Sequence[float] | float | Tensor | None = None,
        **options: Unpack[RegionOptions],
    ) -> None:
        super().__init__(
            *args,
            gamma=gamma,
            lambda_iou=lambda_iou,
            lambda_ce=lambda_focal,
            label_smoothing=label_smoothing,
            pos_weight=pos_weight,
            **options,
        )
