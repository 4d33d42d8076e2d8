"""Loading labels onto the grids of their images."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, TypeGuard

import numpy as np
from monai.config.type_definitions import KeysCollection
from monai.data.image_reader import ImageReader
from monai.data.meta_tensor import MetaTensor
from monai.transforms.io.dictionary import LoadImaged
from monai.utils.enums import MetaKeys

from monai_iou.volumes.grid import Grid, same_grid, spatial_grid

__all__ = ["LoadLabeld"]


class LoadLabeld(LoadImaged):
    """MONAI's `LoadImaged` for labels: a label that lies on the grid of its image gets the affine of the image.

    The headers of an image and its label often differ by a rounding error. Resampled each by its own header, the two
    can get another number of slices; if the axes are oblique by 45 degrees, even another order of axes. A label on
    another grid than its image keeps its own affine.

    Args:
        keys: keys of labels.
        image_key: key of the image, which is loaded before.
        kwargs: as for `LoadImaged`.

    Raises:
        KeyError: when called, if an item lacks one of `keys`; see `allow_missing_keys` of `LoadImaged`.
        FileNotFoundError: when called, if a file does not exist.
        RuntimeError: when called, if no reader of MONAI can read a file.

    Example:
        >>> import tempfile
        >>> import nibabel
        >>> from monai_iou.transforms.label_loading import LoadLabeld
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     files = {"image": f"{folder}/image.nii", "label": f"{folder}/label.nii"}
        ...     for name, size in (("image", 1.0), ("label", 1.0000001)):  # the header of the label is rounded
        ...         affine = np.diag([size, 1, 1, 1])
        ...         nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4)), affine), files[name])
        ...     item = LoadLabeld("label")(LoadImaged("image")(files))
        >>> bool((item["label"].affine == item["image"].affine).all())
        True
    """

    def __init__(self, keys: KeysCollection, image_key: str = "image", **kwargs: Any) -> None:
        super().__init__(keys, **kwargs)
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any], reader: ImageReader | None = None) -> dict[Hashable, Any]:
        """Return the item with its labels loaded."""
        items: dict[Hashable, Any] = super().__call__(data, reader)
        image = items.get(self.image_key)
        for key in self.key_iterator(items):
            label = items[key]
            if _has_grid(image) and _has_grid(label) and same_grid(_grid(label), _grid(image)):
                label.affine = image.affine.clone()
        return items


def _has_grid(volume: Any) -> TypeGuard[MetaTensor]:
    return isinstance(volume, MetaTensor) and MetaKeys.SPATIAL_SHAPE in volume.meta


def _grid(volume: MetaTensor) -> Grid:
    return spatial_grid(volume.meta[MetaKeys.SPATIAL_SHAPE], np.asarray(volume.affine, dtype=np.float64))
