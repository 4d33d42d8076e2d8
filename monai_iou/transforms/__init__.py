"""Transforms for small foregrounds that MONAI does not provide."""

from monai_iou.transforms.affine_elastic import RandAffineElasticd
from monai_iou.transforms.copying import RandCopyLesionsd
from monai_iou.transforms.crops import RandCropByLesions
from monai_iou.transforms.crops_dictionary import LesionIndicesd, RandCropByLesionsd
from monai_iou.transforms.elastic import RandCoarseElasticd
from monai_iou.transforms.intensity import NormalizeModalitiesd
from monai_iou.transforms.regions import ComponentRegionsd
from monai_iou.transforms.resampling import ResampleSpacingd

__all__ = [
    "ComponentRegionsd",
    "LesionIndicesd",
    "NormalizeModalitiesd",
    "RandAffineElasticd",
    "RandCoarseElasticd",
    "RandCopyLesionsd",
    "RandCropByLesions",
    "RandCropByLesionsd",
    "ResampleSpacingd",
]
