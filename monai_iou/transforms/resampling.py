"""Resampling of items that also contain text, and of voxels of any size."""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Mapping
from typing import Any

from monai.data.meta_tensor import MetaTensor
from monai.transforms.spatial.dictionary import Spacingd
from monai.utils.type_conversion import convert_to_tensor

_SMALL = 0.1  # mm; MONAI keeps a spacing, and an affine, within 1e-3 of the new one, whatever the size of the voxels


class ResampleSpacingd(Spacingd):
    """MONAI's `Spacingd` for items that also contain text, such as the `image_path` that MONAI Label adds.

    MONAI 1.6 treats every entry whose key starts with `image_` as metadata of the image and fails if it is text. It
    also does not resample an axis whose spacing is within 0.001 mm of the new one, however small the voxels are. Below
    0.1 mm, this transform lets it compute in a smaller unit.

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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        spacing = self.spacing_transform
        smallest = min((size for size in spacing.pixdim if 0 < size < math.inf), default=1.0)
        # A power of 2, so that nothing is rounded on the way and back.
        self._unit = 1.0 if smallest >= _SMALL else 2.0 ** -math.ceil(-math.log2(smallest))
        spacing.pixdim = spacing.pixdim / self._unit
        spacing.min_pixdim, spacing.max_pixdim = spacing.min_pixdim / self._unit, spacing.max_pixdim / self._unit

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> dict[Hashable, Any]:
        """Return the item with its images resampled."""
        text = {key: value for key, value in data.items() if isinstance(value, str)}
        rest = {key: value for key, value in data.items() if key not in text}
        for key in self.key_iterator(rest):
            rest[key] = _multiplied(_with_affine(rest[key]), 1 / self._unit)
        traced = {key: _traces(rest[key]) for key in self.key_iterator(rest)}
        items: dict[Hashable, Any] = super().__call__(rest, lazy)
        for key, before in traced.items():
            items[key] = _multiplied(items[key], self._unit, trace=_traces(items[key]) > before)
        return {**text, **items}

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item with its images on the grids that they had before."""
        items = dict(data)
        for key in self.key_iterator(items):
            items[key] = _multiplied(items[key], 1 / self._unit, trace=True)
        items = super().inverse(items)
        for key in self.key_iterator(items):
            items[key] = _multiplied(items[key], self._unit)
        return items


def _with_affine(image: Any) -> MetaTensor:
    """Return an image with an affine: MONAI gives a plain one that of the default dtype, which NumPy may not have."""
    if isinstance(image, MetaTensor):
        return image
    warnings.warn("`data_array` is not of type MetaTensor, assuming affine to be identity.", stacklevel=3)
    return MetaTensor(convert_to_tensor(image, track_meta=False))


def _traces(image: Any) -> int:
    """Return how many operations are recorded with an image."""
    return len(image.applied_operations) + len(image.pending_operations) if isinstance(image, MetaTensor) else 0


def _multiplied(image: Any, factor: float, *, trace: bool = False) -> Any:
    """Return an image whose affine is in another unit, and with `trace` also the one in its last recorded operation."""
    if factor == 1 or not isinstance(image, MetaTensor):
        return image
    scaled = MetaTensor(image.as_tensor()).copy_meta_from(image)
    scaled.affine = _in_unit(image.affine, factor)
    operations = scaled.pending_operations or scaled.applied_operations
    details = operations[-1].get("extra_info") or {} if trace and operations else {}
    if "src_affine" in details:
        details = {**details, "src_affine": _in_unit(details["src_affine"], factor)}
        operations[-1] = {**operations[-1], "extra_info": details}
    return scaled


def _in_unit(affine: Any, factor: float) -> Any:
    """Return an affine in another unit; its last row stays as it is."""
    affine = affine.clone()
    affine[..., :-1, :] *= factor
    return affine
