"""Connected components of a mask, and the regions that belong to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monai_iou import checks

__all__ = ["REGIONS", "component_regions", "label_components"]


REGIONS = ("voronoi", "blob")
# A map of class numbers with its regions must not look like per-class maps, whose values are 0 and 1.
FIRST_REGION = 2


def label_components(mask: NDArray[np.bool_], connectivity: int | None) -> tuple[NDArray[Any], int]:
    """Components numbered from 1 in scan order, 0 elsewhere, and their number.

    Args:
        mask: 2 or 3 dimensions.
        connectivity: 6, 18 or 26 neighbours in 3D, 4 or 8 in 2D; None takes the most.

    Raises:
        ValueError: the connectivity does not fit the dimensions.
    """
    import cc3d

    choices = {2: (4, 8), 3: (6, 18, 26)}[mask.ndim]
    neighbours: Any = choices[-1] if connectivity is None else connectivity
    if neighbours not in choices:
        message = (
            f"Expected `connectivity` to be one of {choices} for {mask.ndim} dimensions, but got {connectivity}: None "
            f"takes {choices[-1]}."
        )
        raise ValueError(message)
    if not mask.any():
        return np.zeros(mask.shape, dtype=np.int64), 0
    labels: NDArray[Any]
    # As uint8: cc3d 4.1's way with bool masks finds wrong components, or fails, in volumes one voxel thick.
    numbers = np.ascontiguousarray(mask).astype(np.uint8)
    labels, count = cc3d.connected_components(numbers, connectivity=neighbours, return_N=True)
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
