"""Losses inside the neighbourhood of each lesion, so that a small one counts as much as a large one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss
from typing_extensions import Unpack

from monai_iou import checks
from monai_iou.components import FIRST_REGION, REGIONS
from monai_iou.distributed import fails_together, sum_over_ranks
from monai_iou.losses.base import RegionOptions, with_region_arguments
from monai_iou.losses.cells import (
    Cells,
    check_cells,
    check_term,
    class_map,
    class_masks,
    find_cells,
    groups_of,
    sums_of_classes,
    term_spec,
    total_and_weight,
)
from monai_iou.losses.iou import IoULoss
from monai_iou.losses.pass_loss import call_loss
from monai_iou.spacing import image_spacings
from monai_iou.voxels.labels import valid_voxels
from monai_iou.voxels.partly_labelled import Labelled, labelled_pairs
from monai_iou.voxels.passes import left_labelled, run_pass
from monai_iou.voxels.spec import joined
from monai_iou.voxels.sums import VoxelSums


class InstanceIoULoss(_Loss):
    r"""Mean over components of a loss inside each component's cell, plus a global term.

    .. math:: \lambda_g L_{global} + \lambda_i \frac{1}{K} \sum_{k=1}^{K} L(\mathrm{cell}_k), \qquad
              L = 1 - \frac{I_k + s}{U_k + s}

    with sums I_k, U_k over the voxels of cell k, and any other `term` L of such sums in the place of IoU.

    `regions` says what a cell is. "voronoi": the voxels nearer, in mm, to component k than to any other (CC-metrics,
    Jaus et al. 2024, https://arxiv.org/abs/2410.18684). "blob": all voxels except those of the other components (blob
    loss, Kofler et al. 2023, https://arxiv.org/abs/2205.08209): every false positive counts against every component.
    The other components are masked out of the probabilities, so that a perfect prediction has loss 0.

    `cells` says whose components. Those of the "reference": a lesion that is missed costs as much as any other, and
    false positives count against the nearest one. With `term=IoUCELoss()` or a Dice term this is CC-DiceCE
    (https://arxiv.org/abs/2511.17146), for several classes multi-class CC (https://arxiv.org/abs/2604.24276). Those of
    the "prediction" (the classes of the largest probability, or above 1/2): a component that is invented costs as much
    as any other. "both", (1 - alpha) reference + alpha prediction, is the bidirectional loss BiCC. A cell of the
    prediction may hold nothing of the reference; the `empty` rule of the term says what it costs: "smooth" nearly 1,
    "suppress" the mean probability weighted by itself, which is BiCC's equation (3), "skip" nothing.

    Each foreground class has its own components. The mean is taken over the cells of an image and class (of the batch
    with `batch=True`), then over the images and classes that have one; where there is none, all is left to the global
    term. One pass over the voxels serves all classes, and the global term too unless `global_loss` is given;
    `cells="both"` takes two. A cross-entropy in a cell is the mean over all voxels of the cell.

    Components are found on the CPU: the label map, and with cells of the prediction the map of predicted classes, one
    byte a voxel, is copied there, once for all classes. Cells of the reference may be carried by the target: see
    :class:`monai_iou.ComponentRegionsd`. Carried regions serve both choices of `regions`. A cell whose component a crop
    left out does not count.

    Args:
        regions: "voronoi" or "blob".
        *args: the arguments of :class:`IoULoss`, in its order.
        **options: the same, by name. `reduction` is "mean". `weight` weighs the classes in both terms. Foreground are
            the classes from 1, with one channel that one, and with `sigmoid` and per-class maps all that are included.
            A voxel of a soft map belongs to a component from 0.5 on.
        cells: "reference", "prediction" or "both".
        alpha: share of the prediction's cells with `cells="both"`, from 0 to 1.
        term: the loss inside a cell, `IoULoss` with the options above by default. Any loss of one value per class
            (LogIoULoss, FocalTverskyLoss, ...), a WeightedCrossEntropyLoss, or an IoUCELoss or other CompoundLoss of
            them; its smoothing, exponents and `empty` rule hold; activation, classes and reduction are of this loss.
        cell_weight: "equal", or "inverse" for a mean weighted by 1 / voxels of the component.
        lambda_global: factor of the global term; with 0 the loss is the mean over cells alone.
        lambda_instance: factor of the mean over cells.
        global_loss: the global term; an IoULoss with the same options by default. `IoUCELoss` adds a cross-entropy.
        connectivity: neighbours that connect, 6, 18 or 26 in 3D, 4 or 8 in 2D; the most by default. On the fly only.
        spacing: voxel size in mm, on the fly only; by default that of a MetaTensor target, else 1.

    Attributes:
        last_terms: "global" and "instance" at the last call, with cells of both also "reference" and "prediction",
            detached, before weighting; for logging.

    Raises:
        TypeError: as :class:`IoULoss`, or if `global_loss` is not a module, or `term` has no value in a cell.
        ValueError: as :class:`IoULoss`, or if an argument is out of its range, or precomputed regions are not one
            channel per foreground class, or cells of the prediction are asked for without an activation.

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
        **options: Unpack[RegionOptions],
    ) -> None:
        super().__init__()
        checks.check_choice("regions", regions, REGIONS)
        self.global_loss = _checked_module("global_loss", global_loss)
        self.region_loss = IoULoss(*args, **options)
        checks.check_choice("reduction", self.region_loss.reduction, ("mean",))
        self.alpha = check_cells(cells, alpha, cell_weight, self.region_loss)
        self.term = _checked_module("term", term)
        if self.term is not None:
            check_term(self.term, self.region_loss)
        self.regions, self.cells, self.cell_weight = regions, cells, cell_weight
        self.connectivity, self.spacing = connectivity, spacing
        self.lambda_global = checks.check_positive("lambda_global", lambda_global, allow_zero=True)
        self.lambda_instance = checks.check_positive("lambda_instance", lambda_instance, allow_zero=True)
        self.last_terms: dict[str, Tensor] = {}

    def forward(self, input: Tensor, target: Tensor, labelled: Labelled = None) -> Tensor:
        """Return the loss.

        Args:
            input: logits, or probabilities if no activation is set, (B, C, *S).
            target: label map (B, 1, *S), per-class maps (B, C, *S), or a label map with its regions (B, 1 + F, *S) for
                F foreground classes. With F + 1 = C it is the latter if a value is above 1, which regions always have.
                All zeros, as of a crop that is all padding, are per-class maps without a class with `sigmoid`, ignored
                voxels with `ignore_index`, else an empty label map: one class always holds in one-hot maps.
            labelled: (B, C) bool, False where a class was not annotated in an image, which then has no cells of that
                class; see :class:`IoULoss`.

        Returns:
            A scalar, float32 or float64.

        Raises:
            TypeError: if a tensor has an unsuitable type.
            ValueError: if shapes do not match, or the target holds values that are not classes.
        """
        with fails_together(self.region_loss.sync_batch, input):
            checks.check_input(input)
            label, carried = self._split(input, target)
            checks.check_target(input, label)
            checks.check_onehot_request(input, label, self.region_loss.to_onehot_y)
            classes = self._foreground(input, label)
            pairs = labelled_pairs(input, label, labelled)
            sums, cells = self._read(input, label, carried, classes, pairs)
        means = {kind: self._mean(*part, classes, input.shape[1]) for kind, part in cells.items()}
        instance = torch.stack([share * means[kind] for kind, share in self._shares().items()]).sum()
        terms = {"instance": instance, **(means if len(means) > 1 else {})}
        total = self.lambda_instance * instance
        if self.lambda_global:
            terms["global"] = self._global_term(input, label, sums, pairs)
            total = self.lambda_global * terms["global"] + total
        self.last_terms = {name: term.detach() for name, term in terms.items()}
        return total

    def _shares(self) -> dict[str, float]:
        """Return the share of the cells of the reference and of the prediction."""
        shares = {"reference": 1 - self.alpha, "prediction": self.alpha}
        return shares if self.cells == "both" else {self.cells: 1.0}

    def _global_term(self, input: Tensor, label: Tensor, sums: VoxelSums | None, pairs: Tensor | None) -> Tensor:
        if self.global_loss is None and sums is not None:
            return self.region_loss.score(sums, input.ndim - 2)
        loss = self.region_loss if self.global_loss is None else self.global_loss
        with fails_together(self.region_loss.sync_batch, input):  # it may be MONAI's
            whole = torch.as_tensor(call_loss(loss, input, label, pairs))
        return whole.as_subclass(Tensor)

    def carries_regions(self, target: Tensor, channels: int) -> bool:
        """Return whether the target of an input of so many channels is a label map with its regions (B, 1 + F, *S)."""
        if not isinstance(target, Tensor) or target.ndim < 2 or target.shape[1] != max(channels, 2):
            return False
        if channels == 1:
            return True  # one channel has one foreground class
        values = target.as_subclass(Tensor)  # torch has no minimum of unsigned integers
        values = values.long() if values.dtype in (torch.uint16, torch.uint32, torch.uint64) else values
        low, high = values.aminmax() if values.numel() else (0, 1)
        may_be_empty = not self.region_loss.sigmoid and self.region_loss.ignore_index is None
        return bool(high > 1 or (may_be_empty and low == high == 0))

    def _split(self, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the label and, if the target carries them, the regions (B, F, *S)."""
        if not self.carries_regions(target, input.shape[1]):
            return target, None
        regions = target.as_subclass(Tensor)[:, 1:].long()
        return target[:, :1], torch.where(regions >= FIRST_REGION, regions - FIRST_REGION + 1, 0)

    def _foreground(self, input: Tensor, label: Tensor) -> list[int]:
        loss, channels = self.region_loss, input.shape[1]
        every = channels == 1 or (loss.sigmoid and loss.include_background and label.shape[1] == channels)
        return list(range(0 if every else 1, channels))

    def _read(
        self, input: Tensor, label: Tensor, carried: Tensor | None, classes: list[int], pairs: Tensor | None
    ) -> tuple[VoxelSums | None, dict[str, tuple[Tensor, Tensor]]]:
        """Read the voxels: return the sums for the global term, if they are the same, and each kind's cells' terms."""
        loss, channels = self.region_loss, input.shape[1]
        term = loss if self.term is None else self.term
        alone = loss.pass_spec(channels)
        hard = label.shape[1] == 1 and channels > 1
        spec = term_spec(term, alone.activation, channels, hard=hard)
        both = joined(spec, alone, hard=hard) if self.global_loss is None and self.lambda_global else None
        whole, found = None, {}
        if pairs is not None:
            input, label = left_labelled(input, label, alone, pairs)
        activated = loss.activated(input, label)
        for kind in self._shares():
            cells = self._cells(kind, input, label, carried, classes, pairs)
            groups = groups_of(cells, classes, channels)
            sums = run_pass(activated, label, spec if both is None else both, loss.ignore_index, groups=groups)
            if both is not None and whole is None:
                whole = sums.over_groups()
                whole = whole if pairs is None else whole.only(pairs)
            sums = sums_of_classes(sums, classes, exclusive=alone.activation != "sigmoid")
            found[kind] = total_and_weight(term, sums, cells, self.cell_weight, blob=self.regions == "blob")
        return whole, found

    def _cells(
        self,
        kind: str,
        input: Tensor,
        label: Tensor,
        carried: Tensor | None,
        classes: list[int],
        pairs: Tensor | None,
    ) -> Cells:
        plain = label.as_subclass(Tensor)
        kept = None if pairs is None else pairs[:, classes].reshape(len(label), -1, *[1] * (input.ndim - 2))
        valid = valid_voxels(plain, self.region_loss.ignore_index)
        if kind == "reference" and carried is not None:
            numbers = carried
            if self.regions == "blob":
                foreground = torch.cat([class_map(plain, index, input.shape[1]) for index in classes], 1)
                numbers = torch.where(foreground >= 0.5, carried, 0)
            return Cells((numbers if kept is None else numbers * kept).int())
        masks = class_masks(plain, classes, input.shape[1]) if kind == "reference" else self._predicted(input, classes)
        masks = masks if valid is None else masks & valid.cpu().numpy()
        masks = masks if kept is None else masks & kept.cpu().numpy()
        sizes = image_spacings(None, label, self.spacing, len(label), input.ndim - 2)
        cells = find_cells(masks, self.regions, sizes, self.connectivity)
        volume = None if kind == "reference" or cells.sizes is None else cells.sizes.to(input.device)
        return Cells(cells.numbers.to(input.device), volume)

    def _predicted(self, input: Tensor, classes: list[int]) -> NDArray[np.bool_]:
        """Return the masks (B, F, *S) of what is predicted."""
        logits = input.detach().as_subclass(Tensor)
        if self.region_loss.softmax and input.shape[1] > 1:
            return class_masks(logits.argmax(1, keepdim=True).to(torch.int16), classes, input.shape[1])
        found: NDArray[np.bool_] = (logits[:, classes] > 0).cpu().numpy()
        return found

    def _weights(self, channels: int) -> Tensor | None:
        """Return the weights of all classes; as in the global term, one channel has none."""
        loss = self.region_loss
        if loss.class_weight is None or channels == 1:
            return None
        scored = channels if loss.include_background else channels - 1
        checks.check_weight_length(loss.class_weight, scored, loss.include_background)
        return nn.functional.pad(loss.class_weight.expand(scored), (channels - scored, 0))

    def _mean(self, totals: Tensor, counts: Tensor, classes: list[int], channels: int) -> Tensor:
        """Average over cells, then over the images and classes that have one."""
        loss = self.region_loss
        # A place for every class: ranks must agree on the shape whatever form their targets have.
        places = torch.tensor(classes, device=totals.device)
        both = totals.new_zeros((2, len(totals), channels)).index_copy(2, places, torch.stack([totals, counts]))
        if loss.batch:
            both = both.sum(1, keepdim=True)
            both = sum_over_ranks(both) if loss.sync_batch else both
        totals, counts = both
        means = totals / torch.where(counts > 0, counts, 1)
        weights = self._weights(channels)
        if weights is not None:
            means = means * weights.to(means)
        return means.sum() / (counts > 0).sum().clamp_min(1)


def without_regions(loss: nn.Module, target: Tensor, channels: int) -> Tensor:
    """Return the label map of a target that carries regions for an InstanceIoULoss in `loss`, else the target."""
    parts = (part for part in loss.modules() if isinstance(part, InstanceIoULoss))
    return target[:, :1] if any(part.carries_regions(target, channels) for part in parts) else target


def _checked_module(name: str, module: Any) -> nn.Module | None:
    if module is None or isinstance(module, nn.Module):
        return module
    message = (
        f"Expected `{name}` to be a torch module, but got {type(module).__name__}: pass a loss such as IoUCELoss()."
    )
    raise TypeError(message)
