"""The header of a volume, known before its voxels are read: shape, data type, affine and location of the data."""

from __future__ import annotations

import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# From a nanometre to ten metres. A header with values outside of this range has a wrong unit or is damaged.
VOXEL_EDGES_MM = (1e-6, 1e4)
MAX_AXES = 7


class VolumeError(ValueError):
    """A file cannot be read as a single volume, or as labels; the message names the file, the value and the remedy."""


def refusal(path: Path, expected: str, actual: str, remedy: str) -> VolumeError:
    """Return an error that says in one sentence what is wrong with a file and what to do.

    >>> print(refusal(Path("a.nii"), "be an image", "a table", "name another file"))
    Expected `a.nii` to be an image, but got a table: name another file.
    """
    return VolumeError(f"Expected `{path}` to {expected}, but got {actual}: {remedy}.")


@dataclass(frozen=True)
class Part:
    """A section of a file that holds voxels.

    Attributes:
        file: the file.
        offset: number of bytes in the file before the data, or before the compressed data.
        encoding: "raw", "gzip", "zlib", "bzip2", "ascii" or "hex".
        skip: number of bytes before the voxels after decompression.
        from_end: whether the data are the last bytes of the file, whatever precedes them.
        exact: whether no other data may follow.
    """

    file: Path
    offset: int = 0
    encoding: str = "raw"
    skip: int = 0
    from_end: bool = False
    exact: bool = True


@dataclass(frozen=True)
class Header:
    """A volume whose voxels have not been read yet.

    Attributes:
        path: the path that the user named.
        shape: number of voxels along each axis of the file; the first axis varies fastest.
        dtype: data type of the stored numbers, including the byte order.
        affine: (4, 4) matrix from voxel indices to RAS millimetres.
        parts: the sections of files that hold the numbers, in order and of equal size.
        scaling: slope and intercept that convert stored numbers to values; None if no conversion is needed.
        files: all files of the volume.
        notes: sentences about peculiarities of the header, for the report.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    affine: NDArray[np.float64]
    parts: tuple[Part, ...]
    scaling: tuple[float, float] | None = None
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def stored_bytes(self) -> int:
        """Size of the stored numbers after decompression, in bytes."""
        size = self.dtype.itemsize
        for length in self.shape:
            size *= int(length)
        return size


def check_regular(path: Path) -> None:
    """Raise unless a path is a regular file: opening a pipe could wait forever, and reading a device might not end.

    Raises:
        VolumeError: if there is no such file, or it is a folder, pipe, socket or device.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"the error '{error.strerror}'"
        raise refusal(path, "be a volume", reason, "check the path and its permissions") from error
    except ValueError as error:  # a NUL in the name
        raise refusal(path, "be a volume", f"the error '{error}'", "check the path") from error
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        raise refusal(path, "be a file", kind, "name a file that contains a volume")


def is_dangling(path: Path) -> bool:
    """Return whether a path is a link whose file is not there, such as one that git-annex has not fetched.

    Of a link into a folder that may not be entered, nobody knows.
    """
    try:
        if path.is_symlink():
            path.stat()
    except PermissionError:
        return False
    except OSError:
        return True
    return False


def check_shape(path: Path, shape: tuple[int, ...]) -> None:
    """Raise VolumeError if an axis has no voxels, or there are more axes than any supported format allows."""
    if not shape or len(shape) > MAX_AXES or any(length < 1 for length in shape):
        text = "x".join(str(length) for length in shape[: MAX_AXES + 1]) or "none"
        remedy = "correct its header or write the file again"
        raise refusal(path, "have at least one voxel along each axis", f"shape {text}", remedy)


def check_affine(path: Path, affine: NDArray[np.float64]) -> None:
    """Raise VolumeError if the spacing of an affine is zero, NaN or implausible, or its axes are linearly dependent."""
    edges = np.linalg.norm(affine[:3, :3], axis=0)
    low, high = VOXEL_EDGES_MM
    if not np.isfinite(affine).all() or not ((edges >= low) & (edges <= high)).all():
        sizes = "x".join(f"{edge:.6g}" for edge in edges)
        remedy = "correct the spacing in its header"
        raise refusal(path, "have a valid affine", f"voxels of {sizes} mm at {_numbers(affine[:3, 3])}", remedy)
    if abs(np.linalg.det(affine[:3, :3] / edges)) < 1e-6:
        rows = "; ".join(_numbers(row) for row in affine[:3, :3])
        raise refusal(path, "have a valid affine", f"linearly dependent axes ({rows})", "correct them in its header")


def one_number(path: Path, actual: str) -> VolumeError:
    """Return the error for RGB, complex and vector data."""
    return refusal(path, "hold one number per voxel", actual, "convert it to one channel first")


def _numbers(values: NDArray[np.float64]) -> str:
    return "(" + ", ".join(f"{value:.6g}" for value in values) + ")"
