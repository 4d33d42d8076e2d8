"""Lesions copied from other cases: where they may lie, what of image and label changes, and what must not."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from doc_commands import blocks
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS
from monai.bundle import ConfigParser
from monai.data import CacheDataset, Dataset, MetaTensor
from monai.transforms import Compose, Identityd
from places import DOCS
from scipy import ndimage

from monai_iou.bundle_files import bundle_path
from monai_iou.demo import write_phantom_dataset
from monai_iou.transforms import LesionIndicesd, RandCopyLesionsd, RandCropByLesionsd
from monai_iou.transforms.pasting import SCALE_LIMIT, SURROUNDINGS, body_mask

KEYS = ["image", "label"]
Item = dict[str, Any]


def case(seed: int, shape: tuple[int, ...], lesions: int, channels: int = 2, classes: int = 2, border: int = 3) -> Item:
    """Return noise of mean 0 in a body with 0 around it, and lesions of a few voxels of several classes."""
    rng = np.random.default_rng(seed)
    image = np.zeros((channels, *shape), dtype=np.float32)
    inside = tuple(slice(border, size - border) for size in shape)
    image[(slice(None), *inside)] = rng.normal(size=image[(slice(None), *inside)].shape)
    label = np.zeros((1, *shape), dtype=np.uint8)
    for _ in range(lesions):
        at = [int(rng.integers(border, size - border - 2)) for size in shape]
        box = tuple(slice(a, a + int(rng.integers(1, 3))) for a in at)
        label[(0, *box)] = rng.integers(1, classes + 1)
    image[:, label[0] > 0] += 20
    return {"image": torch.as_tensor(image), "label": torch.as_tensor(label)}


def copying(source: Any, seed: int = 0, **options: Any) -> RandCopyLesionsd:
    return RandCopyLesionsd(KEYS, "label", source, **{"prob": 1.0, "tries": 200, **options}).set_random_state(seed)


def components(mask: Any) -> tuple[Any, int]:
    numbers, count = ndimage.label(np.asarray(mask), np.ones((3,) * np.ndim(mask)))
    return numbers, int(count)


def shapes_of(label: Any) -> set[tuple[Any, ...]]:
    """The lesions of a label map by scipy, wherever they lie: the shape of the box, and the labels in it."""
    numbers, count = components(label[0] > 0)
    found = set()
    for number, box in zip(range(1, count + 1), ndimage.find_objects(numbers), strict=True):
        part = np.where(numbers[box] == number, np.asarray(label[0])[box], 0)
        found.add((part.shape, part.tobytes()))
    return found


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.sampled_from([((20, 22), (17, 25)), ((16, 14, 15), (13, 17, 12)), ((20, 20), (9, 10)), ((30,), (25,))]),
    rim=st.integers(0, 3),
    options=st.fixed_dictionaries({"max_lesions": st.integers(1, 3), "match_intensity": st.booleans()}),
)
def test_what_is_pasted_is_a_lesion_in_the_body_beside_the_others(
    seed: int, sizes: tuple[tuple[int, ...], tuple[int, ...]], rim: int, options: dict[str, Any]
) -> None:
    target, source = case(seed, sizes[0], 2), case(seed + 1, sizes[1], 3)
    before = copy.deepcopy((target, source))
    result = copying([source], seed, rim=rim, **options)(target)
    old, new = target["label"][0].numpy(), result["label"][0].numpy()
    changed_label = old != new
    assert (old[changed_label] == 0).all(), "no lesion is overwritten"
    assert (target["image"].numpy()[:, changed_label] != 0).any(0).all(), "nothing lies outside the body"
    number = components(changed_label)[1]
    assert number <= options["max_lesions"]
    if options["max_lesions"] == 1 and number:
        assert shapes_of(np.where(changed_label, new, 0)[None]) <= shapes_of(source["label"])
    changed_image = (target["image"] != result["image"]).any(0).numpy()
    distance = ndimage.distance_transform_edt(~changed_label) if changed_label.any() else np.full(old.shape, np.inf)
    assert (distance[changed_image] <= rim).all(), "the image changes in the lesion and its rim alone"
    assert not changed_image[old > 0].any(), "no rim lies on a lesion"
    assert not changed_image[(target["image"] == 0).all(0).numpy()].any(), "no rim lies outside the body"
    for item, kept in zip((target, source), before, strict=True):
        assert all(torch.equal(item[key], kept[key]) for key in KEYS), "inputs stay as they are"


def single(shape: tuple[int, ...] = (24, 24)) -> tuple[Item, Item]:
    """A target without a lesion, and a source with one of 2 voxels in the middle, both of positive noise."""
    rng = np.random.default_rng(5)
    images = [torch.as_tensor(rng.uniform(1, 2, (2, *shape))) for _ in range(2)]
    label = torch.zeros(1, *shape, dtype=torch.int64)
    middle = tuple(size // 2 for size in shape)
    label[(0, *middle)] = label[(0, *middle[:-1], middle[-1] + 1)] = 1
    images[1] = images[1] + 10 * label
    return {"image": images[0], "label": torch.zeros_like(label)}, {"image": images[1], "label": label}


@pytest.mark.parametrize("shape", [(24, 24), (16, 15, 14)])
@pytest.mark.parametrize("rim", [0, 1, 2, 4])
@pytest.mark.parametrize("match", [False, True])
def test_the_image_is_that_of_a_slow_loop(shape: tuple[int, ...], rim: int, match: bool) -> None:
    target, source = single(shape)
    result = copying([source], rim=rim, match_intensity=match)(target)
    lesion, there = (np.argwhere(item["label"][0].numpy()) for item in (source, result))
    offset = there[0] - lesion[0]
    near: dict[tuple[int, ...], float] = {}
    for place in np.ndindex(*shape):
        distance = min(float(np.linalg.norm(np.subtract(place, voxel))) for voxel in there)
        origin = np.subtract(place, offset)
        if 0 < distance <= max(rim, SURROUNDINGS) and (origin >= 0).all() and (origin < shape).all():
            near[place] = distance
    for channel in range(2):
        new, old, from_ = (item["image"][channel].numpy() for item in (result, target, source))
        here = np.array([old[place] for place in near])
        around = np.array([from_[tuple(np.subtract(place, offset))] for place in near])
        scale = here.std() / around.std() if match else 1.0
        shift = here.mean() - scale * around.mean() if match else 0.0
        expected = old.copy()
        for place, distance in {**near, **{tuple(voxel): 0.0 for voxel in there.tolist()}}.items():
            share = max(1 - distance / (rim + 1), 0) if distance <= rim else 0
            pasted = scale * from_[tuple(np.subtract(place, offset))] + shift
            expected[place] = share * pasted + (1 - share) * old[place]
        np.testing.assert_allclose(new, expected, rtol=1e-12)


def test_a_constant_surrounding_keeps_the_contrast_and_a_smooth_one_bounds_it() -> None:
    target, source = single()
    lesion = (source["label"] > 0)[0]
    flat = {**source, "image": torch.where(lesion, 15.0, 5.0).repeat(2, 1, 1).double()}
    flat["image"][:, 0, 0] = 6  # the faces are no background: half of them are not 5
    flat["image"][:, 0], flat["image"][:, -1] = torch.arange(24.0), torch.arange(24.0)
    flat["image"][:, :, 0], flat["image"][:, :, -1] = torch.arange(24.0), torch.arange(24.0)
    result = copying([flat], rim=0)(target)
    pasted = result["image"][:, result["label"][0] > 0]
    assert ((pasted > 10) & (pasted < 13)).all(), "10 above a surrounding of 1 to 2"
    smooth = {**target, "image": 1.5 + (target["image"] - 1.5) * 1e-3}
    result = copying([source], rim=0)(smooth)
    contrast = result["image"][:, result["label"][0] > 0] - 1.5
    assert (contrast > 9 / SCALE_LIMIT).all()
    assert (contrast < 11 / SCALE_LIMIT + 0.1).all()


def test_every_place_is_drawn_alike() -> None:
    target = {"image": torch.ones(2, 7, 7), "label": torch.zeros(1, 7, 7)}
    for face in (0, -1):
        target["image"][:, face] = target["image"][:, :, face] = 0
    _, source = single()
    transform = copying([source], tries=1000)
    firsts = [tuple(np.argwhere(transform(target)["label"][0].numpy())[0].tolist()) for _ in range(1000)]
    counts = {place: firsts.count(place) for place in firsts}
    assert set(counts) == {(x, y) for x in range(1, 6) for y in range(1, 5)}
    assert sum((count - 50) ** 2 / 50 for count in counts.values()) < 43.8, "chi-square, 19 degrees, 0.1 %"


def test_prob_and_number_of_lesions() -> None:
    target, source = single()
    transform = copying([source], prob=0.3, max_lesions=3, tries=1000)
    counts = [components(transform(target)["label"][0])[1] for _ in range(400)]
    assert abs(np.mean(np.array(counts) > 0) - 0.3) < 0.09
    assert set(counts) == {0, 1, 2, 3}
    never = copying([source], prob=0.0)
    assert all(never(target)[key] is target[key] for key in KEYS)


def test_a_seed_decides_everything_in_compose_too() -> None:
    target, sources = case(0, (30, 30), 1), [case(seed, (20, 24), 3) for seed in range(1, 5)]
    runs = []
    for seed in (3, 3, 4):
        transform = Compose([copying(sources)]).set_random_state(seed)
        runs.append([transform(target) for _ in range(4)])
    same = [all(torch.equal(a[k], b[k]) for k in KEYS) for a, b in zip(runs[0], runs[1], strict=True)]
    assert all(same)
    assert not all(torch.equal(a["label"], b["label"]) for a, b in zip(runs[0], runs[2], strict=True))


def test_sources_may_be_datasets_and_functions() -> None:
    target, items = case(0, (30, 30), 0), [case(seed, (20, 24), 3) for seed in range(1, 5)]
    cached = CacheDataset(items, Compose([Identityd(KEYS)]), progress=False)
    expected = copying(items)(target)
    asked: list[int] = []

    def function(index: int) -> Item:
        asked.append(index)
        return items[index % len(items)]

    for source in (tuple(items), Dataset(items), cached):
        assert torch.equal(copying(source)(target)["image"], expected["image"])
    assert copying(function)(target)["label"].any()
    assert asked
    assert asked[0] > len(items)
    assert all(torch.equal(cached[i][k], items[i][k]) for i in range(4) for k in KEYS)


def test_no_lesion_and_no_place_leave_the_item() -> None:
    target, source = single()
    big = {**source, "label": torch.ones_like(source["label"])}
    wide = {"image": torch.rand(2, 24, 60), "label": torch.zeros(1, 24, 60, dtype=torch.int64)}
    wide["label"][0, 3, 5:50] = 1
    full = {**target, "label": torch.full_like(target["label"], 2)}
    for item, origin in ((target, target), (full, source), (full, big), (target, wide)):
        result = copying([origin])(item)
        assert all(result[key] is item[key] for key in KEYS)


def test_overlap_is_allowed_on_request() -> None:
    target, source = single()
    full = {**target, "label": torch.full_like(target["label"], 2)}
    result = copying([source], allow_overlap=True)(full)
    assert (result["label"] == 1).sum() == 2
    assert torch.equal((result["image"] != full["image"]).any(0), result["label"][0] == 1), "no rim on what is there"


def test_labels_and_ignored_voxels() -> None:
    target, source = single()
    label = source["label"].clone()
    label[0, 2:5, 2:5], label[0, 20:, 20:] = 3, 255
    source = {**source, "label": label}
    for labels, ignore, expected in (
        (None, 255, {1, 3}),
        ([3], None, {3}),
        ([1], None, {1}),
        (None, None, {1, 3, 255}),
    ):
        transform = copying([source], labels=labels, ignore_index=ignore)
        found = {int(value) for _ in range(40) for value in transform(target)["label"].unique()}
        assert found - {0} == expected


def test_a_lesion_of_several_classes_stays_whole_in_maps_too() -> None:
    target, source = single()
    label = source["label"].clone()
    label[0, 10:15, 10:15], label[0, 12, 12] = 1, 2
    source = {**source, "label": label}
    result = copying([source])(target)
    assert shapes_of(result["label"].numpy()) == shapes_of(label.numpy())

    def maps(item: Item) -> Item:
        parts = [item["label"] == 0, item["label"] > 0, item["label"] == 2]  # overlapping: the whole, and its core
        return {**item, "label": torch.cat(parts).float()}

    mapped = copying([maps(source)])(maps(target))
    assert torch.equal(mapped["label"], maps(result)["label"])
    assert torch.equal(mapped["image"], result["image"])


def test_ignored_voxels_of_maps_are_not_pasted_over() -> None:
    target, source = single()
    label = torch.cat([source["label"] == 0, source["label"] > 0]).float()
    unknown = {**target, "label": torch.zeros_like(label)}
    assert copying([{**source, "label": label}], ignore_index=255)(unknown)["label"] is unknown["label"]
    assert copying([{**source, "label": label}])(unknown)["label"].sum() == 2


def as_form(label: torch.Tensor, form: str) -> torch.Tensor:
    """Return a label map of 0, 1, 2 and 255 as it is, or as maps in which a channel, or no channel, stands for 255."""
    background, first, second, unknown = (label == value for value in (0, 1, 2, 255))
    channels = {
        "no channel": [background, first, second],
        "last channel": [background, first, second, unknown],
        "channel 0": [unknown, first, second],
    }
    return label if form == "label map" else torch.cat(channels[form]).float()


@pytest.mark.parametrize("allow_overlap", [False, True])
@pytest.mark.parametrize(
    ("form", "ignore_index"), [("label map", 255), ("no channel", 9), ("last channel", 3), ("channel 0", 0)]
)
def test_ignored_voxels_are_not_pasted_over_with_other_lesions_either(
    form: str, ignore_index: int, allow_overlap: bool
) -> None:
    target, source = single()
    label = target["label"].clone()
    label[0, :, :12], label[0, :, 12:18] = 255, 2
    target["label"], source["label"] = as_form(label, form), as_form(source["label"], form)
    transform = copying([source], ignore_index=ignore_index, allow_overlap=allow_overlap)
    pasted = [(transform(target)["label"] != target["label"]).any(0) for _ in range(40)]
    assert all(mask.sum() == 2 for mask in pasted)
    assert not any((mask & (label[0] == 255)).any() for mask in pasted)
    assert any((mask & (label[0] == 2)).any() for mask in pasted) == allow_overlap


def test_what_is_not_a_class_number_takes_no_place_in_integers() -> None:
    target, source = single()
    stored = {**source, "label": source["label"].float() * 0.99999994}
    assert torch.equal(copying([stored])(target)["label"], copying([source])(target)["label"])
    assert copying([stored])(target)["label"].sum() == 2
    with pytest.raises(ValueError, match=r"^Expected the label to hold whole class numbers, but got 0\.7: pass soft"):
        copying([{**source, "label": source["label"] * 0.7}])(target)
    maps = [torch.cat([label == 0, label == 1]) for label in (target["label"], source["label"])]
    soft = {**source, "label": maps[1] * 0.7 + 0.1}
    result = copying([soft])({**target, "label": maps[0].to(torch.uint8)})
    assert result["label"].sum((1, 2)).tolist() == [24 * 24 - 2, 2]


def test_the_body_by_a_threshold() -> None:
    target, source = single()
    target["image"][:, :, :12] = 0.4
    for threshold in (0.5, None):  # most of the faces are not 0.4, so that without a threshold all is body
        transform = copying([source], image_threshold=threshold)
        columns = np.concatenate([np.argwhere(transform(target)["label"][0].numpy())[:, 1] for _ in range(40)])
        assert (columns.min() >= 12) == (threshold is not None)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int16", "uint8"])
def test_arrays_of_any_dtype_and_order(dtype: str, order: Any) -> None:
    target, source = ({key: np.asarray(values, order=order) for key, values in item.items()} for item in single())
    for item in (target, source):
        item["image"] = np.asarray((item["image"] * 20), dtype=dtype, order=order)
    result = copying([source])(target)
    assert isinstance(result["image"], np.ndarray)
    assert result["image"].dtype == np.dtype(dtype)
    assert result["label"].dtype == np.int64
    at = result["label"][0] > 0
    assert at.sum() == 2
    assert (result["image"][:, at].astype(float) > 100).all()


def test_meta_tensors_keep_their_metadata() -> None:
    target, source = single()
    affine = torch.diag(torch.tensor([2.0, 3.0, 1.0]))
    meta = {key: MetaTensor(values, affine=affine, meta={"name": "x.nii"}) for key, values in target.items()}
    result = copying([source])(meta)
    for key in KEYS:
        assert isinstance(result[key], MetaTensor)
        assert torch.equal(result[key].affine, meta[key].affine)
        assert result[key].meta["name"] == "x.nii"
        assert result[key].dtype == target[key].dtype
    assert torch.equal(result["image"].as_tensor(), copying([source])(target)["image"])


def test_stored_lesions_give_the_same_and_are_renewed_for_the_crop() -> None:
    target, source = single()
    find = LesionIndicesd("label")
    expected = copying([source])(target)
    result = copying([find(source)])(find(target))
    assert torch.equal(result["image"], expected["image"])
    assert "label_lesions" not in result
    assert "label_lesions" in copying([target])(find(target)), "nothing was pasted, so they still fit"
    crop = RandCropByLesionsd(KEYS, "label", (3, 3), 5, pos=1, neg=0, jitter=0).set_random_state(0)
    assert all(patch["label"][0, 1, 1] == 1 for patch in crop(result))


def test_the_documented_overlay_of_the_bundle(tmp_path: Path) -> None:
    page = (DOCS / "bundle.md").read_text(encoding="utf-8")
    (block,) = [text for text in blocks(page, "json") if "RandCopyLesionsd" in text]
    (tmp_path / "copy.json").write_text(json.dumps(json.loads(block)))
    data = write_phantom_dataset(tmp_path / "data", training=2, evaluation=1, shape=(24, 24, 24))
    files = [str(bundle_path() / "configs" / "train.json"), str(tmp_path / "copy.json")]
    foreground = {}
    for prob in (0.0, 1.0):
        parser = ConfigParser(ConfigParser.load_config_files(files))
        given = {"dataset_dir": str(data), "bundle_root": str(tmp_path), "val_fraction": 0, "copy_lesions": prob}
        parser.update({**given, "patch_size": [24, 24, 24], "num_samples": 1, "copying::tries": 500})
        preprocessing = parser.get_parsed_content("train#preprocessing")
        names = [type(transform).__name__ for transform in preprocessing.transforms]
        assert names[names.index("LesionIndicesd") + 1 :][:2] == ["RandCopyLesionsd", "RandCropByLesionsd"]
        dataset = parser.get_parsed_content("train#dataset")
        until = names.index("RandCropByLesionsd") + 1
        preprocessing.set_random_state(0)
        cut = [preprocessing(dict(dataset._cache[0]), start=until - 2, end=until)[0] for _ in range(5)]
        foreground[prob] = [int((patch["label"] > 0).sum()) for patch in cut]
    assert max(foreground[0.0]) == min(foreground[0.0])
    assert max(foreground[1.0]) > max(foreground[0.0])


def documented_overlay() -> dict[str, Any]:
    page = (DOCS / "bundle.md").read_text(encoding="utf-8")
    (block,) = [text for text in blocks(page, "json") if "RandCopyLesionsd" in text]
    overlay: dict[str, Any] = json.loads(block)
    return overlay


def test_the_documented_overlay_adds_one_transform_to_those_of_the_bundle() -> None:
    shipped = json.loads((bundle_path() / "configs" / "train.json").read_text())["train"]["preprocessing"]["transforms"]
    assert documented_overlay()["train#preprocessing#transforms"].replace("[@copying] + ", "") == shipped


@pytest.mark.parametrize("layout", ["several raters", "Decathlon regions and ignore", "ignore"])
def test_the_documented_overlay_serves_every_kind_of_labels(layout: str, tmp_path: Path) -> None:
    """One rater's label is drawn, ignored voxels are not copied, and cells are not made of maps."""
    (tmp_path / "copy.json").write_text(json.dumps(documented_overlay()))
    data = LAYOUTS[layout](tmp_path / "data")
    files = [str(bundle_path() / "configs" / "train.json"), str(tmp_path / "copy.json")]
    parser = ConfigParser(ConfigParser.load_config_files(files))
    given = {"dataset_dir": str(data), "bundle_root": str(tmp_path), "val_fraction": 0, "copy_lesions": 1.0}
    parser.update({**given, "patch_size": [16, 16, 16], "num_samples": 1, "raters": "draw", "instance": True})
    preprocessing = parser.get_parsed_content("train#preprocessing")
    plan = parser.get_parsed_content("plan")
    names = [type(transform).__name__ for transform in preprocessing.transforms]
    assert ("DrawnRaterd" in names) == (layout == "several raters")
    assert ("ComponentRegionsd" in names) == plan.exclusive
    assert preprocessing.transforms[names.index("RandCopyLesionsd")].ignore_index == plan.ignore_index
    item = parser.get_parsed_content("cases").training[0]
    (patch,) = preprocessing.set_random_state(0)(item)
    assert patch["label"].shape[0] == plan.out_channels


@pytest.mark.parametrize("radius", [20, 28, 30])
@pytest.mark.parametrize("textured", [False, True])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_body_in_one_slice_is_that_in_its_picture(radius: int, textured: bool, axis: int) -> None:
    inside = (np.mgrid[-32:32, -32:32] ** 2).sum(0) < radius**2
    picture = np.where(inside, np.random.default_rng(0).normal(5, textured, (64, 64)), 0.0).astype(np.float32)
    image = np.expand_dims(picture[None], axis + 1)
    np.testing.assert_array_equal(body_mask(image, None).squeeze(axis), inside)
    np.testing.assert_array_equal(body_mask(picture[None], None), inside)
    label = np.zeros_like(image, dtype=np.uint8)
    label.reshape(64, 64)[30:33, 30:33] = 1
    source = [{"image": np.where(label > 0, 9, image), "label": label}]
    copy = RandCopyLesionsd(["image", "label"], "label", source, prob=1.0).set_random_state(0)
    for _ in range(50):
        pasted = np.asarray(copy({"image": image, "label": np.zeros_like(label)})["label"]).reshape(64, 64) > 0
        assert pasted.any()
        assert inside[pasted].all()


def test_a_volume_of_one_voxel_has_a_body() -> None:
    assert body_mask(np.ones((1, 1, 1, 1)), None).shape == (1, 1, 1)


@pytest.mark.parametrize("factor", [0.99999994, 1.00001, 1.0000003])
def test_labels_that_miss_whole_numbers_by_rounding_are_those_numbers(factor: float) -> None:
    target, source = case(3, (20, 22), 2), case(4, (17, 25), 3)
    for item in (target, source):
        item["label"] = item["label"].float()
        item["label"][0, :4] = 9  # ignored
    rounded = [{**item, "label": item["label"] * factor + 3e-6 * (item["label"] == 0)} for item in (target, source)]
    assert all((item["label"] != 0).all() for item in rounded)
    for options in ({}, {"labels": [2]}, {"allow_overlap": True}):
        expected = copying([source], 5, ignore_index=9, max_lesions=3, **options)(target)
        found = copying([rounded[1]], 5, ignore_index=9, max_lesions=3, **options)(rounded[0])
        assert not torch.equal(expected["label"], target["label"])
        assert torch.equal(found["label"].round(), expected["label"])
        assert torch.equal(found["image"], expected["image"])
