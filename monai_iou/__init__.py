"""IoU (Jaccard) losses and metrics for MONAI, for foregrounds that are a tiny part of the volume.

Everything public is imported here and at once: MONAI resolves short names in configs, `"_target_": "IoULoss"`, by
looking through the modules that are loaded.
"""

from monai_iou.distributed import sum_over_ranks
from monai_iou.handlers import BoundaryIoUHandler, IoUHandler, LesionIoUHandler, LossWeightSchedule
from monai_iou.losses import (
    AffinityLoss,
    AttentionSupervisionLoss,
    CompoundLoss,
    ContextAttentionLoss,
    FocalIoULoss,
    FocalTverskyLoss,
    GeneralizedIoULoss,
    InstanceIoULoss,
    IoUCELoss,
    IoUFocalLoss,
    IoULoss,
    LogIoULoss,
    LogTverskyLoss,
    LovaszHingeLoss,
    LovaszSoftmaxLoss,
    MultiScaleLoss,
    WeightedCrossEntropyLoss,
)
from monai_iou.metrics import (
    BoundaryIoUMetric,
    CalibrationMetric,
    IoUMetric,
    LesionIoUMetric,
    LesionScores,
    OverlapScores,
    SurfaceScores,
    ThresholdIoUMetric,
    boundary_iou,
    fine_grained_iou,
    iou_counts,
    iou_from_counts,
    lesion_scores,
    overlap_scores,
    recall_by_volume,
    surface_scores,
)
from monai_iou.networks import AttentionMapUnet, ContextPriorHead
from monai_iou.transforms import (
    ComponentRegionsd,
    LesionIndicesd,
    RandCopyLesionsd,
    RandCropByLesions,
    RandCropByLesionsd,
)
from monai_iou.voxels import VoxelSums, kernel_report, use_kernel, voxel_sums
from monai_iou.weighting import class_weights, count_voxels

__version__ = "0.1.0"

__all__ = [
    "AffinityLoss",
    "AttentionMapUnet",
    "AttentionSupervisionLoss",
    "BoundaryIoUHandler",
    "BoundaryIoUMetric",
    "CalibrationMetric",
    "ComponentRegionsd",
    "CompoundLoss",
    "ContextAttentionLoss",
    "ContextPriorHead",
    "FocalIoULoss",
    "FocalTverskyLoss",
    "GeneralizedIoULoss",
    "InstanceIoULoss",
    "IoUCELoss",
    "IoUFocalLoss",
    "IoUHandler",
    "IoULoss",
    "IoUMetric",
    "LesionIndicesd",
    "LesionIoUHandler",
    "LesionIoUMetric",
    "LesionScores",
    "LogIoULoss",
    "LogTverskyLoss",
    "LossWeightSchedule",
    "LovaszHingeLoss",
    "LovaszSoftmaxLoss",
    "MultiScaleLoss",
    "OverlapScores",
    "RandCopyLesionsd",
    "RandCropByLesions",
    "RandCropByLesionsd",
    "SurfaceScores",
    "ThresholdIoUMetric",
    "VoxelSums",
    "WeightedCrossEntropyLoss",
    "__version__",
    "boundary_iou",
    "class_weights",
    "count_voxels",
    "fine_grained_iou",
    "iou_counts",
    "iou_from_counts",
    "kernel_report",
    "lesion_scores",
    "overlap_scores",
    "recall_by_volume",
    "sum_over_ranks",
    "surface_scores",
    "use_kernel",
    "voxel_sums",
]
