"""NRRD headers (.nrrd, .nhdr); the geometry is interpreted as in ITK."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from monai_iou.volumes.header import Header, Part, check_affine, check_shape, one_number, refusal
from monai_iou.volumes.metaimage import lps_affine
from monai_iou.volumes.payload import AGAIN
from monai_iou.volumes.text_header import (
    CORRECT,
    LONGEST_HEADER,
    check_spelling,
    choice,
    listed_files,
    numbers,
    unit_in_mm,
    whole_numbers,
)

TYPES = {
    **dict.fromkeys(("signed char", "int8", "int8_t"), "i1"),
    **dict.fromkeys(("uchar", "unsigned char", "uint8", "uint8_t"), "u1"),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16", "int16_t"), "i2"),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), "u2"),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t"), "i4"),
    **dict.fromkeys(("uint", "unsigned int", "uint32", "uint32_t"), "u4"),
    **dict.fromkeys(
        ("longlong", "long long", "long long int", "signed long long", "signed long long int", "int64", "int64_t"), "i8"
    ),
    **dict.fromkeys(("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"), "u8"),
    "float": "f4",
    "double": "f8",
}
ENCODINGS = {
    "raw": "raw", "txt": "ascii", "text": "ascii", "ascii": "ascii", "hex": "hex", "gz": "gzip", "gzip": "gzip",
    "bz2": "bzip2", "bzip2": "bzip2",
}  # fmt: skip
# Signs that convert the first two axes of a space to LPS. Spaces without anatomical meaning count as LPS, as in ITK.
SPACES = {
    **dict.fromkeys(("right-anterior-superior", "ras"), "- -"),
    **dict.fromkeys(("left-anterior-superior", "las"), "+ -"),
    **dict.fromkeys(("left-posterior-superior", "lps"), "+ +"),
    **dict.fromkeys(("scanner-xyz", "3d-right-handed", "3d-left-handed", ""), "+ +"),
}
SPACES |= {f"{name}-time": signs for name, signs in SPACES.items() if name} | {
    f"{n}t": SPACES[n] for n in ("ras", "las", "lps")
}
CENTERS = {"cell": "cell", "node": "node", "???": "cell", "none": "cell"}
KNOWN = (
    "dimension", "type", "block size", "encoding", "endian", "content", "sizes", "spacings", "axis mins", "axismins",
    "axis maxs", "centers", "centerings", "labels", "units", "kinds", "data file", "datafile", "line skip", "byte skip",
    "space", "space dimension", "space units", "space origin", "space directions", "measurement frame",
)  # fmt: skip


def read_nrrd_header(path: Path) -> Header:
    """Read the header of an NRRD file.

    Raises:
        VolumeError: if the file is not NRRD, or its header is damaged or contradictory.
    """
    fields, following, position = _fields(path)
    check_spelling(path, fields, KNOWN)
    axes = whole_numbers(path, "dimension", fields.get("dimension", ""), 1)[0]
    shape = tuple(whole_numbers(path, "sizes", fields.get("sizes", ""), axes))
    check_shape(path, shape)
    affine, spatial, notes = _place(path, fields, axes)
    values = int(np.prod([shape[axis] for axis in range(axes) if axis not in spatial], dtype=object))
    if values > 1 and spatial != list(range(len(spatial))):
        raise one_number(path, str(values))  # colours or vectors, interleaved
    parts = _parts(path, fields, following, position)
    files = tuple(dict.fromkeys((path, *(part.file for part in parts))))
    kept = tuple(shape[axis] for axis in spatial)
    if values > 1:
        kept = (*(*kept, 1, 1)[:3], values)  # the channels are no axis in space
    return Header(path, kept, _dtype(path, fields), affine, parts, None, files, tuple(notes))


def _fields(path: Path) -> tuple[dict[str, str], list[str], int]:
    """Return the fields, the lines after `data file: LIST`, and the offset of the data (0 if they are detached)."""
    with path.open("rb") as stream:
        start = stream.read(LONGEST_HEADER)
    if not re.match(rb"NRRD000[1-5]\r?\n", start):
        raise refusal(path, "be an NRRD file", f"the first bytes {start[:8]!r}", AGAIN)
    fields: dict[str, str] = {}
    position = start.index(b"\n") + 1
    while position < len(start):
        end = start.find(b"\n", position)
        end = len(start) if end < 0 else end
        line = start[position:end].rstrip(b"\r").decode("utf-8", "surrogateescape")
        position = end + 1
        if not line.strip():
            return fields, [], position
        if line.startswith("#") or ":=" in line:
            continue  # a comment, or a key-value pair of the user
        name, colon, value = line.partition(":")
        name = name.strip().lower()
        if not colon or name in fields:
            problem = f"`{name}` twice" if colon else f"the line {line[:60]!r}"
            raise refusal(path, "have one field per line, and each field once", problem, AGAIN)
        fields[name] = value.strip()
        if name in ("data file", "datafile") and value.split()[:1] == ["LIST"]:
            return fields, start[position:].decode("utf-8", "surrogateescape").splitlines(), position
    if "data file" in fields or "datafile" in fields:
        return fields, [], 0
    raise refusal(path, "have voxels after its header", "none", AGAIN)


def _dtype(path: Path, fields: dict[str, str]) -> np.dtype[np.generic]:
    kind = choice(path, "type", fields.get("type", ""), TYPES)
    endian = fields.get("endian")
    if endian is None and kind[1] != "1" and ENCODINGS.get(fields.get("encoding", "").lower()) not in ("ascii",):
        raise refusal(path, "have the field `endian`", "none", "add `endian: little` if it was written on a PC")
    order = "<" if endian is None else choice(path, "endian", endian, {"little": "<", "big": ">"})
    return np.dtype(order + kind)


def _parts(path: Path, fields: dict[str, str], following: list[str], position: int) -> tuple[Part, ...]:
    encoding = choice(path, "encoding", fields.get("encoding", ""), ENCODINGS)
    named = fields.get("data file", fields.get("datafile"))
    lines = whole_numbers(path, "line skip", fields.get("line skip", fields.get("lineskip", "0")), 1)[0]
    skip = whole_numbers(path, "byte skip", fields.get("byte skip", fields.get("byteskip", "0")), 1)[0]
    if lines < 0 or skip < -1 or (skip == -1 and encoding != "raw"):
        raise refusal(path, "have valid `line skip` and `byte skip`", f"{lines} and {skip}", "correct its header")
    files = [path] if named is None else listed_files(path, named, following)
    result = []
    for file in files:
        start = _after_lines(path, file, position if named is None else 0, lines)
        if encoding == "raw":
            result.append(Part(file, start + max(0, skip), encoding, from_end=skip == -1))
        else:
            result.append(Part(file, start, encoding, skip=skip))
    return tuple(result)


def _after_lines(path: Path, file: Path, start: int, lines: int) -> int:
    if lines == 0:
        return start
    with file.open("rb") as stream:
        stream.seek(start)
        for _ in range(lines):
            if not stream.readline(LONGEST_HEADER):
                raise refusal(path, f"have {lines} lines before its data", "fewer", "correct `line skip`")
        return stream.tell()


def _place(path: Path, fields: dict[str, str], axes: int) -> tuple[NDArray[np.float64], list[int], list[str]]:
    """Return the affine, the spatial axes of the file, and notes."""
    if "space directions" not in fields:
        return _plain_place(path, fields, axes)
    vectors = re.findall(r"none|\([^)]*\)|\S+", fields["space directions"])
    spatial = [axis for axis, vector in enumerate(vectors) if vector != "none"]
    size = len(spatial)
    if len(vectors) != axes or not 1 <= size <= 4:
        counts = f"{len(vectors)} for {axes} axes"
        raise refusal(path, "have a direction for each axis in `space directions`", counts, "correct its header")
    columns = np.stack([_vector(path, "space directions", vectors[axis], size) for axis in spatial], axis=1)
    origin = _vector(path, "space origin", fields["space origin"], size) if "space origin" in fields else np.zeros(size)
    if size == 4:
        columns, spatial = _three_of_four(path, columns, spatial)
    space = choice(path, "space", fields.get("space", ""), SPACES)
    signs = np.array([-1.0 if sign == "-" else 1.0 for sign in (*space.split(), "+")])[:size]
    scale, notes = unit_in_mm(path, "space units", _quoted(fields.get("space units", ""))[:3])
    affine = lps_affine(columns * signs[:, None] * scale, origin[:3] * signs * scale)
    check_affine(path, affine)
    return affine, spatial, notes


def _three_of_four(path: Path, columns: NDArray[np.float64], axes: list[int]) -> tuple[NDArray[np.float64], list[int]]:
    """Return the directions (3, 3) of the axes that lie in space, and these axes.

    ITK gives each of four axes a direction in four dimensions. The fourth dimension, such as time, must have an axis of
    its own, which then counts the channels.
    """
    outside = np.flatnonzero(columns[3])
    if len(outside) != 1 or columns[:3, outside].any():
        expected = "have one axis along the fourth dimension, and three without a part of it"
        vectors = "; ".join("(" + ", ".join(f"{value:g}" for value in column) + ")" for column in columns.T)
        raise refusal(path, expected, vectors, "write each volume to its own file")
    inside = [place for place in range(4) if place != outside[0]]
    return columns[:3, inside], [axes[place] for place in inside]


def _plain_place(path: Path, fields: dict[str, str], axes: int) -> tuple[NDArray[np.float64], list[int], list[str]]:
    """Return the affine of a header without directions, from `spacings` and `axis mins`, as :func:`_place` does."""
    kinds = fields.get("kinds", "").split()
    spatial = [
        a for a in range(axes) if not (len(kinds) == axes and kinds[a] not in ("domain", "space", "???", "none"))
    ]
    spatial = spatial[:3]
    if _has_origin(path, fields):  # in a space, and in no direction of it
        raise refusal(path, "have `space directions` with its `space origin`", "none", "add the axes' directions")
    if "spacings" not in fields:
        raise refusal(path, "have `space directions` or `spacings`", "neither", "add the distance between voxels in mm")
    spacing = numbers(path, "spacings", fields["spacings"], axes)[spatial]
    if not (np.isfinite(spacing) & (spacing > 0)).all():
        raise refusal(path, "have a positive spacing", repr(fields["spacings"]), "correct the spacing in its header")
    scale, notes = unit_in_mm(path, "units", _units_of_axes(path, fields, axes, spatial))
    affine = lps_affine(np.diag(spacing) * scale, _first_voxel(path, fields, axes, spatial, spacing) * scale)
    check_affine(path, affine)
    return affine, spatial, notes


def _has_origin(path: Path, fields: dict[str, str]) -> bool:
    """Return whether `space origin` is a place other than 0, which is also that of no origin; NaN: unknown."""
    text = fields.get("space origin", "(0)")
    origin = _vector(path, "space origin", text, len(text.strip("()").replace(",", " ").split()))
    return bool((~np.isnan(origin) & (origin != 0)).any())


def _first_voxel(
    path: Path, fields: dict[str, str], axes: int, spatial: list[int], spacing: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the centre of the first voxel: `axis mins` is its edge, except where the samples are nodes."""
    text = fields.get("axis mins", fields.get("axismins"))
    if text is None:
        return np.zeros(len(spatial))
    start = numbers(path, "axis mins", text, axes)[spatial]
    if np.isinf(start).any():
        raise refusal(path, "have finite numbers in `axis mins`", repr(text[:80]), CORRECT)
    centers = fields.get("centerings", fields.get("centers", " ".join(["cell"] * axes)))
    words = [choice(path, "centers", word, CENTERS) for word in centers.split()]
    if len(words) != axes:
        raise refusal(path, f"have {axes} words in `centers`", repr(centers[:80]), CORRECT)
    edges = np.array([words[axis] == "cell" for axis in spatial])
    return np.zeros(len(spatial)) if np.isnan(start).any() else start + edges * spacing / 2  # NaN: unknown, as in ITK


def _vector(path: Path, name: str, text: str, size: int) -> NDArray[np.float64]:
    if not (text.startswith("(") and text.endswith(")")):
        raise refusal(path, f"have vectors in `{name}`", repr(text[:80]), CORRECT)
    return numbers(path, name, text[1:-1].replace(",", " "), size)


def _quoted(text: str) -> list[str]:
    return re.findall(r'"([^"]*)"', text)


def _units_of_axes(path: Path, fields: dict[str, str], axes: int, spatial: list[int]) -> list[str]:
    """Return the units of the spatial axes, none if the header states none."""
    units = _quoted(fields.get("units", ""))
    if len(units) not in (0, axes):
        raise refusal(path, f"have {axes} units in `units`", repr(fields["units"][:80]), CORRECT)
    return [units[axis] for axis in spatial] if units else []
