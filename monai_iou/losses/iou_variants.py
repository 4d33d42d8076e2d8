"""Variants of the IoU loss for classes of unequal size: logarithm, exponents, unequal errors, volume weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from monai_iou import checks, scores
from monai_iou.losses.base import RegionLoss, RegionOptions, suppression, with_region_arguments
from monai_iou.voxels.sums import VoxelSums


class LogIoULoss(RegionLoss):
    r"""Logarithmic IoU loss: its gradient grows as 1 / IoU, so a class that is missed altogether weighs most.

    .. math:: (-\ln \mathrm{IoU}_c)^\gamma, \qquad \mathrm{IoU}_c = \frac{I + s_{nr}}{U + s_{dr}}

    The exponent is that of the exponential logarithmic loss (Wong et al. 2018, https://arxiv.org/abs/1809.00076, for
    Dice): below 1 it favours classes that are nearly right, above 1 those that are far off. Unbounded above.

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
        # Without smoothing a missed class has IoU 0; a rounding error can put a perfect one above 1.
        return scores.power(-iou.clamp(torch.finfo(iou.dtype).tiny, 1).log(), self.gamma)


class FocalIoULoss(RegionLoss):
    r"""IoU loss raised to a power, which shifts the weight between well and badly segmented classes.

    .. math:: (1 - \mathrm{IoU}_c)^\gamma

    gamma > 1 turns to the classes and images that are worst, as focal loss does for voxels; gamma < 1 keeps a gradient
    on those that are nearly right. gamma = 1 is :class:`IoULoss`.

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
    r"""Focal Tversky loss: false positives and false negatives weigh differently.

    .. math:: \left(1 - \frac{I + s_{nr}}{I + \alpha\,FP + \beta\,FN + s_{dr}}\right)^\gamma,
              \qquad FP = P - I, \quad FN = T - I

    beta > alpha asks for recall, which small lesions lack first. alpha = beta = gamma = 1 is :class:`IoULoss`, alpha =
    beta = 1/2 is Dice. Tversky: Salehi et al. 2017, https://arxiv.org/abs/1706.05721; the exponent: Abraham & Khan
    2019, https://arxiv.org/abs/1810.07842, whose gamma of 4/3 is an exponent of 0.75 here.

    Args:
        alpha: weight of false positives, as in MONAI's TverskyLoss.
        beta: weight of false negatives.
        gamma: exponent, above 0.
        *args: the arguments of :class:`IoULoss`, in its order.
        **options: the same, by name. `power` above 1 shrinks P and with it the false positives; with alpha above beta
            the value can then fall below 0.

    Raises:
        TypeError: as :class:`IoULoss`.
        ValueError: as :class:`IoULoss`, or if `gamma` is not above 0, or `alpha` or `beta` is negative, or both are 0.

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
            message = "Expected `alpha` or `beta` to be above 0, but got 0 for both: no error would count."
            raise ValueError(message)

    def class_terms(self, sums: VoxelSums) -> Tensor:
        """Return the focal Tversky loss of each class, (B, C)."""
        return scores.power(1 - self.index(sums), self.gamma)

    def index(self, sums: VoxelSums) -> Tensor:
        """Return the Tversky index of each class, (B, C)."""
        return scores.tversky(
            sums.intersection, sums.prediction, sums.target, self.alpha, self.beta, self.smooth_nr, self.smooth_dr
        )


class LogTverskyLoss(FocalTverskyLoss):
    r"""Logarithm of the Tversky index, raised to a power: false positives and negatives weigh differently.

    .. math:: (-\ln \mathrm{TI}_c)^\gamma, \qquad
              \mathrm{TI}_c = \frac{I + s_{nr}}{I + \alpha\,FP + \beta\,FN + s_{dr}}

    What :class:`LogIoULoss` is to the IoU: the gradient grows as 1 / TI, so a class that is missed altogether weighs
    most. alpha = beta = 1 is :class:`LogIoULoss`; alpha = beta = 1/2 is the exponential logarithmic Dice loss (Wong et
    al. 2018, https://arxiv.org/abs/1809.00076). Unbounded above.

    Args:
        alpha: weight of false positives, as in MONAI's TverskyLoss.
        beta: weight of false negatives.
        gamma: exponent, above 0.
        *args: the arguments of :class:`IoULoss`, in its order.
        **options: the same, by name. An index above 1, which `power` above 1 allows, counts as 1.

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
    r"""Generalised IoU loss: one ratio for all classes, in which each weighs by the inverse of its volume.

    .. math:: 1 - \frac{\sum_c w_c I_c + s_{nr}}{\sum_c w_c U_c + s_{dr}}, \qquad
              w_c = 1/T_c^2, \; 1/T_c \; \text{or} \; 1

    After the generalised Dice of Sudre et al. 2017, https://arxiv.org/abs/1707.03237; other than there and in MONAI's
    GeneralizedDiceLoss the ratio is an IoU. The smoothing is added as the formula says, as in MONAI. With "square" a
    class of T voxels enters with about 1 / T, so smoothing of 1e-5 matters where every class has 10^4 voxels and more:
    lower `smooth_nr` and `smooth_dr` together there, or use "simple".

    Args:
        w_type: "square", 1 / T^2; "simple", 1 / T; or "uniform", 1. A class absent from the image takes the largest
            weight of the others.
        *args: the arguments of :class:`IoULoss`, in its order.
        **options: the same, by name. `weight` multiplies w_c. Absent classes: "skip" leaves them out of both sums;
            "suppress" does too, and gives each the place of one class in a mean with the ratio of the rest.
            `reduction="none"` gives one value per image, (B, 1, 1, ...).

    Raises:
        TypeError: as :class:`IoULoss`.
        ValueError: as :class:`IoULoss`, or if `w_type` is none of the three.

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
        """Return the loss of each image, (B, 1): the classes share one ratio."""
        weights = scores.volume_weights(sums.target, self.w_type)
        if self.class_weight is not None:
            checks.check_weight_length(self.class_weight, weights.shape[1], self.include_background)
            weights = weights * self.class_weight.to(weights)
        if self.empty != "smooth":
            weights = torch.where(sums.target > 0, weights, 0)
        return 1 - scores.generalized_iou(sums, weights, self.smooth_nr, self.smooth_dr).unsqueeze(1)

    def with_empty_rule(self, terms: Tensor, sums: VoxelSums) -> tuple[Tensor, Tensor | None]:
        """Return the images' terms, and which of them count; see the class for what absent classes do."""
        present = sums.target > 0
        some = present.any(1, keepdim=True)
        if self.empty == "skip":
            return torch.where(some | terms.isnan(), terms, 0), some
        if self.empty == "suppress":
            shares = torch.where(present, torch.where(some, terms, 0), suppression(sums, self.power))
            number = (sums.count > 0).sum(1, keepdim=True).clamp_min(1) if sums.partly_labelled else shares.shape[1]
            return shares.sum(1, keepdim=True) / number, None
        return terms, None
