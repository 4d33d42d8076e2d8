"""Arguments and sources that RandCopyLesionsd refuses, each in one sentence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from monai_iou.transforms import ComponentRegionsd, RandCopyLesionsd

KEYS = ["image", "label"]
GIVEN = {"image": torch.rand(2, 24, 24), "label": torch.zeros(1, 24, 24)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"prob": 1.5},
            "Expected `prob` to be from 0 to 1, but got 1.5: give the probability with which lesions are pasted.",
        ),
        (
            {"max_lesions": 0},
            "Expected `max_lesions` to be at least 1, but got 0: set prob=0 to paste none.",
        ),
        (
            {"rim": -1},
            "Expected `rim` to be at least 0, but got -1: give the width in voxels, or 0 to paste without a rim.",
        ),
        (
            {"tries": 0},
            "Expected `tries` to be at least 1, but got 0: give the number of positions to try for each lesion.",
        ),
        (
            {"labels": []},
            "Expected `labels` to name a class to copy, but got an empty list: leave it out to copy all classes "
            "above 0.",
        ),
        (
            {"source": []},
            "Expected `source` to hold an item to copy lesions from, but got none: pass prepared training cases.",
        ),
        (
            {"source": {"image": 1}},
            "Expected `source` to be a sequence of items or a function, but got dict: pass a list or dataset of "
            "prepared items.",
        ),
        (
            {"label_key": "seg"},
            "Expected `keys` to hold the label 'seg' and an image, but got ('image', 'label'): name every image "
            "into which lesions are pasted.",
        ),
        (
            {"image_threshold": "0"},
            "Expected `image_threshold` to be a number, but got str: pass an int or a float.",
        ),
        (
            {"ignore_index": 1.5},
            "Expected `ignore_index` to be None or an integer, but got float: pass the value of the label to ignore, "
            "such as 255.",
        ),
        (
            {"source": [[GIVEN]]},
            "Expected `source` to return dictionaries, but got list: use items before any crop, because a crop "
            "returns a list of them.",
        ),
        (
            {"source": [{"image": GIVEN["image"]}]},
            "Expected items of `source` to have the key 'label', but got none: prepare them by the same transforms.",
        ),
        (
            {"source": [{**GIVEN, "image": GIVEN["image"][:1]}]},
            "Expected `image` of a source item to have 2 channels and 2 dimensions as in the item, but got the shape "
            "(1, 24, 24): prepare both by the same transforms.",
        ),
        (
            {"source": [{"image": GIVEN["image"][..., None], "label": GIVEN["label"][..., None]}]},
            "Expected `image` of a source item to have 2 channels and 2 dimensions as in the item, but got the shape "
            "(2, 24, 24, 1): prepare both by the same transforms.",
        ),
        (
            {"source": [{**GIVEN, "label": GIVEN["label"][:, 1:]}]},
            "Expected images of one shape in an item of `source`, but got (24, 24) of `image`, (23, 24) of `label`: "
            "resample or pad them to the same shape first.",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_and_sources_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        RandCopyLesionsd(**{"keys": KEYS, "label_key": "label", "source": [GIVEN], "prob": 1.0, **options})(GIVEN)
    assert str(error.value) == message


def test_a_label_with_regions_is_refused() -> None:
    """What is pasted would have no region of its own."""
    label = torch.zeros(1, 24, 24)
    label[0, 4:6, 4:6] = 1
    item = ComponentRegionsd("label")({"image": torch.rand(1, 24, 24), "label": label})
    message = "Expected 'label' to be copied without regions, but got the channels of ComponentRegionsd: put that "
    with pytest.raises(ValueError, match=message):
        RandCopyLesionsd(KEYS, "label", [item], prob=1)(item)
    padded = {key: torch.nn.functional.pad(values, (3, 0, 2, 1)) for key, values in item.items()}
    with pytest.raises(ValueError, match=message):
        RandCopyLesionsd(KEYS, "label", [padded], prob=1)(padded)


def test_an_image_that_the_item_lacks_is_not_asked_of_its_source() -> None:
    label = torch.zeros(1, 24, 24)
    label[0, 4:6, 4:6] = 1
    item = {"image": torch.rand(1, 24, 24) + 1, "label": label}
    copy = RandCopyLesionsd(["image", "second", "label"], "label", [item], prob=1, allow_missing_keys=True)
    pasted = copy.set_random_state(0)(dict(item))
    assert (pasted["label"] > 0).sum() > 4
    with pytest.raises(ValueError, match="Expected items of `source` to have the key 'second', but got none"):
        copy({**item, "second": item["image"]})


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_label_map_whose_background_is_ignored_is_refused(dtype: torch.dtype) -> None:
    """Nothing would ever be pasted, because no voxel is background."""
    label = torch.ones(1, 24, 24, dtype=dtype)
    label[0, 4:6, 4:6], label[0, 20:] = 2, 0
    item = {"image": torch.rand(2, 24, 24) + 1, "label": label}
    options: dict[str, Any] = {"prob": 1.0, "labels": [2], "ignore_index": 0}
    with pytest.raises(ValueError, match=r"^Expected") as error:
        RandCopyLesionsd(KEYS, "label", [item], **options)(item)
    assert str(error.value) == (
        "Expected the label map 'label' to have a background to paste lesions on, but got ignore_index=0, which "
        "ignores the background: give the value of the ignored voxels, such as 255, or set allow_overlap=True to paste "
        "over the classes above 0."
    )
    pasted = RandCopyLesionsd(KEYS, "label", [item], allow_overlap=True, tries=200, **options).set_random_state(1)(item)
    changed = pasted["label"] != label
    assert changed.sum() > 0
    assert (label[changed] == 1).all(), "nothing is pasted over ignored voxels"
    assert (pasted["label"][changed] == 2).all()
    assert not (pasted["image"] != item["image"]).any(0)[label[0] == 0].any()


def test_maps_whose_channel_0_marks_ignored_voxels_have_a_background() -> None:
    maps = torch.zeros(2, 24, 24)
    maps[1, 4:6, 4:6], maps[0, 12:] = 1, 1
    item = {"image": torch.rand(2, 24, 24) + 1, "label": maps}
    copy = RandCopyLesionsd(KEYS, "label", [item], prob=1.0, ignore_index=0, tries=200).set_random_state(0)
    pasted = copy(item)["label"]
    assert pasted[1].sum() > 4
    assert torch.equal(pasted[0], maps[0])
    assert not (pasted[1] * maps[0]).any()


@pytest.mark.parametrize(
    ("value", "dtype", "fits"),
    [
        (300, torch.uint8, False),
        (255, torch.uint8, True),
        (-3, torch.uint8, False),
        (200, torch.int8, False),
        (2, torch.bool, False),
        (3001, torch.float16, False),
        (3000, torch.float16, True),
        (100_000, torch.float16, False),
        (300, torch.bfloat16, True),
        (301, torch.bfloat16, False),
        (2**24 + 1, torch.float32, False),
        (300, torch.int16, True),
        (300, np.dtype("uint8"), False),
        (300, np.dtype("int16"), True),
    ],
)
def test_a_class_that_the_label_cannot_hold_is_refused(value: int, dtype: Any, fits: bool) -> None:
    """A cast would make another class of it."""
    label = torch.zeros(1, 24, 24, dtype=torch.int32)
    label[0, 4:6, 4:6] = value
    source = {"image": torch.rand(1, 24, 24) + 1, "label": label}
    empty = np.zeros((1, 24, 24), dtype) if isinstance(dtype, np.dtype) else torch.zeros(1, 24, 24, dtype=dtype)
    copy = RandCopyLesionsd(KEYS, "label", [source], prob=1.0, labels=[value], tries=200).set_random_state(0)
    item = {"image": torch.rand(1, 24, 24) + 1, "label": empty}
    if fits:
        pasted = copy(item)["label"]
        assert pasted.dtype == dtype
        assert (pasted == value).sum() == 4
        return
    with pytest.raises(ValueError, match=r"^Expected the labels") as error:
        copy(item)
    assert str(error.value) == (
        f"Expected the labels of a source item to fit into the type of the item's label, {dtype}, but got {value}: "
        "convert the labels of all items to one wider type first."
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float16, torch.bfloat16, torch.int64])
def test_maps_keep_their_classes_in_every_type(dtype: torch.dtype) -> None:
    maps = torch.zeros(3, 24, 24)
    maps[0], maps[0, 4:6, 4:6], maps[2, 4:6, 4:6] = 1, 0, 0.7
    item = {"image": torch.rand(1, 24, 24) + 1, "label": (torch.arange(3) == 0)[:, None, None].expand(3, 24, 24)}
    item["label"] = item["label"].to(dtype)
    source = {"image": item["image"], "label": maps}
    pasted = RandCopyLesionsd(KEYS, "label", [source], prob=1.0, tries=200).set_random_state(0)(item)["label"]
    assert pasted.dtype == dtype
    assert (pasted >= 0.5).sum((1, 2)).tolist() == [24 * 24 - 4, 0, 4]
