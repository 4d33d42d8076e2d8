"""Label maps in the kernels' form: ignored voxels marked, wrong values found at no cost of a pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from monai_iou.checks import label_error, map_error
from monai_iou.voxels.inputs import Voxels
from monai_iou.voxels.spec import COUNT, TARGET
from monai_iou.voxels.tiling import in_threads

_BYTE_CLASSES = 254  # 254 marks a value that is not a class, 255 an ignored voxel
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
    copy of all. Otherwise they become uint8 (int16 above 254 classes). A value that is not a class stays or becomes a
    number that is not a class either; :func:`report_bad_values` finds it by the sums.
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
        ignore_index: label of ignored voxels. For per-class maps: voxels of that class or, if it is not a class, voxels
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
class _Question:
    """A check whose answer is on its way from the GPU."""

    answer: Tensor
    arrival: torch.cuda.Event
    error: Callable[[], ValueError]


class LateChecks:
    """Checks of a GPU's labels that nothing waits for: their queue of work would run dry.

    What is wrong becomes NaN at once; the error is raised by the first check that begins after the answer's arrival.
    """

    def __init__(self, new_event: Callable[[], torch.cuda.Event] = torch.cuda.Event, *, pinned: bool = True) -> None:
        self._new_event = new_event
        self._pinned = pinned  # memory that a GPU writes to while the CPU goes on
        self._questions: deque[_Question] = deque()

    def raise_arrived(self) -> None:
        """Raise the error of the oldest check that has been answered by "wrong"; the others are dropped with it."""
        while self._questions and self._questions[0].arrival.query():
            question = self._questions.popleft()
            if bool(question.answer):
                self._questions.clear()
                raise question.error()

    def ask(self, bad: Tensor, rows: Tensor, error: Callable[[], ValueError]) -> Tensor:
        """Send `bad` on its way to the CPU; return `rows`, NaN if it holds."""
        answer = torch.empty((), dtype=torch.bool, pin_memory=self._pinned)
        answer.copy_(bad, non_blocking=True)
        arrival = self._new_event()
        arrival.record()
        self._questions.append(_Question(answer, arrival, error))
        return torch.where(bad, float("nan"), rows)


_late_checks = LateChecks()


def report_bad_values(rows: Tensor, target: Tensor, voxels: Voxels, ignore_index: int | None) -> Tensor:
    """Raise ValueError if the target holds values that are not labels; return `rows`.

    On a GPU the answer is not waited for: the sums become NaN there, and the error is raised by a later call. Inside
    torch.compile they become NaN, and no error is raised.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling:
        _late_checks.raise_arrived()
    bad = found_bad_values(rows, voxels)
    if bad is None:
        return rows
    if compiling:
        return torch.where(bad, float("nan"), rows)

    def error() -> ValueError:
        if voxels.labels is None:
            return map_error(target, ignore_index)
        return label_error(target, voxels.logits.shape[1], ignore_index)

    if rows.device.type == "cuda":
        return _late_checks.ask(bad, rows, error)
    if bool(bad):
        raise error()
    return rows


def found_bad_values(rows: Tensor, voxels: Voxels) -> Tensor | None:
    """Return whether the target holds values that are not labels, as one bool on its device; None if it cannot.

    Labels: the targets of all classes add up to the number of voxels unless some voxel belongs to no class.
    """
    if voxels.labels is not None:
        missing = rows[COUNT, :, 0].sum(-1) - rows[TARGET].sum((1, -1))
        return (missing.detach().abs() > 0.5).any()
    assert voxels.maps is not None
    if voxels.maps.numel() == 0 or voxels.maps.dtype == torch.bool:
        return None
    values = voxels.maps.detach()
    if voxels.valid is not None:
        values = torch.where(voxels.valid.unsqueeze(1), values, 0)
    low, high = values.aminmax()
    return ~((low >= 0) & (high <= 1))
