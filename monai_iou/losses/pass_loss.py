"""Losses that are functions of one pass over the voxels."""

from __future__ import annotations

import inspect
import warnings
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from monai_iou import checks
from monai_iou.distributed import fails_together, sums_over_ranks
from monai_iou.voxels.inputs import plain
from monai_iou.voxels.labels import valid_voxels
from monai_iou.voxels.partly_labelled import Labelled, labelled_pairs
from monai_iou.voxels.passes import Reading, run_passes
from monai_iou.voxels.spec import PassSpec
from monai_iou.voxels.sums import VoxelSums

_ROUNDING = 1e-3  # by which probabilities of a half-precision softmax may leave [0, 1]
_has_warned = False


def warn_of_logits(input: Tensor, target: Tensor, ignore_index: int | None) -> None:
    """Warn once per process of an input that no activation is applied to and that is not a probability.

    Each loss looks at its first input only: that is no pass of every step, and a GPU is waited for once.
    """
    global _has_warned
    if _has_warned or input.numel() == 0:
        return
    values = plain(input.detach())
    valid = valid_voxels(plain(target), ignore_index)
    low, high = (values if valid is None else torch.where(valid, values, 0)).aminmax()
    if low < -_ROUNDING or high > 1 + _ROUNDING:
        _has_warned = True
        warnings.warn(
            f"Expected `input` to hold probabilities between 0 and 1, because no activation is set, but got "
            f"{low if low < -_ROUNDING else high:.6g}: these look like logits, set softmax=True or sigmoid=True.",
            stacklevel=4,
        )


def call_loss(loss: nn.Module, input: Any, target: Tensor, labelled: Labelled) -> Tensor:
    """Return loss(input, target), without the classes that were not annotated.

    Raises:
        ValueError: if there are such classes, and the loss has no `labelled`: it would count them as absent.
    """
    value: Tensor
    if labelled is None:
        value = loss(input, target)
        return value
    if "labelled" not in inspect.signature(loss.forward).parameters:
        message = (
            f"Expected `labelled` to be None with {type(loss).__name__}, but got a choice of classes: take losses of "
            "voxel sums, which leave the others out."
        )
        raise ValueError(message)
    value = loss(input, target, labelled)
    return value


class PassLoss(_Loss):
    """A loss that is a function of what one pass over the voxels gives.

    A subclass says what it needs of the pass (:meth:`pass_spec`) and how a reading makes the loss
    (:meth:`score_reading`); a compound of such losses hands each of them a reading that they share.
    """

    def __init__(
        self,
        *,
        to_onehot_y: bool,
        sigmoid: bool,
        softmax: bool,
        other_act: Callable[[Tensor], Tensor] | None,
        reduction: str,
        ignore_index: int | None,
        sync_batch: bool,
    ) -> None:
        checks.check_activation(sigmoid, softmax, other_act)
        reduction = str(getattr(reduction, "value", reduction))  # MONAI's LossReduction or its value
        checks.check_choice("reduction", reduction, checks.REDUCTIONS)
        super().__init__(reduction=reduction)
        self.to_onehot_y = to_onehot_y
        self.sigmoid = sigmoid
        self.softmax = softmax
        self.other_act = other_act
        self.ignore_index = checks.check_ignore_index(ignore_index)
        self.sync_batch = sync_batch
        self._has_looked = False

    def shares_passes(self) -> bool:
        """Return whether a compound may make the pass of this loss; if not, it calls the loss."""
        return True

    def activation(self, channels: int) -> str | None:
        """Return the activation that the pass applies to an input of so many channels."""
        if self.softmax and channels == 1:
            # MONAI goes on with the raw input here, which is not a probability; one channel takes a sigmoid.
            warnings.warn("single channel prediction, `softmax=True` ignored.", stacklevel=4)
            return "sigmoid"
        return "sigmoid" if self.sigmoid else "softmax" if self.softmax else None

    @abstractmethod
    def pass_spec(self, channels: int) -> PassSpec:
        """Return what the loss needs of the voxel pass."""

    @abstractmethod
    def score_reading(self, reading: Reading, space: int) -> Tensor:
        """Return the loss from a reading; `space` is the number of spatial dimensions, for `reduction="none"`."""

    def forward(self, input: Tensor, target: Tensor, labelled: Labelled = None) -> Tensor:
        """Return the loss.

        Args:
            input: logits, or probabilities if no activation is set, (B, C, *S) with 1 to 3 spatial dimensions.
            target: label map (B, 1, *S) or per-class maps (B, C, *S).
            labelled: (B, C) bool, False where a class was not annotated in an image: such pairs leave value and
                gradient, and under a softmax their class is a part of the image's background. On a CPU a per-class map
                that is NaN everywhere says the same.

        Returns:
            A float32 scalar (float64 for a float64 input); with `reduction="none"` a tensor that broadcasts against the
            input.

        Raises:
            TypeError: if a tensor has an unsuitable type.
            ValueError: if shapes do not match, or the target holds values that are not classes.
        """
        with fails_together(self.sync_batch, input):
            checks.check_input(input)
            checks.check_target(input, target)
            checks.check_onehot_request(input, target, self.to_onehot_y)
            pairs = labelled_pairs(input, target, labelled)
            spec = self.pass_spec(input.shape[1])
            (reading,) = run_passes(self.activated(input, target), target, [spec], self.ignore_index, pairs)
        return self.score_reading(reading, input.ndim - 2)

    def activated(self, input: Tensor, target: Tensor) -> Tensor:
        """Apply `other_act`, which the pass does not know; ignored voxels stay out, so that NaN there has no effect."""
        if self.other_act is None:
            if not (self.sigmoid or self.softmax or self._has_looked or torch.compiler.is_compiling()):
                self._has_looked = True
                warn_of_logits(input, target, self.ignore_index)
            return input
        if self.ignore_index is not None:
            valid = valid_voxels(plain(target), self.ignore_index)
            assert valid is not None
            input = torch.where(valid, input, 0)
        return self.other_act(input)


class SumsLoss(PassLoss):
    """A loss that is a function of voxel sums alone (:meth:`score`)."""

    @abstractmethod
    def score(self, sums: VoxelSums, space: int) -> Tensor:
        """Return the loss from sums (B, C); `space` is the number of spatial dimensions, for `reduction="none"`."""

    def score_reading(self, reading: Reading, space: int) -> Tensor:
        """Return the loss from the sums of a reading."""
        return self.score(reading.sums, space)

    def pooled(self, sums: VoxelSums, batch: bool) -> VoxelSums:
        """Add over the images if `batch`, and over the ranks if asked for."""
        sums = sums.over_batch() if batch else sums
        return sums_over_ranks(sums) if self.sync_batch else sums
