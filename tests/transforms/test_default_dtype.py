"""Every transform gives the same whatever dtype and device torch makes tensors in by default."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from default_dtype import default_dtype
from monai.data.meta_tensor import MetaTensor
from monai.transforms.spatial.dictionary import RandAffined
from monai.transforms.utils import create_rotate, create_scale, create_shear, create_translate

from monai_iou import transforms
from monai_iou.transforms import RandAffineElasticd

KEYS = ["image", "label"]
MODES = ["bilinear", "nearest"]
SIZE = (12, 10, 8)
RULES = [{"kind": "zscore"}, {"kind": "ct", "lower": -1, "upper": 1, "mean": 0, "std": 1}]
AFFINE: dict[str, Any] = {
    "rotate_range": (0.3, 0.2, 0.4),
    "shear_range": (0.1,) * 6,
    "translate_range": (2.0, 2.0, 1.0),
    "scale_range": (0.2, 0.2, 0.2),
}
TRANSFORMS: dict[str, Callable[[], Any]] = {
    "ComponentRegionsd": lambda: transforms.ComponentRegionsd("label", num_classes=3),
    "LesionIndicesd": lambda: transforms.LesionIndicesd("label"),
    "NormalizeModalitiesd": lambda: transforms.NormalizeModalitiesd("image", RULES),
    "RandAffineElasticd": lambda: RandAffineElasticd(KEYS, **AFFINE, affine_prob=1.0, elastic_prob=1.0, mode=MODES),
    "RandCoarseElasticd": lambda: transforms.RandCoarseElasticd(KEYS, (3, 5), (20, 80), 1.0, MODES),
    "RandCopyLesionsd": lambda: transforms.RandCopyLesionsd(KEYS, "label", [item(torch.as_tensor)], prob=1.0),
    "RandCropByLesions": lambda: lambda item: {"image": crop_of(item)},
    "RandCropByLesionsd": lambda: transforms.RandCropByLesionsd(KEYS, "label", (4, 4, 4), 2),
    "ResampleSpacingd": lambda: transforms.ResampleSpacingd(KEYS, (1.5, 2.0, 0.7), mode=MODES),
}


def item(kind: Callable[[Any], Any]) -> dict[str, Any]:
    image = np.random.default_rng(0).normal(size=(2, *SIZE)).astype(np.float32)
    label = np.zeros((1, *SIZE), np.float32)
    label[0, 2:4, 2:4, 2:4], label[0, 8:10, 6:9, 5:7] = 1, 2
    return {"image": kind(image), "label": kind(label)}


def crop_of(item: dict[str, Any]) -> torch.Tensor:
    crop = transforms.RandCropByLesions((4, 4, 4)).set_random_state(0)
    return crop(torch.as_tensor(item["image"]), item["label"])[0]


def with_meta(values: Any) -> MetaTensor:
    return MetaTensor(torch.as_tensor(values), affine=torch.diag(torch.tensor([1.0, 2.0, 3.0, 1.0]).double()))


def run(name: str, kind: Callable[[Any], Any]) -> Any:
    transform = TRANSFORMS[name]()
    if hasattr(transform, "set_random_state"):
        transform.set_random_state(0)
    return transform(item(kind))


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list):
        for each in zip(found, expected, strict=True):
            assert_same(*each)
        return
    if isinstance(expected, MetaTensor):
        torch.testing.assert_close(found.affine, expected.affine, rtol=0, atol=0)
        found, expected = found.as_tensor(), expected.as_tensor()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_no_transform_is_left_out() -> None:
    assert sorted(TRANSFORMS) == sorted(transforms.__all__)


@pytest.mark.filterwarnings("ignore:`data_array` is not of type MetaTensor:UserWarning")  # 1 mm is meant
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [torch.as_tensor, np.asarray, with_meta], ids=["tensor", "array", "meta"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_it_changes_nothing(name: str, kind: Callable[[Any], Any], dtype: torch.dtype) -> None:
    expected = run(name, kind)
    with default_dtype(dtype):
        found = run(name, kind)
    assert_same(found, expected)


@pytest.mark.parametrize(
    "name", sorted({*TRANSFORMS} - {"RandCropByLesions", "RandCropByLesionsd", "ResampleSpacingd"})
)
def test_nothing_is_made_on_the_default_device(name: str) -> None:
    """Where MONAI's own parts allow it, which crop and resample."""
    expected = run(name, torch.as_tensor)
    transform, given = TRANSFORMS[name](), item(torch.as_tensor)
    if hasattr(transform, "set_random_state"):
        transform.set_random_state(0)
    with torch.device("meta"):
        found = transform(given)
    assert_same(found, expected)


def test_a_plain_image_is_still_said_to_have_no_affine() -> None:
    with pytest.warns(UserWarning, match="`data_array` is not of type MetaTensor, assuming affine to be identity"):
        transforms.ResampleSpacingd("image", 2.0)({"image": torch.zeros(1, 4, 4, 4)})


@pytest.mark.parametrize("left_out", [(), ("shear_range",), ("rotate_range", "translate_range"), tuple(AFFINE)])
def test_the_matrix_is_that_of_rand_affined_in_double_precision(left_out: tuple[str, ...]) -> None:
    given = {name: value for name, value in AFFINE.items() if name not in left_out}
    draw = RandAffineElasticd("image", **given, affine_prob=1.0).set_random_state(3)
    oracle = RandAffined("image", prob=1.0, **given).rand_affine.rand_affine_grid
    oracle.set_random_state(3).randomize()
    expected = np.eye(4)
    for make, values in (
        (create_rotate, oracle.rotate_params),
        (create_shear, oracle.shear_params),
        (create_translate, oracle.translate_params),
        (create_scale, oracle.scale_params),
    ):
        expected = expected @ np.asarray(make(3, values)) if values else expected
    found = draw._matrix(SIZE)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-7)
    oracle.set_random_state(3)(SIZE, lazy=True)
    np.testing.assert_allclose(found, oracle.get_transformation_matrix(), rtol=0, atol=1e-6)
