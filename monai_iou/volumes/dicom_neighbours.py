"""One slice that is named by itself is no whole image where others of its series lie beside it."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from monai_iou.volumes.dicom_checks import tag_text
from monai_iou.volumes.dicom_marks import is_dicom
from monai_iou.volumes.header import VolumeError, refusal
from monai_iou.volumes.names import slice_candidates

SERIES, POSITION, DIRECTION = "0020|000e", "0020|0032", "0020|0037"
# Bytes: these elements come early, and a folder may hold 10,000 files; a long comment or an icon may lie before them.
HEADER_WITHIN, LONG_HEADER_WITHIN = 1 << 16, 1 << 24
# In both byte orders, with the type of the value or with its length in four bytes.
_LENGTH = rb"(?:UI..|DS..|..\0\0)"
_SERIES = re.compile(rb"(?:\x20\0\x0e\0|\0\x20\0\x0e)" + _LENGTH + rb"([0-9.]+)", re.DOTALL)
_POSITION = re.compile(rb"(?:\x20\0\x32\0|\0\x20\0\x32)" + _LENGTH + rb"([0-9.eE+\\ -]+)", re.DOTALL)
_DIRECTION = re.compile(rb"(?:\x20\0\x37\0|\0\x20\0\x37)" + _LENGTH + rb"([0-9.eE+\\ -]+)", re.DOTALL)
NEARBY = 1e-3  # mm between positions, and of the cosines of a direction


class _Place(NamedTuple):
    """Where a slice lies: its corner in mm, and the directions of its rows and columns."""

    position: tuple[float, ...]
    direction: tuple[float, ...]


def check_alone(path: Path, information: Any) -> None:
    """Refuse one slice of a series whose other slices lie in its folder: a mask of it would lack all the others.

    Accepted are a file of several frames, a slice without such neighbours, and the only view of a localiser in its
    plane, or one of the phases of one slice, which no folder would make a volume. The headers of
    a folder are read once, as long as no slice comes or goes.

    Args:
        path: of the file, as the user named it.
        information: its header, a `SimpleITK.ImageFileReader` after `ReadImageInformation`.

    Raises:
        VolumeError: the file is one of several slices.
    """
    own = _place(tag_text(information, POSITION), tag_text(information, DIRECTION))
    if own is None or information.GetSize()[2:] not in ((), (1,)):
        return
    try:
        names = tuple(slice_candidates(path.parent.absolute()))
    except VolumeError:
        return  # of a folder that may not be listed, nobody knows
    series = _series_in(names).get(tag_text(information, SERIES), [])
    others = {place.position for place in series if _is_beside(place, own)}
    if others:
        actual = f"one slice of a series of {len(others) + 1}"
        remedy = (
            f"name its folder, `{path.parent}`, or convert the series to NIfTI; if the file is an image of its own, "
            "move it to a folder of its own"
        )
        raise refusal(path, "be a whole image", actual, remedy)


@lru_cache(maxsize=8)
def _series_in(files: tuple[Path, ...]) -> dict[str, list[_Place]]:
    """The places of the slices among the files of a folder, by their series.

    What cannot be read is left to whoever reads it.
    """
    found: dict[str, list[_Place]] = {}
    for file in filter(is_dicom, files):
        try:
            with file.open("rb") as stream:
                start = stream.read(HEADER_WITHIN)
                if _DIRECTION.search(start) is None:
                    start += stream.read(LONG_HEADER_WITHIN)
        except OSError:
            continue
        position, direction = _POSITION.search(start), _DIRECTION.search(start)
        place = _place(position[1].decode(), direction[1].decode()) if position and direction else None
        # The file's own series is the last before its place; those that it refers to come earlier.
        series = [match[1].decode() for match in _SERIES.finditer(start, 0, position.start() if position else 0)]
        if place is not None and series:
            found.setdefault(series[-1], []).append(place)
    return found


def _place(position: str, direction: str) -> _Place | None:
    """The place that the texts of two elements state, None if they do not state one."""
    try:
        values = [tuple(float(word) for word in text.split("\\")) for text in (position, direction)]
    except ValueError:
        return None
    return _Place(*values) if [len(each) for each in values] == [3, 6] else None


def _is_beside(other: _Place, own: _Place) -> bool:
    """Whether another slice of the same series lies parallel to one, elsewhere along their normal."""
    normal = np.cross(own.direction[:3], own.direction[3:])
    away = abs(float(np.dot(np.subtract(other.position, own.position), normal)))
    return away > NEARBY and np.allclose(other.direction, own.direction, rtol=0, atol=NEARBY)
