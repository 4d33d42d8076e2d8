"""The cells of components: finding them, and the value of a loss in each cell from the sums over its voxels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from monai_iou import checks
from monai_iou.components import component_regions
from monai_iou.losses.base import RegionLoss
from monai_iou.losses.compound import CompoundLoss
from monai_iou.losses.cross_entropy import WeightedCrossEntropyLoss
from monai_iou.losses.iou_variants import GeneralizedIoULoss
from monai_iou.losses.pass_loss import SumsLoss
from monai_iou.voxels.compact_labels import equals
from monai_iou.voxels.spec import CROSS_ENTROPY, PassSpec, joined
from monai_iou.voxels.sums import VoxelSums


@dataclass(frozen=True)
class Cells:
    """The cells of the components of F foreground classes.

    Attributes:
        numbers: (B, F, *S) integers; for each voxel, the number of the component in whose cell it lies, counted from
            `first`, and less than that outside of all cells.
        sizes: (B, F, R), the number of voxels of each component, with 0 for number 0; None if the sums of the target
            in the cells give these sizes.
        known: R, or more; None if it has to be read from the numbers.
        first: the number of the first component.
        of_all_classes: (B, C, *S), the same numbers as one map per class, if there is such a tensor. Class 0 has
            no cells, so that its map may hold any numbers below `known`.
        in_range: whether all numbers are known to be from 0 to `known` - 1.
    """

    numbers: Tensor
    sizes: Tensor | None = None
    known: int | None = None
    first: int = 1
    of_all_classes: Tensor | None = None
    in_range: bool = False


def find_cells(
    masks: NDArray[np.bool_],
    regions: str,
    spacings: Sequence[Sequence[float]],
    connectivity: int | None,
) -> Cells:
    """Return the cells of masks (B, F, *S): the Voronoi regions of their components, or the components themselves.

    Args:
        masks: (B, F, *S) bool.
        regions: "voronoi" or "blob".
        spacings: voxel size of each image in mm.
        connectivity: see :func:`monai_iou.components.component_regions`.
    """
    numbers = np.zeros(masks.shape, dtype=np.int32)
    sizes = []
    for place in np.ndindex(masks.shape[:2]):
        numbers[place], _ = component_regions(masks[place], regions, spacings[place[0]], connectivity)
        sizes.append(np.bincount(numbers[place][masks[place]]))
    table = np.zeros((*masks.shape[:2], max((len(row) for row in sizes), default=0) or 1))
    for place, row in zip(np.ndindex(masks.shape[:2]), sizes, strict=True):
        table[place][: len(row)] = row
    return Cells(torch.from_numpy(numbers), torch.from_numpy(table), table.shape[2], in_range=True)


def class_masks(label: Tensor, classes: Sequence[int], channels: int) -> NDArray[np.bool_]:
    """Return the masks (B, F, *S) of the given classes on the CPU; a label on a GPU is copied once."""
    if label.shape[1] == 1 and channels > 1:
        label = label.detach()
        values = (label.float() if label.dtype == torch.bfloat16 else label).cpu().numpy()  # NumPy has no bfloat16
        return np.concatenate([values == index for index in classes], 1)
    masks: NDArray[np.bool_] = (label[:, span(classes)].detach().float() >= 0.5).cpu().numpy()
    return masks


def predicted_masks(input: Tensor, classes: Sequence[int], *, softmax: bool) -> NDArray[np.bool_]:
    """Return the masks (B, F, *S) of the voxels that logits (B, C, *S) assign to the given classes, on the CPU."""
    logits = input.detach().as_subclass(Tensor)
    if softmax and input.shape[1] > 1:
        return class_masks(logits.argmax(1, keepdim=True).to(torch.int16), classes, input.shape[1])
    masks: NDArray[np.bool_] = (logits[:, span(classes)] > 0).cpu().numpy()
    return masks


def class_map(label: Tensor, index: int, channels: int) -> Tensor:
    """Return the map (B, 1, *S) of one class from a label map or per-class maps."""
    if label.shape[1] == 1 and channels > 1:
        return equals(label, index).float()
    return label[:, index : index + 1].float()


def groups_of(cells: Cells, classes: Sequence[int], channels: int) -> Tensor:
    """Return the region numbers for the voxel pass: (B, 1, *S) for one foreground class, otherwise (B, C, *S)."""
    numbers = cells.numbers
    if len(classes) in (1, channels):
        return numbers
    if cells.of_all_classes is not None:
        return cells.of_all_classes
    groups = numbers.new_zeros((len(numbers), channels, *numbers.shape[2:]))
    groups[:, span(classes)] = numbers
    return groups


def span(classes: Sequence[int]) -> slice:
    """Return successive classes as a slice: indexing by a list would wait until the GPU has its copy of the list.

    >>> span([1, 2, 3])
    slice(1, 4, None)
    """
    return slice(classes[0], classes[-1] + 1)


def sums_of_classes(sums: VoxelSums, classes: Sequence[int], *, exclusive: bool) -> VoxelSums:
    """Return the sums (B, F, R) of the given classes.

    Args:
        sums: (B, C, R).
        classes: the F foreground classes.
        exclusive: whether classes are mutually exclusive; then the cross-entropy of a cell includes all classes.
    """
    rows = sums.rows[:, :, span(classes)]
    # If all classes share one region map, the pass returned the cross-entropy of each class by itself.
    if exclusive and len(classes) == 1 and sums.rows.shape[2] > 1:
        entropy = sums.rows[CROSS_ENTROPY].sum(1, keepdim=True)[None]
        rows = torch.cat([rows[:CROSS_ENTROPY], entropy, rows[CROSS_ENTROPY + 1 :]])
    return VoxelSums(rows)


def _parts(term: nn.Module) -> list[SumsLoss]:
    return cast("list[SumsLoss]", list(term.losses) if isinstance(term, CompoundLoss) else [term])


def check_term(term: nn.Module, region_loss: RegionLoss) -> None:
    """Check that a loss can be evaluated in every cell and does not contradict the options of the instance loss.

    Raises:
        TypeError: if the loss has no value for a single cell.
        ValueError: if its activation or `ignore_index` differs from that of the instance loss, or it has class weights.
    """
    for part in _parts(term):
        if not isinstance(part, (RegionLoss, WeightedCrossEntropyLoss)) or isinstance(part, GeneralizedIoULoss):
            message = (
                "Expected `term` to be a region loss such as IoULoss or FocalTverskyLoss, a WeightedCrossEntropyLoss "
                f"or a compound of these, but got {type(part).__name__}: choose one that has a value for a single "
                "cell."
            )
            raise TypeError(message)
        if part.class_weight is not None or getattr(part, "pos_weight", None) is not None:
            message = (
                f"Expected `term` without weights, but got some in {type(part).__name__}: pass those of several "
                "classes to InstanceIoULoss as `weight`, and that of one channel, or `pos_weight`, to the global term, "
                "as in global_loss=IoUCELoss(sigmoid=True, pos_weight=2)."
            )
            raise ValueError(message)
        if part.ignore_index not in (None, region_loss.ignore_index):
            message = (
                f"Expected `ignore_index` of `term` to be left out or that of InstanceIoULoss, "
                f"{region_loss.ignore_index}, but got {part.ignore_index}: pass it to InstanceIoULoss alone."
            )
            raise ValueError(message)
        chosen = (part.sigmoid, part.softmax)
        by_default = isinstance(part, WeightedCrossEntropyLoss) and chosen == (False, True)
        own = chosen not in ((False, False), (region_loss.sigmoid, region_loss.softmax)) and not by_default
        if own or (part.other_act is not None and part.other_act is not region_loss.other_act):
            message = (
                f"Expected `term` to have no activation of its own, but got one in {type(part).__name__}: set it in "
                "InstanceIoULoss alone, which applies it."
            )
            raise ValueError(message)


def term_spec(term: nn.Module, activation: str | None, channels: int, *, hard: bool) -> PassSpec:
    """Return what a term needs from the voxel pass.

    Args:
        term: the loss in a cell.
        activation: the activation of the instance loss.
        channels: number of channels C of the input.
        hard: whether the target is a label map.

    Raises:
        ValueError: if the parts of a compound term cannot share one pass.
    """
    specs = [replace(part.pass_spec(max(channels, 2)), activation=activation) for part in _parts(term)]
    together: PassSpec | None = specs[0]
    for spec in specs[1:]:
        together = None if together is None else joined(together, spec, hard=hard)
    if together is None:
        message = (
            "Expected the losses of `term` to share one pass over the voxels, but they differ in power, soft_label, "
            "gamma or label_smoothing: set the same values in all of them."
        )
        raise ValueError(message)
    return together


def cell_values(term: nn.Module, sums: VoxelSums) -> tuple[Tensor, Tensor | None]:
    """Return the value of a term in every cell from the sums (B, F, R), and which cells count (None means all)."""
    if isinstance(term, WeightedCrossEntropyLoss):
        return sums.cross_entropy / sums.count.clamp_min(1), None
    if isinstance(term, RegionLoss):
        return term.with_empty_rule(term.class_terms(sums), sums)
    assert isinstance(term, CompoundLoss)
    parts = [cell_values(part, sums) for part in term.losses]
    total = torch.stack([weight * value for weight, (value, _) in zip(term.weights, parts, strict=True)]).sum(0)
    masks = [counted for _, counted in parts]
    if any(counted is None for counted in masks):
        return total, None
    return total, torch.stack([counted for counted in masks if counted is not None]).any(0)


CELL_WEIGHTS = ("equal", "inverse")


def total_and_weight(
    term: nn.Module, sums: VoxelSums, cells: Cells, cell_weight: str, *, blob: bool
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of a term over the cells of each image and class, (B, F), and the sum of the weights.

    A cell of the reference counts only if it contains a part of its component; a crop may have cut the component off.

    Args:
        term: the loss in a cell.
        sums: sums in the cells, (B, F, R), by their numbers; those below `cells.first` are of voxels outside of all.
        cells: the cells.
        cell_weight: "equal", or "inverse" for 1 / voxels of the component.
        blob: whether the voxels outside of all cells count as a part of every cell.
    """
    inside = VoxelSums(sums.rows[..., cells.first :])
    present = inside.present if cells.sizes is None else inside.annotated
    volume = (inside.target if cells.sizes is None else cells.sizes[..., 1:]).detach()
    if blob:
        inside = VoxelSums(inside.rows + sums.rows[..., : cells.first].sum(-1, keepdim=True))
    values, counted = cell_values(term, inside)
    counts = present if counted is None else present & counted
    values, weights = torch.where(counts, values, 0), counts.to(values)
    if cell_weight == "inverse":
        weights = weights / torch.where(counts, volume.to(values), 1)
        values = values * weights
    return values.sum(-1), weights.sum(-1)


def nan_of(sums: VoxelSums, spec: PassSpec, annotated: Tensor | None) -> Tensor:
    """Return NaN for each image and class, (B, F), that has a NaN, also outside of the cells that count, and else 0.

    Args:
        sums: sums in the cells and outside of all, (B, F, R).
        spec: the pass that they come from.
        annotated: (B, F) bool, False where a class was not annotated in an image; None if all were.
    """
    values = (sums.prediction if spec.overlap is not None else sums.cross_entropy).detach()
    found = values.isnan() if annotated is None else values.isnan() & annotated.unsqueeze(-1)
    return torch.where(found, values, 0).sum(-1)


def check_cells(cells: str, alpha: float, cell_weight: str, region_loss: RegionLoss) -> float:
    """Return `alpha` as a float after checking the options that concern cells.

    Raises:
        TypeError: if `alpha` is not a number.
        ValueError: if an option is out of range, or cells of the prediction are requested without an activation.
    """
    checks.check_choice("cells", cells, ("reference", "prediction", "both"))
    checks.check_choice("cell_weight", cell_weight, CELL_WEIGHTS)
    if cells != "reference" and not (region_loss.softmax or region_loss.sigmoid):
        message = (
            f"Expected `softmax` or `sigmoid` to be True with cells={cells!r}, but got neither: set one, because it "
            "determines which voxels are predicted."
        )
        raise ValueError(message)
    return checks.check_fraction("alpha", alpha, allow_one=True, remedy="give the share of the prediction's cells")
