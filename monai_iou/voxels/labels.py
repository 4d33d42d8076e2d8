"""Which voxels take part, and wrong values of a target, which are found at no cost of a pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from monai_iou.voxels import late_checks
from monai_iou.voxels.compact_labels import IGNORED, compact_dtype, equals
from monai_iou.voxels.inputs import Voxels, both_kept, in_regions, plain
from monai_iou.voxels.label_errors import label_error, map_error
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


def report_bad_values(rows: Tensor, target: Tensor, voxels: Voxels, ignore_index: int | None) -> Tensor:
    """Raise ValueError if the target holds values that are not labels; return `rows`.

    On a GPU the answer is not waited for: the sums become NaN there, and the error is raised by a later call. Inside
    torch.compile and in a CUDA graph they become NaN, and no error is raised.
    """
    bad = found_bad_values(rows, voxels)
    if bad is None and not _is_recorded(rows):
        late_checks.raise_arrived()  # nothing to ask, as of maps of booleans
    return rows if bad is None else raised_or_marked(rows, bad, lambda: _error_of(target, voxels, ignore_index))


def _is_recorded(rows: Tensor) -> bool:
    return torch.compiler.is_compiling() or late_checks.is_captured(rows)


def raised_or_marked(rows: Tensor, bad: Tensor, error_of: Callable[[], Callable[[], ValueError]]) -> Tensor:
    """Raise an error if `bad`, one bool, holds; return `rows`, which are NaN where the answer is not waited for.

    The error of an earlier call is raised here too. `error_of` returns what makes the error, and is not asked where no
    error can follow; what it returns may be kept for long, and so must hold no logits.
    """
    if _is_recorded(rows):
        return rows.masked_fill(bad, float("nan"))
    late_checks.raise_arrived()  # whoever asks also listens, so that unanswered questions never pile up
    error = error_of()
    if late_checks.answers_late(rows):
        late_checks.ask(bad, error)
        return rows.masked_fill(bad, float("nan"))
    if bool(bad):
        raise error()
    return rows


def checked_numbers(values: Tensor, target: Tensor, valid: Tensor | None, ignore_index: int | None) -> Tensor:
    """Raise ValueError if a target that no input has channels for holds values that are not labels; return `values`.

    Args:
        values: what depends on the target, of any shape and a float dtype; NaN where the answer is not waited for.
        target: label map (B, 1, *S) of class numbers from 0, or per-class maps (B, C, *S) with values from 0 to 1.
        valid: which voxels count, (B, 1, *S) bool; None if all do.
        ignore_index: label of ignored voxels.
    """
    target = target.detach()
    is_float, are_maps = target.is_floating_point(), target.shape[1] > 1
    if target.numel() == 0 or target.dtype == torch.bool or not (is_float or are_maps or target.dtype.is_signed):
        return values
    if are_maps:
        wrong = ~((target >= 0) & (target <= 1)) if is_float else (target != 0) & (target != 1)
    else:
        wrong = ~((target >= 0) & (target == target.round()) & target.isfinite()) if is_float else target < 0
    bad = (wrong if valid is None else wrong & valid).any()
    kept = None if valid is None else valid.flatten(1)

    def error() -> ValueError:
        return map_error(target, kept) if are_maps else label_error(target, None, ignore_index, kept)

    return raised_or_marked(values, bad, lambda: error)


def _error_of(target: Tensor, voxels: Voxels, ignore_index: int | None) -> Callable[[], ValueError]:
    """Return what makes the error.

    It may be kept for long, so it holds no logits: the whole graph of the network would stay with them.
    """
    target, classes = plain(target).detach(), voxels.logits.shape[1]
    are_maps, kept = voxels.labels is None, _kept_voxels(voxels)

    def error() -> ValueError:
        return map_error(target, kept()) if are_maps else label_error(target, classes, ignore_index, kept())

    return error


def _kept_voxels(voxels: Voxels) -> Callable[[], Tensor | None]:
    """Return what finds the voxels that count, (B, N) bool, None if all do: it is asked only after an error."""
    labels, valid, regions = voxels.labels, voxels.valid, voxels.regions
    groups = voxels.groups if voxels.as_given else None
    if labels is not None and voxels.has_ignored and not voxels.as_given:
        marked = labels.detach()
        return lambda: marked != IGNORED[marked.dtype]
    return lambda: both_kept(valid, None if groups is None else in_regions(groups, regions)[1])


def found_bad_values(rows: Tensor, voxels: Voxels) -> Tensor | None:
    """Return whether the target holds values that are not labels, as one bool on its device; None if it cannot.

    Labels: the targets of all classes add up to the number of voxels unless some voxel belongs to no class.
    """
    if voxels.labels is not None:
        rows = rows.detach()
        count = rows[COUNT, :, 0]
        missing = (count.sum(-1) if count.shape[-1] > 1 else count[:, 0]) - rows[TARGET].sum((1, -1))
        bad = missing > 0.5
        return bad[0] if len(bad) == 1 else bad.any()
    assert voxels.maps is not None
    if voxels.maps.numel() == 0 or voxels.maps.dtype == torch.bool:
        return None
    if voxels.findings is not None and voxels.findings.maps_are_shares is not None:
        return torch.tensor(not voxels.findings.maps_are_shares, device=rows.device)
    values = voxels.maps.detach()
    if voxels.valid is not None:
        values = torch.where(voxels.valid.unsqueeze(1), values, 0)
    low, high = values.aminmax()
    return ~((low >= 0) & (high <= 1))
