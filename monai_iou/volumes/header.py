"""What the header of a volume says before a voxel is read: shape, type, place, and where the data are stored."""

from __future__ import annotations

import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# From a nanometre to ten metres: what is outside is a header that has lost its unit, or is damaged.
VOXEL_EDGES_MM = (1e-6, 1e4)
MAX_AXES = 7


class VolumeError(ValueError):
    """A file that cannot be read as one volume, or not as labels; the message names the file, the value, the remedy."""


def refusal(path: Path, expected: str, found: str, remedy: str) -> VolumeError:
    """Return the error that says in one sentence what is wrong with a file and what to do."""
    return VolumeError(f"Expected `{path}` to {expected}, but got {found}: {remedy}.")


@dataclass(frozen=True)
class Part:
    """A stretch of a file that holds voxels.

    Attributes:
        file: the file.
        offset: bytes of the file before the data, or before their compression.
        encoding: "raw", "gzip", "zlib", "bzip2", "ascii" or "hex".
        skip: bytes before the data after decompression.
        from_end: whether the data are the last bytes of the file, whatever precedes them.
        exact: whether nothing may follow the data.
    """

    file: Path
    offset: int = 0
    encoding: str = "raw"
    skip: int = 0
    from_end: bool = False
    exact: bool = True


@dataclass(frozen=True)
class Header:
    """A volume whose voxels are not read yet.

    Attributes:
        path: the file that was named.
        shape: number of voxels along each axis of the file, first axis fastest.
        dtype: type of the stored numbers with their byte order.
        affine: (4, 4) matrix from voxel indices to RAS millimetres.
        parts: where the numbers are stored, in order; each part holds an equal share.
        scaling: slope and intercept that turn stored numbers into values; None where they are the values.
        files: every file that the volume depends on.
        notes: sentences about the header that a reader of the results should know.
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
        """Size of the stored numbers after decompression."""
        size = self.dtype.itemsize
        for length in self.shape:
            size *= int(length)
        return size


def check_regular(path: Path) -> None:
    """Refuse what is not a file before it is opened: opening a pipe waits for ever, and a device has no end.

    Raises:
        VolumeError: there is no such file, or it is a folder, a pipe or a device.
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
        raise refusal(path, "be a file", kind, "name a file that holds a volume")


def check_shape(path: Path, shape: tuple[int, ...]) -> None:
    """Refuse axes without voxels, and more axes than any format here has."""
    if not shape or len(shape) > MAX_AXES or any(length < 1 for length in shape):
        text = "x".join(str(length) for length in shape[: MAX_AXES + 1]) or "none"
        raise refusal(path, "have axes of one voxel or more", f"shape {text}", "correct its header or write it again")


def check_affine(path: Path, affine: NDArray[np.float64]) -> None:
    """Refuse an affine that gives voxels no size: zero, NaN or nonsensical spacing, or axes that coincide."""
    edges = np.linalg.norm(affine[:3, :3], axis=0)
    low, high = VOXEL_EDGES_MM
    if not np.isfinite(affine).all() or not ((edges >= low) & (edges <= high)).all():
        sizes = "x".join(f"{edge:.6g}" for edge in edges)
        remedy = "correct the spacing in its header"
        raise refusal(path, "have a valid affine", f"voxels of {sizes} mm at {_numbers(affine[:3, 3])}", remedy)
    if abs(np.linalg.det(affine[:3, :3] / edges)) < 1e-6:
        rows = "; ".join(_numbers(row) for row in affine[:3, :3])
        raise refusal(path, "have a valid affine", f"axes that coincide ({rows})", "correct the axes in its header")


def one_number(path: Path, found: str) -> VolumeError:
    """Return the error for RGB, complex and vector data."""
    return refusal(path, "hold one number per voxel", found, "convert it to one channel first")


def _numbers(values: NDArray[np.float64]) -> str:
    return "(" + ", ".join(f"{value:.6g}" for value in values) + ")"
