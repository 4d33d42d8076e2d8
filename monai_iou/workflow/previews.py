"""A picture of a mask that was written, over its image, both as they lie in their files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monai_iou.files import OutputError
from monai_iou.volumes.grid import Grid
from monai_iou.volumes.names import is_png
from monai_iou.volumes.png import of_slice
from monai_iou.volumes.reading import read_channels, read_labels
from monai_iou.workflow.pictures import draw_case, save_png

__all__ = ["write_preview"]


def write_preview(images: Sequence[Path], mask: Path, path: Path) -> None:
    """Draw the image's first channel with the mask's contours, in the patient's axes, as PNG.

    The numbers of the slices are those of the mask's file, counted from 1.

    Raises:
        VolumeError: a file cannot be read.
        OutputError: the picture cannot be written.
    """
    image, labels = read_channels(images), read_labels(mask)
    values, grid = labels.array, labels.grid
    if is_png(mask):  # it states no place: its pixels are the voxels of the image
        values, grid = of_slice(values, image.grid.shape, mask), image.grid
    array, spacing, _ = _in_patient_axes(image.array[0], image.grid)
    drawn, _, backwards = _in_patient_axes(values, grid)
    picture = draw_case(array.astype(np.float32), drawn, spacing=spacing, title=mask.name, backwards=backwards)
    try:
        save_png(picture, path)
    except OSError as error:
        message = (
            f"Expected to write the picture `{path}`, but got the error '{error.strerror or error}': free space or "
            "choose another folder."
        )
        raise OutputError(message) from error


def _in_patient_axes(array: NDArray[Any], grid: Grid) -> tuple[NDArray[Any], tuple[float, ...], tuple[bool, ...]]:
    """The array with its axes to the patient's right, front and head, its spacing, and whether each axis was turned."""
    letters = grid.orientation
    order = [next(i for i, letter in enumerate(letters) if letter in pair) for pair in ("RL", "AP", "SI")]
    turned = array.transpose(order)
    backwards = tuple(letters[i] in "LPI" for i in order)
    flips = tuple(axis for axis, is_turned in enumerate(backwards) if is_turned)
    return np.flip(turned, flips), tuple(grid.spacing[i] for i in order), backwards
