"""One case of a dataset, and the checks that its image has in common with one that is to be segmented."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monai_iou.volumes.reading import Volume

__all__ = [
    "Case",
    "CaseFacts",
    "DatasetError",
    "check_intensities",
    "check_voxel_size",
    "log_edges",
    "looks_like_image",
    "values_of",
]


ODD_SPACING = 50.0
FEW_VALUES = 32


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
        raters: files of the labels of further raters, if several have annotated the case.
        labelled: numbers from 1 of the classes that were annotated; None for all.
        root: folder of the dataset that the case is listed in; None for an image by itself.
    """

    name: str
    image: Path
    label: Path | None = None
    channels: tuple[Path, ...] = ()
    raters: tuple[Path, ...] = ()
    labelled: tuple[int, ...] | None = None
    root: Path | None = None

    @property
    def images(self) -> tuple[Path, ...]:
        """All image files, in channel order."""
        return (self.image, *self.channels)

    @property
    def labels(self) -> tuple[Path, ...]:
        """All label files, one of each rater."""
        return () if self.label is None else (self.label, *self.raters)

    def as_item(self) -> dict[str, Any]:
        """Return the dictionary that MONAI's datasets take: case, image and label (lists for several files)."""
        item: dict[str, Any] = {"case": self.name, "image": _one_or_all(self.images)}
        return item if self.label is None else {**item, "label": _one_or_all(self.labels)}


def _one_or_all(paths: tuple[Path, ...]) -> str | list[str]:
    return str(paths[0]) if len(paths) == 1 else [str(path) for path in paths]


@dataclass(frozen=True)
class CaseFacts:
    """What reading a case once tells: shape in voxels and spacing in mm in RAS order, and intensities.

    Attributes:
        shape, spacing: of the image.
        foreground: intensities of voxels of the foreground, (channels, samples).
        all_ignored: whether every voxel is ignored.
        lowest: lowest intensity of each channel in the whole image; empty if it is not known.
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    foreground: np.ndarray = field(repr=False)
    all_ignored: bool = False
    lowest: tuple[float, ...] = ()


def log_edges(shape: Sequence[int], spacing: Sequence[float]) -> NDArray[np.float64]:
    """Return the logarithms of a voxel's edges in mm: their mean, then each, sorted.

    NaN, last, stands for the edge along an axis of one voxel: nothing depends on it, and programs write anything there.
    """
    edges = np.where(np.asarray(shape) > 1, np.log(np.asarray(spacing, np.float64)), np.nan)
    known = edges[np.isfinite(edges)]
    return np.array([known.mean() if known.size else np.nan, *np.sort(edges)])


def check_voxel_size(image: Path, facts: CaseFacts, usual: NDArray[np.float64], others: str) -> None:
    """Refuse voxels that are 50 times larger or smaller than usual: no two scans differ like that, but units do.

    Their edges are compared one by one, too: of an error along one axis, the mean shows little. The edges are sorted,
    because scans may have their thick slices along different axes.

    Args:
        image: the file.
        facts: of the file.
        usual: the `log_edges` of usual voxels, a row for each.
        others: whose voxels are usual, for the error.

    Raises:
        DatasetError: the message names the file and both sizes.
    """
    typical = np.ma.median(np.ma.masked_invalid(usual), axis=0).filled(np.nan)
    if not (np.abs(log_edges(facts.shape, facts.spacing) - typical) >= np.log(ODD_SPACING)).any():
        return
    sizes = "x".join(f"{length:.4g}" for length in facts.spacing)
    message = (
        f"Expected {image} to have voxels like {others}, of about {np.exp(typical[0]):.3g} mm, but got {sizes} mm: "
        "correct the spacing or its unit in the header, or leave the case out."
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


def looks_like_image(numbers: NDArray[Any]) -> bool:
    """Return whether numbers are the intensities of an image: there are many of them, and most neighbours differ.

    In a label map, also in one of numbered lesions, neighbours differ at boundaries alone, along one axis at least. The
    most frequent value counts as background.

    Args:
        numbers: (X, Y, Z), of which some slices along the last axis are looked at.

    Example:
        >>> looks_like_image(np.arange(1000).reshape(10, 10, 10))
        True
        >>> looks_like_image(np.arange(100).repeat(10).reshape(10, 10, 10).T)
        False
    """
    some = numbers[..., :: max(1, numbers.shape[-1] // 16)]
    values, voxels = np.unique(some, return_counts=True)
    if len(values) <= FEW_VALUES:
        return False
    background = values[voxels.argmax()]

    def differ(axis: int) -> bool:
        lines = some.swapaxes(0, axis)
        before, after = lines[:-1], lines[1:]
        inside = (before != background) & (after != background)
        return bool(2 * np.count_nonzero((before != after) & inside) > np.count_nonzero(inside))

    axes = [axis for axis in (0, 1) if some.shape[axis] > 1]
    return bool(axes) and all(map(differ, axes))


def values_of(labels: NDArray[np.integer]) -> list[int]:
    """The values of a label map, sorted.

    >>> values_of(np.array([[3, 0, 312782546]]))
    [0, 3, 312782546]
    """
    # A count is much quicker than sorting millions of voxels.
    if labels.dtype.itemsize <= 2 and labels.size and int(labels.min()) >= 0:
        return [int(value) for value in np.flatnonzero(np.bincount(labels.ravel(order="K")))]
    return [int(value) for value in np.unique(labels)]
