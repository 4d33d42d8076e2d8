from __future__ import annotations

import os
import tempfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from dicom_files import write_directory
from test_volumes_reading import write_dicom

from monai_iou.volumes import names as names_of_volumes
from monai_iou.volumes.names import RESULTS, case_name, find_spelling, is_volume, results_among, volumes_below
from monai_iou.volumes.reading import VolumeError, file_hash, read_channels, read_volume
from monai_iou.workflow.images import find_images
from monai_iou.workflow.mask_formats import write_with_itk

JUNK = b"\0\5\x16\7" + bytes(4000)  # what macOS keeps in ._x


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in volumes_below(folder)]


def test_hidden_entries_are_passed_over(tmp_path: Path) -> None:
    for name in (
        "a.nii.gz",
        "._a.nii.gz",
        ".ipynb_checkpoints/a-checkpoint.nii.gz",
        "sub/b.mha",
        "sub/.c.mha",
        "x.txt",
    ):
        touch(tmp_path / name)
    assert names(tmp_path) == ["a.nii.gz", "sub/b.mha"]


def test_linked_folders_are_followed_and_loops_end(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere/b.nii")
    touch(tmp_path / "root/a.nii")
    (tmp_path / "root/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/self").symlink_to(tmp_path / "root")
    (tmp_path / "elsewhere/up").symlink_to(tmp_path / "root")
    (tmp_path / "root/gone").symlink_to(tmp_path / "nowhere")
    assert names(tmp_path / "root") == ["a.nii", "more/b.nii"]


def test_upper_case_extensions_and_pairs(tmp_path: Path) -> None:
    for name in ("A.NII.GZ", "b.Nii", "c.NRRD", "d.hdr", "d.img"):
        touch(tmp_path / name)
    assert names(tmp_path) == ["A.NII.GZ", "b.Nii", "c.NRRD", "d.hdr"]
    assert [case_name(Path(name)) for name in ("A.NII.GZ", "a.b.nii", "d.img", "e.txt", ".nii")] == [
        "A", "a.b", "d", "e.txt", ".nii",
    ]  # fmt: skip


def test_two_spellings_of_one_name_are_one_case(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "Müller") for form in ("NFC", "NFD"))
    assert case_name(Path(f"{decomposed}.nii")) == composed
    file = touch(tmp_path / f"{decomposed}.nii")
    assert find_spelling(tmp_path / f"{composed}.nii") == file
    assert find_spelling(file) == file
    assert find_spelling(tmp_path / "other.nii") is None


@pytest.mark.parametrize("asked", range(8))
@pytest.mark.parametrize("stored", range(8))
def test_each_name_of_a_path_may_be_in_a_form_of_its_own(tmp_path: Path, stored: int, asked: int) -> None:
    def path(forms: int) -> Path:
        parts = [
            unicodedata.normalize("NFC" if forms >> k & 1 else "NFD", name)
            for k, name in enumerate(("Köln", "Größe", "Müller.nii"))
        ]
        return tmp_path.joinpath(*parts)

    file = touch(path(stored))
    assert find_spelling(path(asked)) == file
    assert find_spelling(path(asked).parent / "other.nii") is None
    assert find_spelling(path(asked).parent.parent / "other" / file.name) is None


def test_names_that_are_not_utf8_are_read_in_every_format(tmp_path: Path) -> None:
    import SimpleITK

    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    for extension in ("nii.gz", "mha", "nrrd"):
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array.transpose()), str(tmp_path / f"x.{extension}"))
        odd = os.fsencode(tmp_path) + b"/M\xf6ller." + extension.encode()
        (tmp_path / f"x.{extension}").rename(Path(os.fsdecode(odd)))
        np.testing.assert_array_equal(read_volume(Path(os.fsdecode(odd))).array, array)
        assert len(file_hash(Path(os.fsdecode(odd)))) == 64
    write_dicom(tmp_path / "series", array)
    odd_folder = (tmp_path / "series").rename(Path(os.fsdecode(os.fsencode(tmp_path) + b"/s\xf6rie")))
    np.testing.assert_array_equal(read_volume(odd_folder).array, array)


def test_simpleitk_gets_names_in_utf8_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends the process at others."""
    import SimpleITK

    def only_utf8(call: Callable[..., Any], place: int) -> Callable[..., Any]:
        def checked(*arguments: Any, **options: Any) -> Any:
            arguments[place].encode("utf-8")
            return call(*arguments, **options)

        return checked

    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/M\xf6ller"))
    folder.mkdir()
    colours = np.random.default_rng(0).integers(0, 60000, (6, 5, 3)).astype(np.uint16)
    image = SimpleITK.GetImageFromArray(colours[..., :2].astype(np.int16))
    image.SetSpacing((0.5, 0.75, 2))
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(colours, isVector=True), str(tmp_path / "c.png"))
    SimpleITK.WriteImage(image, str(tmp_path / "c.gipl"))
    SimpleITK.WriteImage(image, str(tmp_path / "c.tif"))
    read = {name: read_channels([tmp_path / name]) for name in ("c.png", "c.gipl")}
    for name in ("c.png", "c.gipl", "c.tif"):
        (tmp_path / name).rename(folder / name)
    reader = SimpleITK.ImageFileReader
    for owner, name, place in (
        (SimpleITK, "WriteImage", 1),
        (SimpleITK, "ReadImage", 0),
        (reader, "GetImageIOFromFileName", 0),
        (reader, "SetFileName", 1),
    ):
        made = only_utf8(getattr(owner, name), place)
        monkeypatch.setattr(owner, name, staticmethod(made) if name == "GetImageIOFromFileName" else made)
    for name, volume in read.items():
        got = read_channels([folder / name])
        np.testing.assert_array_equal(got.array, volume.array)
        np.testing.assert_array_equal(got.grid.affine, volume.grid.affine)
        assert got.path == folder / name
    with pytest.raises(VolumeError) as caught:
        read_volume(folder / "c.tif")
    problem = "to be of a format that states the spacing in mm, but got TIFF: convert"
    assert str(caught.value).startswith(f"Expected `{folder / 'c.tif'}` {problem}")
    mask = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
    for name in ("m.mha", "m.nrrd"):
        write_with_itk(mask, np.diag([2.0, 3, 4, 1]), folder / name)
        np.testing.assert_array_equal(read_volume(folder / name).array, mask)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with pytest.raises(VolumeError, match="to be read through a temporary folder with a name in UTF-8, but got '"):
        read_volume(folder / "c.gipl")
    with pytest.raises(OSError, match=r"^the name of the temporary folder '.+' is not UTF-8$"):
        write_with_itk(mask, np.eye(4), folder / "n.mha")


def test_a_name_that_is_too_long_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 300 + ".nii.gz")
    with pytest.raises(VolumeError, match="to be a readable volume, but got the error 'File name too long'"):
        read_volume(path)
    assert find_spelling(path) is None


@pytest.mark.parametrize("name", ["{:03d}.dcm", "IM{:05d}"])
@pytest.mark.parametrize("start", ["whole", "no preamble", "no preamble, no group 2"])
def test_dicom_is_known_by_its_content(tmp_path: Path, name: str, start: str) -> None:
    array = np.random.default_rng(0).integers(0, 4, (6, 7, 8)).astype(np.uint8)
    folder = tmp_path / "series"
    write_dicom(folder, array)
    for k, file in enumerate(sorted(folder.iterdir())):
        content = file.read_bytes()
        file.unlink()
        # The group's length counts from the end of its own element, 12 bytes long.
        group = 132 + 12 + int.from_bytes(content[140:144], "little")
        (folder / name.format(k)).write_bytes(content[{"whole": 0, "no preamble": 132}.get(start, group) :])
    (folder / "._000.dcm").write_bytes(JUNK)
    (folder / "DICOMDIR.txt").write_text("not a slice")
    os.mkfifo(folder / "pipe")
    assert is_volume(folder)
    assert list(volumes_below(tmp_path)) == [folder]
    np.testing.assert_array_equal(read_volume(folder).array, array)
    before = file_hash(folder)
    (folder / "._000.dcm").write_bytes(b"other")
    assert file_hash(folder) == before


@pytest.mark.parametrize("name", ["DICOMDIR", "dicomdir", "INDEX"])
def test_the_series_of_a_cd_are_found_below_its_table_of_contents(tmp_path: Path, name: str) -> None:
    for series in ("S1", "disk2/S2"):
        (tmp_path / series).parent.mkdir(exist_ok=True)
        write_dicom(tmp_path / series, np.ones((3, 4, 5), np.uint8))
    write_directory(tmp_path / name)
    write_directory(tmp_path / "disk2" / name)
    assert not is_volume(tmp_path)
    assert names(tmp_path) == ["S1", "disk2/S2"]
    assert [case.image for case in find_images([tmp_path], 1)] == [tmp_path / "S1"]


def test_other_files_are_no_dicom(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4)), tmp_path / "a.nii")
    (tmp_path / "b").write_bytes(JUNK)
    (tmp_path / "c").write_bytes(b"")
    (tmp_path / "d").write_bytes(b"\x08\0 text that begins as a group of DICOM does")
    assert not is_volume(tmp_path)


@pytest.mark.parametrize("slice_name", ["{:03d}.dcm", "{:03d}.IMA", "1.2.840.{}", "IM{:04d}", "s{:03d}.mr"])
@pytest.mark.parametrize("other", ["{:03d}.jpg", "0{:03d}.txt", "!{:03d}", "!{:03d}.dcm"])
def test_a_series_is_found_behind_any_number_of_other_files(tmp_path: Path, slice_name: str, other: str) -> None:
    folder = tmp_path / "series"
    write_dicom(folder, np.ones((3, 4, 5), np.uint8))
    for number, file in enumerate(sorted(folder.iterdir()), 100):
        file.rename(folder / slice_name.format(number))
    for number in range(40):
        (folder / other.format(number)).write_bytes(b"another file")
    assert is_volume(folder)
    assert list(volumes_below(tmp_path)) == [folder]
    assert [case.image for case in find_images([tmp_path], 1)] == [folder]


def test_a_single_slice_beside_scans_does_not_stand_for_them(tmp_path: Path) -> None:
    """As a localiser does beside what dcm2niix made of a study."""
    write_dicom(tmp_path / "study", np.ones((1, 4, 5), np.uint8))
    (tmp_path / "study").rename(tmp_path / "scans")
    first, *others = sorted((tmp_path / "scans").iterdir())
    first.rename(tmp_path / "scans" / "reference.dcm")
    for slice_file in others:
        slice_file.unlink()
    for number in range(40):
        touch(tmp_path / "scans" / f"c{number:03}.nii.gz")
        touch(tmp_path / "scans" / f"c{number:03}.json")
    assert not is_volume(tmp_path / "scans")
    assert len(list(volumes_below(tmp_path))) == 40


@pytest.mark.parametrize(
    ("slices", "volumes", "is_series"), [(1, 2, False), (1, 3, False), (2, 1, True), (40, 35, True)]
)
def test_a_folder_of_volumes_is_a_series_only_where_slices_outnumber_them(
    tmp_path: Path, slices: int, volumes: int, is_series: bool
) -> None:
    write_dicom(tmp_path / "scans", np.ones((3, 4, slices), np.uint8))
    scans = [touch(tmp_path / "scans" / f"c{number:02}.nii.gz") for number in range(volumes)]
    found = [tmp_path / "scans"] if is_series else scans
    assert is_volume(tmp_path / "scans") is is_series
    assert list(volumes_below(tmp_path)) == found
    assert [case.image for case in find_images([tmp_path / "scans"], 1)] == found


@pytest.mark.parametrize(
    ("slices", "volumes", "found"),
    [(3, 4, "3 DICOM files beside 4 volumes"), (1, 1, "1 DICOM file beside 1 volume")],
)
def test_a_folder_that_may_be_a_series_or_volumes_is_refused(
    tmp_path: Path, slices: int, volumes: int, found: str
) -> None:
    """Such as a case with masks of many organs beside its few slices, which must not become the images."""
    (tmp_path / "scans").mkdir()
    write_dicom(tmp_path / "scans" / "case1", np.ones((3, 4, slices), np.uint8))
    for number in range(volumes):
        touch(tmp_path / "scans" / "case1" / f"organ{number}.nii.gz")
    for folder in (tmp_path / "scans", tmp_path / "scans" / "case1"):
        with pytest.raises(VolumeError, match=rf"case1` to hold either a DICOM series or volumes, but got {found}"):
            find_images([folder], 1)


def test_a_series_of_links_that_lead_nowhere_is_found_and_refused(tmp_path: Path) -> None:
    for name in ("000.dcm", "001.dcm"):
        (tmp_path / "scans/series").mkdir(parents=True, exist_ok=True)
        (tmp_path / "scans/series" / name).symlink_to(tmp_path / "nowhere" / name)
    assert [case.image for case in find_images([tmp_path / "scans"], 1)] == [tmp_path / "scans/series"]
    with pytest.raises(VolumeError, match=r"to hold whole slices, but got `000\.dcm` and 1 more, which cannot be read"):
        read_volume(tmp_path / "scans/series")


def test_few_files_of_a_large_folder_without_a_series_are_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(200):
        touch(tmp_path / f"{number}.jpg")
        touch(tmp_path / f"{number}.txt")
        touch(tmp_path / f"{number}.nii.gz")
    opened = list[Path]()
    monkeypatch.setattr(names_of_volumes, "is_dicom", opened.append)
    assert not is_volume(tmp_path)
    assert 0 < len(opened) <= 100


def test_results_beside_their_image_are_left_out(tmp_path: Path) -> None:
    for name in ("a.mha", "a_mask.nii.gz", "a_probabilities.nii.gz", "a_preview.png", "a_mask_mask.nrrd"):
        touch(tmp_path / name)
    for name in ("b_0000.nii", "b_0001.nii", "b_mask.nii", "mask.nii", "_mask.mha"):
        touch(tmp_path / name)
    for name in ("c_mask.nii.gz", "d_probabilities.nii", "deep/c.nii.gz", "deep/d.nii.gz"):
        touch(tmp_path / name)
    images = ["_mask.mha", "a.mha", "b_0000.nii", "b_0001.nii", "c_mask.nii.gz", "d_probabilities.nii", "mask.nii"]
    found = [path.name for path in volumes_below(tmp_path, deep=False, without=RESULTS)]
    assert found == images, "what has no image beside it is an image, whatever its name"
    masks = [name for name in names(tmp_path) if not name.startswith("deep/")]
    assert masks == sorted([*images, "a_mask.nii.gz", "a_mask_mask.nrrd", "b_mask.nii"]), "evaluation scores masks"
    named = [tmp_path / name for name in ("a.mha", "a_preview.png", "a_mask.nii.gz", "deep/c.nii.gz", "c_mask.nii.gz")]
    assert results_among(named) == {tmp_path / "a_preview.png", tmp_path / "a_mask.nii.gz"}


def test_a_series_has_results_and_is_none(tmp_path: Path) -> None:
    for name in ("s1", "s1_mask"):
        write_dicom(tmp_path / name, np.ones((3, 4, 5), np.uint8))
    touch(tmp_path / "s1_mask.nii.gz")
    touch(tmp_path / "s1_probabilities.nii.gz")
    assert list(volumes_below(tmp_path, without=RESULTS)) == [tmp_path / "s1", tmp_path / "s1_mask"]


def test_pictures_are_images_still_when_their_masks_lie_beside_them(tmp_path: Path) -> None:
    for name in ("a.png", "a_mask.nii.gz", "a_probabilities.nii.gz", "b.png"):
        touch(tmp_path / name)
    assert [path.name for path in volumes_below(tmp_path, without=RESULTS)] == ["a.png", "b.png"]


def test_a_preview_is_one_where_its_image_or_mask_lies_beside_it(tmp_path: Path) -> None:
    for name in ("a.png", "a_preview.png", "b_mask.png", "b_preview.png", "c_0000.png", "c_preview.png"):
        touch(tmp_path / name)
    for name in ("d_preview.png", "deep/d.png", "_preview.png"):
        touch(tmp_path / name)
    images = ["_preview.png", "a.png", "b_mask.png", "c_0000.png", "d_preview.png"]
    assert [path.name for path in volumes_below(tmp_path, deep=False)] == images
    assert [path.name for path in volumes_below(tmp_path, deep=False, without=RESULTS)] == images
