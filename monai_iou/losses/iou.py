"""The IoU (Jaccard) loss, a formula of the voxel sums."""

from __future__ import annotations

from torch import Tensor

from monai_iou import scores
from monai_iou.losses.base import RegionLoss
from monai_iou.voxels.sums import VoxelSums


class IoULoss(RegionLoss):
    r"""Soft IoU (Jaccard) loss, a drop-in replacement for `monai.losses.DiceLoss(jaccard=True)`.

    For each image (or, with `batch`, for the whole batch) and each class, the term is

    .. math:: 1 - \frac{I + s_{nr}}{U + s_{dr}}, \qquad U = P + T - I

    where I, P and T are the sums over voxels of :math:`p y`, :math:`p^q` and :math:`y^q` (Rahman & Wang 2016,
    https://doi.org/10.1007/978-3-319-50835-1_22). All sums come from one pass over the voxels. MONAI doubles I and U,
    so that its smoothing of s corresponds to s / 2 here.

    Args:
        include_background: whether class 0 is included.
        to_onehot_y: accepted for compatibility with MONAI; the shape of the target decides how it is read.
        sigmoid: apply a sigmoid to the input.
        softmax: apply a softmax to the input.
        other_act: another activation to apply; it needs memory for one more copy of the input.
        squared_pred: the same as `power=2`.
        reduction: "mean" over images and classes; "sum"; or "none", which returns the terms in the shape
            (B, C, 1, ...), or (C, 1, ...) with `batch`.
        smooth_nr: added to the intersection, in voxels.
        smooth_dr: added to the union, in voxels.
        batch: add the sums over the images of the batch before dividing.
        weight: one number, or one number per scored class, by which the terms are multiplied, as in MONAI.
        soft_label: replace I and U by the sums of min(p, y) and max(p, y), so that the loss is 0 if and only if p = y
            (Wang et al. 2023, https://arxiv.org/abs/2302.05666).
        ignore_index: label of the voxels that have no effect on value and gradient. For per-class maps, these are the
            voxels of that class or, if it is not a class, the voxels whose maps are all zero.
        power: exponent q of power Jaccard (Duque-Arias et al. 2021,
            https://www.scitepress.org/Papers/2021/103040), at least 1.
        empty: contribution of a class that is absent from the target. "smooth": the formula as it is. "skip": none; the
            class is left out of the mean. "suppress": the mean probability weighted by itself,
            :math:`\sum p^{q+1} / \sum p^q`, which keeps a gradient on false positives.
        average: how `reduction="mean"` averages the terms that count. "pairs": over all pairs of image and class.
            "images": over the classes of each image, then over the images. "classes": over the images of each class,
            then over the classes. The three differ only where pairs are left out, by `empty="skip"` or by
            `labelled`; with `empty="skip"`, the last two correspond to mIoU-I and mIoU-C of Wang et al. 2023
            (https://arxiv.org/abs/2310.19252).
        sync_batch: with `batch`, add the sums over all ranks as well, so that training with DistributedDataParallel
            equals training in one process.

    Raises:
        TypeError: if `other_act` is not callable, or an argument or tensor has an unsuitable type.
        ValueError: if arguments contradict each other, shapes do not match, or the target holds values that are not
            classes.

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
