"""Class weights from the number of voxels per class, and counting these voxels in a dataset."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from monai_iou import checks

__all__ = ["class_weights", "count_voxels"]


METHODS = ("inverse", "median", "effective")
_MOST_AXES = 4  # a channel and three of space
# Collate functions of torch and MONAI that stack the images of a batch.
_BATCHING = {"default_collate", "list_data_collate", "pad_list_data_collate", "PadListDataCollate"}
_MOST_CLASSES = 1 << 16  # a larger number is no class, such as -1 stored without a sign


def class_weights(
    counts: Sequence[float] | Sequence[Sequence[float]] | NDArray[Any] | Tensor,
    method: str = "inverse",
    beta: float = 0.9999,
) -> Tensor:
    r"""Return one weight per class for the argument `weight` of a loss; rarer classes have larger weights.

    For n_c voxels of class c, the weights are proportional to:

    - "inverse": :math:`1 / n_c`.
    - "median": :math:`\mathrm{median}(f) / f_c`, where f_c is the fraction of class c among the voxels of the cases
      that contain it (Eigen & Fergus 2015, https://arxiv.org/abs/1411.4734). Counts (C,) are treated as one case.
    - "effective": :math:`(1 - \beta) / (1 - \beta^{m_c})`, the inverse of the effective number of samples (Cui et al.
      2019, https://arxiv.org/abs/1901.05555), where m_c is the mean of n_c over the cases that contain the class.
      Counts (C,) are treated as one case. It levels off at :math:`1 / (1 - \beta)` voxels: above five times as many,
      the weights of classes are equal within 1 %, and those of two classes never differ by more than this factor.

    The weights are scaled so that those of the classes with voxels have a mean of 1, which preserves the scale of the
    loss. A class without voxels has a weight of 0.

    Args:
        counts: number of voxels of each class, (C,), or of each case and class, (N, C).
        method: "inverse", "median" or "effective".
        beta: parameter of "effective", at least 0 and below 1. With 0.9999, weights level off at 10^4 voxels per case.

    Returns:
        The weights, (C,) float32, on the CPU.

    Raises:
        TypeError: if the counts are not numbers.
        ValueError: if the counts are negative, not finite, all 0 or of an unsuitable shape, or `method` or `beta` is
            out of range.

    Example:
        >>> from monai_iou import class_weights
        >>> class_weights([9900, 90, 10])
        tensor([0.0027, 0.2997, 2.6975])
        >>> class_weights([[990_000, 500], [990_000, 0]], "effective")
        tensor([0.0930, 1.9070])
    """
    checks.check_choice("method", method, METHODS)
    beta = checks.check_fraction("beta", beta)
    table = _checked_counts(counts)
    total = table.sum(0)
    present = total > 0
    amount = np.where(present, total, 1.0)
    if method == "median":
        amount = amount / np.maximum((table.sum(1, keepdims=True) * (table > 0)).sum(0), 1.0)
    elif method == "effective" and beta > 0:
        # The totals of a data set would all be far above the level at which the weights become equal.
        amount = amount / np.maximum((table > 0).sum(0), 1)
        # This is 1 - beta^m without loss of precision for beta near 1.
        amount = -np.expm1(amount * np.log(beta))
    elif method == "effective":
        amount = np.ones_like(amount)
    weights = np.where(present, 1 / amount, 0.0)
    return torch.as_tensor(weights * present.sum() / weights.sum(), dtype=torch.float32)


def _checked_counts(counts: Any) -> NDArray[np.float64]:
    """Return counts as (N, C)."""
    try:
        given = _as_array(counts)
        table: NDArray[np.float64] = given.astype(np.float64, casting="unsafe" if given.dtype.kind != "c" else "safe")
    except (TypeError, ValueError) as error:
        message = (
            f"Expected `counts` to be numbers of shape (C,) or (N, C), but got {type(counts).__name__} ({error}): pass "
            "a list, an array or a tensor."
        )
        raise TypeError(message) from error
    if table.ndim not in (1, 2) or table.size == 0:
        message = f"Expected `counts` to have shape (C,) or (N, C), but got {table.shape}: sum over all other axes."
        raise ValueError(message)
    bad = ~np.isfinite(table) | (table < 0)
    if bad.any():
        message = (
            f"Expected every one of `counts` to be finite and at least 0, but got {table[bad][0]}: count the voxels "
            "again, for example with `count_voxels`."
        )
        raise ValueError(message)
    if not table.any():
        message = (
            "Expected `counts` to hold at least one voxel, but got 0 for every class: check that the labels were read."
        )
        raise ValueError(message)
    return table.reshape(-1, table.shape[-1])


def count_voxels(dataset: Iterable[Any], num_classes: int | None = None, key: str = "label") -> Tensor:
    """Count the voxels of each class in every item of a dataset.

    Args:
        dataset: items that are dictionaries with a label under `key`, pairs (image, label), labels, or lists of these
            (several crops of one volume). A label is a label map (1, *S) of class numbers, or per-class maps (C, *S),
            hard or soft, with up to 3 spatial dimensions and no batch dimension. If `dataset` is a DataLoader, each
            image of a batch counts as an item; its collate function must be one of torch or MONAI, or return the items
            unchanged. Class numbers that miss a whole number by rounding, as resampling leaves them, are rounded, and
            so are shares outside of 0 to 1.
        num_classes: number of classes C; by default, one more than the largest label.
        key: key of the label in dictionaries.

    Returns:
        The number of voxels of each item and class, (N, C) int64.

    Raises:
        TypeError: if an item contains no label, or `num_classes` is not an integer.
        ValueError: if an item has a batch dimension, another collate function made the batches, a value is negative,
            not a whole number, or at least `num_classes` or 65536, a per-class map leaves the range from 0 to 1, or the
            dataset is empty.

    Example:
        >>> import torch
        >>> from monai_iou import class_weights, count_voxels
        >>> items = [{"label": torch.tensor([[0, 0, 0, 1]])}, {"label": torch.tensor([[0, 0, 0, 0]])}]
        >>> count_voxels(items)
        tensor([[3, 1],
                [4, 0]])
        >>> class_weights(count_voxels(items), method="median")
        tensor([0.4444, 1.5556])
    """
    if num_classes is not None:
        num_classes = checks.check_count("num_classes", num_classes, "count the background too")
    cases = dataset
    if isinstance(dataset, DataLoader) and dataset.batch_sampler is not None:
        if _stacks(dataset.collate_fn):
            cases = (image for batch in dataset for image in _images_of(batch, key))
        elif not _returns_its_item(dataset):
            _check_returns_items(dataset.collate_fn)
            cases = (item for batch in dataset for item in batch)
    rows = [_count_item(item, key, f"item {index}") for index, item in enumerate(cases)]
    if not rows:
        message = "Expected `dataset` to contain at least one item, but it is empty: give the training cases."
        raise ValueError(message)
    classes = max(len(row) for row in rows)
    if num_classes is not None and classes > num_classes:
        message = (
            f"Expected labels below `num_classes` = {num_classes}, but got {classes - 1}: raise `num_classes`, or map "
            "the labels to consecutive classes."
        )
        raise ValueError(message)
    table = np.zeros((len(rows), classes if num_classes is None else num_classes), dtype=np.int64)
    for row, counts in zip(table, rows, strict=True):
        row[: len(counts)] = counts
    return torch.from_numpy(table)


def _stacks(collate: Any) -> bool:
    """Return whether a collate function is known to stack the images of a batch."""
    while isinstance(collate, functools.partial):
        collate = collate.func
    kinds = {kind.__name__ for kind in type(collate).__mro__}
    return not _BATCHING.isdisjoint({getattr(collate, "__name__", ""), *kinds})


def _returns_its_item(loader: DataLoader[Any]) -> bool:
    """Return whether the batches of a loader are single items, as by `lambda batch: batch[0]`."""
    item = object()
    return loader.batch_size == 1 and _collated(loader.collate_fn, [item]) is item


def _check_returns_items(collate: Any) -> None:
    """Raise ValueError unless a collate function returns the very items: of what it makes, nobody knows the axes."""
    items = [object(), object()]
    batch = _collated(collate, items)
    if not isinstance(batch, (list, tuple)) or sorted(map(id, batch)) != sorted(map(id, items)):
        message = (
            "Expected a DataLoader in `dataset` to have a collate function of torch or MONAI, but got another, whose "
            "batches may hold images along any axis: give `dataset.dataset`, which holds single items."
        )
        raise ValueError(message)


def _collated(collate: Any, items: list[object]) -> Any:
    try:
        return collate([*items])
    except Exception:  # of any function of a user's
        return None


def _images_of(batch: Any, key: str) -> Iterable[Any]:
    """Return the labels of the images in a batch; what is no batch of labels is returned as it is, to be refused."""
    labels = batch.get(key) if isinstance(batch, dict) else batch[-1] if isinstance(batch, (list, tuple)) else batch
    return labels if isinstance(labels, Tensor) and labels.ndim else [batch]


def _count_item(item: Any, key: str, name: str) -> NDArray[np.int64]:
    if isinstance(item, dict):
        if key not in item:
            message = (
                f"Expected {name} of `dataset` to hold {key!r}, but got {sorted(map(str, item))}: set `key` to the key "
                "of the label."
            )
            raise TypeError(message)
        item = item[key]
    elif isinstance(item, list) and item:
        parts = [_count_item(part, key, name) for part in item]
        size = max(len(part) for part in parts)
        together: NDArray[np.int64] = np.sum([np.pad(part, (0, size - len(part))) for part in parts], axis=0)
        return together
    elif isinstance(item, tuple):
        item = item[-1]
    if isinstance(item, (str, os.PathLike)) or not hasattr(item, "shape"):
        message = (
            f"Expected {name} of `dataset` to hold a label array, but got {type(item).__name__}: use a dataset that "
            "loads its labels, or `count_label_files` for files."
        )
        raise TypeError(message)
    return _count_label(_as_array(item), name)


def _as_array(item: Any) -> NDArray[Any]:
    if isinstance(item, Tensor):
        item = item.detach().as_subclass(Tensor).cpu()
        item = item.float() if item.dtype == torch.bfloat16 else item  # NumPy has no bfloat16
    return np.asarray(item)


def _count_label(label: NDArray[Any], name: str) -> NDArray[np.int64]:
    if label.ndim > _MOST_AXES:
        message = (
            f"Expected {name} of `dataset` to hold a label (1, *S) or (C, *S) with up to 3 spatial dimensions, but got "
            f"the shape {label.shape}, which is that of a batch: give one case at a time."
        )
        raise ValueError(message)
    if label.ndim > 1 and label.shape[0] > 1:
        wrong = label[~((label >= -checks.ROUNDING) & (label <= 1 + checks.ROUNDING))]
        if wrong.size:
            message = (
                f"Expected {name} of `dataset`, whose {label.shape[0]} channels are maps of classes, to hold values "
                f"from 0 to 1, but got {wrong.flat[0]}: pass label[:1] of a label with the regions of its components, "
                "or label[None] of a label map without a channel."
            )
            raise ValueError(message)
        shares = np.clip(label, 0, 1) if label.dtype.kind == "f" else label
        counts: NDArray[np.int64] = np.rint(shares.reshape(len(label), -1).sum(1, dtype=np.float64)).astype(np.int64)
        return counts
    whole = _class_numbers(label, name)
    if label.size and whole.max() >= _MOST_CLASSES:
        message = (
            f"Expected {name} of `dataset` to hold class numbers below {_MOST_CLASSES}, but got {whole.max()}: map the "
            "labels to consecutive classes."
        )
        raise ValueError(message)
    voxels: NDArray[np.int64] = np.bincount(whole.ravel(), minlength=1)
    return voxels


def _class_numbers(label: NDArray[Any], name: str) -> NDArray[np.int64]:
    """Return a label map as integers from 0, rounded by the rule of :func:`monai_iou.components.whole_numbers`."""
    with np.errstate(invalid="ignore"):  # NaN becomes a number that it is not
        whole = (np.rint(label) if label.dtype.kind == "f" else label).astype(np.int64)
        known = whole >= 0
        if label.dtype.kind == "f":
            known &= np.abs(label - whole) <= checks.label_tolerance(label)
    if not known.all():
        message = (
            f"Expected {name} of `dataset` to hold class numbers from 0, but got {label[~known].flat[0]}: map the "
            "labels to consecutive classes."
        )
        raise ValueError(message)
    return whole
