"""One case of a dataset: read its volumes completely, and refuse what cannot be trained on in one sentence."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monai_iou.volumes.grid import Grid, distance_voxels, offset_note, same_grid
from monai_iou.volumes.reading import Volume, VolumeError, read_channels, read_labels

__all__ = [
    "Case",
    "CaseFacts",
    "CaseVolumes",
    "DatasetError",
    "check_case",
    "check_intensities",
    "check_voxel_size",
    "read_case",
]


FOREGROUND_SAMPLES_PER_CASE = 10_000
ODD_SPACING = 50.0
MAX_SHOWN = 12

logger = logging.getLogger(__name__)


class DatasetError(ValueError):
    """A dataset folder cannot be used; the message names the file and what to do, in one sentence."""


@dataclass(frozen=True)
class Case:
    """One volume of a folder.

    Attributes:
        name: name of the case.
        image: file of the image, or of its first channel.
        label: file of the label; None if there is none.
        channels: files of the other channels, if each channel has its own file.
    """

    name: str
    image: Path
    label: Path | None = None
    channels: tuple[Path, ...] = ()

    @property
    def images(self) -> tuple[Path, ...]:
        """All image files, in channel order."""
        return (self.image, *self.channels)

    def as_item(self) -> dict[str, Any]:
        """Return the dictionary that MONAI's datasets take: case, image (a list for several files) and label."""
        image = [str(path) for path in self.images] if self.channels else str(self.image)
        item = {"case": self.name, "image": image}
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


def check_voxel_size(image: Path, spacing: Sequence[float], usual: float, others: str) -> None:
    """Refuse voxels that are 50 times larger or smaller than usual: no two scans differ like that, but units do.

    Args:
        image: the file.
        spacing: of its voxels, in mm.
        usual: edge of a usual voxel, in mm: the geometric mean of its three.
        others: whose voxels are usual, for the error.

    Raises:
        DatasetError: the message names the file and both sizes.
    """
    edge = float(np.prod(spacing)) ** (1 / len(spacing))
    if 1 / ODD_SPACING < edge / usual < ODD_SPACING:
        return
    sizes = "x".join(f"{length:.4g}" for length in spacing)
    message = (
        f"Expected {image} to have voxels like {others}, of about {usual:.3g} mm, but got {sizes} mm: correct the "
        "spacing or its unit in the header, or leave the case out."
    )
    raise DatasetError(message)


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
        modalities: one name per channel.
        source: where `modalities` comes from, for the error.

    Raises:
        DatasetError: the image or the label is damaged, has the wrong dimensions or no valid geometry, holds NaN,
            infinity or a number that float32 cannot hold, they lie on different grids, or the label holds a value that
            dataset.json does not name.
    """
    try:
        image = read_channels(case.images)
        _check_channels(image, modalities, source)
        check_intensities(image)
        _tell_constant(image)
        if case.label is None:
            return CaseVolumes(image.array, None, image.grid.affine)
        label = read_labels(case.label)
    except VolumeError as error:
        raise DatasetError(str(error)) from error
    _check_grid(case, image.grid, label.grid)
    _check_values(label, label_values)
    for note in (*image.notes, *label.notes):
        logger.warning(note)
    return CaseVolumes(image.array, label.array, image.grid.affine)


def _check_channels(image: Volume, modalities: Sequence[str], source: str) -> None:
    channels = len(image.array)
    if channels == len(modalities):
        return
    expected = "a 3D image" if len(modalities) == 1 else f"a 4D image with {len(modalities)} channels last"
    shape = (*image.grid.shape, *([channels] if channels > 1 else []))
    message = (
        f"Expected {image.path} to be {expected} ({', '.join(modalities)}), as {source} says, but got shape "
        f"{'x'.join(map(str, shape))}: correct one of the two."
    )
    raise DatasetError(message)


def check_intensities(image: Volume) -> None:
    """Refuse an image with NaN, infinity, or numbers that float32, which networks take, turns into infinity.

    Raises:
        DatasetError: the message names the file.
    """
    if image.array.dtype.kind != "f":
        return
    largest = float(np.abs(image.array).max())  # NaN if there is one
    if not np.isfinite(largest):
        message = f"Expected {image.path} to hold finite intensities, but it has NaN or infinity: replace those voxels."
        raise DatasetError(message)
    if largest > float(np.finfo(np.float32).max):
        message = (
            f"Expected {image.path} to hold intensities that float32 can hold, but got {largest:g}: replace those "
            "voxels or rescale the image."
        )
        raise DatasetError(message)


def _tell_constant(image: Volume) -> None:
    """Log an image without any contrast: it can be read, but nothing can be learned from it or found in it."""
    for channel in image.array:
        if channel.min() == channel.max():
            logger.warning("%s is constant: every voxel is %g. Is it the right file?", image.path, channel.flat[0])


def _check_grid(case: Case, image: Grid, label: Grid) -> None:
    if same_grid(label, image):
        if note := offset_note(label, image):
            logger.warning("%s and %s: %s.", case.label, case.image, note)
        return
    if label.shape != image.shape:
        found = f"shapes {'x'.join(map(str, label.shape))} and {'x'.join(map(str, image.shape))}"
    else:
        found = f"affines that differ by up to {distance_voxels(label, image):.3g} voxels"
    message = (
        f"Expected {case.label} to lie on the grid of {case.image}, but they have {found}: "
        "resample the label onto the image's grid."
    )
    raise DatasetError(message)


def _check_values(volume: Volume, allowed: Sequence[int]) -> None:
    wrong = sorted(set(values_of(volume.array)) - set(allowed))
    if not wrong:
        return
    named = ", ".join(map(str, allowed[:MAX_SHOWN])) + (", ..." if len(allowed) > MAX_SHOWN else "")
    remedy = "name the value there or correct the label"
    if wrong[0] < 0:
        remedy = "a negative value cannot be named; write 0 there, or another value with a name of its own"
    message = (
        f"Expected {volume.path} to hold only the values [{named}] of `labels` in dataset.json, "
        f"but got {', '.join(map(str, wrong[:5]))}: {remedy}."
    )
    raise DatasetError(message)


def values_of(labels: NDArray[np.integer]) -> list[int]:
    """The values of a label map, sorted.

    >>> values_of(np.array([[3, 0, 312782546]]))
    [0, 3, 312782546]
    """
    # A count is much quicker than sorting millions of voxels.
    if labels.dtype.itemsize <= 2 and labels.size and int(labels.min()) >= 0:
        return [int(value) for value in np.flatnonzero(np.bincount(labels.ravel(order="K")))]
    return [int(value) for value in np.unique(labels)]
