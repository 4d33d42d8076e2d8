"""Parsing of text headers: spelling of fields, numbers, choices, and the data files that a header names."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from monai_iou.volumes.header import refusal
from monai_iou.volumes.payload import AGAIN

# A text header has a few lines; a file without an end of the header in this many bytes is not one.
LONGEST_HEADER = 1 << 20
MAX_FILES = 100_000
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
CORRECT = "correct its header or write the file again"
UNITS_MM = {
    **dict.fromkeys(("mm", "millimeter", "millimeters", "millimetre", "millimetres", "", "?", "???"), 1.0),
    **dict.fromkeys(("um", "µm", "μm", "micron", "microns", "micrometer", "micrometers", "micrometre"), 1e-3),
    **dict.fromkeys(("cm", "centimeter", "centimeters", "centimetre", "centimetres"), 10.0),
    **dict.fromkeys(("m", "meter", "meters", "metre", "metres"), 1e3),
    **dict.fromkeys(("nm", "nanometer", "nanometers", "nanometre", "nanometres"), 1e-6),
}


def check_spelling(path: Path, names: Collection[str], known: Collection[str]) -> None:
    """Raise if the name of an unknown field differs by one bit from a known one, which indicates a damaged file.

    Raises:
        VolumeError: if there is such a field; the message names both.
    """
    for name in names:
        for other in known:
            if name == other or len(name) != len(other):
                continue
            changed = [ord(a) ^ ord(b) for a, b in zip(name, other, strict=True) if a != b]
            if len(changed) == 1 and changed[0].bit_count() == 1 and name.lower() != other.lower():
                raise refusal(path, f"have an undamaged header with the field `{other}`", f"`{name}`", AGAIN)


def numbers(path: Path, name: str, text: str, count: int | None = None) -> NDArray[np.float64]:
    """Return the numbers in the text of a field.

    Raises:
        VolumeError: if a word is not a number, or there are not exactly `count` numbers.
    """
    words = text.split()
    try:
        values = np.array([float(word) for word in words])
    except ValueError:
        values = np.zeros(0)
    if len(values) != len(words) or not words or (count is not None and len(words) != count):
        expected = f"have {count or 'some'} numbers in `{name}`"
        raise refusal(path, expected, repr(text[:80]), CORRECT)
    return values


def whole_numbers(path: Path, name: str, text: str, count: int | None = None) -> list[int]:
    """Return the whole numbers in the text of a field; errors as for `numbers`."""
    words = text.split()
    if not words or not all(re.fullmatch(r"[+-]?\d{1,18}", word) for word in words):
        raise refusal(path, f"have whole numbers in `{name}`", repr(text[:80]), CORRECT)
    if count is not None and len(words) != count:
        raise refusal(path, f"have {count} numbers in `{name}`", str(len(words)), "correct its header")
    return [int(word) for word in words]


def choice(path: Path, name: str, text: str, known: Mapping[str, str]) -> str:
    """Return the meaning of the word in a field.

    Raises:
        VolumeError: if the word is unknown; the message lists the known ones.
    """
    meaning = known.get(text.strip().lower())
    if meaning is None:
        words = ", ".join(sorted(known))
        raise refusal(path, f"have one of {words} in `{name}`", repr(text[:80]), CORRECT)
    return meaning


def listed_files(path: Path, text: str, following: Sequence[str]) -> list[Path]:
    """Return the data files that a header names: one file, a pattern `f%03d.raw first last step`, or a LIST.

    Args:
        path: the header file; names are relative to its folder.
        text: the value of the field.
        following: the lines after the field, which contain the names of a LIST.

    Raises:
        VolumeError: if the pattern or the list is invalid.
    """
    words = text.split()
    if words and words[0].upper() == "LIST":
        names = [line.strip() for line in following if line.strip()]
    elif len(words) >= 4 and "%" in words[0] and all(re.fullmatch(r"-?\d{1,9}", word) for word in words[1:4]):
        first, last, step = map(int, words[1:4])
        if step == 0 or len(range(first, last, step)) > MAX_FILES:
            raise refusal(path, "name its data files", repr(text[:80]), "correct the numbers of the pattern")
        names = [_numbered(path, words[0], n) for n in range(first, last + (1 if step > 0 else -1), step)]
    else:
        names = [text.strip()]
    if not names or not all(names) or len(names) > MAX_FILES or any("\0" in name for name in names):
        raise refusal(path, "name its data files", repr(text[:80]), "correct its header")
    return [_resolved(path, name) for name in names]


def _numbered(path: Path, pattern: str, number: int) -> str:
    # Python's own formatting would accept widths that fill the memory.
    if not (match := re.fullmatch(r"([^%]*)%(0?)(\d?)d([^%]*)", pattern)):
        raise refusal(path, "have one %d in its file pattern", repr(pattern[:80]), "correct the pattern")
    before, zero, width, after = match.groups()
    return before + str(number).rjust(int(width or 0), zero or " ") + after


def _resolved(path: Path, name: str) -> Path:
    file = path.parent / name
    if not file.is_file() and "\\" in name and (other := path.parent / name.replace("\\", "/")).is_file():
        return other  # written on Windows
    return file


def unit_in_mm(path: Path, field: str, units: list[str]) -> tuple[float, list[str]]:
    """Return the length of the unit of a field in mm, and a note if it is not 1.

    Raises:
        VolumeError: if a unit is unknown, or the axes have different ones.
    """
    names = {name.strip().lower() for name in units} or {""}
    unknown = sorted(name for name in names if name not in UNITS_MM)
    if unknown:
        raise refusal(path, f"have a unit of length in `{field}`", repr(unknown[0][:40]), "write mm, um, cm or m")
    scales = {UNITS_MM[name] for name in names}
    if len(scales) > 1:
        raise refusal(path, f"have one unit in `{field}`", ", ".join(sorted(names)), "correct its header")
    scale = scales.pop()
    notes = [f"`{path.name}`: the header's unit is {', '.join(sorted(names))}; lengths were converted to mm."]
    return scale, notes if scale != 1 else []
