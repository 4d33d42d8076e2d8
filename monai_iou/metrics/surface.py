"""Distances between the surfaces of two masks, in mm, with MONAI's definitions.

HD95 and ASSD measure between the voxels at the surface, as MONAI's `compute_hausdorff_distance` and
`compute_average_surface_distance` do; NSD weights the surface by its area between voxels, as its
`compute_surface_dice(use_subvoxels=True)` and DeepMind's surface-distance do. Here the masks are cropped to their
common bounding box; HD95 and ASSD are computed from the same distances, and so are all tolerances of the NSD.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from monai.metrics.utils import get_code_to_measure_table

from monai_iou.metrics.inputs import ArrayLike, spacing_tuple
from monai_iou.metrics.overlap import DISTANCE_ROUNDING, BoolMask, crop_to_union, edge_voxels, flat_strides, mask_pair

__all__ = ["SurfaceScores", "robust_hausdorff", "surface_scores"]

_Indices = npt.NDArray[np.int64]
_MOST_OF_TORCH = 1 << 24


@dataclass(frozen=True)
class SurfaceScores:
    """Surface distances of one structure.

    Example:
        >>> reference = np.zeros((9, 9), dtype=bool); reference[2:6, 2:6] = True
        >>> scores = surface_scores(np.roll(reference, 1, axis=0), reference, tolerances=(0.5, 1.0))
        >>> scores.hd95_mm, round(scores.assd_mm, 3), [round(value, 3) for value in scores.nsd]
        (1.0, 0.5, [0.5, 1.0])
    """

    hd95_mm: float
    """Larger of the 95th percentiles of the distances in the two directions, in mm; NaN if a mask is empty."""
    assd_mm: float
    """Mean of the distances from each surface to the other, in mm; NaN if a mask is empty."""
    nsd: tuple[float, ...]
    """For each tolerance, the share of both surfaces within it; 0 if one mask is empty, NaN if both are."""


def surface_scores(
    prediction: ArrayLike, reference: ArrayLike, *, tolerances: Sequence[float] = (1.0,), spacing: Any = None
) -> SurfaceScores:
    """Compute HD95, ASSD and the normalised surface Dice (NSD) of two masks.

    HD95 is the larger of the two directed 95th percentiles of the distances between surface voxels. ASSD is the mean of
    the distances in both directions. NSD is the share of both surfaces, by area, that lies within a tolerance of the
    other surface (Nikolov et al. 2021, https://doi.org/10.2196/26151). The distance to an empty mask is undefined: HD95
    and ASSD are then NaN and not infinite, and the NSD is 0, as the IoU is.

    Args:
        prediction: mask of 0 and 1 or of bool, with 2 or 3 dimensions.
        reference: mask of the same shape.
        tolerances: distances in mm up to which a surface counts as correct, one NSD for each. A distance that differs
            from the tolerance only by rounding counts as equal to it.
        spacing: voxel size in mm along each axis; None means 1 mm.

    Returns:
        The scores.

    Raises:
        TypeError: an input is neither an array nor a tensor.
        ValueError: an input contains values other than 0 and 1, the shapes differ, a tolerance is negative, or
            `spacing` does not fit the masks.

    Example:
        >>> reference = np.zeros((9, 9), dtype=bool); reference[2:6, 2:6] = True
        >>> surface_scores(np.roll(reference, 1, axis=0), reference, spacing=(3.0, 1.0)).hd95_mm
        3.0
    """
    p_mask, r_mask = mask_pair(prediction, reference, dimensions=(2, 3))
    size = spacing_tuple(spacing, p_mask.ndim)
    numbers = np.ndim(tolerances) == 1 and all(isinstance(t, Real) for t in tolerances)
    if not numbers or not all(math.isfinite(t) and t >= 0 for t in tolerances):
        given = tuple(tolerances) if np.ndim(tolerances) == 1 else tolerances
        message = (
            f"Expected `tolerances` to be a list of distances of at least 0 mm, but got {given!r}: pass for example "
            "(1.0, 2.0), one for each NSD."
        )
        raise ValueError(message)
    crop = crop_to_union(p_mask, r_mask)
    # One voxel of background around: every edge, and every cell of 2x2x2 voxels with an edge, then lies inside.
    p, r = (np.pad(mask, 1) for mask in crop[:2])
    if not (p.any() and r.any()):
        nsd = 0.0 if p.any() or r.any() else math.nan
        return SurfaceScores(math.nan, math.nan, (nsd,) * len(tolerances))
    hd95, assd = _voxel_distances(p, r, size)
    return SurfaceScores(hd95, assd, _surface_dice(p, r, size, tolerances))


def _voxel_distances(p: BoolMask, r: BoolMask, spacing: tuple[float, ...]) -> tuple[float, float]:
    distances = _both_ways(*(_places(edge_voxels(mask), mask.shape, spacing) for mask in (p, r)))
    hd95 = max(_percentile95(d) for d in distances)
    return hd95, float(_together(distances).mean())


def _percentile95(distances: torch.Tensor) -> float:
    """Return the 95th percentile as MONAI does, by torch, which takes no more than 2^24 numbers."""
    if len(distances) <= _MOST_OF_TORCH:
        return float(distances.quantile(0.95))
    return float(np.quantile(distances.numpy(), 0.95))


def _surface_dice(
    p: BoolMask, r: BoolMask, spacing: tuple[float, ...], tolerances: Sequence[float]
) -> tuple[float, ...]:
    (p_cells, p_area), (r_cells, r_area) = (_edge_cells(mask, spacing) for mask in (p, r))
    distance = _together(_both_ways(*(_places(cells, p.shape, spacing) for cells in (p_cells, r_cells))))
    area = _together([p_area, r_area])
    return tuple(float(area[distance <= t * (1 + DISTANCE_ROUNDING)].sum() / area.sum()) for t in tolerances)


def _together(parts: Sequence[torch.Tensor]) -> npt.NDArray[np.float64]:
    """All numbers in one array of float64: torch's sums depend on the number of threads in their last digits."""
    return np.concatenate([part.numpy().astype(np.float64) for part in parts])


def robust_hausdorff(prediction: BoolMask, reference: BoolMask, spacing: tuple[float, ...], percent: float) -> float:
    """Return the larger of the two directed percentiles of surface distances in mm, weighted by surface area.

    DeepMind's surface-distance computes HD95 in this way, and BraTS uses it; `hd95_mm` counts surface voxels instead.
    The result is infinite if a mask is empty.
    """
    if not (prediction.any() and reference.any()):
        return math.inf
    p, r = (np.pad(mask, 1) for mask in crop_to_union(prediction, reference)[:2])
    (p_cells, p_area), (r_cells, r_area) = (_edge_cells(mask, spacing) for mask in (p, r))
    distances = _both_ways(*(_places(cells, p.shape, spacing) for cells in (p_cells, r_cells)))
    return max(_weighted_percentile(d, a, percent) for d, a in zip(distances, (p_area, r_area), strict=True))


def _weighted_percentile(values: torch.Tensor, weights: torch.Tensor, percent: float) -> float:
    order = torch.argsort(values)
    reached = weights[order].double().cumsum(0) / weights.double().sum()
    place = int(torch.searchsorted(reached, percent / 100))
    return float(values[order][min(place, len(values) - 1)])


# Masks are sparse: what follows looks at their voxels, by flat index, and not at the whole box around them.


def _edge_cells(mask: BoolMask, spacing: tuple[float, ...]) -> tuple[_Indices, torch.Tensor]:
    """Cells of 2x2x2 voxel centres (2x2 in images) that the surface passes, and its area in each by MONAI's table."""
    table, kernel = get_code_to_measure_table(spacing, device=torch.device("cpu"))
    weights = kernel.reshape(-1).to(torch.int64).numpy()
    inside, strides = np.flatnonzero(mask), flat_strides(mask.shape)
    codes = np.zeros(mask.size, dtype=np.uint8)
    for corner, weight in zip(itertools.product((0, 1), repeat=mask.ndim), weights, strict=True):
        # A voxel is this corner of one cell only, so that no index stands twice.
        codes[inside - int(np.dot(corner, strides))] += np.uint8(weight)
    cells = np.flatnonzero(codes)
    edge: _Indices = cells[codes[cells] < len(table) - 1]
    return edge, table[torch.from_numpy(codes[edge].astype(np.int64))]


def _places(indices: _Indices, shape: tuple[int, ...], spacing: tuple[float, ...]) -> npt.NDArray[np.float64]:
    """Positions of flat indices in mm, shape (n, D)."""
    voxels: npt.NDArray[np.float64] = np.stack(np.unravel_index(indices, shape), axis=1).astype(np.float64)
    return voxels * np.asarray(spacing, dtype=np.float64)


def _both_ways(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> list[torch.Tensor]:
    """Distance in mm of every point of one surface to the other surface, in both directions."""
    from scipy.spatial import KDTree

    trees = [KDTree(points, leafsize=32) for points in (first, second)]
    distances = trees[1].query(first)[0], trees[0].query(second)[0]
    return [torch.from_numpy(distance).float() for distance in distances]
