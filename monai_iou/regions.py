"""Connected components of a label and their regions: which component a voxel belongs to, or is nearest to, in mm."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config.type_definitions import KeysCollection
from monai.data.meta_tensor import MetaTensor
from monai.transforms.transform import MapTransform
from numpy.typing import NDArray

from monai_iou import checks

__all__ = [
    "REGIONS",
    "ComponentRegionsd",
    "component_regions",
    "image_spacings",
    "label_components",
    "spacing_tuple",
]

REGIONS = ("voronoi", "blob")
# A map of class numbers with its regions must not look like per-class maps, whose values are 0 and 1.
FIRST_REGION = 2


def label_components(mask: NDArray[np.bool_], connectivity: int | None) -> tuple[NDArray[Any], int]:
    """Components numbered from 1 in scan order, 0 elsewhere, and their number.

    Args:
        mask: 2 or 3 dimensions.
        connectivity: 6, 18 or 26 neighbours in 3D, 4 or 8 in 2D; None takes the most.

    Raises:
        ValueError: the connectivity does not fit the dimensions.
    """
    import cc3d

    choices = {2: (4, 8), 3: (6, 18, 26)}[mask.ndim]
    neighbours: Any = choices[-1] if connectivity is None else connectivity
    if neighbours not in choices:
        message = (
            f"Expected `connectivity` to be one of {choices} for {mask.ndim} dimensions, but got {connectivity}: None "
            f"takes {choices[-1]}."
        )
        raise ValueError(message)
    if not mask.any():
        return np.zeros(mask.shape, dtype=np.int64), 0
    labels: NDArray[Any]
    # As uint8: cc3d 4.1's way with bool masks finds wrong components, or fails, in volumes one voxel thick.
    numbers = np.ascontiguousarray(mask).astype(np.uint8)
    labels, count = cc3d.connected_components(numbers, connectivity=neighbours, return_N=True)
    return labels, int(count)


def component_regions(
    mask: NDArray[np.bool_],
    regions: str = "voronoi",
    spacing: Sequence[float] | None = None,
    connectivity: int | None = None,
) -> tuple[NDArray[Any], int]:
    """Number the regions of a mask's components from 1.

    Args:
        mask: (*S), 1 to 3 dimensions.
        regions: "voronoi", every voxel has the number of the component nearest in mm; "blob", the components
            themselves, 0 elsewhere.
        spacing: voxel size in mm along each axis; 1 by default.
        connectivity: 6, 18 or 26 neighbours in 3D, 4 or 8 in 2D; the most by default.

    Returns:
        The numbers, (*S) int32, and how many components there are; all 0 without one.

    Raises:
        ValueError: if `regions`, `spacing` or `connectivity` is out of its range.

    Example:
        >>> import numpy as np
        >>> from monai_iou.regions import component_regions
        >>> component_regions(np.array([1, 0, 0, 0, 0, 1], dtype=bool))
        (array([1, 1, 1, 2, 2, 2], dtype=int32), 2)
    """
    checks.check_choice("regions", regions, REGIONS)
    if mask.ndim == 1:
        numbers, count = component_regions(mask[:, None], regions, None if spacing is None else (*spacing, 1.0))
        return numbers[:, 0], count
    components, count = label_components(mask, connectivity)
    components = components.astype(np.int32)
    if regions == "blob" or count == 0:
        return components, count
    from scipy.ndimage import distance_transform_edt

    nearest = distance_transform_edt(components == 0, sampling=spacing, return_distances=False, return_indices=True)
    return components[tuple(nearest)], count


def spacing_tuple(spacing: Any, spatial_dims: int) -> tuple[float, ...]:
    """Voxel size in mm along each axis; a number counts for every axis, None is 1.

    Raises:
        ValueError: the number of values does not fit, or one is not positive and finite.
    """
    values = [1.0] if spacing is None else [float(v) for v in np.atleast_1d(np.asarray(spacing, dtype=float))]
    if len(values) == 1:
        values *= spatial_dims
    if len(values) != spatial_dims or not all(np.isfinite(v) and v > 0 for v in values):
        message = (
            f"Expected `spacing` to be {spatial_dims} positive numbers in mm, but got {spacing}: give the voxel size "
            "along each axis, or None for 1 mm."
        )
        raise ValueError(message)
    return tuple(values)


def image_spacings(y_pred: Any, y: Any, spacing: Any, count: int, spatial_dims: int) -> list[tuple[float, ...]]:
    """Voxel size of each image of a batch: as given, else from the MetaTensors' affines, else 1 mm.

    Raises:
        ValueError: the values do not fit the images.
    """
    if spacing is None:
        found = _pixdims(y) or _pixdims(y_pred) or [None] * count
        return [spacing_tuple(None if s is None else s[:spatial_dims], spatial_dims) for s in found]
    if isinstance(spacing, Sequence) and spacing and np.ndim(spacing[0]) == 1:
        if len(spacing) != count:
            message = (
                f"Expected `spacing` to be one voxel size for each of {count} images, but got {len(spacing)}: give "
                "one for all images, or as many as there are."
            )
            raise ValueError(message)
        return [spacing_tuple(s, spatial_dims) for s in spacing]
    return [spacing_tuple(spacing, spatial_dims)] * count


def _pixdims(batch: Any) -> list[Any] | None:
    """Voxel sizes of a batched MetaTensor (MONAI gives a list), or of a list of MetaTensors; None for anything else."""
    if isinstance(batch, (list, tuple)):
        if all(isinstance(image, MetaTensor) for image in batch):
            return [np.asarray(image.pixdim) for image in batch]
        return None
    if not isinstance(batch, MetaTensor):
        return None
    pixdim = batch.pixdim
    if isinstance(pixdim, (list, tuple)):
        return [np.asarray(p) for p in pixdim]
    return [np.asarray(pixdim)] * len(batch)


class ComponentRegionsd(MapTransform):
    """Append to a label map the Voronoi regions of its components, for :class:`monai_iou.InstanceIoULoss`.

    One channel for each foreground class: at every voxel the number of the region it lies in, from 2, the same for all
    voxels that are nearest in mm to the same component of that class; 2 everywhere if there is none. The channels are
    part of the label, so that crops, flips and other spatial transforms (with nearest interpolation) keep them in step;
    computed once, before random transforms, they also know components that a crop leaves out. Voxel sizes are those of
    a MetaTensor, so put the transform after `Spacingd` and before `EnsureTyped(track_meta=False)`.

    Args:
        keys: label maps (1, *S) with class numbers from 0, the background.
        num_classes: number of classes C with the background; the result has C channels.
        connectivity: 6, 18 or 26 neighbours in 3D, 4 or 8 in 2D; the most by default.
        spacing: voxel size in mm, instead of the MetaTensor's.
        allow_missing_keys: do not fail where a key is absent.

    Raises:
        ValueError: a label has several channels, or `num_classes` is below 2.

    Example:
        >>> import torch
        >>> from monai_iou import ComponentRegionsd
        >>> label = torch.tensor([[[1, 0, 0, 0, 0, 1]]])
        >>> ComponentRegionsd("label")({"label": label})["label"]
        tensor([[[1, 0, 0, 0, 0, 1]],
        <BLANKLINE>
                [[2, 2, 2, 3, 3, 3]]], dtype=torch.int32)
    """

    def __init__(
        self,
        keys: KeysCollection,
        num_classes: int = 2,
        connectivity: int | None = None,
        spacing: Sequence[float] | float | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if num_classes < 2:
            message = (
                f"Expected `num_classes` to count the background and at least one class, but got {num_classes}: 2 is "
                "for one foreground class."
            )
            raise ValueError(message)
        self.num_classes, self.connectivity, self.spacing = num_classes, connectivity, spacing

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item with its labels (1, *S) as int32 (C, *S): class numbers, then regions of each class."""
        items = dict(data)
        for key in self.key_iterator(items):
            items[key] = self._with_regions(str(key), items[key])
        return items

    def _with_regions(self, key: str, label: Any) -> torch.Tensor:
        if label.ndim < 2 or label.shape[0] != 1:
            message = f"Expected `{key}` to be a label map (1, *S), but got {tuple(label.shape)}: append regions once."
            raise ValueError(message)
        plain = torch.as_tensor(label).as_subclass(torch.Tensor)
        numbers = plain[0].cpu().numpy()
        spacing = image_spacings(None, [label], self.spacing, 1, numbers.ndim)[0]
        channels = [numbers.astype(np.int32)]
        for index in range(1, self.num_classes):
            regions, _ = component_regions(numbers == index, "voronoi", spacing, self.connectivity)
            # One region without a component, where there is none: a crop of zeros alone could be per-class maps.
            channels.append((regions.clip(1) + FIRST_REGION - 1).astype(np.int32))
        result = torch.as_tensor(np.stack(channels), device=plain.device)
        return (
            MetaTensor(result, meta=label.meta, applied_operations=label.applied_operations)
            if isinstance(label, MetaTensor)
            else result
        )
