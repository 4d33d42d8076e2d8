"""Per-class sums over voxels: the statistics that every region loss, cross-entropy and metric is a function of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from monai_iou import checks
from monai_iou.voxels.formulas import union
from monai_iou.voxels.inputs import Voxels, sum_dtype
from monai_iou.voxels.kernels import pick_kernel
from monai_iou.voxels.labels import compact_labels, report_bad_values, valid_voxels
from monai_iou.voxels.spec import CONFIDENCE, COUNT, CROSS_ENTROPY, INTERSECTION, PREDICTION, TARGET, PassSpec

# torch stores these but computes next to nothing in them.
_BARE_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)


@dataclass(frozen=True, eq=False)
class VoxelSums:
    """Sums over voxels per image and class, (B, C), or (B, C, R) with regions. They add: over images, regions, ranks.

    Attributes:
        rows: (6, B, C[, R]), the sums below in the order of :mod:`monai_iou.voxels.spec`.
        intersection: I, sum of p y (or of min(p, y)).
        prediction: P, sum of p^q.
        target: T, sum of y^q.
        cross_entropy: sum of -ln p over the voxels of the class; with sigmoid, of the binary cross-entropy.
        confidence: sum of p^(q+1); zeros if not asked for.
        count: number of voxels that are not ignored.

    Example:
        >>> import torch
        >>> from monai_iou import voxel_sums
        >>> labels = torch.tensor([[[0, 0, 1, 1]]])
        >>> sums = voxel_sums(torch.zeros(1, 2, 4), labels)
        >>> sums.intersection, sums.union
        (tensor([[1., 1.]]), tensor([[3., 3.]]))
        >>> (sums + sums).count
        tensor([[8., 8.]])
    """

    rows: Tensor

    @property
    def intersection(self) -> Tensor:
        """I, sum of p y (or of min(p, y))."""
        return self.rows[INTERSECTION]

    @property
    def prediction(self) -> Tensor:
        """P, sum of p^q."""
        return self.rows[PREDICTION]

    @property
    def target(self) -> Tensor:
        """T, sum of y^q."""
        return self.rows[TARGET]

    @property
    def cross_entropy(self) -> Tensor:
        """E, sum of -ln p over the voxels of the class; with sigmoid, of the binary cross-entropy."""
        return self.rows[CROSS_ENTROPY]

    @property
    def confidence(self) -> Tensor:
        """Q, sum of p^(q+1); zeros if not asked for."""
        return self.rows[CONFIDENCE]

    @property
    def count(self) -> Tensor:
        """N, number of voxels that are not ignored."""
        return self.rows[COUNT]

    @property
    def union(self) -> Tensor:
        """U = P + T - I."""
        return union(self.intersection, self.prediction, self.target)

    def __add__(self, other: VoxelSums) -> VoxelSums:
        if not isinstance(other, VoxelSums):
            return NotImplemented
        return VoxelSums(self.rows + other.rows)

    def over_batch(self) -> VoxelSums:
        """Add over the images: (1, C[, R])."""
        return VoxelSums(self.rows.sum(1, keepdim=True))

    def over_groups(self) -> VoxelSums:
        """Add over the regions: (B, C)."""
        return VoxelSums(self.rows.sum(3))

    def without_background(self) -> VoxelSums:
        """Leave out class 0."""
        return VoxelSums(self.rows[:, :, 1:])


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
    """Read the voxels once and return the sums that the losses are functions of. Differentiable in `input`.

    The formulas stand in :mod:`monai_iou.voxels.formulas`. Sums are float32 (float64 for a float64 input) whatever the
    input's dtype, and their relative error is below 1e-5 also for a handful of voxels in a large volume.

    Args:
        input: logits (B, C, *S), 1 to 3 spatial dimensions; probabilities with `activation=None`.
        target: label map (B, 1, *S) of any integer, bool or integral float dtype, or per-class maps (B, C, *S) with
            values from 0 to 1. With one channel, a binary or soft map.
        activation: "softmax" (sigmoid if there is one channel), "sigmoid" or None.
        overlap: "product" or, for soft labels, "min_max" (Wang et al. 2023, https://arxiv.org/abs/2302.05666).
        power: exponent q of the predictions and targets in P and T, at least 1.
        ignore_index: label of ignored voxels. For per-class maps: voxels of that class or, if it is no class,
            voxels whose maps are all zero.
        mask: (B, 1, *S) bool or numbers; voxels where it is zero are ignored.
        groups: (B, 1, *S) integer region numbers from 0; voxels with a negative number are ignored.
        num_groups: number R of regions; read from `groups` if None.
        cross_entropy: whether to compute it (zeros otherwise).
        gamma: focal exponent of the cross-entropy (Lin et al. 2017, https://arxiv.org/abs/1708.02002).
        label_smoothing: share of the label given to all classes alike, in the cross-entropy only.
        confidence: whether to compute the sum of p^(q+1).

    Returns:
        :class:`VoxelSums` of shape (B, C), or (B, C, R) with `groups`.

    Raises:
        TypeError: if a tensor has a dtype that cannot be read as what it stands for.
        ValueError: if shapes do not match, an option is none of its choices, or labels are outside the classes.
            On a GPU wrong labels make the sums NaN at once and the error follows at the next call: no step waits.
    """
    checks.check_input(input)
    checks.check_target(input, target)
    if activation == "softmax" and input.shape[1] == 1:
        activation = "sigmoid"
    spec = checked_spec(activation, overlap, power, cross_entropy, gamma, label_smoothing, confidence)
    rows = run_pass(input, target, spec, ignore_index, mask, groups, num_groups)
    return VoxelSums(rows if groups is not None else rows.squeeze(-1))


def checked_spec(
    activation: str | None,
    overlap: str,
    power: float,
    cross_entropy: bool,
    gamma: float,
    label_smoothing: float,
    confidence: bool,
) -> PassSpec:
    """Check the options of a pass and put them together."""
    checks.check_choice("activation", activation, checks.ACTIVATIONS)
    checks.check_choice("overlap", overlap, checks.OVERLAPS)
    power = checks.check_positive("power", power)
    if power < 1:
        message = f"Expected `power` to be at least 1, but got {power}: below 1 the gradient is infinite at p = 0."
        raise ValueError(message)
    if overlap == "min_max" and power != 1:
        message = (
            f"Expected `power` to be 1 with the soft-label (min_max) overlap, but got {power}: choose one of them."
        )
        raise ValueError(message)
    gamma = checks.check_positive("gamma", gamma, allow_zero=True)
    smoothing = checks.check_fraction("label_smoothing", label_smoothing)
    return PassSpec(activation, overlap, power, cross_entropy, gamma, smoothing, confidence)


def run_pass(
    input: Tensor,
    target: Tensor,
    spec: PassSpec,
    ignore_index: int | None,
    mask: Tensor | None = None,
    groups: Tensor | None = None,
    num_groups: int | None = None,
) -> Tensor:
    """Return the statistics (6, B, C, R) of checked tensors."""
    voxels = flatten_voxels(input, target, ignore_index, mask, groups, num_groups)
    rows = pick_kernel(voxels)(voxels, spec)
    return report_bad_values(rows, target, voxels, ignore_index).to(sum_dtype(input))


def flatten_voxels(
    input: Tensor,
    target: Tensor,
    ignore_index: int | None,
    mask: Tensor | None = None,
    groups: Tensor | None = None,
    num_groups: int | None = None,
) -> Voxels:
    """Bring checked tensors into the kernels' form: plain, flat, labels compact, ignored voxels marked."""
    ignore_index = checks.check_ignore_index(ignore_index)
    keep = None if mask is None else checks.check_side_map("mask", mask, input, integer=False) != 0
    regions = 1
    if groups is not None:
        groups = _plain(checks.check_side_map("groups", groups, input, integer=True))
        regions = num_groups if num_groups is not None else int(groups.max()) + 1 if groups.numel() else 1
        regions = max(regions, 1)
        inside = (groups >= 0) & (groups < regions)
        keep = inside if keep is None else keep & inside
        groups = groups.clamp(0, regions - 1)
    logits = _plain(input).flatten(2)
    target = _plain(target).flatten(2)
    if target.dtype in _BARE_UNSIGNED:
        target = target.long()
    if logits.shape[1] > 1 and target.shape[1] == 1:
        labels, has_ignored = compact_labels(target[:, 0], logits.shape[1], ignore_index, keep)
        return Voxels(logits, labels, None, None, has_ignored, groups, regions)
    valid = valid_voxels(target, ignore_index)
    valid = keep if valid is None else valid[:, 0] if keep is None else valid[:, 0] & keep
    return Voxels(logits, None, target, valid, False, groups, regions)


def _plain(tensor: Tensor) -> Tensor:
    """Drop MONAI's MetaTensor, whose bookkeeping costs time in every operation."""
    return tensor if type(tensor) is Tensor else tensor.as_subclass(Tensor)
