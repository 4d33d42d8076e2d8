"""Images in which some classes were not annotated: which these are, and what is left of input and target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monai_iou.voxels.compact_labels import equals
from monai_iou.voxels.flat_voxels import computable
from monai_iou.voxels.inputs import plain, saveable, sum_dtype

Labelled = Tensor | Sequence[Sequence[bool]] | None


def labelled_table(labelled: Any, shape: tuple[int, ...] | str, device: torch.device | None = None) -> Tensor:
    """Return `labelled`, a tensor, an array, or a list of rows of any kind, as a plain tensor of any dtype and shape.

    Without a `device`, a tensor stays where it is, and anything else is on the CPU.

    Raises:
        ValueError: if it is no table of values. `shape` is what the message asks for.
    """
    if isinstance(labelled, Tensor):
        # Not by `as_tensor`, which would take it to torch's default device.
        return plain(labelled if device is None else labelled.to(device))
    if torch.compiler.is_compiling():
        return torch.as_tensor(labelled, device=device)
    rows = labelled
    try:
        if isinstance(labelled, (list, tuple)):
            rows = np.asarray([row.cpu() if isinstance(row, Tensor) else row for row in labelled])
        return torch.as_tensor(rows, device=device or "cpu")
    except (TypeError, ValueError) as error:  # rows of different lengths, or what is neither a number nor bool
        lengths = sorted({len(row) for row in labelled if hasattr(row, "__len__")}) if np.iterable(labelled) else []
        found = f"rows of {lengths} values" if len(lengths) > 1 else f"{type(labelled).__name__} of other values"
        message = f"Expected `labelled` to have shape {shape}, but got {found}: give one value per image and class."
        raise ValueError(message) from error


def labelled_pairs(input: Tensor, target: Tensor, labelled: Labelled) -> Tensor | None:
    """Return which classes of which images are annotated, (B, C) bool, or None if all are.

    Args:
        input: (B, C, *S).
        target: label map (B, 1, *S) or per-class maps (B, C, *S); on a CPU, a map that is NaN everywhere says by itself
            that its class was not annotated. On a GPU the step would have to wait to see it.
        labelled: (B, C) bool, or None.

    Raises:
        TypeError: if `labelled` is not bool.
        ValueError: if it has another shape.
    """
    if labelled is not None:
        pairs = labelled_table(labelled, tuple(input.shape[:2]), input.device)
        if pairs.dtype != torch.bool:
            message = (
                f"Expected `labelled` to be bool, but got {pairs.dtype}: convert it to bool, True where a class was "
                "annotated."
            )
            raise TypeError(message)
        if pairs.shape != input.shape[:2]:
            message = (
                f"Expected `labelled` to have shape {tuple(input.shape[:2])}, but got {tuple(pairs.shape)}: give one "
                "value per image and class."
            )
            raise ValueError(message)
        return saveable(pairs)
    maps = plain(target)
    if maps.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    if maps.shape[1:2] != input.shape[1:2] or not maps.is_floating_point() or maps.numel() == 0:
        return None
    if not bool(maps.flatten(2)[:, :, 0].isnan().any()):
        return None
    return ~maps.flatten(2).isnan().all(2)


def excluded(pairs: Tensor | None, labelled: Labelled, *, has_ranks: bool) -> str | None:
    """Return in words what excludes classes from a loss that cannot leave them out, or None if nothing does.

    A GPU would have to wait for the values of its tensor, so that one there counts as excluding some. So does one on
    several ranks: each would decide by its own values, and those that go on would wait for the others.

    Args:
        pairs: what :func:`labelled_pairs` found.
        labelled: what the user gave.
        has_ranks: whether several ranks are running.
    """
    known = pairs if labelled is None else labelled_table(labelled, "(B, C)")
    if known is None:
        return None
    if labelled is not None and has_ranks:
        return "`labelled` on several ranks, which must decide alike and do not read its values"
    if torch.compiler.is_compiling():
        return "`labelled` inside torch.compile, where its values are not read"
    if known.device.type != "cpu":
        return f"`labelled` on {known.device}, where its values are not read"
    if bool(known.all()):
        return None
    return "a map that is NaN everywhere" if labelled is None else "False for some of them in `labelled`"


def merge_unlabelled(
    logits: Tensor, target: Tensor, labelled: Tensor, ignore_index: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return logits and target in which the classes that were not annotated are a part of the background.

    The softmax of the new logits gives the background p_0 + sum of the others' p (the marginal loss, Shi et al. 2021,
    https://arxiv.org/abs/2007.03868), and 0 for those classes; their voxels are labelled as background, but for those
    with the label `ignore_index`.
    """
    away = ~labelled
    away[:, 0] = False
    together = away.clone()
    together[:, 0] = True
    away, together = (pairs.view(*pairs.shape, *[1] * (logits.ndim - 2)) for pairs in (away, together))
    logits = plain(logits).to(sum_dtype(logits))
    background = torch.where(together, logits, -torch.inf).logsumexp(1, keepdim=True)
    logits = torch.cat([background, torch.where(away, -torch.inf, logits)[:, 1:]], 1)
    target = computable(plain(target))
    if target.shape[1] == 1:
        merged = _holds(away, target)
        return logits, torch.where(
            merged if ignore_index is None else merged & ~equals(target, ignore_index), 0, target
        )
    maps = target.to(logits.dtype)
    added = torch.where(away, maps, 0).nan_to_num(0).sum(1, keepdim=True)
    if ignore_index is not None and 0 <= ignore_index < maps.shape[1]:
        away = away.clone()
        away[:, ignore_index] = False  # the map that says which voxels are ignored
    maps = blank_unlabelled(torch.where(away, 0, maps), labelled, ignore_index)
    return logits, torch.cat([(maps[:, :1] + added).clamp_max(1), maps[:, 1:]], 1)


def _holds(away: Tensor, labels: Tensor) -> Tensor:
    """Return which voxels of a label map (B, 1, *S) have a class of `away`, (B, C, 1, ...) bool."""
    classes = labels.long().clamp(0, away.shape[1] - 1)
    is_away = away.flatten(1).gather(1, classes.flatten(1)).view(labels.shape)
    # Other values are not classes. Both sides have one type, because torch compares no int64 with uint16 and above.
    return is_away & (classes.to(labels.dtype) == labels)


def blank_unlabelled(target: Tensor, labelled: Tensor, ignore_index: int | None = None) -> Tensor:
    """Return a target whose per-class maps are 0 where they were not annotated; a label map as it is.

    With an `ignore_index`, a map that was not annotated may still say which voxels are ignored (`valid_voxels`): it is
    1 where it says so. What it holds does not matter otherwise, because its class leaves the loss.
    """
    if target.shape[1] != labelled.shape[1]:
        return target
    target = computable(plain(target))
    known, channels = labelled.view(*labelled.shape, *[1] * (target.ndim - 2)), target.shape[1]
    if ignore_index is None or channels == 1:
        return torch.where(known, target, 0)
    marks = (target != 0) & (target == target)
    if 0 <= ignore_index < channels:
        of_class = torch.zeros_like(marks)
        of_class[:, ignore_index] = target[:, ignore_index] >= 0.5
        marks = of_class
    return torch.where(known, target, marks.to(target.dtype))
