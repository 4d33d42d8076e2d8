"""Base classes of the losses that are computed from one pass over the voxels."""

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
from monai_iou.distributed import fails_together, is_distributed, sums_over_ranks
from monai_iou.voxels.inputs import plain
from monai_iou.voxels.labels import valid_voxels
from monai_iou.voxels.partly_labelled import Labelled, excluded, labelled_pairs
from monai_iou.voxels.passes import Reading, run_passes
from monai_iou.voxels.spec import PassSpec
from monai_iou.voxels.sums import VoxelSums

_ROUNDING = 1e-3  # a half-precision softmax may exceed the range from 0 to 1 by this much
_has_warned = False


def warn_of_logits(input: Tensor, target: Tensor, ignore_index: int | None) -> None:
    """Warn once per process if an input to which no activation is applied does not hold probabilities.

    Each loss checks only its first input, so that later steps need no extra pass and wait for no GPU.
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
            f"{low if low < -_ROUNDING else high:.6g}: these look like logits, so set softmax=True or sigmoid=True.",
            stacklevel=4,
        )


def call_loss(loss: nn.Module, input: Any, target: Tensor, labelled: Labelled) -> Tensor:
    """Return loss(input, target) as a plain tensor, leaving out the classes that were not annotated.

    Args:
        loss: any loss of an input and a target.
        input: (B, C, *S), or whatever the loss accepts.
        target: (B, 1, *S) or (B, C, *S).
        labelled: (B, C) bool, False where a class was not annotated in an image; None if all were.

    Raises:
        ValueError: if `labelled` excludes a class and the loss does not accept it: it would count the class as absent.
    """
    if labelled is not None and "labelled" in inspect.signature(loss.forward).parameters:
        return _plain_value(loss(input, target, labelled))
    found = excluded(None, labelled, has_ranks=is_distributed())
    if found is not None:
        message = (
            f"Expected every class to be annotated with {type(loss).__name__}, which cannot leave classes out, but got "
            f"{found}: use a loss that accepts `labelled`, such as IoUCELoss, or leave `labelled` out if every class "
            "was."
        )
        raise ValueError(message)
    return _plain_value(loss(input, target))


def _plain_value(value: Any) -> Tensor:
    """Return the value of any loss without metadata: MONAI's losses return a MetaTensor for a MetaTensor."""
    return plain(value) if isinstance(value, Tensor) else torch.as_tensor(value)


class PassLoss(_Loss):
    """A loss that is computed from one pass over the voxels.

    A subclass states what it needs from the pass (:meth:`pass_spec`) and computes the loss from the result, a reading
    (:meth:`score_reading`). The terms of a compound loss share one reading where they can.
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
        """Return whether a compound loss may make the pass for this loss; otherwise the compound calls the loss."""
        return True

    def activation(self, channels: int) -> str | None:
        """Return the activation that the pass applies to an input with `channels` channels."""
        if self.softmax and channels == 1:
            # MONAI continues with the raw input here, which is not a probability.
            checks.warn_ignored("softmax=True", stacklevel=4)
            return "sigmoid"
        return "sigmoid" if self.sigmoid else "softmax" if self.softmax else None

    @abstractmethod
    def pass_spec(self, channels: int) -> PassSpec:
        """Return what the loss needs from the voxel pass over an input with `channels` channels."""

    @abstractmethod
    def score_reading(self, reading: Reading, space: int) -> Tensor:
        """Return the loss from a reading; `space` is the number of spatial dimensions, for `reduction="none"`."""

    def forward(self, input: Tensor, target: Tensor, labelled: Labelled = None) -> Tensor:
        """Return the loss.

        Args:
            input: logits, or probabilities if no activation is set, (B, C, *S) with 1 to 3 spatial dimensions.
            target: label map (B, 1, *S) or per-class maps (B, C, *S).
            labelled: (B, C) bool, False where a class was not annotated in an image. Such pairs of image and class have
                no effect on value and gradient; under a softmax their class counts as background of that image. On a
                CPU, a per-class map that is NaN everywhere has the same meaning.

        Returns:
            A float32 scalar (float64 for a float64 input). With `reduction="none"`, a tensor that broadcasts against
            the input.

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
        """Apply `other_act`, which no kernel knows. Ignored voxels are set to 0 first, so that NaN has no effect."""
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
    """A loss that is computed from voxel sums alone (:meth:`score`)."""

    @abstractmethod
    def score(self, sums: VoxelSums, space: int) -> Tensor:
        """Return the loss from voxel sums (B, C); `space` is the number of spatial dimensions (`reduction="none"`)."""

    def score_reading(self, reading: Reading, space: int) -> Tensor:
        """Return the loss from the voxel sums of a reading."""
        return self.score(reading.sums, space)

    def pooled(self, sums: VoxelSums, batch: bool) -> VoxelSums:
        """Add the sums over the images if `batch` is True, and over the ranks if `sync_batch` is True."""
        sums = sums.with_marks() if self.sync_batch else sums
        sums = sums.over_batch() if batch else sums
        return sums_over_ranks(sums) if self.sync_batch else sums
