"""IoU (Jaccard) losses: each is a few lines over the voxel sums."""

from __future__ import annotations

from torch import Tensor

from monai_iou import scores
from monai_iou.losses.base import RegionLoss
from monai_iou.voxels.sums import VoxelSums


class IoULoss(RegionLoss):
    r"""Soft IoU (Jaccard) loss, a drop-in for `monai.losses.DiceLoss(jaccard=True)` that reads the volume once.

    .. math:: 1 - \frac{I + s_{nr}}{U + s_{dr}}, \qquad U = P + T - I

    per class, with I, P, T the sums over voxels of :math:`p y`, :math:`p^q` and :math:`y^q` (Rahman & Wang 2016).
    MONAI doubles I and U, so its smoothing of s is s / 2 here.

    Args:
        include_background: whether class 0 is included.
        to_onehot_y: accepted for drop-in use; the target's shape decides how it is read.
        sigmoid: apply a sigmoid to the input.
        softmax: apply a softmax to the input.
        other_act: another activation to apply, which costs a copy of the input.
        squared_pred: the same as `power=2`.
        reduction: "mean" over images and classes, "sum", or "none" for (B, C, 1, ...), or (C, 1, ...) with `batch`.
        smooth_nr: added to the intersection.
        smooth_dr: added to the union.
        batch: add the sums over the batch before dividing.
        weight: one number, or one number per scored class; multiplies its terms, as in MONAI.
        soft_label: I and U become the sums of min(p, y) and max(p, y): 0 if and only if p = y (Wang et al. 2023,
            https://arxiv.org/abs/2302.05666).
        ignore_index: label of voxels ignored in value and gradient; for per-class maps voxels of that class
            or, if it is not a class, voxels whose maps are all zero.
        power: exponent q of power Jaccard (Duque-Arias et al. 2021), at least 1.
        empty: what a class absent from the target contributes: "smooth", the formula as it is; "skip", nothing, it is
            left out of the mean; "suppress", the mean probability weighted by itself, which keeps a gradient on
            false positives.
        average: how `reduction="mean"` averages the terms that count: "pairs", all pairs of image and class alike;
            "images", over the classes of each image, then over the images; "classes", over the images of each class,
            then over the classes. They differ where `empty="skip"` leaves pairs out, and are then mIoU-I and mIoU-C of
            Wang et al. 2023 (https://arxiv.org/abs/2310.19252) as losses.
        sync_batch: with `batch`, add the sums over all ranks as well, so that DDP trains as one process would.

    Raises:
        TypeError: if `other_act` cannot be called, or a tensor has an unsuitable type.
        ValueError: if options contradict each other, shapes do not match, or labels are outside the classes.

    Example:
        >>> import torch
        >>> from monai_iou import IoULoss
        >>> logits = torch.tensor([[[[5.0, -5.0], [-5.0, -5.0]], [[-5.0, 5.0], [5.0, 5.0]]]])
        >>> labels = torch.tensor([[[[0, 1], [1, 1]]]])
        >>> round(IoULoss(softmax=True)(logits, labels).item(), 5)
        0.00012
    """

    def class_terms(self, sums: VoxelSums) -> Tensor:
        """Return 1 - IoU of each class, (B, C)."""
        return 1 - scores.iou(sums.intersection, sums.prediction, sums.target, self.smooth_nr, self.smooth_dr)
