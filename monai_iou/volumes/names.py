"""Names of volumes, and finding volumes below a folder."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from monai_iou.tables import counted
from monai_iou.volumes.dicom_marks import DICOM_ENDINGS, DIRECTORY_CLASS, dicom_class, is_dicom
from monai_iou.volumes.header import VolumeError, refusal

NIFTI_EXTENSIONS = (".nii.gz", ".nii")
# A pair of files is listed by the name of its header; `.img` is accepted where the user names it.
PAIR_EXTENSIONS = (".hdr.gz", ".hdr")
NIFTI_ENDINGS = (*NIFTI_EXTENSIONS, *PAIR_EXTENSIONS, ".img.gz", ".img")
METAIMAGE_EXTENSIONS = (".mha", ".mhd")
NRRD_EXTENSIONS = (".nrrd", ".nhdr")
PNG_EXTENSION = ".png"
EXTENSIONS = (*NIFTI_EXTENSIONS, *PAIR_EXTENSIONS, *METAIMAGE_EXTENSIONS, *NRRD_EXTENSIONS, PNG_EXTENSION)
# Behind an image's name and an underscore: what `monai-iou predict` writes beside it.
MASK, PROBABILITIES, PREVIEW = "mask", "probabilities", "preview"
RESULTS = (MASK, PROBABILITIES)  # those that are volumes
PREVIEW_ENDING = f"_{PREVIEW}.png"
_ALL_EXTENSIONS = (*EXTENSIONS, ".img.gz", ".img")
_OF_SCANS = tuple(ending for ending in EXTENSIONS if ending != PNG_EXTENSION)
# The slices of a series have one ending. Of an ending that slices usually have, all files are inspected, as others may
# share it; of any other, such as `.jpg`, only so many: a folder may hold 100,000 files.
SLICE_ENDINGS = (*DICOM_ENDINGS, "")
LOOKED_INTO = 32
DIRECTORY = "dicomdir"  # the table of contents of a CD, which is DICOM and no slice
# Folders that the operating system keeps for itself, often without the right to read them.
_OF_THE_SYSTEM = ("lost+found", "System Volume Information", "$RECYCLE.BIN")


def case_name(path: Path) -> str:
    """Return the file name without the extension of a volume, in the composed Unicode form (NFC).

    >>> case_name(Path("site.2/case_1.nii.gz")), case_name(Path("c.NII.GZ"))
    ('case_1', 'c')
    """
    name = composed(path.name)
    lower = path.name.lower()
    for extension in _ALL_EXTENSIONS:
        if lower.endswith(extension) and len(lower) > len(extension):
            return name[: -len(extension)]
    return name


def with_name(path: Path) -> Path:
    """Return a path that ends in the name of what it leads to, which `.` and `..` lack; others stay as they are.

    >>> with_name(Path(".")).name == Path.cwd().name, with_name(Path("a")) == Path("a")
    (True, True)
    """
    return path.resolve() if path.name in ("", "..") else path


def composed(name: str) -> str:
    r"""Return a name in the composed Unicode form (NFC), in which names are compared whatever system wrote them.

    >>> composed("u\N{COMBINING DIAERESIS}") == "\N{LATIN SMALL LETTER U WITH DIAERESIS}"
    True
    """
    return unicodedata.normalize("NFC", name)


def is_hidden(path: Path) -> bool:
    """Return whether a file or folder is hidden, such as `.snapshot` or `._x`, the metadata of macOS."""
    return path.name.startswith(".") or path.name in _OF_THE_SYSTEM


def visible_entries(folder: Path) -> list[Path]:
    """Return the entries of a folder that are not hidden, sorted; none if there is no such folder.

    Raises:
        VolumeError: if the folder may not be read or entered: its volumes would otherwise be missing without notice.
    """
    try:
        os.stat(os.path.join(folder, "."))  # noqa: PTH116, PTH118 - fails where a folder may be listed but not entered
        return sorted(entry for entry in folder.iterdir() if not is_hidden(entry))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise unreadable(folder, error) from error


def is_folder(path: Path) -> bool:
    """Return whether a path is a folder or a link to one.

    Raises:
        VolumeError: if nobody may know, because it is a link into a folder that may not be entered.
    """
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except PermissionError as error:
        raise unreadable(path, error) from error
    except OSError:
        return False


def unreadable(path: Path, error: OSError) -> VolumeError:
    """Return the error for a file or folder that may not be read."""
    remedy = "ask for the right to read it, or move it elsewhere"
    return refusal(path, "be readable", f"the error '{error.strerror or error}'", remedy)


def is_volume(path: Path) -> bool:
    """Return whether a path has the name of a volume file, or is a folder of DICOM slices; see `_holds_series`."""
    if is_hidden(path):
        return False
    if is_folder(path):
        return _holds_series(path)
    return path.name.lower().endswith(EXTENSIONS)


def is_png(path: Path) -> bool:
    """Return whether a path has the name of a PNG picture."""
    return path.name.lower().endswith(PNG_EXTENSION)


def dicom_slices(folder: Path) -> Iterator[Path]:
    """Yield the DICOM files directly in a folder, sorted by name; the `DICOMDIR` of a CD is none of them.

    Raises:
        VolumeError: if the folder may not be read.
    """
    yield from filter(_is_slice, slice_candidates(folder))


def _is_slice(file: Path) -> bool:
    return is_dicom(file) and dicom_class(file) != DIRECTORY_CLASS


def _holds_series(folder: Path) -> bool:
    """Return whether a folder contains DICOM slices, and more of them than volumes.

    A single slice beside several volumes, such as the localiser of a study, does not stand for them.

    Raises:
        VolumeError: it contains slices and at least as many volumes, of which either may be what is meant.
    """
    files = slice_candidates(folder)
    scans = [entry for entry in visible_entries(folder) if entry.name.lower().endswith(_OF_SCANS)]
    # The mask of a lone slice, which `monai-iou predict` writes beside it, is no volume that may be meant.
    volumes = len(scans) - len((results_among([*files, *scans]) - results_among(scans)).intersection(scans))
    if not volumes:
        return any(map(_is_slice, _inspected(files)))
    endings = {slice_ending(file) for file in files[:LOOKED_INTO] if _is_slice(file)}
    slices = filter(_is_slice, (file for file in files if slice_ending(file) in endings))
    count = len(list(islice(slices, volumes + 1)))
    if 1 < count <= volumes or (count == volumes == 1):
        found = f"{counted(count, 'DICOM file')} beside {counted(volumes, 'volume')}"
        raise refusal(folder, "hold either a DICOM series or volumes", found, "move them to folders of their own")
    return count > volumes


def _inspected(files: Iterable[Path]) -> Iterator[Path]:
    """Yield the files to inspect for slices, those whose names look like slices first."""
    of_ending: dict[str, list[Path]] = {}
    for file in files:
        of_ending.setdefault(slice_ending(file), []).append(file)
    for ending in SLICE_ENDINGS:
        yield from of_ending.pop(ending, [])
    for others in of_ending.values():
        yield from others[:LOOKED_INTO]


def slice_ending(file: Path) -> str:
    """Return the extension of a slice in lower case; the last part of a UID or a number is none."""
    ending = file.suffix.lower()
    return "" if ending[1:].isdigit() else ending


def slice_candidates(folder: Path) -> list[Path]:
    """Return the entries of a folder that may be DICOM slices by their names, sorted; the errors of `dicom_slices`."""
    named = ((entry, entry.name.lower()) for entry in visible_entries(folder))
    return [entry for entry, name in named if not name.endswith(_ALL_EXTENSIONS) and name != DIRECTORY]


def results_among(volumes: Iterable[Path], kinds: Sequence[str] = RESULTS) -> set[Path]:
    """Return the files that have the names of results for others: `a_mask.nii.gz` beside `a.mha` or `a_0000.mha`.

    Args:
        volumes: files, and folders of DICOM slices; each may be the image and none but a file the result.
        kinds: of `RESULTS`; the pictures of masks are found in any case, beside the mask too.
    """
    named = [(path, case_name(path)) for path in volumes]
    images = {(path.parent, image) for path, name in named for image in (name, name.removesuffix("_0000"))}
    shown = images | {(path.parent, name.removesuffix(f"_{kind}")) for path, name in named for kind in RESULTS}

    def is_result(path: Path, name: str) -> bool:
        image, _, kind = name.rpartition("_")
        place = (path.parent, image)
        known = place in shown if path.name.endswith(PREVIEW_ENDING) else kind in kinds and place in images
        return known and image != "" and not path.is_dir()

    return {path for path, name in named if is_result(path, name)}


def volumes_below(folder: Path, *, deep: bool = True, without: Sequence[str] = (PROBABILITIES,)) -> Iterator[Path]:
    """Yield every volume below a folder: files with the names of volumes, and folders of DICOM slices.

    The entries of each folder are sorted. Hidden entries are skipped. Links to folders are followed, except those that
    lead back to a folder that contains them. PNG pictures count only where all volumes of their folder are PNG, apart
    from probability maps and what is left out: beside others they are screenshots.

    Args:
        folder: the folder to search; it is not regarded as a folder of slices itself.
        deep: whether to search subfolders as well.
        without: kinds of results that are left out where the volume that they are of lies beside them. Who looks for
            images leaves out all `RESULTS`.

    Raises:
        VolumeError: if a folder may not be read, whose volumes would be missing without notice.
    """
    yield from _below(folder, deep, without, (_identity(folder),))


def _below(folder: Path, deep: bool, without: Sequence[str], above: tuple[object, ...]) -> Iterator[Path]:
    entries = visible_entries(folder)
    folders = dict.fromkeys(entry for entry in entries if is_folder(entry))
    files = [entry for entry in entries if entry not in folders and is_volume(entry)]
    series = {entry for entry in folders if is_volume(entry)}
    volumes = [*series, *files]
    results = results_among(volumes, without)
    maps = f"_{PROBABILITIES}"
    pictures_only = all(is_png(e) or case_name(e).endswith(maps) for e in volumes if e not in results)
    yield from (e for e in files if e not in results and (pictures_only or not is_png(e)))
    for entry in folders:
        identity = _identity(entry)
        if identity in above:
            continue
        if entry in series:
            yield entry
        elif deep:
            yield from _below(entry, deep, without, (*above, identity))


def files_below(folder: Path, ending: str) -> Iterator[Path]:
    """Yield every file below a folder whose name has an ending, in upper or lower case.

    Args:
        folder: the folder to search; hidden entries and links are treated as by `volumes_below`.
        ending: in lower case, such as `.npz`.

    Raises:
        VolumeError: if a folder may not be read, whose files would be missing without notice.
    """
    yield from _files_below(folder, ending, (_identity(folder),))


def _files_below(folder: Path, ending: str, above: tuple[object, ...]) -> Iterator[Path]:
    for entry in visible_entries(folder):
        if not is_folder(entry):
            yield from [entry] if entry.name.lower().endswith(ending) else []
        elif (identity := _identity(entry)) not in above:
            yield from _files_below(entry, ending, (*above, identity))


def _identity(folder: Path) -> object:
    try:
        status = folder.stat()
    except OSError:
        return str(folder)
    return (status.st_dev, status.st_ino)


def find_spelling(path: Path) -> Path | None:
    """Return an existing path that equals `path` up to the Unicode form (NFC or NFD) of its names, or None.

    macOS may store an umlaut as a letter and two dots where other systems store one character: the names look the same
    but consist of different bytes, and each folder and file on the way may have been named by another system.
    """
    if os.path.lexists(path):
        return path
    folder = find_spelling(path.parent) if path.name else None
    if folder is None:
        return None
    for name in (path.name, *(unicodedata.normalize(form, path.name) for form in ("NFC", "NFD"))):
        if os.path.lexists(other := folder / name):
            return other
    try:
        return next((entry for entry in folder.iterdir() if composed(entry.name) == composed(path.name)), None)
    except OSError:
        return None
