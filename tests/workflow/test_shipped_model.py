"""The trained model that is shipped: small, described, found by its name, and as good as its page says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from places import DATA, ROOT

from monai_iou.bundle_files import TRAINED_MODELS, bundle_path, copy_bundle, trained_model_path
from monai_iou.cli import main
from monai_iou.commands.predict import SHIPPED_MODELS

HIPPOCAMPUS = DATA / "Task904_Hippocampus"
MEGABYTES = 8e6


@pytest.mark.parametrize("name", TRAINED_MODELS)
def test_a_shipped_model_is_small_and_described(name: str) -> None:
    folder = trained_model_path(name)
    assert folder is not None
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < MEGABYTES
    assert {path.name for path in (folder / "models").iterdir()} >= {"model.pt", "model.json"}
    page = " ".join((folder / "README.md").read_text(encoding="utf-8").split())
    for word in ("CC BY-SA 4.0", "Medical Segmentation Decathlon", "Dice", "not for clinical use", f"predict {name}"):
        assert word in page


def test_the_page_of_the_bundle_shows_the_scores_of_the_shipped_model() -> None:
    folder = trained_model_path("hippocampus_mr")
    assert folder is not None
    pages = (folder / "README.md", bundle_path() / "docs" / "README.md")
    rows = [
        re.findall(r"^\| (?:anterior|posterior|mean of both) \|.*$", page.read_text(encoding="utf-8"), re.M)
        for page in pages
    ]
    assert len(rows[0]) == 3
    assert rows[0] == rows[1]


def test_the_command_knows_the_shipped_models() -> None:
    assert SHIPPED_MODELS == TRAINED_MODELS


def test_only_names_of_shipped_models_are_found() -> None:
    assert trained_model_path("liver_ct") is None
    assert trained_model_path("../small_foreground_segmentation") is None


def test_a_copy_of_the_bundle_has_no_model(tmp_path: Path) -> None:
    assert not list(copy_bundle(tmp_path / "mine").rglob("*.pt"))
    assert not (bundle_path() / "models" / "model.pt").exists()


def test_a_scan_is_segmented_on_its_own_grid_by_the_name_of_the_model(tmp_path: Path) -> None:
    affine = np.array([[0, 0, 1.2, 5], [-0.9, 0, 0, 7], [0, 1.1, 0, 9], [0, 0, 0, 1]])
    image = np.random.default_rng(0).normal(100, 20, (39, 31, 45)).astype(np.float32)
    nib.save(nib.Nifti1Image(image, affine), tmp_path / "scan.nii.gz")
    assert main(["predict", "hippocampus_mr", str(tmp_path / "scan.nii.gz"), "--output", str(tmp_path / "masks")]) == 0
    mask = nib.load(tmp_path / "masks" / "scan.nii.gz")
    np.testing.assert_allclose(mask.affine, affine, atol=1e-5)
    assert mask.shape == image.shape
    assert set(np.unique(mask.dataobj)) <= {0, 1, 2}


def test_a_folder_of_the_user_comes_before_a_shipped_model_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hippocampus_mr").mkdir()
    assert main(["predict", "hippocampus_mr", str(tmp_path)]) == 1
    assert "Expected hippocampus_mr to hold a trained model" in capsys.readouterr().err


@pytest.mark.real_data
@pytest.mark.skipif(not HIPPOCAMPUS.is_dir(), reason=f"no {HIPPOCAMPUS}")
def test_held_out_volumes_are_segmented_as_the_page_says(tmp_path: Path) -> None:
    cases = json.loads((HIPPOCAMPUS / "dataset.json").read_text())["test_labelled"][:6]
    trained = json.loads((ROOT / "bundles" / "hippocampus_mr" / "models" / "model.json").read_text())["trained"]
    images = [HIPPOCAMPUS / case["image"] for case in cases]
    assert not {image.name.removesuffix(".nii.gz") for image in images} & set(trained)
    assert main(["predict", "hippocampus_mr", *map(str, images), "--output", str(tmp_path)]) == 0
    scores = []
    for case, image in zip(cases, images, strict=True):
        mask, reference = (
            np.asarray(nib.load(path).dataobj) for path in (tmp_path / image.name, HIPPOCAMPUS / case["label"])
        )
        for label in (1, 2):
            found, wanted = mask == label, reference == label
            scores.append(2 * (found & wanted).sum() / (found.sum() + wanted.sum()))
    assert np.mean(scores) > 0.83
