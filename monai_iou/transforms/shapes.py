"""The shape of an image, and the check that several images of an item have one."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from monai.data.meta_tensor import MetaTensor


def spatial_shape(image: Any) -> tuple[int, ...]:
    """Return the shape S of an image (C, *S) as its pending lazy transforms leave it."""
    return tuple(image.peek_pending_shape() if isinstance(image, MetaTensor) else image.shape[1:])


def check_same_shape(images: Mapping[Hashable, Any], owner: str = "an item", *, pending: bool = False) -> None:
    """Raise ValueError if images (C, *S) differ in their spatial shape.

    Args:
        images: key -> image.
        owner: of the images, for the error.
        pending: whether the shapes are those that pending lazy transforms leave.
    """
    shapes = {str(key): spatial_shape(values) if pending else tuple(values.shape[1:]) for key, values in images.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{shape} of `{key}`" for key, shape in shapes.items())
        remedy = "resample or pad them to the same shape first"
        if len({len(shape) for shape in shapes.values()}) > 1:
            remedy = "give all as many dimensions, and each its channel dimension"
        message = f"Expected images of one shape in {owner}, but got {listed}: {remedy}."
        raise ValueError(message)
