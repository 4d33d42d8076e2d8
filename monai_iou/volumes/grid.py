"""The position of voxels in the patient: comparing, reorienting and resampling voxel grids.

Every grid is in RAS millimetres (the convention of NIfTI and nibabel), whatever the convention of the file.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Two grids count as the same if corresponding voxels are at most this fraction of a voxel apart. Headers store float32
# or decimal text, and programs round: offsets of 0.02 voxels occur, and change scores only by a similar fraction.
TOLERANCE_VOXELS = 0.025
# Larger offsets are reported, because rounding in most headers causes smaller ones.
NOTE_MM = 1e-3
# Smaller angles result from rounding in headers, and change distances by less than 0.2 %.
SHEAR_DEGREES = 0.1
AXIS_LETTERS = (("L", "R"), ("P", "A"), ("I", "S"))


class GridError(ValueError):
    """Two volumes that must be on the same grid are not; the message names both grids and the remedy."""


@dataclass(frozen=True, eq=False)
class Grid:
    """A regular grid of voxels in the patient.

    Args:
        shape: number of voxels along the three array axes.
        affine: (4, 4) matrix from voxel indices to RAS millimetres.
    """

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance between neighbouring voxels along each array axis, in mm."""
        x, y, z = (float(length) for length in np.linalg.norm(self.affine[:3, :3], axis=0))
        return x, y, z

    @property
    def origin(self) -> tuple[float, float, float]:
        """Position of the centre of the first voxel, in RAS mm."""
        x, y, z = (float(value) for value in self.affine[:3, 3])
        return x, y, z

    @property
    def orientation(self) -> str:
        """The closest anatomical direction of each array axis, such as `RAS` or `LPS`.

        >>> Grid((2, 2, 2), np.diag([-1.0, -1.0, 2.0, 1.0])).orientation
        'LPS'
        """
        directions = self.affine[:3, :3] / np.asarray(self.spacing)
        # Of the six assignments of array axes to patient axes, the one with the largest sum of cosines.
        best = max(
            itertools.permutations(range(3)), key=lambda axes: sum(abs(directions[axes[i], i]) for i in range(3))
        )
        return "".join(AXIS_LETTERS[axis][int(directions[axis, i] > 0)] for i, axis in enumerate(best))

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel, in millilitres."""
        return abs(float(np.linalg.det(self.affine[:3, :3]))) / 1000.0

    @property
    def shear(self) -> float:
        """Largest deviation of the angles between axes from 90 degrees, in degrees; 0 for nearly all scans.

        >>> tilted = np.eye(4)
        >>> tilted[1, 2] = np.tan(np.radians(10))
        >>> round(Grid((2, 2, 2), tilted).shear, 6)
        10.0
        """
        directions = self.affine[:3, :3] / np.asarray(self.spacing)
        cosines = np.abs(np.triu(directions.T @ directions, k=1)).max()
        return float(np.degrees(np.arcsin(min(1.0, cosines))))

    def __str__(self) -> str:
        shape = "x".join(str(size) for size in self.shape)
        spacing = "x".join(f"{length:.6g}" for length in self.spacing)
        # Adding zero turns -0 into 0.
        origin = ", ".join(f"{value + 0.0:.6g}" for value in np.round(self.origin, 4))
        return f"shape {shape}, spacing {spacing} mm, orientation {self.orientation}, origin ({origin}) mm"


def spatial_grid(shape: Sequence[int], affine: NDArray[np.float64]) -> Grid:
    """Return the grid of the first three axes of an array; missing axes have a length of one voxel.

    Args:
        shape: shape of the array in voxels.
        affine: (4, 4) matrix from voxel indices to RAS millimetres.

    >>> spatial_grid((4, 5), np.eye(4)).shape
    (4, 5, 1)
    """
    x, y, z = (int(length) for length in (*shape, 1, 1)[:3])
    return Grid((x, y, z), affine)


def distance_mm(first: Grid, second: Grid) -> float:
    """Return the largest distance between voxels with the same index, in mm; infinity if the shapes differ.

    The largest displacement of an affine map over a box is at one of its corners, so that the eight corners suffice.
    """
    shifts = _corner_shifts(first, second)
    return float("inf") if shifts is None else float(np.linalg.norm(shifts, axis=0).max())


def distance_voxels(first: Grid, second: Grid) -> float:
    """Return the largest offset of voxels with the same index along an axis, in voxels of `second`.

    It is infinity if the shapes differ.

    >>> original = Grid((2, 2, 2), np.diag([1.0, 1.0, 4.0, 1.0]))
    >>> shifted = np.diag([1.0, 1.0, 4.0, 1.0])
    >>> shifted[2, 3] = 1.0
    >>> distance_voxels(Grid((2, 2, 2), shifted), original)
    0.25
    """
    shifts = _corner_shifts(first, second)
    return float("inf") if shifts is None else float(np.abs(np.linalg.solve(second.affine[:3, :3], shifts)).max())


def _corner_shifts(first: Grid, second: Grid) -> NDArray[np.float64] | None:
    """Return the vector from each corner of `second` to that of `first`, (3, 8) in mm; None if the shapes differ."""
    if first.shape != second.shape:
        return None
    corners = np.array(list(itertools.product(*((0, size - 1) for size in first.shape), (1,))), dtype=float)
    return np.asarray((first.affine - second.affine)[:3] @ corners.T)


def same_grid(first: Grid, second: Grid) -> bool:
    """Return whether shapes are equal and corresponding voxels are at most `TOLERANCE_VOXELS` apart."""
    return distance_voxels(first, second) <= TOLERANCE_VOXELS


def offset_note(first: Grid, second: Grid) -> str | None:
    """Return a sentence about the offset of two grids that count as the same; None if it is less than `NOTE_MM`.

    >>> moved = np.eye(4)
    >>> moved[0, 3] = 0.02
    >>> offset_note(Grid((2, 2, 2), moved), Grid((2, 2, 2), np.eye(4)))
    'the grids are up to 0.02 mm (0.02 voxels) apart, which was taken as the same grid'
    """
    distance = distance_mm(first, second)
    if distance < NOTE_MM or np.isinf(distance):
        return None
    return (
        f"the grids are up to {distance:.3g} mm ({distance_voxels(first, second):.2g} voxels) apart, which was taken "
        "as the same grid"
    )


def reorient(array: NDArray[Any], grid: Grid, onto: Grid) -> tuple[NDArray[Any], Grid]:
    """Permute and flip the axes of `array` to match those of `onto`, without interpolation.

    An array whose axes are oblique to those of `onto` is returned unchanged.

    Args:
        array: voxels on `grid`, shape (X, Y, Z).
        grid: the grid of the array.
        onto: the grid whose axes to match.

    Returns:
        The array (a view) and its new grid.
    """
    relative = np.linalg.solve(onto.affine[:3, :3], grid.affine[:3, :3]) * np.divide(
        np.asarray(onto.spacing)[:, None], np.asarray(grid.spacing)[None, :]
    )
    signs = np.rint(relative)
    is_permutation = (np.abs(signs).sum(0) == 1).all() and (np.abs(signs).sum(1) == 1).all()
    if not is_permutation or np.abs(relative - signs).max() > 1e-2:
        return array, grid
    axes = [int(axis) for axis in np.abs(signs).argmax(axis=1)]
    flips = [signs[i, axis] < 0 for i, axis in enumerate(axes)]
    move = np.eye(4)  # from new to old voxel indices
    move[:3, :3] = 0
    for i, (axis, flip) in enumerate(zip(axes, flips, strict=True)):
        move[axis, i] = -1 if flip else 1
        move[axis, 3] = grid.shape[axis] - 1 if flip else 0
    array = array.transpose(axes)[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]
    x, y, z = array.shape
    return array, Grid((x, y, z), grid.affine @ move)


def align(array: NDArray[Any], grid: Grid, onto: Grid) -> NDArray[Any]:
    """Return `array` with its axes in the order and direction of those of `onto`.

    Args:
        array: voxels on `grid`, shape (X, Y, Z).
        grid: the grid of the array.
        onto: the grid on which the voxels must lie.

    Returns:
        The voxels in the axis order of `onto` (a view).

    Raises:
        GridError: if corresponding voxels are more than `TOLERANCE_VOXELS` apart. The message names both grids.

    >>> onto = Grid((2, 1, 1), np.eye(4))
    >>> flipped = Grid((2, 1, 1), np.array([[-1.0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))
    >>> align(np.array([[[7]], [[8]]]), flipped, onto).ravel().tolist()
    [8, 7]
    """
    array, reoriented = reorient(array, grid, onto)
    if same_grid(reoriented, onto):
        return array
    distance = distance_mm(reoriented, onto)
    apart = "" if np.isinf(distance) else f" (up to {distance:.4g} mm apart)"
    message = (
        f"Expected the prediction on the reference's grid ({onto}), but got {grid}{apart}: "
        "write the prediction on the reference's grid, or pass `--resample reference`."
    )
    raise GridError(message)


def resample(array: NDArray[Any], grid: Grid, onto: Grid, order: int = 0) -> NDArray[Any]:
    """Resample `array` onto another grid; the result is 0 outside its field of view.

    Args:
        array: voxels on `grid`, shape (X, Y, Z).
        grid: the grid of the array.
        onto: the grid of the result.
        order: 0 for the nearest voxel (labels), or 1 for linear interpolation (images).

    Returns:
        The resampled voxels, with the shape of `onto` and the dtype of `array`.
    """
    from scipy.ndimage import affine_transform  # `import monai_iou` must not load scipy

    matrix = np.linalg.solve(grid.affine, onto.affine)
    # "grid-constant" keeps the outer half of the outermost voxels, which "constant" would cut off.
    result: NDArray[Any] = affine_transform(
        array, matrix[:3, :3], offset=matrix[:3, 3], output_shape=onto.shape, order=order, mode="grid-constant"
    )
    return result
