"""Lesions of other cases, pasted into an image and its label."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
from monai.config.type_definitions import KeysCollection
from monai.transforms.transform import MapTransform, RandomizableTransform
from monai.utils.type_conversion import convert_to_dst_type
from numpy.typing import NDArray

from monai_iou import checks
from monai_iou.components import BACKGROUND, ComponentRuns, component_runs
from monai_iou.transforms.crops import as_array
from monai_iou.transforms.crops_dictionary import POSTFIX
from monai_iou.transforms.pasting import Lesion, body_mask, foreground_mask, in_channels, paste_image, surrounded

__all__ = ["RandCopyLesionsd"]

Item = Mapping[Hashable, Any]


class RandCopyLesionsd(RandomizableTransform, MapTransform):
    """Paste lesions of other cases into an item, with their label.

    A lesion is a connected component of the voxels of all `labels` together, so that a lesion of several classes stays
    whole. A source item is drawn, then one of its lesions, each with the same chance, then a place for it. The label is
    written exactly at the lesion's voxels. In the image, the lesion is surrounded by a rim, in which a voxel at the
    distance d from the lesion (in voxels, d <= `rim`) becomes

        w * source + (1 - w) * target        w = 1 - d / (rim + 1).

    With `match_intensity`, each channel of the source is first shifted and scaled so that mean and standard deviation
    of the voxels round the lesion (`rim` wide, at least 3 voxels) are those of the voxels round its new place; the
    scale stays within 1/4 and 4, and is 1 where one of the two is constant.

    All voxels of a lesion lie inside the volume, in the body, and on none of the item's lesions (unless
    `allow_overlap`); the rim leaves out what is outside the volume, the body or the background of either label. Where
    no place is found, or the source has no lesion, the item stays as it is. Nothing is changed in place. The idea is
    that of TumorCP (Yang et al., arXiv 2107.11023) and CarveMix (Zhang et al., arXiv 2108.06883).

    Use it behind all deterministic transforms of the item and before the crop. What `LesionIndicesd` stored of an item
    does not know a pasted lesion, and is taken out; `RandCropByLesionsd` then finds the components anew.

    Args:
        keys: the label and one or more images (C, *S), in items of one shape but for the channels.
        label_key: the label among them: a label map (1, *S) or per-class maps (C, *S).
        source: where lesions come from: a sequence of items that are prepared like this transform's input, such as a
            `CacheDataset` with the deterministic transforms, or a function that returns an item for a whole number from
            0 to 2^31 - 2. The item itself may be drawn.
        prob: chance that lesions are pasted.
        max_lesions: at most so many are pasted, at least one, each number with the same chance.
        labels: classes that are copied: values of a label map, channels of per-class maps; all above 0 by default.
            Name the lesions if the label also has organs.
        rim: width of the rim in voxels; 0 for none.
        match_intensity: see above.
        allow_overlap: whether a lesion may be pasted over others.
        tries: number of places to try for a lesion.
        image_threshold: the body is where any channel of an image exceeds it. None takes where a channel differs from
            its background, the value that most of its outermost voxels have; everywhere if they have no such value.
        ignore_index: value of ignored voxels, or the channel that marks them; they are not copied, nor pasted over.
        lesions_key: where `LesionIndicesd` stored its findings, by default `label_key` with "_lesions" appended; it
            saves searching a source item, if it found one class there and `labels` is None.
        allow_missing_keys: do not fail where the key of an image is absent.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is out of its range; when called, items do not fit each other.

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
            self, checks.check_fraction("prob", prob, allow_one=True, remedy="it is the chance that lesions are pasted")
        )
        _check_keys(self.keys, label_key)
        self.label_key = label_key
        self.source, self.count = source, _source_length(source)
        self.max_lesions = _whole("max_lesions", max_lesions, 1, "set prob=0 to paste none")
        self.labels = None if labels is None else list(labels)
        if self.labels == []:
            message = "Expected `labels` to name a class to copy, but got an empty list: None takes all above 0."
            raise ValueError(message)
        self.rim = _whole("rim", rim, 0, "it is the width in voxels, 0 pastes without a rim")
        self.match_intensity, self.allow_overlap = match_intensity, allow_overlap
        self.tries = _whole("tries", tries, 1, "it is the number of places to try for a lesion")
        self.image_threshold = (
            None if image_threshold is None else checks.check_number("image_threshold", image_threshold)
        )
        self.ignore_index = checks.check_ignore_index(ignore_index)
        self.lesions_key = f"{label_key}{POSTFIX}" if lesions_key is None else lesions_key

    def __call__(self, data: Item) -> dict[Hashable, Any]:
        """Return the item, with lesions pasted into copies of its images and label if chance says so."""
        items = dict(data)
        self.randomize(None)
        if not self._do_transform:
            return items
        arrays = {key: np.array(as_array(items[key])) for key in self.key_iterator(items)}
        _check_shapes("the item", arrays)
        body = self._body(arrays)
        wanted = int(self.R.randint(1, self.max_lesions + 1))
        if not sum(self._paste_one(arrays, body) for _ in range(wanted)):
            return items
        items.pop(self.lesions_key, None)
        for key, values in arrays.items():
            items[key] = convert_to_dst_type(values, items[key], dtype=items[key].dtype)[0]
        return items

    def _body(self, arrays: Mapping[Hashable, NDArray[Any]]) -> NDArray[np.bool_]:
        masks = [body_mask(values, self.image_threshold) for key, values in arrays.items() if key != self.label_key]
        return np.asarray(np.logical_or.reduce(masks))

    def _paste_one(self, arrays: dict[Hashable, NDArray[Any]], body: NDArray[np.bool_]) -> bool:
        """Paste a lesion of a source item into the arrays in place; return whether there was a place for it."""
        item = self._source_item()
        source = {key: as_array(item[key]) for key in arrays}
        _check_fit(source, arrays)
        lesion = self._lesion(item, source)
        if lesion is None:
            return False
        occupied = self._occupied(arrays[self.label_key])
        offset = self._place(lesion.voxels, body if self.allow_overlap else body & ~occupied)
        if offset is None:
            return False
        for key in arrays:
            if key != self.label_key:
                paste_image(arrays[key], source[key], lesion, offset, body & ~occupied, self.rim, self.match_intensity)
        there = in_channels(lesion.voxels + offset)
        arrays[self.label_key][there] = source[self.label_key][in_channels(lesion.voxels)]
        return True

    def _source_item(self) -> Item:
        index = int(self.R.randint(self.count))
        item = self.source(index) if callable(self.source) else self.source[index]
        if not isinstance(item, Mapping):
            message = (
                f"Expected `source` to give dictionaries, but got {type(item).__name__}: use items before any crop, "
                "which makes a list of them."
            )
            raise TypeError(message)
        if missing := [key for key in self.key_iterator(dict.fromkeys(self.keys)) if key not in item]:
            message = f"Expected items of `source` to have the key {missing[0]!r}, but got none: prepare them alike."
            raise ValueError(message)
        return item

    def _lesion(self, item: Item, source: Mapping[Hashable, NDArray[Any]]) -> Lesion | None:
        """Draw a lesion of a source item; None if it has none."""
        label = source[self.label_key]
        stored = item.get(self.lesions_key) if self.labels is None else None
        runs = None if stored is None else ComponentRuns.from_item(stored)
        if runs is None or len(set(runs.classes.tolist()) - {BACKGROUND}) > 1 or runs.shape != label.shape[1:]:
            shown = foreground_mask(label, self.labels, self.ignore_index)
            runs = component_runs(shown[None], labels=[1])
        lesions = np.flatnonzero(runs.classes != BACKGROUND)
        if len(lesions) == 0:
            return None
        voxels = runs.voxels(int(lesions[self.R.randint(len(lesions))]))
        return surrounded(voxels, self._body(source) & ~self._occupied(label), self.rim)

    def _occupied(self, label: NDArray[Any]) -> NDArray[np.bool_]:
        """Return where a label is not background: a lesion, an ignored voxel, or another class."""
        if len(label) == 1:
            return np.asarray(label[0] != 0)
        occupied = foreground_mask(label, sorted({*range(1, len(label)), *(self.labels or [])}))
        unknown = self.ignore_index is not None and not 0 <= self.ignore_index < len(label)
        return occupied | ~(label >= 0.5).any(0) if unknown else occupied

    def _place(self, voxels: NDArray[Any], free: NDArray[np.bool_]) -> NDArray[Any] | None:
        """Draw where the lesion's voxels are all free; every such place has the same chance. None if none was found."""
        candidates = np.flatnonzero(free)
        if len(candidates) < len(voxels) or np.any(np.ptp(voxels, axis=0) >= free.shape):
            return None
        for _ in range(self.tries):
            at = np.unravel_index(int(candidates[self.R.randint(len(candidates))]), free.shape)
            offset = np.array(at) - voxels[len(voxels) // 2]
            places = voxels + offset
            if np.all((places >= 0) & (places < free.shape)) and free[tuple(places.T)].all():
                return np.asarray(offset)
        return None


def _check_keys(keys: Sequence[Hashable], label_key: str) -> None:
    if label_key not in keys or len(set(keys)) < 2:
        message = (
            f"Expected `keys` to hold the label {label_key!r} and an image, but got {tuple(keys)}: name all that "
            "change with a pasted lesion."
        )
        raise ValueError(message)


def _source_length(source: Any) -> int:
    """Return how many items there are to draw from."""
    if callable(source):
        return 2**31 - 1
    if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")) or isinstance(source, (str, Mapping)):
        message = (
            f"Expected `source` to be a sequence of items or a function, but got {type(source).__name__}: pass a list "
            "or a dataset of prepared items."
        )
        raise TypeError(message)
    if len(source) == 0:
        message = "Expected `source` to hold an item to copy lesions from, but got none: pass prepared training cases."
        raise ValueError(message)
    return len(source)


def _whole(name: str, value: Any, least: int, remedy: str) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        message = f"Expected `{name}` to be a whole number of at least {least}, but got {value!r}: {remedy}."
        raise ValueError(message)
    return int(value)


def _check_shapes(owner: str, arrays: Mapping[Hashable, NDArray[Any]]) -> None:
    shapes = {str(key): values.shape[1:] for key, values in arrays.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{shape} of `{key}`" for key, shape in shapes.items())
        message = f"Expected images of one shape in {owner}, but got {listed}: resample or pad them alike first."
        raise ValueError(message)


def _check_fit(source: Mapping[Hashable, NDArray[Any]], arrays: Mapping[Hashable, NDArray[Any]]) -> None:
    """Raise ValueError unless a source item has the item's channels and number of dimensions."""
    _check_shapes("an item of `source`", source)
    for key, values in arrays.items():
        found = source[key].shape
        if len(found) != values.ndim or found[0] != len(values):
            message = (
                f"Expected `{key}` of a source item to have {len(values)} channels and {values.ndim - 1} dimensions as "
                f"in the item, but got the shape {found}: prepare both by the same transforms."
            )
            raise ValueError(message)
