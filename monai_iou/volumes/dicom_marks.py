"""What tells that a file is DICOM, and of which class, by its first bytes."""

from __future__ import annotations

import re
from pathlib import Path

from monai_iou.volumes.header import is_dangling

DIRECTORY_CLASS = "1.2.840.10008.1.3.10"
DICOM_ENDINGS = (".dcm", ".dicom", ".ima")
_VALUE_TYPES = b"AE AS AT CS DA DS DT FD FL IS LO LT OB OD OF OL OV OW PN SH SL SQ SS ST SV TM UC UI UL UN UR US UT UV"
# Groups 2 and 8 in little-endian order: what a DICOM file without its preamble begins with.
_FIRST_GROUPS = (b"\x02\0", b"\x08\0")
# The class of the object that a DICOM file holds: of the file, or of the object itself, with or without its type.
_CLASS = re.compile(rb"(?:\x02\0\x02\0|\x08\0\x16\0)(?:UI(..)|(..)\0\0)", re.DOTALL)
_CLASS_WITHIN = 4096


def is_dicom(path: Path) -> bool:
    """Return whether a file is DICOM, with or without the preamble that the standard requires.

    A file that may not be read, and a link whose file is not there, count as DICOM if they are called so: reading the
    series fails by their names.
    """
    try:
        if not path.is_file():  # never opens a pipe or a device
            return is_dangling(path) and _is_called_so(path)
        with path.open("rb") as stream:
            start = stream.read(132)
    except PermissionError:
        return _is_called_so(path)
    except OSError:
        return False
    if start[128:] == b"DICM":
        return True
    if start[:4] == b"DICM":
        return True
    explicit = start[4:6] in _VALUE_TYPES.split()
    implicit = start[6:8] == b"\0\0" and 0 < int.from_bytes(start[4:6], "little") <= 64
    return start[:2] in _FIRST_GROUPS and start[3:4] == b"\0" and (explicit or implicit)


def _is_called_so(path: Path) -> bool:
    return path.suffix.lower() in DICOM_ENDINGS


def dicom_class(path: Path) -> str:
    """Return the SOP class of a DICOM file, "" if its first bytes do not hold it: the file may be cut off there."""
    try:
        with path.open("rb") as stream:
            start = stream.read(_CLASS_WITHIN)
    except OSError:
        return ""
    for match in _CLASS.finditer(start):
        length = int.from_bytes(match[1] or match[2], "little")
        text = start[match.end() : match.end() + length].rstrip(b"\0 ")
        if match.end() + length <= len(start) and re.fullmatch(rb"[0-9.]+", text):
            return text.decode("ascii")
    return ""
