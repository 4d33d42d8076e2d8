"""Reading DICOM, one series per folder or a single file, with SimpleITK and GDCM."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monai_iou.volumes.dicom_checks import (
    check_direction,
    check_length,
    check_series,
    check_spacing,
    slice_thickness,
    tag_text,
)
from monai_iou.volumes.dicom_frames import check_frames
from monai_iou.volumes.dicom_marks import DIRECTORY_CLASS, dicom_class, is_dicom
from monai_iou.volumes.dicom_neighbours import check_alone
from monai_iou.volumes.header import check_affine, is_dangling, one_number, refusal
from monai_iou.volumes.memory import room_for
from monai_iou.volumes.metaimage import lps_affine
from monai_iou.volumes.names import dicom_slices, slice_candidates, slice_ending, unreadable
from monai_iou.volumes.plain_names import give_name, temporary_folder

SOP_CLASS = "0008|0016"
PREAMBLE = 128  # bytes before DICM
# These hold contours or packed frames, which ITK reads as an empty image or rejects without giving the reason.
NOT_IMAGES = {
    "1.2.840.10008.5.1.4.1.1.481.3": "an RT structure set",
    "1.2.840.10008.5.1.4.1.1.66.4": "a DICOM segmentation object",
    "1.2.840.10008.5.1.4.1.1.66.7": "a DICOM label map segmentation",
    "1.2.840.10008.5.1.4.1.1.66.1": "a DICOM registration object",
    "1.2.840.10008.5.1.4.1.1.66.5": "a DICOM surface segmentation",
    DIRECTORY_CLASS: "the table of contents of a CD",
}


def read_dicom(path: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Read a folder that contains one DICOM series, or a single DICOM file.

    Returns:
        The voxels, indexed [x, y, z] with x along the rows of a slice, and the (4, 4) affine from voxel indices to RAS
        mm.

    Raises:
        VolumeError: if it is not an image, has colours or no valid spacing, or the folder contains several series, a
            series with gaps, or the remains of a slice, or the file is one slice of a series that lies beside it.
    """
    with itk_is_quiet(), _plain_names(path) as links:
        if not links:
            raise refusal(path, "hold one DICOM series", "0", "name the folder that contains its slices")
        _refuse_objects(path, _kind_of_images(links))
        if path.is_dir():
            return read_with_itk(path, _one_series(path, links))
        (file,) = links
        check_alone(path, _information(file))
        return read_with_itk(path, [file])


def read_with_itk(path: Path, files: list[Path]) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Read files of any format as one volume with SimpleITK; see `read_dicom` for the result and the errors."""
    import SimpleITK

    slices = [_information(file) for file in files]
    information = slices[0]
    _refuse_objects(path, tag_text(information, SOP_CLASS))
    if information.GetNumberOfComponents() > 1:
        raise one_number(path, f"{information.GetNumberOfComponents()} (colours)")
    _check_headers(path, files, slices)
    size = information.GetSize()
    shape = (*size[:2], len(files)) if len(files) > 1 else size
    count = int(np.prod(shape, dtype=object))
    with room_for(path, 2 * count * max(map(_item_bytes, slices)), shape):
        # ITK reads a series as its first slice's type: the fractions of a later slice's own scale would be cut off.
        kind = information.GetPixelID() if len({each.GetPixelID() for each in slices}) == 1 else SimpleITK.sitkFloat64
        image = SimpleITK.ReadImage([str(file) for file in files] if len(files) > 1 else str(files[0]), kind)
        if image.GetNumberOfComponentsPerPixel() > 1:
            raise one_number(path, f"{image.GetNumberOfComponentsPerPixel()} (colours)")
        if "complex" in image.GetPixelIDTypeAsString():
            raise one_number(path, "complex numbers")
        if shape[2:] == (1,):
            image.SetSpacing((*image.GetSpacing()[:2], slice_thickness(information, image.GetSpacing()[2])))
        affine = _affine(image)
        check_affine(path, affine)
        return SimpleITK.GetArrayFromImage(image).transpose(), affine


def _check_headers(path: Path, files: list[Path], slices: list[Any]) -> None:
    for file, each in zip(files, slices, strict=True):
        check_length(path, file, each)
        check_spacing(path, file, each)
        check_direction(path, each)
        check_frames(path, file, each)
    if len(files) > 1:
        check_series(path, slices)


def _affine(image: Any) -> NDArray[np.float64]:
    axes = image.GetDimension()
    columns = np.reshape(image.GetDirection(), (axes, axes)) * np.asarray(image.GetSpacing())
    return lps_affine(columns, np.asarray(image.GetOrigin()))


def _information(file: Path) -> Any:
    import SimpleITK

    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(file))
    reader.ReadImageInformation()
    return reader


def _item_bytes(information: Any) -> int:
    import SimpleITK

    text = SimpleITK.GetPixelIDValueAsString(information.GetPixelID())
    return next((bits // 8 for bits in (64, 32, 16) if str(bits) in text), 1)


def _one_series(folder: Path, links: dict[Path, Path]) -> list[Path]:
    """Return the links to the slices of a folder's only series, in order along the normal of the slices."""
    import SimpleITK

    plain = next(iter(links)).parent
    series = SimpleITK.ImageSeriesReader.GetGDCMSeriesIDs(str(plain))
    if len(series) != 1:
        remedy = "put each series into a folder of its own"
        if not series:
            remedy = "name the folder that contains its slices, or copy them again"
        raise refusal(folder, "hold one DICOM series", str(len(series)), remedy)
    names = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(plain), series[0])
    slices = [plain / Path(name).name for name in names]
    _check_complete(folder, links, set(slices))
    return slices


def _check_complete(folder: Path, links: dict[Path, Path], slices: set[Path]) -> None:
    """Refuse the remains of a slice, which GDCM leaves out without a word: an interrupted copy cuts a file anywhere.

    A file of another class than the slices', such as a structure set or a report, is not among them and may stay.
    """
    out = [link for link in links if link not in slices]
    classes = {dicom_class(link) for link in slices} | {""} if out else set()
    cut = [links[link] for link in out if dicom_class(link) in classes]
    cut += _without_content(folder, set(links.values()), {slice_ending(links[link]) for link in slices})
    _refuse_remains(folder, cut)


def _refuse_remains(folder: Path, cut: list[Path]) -> None:
    if cut:
        more = f" and {len(cut) - 1} more" if len(cut) > 1 else ""
        problem = f"`{cut[0].name}`{more}, which cannot be read"
        raise refusal(folder, "hold whole slices", problem, "copy it again, or take it away if it is none")


def _without_content(folder: Path, dicom: set[Path], endings: set[str]) -> list[Path]:
    """Return the files that are named as the slices are and are no DICOM, because they are empty or overwritten.

    So is a link whose file is not there.
    """
    files = [f for f in slice_candidates(folder) if f not in dicom and (is_dangling(f) or f.is_file())]
    others = [file for file in files if not is_dicom(file)]
    return [file for file in others if slice_ending(file) in endings and (slice_ending(file) or _was_slice(file))]


def _was_slice(file: Path) -> bool:
    """Whether a file without an ending may be the rest of a slice; a link may have led to anything but for a number."""
    return any(map(str.isdigit, file.name)) if is_dangling(file) else _is_blank(file)


def _kind_of_images(files: Iterable[Path]) -> str:
    """The class of the first file that holds an image, or of the first of all if there are only other objects."""
    kinds = map(dicom_kind, files)
    first = next(kinds)
    return next((kind for kind in chain([first], kinds) if kind not in NOT_IMAGES), first)


def _is_blank(file: Path) -> bool:
    """Return whether a file is empty, begins with zeros, or may not be read; a text beside slices is something else."""
    try:
        with file.open("rb") as stream:
            return not stream.read(PREAMBLE + 4).strip(b"\0")
    except OSError:
        return True


@contextmanager
def _plain_names(path: Path) -> Iterator[dict[Path, Path]]:
    """Link to the DICOM files under names that every library accepts; skip hidden files, pipes and other formats."""
    files = list(dicom_slices(path)) if path.is_dir() else [path]
    if path.is_dir():
        _refuse_remains(path, [file for file in files if is_dangling(file)])
    with temporary_folder(path) as folder:
        links = {}
        for number, file in enumerate(files):
            link = Path(folder) / f"{number:06d}.dcm"
            start = _missing_start(file)
            if start:
                link.write_bytes(start + file.read_bytes())
            else:
                give_name(link, file.resolve())
            links[link] = file
        yield links


def _missing_start(file: Path) -> bytes:
    """Return the bytes that GDCM needs before a file: none, the preamble, or also the group that gives the encoding."""
    try:
        with file.open("rb") as stream:
            start = stream.read(PREAMBLE + 4)
    except PermissionError as error:
        raise unreadable(file, error) from error
    if start[PREAMBLE:] == b"DICM":
        return b""
    if start[:4] == b"DICM":
        return bytes(PREAMBLE)
    if start[:2] == b"\x02\0":
        return bytes(PREAMBLE) + b"DICM"
    explicit = start[4:6].isalpha() and start[4:6].isupper()
    syntax = b"1.2.840.10008.1.2.1\0" if explicit else b"1.2.840.10008.1.2\0"
    element = b"\x02\0\x10\0UI" + len(syntax).to_bytes(2, "little") + syntax
    return bytes(PREAMBLE) + b"DICM\x02\0\0\0UL\x04\0" + len(element).to_bytes(4, "little") + element


def dicom_kind(path: Path) -> str:
    """Return the SOP class of a DICOM file, or an empty string if it is unknown."""
    import SimpleITK

    header = SimpleITK.ImageFileReader()
    header.SetFileName(str(path))
    header.SetImageIO("GDCMImageIO")
    try:
        header.ReadImageInformation()
    except RuntimeError:
        return dicom_class(path)  # GDCM rejects objects without pixels
    return tag_text(header, SOP_CLASS)


def _refuse_objects(path: Path, kind: str) -> None:
    if kind in NOT_IMAGES:
        remedy = "convert it to a NIfTI or NRRD label map on the grid of the image"
        if kind == DIRECTORY_CLASS:
            remedy = "name the folder that contains the slices of the series"
        raise refusal(path, "hold image slices", NOT_IMAGES[kind], remedy)


@contextmanager
def itk_is_quiet() -> Iterator[None]:
    """Suppress the warnings that ITK writes directly to the terminal; this module checks what matters in them."""
    import SimpleITK

    shown = SimpleITK.ProcessObject.GetGlobalWarningDisplay()
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        SimpleITK.ProcessObject.SetGlobalWarningDisplay(shown)
