"""`monai-iou predict` on a small model: where masks go, in which format, and what is never replaced."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from monai_iou.cli import main
from monai_iou.volumes.reading import read_channels, read_labels, read_volume
from monai_iou.workflow.mask_formats import write_with_itk
from monai_iou.workflow.prediction import find_models


@pytest.fixture(scope="module")
def scan(data: Path) -> Path:
    return next(iter(sorted((data / "imagesTs").glob("*.nii.gz"))))


def predict(*words: object) -> int:
    return main(["predict", *map(str, words)])


def test_a_mask_lies_beside_its_image_and_nothing_is_replaced(
    folds: Path, scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = Path(shutil.copy(scan, tmp_path / "my scan.nii.gz"))
    before = image.read_bytes()
    assert predict(folds / "fold0", image, "--preview", "--save-probabilities") == 0
    printed = capsys.readouterr().out
    assert image.read_bytes() == before
    mask = tmp_path / "my scan_mask.nii.gz"
    for path in (mask, tmp_path / "my scan_probabilities.nii.gz", tmp_path / "my scan_preview.png"):
        assert f"Written: {path}\n" in printed
        assert path.is_file()
    assert f"""--images "['{image}']" --ckpt_dir {folds}/fold0""" in printed
    header, found = nib.load(image), nib.load(mask)
    np.testing.assert_array_equal(found.affine, header.affine)
    assert found.shape == header.shape
    probabilities = read_channels([tmp_path / "my scan_probabilities.nii.gz"]).array
    np.testing.assert_allclose(probabilities.sum(0), 1, atol=1e-5)
    assert np.array_equal(probabilities.argmax(0), read_labels(mask).array)

    stamp = mask.read_bytes()
    assert predict(folds / "fold0", image) == 1
    assert "add --overwrite to replace it" in capsys.readouterr().err
    assert mask.read_bytes() == stamp


def test_a_folder_of_formats_goes_to_a_folder_of_the_same_formats(folds: Path, scan: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    volume = read_volume(scan)
    write_with_itk(volume.array.astype(np.float32), volume.grid.affine, images / "a.mha")
    write_with_itk(volume.array.astype(np.float32), volume.grid.affine, images / "b.nrrd")
    shutil.copy(scan, images / "c_0000.nii.gz")
    output = tmp_path / "masks"
    # `folds` keeps its models in fold0 and fold1 themselves, as trainings by the bundle's own keys may
    for fold in (0, 1):
        shutil.copytree(folds / f"fold{fold}", tmp_path / "run" / f"fold{fold}" / "models")
    assert predict(tmp_path / "run", images, "--output", output, "--format", "same", "--folds", "all") == 0
    assert sorted(path.name for path in output.iterdir()) == ["a.mha", "b.nrrd", "c.nii.gz"]
    masks = [read_labels(path) for path in sorted(output.iterdir())]
    assert all(np.array_equal(mask.array, masks[0].array) for mask in masks)
    for mask in masks:
        np.testing.assert_allclose(mask.grid.affine, volume.grid.affine, atol=1e-5)


def test_the_folder_of_the_images_is_refused_for_the_masks(
    folds: Path, scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = Path(shutil.copy(scan, tmp_path / "scan.nii.gz"))
    before = image.read_bytes()
    assert predict(folds / "fold0", image, "--output", tmp_path, "--overwrite") == 1
    assert "Expected `--output` to be apart from the images" in capsys.readouterr().err
    assert image.read_bytes() == before


def test_what_is_no_run_or_no_image_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(tmp_path / "nowhere", tmp_path) == 2
    assert predict(tmp_path, tmp_path / "nothing.nii.gz") == 2
    assert predict(tmp_path, tmp_path) == 1
    errors = capsys.readouterr().err
    assert "Expected RUN to be the folder of a training" in errors
    assert "but there is no `" in errors
    assert "train one by `monai-iou train`" in errors


def test_the_models_of_chosen_folds(folds: Path, tmp_path: Path) -> None:
    for fold in (0, 1, 10):
        shutil.copytree(folds / "fold0", tmp_path / f"fold{fold}" / "models")
    assert [path.parent.parent.name for path in find_models(tmp_path).files] == ["fold0", "fold1", "fold10"]
    assert [path.parent.parent.name for path in find_models(tmp_path, "10,0").files] == ["fold10", "fold0"]
    with pytest.raises(ValueError, match=r"a model of fold 2, but it has 0, 1, 10: train it or leave it out\.$"):
        find_models(tmp_path, "2")
    with pytest.raises(ValueError, match="all or numbers of folds"):
        find_models(tmp_path, "first")
