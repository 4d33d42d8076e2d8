"""IoU (Jaccard) losses and metrics for MONAI, for foregrounds that are a tiny part of the volume.

Everything public is imported here and at once: MONAI resolves short names in configs, `"_target_": "IoULoss"`, by
looking through the modules that are loaded.
"""

from monai_iou.distributed import sum_over_ranks
from monai_iou.handlers import IoUHandler
from monai_iou.losses import (
    CompoundLoss,
    FocalIoULoss,
    FocalTverskyLoss,
    GeneralizedIoULoss,
    InstanceIoULoss,
    IoUCELoss,
    IoUFocalLoss,
    IoULoss,
    LogIoULoss,
    MultiScaleLoss,
    WeightedCrossEntropyLoss,
)
from monai_iou.metrics import IoUMetric
from monai_iou.regions import ComponentRegionsd
from monai_iou.voxels import VoxelSums, use_kernel, voxel_sums
from monai_iou.weighting import class_weights, count_voxels

__version__ = "0.1.0"

__all__ = [
    "ComponentRegionsd",
    "CompoundLoss",
    "FocalIoULoss",
    "FocalTverskyLoss",
    "GeneralizedIoULoss",
    "InstanceIoULoss",
    "IoUCELoss",
    "IoUFocalLoss",
    "IoUHandler",
    "IoULoss",
    "IoUMetric",
    "LogIoULoss",
    "MultiScaleLoss",
    "VoxelSums",
    "WeightedCrossEntropyLoss",
    "__version__",
    "class_weights",
    "count_voxels",
    "sum_over_ranks",
    "use_kernel",
    "voxel_sums",
]
