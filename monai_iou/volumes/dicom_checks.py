"""Checks of what GDCM and ITK do not report in DICOM: missing pixels, invalid spacing, slices that differ."""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monai_iou.volumes.header import refusal

SPACING_TAGS = ("0028|0030", "0018|1164", "0018|2010")
FRAMES, BITS, DIRECTION = "0028|0008", "0028|0100", "0020|0037"
SYNTAX = re.compile(rb"\x02\x00\x10\x00UI..([0-9.]+)", re.DOTALL)
RAW_SYNTAXES = (b"1.2.840.10008.1.2", b"1.2.840.10008.1.2.1")
MAX_RATIO = 100_000  # of compressed frames with a single value; deflate stays below 1032
PIXELS = re.compile(rb"\xe0\x7f\x10\x00(?:O[BW]\0\0(.{4})|(.{4}))", re.DOTALL)
NESTED_SPACING = re.compile(rb"\x28\x00\x30\x00(?:DS(..)|(..)\x00\x00)([0-9eE+. \\-]*)", re.DOTALL)
BETWEEN_SLICES, THICKNESS = "0018|0088", "0018|0050"
MAX_TILT = 0.5  # in voxels, from the first to the last slice


def tag_text(information: Any, tag: str) -> str:
    """Return the text of an element, "" if the file does not have it."""
    return str(information.GetMetaData(tag)).strip("\0 ") if information.HasMetaDataKey(tag) else ""


def check_length(path: Path, file: Path, information: Any) -> None:
    """Refuse a file with fewer pixels than its header states, for which GDCM returns what lies in memory.

    Raises:
        VolumeError: the file is too short, or its pixels are.
    """
    bits = tag_text(information, BITS)
    if not bits.isdigit():
        return  # not DICOM
    needed = int(np.prod(information.GetSize(), dtype=object)) * information.GetNumberOfComponents() * int(bits) // 8
    with file_content(file) as content:
        syntax = SYNTAX.search(content, 0, 1024)
        is_raw = syntax is not None and syntax[1].strip(b"\0") in RAW_SYNTAXES
        most = _pixel_bytes(content, needed) if is_raw else len(content) * MAX_RATIO
    if needed > most:
        shape = "x".join(map(str, information.GetSize()))
        raise refusal(path, "hold all its voxels", f"{most} bytes for {needed} of shape {shape}", "copy it again")


def _pixel_bytes(content: mmap.mmap, needed: int) -> int:
    """Return the length of the pixel data; a thumbnail has pixel data of its own, so the longest element counts."""
    most = 0
    for match in PIXELS.finditer(content):
        length = int.from_bytes(match[1] or match[2], "little")
        most = max(most, min(length, len(content) - match.end()))
        if most >= needed:
            break
    return most


@contextmanager
def file_content(file: Path) -> Iterator[mmap.mmap]:
    """Map a file into memory."""
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        yield content


def check_spacing(path: Path, file: Path, information: Any) -> None:
    """Refuse zero, missing and invalid spacing by the DICOM element, because ITK replaces it by 1."""
    texts = [tag_text(information, tag) for tag in SPACING_TAGS]
    spacing = next((text for text in texts if text), "")
    if not spacing and tag_text(information, FRAMES):  # of several frames: in a sequence, which ITK does not show
        spacing = _nested_spacing(file)
    elif not spacing and not tag_text(information, BITS):
        return  # not DICOM
    try:
        values = [float(word) for word in spacing.split("\\")]
    except ValueError:
        values = [0.0]
    if not all(np.isfinite(value) and value > 0 for value in values):
        remedy = "correct the pixel spacing in its header"
        raise refusal(path, "have a positive spacing", repr(spacing) if spacing else "none", remedy)


def _nested_spacing(file: Path) -> str:
    with file_content(file) as content:
        match = NESTED_SPACING.search(content)
        return match[3][: int.from_bytes(match[1] or match[2], "little")].decode().strip() if match else ""


def slice_thickness(information: Any, read: float) -> float:
    """Return the third spacing of a single slice in mm; where GDCM knows none, it reads 1, whatever its thickness."""
    for tag in (BETWEEN_SLICES, THICKNESS) if read == 1 else ():
        try:
            value = float(tag_text(information, tag))
        except ValueError:
            continue
        if np.isfinite(value) and value > 0:
            return value
    return read


def check_direction(path: Path, information: Any) -> None:
    """Refuse row and column directions that are not orthonormal, because ITK replaces them by the patient's axes."""
    text = tag_text(information, DIRECTION)
    if not text:
        return
    try:
        rows = np.reshape([float(word) for word in text.split("\\")], (2, 3))
        usable = np.allclose(rows @ rows.T, np.eye(2), atol=1e-2)
    except ValueError:
        usable = False
    if not usable:
        raise refusal(path, "have axes at a right angle", repr(text), "correct the orientation in its header")


def check_series(folder: Path, slices: Sequence[Any]) -> None:
    """Refuse slices that do not form a stack, because ITK takes size, spacing and direction of all from the first."""
    _check_alike(folder, slices)
    places = np.asarray([each.GetOrigin() for each in slices])
    check_steps(folder, places, "add missing slices or remove duplicate ones")
    check_upright(folder, slices[0], places)


def check_steps(path: Path, places: NDArray[np.float64], remedy: str) -> None:
    """Refuse slices at unequal distances: ITK only warns, and then puts slices at wrong positions."""
    steps = np.linalg.norm(np.diff(places, axis=0), axis=1)
    if steps.max() > steps.min() * 1.01 + 1e-3 or steps.min() < 1e-6:
        distances = f"distances from {steps.min():.4g} to {steps.max():.4g} mm"
        raise refusal(path, "hold evenly spaced slices", distances, remedy)


def _check_alike(folder: Path, slices: Sequence[Any]) -> None:
    first = slices[0]
    for each in slices[1:]:
        for what, own, other in (
            ("size", each.GetSize(), first.GetSize()),
            ("spacing", each.GetSpacing()[:2], first.GetSpacing()[:2]),
            ("direction", each.GetDirection(), first.GetDirection()),
        ):
            if not np.allclose(own, other, rtol=1e-3, atol=1e-3):
                difference = f"{what} {numbers_text(other)} and {numbers_text(own)}"
                raise refusal(folder, "hold slices of one size, spacing and direction", difference, "separate them")


def check_upright(path: Path, first: Any, places: NDArray[np.float64]) -> None:
    """Refuse slices that are shifted against each other (tilted gantry), because ITK stacks them along their normal."""
    normal = np.reshape(first.GetDirection(), (3, 3))[:, 2]
    way = places[-1] - places[0]
    shift = float(np.linalg.norm(way - (way @ normal) * normal))
    if shift > MAX_TILT * min(first.GetSpacing()[:2]):
        remedy = "convert it to NIfTI by a program that corrects the tilt, such as dcm2niix"
        raise refusal(path, "hold slices along their normal", f"a shift of {shift:.3g} mm over the stack", remedy)


def numbers_text(values: Sequence[float] | NDArray[np.float64]) -> str:
    """Return numbers as text, such as (0.5, 0.5, 2)."""
    return "(" + ", ".join(f"{value:.6g}" for value in values) + ")"
