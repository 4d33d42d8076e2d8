"""What may not be read is named: a volume that is left out without notice makes counts and scores wrong."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest
from dicom_files import write_series
from ordinary_user import without_rights

from monai_iou.datasets.found_folders import read_found_cases, read_plain_cases
from monai_iou.datasets.label_counts import count_label_files
from monai_iou.evaluation.pairing import find_volumes
from monai_iou.volumes.names import is_volume, volumes_below
from monai_iou.volumes.reading import VolumeError, read_volume
from monai_iou.workflow.images import find_images

SLICES = np.arange(60, dtype=np.int16).reshape(5, 4, 3)


@pytest.fixture
def root() -> Iterator[Path]:
    """A folder that every user may enter, with the label maps of two sites."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        for site in "AB":
            path = folder / f"site{site}" / f"{site}.nii.gz"
            path.parent.mkdir()
            nibabel.save(nibabel.Nifti1Image(np.ones((2, 2, 2), np.uint8), np.eye(4)), path)
        yield folder


SEARCHES: dict[str, Callable[[Path], object]] = {
    "class weights": count_label_files,
    "evaluation": lambda folder: find_volumes(folder, "--references"),
    "prediction": lambda folder: find_images([folder], 1),
    "training": lambda folder: read_plain_cases(folder, folder),
    "search": lambda folder: list(volumes_below(folder)),
}


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("mode", [0o000, 0o444, 0o111])
def test_a_folder_that_may_not_be_read_or_entered_is_named(root: Path, search: str, mode: int) -> None:
    assert count_label_files(root).cases == ("A", "B")
    sentence = f"Expected `{root / 'siteB'}` to be readable, but got the error 'Permission denied': ask for the right"
    with without_rights(root / "siteB", mode), pytest.raises(VolumeError) as caught:
        SEARCHES[search](root)
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("mode", [0o000, 0o444])
def test_so_is_the_folder_that_was_named(root: Path, search: str, mode: int) -> None:
    with without_rights(root, mode), pytest.raises(VolumeError, match=f"`{root}` to be readable, but got the error"):
        SEARCHES[search](root)


def test_nnunets_folder_of_images_is_named(root: Path) -> None:
    (root / "imagesTr").mkdir()
    with without_rights(root / "imagesTr", 0o000), pytest.raises(VolumeError, match="imagesTr` to be readable, but"):
        read_found_cases({}, root, "Tr", 1)


def test_a_link_into_a_folder_that_may_not_be_entered_is_named(root: Path) -> None:
    (root / "siteA" / "more").symlink_to(root / "siteB" / "deep")
    with without_rights(root / "siteB", 0o000), pytest.raises(VolumeError, match="more` to be readable, but got"):
        list(volumes_below(root / "siteA"))


@pytest.mark.parametrize("name", [".trash", "lost+found", "System Volume Information"])
def test_folders_that_are_passed_over_need_no_rights(root: Path, name: str) -> None:
    (root / name).mkdir()
    with without_rights(root / name, 0o000):
        assert [path.name for path in volumes_below(root)] == ["A.nii.gz", "B.nii.gz"]


@pytest.mark.parametrize("name", ["2.dcm", "1.2.840.2"])
def test_a_slice_that_may_not_be_read_is_named(root: Path, name: str) -> None:
    folder = write_series(root / "series", SLICES)
    if name != "2.dcm":
        for file in list(folder.iterdir()):
            file.rename(folder / f"1.2.840.{file.stem}")
    read_volume(folder)
    with without_rights(folder / name, 0o000):
        assert is_volume(folder)
        with pytest.raises(VolumeError) as caught:
            read_volume(folder)
    assert name in str(caught.value)


def test_a_slice_that_is_a_link_into_a_folder_that_may_not_be_entered_is_named(root: Path) -> None:
    folder = write_series(root / "series", SLICES)
    (folder / "2.dcm").rename(root / "siteB" / "2.dcm")
    (folder / "2.dcm").symlink_to(root / "siteB" / "2.dcm")
    with without_rights(root / "siteB", 0o000), pytest.raises(VolumeError, match=r"2\.dcm` to be readable, but got"):
        read_volume(folder)


def test_a_text_that_may_not_be_read_hinders_nothing(root: Path) -> None:
    folder = write_series(root / "series", SLICES)
    (folder / "notes.txt").write_text("mine")
    with without_rights(folder / "notes.txt", 0o000):
        assert [path.name for path in volumes_below(root)] == ["series", "A.nii.gz", "B.nii.gz"]
        np.testing.assert_array_equal(read_volume(folder).array, SLICES)
