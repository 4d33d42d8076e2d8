"""A kernel of the voxel pass on some voxels: its sums, and a gradient whose incoming one is not 1."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from monai_iou.voxels.inputs import Voxels
from monai_iou.voxels.self_check import Kernel
from monai_iou.voxels.spec import PassSpec


def run(kernel: Kernel, voxels: Voxels, spec: PassSpec, repeat: int = 1) -> tuple[Tensor, Tensor]:
    """Return the sums and the gradient of a random projection of them, that of the last of `repeat` backward passes."""
    leaf = voxels.logits.detach().requires_grad_()
    rows = kernel(replace(voxels, logits=leaf), spec)
    pull = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(rows)
    for turn in range(repeat):
        (gradient,) = torch.autograd.grad(rows, leaf, pull, retain_graph=turn + 1 < repeat)
    return rows.detach(), gradient
