"""The checks of RandCopyLesionsd: of its arguments, of its source, and of an item and what is copied into it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from monai_iou.checks import label_tolerance
from monai_iou.tables import counted
from monai_iou.transforms.lesions import as_array, holds_regions
from monai_iou.transforms.shapes import check_same_shape

__all__ = ["check_fit", "check_keys", "check_label", "check_type", "source_length"]


def check_keys(keys: Sequence[Hashable], label_key: str) -> None:
    """Raise ValueError unless the keys are those of a label and of an image."""
    if label_key not in keys or len(set(keys)) < 2:
        message = (
            f"Expected `keys` to hold the label {label_key!r} and an image, but got {tuple(keys)}: name every image "
            "into which lesions are pasted."
        )
        raise ValueError(message)


def source_length(source: Any) -> int:
    """Return the number of items to draw from."""
    if callable(source):
        return 2**31 - 1
    if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")) or isinstance(source, (str, Mapping)):
        message = (
            f"Expected `source` to be a sequence of items or a function, but got {type(source).__name__}: pass a list "
            "or dataset of prepared items."
        )
        raise TypeError(message)
    if len(source) == 0:
        message = "Expected `source` to hold an item to copy lesions from, but got none: pass prepared training cases."
        raise ValueError(message)
    return len(source)


def check_fit(source: Mapping[Hashable, NDArray[Any]], arrays: Mapping[Hashable, NDArray[Any]]) -> None:
    """Raise ValueError unless a source item has the same channels and number of dimensions as the item."""
    check_same_shape(source, "an item of `source`")
    for key, values in arrays.items():
        shape = source[key].shape
        if len(shape) != values.ndim or shape[0] != len(values):
            message = (
                f"Expected `{key}` of a source item to have {counted(len(values), 'channel')} and "
                f"{counted(values.ndim - 1, 'dimension')} as in the item, but got the shape {shape}: "
                "prepare both by the same transforms."
            )
            raise ValueError(message)


def check_label(key: str, label: NDArray[Any], ignore_index: int | None, *, allow_overlap: bool) -> None:
    """Raise ValueError if the label (C, *S) of an item is none that a lesion can be pasted into.

    A label map whose 0 is ignored has no background: its voxels above 0 are classes, and all others are ignored.
    """
    if holds_regions(label, ignore_index):
        message = (
            f"Expected {key!r} to be copied without regions, but got the channels of ComponentRegionsd: put that "
            "transform after this one, so that pasted lesions have regions too."
        )
        raise ValueError(message)
    if ignore_index == 0 and len(label) == 1 and not allow_overlap:
        message = (
            f"Expected the label map {key!r} to have a background to paste lesions on, but got ignore_index=0, which "
            "ignores the background: give the value of the ignored voxels, such as 255, or set allow_overlap=True to "
            "paste over the classes above 0."
        )
        raise ValueError(message)


def check_type(values: NDArray[Any], dtype: np.dtype[Any] | torch.dtype) -> None:
    """Raise ValueError if labels (C, n) to paste would be others in the type of an item: 300 becomes 44 in uint8.

    In per-class maps only the side of 0.5 counts, on which a share lies.
    """
    found = np.unique(values).astype(np.float64 if values.dtype.kind == "f" else np.int64)
    with np.errstate(all="ignore"):  # what is too large becomes infinite
        kept = as_array(torch.from_numpy(found).to(dtype)) if isinstance(dtype, torch.dtype) else found.astype(dtype)
    if len(values) == 1:
        wrong = ~np.isclose(kept.astype(np.float64), found, rtol=0, atol=label_tolerance(found), equal_nan=True)
    else:
        wrong = (kept >= 0.5) != (found >= 0.5)
    if wrong.any():
        message = (
            f"Expected the labels of a source item to fit into the type of the item's label, {dtype}, but got "
            f"{found[wrong][0]:.16g}: convert the labels of all items to one wider type first."
        )
        raise ValueError(message)
