"""Deep supervision that preserves small lesions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from monai_iou import checks
from monai_iou.distributed import depending_on, fails_together, is_distributed, is_synchronised, sum_over_ranks
from monai_iou.losses.arguments import check_factors, explains_arguments
from monai_iou.losses.fraction_form import form_for_fractions
from monai_iou.losses.label_pooling import DOWNSAMPLINGS, checked_target, class_counts, pool_labels
from monai_iou.losses.lovasz import LovaszHingeLoss, LovaszSoftmaxLoss
from monai_iou.losses.nested_instances import carries_regions, on_coarser_grid
from monai_iou.losses.pass_loss import call_loss
from monai_iou.voxels.inputs import plain
from monai_iou.voxels.labels import raised_or_marked
from monai_iou.voxels.partly_labelled import Labelled, blank_unlabelled, labelled_pairs

_SHARES = 1e-2  # by which the sum of the maps of a voxel may exceed 1 in half precision


class MultiScaleLoss(_Loss):
    r"""Weighted sum of a loss over a network's outputs at several scales (deep supervision).

    .. math:: \sum_k w_k L(\mathrm{output}_k, \mathrm{label}_k), \qquad w_k = 2^{-k} / \sum_j 2^{-j}

    Each output is compared with the label downsampled to its size. Taking the nearest voxel, as MONAI's
    DeepSupervisionLoss does, keeps only 45 % of random lesions of 3x3x3 voxels at a scale of 1/4, and 5 % at 1/8. The
    default weights are those of nnU-Net (Isensee et al. 2021, https://doi.org/10.1038/s41592-020-01008-z).

    In a config, write the full path `monai_iou.MultiScaleLoss`: the short name resolves to MONAI's registration loss of
    the same name.

    Args:
        loss: a loss that maps (input, target) to a scalar and takes targets (B, 1, *S) or (B, C, *S) and, with "area",
            soft per-class maps.
        weights: one factor per scale, finest first, used as given; by default 1/2^k, normalised to a sum of 1. A scale
            with the weight 0 is left out.
        downsample: how the label is downsampled. "area": to the fraction of each class in a coarse voxel. Region losses
            then use their soft-label form (`soft_label` is set on a copy of `loss`, `soft_loss`, which follows later
            changes of its options and weights; change lists, tensors and parameters of a loss class of your own in
            both; a loss with `power` between 1 and 2 has no such form and stays as it is). Lovasz losses
            need hard labels and do not accept "area". "max": a coarse voxel is foreground if any of its voxels is; of
            several classes, it takes the one that is rarest in the batch (of all ranks, if `loss` has `sync_batch`).
            "nearest": the nearest voxel, as in MONAI.

    Attributes:
        last_terms: the values at the last call, from "scale_0", the finest, detached and not weighted, for logging.
        ignore_index: that of the loss; to change it, set it there.

    Raises:
        TypeError: if `loss` is not a module, or `weights` is not a list of numbers.
        ValueError: if `downsample` is not one of the three, or is "area" with a Lovasz loss, or a weight is negative.

    Example:
        >>> import torch
        >>> from monai_iou import IoUCELoss, MultiScaleLoss
        >>> loss = MultiScaleLoss(IoUCELoss(softmax=True))
        >>> outputs = [torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 2, 2)]
        >>> labels = torch.zeros(1, 1, 8, 8)
        >>> labels[..., :2] = 1
        >>> round(loss(outputs, labels).item(), 4)
        1.3404
    """

    @explains_arguments
    def __init__(
        self, loss: nn.Module, weights: Sequence[float] | Tensor | None = None, downsample: str = "area"
    ) -> None:
        super().__init__()
        checks.check_module("loss", loss)
        checks.check_choice("downsample", downsample, DOWNSAMPLINGS)
        if downsample == "area":
            _check_takes_fractions(loss)
        self.loss = loss
        self.soft_loss = form_for_fractions(loss) if downsample == "area" else loss  # for coarser outputs
        self.weights = check_factors(weights, of="scale")
        self.downsample = downsample
        self.last_terms: dict[str, Tensor] = {}

    def forward(self, input: Tensor | Sequence[Tensor], target: Tensor, labelled: Labelled = None) -> Tensor:
        """Return the weighted sum.

        Args:
            input: outputs (B, C, *S_k), finest first; or DynUNet's stacked tensor (B, K, C, *S) of K outputs resampled
                to one size; or a single output (B, C, *S), as networks return in evaluation.
            target: label map (B, 1, *S) or per-class maps (B, C, *S) of the size of the finest output. Precomputed
                regions of an InstanceIoULoss are used for outputs of that size; for coarser outputs, the regions are
                computed from the downsampled label.
            labelled: (B, C) bool, False where a class was not annotated in an image; see :meth:`IoULoss.forward`.

        Returns:
            What `loss` returns.

        Raises:
            TypeError: if `input` is neither a tensor nor a list of tensors.
            ValueError: if `input` is an empty list, `weights` do not fit its length, or an output is larger than the
                target.
        """
        self._follow_loss()
        counts = self._class_counts(input, target)
        with fails_together(is_synchronised(self.loss), input):
            checks.check_tensor("target", target)
            outputs = _as_list(input, target)
            doubt = self._checked_channel(input, outputs[0], target)
            weights = self._weights(len(outputs))
            pairs = labelled_pairs(outputs[0], target, labelled)
            whole = self._poolable(target, outputs[0].shape[1], pairs)
            scales = list(zip(outputs, weights, strict=True))
            labels = [self._label(output, target, whole, counts) if weight else target for output, weight in scales]
            doubts = [doubt, self._checked_values(scales, labels, target, whole)]
        self.last_terms = {}
        total = None
        for scale, ((output, weight), label) in enumerate(zip(scales, labels, strict=True)):
            if weight == 0:
                continue  # this also saves pooling the label
            term = self._term(output, target, label, pairs, is_label_map=whole.shape[1] == 1)
            self.last_terms[f"scale_{scale}"] = term.detach()
            total = weight * term if total is None else total + weight * term
        total = plain(outputs[0]).flatten()[:1].sum() * 0 if total is None else total
        total = sum((doubt for doubt in doubts if doubt is not None), total)
        return depending_on([output for output, weight in scales if weight == 0], total)

    @property
    def ignore_index(self) -> int | None:
        """The `ignore_index` of the loss, or of the first of its terms that has one."""
        # MONAI's compound losses contain torch's CrossEntropyLoss, whose default of -100 the user did not choose.
        parts = (part for part in self.loss.modules() if not isinstance(part, (nn.CrossEntropyLoss, nn.NLLLoss)))
        values = (getattr(part, "ignore_index", None) for part in parts)
        return next((value for value in values if isinstance(value, int)), None)

    def _follow_loss(self) -> None:
        """Let the coarser outputs see what was changed of `loss`, or `downsample`, since the last call."""
        soft = form_for_fractions(self.loss, self.soft_loss) if self.downsample == "area" else self.loss
        if soft is not self.soft_loss:
            if self.downsample == "area":
                _check_takes_fractions(self.loss)
            self.soft_loss = soft

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load the weights that `loss` and `soft_loss` share from the loss: they once could differ."""
        own = self.loss.state_dict(keep_vars=True)
        for name, tensor in self.soft_loss.state_dict(keep_vars=True).items():
            if own.get(name) is tensor and f"{prefix}loss.{name}" in state_dict:
                state_dict[f"{prefix}soft_loss.{name}"] = state_dict[f"{prefix}loss.{name}"]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _class_counts(self, input: Tensor | Sequence[Tensor], target: Tensor) -> Tensor | None:
        """Return the number of voxels of each class, (C,), on all ranks if these decide together which one is rarest.

        Every rank takes part, whatever form its target has; otherwise a class could be rare on one of them alone.
        """
        if self.downsample != "max":
            return None
        together = is_synchronised(self.loss) and is_distributed()
        with fails_together(together, input):
            checks.check_tensor("target", target)
            outputs = _as_list(input, target)
            classes = outputs[0].shape[1]
            if not together and (classes == 1 or all(output.shape[2:] == target.shape[2:] for output in outputs)):
                return None  # nothing is downsampled, or one map
            holds = carries_regions(self.loss, target, classes)
            counts = class_counts(target[:, :1] if holds else target, classes).to(outputs[0].device)
        return sum_over_ranks(counts) if together else counts

    def _checked_channel(self, input: Tensor | Sequence[Tensor], output: Tensor, target: Tensor) -> Tensor | None:
        """Raise ValueError if a stack is a single output (B, C, *S), whose label map (B, *S) lacks the channel.

        Read as a stack, it would be compared with one class for each slice. Where the outputs have the shape of the
        target, only a softmax tells, whose maps add up to at most 1. On a GPU, return 0, or NaN if they do not.
        """
        if not isinstance(input, Tensor) or output.shape != target.shape or not 3 <= output.ndim <= 4:
            return None
        if output.shape[1] == 1 or carries_regions(self.loss, target, output.shape[1]):
            return None
        if input.shape[1] == 1:
            raise _channel_error(input.shape, target.shape)
        if not any(getattr(part, "softmax", False) is True for part in self.loss.modules()):
            return None
        wrong = plain(target).float().sum(1) > 1 + _SHARES
        mark = torch.zeros((), device=target.device)
        error = partial(_channel_error, input.shape, target.shape)
        return raised_or_marked(mark, wrong.any(), lambda: error)

    def _checked_values(
        self, scales: Sequence[tuple[Tensor, float]], labels: Sequence[Tensor], target: Tensor, whole: Tensor
    ) -> Tensor | None:
        """Raise ValueError for values that are not labels where no loss sees all of them; on a GPU as above."""
        used = [label for (_, weight), label in zip(scales, labels, strict=True) if weight]
        if self.downsample == "area" or not used or any(label is target for label in used):
            return None
        return checked_target(whole, scales[0][0].shape[1], self.ignore_index)

    def _poolable(self, target: Tensor, channels: int, pairs: Tensor | None) -> Tensor:
        """Return the target as it can be pooled: at coarser scales regions are computed on the fly, and NaN is none."""
        if carries_regions(self.loss, target, channels):
            return target[:, :1]
        return target if pairs is None else blank_unlabelled(target, pairs, self.ignore_index)

    def _label(self, output: Tensor, target: Tensor, whole: Tensor, counts: Tensor | None) -> Tensor:
        """Return the target itself for an output of its size, else `whole` downsampled to the output."""
        size, space = output.shape[2:], target.shape[2:]
        if size == space:
            return target
        if len(size) != len(space) or any(side > full for side, full in zip(size, space, strict=True)):
            message = (
                f"Expected every output of `input` to be no larger than the target {tuple(target.shape)}, "
                f"but got {tuple(output.shape)}: pass the target of the finest scale."
            )
            raise ValueError(message)
        return pool_labels(whole, size, output.shape[1], self.downsample, self.ignore_index, counts)

    def _term(
        self, output: Tensor, target: Tensor, label: Tensor, pairs: Tensor | None, *, is_label_map: bool
    ) -> Tensor:
        if label is target:
            return call_loss(self.loss, output, target, pairs)
        with on_coarser_grid(self.loss, target, output.shape[2:], is_label_map=is_label_map):
            return call_loss(self.soft_loss, output, label, pairs)

    def _weights(self, scales: int) -> list[float]:
        if self.weights is None:
            halves = [0.5**scale for scale in range(scales)]
            return [half / sum(halves) for half in halves]
        if scales == 1:
            return self.weights[:1]  # in evaluation, the network returns one output
        if len(self.weights) != scales:
            message = (
                f"Expected `weights` to hold one factor per scale ({scales}), but got {len(self.weights)}: give as "
                "many factors as the network has outputs, or leave `weights` out."
            )
            raise ValueError(message)
        return self.weights


def _channel_error(input: Sequence[int], target: Sequence[int]) -> ValueError:
    message = (
        f"Expected the per-class maps of `target` {tuple(target)} to add up to at most 1 and `input` to be a "
        f"stack of outputs (B, K, C, *S), but got {tuple(input)}: add the channel dimension, "
        "target.unsqueeze(1), if the target is a label map; otherwise, pass the outputs as a list."
    )
    return ValueError(message)


def _as_list(input: Tensor | Sequence[Tensor], target: Tensor) -> list[Tensor]:
    if isinstance(input, Tensor):
        return list(input.unbind(1)) if input.ndim == target.ndim + 1 else [input]
    if not isinstance(input, (list, tuple)) or not all(isinstance(output, Tensor) for output in input):
        message = (
            f"Expected `input` to be a tensor or a list of tensors, but got {type(input).__name__}: pass the network's "
            "outputs, finest first."
        )
        raise TypeError(message)
    if not input:
        message = "Expected `input` to hold at least one output, but got an empty list: pass the network's outputs."
        raise ValueError(message)
    return list(input)


def needs_hard_labels(loss: nn.Module) -> str | None:
    """Return the name of the first Lovasz loss inside `loss`, which does not accept class fractions, or None."""
    hard = (part for part in loss.modules() if isinstance(part, LovaszSoftmaxLoss | LovaszHingeLoss))
    return next((type(part).__name__ for part in hard), None)


def _check_takes_fractions(loss: nn.Module) -> None:
    hard = needs_hard_labels(loss)
    if hard:
        message = (
            f"Expected `downsample` to be 'max' or 'nearest' with {hard}, which needs hard labels, but got 'area': "
            'use downsample="max", which keeps small lesions.'
        )
        raise ValueError(message)
