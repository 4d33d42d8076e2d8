"""Distances between the surfaces of two masks, in mm, from MONAI's surface distances.

HD95 and ASSD measure between the voxels at the surface, as MONAI's `compute_hausdorff_distance` and
`compute_average_surface_distance` do; NSD weights the surface by its area between voxels, as its
`compute_surface_dice(use_subvoxels=True)` and DeepMind's surface-distance do. Here the masks are cropped to where
either has a voxel, and HD95 and ASSD share their distances, as do all tolerances of NSD.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.metrics.utils import get_mask_edges, get_surface_distance

from monai_iou.metrics.inputs import ArrayLike, spacing_tuple
from monai_iou.metrics.overlap import BoolMask, crop_to_union, mask_pair

__all__ = ["SurfaceScores", "robust_hausdorff", "surface_scores"]


@dataclass(frozen=True)
class SurfaceScores:
    """Surface distances of one structure."""

    hd95_mm: float
    """The larger of the two directions' 95th percentiles; NaN where either mask is empty."""
    assd_mm: float
    """Mean over both surfaces' distances to each other; NaN where either mask is empty."""
    nsd: tuple[float, ...]
    """Share of both surfaces within each tolerance of the other; 0 where one mask is empty, NaN where both are."""


def surface_scores(
    prediction: ArrayLike, reference: ArrayLike, *, tolerances: Sequence[float] = (1.0,), spacing: Any = None
) -> SurfaceScores:
    """HD95, ASSD and normalised surface Dice (NSD) of two masks.

    A distance to nothing has no value: with one mask empty HD95 and ASSD are NaN, not infinite, and the NSD of 0 (as
    well as the IoU of 0) says what happened.

    Args:
        prediction: mask of 0 and 1, or bool, of 2 or 3 dimensions.
        reference: mask of the same shape.
        tolerances: distances in mm up to which a surface counts as right, one NSD for each.
        spacing: voxel size in mm along each axis; None is 1 mm.

    Returns:
        The scores.

    Raises:
        TypeError: an input is neither an array nor a tensor.
        ValueError: values other than 0 and 1, different shapes, negative tolerances, or an unfit `spacing`.

    >>> reference = np.zeros((9, 9), dtype=bool); reference[2:6, 2:6] = True
    >>> surface_scores(np.roll(reference, 1, axis=0), reference, spacing=(3.0, 1.0)).hd95_mm
    3.0
    """
    p_mask, r_mask = mask_pair(prediction, reference, dimensions=(2, 3))
    size = spacing_tuple(spacing, p_mask.ndim)
    if not all(math.isfinite(t) and t >= 0 for t in tolerances):
        message = f"Expected `tolerances` to be mm of at least 0, but got {tuple(tolerances)}: give one per NSD wanted."
        raise ValueError(message)
    crop = crop_to_union(p_mask, r_mask)
    p, r = (torch.from_numpy(np.pad(mask, 1)) for mask in crop[:2])  # MONAI's own crop is the same, and slow
    if not (p.any() and r.any()):
        nsd = 0.0 if p.any() or r.any() else math.nan
        return SurfaceScores(math.nan, math.nan, (nsd,) * len(tolerances))
    hd95, assd = _voxel_distances(p, r, size)
    return SurfaceScores(hd95, assd, _surface_dice(p, r, size, tolerances))


def _voxel_distances(p: torch.Tensor, r: torch.Tensor, spacing: tuple[float, ...]) -> tuple[float, float]:
    p_edge, r_edge = get_mask_edges(p, r, crop=False)
    distances = _both_ways(p_edge, r_edge, spacing)
    hd95 = max(float(d.quantile(0.95)) for d in distances)
    return hd95, float(torch.cat(distances).mean())


def robust_hausdorff(prediction: BoolMask, reference: BoolMask, spacing: tuple[float, ...], percent: float) -> float:
    """The larger of both directions' percentiles of surface distances in mm, surfaces weighted by their area.

    DeepMind's surface-distance computes HD95 so, and through it BraTS; `hd95_mm` counts voxels at the surface instead.
    Infinite where a mask is empty.
    """
    if not (prediction.any() and reference.any()):
        return math.inf
    p, r = (torch.from_numpy(np.pad(mask, 1)) for mask in crop_to_union(prediction, reference)[:2])
    p_edge, r_edge, p_area, r_area = get_mask_edges(p, r, crop=False, spacing=spacing)
    distances = _both_ways(p_edge, r_edge, spacing)
    areas = (p_area[p_edge], r_area[r_edge])
    return max(_weighted_percentile(d, a, percent) for d, a in zip(distances, areas, strict=True))


def _weighted_percentile(values: torch.Tensor, weights: torch.Tensor, percent: float) -> float:
    order = torch.argsort(values)
    reached = weights[order].double().cumsum(0) / weights.double().sum()
    place = int(torch.searchsorted(reached, percent / 100))
    return float(values[order][min(place, len(values) - 1)])


def _surface_dice(
    p: torch.Tensor, r: torch.Tensor, spacing: tuple[float, ...], tolerances: Sequence[float]
) -> tuple[float, ...]:
    p_edge, r_edge, p_area, r_area = get_mask_edges(p, r, crop=False, spacing=spacing)
    distance = torch.cat(_both_ways(p_edge, r_edge, spacing))
    area = torch.cat([p_area[p_edge], r_area[r_edge]])
    return tuple(float(area[distance <= t].sum() / area.sum()) for t in tolerances)


def _both_ways(first: torch.Tensor, second: torch.Tensor, spacing: tuple[float, ...]) -> list[torch.Tensor]:
    """Distance in mm of every surface voxel of one to the other's surface, in both directions."""
    return [torch.as_tensor(get_surface_distance(a, b, spacing=spacing)) for a, b in ((first, second), (second, first))]
