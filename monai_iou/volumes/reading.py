"""Reading volumes for training, planning, evaluation and inference, with grids in RAS millimetres.

NIfTI, MetaImage and NRRD are read by this package, which verifies every checksum, length and range; so are the
checksums of PNG. DICOM and formats that only ITK supports are read by SimpleITK.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from monai_iou.volumes.dicom import itk_is_quiet, read_dicom, read_with_itk
from monai_iou.volumes.dicom_marks import is_dicom
from monai_iou.volumes.grid import Grid, same_grid, spatial_grid
from monai_iou.volumes.header import Header, VolumeError, check_regular, refusal
from monai_iou.volumes.labels import rounding_of, whole_labels
from monai_iou.volumes.memory import room_for
from monai_iou.volumes.metaimage import read_metaimage_header
from monai_iou.volumes.names import (
    METAIMAGE_EXTENSIONS,
    NIFTI_ENDINGS,
    NRRD_EXTENSIONS,
    case_name,
    dicom_slices,
    is_png,
    is_volume,
)
from monai_iou.volumes.nifti import read_nifti_header
from monai_iou.volumes.nrrd import read_nrrd_header
from monai_iou.volumes.payload import AGAIN, check_claims, stored_numbers
from monai_iou.volumes.plain_names import plain_name
from monai_iou.volumes.png import png_channels, read_png

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "Volume",
    "VolumeError",
    "case_name",
    "channel_count",
    "file_hash",
    "is_volume",
    "read_channels",
    "read_header",
    "read_labels",
    "read_volume",
    "volume_files",
]

_READERS = {
    NIFTI_ENDINGS: read_nifti_header,
    METAIMAGE_EXTENSIONS: read_metaimage_header,
    NRRD_EXTENSIONS: read_nrrd_header,
}
# Formats of pictures, as ITK calls them, which state no distance in mm between voxels, or none between slices.
_PICTURES = ("BMP", "JPEG", "JPEG2000", "TIFF")


@dataclass(frozen=True, eq=False)
class Volume:
    """The voxels of a volume and their grid.

    Args:
        array: voxels of shape (X, Y, Z), with the axes in the order of the file; `read_channels` returns (C, X, Y, Z).
        grid: the position of the voxels in the patient, in RAS mm.
        path: the file or DICOM folder.
        notes: sentences about peculiarities of the header, for the report.
    """

    array: NDArray[Any]
    grid: Grid
    path: Path
    notes: tuple[str, ...] = ()


def read_header(path: Path | str) -> Header | None:
    """Read the header of a file without its voxels; return None for DICOM, PNG and formats that only ITK reads.

    Raises:
        VolumeError: if the header is damaged, claims more voxels than the file can hold, or has no valid geometry.
    """
    path = Path(path)
    reader = next((read for names, read in _READERS.items() if path.name.lower().endswith(names)), None)
    if reader is None:
        return None
    with _one_sentence(path):
        check_regular(path)
        header = reader(path)
        check_claims(header)
        return header


def read_volume(path: Path | str) -> Volume:
    """Read one 3D volume, with the scaling of its header applied and its lengths in mm.

    Args:
        path: a NIfTI, MetaImage, NRRD or PNG file, any other file that SimpleITK reads, or a folder with one DICOM
            series.

    Returns:
        The volume, with an array of shape (X, Y, Z). A 2D image becomes a volume with one slice; axes of length 1 after
        the third are dropped.

    Raises:
        VolumeError: if the file is missing, damaged or not a volume, contains several volumes, has no valid geometry,
            or does not fit into the free memory.

    Example:
        >>> import tempfile
        >>> import nibabel
        >>> from monai_iou.volumes.reading import read_volume
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     nibabel.save(nibabel.Nifti1Image(np.zeros((4, 3, 2), np.uint8), np.eye(4)), f"{folder}/case.nii.gz")
        ...     volume = read_volume(f"{folder}/case.nii.gz")
        >>> volume.array.shape, volume.grid.spacing, volume.grid.orientation
        ((4, 3, 2), (1.0, 1.0, 1.0), 'RAS')
    """
    return _read_single(Path(path), "hold one 3D volume", "write each volume to its own file")


def read_channels(paths: Sequence[Path | str]) -> Volume:
    """Read the channels of one image from a file with channels along its fourth axis, or from one file per channel.

    Args:
        paths: one path, or one path per channel.

    Returns:
        The volume, with an array of shape (channels, X, Y, Z).

    Raises:
        VolumeError: as `read_volume`, or if the files are on different grids.
    """
    first, *others = (Path(path) for path in paths)
    if others:
        volumes = [read_volume(path) for path in (first, *others)]
        for volume in volumes[1:]:
            if not same_grid(volume.grid, volumes[0].grid):
                expected = f"be on the same grid ({volumes[0].grid}) as its other channels"
                actual = f"{volume.grid} in `{volume.path}`"
                raise refusal(first, expected, actual, "resample the channels to one grid")
        notes = tuple(note for volume in volumes for note in volume.notes)
        return Volume(np.stack([volume.array for volume in volumes]), volumes[0].grid, first, notes)
    array, affine, notes = _read(first)
    sizes = [size for size in array.shape[3:] if size != 1]
    if array.size == 0 or len(sizes) > 1:
        shape = "x".join(str(size) for size in array.shape)
        remedy = "write one file per channel, or the channels along the fourth axis"
        raise refusal(first, "hold one image with its channels along the fourth axis", f"shape {shape}", remedy)
    array = np.moveaxis(array.reshape((*_three(array.shape), *(sizes or (1,)))), -1, 0)
    return _volume(array, affine, first, notes)


def channel_count(path: Path) -> int:
    """Return how many channels `read_channels` finds in a file, by its header; 1 for DICOM and what only ITK reads.

    Raises:
        VolumeError: if the header is damaged.
    """
    if is_png(path) and not path.is_dir():
        return png_channels(path)
    header = None if path.is_dir() else read_header(path)
    return 1 if header is None else next((size for size in header.shape[3:] if size != 1), 1)


def read_labels(path: Path | str) -> Volume:
    """Read one label map with the smallest integer dtype that represents its values.

    Args:
        path: as for `read_volume`; whole numbers stored as floats are accepted.

    Returns:
        The volume, with an array of shape (X, Y, Z) and of dtype uint8, int16, int32 or int64.

    Raises:
        VolumeError: as `read_volume`, or if a voxel is NaN, infinite, a fraction, or a number that its type cannot
            represent exactly.
    """
    remedy = "write one value per class instead of one-hot channels, or each volume to its own file"
    volume = _read_single(Path(path), "hold one label map", remedy, as_labels=True)
    header = None if volume.path.is_dir() else read_header(volume.path)
    array = whole_labels(volume.array, volume.path, rounding_of(header))
    return Volume(array, volume.grid, volume.path, volume.notes)


def file_hash(path: Path | str) -> str:
    """Return the SHA-256 hash of the names and contents of all files of a volume; see `volume_files`.

    Raises:
        OSError: if a file cannot be read, or is a pipe or device.
    """
    digest = hashlib.sha256()
    for file in volume_files(path):
        try:
            check_regular(file)
        except VolumeError as error:
            raise OSError(str(error)) from error
        digest.update(file.name.encode(errors="surrogateescape"))
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def volume_files(path: Path | str) -> list[Path]:
    """Return all files of a volume: the file itself, a header and its data, or the slices in a folder."""
    path = Path(path)
    if path.is_dir():
        return list(dicom_slices(path))
    try:
        header = read_header(path)
    except VolumeError:
        return [path]  # reading the volume will raise the error
    return [path] if header is None else list(dict.fromkeys((path, *header.files)))


def _read_single(path: Path, expected: str, remedy: str, *, as_labels: bool = False) -> Volume:
    array, affine, notes = _read(path, as_labels=as_labels)
    if array.size == 0 or any(size != 1 for size in array.shape[3:]):
        raise refusal(path, expected, f"shape {'x'.join(map(str, array.shape))}", remedy)
    return _volume(array.reshape(_three(array.shape)), affine, path, notes)


def _read(path: Path, *, as_labels: bool = False) -> tuple[NDArray[Any], NDArray[np.float64], tuple[str, ...]]:
    """Return the values of a file in its own axis order, the affine, and notes."""
    with _one_sentence(path):
        if is_png(path) and not path.is_dir():
            return read_png(path, as_labels=as_labels)
        header = None if path.is_dir() else read_header(path)
        if header is None:
            return (*_by_itk(path), ())
        values = header.stored_bytes // header.dtype.itemsize
        with room_for(path, header.stored_bytes + (8 * values if header.scaling else 0), header.shape):
            array = stored_numbers(header)
            if header.scaling is not None:
                from nibabel.volumeutils import apply_read_scaling

                array = apply_read_scaling(array, *header.scaling)
        return array, header.affine, header.notes


def _by_itk(path: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    if path.is_dir() or is_dicom(path):
        return read_dicom(path)
    check_regular(path)
    with itk_is_quiet(), plain_name(path) as name:
        _refuse_pictures(path, name)
        return read_with_itk(path, [name])


def _refuse_pictures(path: Path, name: Path) -> None:
    import SimpleITK

    kind = SimpleITK.ImageFileReader.GetImageIOFromFileName(str(name)).removesuffix("ImageIO")
    if kind in _PICTURES:
        remedy = "convert it to .nii.gz with its spacing or, if it is a single picture, to .png"
        raise refusal(path, "be of a format that states the spacing in mm", kind, remedy)


def _three(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape, 1, 1)[:3]


def _volume(array: NDArray[Any], affine: NDArray[np.float64], path: Path, notes: tuple[str, ...]) -> Volume:
    return Volume(array, spatial_grid(array.shape[-3:], affine), path, notes)


@contextmanager
def _one_sentence(path: Path) -> Iterator[None]:
    try:
        yield
    except VolumeError:
        raise
    except MemoryError as error:
        remedy = "free memory or use a machine with more memory"
        raise refusal(path, "fit into the free memory", "none left", remedy) from error
    except Exception as error:  # the libraries raise errors of any type for damaged files
        raise refusal(path, "be a readable volume", _one_line(error), AGAIN) from error


def _one_line(error: Exception) -> str:
    """Return the most informative line of a library's error, without source locations."""
    if isinstance(error, OSError) and error.strerror:
        return f"the error '{error.strerror}'"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # ITK's last line repeats errno, which may be wrong ("No such file"); nibabel's asks a question.
    lines = [line for line in lines if "/Code/" not in line and not line.startswith(("Reason:", "- could"))]
    text = re.sub(r"^.*?(ITK ERROR|sitk::ERROR): *", "", lines[-1]) if lines else type(error).__name__
    text = re.sub(r"^\w+\(0x[0-9a-f]+\): *", "", text)  # the address of ITK's reader object
    text = re.sub(r' for "[^"]*"', "", text)  # the name of our own link
    return f"the error '{text.rstrip('.')}'"
