"""The frames of one DICOM file: their geometry stands in sequences that ITK does not show, and is checked here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monai_iou.volumes.dicom_checks import FRAMES, check_steps, check_upright, file_content, numbers_text, tag_text
from monai_iou.volumes.header import refusal

OFFSETS = "3004|000c"  # of the frames of a dose, along the normal
SHARED, PER_FRAME, PIXELS = b"\0\x52\x29\x92", b"\0\x52\x30\x92", b"\xe0\x7f\x10\0"
_FIRST_ITEM = rb"(?:SQ\0\0)?.{4}\xfe\xff\0\xe0.{4}"
_LENGTH = rb"(?:DS(..)|(..)\0\0)"
POSITION = re.compile(rb"\x20\0\x13\x91" + _FIRST_ITEM + rb"\x20\0\x32\0" + _LENGTH, re.DOTALL)
DIRECTION = re.compile(rb"\x20\0\x16\x91" + _FIRST_ITEM + rb"\x20\0\x37\0" + _LENGTH, re.DOTALL)
# Thickness and distance of the slices come before the spacing, with up to 24 bytes each.
SPACING = re.compile(rb"\x28\0\x10\x91" + _FIRST_ITEM + rb".{0,64}?\x28\0\x30\0" + _LENGTH, re.DOTALL)
_SCALE = rb"\x28\0\x45\x91" + _FIRST_ITEM
INTERCEPT = re.compile(_SCALE + rb"\x28\0\x52\x10" + _LENGTH, re.DOTALL)
SLOPE = re.compile(_SCALE + rb".{0,32}?\x28\0\x53\x10" + _LENGTH, re.DOTALL)  # after the intercept
SEPARATE = "separate its phases, or convert it to NIfTI by a program such as dcm2niix"
CONVERT = "convert it to NIfTI by a program such as dcm2niix"


def check_frames(path: Path, file: Path, information: Any) -> None:
    """Refuse frames that do not form a stack, or that ITK places elsewhere: it then falls back to a spacing of 1 mm.

    Raises:
        VolumeError: the frames are not evenly spaced along their normal, or differ in their geometry or scale, or ITK
            does not follow them.
    """
    count = tag_text(information, FRAMES)
    if not count.isdigit():
        return
    groups = _functional_groups(file)
    for what, pattern in (("rescale intercept", INTERCEPT), ("rescale slope", SLOPE)):
        _check_scale(path, what, _stated(path, groups, pattern, 1), int(count))
    spacings = _stated(path, groups, SPACING, 2)[:, ::-1]  # the distance between rows comes first
    directions = _stated(path, groups, DIRECTION, 6)
    places = _places(path, groups, information, int(count))
    if len(places) > 1:
        check_steps(path, places, SEPARATE)
        check_upright(path, information, places)
    axes = np.reshape(information.GetDirection(), (3, 3))
    _check_alike(path, "spacing", spacings, information.GetSpacing()[:2], 1e-3 * np.min(spacings, initial=1.0))
    _check_alike(path, "direction", directions, axes[:, :2].T.ravel(), 1e-2)
    if len(places):
        _check_followed(path, places, information, axes[:, 2])


def _functional_groups(file: Path) -> bytes:
    """Return the part of a file that says what its frames share and what each of them has."""
    with file_content(file) as content:
        starts = [start for tag in (SHARED, PER_FRAME) if (start := content.find(tag)) >= 0]
        if not starts:
            return b""
        end = content.find(PIXELS, max(starts))
        return content[min(starts) : end if end >= 0 else len(content)]


def _stated(path: Path, groups: bytes, pattern: re.Pattern[bytes], count: int) -> NDArray[np.float64]:
    """Return the numbers of an element, a row of `count` for each time that it occurs."""
    rows = []
    for match in pattern.finditer(groups):
        length = int.from_bytes(match[1] or match[2], "little")
        text = groups[match.end() : match.end() + length].decode("ascii", "replace").strip("\0 ")
        rows.append(_numbers(path, text, count))
    return np.reshape(rows, (len(rows), count))


def _numbers(path: Path, text: str, count: int | None = None) -> list[float]:
    try:
        values = [float(word) for word in text.split("\\")]
    except ValueError:
        values = []
    if len(values) != (count or len(values)) or not values or not np.isfinite(values).all():
        raise refusal(
            path, "state the geometry and scale of its frames in numbers", repr(text[:80]), "correct its header"
        )
    return values


def _places(path: Path, groups: bytes, information: Any, count: int) -> NDArray[np.float64]:
    """Return the position of each frame, none if the file does not state them."""
    places = _stated(path, groups, POSITION, 3)
    offsets = tag_text(information, OFFSETS)
    if not len(places) and offsets:
        along = np.array(_numbers(path, offsets))
        columns = np.reshape(information.GetDirection(), (3, 3)).T
        normal = np.cross(columns[0], columns[1])  # of ITK's third axis, the sign is that of the offsets
        places = np.asarray(information.GetOrigin()) + np.outer(along - along[0], normal)
    if len(places) not in (0, count):
        raise refusal(path, f"state the positions of its {count} frames", str(len(places)), CONVERT)
    return places


def _check_scale(path: Path, what: str, stated: NDArray[np.float64], count: int) -> None:
    """Refuse frames with different scales: GDCM applies that of the first one to all of them."""
    if len(stated) not in (0, 1, count):
        raise refusal(path, f"state the {what} of its {count} frames", str(len(stated)), CONVERT)
    if len(stated) and np.ptp(stated) > 0:
        problem = f"values from {stated.min():.6g} to {stated.max():.6g}"
        raise refusal(path, f"hold frames of one {what}", problem, CONVERT)


def _check_alike(path: Path, what: str, stated: NDArray[np.float64], read: Sequence[float], tolerance: float) -> None:
    """Refuse frames that differ from one another, or from what ITK reads, by more than a tolerance."""
    if not len(stated):
        return
    if np.ptp(stated, axis=0).max() > min(tolerance, 1e-3):
        problem = f"{what} {numbers_text(stated[0])} and others"
        raise refusal(path, f"hold frames of one {what}", problem, SEPARATE)
    if np.abs(stated - read).max() > tolerance:
        problem = f"{numbers_text(read)} for {numbers_text(stated[0])}"
        raise refusal(path, f"be read with the {what} that its frames state", problem, CONVERT)


def _check_followed(path: Path, places: NDArray[np.float64], information: Any, normal: NDArray[np.float64]) -> None:
    """Refuse frames of which one lies more than a fortieth of a voxel from where ITK puts it along the normal."""
    origin, step = np.asarray(information.GetOrigin()), information.GetSpacing()[2]
    along = (places - places[0]) @ normal
    away = np.abs(along - step * np.arange(len(places))).max()
    away = max(away, np.abs(places[0] - origin).max())
    if away > 0.025 * np.abs(information.GetSpacing()).min() + 1e-3:  # negative where the frames go down
        problem = f"one that is {away:.4g} mm away"
        raise refusal(path, "be read with the positions that its frames state", problem, CONVERT)
