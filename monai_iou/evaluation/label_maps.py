"""Whether a file is a label map or an image: nothing but its values tells."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from monai_iou.datasets.cases import looks_like_image
from monai_iou.volumes.header import VolumeError
from monai_iou.volumes.reading import read_channels, read_labels

__all__ = ["is_image", "is_label_map"]


def is_label_map(path: Path, *labelled: Path) -> bool:
    """Return whether a file has no other values than these label maps, and 0; not if one cannot be read."""
    try:
        values = np.unique(np.concatenate([[0], *(np.unique(read_labels(other).array) for other in labelled)]))
        found = read_labels(path).array
    except (OSError, VolumeError):
        return False
    inside = found.min() >= values[0] and found.max() <= values[-1]  # at once False for most images
    return bool(inside and np.isin(found, values).all())


def is_image(path: Path) -> bool:
    """Return whether a file looks like an image, by its first channel; not if it cannot be read."""
    try:
        return looks_like_image(read_channels([path]).array[0])
    except (OSError, VolumeError):
        return False
