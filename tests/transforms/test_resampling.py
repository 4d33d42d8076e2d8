"""The bundle's resampling: MONAI's own, whatever text the item holds."""

from __future__ import annotations

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Spacingd

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
