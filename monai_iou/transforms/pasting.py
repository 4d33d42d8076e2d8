"""Pasting a lesion of one image into another: its surroundings, and the matching of its intensities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from monai_iou.checks import label_tolerance
from monai_iou.components import whole_numbers
from monai_iou.transforms.copying_checks import check_type

__all__ = ["Lesion", "body_mask", "foreground_mask", "ignored_mask", "in_channels", "matched", "occupied_mask"]
__all__ += ["paste_image", "paste_label", "surrounded"]

SURROUNDINGS = 3  # minimum width in voxels of the shell by which intensities are matched: a thinner one is mostly noise
# Nearly constant surroundings in one of the images must neither remove nor exaggerate the contrast of the lesion.
SCALE_LIMIT = 4.0


@dataclass(frozen=True)
class Lesion:
    """The voxel indices of a lesion and of its surroundings in its volume.

    Attributes:
        voxels: indices of the lesion's voxels, (n, d).
        near: indices of the surrounding voxels, which belong to no lesion, (m, d).
        distance: distance of each surrounding voxel from the lesion in voxels, (m,).
    """

    voxels: NDArray[Any]
    near: NDArray[Any]
    distance: NDArray[Any]


def surrounded(voxels: NDArray[Any], available: NDArray[np.bool_], rim: int) -> Lesion:
    """Return a lesion with its surroundings: the `available` voxels up to a distance of `rim`, but at least 3, voxels.

    Args:
        voxels: indices of the lesion's voxels, (n, d).
        available: (*S) bool, the voxels that may belong to the surroundings.
        rim: width of the rim in voxels.
    """
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
    """Return the voxels (*S) where any channel of an image (C, *S) exceeds the threshold.

    With `threshold=None`, these are the voxels where any channel differs from the value that more than half of the
    voxels on the faces of the volume have; all voxels if a channel has no such value. A volume of one slice has faces
    at the edges of the slice only.
    """
    if threshold is not None:
        return np.asarray((image > threshold).any(0))
    body = np.zeros(image.shape[1:], dtype=bool)
    # Across an axis of length 1 both faces are the whole picture.
    axes = [axis for axis in range(body.ndim) if body.shape[axis] > 1] or range(body.ndim)
    for channel in image:
        faces = np.concatenate([channel.take([0, -1], axis).ravel() for axis in axes])
        common = np.median(faces)  # a value shared by more than half of the voxels is the median
        if 2 * np.count_nonzero(faces == common) <= faces.size:
            return np.ones_like(body)
        body |= np.asarray(channel != common)
    return body


def foreground_mask(
    label: NDArray[Any], labels: list[int] | None = None, ignore_index: int | None = None
) -> NDArray[np.bool_]:
    """Return the voxels (*S) that belong to one of the classes `labels`, by default to any class above 0.

    Args:
        label: label map (1, *S) or per-class maps (C, *S).
        labels: values of a label map, or channels of per-class maps.
        ignore_index: value of ignored voxels, or the channel that marks them.

    Raises:
        ValueError: if `labels` names a channel that does not exist.
    """
    if len(label) == 1:
        values = _rounded(label[0])
        mask = np.asarray(values > 0 if labels is None else np.isin(values, labels))
        return mask if ignore_index is None else mask & np.asarray(values != ignore_index)
    channels = [channel for channel in (range(1, len(label)) if labels is None else labels) if channel != ignore_index]
    if wrong := [channel for channel in channels if not 0 <= channel < len(label)]:
        message = f"Expected `labels` to be channels of {len(label)} maps, but got {wrong[0]}: count channels from 0."
        raise ValueError(message)
    return np.asarray((label[channels] >= 0.5).any(0))


def ignored_mask(label: NDArray[Any], ignore_index: int | None) -> NDArray[np.bool_]:
    """Return the ignored voxels (*S) of a label map (1, *S) or of per-class maps (C, *S).

    In maps, these are the voxels of the channel `ignore_index` or, if there is none, those that belong to no channel.
    """
    if ignore_index is None:
        return np.zeros(label.shape[1:], dtype=bool)
    if len(label) == 1:
        return np.asarray(_rounded(label[0]) == ignore_index)
    if 0 <= ignore_index < len(label):
        return np.asarray(label[ignore_index] >= 0.5)
    return ~np.asarray((label >= 0.5).any(0))


def occupied_mask(label: NDArray[Any], labels: list[int] | None, ignore_index: int | None) -> NDArray[np.bool_]:
    """Return the voxels (*S) of a label that are not background: lesions, other classes and ignored voxels.

    Args:
        label: label map (1, *S) or per-class maps (C, *S).
        labels: channels of per-class maps that count beside those from 1 on, such as a channel 0 that is no background.
        ignore_index: value of ignored voxels, or the channel that marks them.
    """
    if len(label) == 1:
        occupied = np.asarray(_rounded(label[0]) != 0)
    else:
        occupied = foreground_mask(label, sorted({*range(1, len(label)), *(labels or [])}))
    return occupied if ignore_index is None else occupied | ignored_mask(label, ignore_index)


def _rounded(values: NDArray[Any]) -> NDArray[Any]:
    """Return a label map with whole numbers where its values miss them by no more than resampling makes them."""
    if values.dtype.kind != "f":
        return values
    nearest = np.rint(values)
    with np.errstate(invalid="ignore"):  # the difference of infinities is no number
        return np.where(np.abs(values - nearest) <= label_tolerance(values), nearest, values)


def matched(values: NDArray[Any], source: NDArray[Any], target: NDArray[Any]) -> NDArray[Any]:
    """Shift and scale values (C, n) by the map that gives `source` (C, m) the mean and deviation of `target` (C, m).

    Values are unchanged if m is below 2, and only shifted if one of the standard deviations is 0.
    """
    if source.shape[1] < 2:
        return values
    source_std, target_std = source.std(1, keepdims=True), target.std(1, keepdims=True)
    varies = (source_std > 0) & (target_std > 0)
    scale = np.divide(target_std, source_std, out=np.ones_like(source_std), where=varies)
    scale = scale.clip(1 / SCALE_LIMIT, SCALE_LIMIT)
    return np.asarray((values - source.mean(1, keepdims=True)) * scale + target.mean(1, keepdims=True))


def in_channels(places: NDArray[Any]) -> tuple[Any, ...]:
    """Return an index that selects the voxels with indices (n, d) in all channels of an image (C, *S)."""
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
        image: the image to write to, (C, *S).
        source: the image that contains the lesion, (C, *S').
        lesion: the voxel indices of the lesion in `source`.
        offset: offset from indices in `source` to indices in `image`, (d,).
        changeable: (*S) bool, the voxels that may belong to the rim and to the surroundings of the new position.
        rim: width of the rim in voxels.
        match_intensity: whether the intensities of the lesion are matched by those of its surroundings.
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


def paste_label(
    label: NDArray[Any], source: NDArray[Any], lesion: Lesion, offset: NDArray[Any], dtype: np.dtype[Any] | torch.dtype
) -> None:
    """Write the labels of a lesion into a label in place.

    A label of integers takes rounded values: a cast would make background of a class that is stored as 0.9999999.

    Args:
        label: the label to write to, (C, *S).
        source: the label that contains the lesion, (C, *S').
        lesion: the voxel indices of the lesion in `source`.
        offset: offset from indices in `source` to indices in `label`, (d,).
        dtype: of the label in its item.

    Raises:
        ValueError: if a label map of integers would take a value that is not a whole number, or a label a class that
            its type cannot hold.
    """
    values = source[in_channels(lesion.voxels)]
    if label.dtype.kind != "f" and values.dtype.kind == "f":
        values = whole_numbers(values) if len(label) == 1 else np.floor(values + 0.5)
    check_type(values, dtype)
    label[in_channels(lesion.voxels + offset)] = values


def _at(image: NDArray[Any], places: NDArray[Any]) -> NDArray[np.float64]:
    """Return the values at voxel indices (n, d), shape (C, n)."""
    return np.asarray(image[in_channels(places)], dtype=np.float64)


def _write(image: NDArray[Any], places: NDArray[Any], values: NDArray[Any]) -> None:
    if np.issubdtype(image.dtype, np.integer):
        limits = np.iinfo(image.dtype)
        values = np.rint(values).clip(limits.min, limits.max)
    image[in_channels(places)] = values
