"""Variants of the IoU loss for classes of unequal size: logarithm, exponent, asymmetric errors, volume weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from monai_iou import checks, scores
from monai_iou.losses.base import RegionLoss, RegionOptions, suppression, with_region_arguments
from monai_iou.losses.weights import scored_weights
from monai_iou.voxels.spec import PassSpec
from monai_iou.voxels.sums import VoxelSums


class LogIoULoss(RegionLoss):
    r"""Logarithmic IoU loss: its gradient grows as 1 / IoU, so that a completely missed class has the largest gradient.

    .. math:: (-\ln \mathrm{IoU}_c)^\gamma, \qquad \mathrm{IoU}_c = \frac{I + s_{nr}}{U + s_{dr}}

    The exponent is that of the exponential logarithmic loss (Wong et al. 2018, https://arxiv.org/abs/1809.00076, for
    Dice): an exponent below 1 emphasises classes with a high IoU, an exponent above 1 those with a low IoU. The loss
    has no upper bound. See :class:`IoULoss` for the symbols and the shapes.

    Args:
        gamma: exponent, above 0.
        *args: the arguments of :class:`IoULoss`, in its order.
        **options: the same, by name.

    Raises:
        TypeError: as :class:`IoULoss`.
        ValueError: as :class:`IoULoss`, or if `gamma` is not above 0.

    Example:
        >>> import torch
        >>> from monai_iou import LogIoULoss
        >>> round(LogIoULoss(softmax=True)(torch.zeros(1, 2, 4, 4), torch.ones(1, 1, 4, 4)).item(), 4)
        7.1428
    """

    @with_region_arguments
    def __init__(self, gamma: float = 1.0, *args: Any, **options: Unpack[RegionOptions]) -> None:
        super().__init__(*args, **options)
        self.gamma = checks.check_positive("gamma", gamma)

    def class_terms(self, sums: VoxelSums) -> Tensor:
        """Return (-ln IoU)^gamma of each class, (B, C)."""
        iou = scores.iou(sums.intersection, sums.prediction, sums.target, self.smooth_nr, self.smooth_dr)
        # Without smoothing, a missed class has IoU 0; rounding can put the IoU of a perfect class above 1.
        return scores.power(-iou.clamp(torch.finfo(iou.dtype).tiny, 1).log(), self.gamma)


class FocalIoULoss(RegionLoss):
    r"""IoU loss raised to a power, which shifts the emphasis between well and poorly segmented classes.

    .. math:: (1 - \mathrm{IoU}_c)^\gamma

    gamma > 1 emphasises the images and classes with the lowest IoU, as the focal loss does for voxels; gamma < 1 keeps
    a gradient on those that are nearly right. gamma = 1 is :class:`IoULoss`, which defines the symbols and the shapes.

    Args:
        gamma: exponent, above 0.
        *args: the arguments of :class:`IoULoss`, in its order.
        **options: the same, by name.

    Raises:
        TypeError: as :class:`IoULoss`.
        ValueError: as :class:`IoULoss`, or if `gamma` is not above 0.

    Example:
        >>> import torch
        >>> from monai_iou import FocalIoULoss
        >>> round(FocalIoULoss(softmax=True)(torch.zeros(1, 2, 4, 4), torch.ones(1, 1, 4, 4)).item(), 4)
        0.625
    """

    @with_region_arguments
    def __init__(self, gamma: float = 2.0, *args: Any, **options: Unpack[RegionOptions]) -> None:
        super().__init__(*args, **options)
        self.gamma = checks.check_positive("gamma", gamma)

    def class_terms(self, sums: VoxelSums) -> Tensor:
        """Return (1 - IoU)^gamma of each class, (B, C)."""
        return scores.power(
            1 - scores.iou(sums.intersection, sums.prediction, sums.target, self.smooth_nr, self.smooth_dr), self.gamma
        )


class FocalTverskyLoss(RegionLoss):
    r"""Focal Tversky loss: false positives and false negatives have different weights.

    .. math:: \left(1 - \frac{I + s_{nr}}{I + \alpha\,FP + \beta\,FN + s_{dr}}\right)^\gamma,
              \qquad FP = P - I, \quad FN = T - I

    beta > alpha favours recall, which is usually what small lesions lack. alpha = beta = gamma = 1 is :class:`IoULoss`;
    alpha = beta = 1/2 and gamma = 1 is the Dice loss. The Tversky loss is that of Salehi et al. 2017
    (https://arxiv.org/abs/1706.05721), the exponent that of Abraham & Khan 2019 (https://arxiv.org/abs/1810.07842),
    whose gamma of 4/3 corresponds to an exponent of 0.75 here. See :class:`IoULoss` for the symbols and the shapes.

    Args:
        alpha: weight of false positives, as in MONAI's TverskyLoss.
        beta: weight of false negatives.
        gamma: exponent, above 0.
        *args: the arguments of :class:`IoULoss`, in its order.
        **options: the same, by name. A `power` q above 1 reduces P and with it FP, so that the Tversky index would
            exceed 1 at wrong predictions if alpha (q - 1) were above beta, or, with `soft_label`, alpha unequal to
            beta; both are refused.

    Raises:
        TypeError: as :class:`IoULoss`.
        ValueError: as :class:`IoULoss`; if `gamma` is not above 0, or `alpha` or `beta` is negative, or both are 0; or
            if `power` and the weights do not go together.

    Example:
        >>> import torch
        >>> from monai_iou import FocalTverskyLoss
        >>> loss = FocalTverskyLoss(alpha=0.3, beta=0.7, gamma=1.0, softmax=True, include_background=False)
        >>> round(loss(torch.zeros(1, 2, 4, 4), torch.ones(1, 1, 4, 4)).item(), 4)
        0.4118
    """

    @with_region_arguments
    def __init__(
        self,
        alpha: float = 0.3,
        beta: float = 0.7,
        gamma: float = 0.75,
        *args: Any,
        **options: Unpack[RegionOptions],
    ) -> None:
        super().__init__(*args, **options)
        self.alpha = checks.check_positive("alpha", alpha, allow_zero=True)
        self.beta = checks.check_positive("beta", beta, allow_zero=True)
        self.gamma = checks.check_positive("gamma", gamma)
        if self.alpha == self.beta == 0:
            message = (
                "Expected `alpha` or `beta` to be above 0, but got 0 for both: raise one of them, because otherwise no "
                "error would count."
            )
            raise ValueError(message)
        self._check_power()

    @property
    def has_soft_form(self) -> bool:
        """Whether `soft_label` can be set: with a power of 2 only if both weights are equal."""
        return super().has_soft_form and (self.power == 1 or self.alpha == self.beta)

    def _check_power(self) -> None:
        """Refuse a power for which the index exceeds 1, so that the best prediction would be a wrong one.

        A voxel with y = 1 adds alpha (p^q - p) + beta (1 - p) to the denominator beside I. It is convex in p and 0 at
        p = 1: it is negative below 1 if its slope alpha (q - 1) - beta there is positive.
        """
        if self.power == 1:
            return
        if self.soft_label and not self.has_soft_form:
            message = (
                "Expected `alpha` and `beta` to be equal with soft_label=True and a `power` of 2, but got "
                f"{self.alpha:g} and {self.beta:g}: leave `power` at 1 and squared_pred out, or give both one value."
            )
            raise ValueError(message)
        slope = self.alpha * (min(self.power, 2.0) - 1)  # above 2, `power` alone makes every loss negative
        if slope > self.beta * (1 + 1e-9):
            message = (
                f"Expected `beta` to be at least {slope:g}, which is `alpha` times (q - 1) with a `power` q of "
                f"{self.power:g}, but got {self.beta:g}: leave `power` at 1 and squared_pred out, or raise `beta`, "
                "because wrong predictions would have a lower loss than right ones."
            )
            raise ValueError(message)

    def pass_spec(self, channels: int) -> PassSpec:
        """Return what the loss needs from the voxel pass over an input with `channels` channels."""
        self._check_power()
        return super().pass_spec(channels)

    def class_terms(self, sums: VoxelSums) -> Tensor:
        """Return the focal Tversky loss of each class, (B, C)."""
        return scores.power(1 - self.index(sums), self.gamma)

    def index(self, sums: VoxelSums) -> Tensor:
        """Return the Tversky index of each class, (B, C)."""
        return scores.tversky(
            sums.intersection, sums.prediction, sums.target, self.alpha, self.beta, self.smooth_nr, self.smooth_dr
        )


class LogTverskyLoss(FocalTverskyLoss):
    r"""Logarithm of the Tversky index, raised to a power: false positives and negatives have different weights.

    .. math:: (-\ln \mathrm{TI}_c)^\gamma, \qquad
              \mathrm{TI}_c = \frac{I + s_{nr}}{I + \alpha\,FP + \beta\,FN + s_{dr}}

    As for :class:`LogIoULoss`, the gradient grows as 1 / TI, so that a completely missed class has the largest
    gradient. alpha = beta = 1 is :class:`LogIoULoss`; alpha = beta = 1/2 is the exponential logarithmic Dice loss (Wong
    et al. 2018, https://arxiv.org/abs/1809.00076). The loss has no upper bound. See :class:`IoULoss` for the symbols
    and the shapes.

    Args:
        alpha: weight of false positives, as in MONAI's TverskyLoss.
        beta: weight of false negatives.
        gamma: exponent, above 0.
        *args: the arguments of :class:`IoULoss`, in its order.
        **options: the same, by name. A Tversky index above 1, which is possible with a `power` above 2, counts as 1.

    Raises:
        TypeError: as :class:`IoULoss`.
        ValueError: as :class:`FocalTverskyLoss`.

    Example:
        >>> import torch
        >>> from monai_iou import LogTverskyLoss
        >>> loss = LogTverskyLoss(alpha=0.3, beta=0.7, softmax=True, include_background=False)
        >>> round(loss(torch.zeros(1, 2, 4, 4), torch.ones(1, 1, 4, 4)).item(), 4)
        0.5306
    """

    @with_region_arguments
    def __init__(
        self, alpha: float = 0.3, beta: float = 0.7, gamma: float = 1.0, *args: Any, **options: Unpack[RegionOptions]
    ) -> None:
        super().__init__(alpha, beta, gamma, *args, **options)

    def class_terms(self, sums: VoxelSums) -> Tensor:
        """Return (-ln TI)^gamma of each class, (B, C)."""
        index = self.index(sums)
        return scores.power(-index.clamp(torch.finfo(index.dtype).tiny, 1).log(), self.gamma)


class GeneralizedIoULoss(RegionLoss):
    r"""Generalised IoU loss: one ratio for all classes, in which each class is weighted by its inverse volume.

    .. math:: 1 - \frac{\sum_c w_c I_c + s_{nr}}{\sum_c w_c U_c + s_{dr}}, \qquad
              w_c = 1/T_c^2, \; 1/T_c \; \text{or} \; 1

    This is the generalised Dice loss of Sudre et al. 2017 (https://arxiv.org/abs/1707.03237) and of MONAI's
    GeneralizedDiceLoss, with the IoU instead of Dice. The smoothing is added exactly as in the formula, as in MONAI.
    With "square", a class of T voxels contributes about 1 / T to each sum, so that a smoothing of 1e-5 has an effect if
    every class has 10^4 voxels or more: then lower `smooth_nr` and `smooth_dr` together, or use "simple". See
    :class:`IoULoss` for the symbols and the shapes.

    Args:
        w_type: "square" for 1 / T^2, "simple" for 1 / T, or "uniform" for 1. A class that is absent from the image
            takes the largest weight of the other classes. The gradient with respect to a soft target is exact: it
            includes that of the weights. (MONAI's GeneralizedDiceLoss has no such gradient.)
        *args: the arguments of :class:`IoULoss`, in its order.
        **options: the same, by name. `weight` multiplies w_c. `empty="skip"` leaves absent classes out of both sums.
            `empty="suppress"` does so too, and then averages over the classes: each present class contributes the
            common term, each absent class its own suppression term. `reduction="none"` returns one value per image,
            (B, 1, 1, ...).

    Raises:
        TypeError: as :class:`IoULoss`.
        ValueError: as :class:`IoULoss`, or if `w_type` is not one of the three.

    Example:
        >>> import torch
        >>> from monai_iou import GeneralizedIoULoss
        >>> labels = torch.tensor([[[0, 0, 0, 0, 0, 0, 0, 1]]])
        >>> round(GeneralizedIoULoss(softmax=True)(torch.zeros(1, 2, 8), labels).item(), 4)
        0.8772
    """

    @with_region_arguments
    def __init__(self, w_type: str = "square", *args: Any, **options: Unpack[RegionOptions]) -> None:
        super().__init__(*args, **options)
        checks.check_choice("w_type", w_type, scores.WEIGHT_TYPES)
        self.w_type = w_type

    def class_terms(self, sums: VoxelSums) -> Tensor:
        """Return the loss of each image, (B, 1), because all classes share one ratio."""
        weights = scores.volume_weights(sums.target, self.w_type)
        if self.class_weight is not None:
            weights = weights * scored_weights(self.class_weight, weights, weights.shape[1], self.include_background)
        if self.empty != "smooth":
            weights = torch.where(sums.present, weights, 0)
        return 1 - scores.generalized_iou(sums, weights, self.smooth_nr, self.smooth_dr).unsqueeze(1)

    def with_empty_rule(self, terms: Tensor, sums: VoxelSums) -> tuple[Tensor, Tensor | None]:
        """Return the terms of the images and which of them count; see the class for the effect of absent classes."""
        any_present = sums.present.any(1, keepdim=True)
        if self.empty == "skip":
            return torch.where(any_present | terms.isnan(), terms, 0), any_present
        if self.empty == "suppress":
            shares = torch.where(sums.present, torch.where(any_present, terms, 0), suppression(sums, self.power))
            labelled = sums.labelled
            number = shares.shape[1] if labelled is None else labelled.sum(1, keepdim=True).clamp_min(1)
            return shares.sum(1, keepdim=True) / number, None
        return terms, None
