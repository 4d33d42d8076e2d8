"""Frames in one DICOM file: a stack that lies where they state, or one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_files import ENHANCED_CT, SECONDARY_CAPTURE, multi_frame, slice_elements, write_elements, write_series

from monai_iou.volumes.reading import VolumeError, read_channels, read_labels, read_volume

VOLUME = np.arange(120, dtype=np.int16).reshape(5, 4, 6)
POSITION, SHARED, PER_FRAME = (0x0020, 0x0032), (0x5200, 0x9229), (0x5200, 0x9230)
DOSE = "1.2.840.10008.5.1.4.1.1.481.2"


def heights(*values: float) -> list[str]:
    return [f"-30\\40\\{value}" for value in values]


def refused(path: Path, expected: str) -> None:
    for read in (read_volume, read_labels, lambda file: read_channels([file])):
        with pytest.raises(VolumeError) as caught:
            read(path)
        assert str(caught.value).startswith(f"Expected `{path}` to {expected}")


@pytest.mark.parametrize("sequence", ["SQ", "SQ open"])
@pytest.mark.parametrize("values", [(0, 2, 4, 6, 8, 10), (10, 8, 6, 4, 2, 0), (1, 3.5, 6, 8.5, 11, 13.5)])
def test_frames_are_read_at_the_positions_that_they_state(tmp_path: Path, values: Any, sequence: str) -> None:
    table = multi_frame(VOLUME, places=heights(*values), sequence=sequence)
    got = read_volume(write_elements(tmp_path / "a.dcm", table))
    np.testing.assert_array_equal(got.array, VOLUME)
    for number, value in enumerate(values):
        np.testing.assert_allclose(got.grid.affine @ [0, 0, number, 1], [30, -40, value, 1], atol=1e-6)
    np.testing.assert_allclose(got.grid.spacing, (0.75, 0.5, abs(values[1] - values[0])))


@pytest.mark.parametrize("sequence", ["SQ", "SQ open"])
@pytest.mark.parametrize(
    ("places", "expected"),
    [
        (
            heights(0, 2, 4, 6, 8, 12),
            "hold evenly spaced slices, but got distances from 2 to 4 mm: separate its phases",
        ),
        (heights(0, 6, 2, 8, 4, 10), "hold evenly spaced slices, but got distances from 4 to 6 mm"),
        (heights(0, 2, 4, 0, 2, 4), "hold evenly spaced slices, but got distances from 2 to 4 mm"),
        (heights(0, 0, 2, 2, 4, 4), "hold evenly spaced slices, but got distances from 0 to 2 mm"),
        (heights(0, 0, 0, 0, 0, 0), "hold evenly spaced slices, but got distances from 0 to 0 mm"),
        (heights(0, 2, 0, 2, 0, 2), "be read with the positions that its frames state, but got one that is 8 mm away"),
        (heights(0, 1.99, 4, 6, 8, 10), "be read with the spacing that its frames state, but got (1, 1) for (0.75, 0"),
        (heights(5), "state the positions of its 6 frames, but got 1: convert it to NIfTI"),
        (heights(0, 2, 4, 6, 8), "state the positions of its 6 frames, but got 5"),
        (["0\\0"] * 6, "state the geometry and scale of its frames in numbers, but got '0\\\\0': correct its header."),
        (["a\\b\\c"] * 6, "state the geometry and scale of its frames in numbers, but got 'a\\\\b\\\\c'"),
        ([f"0\\{k}\\{2 * k}" for k in range(6)], "hold slices along their normal, but got a shift of 5 mm"),
    ],
)
def test_frames_that_are_no_stack_are_refused(tmp_path: Path, places: list[str], expected: str, sequence: str) -> None:
    refused(write_elements(tmp_path / "a.dcm", multi_frame(VOLUME, places=places, sequence=sequence)), expected)


@pytest.mark.parametrize("values", [(0, 2, 4, 6, 8, 12), (0, 2, 4, 0, 2, 4)])
def test_the_same_slices_are_refused_as_a_folder(tmp_path: Path, values: Any) -> None:
    folder = write_series(tmp_path / "series", VOLUME, [{POSITION: ("DS", text)} for text in heights(*values)])
    refused(folder, "hold evenly spaced slices, but got distances from ")


def test_uneven_frames_of_a_spacing_of_1_mm_are_not_taken_for_those_of_itk(tmp_path: Path) -> None:
    table = multi_frame(VOLUME, places=heights(0, 1.99, 4, 6, 8, 10), spacing="1\\1")
    refused(write_elements(tmp_path / "a.dcm", table), "be read with the positions that its frames state, but got one")


def test_a_class_whose_sequences_itk_does_not_follow_is_refused(tmp_path: Path) -> None:
    table = multi_frame(VOLUME, kind=SECONDARY_CAPTURE)
    refused(write_elements(tmp_path / "a.dcm", table), "be read with the spacing that its frames state, but got (1, 1)")
    flat = multi_frame(VOLUME, kind=SECONDARY_CAPTURE, spacing="1\\1", places=heights(*range(6)))
    refused(write_elements(tmp_path / "b.dcm", flat), "be read with the positions that its frames state, but got one")
    turned = {**multi_frame(VOLUME, kind=SECONDARY_CAPTURE, spacing="1\\1")}
    turned[SHARED][1][0][0x0020, 0x9116] = ("SQ", [{(0x0020, 0x0037): ("DS", "0\\1\\0\\1\\0\\0")}])
    refused(write_elements(tmp_path / "c.dcm", turned), "be read with the direction that its frames state, but got (1")


@pytest.mark.parametrize(
    ("groups", "elements", "what"),
    [
        ((0x0028, 0x9110), {(0x0028, 0x0030): ("DS", "0.5\\0.8")}, "spacing (0.75, 0.5)"),
        ((0x0020, 0x9116), {(0x0020, 0x0037): ("DS", "0.8\\0.6\\0\\-0.6\\0.8\\0")}, "direction (1, 0, 0, 0, 1, 0)"),
    ],
)
def test_frames_that_differ_are_refused(tmp_path: Path, groups: Any, elements: Any, what: str) -> None:
    table = multi_frame(VOLUME)
    table[PER_FRAME][1][3][groups] = ("SQ", [elements])
    refused(write_elements(tmp_path / "a.dcm", table), f"hold frames of one {what.split()[0]}, but got {what} and oth")


SCALES = {"rescale intercept": (0x0028, 0x1052), "rescale slope": (0x0028, 0x1053)}


def scaled(values: dict[str, list[str]], sequence: str) -> dict[tuple[int, int], tuple[str, Any]]:
    """Frames that state their intercept and slope; the list of a scale may be shorter than that of the frames."""
    table = multi_frame(VOLUME, sequence=sequence)
    for number, frame in enumerate(table[PER_FRAME][1]):
        scale = {SCALES[what]: ("DS", texts[number]) for what, texts in values.items() if number < len(texts)}
        if scale:
            frame[0x0028, 0x9145] = (sequence, [{**scale, (0x0028, 0x1054): ("LO", "US")}])
    return table


@pytest.mark.parametrize("sequence", ["SQ", "SQ open"])
def test_frames_of_one_scale_are_read_with_it(tmp_path: Path, sequence: str) -> None:
    table = scaled({"rescale intercept": ["-10"] * 6, "rescale slope": ["2.5"] * 6}, sequence)
    np.testing.assert_allclose(read_volume(write_elements(tmp_path / "a.dcm", table)).array, VOLUME * 2.5 - 10)


@pytest.mark.parametrize("sequence", ["SQ", "SQ open"])
@pytest.mark.parametrize(
    ("what", "texts", "expected"),
    [
        (
            "rescale slope",
            list("246888"),
            "hold frames of one rescale slope, but got values from 2 to 8: convert it to ",
        ),
        ("rescale slope", ["1.5"] * 5, "state the rescale slope of its 6 frames, but got 5: convert it to NIfTI by a "),
        ("rescale intercept", list("000001"), "hold frames of one rescale intercept, but got values from 0 to 1"),
    ],
)
def test_frames_with_scales_of_their_own_are_refused(
    tmp_path: Path, what: str, texts: list[str], expected: str, sequence: str
) -> None:
    both = {"rescale intercept": ["0"] * 6, "rescale slope": ["1"] * 6} | {what: texts}
    refused(write_elements(tmp_path / "a.dcm", scaled(both, sequence)), expected)


def dose(offsets: str) -> dict[tuple[int, int], tuple[str, Any]]:
    return {
        **slice_elements(np.ascontiguousarray(VOLUME[..., 0].T), kind=DOSE),
        (0x0028, 0x0008): ("IS", 6),
        (0x0028, 0x0009): ("AT", b"\x04\x30\x0c\0"),
        (0x3004, 0x000C): ("DS", offsets),
        (0x7FE0, 0x0010): ("OW", np.ascontiguousarray(VOLUME.transpose(2, 1, 0)).tobytes()),
    }


def test_the_frames_of_a_dose_are_a_stack_by_their_offsets(tmp_path: Path) -> None:
    for offsets, step in (("0\\2\\4\\6\\8\\10", 2), ("0\\-3\\-6\\-9\\-12\\-15", -3), ("30\\32\\34\\36\\38\\40", 2)):
        got = read_volume(write_elements(tmp_path / "a.dcm", dose(offsets)))
        np.testing.assert_array_equal(got.array, VOLUME)
        np.testing.assert_allclose(got.grid.affine[:3, 2], [0, 0, step], atol=1e-6)
    uneven = write_elements(tmp_path / "b.dcm", dose("0\\2\\4\\6\\8\\12"))
    refused(uneven, "hold evenly spaced slices, but got distances from 2 to 4 mm")
    refused(write_elements(tmp_path / "c.dcm", dose("0\\2\\4")), "state the positions of its 6 frames, but got 3")


def test_frames_without_positions_are_read_as_before(tmp_path: Path) -> None:
    table = {tag: value for tag, value in dose("0").items() if tag[0] != 0x3004}
    table |= {(0x0008, 0x0016): ("UI", SECONDARY_CAPTURE), (0x0018, 0x0088): ("DS", "2")}
    assert read_volume(write_elements(tmp_path / "a.dcm", table)).grid.spacing == (0.75, 0.5, 2)
    one = multi_frame(VOLUME[..., :1], kind=ENHANCED_CT)
    assert read_volume(write_elements(tmp_path / "b.dcm", one)).grid.spacing == (0.75, 0.5, 2)
