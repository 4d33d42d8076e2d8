"""Labels downsampled to a coarser grid: class fractions, any foreground, or the label of the nearest voxel."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_iou import checks
from monai_iou.voxels.compact_labels import equals, fits
from monai_iou.voxels.inputs import plain
from monai_iou.voxels.label_errors import label_error, map_error
from monai_iou.voxels.labels import raised_or_marked, valid_voxels

DOWNSAMPLINGS = ("area", "max", "nearest")
_PART = 1 << 16  # voxels at a time on a CPU
_COLUMNS, _MOST_COUNTERS = 1024, 1 << 20

_Pool = Callable[..., Tensor]
_average: dict[int, _Pool] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
_maximum: dict[int, _Pool] = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}


def pool_labels(
    target: Tensor,
    size: Sequence[int],
    classes: int | None,
    mode: str = "area",
    ignore_index: int | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """Return a target downsampled to a coarser grid.

    Args:
        target: label map (B, 1, *S), or per-class maps (B, C, *S).
        size: the coarse shape in voxels, one number per spatial dimension.
        classes: number C of classes, which is the number of channels of the output that the target belongs to. None
            for a label map without an output, of any class numbers, which "max" has to look for: a GPU is waited for.
        mode: "area": the fraction of each class among the voxels that a coarse voxel covers, as per-class maps. "max":
            a coarse voxel is foreground if any of its voxels is; of several foreground classes, it takes the one that
            is rarest in the batch, whereas per-class maps are pooled independently. "nearest": the label of the voxel
            in the middle, as in MONAI, which loses small structures.
        ignore_index: label of ignored voxels. A coarse voxel is ignored if all of its voxels are.
        counts: number of voxels of each class, (C,), by which "max" finds the rarest; by default those of the target.

    Returns:
        (B, C, *size) float32 for "area"; otherwise the target's number of channels and dtype.

    Raises:
        ValueError: if `mode` is not one of the three; with "area", if the target holds values that are not labels. On a
            GPU the fractions are NaN instead, and a later call raises the error.

    Example:
        >>> import torch
        >>> from monai_iou.losses.label_pooling import pool_labels
        >>> labels = torch.tensor([[[0, 0, 0, 1, 2, 2, 2, 1]]])
        >>> pool_labels(labels, [2], classes=3, mode="max")
        tensor([[[1, 1]]])
        >>> pool_labels(labels, [2], classes=3)
        tensor([[[0.7500, 0.0000],
                 [0.2500, 0.2500],
                 [0.0000, 0.7500]]])
    """
    checks.check_choice("downsample", mode, DOWNSAMPLINGS)
    target = plain(target)
    is_labels = target.shape[1] == 1 and classes != 1
    if 0 in target.shape[2:]:  # which torch does not pool
        channels, dtype = (classes, torch.float32) if mode == "area" else (target.shape[1], target.dtype)
        return torch.zeros((len(target), channels or 1, *size), dtype=dtype, device=target.device)
    if mode == "nearest":
        return _nearest(target, size)
    if mode == "max":
        return (
            _rarest(target, size, classes, ignore_index, counts) if is_labels else _largest(target, size, ignore_index)
        )
    assert classes is not None
    return _fractions(target, size, classes, is_labels, ignore_index)


def class_counts(target: Tensor, classes: int) -> Tensor:
    """Return the number of voxels of each class in a label map (B, 1, *S), (C,) int64; 0 for per-class maps.

    The voxels are read once and, unlike with `torch.bincount`, no GPU is waited for.
    """
    labels = plain(target)
    if labels.shape[1] != 1:
        return torch.zeros(classes, dtype=torch.int64, device=labels.device)
    columns = min(_COLUMNS, max(_MOST_COUNTERS // (classes + 1), 1))
    # A row of counters for each class: one counter of a class would be increased by one voxel after the other.
    counters = torch.zeros(classes + 1, columns, dtype=torch.int64, device=labels.device)
    one = torch.ones((), dtype=torch.int64, device=labels.device)
    for part in _parts(labels):
        slots = _slots(part, classes, None)
        slots = F.pad(slots, (0, -len(slots) % columns), value=classes).view(-1, columns)
        counters.scatter_add_(0, slots, one.expand(slots.shape))
    return counters.sum(1)[:classes]


def _nearest(target: Tensor, size: Sequence[int]) -> Tensor:
    """Return the voxels that torch's "nearest-exact" takes; float32, in which it reads them, rounds ids above 2^24."""
    space = target.ndim - 2
    places: list[slice | Tensor] = [slice(None), slice(None)]
    for axis, (full, side) in enumerate(zip(target.shape[2:], size, strict=True)):
        line = torch.arange(full, dtype=torch.float32, device=target.device).view(1, 1, full)
        chosen = F.interpolate(line, size=side, mode="nearest-exact").long()
        places.append(chosen.view(side, *[1] * (space - 1 - axis)))
    return target[tuple(places)]


def _parts(labels: Tensor) -> Sequence[Tensor]:
    """Return flat voxels a part at a time on a CPU, so that intermediate results stay in its cache; else at once."""
    whole = labels.flatten()
    at_once = labels.device.type != "cpu" or torch.compiler.is_compiling()
    return (whole,) if at_once else whole.split(_PART)


def _slots(labels: Tensor, classes: int, ignore_index: int | None) -> Tensor:
    """Return class numbers as int64, and `classes` for voxels that are ignored or of no class."""
    numbers = labels.long()
    outside = (numbers < 0) | (numbers >= classes)
    if ignore_index is not None:
        outside = outside | equals(labels, ignore_index)
    return numbers.masked_fill(outside, classes)


def checked_target(target: Tensor, classes: int, ignore_index: int | None) -> Tensor:
    """Return 0 for a target whose values are labels, of which pooling by "max" or "nearest" would hide a wrong one.

    Args:
        target: label map (B, 1, *S), or per-class maps (B, C, *S).
        classes: as in :func:`pool_labels`.
        ignore_index: label of ignored voxels.

    Raises:
        ValueError: the target holds values that are not labels. On a GPU the result is NaN instead, and a later call
            raises the error.
    """
    target = plain(target)
    valid = valid_voxels(target, ignore_index)
    wrong = _holds_wrong_values(target, classes, target.shape[1] == 1 and classes > 1, valid)
    mark = torch.zeros((), device=target.device)
    return raised_or_marked(mark, wrong, lambda: _error_of(target, classes, valid, ignore_index))


def pooled(values: Tensor, size: Sequence[int], how: dict[int, _Pool]) -> Tensor:
    """Pool (B, C, *S) to (B, C, *size)."""
    result: Tensor = how[values.ndim - 2](values, tuple(size))
    return result


def _fractions(target: Tensor, size: Sequence[int], classes: int, is_labels: bool, ignore_index: int | None) -> Tensor:
    # One class at a time: a one-hot copy of the whole volume would be several times the size of the logits.
    maps = (equals(target, label) if is_labels else target[:, label : label + 1] for label in range(classes))
    valid = valid_voxels(target, ignore_index)
    wrong = _holds_wrong_values(target, classes, is_labels, valid)
    counted = (values.float() if valid is None else torch.where(valid, values.float(), 0) for values in maps)
    sums = torch.cat([pooled(values, size, _average) for values in counted], 1)
    sums = raised_or_marked(sums, wrong, lambda: _error_of(target, classes, valid, ignore_index))
    if valid is None:
        return sums
    share = pooled(valid.float(), size, _average)
    return _mark_ignored(sums / torch.where(share > 0, share, 1), share == 0, ignore_index)


def _holds_wrong_values(target: Tensor, classes: int, is_labels: bool, valid: Tensor | None) -> Tensor:
    """Return whether a value that counts is not a label, one bool; in a mean over voxels it would not show."""
    if not is_labels:
        values = target.float() if valid is None else torch.where(valid, target.float(), 0)
        return ~((values >= 0) & (values <= 1)).all()
    known = torch.zeros_like(target, dtype=torch.bool) if valid is None else ~valid
    for label in range(classes):
        known = known | equals(target, label)
    return ~known.all()


def _error_of(target: Tensor, classes: int, valid: Tensor | None, ignore_index: int | None) -> Callable[[], ValueError]:
    """Return what makes the error for the first value that is not a label."""
    target = target.detach()
    kept = None if valid is None else valid.flatten(1)
    if target.shape[1] == 1 and classes > 1:
        return lambda: label_error(target, classes, ignore_index, kept)
    return lambda: map_error(target, kept)


def _mark_ignored(maps: Tensor, ignored: Tensor, ignore_index: int | None) -> Tensor:
    """Mark the ignored voxels of per-class maps in the way that the voxel pass expects."""
    maps = maps.masked_fill(ignored, 0)
    if ignore_index is None:
        return maps
    if maps.shape[1] == 1:
        return maps.masked_fill(ignored, ignore_index)
    if 0 <= ignore_index < maps.shape[1]:
        maps[:, ignore_index : ignore_index + 1].masked_fill_(ignored, 1)
    return maps


def _rarest(
    labels: Tensor, size: Sequence[int], classes: int | None, ignore_index: int | None, counts: Tensor | None
) -> Tensor:
    if classes is None:
        values, slots, counts = labels.unique(return_inverse=True, return_counts=True)
        background, ignored = values == 0, torch.zeros_like(values, dtype=torch.bool)
        if ignore_index is not None:
            ignored = equals(values, ignore_index)
    else:
        numbers = torch.arange(classes + 1, device=labels.device)
        values = numbers.to(labels.dtype, copy=True)
        values[classes] = ignore_index if ignore_index is not None and fits(labels.dtype, ignore_index) else 0
        counts = F.pad(class_counts(labels, classes) if counts is None else counts, (0, 1))
        background, ignored = numbers == 0, numbers == classes
    # The ranks ascend from ignored voxels over background to foreground, and there from common to rare classes. Of two
    # equally frequent classes, the higher label has the higher rank.
    most = counts.sum()
    counts = torch.where(ignored, most + 2, torch.where(background, most + 1, counts))
    order = counts.argsort(descending=True, stable=True)
    rank = order.argsort().float()
    parts = _parts(slots) if classes is None else (_slots(part, classes, ignore_index) for part in _parts(labels))
    highest = pooled(torch.cat([rank[part] for part in parts]).view(labels.shape), size, _maximum).long()
    pooled_labels: Tensor = values[order[highest]]  # torch.take does not support unsigned types of 16 bits or more
    return pooled_labels


def _largest(maps: Tensor, size: Sequence[int], ignore_index: int | None) -> Tensor:
    valid = valid_voxels(maps, ignore_index)
    if valid is None:
        return pooled(maps.float(), size, _maximum).to(maps.dtype)
    result = pooled(torch.where(valid, maps.float(), 0), size, _maximum)
    ignored = pooled(valid.float(), size, _maximum) == 0
    return _mark_ignored(result, ignored, ignore_index).to(maps.dtype)
