"""Connected components of a mask or label, the indices of their voxels, and the regions around them."""

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
    "whole_numbers",
]

REGIONS = ("voronoi", "blob")
# A label map with precomputed regions must be distinguishable from per-class maps, whose values are 0 and 1.
FIRST_REGION = 2
BACKGROUND = -1  # the class of background voxels, because 0 may be a channel of overlapping maps


def label_components(mask: NDArray[np.bool_], connectivity: int | None) -> tuple[NDArray[Any], int]:
    """Return the connected components of a mask, numbered from 1 in scan order, (*S), and their number.

    Args:
        mask: (*S) bool with 1 to 3 dimensions.
        connectivity: 6, 18 or 26 neighbours in 3D, 4 or 8 in 2D; None for the largest.

    Raises:
        ValueError: if the connectivity does not fit the number of dimensions.
    """
    # cc3d 4.1 finds wrong components of bool masks, or fails, in volumes that are one voxel thick.
    return _number_components(np.ascontiguousarray(mask).astype(np.uint8), connectivity)


def _number_components(values: NDArray[Any], connectivity: int | None) -> tuple[NDArray[Any], int]:
    """Number the components of all values except 0 from 1; adjacent voxels with different values are not connected."""
    import cc3d

    if values.ndim == 1:
        labels, count = _number_components(values[:, None], None)
        return labels[:, 0], count
    choices = {2: (4, 8), 3: (6, 18, 26)}[values.ndim]
    neighbours: Any = choices[-1] if connectivity is None else connectivity
    if neighbours not in choices:
        message = (
            f"Expected `connectivity` to be one of {choices} for {values.ndim} dimensions, but got {connectivity}: "
            f"choose one of these, or None for {choices[-1]}."
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
    """Return the regions of a mask's connected components, numbered from 1.

    Args:
        mask: (*S) bool with 1 to 3 dimensions.
        regions: "voronoi": every voxel has the number of the nearest component, by distance in mm. "blob": only the
            voxels of a component have its number.
        spacing: voxel size in mm along each axis; 1 mm by default.
        connectivity: 6, 18 or 26 neighbours in 3D, 4 or 8 in 2D; by default the largest.

    Returns:
        The numbers, (*S) int32, which are all 0 for an empty mask, and the number of components.

    Raises:
        ValueError: if `regions`, `spacing` or `connectivity` is out of range.

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
    """The voxels of a label's components and of its background, stored as runs of consecutive flat indices.

    Attributes:
        starts: flat index of the first voxel of each run, (R,); the runs of a component are consecutive.
        before: number of voxels in all earlier runs, (R,).
        bounds: number of voxels in all components before each one, and the total number, (K + 1,).
        classes: class of each component, ascending, (K,). The background is one component of the class `BACKGROUND`.
        shape: shape of the volume.

    Example:
        >>> import numpy as np
        >>> from monai_iou.components import component_runs
        >>> runs = component_runs(np.array([[[1, 1, 0, 2], [0, 0, 0, 1]]]))
        >>> runs.classes.tolist(), runs.sizes.tolist()
        ([-1, 1, 1, 2], [4, 2, 1, 1])
        >>> [runs.voxel(number) for number in range(8)]  # flat indices, component by component
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
        """Return the flat index of voxel `number`, counted from 0 through the components in order."""
        run = int(np.searchsorted(self.before, number, side="right")) - 1
        return int(self.starts[run]) + number - int(self.before[run])

    def voxels(self, component: int) -> NDArray[Any]:
        """Return the indices of the n voxels of a component in the d-dimensional volume, (n, d), in scan order."""
        numbers = np.arange(self.bounds[component], self.bounds[component + 1])
        run = np.searchsorted(self.before, numbers, side="right") - 1
        return np.stack(np.unravel_index(self.starts[run] + numbers - self.before[run], self.shape), axis=1)

    def as_item(self) -> dict[str, NDArray[Any]]:
        """Return the attributes as a dictionary of arrays, which a dataset's cache on disk can store."""
        names = ("starts", "before", "bounds", "classes")
        return {**{name: getattr(self, name) for name in names}, "shape": np.array(self.shape, dtype=np.int64)}

    @classmethod
    def from_item(cls, item: Mapping[str, Any]) -> ComponentRuns:
        """Return an instance from the dictionary of :meth:`as_item`, in which a cache may have put tensors."""
        starts, before, bounds, classes = (np.asarray(item[name]) for name in ("starts", "before", "bounds", "classes"))
        return cls(starts, before, bounds, classes, tuple(np.asarray(item["shape"]).tolist()))


def component_chances(sizes: NDArray[Any], classes: NDArray[Any], size_exponent: float) -> NDArray[np.float64]:
    """Return the probability of drawing each component, (K,): uniform over the classes, then size^size_exponent.

    Args:
        sizes: number of voxels of each component, (K,).
        classes: class of each component, ascending, (K,).
        size_exponent: with 0, all components of a class are equally likely; with 1, all voxels of a class.

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
    # Relative to the largest component of the class, so that no power overflows.
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
    """Find the connected components of every class, and the background; see `ComponentRuns` for an example.

    Args:
        label: label map (1, *S) of whole numbers, or per-class maps (C, *S) with a class where the value is at least
            0.5; 1 to 3 spatial dimensions.
        labels: classes to find, as values of a label map or channels of per-class maps. By default all above 0.
        connectivity: 6, 18 or 26 neighbours in 3D, 4 or 8 in 2D; by default the largest.
        ignore_index: value of ignored voxels, which are neither foreground nor background. For per-class maps, it is a
            channel that marks these voxels or, if it is not a channel, they are those whose maps are all 0.
        inside: (*S) bool, the voxels that may count as background; by default all.

    Raises:
        ValueError: if a value of a label map is not a whole number, or the connectivity or the shape does not fit.
    """
    checks.check_dimensions("the label", label.shape, "(C, *S)", too_many="remove the batch dimension")
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


_Runs = tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]  # starts, lengths, component numbers, classes


def _runs_of_labels(
    label: NDArray[Any],
    labels: Sequence[int] | None,
    connectivity: int | None,
    ignore_index: int | None,
    inside: NDArray[np.bool_] | None,
) -> list[_Runs]:
    values = whole_numbers(label[0])
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
        message = f"Expected `labels` to be channels of {len(maps)} maps, but got {wrong[0]}: count channels from 0."
        raise ValueError(message)
    masks = maps >= 0.5
    valid = np.ones(maps.shape[1:], dtype=bool) if inside is None else inside
    if ignore_index is not None:
        known = ~masks[ignore_index] if 0 <= ignore_index < len(maps) else masks.any(0)
        masks, valid = masks & known, valid & known
    tables, next_number = [], 1
    occupied = masks[sorted({*range(1, len(maps)), *channels} - {ignore_index})].any(0)
    for channel, mask in [(BACKGROUND, valid & ~occupied), *((channel, masks[channel]) for channel in channels)]:
        numbers, count = (mask, 1) if channel == BACKGROUND else label_components(mask, connectivity)
        starts, lengths, owners = _runs(numbers.ravel())
        tables.append((starts, lengths, owners + np.int64(next_number), np.full(len(starts), channel)))
        next_number += count
    return tables


def whole_numbers(values: NDArray[Any]) -> NDArray[Any]:
    """Return a label map as integers; ValueError if a value differs from a whole number by more than rounding."""
    if values.dtype.kind in "biu":
        return values.astype(np.uint8) if values.dtype == np.bool_ else values
    nearest = np.round(values)
    odd = values[(values != nearest) | np.isinf(values)]
    with np.errstate(invalid="ignore"):  # the difference of infinities is no number
        bad = odd[~(np.abs(odd - np.round(odd)) <= checks.label_tolerance(odd))]
    if bad.size:
        message = (
            f"Expected the label to hold whole class numbers, but got {checks.digits(bad[0])}: pass soft labels as "
            "one map per class, shape (C, *S)."
        )
        raise ValueError(message)
    return np.asarray(nearest.astype(np.int64))


def _runs(numbers: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return the start, length and value of every run of equal values above 0."""
    first = np.append(0, np.flatnonzero(numbers[1:] != numbers[:-1]) + 1)[: numbers.size]
    owners = numbers[first].astype(np.int64)
    lengths = np.diff(first, append=numbers.size)
    return first[owners > 0], lengths[owners > 0], owners[owners > 0]
