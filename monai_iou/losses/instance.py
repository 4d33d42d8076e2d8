"""IoU inside the neighbourhood of each lesion, so that a small one counts as much as a large one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss
from typing_extensions import Unpack

from monai_iou import checks, scores
from monai_iou.components import FIRST_REGION, REGIONS, component_regions
from monai_iou.distributed import fails_together, sum_over_ranks
from monai_iou.losses.base import RegionOptions, with_region_arguments
from monai_iou.losses.iou import IoULoss
from monai_iou.spacing import image_spacings
from monai_iou.voxels.inputs import sum_dtype
from monai_iou.voxels.labels import valid_voxels
from monai_iou.voxels.passes import run_pass
from monai_iou.voxels.sums import VoxelSums

_Terms = tuple[Tensor, Tensor]


class InstanceIoULoss(_Loss):
    r"""Mean over ground-truth components of the IoU loss inside each component's region, plus a global term.

    .. math:: \lambda_g L_{global} + \lambda_i \frac{1}{K} \sum_{k=1}^{K} \left(1 - \frac{I_k + s}{U_k + s}\right)

    "voronoi": I_k and U_k are sums over the voxels nearer, in mm, to component k than to any other (CC-metrics,
    Jaus et al. 2024, https://arxiv.org/abs/2410.18684). "blob": over all voxels except those of the other components
    (blob loss, Kofler et al. 2023, https://arxiv.org/abs/2205.08209): every false positive counts against every
    component. The other components are masked out of the probabilities, so that a perfect prediction has loss 0.

    Components are those of the label, each foreground class by itself. The mean is taken over the components of an
    image and class (of the batch with `batch=True`), then over the images and classes that have one; false positives
    where there is none are left to the global term. One pass over the voxels serves both terms of a two-class or
    one-channel problem; more classes take a pass each, over probabilities.

    The regions are computed on the fly, from the label on the CPU, or carried by the target: see
    :class:`monai_iou.ComponentRegionsd`. Carried regions serve both choices. A region whose component a crop left out
    does not count.

    Args:
        regions: "voronoi" or "blob".
        *args: the arguments of :class:`IoULoss`, in its order.
        **options: the same, by name. `reduction` is "mean". `weight` weighs the classes in both terms. Foreground are
            the classes from 1, with one channel that one, and with `sigmoid` and per-class maps all that are included.
            A voxel of a soft map belongs to a component from 0.5 on.
        lambda_global: factor of the global term.
        lambda_instance: factor of the mean over components.
        global_loss: the global term; an IoULoss with the same options by default. `IoUCELoss` adds a cross-entropy.
        connectivity: neighbours that connect, 6, 18 or 26 in 3D, 4 or 8 in 2D; the most by default. On the fly only.
        spacing: voxel size in mm, on the fly only; by default that of a MetaTensor target, else 1.

    Attributes:
        last_terms: "global" and "instance" at the last call, detached, before weighting; for logging.

    Raises:
        TypeError: as :class:`IoULoss`, or if `global_loss` is no module.
        ValueError: as :class:`IoULoss`, or if an argument is out of its range, or precomputed regions are not one
            channel per foreground class.

    Example:
        >>> import torch
        >>> from monai_iou import InstanceIoULoss
        >>> labels = torch.tensor([[[1, 1, 1, 1, 0, 0, 0, 1]]])
        >>> only_the_large_one = torch.tensor([[[1.0, 1, 1, 1, 0, 0, 0, 0]]])
        >>> loss = InstanceIoULoss()
        >>> value = loss(only_the_large_one, labels)
        >>> {name: round(term.item(), 4) for name, term in loss.last_terms.items()}
        {'global': 0.2, 'instance': 0.5}
    """

    @with_region_arguments
    def __init__(
        self,
        regions: str = "voronoi",
        *args: Any,
        lambda_global: float = 1.0,
        lambda_instance: float = 1.0,
        global_loss: nn.Module | None = None,
        connectivity: int | None = None,
        spacing: Sequence[float] | float | None = None,
        **options: Unpack[RegionOptions],
    ) -> None:
        super().__init__()
        checks.check_choice("regions", regions, REGIONS)
        if global_loss is not None and not isinstance(global_loss, nn.Module):
            message = f"Expected `global_loss` to be a torch module, but got {type(global_loss).__name__}."
            raise TypeError(message)
        self.region_loss = IoULoss(*args, **options)
        checks.check_choice("reduction", self.region_loss.reduction, ("mean",))
        self.global_loss = global_loss
        self.regions, self.connectivity, self.spacing = regions, connectivity, spacing
        self.lambda_global = checks.check_positive("lambda_global", lambda_global, allow_zero=True)
        self.lambda_instance = checks.check_positive("lambda_instance", lambda_instance, allow_zero=True)
        self.last_terms: dict[str, Tensor] = {}

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss.

        Args:
            input: logits, or probabilities if no activation is set, (B, C, *S).
            target: label map (B, 1, *S), per-class maps (B, C, *S), or a label map with its regions (B, 1 + F, *S) for
                F foreground classes. With F + 1 = C it is the latter if a value is above 1, which regions always have.
                All zeros, as of a crop that is all padding, are per-class maps without a class with `sigmoid`, ignored
                voxels with `ignore_index`, else an empty label map: one class always holds in one-hot maps.

        Returns:
            A scalar, float32 or float64.

        Raises:
            TypeError: if a tensor cannot be read as what it stands for.
            ValueError: if shapes do not match, or the target holds values that are no class.
        """
        with fails_together(self.region_loss.sync_batch, input):
            checks.check_input(input)
            label, carried = self._split(input, target)
            checks.check_target(input, label)
            checks.check_onehot_request(input, label, self.region_loss.to_onehot_y)
            classes = self._foreground(input, label)
            if carried is None:
                maps = [self._regions(label, input, index) for index in classes]
            else:
                maps = [carried[:, [position]] for position in range(len(classes))]
        if len(classes) == 1 and self.global_loss is None:
            whole, terms = self._one_pass(input, label, maps[0])
        else:
            whole, terms = self._pass_a_class(input, label, classes, maps)
        instance = self._mean(terms, classes, input.shape[1])
        self.last_terms = {"global": whole.detach(), "instance": instance.detach()}
        return self.lambda_global * whole + self.lambda_instance * instance

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

    def _regions(self, label: Tensor, input: Tensor, index: int) -> Tensor:
        """Compute the region numbers (B, 1, *S) of a class."""
        space = input.ndim - 2
        sizes = image_spacings(None, label, self.spacing, len(label), space)
        mask = _class_map(label.as_subclass(Tensor), index, input.shape[1]) >= 0.5
        valid = valid_voxels(label.as_subclass(Tensor), self.region_loss.ignore_index)
        mask = mask if valid is None else mask & valid
        numbers = [
            torch.as_tensor(component_regions(image[0], self.regions, spacing, self.connectivity)[0])
            for image, spacing in zip(mask.cpu().numpy(), sizes, strict=True)
        ]
        return torch.stack(numbers).unsqueeze(1).long().to(input.device) if numbers else mask.long()

    def _one_pass(self, input: Tensor, label: Tensor, regions: Tensor) -> tuple[Tensor, list[_Terms]]:
        """Return the global term and the components' terms of the only foreground class, the last channel."""
        loss = self.region_loss
        groups = self._groups(regions, _class_map(label.as_subclass(Tensor), input.shape[1] - 1, input.shape[1]))
        with fails_together(loss.sync_batch, input):
            sums = run_pass(
                loss.activated(input, label), label, loss.pass_spec(input.shape[1]), loss.ignore_index, groups=groups
            )
        whole = loss.score(sums.over_groups(), input.ndim - 2)
        return whole, [self._component_terms(VoxelSums(sums.rows[:, :, -1]))]

    def _pass_a_class(
        self, input: Tensor, label: Tensor, classes: list[int], maps: list[Tensor]
    ) -> tuple[Tensor, list[_Terms]]:
        loss, channels = self.region_loss, input.shape[1]
        with fails_together(loss.sync_batch and self.global_loss is not None, input):  # which may be MONAI's
            whole = torch.as_tensor((loss if self.global_loss is None else self.global_loss)(input, label))
        whole = whole.as_subclass(Tensor)
        spec = loss.pass_spec(channels)
        target = label.as_subclass(Tensor)
        valid = valid_voxels(target, loss.ignore_index)
        logits = input.as_subclass(Tensor).to(sum_dtype(input))
        logits = loss.activated(
            logits if valid is None else torch.where(valid, logits, 0), label
        )  # NaN has no gradient of 0
        p = logits.softmax(1) if spec.activation == "softmax" else logits.sigmoid() if spec.activation else logits
        terms = []
        for index, regions in zip(classes, maps, strict=True):
            foreground = _class_map(target, index, channels)
            foreground = foreground if valid is None else torch.where(valid, foreground, 0)
            alone = replace(spec, activation=None)
            groups = self._groups(regions, foreground)
            sums = run_pass(p[:, [index]], foreground, alone, None, mask=valid, groups=groups)
            terms.append(self._component_terms(VoxelSums(sums.rows[:, :, 0])))
        return whole, terms

    def _groups(self, regions: Tensor, foreground: Tensor) -> Tensor:
        return torch.where(foreground >= 0.5, regions, 0) if self.regions == "blob" else regions

    def _component_terms(self, sums: VoxelSums) -> _Terms:
        """Return the sum of the terms of an image's components and their number, (B,) each, from sums (B, R)."""
        loss = self.region_loss
        present = sums.target[:, 1:] > 0
        if self.regions == "blob":  # what lies outside all components counts with each
            sums = VoxelSums(sums.rows[..., 1:] + sums.rows[..., :1])
        else:
            sums = VoxelSums(sums.rows[..., 1:])
        iou = scores.iou(sums.intersection, sums.prediction, sums.target, loss.smooth_nr, loss.smooth_dr)
        return torch.where(present, 1 - iou, 0).sum(1), present.sum(1).to(iou)

    def _weights(self, channels: int) -> Tensor | None:
        """Return the weights of all classes; as in the global term, one channel has none."""
        loss = self.region_loss
        if loss.class_weight is None or channels == 1:
            return None
        scored = channels if loss.include_background else channels - 1
        checks.check_weight_length(loss.class_weight, scored, loss.include_background)
        return nn.functional.pad(loss.class_weight.expand(scored), (channels - scored, 0))

    def _mean(self, terms: list[_Terms], classes: list[int], channels: int) -> Tensor:
        """Average over components, then over the images and classes that have one."""
        loss = self.region_loss
        # A place for every class: ranks must agree on the shape whatever form their targets have.
        totals, counts = (_placed(part, classes, channels) for part in zip(*terms, strict=True))
        if loss.batch:
            both = torch.stack([totals.sum(0, keepdim=True), counts.sum(0, keepdim=True)])
            totals, counts = sum_over_ranks(both) if loss.sync_batch else both
        means = totals / counts.clamp_min(1)
        weights = self._weights(channels)
        if weights is not None:
            means = means * weights.to(means)
        return means.sum() / (counts > 0).sum().clamp_min(1)


def _placed(columns: Sequence[Tensor], classes: Sequence[int], channels: int) -> Tensor:
    """Return (B, C) with the columns (B,) of some classes, 0 elsewhere."""
    given = dict(zip(classes, columns, strict=True))
    return torch.stack([given.get(index, torch.zeros_like(columns[0])) for index in range(channels)], 1)


def _class_map(label: Tensor, index: int, channels: int) -> Tensor:
    """Return the map (B, 1, *S) of one class from a label map or per-class maps."""
    if label.shape[1] == 1 and channels > 1:
        return (label == index).float()
    return label[:, [index]].float()
