"""Affine and elastic deformation at once: MONAI's `RandAffined` and `RandCoarseElasticd` are the oracles."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Hashable
from typing import Any

import numpy as np
import pytest
import torch
from monai.data.meta_tensor import MetaTensor
from monai.transforms.compose import Compose
from monai.transforms.spatial.dictionary import RandAffined
from numpy.typing import NDArray

from monai_iou.transforms import RandAffineElasticd, RandCoarseElasticd
from monai_iou.transforms.elastic import displacement_spread, draw_displacements

KEYS = ["image", "label"]
MODES = ["bilinear", "nearest"]
PAIR = "Expected `{}` to be two positive numbers, the smaller first, but got {}: pass for example (3, 5)."
# Ranges of one value each: every draw is this map.
FIXED: dict[str, Any] = {
    "rotate_range": [(0.3, 0.3), (-0.2, -0.2), (0.4, 0.4)],
    "shear_range": [(value, value) for value in (0.1, -0.05, 0.08, 0.02, -0.1, 0.06)],
    "translate_range": [(1.5, 1.5), (-2.25, -2.25), (0.75, 0.75)],
    "scale_range": [(0.2, 0.2), (-0.15, -0.15), (0.1, 0.1)],
}
STILL: dict[str, Any] = {name: [(0.0, 0.0)] * len(values) for name, values in FIXED.items()}
DRAWN: dict[str, Any] = {"rotate_range": [0.3] * 3, "shear_range": [0.1] * 6, "scale_range": [0.2] * 3}


def coordinates(*size: int) -> torch.Tensor:
    """Volumes that hold the place of each voxel from the centre, so that a changed one tells where it was read."""
    axes = [torch.arange(float(length)) - (length - 1) / 2 for length in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def image_of(transform: Any, image: Any, seed: int | None = 0) -> Any:
    if seed is not None:
        transform.set_random_state(seed)
    return transform({"image": image})["image"]


@pytest.mark.parametrize("padding", ["border", "zeros", "reflection"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(24, 20, 16), (17, 13, 9), (9, 24, 3), (2, 5, 8)])
def test_the_affine_map_is_that_of_rand_affined(size: tuple[int, ...], mode: str, padding: str) -> None:
    image = torch.as_tensor(np.random.default_rng(0).random((2, *size), dtype=np.float32))
    given: dict[str, Any] = {"mode": mode, "padding_mode": padding, **FIXED}
    found = image_of(RandAffineElasticd("image", affine_prob=1.0, elastic_prob=0.0, **given), image)
    expected = torch.as_tensor(image_of(RandAffined("image", prob=1.0, **given), image))
    assert not torch.equal(found, image)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_a_slice_turns_in_its_plane(mode: str, axis: int) -> None:
    size = [24, 20, 17]
    size[axis] = 1
    turns = [(0.0, 0.0)] * 3
    turns[axis] = (0.4, 0.4)
    image = torch.as_tensor(np.random.default_rng(0).random((1, *size), dtype=np.float32))
    given: dict[str, Any] = {"rotate_range": turns, "scale_range": [(0.1, 0.1)] * 3, "mode": mode}
    found = image_of(RandAffineElasticd("image", affine_prob=1.0, elastic_prob=0.0, **given), image)
    expected = image_of(RandAffined("image", prob=1.0, padding_mode="border", **given), image)
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=0, atol=1e-4)
    both = RandAffineElasticd("image", affine_prob=1.0, elastic_prob=1.0, padding_mode="zeros", **given)
    inner = [slice(length // 3, 2 * length // 3) if length > 1 else slice(None) for length in size]
    ones = image_of(both, torch.ones_like(image))[0][tuple(inner)]
    torch.testing.assert_close(ones, torch.ones_like(ones), msg="the field moves voxels out of the slice")


@pytest.mark.parametrize("size", [(24, 20, 16), (17, 13, 9), (24, 20, 1)])
def test_the_field_is_that_of_rand_coarse_elasticd(size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.as_tensor(np.random.default_rng(0).random((2, *size), dtype=np.float32))
    ranges = ((3, 5), (100, 200))
    both = RandAffineElasticd(
        "image", affine_prob=0.0, sigma_range=(3, 5), magnitude_range=(100, 200), elastic_prob=1.0
    )
    monkeypatch.setattr(both, "_noise", lambda shape: both.R.standard_normal(shape))
    alone = RandCoarseElasticd("image", *ranges, prob=1.0)
    state = np.random.RandomState(0)
    state.rand()  # the chance of the affine map
    alone.set_random_state(state=state)
    torch.testing.assert_close(image_of(both, image), image_of(alone, image, None), rtol=0, atol=1e-4)


def test_the_affine_map_moves_what_the_field_has_displaced() -> None:
    volume = coordinates(40, 36, 32)
    elastic: dict[str, Any] = {"sigma_range": (3, 4), "magnitude_range": (100, 150), "elastic_prob": 1.0}
    displaced = image_of(RandAffineElasticd("image", affine_prob=1.0, **STILL, **elastic), volume, seed=4)
    both = image_of(RandAffineElasticd("image", affine_prob=1.0, **FIXED, **elastic), volume, seed=4)
    affine = image_of(RandAffined("image", prob=1.0, padding_mode="border", **FIXED), volume)
    inner = (slice(None), slice(12, 28), slice(11, 25), slice(10, 22))  # no border is felt
    # An affine function of the place is known from its values anywhere.
    places = torch.cat([volume, torch.ones(1, 40, 36, 32)])[inner].flatten(1).double()
    matrix = torch.as_tensor(affine)[inner].flatten(1).double() @ torch.linalg.pinv(places)
    moved = displaced[inner].flatten(1).double()
    expected = matrix[:, :3] @ moved + matrix[:, 3:]
    torch.testing.assert_close(both[inner].flatten(1).double(), expected, rtol=0, atol=1e-3)
    assert (displaced - volume)[inner].abs().max() > 1
    assert (matrix[:, :3] - torch.eye(3)).abs().max() > 0.2


def displacements(transforms: list[Any], draws: int) -> NDArray[np.float32]:
    """Return displacements (draws, 3, 6, 6, 6) of the middle, where no border is felt."""
    volume, inner, found = coordinates(24, 24, 24), slice(9, 15), []
    for _ in range(draws):
        item: dict[Hashable, Any] = {"image": volume}
        for transform in transforms:
            item = transform(item)
        found.append((torch.as_tensor(item["image"]) - volume)[:, inner, inner, inner].numpy())
    return np.stack(found)


def test_displacements_are_spread_as_by_both_transforms_in_turn() -> None:
    elastic: dict[str, Any] = {"sigma_range": (3, 3), "magnitude_range": (50, 50)}
    first = RandAffined("image", prob=1.0, padding_mode="border", **DRAWN).set_random_state(1)
    second = RandCoarseElasticd("image", prob=1.0, **elastic).set_random_state(2)
    both = RandAffineElasticd("image", affine_prob=1.0, elastic_prob=1.0, **DRAWN, **elastic).set_random_state(3)
    expected, found = displacements([first, second], 200), displacements([both], 200)
    spread = expected.std()
    assert spread > 1.05 * displacement_spread(3, 50), "both take part"
    assert found.std() == pytest.approx(spread, rel=0.1)
    for axis in range(3):
        assert abs(found[:, axis].mean() - expected[:, axis].mean()) < 4 * spread * np.sqrt(2 / 200)
        assert found[:, axis].std() == pytest.approx(expected[:, axis].std(), rel=0.15)
    corner = found[:, :, 0, 0, 0].std(), expected[:, :, 0, 0, 0].std()
    assert corner[0] == pytest.approx(corner[1], rel=0.2)


def test_the_field_alone_is_spread_as_announced() -> None:
    transform = RandAffineElasticd("image", sigma_range=(4, 4), magnitude_range=(50, 50), affine_prob=0, elastic_prob=1)
    found = displacements([transform.set_random_state(0)], 100)
    assert found.std() == pytest.approx(displacement_spread(4, 50), rel=0.1)
    noise = transform._noise((100, 1000))
    assert (noise.mean(), noise.std()) == (pytest.approx(0, abs=0.02), pytest.approx(1, abs=0.01))


def test_displacements_are_nearly_normal_from_a_sigma_of_two_voxels_on() -> None:
    transform = RandAffineElasticd("image").set_random_state(0)
    excess = []
    for sigma in (1.0, 2.0, 3.0):
        ranges = ((sigma, sigma), (50.0, 50.0))
        field = draw_displacements(transform.R, (60, 60, 60), ranges, transform._noise, torch.device("cpu"))
        excess.append(float(((field / field.std()) ** 4).mean()) - 3)
    assert excess[0] < -0.8
    assert max(map(abs, excess[1:])) < 0.3


def test_image_and_label_move_together_and_keep_their_kind() -> None:
    image = MetaTensor(torch.zeros(1, 24, 20, 16), affine=torch.diag(torch.tensor([2.0, 2.0, 3.0, 1.0])))
    image[:, 8:16, 6:14, 4:12] = 1
    label = image.clone().as_tensor().to(torch.uint8)
    deform = RandAffineElasticd(KEYS, **DRAWN, affine_prob=1.0, elastic_prob=1.0, mode=MODES)
    given: dict[Hashable, Any] = {"image": image, "label": label, "name": "a"}
    item = deform.set_random_state(1)(given)
    assert item["name"] == "a"
    assert isinstance(item["image"], MetaTensor)
    assert type(item["label"]) is torch.Tensor
    torch.testing.assert_close(item["image"].affine, image.affine)
    assert item["label"].dtype == torch.uint8
    assert set(item["label"].unique().tolist()) == {0, 1}
    assert (item["label"] != label).float().mean() > 0.01
    assert ((item["image"] > 0.5) != (item["label"] > 0)).float().mean() < 0.01
    assert given["image"] is image
    assert given["label"] is label


def test_the_two_changes_are_drawn_independently() -> None:
    # A shift by a whole voxel leaves whole numbers, a field does not.
    transform = RandAffineElasticd(
        "image",
        translate_range=[(1, 1)],
        affine_prob=0.6,
        sigma_range=(3, 3),
        magnitude_range=(20, 20),
        elastic_prob=0.3,
    ).set_random_state(0)
    volume, draws, counts = coordinates(5, 5, 5), 800, {}
    for _ in range(draws):
        found = image_of(transform, volume, None)
        field = bool((found[1] - volume[1]).abs().max() > 1e-4)
        shift = bool((found[0] - volume[0])[1:3].mean() > 0.5)
        counts[shift, field] = counts.get((shift, field), 0) + 1
    for shift, chance in ((True, 0.6), (False, 0.4)):
        for field, other in ((True, 0.3), (False, 0.7)):
            p = chance * other
            assert counts[shift, field] == pytest.approx(draws * p, abs=4 * np.sqrt(draws * p * (1 - p)))


def test_a_seed_for_each_item_does_not_tie_the_map_to_the_chance() -> None:
    # The bundle's loader seeds before each item.
    volume, shifts = coordinates(9, 3, 3), []
    transform = RandAffineElasticd("image", translate_range=2.0, affine_prob=0.5, elastic_prob=0.0)
    for seed in range(400):
        found = image_of(transform, volume, seed)
        if found is not volume:
            shifts.append(float(found[0, 4, 1, 1]))
    assert len(shifts) == pytest.approx(200, abs=40)
    assert np.mean(shifts) == pytest.approx(0, abs=4 * 2 / np.sqrt(3 * len(shifts)))
    assert min(shifts) < -1.8
    assert max(shifts) > 1.8


def test_a_seed_decides_everything() -> None:
    image = torch.rand(1, 12, 10, 8)
    transform = RandAffineElasticd("image", **DRAWN, affine_prob=0.6, elastic_prob=0.5)
    pipeline = Compose([transform])
    runs = []
    for seed in (5, 5, 6):
        pipeline.set_random_state(seed)
        runs.append(torch.stack([pipeline({"image": image})["image"] for _ in range(6)]))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    transform.set_random_state(7)
    copied = pickle.loads(pickle.dumps(transform))  # a loader's processes get copies
    for _ in range(6):
        assert torch.equal(image_of(transform, image, None), image_of(copied, image, None))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda transform: pickle.loads(pickle.dumps(transform))])
def test_copies_that_nobody_has_seeded_draw_maps_of_their_own(copied: Any) -> None:
    image = torch.rand(1, 8, 8, 8)
    transform = RandAffineElasticd("image", **DRAWN, affine_prob=1.0, elastic_prob=0.0)
    first, second = (image_of(copied(transform), image, None) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.fixture(params=[torch.float64, torch.bfloat16])
def default_dtype(request: pytest.FixtureRequest) -> Any:
    before = torch.get_default_dtype()
    yield request.param
    torch.set_default_dtype(before)


def test_places_do_not_depend_on_torchs_default_type(default_dtype: torch.dtype) -> None:
    image = torch.rand(1, 64, 12, 10)
    both = RandAffineElasticd("image", **FIXED, affine_prob=1.0, elastic_prob=1.0)
    # MONAI draws no affine map in bfloat16.
    forms = [both] if default_dtype == torch.float64 else []
    forms += [RandAffineElasticd("image", affine_prob=0.0, elastic_prob=1.0)]
    expected = [image_of(form, image) for form in forms]
    torch.set_default_dtype(default_dtype)
    for form, values in zip(forms, expected, strict=True):
        torch.testing.assert_close(image_of(form, image), values, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_places_are_not_rounded_by_autocast(dtype: torch.dtype) -> None:
    volume = coordinates(64, 12, 10).to(dtype)
    both = RandAffineElasticd("image", **FIXED, affine_prob=1.0, elastic_prob=1.0)
    for form in (both, RandCoarseElasticd("image", (3, 5), (20, 80), prob=1.0)):
        expected = image_of(form, volume)
        with torch.autocast("cpu", torch.bfloat16):
            found = image_of(form, volume)
        assert torch.equal(found, expected)


def test_none_in_the_place_of_an_axis_leaves_this_axis_alone() -> None:
    given: dict[str, Any] = {
        "rotate_range": [None, (0.3, 0.3)],
        "shear_range": [None, None, None, (0.1, 0.1)],
        "translate_range": (None, None, (1.5, 1.5)),
        "scale_range": [None, (0.2, 0.2), None],
    }
    zeros = {name: [(0.0, 0.0) if each is None else each for each in ranges] for name, ranges in given.items()}
    volume = coordinates(9, 8, 7)
    found, expected = (
        image_of(RandAffineElasticd("image", affine_prob=1.0, elastic_prob=0.0, **ranges), volume)
        for ranges in (given, zeros)
    )
    assert torch.equal(found, expected)
    assert not torch.equal(found, volume)


@pytest.mark.parametrize(
    "given",
    [
        np.array([[-0.5, 0.5]] * 3),
        (np.array([-0.5, 0.5]),) * 3,
        torch.tensor([0.5] * 3),
        (torch.tensor(0.5),) * 3,
        (np.float32(0.5),) * 3,
    ],
)
def test_ranges_may_be_arrays(given: Any) -> None:
    volume = coordinates(9, 8, 7)
    found, expected = (
        image_of(RandAffineElasticd("image", affine_prob=1.0, elastic_prob=0.0, rotate_range=ranges), volume)
        for ranges in (given, [0.5] * 3)
    )
    assert torch.equal(found, expected)


def test_nothing_is_done_to_an_item_that_draws_nothing() -> None:
    item: dict[Hashable, Any] = {"image": np.zeros((1, 6)), "label": "not even a volume"}
    found = RandAffineElasticd(KEYS, **DRAWN, affine_prob=0.0, elastic_prob=0.0, mode=MODES)(item)
    assert found == item
    assert found is not item
    assert found["image"] is item["image"]


@pytest.mark.parametrize(
    "dtype", [np.uint8, np.int16, np.float64, torch.int64, torch.float16, torch.bfloat16, torch.bool]
)
def test_types_are_kept_and_whole_numbers_rounded(dtype: Any) -> None:
    upper = 2 if dtype == torch.bool else 250
    image = torch.as_tensor(np.random.default_rng(0).integers(0, upper, (1, 20, 18, 16)))
    given: Any = image.to(dtype) if isinstance(dtype, torch.dtype) else image.numpy().astype(dtype)
    transform = RandAffineElasticd("image", **DRAWN, affine_prob=1.0, elastic_prob=1.0)
    exact = image_of(transform, image.float()).double()
    found = image_of(transform, given)
    assert found.dtype == given.dtype
    assert type(found) is type(given)
    allowed = {np.float64: 1e-2, torch.float16: 0.1, torch.bfloat16: 1.0}.get(dtype, 0.5 + 1e-2)
    assert (torch.as_tensor(found).double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("sign", [1, -1])
def test_labels_of_an_atlas_keep_their_numbers(sign: int) -> None:
    values = torch.tensor([0, 312782546, 312782547, 312782550]) * sign
    label = values[torch.arange(24) // 6].expand(1, 20, 16, 24)
    deform = RandAffineElasticd("image", **DRAWN, affine_prob=1.0, elastic_prob=1.0, mode="nearest")
    unsigned = [label.to(torch.uint32), label.to(torch.uint64)] if sign == 1 else []
    for given in (label, label.to(torch.int32), label.numpy(), label.double(), *unsigned):
        moved = image_of(deform, given)
        assert set(np.unique(moved).tolist()) == set(values.tolist())
        assert not np.array_equal(moved, given)


def test_a_device_is_where_results_are() -> None:
    deform = RandAffineElasticd(KEYS, **DRAWN, affine_prob=1.0, device="meta")
    item = deform({"image": torch.rand(1, 6, 6, 6), "label": torch.ones(1, 6, 6, 6)})
    assert {item[key].device.type for key in KEYS} == {"meta"}


def test_absent_entries_are_passed_over_only_if_allowed() -> None:
    given: dict[str, Any] = {**DRAWN, "affine_prob": 1.0, "mode": MODES}
    image = torch.rand(1, 8, 8, 8)
    item = RandAffineElasticd(KEYS, allow_missing_keys=True, **given)({"image": image})
    assert list(item) == ["image"]
    assert not torch.equal(item["image"], image)
    assert RandAffineElasticd(KEYS, allow_missing_keys=True, **given)({"name": 1}) == {"name": 1}
    with pytest.raises(KeyError, match="label"):
        RandAffineElasticd(KEYS, **given)({"image": image})


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (
            torch.ones(1, 8, 8, 8),
            "Expected images of one shape in an item, but got (16, 16, 16) of `image`, (8, 8, 8) of `label`: resample "
            "or pad them to the same shape first.",
        ),
        (
            torch.ones(1, 16, 16),
            "Expected `label` to have the shape (C, X, Y, Z), but got (1, 16, 16): add the channel "
            "dimension, or an axis of one voxel to 2D data.",
        ),
    ],
)
def test_entries_of_other_shapes_are_refused(label: torch.Tensor, message: str) -> None:
    deform = RandAffineElasticd(KEYS, affine_prob=1.0, mode=MODES)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        deform({"image": torch.rand(1, 16, 16, 16), "label": label})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"affine_prob": 1.5},
            ValueError,
            "Expected `affine_prob` to be from 0 to 1, but got 1.5: choose a value in this range.",
        ),
        (
            {"elastic_prob": float("nan")},
            ValueError,
            "Expected `elastic_prob` to be from 0 to 1, but got nan: choose a value in this range.",
        ),
        (
            {"elastic_prob": None},
            TypeError,
            "Expected `elastic_prob` to be a number, but got NoneType: pass an int or a float.",
        ),
        (
            {"sigma_range": (5, 3)},
            ValueError,
            PAIR.format("sigma_range", "(5, 3)"),
        ),
        (
            {"magnitude_range": (0, 3)},
            ValueError,
            PAIR.format("magnitude_range", "(0, 3)"),
        ),
        (
            {"rotate_range": [(0.1, 0.2, 0.3)]},
            ValueError,
            "If giving range as [min,max], should have 2 elements per dim, got (0.1, 0.2, 0.3).",
        ),
        (
            {"translate_range": [1.0] * 4},
            ValueError,
            "Expected `translate_range` to have at most 3 ranges, but got 4: give one for each axis.",
        ),
        (
            {"scale_range": [(0.1, "a")]},
            TypeError,
            "Expected `scale_range` to hold numbers or pairs of numbers, but got 'a': pass for example "
            "(0.5, 0.5, 0.5).",
        ),
        (
            {"shear_range": [0.1] * 7},
            ValueError,
            "Expected `shear_range` to have at most 6 ranges, but got 7: give one for each shear.",
        ),
        (
            {"sigma_range": 5},
            ValueError,
            PAIR.format("sigma_range", "5"),
        ),
        (
            {"sigma_range": "35"},
            ValueError,
            PAIR.format("sigma_range", "('3', '5')"),
        ),
        (
            {"magnitude_range": (20, float("inf"))},
            ValueError,
            PAIR.format("magnitude_range", "(20, inf)"),
        ),
        (
            {"mode": "bicubic"},
            ValueError,
            "Expected `mode` to be one of 'bilinear', 'nearest', but got 'bicubic': choose one of these.",
        ),
        (
            {"padding_mode": "constant"},
            ValueError,
            "Expected `padding_mode` to be one of 'border', 'zeros', 'reflection', but got 'constant': choose one of "
            "these.",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        RandAffineElasticd("image", **arguments)
