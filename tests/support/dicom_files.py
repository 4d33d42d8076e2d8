"""DICOM files from a table of elements, for what no writer at hand makes: colours, segmentations, damaged headers."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

CT = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"
STRUCTURES = "1.2.840.10008.5.1.4.1.1.481.3"
REPORT = "1.2.840.10008.5.1.4.1.1.88.11"
DIRECTORY = "1.2.840.10008.1.3.10"
LONG = ("OB", "OW", "SQ", "UN", "UT")  # value representations with four bytes of length
OPEN = 0xFFFFFFFF
END_OF_ITEM, END_OF_SEQUENCE = struct.pack("<HHI", 0xFFFE, 0xE00D, 0), struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)

Elements = Mapping[tuple[int, int], tuple[str, Any]]


def element(tag: tuple[int, int], kind: str, value: Any) -> bytes:
    """One element in explicit little endian; a sequence is a list of tables, `SQ open` one that ends at a mark."""
    if kind == "SQ open":
        marked = [struct.pack("<HHI", 0xFFFE, 0xE000, OPEN) + elements(item) + END_OF_ITEM for item in value]
        return struct.pack("<HH", *tag) + b"SQ" + struct.pack("<HI", 0, OPEN) + b"".join(marked) + END_OF_SEQUENCE
    if kind == "SQ":
        items = [elements(item) for item in value]
        content = b"".join(struct.pack("<HHI", 0xFFFE, 0xE000, len(item)) + item for item in items)
    elif kind in ("US", "UL"):
        content = struct.pack("<H" if kind == "US" else "<I", value)
    else:
        content = value if isinstance(value, bytes) else str(value).encode()
        content += b"\0 "[kind != "UI" and kind not in LONG :][:1] * (len(content) % 2)
    length = struct.pack("<HI" if kind in LONG else "<H", *([0] if kind in LONG else []), len(content))
    return struct.pack("<HH", *tag) + kind.encode() + length + content


def elements(table: Elements) -> bytes:
    return b"".join(element(tag, kind, value) for tag, (kind, value) in sorted(table.items()))


def slice_elements(pixels: np.ndarray, number: int = 0, **changes: Any) -> dict[tuple[int, int], tuple[str, Any]]:
    """The elements of a slice (rows, columns), or of colours (rows, columns, 3), 2 mm above the one before it."""
    samples = pixels.shape[2] if pixels.ndim == 3 else 1
    bits = pixels.dtype.itemsize * 8
    return {
        (0x0008, 0x0016): ("UI", changes.get("kind", CT)),
        (0x0008, 0x0018): ("UI", f"1.2.3.{number + 1}"),
        (0x0008, 0x0060): ("CS", "CT"),
        (0x0020, 0x000D): ("UI", "1.2.3"),
        (0x0020, 0x000E): ("UI", "1.2.4"),
        (0x0020, 0x0013): ("IS", number + 1),
        (0x0020, 0x0032): ("DS", f"0\\0\\{2 * number}"),
        (0x0020, 0x0037): ("DS", "1\\0\\0\\0\\1\\0"),
        (0x0028, 0x0002): ("US", samples),
        (0x0028, 0x0004): ("CS", "RGB" if samples == 3 else "MONOCHROME2"),
        **({(0x0028, 0x0006): ("US", 0)} if samples == 3 else {}),
        (0x0028, 0x0010): ("US", pixels.shape[0]),
        (0x0028, 0x0011): ("US", pixels.shape[1]),
        (0x0028, 0x0030): ("DS", changes.get("spacing", "0.5\\0.75")),
        (0x0028, 0x0100): ("US", bits),
        (0x0028, 0x0101): ("US", bits),
        (0x0028, 0x0102): ("US", bits - 1),
        (0x0028, 0x0103): ("US", int(pixels.dtype.kind == "i")),
        (0x7FE0, 0x0010): ("OW" if bits > 8 else "OB", pixels.tobytes()),
    }


def write_without_pixels(path: Path, kind: str, series: str = "1.2.5") -> Path:
    """Write an object that is no image, such as a structure set."""
    table = slice_elements(np.zeros((1, 1), np.int16), 99, kind=kind)
    own = {tag: value for tag, value in table.items() if tag[0] < 0x20 or tag == (0x0020, 0x000D)}
    return write_elements(path, {**own, (0x0020, 0x000E): ("UI", series)})


def write_directory(path: Path) -> Path:
    """Write the table of contents of a CD, which has its class in the file's own group alone."""
    table = {(0x0004, 0x1130): ("CS", "DISK"), (0x0004, 0x1220): ("SQ", [])}
    return write_elements(path, table, DIRECTORY)


def write_elements(path: Path, table: Elements, kind: str = "") -> Path:
    """Write a file with preamble and the group that names its encoding."""
    meta = elements({
        (0x0002, 0x0001): ("OB", b"\0\1"),
        (0x0002, 0x0002): ("UI", kind or table[0x0008, 0x0016][1]),
        (0x0002, 0x0003): ("UI", table[0x0008, 0x0018][1] if (0x0008, 0x0018) in table else "1.2.9"),
        (0x0002, 0x0010): ("UI", "1.2.840.10008.1.2.1"),
    })  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(128) + b"DICM" + element((0x0002, 0x0000), "UL", len(meta)) + meta + elements(table))
    return path


def write_series(folder: Path, volume: np.ndarray, edits: Sequence[Elements] = (), **changes: Any) -> Path:
    """Write an array (X, Y, Z) as one file per slice; `edits` replace elements of the first slices."""
    for number in range(volume.shape[2]):
        table = slice_elements(np.ascontiguousarray(volume[..., number].T), number, **changes)
        write_elements(folder / f"{number}.dcm", {**table, **(edits[number] if number < len(edits) else {})})
    return folder


def multi_frame(
    volume: np.ndarray,
    kind: str = ENHANCED_CT,
    spacing: str = "0.5\\0.75",
    places: Sequence[str] | None = None,
    sequence: str = "SQ",
) -> Elements:
    """The elements of an array (X, Y, Z) in one file, its geometry in sequences; `places` are those of its frames."""
    places = [f"0\\0\\{2 * number}" for number in range(volume.shape[2])] if places is None else places
    table = slice_elements(np.ascontiguousarray(volume[..., 0].T), kind=kind)
    for tag in ((0x0020, 0x0032), (0x0020, 0x0037), (0x0028, 0x0030)):
        del table[tag]
    measures = {(0x0018, 0x0050): ("DS", "2"), (0x0018, 0x0088): ("DS", "2"), (0x0028, 0x0030): ("DS", spacing)}
    shared = {
        (0x0020, 0x9116): (sequence, [{(0x0020, 0x0037): ("DS", "1\\0\\0\\0\\1\\0")}]),
        (0x0028, 0x9110): (sequence, [measures]),
    }
    frames = [{(0x0020, 0x9113): (sequence, [{(0x0020, 0x0032): ("DS", place)}])} for place in places]
    return {
        **table,
        (0x0028, 0x0008): ("IS", volume.shape[2]),
        (0x5200, 0x9229): (sequence, [shared]),
        (0x5200, 0x9230): (sequence, frames),
        (0x7FE0, 0x0010): ("OW", np.ascontiguousarray(volume.transpose(2, 1, 0)).tobytes()),
    }
