"""Headers of NIfTI results: those of their images, so that every program finds a result where it finds the image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monai_iou.volumes.grid import Grid, same_grid, spatial_grid
from monai_iou.volumes.header import Header, VolumeError
from monai_iou.volumes.names import NIFTI_ENDINGS
from monai_iou.volumes.nifti import load_raw_header
from monai_iou.volumes.reading import read_header

__all__ = ["nifti_on_image"]

# Of sform and qform in a header: the largest code that nibabel knows, and that of a place other than the scanner's.
LARGEST_CODE, ALIGNED = 5, 2


def nifti_on_image(array: NDArray[Any], affine: NDArray[np.float64], source: Path | None) -> Any:
    """Return a result on the grid of an image as a nibabel image, of the array's type.

    If the image is NIfTI, the result carries its header: qform and sform with their codes, units and, without channels,
    trailing axes. For other images both forms hold the affine.

    Args:
        array: shape (X, Y, Z), or (X, Y, Z, C) with channels.
        affine: (4, 4), from voxel indices to RAS millimetres.
        source: the file of the image, if there is one.
    """
    import nibabel

    header = None if source is None else _header(source, spatial_grid(array.shape, affine))
    if header is None:
        image = nibabel.Nifti1Image(array, affine, dtype=array.dtype)
        image.set_qform(affine, 1)
        image.set_sform(affine, 1)
        image.header.set_xyzt_units("mm")
        return image
    image_shape, raw = header[0].shape, header[1].copy()
    if array.ndim <= 3:
        # Channels lie on the image's fourth axis; a mask has none, only axes of length one.
        shape = tuple(n if axis < 3 else 1 for axis, n in enumerate(image_shape))
        array = array.reshape(shape if image_shape[3:] == shape[3:] else shape[:3])
    else:
        raw["xyzt_units"] = int(raw["xyzt_units"]) & 7  # the fourth axis is no time
        raw["pixdim"][4] = 1
    raw.set_data_dtype(array.dtype)
    for name in ("cal_min", "cal_max", "intent_code", "scl_slope", "scl_inter", "vox_offset"):
        raw[name] = 0
    for name in ("sform_code", "qform_code"):
        if int(raw[name]) > LARGEST_CODE:  # nibabel would write 0, and the result would lie elsewhere
            raw[name] = ALIGNED
    kind = nibabel.Nifti2Image if len(raw.binaryblock) == 540 else nibabel.Nifti1Image
    return kind(array, None, raw)


def _header(source: Path, grid: Grid) -> tuple[Header, Any] | None:
    """The header of an image, if that is NIfTI, still there, and lies where the result lies."""
    if not source.name.lower().endswith(NIFTI_ENDINGS):
        return None
    try:
        header = read_header(source)
        raw = load_raw_header(source)
    except (VolumeError, OSError):
        return None
    if header is None or not same_grid(spatial_grid(header.shape, header.affine), grid):
        return None
    return header, raw
