"""Lovasz losses: the convex extension of 1 - IoU, computed from histograms of errors or from sorted errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from monai_iou import checks
from monai_iou.distributed import fails_together, is_distributed, largest_over_ranks
from monai_iou.losses.arguments import explains_arguments
from monai_iou.losses.lovasz_base import LovaszLoss
from monai_iou.losses.weights import as_weight, scored_weights
from monai_iou.voxels.error_bins import DEFAULT_BINS
from monai_iou.voxels.partly_labelled import Labelled, excluded, labelled_pairs
from monai_iou.voxels.passes import Reading, error_reading, largest_errors, sorted_lovasz
from monai_iou.voxels.spec import PassSpec

CLASSES = ("present", "all")


class LovaszSoftmaxLoss(LovaszLoss):
    r"""Lovasz-Softmax loss: the tight convex surrogate of 1 - IoU for softmax or sigmoid probabilities.

    .. math:: L_c = \int_0^1 J(\{v : |y_{cv} - p_{cv}| \ge t\}) \, dt, \qquad
              J(S) = 1 - \frac{|Y_c \setminus S|}{|Y_c \cup S|}

    where :math:`Y_c` are the voxels of class c, y the labels and p the probabilities (Berman et al. 2018,
    https://arxiv.org/abs/1705.08790). Hard predictions give exactly 1 - IoU. Histograms of the errors replace the
    sorting: the value is within 1 / (2 bins) of the sorted one, at a fraction of its time and memory; see
    docs/lovasz.md for measurements.

    Args:
        classes: "present" for the mean over the classes that an image (or, with `batch`, the batch) contains, or "all";
            the term of an absent class is its largest probability.
        bins: number of bins of the histograms, or None to sort exactly.
        include_background: whether class 0 is included.
        to_onehot_y: accepted for compatibility with MONAI; the shape of the target decides how it is read.
        sigmoid: apply a sigmoid to the input, whose channels are independent classes.
        softmax: apply a softmax to the input. If neither is set, the input holds probabilities.
        other_act: another activation to apply; it needs memory for one more copy of the input.
        reduction: "mean" over the classes of each image, then over the images; "sum"; or "none", which returns the
            terms in the shape (B, C, 1, ...), or (C, 1, ...) with `batch`. An image that contains no class counts as 0;
            one in which no class was annotated (`labelled`) does not count.
        batch: treat the batch as one image.
        weight: one number, or one number per scored class, by which the terms are multiplied, as in MONAI.
        ignore_index: label of the voxels that have no effect on value and gradient. For per-class maps, these are the
            voxels of that class or, if it is not a class, the voxels whose maps are all zero.
        sync_batch: with `batch`, add the histograms over all ranks as well, so that training with
            DistributedDataParallel equals training in one process.

    Raises:
        TypeError: if `other_act` is not callable, or an argument or tensor has an unsuitable type.
        ValueError: if arguments contradict each other, shapes do not match, per-class maps are not binary, an input
            without activation has values outside the range from 0 to 1, or the target holds values that are not
            classes.

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
        self.register_buffer("class_weight", as_weight(weight))

    def shares_passes(self) -> bool:
        """Return whether a compound may make the pass for this loss: not if it sorts or runs inside torch.compile."""
        return self.bins is not None and not torch.compiler.is_compiling()

    def pass_spec(self, channels: int) -> PassSpec:
        """Return what the loss needs from the voxel pass over an input with `channels` channels."""
        if channels == 1 and not self.include_background:
            checks.warn_ignored("include_background=False", stacklevel=4)
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
            labelled: (B, C) bool, False where a class was not annotated in an image; see :meth:`IoULoss.forward`.
                With `bins=None` and `batch`, it must be None or, in one process on a CPU and outside of torch.compile,
                True everywhere.

        Returns:
            A float32 scalar (float64 for a float64 input); see `reduction` for other shapes.

        Raises:
            TypeError: if a tensor has an unsuitable type.
            ValueError: if shapes do not match, or values are outside the range for which the loss is defined.
        """
        if self.bins is not None:
            return super().forward(input, target, labelled)
        checks.check_input(input)
        checks.check_target(input, target)
        checks.check_onehot_request(input, target, self.to_onehot_y)
        pairs = labelled_pairs(input, target, labelled)
        if self.batch:
            found, pairs = excluded(pairs, labelled, has_ranks=is_distributed()), None
            if found is not None:
                message = (
                    f"Expected every class of every image to be annotated with bins=None and batch=True, but got "
                    f"{found}: set `bins`, for example to 2048, because sorting a batch cannot leave images out."
                )
                raise ValueError(message)
        values, volume = sorted_lovasz(
            self.activated(input, target), target, self.pass_spec(input.shape[1]), self.ignore_index, pairs,
            batch=self.batch,
        )  # fmt: skip
        return self._score(values, volume, pairs, input.ndim - 2)

    def _score(self, terms: Tensor, volume: Tensor, labelled: Tensor | None, space: int) -> Tensor:
        """Return the loss from the value and volume of each class and whether it is labelled, (B, C) or (1, C)."""
        if not self.include_background and terms.shape[1] > 1:
            terms, volume = terms[:, 1:], volume[:, 1:]
            labelled = None if labelled is None else labelled[:, 1:]
        counted = labelled
        if self.classes == "present":
            counted = (volume != 0) | terms.isnan()  # where labels are wrong, volumes are NaN
            counted = counted if labelled is None else counted & labelled
        if counted is not None:
            terms = torch.where(counted, terms, 0)
        if self.class_weight is not None and terms.shape[1] > 1:
            terms = terms * scored_weights(self.class_weight, terms, terms.shape[1], self.include_background)
        return self.reduced(terms, counted, space, labelled)


class LovaszHingeLoss(LovaszLoss):
    r"""Lovasz hinge loss: the Lovasz extension of 1 - IoU for the hinge errors of single-channel logits.

    .. math:: L = \int_0^\infty J(\{v : \max(0, 1 - s_v f_v) \ge t\}) \, dt, \qquad s_v = 2 y_v - 1

    for logits f and binary labels y, with J as in :class:`LovaszSoftmaxLoss` (Berman et al. 2018,
    https://arxiv.org/abs/1705.08790). It is 0 once every voxel is correct with a margin of 1. The errors have no upper
    bound: the histograms cover the range from 0 to the largest error m of the image (with `batch`, of the batch; with
    `sync_batch`, of all ranks), and the value is within m / (2 bins) of the sorted one. The loss of an image without
    foreground is its largest error.

    Args:
        bins: number of bins of the histograms, or None to sort exactly.
        batch: treat the batch as one image; otherwise the loss is the mean over the images, as in the paper.
        ignore_index: label of the voxels that have no effect on value and gradient.
        reduction: "mean"; "sum"; or "none", which returns the terms in the shape (B, 1, 1, ...), or (1, 1, ...) with
            `batch`.
        to_onehot_y: accepted for compatibility with MONAI; it has no effect on a single channel.
        sync_batch: with `batch`, add the histograms over all ranks; see :class:`LovaszSoftmaxLoss`.

    Raises:
        TypeError: if an argument or tensor has an unsuitable type.
        ValueError: if arguments contradict each other, the input has several channels, shapes do not match, or the
            target holds values other than 0 and 1.

    Example:
        >>> import torch
        >>> from monai_iou.losses.lovasz import LovaszHingeLoss
        >>> logits = torch.tensor([[[3.0, 0.0, -2.0, -2.0]]])
        >>> LovaszHingeLoss()(logits, torch.tensor([[[1, 1, 0, 0]]]))  # one of two foreground voxels has an error of 1
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
        """Return False: the histograms end at the largest error, and finding it takes one more pass."""
        return False

    def pass_spec(self, channels: int) -> PassSpec:
        """Return what the loss needs from the voxel pass over an input with `channels` channels."""
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
            labelled: must be None or, in one process on a CPU, True for all, because there is only one class: leave
                images that were not annotated out of the batch instead.

        Returns:
            A float32 scalar (float64 for a float64 input); see `reduction` for other shapes.

        Raises:
            TypeError: if a tensor has an unsuitable type.
            ValueError: if shapes do not match, `labelled` excludes an image, or values are outside the range for which
                the loss is defined.
        """
        with fails_together(self.sync_batch, input):
            checks.check_input(input)
            if input.shape[1] != 1:
                message = (
                    f"Expected `input` to have one channel of logits, but got {input.shape[1]}: "
                    "use LovaszSoftmaxLoss for several classes."
                )
                raise ValueError(message)
            checks.check_target(input, target)
            checks.check_onehot_request(input, target, self.to_onehot_y)
            found = excluded(labelled_pairs(input, target, labelled), labelled, has_ranks=is_distributed())
            if found is not None:
                message = (
                    f"Expected every image to be annotated for LovaszHingeLoss, which has one class, but got {found}: "
                    "leave other images out of the batch, and `labelled` out of the call."
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
