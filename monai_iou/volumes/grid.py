"""Where voxels lie in the patient: grids of voxels in millimetres, compared, reoriented and resampled.

Every grid here is in RAS millimetres (nibabel's and NIfTI's convention), whatever the file's own convention was.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Two grids are the same if no voxel is further from its partner than this part of a voxel. Headers store float32 and
# decimal text, and tools round: 0.02 of a voxel occurs, and moves no score by more than such a part.
TOLERANCE_VOXELS = 0.025
# From here on the distance is told: it is more than what rounding in most headers does.
NOTE_MM = 1e-3
# Below it lies what rounding in files' headers does; distances are then wrong by less than 0.2 %.
SHEAR_DEGREES = 0.1
AXIS_LETTERS = (("L", "R"), ("P", "A"), ("I", "S"))


class GridError(ValueError):
    """Two volumes that should lie on one grid do not."""


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
        """Distance of neighbouring voxels along each array axis, in mm."""
        x, y, z = (float(length) for length in np.linalg.norm(self.affine[:3, :3], axis=0))
        return x, y, z

    @property
    def origin(self) -> tuple[float, float, float]:
        """Position of the first voxel's centre, in RAS mm."""
        x, y, z = (float(value) for value in self.affine[:3, 3])
        return x, y, z

    @property
    def orientation(self) -> str:
        """The anatomical direction that each array axis points to most, such as `RAS` or `LPS`.

        >>> Grid((2, 2, 2), np.diag([-1.0, -1.0, 2.0, 1.0])).orientation
        'LPS'
        """
        directions = self.affine[:3, :3] / np.asarray(self.spacing)
        # Each patient axis goes to one array axis: of the six assignments, the one with the largest sum of cosines.
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
        """How far the axes are from right angles to each other, in degrees; 0 for nearly all scans.

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
        # The added zero turns -0 into 0.
        origin = ", ".join(f"{value + 0.0:.6g}" for value in np.round(self.origin, 4))
        return f"shape {shape}, spacing {spacing} mm, orientation {self.orientation}, origin ({origin}) mm"


def spatial_grid(shape: Sequence[int], affine: NDArray[np.float64]) -> Grid:
    """Return the grid of an array's first three axes; missing ones have length one.

    >>> spatial_grid((4, 5), np.eye(4)).shape
    (4, 5, 1)
    """
    x, y, z = (int(length) for length in (*shape, 1, 1)[:3])
    return Grid((x, y, z), affine)


def distance_mm(first: Grid, second: Grid) -> float:
    """The largest distance between voxels of the same index, in mm; infinite if the shapes differ.

    An affine map's largest displacement over a box is at a corner, so the eight corners suffice.
    """
    moved = _corner_shifts(first, second)
    return float("inf") if moved is None else float(np.linalg.norm(moved, axis=0).max())


def distance_voxels(first: Grid, second: Grid) -> float:
    """The largest distance between voxels of the same index, in voxels of `second`; infinite if the shapes differ.

    >>> here = Grid((2, 2, 2), np.diag([1.0, 1.0, 4.0, 1.0]))
    >>> there = np.diag([1.0, 1.0, 4.0, 1.0])
    >>> there[2, 3] = 1.0
    >>> distance_voxels(Grid((2, 2, 2), there), here)
    0.25
    """
    moved = _corner_shifts(first, second)
    return float("inf") if moved is None else float(np.abs(np.linalg.solve(second.affine[:3, :3], moved)).max())


def _corner_shifts(first: Grid, second: Grid) -> NDArray[np.float64] | None:
    """The way from each corner of `second` to that of `first`, (3, 8) in mm; None if the shapes differ."""
    if first.shape != second.shape:
        return None
    corners = np.array(list(itertools.product(*((0, size - 1) for size in first.shape), (1,))), dtype=float)
    return np.asarray((first.affine - second.affine)[:3] @ corners.T)


def same_grid(first: Grid, second: Grid) -> bool:
    """Whether two grids are the same: equal shapes, and no voxel further than `TOLERANCE_VOXELS` from its partner."""
    return distance_voxels(first, second) <= TOLERANCE_VOXELS


def offset_note(first: Grid, second: Grid) -> str | None:
    """Return how far two grids that count as the same are apart, None if it is less than `NOTE_MM`.

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
    """Permute and flip the axes of `array` so that they run as those of `onto`; no voxel is interpolated.

    Axes that are oblique to those of `onto` stay as they are: `align` refuses them.

    Args:
        array: voxels on `grid`, shape (X, Y, Z).
        grid: where the voxels lie.
        onto: the grid whose axes to follow.

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
    move = np.eye(4)  # new index -> old index
    move[:3, :3] = 0
    for i, (axis, flip) in enumerate(zip(axes, flips, strict=True)):
        move[axis, i] = -1 if flip else 1
        move[axis, 3] = grid.shape[axis] - 1 if flip else 0
    array = array.transpose(axes)[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]
    x, y, z = array.shape
    return array, Grid((x, y, z), grid.affine @ move)


def align(array: NDArray[Any], grid: Grid, onto: Grid) -> NDArray[Any]:
    """Read `array` in the axis order of `onto`.

    Args:
        array: voxels on `grid`, shape (X, Y, Z).
        grid: where the voxels lie.
        onto: the grid they are expected on.

    Returns:
        The voxels in the axis order of `onto` (a view).

    Raises:
        GridError: a voxel would lie more than `TOLERANCE_VOXELS` from its partner. The message names both grids.

    >>> here = Grid((2, 1, 1), np.eye(4))
    >>> flipped = Grid((2, 1, 1), np.array([[-1.0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))
    >>> align(np.array([[[7]], [[8]]]), flipped, here).ravel().tolist()
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
    """Resample `array` onto another grid; outside of its field of view the result is 0.

    Args:
        array: voxels on `grid`, shape (X, Y, Z).
        grid: where the voxels lie.
        onto: the grid of the result.
        order: 0 takes the nearest voxel (labels), 1 interpolates linearly (images).

    Returns:
        Voxels of shape `onto.shape` and of the dtype of `array`.
    """
    from scipy.ndimage import affine_transform  # imported here: `import monai_iou` must not load scipy

    matrix = np.linalg.solve(grid.affine, onto.affine)
    # "grid-constant" lets the outermost voxels keep their outer half; "constant" would cut it off.
    result: NDArray[Any] = affine_transform(
        array, matrix[:3, :3], offset=matrix[:3, 3], output_shape=onto.shape, order=order, mode="grid-constant"
    )
    return result
