"""nnU-Net's folders: every volume in them belongs to a case, or is refused in one sentence that says why."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from places import DOCS

from monai_iou.datasets.cases import DatasetError
from monai_iou.datasets.folder import read_folder
from monai_iou.datasets.found_folders import read_plain_cases


def nnunet(root: Path, *files: str, **content: Any) -> Path:
    """Two training cases of one channel and a test image, and more files; all are empty, as none is opened."""
    usual = ("imagesTr/a_0000", "labelsTr/a", "imagesTr/b_0000", "labelsTr/b", "imagesTs/c_0000")
    for name in (*(f"{name}.nii.gz" for name in usual), *files):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    described = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "x": 1}, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps({**described, **content}))
    return root


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            "labelsTr/d.nii.gz",
            "Expected an image for {root}/labelsTr/d.nii.gz at {root}/imagesTr/d_0000.nii.gz, but there is none: add "
            "or move one.",
        ),
        (
            "labelsTs/d.nii.gz",
            "Expected an image for {root}/labelsTs/d.nii.gz at {root}/imagesTs/d_0000.nii.gz, but there is none: add "
            "or move one.",
        ),
        (
            "imagesTr/a_0001.nii.gz",
            "Expected {root}/imagesTr to have one file for the only channel of a case, but a_0001.nii.gz is there "
            "too: name its channel in `channel_names` in dataset.json, or move the file.",
        ),
        ("imagesTs/c_0001.nii.gz", "Expected {root}/imagesTs to have one file for the only channel of a case, but"),
        (
            "imagesTr/d_0000.nii",
            "Expected {root}/imagesTr/d_0000.nii to be called CASE_0000.nii.gz, as `file_ending` in dataset.json says, "
            "but it is not: correct `file_ending`, or rename or move the file.",
        ),
        ("imagesTr/d.nii.gz", "Expected {root}/imagesTr/d.nii.gz to be called CASE_0000.nii.gz, as `file_ending` in"),
        ("imagesTr/d_0000.NII.GZ", "Expected {root}/imagesTr/d_0000.NII.GZ to be called CASE_0000.nii.gz, as"),
        ("labelsTr/a.mha", "Expected {root}/labelsTr/a.mha to be called CASE.nii.gz, as `file_ending` in dataset.json"),
    ],
)
def test_a_volume_of_no_case_is_refused(file: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=f"^{re.escape(message.format(root=tmp_path))}"):
        read_folder(nnunet(tmp_path, file))


@pytest.mark.parametrize("ending", [".nii", "nii.gz", ".mha", ".png", None])
def test_an_ending_that_no_file_has_is_named(ending: str | None, tmp_path: Path) -> None:
    message = f"{tmp_path}/imagesTr/a_0000.nii.gz to be called CASE_0000{ending}, as `file_ending` in dataset.json says"
    with pytest.raises(DatasetError, match=re.escape(message)):
        read_folder(nnunet(tmp_path, file_ending=ending))


@pytest.mark.parametrize("ending", [".tif", ".JPG"])
def test_an_ending_of_pictures_is_refused(ending: str, tmp_path: Path) -> None:
    nnunet(tmp_path, file_ending=ending)
    for file in [*tmp_path.glob("*/*.nii.gz")]:
        file.rename(file.with_name(file.name.removesuffix(".nii.gz") + ending))
    message = (
        f"Expected `file_ending` in {tmp_path}/dataset.json to be that of a format that states the spacing in mm, but "
        f"got {ending}: convert the files to .nii.gz, and correct `file_ending`."
    )
    with pytest.raises(DatasetError, match=f"^{re.escape(message)}$"):
        read_folder(tmp_path)


@pytest.mark.parametrize("ending", [".nii", ".MHA", ".nhdr", ".hdr", "_x.nii.gz", ".gipl"])
def test_every_ending_of_a_volume_may_be_named(ending: str, tmp_path: Path) -> None:
    nnunet(tmp_path, file_ending=ending)
    for file in [*tmp_path.glob("*/*.nii.gz")]:
        file.rename(file.with_name(file.name.removesuffix(".nii.gz") + ending))
    assert [case.name for case in read_folder(tmp_path).training] == ["a", "b"]


def test_files_that_are_no_volumes_of_the_dataset_are_passed_over(tmp_path: Path) -> None:
    others = ["imagesTr/._d_0000.nii.gz", "labelsTr/.d.nii.gz", "imagesTr/notes.txt", "labelsTr/a.png"]
    results = ["imagesTs/c_mask.nii.gz", "imagesTs/c_probabilities.nii.gz", "imagesTs/c_preview.png"]
    folder = read_folder(nnunet(tmp_path, *others, *results, "left_out/d_0000.nii.gz", "labelsTs/c.nii.gz"))
    assert [case.name for case in folder.training] == ["a", "b"]
    assert [case.name for case in folder.test] == [case.name for case in folder.evaluation] == ["c"]


@pytest.mark.parametrize("label", ["labelsTr/a.nii.gz", "labelsTs/c.nii.gz"])
def test_a_label_whose_link_leads_nowhere_is_missed(label: str, tmp_path: Path) -> None:
    """A test case would be segmented and not scored."""
    nnunet(tmp_path, "labelsTs/c.nii.gz")
    (tmp_path / label).unlink()
    (tmp_path / label).symlink_to(tmp_path / "nowhere.nii.gz")
    name = Path(label).name[0]
    message = (
        f"Expected the label of {name} at {tmp_path / label}, but there is no such file: add it or move the image."
    )
    with pytest.raises(DatasetError, match=f"^{re.escape(message)}$"):
        read_folder(tmp_path)


def test_folders_without_training_cases_are_named(tmp_path: Path) -> None:
    nnunet(tmp_path)
    for name in ("imagesTr/a_0000", "labelsTr/a", "imagesTr/b_0000", "labelsTr/b"):
        (tmp_path / f"{name}.nii.gz").unlink()
    folder = read_folder(tmp_path)  # there may be images to segment only
    assert [case.name for case in folder.test] == ["c"]
    message = f"Expected {tmp_path}/imagesTr to hold images with labels, but it has none: add at least one pair."
    with pytest.raises(DatasetError, match=f"^{re.escape(message)}$"):
        folder.need_training()


def plain(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}.nii.gz").touch()
    return root


def test_a_plain_pair_with_channels_in_files_is_told_to_have_a_description(tmp_path: Path) -> None:
    plain(tmp_path, "images/c_0000", "images/c_0001", "labels/c")
    message = (
        f"Expected one image for the label c, as the folder has no dataset.json, but got {tmp_path}/images/c_0001."
        "nii.gz too, which has the name of a further channel: write a dataset.json that lists the channels, as "
        "docs/bundle.md shows, or move the file."
    )
    with pytest.raises(DatasetError, match=f"^{re.escape(message)}$"):
        read_folder(tmp_path)


def test_a_numbered_case_without_a_label_is_no_channel(tmp_path: Path) -> None:
    plain(tmp_path, "images/c_0000", "images/c_0001", "labels/c_0000")
    with pytest.raises(DatasetError, match=r"^Expected a label for .*c_0001\.nii\.gz in .*: add or rename it\.$"):
        read_folder(tmp_path)


def touch(root: Path, *files: str) -> Path:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


FORMATS = (
    "to be a NIfTI, MetaImage or NRRD file, or a PNG where all files of its folder are, but it is not: convert it to "
    ".nii.gz or, if all are pictures, to .png, or move it elsewhere."
)
UP = (
    "move its files up, an image and its label under one name, write a dataset.json that lists them, as "
    "docs/bundle.md shows, or move the folder elsewhere if they are not meant."
)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("images/a.mgz", "labels/a.mgz"), f"Expected {{}}/images/a.mgz {FORMATS}"),
        (("images/a.tif", "labels/a.tif"), f"Expected {{}}/images/a.tif {FORMATS}"),
        (("images/a.jpg", "masks/a.png"), f"Expected {{}}/images/a.jpg {FORMATS}"),
        (("images/a.png", "masks/a.TIF"), f"Expected {{}}/masks/a.TIF {FORMATS}"),
        (("images/a.jpg", "masks/b.tif"), f"Expected {{}}/images/a.jpg {FORMATS}"),
        (
            ("images/a.nii.gz", "images/b.mgz", "labels/a.nii.gz", "labels/b.mgz"),
            f"Expected {{}}/images/b.mgz {FORMATS}",
        ),
        (
            ("images/a.nii", "images/b_0000.mgz", "labels/a.nii", "labels/b.nii"),
            f"Expected {{}}/images/b_0000.mgz {FORMATS}",
        ),
        (("images/a.nii", "images/b.png", "labels/a.nii", "labels/b.png"), f"Expected {{}}/images/b.png {FORMATS}"),
        (
            ("images/p/t1.nii.gz", "labels/p/seg.nii.gz"),
            f"Expected {{}}/images to hold the volumes themselves, but got the folder p: {UP}",
        ),
        (
            ("images/a.nii.gz", "images/p/t1.nii.gz", "labels/a.nii.gz", "labels/p/seg.nii.gz"),
            f"Expected {{}}/images to hold the volumes themselves, but got the folder p: {UP}",
        ),
        (
            ("images/p.nii.gz", "labels/p/seg.nii.gz"),
            f"Expected {{}}/labels to hold the volumes themselves, but got the folder p: {UP}",
        ),
        (
            ("images/notes.txt", "labels/notes.txt"),
            "Expected {}/images to hold images with labels, but it has none: add at least one pair.",
        ),
    ],
)
def test_a_plain_pair_that_is_not_read_is_named(files: tuple[str, ...], message: str, tmp_path: Path) -> None:
    touch(tmp_path, *files)
    with pytest.raises(DatasetError) as caught:
        read_folder(tmp_path)
    assert str(caught.value) == message.format(tmp_path)


def test_notes_beside_a_plain_pair_are_passed_over(tmp_path: Path) -> None:
    """A picture or a copy in another format of what is read, and what only one of the folders has."""
    cases = touch(tmp_path, "images/a_0000.nii.gz", "images/a.jpg", "labels/a.nii.gz", "labels/a.mgz", "labels/a.png")
    touch(tmp_path, "images/overview.png", "images/old/b.nii.gz", "images/drafts/readme", "labels/drafts/readme")
    assert [case.name for case in read_plain_cases(cases / "images", cases / "labels")] == ["a"]


def test_a_folder_without_a_description_is_told_how_to_get_one(tmp_path: Path) -> None:
    touch(tmp_path, "case_00000/imaging.nii.gz", "case_00000/segmentation.nii.gz")
    with pytest.raises(DatasetError) as caught:
        read_folder(tmp_path)
    assert str(caught.value) == (
        f"Expected {tmp_path}/dataset.json to exist, but it does not: write one that lists the files, as "
        "docs/bundle.md shows, or name a folder in the Decathlon's or nnU-Net v2's layout, or one with the folders "
        "images and labels."
    )


def test_the_descriptions_of_the_page_are_read(tmp_path: Path) -> None:
    page = (DOCS / "bundle.md").read_text(encoding="utf-8").split("## The dataset folder")[0]
    single, several = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    plain(tmp_path, *(f"{part}/{name}" for part in ("images", "labels") for name in "ab"))
    plain(tmp_path, *(f"images/{name}_{channel:04d}" for name in "ab" for channel in range(2)))
    for text, modalities in ((single, ("CT",)), (several, ("T1", "FLAIR"))):
        (tmp_path / "dataset.json").write_text(text)
        folder = read_folder(tmp_path)
        assert folder.modalities == modalities
        assert [len(case.images) for case in folder.training] == [len(modalities)] * 2


@pytest.mark.parametrize("ending", ["_preview.png", "_probabilities.npz", ".png"])
def test_results_and_pictures_of_a_plain_pair_are_passed_over(ending: str, tmp_path: Path) -> None:
    root = touch(tmp_path, *(f"{folder}/a{each}" for folder in ("images", "labels") for each in (".nii.gz", ending)))
    assert [case.name for case in read_plain_cases(root / "images", root / "labels")] == ["a"]
