"""Masks in the formats of ITK: MetaImage and NRRD, where a user asks for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ITK_ENDINGS", "MASK_ENDINGS", "mask_ending", "write_with_itk"]

ITK_ENDINGS = (".mha", ".nrrd")
MASK_ENDINGS = (".nii.gz", ".nii", *ITK_ENDINGS)
LPS = np.diag([-1.0, -1.0, 1.0])  # ITK's axes point to the left and to the back, ours to the right and to the front


def mask_ending(name: str) -> str:
    """Return which of the formats a file's name has, NIfTI's compressed one for any other name.

    >>> mask_ending("a.b.nrrd"), mask_ending("C.NII"), mask_ending("c")
    ('.nrrd', '.nii', '.nii.gz')
    """
    return next((ending for ending in MASK_ENDINGS if name.lower().endswith(ending)), MASK_ENDINGS[0])


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
        SimpleITK.WriteImage(image, str(path), useCompression=True)
    except RuntimeError as error:
        message = str(error).strip().splitlines()[-1]
        raise OSError(message) from error
