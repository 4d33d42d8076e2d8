"""Connected components of two masks: what overlaps what, which match, and whose neighbourhood a voxel belongs to."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from monai_iou import scores
from monai_iou.components import label_components
from monai_iou.metrics.overlap import BoolMask, edge_voxels, voxel_indices

__all__ = ["Overlaps", "find_overlaps", "label_components", "match_one_to_one", "nearest_component"]

_IntArray = npt.NDArray[np.int64]
_FloatArray = npt.NDArray[np.float64]

# Distances of this ratio are equal but for rounding.
_ROUNDING = 1 + 1e-9


class Overlaps(NamedTuple):
    """Pairs of components that share a voxel, numbered from 0, and the size of every component in voxels."""

    reference: _IntArray
    prediction: _IntArray
    intersection: _IntArray
    reference_sizes: _IntArray
    prediction_sizes: _IntArray

    @property
    def iou(self) -> _FloatArray:
        """IoU of each pair."""
        return scores.iou(
            self.intersection, self.prediction_sizes[self.prediction], self.reference_sizes[self.reference]
        )

    @property
    def covered(self) -> _FloatArray:
        """Share of the reference component that each pair's predicted one covers."""
        return scores.ratio(self.intersection, self.reference_sizes[self.reference])


def find_overlaps(
    reference: npt.NDArray[Any], prediction: npt.NDArray[Any], reference_count: int, prediction_count: int
) -> Overlaps:
    """Count the voxels of every pair of components in one histogram.

    Args:
        reference: component number of each voxel, 0 for none, any one shape.
        prediction: the same for the other mask.
        reference_count: number of reference components.
        prediction_count: number of predicted components.
    """
    first, second = (np.flatnonzero(numbers > 0) for numbers in (reference, prediction))
    inside = reference.reshape(-1)[first], prediction.reshape(-1)[second]
    beside = prediction.reshape(-1)[first]
    both = beside > 0
    pair = (inside[0][both].astype(np.int64) - 1) * prediction_count + (beside[both].astype(np.int64) - 1)
    pairs, intersection = np.unique(pair, return_counts=True)
    columns = max(prediction_count, 1)
    return Overlaps(
        reference=pairs // columns,
        prediction=pairs % columns,
        intersection=intersection.astype(np.int64),
        reference_sizes=np.bincount(inside[0], minlength=reference_count + 1)[1:],
        prediction_sizes=np.bincount(inside[1], minlength=prediction_count + 1)[1:],
    )


def match_one_to_one(overlaps: Overlaps, candidates: _IntArray) -> _IntArray:
    """Pairs matched one to one: as many as can be, and among those choices the largest sum of IoU.

    Above an IoU of 0.5 no component has two candidates, so that every way of matching gives the same; below, taking the
    best pair first can leave partners without a match.

    Args:
        overlaps: of the components.
        candidates: indices of the pairs that can match.

    Returns:
        Indices into the pairs of `overlaps`, ascending.
    """
    iou = overlaps.iou
    chosen = [np.empty(0, dtype=np.int64)]
    for group in _independent_groups(overlaps.reference[candidates], overlaps.prediction[candidates]):
        pairs = candidates[group]
        chosen.append(pairs if len(pairs) == 1 else _assign(overlaps, pairs, iou))
    return np.sort(np.concatenate(chosen))


def _independent_groups(rows: _IntArray, columns: _IntArray) -> list[_IntArray]:
    """Split pairs into groups that share no component, so that each assignment is small."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not len(rows):
        return []
    _, row = np.unique(rows, return_inverse=True)
    _, column = np.unique(columns, return_inverse=True)
    nodes = int(row.max()) + 1 + int(column.max()) + 1
    graph = coo_array((np.ones(len(row)), (row, column + int(row.max()) + 1)), shape=(nodes, nodes))
    _, group_of_node = connected_components(graph, directed=False)
    group = group_of_node[row]
    order = np.argsort(group, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(group[order])) + 1)


def _assign(overlaps: Overlaps, pairs: _IntArray, iou: _FloatArray) -> _IntArray:
    from scipy.optimize import linear_sum_assignment

    rows, row = np.unique(overlaps.reference[pairs], return_inverse=True)
    columns, column = np.unique(overlaps.prediction[pairs], return_inverse=True)
    gain = np.zeros((len(rows), len(columns)))
    # one more match outweighs any sum of IoU
    gain[row, column] = min(gain.shape) + iou[pairs]
    index = np.full(gain.shape, -1, dtype=np.int64)
    index[row, column] = pairs
    matched: _IntArray = index[linear_sum_assignment(gain, maximize=True)]
    return matched[matched >= 0]


def nearest_component(components: npt.NDArray[Any], where: BoolMask, spacing: tuple[float, ...]) -> _IntArray:
    """Number of the component nearest in mm to each voxel of `where`: the Voronoi region that the voxel lies in.

    Only the component voxels with a neighbouring background voxel can be nearest to a voxel outside, and only the
    voxels asked for are searched, so that no distance transform of the volume is needed. At equal distances the lower
    number wins, as where one distance transform a component is compared with the next.

    Args:
        components: component numbers from 1, 0 outside; at least one component.
        where: voxels outside the components.
        spacing: voxel size in mm.

    Returns:
        One number for each voxel of `where`, in scan order.
    """
    from scipy.spatial import cKDTree

    if components.max() == 1:
        return np.ones(np.count_nonzero(where), dtype=np.int64)
    queries = np.stack(voxel_indices(where), axis=1) * spacing
    inside = np.pad(components > 0, 1)
    surface = np.stack(np.unravel_index(edge_voxels(inside), inside.shape), axis=1) - 1  # of the array before the pad
    numbers = components[tuple(surface.T)].astype(np.int64)
    tree = cKDTree(surface * spacing)
    result = np.empty(len(queries), dtype=np.int64)
    open_queries, k = np.arange(len(queries)), 4
    while len(open_queries):
        k = min(k, len(surface))
        distance, index = tree.query(queries[open_queries], k=list(range(1, k + 1)))
        tied = distance <= distance[:, :1] * _ROUNDING
        result[open_queries] = np.where(tied, numbers[index], len(surface) + 1).min(axis=1)
        # where the last neighbour asked for is as near as the first, there may be more
        open_queries = open_queries[tied[:, -1]] if k < len(surface) else open_queries[:0]
        k *= 4
    return result
