"""The check that several images of an item have one shape."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any


def check_same_shape(images: Mapping[Hashable, Any], owner: str = "an item") -> None:
    """Raise ValueError if images (C, *S) differ in their spatial shape.

    Args:
        images: key -> image.
        owner: of the images, for the error.
    """
    shapes = {str(key): tuple(values.shape[1:]) for key, values in images.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{shape} of `{key}`" for key, shape in shapes.items())
        message = (
            f"Expected images of one shape in {owner}, but got {listed}: resample or pad them to the same shape first."
        )
        raise ValueError(message)
