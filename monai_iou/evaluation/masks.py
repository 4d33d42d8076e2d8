"""The masks of a case's structures, each cut to the box that holds it in both label maps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from monai_iou.evaluation.rules import Structure
from monai_iou.metrics.overlap import bounding_box

__all__ = ["MaskPair", "counted_voxels", "mask_of", "mask_pairs"]


@dataclass(frozen=True, eq=False)
class MaskPair:
    """One structure's masks, cut to the box that holds them and what is scored about them.

    Args:
        structure: what the masks are of.
        prediction: bool.
        reference: bool, of the same shape.
        ignored: bool, of the same shape, or None.
        offset: the box's first voxel in the volume.
    """

    structure: Structure
    prediction: NDArray[np.bool_]
    reference: NDArray[np.bool_]
    ignored: NDArray[np.bool_] | None
    offset: tuple[int, ...]

    @property
    def box(self) -> tuple[slice, ...]:
        """The box in the volume."""
        return tuple(slice(low, low + size) for low, size in zip(self.offset, self.reference.shape, strict=True))


def counted_voxels(reference: NDArray[Any], ignore: int | None) -> int:
    """Voxels of a volume that are not ignored."""
    ignored = 0 if ignore is None else int(np.count_nonzero(reference == ignore))
    return int(reference.size) - ignored


def mask_pairs(
    prediction: NDArray[Any],
    reference: NDArray[Any],
    structures: Sequence[Structure],
    ignore: int | None,
    whole: bool = False,
) -> Iterator[MaskPair]:
    """The structures' masks one after the other, each cut to where either label map holds the structure.

    What lies beyond the box is in neither mask, as what lies beyond the image is, so that no score changes by it. With
    ignored voxels, which may lie beyond the box and are not background, and where `whole` asks for it (`Rules.whole`),
    the box is the whole volume.
    """
    ignored = None if ignore is None else reference == ignore
    boxes = [_boxes(labels) for labels in (prediction, reference)] if ignored is None and not whole else []
    for structure in structures:
        box = _box_of(structure, boxes) if boxes else (slice(None),) * reference.ndim
        cut = None if ignored is None else ignored[box]
        # In C order, as all that follows walks through the voxels in it; most files store the first axis first.
        masks = [np.ascontiguousarray(mask_of(labels[box], structure.values)) for labels in (prediction, reference)]
        if cut is not None:
            masks = [mask & ~cut for mask in masks]
        yield MaskPair(structure, masks[0], masks[1], cut, tuple(part.start or 0 for part in box))


_Boxes: TypeAlias = Mapping[int, tuple[slice, ...]]


def _boxes(labels: NDArray[Any]) -> _Boxes | None:
    """Each value's box, from one pass over the labelled part; None where values are too many or negative for it."""
    from scipy.ndimage import find_objects  # imported here: `import monai_iou` must not load scipy

    if labels.dtype != np.uint8 and (not labels.size or labels.min() < 0 or labels.max() > 65535):
        return None
    # In the order of the memory, which is that of the file's first axis for most formats.
    turned = labels.T if labels.flags.f_contiguous else labels
    part = bounding_box(turned != 0)
    if not all(side.stop for side in part):
        return {}
    objects = find_objects(np.ascontiguousarray(turned[part], dtype=np.int32))
    boxes = {value: _moved(box, part) for value, box in enumerate(objects, start=1) if box is not None}
    return {value: box[::-1] for value, box in boxes.items()} if turned is not labels else boxes


def _moved(box: tuple[slice, ...], part: tuple[slice, ...]) -> tuple[slice, ...]:
    return tuple(slice(b.start + p.start, b.stop + p.start) for b, p in zip(box, part, strict=True))


def _box_of(structure: Structure, boxes: Sequence[_Boxes | None]) -> tuple[slice, ...]:
    """The box of a structure in both label maps: the whole volume if it is unknown, one voxel if it is in none."""
    if any(known is None for known in boxes):
        return (slice(None),) * 3
    slices = [known[value] for known in boxes if known is not None for value in structure.values if value in known]
    if not slices:
        return (slice(0, 1),) * 3
    return tuple(slice(min(p.start for p in parts), max(p.stop for p in parts)) for parts in zip(*slices, strict=True))


def mask_of(labels: NDArray[Any], values: Sequence[int]) -> NDArray[np.bool_]:
    """Where `labels` holds one of `values`."""
    mask: NDArray[np.bool_] = labels == values[0]
    for value in values[1:]:
        mask |= labels == value
    return mask
