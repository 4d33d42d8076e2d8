"""Checked tensors as flat voxels: a target is a label map or per-class maps, ignored voxels are known."""

from __future__ import annotations

import torch
from torch import Tensor

from monai_iou import checks
from monai_iou.voxels.inputs import Findings, Voxels, both_kept, count_regions, in_regions, plain, saveable
from monai_iou.voxels.labels import valid_voxels

# torch stores these but computes next to nothing in them.
_BARE_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)


def computable(values: Tensor) -> Tensor:
    """Return whole numbers in a dtype that torch computes in."""
    return values.long() if values.dtype in _BARE_UNSIGNED else values


def flat_voxels(
    input: Tensor,
    target: Tensor,
    ignore_index: int | None,
    mask: Tensor | None = None,
    groups: Tensor | None = None,
    num_groups: int | None = None,
    *,
    in_range: bool = False,
) -> Voxels:
    """Bring checked tensors into one plain, flat form; labels, and groups with them, stay as they were given.

    `in_range` says that all numbers of regions are from 0 to `num_groups` - 1.
    """
    ignore_index = checks.check_ignore_index(ignore_index)
    keep = None
    if mask is not None:
        keep = computable(plain(_check_side_map("mask", mask, input, integer=False))) != 0
    regions = 1
    if groups is not None:
        groups = saveable(computable(plain(_check_groups(groups, input))))
        regions = count_regions(groups, num_groups)
    logits = plain(input).flatten(2)
    target = saveable(computable(plain(target).flatten(2)))
    if logits.shape[1] > 1 and target.shape[1] == 1:
        has_ignored = keep is not None or ignore_index is not None
        return Voxels(
            logits, target[:, 0], None, keep, has_ignored, groups, regions, True, ignore_index, in_range=in_range
        )
    if groups is not None and not in_range:
        groups, inside = in_regions(groups, regions)
        keep = both_kept(keep, inside)
    valid = valid_voxels(target, ignore_index)
    valid = both_kept(None if valid is None else valid[:, 0], keep)
    findings = None if torch.compiler.is_compiling() else Findings()
    return Voxels(logits, None, target, valid, False, groups, regions, findings=findings)


def _check_groups(groups: Tensor, input: Tensor) -> Tensor:
    """Return region maps with flattened space; raise unless they fit `input` and are integer, with 1 or C channels."""
    if isinstance(groups, Tensor) and groups.shape == input.shape:
        _check_side_map("groups", groups[:, :1], input, integer=True)
        return groups.flatten(2)
    return _check_side_map("groups", groups, input, integer=True).unsqueeze(1)


def _check_side_map(name: str, value: Tensor, input: Tensor, *, integer: bool) -> Tensor:
    """Return a mask or region map (B, 1, *S) flattened to (B, N); raise unless shape, device and dtype suit."""
    batch, classes, *space = input.shape
    checks.check_tensor(name, value)
    if tuple(value.shape) != (batch, 1, *space):
        expected, remedy = f"{(batch, 1, *space)}", "give one value per voxel in a single channel"
        if integer and classes > 1:
            expected, remedy = f"{expected} or {(batch, classes, *space)}", f"{remedy}, or in one for each class"
        message = f"Expected `{name}` to have shape {expected}, but got {tuple(value.shape)}: {remedy}."
        raise ValueError(message)
    checks.check_device(name, value, input)
    if integer and (value.is_floating_point() or value.dtype == torch.bool or value.is_complex()):
        message = f"Expected `{name}` to hold integer region numbers, but got {value.dtype}: convert it with .long()."
        raise TypeError(message)
    return value.flatten(1)
