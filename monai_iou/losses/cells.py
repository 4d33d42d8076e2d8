"""The cells of components: where each lies, and the value of a loss inside each from the sums over its voxels."""

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
from monai_iou.voxels.spec import CROSS_ENTROPY, PassSpec, joined
from monai_iou.voxels.sums import VoxelSums


@dataclass(frozen=True)
class Cells:
    """The cells of the components of some classes.

    Attributes:
        numbers: (B, F, *S) int32, the number of the component in whose cell a voxel lies, from 1, for each of F
            classes; 0 outside all of them.
        sizes: voxels of each component, (B, F, R) with 0 for number 0; None if they are the targets in the cells.
    """

    numbers: Tensor
    sizes: Tensor | None = None


def find_cells(
    masks: NDArray[np.bool_],
    regions: str,
    spacings: Sequence[Sequence[float]],
    connectivity: int | None,
) -> Cells:
    """Number the cells of masks (B, F, *S): the Voronoi regions of their components, or the components themselves."""
    numbers = np.zeros(masks.shape, dtype=np.int32)
    sizes = []
    for place in np.ndindex(masks.shape[:2]):
        numbers[place], _ = component_regions(masks[place], regions, spacings[place[0]], connectivity)
        sizes.append(np.bincount(numbers[place][masks[place]]))
    table = np.zeros((*masks.shape[:2], max((len(row) for row in sizes), default=0) or 1))
    for place, row in zip(np.ndindex(masks.shape[:2]), sizes, strict=True):
        table[place][: len(row)] = row
    return Cells(torch.as_tensor(numbers), torch.as_tensor(table))


def class_masks(label: Tensor, classes: Sequence[int], channels: int) -> NDArray[np.bool_]:
    """Return the masks (B, F, *S) of some classes, from one copy of the label on the CPU."""
    if label.shape[1] == 1 and channels > 1:
        values = (label.float() if label.dtype == torch.bfloat16 else label).cpu().numpy()  # NumPy has no bfloat16
        masks = np.concatenate([values == index for index in classes], 1)
    else:
        masks = (label[:, list(classes)].float() >= 0.5).cpu().numpy()
    found: NDArray[np.bool_] = masks
    return found


def class_map(label: Tensor, index: int, channels: int) -> Tensor:
    """Return the map (B, 1, *S) of one class from a label map or per-class maps."""
    if label.shape[1] == 1 and channels > 1:
        return (label == index).float()
    return label[:, [index]].float()


def groups_of(cells: Cells, classes: Sequence[int], channels: int) -> Tensor:
    """Return the region numbers for the voxel pass: (B, 1, *S) for one class, else (B, C, *S)."""
    numbers = cells.numbers
    if len(classes) in (1, channels):
        return numbers
    groups = numbers.new_zeros((len(numbers), channels, *numbers.shape[2:]))
    groups[:, list(classes)] = numbers
    return groups


def sums_of_classes(sums: VoxelSums, classes: Sequence[int], *, exclusive: bool) -> VoxelSums:
    """Return sums (B, F, R) of some classes; of classes that exclude each other, E is that of all voxels of a cell."""
    rows = sums.rows[:, :, list(classes)]
    if exclusive and len(classes) == 1 and sums.rows.shape[2] > 1:  # with cells of its own the pass gave it for a class
        rows = rows.index_copy(
            0, torch.tensor([CROSS_ENTROPY], device=rows.device), sums.rows[CROSS_ENTROPY].sum(1, keepdim=True)[None]
        )
    return VoxelSums(rows)


def _parts(term: nn.Module) -> list[SumsLoss]:
    return cast("list[SumsLoss]", list(term.losses) if isinstance(term, CompoundLoss) else [term])


def check_term(term: nn.Module, region_loss: RegionLoss) -> None:
    """Raise unless a loss has a value in every cell, and asks for nothing that the instance loss decides.

    Raises:
        TypeError: if it is none of the losses that do.
        ValueError: if its activation or `ignore_index` differs from that of the instance loss, or it has class weights.
    """
    for part in _parts(term):
        if not isinstance(part, (RegionLoss, WeightedCrossEntropyLoss)) or isinstance(part, GeneralizedIoULoss):
            message = (
                "Expected `term` to be a region loss such as IoULoss or FocalTverskyLoss, a WeightedCrossEntropyLoss "
                f"or a compound of these, but got {type(part).__name__}: it has no value for a single cell."
            )
            raise TypeError(message)
        if part.class_weight is not None or getattr(part, "pos_weight", None) is not None:
            message = (
                f"Expected `term` without weights, but got some in {type(part).__name__}: give those of classes to "
                "InstanceIoULoss as `weight`."
            )
            raise ValueError(message)
        if part.ignore_index not in (None, region_loss.ignore_index):
            message = (
                f"Expected `ignore_index` of `term` to be left out or that of InstanceIoULoss, "
                f"{region_loss.ignore_index}, but got {part.ignore_index}: give it to InstanceIoULoss alone."
            )
            raise ValueError(message)
        chosen = (part.sigmoid, part.softmax)
        by_default = isinstance(part, WeightedCrossEntropyLoss) and chosen == (False, True)
        if chosen not in ((False, False), (region_loss.sigmoid, region_loss.softmax)) and not by_default:
            message = (
                f"Expected `term` to have no activation of its own, but got one in {type(part).__name__}: the one of "
                "InstanceIoULoss holds for it."
            )
            raise ValueError(message)


def term_spec(term: nn.Module, activation: str | None, channels: int, *, hard: bool) -> PassSpec:
    """Return what a term needs of the voxel pass.

    Raises:
        ValueError: if its parts cannot share one.
    """
    specs = [replace(part.pass_spec(max(channels, 2)), activation=activation) for part in _parts(term)]
    together: PassSpec | None = specs[0]
    for spec in specs[1:]:
        together = None if together is None else joined(together, spec, hard=hard)
    if together is None:
        message = (
            "Expected the losses of `term` to share a reading of the voxels, but they differ in power, soft_label, "
            "gamma or label_smoothing: give all of them the same."
        )
        raise ValueError(message)
    return together


def cell_values(term: nn.Module, sums: VoxelSums) -> tuple[Tensor, Tensor | None]:
    """Return the value of a term in every cell from its sums (B, F, R), and which cells count (None: all)."""
    if isinstance(term, WeightedCrossEntropyLoss):
        return sums.cross_entropy / sums.count.clamp_min(1), None
    if isinstance(term, RegionLoss):
        return term.with_empty_rule(term.class_terms(sums), sums)
    assert isinstance(term, CompoundLoss)
    found = [cell_values(part, sums) for part in term.losses]
    total = torch.stack([weight * value for weight, (value, _) in zip(term.weights, found, strict=True)]).sum(0)
    counted = [part for _, part in found]
    if any(part is None for part in counted):
        return total, None
    return total, torch.stack([part for part in counted if part is not None]).any(0)


CELL_WEIGHTS = ("equal", "inverse")


def total_and_weight(
    term: nn.Module, sums: VoxelSums, cells: Cells, cell_weight: str, *, blob: bool
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of a term's values in the cells of each image and class, (B, F), and of the weights.

    A cell of the reference counts if something of its component is there, which a crop may have left out.
    """
    inside = VoxelSums(sums.rows[..., 1:])
    present = (inside.target if cells.sizes is None else inside.count) > 0
    volume = (inside.target if cells.sizes is None else cells.sizes[..., 1:]).detach()
    if blob:  # what lies outside all components counts with each
        inside = VoxelSums(inside.rows + sums.rows[..., :1])
    values, counted = cell_values(term, inside)
    counts = present if counted is None else present & counted
    weights = counts.to(values)
    if cell_weight == "inverse":
        weights = weights / torch.where(counts, volume.to(values), 1)
    return (torch.where(counts, values, 0) * weights).sum(-1), weights.sum(-1)


def check_cells(cells: str, alpha: float, cell_weight: str, region_loss: RegionLoss) -> float:
    """Return alpha; raise unless the choice of cells fits."""
    checks.check_choice("cells", cells, ("reference", "prediction", "both"))
    checks.check_choice("cell_weight", cell_weight, CELL_WEIGHTS)
    if cells != "reference" and not (region_loss.softmax or region_loss.sigmoid):
        message = (
            f"Expected `softmax` or `sigmoid` to be True with cells={cells!r}, but got neither: which voxels are "
            "predicted is read from the activation."
        )
        raise ValueError(message)
    return checks.check_fraction("alpha", alpha, allow_one=True, remedy="it is the share of the prediction's cells")
