"""Connected components of a mask or label, their voxels, and the regions that belong to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monai_iou import checks

__all__ = [
    "BACKGROUND",
    "REGIONS",
    "ComponentRuns",
    "component_chances",
    "component_regions",
    "component_runs",
    "label_components",
]

REGIONS = ("voronoi", "blob")
# A map of class numbers with its regions must not look like per-class maps, whose values are 0 and 1.
FIRST_REGION = 2
BACKGROUND = -1  # the class of the background's voxels: 0 may be a channel of overlapping maps


def label_components(mask: NDArray[np.bool_], connectivity: int | None) -> tuple[NDArray[Any], int]:
    """Components numbered from 1 in scan order, 0 elsewhere, and their number.

    Args:
        mask: 2 or 3 dimensions.
        connectivity: 6, 18 or 26 neighbours in 3D, 4 or 8 in 2D; None takes the largest.

    Raises:
        ValueError: the connectivity does not fit the dimensions.
    """
    # As uint8: cc3d 4.1's way with bool masks finds wrong components, or fails, in volumes one voxel thick.
    return _number_components(np.ascontiguousarray(mask).astype(np.uint8), connectivity)


def _number_components(values: NDArray[Any], connectivity: int | None) -> tuple[NDArray[Any], int]:
    """Number the components of every value but 0 from 1; of two values that touch, each has its own."""
    import cc3d

    if values.ndim == 1:
        labels, count = _number_components(values[:, None], None)
        return labels[:, 0], count
    choices = {2: (4, 8), 3: (6, 18, 26)}[values.ndim]
    neighbours: Any = choices[-1] if connectivity is None else connectivity
    if neighbours not in choices:
        message = (
            f"Expected `connectivity` to be one of {choices} for {values.ndim} dimensions, but got {connectivity}: "
            f"None takes {choices[-1]}."
        )
        raise ValueError(message)
    if not values.any():
        return np.zeros(values.shape, dtype=np.int64), 0
    labels, count = cc3d.connected_components(np.ascontiguousarray(values), connectivity=neighbours, return_N=True)
    return labels, int(count)


def component_regions(
    mask: NDArray[np.bool_],
    regions: str = "voronoi",
    spacing: Sequence[float] | None = None,
    connectivity: int | None = None,
) -> tuple[NDArray[Any], int]:
    """Number the regions of a mask's components from 1.

    Args:
        mask: (*S), 1 to 3 dimensions.
        regions: "voronoi", every voxel has the number of the component nearest in mm; "blob", the components
            themselves, 0 elsewhere.
        spacing: voxel size in mm along each axis; 1 by default.
        connectivity: 6, 18 or 26 neighbours in 3D, 4 or 8 in 2D; the most by default.

    Returns:
        The numbers, (*S) int32, and how many components there are; all 0 without one.

    Raises:
        ValueError: if `regions`, `spacing` or `connectivity` is out of its range.

    Example:
        >>> import numpy as np
        >>> from monai_iou.components import component_regions
        >>> component_regions(np.array([1, 0, 0, 0, 0, 1], dtype=bool))
        (array([1, 1, 1, 2, 2, 2], dtype=int32), 2)
    """
    checks.check_choice("regions", regions, REGIONS)
    if mask.ndim == 1:
        numbers, count = component_regions(mask[:, None], regions, None if spacing is None else (*spacing, 1.0))
        return numbers[:, 0], count
    components, count = label_components(mask, connectivity)
    components = components.astype(np.int32)
    if regions == "blob" or count == 0:
        return components, count
    from scipy.ndimage import distance_transform_edt

    nearest = distance_transform_edt(components == 0, sampling=spacing, return_distances=False, return_indices=True)
    return components[tuple(nearest)], count


@dataclass(frozen=True)
class ComponentRuns:
    """The voxels of a label's components and of its background, as runs of consecutive flat indices.

    Nothing is left out, and little is stored: two numbers per run, where a list of indices has one per voxel.

    Attributes:
        starts: (R,) flat index of each run's first voxel; the runs of a component follow one another.
        before: (R,) number of voxels in all earlier runs.
        bounds: (K + 1,) number of voxels before each component, and of all.
        classes: (K,) class of each component, ascending; `BACKGROUND` for the background, which is one component.
        shape: of the volume.

    Example:
        >>> import numpy as np
        >>> from monai_iou.components import component_runs
        >>> runs = component_runs(np.array([[[1, 1, 0, 2], [0, 0, 0, 1]]]))
        >>> runs.classes.tolist(), runs.sizes.tolist()
        ([-1, 1, 1, 2], [4, 2, 1, 1])
        >>> [runs.voxel(number) for number in range(8)]  # flat indices, a component after the other
        [2, 4, 5, 6, 0, 1, 7, 3]
    """

    starts: NDArray[Any]
    before: NDArray[Any]
    bounds: NDArray[Any]
    classes: NDArray[Any]
    shape: tuple[int, ...]

    @property
    def sizes(self) -> NDArray[Any]:
        """Number of voxels of each component, (K,)."""
        return np.diff(self.bounds)

    def voxel(self, number: int) -> int:
        """Return the flat index of a voxel from its number, counted through all components."""
        run = int(np.searchsorted(self.before, number, side="right")) - 1
        return int(self.starts[run]) + number - int(self.before[run])

    def voxels(self, component: int) -> NDArray[Any]:
        """Return the places of a component's voxels in the volume, (n, d), in scan order."""
        numbers = np.arange(self.bounds[component], self.bounds[component + 1])
        run = np.searchsorted(self.before, numbers, side="right") - 1
        return np.stack(np.unravel_index(self.starts[run] + numbers - self.before[run], self.shape), axis=1)

    def as_item(self) -> dict[str, NDArray[Any]]:
        """Return arrays only, which an item of a dataset holds and a cache on disk stores."""
        names = ("starts", "before", "bounds", "classes")
        return {**{name: getattr(self, name) for name in names}, "shape": np.array(self.shape, dtype=np.int64)}

    @classmethod
    def from_item(cls, item: Mapping[str, Any]) -> ComponentRuns:
        """Build from :meth:`as_item`'s arrays, or from tensors of them, as a cache on disk returns."""
        starts, before, bounds, classes = (np.asarray(item[name]) for name in ("starts", "before", "bounds", "classes"))
        return cls(starts, before, bounds, classes, tuple(np.asarray(item["shape"]).tolist()))


def component_chances(sizes: NDArray[Any], classes: NDArray[Any], size_exponent: float) -> NDArray[np.float64]:
    """Return the chance of each component to be drawn: every class alike, within a class as size^size_exponent.

    Args:
        sizes: number of voxels of each component, (K,).
        classes: class of each component, ascending, (K,).
        size_exponent: 0, every component of a class alike; 1, every voxel of a class alike.

    Example:
        >>> import numpy as np
        >>> from monai_iou.components import component_chances
        >>> component_chances(np.array([1, 9, 4]), np.array([1, 1, 2]), 0.5)
        array([0.125, 0.375, 0.5  ])
    """
    if len(sizes) == 0:
        return np.zeros(0)
    first = np.flatnonzero(np.diff(classes, prepend=classes[0] - 1))
    counts = np.diff(first, append=len(classes))
    # By the class's largest component, so that no power overflows.
    weights = (sizes / np.maximum.reduceat(sizes, first).repeat(counts)) ** size_exponent
    chances: NDArray[np.float64] = weights / np.add.reduceat(weights, first).repeat(counts) / len(first)
    return chances


def component_runs(
    label: NDArray[Any],
    labels: Sequence[int] | None = None,
    connectivity: int | None = None,
    ignore_index: int | None = None,
    inside: NDArray[np.bool_] | None = None,
) -> ComponentRuns:
    """Find the components of every class and the background's voxels.

    Args:
        label: label map (1, *S) of whole numbers, or per-class maps (C, *S), whose voxels belong to a class from 0.5
            on; 1 to 3 spatial dimensions.
        labels: the classes to find: values of a label map, channels of maps. All above 0 by default.
        connectivity: 6, 18 or 26 neighbours in 3D, 4 or 8 in 2D; the most by default.
        ignore_index: value of ignored voxels, which are neither foreground nor background; of maps a channel that marks
            them or, if it is not a channel, the voxels where all maps are 0.
        inside: (*S), where the background's voxels may lie; everywhere by default.

    Raises:
        ValueError: a label map holds a value that is not a whole number, or `connectivity` or the shape does not fit.
    """
    if not 2 <= label.ndim <= 4:
        message = (
            f"Expected the label to have shape (C, *S) with 1 to 3 spatial dimensions, but got {label.shape}: add the "
            "channel dimension."
        )
        raise ValueError(message)
    find = _runs_of_labels if label.shape[0] == 1 else _runs_of_maps
    tables = find(label, labels, connectivity, ignore_index, inside)
    starts, lengths, owners, classes = (np.concatenate(parts) for parts in zip(*tables, strict=True))
    order = np.lexsort((owners, classes))
    starts, lengths, owners, classes = starts[order], lengths[order], owners[order], classes[order]
    ends = lengths.cumsum()
    first = np.flatnonzero(np.diff(owners, prepend=-1))
    before = ends - lengths
    index = np.int32 if label[0].size < 2**31 else np.int64
    bounds = np.append(before[first], ends[-1:] if len(ends) else 0)
    return ComponentRuns(
        starts.astype(index), before.astype(index), bounds.astype(np.int64), classes[first], label.shape[1:]
    )


_Runs = tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]  # starts, lengths, components and classes


def _runs_of_labels(
    label: NDArray[Any],
    labels: Sequence[int] | None,
    connectivity: int | None,
    ignore_index: int | None,
    inside: NDArray[np.bool_] | None,
) -> list[_Runs]:
    values = _whole_numbers(label[0])
    background = values == 0
    foreground = values > 0 if labels is None else np.isin(values, labels)
    if ignore_index is not None:
        background, foreground = background & (values != ignore_index), foreground & (values != ignore_index)
    numbers, count = _number_components(np.where(foreground, values, 0), connectivity)
    background = background if inside is None else background & inside
    numbers = np.where(background, np.int32(count + 1), numbers.astype(np.int32))
    starts, lengths, owners = _runs(numbers.ravel())
    classes = np.where(owners > count, BACKGROUND, values.ravel()[starts].astype(np.int64))
    return [(starts, lengths, owners, classes)]


def _runs_of_maps(
    maps: NDArray[Any],
    labels: Sequence[int] | None,
    connectivity: int | None,
    ignore_index: int | None,
    inside: NDArray[np.bool_] | None,
) -> list[_Runs]:
    channels = list(range(1, len(maps)) if labels is None else labels)
    if wrong := [channel for channel in channels if not 0 <= channel < len(maps)]:
        message = f"Expected `labels` to be channels of {len(maps)} maps, but got {wrong[0]}: channels count from 0."
        raise ValueError(message)
    masks = maps >= 0.5
    valid = np.ones(maps.shape[1:], dtype=bool) if inside is None else inside
    if ignore_index is not None:
        known = ~masks[ignore_index] if 0 <= ignore_index < len(maps) else masks.any(0)
        masks, valid = masks & known, valid & known
    tables, found = [], 1
    occupied = masks[sorted({*range(1, len(maps)), *channels} - {ignore_index})].any(0)
    for channel, mask in [(BACKGROUND, valid & ~occupied), *((channel, masks[channel]) for channel in channels)]:
        numbers, count = (mask, 1) if channel == BACKGROUND else label_components(mask, connectivity)
        starts, lengths, owners = _runs(numbers.ravel())
        tables.append((starts, lengths, owners + np.int64(found), np.full(len(starts), channel)))
        found += count
    return tables


def _whole_numbers(values: NDArray[Any]) -> NDArray[Any]:
    """Return a label map as integers."""
    if values.dtype == np.bool_:
        return values.astype(np.uint8)
    if np.issubdtype(values.dtype, np.integer):
        return values
    bad = ~np.isfinite(values) | (values != np.round(values))
    if bad.any():
        message = (
            f"Expected the label to hold whole class numbers, but got {values[bad][0]:g}: give soft labels one map per "
            "class, shape (C, *S)."
        )
        raise ValueError(message)
    return values.astype(np.int64)


def _runs(numbers: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return start, length and number of every run of an equal number above 0."""
    first = np.append(0, np.flatnonzero(numbers[1:] != numbers[:-1]) + 1)[: numbers.size]
    owners = numbers[first].astype(np.int64)
    lengths = np.diff(first, append=numbers.size)
    return first[owners > 0], lengths[owners > 0], owners[owners > 0]
