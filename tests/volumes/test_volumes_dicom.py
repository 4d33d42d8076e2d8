"""DICOM with a header or pixels that GDCM misreads: refused in one sentence, or read correctly."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_files import (
    REPORT,
    SECONDARY_CAPTURE,
    SEGMENTATION,
    STRUCTURES,
    multi_frame,
    slice_elements,
    write_directory,
    write_elements,
    write_series,
    write_without_pixels,
)

from monai_iou.volumes.reading import VolumeError, file_hash, read_channels, read_labels, read_volume

VOLUME = np.arange(60, dtype=np.int16).reshape(5, 4, 3)
REGISTRATION = "1.2.840.10008.5.1.4.1.1.66.1"
SPACING, DIRECTION, POSITION = (0x0028, 0x0030), (0x0020, 0x0037), (0x0020, 0x0032)
INTERCEPT, SLOPE = (0x0028, 0x1052), (0x0028, 0x1053)


def first_slice() -> dict[tuple[int, int], tuple[str, Any]]:
    return slice_elements(np.ascontiguousarray(VOLUME[..., 0].T))


def refused(path: Path, expected: str) -> None:
    for read in (read_volume, read_labels, lambda file: read_channels([file])):
        with pytest.raises(VolumeError) as caught:
            read(path)
        assert str(caught.value).startswith(f"Expected `{path}` to {expected}")


def test_a_series_and_frames_in_one_file_are_read_alike(tmp_path: Path) -> None:
    series = read_volume(write_series(tmp_path / "series", VOLUME))
    frames = read_volume(write_elements(tmp_path / "frames.dcm", multi_frame(VOLUME)))
    for volume in (series, frames):
        np.testing.assert_array_equal(volume.array, VOLUME)
        np.testing.assert_allclose(volume.grid.affine, np.diag([-0.75, -0.5, 2, 1]))


@pytest.mark.parametrize("text", ["0\\0", "0\\0.75", "-1\\1", "nan\\nan", "inf\\1", "abc\\1", ""])
def test_spacing_that_means_nothing_is_refused_wherever_it_stands(tmp_path: Path, text: str) -> None:
    expected = f"have a positive spacing, but got {text!r}" if text else "have a positive spacing, but got none"
    refused(write_series(tmp_path / "all", VOLUME, spacing=text), expected)
    refused(write_series(tmp_path / "second", VOLUME, [{}, {SPACING: ("DS", text)}]), expected)
    refused(write_elements(tmp_path / "one.dcm", {**first_slice(), SPACING: ("DS", text)}), expected)
    if "n" not in text and "c" not in text:
        refused(write_elements(tmp_path / "frames.dcm", multi_frame(VOLUME, spacing=text)), expected)


def test_the_spacing_of_a_plate_counts_where_no_other_is_given(tmp_path: Path) -> None:
    table = {tag: value for tag, value in first_slice().items() if tag != SPACING}
    refused(write_elements(tmp_path / "none.dcm", table), "have a positive spacing, but got none")
    refused(write_elements(tmp_path / "zero.dcm", {**table, (0x0018, 0x1164): ("DS", "0\\1")}), "have a positive")


def test_colours_are_refused(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    file = write_elements(tmp_path / "rgb.dcm", slice_elements(colours, kind=SECONDARY_CAPTURE))
    for number in range(3):
        write_elements(tmp_path / "series" / f"{number}.dcm", slice_elements(colours, number))
    for path in (file, tmp_path / "series"):
        refused(path, "hold one number per voxel, but got 3 (colours): convert it to one channel first.")


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ["seg.dcm", "seg", "folder/seg.dcm"])
def test_segmentation_objects_are_refused_by_name(tmp_path: Path, name: str, packed: bool) -> None:
    mask = (VOLUME > 20).astype(np.uint8)
    table = dict(multi_frame(mask, kind=SEGMENTATION))
    if packed:
        bits = np.packbits(mask.transpose(2, 1, 0).ravel(), bitorder="little").tobytes()
        table |= {(0x0028, 0x0100): ("US", 1), (0x0028, 0x0101): ("US", 1), (0x0028, 0x0102): ("US", 0)}
        table[0x7FE0, 0x0010] = ("OB", bits)
    file = write_elements(tmp_path / name, table)
    refused(
        file.parent if name.startswith("folder") else file,
        "hold image slices, but got a DICOM segmentation object: convert it to a NIfTI or NRRD label map",
    )


def test_pixels_that_are_not_there_are_not_taken_from_memory(tmp_path: Path) -> None:
    pixels = (0x7FE0, 0x0010)
    short = {**first_slice(), pixels: ("OW", bytes(10))}
    refused(
        write_elements(tmp_path / "short.dcm", short), "hold all its voxels, but got 10 bytes for 40 of shape 5x4x1"
    )
    series = write_series(tmp_path / "series", VOLUME, [{}, {}, {pixels: ("OW", bytes(38))}])
    refused(series, "hold all its voxels, but got 38 bytes for 40 of shape 5x4x1")
    whole = write_elements(tmp_path / "cut.dcm", first_slice())
    whole.write_bytes(whole.read_bytes()[:-6])
    refused(
        whole,
        "be a readable volume, but got the error 'Unable to determine ImageIO reader': copy or write the file again.",
    )
    thumbnail = {(0x0088, 0x0200): ("SQ", [{pixels: ("OW", bytes(4))}])}
    read = read_volume(write_elements(tmp_path / "icon.dcm", {**first_slice(), **thumbnail}))
    np.testing.assert_array_equal(read.array, VOLUME[..., :1])


@pytest.mark.parametrize("name", ["0.dcm", "1.dcm", "2.dcm"])
def test_a_slice_that_was_cut_off_anywhere_is_missed_by_its_name(tmp_path: Path, name: str) -> None:
    folder = write_series(tmp_path / "series", VOLUME)
    whole = (folder / name).read_bytes()
    for length in [*range(0, len(whole), 7), len(whole) - 1]:
        (folder / name).write_bytes(whole[:length])
        with pytest.raises(VolumeError) as caught:
            read_volume(folder)
        problem = f"hold whole slices, but got `{name}`, which cannot be read: copy it again, or take it away if"
        assert str(caught.value).startswith(f"Expected `{folder}` to {problem}"), length
    for damaged in (bytes(len(whole)), b"<html>not found</html>"):
        (folder / name).write_bytes(damaged)
        refused(folder, f"hold whole slices, but got `{name}`, which cannot be read")
    (folder / name).write_bytes(whole)
    np.testing.assert_array_equal(read_volume(folder).array, VOLUME)


def test_slices_without_an_ending_are_missed_too_and_a_text_beside_them_is_not(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "series", VOLUME)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(folder / f"1.2.840.{number}")
    (folder / "README").write_text("a text")
    (folder / "notes.txt").write_bytes(b"")
    np.testing.assert_array_equal(read_volume(folder).array, VOLUME)
    for name in ("1.2.840.0", "1.2.840.2"):
        (folder / name).write_bytes(b"")
    refused(folder, "hold whole slices, but got `1.2.840.0` and 1 more, which cannot be read")


@pytest.mark.parametrize("name", ["{}.dcm", "{}.IMA", "1.2.840.{}", "{}.mr"])
@pytest.mark.parametrize("lost", [[2], [0, 2], [0, 1, 2]])
def test_a_slice_whose_link_leads_nowhere_is_missed_by_its_name(tmp_path: Path, name: str, lost: list[int]) -> None:
    """As of a dataset of git-annex that was fetched in part."""
    stored = sorted(write_series(tmp_path / "store", VOLUME).iterdir())
    folder = tmp_path / "series"
    folder.mkdir()
    links = [folder / name.format(number) for number in range(3)]
    for link, file in zip(links, stored, strict=True):
        link.symlink_to(file)
    np.testing.assert_array_equal(read_volume(folder).array, VOLUME)
    for number in lost:
        stored[number].unlink()
    if len(lost) < 3 or name in ("{}.dcm", "{}.IMA"):
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        refused(folder, f"hold whole slices, but got `{links[lost[0]].name}`{more}, which cannot be read: copy it")
        with pytest.raises(OSError, match="no such file"):
            file_hash(links[lost[0]])
    else:  # nothing tells that these were slices
        refused(folder, "hold one DICOM series, but got 0: name the folder that contains its slices.")


@pytest.mark.parametrize("name", ["RS.dcm", "!RS.dcm", "1.2.246.dcm"])
@pytest.mark.parametrize("kind", [STRUCTURES, REPORT, REGISTRATION])
def test_objects_without_pixels_may_lie_beside_a_series(tmp_path: Path, kind: str, name: str) -> None:
    folder = write_series(tmp_path / "series", VOLUME)
    write_without_pixels(folder / name, kind)
    write_without_pixels(folder / "same.dcm", kind, "1.2.4")
    np.testing.assert_array_equal(read_volume(folder).array, VOLUME)
    other = {**first_slice(), (0x0020, 0x000E): ("UI", "1.2.6")}
    write_elements(folder / "other.dcm", other)
    refused(folder, "hold one DICOM series, but got 2: put each series into a folder of its own.")


def test_structure_sets_alone_are_refused_by_their_name(tmp_path: Path) -> None:
    for number in range(2):
        write_without_pixels(tmp_path / "series" / f"{number}.dcm", STRUCTURES)
    refused(tmp_path / "series", "hold image slices, but got an RT structure set: convert it to a NIfTI or NRRD label")


def test_the_table_of_contents_of_a_cd_is_no_slice(tmp_path: Path) -> None:
    series = write_series(tmp_path / "cd" / "S1", VOLUME)
    for name in ("DICOMDIR", "contents.dcm"):
        file = write_directory(series / name)
        refused(file, "hold image slices, but got the table of contents of a CD: name the folder that contains the")
    np.testing.assert_array_equal(read_volume(series).array, VOLUME)
    write_directory(tmp_path / "cd" / "DICOMDIR")
    refused(tmp_path / "cd", "hold one DICOM series, but got 0: name the folder that contains its slices")


@pytest.mark.parametrize(
    ("tag", "kind", "value"),
    [((0x0028, 0x0010), "US", 65535), ((0x0028, 0x0008), "IS", 2_000_000_000)],
    ids=["rows", "frames"],
)
def test_a_small_file_that_claims_much_takes_no_memory(tmp_path: Path, tag: Any, kind: str, value: int) -> None:
    table = {**multi_frame(VOLUME), (0x0028, 0x0011): ("US", 65535), tag: (kind, value)}
    refused(write_elements(tmp_path / "huge.dcm", table), "hold all its voxels, but got 120 bytes for ")


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (
            {SPACING: ("DS", "1\\1")},
            "hold slices of one size, spacing and direction, but got spacing (0.75, 0.5) and (1",
        ),
        ({DIRECTION: ("DS", "0\\1\\0\\1\\0\\0")}, "hold slices of one size, spacing and direction, but got "),
        ({DIRECTION: ("DS", "0\\0\\0\\0\\0\\0")}, "have axes at a right angle, but got '0\\\\0\\\\0\\\\0\\\\0\\\\0'"),
        ({DIRECTION: ("DS", "1\\0\\0")}, "have axes at a right angle, but got '1\\\\0\\\\0'"),
        ({POSITION: ("DS", "0\\0\\2.5")}, "hold evenly spaced slices, but got distances from 1.5 to 2.5 mm"),
        ({POSITION: ("DS", "0\\0\\0")}, "hold evenly spaced slices, but got distances from 0 to "),
    ],
)
def test_slices_that_are_no_stack_are_refused(tmp_path: Path, edit: Any, expected: str) -> None:
    refused(write_series(tmp_path / "series", VOLUME, [{}, edit]), expected)


def test_a_tilted_gantry_is_refused_and_oblique_slices_are_not(tmp_path: Path) -> None:
    tilted = [{POSITION: ("DS", f"0\\{number}\\{2 * number}")} for number in range(3)]
    refused(
        write_series(tmp_path / "tilted", VOLUME, tilted), "hold slices along their normal, but got a shift of 2 mm"
    )
    oblique = [
        {POSITION: ("DS", f"0\\{-1.2 * k}\\{1.6 * k}"), DIRECTION: ("DS", "1\\0\\0\\0\\0.8\\0.6")} for k in range(3)
    ]
    np.testing.assert_array_equal(read_volume(write_series(tmp_path / "oblique", VOLUME, oblique)).array, VOLUME)


def test_every_slice_has_its_own_scale(tmp_path: Path) -> None:
    scales = [{INTERCEPT: ("DS", "0"), SLOPE: ("DS", text)} for text in ("2", "1", "0.5")]
    got = read_volume(write_series(tmp_path / "pet", VOLUME, scales)).array
    np.testing.assert_allclose(got, VOLUME * [2, 1, 0.5])


@pytest.mark.parametrize(
    ("thickness", "expected"),
    [
        ({(0x0018, 0x0050): ("DS", "5")}, 5.0),
        ({(0x0018, 0x0050): ("DS", "5"), (0x0018, 0x0088): ("DS", "6")}, 6.0),
        ({(0x0018, 0x0050): ("DS", "")}, 1.0),
        ({}, 1.0),
    ],
)
def test_a_single_slice_has_its_thickness(tmp_path: Path, thickness: dict[Any, Any], expected: float) -> None:
    table = {**slice_elements(np.ones((6, 5), np.int16)), **thickness}
    path = write_elements(tmp_path / "series" / "a.dcm", table)
    for place in (path, path.parent):
        assert read_volume(place).grid.spacing[2] == pytest.approx(expected)


@pytest.mark.parametrize("missing", [("symlink_to",), ("symlink_to", "hardlink_to")], ids=["symbolic", "any"])
def test_a_series_is_read_where_no_links_can_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...]
) -> None:
    """As for ordinary users of Windows, where a second name of a protected file would take its protection away."""
    series = write_series(tmp_path / "series", VOLUME)
    alone = write_series(tmp_path / "alone", VOLUME[..., :1]) / "0.dcm"
    (series / "0.dcm").chmod(0o444)
    before = [(file, file.read_bytes(), file.stat().st_mode, file.stat().st_nlink) for file in sorted(series.iterdir())]
    second_names, link = [], Path.hardlink_to

    def note(self: Path, target: Path) -> None:
        second_names.append(target.name)
        link(self, target)

    def refuse(self: Path, target: Path, **_: Any) -> None:
        raise OSError(22, "A required privilege is not held by the client")

    monkeypatch.setattr(Path, "hardlink_to", note)
    for name in missing:
        monkeypatch.setattr(Path, name, refuse)
    monkeypatch.setattr(os, "access", lambda path, mode: bool(Path(path).stat().st_mode & 0o200))
    np.testing.assert_array_equal(read_volume(series).array, VOLUME)
    np.testing.assert_array_equal(read_volume(alone).array, VOLUME[..., :1])
    assert second_names == ([] if len(missing) > 1 else ["1.dcm", "2.dcm", "0.dcm"])
    after = [(file, file.read_bytes(), file.stat().st_mode, file.stat().st_nlink) for file in sorted(series.iterdir())]
    assert after == before


def test_a_missing_temporary_folder_is_named_and_not_the_series(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_series(tmp_path / "series", np.zeros((4, 4, 3), np.int16))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    message = (
        f"Expected `{folder}` to be read through a temporary folder, but got the error 'No such file or directory': "
        "set TMPDIR to a folder that you may write to."
    )
    with pytest.raises(VolumeError, match=f"^{re.escape(message)}$"):
        read_volume(folder)
