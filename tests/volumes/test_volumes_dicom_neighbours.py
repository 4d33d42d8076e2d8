"""One slice of a DICOM series that is named by itself: refused beside the others, read where it is the whole image."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_files import multi_frame, slice_elements, write_elements, write_series

from monai_iou.volumes.dicom_neighbours import _series_in
from monai_iou.volumes.header import refusal
from monai_iou.volumes.names import is_volume
from monai_iou.volumes.reading import VolumeError, read_channels, read_labels, read_volume

VOLUME = np.arange(60, dtype=np.int16).reshape(5, 4, 3)
SERIES, POSITION, DIRECTION = (0x0020, 0x000E), (0x0020, 0x0032), (0x0020, 0x0037)
REFERRED = (0x0008, 0x1115)
PREAMBLE = 132


def write_slice(path: Path, number: int, **changes: Any) -> Path:
    table = slice_elements(np.ascontiguousarray(VOLUME[..., number].T), number)
    return write_elements(path, {**table, **changes.get("edits", {})})


@pytest.mark.parametrize("name", ["1.dcm", "1.IMA", "scan.0001", "IM0001"])
@pytest.mark.parametrize("read", [read_volume, read_labels, lambda path: read_channels([path])])
def test_one_slice_of_a_series_is_refused(tmp_path: Path, name: str, read: Callable[[Path], object]) -> None:
    folder = write_series(tmp_path / "series", VOLUME)
    path = (folder / "1.dcm").rename(folder / name)
    with pytest.raises(VolumeError) as caught:
        read(path)
    assert str(caught.value) == (
        f"Expected `{path}` to be a whole image, but got one slice of a series of 3: name its folder, `{folder}`, or "
        "convert the series to NIfTI; if the file is an image of its own, move it to a folder of its own."
    )
    np.testing.assert_array_equal(read_volume(folder).array, VOLUME)


def test_so_is_one_without_the_preamble_or_in_a_folder_that_was_named_from_within(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_series(tmp_path / "series", VOLUME)
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[PREAMBLE:])
    monkeypatch.chdir(folder)
    with pytest.raises(VolumeError, match=re.escape("one slice of a series of 3: name its folder, `.`, or")):
        read_volume("2.dcm")


def test_what_is_added_or_taken_away_later_counts(tmp_path: Path) -> None:
    path = write_slice(tmp_path / "0.dcm", 0)
    assert read_volume(path).array.shape == (5, 4, 1)
    other = write_slice(tmp_path / "1.dcm", 1)
    with pytest.raises(VolumeError, match="one slice of a series of 2"):
        read_volume(path)
    other.unlink()
    assert read_volume(path).array.shape == (5, 4, 1)


@pytest.mark.parametrize(
    "edits",
    [
        {SERIES: ("UI", "1.2.5")},
        {SERIES: ("UI", "1.2.4.1")},
        {SERIES: ("UI", "1.2.5"), REFERRED: ("SQ", [{SERIES: ("UI", "1.2.4")}])},
        {DIRECTION: ("DS", "0\\1\\0\\0\\0\\1")},
        {POSITION: ("DS", "0\\0\\0")},
        {POSITION: ("DS", "5\\0\\0")},
        {POSITION: ("DS", "")},
        {POSITION: ("DS", "here")},
    ],
    ids=["series", "longer series", "referred", "localiser", "phase", "tile", "no place", "damaged"],
)
def test_files_that_are_no_other_slices_of_it_leave_a_slice_alone(tmp_path: Path, edits: dict[Any, Any]) -> None:
    path = write_slice(tmp_path / "0.dcm", 0)
    write_slice(tmp_path / "1.dcm", 1, edits=edits)
    shutil.copy(path, tmp_path / "copy.dcm")
    (tmp_path / "notes.txt").write_text("of the reader")
    (tmp_path / "gone.dcm").symlink_to(tmp_path / "nowhere")
    np.testing.assert_array_equal(read_volume(path).array, VOLUME[..., :1])


def test_a_scout_in_another_plane_and_a_long_header_hide_no_slice(tmp_path: Path) -> None:
    comment = {(0x0010, element): ("LT", "x" * 60_000) for element in (0x21B0, 0x4000)}
    for number in range(2):
        write_slice(tmp_path / f"{number}.dcm", number, edits=comment)
    write_slice(tmp_path / "scout.dcm", 2, edits={DIRECTION: ("DS", "0\\1\\0\\0\\0\\-1")})
    with pytest.raises(VolumeError, match="one slice of a series of 2"):
        read_volume(tmp_path / "1.dcm")
    assert read_volume(tmp_path / "scout.dcm").array.shape == (5, 4, 1)


def test_masks_that_are_written_beside_slices_let_no_header_be_read_again(tmp_path: Path) -> None:
    for number in range(3):
        write_slice(tmp_path / f"{number}.dcm", number, edits={SERIES: ("UI", f"1.2.{number}")})
    before = _series_in.cache_info().misses
    for number in range(3):
        read_volume(tmp_path / f"{number}.dcm")
        (tmp_path / f"{number}_mask.nii.gz").touch()
    assert _series_in.cache_info().misses == before + 1


def test_a_file_in_a_folder_that_may_not_be_listed_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_slice(tmp_path / "0.dcm", 0)

    def refuse(folder: Path) -> list[Path]:
        raise refusal(folder, "be readable", "the error 'Permission denied'", "ask for the right to read it")

    monkeypatch.setattr("monai_iou.volumes.dicom_neighbours.slice_candidates", refuse)
    assert read_volume(path).array.shape == (5, 4, 1)


def test_frames_in_one_file_and_projections_without_a_place_stay_accepted(tmp_path: Path) -> None:
    write_series(tmp_path, VOLUME)
    frames = write_elements(tmp_path / "frames.dcm", multi_frame(VOLUME))
    np.testing.assert_array_equal(read_volume(frames).array, VOLUME)
    for number in range(2):
        write_slice(tmp_path / "plates" / f"{number}.dcm", number, edits={POSITION: ("DS", "")})
    assert read_volume(tmp_path / "plates" / "1.dcm").array.shape == (5, 4, 1)


@pytest.mark.parametrize("name", ["IM0003.dcm", "IM0003"])
def test_the_mask_beside_a_lone_slice_does_not_make_its_folder_ambiguous(tmp_path: Path, name: str) -> None:
    write_slice(tmp_path / name, 0)
    for kind in ("mask", "probabilities"):
        (tmp_path / f"{name}_{kind}.nii.gz").touch()
    assert is_volume(tmp_path)
    assert read_volume(tmp_path).array.shape == (5, 4, 1)
    (tmp_path / "other.nii.gz").touch()
    with pytest.raises(VolumeError, match="hold either a DICOM series or volumes, but got 1 DICOM file beside 1 vol"):
        is_volume(tmp_path)
