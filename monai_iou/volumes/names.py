"""Names of volumes, and finding them: hidden entries are passed over, linked folders are followed once."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

NIFTI_EXTENSIONS = (".nii.gz", ".nii")
# The header's name stands for a pair; `.img` is read where it is named.
PAIR_EXTENSIONS = (".hdr.gz", ".hdr")
METAIMAGE_EXTENSIONS = (".mha", ".mhd")
NRRD_EXTENSIONS = (".nrrd", ".nhdr")
EXTENSIONS = NIFTI_EXTENSIONS + PAIR_EXTENSIONS + METAIMAGE_EXTENSIONS + NRRD_EXTENSIONS
_ALL_EXTENSIONS = (*EXTENSIONS, ".img.gz", ".img")
# So many files of a folder are looked into before it counts as one without DICOM slices.
LOOKED_INTO = 32
_VALUE_TYPES = b"AE AS AT CS DA DS DT FD FL IS LO LT OB OD OF OL OV OW PN SH SL SQ SS ST SV TM UC UI UL UN UR US UT UV"
# Groups 2 and 8 in little-endian order: what a DICOM file without its preamble begins with.
_FIRST_GROUPS = (b"\x02\0", b"\x08\0")


def case_name(path: Path) -> str:
    """The file name without the extension of a volume, composed (NFC) as most systems write it.

    >>> case_name(Path("site.2/case_1.nii.gz")), case_name(Path("c.NII.GZ"))
    ('case_1', 'c')
    """
    name = unicodedata.normalize("NFC", path.name)
    lower = path.name.lower()
    for extension in _ALL_EXTENSIONS:
        if lower.endswith(extension) and len(lower) > len(extension):
            return name[: -len(extension)]
    return name


def is_hidden(path: Path) -> bool:
    """Whether a file or folder is hidden: `.snapshot`, `.ipynb_checkpoints`, and `._x`, the metadata of macOS."""
    return path.name.startswith(".")


def is_volume(path: Path) -> bool:
    """Whether the name is that of a volume file, or the folder is one of DICOM slices."""
    if is_hidden(path):
        return False
    if path.is_dir():
        return next(dicom_slices(path, LOOKED_INTO), None) is not None
    return path.name.lower().endswith(EXTENSIONS)


def dicom_slices(folder: Path, most: int | None = None) -> Iterator[Path]:
    """The DICOM files directly in a folder by name; with `most`, only so many files are looked into."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return
    candidates = (e for e in entries if not is_hidden(e) and not e.name.lower().endswith(_ALL_EXTENSIONS))
    for number, entry in enumerate(candidates):
        if most is not None and number >= most:
            return
        if is_dicom(entry):
            yield entry


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM, with or without the preamble that the standard asks for."""
    try:
        if not path.is_file():  # never opens a pipe or a device
            return False
        with path.open("rb") as stream:
            start = stream.read(132)
    except OSError:
        return False
    if start[128:] == b"DICM":
        return True
    if start[:4] == b"DICM":
        return True
    explicit = start[4:6] in _VALUE_TYPES.split()
    implicit = start[6:8] == b"\0\0" and 0 < int.from_bytes(start[4:6], "little") <= 64
    return start[:2] in _FIRST_GROUPS and start[3:4] == b"\0" and (explicit or implicit)


def volumes_below(folder: Path, *, deep: bool = True) -> Iterator[Path]:
    """Every volume below a folder, sorted within each: files by their names, and folders of DICOM slices.

    Hidden entries are passed over. Links to folders are followed; a folder that a link leads back to is not entered
    again on the way down.

    Args:
        folder: where to start; it is not itself taken for a folder of slices.
        deep: whether to look into subfolders that are not a DICOM series.
    """
    yield from _below(folder, deep, (_identity(folder),))


def _below(folder: Path, deep: bool, above: tuple[object, ...]) -> Iterator[Path]:
    try:
        entries = sorted(entry for entry in folder.iterdir() if not is_hidden(entry))
    except OSError:
        return
    folders = []
    for entry in entries:
        if entry.is_dir():
            folders.append(entry)
        elif is_volume(entry):
            yield entry
    for entry in folders:
        identity = _identity(entry)
        if identity in above:
            continue
        if is_volume(entry):
            yield entry
        elif deep:
            yield from _below(entry, deep, (*above, identity))


def _identity(folder: Path) -> object:
    try:
        status = folder.stat()
    except OSError:
        return str(folder)
    return (status.st_dev, status.st_ino)


def find_spelling(path: Path) -> Path | None:
    """Return the path of an existing file whose name is `path` in another Unicode form (NFC, NFD), None without one.

    macOS writes `u` and two dots where other systems write one letter; they look the same and are other bytes.
    """
    if os.path.lexists(path):
        return path
    for form in ("NFC", "NFD"):
        other = Path(unicodedata.normalize(form, str(path)))
        if os.path.lexists(other):
            return other
    try:
        wanted = unicodedata.normalize("NFC", path.name)
        return next((e for e in path.parent.iterdir() if unicodedata.normalize("NFC", e.name) == wanted), None)
    except OSError:
        return None
