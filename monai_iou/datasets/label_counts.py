"""Count the voxels of each label in a folder of label files."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from monai_iou.components import label_components
from monai_iou.datasets.cases import looks_like_image, values_of
from monai_iou.datasets.description import MOST_CLASSES, description_places, read_description, read_label_scheme
from monai_iou.datasets.scheme import LabelScheme
from monai_iou.tables import enumerated
from monai_iou.volumes.names import case_name, volumes_below
from monai_iou.volumes.reading import read_labels

__all__ = ["LabelCounts", "count_label_files"]


@dataclass(frozen=True)
class LabelCounts:
    """What a folder of label files holds.

    Attributes:
        values: the label values in ascending order; class k of a network is the k-th value.
        cases: file names without the extension.
        voxels: (N, C), numbers of voxels of each case and class.
        components: (C,), numbers of connected components (26 neighbours) over all cases; 0 for the background.
        regions: names of the regions that dataset.json has for classes; what is counted is still the label values.
    """

    values: tuple[int, ...]
    cases: tuple[str, ...]
    voxels: NDArray[np.int64]
    components: NDArray[np.int64]
    regions: tuple[str, ...] = ()

    def as_json(self, weights: Tensor, method: str) -> dict[str, Any]:
        """Return what `monai-iou class-weights` writes."""
        return {
            "weights": [round(value, 6) for value in weights.tolist()],
            "method": method,
            "labels": list(self.values),
            "voxels": self.voxels.sum(0).tolist(),
            "cases_with_class": (self.voxels > 0).sum(0).tolist(),
            "cases": len(self.cases),
            "components": self.components.tolist(),
        }


def count_label_files(folder: str | os.PathLike[str], values: Sequence[int] | None = None) -> LabelCounts:
    """Count voxels and components in every label file of a folder and its subfolders.

    Args:
        folder: folder of label maps (NIfTI, MetaImage, NRRD, PNG, or folders of DICOM slices).
        values: the label values. By default those that a `dataset.json` in the folder or above it names, without the
            value to ignore, or otherwise those that occur in the files, and 0.

    Returns:
        The counts.

    Raises:
        ValueError: if there is no such folder or no file in it, two files are the same case, a file is not a label map,
            there are so many values that the files are images, or a label is not among `values`.
    """
    root = Path(folder)
    files = sorted(volumes_below(root)) if root.is_dir() else []
    if not files:
        problem = "it holds none" if root.is_dir() else "there is no such folder"
        message = f"Expected `{root}` to be a folder of label files, but {problem}: give the folder that holds them."
        raise ValueError(message)
    _check_names(files)
    scheme = _scheme_of_dataset(root)
    named, ignore = tuple(scheme.labels), scheme.ignore
    allowed = tuple(sorted(set(values))) if values else named
    left_out: set[int] = set() if ignore is None or ignore in allowed else {ignore}
    rows: list[dict[int, tuple[int, int]]] = []
    every = {0}
    for path in files:
        labels = read_labels(path).array
        held = set(values_of(labels)) - left_out
        every |= held
        _check_is_label_map(path, labels, held, every, allowed)  # first: to count the values of an image takes minutes
        rows.append(_count_array(labels, held))
    known = allowed or tuple(sorted({0, *(value for row in rows for value in row)}))
    voxels = np.array([[row.get(value, (0, 0))[0] for value in known] for row in rows], dtype=np.int64)
    components = np.array([sum(row.get(value, (0, 0))[1] for row in rows) for value in known], dtype=np.int64)
    cases = tuple(map(case_name, files))
    return LabelCounts(known, cases, voxels, components, tuple(scheme.regions))


def _check_names(files: Sequence[Path]) -> None:
    """Refuse to count a case twice, such as `a.nii` beside `a.nii.gz`."""
    known: dict[Path, Path] = {}
    for path in files:
        other = known.setdefault(path.parent / case_name(path), path)
        if other is not path:
            message = f"Expected one file per case, but got `{other}` and `{path}`: keep one of them."
            raise ValueError(message)


def _check_is_label_map(
    path: Path, labels: NDArray[Any], held: Collection[int], every: Collection[int], allowed: Collection[int]
) -> None:
    """Raise ValueError for an image, or for values that are no labels.

    Args:
        path: the file.
        labels: of the file.
        held: their values.
        every: the values of this file and those before it.
        allowed: the labels that are named, if any are.
    """
    wrong = sorted(set(held) - set(allowed)) if allowed else []
    if len(every) > max(MOST_CLASSES, len(allowed) + 1) or ((wrong or not allowed) and looks_like_image(labels)):
        of_all = f", and {len(every)} in all files so far" if len(held) < len(every) - 1 else ""
        message = (
            f"Expected `{path}` to be a label map, but got {len(held)} different values{of_all}: the folder seems to "
            "hold images; name the folder of label files instead, or the label values if so many are right."
        )
        raise ValueError(message)
    if min(held, default=0) < 0:
        message = (
            f"Expected `{path}` to hold labels from 0 up, but got {min(held)}: a negative value is no class; write 0, "
            "or another value where the voxels are to be ignored, or name another folder if this is an image."
        )
        raise ValueError(message)
    if wrong:
        message = (
            f"Expected `{path}` to hold only {enumerated('label', allowed)}, but got {wrong[0]}: correct the file, or "
            "the labels named for it, or name another folder if this is an image."
        )
        raise ValueError(message)


def _count_array(labels: NDArray[Any], values: Iterable[int]) -> dict[int, tuple[int, int]]:
    """Return voxels and components of each of these label values."""
    masks = ((value, labels == value) for value in values)
    return {
        value: (int(np.count_nonzero(mask)), label_components(mask, None)[1] if value != 0 else 0)
        for value, mask in masks
    }


def _scheme_of_dataset(folder: Path) -> LabelScheme:
    """What `dataset.json` in the folder or above it says of label values; without it, nothing."""
    path = next((path for path in description_places(folder) if os.path.lexists(path)), None)
    return LabelScheme({}) if path is None else read_label_scheme(read_description(path), path)
