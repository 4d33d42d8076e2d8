"""What the metrics accept, turned into checked pairs of images: label maps, per-class maps of 0 and 1, lists."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from monai.data.meta_tensor import MetaTensor

from monai_iou.spacing import image_spacings, spacing_tuple

__all__ = ["ArrayLike", "ImagePair", "as_plain_tensor", "image_spacings", "pair_images", "spacing_tuple"]

# Voxels looked at a time: no copy of the volume is made, and no threads are woken.
_CHUNK = 1 << 15

ArrayLike: TypeAlias = torch.Tensor | npt.NDArray[Any]


@dataclass(frozen=True)
class ImagePair:
    """Prediction and reference of one image, channel first, each a label map (1, *S) or per-class maps (C, *S)."""

    prediction: torch.Tensor
    reference: torch.Tensor
    num_classes: int
    valid: torch.Tensor | None
    """Voxels that count, shape S, or None where all do."""

    @property
    def spatial_dims(self) -> int:
        """Number of spatial dimensions."""
        return self.reference.ndim - 1

    @property
    def both_label_maps(self) -> bool:
        """Whether both sides hold class numbers."""
        return self.num_classes > 1 and len(self.prediction) == len(self.reference) == 1

    def masks(self, first_class: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Boolean prediction and reference of each class in turn, shape S, without the voxels that do not count."""
        for index in range(first_class, self.num_classes):
            prediction = _class_mask(self.prediction, index, self.num_classes)
            reference = _class_mask(self.reference, index, self.num_classes)
            if self.valid is not None:
                prediction, reference = prediction & self.valid, reference & self.valid
            yield prediction, reference


def _class_mask(image: torch.Tensor, index: int, num_classes: int) -> torch.Tensor:
    return _equals(image[index], 1) if len(image) == num_classes else _equals(image[0], index)


def _equals(labels: torch.Tensor, value: int) -> torch.Tensor:
    """`labels == value` without torch's wrap-around: it finds -1 in a uint8 map that holds 255."""
    whole = labels.dtype != torch.bool and not labels.is_floating_point()
    low, high = (torch.iinfo(labels.dtype).min, torch.iinfo(labels.dtype).max) if whole else (0, 1)
    if (whole or labels.dtype == torch.bool) and not low <= value <= high:
        return torch.zeros_like(labels, dtype=torch.bool)
    return labels == value


def as_plain_tensor(image: Any, name: str) -> torch.Tensor:
    """Detached plain tensor over the same memory; a MetaTensor loses its metadata.

    Raises:
        TypeError: `image` is neither a tensor nor an array.
    """
    if isinstance(image, MetaTensor):
        image = image.as_tensor()
    if isinstance(image, np.ndarray):
        native = image.astype(image.dtype.newbyteorder("="), copy=False)
        image = torch.from_numpy(np.require(native, requirements=["W", "C"]))
    if not isinstance(image, torch.Tensor):
        message = f"Expected `{name}` to be a tensor, an array, or a list of them, but got {type(image).__name__}"
        raise TypeError(message)
    # torch has no minimum, sum or sorting for these three
    wider = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}.get(image.dtype)
    return image.detach() if wider is None else image.detach().to(wider)


def pair_images(y_pred: Any, y: Any, num_classes: int | None, ignore_index: int | None) -> list[ImagePair]:
    """Split a batch, or a list, into checked pairs of images.

    Raises:
        TypeError: an input is neither a tensor nor a list of tensors.
        ValueError: the numbers of images, the shapes or the classes disagree, or values are not hard labels.
    """
    predictions, references = _images(y_pred, "y_pred"), _images(y, "y")
    if len(predictions) != len(references) or not predictions:
        message = (
            f"Expected `y_pred` and `y` to hold the same number of images, at least one, "
            f"but got {len(predictions)} and {len(references)}"
        )
        raise ValueError(message)
    return [_pair(p, r, num_classes, ignore_index) for p, r in zip(predictions, references, strict=True)]


def _images(batch: Any, name: str) -> list[torch.Tensor]:
    if isinstance(batch, (list, tuple)):
        images = [as_plain_tensor(image, name) for image in batch]
        expected = "hold images of shape (C, *S)"
    else:
        tensor = as_plain_tensor(batch, name)
        images = list(tensor) if tensor.ndim else [tensor]
        expected = "have shape (B, C, *S)"
    for image in images:
        if not 2 <= image.ndim <= 4:
            found = tuple(image.shape) if isinstance(batch, (list, tuple)) else tuple(batch.shape)
            message = f"Expected `{name}` to {expected} with 1 to 3 spatial dimensions, but got {found}"
            raise ValueError(message)
    return images


def _pair(
    prediction: torch.Tensor, reference: torch.Tensor, num_classes: int | None, ignore_index: int | None
) -> ImagePair:
    if prediction.shape[1:] != reference.shape[1:]:
        message = (
            f"Expected `y_pred` and `y` to have the same spatial shape, but got "
            f"{tuple(prediction.shape[1:])} and {tuple(reference.shape[1:])}: put them on one grid"
        )
        raise ValueError(message)
    classes = _number_of_classes(len(prediction), len(reference), num_classes)
    reference = reference.to(prediction.device)
    valid = _valid_voxels(reference, ignore_index)
    for image, name in ((prediction, "y_pred"), (reference, "y")):
        if len(image) == classes:
            _check_binary(image, valid, name, given=num_classes)
        else:
            _check_labels(image[0], classes, valid, name)
    return ImagePair(prediction, reference, classes, valid)


def _number_of_classes(prediction_channels: int, reference_channels: int, num_classes: int | None) -> int:
    channels = {c for c in (prediction_channels, reference_channels) if c != 1} or {num_classes or 1}
    if len(channels) > 1 or (num_classes is not None and channels != {num_classes}):
        expected = "the same number of channels" if num_classes is None else f"1 or num_classes={num_classes} channels"
        message = (
            f"Expected `y_pred` and `y` to have {expected}, but got {prediction_channels} and {reference_channels}"
        )
        raise ValueError(message)
    return channels.pop()


def _valid_voxels(reference: torch.Tensor, ignore_index: int | None) -> torch.Tensor | None:
    if ignore_index is None:
        return None
    if len(reference) == 1:
        return ~_equals(reference[0], ignore_index)
    if 0 <= ignore_index < len(reference):
        return ~_equals(reference[ignore_index], 1)
    return reference.any(dim=0)


def _check_binary(image: torch.Tensor, valid: torch.Tensor | None, name: str, given: int | None) -> None:
    for channel in image:
        values = channel if valid is None else channel[valid]
        wrong = values[(values != 0) & (values != 1)]
        if wrong.numel() == 0:
            continue
        remedy = "threshold it, or take the argmax, first"
        if (
            len(image) == 1
            and given is None
            and bool((wrong == wrong.round()).all() if wrong.is_floating_point() else True)
        ):
            remedy = "pass `num_classes` if this is a label map"
        message = (
            f"Expected `{name}` to hold 0 and 1 in its {len(image)} channel(s), but got {wrong[0].item():g}: {remedy}"
        )
        raise ValueError(message)


def _check_labels(labels: torch.Tensor, num_classes: int, valid: torch.Tensor | None, name: str) -> None:
    if labels.dtype == torch.bool:
        return
    flat, keep = labels.reshape(-1), None if valid is None else valid.reshape(-1)
    for start in range(0, len(flat), _CHUNK):
        values = flat[start : start + _CHUNK]
        if keep is not None:
            values = values.masked_fill(~keep[start : start + _CHUNK], 0)
        _check_chunk(values, num_classes, name)


def _check_chunk(values: torch.Tensor, num_classes: int, name: str) -> None:
    if values.is_floating_point() and not bool((values == values.round()).all()):
        wrong = values[values != values.round()][0].item()
        message = (
            f"Expected `{name}` to hold whole class numbers, but got {wrong:g}: take the argmax of probabilities first"
        )
        raise ValueError(message)
    low, high = (v.item() for v in values.aminmax())
    if low < 0 or high >= num_classes:
        wrong = low if low < 0 else high
        message = (
            f"Expected `{name}` to hold classes 0 to {num_classes - 1} (num_classes={num_classes}), but got {wrong:g}: "
            "raise `num_classes`, or name the value as `ignore_index`"
        )
        raise ValueError(message)
