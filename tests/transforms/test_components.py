"""The voxels of a label's components: all of them, each once, as scipy finds them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.transforms import Compose, FgBgToIndicesd, RandCropByPosNegLabeld
from numpy.typing import NDArray
from scipy import ndimage

from monai_iou import (
    ComponentRegionsd,
    InstanceIoULoss,
    LesionIndicesd,
    RandCropByLesions,
    RandCropByLesionsd,
    count_voxels,
)
from monai_iou.components import BACKGROUND, ComponentRuns, component_chances, component_runs, whole_numbers
from monai_iou.metrics.inputs import pair_images
from monai_iou.metrics.lesion_maps import lesion_maps
from monai_iou.transforms.pasting import foreground_mask
from monai_iou.volumes.labels import whole_labels

SHAPES = [(7,), (9, 8), (1, 12), (6, 7, 5), (1, 9, 8), (9, 1, 8), (9, 8, 1), (2, 1, 1), (1, 1, 1)]


def voxels(runs: ComponentRuns) -> list[tuple[int, frozenset[int]]]:
    """Return each component's class and flat indices."""
    numbers = [range(int(a), int(b)) for a, b in zip(runs.bounds[:-1], runs.bounds[1:], strict=True)]
    found = [frozenset(runs.voxel(number) for number in part) for part in numbers]
    return list(zip(runs.classes.tolist(), found, strict=True))


def by_scipy(masks: dict[int, NDArray[np.bool_]], background: NDArray[np.bool_]) -> set[tuple[int, frozenset[int]]]:
    expected = {(BACKGROUND, frozenset(np.flatnonzero(background).tolist()))} if background.any() else set()
    for value, mask in masks.items():
        numbers, count = ndimage.label(mask, np.ones((3,) * mask.ndim))
        expected |= {(value, frozenset(np.flatnonzero(numbers == number).tolist())) for number in range(1, count + 1)}
    return expected


@given(st.sampled_from(SHAPES), st.floats(0, 1), st.integers(1, 4), st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_label_maps_and_overlapping_maps_as_by_scipy(
    shape: tuple[int, ...], density: float, classes: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    label = np.where(rng.random(shape) < density, rng.integers(1, classes + 1, shape), 0)
    runs = component_runs(label[None])
    masks = {value: label == value for value in range(1, classes + 1)}
    assert set(voxels(runs)) == by_scipy(masks, label == 0)
    assert runs.classes.tolist() == sorted(runs.classes.tolist())
    assert runs.sizes.sum() == label.size
    maps = rng.random((classes + 1, *shape)) < density
    found = component_runs(maps, labels=range(classes + 1))
    assert set(voxels(found)) == by_scipy(dict(enumerate(maps)), ~maps.any(0))
    one_hot = np.stack([label == value for value in range(classes + 1)])
    assert set(voxels(component_runs(one_hot.astype(np.float32)))) == set(voxels(runs))


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int16, np.uint16, np.int64, np.float32, np.float64, ">i2"])
def test_every_dtype(dtype: object) -> None:
    label = np.array([[[0, 1, 1, 0], [0, 0, 0, 1]]]).astype(dtype)  # type: ignore[call-overload]
    assert set(voxels(component_runs(label))) == {(BACKGROUND, frozenset({0, 3, 4, 5, 6})), (1, frozenset({1, 2, 7}))}


def test_ignored_voxels_are_neither() -> None:
    label = np.array([[[0, 1, 255, 1, 0]]])
    assert set(voxels(component_runs(label, ignore_index=255))) == {
        (BACKGROUND, frozenset({0, 4})),
        (1, frozenset({1})),
        (1, frozenset({3})),
    }
    maps = np.array([[[0, 1, 0, 1]], [[0, 0, 0, 1]], [[1, 1, 0, 0]]])
    by_channel = component_runs(maps, labels=[0, 1], ignore_index=2)
    assert set(voxels(by_channel)) == {(BACKGROUND, frozenset({2})), (0, frozenset({3})), (1, frozenset({3}))}
    no_map = component_runs(maps, labels=[0, 1], ignore_index=-1)  # where all maps are 0
    assert set(voxels(no_map)) == {(0, frozenset({1})), (0, frozenset({3})), (1, frozenset({3}))}
    assert len(component_runs(np.full((1, 3, 3), 255), ignore_index=255).sizes) == 0


def test_chosen_labels_connectivity_and_place_of_the_background() -> None:
    label = np.array([[[1, 0, 2], [0, 1, 0]]])
    assert component_runs(label, connectivity=4).classes.tolist() == [BACKGROUND, 1, 1, 2]
    assert component_runs(label, labels=[2]).classes.tolist() == [BACKGROUND, 2]
    inside = np.array([[True, True, True], [False, True, False]])
    assert dict(voxels(component_runs(label, inside=inside)))[BACKGROUND] == {1}


def test_survives_a_cache_on_disk() -> None:
    label = np.random.default_rng(0).integers(0, 3, (1, 9, 8, 7))
    runs = component_runs(label)
    stored = {name: torch.as_tensor(values) for name, values in runs.as_item().items()}
    again = ComponentRuns.from_item(stored)
    assert again.shape == (9, 8, 7)
    assert voxels(again) == voxels(runs)


def test_takes_little_where_voxels_lie_in_rows() -> None:
    label = np.zeros((1, 96, 96, 96), dtype=np.uint8)
    label[0, 10:70, 10:70, 10:70] = 1
    stored = sum(values.nbytes for values in component_runs(label).as_item().values())
    assert stored < 0.1 * 4 * label.sum(), "an index for each foreground voxel would take ten times as much"


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 10**7)), min_size=1, max_size=30), st.floats(0, 50))
def test_chances(components: list[tuple[int, int]], exponent: float) -> None:
    classes, sizes = (np.array(part) for part in zip(*sorted(components), strict=True))
    chances = component_chances(sizes, classes, exponent)
    for value in np.unique(classes):
        inside = classes == value
        expected = (sizes[inside] / sizes[inside].max()) ** exponent
        np.testing.assert_allclose(
            chances[inside] * len(np.unique(classes)), expected / expected.sum(), rtol=1e-9, atol=1e-300
        )


@pytest.mark.parametrize(
    ("label", "options", "message"),
    [
        (
            np.array([[0.0, 0.5]]),
            {},
            "Expected the label to hold whole class numbers, but got 0.5: pass soft labels as one map per class, "
            "shape (C, *S).",
        ),
        (np.array([[0.0, np.nan]]), {}, "Expected the label to hold whole class numbers, but got nan"),
        (np.zeros(5), {}, "Expected the label to have shape (C, *S) with 1 to 3 spatial dimensions, but got (5,)"),
        (np.zeros((1, 4, 4)), {"connectivity": 6}, "Expected `connectivity` to be one of (4, 8) for 2 dimensions"),
        (
            np.zeros((2, 4, 4)),
            {"labels": [2]},
            "Expected `labels` to be channels of 2 maps, but got 2: count channels from 0.",
        ),
    ],
)
def test_bad_input(label: NDArray[np.float64], options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=r"^Expected") as error:
        component_runs(label, **options)  # type: ignore[arg-type]
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ComponentRegionsd("label", connectivity=5),
        lambda: LesionIndicesd("label", connectivity=5),
        lambda: RandCropByLesions((2, 2), connectivity=5),
        lambda: InstanceIoULoss(connectivity=5),
    ],
)
def test_a_connectivity_that_does_not_exist_is_refused_at_once(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="but got 5: choose one of these, or None for the largest"):
        make()


def test_labels_of_bfloat16_have_the_same_components() -> None:
    label = torch.tensor([[[1, 1, 0, 0], [0, 0, 0, 1]]])
    regions = [ComponentRegionsd("label")({"label": values})["label"] for values in (label, label.bfloat16())]
    assert regions[0].equal(regions[1])
    lesions = [LesionIndicesd("label")({"label": values})["label_lesions"] for values in (label, label.bfloat16())]
    assert all((lesions[0][name] == lesions[1][name]).all() for name in lesions[0])


FINDERS = [
    lambda label: ComponentRegionsd("label", num_classes=3)({"label": label})["label"],
    lambda label: LesionIndicesd("label")({"label": label})["label_lesions"],
]


@pytest.mark.parametrize("find", FINDERS)
@pytest.mark.parametrize("factor", [0.99999994, 1.00001, 1.00004])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_labels_that_miss_whole_numbers_by_rounding_have_the_same_components(
    find: Callable[[torch.Tensor], object], factor: float, dtype: torch.dtype
) -> None:
    label = torch.zeros(1, 12, 12, dtype=dtype)
    label[0, 2:4, 2:4], label[0, 8:10, 8:10], label[0, 5, 1] = 1, 1, 2
    scaled = label * factor
    scaled[0, 0, 0] = 5e-5
    assert not (scaled == label).all()
    torch.testing.assert_close(find(scaled), find(label), rtol=0, atol=0)


def _of_metrics(label: np.ndarray, classes: int) -> np.ndarray:
    pair = next(iter(pair_images(torch.from_numpy(label)[None, None], torch.zeros(1, 1, *label.shape), classes, None)))
    return pair.prediction[0].numpy()


def _of_instances(label: np.ndarray, _: int) -> np.ndarray:
    return np.where(label > 0, max(lesion_maps(label, label, (1.0, 1.0), instances=True).reference_numbers), 0)


def _counted(label: np.ndarray, classes: int) -> np.ndarray:
    counts = count_voxels([{"label": label[None]}], num_classes=classes)[0]
    return np.where(label > 0, np.flatnonzero(counts).max(), 0)


ROUNDERS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "files": lambda label, _: whole_labels(label[None], Path("a.nii"))[0],
    "components": lambda label, _: whole_numbers(label),
    "metrics": _of_metrics,
    "lesion numbers": _of_instances,
    "class weights": _counted,
    "pasting": lambda label, classes: np.where(foreground_mask(label[None], [classes - 1], None), classes - 1, 0),
}


@pytest.mark.parametrize("reader", ROUNDERS)
@pytest.mark.parametrize("number", [1, 1023, 1024, 2035, 7015, 65000])
@pytest.mark.parametrize("towards", [-np.inf, np.inf])
def test_a_label_that_misses_a_whole_number_by_float32_rounding_is_that_number(
    reader: str, number: int, towards: float
) -> None:
    label = np.zeros((4, 5), np.float32)
    label[1:3] = np.nextafter(np.nextafter(np.float32(number), np.float32(towards)), np.float32(towards))
    expected = np.zeros((4, 5), int)
    expected[1:3] = number
    np.testing.assert_array_equal(ROUNDERS[reader](label, number + 1), expected)


@pytest.mark.parametrize("reader", [name for name in ROUNDERS if name != "pasting"])
@pytest.mark.parametrize("value", ["1.00015", "1023.00073", "2035.00293", "65000.0625"])
def test_a_label_that_misses_a_whole_number_by_more_is_shown_as_no_whole_number(reader: str, value: str) -> None:
    label = np.zeros((4, 5), np.float32)
    label[1] = np.float32(value)
    with pytest.raises(ValueError, match=r"^Expected") as error:
        ROUNDERS[reader](label, 65001)
    shown = re.search(r"but got (?:5 fractions such as )?([\d.]+)[:,]", str(error.value))
    assert shown is not None
    assert float(shown[1]) == pytest.approx(float(value), rel=1e-5)
    assert float(shown[1]) % 1 != 0


@pytest.mark.parametrize("find", FINDERS)
@pytest.mark.parametrize("value", [0.5, 1.001, 0.9997, np.nan, np.inf, -np.inf])
def test_labels_between_whole_numbers_are_refused(find: Callable[[torch.Tensor], object], value: float) -> None:
    label = torch.zeros(1, 4, 4)
    label[0, 1, 1] = 1
    label[0, 2, 3] = value
    message = (
        f"Expected the label to hold whole class numbers, but got {value:g}: pass soft labels as one map per class, "
        "shape (C, *S)."
    )
    with pytest.raises(ValueError, match=r"^Expected") as error:
        find(label)
    assert str(error.value) == message


def test_patches_of_labels_with_regions_show_lesions_as_the_docs_say() -> None:
    label = torch.zeros(1, 48, 48, 48)
    label[0, 5:9, 5:9, 5:9] = 1
    keys, size = ["image", "label"], (16, 16, 16)
    indices = {"fg_indices_key": "label_fg_indices", "bg_indices_key": "label_bg_indices"}
    regions, before = ComponentRegionsd("label"), FgBgToIndicesd("label")

    def share_of(*transforms: object) -> float:
        item = {"image": torch.rand(1, 48, 48, 48), "label": label}
        patches = Compose(transforms).set_random_state(0)(item)
        assert all(patch["label"].shape == (2, *size) for patch in patches)
        return float(np.mean([bool((patch["label"][0] == 1).any()) for patch in patches]))

    options = {"pos": 1, "neg": 0, "num_samples": 50}
    with pytest.warns(UserWarning, match="Num backgrounds 0, unable to generate class balanced samples"):
        assert share_of(regions, RandCropByPosNegLabeld(keys, "label", size, **options)) < 0.5
    assert share_of(before, regions, RandCropByPosNegLabeld(keys, "label", size, **indices, **options)) == 1
    assert share_of(regions, RandCropByLesionsd(keys, "label", size, **options)) == 1
    assert share_of(LesionIndicesd("label"), regions, RandCropByLesionsd(keys, "label", size, **options)) == 1
