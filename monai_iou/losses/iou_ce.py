"""The IoU loss plus a cross-entropy, plain or focal: the compound losses that most training runs start with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from monai_iou import checks
from monai_iou.losses.base import RegionOptions, check_average, with_region_arguments
from monai_iou.losses.compound import CompoundLoss
from monai_iou.losses.cross_entropy import WeightedCrossEntropyLoss
from monai_iou.losses.iou import IoULoss
from monai_iou.losses.weights import as_weight

# The arguments of a region loss that the cross-entropy accepts as well.
_SHARED = ("to_onehot_y", "sigmoid", "softmax", "reduction", "ignore_index", "sync_batch")


def _factor(term: int, name: str) -> Any:
    """Return the property of a compound loss that reads and writes the factor of a term."""

    def write(loss: CompoundLoss, factor: float) -> None:
        # Into the list, as others may hold it.
        loss.weights[term] = checks.check_positive(name, factor, allow_zero=True)

    return property(lambda loss: loss.weights[term], write, doc=f"The factor of a term, `weights[{term}]`.")


class IoUCELoss(CompoundLoss):
    r"""IoU loss plus cross-entropy, computed in one pass over the voxels.

    .. math:: \lambda_{iou} L_{IoU} + \lambda_{ce} L_{CE}

    See :class:`IoULoss` and :class:`WeightedCrossEntropyLoss` for the two terms, and :class:`IoULoss` for the shapes.

    Args:
        lambda_iou: factor of the IoU loss.
        lambda_ce: factor of the cross-entropy.
        gamma: focal exponent of the cross-entropy; 0 for the plain cross-entropy.
        label_smoothing: label smoothing of the cross-entropy, also with one channel, where MONAI's DiceCELoss has none.
        weight: one number, or one number per class including the background, for both terms. With
            `include_background=False` the IoU term ignores the weight of the background. With one channel, `weight` is
            the `pos_weight` of the cross-entropy, as in MONAI's DiceCELoss.
        pos_weight: with `sigmoid` or one channel, the weight of the foreground voxels of a class relative to its
            background voxels in the cross-entropy; see :class:`WeightedCrossEntropyLoss`.
        *args: the arguments of :class:`IoULoss`, in its order.
        **options: the same, by name. The cross-entropy always includes class 0. If no activation is set, the input
            holds probabilities for both terms.

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
        lambda_iou = checks.check_positive("lambda_iou", lambda_iou, allow_zero=True)
        lambda_ce = checks.check_positive("lambda_ce", lambda_ce, allow_zero=True)
        weight = as_weight(options.pop("weight", None))
        shared: dict[str, Any] = {name: value for name, value in options.items() if name in _SHARED}
        shared = {"softmax": False, "pos_weight": pos_weight, **shared}
        entropy = WeightedCrossEntropyLoss(weight, gamma, label_smoothing, **shared)
        if weight is not None and weight.ndim == 1 and not options.get("include_background", True):
            weight = weight[1:]
        region: RegionOptions = {**options, "weight": weight}
        super().__init__([IoULoss(*args, **region), entropy], [lambda_iou, lambda_ce])
        self.names = ["iou", "focal" if gamma else "cross_entropy"]

    lambda_iou = _factor(0, "lambda_iou")
    lambda_ce = _factor(1, "lambda_ce")

    @property
    def reduction(self) -> str:
        """The reduction of both terms."""
        terms: Any = self._modules.get("losses")
        return "mean" if terms is None else str(terms[0].reduction)

    @reduction.setter
    def reduction(self, reduction: str) -> None:
        terms: Any = self._modules.get("losses")
        if terms is None:
            return  # torch's constructor sets its own default before there are terms
        reduction = str(getattr(reduction, "value", reduction))
        checks.check_choice("reduction", reduction, checks.REDUCTIONS)
        region = terms[0]
        _check_terms_fit(
            {"reduction": reduction, "batch": region.batch, "include_background": region.include_background}
        )
        check_average(region.average, reduction)
        for term in terms:
            term.reduction = reduction


def _check_terms_fit(options: RegionOptions) -> None:
    if options.get("other_act") is not None:
        message = (
            "Expected `other_act` to be None with a cross-entropy, but got a function: set softmax=True or "
            "sigmoid=True instead."
        )
        raise ValueError(message)
    reduction = options.get("reduction")
    shapes_differ = options.get("batch", False) or not options.get("include_background", True)
    if getattr(reduction, "value", reduction) == "none" and shapes_differ:
        message = (
            "Expected `reduction` to be 'mean' or 'sum' with batch=True or include_background=False, but got "
            "'none': choose one of these, because the cross-entropy has a value for every image and class but the IoU "
            "term would not."
        )
        raise ValueError(message)


class IoUFocalLoss(IoUCELoss):
    r"""IoU loss plus focal loss, computed in one pass over the voxels.

    .. math:: \lambda_{iou} L_{IoU} + \lambda_{focal} L_{focal}

    Args:
        gamma: focal exponent (Lin et al. 2017, https://arxiv.org/abs/1708.02002).
        *args: the arguments of :class:`IoULoss`, in its order.
        **options: the same, by name. `weight` is as in :class:`IoUCELoss`. The focal loss always includes class 0; that
            of MONAI's DiceFocalLoss leaves it out with `include_background=False`.
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
            lambda_ce=checks.check_positive("lambda_focal", lambda_focal, allow_zero=True),
            label_smoothing=label_smoothing,
            pos_weight=pos_weight,
            **options,
        )

    lambda_focal = _factor(1, "lambda_focal")
