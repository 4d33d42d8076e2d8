"""Prepared volumes, kept in memory or on disk, so that only what is random is done again."""

from __future__ import annotations

import copy
import hashlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.data.dataset import CacheDataset, Dataset, PersistentDataset
from monai.utils.type_conversion import convert_to_tensor

from monai_iou.volumes.reading import volume_files
from monai_iou.workflow.checkpoint_files import write_atomically
from monai_iou.workflow.failures import explain_out_of_memory
from monai_iou.workflow.settings import exit_with_message, optional

__all__ = ["DiskCacheDataset", "cached_dataset"]


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
        transform: a MONAI `Compose`; what stands before its first random transform is done once per volume.
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
        return CacheDataset(data, transform, cache_rate=cache_rate, num_workers=num_workers, progress=False)


class DiskCacheDataset(PersistentDataset):
    """MONAI's `PersistentDataset`, made safe against changed files and against being killed.

    A volume's file is named by what it came from: the item, size and time of its files, and the transforms up to the
    first random one. When any of them changes, it is prepared again; what is no longer used stays until the folder is
    deleted. Files are written whole or not at all and load with `weights_only=True`, so several trainings, or the ranks
    of one, may share the folder.

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

    def _cachecheck(self, item_transformed: Any) -> Any:
        path = Path(str(self.cache_dir)) / f"{_item_hash(item_transformed).decode()}{self.transform_hash}.pt"
        if path.is_file():
            return torch.load(path, weights_only=True)
        prepared = convert_to_tensor(
            self._pre_transform(copy.deepcopy(item_transformed)), convert_numeric=False, track_meta=False
        )
        try:
            write_atomically(prepared, path, shared=True)
        except PermissionError:
            # Windows replaces no file that another process is reading; that process wrote the same one.
            if not path.is_file():
                raise
        return prepared


def _item_hash(item: Mapping[str, Any]) -> bytes:
    values = [
        each for key, value in item.items() if key != "case" for each in (value if isinstance(value, list) else [value])
    ]
    named = [Path(value) for value in values if isinstance(value, str) and Path(value).exists()]
    paths = [path for name in named for path in volume_files(name)]  # data beside a header count too
    states = [(path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return _digest(repr((sorted(item.items()), states)).encode())


def _transforms_hash(transforms: Sequence[Any]) -> bytes:
    try:
        return _digest(pickle.dumps(transforms))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        with exit_with_message():
            message = (
                f"Expected `cache_dir` to be used with transforms that can be pickled, because the cache "
                f"key hashes the pickle, but {error}: "
                "replace that transform, as a lambda by a function, or set `cache_dir` to null."
            )
            raise ValueError(message) from error


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest()[:32].encode()
