"""The one pass over the voxels that every loss is a function of."""

from monai_iou.voxels.kernels import kernel_report, use_kernel
from monai_iou.voxels.passes import voxel_sums
from monai_iou.voxels.sums import VoxelSums

__all__ = ["VoxelSums", "kernel_report", "use_kernel", "voxel_sums"]
