"""Every transform takes NumPy arrays as it takes tensors, also flipped ones, whose strides are negative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from monai_iou import transforms
from monai_iou.planning.plan import Plan
from monai_iou.workflow.loading import LabelClassesd
from monai_iou.workflow.masks import ClassValuesd
from monai_iou.workflow.postprocessing import LabelsFromProbabilitiesd, Postprocessing
from monai_iou.workflow.targets import DrawnRaterd, LabelTargetsd, ScoredLabelsd

KEYS = ["image", "label"]
PLAN = Plan((), {0: "background", 1: "lesion"}, (), (), (), (), (), ignore=9)


def item(kind: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    image = np.random.default_rng(0).normal(size=(2, 12, 10, 8)).astype(np.float32)
    label = np.zeros((1, 12, 10, 8), np.int16)
    label[0, 2:4, 2:4, 2:4] = 1
    return {"image": kind(image), "label": kind(label)}


SOURCE = [item(np.asarray)]
RULES = [{"kind": "zscore"}, {"kind": "ct", "lower": -1, "upper": 1, "mean": 0, "std": 1}]
PUBLIC: dict[str, Callable[[], Any]] = {
    "ComponentRegionsd": lambda: transforms.ComponentRegionsd("label"),
    "LesionIndicesd": lambda: transforms.LesionIndicesd("label"),
    "NormalizeModalitiesd": lambda: transforms.NormalizeModalitiesd("image", RULES),
    "RandAffineElasticd": lambda: transforms.RandAffineElasticd(
        KEYS, 0.5, affine_prob=1.0, elastic_prob=1.0, mode=["bilinear", "nearest"]
    ),
    "RandCoarseElasticd": lambda: transforms.RandCoarseElasticd(KEYS, (3, 5), (20, 80), 1.0, ["bilinear", "nearest"]),
    "RandCopyLesionsd": lambda: transforms.RandCopyLesionsd(KEYS, "label", SOURCE, prob=1.0, image_threshold=-9),
    "RandCropByLesions": lambda: lambda item: {"image": crop_of(item)},
    "RandCropByLesionsd": lambda: transforms.RandCropByLesionsd(KEYS, "label", (4, 4, 4), 2),
    "ResampleSpacingd": lambda: transforms.ResampleSpacingd(KEYS, (2.0, 2.0, 2.0), mode=["bilinear", "nearest"]),
}
INTERNAL: dict[str, Callable[[], Any]] = {
    "ClassValuesd": lambda: ClassValuesd("label", [0, 70000]),
    "DrawnRaterd": lambda: DrawnRaterd("label", PLAN),
    "LabelClassesd": lambda: LabelClassesd("label", [0, 1]),
    "LabelTargetsd": lambda: LabelTargetsd("label", PLAN),
    "LabelsFromProbabilitiesd": lambda: LabelsFromProbabilitiesd("image", Postprocessing(0.5, (2.0,))),
    "ScoredLabelsd": lambda: ScoredLabelsd(["image", "label"], PLAN),
}


def crop_of(item: dict[str, Any]) -> torch.Tensor:
    crop = transforms.RandCropByLesions((4, 4, 4)).set_random_state(0)
    return crop(item["image"], item["label"])[0]


def run(make: Callable[[], Any], given: dict[str, Any]) -> list[dict[str, Any]]:
    transform = make()
    if hasattr(transform, "set_random_state"):
        transform.set_random_state(0)
    result = transform(given)
    return result if isinstance(result, list) else [result]


def test_no_transform_is_left_out() -> None:
    assert sorted(PUBLIC) == sorted(transforms.__all__)


@pytest.mark.filterwarnings("ignore:`data_array` is not of type MetaTensor:UserWarning")  # 1 mm is meant
@pytest.mark.parametrize("name", [*PUBLIC, *INTERNAL])
def test_arrays_give_what_tensors_give(name: str) -> None:
    make = {**PUBLIC, **INTERNAL}[name]
    mirrored = (lambda array: np.ascontiguousarray(array[:, ::-1])[:, ::-1]) if name in PUBLIC else np.asarray
    for expected, found, flipped in zip(
        *(run(make, item(kind)) for kind in (torch.as_tensor, np.asarray, mirrored)), strict=True
    ):
        for key in KEYS:
            if key in expected:
                values = np.asarray(torch.as_tensor(expected[key]))
                for array in (found[key], flipped[key]):
                    np.testing.assert_array_equal(np.asarray(torch.as_tensor(np.ascontiguousarray(array))), values)
                    assert str(array.dtype).rpartition(".")[2] == str(values.dtype)


def test_a_normalised_array_is_an_array_of_float32_and_the_input_stays() -> None:
    given = np.array([[0, 1, 3]], dtype=np.int16)
    for values in (given, given[:, ::-1][:, ::-1], given.astype(np.float32)):
        before = values.copy()
        found = transforms.NormalizeModalitiesd("image", [{"kind": "zscore"}])({"image": values})["image"]
        assert isinstance(found, np.ndarray)
        assert found.dtype == np.float32
        assert found.tolist() == [[0, -1, 1]]
        np.testing.assert_array_equal(values, before)
