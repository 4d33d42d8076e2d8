"""The fingerprint of a dataset: shapes, spacings, intensities, and the components of each class."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from monai_iou.components import label_components
from monai_iou.datasets.case_volumes import SOURCE, CaseVolumes, check_trainable, read_case
from monai_iou.datasets.cases import Case, CaseFacts, values_of
from monai_iou.datasets.folder import SegmentationFolder, map_cases
from monai_iou.datasets.scheme import LabelScheme
from monai_iou.datasets.splits import count_patients
from monai_iou.planning.intensity import warn_of_unnamed_ct

__all__ = [
    "CaseMeasures",
    "ClassFingerprint",
    "Fingerprint",
    "Spread",
    "compute_fingerprint",
    "measure_case",
    "summarise_measures",
]


PERCENTILES = (0.5, 5.0, 50.0, 95.0, 99.5)


@dataclass(frozen=True)
class Spread:
    """Smallest, median and largest value; for values with axes one number per axis, in RAS order."""

    smallest: tuple[float, ...]
    median: tuple[float, ...]
    largest: tuple[float, ...]

    @staticmethod
    def of(values: npt.ArrayLike) -> Spread:
        """Return the spread of (N,) or (N, axes) values; zeros if there are none."""
        table = np.asarray(values, dtype=float)
        table = table.reshape(len(table), -1) if table.size else np.zeros((1, 1))
        return Spread(*(tuple(map(_short, f(table, axis=0))) for f in (np.min, np.median, np.max)))


@dataclass(frozen=True)
class CaseMeasures:
    """One labelled case: its facts, and what of it belongs to each class.

    Attributes:
        facts: shape, spacing and intensities.
        voxels: of the background and of each foreground class; classes may overlap.
        components: sizes in voxels of each foreground class's components.
        ignored: voxels that count neither way.
    """

    facts: CaseFacts
    voxels: tuple[int, ...]
    components: tuple[npt.NDArray[np.int64], ...]
    ignored: int = 0

    @property
    def foreground_fraction(self) -> float:
        """Share of the voxels that belong to some class."""
        return 1 - (self.voxels[0] + self.ignored) / self.total

    @property
    def total(self) -> int:
        """Number of voxels."""
        return int(np.prod(self.facts.shape))

    @property
    def voxel_mm3(self) -> float:
        """Volume of a voxel in mm^3."""
        return float(np.prod(self.facts.spacing))


@dataclass(frozen=True)
class ClassFingerprint:
    """A foreground class over all cases of a dataset.

    Attributes:
        value, name: label value and name in dataset.json; of a region the value that it is written as.
        fraction: share of the class in all voxels.
        cases: number of cases that contain the class.
        components: number of connected components (26 neighbours) in all cases.
        components_a_case: median number of components in the cases that contain the class.
        size_voxels, size_mm3: sizes of the components.
        small_mm3: 1st percentile of `size_mm3`, which is robust against single stray voxels.
        size_ratio: ratio of the largest to the median component of a case, as the median over the cases with several
            components; 1 if no case has several.
    """

    value: int
    name: str
    fraction: float
    cases: int
    components: int
    components_a_case: float
    size_voxels: Spread
    size_mm3: Spread
    small_mm3: float
    size_ratio: float


@dataclass(frozen=True)
class Fingerprint:
    """The fingerprint of a labelled dataset.

    Attributes:
        cases, patients: number of cases and of patients.
        shape: smallest, median and largest shape in voxels, in RAS order.
        spacing: smallest, median and largest spacing in mm, in RAS order.
        extent: smallest, median and largest shape times spacing in mm, in RAS order.
        intensities: for each channel, its name and the percentiles 0.5, 5, 50, 95 and 99.5 inside the foreground.
        classes: the foreground classes.
        voxels: number of voxels of the background and of each class over all cases.
        foreground_fraction: smallest, median and largest fraction of foreground in a case.
        empty_cases: names of the cases without foreground.
        measures: the measures of every case, in the order of dataset.json; they are not part of the JSON.
    """

    cases: int
    patients: int
    shape: Spread
    spacing: Spread
    extent: Spread
    intensities: tuple[tuple[str, tuple[float, ...]], ...]
    classes: tuple[ClassFingerprint, ...]
    voxels: tuple[int, ...]
    foreground_fraction: Spread
    empty_cases: tuple[str, ...]
    measures: tuple[CaseMeasures, ...]

    def as_json(self) -> dict[str, Any]:
        """Return everything except the measures of the single cases."""
        return {key: value for key, value in asdict(self).items() if key != "measures"}


def measure_case(case: Case, scheme: LabelScheme, modalities: Sequence[str], source: str = SOURCE) -> CaseMeasures:
    """Read a labelled case, check it, and measure its classes.

    Raises:
        DatasetError: the case cannot be used, as in `check_case`.
    """
    volumes = read_case(case, scheme, modalities, source)
    empty = np.zeros(0, dtype=np.int64)
    sizes, voxels = [], [int(np.count_nonzero(volumes.background))]
    for number in _present(volumes):
        mask = None if number is None else volumes.mask(number)
        voxels.append(0 if mask is None else int(np.count_nonzero(mask)))
        sizes.append(_component_sizes(mask) if mask is not None and voxels[-1] else empty)
    return CaseMeasures(volumes.facts(), tuple(voxels), tuple(sizes), int(np.count_nonzero(volumes.ignored)))


def _present(volumes: CaseVolumes) -> list[int | None]:
    """Number of each foreground class, None of those that occur nowhere: of a thousand most do not."""
    numbers = range(1, len(volumes.scheme.classes) + 1)
    if volumes.scheme.soft:
        return list(numbers)
    held = {value for label in volumes.labels for value in values_of(label)}
    return [number if held & {*volumes.scheme.classes[number - 1][1]} else None for number in numbers]


def compute_fingerprint(
    folder: SegmentationFolder, show: Callable[[int, int, str], None] = lambda done, total, case: None
) -> Fingerprint:
    """Read and measure every training case of a folder in parallel; the cases of `test_labelled` are not read.

    Args:
        folder: the dataset.
        show: called after each case with the number of finished cases, the number of all cases, and the case's name.

    Raises:
        DatasetError: a file cannot be used for training, there is no training case, or no case has foreground.
    """
    folder.need_training()
    lock, total = threading.Lock(), len(folder.training)
    done: list[str] = []

    def measure(case: Case) -> CaseMeasures:
        measures = measure_case(case, folder.scheme, folder.modalities, folder.source)
        with lock:
            done.append(case.name)
            show(len(done), total, case.name)
        return measures

    return summarise_measures(folder, map_cases(measure, folder.training))


def summarise_measures(folder: SegmentationFolder, measures: Sequence[CaseMeasures]) -> Fingerprint:
    """Return the fingerprint of measured cases.

    Args:
        folder: the dataset.
        measures: the measures of its training cases, in their order.

    Raises:
        DatasetError: no case has foreground.
    """
    facts = [case.facts for case in measures]
    check_trainable(folder.training, facts, folder.scheme.ignore)
    folder.need_foreground(facts)
    folder.need_like_spacings(folder.training, facts)
    warn_of_unnamed_ct(folder.modalities, facts)
    voxels = np.array([case.voxels for case in measures], dtype=np.int64)
    shapes, spacings = (np.array([getattr(case, name) for case in facts], float) for name in ("shape", "spacing"))
    return Fingerprint(
        cases=len(measures),
        patients=count_patients(folder.training, folder.patient_groups),
        shape=Spread.of(shapes),
        spacing=Spread.of(spacings),
        extent=Spread.of(shapes * spacings),
        intensities=tuple(
            (
                name,
                tuple(map(_short, np.percentile(np.concatenate([case.foreground[c] for case in facts]), PERCENTILES))),
            )
            for c, name in enumerate(folder.modalities)
        ),
        classes=tuple(_class_fingerprint(folder, measures, voxels, index) for index in range(1, voxels.shape[1])),
        voxels=tuple(map(int, voxels.sum(0))),
        foreground_fraction=Spread.of([case.foreground_fraction for case in measures]),
        empty_cases=tuple(case.name for case, row in zip(folder.training, voxels, strict=True) if not row[1:].any()),
        measures=tuple(measures),
    )


def _class_fingerprint(
    folder: SegmentationFolder, measures: Sequence[CaseMeasures], voxels: npt.NDArray[np.int64], index: int
) -> ClassFingerprint:
    sizes = [case.components[index - 1] for case in measures]
    in_mm3 = np.concatenate([size * case.voxel_mm3 for size, case in zip(sizes, measures, strict=True)])
    counts = np.array([len(size) for size in sizes])
    ratios = [float(size.max() / np.median(size)) for size in sizes if len(size) > 1]
    name, values = folder.scheme.classes[index - 1]
    return ClassFingerprint(
        value=folder.regions_order[index - 1] if folder.regions else values[0],
        name=name,
        fraction=_short(voxels[:, index].sum() / sum(case.total for case in measures)),
        cases=int((counts > 0).sum()),
        components=int(counts.sum()),
        components_a_case=float(np.median(counts[counts > 0])) if counts.any() else 0.0,
        size_voxels=Spread.of(np.concatenate(sizes)),
        size_mm3=Spread.of(in_mm3),
        small_mm3=_short(np.percentile(in_mm3, 1)) if len(in_mm3) else 0.0,
        size_ratio=_short(np.median(ratios)) if ratios else 1.0,
    )


def _component_sizes(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    # Only the bounding box of the mask is searched for components, because foregrounds are small.
    for axis in range(mask.ndim):
        used = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        mask = np.moveaxis(np.moveaxis(mask, axis, 0)[used[0] : used[-1] + 1], 0, axis)
    numbers, count = label_components(mask, None)
    sizes: npt.NDArray[np.int64] = np.bincount(numbers.ravel(), minlength=count + 1)[1:].astype(np.int64)
    return sizes


def _short(value: float) -> float:
    return float(f"{value:.6g}")
