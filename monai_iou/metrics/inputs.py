"""What the metrics accept, converted to checked pairs of images: label maps, per-class maps of 0 and 1, lists.

Hard labels only: probabilities, logits and NaN are refused, because each would be scored as something else. A value
that is off a whole number by rounding, as resampling and stored scale factors leave it, is rounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from monai.data.meta_tensor import MetaTensor

from monai_iou.checks import check_dimensions, check_real, digits, label_tolerance
from monai_iou.metrics.partly_labelled import annotated, labelled_rows
from monai_iou.spacing import image_spacings, spacing_tuple
from monai_iou.tables import counted
from monai_iou.voxels.compact_labels import equals
from monai_iou.voxels.labels import valid_voxels

__all__ = ["ArrayLike", "ImagePair", "annotated", "as_plain_tensor", "check_binary", "check_labels", "image_spacings"]
__all__ += ["labelled_rows", "pair_images", "rounded", "spacing_tuple", "split_images"]

# Voxels looked at a time: no copy of the volume is made, and no threads are woken.
_CHUNK = 1 << 15

# By which the probabilities of a voxel may miss 1 in half precision.
_SHARES = 1e-2

_NAN_REMEDY = "find out where it comes from, because NaN is no label"
_NAN_REMEDY_OF_Y = "give a class that was not annotated NaN in its whole map, or leave it out by `labelled`"

ArrayLike: TypeAlias = torch.Tensor | npt.NDArray[Any]


@dataclass(frozen=True)
class ImagePair:
    """Prediction and reference of one image, channel first, each a label map (1, *S) or per-class maps (C, *S)."""

    prediction: torch.Tensor
    reference: torch.Tensor
    num_classes: int
    valid: torch.Tensor | None
    """Voxels that count, shape S, or None where all do."""
    labelled: torch.Tensor | None = None
    """Which classes the reference was annotated for, shape (num_classes,) bool, or None for all."""
    given: torch.Tensor | None = None
    """The reference with what it holds of classes that were not annotated, or None if all were."""

    @property
    def spatial_dims(self) -> int:
        """Number of spatial dimensions."""
        return self.reference.ndim - 1

    @property
    def both_label_maps(self) -> bool:
        """Whether both sides hold class numbers."""
        return self.num_classes > 1 and len(self.prediction) == len(self.reference) == 1

    @property
    def has_background(self) -> bool:
        """Whether class 0 is what no other class claims: in label maps, and in maps that share out the voxels.

        Overlapping regions (whole tumour, core, ...) and classes without a background leave voxels that no map claims,
        or that several do. Where per-class references are only partly annotated, they may still hold all classes; if
        they do not, the prediction tells.
        """
        if len(self.reference) == 1 or self.given is None:
            return self._is_shared_out(self.reference)
        return self._is_shared_out(self.given) or self._is_shared_out(self.prediction)

    @property
    def tells_background(self) -> bool:
        """Whether the reference itself says if class 0 is a background: not where some of its maps are missing."""
        return len(self.reference) == 1 or self.given is None or self._is_shared_out(self.given)

    def _is_shared_out(self, maps: torch.Tensor) -> bool:
        if len(maps) == 1:
            return self.num_classes > 1
        claims = sum(maps, torch.zeros((), device=maps.device))
        shared_out = (claims - 1).abs() <= _SHARES
        return bool((shared_out if self.valid is None else shared_out | ~self.valid).all())

    def masks(self, first_class: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Boolean prediction and reference of each class in turn, shape S, without the voxels that do not count."""
        for index in range(first_class, self.num_classes):
            prediction = _class_mask(self.prediction, index, self.num_classes)
            reference = _class_mask(self.reference, index, self.num_classes)
            if self.valid is not None:
                prediction, reference = prediction & self.valid, reference & self.valid
            yield prediction, reference


def _class_mask(image: torch.Tensor, index: int, num_classes: int) -> torch.Tensor:
    return equals(image[index], 1) if len(image) == num_classes else equals(image[0], index)


def as_plain_tensor(image: Any, name: str) -> torch.Tensor:
    """Detached plain tensor over the same memory; a MetaTensor loses its metadata.

    Raises:
        TypeError: `image` is neither a tensor nor an array, or holds complex numbers.
    """
    image = image.as_tensor() if isinstance(image, MetaTensor) else image
    if isinstance(image, np.ndarray):
        native = image.astype(image.dtype.newbyteorder("="), copy=False)
        image = torch.from_numpy(np.require(native, requirements=["W", "C"]))
    if not isinstance(image, torch.Tensor):
        message = (
            f"Expected `{name}` to be a tensor, an array, or a list of them, but got {type(image).__name__}: read "
            "files and convert other types first."
        )
        raise TypeError(message)
    check_real(name, image)
    # torch has no minimum, sum or sorting for these three
    wider = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}.get(image.dtype)
    return image.detach() if wider is None else image.detach().to(wider)


def as_plain_array(image: ArrayLike, name: str) -> npt.NDArray[Any]:
    """The values as a NumPy array, which knows no bfloat16; TypeError as by `as_plain_tensor`."""
    if isinstance(image, np.ndarray):
        return image
    tensor = as_plain_tensor(image, name).cpu()
    return np.asarray(tensor.float() if tensor.dtype == torch.bfloat16 else tensor)


def pair_images(
    y_pred: Any,
    y: Any,
    num_classes: int | None,
    ignore_index: int | None,
    labelled: Any = None,
    names: tuple[str, str] = ("y_pred", "y"),
) -> list[ImagePair]:
    """Split a batch, or a list, into checked pairs of images.

    Args:
        y_pred: hard predictions, in the forms of `PerClassMetric.__call__`.
        y: the reference; per-class maps may be NaN throughout for a class that was not annotated.
        num_classes: number of classes of label maps, background included.
        ignore_index: reference label whose voxels are left out.
        labelled: (B, C) bool, which classes each image was annotated for; None for all.
        names: of the two, for the errors.

    Raises:
        TypeError: an input is neither a tensor nor a list of tensors.
        ValueError: the numbers of images, the shapes or the classes disagree, or values are not hard labels.
    """
    predictions, references = split_images(y_pred, names[0]), split_images(y, names[1])
    if len(predictions) != len(references) or not predictions:
        message = (
            f"Expected `{names[0]}` and `{names[1]}` to hold the same number of images, at least one, "
            f"but got {len(predictions)} and {len(references)}: pass each prediction with its reference."
        )
        raise ValueError(message)
    known = labelled_rows(labelled, len(references))
    return [
        _pair(p, r, num_classes, ignore_index, row, names)
        for p, r, row in zip(predictions, references, known, strict=True)
    ]


def split_images(batch: Any, name: str) -> list[torch.Tensor]:
    """The images of a batch (B, C, *S), or of a list of (C, *S), as plain tensors."""
    if isinstance(batch, (list, tuple)):
        images = [as_plain_tensor(image, name) for image in batch]
        too_many = "pass the batch itself, or the images without the batch dimension"
        for image in images:
            check_dimensions(f"`{name}`", image.shape, "(C, *S)", expected="hold images of shape", too_many=too_many)
        return images
    tensor = as_plain_tensor(batch, name)
    check_dimensions(f"`{name}`", tensor.shape)
    return list(tensor)


def _pair(
    prediction: torch.Tensor,
    reference: torch.Tensor,
    num_classes: int | None,
    ignore_index: int | None,
    labelled: torch.Tensor | None,
    names: tuple[str, str],
) -> ImagePair:
    if prediction.shape[1:] != reference.shape[1:]:
        message = (
            f"Expected `{names[0]}` and `{names[1]}` to have the same spatial shape, but got "
            f"{tuple(prediction.shape[1:])} and {tuple(reference.shape[1:])}: put them on one grid."
        )
        raise ValueError(message)
    classes = _number_of_classes(len(prediction), len(reference), num_classes)
    prediction, reference = rounded(prediction), rounded(reference.to(prediction.device))
    given = reference
    reference, labelled = annotated(reference, classes, labelled, ignore_index)
    kept = valid_voxels(reference[None], ignore_index)
    valid = None if kept is None else kept[0, 0]
    for image, name in ((prediction, names[0]), (reference, names[1])):
        if len(image) == classes:
            check_binary(image, valid, name, given=num_classes)
        else:
            check_labels(image[0], classes, valid, name)
    return ImagePair(prediction, reference, classes, valid, labelled, None if labelled is None else given)


def rounded(image: torch.Tensor) -> torch.Tensor:
    """The image with values that miss a whole number by rounding made whole; the same tensor where none does."""
    if not image.is_floating_point() or all(bool((p == p.round()).all()) for p in image.reshape(-1).split(_CHUNK)):
        return image
    nearest = image.round()
    return torch.where((image - nearest).abs() <= label_tolerance(image), nearest, image)


def _number_of_classes(prediction_channels: int, reference_channels: int, num_classes: int | None) -> int:
    channels = {c for c in (prediction_channels, reference_channels) if c != 1} or {num_classes or 1}
    if len(channels) > 1 or (num_classes is not None and channels != {num_classes}):
        expected = "the same number of channels" if num_classes is None else f"1 or num_classes={num_classes} channels"
        message = (
            f"Expected `y_pred` and `y` to have {expected}, but got {prediction_channels} and {reference_channels}: "
            "pass label maps of one channel, or per-class maps of the same classes."
        )
        raise ValueError(message)
    return channels.pop()


def check_binary(image: torch.Tensor, valid: torch.Tensor | None, name: str, given: int | None) -> None:
    """Raise ValueError if per-class maps hold anything but 0 and 1 at a voxel that counts."""
    if image.dtype == torch.bool:
        return
    for channel in image:
        values = channel if valid is None else channel[valid]
        wrong = values[(values != 0) & (values != 1)]
        if wrong.numel() == 0:
            continue
        remedy = "threshold it, or take the argmax, first"
        if wrong.is_floating_point() and bool(wrong.isnan().any()):
            wrong, remedy = wrong[wrong.isnan()], _NAN_REMEDY_OF_Y if name == "y" else _NAN_REMEDY
        elif len(image) == 1 and given is None and not bool((wrong % 1).any()):
            remedy = "pass `num_classes` if this is a label map"
        channels = counted(len(image), "channel")
        message = f"Expected `{name}` to hold 0 and 1 in its {channels}, but got {wrong[0].item():g}: {remedy}."
        raise ValueError(message)


def check_labels(labels: torch.Tensor, num_classes: int, valid: torch.Tensor | None, name: str) -> None:
    """Raise ValueError if a label map holds anything but class numbers at a voxel that counts."""
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
        remedy = _NAN_REMEDY if math.isnan(wrong) else "take the argmax of probabilities first"
        message = f"Expected `{name}` to hold whole class numbers, but got {digits(wrong)}: {remedy}."
        raise ValueError(message)
    low, high = (v.item() for v in values.aminmax())
    if low < 0 or high >= num_classes:
        wrong = low if low < 0 else high
        is_reference = name in ("y", "reference")  # only its labels can be ignored
        other = "name the value as `ignore_index`" if is_reference else "map the value to one of these classes"
        remedy = other if low < 0 else f"raise `num_classes`, or {other}"
        message = (
            f"Expected `{name}` to hold classes 0 to {num_classes - 1} (num_classes={num_classes}), but got {wrong:g}: "
            f"{remedy}."
        )
        raise ValueError(message)
