"""The bundle's resampling: MONAI's own, whatever text the item holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd, Orientationd, Spacingd

from monai_iou.transforms import ResampleSpacingd


def test_resamples_and_inverts_as_monai_beside_text() -> None:
    affine = np.diag([1.0, 1.0, 3.0, 1.0])
    image = MetaTensor(torch.rand(1, 9, 8, 5), affine=affine, meta={"filename_or_obj": "a.nii.gz"})
    expected = Spacingd("image", pixdim=(1.5, 1.5, 1.5))({"image": image.clone()})["image"]
    resample = ResampleSpacingd("image", pixdim=(1.5, 1.5, 1.5))
    found = resample({"image": image.clone(), "image_path": "a.nii.gz"})
    assert found["image_path"] == "a.nii.gz"
    torch.testing.assert_close(found["image"].as_tensor(), expected.as_tensor())
    torch.testing.assert_close(found["image"].affine, expected.affine)
    assert resample.inverse(found)["image"].shape == image.shape


AFFINE = np.array([[0, 2.0, 0, -7], [-1.5, 0, 0, 30], [0, 0, 1.0, 5], [0, 0, 0, 1]])


def small(unit: float) -> MetaTensor:
    """An image whose voxels are 1.5, 2 and 1 of a unit that is so many mm."""
    affine = AFFINE.copy()
    affine[:3] *= unit
    image = torch.rand(1, 9, 8, 10, generator=torch.Generator().manual_seed(0))
    return MetaTensor(image, affine=torch.from_numpy(affine), meta={"filename_or_obj": "a.nii.gz"})


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("pixdim", [(1.0, 1.0, 1.0), (2.0, 1.6, 1.5), (1.5, 2.0, 1.0), (-1.0, 1.25, 1.0)])
@pytest.mark.parametrize("unit", [1e-1, 1e-2, 1e-3, 3e-4])
def test_voxels_of_micrometres_are_resampled_as_those_of_millimetres(
    unit: float, pixdim: tuple[float, ...], lazy: bool
) -> None:
    def resampled(unit: float, kind: type[Spacingd]) -> tuple[MetaTensor, MetaTensor, MetaTensor]:
        image = small(unit)
        given = image.affine.clone()
        size = [unit * side for side in pixdim]
        steps = [Orientationd("image", "RAS", labels=None), kind("image", pixdim=size, mode="bilinear")]
        chain = Compose(steps)
        item = chain({"image": image}, lazy=lazy)
        result = item["image"].clone()
        item["pred"] = MetaTensor(item["image"].as_tensor())
        prediction = Invertd("pred", transform=chain, orig_keys="image", nearest_interp=False)(item)["pred"]
        inverse = chain.inverse(item)["image"]
        torch.testing.assert_close(image.affine, given, rtol=0, atol=0)
        return result, inverse, prediction

    for found, expected in zip(resampled(unit, ResampleSpacingd), resampled(1.0, Spacingd), strict=True):
        torch.testing.assert_close(found.as_tensor(), expected.as_tensor(), rtol=1e-4, atol=1e-4)
        affine = expected.affine.clone()
        affine[:3] *= unit
        torch.testing.assert_close(found.affine, affine, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("unit", [1.0, 1e-3])
def test_the_record_of_an_operation_holds_the_affine_of_the_image(unit: float) -> None:
    image = small(unit)
    found = ResampleSpacingd("image", pixdim=[unit] * 3)({"image": image})["image"]
    torch.testing.assert_close(found.applied_operations[-1]["extra_info"]["src_affine"], image.affine)
    assert found.meta["filename_or_obj"] == "a.nii.gz"
    assert len(image.applied_operations) == 0
