"""The tiled kernel's derivative, in float64, for every combination of what a pass can compute."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from monai_iou import use_kernel, voxel_sums
from monai_iou.voxels import in_place, tiling

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(2, 3, 2, 5, dtype=torch.float64, generator=GENERATOR)
LABELS = torch.randint(0, 3, (2, 1, 2, 5), generator=GENERATOR)
SOFT = torch.rand(2, 3, 2, 5, dtype=torch.float64, generator=GENERATOR)
REGIONS = torch.randint(-1, 3, (2, 1, 2, 5), generator=GENERATOR)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", None])
@pytest.mark.parametrize(("overlap", "power"), [("product", 1), ("product", 2), ("product", 1.5), ("min_max", 1)])
@pytest.mark.parametrize(
    ("gamma", "label_smoothing"),
    [(0.5, 0.1), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(0, 0), (2, 0), (0, 0.1)])],
)
def test_gradient_of_every_branch(
    activation: str | None,
    overlap: str,
    power: float,
    gamma: float,
    label_smoothing: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(tiling.TILE_ELEMENTS, "cpu", 9)  # three voxels a tile, so that tiles end inside an image
    monkeypatch.setattr(in_place, "FACTOR", {1: 1, 2: 1})
    monkeypatch.setattr(in_place, "MANY", 1)
    logits = LOGITS if activation else LOGITS.sigmoid()
    logits = logits.clone().requires_grad_()
    for target, groups, ignore_index in itertools.product((LABELS, SOFT), (None, REGIONS), (None, 1, 255)):

        def sums(
            x: Tensor, target: Tensor = target, groups: Tensor | None = groups, ignore: int | None = ignore_index
        ) -> Tensor:
            return voxel_sums(
                x,
                target,
                activation=activation,
                overlap=overlap,
                power=power,
                gamma=gamma,
                label_smoothing=label_smoothing,
                ignore_index=ignore,
                groups=groups,
                confidence=True,
            ).rows

        with use_kernel("tiled"):
            assert gradcheck(sums, (logits,), fast_mode=True)
            found = sums(logits)
        with use_kernel("reference"):
            torch.testing.assert_close(found, sums(logits))
