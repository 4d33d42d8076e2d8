"""Formats of masks beside NIfTI, where a user asks for them: MetaImage and NRRD by ITK, and PNG for single slices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monai_iou.datasets.cases import DatasetError
from monai_iou.volumes.names import PNG_EXTENSION
from monai_iou.volumes.plain_names import plain_target
from monai_iou.volumes.png import MOST_STORED

__all__ = ["ITK_ENDINGS", "MASK_ENDINGS", "check_fits_png", "mask_ending", "write_with_itk"]

ITK_ENDINGS = (".mha", ".nrrd")
MASK_ENDINGS = (".nii.gz", ".nii", *ITK_ENDINGS, PNG_EXTENSION)
LPS = np.diag([-1.0, -1.0, 1.0])  # ITK's axes point to the left and to the back, ours to the right and to the front


def mask_ending(name: str) -> str:
    """Return which of the formats a file's name has, NIfTI's compressed one for any other name.

    >>> mask_ending("a.b.nrrd"), mask_ending("C.NII"), mask_ending("c")
    ('.nrrd', '.nii', '.nii.gz')
    """
    return next((ending for ending in MASK_ENDINGS if name.lower().endswith(ending)), MASK_ENDINGS[0])


def check_fits_png(image: Path, shape: Sequence[int], values: Sequence[int]) -> None:
    """Check before any work that the mask of an image can be a PNG.

    Raises:
        DatasetError: the image has several slices, or a label value exceeds 65535.
    """
    if 1 in shape and max(values) <= MOST_STORED:
        return
    found = f"the value {max(values)}" if 1 in shape else f"shape {'x'.join(map(str, shape))}"
    message = (
        f"Expected a mask of one slice with values up to {MOST_STORED} for a PNG, but got {found} for {image}: take "
        "another format, such as .nii.gz."
    )
    raise DatasetError(message)


def write_with_itk(array: NDArray[Any], affine: NDArray[np.float64], path: Path) -> None:
    """Write a map of labels by SimpleITK, compressed.

    Args:
        array: shape (X, Y, Z), of integers.
        affine: (4, 4), from voxel indices to RAS millimetres.
        path: ends in `.mha` or `.nrrd`.

    Raises:
        OSError: the file cannot be written.
    """
    import SimpleITK

    columns = affine[:3, :3]
    spacing = np.linalg.norm(columns, axis=0)
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
    image.SetSpacing(spacing.tolist())
    image.SetOrigin((LPS @ affine[:3, 3]).tolist())
    image.SetDirection((LPS @ columns / spacing).ravel().tolist())
    try:
        with plain_target(path) as name:
            SimpleITK.WriteImage(image, str(name), useCompression=True)
    except RuntimeError as error:
        message = str(error).strip().splitlines()[-1]
        raise OSError(message) from error
