"""The files of one case: read completely, and refused in one sentence where they cannot be trained on."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from monai_iou.datasets.cases import Case, CaseFacts, DatasetError, check_intensities, values_of
from monai_iou.datasets.scheme import LabelScheme
from monai_iou.tables import counted
from monai_iou.volumes.grid import distance_voxels, offset_note, same_grid
from monai_iou.volumes.reading import Volume, VolumeError, read_channels, read_labels

__all__ = ["SOURCE", "CaseVolumes", "check_case", "check_side", "check_trainable", "read_case", "read_shares"]

SOURCE = "`modality` in dataset.json"
FOREGROUND_SAMPLES_PER_CASE = 10_000
MAX_SHOWN = 12
SHARE_ROUNDING = 1e-3  # by which stored shares may miss 0 and 1: the scale of a file of integers leaves such values

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaseVolumes:
    """The files of a case, read and checked.

    Attributes:
        image: (channels, *S).
        labels: of each rater, (*S) values; or (F, *S) shares of the foreground classes where labels are soft.
        affine: (4, 4).
        scheme: what the labels mean.
    """

    image: np.ndarray
    labels: tuple[np.ndarray, ...]
    affine: np.ndarray
    scheme: LabelScheme

    @property
    def ignored(self) -> np.ndarray:
        """(*S), where no rater says anything."""
        ignore = self.scheme.ignore
        if ignore is None or not self.labels:
            return np.zeros(self.image.shape[1:], dtype=bool)
        return np.asarray(np.logical_and.reduce([label == ignore for label in self.labels]))

    @property
    def background(self) -> np.ndarray:
        """(*S), where at least half of the raters see no class."""
        return self._agreed([self._background(label) for label in self.labels])

    def mask(self, number: int) -> np.ndarray:
        """(*S), where at least half of the raters see a class, by its number from 1."""
        if self.scheme.soft:
            return self._agreed([label[number - 1] for label in self.labels])
        values = self.scheme.classes[number - 1][1]
        one = len(values) == 1
        return self._agreed([label == values[0] if one else np.isin(label, values) for label in self.labels])

    def _background(self, label: np.ndarray) -> np.ndarray:
        if self.scheme.soft:
            return np.asarray(label.max(0) < 0.5)
        if not self.scheme.regions:
            return np.asarray(label == 0)
        inside = [value for _, values in self.scheme.classes for value in values]
        return np.isin(label, [*inside, *([] if self.scheme.ignore is None else [self.scheme.ignore])], invert=True)

    def _agreed(self, votes: Sequence[np.ndarray]) -> np.ndarray:
        if not votes:
            return np.zeros(self.image.shape[1:], dtype=bool)
        first = np.asarray(votes[0])
        return first >= 0.5 if len(votes) == 1 else np.asarray(np.mean(votes, axis=0) >= 0.5)

    def facts(self) -> CaseFacts:
        """Return the facts that planning needs."""
        import nibabel as nib

        foreground, ignored = np.zeros((len(self.image), 0), dtype=np.float32), self.ignored
        if self.labels:
            inside = np.flatnonzero(~(self.background | ignored))
            step = max(1, len(inside) // FOREGROUND_SAMPLES_PER_CASE)
            foreground = self.image.reshape(len(self.image), -1)[:, inside[::step]].astype(np.float32)
        order = np.argsort(nib.io_orientation(self.affine)[:, 0])
        shape, spacing = np.array(self.image.shape[1:])[order], nib.affines.voxel_sizes(self.affine)[order]
        sizes = (*map(int, shape),), (*map(float, spacing),)
        lowest = tuple(float(channel.min()) for channel in self.image)
        return CaseFacts(*sizes, foreground, bool(ignored.all()), lowest)  # type: ignore[arg-type]


def check_trainable(cases: Sequence[Case], facts: Sequence[CaseFacts], ignore: int | None) -> None:
    """Raise DatasetError if all voxels of a case are ignored: no patch of it would show anything."""
    for case, fact in zip(cases, facts, strict=True):
        if fact.all_ignored:
            message = (
                f"Expected {case.label} to have voxels that are not ignored, but all have the value {ignore}: leave "
                "this case out."
            )
            raise DatasetError(message)


def check_side(cases: Sequence[Case], facts: Sequence[CaseFacts]) -> None:
    """Raise DatasetError if none of the cases that a split leaves to train on has foreground."""
    if cases and not any(fact.foreground.shape[1] for fact in facts):
        names = ", ".join(case.name for case in cases[:MAX_SHOWN])
        which, found = f"one of the {len(cases)} cases", "all are empty"
        if len(cases) == 1:
            which, found = "the only case", "it is empty"
        message = (
            f"Expected {which} to train on to have foreground, but {found} ({names}): "
            "choose another `split_seed` or other `folds`, or correct the split that splits_final.json or "
            "`validation` gives."
        )
        raise DatasetError(message)


def check_case(
    case: Case,
    scheme: LabelScheme,
    modalities: Sequence[str],
    source: str = SOURCE,
) -> CaseFacts:
    """Read a case completely, check it as `read_case` does, and return its facts."""
    return read_case(case, scheme, modalities, source).facts()


def read_case(
    case: Case,
    scheme: LabelScheme,
    modalities: Sequence[str],
    source: str = SOURCE,
) -> CaseVolumes:
    """Read a case completely and check image, label and that their grids agree.

    Args:
        case: the case.
        scheme: what its label may hold.
        modalities: one name per channel.
        source: where `modalities` comes from, for the error.

    Raises:
        DatasetError: the image or the label is damaged, has the wrong dimensions or no valid geometry, holds NaN,
            infinity or a number that float32 cannot hold, they lie on different grids, or the label holds a value that
            dataset.json does not name.
    """
    try:
        image = read_channels(case.images)
        _check_channels(image, modalities, source, by_itself=case.root is None and case.label is None)
        check_intensities(image)
        _tell_constant(image)
        read = read_shares if scheme.soft else read_labels
        labels = [read(path) for path in case.labels]
    except VolumeError as error:
        raise DatasetError(_with_soft_labels(str(error))) from error
    for label in labels:
        _check_grid(label, image)
        if scheme.soft:
            _check_shares(label, scheme)
        else:
            _check_values(label, scheme.file_values)
    for note in (note for volume in (image, *labels) for note in volume.notes):
        logger.warning(note)
    return CaseVolumes(image.array, tuple(label.array for label in labels), image.grid.affine, scheme)


def _with_soft_labels(message: str) -> str:
    """Name what fractions may be in a dataset: they have no place among label values."""
    if "fractions such as" not in message:
        return message
    return f"{message.removesuffix('.')}, or set `soft_labels` to true in dataset.json if they are shares of classes."


def read_shares(path: Path) -> Volume:
    """Read a soft label: the share of each foreground class in a voxel, (F, X, Y, Z) as float32 from 0 to 1.

    Raises:
        VolumeError: as `read_channels`, or a share is not between 0 and 1, apart from rounding.
    """
    volume = read_channels([path])
    low, high = float(volume.array.min()), float(volume.array.max())
    is_negative = not low >= -SHARE_ROUNDING
    if is_negative or not high <= 1 + SHARE_ROUNDING:
        remedy = "replace negative values by 0" if is_negative else "divide by the largest value"
        if not math.isfinite(low + high):
            remedy = "replace NaN and infinite values"
        message = (
            f"Expected {path} to hold shares from 0 to 1, as `soft_labels` in dataset.json says, but got "
            f"{low if is_negative else high:g}: {remedy}, or set `soft_labels` to false if these are no shares."
        )
        raise VolumeError(message)
    return Volume(volume.array.astype(np.float32).clip(0, 1), volume.grid, volume.path, volume.notes)


def _check_shares(label: Volume, scheme: LabelScheme) -> None:
    if len(label.array) != len(scheme.classes):
        message = (
            f"Expected {label.path} to hold {counted(len(scheme.classes), 'channel')}, one for each class, as "
            f"`soft_labels` in dataset.json says, but got {len(label.array)}: write them on the fourth axis, without "
            "the background."
        )
        raise DatasetError(message)
    if not scheme.regions and float(label.array.sum(0).max()) > 1 + SHARE_ROUNDING:
        message = (
            f"Expected the shares of the classes in {label.path} to add up to at most 1 in every voxel, but got "
            f"{float(label.array.sum(0).max()):g}: correct the shares, or list classes that overlap in `regions`."
        )
        raise DatasetError(message)


def _check_channels(image: Volume, modalities: Sequence[str], source: str, *, by_itself: bool) -> None:
    channels = len(image.array)
    if channels == len(modalities):
        return
    expected = "a 3D image" if len(modalities) == 1 else f"a 4D image with {len(modalities)} channels last"
    shape = (*image.grid.shape, *([channels] if channels > 1 else []))
    remedy = "correct one of the two"
    if by_itself and channels == 1:
        files = ", ".join(f"NAME_{number:04d} ({name})" for number, name in enumerate(modalities))
        remedy = f"join the channels of an image in one file, or call their files {files} for `monai-iou predict`"
    message = (
        f"Expected {image.path} to be {expected} ({', '.join(modalities)}), as {source} says, but got shape "
        f"{'x'.join(map(str, shape))}: {remedy}."
    )
    raise DatasetError(message)


def _tell_constant(image: Volume) -> None:
    """Log an image without any contrast: it can be read, but nothing can be learned from it or found in it."""
    for channel in image.array:
        if channel.min() == channel.max():
            logger.warning("%s is constant: every voxel is %g. Is it the right file?", image.path, channel.flat[0])


def _check_grid(label: Volume, image: Volume) -> None:
    if same_grid(label.grid, image.grid):
        if note := offset_note(label.grid, image.grid):
            logger.warning("%s and %s: %s.", label.path, image.path, note)
        return
    if label.grid.shape != image.grid.shape:
        shapes = f"shapes {'x'.join(map(str, label.grid.shape))} and {'x'.join(map(str, image.grid.shape))}"
    else:
        shapes = f"affines that differ by up to {distance_voxels(label.grid, image.grid):.3g} voxels"
    message = (
        f"Expected {label.path} to lie on the grid of {image.path}, but they have {shapes}: "
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
