"""IoU losses and their class-imbalance variants, as MONAI losses."""

from monai_iou.losses.affinity import AffinityLoss
from monai_iou.losses.attention import AttentionSupervisionLoss, ContextAttentionLoss
from monai_iou.losses.compound import CompoundLoss
from monai_iou.losses.cross_entropy import WeightedCrossEntropyLoss
from monai_iou.losses.instance import InstanceIoULoss
from monai_iou.losses.iou import IoULoss
from monai_iou.losses.iou_ce import IoUCELoss, IoUFocalLoss
from monai_iou.losses.iou_variants import FocalIoULoss, FocalTverskyLoss, GeneralizedIoULoss, LogIoULoss, LogTverskyLoss
from monai_iou.losses.lovasz import LovaszHingeLoss, LovaszSoftmaxLoss
from monai_iou.losses.multi_scale import MultiScaleLoss
from monai_iou.losses.terms import loss_and_terms

__all__ = [
    "AffinityLoss",
    "AttentionSupervisionLoss",
    "CompoundLoss",
    "ContextAttentionLoss",
    "FocalIoULoss",
    "FocalTverskyLoss",
    "GeneralizedIoULoss",
    "InstanceIoULoss",
    "IoUCELoss",
    "IoUFocalLoss",
    "IoULoss",
    "LogIoULoss",
    "LogTverskyLoss",
    "LovaszHingeLoss",
    "LovaszSoftmaxLoss",
    "MultiScaleLoss",
    "WeightedCrossEntropyLoss",
    "loss_and_terms",
]
