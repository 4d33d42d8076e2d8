"""Lesions that LesionIndicesd found are refused where a later transform has moved them, and only there."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import AsDiscreted, Compose, Flip, Flipd, RandFlipd, RandGaussianNoised, RandShiftIntensityd
from monai.transforms.lazy.functional import apply_pending
from torch import Tensor

from monai_iou import ComponentRegionsd, LesionIndicesd, RandCopyLesionsd, RandCropByLesions, RandCropByLesionsd

KEYS = ["image", "label"]
SHAPE = (24, 20, 16)


def volume(lesion: float = 1, background: float = 0) -> Tensor:
    """A lesion of eight voxels in a corner, which no flip leaves in its place."""
    label = torch.full((1, *SHAPE), float(background))
    label[0, 2:4, 2:4, 2:4] = lesion
    return label


def cropped(label: Any, *between: Any, **options: Any) -> list[dict[Any, Any]]:
    found = {name: options.pop(name) for name in ("labels",) if name in options}
    crop = RandCropByLesionsd(KEYS, "label", (8, 8, 8), **{"num_samples": 20, "pos": 1, "neg": 0, **options})
    item = LesionIndicesd("label", ignore_index=options.get("ignore_index"), **found)({"image": label, "label": label})
    for transform in between:  # not by Compose, which hides the error in another
        item = transform(item)
    return crop.set_random_state(0)(item)


@pytest.mark.parametrize("kind", [np.asarray, torch.Tensor.int, torch.Tensor.bfloat16, MetaTensor])
@pytest.mark.parametrize("jitter", [0.0, 0.5, 1.0])
def test_lesions_that_a_flip_has_moved_are_refused(kind: Any, jitter: float) -> None:
    pattern = (
        r"^Expected the voxel \([23], [23], [23]\), where LesionIndicesd found a lesion, to be foreground of the "
        r"label, but got \[0(\.0)?\]: put LesionIndicesd after all transforms that move voxels, such as flips, or "
        r"leave it out\.$"
    )
    label = kind(volume()) if kind is not torch.Tensor.bfloat16 else volume().int()
    as_half = [lambda item: {**item, "label": item["label"].bfloat16()}] if kind is torch.Tensor.bfloat16 else []
    with pytest.raises(ValueError, match=pattern):
        cropped(label, *as_half, RandFlipd(KEYS, prob=1.0, spatial_axis=0), jitter=jitter)
    assert all(patch["label"].sum() > 0 for patch in cropped(label, *as_half, jitter=jitter))
    moved = Compose([RandFlipd(KEYS, prob=1.0, spatial_axis=0), LesionIndicesd("label")])(
        {"image": label, "label": label}
    )
    crop = RandCropByLesionsd(KEYS, "label", (8, 8, 8), 20, pos=1, neg=0, jitter=jitter)
    assert all(patch["label"].sum() > 0 for patch in crop(moved))  # type: ignore[arg-type]


@pytest.mark.parametrize("lazy", [False, True])
def test_the_form_for_arrays_compares_too_if_it_has_the_label(lazy: bool) -> None:
    label = MetaTensor(volume())
    lesions = LesionIndicesd("label")({"label": label})["label_lesions"]
    crop = RandCropByLesions((8, 8, 8), 5, pos=1, neg=0)
    moved = Flip(0, lazy=lazy)(label)
    with pytest.raises(ValueError, match="where LesionIndicesd found a lesion"):
        crop(moved, moved, lesions)
    crop(moved, None, lesions)  # nothing to compare with
    crop(label, label, lesions)
    with pytest.raises(ValueError, match=re.escape("after all transforms that move voxels or change the shape")):
        crop(label[:, 1:], label[:, 1:], lesions)


@pytest.mark.parametrize("lazy", [False, True])
def test_lesions_lie_where_pending_transforms_leave_them(lazy: bool) -> None:
    """Without Compose, which applies them before a crop that is no lazy one."""
    label = Flip(0, lazy=True)(MetaTensor(volume()))
    crop = RandCropByLesions((8, 8, 8), 20, pos=1, neg=0, lazy=lazy).set_random_state(0)
    lesions = LesionIndicesd("label")({"label": label})["label_lesions"]
    found = LesionIndicesd("label")({"label": volume().flip(1)})["label_lesions"]
    assert all(np.array_equal(lesions[name], found[name]) for name in found)
    for given in ((label,), (label, lesions)):
        patches = [apply_pending(patch)[0] for patch in crop(label, *given)]
        assert len(label.pending_operations) == 1
        assert all(patch.shape == (1, 8, 8, 8) and patch.sum() > 0 for patch in patches)
    items = RandCropByLesionsd(KEYS, "label", (8, 8, 8), 9, pos=1, neg=0, lazy=lazy)({"image": label, "label": label})
    assert all(apply_pending(item[key])[0].sum() > 0 for item in items for key in KEYS)


def test_the_background_lies_where_pending_transforms_leave_the_image() -> None:
    image = Flip(0, lazy=True)(MetaTensor(volume()))  # above 0 in a corner alone
    crop = RandCropByLesions((3, 3, 3), 20, pos=0, neg=1, lazy=True)
    patches = crop(image, torch.zeros(1, *SHAPE), None, image)
    assert all(apply_pending(patch)[0][0, 1, 1, 1] == 1 for patch in patches)


def test_regions_are_those_of_the_label_after_pending_transforms() -> None:
    label = volume()
    label[0, 20, 18, 14] = 1
    expected = ComponentRegionsd("label")({"label": label.flip(1)})["label"]
    found = ComponentRegionsd("label")({"label": Flip(0, lazy=True)(MetaTensor(label))})["label"]
    assert not found.pending_operations
    assert torch.equal(found.as_tensor(), expected)


def test_ignored_voxels_are_no_foreground() -> None:
    label = volume(background=255)
    for ignored in (255, 2):  # also where the number of the ignored is below those of classes
        label[label > 1] = ignored
        with pytest.raises(ValueError, match=rf"where LesionIndicesd found a lesion, .* but got \[{ignored}\.0\]"):
            cropped(label, Flipd(KEYS, 0), ignore_index=ignored)
        assert len(cropped(label, ignore_index=ignored)) == 20


def test_maps_soft_labels_and_regions() -> None:
    hard = volume()
    maps = torch.cat([1 - hard, hard])
    soft = maps * 0.5 + 0.2  # 0.7 where the class is, 0.2 elsewhere
    overlapping = torch.cat([hard, hard * 0])  # without a map of the background
    for label, options in ((maps, {}), (soft, {}), (overlapping, {"labels": range(2)}), (maps, {"ignore_index": 5})):
        assert len(cropped(label, **options)) == 20
        with pytest.raises(ValueError, match="where LesionIndicesd found a lesion"):
            cropped(label, Flipd(KEYS, 1), **options)
    regions = ComponentRegionsd("label")
    assert len(cropped(hard, regions)) == 20
    with pytest.raises(ValueError, match="where LesionIndicesd found a lesion"):
        cropped(hard, Flipd(KEYS, 2), regions)


def test_what_moves_no_voxel_may_come_between() -> None:
    steps = [RandGaussianNoised("image", prob=1.0), RandShiftIntensityd("image", 1.0, prob=1.0)]
    for label in (volume(), volume(3)):
        merged = [lambda item: {**item, "label": (item["label"] > 0).float()}]  # classes merged to one
        for between in (steps, merged, [AsDiscreted("label", to_onehot=4)]):
            assert all(
                patch["label"][-1 if len(patch["label"]) == 1 else 1 :].sum() > 0 for patch in cropped(label, *between)
            )
    assert len(cropped(volume(), Flipd(KEYS, 0), pos=0, neg=1)) == 20  # no lesion is drawn


def test_a_source_of_lesions_that_was_moved_is_refused() -> None:
    item = {"image": volume(), "label": volume()}
    found = LesionIndicesd("label")(item)
    moved = Flipd(KEYS, 0)(found)
    target = {"image": torch.rand(1, *SHAPE), "label": torch.zeros(1, *SHAPE)}
    copy = RandCopyLesionsd(KEYS, "label", [moved], prob=1.0).set_random_state(0)
    with pytest.raises(
        ValueError, match=r"^Expected the voxel \([23], [23], [23]\), where LesionIndicesd found a lesion"
    ):
        copy(target)
    copy = RandCopyLesionsd(KEYS, "label", [found], prob=1.0).set_random_state(0)
    assert copy(target)["label"].sum() == 8
