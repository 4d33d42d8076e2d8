"""One reading of the voxels: for one specification, or for as many as can share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from monai_iou import checks
from monai_iou.voxels import in_place
from monai_iou.voxels.error_bins import DEFAULT_BINS, check_bins, largest_error
from monai_iou.voxels.error_gradient import error_spec, read_errors
from monai_iou.voxels.flat_voxels import flat_voxels
from monai_iou.voxels.histograms import ErrorHistograms, check_constant_maps, check_hard_maps, check_probabilities
from monai_iou.voxels.inputs import Voxels, sum_dtype
from monai_iou.voxels.kernels import chosen_kernel, pick_error_kernel, pick_kernel, takes_labels_as_given
from monai_iou.voxels.labels import report_bad_values
from monai_iou.voxels.partly_labelled import blank_unlabelled, merge_unlabelled
from monai_iou.voxels.sorted_errors import sorted_extension
from monai_iou.voxels.spec import PassSpec, checked_spec, joined
from monai_iou.voxels.sums import VoxelSums


@dataclass(frozen=True)
class Reading:
    """What one reading of the voxels gave: sums (B, C), and the histograms of errors if they were asked for."""

    sums: VoxelSums
    errors: ErrorHistograms | None

    def only(self, labelled: Tensor) -> Reading:
        """Leave out the pairs of image and class that were not annotated; `labelled` is (B, C) bool."""
        return Reading(self.sums.only(labelled), None if self.errors is None else self.errors.only(labelled))


def run_passes(
    input: Tensor,
    target: Tensor,
    specs: Sequence[PassSpec],
    ignore_index: int | None,
    labelled: Tensor | None = None,
) -> list[Reading]:
    """Read the voxels of checked tensors as few times as the specifications allow; return a reading for each of them.

    Pairs of image and class that are not `labelled`, (B, C) bool, are left out; under a softmax the classes that an
    image lacks become a part of its background.

    Raises:
        ValueError: if the target holds values that are not labels; with histograms of errors, if maps are soft, or
            probabilities leave [0, 1].
    """
    readings: dict[int, Reading] = {}
    if labelled is not None:
        for merged in {spec.activation == "softmax" for spec in specs}:
            chosen = [index for index, spec in enumerate(specs) if (spec.activation == "softmax") == merged]
            tensors = left_labelled(input, target, specs[chosen[0]], labelled, ignore_index)
            results = run_passes(*tensors, [specs[index] for index in chosen], ignore_index)
            readings |= {index: reading.only(labelled) for index, reading in zip(chosen, results, strict=True)}
        return [readings[index] for index in range(len(specs))]
    voxels = suited(flat_voxels(input, target, ignore_index))
    for spec, members in shared_readings(specs, voxels):
        reading = _read(voxels, target, spec, ignore_index)
        readings |= dict.fromkeys(members, reading)
    return [readings[index] for index in range(len(specs))]


def left_labelled(
    input: Tensor, target: Tensor, spec: PassSpec, labelled: Tensor, ignore_index: int | None
) -> tuple[Tensor, Tensor]:
    """Return input and target without what was not annotated, as the activation asks for."""
    if spec.activation == "softmax":
        return merge_unlabelled(input, target, labelled, ignore_index)
    return input, blank_unlabelled(target, labelled, ignore_index)


def shared_readings(specs: Sequence[PassSpec], voxels: Voxels) -> list[tuple[PassSpec, list[int]]]:
    """Return specifications that serve all of `specs`, each with the positions of those that it serves."""
    shared: list[tuple[PassSpec, list[int]]] = []
    for index, spec in enumerate(specs):
        for position, (other, members) in enumerate(shared):
            both = joined(other, spec, hard=voxels.labels is not None)
            if both is not None and _at_once(both):
                shared[position] = (both, [*members, index])
                break
        else:
            shared.append((spec, [index]))
    return shared


def _at_once(spec: PassSpec) -> bool:
    """Return whether one reading gives all of `spec`: together with histograms, one kernel gives the usual sums."""
    return spec.bins is None or (in_place.is_usual(spec) and chosen_kernel() in ("auto", "tiled", "triton"))


def _read(voxels: Voxels, target: Tensor, spec: PassSpec, ignore_index: int | None) -> Reading:
    if spec.bins is None:
        rows = report_bad_values(pick_kernel(voxels, spec)(voxels, spec), target, voxels, ignore_index)
        return Reading(VoxelSums(rows.squeeze(-1).to(sum_dtype(voxels.logits))), None)
    check_constant_maps(voxels)
    check_hard_maps(voxels, target)
    if spec.activation is None:
        voxels = voxels.compact()
        check_probabilities(voxels)
    return error_reading(voxels, target, spec, ignore_index, voxels.logits.new_ones((1, 1)))


def error_reading(voxels: Voxels, target: Tensor, spec: PassSpec, ignore_index: int | None, limit: Tensor) -> Reading:
    """Return the histograms of errors up to `limit`, (1, 1) or (B, 1), of voxels with hard labels, and the sums."""
    kernel = pick_error_kernel(voxels, spec)
    voxels = voxels.compact() if kernel is None else voxels
    rows, errors = read_errors(voxels, spec, limit.to(sum_dtype(voxels.logits)), kernel)
    if voxels.labels is not None:  # maps have been checked
        rows = report_bad_values(rows, target, voxels, ignore_index)
    return Reading(VoxelSums(rows.squeeze(-1).to(sum_dtype(voxels.logits))), errors)


def largest_errors(input: Tensor, target: Tensor, spec: PassSpec, ignore_index: int | None) -> tuple[Voxels, Tensor]:
    """Return checked tensors as :func:`error_reading` takes them, and the largest error of each image, (B, 1)."""
    voxels = flatten_voxels(input, target, ignore_index)
    check_constant_maps(voxels)
    check_hard_maps(voxels, target)
    with torch.no_grad():
        return voxels, largest_error(voxels, error_spec(spec))


def sorted_lovasz(
    input: Tensor,
    target: Tensor,
    spec: PassSpec,
    ignore_index: int | None,
    labelled: Tensor | None = None,
    *,
    batch: bool,
) -> tuple[Tensor, Tensor]:
    """Return the Lovasz extension, exactly, and the classes' volumes, (B, C), or (1, C) over the batch.

    Raises:
        ValueError: as :func:`run_passes` with histograms of errors.
    """
    if labelled is not None:
        input, target = left_labelled(input, target, spec, labelled, ignore_index)
    voxels = flatten_voxels(input, target, ignore_index)
    check_hard_maps(voxels, target)
    if spec.activation is None:
        check_probabilities(voxels)
    return sorted_extension(voxels, target, spec.activation, ignore_index, batch=batch)


def run_pass(
    input: Tensor,
    target: Tensor,
    spec: PassSpec,
    ignore_index: int | None,
    mask: Tensor | None = None,
    groups: Tensor | None = None,
    num_groups: int | None = None,
    *,
    in_range: bool = False,
) -> VoxelSums:
    """Return the sums (B, C, R) of checked tensors, by region; `in_range` is that of :func:`flat_voxels`."""
    voxels = suited(flat_voxels(input, target, ignore_index, mask, groups, num_groups, in_range=in_range))
    rows = report_bad_values(pick_kernel(voxels, spec)(voxels, spec), target, voxels, ignore_index)
    return VoxelSums(rows.to(sum_dtype(input)))


def suited(voxels: Voxels) -> Voxels:
    """Return the voxels with compact labels, or as they were given where a kernel may be used that takes them so."""
    return voxels if takes_labels_as_given(voxels) else voxels.compact()


def flatten_voxels(
    input: Tensor,
    target: Tensor,
    ignore_index: int | None,
    mask: Tensor | None = None,
    groups: Tensor | None = None,
    num_groups: int | None = None,
) -> Voxels:
    """Bring checked tensors into the kernels' form: plain, flat, labels compact, ignored voxels marked."""
    return flat_voxels(input, target, ignore_index, mask, groups, num_groups).compact()


def voxel_sums(
    input: Tensor,
    target: Tensor,
    *,
    activation: str | None = "softmax",
    overlap: str = "product",
    power: float = 1.0,
    ignore_index: int | None = None,
    mask: Tensor | None = None,
    groups: Tensor | None = None,
    num_groups: int | None = None,
    cross_entropy: bool = True,
    gamma: float = 0.0,
    label_smoothing: float = 0.0,
    confidence: bool = False,
) -> VoxelSums:
    """Read the voxels once and return the sums from which the losses are computed, with gradients for `input`.

    The formulas are in :mod:`monai_iou.voxels.formulas`. The sums are float32 (float64 for a float64 input), whatever
    the dtype of the input, and their relative error is below 1e-5 even for a few voxels in a large volume.

    Args:
        input: logits (B, C, *S) with 1 to 3 spatial dimensions; probabilities if `activation` is None.
        target: label map (B, 1, *S) of any integer, bool or integral float dtype, or per-class maps (B, C, *S) with
            values from 0 to 1. For an input with one channel, a binary or soft map.
        activation: "softmax" (sigmoid if there is one channel), "sigmoid" or None.
        overlap: "product" or, for soft labels, "min_max" (Wang et al. 2023, https://arxiv.org/abs/2302.05666).
        power: exponent q of the predictions and targets in P and T, at least 1.
        ignore_index: label of ignored voxels. For per-class maps: voxels of that class or, if it is not a class,
            voxels whose maps are all zero.
        mask: (B, 1, *S) bool or numbers; voxels where it is zero are ignored.
        groups: integer region numbers from 0, (B, 1, *S), or (B, C, *S) if each class has its own regions; voxels with
            a number below 0 or from R on are ignored. If each class has its own regions and `activation` is not
            "sigmoid", the cross-entropy of a region includes all of its voxels, whatever their class.
        num_groups: number R of regions; None takes one more than the largest number in `groups`.
        cross_entropy: whether to compute the cross-entropy, which is 0 otherwise. It is binary with "sigmoid", and for
            one channel.
        gamma: focal exponent of the cross-entropy (Lin et al. 2017, https://arxiv.org/abs/1708.02002).
        label_smoothing: share of the label that is distributed evenly over all classes, in the cross-entropy only.
        confidence: whether to compute the sum of p^(q+1), which is 0 otherwise.

    Returns:
        :class:`VoxelSums` of shape (B, C), or (B, C, R) with `groups`.

    Raises:
        TypeError: if a tensor has an unsuitable dtype, or `num_groups` is not an integer.
        ValueError: if the shapes do not match, an option is not one of its choices, or the target contains values that
            are not classes. On a GPU no step waits for this check: the sums become NaN at once, and a later call raises
            the error.

    Example:
        >>> import torch
        >>> from monai_iou import voxel_sums
        >>> labels = torch.tensor([[[0, 0, 1, 1]]])
        >>> probabilities = torch.tensor([[[0.75, 1.0, 0.5, 0.0], [0.25, 0.0, 0.5, 1.0]]])
        >>> sums = voxel_sums(probabilities, labels, activation=None)
        >>> sums.intersection, sums.prediction, sums.target
        (tensor([[1.7500, 1.5000]]), tensor([[2.2500, 1.7500]]), tensor([[2., 2.]]))
        >>> two_halves = torch.tensor([[[0, 0, 1, 1]]])  # region numbers
        >>> voxel_sums(probabilities, labels, activation=None, groups=two_halves).target
        tensor([[[2., 0.],
                 [0., 2.]]])
    """
    checks.check_input(input)
    checks.check_target(input, target)
    if activation == "softmax" and input.shape[1] == 1:
        activation = "sigmoid"
    spec = checked_spec(activation, overlap, power, cross_entropy, gamma, label_smoothing, confidence)
    if num_groups is not None:
        num_groups = checks.check_count("num_groups", num_groups, "give the number of regions, or leave it out")
    sums = run_pass(input, target, spec, ignore_index, mask, groups, num_groups)
    return sums if groups is not None else VoxelSums(sums.rows.squeeze(-1))


def error_histograms(
    input: Tensor,
    target: Tensor,
    *,
    activation: str | None = "softmax",
    bins: int = DEFAULT_BINS,
    ignore_index: int | None = None,
) -> ErrorHistograms:
    """Count voxels by the error |y - p| of each class. Not differentiable: see `LovaszSoftmaxLoss` for gradients.

    Args:
        input: logits (B, C, *S), 1 to 3 spatial dimensions; probabilities with `activation=None`.
        target: label map (B, 1, *S), or per-class maps (B, C, *S) of 0 and 1.
        activation: "softmax" (sigmoid if there is one channel), "sigmoid" or None.
        bins: resolution K: errors are rounded by at most 1 / (2 K).
        ignore_index: label of ignored voxels.

    Returns:
        :class:`ErrorHistograms`, with an example: `background` and `foreground` of shape (B, C, M + 1), M = 2 bins,
        count the voxels outside and inside of each class by error, from 1 to 0; `undefined` (B, C), those of NaN.

    Raises:
        TypeError: if a tensor or `bins` has an unsuitable type.
        ValueError: if shapes do not match, maps are soft, probabilities leave [0, 1] or labels are not classes.
    """
    checks.check_input(input)
    checks.check_target(input, target)
    checks.check_choice("activation", activation, checks.ACTIVATIONS)
    if activation == "softmax" and input.shape[1] == 1:
        activation = "sigmoid"
    voxels = flatten_voxels(input.detach(), target, ignore_index)
    check_hard_maps(voxels, target)
    if activation is None:
        check_probabilities(voxels)
    limit = voxels.logits.new_ones((1, 1), dtype=sum_dtype(input))
    spec = PassSpec(activation, overlap=None, bins=check_bins(bins))
    errors = error_reading(voxels, target, spec, ignore_index, limit).errors
    assert errors is not None
    return errors
