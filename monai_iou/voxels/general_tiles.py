"""The reference's formulas on a part of a volume: whatever a specification asks for, and whatever the numbers are."""

from __future__ import annotations

from torch import Tensor

from monai_iou.voxels.formulas import count_valid, reduce_map, sums_entropy, tile_gradient, tile_maps
from monai_iou.voxels.inputs import Voxels, sum_dtype
from monai_iou.voxels.spec import COUNT, CROSS_ENTROPY, PassSpec


def add_tile(total: Tensor, voxels: Voxels, spec: PassSpec, image: int, part: slice) -> None:
    """Add the statistics of some voxels of an image to `total` (7, B, C, R)."""
    dtype = sum_dtype(voxels.logits)
    tile, target, valid = voxels.tile(image, part, dtype)
    groups = None if voxels.groups is None else voxels.groups[image, :, part]
    if groups is not None:
        dtype = total.dtype  # added one after the other, thousands of small numbers lose their digits in float32
    for row, values in tile_maps(tile, target, valid, groups, spec):
        total[row, image] += reduce_map(values, groups, voxels.regions, dtype)
    total[COUNT, image] += count_valid(tile, valid, groups, voxels.regions, dtype)


def write_gradient(out: Tensor, gradient: Tensor, voxels: Voxels, spec: PassSpec, image: int, part: slice) -> None:
    """Write d loss / d logits of some voxels of an image into `out` (B, C, N); `gradient` is (7, B, C, R)."""
    tile, target, valid = voxels.tile(image, part, gradient.dtype)
    slope = gradient[:, image]
    if voxels.groups is not None:
        groups = voxels.groups[image, :, part].long()
        slope = slope.gather(2, groups.expand(*slope.shape[:2], -1))
        if sums_entropy(groups, spec):
            slope[CROSS_ENTROPY] = slope[CROSS_ENTROPY].sum(0, keepdim=True)
    out[image, :, part] = tile_gradient(tile, target, valid, slope, spec)
