"""Voxel sizes in mm, from arguments and from MONAI's metadata, and the shapes of coarse grids."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from monai.data.meta_tensor import MetaTensor

from monai_iou.tables import counted

__all__ = ["check_grid", "check_positions", "check_spacing", "image_spacings", "spacing_tuple"]

MAX_POSITIONS = 4096  # of the grid of an affinity


def spacing_tuple(spacing: Any, spatial_dims: int) -> tuple[float, ...]:
    """Return the voxel size in mm along each axis.

    Args:
        spacing: one number for all axes, one number per axis, or None for 1 mm.
        spatial_dims: number of axes.

    Raises:
        ValueError: if the number of values does not fit, or a value is not positive and finite.

    Example:
        >>> from monai_iou.spacing import spacing_tuple
        >>> spacing_tuple(0.5, 3), spacing_tuple((3.0, 1.0), 2)
        ((0.5, 0.5, 0.5), (3.0, 1.0))
    """
    values = [1.0] if spacing is None else _numbers(spacing)
    if len(values) == 1:
        values *= spatial_dims
    if len(values) != spatial_dims or not all(map(_is_size, values)):
        numbers = counted(spatial_dims, "positive number")
        message = (
            f"Expected `spacing` to be {numbers} in mm, but got {spacing!r}: give the voxel size along each axis, or "
            "None for 1 mm."
        )
        raise ValueError(message)
    return tuple(values)


def check_spacing(spacing: Any) -> Any:
    """Return `spacing`, for images that are not known yet; raise ValueError unless it can fit some.

    Args:
        spacing: one voxel size in mm for all images, one per image, or None for those of the images themselves.

    Example:
        >>> from monai_iou.spacing import check_spacing
        >>> check_spacing((3.0, 1.0, 1.0)), check_spacing(None)
        ((3.0, 1.0, 1.0), None)
    """
    for size in spacing if _is_per_image(spacing) else (spacing,):
        values = [1.0] if size is None else _numbers(size)
        if not 1 <= len(values) <= 3 or not all(map(_is_size, values)):
            message = (
                f"Expected `spacing` to be a positive number in mm, or one for each of up to 3 axes, but got {size!r}: "
                "give the voxel size along each axis, or None for 1 mm."
            )
            raise ValueError(message)
    return spacing


def _is_size(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _numbers(spacing: Any) -> list[float]:
    """The numbers of one voxel size; none if it is something else, which fits no image."""
    try:
        values = np.asarray(spacing.detach().cpu() if isinstance(spacing, torch.Tensor) else spacing, dtype=float)
    except (TypeError, ValueError):  # text, or lists of different lengths
        return []
    return [float(value) for value in values.ravel()] if values.ndim <= 1 else []


def image_spacings(y_pred: Any, y: Any, spacing: Any, count: int, spatial_dims: int) -> list[tuple[float, ...]]:
    """Return the voxel size in mm of each image of a batch.

    Args:
        y_pred: the predictions: a batch, or a list of images.
        y: the references: a batch, or a list of images.
        spacing: one voxel size for all images, one per image as a list or as an array (count, spatial_dims), or as a
            list of one tensor (count,) per axis, which torch's collate makes of them; or None for those of MetaTensors,
            of `y` first, or else 1 mm.
        count: number of images.
        spatial_dims: number of spatial dimensions.

    Raises:
        ValueError: if the values do not fit the images.
    """
    if spacing is None:
        known = _affine_sizes(y, count, spatial_dims) or _affine_sizes(y_pred, count, spatial_dims)
        return [spacing_tuple(size, spatial_dims) for size in known or [(1.0,)] * count]
    if _is_per_image(spacing):
        spacing = _of_images(spacing, count, spatial_dims)
        if len(spacing) != count:
            message = (
                f"Expected `spacing` to be one voxel size for each of {counted(count, 'image')}, but got "
                f"{len(spacing)}: give one for all images, or one per image."
            )
            raise ValueError(message)
        return [spacing_tuple(s, spatial_dims) for s in spacing]
    return [spacing_tuple(spacing, spatial_dims)] * count


def _is_per_image(spacing: Any) -> bool:
    if isinstance(spacing, (np.ndarray, torch.Tensor)):
        return spacing.ndim == 2
    first = spacing[0] if isinstance(spacing, Sequence) and spacing else None
    is_size = isinstance(first, (Sequence, np.ndarray, torch.Tensor)) and not isinstance(first, str)
    return is_size and getattr(first, "ndim", 1) == 1


def _of_images(spacing: Any, count: int, spatial_dims: int) -> Any:
    """Return one voxel size per image, also of one tensor per axis, into which torch's collate turns tuples of numbers.

    Raises:
        ValueError: a list of as many tensors as there are axes could be either, and they differ.
    """
    is_list = isinstance(spacing, (list, tuple)) and all(isinstance(each, torch.Tensor) for each in spacing)
    if not is_list or len(spacing) != spatial_dims or any(each.shape != (count,) for each in spacing):
        return spacing
    table = torch.stack([each.detach().cpu().double() for each in spacing])
    if count == spatial_dims and not torch.equal(table, table.T):
        message = (
            f"Expected `spacing` to be one voxel size for each of {count} images, but got {count} tensors of {count} "
            f"numbers, which could be one per image or one per axis: give one tensor ({count}, {spatial_dims}), of "
            "images and axes, such as torch.stack(sizes)."
        )
        raise ValueError(message)
    return table.T


def _affine_sizes(batch: Any, count: int, spatial_dims: int) -> list[tuple[float, ...]] | None:
    """Return the voxel sizes of a MetaTensor, or of a list of MetaTensors, from their affines; None for anything else.

    MONAI's `pixdim` is cut to the dimensions that the tensor had before channels or images were added to it.

    Raises:
        ValueError: the affines are not those of these images: torch's functions leave the list of a batch as it was.
    """
    if isinstance(batch, (list, tuple)):
        if not all(isinstance(image, MetaTensor) for image in batch):
            return None
        affines = [image.affine for image in batch]
    elif isinstance(batch, MetaTensor):
        affines = list(batch.affine) if batch.affine.ndim == 3 else [batch.affine] * count
    else:
        return None
    sizes = [_affine_size(affine, spatial_dims) for affine in affines]
    if len(sizes) < count or (len(sizes) > count and not np.allclose(sizes, sizes[:1], rtol=1e-3)):
        message = (
            f"Expected one affine for each image of a MetaTensor ({count}), but got {len(sizes)}, as MONAI does not "
            "update the affines when a batch is split, joined or repeated: give `spacing`, or collate the images again."
        )
        raise ValueError(message)
    return sizes[:count]


def _affine_size(affine: Any, spatial_dims: int) -> tuple[float, ...]:
    """Return the lengths of the columns of an affine, of as many axes as the image has; 1 for a column of zeros."""
    table = torch.as_tensor(affine, device="cpu").detach().double()
    if table.ndim != 2 or table.shape[1] <= spatial_dims:
        message = (
            f"Expected the affine of an image of {spatial_dims} dimensions to have {spatial_dims + 1} rows and columns "
            f"or more, but got the shape {tuple(table.shape)}: give `spacing`, or the image an affine of its own."
        )
        raise ValueError(message)
    return tuple(float(size) or 1.0 for size in table[:-1, :spatial_dims].norm(dim=0))


def check_positions(name: str, size: Sequence[int]) -> int:
    """Return the number of positions N of a grid; raise ValueError above 16^3, because memory grows with N^2."""
    positions = math.prod(size)
    if not 1 <= positions <= MAX_POSITIONS or len(size) > 3:
        message = (
            f"Expected `{name}` to have 1 to {MAX_POSITIONS} positions (16x16x16) in 1 to 3 dimensions, but got "
            f"{positions} of {'x'.join(map(str, size))}: choose a coarser grid, because an affinity of N positions "
            "takes 4 N^2 bytes per image."
        )
        raise ValueError(message)
    return positions


def check_grid(name: str, size: Any) -> tuple[int, ...]:
    """Return the shape of a grid; raise TypeError unless it holds integers, and ValueError as `check_positions`."""
    sides = list(size) if isinstance(size, Sequence) and not isinstance(size, str) else []
    if not sides or not all(isinstance(side, numbers.Integral) for side in sides):
        message = (
            f"Expected `{name}` to be one integer per spatial dimension, but got {size!r}: give the shape of the grid."
        )
        raise TypeError(message)
    check_positions(name, sides)
    return tuple(int(side) for side in sides)
