"""Elastic deformation by a coarse field: MONAI's transform is the oracle for the displacements."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from monai.data.meta_tensor import MetaTensor
from monai.transforms.spatial.dictionary import Rand3DElasticd
from numpy.typing import NDArray

from monai_iou.transforms import RandCoarseElasticd
from monai_iou.transforms.elastic import displacement_spread

Transform = TypeVar("Transform", RandCoarseElasticd, Rand3DElasticd)
KEYS = ["image", "label"]
SIDE = 32


def coordinates() -> torch.Tensor:
    """Volumes that hold the place of each voxel, so that a deformed one tells where it was read."""
    return torch.stack(torch.meshgrid(*[torch.arange(float(SIDE))] * 3, indexing="ij"))


def seeded(transform: Transform, seed: int) -> Transform:
    transform.set_random_state(seed)
    return transform


def displacements(transform: RandCoarseElasticd | Rand3DElasticd, draws: int) -> NDArray[np.float32]:
    """Return displacements of the middle, where no border is felt."""
    inner = slice(10, SIDE - 10)
    found = []
    for _ in range(draws):
        given: dict[Hashable, Any] = {"image": coordinates()}
        moved = transform(given)["image"]
        found.append((torch.as_tensor(moved) - coordinates())[:, inner, inner, inner].numpy())
    return np.stack(found)


def test_displacements_are_spread_as_monais() -> None:
    ours = displacements(seeded(RandCoarseElasticd("image", (4, 4), (50, 50), prob=1.0), 0), 8)
    monai = Rand3DElasticd("image", (4, 4), (50, 50), prob=1.0, padding_mode="border")
    theirs = displacements(seeded(monai, 0), 8)
    expected = displacement_spread(4, 50)
    for found in (ours, theirs):
        assert abs(found.mean()) < 0.05 * expected + 3 * expected / np.sqrt(8 * 3)
        assert found.std() == pytest.approx(expected, rel=0.2)
    assert ours.std() == pytest.approx(theirs.std(), rel=0.2)
    # As smooth: the mean square of a difference between neighbours.
    steps = [np.square(np.diff(found, axis=2)).mean() / found.var() for found in (ours, theirs)]
    assert steps[0] == pytest.approx(steps[1], rel=0.25)


def test_image_and_label_move_together_and_keep_their_kind() -> None:
    image = MetaTensor(torch.zeros(1, 24, 20, 16), affine=torch.diag(torch.tensor([2.0, 2.0, 3.0, 1.0])))
    image[:, 8:16, 6:14, 4:12] = 1
    label = MetaTensor(image.clone().as_tensor().to(torch.uint8), affine=image.affine)
    deform = RandCoarseElasticd(KEYS, (3, 5), (60, 80), prob=1.0, mode=["bilinear", "nearest"])
    given: dict[Hashable, Any] = {"image": image, "label": label, "name": "a"}
    item = seeded(deform, 1)(given)
    assert item["name"] == "a"
    assert isinstance(item["image"], MetaTensor)
    torch.testing.assert_close(item["image"].affine, image.affine)
    assert item["label"].dtype == torch.uint8
    assert set(item["label"].unique().tolist()) == {0, 1}
    assert not torch.equal(item["label"], label)
    assert ((item["image"] > 0.5) != (item["label"] > 0)).float().mean() < 0.005
    again = seeded(deform, 1)(given)
    torch.testing.assert_close(again["image"], item["image"])


def test_without_luck_nothing_changes_and_wrong_arguments_are_named() -> None:
    item: dict[Hashable, Any] = {"image": torch.rand(1, 6, 6, 6)}
    assert RandCoarseElasticd("image", (3, 5), (20, 80), prob=0.0)(item)["image"] is item["image"]
    with pytest.raises(ValueError, match=r"^Expected `sigma_range` to be two positive numbers, .* got \(5, 3\)"):
        RandCoarseElasticd("image", (5, 3), (20, 80))
    with pytest.raises(ValueError, match=r"^Expected `image` to have the shape \(C, X, Y, Z\), but got \(1, 6, 6\)"):
        RandCoarseElasticd("image", (3, 5), (20, 80), prob=1.0)({"image": torch.rand(1, 6, 6)})


def test_an_axis_of_one_voxel_stays() -> None:
    image = torch.rand(1, 24, 20, 1)
    transform = RandCoarseElasticd(["image"], sigma_range=(3, 5), magnitude_range=(100, 200), prob=1.0)
    moved = transform.set_random_state(0)({"image": image})["image"]
    assert moved.shape == image.shape
    assert not torch.equal(torch.as_tensor(moved), image)
    assert moved.min() >= 0
    assert moved.max() <= 1


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, torch.uint8, torch.int16, torch.int64])
def test_whole_numbers_are_rounded(dtype: Any) -> None:
    image = torch.as_tensor(np.random.default_rng(0).integers(0, 250, (1, 32, 32, 32)))
    exact = seeded(RandCoarseElasticd("image", (3, 5), (20, 80), prob=1.0), 0)({"image": image.float()})["image"]
    given: Any = image.to(dtype) if isinstance(dtype, torch.dtype) else image.numpy().astype(dtype)
    found = seeded(RandCoarseElasticd("image", (3, 5), (20, 80), prob=1.0), 0)({"image": given})["image"]
    assert found.dtype == given.dtype
    assert type(found) is type(given)
    error = np.asarray(found, dtype=np.float64) - exact.double().numpy()
    assert np.abs(error).max() <= 0.5 + 1e-4
    assert abs(error.mean()) < 0.01


@pytest.mark.parametrize("sign", [1, -1])
def test_labels_of_an_atlas_keep_their_numbers(sign: int) -> None:
    values = torch.tensor([0, 312782546, 312782547, 312782550]) * sign
    label = values[torch.arange(24) // 6].expand(1, 20, 16, 24)
    deform = seeded(RandCoarseElasticd("label", (3, 5), (100, 200), prob=1.0, mode="nearest"), 0)
    for given in (label, label.to(torch.int32), label.numpy(), label.double()):
        moved = deform({"label": given})["label"]
        assert set(np.unique(moved).tolist()) == set(values.tolist())
        assert not np.array_equal(moved, given)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            (1, 8, 8, 8),
            "Expected images of one shape in an item, but got (16, 16, 16) of `image`, (8, 8, 8) of `label`: ",
        ),
        ((1, 16, 16), "Expected `label` to have the shape (C, X, Y, Z), but got (1, 16, 16): "),
    ],
)
def test_entries_of_other_shapes_are_refused(shape: tuple[int, ...], message: str) -> None:
    deform = RandCoarseElasticd(KEYS, (3, 5), (20, 80), prob=1.0, mode=["bilinear", "nearest"])
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        deform({"image": torch.rand(1, 16, 16, 16), "label": torch.ones(shape)})
