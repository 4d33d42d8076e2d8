"""Image and label that were taken for one grid are prepared as one grid, however their headers are rounded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data.meta_tensor import MetaTensor
from monai.transforms import Compose
from PIL import Image

from monai_iou.bundle_files import bundle_path
from monai_iou.transforms.label_loading import LoadLabeld
from monai_iou.workflow.data import BundleCases
from monai_iou.workflow.loading import LabelReader

VALUES = {"0": "background", "1": "lesion"}


def turned(degrees: float) -> np.ndarray:
    angle, affine = np.radians(degrees), np.eye(4)
    affine[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return affine


def thick(spacing: float) -> np.ndarray:
    return np.diag([1.0, 1.0, spacing, 1.0])


THICK = (thick(6), thick(6.01), (16, 16, 10), [1, 1, 4])
TURNED = (turned(44.999), turned(45.001), (16, 12, 10), [1, 1, 1])


def save(path: Path, array: np.ndarray, affine: np.ndarray) -> str:
    nib.save(nib.Nifti1Image(array, affine), path)
    return path.name


def dataset(
    root: Path, affine: np.ndarray, label_affine: np.ndarray, shape: tuple[int, ...], kind: str = "plain"
) -> Path:
    """One case whose image is 1 where its label is, as one file each, or as several channels or raters."""
    mask = np.zeros(shape, np.uint8)
    mask[3:7, 5:9, 2:4] = mask[11:, 2:4, -2:] = 1
    soft = kind == "soft"
    label = mask.astype(np.float32) if soft else mask
    images = [save(root / f"c{k}.nii.gz", mask.astype(np.float32), affine) for k in range(1 + (kind == "channels"))]
    labels = [save(root / f"l{k}.nii.gz", label, label_affine) for k in range(1 + (kind == "raters"))]
    pair = {"image": images if kind == "channels" else images[0], "label": labels if kind == "raters" else labels[0]}
    content = {"modality": {str(k): "MRI" for k in range(len(images))}, "labels": VALUES, "training": [pair]}
    (root / "dataset.json").write_text(json.dumps({**content, "soft_labels": soft}))
    return root


def prepared(root: Path, pixdim: list[float], part: str = "train#deterministic_transforms") -> dict[str, Any]:
    """The item after the bundle's transforms that are not random, its image not normalised."""
    parser = ConfigParser(ConfigParser.load_config_file(bundle_path() / "configs" / "train.json"))
    cases = BundleCases(str(root), val_fraction=0)
    plan = cases.plan([8, 8, 8], pixdim, base_channels=4)
    parser["plan"] = plan
    parser["train"]["deterministic_transforms"] = [
        each for each in parser["train"]["deterministic_transforms"] if "Normalize" not in each["_target_"]
    ]
    content = parser.get_parsed_content(part)
    item = (Compose(content) if isinstance(content, list) else content)(cases.training[0])
    assert isinstance(item, dict)
    return item


@pytest.mark.parametrize("kind", ["plain", "channels", "raters", "soft"])
@pytest.mark.parametrize("given", [THICK, TURNED], ids=["thick slices", "turned by 45 degrees"])
def test_a_label_is_prepared_on_the_grid_of_its_image(tmp_path: Path, given: Any, kind: str) -> None:
    affine, label_affine, shape, pixdim = given
    item = prepared(dataset(tmp_path, affine, label_affine, shape, kind), pixdim)
    image, label = item["image"][0], item["label"][-1].float()
    assert image.shape == label.shape
    assert label.sum() > 50
    # The image is interpolated linearly and most labels are not: they agree where the mask is, up to its rim.
    assert torch.equal(image > 0.5, label > 0.5)


def test_validation_prepares_them_likewise(tmp_path: Path) -> None:
    affine, label_affine, shape, pixdim = THICK
    item = prepared(dataset(tmp_path, affine, label_affine, shape), pixdim, "validate#preprocessing")
    assert torch.equal(item["image"][0] > 0.5, item["label"][0] > 0)


def test_pictures_need_no_header(tmp_path: Path) -> None:
    mask = np.zeros((20, 16), np.uint8)
    mask[4:9, 3:7] = 1
    for part, scale in (("images", 255), ("labels", 1)):
        (tmp_path / part).mkdir()
        Image.fromarray(mask * scale).save(tmp_path / part / "a.png")
    item = prepared(tmp_path, [1, 1, 1])
    assert torch.equal(item["image"][0] > 100, item["label"][0] > 0)


def test_a_label_on_another_grid_keeps_its_own(tmp_path: Path) -> None:
    path = tmp_path / "label.nii.gz"
    save(path, np.zeros((4, 5, 6), np.uint8), thick(3))
    load = LoadLabeld("label", reader=LabelReader, dtype=None)
    for affine, shape in ((thick(2), (4, 5, 6)), (thick(3.001), (4, 5, 7))):
        image = MetaTensor(torch.zeros(shape), affine=affine, meta={"spatial_shape": np.array(shape)})
        assert load({"image": image, "label": path})["label"].affine[2, 2] == 3
    assert load({"label": path})["label"].affine[2, 2] == 3
    assert load({"image": torch.zeros(4, 5, 6), "label": path})["label"].affine[2, 2] == 3
