"""The distance between voxels, in mm, from arguments and from MONAI's metadata."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from monai.data.meta_tensor import MetaTensor

__all__ = ["image_spacings", "spacing_tuple"]


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
