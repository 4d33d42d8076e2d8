"""Label values: whole numbers kept exactly, or refused before they are cast to another type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monai_iou.volumes.header import refusal

# Header scaling and resampling in float32 leave whole numbers this far from whole, and this part of their size.
ROUNDING = 1e-4
ROUNDING_PER_VALUE = 4 * float(np.finfo(np.float32).eps)
# Far below it the nearest whole number is in no doubt.
MAX_ROUNDING = 0.05
# Whole numbers above are not all there: 312782546 and 312782547 are one number in float32.
EXACT = {2: 2**11, 4: 2**24, 8: 2**53}
INTEGERS = (np.uint8, np.int16, np.int32, np.int64)


def whole_labels(array: NDArray[Any], path: Path) -> NDArray[Any]:
    """Return labels as the smallest of uint8, int16, int32 and int64 that holds every value.

    Args:
        array: values of any real dtype, shape (X, Y, Z).
        path: for the errors.

    Raises:
        VolumeError: a voxel is NaN, infinite, a fraction, or too large for its type to keep apart from the next.
    """
    if array.dtype.kind == "f":
        array = _of_floats(array, path)
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    for dtype in INTEGERS:
        limits = np.iinfo(dtype)
        if limits.min <= low and high <= limits.max:
            return array.astype(dtype, copy=False)
    raise refusal(path, "hold labels within 64-bit integers", f"values up to {high}", "renumber them")


def _of_floats(array: NDArray[Any], path: Path) -> NDArray[np.int64]:
    """The labels of a float volume, a slice at a time: whole copies of it would be many times the labels' size."""
    exact = EXACT[min(array.dtype.itemsize, 8)]
    whole = np.zeros(array.shape, dtype=np.int64, order="F")
    bad = wrong = 0
    example = largest = 0.0
    for k in range(array.shape[2]):
        part = array[:, :, k].astype(np.float64)
        finite = np.isfinite(part)
        if not finite.all():
            bad += int(part.size - finite.sum())
            part = np.where(finite, part, 0.0)
        largest = max(largest, float(np.abs(part).max(initial=0.0)))
        if largest > exact:
            continue
        rounded = np.rint(part)
        tolerance = np.minimum(ROUNDING + ROUNDING_PER_VALUE * np.abs(part), MAX_ROUNDING)
        fractions = part[np.abs(part - rounded) > tolerance]
        wrong += int(fractions.size)
        example = example or float(next(iter(fractions), 0.0))
        whole[:, :, k] = rounded
    if bad:
        raise refusal(path, "hold labels", f"{bad} NaN or infinite voxels", "write 0 for background")
    if largest > exact:
        found = f"{largest:.10g}, which {array.dtype.name} does not keep exactly"
        raise refusal(path, "hold labels that stay apart", found, "store the labels as integers, or renumber them")
    if wrong:
        found = f"{wrong} fractions such as {example:.9g}"
        remedy = "threshold the probabilities, or pass the label map instead of an image"
        raise refusal(path, "hold whole-number labels", found, remedy)
    return whole
