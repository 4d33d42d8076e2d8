"""Dictionary forms of the crops that reach every lesion, and the transform that finds the lesions once per volume."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
from monai.config.type_definitions import KeysCollection
from monai.transforms.traits import MultiSampleTrait
from monai.transforms.transform import LazyTransform, MapTransform, Randomizable

from monai_iou import checks
from monai_iou.transforms.crops import RandCropByLesions
from monai_iou.transforms.lesions import find_lesions
from monai_iou.transforms.shapes import check_same_shape

__all__ = ["LesionIndicesd", "RandCropByLesionsd"]

POSTFIX = "_lesions"


def _limiting_image(item: Mapping[Hashable, Any], key: str | None) -> Any:
    """Return the image that limits the background, None without a key; raise KeyError if an item lacks it."""
    if not key:
        return None
    if key not in item:
        message = (
            f"Expected `image_key` to be a key of the item, but got {key!r} beside {sorted(map(str, item))}: correct "
            "it, or leave `image_key` out to take background anywhere."
        )
        raise KeyError(message)
    return item[key]


class LesionIndicesd(MapTransform):
    """Find the lesions and the background of a label once per volume, for `RandCropByLesionsd`.

    Without this transform, the crop finds the components again at every call. The cache of a dataset, in memory or on
    disk, stores the result of all transforms before the first random one. Put this transform last among those, after
    all transforms that move voxels (flips, resampling, crops): the crop refuses lesions that are no longer there.

    The result describes every voxel of every component and of the background. It needs little memory, because it stores
    runs of consecutive voxels: MONAI's `FgBgToIndicesd` stores 8 bytes per voxel, 600 MB for a whole-body CT.

    Args:
        keys: keys of labels: label maps (1, *S) or per-class maps (C, *S).
        image_key: only voxels where this image exceeds `image_threshold` count as background; None for no limit.
        image_threshold: see `image_key`.
        labels, connectivity, ignore_index: see `RandCropByLesions`.
        postfix: the result, a dictionary of arrays, is stored under the key of the label with `postfix` appended.
        allow_missing_keys: whether keys may be absent from an item.

    Raises:
        TypeError: if `ignore_index` is not an integer, `image_threshold` not a number, or `labels` not a list of
            integers.
        KeyError: when called, if the item lacks `image_key`.
        ValueError: when called, if the label contains a value that is not a whole number, or the image has another
            shape.

    Example:
        >>> import torch
        >>> from monai_iou.transforms import LesionIndicesd
        >>> item = LesionIndicesd("label")({"label": torch.tensor([[[0, 0, 1], [2, 2, 0]]])})
        >>> {name: values.tolist() for name, values in item["label_lesions"].items()}
        {'starts': [0, 5, 2, 3], 'before': [0, 2, 3, 4], 'bounds': [0, 3, 4, 6], 'classes': [-1, 1, 2], 'shape': [2, 3]}
    """

    def __init__(
        self,
        keys: KeysCollection,
        image_key: str | None = None,
        image_threshold: float = 0.0,
        labels: Sequence[int] | None = None,
        connectivity: int | None = None,
        ignore_index: int | None = None,
        postfix: str = POSTFIX,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.image_key = image_key
        self.image_threshold = checks.check_number("image_threshold", image_threshold)
        self.labels = checks.check_class_numbers("labels", labels)
        self.connectivity = checks.check_connectivity(connectivity)
        self.ignore_index = checks.check_ignore_index(ignore_index)
        self.postfix = postfix

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item with the result for each label added."""
        items = dict(data)
        image = _limiting_image(items, self.image_key)
        for key in self.key_iterator(items):
            runs = find_lesions(
                items[key], image, self.image_threshold, self.labels, self.connectivity, self.ignore_index
            )
            items[f"{key}{self.postfix}"] = runs.as_item()
        return items


class RandCropByLesionsd(Randomizable, MapTransform, LazyTransform, MultiSampleTrait):
    """Crop patches of several images that can be centred on every lesion; see `RandCropByLesions` for the sampling.

    If the item contains the result of `LesionIndicesd`, it is used and removed from the item; no transform between the
    two may move voxels. Otherwise the components are found from the label at every call.

    Args:
        keys: keys of the images and labels to crop, (C, *S), all with the same spatial shape.
        label_key: key of the label whose lesions are drawn: a label map (1, *S) or per-class maps (C, *S).
        spatial_size, num_samples, pos, neg, size_exponent, jitter: see `RandCropByLesions`.
        lesions_key: key of the result of `LesionIndicesd`; by default `label_key` with "_lesions" appended.
        image_key: negative patches are centred on voxels where this image exceeds `image_threshold`; None for no
            limit.
        image_threshold, labels, connectivity, ignore_index: see `RandCropByLesions`. Like `image_key`, they have no
            effect on the result of `LesionIndicesd`, which has options of its own.
        allow_smaller: whether a volume that is smaller than the patch gives a smaller patch instead of an error.
        allow_missing_keys: whether keys may be absent from an item.
        lazy: whether cropping is lazy, as in MONAI.

    Raises:
        TypeError: as `RandCropByLesions`.
        KeyError: when called, if the item holds neither `image_key` nor the result of `LesionIndicesd`.
        ValueError: as `RandCropByLesions`; when called, also if the images and labels differ in spatial shape.

    Example:
        >>> import torch
        >>> from monai_iou.transforms import LesionIndicesd, RandCropByLesionsd
        >>> label = torch.zeros(1, 16, 16, 16)
        >>> label[0, 2, 3, 4] = 1
        >>> item = LesionIndicesd("label")({"image": torch.rand(2, 16, 16, 16), "label": label})
        >>> crop = RandCropByLesionsd(["image", "label"], "label", (8, 8, 8), num_samples=2, pos=1, neg=0)
        >>> [(tuple(patch["image"].shape), patch["label"].sum().item()) for patch in crop(item)]
        [((2, 8, 8, 8), 1.0), ((2, 8, 8, 8), 1.0)]
    """

    backend = RandCropByLesions.backend

    def __init__(
        self,
        keys: KeysCollection,
        label_key: str,
        spatial_size: Sequence[int] | int,
        num_samples: int = 1,
        pos: float = 1.0,
        neg: float = 1.0,
        size_exponent: float = 0.5,
        jitter: float = 0.5,
        lesions_key: str | None = None,
        image_key: str | None = None,
        image_threshold: float = 0.0,
        labels: Sequence[int] | None = None,
        connectivity: int | None = None,
        ignore_index: int | None = None,
        allow_smaller: bool = False,
        allow_missing_keys: bool = False,
        lazy: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        LazyTransform.__init__(self, lazy)
        self.label_key, self.image_key = label_key, image_key
        self.lesions_key = f"{label_key}{POSTFIX}" if lesions_key is None else lesions_key
        self.cropper = RandCropByLesions(
            spatial_size,
            num_samples=num_samples,
            pos=pos,
            neg=neg,
            size_exponent=size_exponent,
            jitter=jitter,
            labels=labels,
            connectivity=connectivity,
            ignore_index=ignore_index,
            image_threshold=image_threshold,
            allow_smaller=allow_smaller,
            lazy=lazy,
        )

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> Any:
        """Seed the crop."""
        super().set_random_state(seed, state)
        self.cropper.set_random_state(seed, state)
        return self

    @LazyTransform.lazy.setter  # type: ignore[attr-defined, untyped-decorator]
    def lazy(self, value: bool) -> None:
        """Set whether cropping is lazy."""
        self._lazy = value
        self.cropper.lazy = value

    @property
    def requires_current_data(self) -> bool:
        """Whether pending lazy transforms must be applied first: True, because the label is read."""
        return True

    def randomize(self, data: Mapping[Hashable, Any]) -> None:
        """Draw the positions of the patches from an item."""
        label, lesions = data.get(self.label_key), data.get(self.lesions_key)
        image = None if lesions is not None else _limiting_image(data, self.image_key)
        self.cropper.randomize(label, lesions, image)

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> list[dict[Hashable, Any]]:
        """Return one item per patch; entries that are not cropped are copied into each."""
        self.randomize(data)
        items = {key: value for key, value in data.items() if key != self.lesions_key}
        rest = {key: value for key, value in items.items() if key not in self.keys}
        patches = [{**items, **deepcopy(rest)} for _ in self.cropper.centers]
        lazy = self.lazy if lazy is None else lazy
        keys = [*self.key_iterator(items), self.label_key]
        check_same_shape({key: items[key] for key in keys if items.get(key) is not None}, pending=True)
        for key in self.key_iterator(items):
            for patch, values in zip(patches, self.cropper(items[key], randomize=False, lazy=lazy), strict=True):
                patch[key] = values
        return patches
