"""Label values as integers; values that an integer cannot represent exactly raise an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monai_iou.checks import label_tolerance
from monai_iou.volumes.header import Header, refusal

# The largest whole numbers, by bytes of the float type, below which all whole numbers are represented exactly: in
# float32, 312782546 and 312782547 are the same number.
EXACT = {2: 2**11, 4: 2**24, 8: 2**53}
INTEGERS = (np.uint8, np.int16, np.int32, np.int64)


def whole_labels(array: NDArray[Any], path: Path, rounding: float = 0.0) -> NDArray[Any]:
    """Return labels as the smallest of uint8, int16, int32 and int64 that represents every value.

    Args:
        array: values of any real dtype, shape (X, Y, Z).
        path: the file of the labels, for error messages.
        rounding: further error of each value, see `rounding_of`.

    Raises:
        VolumeError: if a voxel is NaN, infinite or a fraction, or so large that its float type cannot distinguish it
            from the next whole number.

    >>> whole_labels(np.array([[[0.0, 2.0, 300.0]]]), Path("a.nii")).dtype
    dtype('int16')
    """
    if array.dtype.kind == "f":
        array = _of_floats(array, path, rounding)
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    for dtype in INTEGERS:
        limits = np.iinfo(dtype)
        if limits.min <= low and high <= limits.max:
            return array.astype(dtype, copy=False)
    raise refusal(path, "hold labels within 64-bit integers", f"values up to {high}", "renumber them")


def rounding_of(header: Header | None) -> float:
    """Return how far a value may lie from what was written, where the header scales whole numbers: half of a step."""
    if header is None or header.scaling is None or header.dtype.kind not in "iu":
        return 0.0
    return abs(header.scaling[0]) / 2


def _of_floats(array: NDArray[Any], path: Path, rounding: float) -> NDArray[np.int64]:
    """Convert a float volume to labels, slice by slice, because copies of the volume would need far more memory."""
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
        tolerance = label_tolerance(part, rounding)
        fractions = part[np.abs(part - rounded) > tolerance]
        wrong += int(fractions.size)
        example = example or float(next(iter(fractions), 0.0))
        whole[:, :, k] = rounded
    if bad:
        raise refusal(path, "hold labels", f"{bad} NaN or infinite voxels", "write 0 for background")
    if largest > exact:
        values = f"{largest:.10g}, which {array.dtype.name} cannot represent exactly"
        raise refusal(path, "hold distinct labels", values, "store the labels as integers, or renumber them")
    if wrong:
        values = f"{wrong} fractions such as {example:.9g}"
        remedy = "threshold the probabilities, or pass the label map instead of an image"
        raise refusal(path, "hold whole-number labels", values, remedy)
    return whole
