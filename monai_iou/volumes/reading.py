"""Reading volumes: NIfTI by nibabel, everything else by SimpleITK, all on grids in RAS millimetres."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monai_iou.volumes.grid import Grid

NIFTI_EXTENSIONS = (".nii.gz", ".nii")
ITK_EXTENSIONS = (".mha", ".mhd", ".nrrd", ".nhdr")
EXTENSIONS = NIFTI_EXTENSIONS + ITK_EXTENSIONS

SOP_CLASS = "0008|0016"
# They hold outlines or packed frames, which ITK reads as an image of nothing or refuses without saying why.
NOT_IMAGES = {
    "1.2.840.10008.5.1.4.1.1.481.3": "an RT structure set",
    "1.2.840.10008.5.1.4.1.1.66.4": "a DICOM segmentation object",
}
# Header scaling in float32 leaves whole numbers this far from whole.
ROUNDING = 1e-4


class VolumeError(ValueError):
    """A file that cannot be read as one volume, or not as labels; the message names the file, the value, the remedy."""


@dataclass(frozen=True, eq=False)
class Volume:
    """Voxels and where they lie.

    Args:
        array: shape (X, Y, Z), axes as in the file's own index order.
        grid: their place in the patient, in RAS mm.
        path: the file or DICOM folder.
    """

    array: NDArray[Any]
    grid: Grid
    path: Path


def case_name(path: Path) -> str:
    """The file name without the extension of a volume.

    >>> case_name(Path("site.2/case_1.nii.gz"))
    'case_1'
    """
    for extension in EXTENSIONS:
        if path.name.lower().endswith(extension):
            return path.name[: -len(extension)]
    return path.name


def is_volume(path: Path) -> bool:
    """Whether the name is that of a volume file, or the folder is one of DICOM slices."""
    if path.is_dir():
        return any(_is_dicom(file) for file in sorted(path.iterdir())[:8])
    return path.name.lower().endswith(EXTENSIONS) and not path.name.startswith(".")


def read_volume(path: Path | str) -> Volume:
    """Read one 3D volume with its header's scaling applied.

    Args:
        path: NIfTI, MetaImage, NRRD or any other file SimpleITK reads, or a folder with one DICOM series.

    Returns:
        The volume. A 2D image becomes one slice; axes of length one after the third are dropped.

    Raises:
        VolumeError: the file is missing, truncated, not a volume, has more than one volume, or has no valid geometry.
    """
    path = Path(path)
    if not path.exists():
        message = f"Expected `{path}` to be a volume, but there is no such file."
        raise VolumeError(message)
    reader = _read_nifti if path.name.lower().endswith(NIFTI_EXTENSIONS) else _read_itk
    try:
        array, affine = reader(path)
    except VolumeError:
        raise
    except Exception as error:  # the libraries raise anything from EOFError to zlib.error on damaged files
        message = f"Expected `{path}` to be a readable volume, but got {_one_line(error)}: copy or write it again."
        raise VolumeError(message) from error
    array = _squeeze(array, path)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        message = f"Expected `{path}` to have a valid affine, but got {affine[:3].tolist()}: correct its header."
        raise VolumeError(message)
    x, y, z = array.shape
    return Volume(array, Grid((x, y, z), affine), path)


def read_labels(path: Path | str) -> Volume:
    """Read one volume of labels as the smallest integer dtype that holds them.

    Args:
        path: as for `read_volume`; whole numbers stored as floats are accepted.

    Returns:
        The volume, its array of dtype uint8, int16, int32 or int64.

    Raises:
        VolumeError: as `read_volume`, or a voxel is NaN, infinite or a fraction.
    """
    volume = read_volume(path)
    array = volume.array
    if array.dtype.kind == "f":
        array = _whole_numbers(array, volume.path)
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    for dtype in (np.uint8, np.int16, np.int32, np.int64):
        limits = np.iinfo(dtype)
        if limits.min <= low and high <= limits.max:
            return Volume(array.astype(dtype, copy=False), volume.grid, volume.path)
    message = f"Expected `{path}` to hold labels within 64-bit integers, but got values up to {high}: renumber them."
    raise VolumeError(message)


def file_hash(path: Path | str) -> str:
    """SHA-256 over the bytes of a volume: of the file, of a detached header and its data, or of a folder's files."""
    digest = hashlib.sha256()
    for file in _files_of(Path(path)):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.is_file())
    files = [path]
    if path.suffix.lower() in {".mhd", ".nhdr"}:
        text = path.read_bytes()[:65536].decode("latin-1")
        for name in re.findall(r"(?im)^(?:ElementDataFile\s*=|data ?file\s*:)\s*(.+?)\s*$", text):
            files += [path.with_name(name)] if path.with_name(name).is_file() else []
    return files


def _read_nifti(path: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    import nibabel

    image: Any = nibabel.load(path)
    if image.get_data_dtype().fields is not None or image.get_data_dtype().kind == "c":
        message = f"Expected `{path}` to hold one number per voxel, but got {image.get_data_dtype()}: convert it first."
        raise VolumeError(message)
    array = np.asanyarray(image.dataobj)
    return array.astype(array.dtype.newbyteorder("="), copy=False), np.asarray(image.affine, dtype=np.float64)


def _read_itk(path: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    import SimpleITK

    with _itk_is_quiet():
        if _is_dicom(path):
            _refuse_dicom_objects(path, _dicom_kind(path))
        image = _read_series(path) if path.is_dir() else SimpleITK.ReadImage(str(path))
    if image.HasMetaDataKey(SOP_CLASS):
        _refuse_dicom_objects(path, image.GetMetaData(SOP_CLASS).strip("\0 "))
    if image.GetNumberOfComponentsPerPixel() > 1:
        message = (
            f"Expected `{path}` to hold one number per voxel, but got {image.GetNumberOfComponentsPerPixel()}: "
            "write one component."
        )
        raise VolumeError(message)
    dimension = image.GetDimension()
    directions = np.eye(max(dimension, 3))
    directions[:dimension, :dimension] = np.reshape(image.GetDirection(), (dimension, dimension))
    affine = np.eye(4)
    affine[:3, :3] = directions[:3, :3] * np.append(image.GetSpacing(), 1.0)[:3]
    affine[:3, 3] = np.append(image.GetOrigin(), 0.0)[:3]
    # ITK's positions are LPS; SimpleITK's arrays have the axes reversed.
    return SimpleITK.GetArrayFromImage(image).transpose(), np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _read_series(folder: Path) -> Any:
    """Read the folder's one DICOM series as a SimpleITK image."""
    import SimpleITK

    series = SimpleITK.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    if len(series) != 1:
        for file in sorted(folder.iterdir())[:1]:
            _refuse_dicom_objects(folder, _dicom_kind(file))
        message = f"Expected `{folder}` to hold one DICOM series, but got {len(series)}: give each a folder of its own."
        raise VolumeError(message)
    files = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series[0])
    slices = []
    for name in files:
        header = SimpleITK.ImageFileReader()
        header.SetFileName(name)
        header.ReadImageInformation()
        slices.append(np.asarray(header.GetOrigin()))
    steps = np.linalg.norm(np.diff(np.asarray(slices), axis=0), axis=1)
    if steps.size and steps.max() > steps.min() * 1.01 + 1e-3:
        # ITK only warns, and then places every slice after the gap wrongly.
        message = (
            f"Expected `{folder}` to hold evenly spaced slices, but got steps from {steps.min():.4g} to "
            f"{steps.max():.4g} mm: add the missing slices."
        )
        raise VolumeError(message)
    return SimpleITK.ReadImage(list(files))


def _dicom_kind(path: Path) -> str:
    """The SOP class of a DICOM file, or an empty string."""
    import SimpleITK

    header = SimpleITK.ImageFileReader()
    header.SetFileName(str(path))
    header.SetImageIO("GDCMImageIO")
    try:
        header.ReadImageInformation()
    except RuntimeError:
        # GDCM refuses objects without pixels; their class stands as plain text in the first bytes.
        head = path.read_bytes()[:4096] if path.is_file() else b""
        return next((kind for kind in NOT_IMAGES if kind.encode() + b"\0" in head), "")
    return str(header.GetMetaData(SOP_CLASS)).strip("\0 ") if header.HasMetaDataKey(SOP_CLASS) else ""


def _refuse_dicom_objects(path: Path, kind: str) -> None:
    if kind in NOT_IMAGES:
        message = (
            f"Expected `{path}` to hold image slices, but got {NOT_IMAGES[kind]}: convert it to a NIfTI or NRRD label "
            "map on the image's grid."
        )
        raise VolumeError(message)


def _squeeze(array: NDArray[Any], path: Path) -> NDArray[Any]:
    """Exactly three axes: a 2D image is one slice, and axes after the third must have length one."""
    while array.ndim < 3:
        array = array[..., None]
    if array.size == 0 or any(size != 1 for size in array.shape[3:]):
        shape = "x".join(str(size) for size in array.shape)
        message = f"Expected `{path}` to hold one 3D volume, but got shape {shape}: write each volume to its own file."
        raise VolumeError(message)
    return array.reshape(array.shape[:3])


def _whole_numbers(array: NDArray[Any], path: Path) -> NDArray[np.int64]:
    """The labels of a float volume, a slice at a time: whole copies of it would be many times the labels' size."""
    whole = np.zeros(array.shape, dtype=np.int64, order="F")
    bad = wrong = 0
    example = 0.0
    for k in range(array.shape[2]):
        part = array[:, :, k]
        finite = np.where(np.isfinite(part), part, 0)
        bad += int(part.size - np.isfinite(part).sum())
        rounded = np.rint(finite)
        fractions = finite[np.abs(finite - rounded) > ROUNDING]
        wrong += int(fractions.size)
        example = example or float(next(iter(fractions), 0.0))
        whole[:, :, k] = rounded
    if bad:
        message = f"Expected `{path}` to hold labels, but got {bad} NaN or infinite voxels: write 0 for background."
        raise VolumeError(message)
    if wrong:
        message = (
            f"Expected `{path}` to hold whole-number labels, but got {wrong} fractions such as "
            f"{example:.4g}: threshold the probabilities, or pass the label map instead of an image."
        )
        raise VolumeError(message)
    return whole


@contextmanager
def _itk_is_quiet() -> Iterator[None]:
    """Keep ITK from writing its warnings past Python to the terminal; what matters in them is checked above."""
    import SimpleITK

    shown = SimpleITK.ProcessObject.GetGlobalWarningDisplay()
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        SimpleITK.ProcessObject.SetGlobalWarningDisplay(shown)


def _is_dicom(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _one_line(error: Exception) -> str:
    """The most telling line of a library's error, without its source locations."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # ITK ends with errno's text ("No such file", wrongly), nibabel with a question.
    lines = [line for line in lines if "/Code/" not in line and not line.startswith(("Reason:", "- could"))]
    text = re.sub(r"^.*?(ITK ERROR|sitk::ERROR): *", "", lines[-1]) if lines else type(error).__name__
    text = re.sub(r"^\w+\(0x[0-9a-f]+\): *", "", text)  # the address of ITK's reader object
    return f"the error '{text.rstrip('.')}'"
