"""Dictionary forms of the crops that reach every lesion, and what they keep of a volume between epochs."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
from monai.config.type_definitions import KeysCollection
from monai.transforms.traits import MultiSampleTrait
from monai.transforms.transform import LazyTransform, MapTransform, Randomizable

from monai_iou import checks
from monai_iou.transforms.crops import RandCropByLesions, find_lesions

__all__ = ["LesionIndicesd", "RandCropByLesionsd"]

POSTFIX = "_lesions"


class LesionIndicesd(MapTransform):
    """Find where `RandCropByLesionsd` may put its patches, once per volume.

    Without it, the crop finds the components anew each time. A dataset's cache, in memory or on disk, keeps what comes
    before the first random transform, so put it last of those, behind all transforms that change the label's shape.

    Every voxel of every component is kept, and of the background; as runs of consecutive voxels they take little:
    MONAI's `FgBgToIndicesd` keeps 8 bytes per voxel, 600 MB for a whole-body CT.

    Args:
        keys: labels (C, *S), see `RandCropByLesions`.
        image_key: background is where this image exceeds `image_threshold`; None for everywhere.
        image_threshold: see `image_key`.
        labels, connectivity, ignore_index: see `RandCropByLesions`.
        postfix: appended to the key of the label for what is found: a dictionary of arrays.
        allow_missing_keys: do not fail where a key is absent.

    Raises:
        ValueError: when called, the label holds a value that is not a whole number.

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
        self.image_key, self.image_threshold = image_key, image_threshold
        self.labels = None if labels is None else list(labels)
        self.connectivity, self.ignore_index = connectivity, checks.check_ignore_index(ignore_index)
        self.postfix = postfix

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item with what was found added."""
        items = dict(data)
        image = None if self.image_key is None else items[self.image_key]
        for key in self.key_iterator(items):
            runs = find_lesions(
                items[key], image, self.image_threshold, self.labels, self.connectivity, self.ignore_index
            )
            items[f"{key}{self.postfix}"] = runs.as_item()
        return items


class RandCropByLesionsd(Randomizable, MapTransform, LazyTransform, MultiSampleTrait):
    """Crop patches of several images so that every lesion can be in the middle of one: `RandCropByLesions`.

    What `LesionIndicesd` stored is used, and taken out of the item, if it is there; else the components are found from
    the label at every call.

    Args:
        keys: images and labels to crop, of one shape but for the channels.
        label_key: the label (C, *S) whose lesions are drawn.
        spatial_size, num_samples, pos, neg, size_exponent, jitter: see `RandCropByLesions`.
        lesions_key: where `LesionIndicesd` stored its findings; by default `label_key` with "_lesions" appended.
        image_key: negative patches are centred where this image exceeds `image_threshold`; None for everywhere.
        image_threshold, labels, connectivity, ignore_index: see `RandCropByLesions`; like `image_key` without effect
            on what `LesionIndicesd` stored, which has its own.
        allow_smaller: whether a volume smaller than the patch gives a smaller patch instead of an error.
        allow_missing_keys: do not fail where a key is absent.
        lazy: whether cropping is lazy, as in MONAI.

    Raises:
        TypeError: as `RandCropByLesions`.
        ValueError: as `RandCropByLesions`, or if the images differ in shape.

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
        """Whether pending lazy transforms must be applied first: yes, the label is read."""
        return True

    def randomize(self, data: Mapping[Hashable, Any]) -> None:
        """Draw the patches' places."""
        label, lesions = data.get(self.label_key), data.get(self.lesions_key)
        image = None if self.image_key is None else data.get(self.image_key)
        self.cropper.randomize(label, lesions, image)

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> list[dict[Hashable, Any]]:
        """Return an item for each patch; what is not cropped is copied into each."""
        self.randomize(data)
        items = {key: value for key, value in data.items() if key != self.lesions_key}
        rest = {key: value for key, value in items.items() if key not in self.keys}
        patches = [{**items, **deepcopy(rest)} for _ in self.cropper.centers]
        lazy = self.lazy if lazy is None else lazy
        shapes = {str(key): tuple(items[key].shape[1:]) for key in self.key_iterator(items)}
        if len(set(shapes.values())) > 1:
            listed = ", ".join(f"{shape} of `{key}`" for key, shape in shapes.items())
            message = f"Expected images of one shape, but got {listed}: resample or pad them alike before cropping."
            raise ValueError(message)
        for key in self.key_iterator(items):
            for patch, values in zip(patches, self.cropper(items[key], randomize=False, lazy=lazy), strict=True):
                patch[key] = values
        return patches
