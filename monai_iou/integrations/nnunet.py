"""Trainers for nnU-Net v2 that replace its Dice loss by IoU and its variants.

nnU-Net looks for a trainer in the folders that `nnUNet_extTrainer` names. One file there makes all of these known:

    from monai_iou.integrations.nnunet import *

and `nnUNetv2_train DATASET 3d_fullres 0 -tr nnUNetTrainerIoU` trains with IoU plus cross-entropy. Training, prediction
and every other command that reads the trained model need the variable. Data, network, schedule, deep supervision and
its weights stay nnU-Net's own.

| trainer | loss, each plus cross-entropy |
| --- | --- |
| nnUNetTrainerIoU | IoU; over the batch where nnU-Net's plan has `batch_dice`, else over each image |
| nnUNetTrainerIoUBatch | IoU over the batch, and over all GPUs |
| nnUNetTrainerIoUSuppress | IoU whose term of an absent class pushes confident false positives down |
| nnUNetTrainerIoUArea | IoU; coarse outputs learn class fractions, where nnU-Net's nearest voxel loses small lesions |
| nnUNetTrainerFocalTversky | focal Tversky |
| nnUNetTrainerLovasz | Lovasz |
| nnUNetTrainerIoUInstance | IoU plus the mean of IoU in the cell of every lesion: small ones count as large ones |
| nnUNetTrainerIoUBidirectional | also the cells of predicted components: false positive lesions count as well |

A trainer of your own is a subclass with other attributes, or another `region_loss`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn

from monai_iou.losses import (
    CompoundLoss,
    FocalTverskyLoss,
    InstanceIoULoss,
    IoULoss,
    MultiScaleLoss,
    WeightedCrossEntropyLoss,
)
from monai_iou.losses.lovasz import LovaszSoftmaxLoss
from monai_iou.losses.nested_instances import on_coarser_grid

__all__ = [
    "nnUNetTrainerFocalTversky",
    "nnUNetTrainerIoU",
    "nnUNetTrainerIoUArea",
    "nnUNetTrainerIoUBatch",
    "nnUNetTrainerIoUBidirectional",
    "nnUNetTrainerIoUInstance",
    "nnUNetTrainerIoUSuppress",
    "nnUNetTrainerLovasz",
]


class nnUNetTrainerIoU(nnUNetTrainer):  # noqa: N801 - nnU-Net finds trainers by names of this form
    """nnU-Net's trainer with IoU plus cross-entropy.

    Labels train a softmax without a term of the background, regions a sigmoid, as in nnU-Net. Voxels with the dataset's
    ignore label are excluded. Under DDP, sums over the batch are sums over all ranks.

    Attributes:
        iou_batch: add the sums over the batch before dividing; None for nnU-Net's own choice, the plan's `batch_dice`.
        iou_empty: what a class absent from the labels contributes, see `monai_iou.IoULoss`.
        iou_downsample: None to take the labels that nnU-Net downsampled for deep supervision by nearest voxel, or how
            to make them from the full-size labels, see `monai_iou.MultiScaleLoss`.
        lambda_region: factor of the region loss.
        lambda_ce: factor of the cross-entropy.
    """

    iou_batch: ClassVar[bool | None] = None
    iou_empty: ClassVar[str] = "smooth"
    iou_downsample: ClassVar[str | None] = None
    lambda_region: ClassVar[float] = 1.0
    lambda_ce: ClassVar[float] = 1.0

    def region_loss(self, **options: Any) -> nn.Module:
        """Return the loss that takes the place of Dice; `options` are arguments of `monai_iou.IoULoss`."""
        return IoULoss(**options)

    def _build_loss(self) -> nn.Module:
        """Return nnU-Net's loss with ours in the place of Dice and cross-entropy."""
        labels = self.label_manager
        # nnU-Net hands the ignored voxels of regions over as one more map, which is made the first: the background.
        ignored_map = labels.has_regions and labels.ignore_label is not None
        batch = bool(self.configuration_manager.batch_dice if self.iou_batch is None else self.iou_batch)
        shared: dict[str, Any] = {
            "sigmoid": labels.has_regions,
            "softmax": not labels.has_regions,
            "ignore_index": 0 if ignored_map else labels.ignore_label,
            "sync_batch": batch and self.is_ddp,
        }
        region = self.region_loss(
            include_background=labels.has_regions and not ignored_map, batch=batch, empty=self.iou_empty, **shared
        )
        entropy = WeightedCrossEntropyLoss(include_background=not ignored_map, **shared)
        loss = CompoundLoss([region, entropy], [self.lambda_region, self.lambda_ce])
        theirs = super()._build_loss()
        if not isinstance(theirs, DeepSupervisionWrapper):
            return _IgnoredMapFirst(loss) if ignored_map else loss
        if self.iou_downsample is not None:
            return _FinestLabels(loss, theirs.weight_factors, self.iou_downsample, ignored_map)
        return _EachScale(_IgnoredMapFirst(loss) if ignored_map else loss, theirs.weight_factors)


class nnUNetTrainerIoUBatch(nnUNetTrainerIoU):  # noqa: N801
    """IoU over the whole batch: a patch without a lesion gives no term of its own."""

    iou_batch = True


class nnUNetTrainerIoUSuppress(nnUNetTrainerIoU):  # noqa: N801
    """IoU whose term of an absent class has a bounded gradient on false positives."""

    iou_empty = "suppress"


class nnUNetTrainerIoUArea(nnUNetTrainerIoU):  # noqa: N801
    """IoU whose deep supervision keeps small lesions: coarse labels are fractions of classes."""

    iou_downsample = "area"


class nnUNetTrainerFocalTversky(nnUNetTrainerIoU):  # noqa: N801
    """Focal Tversky loss, which weighs false negatives more than false positives."""

    def region_loss(self, **options: Any) -> nn.Module:
        """Return the focal Tversky loss."""
        return FocalTverskyLoss(**options)


class nnUNetTrainerLovasz(nnUNetTrainerIoU):  # noqa: N801
    """Lovasz loss; `iou_empty` has no effect: only classes that are present count."""

    def region_loss(self, **options: Any) -> nn.Module:
        """Return the Lovasz loss."""
        options.pop("empty")
        return LovaszSoftmaxLoss(**options)


class nnUNetTrainerIoUInstance(nnUNetTrainerIoU):  # noqa: N801
    """IoU, and the mean of IoU over the cells of all lesions of the label, at every scale of deep supervision.

    Components are found on the CPU in every step. Distances are in mm, by the spacing that nnU-Net trains at.

    Attributes:
        instance_cells: whose components have cells, see `monai_iou.InstanceIoULoss`.
    """

    instance_cells: ClassVar[str] = "reference"

    def region_loss(self, **options: Any) -> nn.Module:
        """Return the loss of the whole and of the cells."""
        spacing = [float(side) for side in self.configuration_manager.spacing]
        return InstanceIoULoss(cells=self.instance_cells, spacing=spacing, **options)


class nnUNetTrainerIoUBidirectional(nnUNetTrainerIoUInstance):  # noqa: N801
    """The same over the cells of the label's and of the predicted components, half and half, as in BiCC."""

    instance_cells = "both"
    iou_empty = "suppress"


def _with_map_first(logits: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(logits[:, :1]), logits], 1)


class _IgnoredMapFirst(nn.Module):
    """A loss of regions for nnU-Net's targets, whose last map marks the ignored voxels."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        result: Tensor = self.loss(_with_map_first(output), target.roll(1, dims=1))
        return result


class _EachScale(DeepSupervisionWrapper):
    """nnU-Net's deep supervision, in which distances between components are in mm at the coarser scales too.

    nnU-Net halves the axes of thick slices later than the others, so that coarse voxels have other proportions.
    """

    def forward(self, outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Any:
        total: Any = 0
        for weight, output, target in zip(self.weight_factors, outputs, targets, strict=False):
            if weight != 0:
                with on_coarser_grid(self.loss, targets[0], target.shape[2:]):
                    total = total + weight * self.loss(output, target)
        return total


class _FinestLabels(nn.Module):
    """Deep supervision from the labels of full size only."""

    def __init__(self, loss: nn.Module, weights: Sequence[float], downsample: str, ignored_map: bool) -> None:
        super().__init__()
        self.loss = MultiScaleLoss(loss, [float(weight) for weight in weights], downsample)
        self.ignored_map = ignored_map

    def forward(self, outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        target = targets[0]
        if self.ignored_map:
            outputs, target = [_with_map_first(output) for output in outputs], target.roll(1, dims=1)
        result: Tensor = self.loss(list(outputs), target)
        return result
