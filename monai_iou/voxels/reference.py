"""The reference kernel: the formulas over whole volumes, differentiated by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from monai_iou.voxels.formulas import count_valid, reduce_map, tile_maps
from monai_iou.voxels.inputs import Voxels, sum_dtype, total_dtype
from monai_iou.voxels.spec import COUNT, ROWS, PassSpec


def compute_sums(voxels: Voxels, spec: PassSpec) -> Tensor:
    """Return the statistics (7, B, C, R) by autograd: the specification of every other kernel."""
    voxels = voxels.compact()
    precise = total_dtype(voxels.logits)
    logits, target, valid = voxels.tile(slice(None), slice(None), sum_dtype(voxels.logits))
    rows: list[Tensor | None] = [None] * ROWS
    for row, values in tile_maps(logits, target, valid, voxels.groups, spec):
        rows[row] = reduce_map(values, voxels.groups, voxels.regions, precise)
    count = count_valid(logits, valid, voxels.groups, voxels.regions, precise)
    rows[COUNT], filler = count, torch.zeros_like(count)
    return torch.stack([filler if row is None else row for row in rows])
