"""Voxel sizes as arguments: one for all images or one per image, in every kind of sequence."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from monai_iou import InstanceIoULoss
from monai_iou.metrics import BoundaryIoUMetric
from monai_iou.spacing import image_spacings, spacing_tuple

SIZES = [[1.0, 1.0, 1.0], [2.0, 1.0, 0.5]]
KINDS: list[Callable[[Any], Any]] = [
    list,
    tuple,
    np.array,
    torch.tensor,
    lambda sizes: [np.array(size) for size in sizes],
    lambda sizes: [torch.tensor(size) for size in sizes],
    lambda sizes: np.array(sizes, dtype=np.float32),
]


@pytest.mark.parametrize("kind", KINDS)
def test_one_size_per_image(kind: Callable[[Any], Any]) -> None:
    assert image_spacings(None, None, kind(SIZES), 2, 3) == [tuple(size) for size in SIZES]
    message = "Expected `spacing` to be one voxel size for each of 3 images, but got 2: "
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        image_spacings(None, None, kind(SIZES), 3, 3)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, lambda size: [np.float32(s) for s in size]])
def test_one_size_for_all_images(kind: Callable[[Any], Any]) -> None:
    assert image_spacings(None, None, kind([2.0, 1.0, 0.5]), 2, 3) == [(2.0, 1.0, 0.5)] * 2


@pytest.mark.parametrize(
    "wrong",
    [
        np.ones((2, 3)),
        torch.ones(2, 3),
        [[1, 1, 1], [1, 1, 1]],
        "1 mm",
        ["a", "b", "c"],
        [1, [2], 3],
        [1, 2],
        [1, 0, 1],
    ],
)
def test_what_is_no_voxel_size_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"(?s)^Expected `spacing` to be 3 positive numbers in mm, but got .*: give"):
        spacing_tuple(wrong, 3)
    if np.ndim(wrong if isinstance(wrong, (np.ndarray, torch.Tensor)) else wrong[0]) == 0:
        with pytest.raises(ValueError, match=r"^Expected `spacing` to be 3 positive numbers in mm"):
            image_spacings(None, None, wrong, 2, 3)


def test_metrics_and_losses_take_arrays() -> None:
    masks = (torch.rand(2, 1, 6, 6, 6, generator=torch.manual_seed(0)) > 0.5).float()
    other = (torch.rand(2, 1, 6, 6, 6, generator=torch.manual_seed(1)) > 0.5).float()
    metric = BoundaryIoUMetric(width=1.0, distance="euclidean")
    found = [metric(masks, other, spacing=size) for size in (SIZES, np.array(SIZES))]
    torch.testing.assert_close(found[0], found[1])
    losses = [InstanceIoULoss(sigmoid=True, spacing=size)(masks, other) for size in (SIZES, np.array(SIZES))]
    torch.testing.assert_close(losses[0], losses[1])
