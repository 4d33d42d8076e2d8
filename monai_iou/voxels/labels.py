"""Which voxels take part, and wrong values of a target, which are found at no cost of a pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from monai_iou.checks import label_error, map_error
from monai_iou.voxels.compact_labels import compact_dtype, equals
from monai_iou.voxels.inputs import Voxels
from monai_iou.voxels.spec import COUNT, TARGET


def narrowed(labels: Tensor | None, classes: int) -> Tensor | None:
    """Return labels, all of them classes, as kept for backward: one byte per voxel, two above 254 classes."""
    dtype = compact_dtype(classes)
    return labels if labels is None or labels.element_size() <= dtype.itemsize else labels.to(dtype)


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
    torch.compile and in a CUDA graph they become NaN, and no error is raised.
    """
    is_recorded = torch.compiler.is_compiling() or _is_captured(rows.device)
    if not is_recorded:
        _late_checks.raise_arrived()
    bad = found_bad_values(rows, voxels)
    if bad is None:
        return rows
    if is_recorded:
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


def _is_captured(device: torch.device) -> bool:
    """Return whether the work becomes part of a CUDA graph, in which no event may be asked for its answer."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


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
