"""Prepared volumes, kept in memory or on disk, so that only what is random is done again."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.data.dataset import CacheDataset, Dataset, PersistentDataset
from monai.transforms.traits import RandomizableTrait
from monai.transforms.transform import Transform
from monai.utils.type_conversion import convert_to_tensor

from monai_iou.transforms.crops_dictionary import RandCropByLesionsd
from monai_iou.volumes.reading import volume_files
from monai_iou.workflow.checkpoint_files import UNREADABLE, check_content, write_atomically
from monai_iou.workflow.failures import TrainingError, explain_out_of_memory
from monai_iou.workflow.settings import exit_with_message, optional
from monai_iou.workflow.typed_words import switch_on
from monai_iou.workflow.versions import about_this_run

__all__ = ["DiskCacheDataset", "cached_dataset"]

logger = logging.getLogger(__name__)

MAKERS = ("monai-iou", "monai", "torch")  # of prepared volumes: another version may prepare them in another way


def cached_dataset(
    data: Sequence[Mapping[str, Any]],
    transform: Callable[..., Any],
    cache_rate: float = 1.0,
    num_workers: int = 2,
    cache_dir: str | None = None,
) -> Dataset:
    """Return the dataset that the bundle's training reads from.

    Args:
        data: items with the paths of their files.
        transform: a MONAI `Compose`; what comes before its first random transform is done once per volume.
        cache_rate: part of the volumes that is kept in memory; without effect on `cache_dir`.
        num_workers: threads that prepare volumes for memory.
        cache_dir: folder in which to keep them for this and later runs instead; None for memory.

    Raises:
        TrainingError: the volumes do not fit into memory, or onto the disk.
    """
    folder = optional(cache_dir)
    if folder is not None:
        return DiskCacheDataset(data, transform, cache_dir=folder)
    with explain_out_of_memory():
        return MemoryCacheDataset(data, transform, cache_rate=cache_rate, num_workers=num_workers, progress=False)


class _Watched:
    """What both datasets do when a file is gone or is another one than when the run started: say which."""

    data: Any

    def watch(self) -> None:
        """Remember size and time of every item's files."""
        self._states = [{path: _state(path) for path in _paths(item)} for item in self.data]

    @contextlib.contextmanager
    def unchanged_files(self, index: int) -> Iterator[None]:
        """Raise TrainingError if a file of the item has changed, before it is read or while it is."""
        self._check_files(index)
        try:
            yield
        except Exception:
            self._check_files(index)
            raise

    def _check_files(self, index: int) -> None:
        for path, state in self._states[index].items():
            if _state(path) != state:
                what = "was replaced or changed" if path.exists() else "is no longer there"
                message = (
                    f"Expected {path} to stay as it was when the run started, but it {what}: leave the dataset alone "
                    f"during a run; a training continues with {switch_on('resume')} once the file is back."
                )
                raise TrainingError(message)


class MemoryCacheDataset(_Watched, CacheDataset):
    """MONAI's `CacheDataset`, which says in one sentence that a file which is not in memory has changed.

    MONAI's copies a volume each time, so that random transforms cannot change the one that is kept. Where a
    `RandCropByLesionsd` comes first, which leaves it as it is and gives patches of their own, no copy is made.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.watch()
        first = self.transform.get_index_of_first(_is_random)
        crop = None if first is None else self.transform.transforms[first]
        is_lazy = bool(self.transform.lazy or getattr(crop, "lazy", False))
        self.copy_cache = self.copy_cache and (type(crop) is not RandCropByLesionsd or is_lazy)

    def _transform(self, index: int) -> Any:
        if index % len(self) < self.cache_num:
            return super()._transform(index)
        with self.unchanged_files(index):
            return super()._transform(index)


class DiskCacheDataset(_Watched, PersistentDataset):
    """MONAI's `PersistentDataset`, made safe against changed files and against being killed.

    A volume's file is named by what it came from: the item, size and time of its files, the transforms up to the
    first random one, and the versions of this package, MONAI and torch. When any of them changes, it is prepared again;
    what is no longer used stays until the folder is deleted. Files are written whole or not at all and load with
    `weights_only=True`, so several trainings, or the ranks of one, may share the folder.

    Args:
        data: items with the paths of their files.
        transform: a MONAI `Compose`. Its transforms up to the first random one must allow pickling.
        cache_dir: the folder; made if there is none.

    Raises:
        ValueError: a transform cannot be pickled.
        TrainingError: on reading an item, if the disk is full.
    """

    def __init__(self, data: Sequence[Any], transform: Callable[..., Any], cache_dir: str) -> None:
        super().__init__(data, transform, cache_dir, hash_func=_item_hash, hash_transform=_transforms_hash)
        self.watch()

    def _transform(self, index: int) -> Any:
        with self.unchanged_files(index):
            return super()._transform(index)

    def _cachecheck(self, item_transformed: Any) -> Any:
        path = Path(str(self.cache_dir)) / f"{_item_hash(item_transformed).decode()}{self.transform_hash}.pt"
        if path.is_file():
            try:
                check_content(path)
                return torch.load(path, weights_only=True)
            except UNREADABLE as error:
                logger.warning("%s is damaged (%s): the volume is prepared again.", path, error)
        prepared = convert_to_tensor(
            self._pre_transform(copy.deepcopy(item_transformed)), convert_numeric=False, track_meta=False
        )
        try:
            write_atomically(prepared, path)
        except PermissionError:
            # Windows replaces no file that another process is reading; that process wrote the same one.
            if not path.is_file():
                raise
        return prepared


def _is_random(transform: Any) -> bool:
    """Return whether MONAI's `CacheDataset` does this transform anew each time."""
    return isinstance(transform, RandomizableTrait) or not isinstance(transform, Transform)


def _paths(item: Any) -> list[Path]:
    values = [item[key] for key in ("image", "label") if key in item] if isinstance(item, Mapping) else []
    files = [file for value in values for file in (value if isinstance(value, (list, tuple)) else [value])]
    return [part for file in files if isinstance(file, (str, Path)) for part in volume_files(file)]


def _state(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _item_hash(item: Mapping[str, Any]) -> bytes:
    values = [
        each for key, value in item.items() if key != "case" for each in (value if isinstance(value, list) else [value])
    ]
    named = [Path(value) for value in values if isinstance(value, str) and Path(value).exists()]
    states = [_state(path) for name in named for path in volume_files(name)]  # data beside a header count too
    return _digest(repr((sorted(item.items()), states)).encode())


def _transforms_hash(transforms: Sequence[Any]) -> bytes:
    try:
        versions = about_this_run(())["versions"]
        return _digest(repr([versions[name] for name in MAKERS]).encode() + pickle.dumps(transforms))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        with exit_with_message():
            message = (
                f"Expected `cache_dir` to be used with transforms that can be pickled, because the cache "
                f"key hashes the pickle, but {error}: "
                "replace that transform, for instance a lambda by a named function, or set `cache_dir` to null."
            )
            raise ValueError(message) from error


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest()[:32].encode()
