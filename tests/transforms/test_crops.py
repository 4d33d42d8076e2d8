"""Crops that reach every lesion: each component is drawn as often as its size says, and lies where jitter allows."""

from __future__ import annotations

import math
import pickle
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import CacheDataset, MetaTensor
from monai.transforms import Compose, RandCropByPosNegLabel, SpatialPad
from numpy.typing import NDArray
from places import DATA
from scipy import ndimage, stats

from monai_iou.components import BACKGROUND, ComponentRuns, component_chances, component_runs
from monai_iou.transforms import ComponentRegionsd, LesionIndicesd, RandCropByLesions, RandCropByLesionsd
from monai_iou.transforms.crops import window
from monai_iou.transforms.lesions import find_lesions
from monai_iou.workflow.caching import cached_dataset


def drawn_components(label: NDArray[Any], draws: int, exponent: float) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Return how often each component (by scipy) was in the middle of a positive patch, and its chance by formula."""
    numbers, count = ndimage.label(label[0], np.ones((3,) * (label.ndim - 1)))
    sizes = np.bincount(numbers.ravel(), minlength=count + 1)[1:]
    crop = RandCropByLesions((1,) * (label.ndim - 1), draws, pos=1, neg=0, size_exponent=exponent, jitter=0)
    crop.set_random_state(0)
    crop.randomize(lesions=component_runs(label).as_item())
    at = numbers[tuple(np.array(crop.centers).T)]
    assert (at > 0).all()
    return np.bincount(at, minlength=count + 1)[1:], sizes**exponent / (sizes**exponent).sum()


def draws_that_reach_all(chances: NDArray[np.float64]) -> int:
    """Return N so that a component is missing in N draws with a chance below 1e-3: sum_k (1 - p_k)^N <= K e^(-N p)."""
    return math.ceil(math.log(len(chances) * 1e3) / chances.min())


def phantom() -> NDArray[np.uint8]:
    """Return one lesion of 60^3 voxels and 50 of one voxel."""
    label = np.zeros((1, 96, 96, 96), dtype=np.uint8)
    label[0, 2:62, 2:62, 2:62] = 1
    places = np.random.default_rng(0).permutation(np.stack(np.mgrid[0:12, 0:12, 0:3], -1).reshape(-1, 3))[:50]
    for x, y, z in places * [8, 8, 8] + [0, 0, 71]:
        label[0, x, y, z] = 1
    return label


@pytest.mark.parametrize("exponent", [0.0, 1 / 3, 0.5])
def test_each_of_51_components_is_drawn_as_often_as_its_size_says(exponent: float) -> None:
    label = phantom()
    sizes = np.array([60**3, *[1] * 50])
    draws = draws_that_reach_all(sizes**exponent / (sizes**exponent).sum())
    counts, chances = drawn_components(label, draws, exponent)
    assert len(counts) == 51
    assert counts.min() > 0
    small = counts[chances < chances.max()].sum() if exponent else counts[1:].sum()
    share = 50 / (50 + 60 ** (3 * exponent))
    assert stats.binomtest(int(small), draws, share).pvalue > 1e-3
    # By voxels, as a list of foreground voxels draws: less than one small lesion in 4000 patches.
    assert 50 / (50 + 60**3) < 1 / 4000 < share


def load_mask(path: Path) -> NDArray[np.uint8]:
    mask = (np.asanyarray(nib.load(path).dataobj) > 0).astype(np.uint8)
    box = ndimage.find_objects(mask)[0]  # nothing outside has a component
    return mask[box][None]


def check_mask(path: Path) -> tuple[int, float]:
    label = load_mask(path)
    sizes = component_runs(label).sizes[1:]
    chances = component_chances(sizes, np.ones(len(sizes)), 0.5)
    counts, by_formula = drawn_components(label, draws_that_reach_all(chances), 0.5)
    assert counts.min() > 0, f"{path.name}: {(counts == 0).sum()} of {len(counts)} are never drawn"
    np.testing.assert_allclose(np.sort(by_formula), np.sort(chances))
    small = by_formula <= np.median(by_formula)
    assert stats.binomtest(int(counts[small].sum()), int(counts.sum()), float(by_formula[small].sum())).pvalue > 1e-4
    return len(counts), float(by_formula.max())


@pytest.mark.real_data
def test_every_lesion_of_a_scan_is_drawn() -> None:
    path = DATA / "Task901_MSLesionFLAIR" / "labelsTr" / "openms_19.nii.gz"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    lesions, largest = check_mask(path)
    assert lesions == 98
    assert largest == pytest.approx(0.34, abs=0.01)  # 94 % by voxels


@pytest.mark.real_data
@pytest.mark.slow
def test_every_lesion_of_thirty_masks_is_drawn() -> None:
    paths = sorted((DATA / "Masks905_OpenMS" / "labels").glob("*.nii.gz"))
    if not paths:
        pytest.skip("the masks are not there")
    assert len(paths) == 30
    lesions = [check_mask(path)[0] for path in paths]
    assert (min(lesions), max(lesions)) == (17, 392)


# -- where the voxel lies in the patch


@pytest.mark.parametrize("jitter", [0.0, 0.3, 0.5, 1.0])
def test_the_voxel_lies_anywhere_in_the_window(jitter: float) -> None:
    label = torch.zeros(1, 101, 101)
    label[0, 50, 50] = 1
    size = (16, 21)
    crop = RandCropByLesions(size, num_samples=6000, pos=1, neg=0, jitter=jitter).set_random_state(1)
    crop.randomize(label)
    places = 50 - (np.array(crop.centers) - np.array(size) // 2)
    for axis, side in enumerate(size):
        first, width = window(side, jitter)
        counts = np.bincount(places[:, axis], minlength=side)
        assert counts[:first].sum() == counts[first + width :].sum() == 0
        assert width == max(1, math.floor(jitter * side + 0.5))
        assert width == 1 or stats.chisquare(counts[first : first + width]).pvalue > 1e-3
    joint = np.histogram2d(*places.T, bins=[np.unique(place).size for place in places.T])[0]
    assert joint.size == 1 or stats.chi2_contingency(joint + 1e-9).pvalue > 1e-3, "the axes are independent"


@given(st.integers(1, 300), st.floats(0, 1))
def test_the_window_is_in_the_patch_around_its_middle(size: int, jitter: float) -> None:
    first, width = window(size, jitter)
    assert 0 <= first <= size // 2 < first + width <= size
    assert (first, width) == (size // 2, 1) if jitter == 0 else width >= 1
    assert jitter < 1 or (first, width) == (0, size)


@given(
    st.sampled_from([(9,), (8, 11), (1, 7), (6, 9, 7), (5, 1, 8)]),
    st.integers(1, 12),
    st.floats(0, 1),
    st.integers(0, 10**6),
)
@settings(max_examples=100, deadline=None)
def test_every_patch_lies_in_the_volume_and_holds_its_voxel(
    shape: tuple[int, ...], side: int, jitter: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    voxel = tuple(int(rng.integers(0, length)) for length in shape)
    label = torch.zeros(1, *shape)
    label[(0, *voxel)] = 1
    crop = RandCropByLesions(side, num_samples=3, pos=1, neg=0, jitter=jitter, allow_smaller=True)
    for patch in crop.set_random_state(seed)(label, label):
        assert patch.shape == (1, *(min(side, length) for length in shape))
        assert patch.sum() == 1


def test_without_jitter_patches_are_monais() -> None:
    label = torch.zeros(1, 20, 17)
    label[0, 3, 16] = 1
    image = torch.rand(2, 20, 17)
    ours = RandCropByLesions((8, 7), pos=1, neg=0, jitter=0)(image, label)
    theirs = RandCropByPosNegLabel((8, 7), pos=1, neg=0)(image, label)
    assert torch.equal(ours[0], torch.as_tensor(theirs[0]))


def test_negative_patches_are_centred_on_any_background_voxel_alike() -> None:
    label = torch.zeros(1, 12, 12)
    label[0, 4:8, 4:7] = 1
    crop = RandCropByLesions((1, 1), num_samples=5000, pos=0, neg=1, jitter=1).set_random_state(0)
    crop.randomize(label)
    counts = np.bincount(np.ravel_multi_index(np.array(crop.centers).T, (12, 12)), minlength=144)
    background = label.flatten().numpy() == 0
    assert counts[~background].sum() == 0
    assert stats.chisquare(counts[background]).pvalue > 1e-3


@pytest.mark.parametrize(("pos", "neg"), [(1, 1), (2, 1), (1, 9), (3, 0), (0, 1)])
def test_positive_patches_have_their_share(pos: float, neg: float) -> None:
    label = torch.zeros(1, 30, 30)
    label[0, 5:9, 5:9], label[0, 20, 20] = 1, 2
    crop = RandCropByLesions((1, 1), num_samples=3000, pos=pos, neg=neg, jitter=0).set_random_state(0)
    crop.randomize(label)
    counts = np.bincount(label[0].long().numpy()[tuple(np.array(crop.centers).T)], minlength=3)
    assert stats.binomtest(int(counts[1] + counts[2]), 3000, pos / (pos + neg)).pvalue > 1e-3
    assert pos == 0 or stats.binomtest(int(counts[1]), int(counts[1] + counts[2])).pvalue > 1e-3


# -- volumes of every kind


def test_volumes_without_foreground_or_background() -> None:
    empty, full = torch.zeros(1, 6, 6), torch.ones(1, 6, 6)
    crop = RandCropByLesions((3, 3), num_samples=20).set_random_state(0)
    assert all((patch == 0).all() for patch in crop(empty, empty))
    assert all((patch == 1).all() for patch in crop(full, full))
    with pytest.raises(ValueError, match=r"^Expected a volume with a voxel to centre a patch on, but all voxels are"):
        RandCropByLesions((3, 3), ignore_index=1)(full, full)


def test_thousands_of_components() -> None:
    label = np.zeros((1, 36, 36, 36), dtype=np.uint8)
    label[:, ::3, ::3, ::3] = 1
    counts, chances = drawn_components(label, draws_that_reach_all(np.full(12**3, 1 / 12**3)), 0.5)
    assert len(counts) == 12**3
    assert counts.min() > 0
    assert stats.chisquare(counts, chances * counts.sum()).pvalue > 1e-3


def test_an_image_says_where_the_background_is() -> None:
    label = torch.zeros(1, 8, 8)
    label[0, 0, 0] = 1
    image = torch.zeros(2, 8, 8)
    image[1, 5, 6] = 2
    item = {"image": image, "label": label}
    crop = RandCropByLesionsd("label", "label", (1, 1), 10, pos=0, image_key="image", image_threshold=1)
    crop(item)
    assert crop.cropper.centers == [[5, 6]] * 10
    indices = LesionIndicesd("label", image_key="image", image_threshold=1)
    crop = RandCropByLesionsd("label", "label", (1, 1), 10, pos=0)
    crop(indices(item))
    assert crop.cropper.centers == [[5, 6]] * 10


# -- MONAI's conventions


def volume(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    label = (rng.random((1, 24, 20, 16)) < 0.02).astype(np.float32)
    return {"image": torch.rand(2, 24, 20, 16), "label": torch.as_tensor(label), "name": ["a"]}


def crop(**options: Any) -> RandCropByLesionsd:
    return RandCropByLesionsd(["image", "label"], "label", (8, 8, 8), num_samples=3, **options)


def test_an_image_that_the_item_lacks_is_named() -> None:
    """A crop that went on without it would take its negative patches from the air around the body."""
    label = torch.zeros(1, 16, 16, 16)
    label[0, 2, 2, 2] = 1
    item = {"image": torch.ones(1, 16, 16, 16), "label": label}
    options: dict[str, Any] = {"num_samples": 2, "image_key": "imge"}
    crop = RandCropByLesionsd(["image", "label"], "label", 8, **options)
    text = (
        "Expected `image_key` to be a key of the item, but got 'imge' beside ['image', 'label']: correct it, or leave "
        "`image_key` out to take background anywhere."
    )
    for transform in (crop, LesionIndicesd("label", image_key="imge")):
        with pytest.raises(KeyError) as caught:
            transform(item)
        assert caught.value.args == (text,)
    assert len(crop(LesionIndicesd("label")(item))) == 2  # where it has no effect


@pytest.mark.parametrize("shape", [(12, 12, 12), (18, 18, 18), (20, 20), (1, 20, 20)])
@pytest.mark.parametrize("kind", [torch.as_tensor, np.asarray, MetaTensor], ids=["tensor", "array", "meta"])
def test_an_image_of_another_shape_than_the_label_is_refused(kind: Any, shape: tuple[int, ...]) -> None:
    """Patches at places beyond it would be empty or cut, and a slice would limit the background of all slices."""
    label = torch.zeros(1, 20, 20, 20)
    label[0, 15:, 15:, 15:] = 1
    image = kind(torch.ones(1, *shape))
    remedy = "put both on one grid, each with its channel dimension"
    text = (
        "Expected the image to have the shape (20, 20, 20) of the label, in which the patches were drawn, but got "
        f"{shape}: {remedy}."
    )
    one = RandCropByLesions((6, 6, 6), num_samples=3)
    one.randomize(label)
    calls: list[Any] = [
        lambda: one(image, randomize=False),
        lambda: one(image, label),
        lambda: one(image, lesions=find_lesions(label).as_item()),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            call()
    text = (
        "Expected the image that limits the background to have the label's shape (20, 20, 20), but got "
        f"{shape}: {remedy}."
    )
    item = {"image": image, "label": label}
    calls = [
        lambda: one(label, label, image=image),
        lambda: LesionIndicesd("label", image_key="image")(item),
        lambda: RandCropByLesionsd("label", "label", 6, image_key="image")(item),
        lambda: RandCropByLesionsd(["image", "label"], "label", 6, image_key="image")(item),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            call()
    remedy = "resample or pad them to the same shape first"
    if len(shape) == 2:
        remedy = "give all as many dimensions, and each its channel dimension"
    text = f"Expected images of one shape in an item, but got {shape} of `image`, (20, 20, 20) of `label`: {remedy}."
    for keys in (["image"], ["image", "label"]):
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            RandCropByLesionsd(keys, "label", 6)(item)


def test_the_shape_is_that_which_pending_transforms_leave() -> None:
    item = volume()
    padded = SpatialPad((30, 30, 30), lazy=True)(MetaTensor(item["label"]))
    label = SpatialPad((30, 30, 30))(MetaTensor(item["label"]))
    patches = RandCropByLesions((8, 8, 8), num_samples=2)(padded, label)
    assert [tuple(patch.shape) for patch in patches] == [(1, 8, 8, 8)] * 2
    crops = crop()({"image": padded, "label": label})
    assert [tuple(patch["image"].shape) for patch in crops] == [(1, 8, 8, 8)] * 3
    with pytest.raises(ValueError, match=r"but got \(30, 30, 30\) of `image`, \(24, 20, 16\) of `label`"):
        crop()({**item, "image": padded})


def test_stored_and_found_components_give_the_same_patches() -> None:
    item = volume()
    found = crop().set_random_state(3)(item)
    stored = crop().set_random_state(3)(LesionIndicesd("label")(item))
    assert len(found) == len(stored) == 3
    for one, other in zip(found, stored, strict=True):
        assert one.keys() == other.keys() == item.keys()
        assert all(torch.equal(one[key], other[key]) for key in ("image", "label"))
    assert found[0]["name"] == ["a"]
    assert found[0]["name"] is not found[1]["name"]


def test_the_same_seed_gives_the_same_patches_and_pickles() -> None:
    item = volume()
    first, again, other = (crop().set_random_state(seed)(item) for seed in (5, 5, 6))
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a["image"], b["image"]) for a, b in zip(first, other, strict=True))
    restored = pickle.loads(pickle.dumps(crop().set_random_state(5)))
    assert torch.equal(restored(item)[0]["image"], first[0]["image"])


def test_metatensors_keep_their_place_in_space_and_lazy_crops_agree() -> None:
    item = volume()
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    for key in ("image", "label"):
        item[key] = MetaTensor(item[key], affine=affine)
    now, later = crop().set_random_state(0)(item), crop(lazy=True).set_random_state(0)(item)
    for patch, pending in zip(now, later, strict=True):
        start = np.array(patch["image"].meta["crop_center"]) - 4
        np.testing.assert_allclose(patch["image"].affine[:3, 3], affine[:3, :3] @ start)
        assert pending["image"].has_pending_operations
        assert pending["image"].peek_pending_shape() == (8, 8, 8)
    both = Compose([crop(lazy=True)], lazy=True).set_random_state(0)(volume() | item)
    assert both[0]["image"].shape == (2, 8, 8, 8)
    assert [patch["image"].meta["patch_index"] for patch in now] == [0, 1, 2]


@pytest.mark.parametrize("on_disk", [False, True])
def test_caches_keep_what_was_found(on_disk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transforms = Compose([LesionIndicesd("label"), crop()])
    folder = str(tmp_path) if on_disk else None
    dataset = cached_dataset([volume(seed) for seed in range(2)], transforms, num_workers=1, cache_dir=folder)
    for index in range(2):
        dataset[index]
    monkeypatch.setattr(LesionIndicesd, "__call__", None)  # not called again
    assert isinstance(dataset, CacheDataset) != on_disk
    patches = [dataset[index] for index in range(2)]
    assert patches[0][0]["image"].shape == (2, 8, 8, 8)
    assert "label_lesions" not in patches[0][0]


def test_missing_keys_and_one_voxel_in_each_corner() -> None:
    label = torch.zeros(1, 10, 10)
    label[0, ::9, ::9] = 1
    draw = RandCropByLesionsd(["image", "label"], "label", (4, 4), 60, pos=1, neg=0, allow_missing_keys=True)
    patches = draw.set_random_state(0)({"label": label})
    assert all(patch["label"].sum() == 1 for patch in patches)
    assert len({tuple(patch["label"].flatten().tolist()) for patch in patches}) == 4
    with pytest.raises(KeyError):
        RandCropByLesionsd(["image", "label"], "label", (4, 4))({"label": label})


@pytest.mark.parametrize("kind", ["tensor", "MetaTensor", "numpy"])
def test_patches_have_memory_of_their_own(kind: str) -> None:
    label = torch.zeros(1, 8, 8, 8)
    label[0, 4, 4, 4] = 1
    volume: Any = {"tensor": label, "MetaTensor": MetaTensor(label), "numpy": label.numpy()}[kind]
    (patch,) = RandCropByLesions((8, 8, 8), pos=1, neg=0)(volume, volume)
    patch += 1
    assert label.sum() == 1


def test_size_of_the_volume() -> None:
    label = torch.zeros(1, 10, 6)
    assert RandCropByLesions((4, -1))(label, label)[0].shape == (1, 4, 6)
    assert RandCropByLesions((4, 9), allow_smaller=True)(label, label)[0].shape == (1, 4, 6)
    with pytest.raises(ValueError, match=r"^Expected a volume of at least the patch.s size \(4, 9\), but got"):
        RandCropByLesions((4, 9))(label, label)


NOT_IN = "Expected `{}` to be {}, but got {}: {}."
JITTER = "give a fraction of the patch, or 0 to centre it on the voxel"
RANGE, PATCHES = "choose a value in this range", "give the number of patches to crop from each volume"
EXPONENT = "give 0 to draw all components equally often, or 1 to draw all voxels equally often"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"jitter": 1.5}, ValueError, NOT_IN.format("jitter", "from 0 to 1", 1.5, JITTER)),
        ({"jitter": -0.1}, ValueError, NOT_IN.format("jitter", "from 0 to 1", -0.1, JITTER)),
        ({"jitter": math.nan}, ValueError, NOT_IN.format("jitter", "from 0 to 1", "nan", JITTER)),
        ({"jitter": "half"}, TypeError, "Expected `jitter` to be a number, but got str: pass an int or a float."),
        (
            {"size_exponent": -1},
            ValueError,
            NOT_IN.format("size_exponent", "a finite number at least 0", -1, EXPONENT),
        ),
        (
            {"size_exponent": math.nan},
            ValueError,
            NOT_IN.format("size_exponent", "a finite number at least 0", "nan", EXPONENT),
        ),
        (
            {"pos": 0, "neg": 0},
            ValueError,
            "Expected `pos` or `neg` to be above 0, but got 0 for both: give the ratio of the two kinds.",
        ),
        ({"pos": -1}, ValueError, NOT_IN.format("pos", "a finite number at least 0", -1, RANGE)),
        ({"neg": math.inf}, ValueError, NOT_IN.format("neg", "a finite number at least 0", "inf", RANGE)),
        ({"num_samples": 0}, ValueError, NOT_IN.format("num_samples", "at least 1", 0, PATCHES)),
        ({"num_samples": 1.5}, TypeError, NOT_IN.format("num_samples", "an integer", "float", PATCHES)),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=r"^Expected") as caught:
        RandCropByLesions((4, 4), **options)
    assert str(caught.value) == message


def test_bad_volumes() -> None:
    item = volume()
    with pytest.raises(ValueError, match=r"^Expected the label to hold whole class numbers, but got 0\.5"):
        crop()({**item, "label": item["label"] / 2})
    stored = LesionIndicesd("label")(item)
    with pytest.raises(ValueError, match=r"^Expected the label to have the shape .* in which its lesions were found"):
        crop()({**stored, "label": item["label"][:, 2:]})
    with pytest.raises(ValueError, match=r"^Expected images of one shape in an item, but got .* of `image`, .* of `l"):
        crop()({**item, "image": item["image"][:, 2:]})
    with pytest.raises(ValueError, match=r"^Expected `label` or `lesions`, but got neither"):
        RandCropByLesions((4, 4))(torch.zeros(1, 8, 8))


def test_the_background_is_one_component() -> None:
    runs = component_runs(np.array([[0, 1, 0, 0]]))
    assert runs.classes.tolist() == [BACKGROUND, 1]
    assert ComponentRuns.from_item(runs.as_item()).sizes.tolist() == [3, 1]


@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.parametrize("indexed", [False, True])
def test_regions_behind_a_label_map_are_no_lesions(classes: int, indexed: bool) -> None:
    """Cells fill the whole volume: taken for a lesion, they would hide all others from the sampling."""
    label = torch.zeros(1, 24, 24, 24)
    label[0, 2:4, 2:4, 2:4] = 1
    label[0, 18:20, 18:20, 10:14] = classes
    item = {"image": torch.rand(1, 24, 24, 24), "label": label}
    with_regions = ComponentRegionsd("label", num_classes=classes + 1)(dict(item))
    assert len(with_regions["label"]) == classes + 1
    if indexed:
        found = [LesionIndicesd("label")(dict(each)) for each in (item, with_regions)]
        assert all(
            (found[0]["label_lesions"][key] == found[1]["label_lesions"][key]).all() for key in ("bounds", "before")
        )
        item, with_regions = found
    crop = RandCropByLesionsd(["image", "label"], "label", 8, 50, pos=1, neg=0)
    alone, beside = (crop.set_random_state(0)(dict(each)) for each in (item, with_regions))
    assert all((patch["label"][0] > 0).any() for patch in beside)
    for first, second in zip(alone, beside, strict=True):
        torch.testing.assert_close(second["image"], first["image"])


def test_a_map_that_nobody_annotated_is_no_map_of_regions() -> None:
    maps = np.zeros((2, 12, 12, 12), np.int64)
    maps[0, 2:4, 2:4, 2:4] = maps[0, 8, 8, 8] = 1
    maps[1] = 255
    runs = find_lesions(maps, labels=[0], ignore_index=255)
    assert runs.classes.tolist() == [0, 0]


# -- regions with padding around them


PADDED = [(1, 0), (2, 0), (1, 255), (2, 255), (1, -1), (2, -1)]


@pytest.mark.parametrize(("classes", "value"), PADDED)
def test_padding_around_regions_hides_no_lesion(classes: int, value: int) -> None:
    """As any padding after ComponentRegionsd leaves it, the whole volume would be one lesion of per-class maps."""
    label = torch.zeros(1, 16, 16, 16, dtype=torch.int32)
    label[0, 2:4, 2:4, 2:4], label[0, 12, 12, 12] = 1, classes
    regions = ComponentRegionsd("label", num_classes=classes + 1)({"label": label})["label"]
    pad = SpatialPad((24, 20, 16), value=value)
    ignored = value or None
    for margins in (pad, lambda image: pad(image)[:, 2:]):  # the first voxel tells nothing
        expected, found = (find_lesions(margins(values), ignore_index=ignored) for values in (label, regions))
        assert expected.classes.tolist() == [BACKGROUND, *sorted({1, classes}), *[1] * (classes == 1)]
        for name, part in expected.as_item().items():
            np.testing.assert_array_equal(found.as_item()[name], part)
    item = {"image": torch.rand(1, 24, 20, 16), "label": pad(regions)}
    crop = RandCropByLesionsd(["image", "label"], "label", 8, 50, pos=1, neg=0, ignore_index=ignored)
    for each in (item, LesionIndicesd("label", ignore_index=ignored)(item)):
        patches = crop.set_random_state(0)(each)
        assert all(((patch["label"][0] > 0) & (patch["label"][0] != value)).any() for patch in patches)


def test_maps_with_padding_are_no_regions() -> None:
    lesions = np.zeros((12, 12, 12), np.int64)
    lesions[2:4, 2:4, 2:4] = lesions[8, 8, 8] = 1
    unknown = np.full_like(lesions, 255)
    for maps, labels in (
        (np.stack([lesions, unknown]), [0]),  # nobody annotated the other
        (np.stack([1 - lesions, lesions]), [1]),
        (np.stack([1 - lesions, lesions]) * 255, [1]),  # as 8-bit images store masks
    ):
        padded = np.pad(maps, [(0, 0), (3, 3), (0, 2), (0, 0)])
        runs = find_lesions(padded, labels=labels, ignore_index=255)
        assert runs.classes.tolist()[-2:] == labels * 2
        assert runs.sizes.tolist()[-2:] == [8, 1]


@pytest.mark.parametrize("size", [[4], (4,), (-1,), np.array([4]), np.array([4, 4]), torch.tensor([4, 4])])
def test_a_size_is_a_number_or_one_for_each_axis(size: Any) -> None:
    label = torch.zeros(1, 8, 8, 8)
    assert RandCropByLesions(4)(label, label)[0].shape == (1, 4, 4, 4)
    given = re.escape(str(tuple(np.asarray(size).tolist())))
    with pytest.raises(
        ValueError, match=rf"^Expected `spatial_size` to be a number, .* volume \(8, 8, 8\), but got {given}"
    ):
        RandCropByLesions(size)(label, label)


def test_a_label_that_is_none_is_not_compared() -> None:
    label = torch.zeros(1, 8, 8, 8)
    label[0, 2, 2, 2] = 1
    item = LesionIndicesd("label")({"image": torch.rand(1, 8, 8, 8), "label": label})
    patches = RandCropByLesionsd("image", "label", (4, 4, 4))({**item, "label": None})
    assert patches[0]["image"].shape == (1, 4, 4, 4)


@pytest.mark.parametrize("threshold", ["0", None])
def test_a_threshold_is_a_number(threshold: Any) -> None:
    for make in (
        lambda: LesionIndicesd("label", image_key="image", image_threshold=threshold),
        lambda: RandCropByLesionsd("image", "label", (4, 4, 4), image_key="image", image_threshold=threshold),
    ):
        with pytest.raises(TypeError, match=r"^Expected `image_threshold` to be a number, but got"):
            make()
