"""A lesion of one image, written into another: where it fits, what surrounds it, and how its intensities adapt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Lesion", "body_mask", "foreground_mask", "in_channels", "matched", "paste_image", "surrounded"]

SURROUNDINGS = 3  # voxels round a lesion that its intensities are matched by, at least: a thinner shell is mostly noise
# A nearly constant surrounding of one of the images must not wipe the lesion's contrast out, or blow it up.
SCALE_LIMIT = 4.0


@dataclass(frozen=True)
class Lesion:
    """The places of a lesion and of its surroundings in its volume.

    Attributes:
        voxels: of the lesion, (n, d).
        near: of the voxels round it, (m, d), which belong to no lesion.
        distance: of each of these from the lesion, in voxels, (m,).
    """

    voxels: NDArray[Any]
    near: NDArray[Any]
    distance: NDArray[Any]


def surrounded(voxels: NDArray[Any], available: NDArray[np.bool_], rim: int) -> Lesion:
    """Return a lesion with the voxels round it that are `available`, (*S)."""
    from scipy.ndimage import distance_transform_edt

    width = max(rim, SURROUNDINGS)
    first = np.maximum(voxels.min(0) - width, 0)
    end = np.minimum(voxels.max(0) + width + 1, available.shape)
    outside = np.ones(tuple(end - first), dtype=bool)
    outside[tuple((voxels - first).T)] = False
    distance = distance_transform_edt(outside)
    box = tuple(slice(a, b) for a, b in zip(first, end, strict=True))
    near = outside & (distance <= width) & available[box]
    return Lesion(voxels, np.argwhere(near) + first, distance[near])


def body_mask(image: NDArray[Any], threshold: float | None) -> NDArray[np.bool_]:
    """Return where any channel of an image (C, *S) exceeds the threshold; see `RandCopyLesionsd` for None."""
    if threshold is not None:
        return np.asarray((image > threshold).any(0))
    body = np.zeros(image.shape[1:], dtype=bool)
    for channel in image:
        faces = np.concatenate([channel.take([0, -1], axis).ravel() for axis in range(channel.ndim)])
        common = np.median(faces)  # a value that more than half have is the median
        if 2 * np.count_nonzero(faces == common) <= faces.size:
            return np.ones_like(body)
        body |= np.asarray(channel != common)
    return body


def foreground_mask(
    label: NDArray[Any], labels: list[int] | None = None, ignore_index: int | None = None
) -> NDArray[np.bool_]:
    """Return where a label map (1, *S) or per-class maps (C, *S) show one of the classes; all above 0 by default."""
    if len(label) == 1:
        shown = np.asarray(label[0] > 0 if labels is None else np.isin(label[0], labels))
        return shown if ignore_index is None else shown & np.asarray(label[0] != ignore_index)
    channels = [channel for channel in (range(1, len(label)) if labels is None else labels) if channel != ignore_index]
    if wrong := [channel for channel in channels if not 0 <= channel < len(label)]:
        message = f"Expected `labels` to be channels of {len(label)} maps, but got {wrong[0]}: channels count from 0."
        raise ValueError(message)
    return np.asarray((label[channels] >= 0.5).any(0))


def matched(values: NDArray[Any], source: NDArray[Any], target: NDArray[Any]) -> NDArray[Any]:
    """Return values (C, n), shifted and scaled so that mean and deviation of `source` (C, m) become `target`'s.

    With m below 2 they stay; where a surrounding is constant they are shifted only.
    """
    if source.shape[1] < 2:
        return values
    wide, wanted = source.std(1, keepdims=True), target.std(1, keepdims=True)
    varied = (wide > 0) & (wanted > 0)
    scale = np.divide(wanted, wide, out=np.ones_like(wide), where=varied).clip(1 / SCALE_LIMIT, SCALE_LIMIT)
    return np.asarray((values - source.mean(1, keepdims=True)) * scale + target.mean(1, keepdims=True))


def in_channels(places: NDArray[Any]) -> tuple[Any, ...]:
    """Return the index of (n, d) places in all channels of an image (C, *S)."""
    return (slice(None), *places.T)


def paste_image(
    image: NDArray[Any],
    source: NDArray[Any],
    lesion: Lesion,
    offset: NDArray[Any],
    changeable: NDArray[np.bool_],
    rim: int,
    match_intensity: bool,
) -> None:
    """Write a lesion and its rim into an image in place.

    Args:
        image: (C, *S), what is written to.
        source: (C, *S'), whose lesion it is.
        lesion: its places in `source`.
        offset: of the places in `image` from those in `source`, (d,).
        changeable: (*S), where the rim may lie, and the surroundings count.
        rim: width of the rim in voxels.
        match_intensity: whether the lesion's intensities are matched by its surroundings.
    """
    near = lesion.near + offset
    inside = np.all((near >= 0) & (near < changeable.shape), axis=1)
    inside[inside] = changeable[tuple(near[inside].T)]
    from_near, to_near = _at(source, lesion.near[inside]), _at(image, near[inside])
    pasted = _at(source, lesion.voxels)
    blended = from_near
    if match_intensity:
        finite = np.isfinite(from_near).all(0) & np.isfinite(to_near).all(0)
        pasted = matched(pasted, from_near[:, finite], to_near[:, finite])
        blended = matched(blended, from_near[:, finite], to_near[:, finite])
    share = (1 - lesion.distance[inside] / (rim + 1)).clip(0)
    changed = lesion.distance[inside] <= rim
    mixed = share * blended + (1 - share) * to_near
    _write(image, near[inside][changed], mixed[:, changed])
    _write(image, lesion.voxels + offset, pasted)


def _at(image: NDArray[Any], places: NDArray[Any]) -> NDArray[np.float64]:
    """Return the values at (n, d) places, (C, n)."""
    return np.asarray(image[in_channels(places)], dtype=np.float64)


def _write(image: NDArray[Any], places: NDArray[Any], values: NDArray[Any]) -> None:
    if np.issubdtype(image.dtype, np.integer):
        limits = np.iinfo(image.dtype)
        values = np.rint(values).clip(limits.min, limits.max)
    image[in_channels(places)] = values
