"""A loss evaluated in the neighbourhood of each lesion, so that small and large lesions have the same weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss
from typing_extensions import Unpack

from monai_iou import checks
from monai_iou.components import REGIONS
from monai_iou.distributed import fails_together, is_distributed
from monai_iou.losses.base import RegionOptions, with_region_arguments
from monai_iou.losses.cell_means import mean_over_cells
from monai_iou.losses.cells import (
    Cells,
    check_cells,
    check_term,
    class_map,
    class_masks,
    find_cells,
    groups_of,
    nan_of,
    predicted_masks,
    span,
    sums_of_classes,
    term_spec,
    total_and_weight,
)
from monai_iou.losses.iou import IoULoss
from monai_iou.losses.nested_instances import TakesRegions
from monai_iou.losses.pass_loss import call_loss
from monai_iou.losses.precomputed_regions import check_numbers, holds_regions, split_regions
from monai_iou.losses.terms import weighted_sum
from monai_iou.losses.voxel_sizes import is_downsampled, voxel_sizes, was_label_map
from monai_iou.spacing import check_spacing
from monai_iou.voxels.labels import valid_voxels
from monai_iou.voxels.partly_labelled import Labelled, labelled_pairs
from monai_iou.voxels.passes import left_labelled, run_pass
from monai_iou.voxels.spec import PassSpec, joined
from monai_iou.voxels.sums import VoxelSums


class InstanceIoULoss(_Loss, TakesRegions):
    r"""Mean over the connected components of a loss in the cell of each component, plus a global term.

    .. math:: \lambda_g L_{global} + \lambda_i \frac{1}{K} \sum_{k=1}^{K} L(\mathrm{cell}_k), \qquad
              L = 1 - \frac{I_k + s}{U_k + s}

    where I_k and U_k are the sums over the voxels of cell k; another `term` L of such sums can replace the IoU.

    `regions` defines the cells. "voronoi": the voxels that are nearer, in mm, to component k than to any other
    (CC-metrics, Jaus et al. 2024, https://arxiv.org/abs/2410.18684). "blob": all voxels except those of the other
    components, so that every false positive counts against every component (blob loss, Kofler et al. 2023,
    https://arxiv.org/abs/2205.08209). The other components are excluded from the probabilities too, so that a perfect
    prediction has a loss of 0.

    `cells` selects the components. "reference": a missed lesion costs as much as any other, and false positives count
    against the nearest lesion. With `term=IoUCELoss()` or a Dice term this corresponds to CC-DiceCE
    (https://arxiv.org/abs/2511.17146), and with several classes to multi-class CC (https://arxiv.org/abs/2604.24276).
    "prediction": the components of the most probable class, or of probabilities above 1/2; a false positive component
    costs as much as any other. "both": (1 - alpha) * reference + alpha * prediction, the bidirectional loss BiCC
    (https://github.com/TIO-IKIM/BiCC-Loss). A cell of the prediction may contain no reference voxel; its value then
    follows from the `empty` rule of the term: nearly 1 with "smooth", the mean probability weighted by itself with
    "suppress" (equation (3) of BiCC), and none with "skip".

    Each foreground class has its own components. The mean is taken over the cells of each image and class (with
    `batch=True`, of each class), then over the images and classes that have cells; without any cell, only the global
    term remains. One pass over the voxels serves all classes, and also the global term unless `global_loss` is given;
    `cells="both"` needs two passes. A cross-entropy in a cell is the mean over all voxels of the cell.

    Components are found on the CPU: the label map and, for cells of the prediction, the map of predicted classes are
    copied there once for all classes. The target may contain precomputed regions of the reference instead; see
    :class:`monai_iou.ComponentRegionsd`. These serve both choices of `regions`. A cell does not count if a crop has cut
    off its component.

    Args:
        regions: "voronoi" or "blob".
        *args: the arguments of :class:`IoULoss`, in its order.
        **options: the same, by name. `reduction` must be "mean". `weight` weights the classes in both terms, and has no
            effect where a single class is scored, as with one channel. The foreground classes are those from 1 on; with
            one channel, this channel; with `sigmoid` and per-class maps, all included classes. A voxel of a soft map
            belongs to a component if its value is at least 0.5.
        cells: "reference", "prediction" or "both".
        alpha: weight of the cells of the prediction with `cells="both"`, from 0 to 1.
        term: the loss in a cell; by default an `IoULoss` with the options above. Possible are losses with one value per
            class (LogIoULoss, FocalTverskyLoss, ...), WeightedCrossEntropyLoss, and IoUCELoss or another CompoundLoss
            of these. The smoothing, exponents and `empty` rule of the term apply; activation, classes and reduction are
            those of this loss.
        cell_weight: "equal", or "inverse" to weight each cell by 1 / (number of voxels of its component).
        lambda_global: factor of the global term; with 0, the loss is the mean over the cells alone.
        lambda_instance: factor of the mean over the cells.
        global_loss: the global term; by default an IoULoss with the same options. `IoUCELoss` adds a cross-entropy.
        connectivity: 6, 18 or 26 neighbours in 3D, 4 or 8 in 2D; by default the largest. It has no effect on
            precomputed regions.
        spacing: voxel size in mm; by default that of a MetaTensor target, or else 1 mm. It has no effect on precomputed
            regions.
        max_regions: the largest number of precomputed regions of a class in an image. If given, every target (B, 1 + F,
            *S) is read as a label map with regions without a synchronisation with the GPU, so that a training step with
            cells of the reference can be captured as a CUDA graph. Cells of the prediction are found on the CPU, so
            that the host waits for the GPU. A value that is ten times too large costs almost nothing.

    Attributes:
        last_terms: "instance" at the last call, "global" unless `lambda_global` is 0 and, with `cells="both"`, also
            "reference" and "prediction"; detached and not weighted, for logging.

    Raises:
        TypeError: as :class:`IoULoss`, or if `global_loss` is not a module, or `term` has no value for a single cell.
        ValueError: as :class:`IoULoss`, or if an argument is out of range, or cells of the prediction are requested
            without an activation; when called, if the precomputed regions do not have one channel per foreground class.

    Example:
        >>> import torch
        >>> from monai_iou import FocalTverskyLoss, InstanceIoULoss
        >>> labels = torch.tensor([[[1, 1, 1, 1, 0, 0, 0, 1]]])
        >>> only_the_large_one = torch.tensor([[[1.0, 1, 1, 1, 0, 0, 0, 0]]])
        >>> loss = InstanceIoULoss()
        >>> value = loss(only_the_large_one, labels)
        >>> {name: round(term.item(), 4) for name, term in loss.last_terms.items()}
        {'instance': 0.5, 'global': 0.2}
        >>> dice = FocalTverskyLoss(alpha=0.5, beta=0.5, gamma=1.0, empty="suppress")
        >>> both = InstanceIoULoss(cells="both", term=dice, sigmoid=True, lambda_global=0)
        >>> round(both(100 * only_the_large_one - 50, labels).item(), 4)  # (1/2 + 1/9) / 2
        0.3056
    """

    @with_region_arguments
    def __init__(
        self,
        regions: str = "voronoi",
        *args: Any,
        cells: str = "reference",
        alpha: float = 0.5,
        term: nn.Module | None = None,
        cell_weight: str = "equal",
        lambda_global: float = 1.0,
        lambda_instance: float = 1.0,
        global_loss: nn.Module | None = None,
        connectivity: int | None = None,
        spacing: Sequence[float] | float | None = None,
        max_regions: int | None = None,
        **options: Unpack[RegionOptions],
    ) -> None:
        super().__init__()
        checks.check_choice("regions", regions, REGIONS)
        remedy = "give the largest number of lesions of an image, or leave it out"
        self.max_regions = None if max_regions is None else checks.check_count("max_regions", max_regions, remedy)
        self.global_loss = None if global_loss is None else checks.check_module("global_loss", global_loss)
        self.region_loss = IoULoss(*args, **options)
        checks.check_choice("reduction", self.region_loss.reduction, ("mean",))
        self.alpha = check_cells(cells, alpha, cell_weight, self.region_loss)
        self.term = None if term is None else checks.check_module("term", term)
        if self.term is not None:
            check_term(self.term, self.region_loss)
        self.regions, self.cells, self.cell_weight = regions, cells, cell_weight
        self.connectivity = checks.check_connectivity(connectivity)
        self.spacing = check_spacing(spacing)
        self.lambda_global = checks.check_positive("lambda_global", lambda_global, allow_zero=True)
        self.lambda_instance = checks.check_positive("lambda_instance", lambda_instance, allow_zero=True)
        self.last_terms: dict[str, Tensor] = {}

    def forward(self, input: Tensor, target: Tensor, labelled: Labelled = None) -> Tensor:
        """Return the loss.

        Args:
            input: logits, or probabilities if no activation is set, (B, C, *S).
            target: label map (B, 1, *S), per-class maps (B, C, *S), or a label map with precomputed regions
                (B, 1 + F, *S) for F foreground classes. If 1 + F = C, values above 1, which regions always contain,
                identify the latter. A target of zeros, such as a crop that consists of padding, means per-class maps
                without any class with `sigmoid`, ignored voxels with `ignore_index`, and otherwise an empty label map.
                Integer regions are not copied on a CPU: leave them unchanged until the backward pass has ended.
            labelled: (B, C) bool, False where a class was not annotated in an image, which then has no cells of that
                class; see :meth:`IoULoss.forward`.

        Returns:
            A scalar, float32 or float64.

        Raises:
            TypeError: if a tensor has an unsuitable type.
            ValueError: if shapes do not match, or the target holds values that are not classes.
        """
        with fails_together(self.region_loss.sync_batch, input):
            checks.check_input(input)
            holds = not is_downsampled() and self.carries_regions(target, input.shape[1])
            label, precomputed = split_regions(target) if holds else (target, None)
            checks.check_target(input, label)
            checks.check_onehot_request(input, label, self.region_loss.to_onehot_y)
            classes = self._foreground(input, label)
            pairs = labelled_pairs(input, label, labelled)
            sums, cells = self._read(input, label, precomputed, classes, pairs)
        loss, channels = self.region_loss, input.shape[1]
        means = {kind: mean_over_cells(loss, *part, classes, channels) for kind, part in cells.items()}
        instance = weighted_sum([*self._shares().values()], [*means.values()])
        terms = {"instance": instance, **(means if len(means) > 1 else {})}
        factors = {"instance": self.lambda_instance}
        if self.lambda_global:
            terms["global"], factors["global"] = self._global_term(input, label, sums, pairs), self.lambda_global
        total = weighted_sum([*factors.values()], [terms[name] for name in factors])
        self.last_terms = {name: term.detach() for name, term in terms.items()}
        return total

    def _shares(self) -> dict[str, float]:
        """Return the weight of the cells of the reference and of the prediction."""
        shares = {"reference": 1 - self.alpha, "prediction": self.alpha}
        return shares if self.cells == "both" else {self.cells: 1.0}

    def _global_term(self, input: Tensor, label: Tensor, sums: VoxelSums | None, pairs: Tensor | None) -> Tensor:
        if self.global_loss is None and sums is not None:
            return self.region_loss.score(sums, input.ndim - 2)
        loss = self.region_loss if self.global_loss is None else self.global_loss
        with fails_together(self.region_loss.sync_batch, input):  # a loss of MONAI's would fail on one rank alone
            return call_loss(loss, input, label, pairs)

    def carries_regions(self, target: Tensor, channels: int) -> bool:
        """Return whether the target of an input with `channels` channels contains precomputed regions."""
        if self.max_regions is not None and isinstance(target, Tensor) and target.ndim > 1:
            return target.shape[1] == max(channels, 2)
        # One class always holds in one-hot maps, unless classes are independent or voxels ignored.
        may_be_empty = not self.region_loss.sigmoid and self.region_loss.ignore_index is None
        return holds_regions(target, channels, may_be_empty=may_be_empty)

    def _foreground(self, input: Tensor, label: Tensor) -> list[int]:
        loss, channels = self.region_loss, input.shape[1]
        maps = label.shape[1] == channels and not was_label_map()
        every = channels == 1 or (loss.sigmoid and loss.include_background and maps)
        return list(range(0 if every else 1, channels))

    def _wanted(self, term: nn.Module, channels: int, *, hard: bool) -> tuple[PassSpec, bool]:
        """Return what the pass over the cells computes, and whether the global term is a part of it."""
        alone = self.region_loss.pass_spec(channels)
        spec = term_spec(term, alone.activation, channels, hard=hard)
        alike = not (self.region_loss.sync_batch and is_distributed())  # another rank's target may have another form
        both = joined(spec, alone, hard=hard and alike) if self.global_loss is None and self.lambda_global else None
        return (spec, False) if both is None else (both, True)

    def _read(
        self, input: Tensor, label: Tensor, precomputed: Cells | None, classes: list[int], pairs: Tensor | None
    ) -> tuple[VoxelSums | None, dict[str, tuple[Tensor, Tensor]]]:
        """Read the voxels; return the sums of the global term, if it shares the pass, and the terms of the cells."""
        loss, channels = self.region_loss, input.shape[1]
        term = loss if self.term is None else self.term
        wanted, shared = self._wanted(term, channels, hard=label.shape[1] == 1 and channels > 1)
        given = label  # knows the voxel size, which a label without some classes does not
        whole, terms = None, {}
        if pairs is not None:
            input, label = left_labelled(input, label, wanted, pairs, loss.ignore_index)
        activated = loss.activated(input, label)
        for kind in self._shares():
            cells = self._cells(kind, input, label, given, precomputed, classes, pairs)
            groups = groups_of(cells, classes, channels)
            options = (loss.ignore_index, None, groups, cells.known)
            sums = run_pass(activated, label, wanted, *options, in_range=cells.in_range)
            if kind == "reference" and precomputed is not None and self.max_regions is not None:
                sums = check_numbers(sums, cells, self.max_regions)
            if shared and whole is None:
                whole = sums.over_groups() if pairs is None else sums.over_groups().only(pairs)
            sums = sums_of_classes(sums, classes, exclusive=wanted.activation != "sigmoid")
            total, weight = total_and_weight(term, sums, cells, self.cell_weight, blob=self.regions == "blob")
            annotated = None if pairs is None else pairs[:, span(classes)]
            terms[kind] = total + nan_of(sums, wanted, annotated), weight
        return whole, terms

    def _cells(
        self,
        kind: str,
        input: Tensor,
        label: Tensor,
        given: Tensor,
        precomputed: Cells | None,
        classes: list[int],
        pairs: Tensor | None,
    ) -> Cells:
        """Return the cells of one kind, "reference" or "prediction", on the input's device."""
        plain = label.as_subclass(Tensor)
        space = input.ndim - 2
        kept = None if pairs is None else pairs[:, span(classes)].reshape(len(label), len(classes), *[1] * space)
        valid = valid_voxels(plain, self.region_loss.ignore_index)
        if kind == "reference" and precomputed is not None:
            cells = precomputed
            if self.max_regions is not None:  # and the labels of `of_all_classes` are to be below it
                cells = replace(cells, known=max(self.max_regions + cells.first, input.shape[1]), in_range=False)
            if self.regions == "blob":
                foreground = torch.cat([class_map(plain, index, input.shape[1]) for index in classes], 1)
                cells = replace(cells, numbers=torch.where(foreground >= 0.5, cells.numbers, 0), of_all_classes=None)
            return cells if kept is None else replace(cells, numbers=cells.numbers * kept, of_all_classes=None)
        if kind == "reference":
            masks = class_masks(plain, classes, input.shape[1])
        else:
            masks = predicted_masks(input, classes, softmax=self.region_loss.softmax)
        masks = masks if valid is None else masks & valid.cpu().numpy()
        masks = masks if kept is None else masks & kept.cpu().numpy()
        sizes = [(1.0,) * space] * len(masks) if self.regions == "blob" else voxel_sizes(given, self.spacing)
        cells = find_cells(masks, self.regions, sizes, self.connectivity)
        volume = None if kind == "reference" or cells.sizes is None else cells.sizes.to(input.device)
        return Cells(cells.numbers.to(input.device), volume, cells.known, in_range=True)
