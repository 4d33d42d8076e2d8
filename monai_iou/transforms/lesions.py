"""The lesions of a label, found at once or earlier; and whether those found earlier are still where they were."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from monai.config.type_definitions import NdarrayOrTensor
from monai.data.meta_tensor import MetaTensor
from monai.transforms.lazy.functional import apply_pending
from numpy.typing import NDArray

from monai_iou.components import BACKGROUND, FIRST_REGION, ComponentRuns, component_runs
from monai_iou.transforms.shapes import spatial_shape

__all__ = ["as_array", "check_shape", "check_unmoved", "find_lesions", "holds_regions", "up_to_date"]


_Image = TypeVar("_Image", bound=NdarrayOrTensor)


def find_lesions(
    label: NdarrayOrTensor,
    image: NdarrayOrTensor | None = None,
    image_threshold: float = 0.0,
    labels: Sequence[int] | None = None,
    connectivity: int | None = None,
    ignore_index: int | None = None,
) -> ComponentRuns:
    """Return the voxels of a label's components, and of its background where the image exceeds a threshold.

    They are those of the label and image as their pending lazy transforms leave them.

    Args:
        label: label map (1, *S), also with regions behind it, or per-class maps (C, *S).
        image: (C, *S); only voxels where any channel exceeds `image_threshold` count as background. None for no limit.
        image_threshold: see `image`.
        labels: as for :func:`monai_iou.components.component_runs`.
        connectivity: as for :func:`monai_iou.components.component_runs`.
        ignore_index: as for :func:`monai_iou.components.component_runs`.

    Raises:
        ValueError: as :func:`monai_iou.components.component_runs`, or if the image has another shape than the label.
    """
    inside = None if image is None else np.any(as_array(up_to_date(image)) > image_threshold, axis=0)
    values = as_array(up_to_date(label))
    if inside is not None and inside.shape != values.shape[1:]:
        message = (
            f"Expected the image that limits the background to have the label's shape {values.shape[1:]}, but got "
            f"{inside.shape}: put both on one grid, each with its channel dimension."
        )
        raise ValueError(message)
    values = values[:1] if holds_regions(values, ignore_index) else values
    return component_runs(values, labels, connectivity, ignore_index, inside)


def up_to_date(values: _Image) -> _Image:
    """Return an image (C, *S) with its pending lazy transforms applied; the image itself keeps them."""
    if isinstance(values, MetaTensor) and values.pending_operations:
        applied: _Image = apply_pending(values.clone())[0]  # which takes them off the image that it is given
        return applied
    return values


def holds_regions(label: NDArray[Any], ignore_index: int | None) -> bool:
    """Return whether a label (C, *S) is a label map with the regions of `ComponentRegionsd` behind it.

    There may be padding around the regions: voxels where all channels are 0 or all are `ignore_index`. A channel that
    is `ignore_index` everywhere else is a map that nobody annotated, and none of regions.
    """
    behind = label[1:]
    if not (behind.size and behind.max() >= FIRST_REGION):  # so are nearly all per-class maps told apart
        return False
    inside = (behind >= FIRST_REGION).all(0)
    if not inside.all():
        fillings = [0] if ignore_index is None else [0, ignore_index]
        padding = np.logical_or.reduce([(label == value).all(0) for value in fillings])
        if not (inside | padding).all():
            return False
    return ignore_index is None or not any((channel[inside] == ignore_index).all() for channel in behind)


def as_array(values: NdarrayOrTensor) -> NDArray[Any]:
    """Return an image as a NumPy array, which shares memory with a tensor on the CPU."""
    if not isinstance(values, torch.Tensor):
        return np.asarray(values)
    values = values.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()  # NumPy has no bfloat16


def check_shape(label: NdarrayOrTensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError if a label (C, *S) has another shape than that in which its lesions were found."""
    label_shape = spatial_shape(label)
    if label_shape != shape:
        message = (
            f"Expected the label to have the shape {shape} in which its lesions were found, but got {label_shape}: put "
            "LesionIndicesd after all transforms that move voxels or change the shape, or leave it out."
        )
        raise ValueError(message)


def check_unmoved(
    label: NdarrayOrTensor, voxels: NDArray[Any], classes: NDArray[Any], ignore_index: int | None
) -> None:
    """Raise ValueError if a voxel of a lesion that was found earlier is no foreground of the label.

    Args:
        label: label map (1, *S), also with regions behind it, or per-class maps (C, *S), which may be soft.
        voxels: indices of voxels, (n, d).
        classes: class in which each was found, (n,); `BACKGROUND` is not looked at.
        ignore_index: value of ignored voxels, or the channel that marks them; they are no foreground.
    """
    label = up_to_date(label)
    lesions = classes != BACKGROUND
    voxels, classes = voxels[lesions], classes[lesions]
    places: Any = (slice(None), *voxels.T)
    if isinstance(label, torch.Tensor):
        values = as_array(label.as_subclass(torch.Tensor)[places].double())  # NumPy has no bfloat16
    else:
        values = np.asarray(label)[places]
    wrong = np.flatnonzero(~_is_foreground(values, classes, ignore_index))
    if len(wrong):
        place, found = tuple(voxels[wrong[0]].tolist()), values[:, wrong[0]].tolist()
        message = (
            f"Expected the voxel {place}, where LesionIndicesd found a lesion, to be foreground of the label, but got "
            f"{found}: put LesionIndicesd after all transforms that move voxels, such as flips, or leave it out."
        )
        raise ValueError(message)


def _is_foreground(values: NDArray[Any], classes: NDArray[Any], ignore_index: int | None) -> NDArray[np.bool_]:
    """Whether voxels with values (C, n) are foreground, (n,); another class counts too, as labels may be renamed."""
    if len(values) == 1 or bool((values[1:] >= FIRST_REGION).all()):
        return np.asarray((values[0] == classes) | ((values[0] > 0) & (values[0] != ignore_index)))
    channels = np.arange(len(values))[:, None]
    counted = ((channels > 0) | (channels == classes)) & (channels != ignore_index)
    return np.asarray(((values >= 0.5) & counted).any(0))
