"""An augmentation that pastes lesions of other cases into an image and its label."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from monai.config.type_definitions import KeysCollection
from monai.transforms.transform import MapTransform, RandomizableTransform
from monai.utils.type_conversion import convert_to_dst_type
from numpy.typing import NDArray

from monai_iou import checks
from monai_iou.components import BACKGROUND, ComponentRuns, component_runs
from monai_iou.transforms.copying_checks import check_fit, check_keys, check_label, source_length
from monai_iou.transforms.crops_dictionary import POSTFIX
from monai_iou.transforms.lesions import as_array, check_unmoved
from monai_iou.transforms.pasting import (
    Lesion,
    body_mask,
    foreground_mask,
    ignored_mask,
    occupied_mask,
    paste_image,
    paste_label,
    surrounded,
)
from monai_iou.transforms.shapes import check_same_shape

__all__ = ["RandCopyLesionsd"]

Item = Mapping[Hashable, Any]


class RandCopyLesionsd(RandomizableTransform, MapTransform):
    """Copy lesions of other cases into an item, together with their labels.

    A lesion is a connected component of the voxels of all `labels` together, so that a lesion with several classes is
    copied as a whole. The transform draws a source item, one of its lesions, and a position for it, each uniformly. The
    label is changed at the voxels of the lesion only. In the image, the lesion is surrounded by a rim, in which a voxel
    at a distance of d voxels from the lesion (d <= `rim`) becomes

        w * source + (1 - w) * target        w = 1 - d / (rim + 1).

    With `match_intensity`, each channel of the source is first shifted and scaled so that the mean and the standard
    deviation of the voxels around the lesion (up to a distance of `rim`, and at least of 3 voxels) become those of the
    voxels around the new position. The scale is limited to the range from 1/4 to 4, and is 1 if one of the standard
    deviations is 0.

    All voxels of the pasted lesion lie inside the volume and the body and, unless `allow_overlap` is set, on background
    of the item's label. The rim leaves out voxels that are outside the volume or the body, or that are not background
    in the label of the source or of the item. If no position is found or the source has no lesion, the item remains
    unchanged. The input is never modified in place. The method follows TumorCP (Yang et al. 2021,
    https://arxiv.org/abs/2107.11023) and CarveMix (Zhang et al. 2021, https://arxiv.org/abs/2108.06883).

    Use it after all deterministic transforms of the item and before cropping. The result of `LesionIndicesd` does not
    include a pasted lesion and is removed from the item; `RandCropByLesionsd` then finds the components again.

    Args:
        keys: the label and one or more images (C, *S), all with the same spatial shape.
        label_key: the key of the label: a label map (1, *S) or per-class maps (C, *S).
        source: the source of the lesions: a sequence of items that are prepared like the input of this transform, such
            as a `CacheDataset` with the deterministic transforms, or a function that returns an item for an integer
            from 0 to 2^31 - 2. An item may be its own source.
        prob: probability that lesions are pasted.
        max_lesions: the number of lesions to paste is drawn uniformly from 1 to `max_lesions`.
        labels: classes that are copied: values of a label map, or channels of per-class maps; by default all above 0.
            Name the lesion classes if the label also contains organs.
        rim: width of the rim in voxels; 0 for none.
        match_intensity: whether intensities are matched as described above.
        allow_overlap: whether a lesion may be pasted over other lesions; not over ignored voxels.
        tries: number of positions to try for each lesion.
        image_threshold: a voxel belongs to the body if any channel of any image exceeds this value. By default, it
            belongs to the body if any channel differs from the value that most voxels on the faces of the volume have;
            if there is no such value, the body is the whole volume.
        ignore_index: value of ignored voxels, or the channel that marks them. They are neither copied nor pasted over.
            A label map whose 0 is ignored has no background: with it, lesions are only pasted over the classes above 0,
            if `allow_overlap` is set, and without a rim.
        lesions_key: key of the result of `LesionIndicesd`; by default `label_key` with "_lesions" appended. It saves
            searching a source item if it contains a single class and `labels` is None.
        allow_missing_keys: whether keys of images may be absent from an item.

    Raises:
        TypeError: if an argument has an unsuitable type.
        ValueError: if an argument is out of range; when called, if a source item and the item do not match, the lesions
            of a source item are not where `LesionIndicesd` found them, the type of the label cannot hold a class to
            paste, or the label has no background (see `ignore_index`).

    Example:
        >>> import torch
        >>> from monai_iou.transforms import RandCopyLesionsd
        >>> label = torch.zeros(1, 16, 16)
        >>> label[0, 4:6, 4:7] = 1
        >>> source = [{"image": 5 * label, "label": label}]
        >>> copy = RandCopyLesionsd(["image", "label"], "label", source, prob=1.0).set_random_state(0)
        >>> item = copy({"image": torch.rand(1, 16, 16), "label": torch.zeros(1, 16, 16)})
        >>> item["label"].sum().item(), item["image"][item["label"] > 0].unique().item()
        (6.0, 5.0)
    """

    def __init__(
        self,
        keys: KeysCollection,
        label_key: str,
        source: Sequence[Item] | Callable[[int], Item],
        prob: float = 0.5,
        max_lesions: int = 1,
        labels: Sequence[int] | None = None,
        rim: int = 2,
        match_intensity: bool = True,
        allow_overlap: bool = False,
        tries: int = 10,
        image_threshold: float | None = None,
        ignore_index: int | None = None,
        lesions_key: str | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(
            self,
            checks.check_fraction(
                "prob", prob, allow_one=True, remedy="give the probability with which lesions are pasted"
            ),
        )
        check_keys(self.keys, label_key)
        self.label_key = label_key
        self.source, self.count = source, source_length(source)
        self.max_lesions = checks.check_count("max_lesions", max_lesions, "set prob=0 to paste none")
        self.labels = checks.check_class_numbers("labels", labels)
        if self.labels == []:
            message = (
                "Expected `labels` to name a class to copy, but got an empty list: leave it out to copy all classes "
                "above 0."
            )
            raise ValueError(message)
        self.rim = checks.check_count("rim", rim, "give the width in voxels, or 0 to paste without a rim", least=0)
        self.match_intensity, self.allow_overlap = match_intensity, allow_overlap
        self.tries = checks.check_count("tries", tries, "give the number of positions to try for each lesion")
        self.image_threshold = (
            None if image_threshold is None else checks.check_number("image_threshold", image_threshold)
        )
        self.ignore_index = checks.check_ignore_index(ignore_index)
        self.lesions_key = f"{label_key}{POSTFIX}" if lesions_key is None else lesions_key

    def __call__(self, data: Item) -> dict[Hashable, Any]:
        """Return the item, with probability `prob` with lesions pasted into copies of its images and label.

        Args:
            data: an item with the images (C, *S) and the label.

        Raises:
            TypeError: if `source` does not return a dictionary.
            ValueError: if the images of an item differ in shape, a source item lacks one of its keys or has other
                channels, the label holds regions or has no background, or its type cannot hold a class to paste.
        """
        items = dict(data)
        self.randomize(None)
        if not self._do_transform:
            return items
        arrays = {key: np.array(as_array(items[key])) for key in self.key_iterator(items)}
        check_same_shape(arrays, "the item")
        check_label(self.label_key, arrays[self.label_key], self.ignore_index, allow_overlap=self.allow_overlap)
        body = self._body(arrays)
        wanted = int(self.R.randint(1, self.max_lesions + 1))
        dtype = items[self.label_key].dtype  # of the array it may be another, as NumPy has no bfloat16
        if not sum(self._paste_one(arrays, body, dtype) for _ in range(wanted)):
            return items
        items.pop(self.lesions_key, None)
        for key, values in arrays.items():
            items[key] = convert_to_dst_type(values, items[key], dtype=items[key].dtype)[0]
        return items

    def _body(self, arrays: Mapping[Hashable, NDArray[Any]]) -> NDArray[np.bool_]:
        masks = [body_mask(values, self.image_threshold) for key, values in arrays.items() if key != self.label_key]
        return np.asarray(np.logical_or.reduce(masks))

    def _paste_one(self, arrays: dict[Hashable, NDArray[Any]], body: NDArray[np.bool_], dtype: Any) -> bool:
        """Paste a lesion of a source item into the arrays in place; return whether a position was found for it."""
        item = self._source_item(arrays)
        source = {key: as_array(item[key]) for key in arrays}
        check_fit(source, arrays)
        lesion = self._lesion(item, source)
        if lesion is None:
            return False
        occupied = occupied_mask(arrays[self.label_key], self.labels, self.ignore_index)
        taken = ignored_mask(arrays[self.label_key], self.ignore_index) if self.allow_overlap else occupied
        offset = self._offset(lesion.voxels, body & ~taken)
        if offset is None:
            return False
        for key in arrays:
            if key != self.label_key:
                paste_image(arrays[key], source[key], lesion, offset, body & ~occupied, self.rim, self.match_intensity)
        paste_label(arrays[self.label_key], source[self.label_key], lesion, offset, dtype)
        return True

    def _source_item(self, keys: Iterable[Hashable]) -> Item:
        index = int(self.R.randint(self.count))
        item = self.source(index) if callable(self.source) else self.source[index]
        if not isinstance(item, Mapping):
            message = (
                f"Expected `source` to return dictionaries, but got {type(item).__name__}: use items before any crop, "
                "because a crop returns a list of them."
            )
            raise TypeError(message)
        if missing := [key for key in keys if key not in item]:
            message = (
                f"Expected items of `source` to have the key {missing[0]!r}, but got none: prepare them by the same "
                "transforms."
            )
            raise ValueError(message)
        return item

    def _lesion(self, item: Item, source: Mapping[Hashable, NDArray[Any]]) -> Lesion | None:
        """Draw a lesion of a source item; return None if it has no lesion."""
        label = source[self.label_key]
        stored = item.get(self.lesions_key) if self.labels is None else None
        runs = None if stored is None else ComponentRuns.from_item(stored)
        if runs is None or len(set(runs.classes.tolist()) - {BACKGROUND}) > 1 or runs.shape != label.shape[1:]:
            lesion_mask = foreground_mask(label, self.labels, self.ignore_index)
            stored, runs = None, component_runs(lesion_mask[None], labels=[1])
        lesions = np.flatnonzero(runs.classes != BACKGROUND)
        if len(lesions) == 0:
            return None
        drawn = int(lesions[self.R.randint(len(lesions))])
        voxels = runs.voxels(drawn)
        if stored is not None:
            check_unmoved(label, voxels, runs.classes[drawn].repeat(len(voxels)), self.ignore_index)
        occupied = occupied_mask(label, self.labels, self.ignore_index)
        return surrounded(voxels, self._body(source) & ~occupied, self.rim)

    def _offset(self, voxels: NDArray[Any], free: NDArray[np.bool_]) -> NDArray[Any] | None:
        """Draw an offset, uniformly among those that move all voxels of a lesion onto free ones.

        Args:
            voxels: indices of the lesion's voxels, (n, d).
            free: (*S) bool.

        Returns:
            The offset in voxels, (d,), or None if `tries` draws did not find one.
        """
        candidates = np.flatnonzero(free)
        if len(candidates) < len(voxels) or np.any(np.ptp(voxels, axis=0) >= free.shape):
            return None
        for _ in range(self.tries):
            voxel = np.unravel_index(int(candidates[self.R.randint(len(candidates))]), free.shape)
            offset = np.array(voxel) - voxels[len(voxels) // 2]
            moved = voxels + offset
            if np.all((moved >= 0) & (moved < free.shape)) and free[tuple(moved.T)].all():
                return np.asarray(offset)
        return None
