"""MetaImage headers (.mha, .mhd); the geometry is interpreted as in ITK."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from monai_iou.volumes.header import Header, Part, check_affine, check_shape, one_number, refusal
from monai_iou.volumes.payload import AGAIN
from monai_iou.volumes.text_header import (
    LONGEST_HEADER,
    LPS_TO_RAS,
    check_spelling,
    choice,
    listed_files,
    numbers,
    unit_in_mm,
    whole_numbers,
)

TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}  # fmt: skip
KNOWN = (
    "ObjectType", "NDims", "BinaryData", "BinaryDataByteOrderMSB", "ElementByteOrderMSB", "CompressedData",
    "CompressedDataSize", "TransformMatrix", "Rotation", "Orientation", "Offset", "Position", "Origin",
    "CenterOfRotation", "AnatomicalOrientation", "ElementSpacing", "ElementSize", "DimSize", "HeaderSize",
    "ElementNumberOfChannels", "ElementType", "ElementDataFile", "DistanceUnits",
)  # fmt: skip
YES_NO = {"true": "yes", "t": "yes", "1": "yes", "false": "", "f": "", "0": ""}


def read_metaimage_header(path: Path) -> Header:
    """Read the header of a MetaImage file.

    Raises:
        VolumeError: if the file is not a MetaImage, or its header is damaged or contradictory.
    """
    fields, following, local = _fields(path)
    check_spelling(path, fields, KNOWN)
    if (kind := fields.get("ObjectType", "Image")) != "Image":
        raise refusal(path, "be an image", f"the object type {kind!r}", AGAIN)
    axes = whole_numbers(path, "NDims", fields.get("NDims", ""), 1)[0]
    shape = tuple(whole_numbers(path, "DimSize", fields.get("DimSize", ""), axes))
    check_shape(path, shape)
    channels = whole_numbers(path, "ElementNumberOfChannels", fields.get("ElementNumberOfChannels", "1"), 1)[0]
    if channels != 1 or fields.get("ElementType", "").endswith("_ARRAY"):
        raise one_number(path, str(channels))
    affine, notes = _place(path, fields, axes)
    dtype = _dtype(path, fields)
    parts = _parts(path, fields, following, local)
    files = tuple(dict.fromkeys((path, *(part.file for part in parts))))
    return Header(path, shape, dtype, affine, parts, None, files, tuple(notes))


def _fields(path: Path) -> tuple[dict[str, str], list[str], int]:
    """Return the fields up to ElementDataFile, which ends a header; the lines after it; and the offset of these."""
    with path.open("rb") as stream:
        start = stream.read(LONGEST_HEADER)
    fields: dict[str, str] = {}
    position = 0
    while position < len(start):
        end = start.find(b"\n", position)
        end = len(start) if end < 0 else end
        name, equals, value = start[position:end].decode("utf-8", "surrogateescape").partition("=")
        position = end + 1
        if not equals:
            if name.strip():
                break
            continue
        if name.strip() in fields:
            raise refusal(path, "have each field once", f"`{name.strip()}` twice", AGAIN)
        fields[name.strip()] = value.strip()
        if name.strip() == "ElementDataFile":
            local = value.strip().upper() == "LOCAL"
            rest = [] if local else start[position:].decode("utf-8", "surrogateescape").splitlines()
            return fields, rest, position
    raise refusal(path, "be a MetaImage", "no field `ElementDataFile`", AGAIN)


def _yes(path: Path, fields: dict[str, str], name: str, default: str = "False") -> bool:
    return bool(choice(path, name, fields.get(name, default), YES_NO))


def _dtype(path: Path, fields: dict[str, str]) -> np.dtype[np.generic]:
    kind = fields.get("ElementType", "")
    if kind not in TYPES:
        raise refusal(path, f"have one of {', '.join(TYPES)} as `ElementType`", repr(kind[:80]), AGAIN)
    name = "BinaryDataByteOrderMSB" if "BinaryDataByteOrderMSB" in fields else "ElementByteOrderMSB"
    return np.dtype((">" if _yes(path, fields, name) else "<") + TYPES[kind])


def _parts(path: Path, fields: dict[str, str], following: list[str], position: int) -> tuple[Part, ...]:
    source = fields["ElementDataFile"]
    encoding = "zlib" if _yes(path, fields, "CompressedData") else "raw"
    if not _yes(path, fields, "BinaryData", "True"):
        encoding = "ascii"
    skip = whole_numbers(path, "HeaderSize", fields.get("HeaderSize", "0"), 1)[0]
    if skip < -1:
        raise refusal(path, "have a `HeaderSize` of -1 or more", str(skip), "correct its header")
    if source.upper() == "LOCAL":
        return (Part(path, position, encoding),)
    from_end = skip == -1 and encoding == "raw"
    return tuple(
        Part(file, max(0, skip), encoding, from_end=from_end) for file in listed_files(path, source, following)
    )


def _place(path: Path, fields: dict[str, str], axes: int) -> tuple[NDArray[np.float64], list[str]]:
    """Return the affine and notes. The rows of the header's matrix are the directions of the axes, in LPS."""
    text = fields.get("ElementSpacing", fields.get("ElementSize"))
    if text is None:
        raise refusal(path, "have the field `ElementSpacing`", "none", "add the distance between voxels in mm")
    spacing = numbers(path, "ElementSpacing", text, axes)
    if not (np.isfinite(spacing) & (spacing > 0)).all():
        raise refusal(path, "have a positive spacing", repr(text), "correct the spacing in its header")
    matrix = _field(fields, ("TransformMatrix", "Rotation", "Orientation"))
    directions = (
        np.eye(axes) if matrix is None else numbers(path, "TransformMatrix", matrix, axes**2).reshape(axes, axes)
    )
    offset = _field(fields, ("Offset", "Position", "Origin"))
    origin = np.zeros(axes) if offset is None else numbers(path, "Offset", offset, axes)
    check_directions(path, directions)
    scale, notes = unit_in_mm(path, "DistanceUnits", [fields.get("DistanceUnits", "mm")])
    affine = lps_affine(directions.T * spacing * scale, origin * scale)
    check_affine(path, affine)
    return affine, notes


def check_directions(path: Path, directions: NDArray[np.float64]) -> None:
    """Raise VolumeError if a direction vector does not have length 1: a damaged digit would change the spacing."""
    lengths = np.linalg.norm(directions, axis=1)
    if not np.isfinite(lengths).all() or np.abs(lengths - 1).max() > 1e-2:
        text = ", ".join(f"{length:.4g}" for length in lengths)
        raise refusal(path, "have axis directions of length 1", text, "correct the directions in its header")


def lps_affine(columns: NDArray[np.float64], origin: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the (4, 4) affine to RAS mm of the first three axes from their columns and origin in LPS mm.

    The voxel size along missing axes is 1 mm.
    """
    axes = min(3, len(origin))
    affine = np.eye(4)
    affine[:axes, :axes] = columns[:axes, :axes]
    affine[:axes, 3] = origin[:axes]
    return np.asarray(LPS_TO_RAS @ affine)


def _field(fields: dict[str, str], names: tuple[str, ...]) -> str | None:
    return next((fields[name] for name in names if name in fields), None)
