"""Resampling of items that also contain text."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping
from typing import Any

from monai.data.meta_tensor import MetaTensor
from monai.transforms.spatial.dictionary import Spacingd
from monai.utils.type_conversion import convert_to_tensor


class ResampleSpacingd(Spacingd):
    """MONAI's `Spacingd` for items that also contain text, such as the `image_path` that MONAI Label adds.

    MONAI 1.6 treats every entry whose key starts with `image_` as metadata of the image and fails if it is text.

    Args:
        keys, pixdim, mode and all others: as for `monai.transforms.Spacingd`; `pixdim` is the new voxel size in mm.

    Raises:
        ValueError: as `monai.transforms.Spacingd`.

    Example:
        >>> import torch
        >>> from monai.data import MetaTensor
        >>> from monai_iou.transforms import ResampleSpacingd
        >>> item = {"image": MetaTensor(torch.zeros(1, 4, 4, 4)), "image_path": "a.nii.gz"}
        >>> resampled = ResampleSpacingd("image", pixdim=(2.0, 2.0, 2.0))(item)
        >>> tuple(resampled["image"].shape), resampled["image_path"]
        ((1, 2, 2, 2), 'a.nii.gz')
    """

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> dict[Hashable, Any]:
        """Return the item with its images resampled."""
        text = {key: value for key, value in data.items() if isinstance(value, str)}
        rest = {key: value for key, value in data.items() if key not in text}
        for key in self.key_iterator(rest):
            rest[key] = _with_affine(rest[key])
        return {**text, **super().__call__(rest, lazy)}


def _with_affine(image: Any) -> MetaTensor:
    """Return an image with an affine: MONAI gives a plain one that of the default dtype, which NumPy may not have."""
    if isinstance(image, MetaTensor):
        return image
    warnings.warn("`data_array` is not of type MetaTensor, assuming affine to be identity.", stacklevel=3)
    return MetaTensor(convert_to_tensor(image, track_meta=False))
