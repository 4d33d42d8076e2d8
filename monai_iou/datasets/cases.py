"""One case of a dataset: read its volumes completely, and refuse what cannot be trained on in one sentence."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Case", "CaseFacts", "CaseVolumes", "DatasetError", "check_case", "read_case"]


# Two grids are the same if no corner of the volume is further away than this part of a voxel: headers store float32.
GRID_TOLERANCE_VOXELS = 0.1
SMALLEST_VOXEL_MM3 = 1e-15
FOREGROUND_SAMPLES_PER_CASE = 10_000


class DatasetError(ValueError):
    """A dataset folder cannot be used; the message names the file and what to do, in one sentence."""


@dataclass(frozen=True)
class Case:
    """One volume of a folder: its name, its image, and its label if it has one."""

    name: str
    image: Path
    label: Path | None = None

    def as_item(self) -> dict[str, str]:
        """Return the dictionary that MONAI's datasets take: case, image and, if there is one, label."""
        item = {"case": self.name, "image": str(self.image)}
        return item if self.label is None else {**item, "label": str(self.label)}


@dataclass(frozen=True)
class CaseFacts:
    """What reading a case once tells: shape in voxels and spacing in mm in RAS order, foreground intensities."""

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    foreground: np.ndarray = field(repr=False)  # (channels, samples)


@dataclass(frozen=True)
class CaseVolumes:
    """The files of a case, read and checked: image (channels, *S), label (*S) if there is one, and the 4x4 affine."""

    image: np.ndarray
    label: np.ndarray | None
    affine: np.ndarray

    def facts(self) -> CaseFacts:
        """Return the facts that planning needs."""
        import nibabel as nib

        foreground = np.zeros((len(self.image), 0), dtype=np.float32)
        if self.label is not None:
            inside = np.flatnonzero(self.label)
            step = max(1, len(inside) // FOREGROUND_SAMPLES_PER_CASE)
            foreground = self.image.reshape(len(self.image), -1)[:, inside[::step]].astype(np.float32)
        order = np.argsort(nib.io_orientation(self.affine)[:, 0])
        shape, spacing = np.array(self.image.shape[1:])[order], nib.affines.voxel_sizes(self.affine)[order]
        return CaseFacts((*map(int, shape),), (*map(float, spacing),), foreground)  # type: ignore[arg-type]


def check_case(
    case: Case,
    label_values: Sequence[int],
    modalities: Sequence[str],
    source: str = "`modality` in dataset.json",
) -> CaseFacts:
    """Read a case completely, check it as `read_case` does, and return its facts."""
    return read_case(case, label_values, modalities, source).facts()


def read_case(
    case: Case,
    label_values: Sequence[int],
    modalities: Sequence[str],
    source: str = "`modality` in dataset.json",
) -> CaseVolumes:
    """Read a case completely and check image, label and that their grids agree.

    Args:
        case: the case.
        label_values: values that its label may hold.
        modalities: one name a channel.
        source: where `modalities` comes from, for the error.

    Raises:
        DatasetError: the image or the label is damaged, has the wrong dimensions or a singular affine, holds NaN or
            infinity, they lie on different grids, or the label holds a value that dataset.json does not name.
    """
    image, affine = _read_volume(case.image)
    image = _channels_first(image, case.image, modalities, source)
    if not np.isfinite(image).all():
        message = f"Expected {case.image} to hold finite intensities, but it has NaN or infinity: replace those voxels."
        raise DatasetError(message)
    if case.label is None:
        return CaseVolumes(image, None, affine)
    label, label_affine = _read_volume(case.label)
    label = label[..., 0] if label.ndim == 4 and label.shape[-1] == 1 else label
    _check_grid(case, image.shape[1:], affine, label.shape, label_affine)
    _check_values(case.label, label, label_values)
    return CaseVolumes(image, label, affine)


def _read_volume(path: Path) -> tuple[np.ndarray, np.ndarray]:
    import nibabel as nib

    try:
        volume: Any = _decompressed(path) if path.suffix == ".gz" else nib.load(path)
        voxels, affine = np.asanyarray(volume.dataobj), np.asarray(volume.affine)
    except _unreadable() as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        message = f"Expected {path} to be a complete NIfTI file, but it cannot be read ({reason}): copy it again."
        raise DatasetError(message) from error
    # A voxel of this volume is none; the smallest real ones, in mm, are far above it.
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < SMALLEST_VOXEL_MM3:
        message = (
            f"Expected {path} to have an affine that gives its voxels a size, but got {affine[:3].tolist()}: "
            "correct its header."
        )
        raise DatasetError(message)
    return voxels, affine


def _unreadable() -> tuple[type[Exception], ...]:
    import nibabel as nib

    headers = (nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError, nib.wrapstruct.WrapStructError)
    return (OSError, EOFError, ValueError, zlib.error, *headers)


def _decompressed(path: Path) -> Any:
    # nibabel stops reading at the last voxel, before the checksum, and so takes a file whose end is missing.
    import nibabel as nib

    content = gzip.decompress(path.read_bytes())
    nifti2 = content[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c")  # header sizes, 540 or 348, in either byte order
    return (nib.Nifti2Image if nifti2 else nib.Nifti1Image).from_bytes(content)


def _channels_first(image: np.ndarray, path: Path, modalities: Sequence[str], source: str) -> np.ndarray:
    channels = 1 if image.ndim == 3 else image.shape[-1] if image.ndim == 4 else None
    if channels != len(modalities):
        expected = "a 3D image" if len(modalities) == 1 else f"a 4D image with {len(modalities)} channels last"
        message = (
            f"Expected {path} to be {expected} ({', '.join(modalities)}), as {source} says, but got shape "
            f"{'x'.join(map(str, image.shape))}: correct one of the two."
        )
        raise DatasetError(message)
    return image[None] if image.ndim == 3 else np.moveaxis(image, -1, 0)


def _check_grid(
    case: Case, shape: tuple[int, ...], affine: np.ndarray, label_shape: tuple[int, ...], label_affine: np.ndarray
) -> None:
    if shape != label_shape:
        found = f"shapes {'x'.join(map(str, label_shape))} and {'x'.join(map(str, shape))}"
    else:
        corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape], [1])).reshape(4, -1)
        moved = float(np.abs(np.linalg.solve(affine, (label_affine - affine) @ corners)[:3]).max())
        if moved <= GRID_TOLERANCE_VOXELS:
            return
        found = f"affines that differ by up to {moved:.3g} voxels"
    message = (
        f"Expected {case.label} to lie on the grid of {case.image}, but they have {found}: "
        "resample the label onto the image's grid."
    )
    raise DatasetError(message)


def _check_values(path: Path, label: np.ndarray, allowed: Sequence[int]) -> None:
    # Two maxima and a count are much quicker than sorting millions of voxels for their unique values.
    if label.dtype.kind in "ui" and label.size and int(label.min()) >= 0 and int(label.max()) < 65536:
        values = np.flatnonzero(np.bincount(label.ravel()))
    else:
        values = np.unique(label)
    wrong = [float(value) for value in values if float(value) not in set(map(float, allowed))]
    if wrong:
        message = (
            f"Expected {path} to hold only the values {list(allowed)} of `labels` in dataset.json, "
            f"but got {', '.join(f'{value:g}' for value in wrong[:5])}: name the value there or correct the label."
        )
        raise DatasetError(message)
