"""Label maps in the kernels' form: ignored voxels marked, wrong values found at no cost of a pass."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from monai_iou.checks import label_error, map_error
from monai_iou.voxels.inputs import Voxels
from monai_iou.voxels.spec import COUNT, TARGET
from monai_iou.voxels.tiling import in_threads

_BYTE_CLASSES = 254  # 254 marks a value that is no class, 255 an ignored voxel
_PART = 1 << 16  # voxels at a time on a CPU, so that intermediate results stay in its cache


def equals(labels: Tensor, value: int) -> Tensor:
    """Return labels == value; a value beyond the dtype of the labels equals none, where torch would let it wrap."""
    if not labels.is_floating_point():
        low, high = (
            (0, 1) if labels.dtype == torch.bool else (torch.iinfo(labels.dtype).min, torch.iinfo(labels.dtype).max)
        )
        if not low <= value <= high:
            return torch.zeros_like(labels, dtype=torch.bool)
    return labels == value


def compact_labels(labels: Tensor, classes: int, ignore_index: int | None, keep: Tensor | None) -> tuple[Tensor, bool]:
    """Return labels (B, N) in the kernels' form and whether ignored voxels are marked in them.

    With nothing to ignore, a CPU takes them as they are: its kernels widen a part at a time, which costs less than a
    copy of all. Otherwise they become uint8 (int16 above 254 classes). A value that is no class stays or becomes a
    number that is no class either; :func:`report_bad_values` finds it by the sums.
    """
    dtype = torch.uint8 if classes <= _BYTE_CLASSES else torch.int16
    has_ignored = ignore_index is not None or keep is not None
    if not has_ignored and (labels.dtype == dtype or (labels.device.type == "cpu" and labels.dtype != torch.float64)):
        return labels, False
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return _compacted(labels, classes, dtype, ignore_index, keep), has_ignored
    compact = torch.empty(labels.shape, dtype=dtype, device=labels.device)

    def fill(task: tuple[int, slice]) -> None:
        image, part = task
        kept = None if keep is None else keep[image, part]
        compact[image, part] = _compacted(labels[image, part], classes, dtype, ignore_index, kept)

    starts = range(0, labels.shape[1], _PART)
    in_threads(fill, [(image, slice(start, start + _PART)) for image in range(labels.shape[0]) for start in starts])
    return compact, has_ignored


def narrowed(labels: Tensor | None, classes: int) -> Tensor | None:
    """Return labels, all of them classes, as kept for backward: one byte per voxel, two above 254 classes."""
    dtype = torch.uint8 if classes <= _BYTE_CLASSES else torch.int16
    return labels if labels is None or labels.element_size() <= dtype.itemsize else labels.to(dtype)


def _compacted(
    labels: Tensor, classes: int, dtype: torch.dtype, ignore_index: int | None, keep: Tensor | None
) -> Tensor:
    compact = labels.to(dtype)
    if not _surely_clean(labels, compact):
        changed = compact != labels  # wrapped round, fractional or NaN
        reserved = (compact >= _BYTE_CLASSES) if dtype == torch.uint8 else (compact < 0)
        compact = compact.masked_fill(changed | reserved, classes)
    # Every bit set is the mark, in both dtypes; a CPU does this ten times as fast as masked_fill.
    if ignore_index is not None:
        compact = compact | equals(labels, ignore_index).to(dtype).neg_()
    if keep is not None:
        compact = compact | (~keep).to(dtype).neg_()
    return compact


def _surely_clean(labels: Tensor, compact: Tensor) -> bool:
    """Return whether no value changed or is reserved, where that is cheap to know: not on a GPU, which would wait."""
    if labels.dtype == torch.bool:
        return True
    if labels.device.type != "cpu" or torch.compiler.is_compiling() or compact.numel() == 0:
        return False
    low, high = (int(value) for value in compact.aminmax())
    inside = low >= 0 and (high < _BYTE_CLASSES or compact.dtype != torch.uint8)
    return inside and torch.equal(compact.to(labels.dtype), labels)


def valid_voxels(target: Tensor, ignore_index: int | None) -> Tensor | None:
    """Return which voxels are not ignored, (B, 1, *S) bool, or None if none is.

    Args:
        target: label map (B, 1, *S), or per-class maps (B, C, *S).
        ignore_index: label of ignored voxels. For per-class maps: voxels of that class or, if it is no class, voxels
            whose maps are all zero.
    """
    if ignore_index is None:
        return None
    if target.shape[1] == 1:
        return ~equals(target, ignore_index)
    if 0 <= ignore_index < target.shape[1]:
        return target[:, ignore_index : ignore_index + 1] < 0.5
    return (target != 0).any(1, keepdim=True)


@dataclass(frozen=True)
class _Pending:
    """A check whose answer is on its way from the GPU."""

    flag: Tensor
    event: torch.cuda.Event
    target: Tensor
    classes: int
    ignore_index: int | None
    is_map: bool

    def error(self) -> ValueError:
        return (
            map_error(self.target, self.ignore_index)
            if self.is_map
            else label_error(self.target, self.classes, self.ignore_index)
        )


_pending: deque[_Pending] = deque()


def waits(rows: Tensor) -> bool:
    """Return whether a check is answered at once: everywhere but on a GPU, whose queue of work would run dry."""
    return rows.device.type != "cuda"


def asked(bad: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    """Send a flag from the GPU on its way; it has arrived when the event has."""
    flag = torch.empty((), dtype=torch.bool, pin_memory=True)
    flag.copy_(bad, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return flag, event


def report_bad_values(rows: Tensor, target: Tensor, voxels: Voxels, ignore_index: int | None) -> Tensor:
    """Raise ValueError if the target holds values that are no labels; return `rows`.

    Labels: the targets of all classes add up to the number of voxels unless some voxel belongs to no class.
    On a GPU the answer is not waited for: the sums become NaN there, and the error is raised by a later call.
    """
    if torch.compiler.is_compiling():
        return rows
    while _pending and _pending[0].event.query():
        done = _pending.popleft()
        if bool(done.flag):
            _pending.clear()
            raise done.error()
    is_map = voxels.labels is None
    if is_map:
        assert voxels.maps is not None
        if voxels.maps.numel() == 0 or voxels.maps.dtype == torch.bool:
            return rows
        values = voxels.maps.detach()
        if voxels.valid is not None:
            values = torch.where(voxels.valid.unsqueeze(1), values, 0)
        low, high = values.aminmax()
        bad = ~((low >= 0) & (high <= 1))
    else:
        missing = rows[COUNT, :, 0] - rows[TARGET].sum(1)
        bad = (missing.detach().abs() > 0.5).any()
    if waits(rows):
        if bool(bad):
            raise (
                map_error(target, ignore_index) if is_map else label_error(target, voxels.logits.shape[1], ignore_index)
            )
        return rows
    flag, event = asked(bad)
    _pending.append(_Pending(flag, event, target, voxels.logits.shape[1], ignore_index, is_map))
    return torch.where(bad, float("nan"), rows)
