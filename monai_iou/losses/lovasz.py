"""Lovasz losses: the convex extension of 1 - IoU, read from histograms of errors instead of sorted lists."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from monai_iou import checks, scores
from monai_iou.distributed import errors_over_ranks, fails_together, largest_over_ranks, sums_over_ranks
from monai_iou.losses.arguments import explains_arguments
from monai_iou.losses.pass_loss import PassLoss
from monai_iou.voxels.error_bins import DEFAULT_BINS, check_bins
from monai_iou.voxels.partly_labelled import Labelled, labelled_pairs
from monai_iou.voxels.passes import Reading, error_reading, largest_errors, sorted_lovasz
from monai_iou.voxels.spec import PassSpec

CLASSES = ("present", "all")


class _LovaszLoss(PassLoss):
    """What the Lovasz losses share: values from a reading with histograms of errors, or from sorted errors."""

    def __init__(
        self,
        bins: int | None,
        batch: bool,
        *,
        to_onehot_y: bool,
        reduction: str,
        ignore_index: int | None,
        sync_batch: bool,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(
            to_onehot_y=to_onehot_y,
            sigmoid=sigmoid,
            softmax=softmax,
            other_act=other_act,
            reduction=reduction,
            ignore_index=ignore_index,
            sync_batch=sync_batch,
        )
        self.bins = None if bins is None else check_bins(bins)
        self.batch = batch
        if sync_batch and not batch:
            message = "Expected `batch` to be True with sync_batch=True, but got False: ranks join their batches."
            raise ValueError(message)
        if sync_batch and bins is None:
            message = (
                "Expected `bins` to be a number with sync_batch=True, but got None: only histograms add over ranks."
            )
            raise ValueError(message)

    def pooled(self, reading: Reading) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the Lovasz extension of each class, the classes' volumes, and which are labelled (None: all).

        Each is (B, C), or (1, C) with `batch`.
        """
        errors, sums = reading.errors, replace(reading.sums, rows=reading.sums.rows.detach())
        assert errors is not None
        if self.batch:
            errors, sums = errors.over_batch(), sums.over_batch()
        if self.sync_batch:
            errors, sums = errors_over_ranks(errors), sums_over_ranks(sums)
        # volumes are NaN where labels are wrong
        values = (scores.lovasz(errors) + 0 * sums.target).to(sums.target.dtype)
        return values, sums.target, sums.count > 0 if sums.partly_labelled else None

    def reduced(self, terms: Tensor, counted: Tensor | None, space: int) -> Tensor:
        """Apply `reduction` to terms (B, C), or (1, C); the mean is over the `counted` ones of each image first."""
        if self.reduction == "sum":
            return terms.sum()
        if self.reduction == "none":
            return terms.reshape(*(terms.shape[1:] if self.batch else terms.shape), *[1] * space)
        if counted is None:
            counted = torch.ones_like(terms, dtype=torch.bool)
        images = terms.sum(1) / counted.sum(1).clamp_min(1)
        return images.sum() / max(1, len(images))


class LovaszSoftmaxLoss(_LovaszLoss):
    r"""Lovasz-Softmax: the tight convex surrogate of 1 - IoU, on softmax or sigmoid probabilities.

    .. math:: L_c = \int_0^1 J(\{v : |y_{cv} - p_{cv}| \ge t\}) \, dt, \qquad
              J(S) = 1 - \frac{|Y_c \setminus S|}{|Y_c \cup S|}

    with :math:`Y_c` the voxels of class c (Berman et al. 2018, https://arxiv.org/abs/1705.08790). Hard predictions give
    exactly 1 - IoU. Histograms of the errors take the place of a sort: the value is within 1 / (2 bins) of the sorted
    one at a small part of its time and memory; docs/lovasz.md has the evidence.

    Args:
        classes: "present", the mean over the classes that an image (or with `batch` the batch) holds, or "all"; a class
            that is absent costs its largest probability.
        bins: resolution of the histograms, or None to sort exactly.
        include_background: whether class 0 is included.
        to_onehot_y: accepted for drop-in use; the target's shape decides how it is read.
        sigmoid: apply a sigmoid to the input; each channel is a class of its own.
        softmax: apply a softmax to the input. With neither, the input holds probabilities.
        other_act: another activation to apply, which costs a copy of the input.
        reduction: "mean" over each image's classes, then over images; "sum"; or "none" for (B, C, 1, ...), or
            (C, 1, ...) with `batch`. Images in which no class is present count as 0.
        batch: treat the batch as one image.
        weight: one number, or one number per scored class; multiplies its terms, as in MONAI.
        ignore_index: label of voxels ignored in value and gradient; for per-class maps voxels of that class
            or, if it is not a class, voxels whose maps are all zero.
        sync_batch: with `batch`, add the histograms over all ranks as well: then value and gradients under
            DistributedDataParallel are those of one process on the joined batch.

    Raises:
        TypeError: if `other_act` cannot be called, or an argument or tensor has an unsuitable type.
        ValueError: if options contradict each other, shapes do not match, per-class maps are soft, an input without
            activation leaves [0, 1], or labels are outside the classes.

    Example:
        >>> import torch
        >>> from monai_iou.losses.lovasz import LovaszSoftmaxLoss
        >>> hard = torch.tensor([[[0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]]])  # IoU 1/2 and 2/3
        >>> labels = torch.tensor([[[1, 1, 1, 0]]])
        >>> round(LovaszSoftmaxLoss()(hard, labels).item(), 4)
        0.4167
    """

    @explains_arguments
    def __init__(
        self,
        classes: str = "present",
        bins: int | None = DEFAULT_BINS,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        reduction: str = "mean",
        batch: bool = False,
        weight: Sequence[float] | float | Tensor | None = None,
        ignore_index: int | None = None,
        *,
        sync_batch: bool = False,
    ) -> None:
        checks.check_choice("classes", classes, CLASSES)
        super().__init__(
            bins,
            batch,
            to_onehot_y=to_onehot_y,
            reduction=reduction,
            ignore_index=ignore_index,
            sync_batch=sync_batch,
            sigmoid=sigmoid,
            softmax=softmax,
            other_act=other_act,
        )
        self.classes = classes
        self.include_background = include_background
        self.class_weight: Tensor | None
        self.register_buffer("class_weight", checks.as_weight(weight))

    def shares_passes(self) -> bool:
        """Return whether a compound may make the pass of this loss: not if it sorts, nor inside torch.compile."""
        return self.bins is not None and not torch.compiler.is_compiling()

    def pass_spec(self, channels: int) -> PassSpec:
        """Return what the loss needs of the voxel pass."""
        if channels == 1 and not self.include_background:
            warnings.warn("single channel prediction, `include_background=False` ignored.", stacklevel=4)
        return PassSpec(self.activation(channels), overlap=None, bins=self.bins)

    def score_reading(self, reading: Reading, space: int) -> Tensor:
        """Return the loss from a reading with histograms of errors."""
        return self._score(*self.pooled(reading), space)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, input: Tensor, target: Tensor, labelled: Labelled = None) -> Tensor:
        """Return the loss.

        Args:
            input: logits, or probabilities if no activation is set, (B, C, *S) with 1 to 3 spatial dimensions.
            target: label map (B, 1, *S) or per-class maps of 0 and 1, (B, C, *S).
            labelled: (B, C) bool, False where a class was not annotated in an image; see :class:`IoULoss`. Not with
                `bins=None` and `batch`.

        Returns:
            A float32 scalar (float64 for a float64 input); see `reduction` for its other shapes.

        Raises:
            TypeError: if a tensor has an unsuitable type.
            ValueError: if shapes do not match, or values are none that the loss is defined for.
        """
        if self.bins is not None:
            return super().forward(input, target, labelled)
        checks.check_input(input)
        checks.check_target(input, target)
        checks.check_onehot_request(input, target, self.to_onehot_y)
        pairs = labelled_pairs(input, target, labelled)
        if pairs is not None and self.batch:
            message = (
                "Expected every class of every image to be labelled with bins=None and batch=True, but some are not: "
                "sorted errors of a batch cannot leave images out, take bins=2048."
            )
            raise ValueError(message)
        values, volume = sorted_lovasz(
            self.activated(input, target), target, self.pass_spec(input.shape[1]), self.ignore_index, pairs,
            batch=self.batch,
        )  # fmt: skip
        return self._score(values, volume, pairs, input.ndim - 2)

    def _score(self, terms: Tensor, volume: Tensor, labelled: Tensor | None, space: int) -> Tensor:
        """Return the loss from the classes' values and volumes, and which are labelled, (B, C) or (1, C)."""
        if not self.include_background and terms.shape[1] > 1:
            terms, volume = terms[:, 1:], volume[:, 1:]
            labelled = None if labelled is None else labelled[:, 1:]
        counted = labelled
        if self.classes == "present":
            counted = (volume != 0) | terms.isnan()  # volumes are NaN where labels are wrong
            counted = counted if labelled is None else counted & labelled
        if counted is not None:
            terms = torch.where(counted, terms, 0)
        if self.class_weight is not None and terms.shape[1] > 1:
            checks.check_weight_length(self.class_weight, terms.shape[1], self.include_background)
            terms = terms * self.class_weight.to(terms)
        return self.reduced(terms, counted, space)


class LovaszHingeLoss(_LovaszLoss):
    r"""Lovasz hinge: the Lovasz extension of 1 - IoU at the hinge errors of one-channel logits.

    .. math:: L = \int_0^\infty J(\{v : \max(0, 1 - s_v f_v) \ge t\}) \, dt, \qquad s_v = 2 y_v - 1

    for logits f and binary maps y (Berman et al. 2018, https://arxiv.org/abs/1705.08790). It is 0 once every voxel is
    right by a margin of 1. Errors have no upper bound: the histograms reach from 0 to the largest error m of the image
    (with `batch`, of the batch and its ranks), and the value is within m / (2 bins) of the sorted one. An image without
    foreground costs its largest error.

    Args:
        bins: resolution of the histograms, or None to sort exactly.
        batch: treat the batch as one image; else the mean over images, as in the paper.
        ignore_index: label of voxels ignored in value and gradient.
        reduction: "mean", "sum", or "none" for (B, 1, 1, ...), or (1, 1, ...) with `batch`.
        to_onehot_y: accepted for drop-in use; ignored for single-channel input.
        sync_batch: with `batch`, add the histograms over all ranks; see :class:`LovaszSoftmaxLoss`.

    Raises:
        TypeError: if an argument or tensor has an unsuitable type.
        ValueError: if options contradict each other, the input has several channels, shapes do not match, or the target
            holds anything but 0 and 1.

    Example:
        >>> import torch
        >>> from monai_iou.losses.lovasz import LovaszHingeLoss
        >>> logits = torch.tensor([[[3.0, 0.0, -2.0, -2.0]]])
        >>> LovaszHingeLoss()(logits, torch.tensor([[[1, 1, 0, 0]]]))  # one voxel of two, wrong by 1
        tensor(0.5000)
    """

    @explains_arguments
    def __init__(
        self,
        bins: int | None = DEFAULT_BINS,
        batch: bool = False,
        ignore_index: int | None = None,
        reduction: str = "mean",
        to_onehot_y: bool = False,
        *,
        sync_batch: bool = False,
    ) -> None:
        super().__init__(
            bins,
            batch,
            to_onehot_y=to_onehot_y,
            reduction=reduction,
            ignore_index=ignore_index,
            sync_batch=sync_batch,
        )

    def shares_passes(self) -> bool:
        """Return False: the histograms reach to the largest error, for which the voxels are read once more."""
        return False

    def pass_spec(self, channels: int) -> PassSpec:
        """Return what the loss needs of the voxel pass."""
        return PassSpec("hinge", overlap=None, bins=self.bins)

    def score_reading(self, reading: Reading, space: int) -> Tensor:
        """Return the loss from a reading with histograms of errors."""
        return self.reduced(self.pooled(reading)[0], None, space)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, input: Tensor, target: Tensor, labelled: Labelled = None) -> Tensor:
        """Return the loss.

        Args:
            input: logits (B, 1, *S) with 1 to 3 spatial dimensions.
            target: binary maps (B, 1, *S).
            labelled: None: leave images without a label out of the batch.

        Returns:
            A float32 scalar (float64 for a float64 input); see `reduction` for its other shapes.

        Raises:
            TypeError: if a tensor has an unsuitable type.
            ValueError: if shapes do not match, or values are none that the loss is defined for.
        """
        with fails_together(self.sync_batch, input):
            checks.check_input(input)
            if input.shape[1] != 1:
                message = (
                    f"Expected `input` to have one channel of logits, but got {input.shape[1]}: "
                    "for several classes take LovaszSoftmaxLoss."
                )
                raise ValueError(message)
            checks.check_target(input, target)
            checks.check_onehot_request(input, target, self.to_onehot_y)
            if labelled_pairs(input, target, labelled) is not None:
                message = (
                    "Expected `labelled` to be None for LovaszHingeLoss, which has one class, but got a choice of "
                    "images: leave the others out of the batch."
                )
                raise ValueError(message)
            spec = self.pass_spec(1)
            if self.bins is None:
                values, _ = sorted_lovasz(input, target, spec, self.ignore_index, batch=self.batch)
                return self.reduced(values, None, input.ndim - 2)
            voxels, limit = largest_errors(input, target, spec, self.ignore_index)
        if self.batch:
            limit = limit.amax(0, keepdim=True) if len(limit) else limit.new_zeros((1, 1))
        if self.sync_batch:
            limit = largest_over_ranks(limit)
        with fails_together(self.sync_batch, input):
            reading = error_reading(voxels, target, spec, self.ignore_index, limit)
        return self.score_reading(reading, input.ndim - 2)
