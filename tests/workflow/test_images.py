"""Images that are named one by one: files, folders, channels in files of their own."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from monai_iou.datasets.cases import DatasetError
from monai_iou.workflow.images import find_images, image_cases


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_a_folder_gives_every_image_once(tmp_path: Path) -> None:
    touch(tmp_path, "b.nii.gz", "a.mha", "._a.mha", "notes.txt", "c_0000.nrrd")
    cases = find_images([tmp_path, tmp_path / "b.nii.gz"], 1)
    assert [(case.name, case.image.name) for case in cases] == [("a", "a.mha"), ("b", "b.nii.gz"), ("c", "c_0000.nrrd")]


def test_one_channel_stands_for_its_siblings(tmp_path: Path) -> None:
    touch(tmp_path, "p_0000.nii.gz", "p_0001.nii.gz", "q_0000.nii.gz", "q_0001.nii.gz", "four_d.nii.gz")
    (one,) = find_images([tmp_path / "p_0001.nii.gz"], 2)
    assert one.name == "p"
    assert [path.name for path in one.images] == ["p_0000.nii.gz", "p_0001.nii.gz"]
    assert [case.name for case in find_images([tmp_path], 2)] == ["four_d", "p", "q"]


def test_a_missing_channel_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "p_0000.nii.gz")
    with pytest.raises(DatasetError, match=r"^Expected a file for each of the 2 .* there is no p_0001\.nii\.gz: add"):
        find_images([tmp_path], 2)


@pytest.mark.parametrize("named", [".", "p_0000.nii.gz", "p_0002.nii.gz"])
def test_a_channel_that_the_model_lacks_is_not_left_out_silently(named: str, tmp_path: Path) -> None:
    touch(tmp_path, "p_0000.nii.gz", "p_0001.nii.gz", "p_0002.nii.gz", "q_0000.nii.gz", "q_0001.nii.gz")
    with pytest.raises(DatasetError) as caught:
        find_images([tmp_path / named], 2)
    assert str(caught.value) == (
        f"Expected {tmp_path} to have one file for each of the 2 channels that the model was trained on, but "
        "p_0002.nii.gz is there too: move it, or name a model that was trained on all of them."
    )
    assert len(find_images([tmp_path / "q_0001.nii.gz"], 2)) == 1, "another image's files are no channels of this one"
    assert len(find_images([tmp_path / "p_0002.nii.gz"], 3)) == 1
    assert len(find_images([tmp_path], 1)) == 5, "numbers of cases, where an image has one channel"


@pytest.mark.parametrize("named", [".", "p_0000.nii.gz"])
def test_the_number_of_a_case_stays_in_its_name(named: str, tmp_path: Path) -> None:
    touch(tmp_path, "p_0000.nii.gz", "p_0001.nii.gz", "q_0000.nii.gz")
    names = [case.name for case in find_images([tmp_path / named], 1)]
    assert names == (["p_0000", "p_0001", "q"] if named == "." else ["p_0000"])
    assert [case.name for case in image_cases([str(tmp_path / "p_0000.nii.gz")])] == ["p_0000"]
    assert [case.name for case in image_cases([str(tmp_path / "q_0000.nii.gz")])] == ["q"]


def test_the_number_of_a_case_with_a_folder_for_each_channel_stays_in_its_name(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{folder}/p_000{number}.nii.gz" for folder in ("CT", "PET") for number in range(2)))
    images = [[str(tmp_path / f"{folder}/p_000{number}.nii.gz") for folder in ("CT", "PET")] for number in range(2)]
    assert [case.name for case in image_cases(images)] == ["p_0000", "p_0001"]
    assert [case.name for case in image_cases(images[:1])] == ["p_0000"]
    apart = [str(tmp_path / "CT/p_0000.nii.gz"), str(tmp_path / "PET/p_0001.nii.gz")]
    assert [case.name for case in image_cases([apart])] == ["p"], "numbers of channels, in folders of their own"


def test_channels_are_found_in_whatever_form_their_names_were_written(tmp_path: Path) -> None:
    names = [f"u\N{COMBINING DIAERESIS}_000{number}.nii.gz" for number in range(2)]
    touch(tmp_path, *names)
    (case,) = find_images([tmp_path], 2)
    assert (case.name, [path.name for path in case.images]) == ("\N{LATIN SMALL LETTER U WITH DIAERESIS}", names)


def write(path: Path, channels: int) -> Path:
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4, channels), np.float32), np.eye(4)), path)
    return path


def test_a_file_of_several_channels_is_an_image_of_its_own_whatever_its_name(tmp_path: Path) -> None:
    for number in ("0001", "0002", "0012"):
        write(tmp_path / f"case_{number}.nii.gz", 2)
    files = sorted(tmp_path.iterdir())
    for named in ([tmp_path], files, files[2:]):
        cases = find_images(named, 2)
        expected = files if named != files[2:] else named
        assert [(case.image, case.channels) for case in cases] == [(file, ()) for file in expected]
        assert [case.name for case in cases] == [case.name for case in image_cases([str(file) for file in expected])]
    # Neighbours of all numbers do not make channels of it, and a wrong number of channels is not taken for one.
    write(tmp_path / "case_0000.nii.gz", 2)
    assert len(find_images([tmp_path], 2)) == 4
    assert len(find_images([tmp_path], 3)) == 4


def test_files_of_one_channel_beside_those_of_several_belong_together(tmp_path: Path) -> None:
    single = [write(tmp_path / f"p_000{number}.nii.gz", 1) for number in range(2)]
    several = write(tmp_path / "q_0001.nii.gz", 2)
    assert [case.images for case in find_images([tmp_path], 2)] == [tuple(single), (several,)]
    write(tmp_path / "p_0002.nii.gz", 2)
    assert [case.name for case in find_images([single[0]], 2)] == ["p"], "a file of several channels is none of them"
    (tmp_path / "p_0002.nii.gz").unlink()
    single[1].unlink()
    with pytest.raises(
        DatasetError, match=r"there is no p_0001\.nii\.gz: add it, or name an image that holds them all\."
    ):
        find_images([tmp_path], 2)


def test_equal_names_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    touch(tmp_path, "x/image.nii.gz", "y/image.nii.gz")
    images = [tmp_path / "x/image.nii.gz", tmp_path / "y/image.nii.gz"]
    assert [case.name for case in find_images(images, 1)] == ["x/image", "y/image"]


def test_two_formats_of_one_name_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "a.mha")
    with pytest.raises(DatasetError, match="names of their own"):
        find_images([tmp_path], 1)


@pytest.mark.parametrize(
    ("name", "sentence"), [("no", "there is no"), ("empty", "but it has none: name a folder that holds some.")]
)
def test_nothing_to_segment(tmp_path: Path, name: str, sentence: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match=sentence):
        find_images([tmp_path / name], 1)


def test_the_bundles_key_names_what_the_command_found(tmp_path: Path) -> None:
    touch(tmp_path, "p_0000.nii.gz", "p_0001.nii.gz", "d/p.nii.gz")
    channels = [str(tmp_path / "p_0000.nii.gz"), str(tmp_path / "p_0001.nii.gz")]
    (case,) = image_cases([channels])
    assert case.as_item() == {"case": "p", "image": channels}
    named = {"case": "mine", "image": str(tmp_path / "d/p.nii.gz")}
    assert [each.name for each in image_cases(str([named, channels]))] == ["mine", "p"]
    assert image_cases(named["image"])[0].name == "p"


@pytest.mark.parametrize("images", [[], [3], {"case": "a"}, "[broken", [[""]], [{"case": 3, "image": "a"}]])
def test_what_is_no_list_of_images_is_refused(images: object) -> None:
    with pytest.raises(DatasetError, match=r"^Expected "):
        image_cases(images)


def test_results_of_a_folder_are_no_images(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "a_mask.mha", "a_probabilities.nii.gz", "b_mask.nii.gz", "c_0000.nii", "c_mask.nii.gz")
    assert [case.name for case in find_images([tmp_path], 1)] == ["a", "b_mask", "c"]
    assert [case.name for case in find_images([tmp_path / "a_mask.mha"], 1)] == ["a_mask"], "one that is named alone"


@pytest.mark.parametrize("result", ["a_mask.mha", "a_probabilities.nii.gz", "a_preview.png"])
def test_an_image_and_its_result_are_not_segmented_by_one_command(tmp_path: Path, result: str) -> None:
    touch(tmp_path, "a.nii.gz", result)
    with pytest.raises(DatasetError, match=rf"but got .*/{result}, which has the name of a result for another image"):
        find_images(sorted(tmp_path.iterdir()), 1)


def test_names_count_from_the_common_folder_however_the_paths_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "study/a/image.nii.gz", "other/b/image.nii.gz")
    monkeypatch.chdir(tmp_path / "study")
    one, other = "a/image.nii.gz", "../other/b/image.nii.gz"
    for written in ([one, other], [str(Path(one).absolute()), other], [one, str(tmp_path / "other/b/image.nii.gz")]):
        for cases in (find_images([Path(path) for path in written], 1), image_cases(written)):
            assert [case.name for case in cases] == ["study/a/image", "other/b/image"]
            assert [str(case.image) for case in cases] == written
    with pytest.raises(DatasetError) as caught:
        find_images([Path(one), tmp_path / "study" / one], 1)
    assert str(caught.value) == (
        f"Expected the images to list each image once, but {tmp_path / 'study' / one} comes twice: remove one entry."
    )


@pytest.mark.parametrize("name", ["../b/image", "a/../../b", "/b/image"])
def test_a_case_is_not_named_out_of_the_folder_of_the_masks(name: str, tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz")
    with pytest.raises(DatasetError) as caught:
        image_cases([{"case": name, "image": str(tmp_path / "a.nii.gz")}])
    assert str(caught.value) == (
        f"Expected `case` of `images` to name a file below `output_dir`, but got {name!r}: remove what leads to "
        "another folder."
    )


@pytest.mark.parametrize(("inside", "path"), [(".", "."), ("sub", "..")])
def test_the_folder_that_one_is_in_has_its_name(
    inside: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    series = tmp_path.resolve() / "series_T1"
    (series / "sub").mkdir(parents=True)
    (series / "IM0001").write_bytes(b"\0" * 128 + b"DICM")
    monkeypatch.chdir(series / inside)
    for case in (*find_images([Path(path)], 1), *image_cases(path)):
        assert (case.name, case.image, case.image.parent) == ("series_T1", series, series.parent)
    (series / "IM0001").unlink()
    touch(series, "a.nii.gz")
    assert [case.image for case in find_images([Path(path)], 1)] == [Path(path) / "a.nii.gz"]
