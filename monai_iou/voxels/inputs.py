"""The voxels of a pass: checked and flattened, whole or in tiles."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from monai_iou.voxels.compact_labels import IGNORED, compact_labels


@dataclass
class Findings:
    """What a kernel found out about a target while it read it.

    Attributes:
        maps_are_shares: whether all values that count are from 0 to 1; None if it did not look.
    """

    maps_are_shares: bool | None = None


@dataclass(frozen=True)
class Voxels:
    """A checked and flattened input of the pass.

    Attributes:
        logits: (B, C, N), any float dtype.
        labels: (B, N) class numbers of any dtype that float32 holds them in, or None if `maps` are given.
        maps: (B, C, N) per-class maps, or None.
        valid: (B, N) bool, False at ignored voxels; None if no voxel is ignored. With labels, ignored voxels are
            marked in them (:data:`IGNORED`) if `has_ignored`, labels are uint8 or int16, and `valid` is None.
        has_ignored: whether labels hold marks of ignored voxels.
        groups: integer region numbers, (B, 1, N), or (B, C, N) where each class has its own; or None. With labels as
            given, voxels whose number is out of range are ignored; otherwise all numbers are in range.
        regions: number R of regions, 1 without `groups`.
        as_given: whether labels are still what the user passed, values of any kind in any dtype: ignored where they are
            `ignore_index` or `valid` is False. Kernels that read them otherwise begin with :meth:`compact`.
        ignore_index: label of ignored voxels of labels as given.
        in_range: whether all region numbers are known to be in range, so that no kernel's form needs to look.
        findings: where a kernel may write what it found out.
    """

    logits: Tensor
    labels: Tensor | None
    maps: Tensor | None
    valid: Tensor | None
    has_ignored: bool
    groups: Tensor | None
    regions: int
    as_given: bool = False
    ignore_index: int | None = None
    findings: Findings | None = None
    in_range: bool = False

    def compact(self) -> Voxels:
        """Return the same voxels with labels in the kernels' form."""
        if not self.as_given or self.labels is None:
            return self
        groups, keep = self.groups, self.valid
        if groups is not None and not self.in_range:
            groups, inside = in_regions(groups, self.regions)
            keep = both_kept(keep, inside)
        labels, has_ignored = compact_labels(self.labels, self.logits.shape[1], self.ignore_index, keep)
        return Voxels(self.logits, labels, None, None, has_ignored, groups, self.regions)

    def tile(self, image: int | slice, voxels: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return :meth:`Tile.read` of a part: (..., C, n), (..., C, n) and (..., 1, n)."""
        assert not self.as_given
        sides = (self.labels, self.valid)
        labels, valid = (None if side is None else side[image, voxels].unsqueeze(-2) for side in sides)
        maps = None if self.maps is None else self.maps[image, :, voxels]
        tile = Tile(self.logits[image, :, voxels], labels, maps, valid, self.class_numbers(), self.has_ignored)
        return tile.read(dtype)

    def part(self, image: int, voxels: slice) -> Voxels:
        """Return some voxels of an image as a batch of one."""
        assert not self.as_given
        chosen = slice(image, image + 1)
        logits, maps = (None if side is None else side[chosen, :, voxels] for side in (self.logits, self.maps))
        labels, valid = (None if side is None else side[chosen, voxels] for side in (self.labels, self.valid))
        assert logits is not None
        return Voxels(logits, labels, maps, valid, self.has_ignored, None, 1)

    def tiles(self, size: int) -> list[list[Tile]]:
        """Return every image's voxels in tiles of a size, in order.

        It is done by few calls: threads would wait for each other.
        """

        def cut(part: Tensor | None) -> Sequence[Iterable[Tensor | None]]:
            if part is None:
                return [itertools.repeat(None)] * len(self.logits)
            return [image.split(size, -1) for image in part.unbind()]

        labels, valid = (cut(None if part is None else part.unsqueeze(1)) for part in (self.labels, self.valid))
        logits, maps = [image.split(size, -1) for image in self.logits.unbind()], cut(self.maps)
        numbers = self.class_numbers()
        return [
            [Tile(*parts, numbers, self.has_ignored) for parts in zip(*image, strict=False)]
            for image in zip(logits, labels, maps, valid, strict=True)
        ]

    def class_numbers(self) -> Tensor:
        """Return 0, 1, ... as (C, 1), in the dtype of the sums."""
        dtype = sum_dtype(self.logits)
        return torch.arange(self.logits.shape[1], dtype=dtype, device=self.logits.device).unsqueeze(-1)


@dataclass(frozen=True)
class Tile:
    """Some voxels of :class:`Voxels`: logits and maps (..., C, n), labels and valid (..., 1, n), classes (C, 1)."""

    logits: Tensor
    labels: Tensor | None
    maps: Tensor | None
    valid: Tensor | None
    classes: Tensor
    has_ignored: bool

    def read(self, dtype: torch.dtype, out: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return logits and targets (..., C, n), and valid voxels (..., 1, n), 1 or 0, if some are not.

        Ignored voxels are cleared: all their targets are 0, and logits that are NaN or infinite become 0. `out` takes
        the targets of labels; of maps they may lie elsewhere.
        """
        logits = self.logits if self.logits.dtype == dtype else self.logits.to(dtype)
        if self.labels is None:
            assert self.maps is not None
            target = self.maps.to(dtype)
            if self.valid is None:
                return logits, target, None
            return _finite(logits, self.valid), _finite(target, self.valid) * self.valid, self.valid.to(dtype)
        numbers = self.labels.to(dtype)
        target = numbers.new_empty(logits.shape) if out is None else out
        torch.eq(numbers, self.classes, out=target)  # numbers at once, with no bools between: four times as fast
        if not self.has_ignored:
            return logits, target, None
        valid = self.labels != IGNORED[self.labels.dtype]
        return _finite(logits, valid), target, valid.to(dtype)


def _finite(values: Tensor, valid: Tensor) -> Tensor:
    """Set ignored values to 0 where a product with 0 would not."""
    return values if surely_finite(values) else torch.where(valid, values, 0)


def count_regions(groups: Tensor, num_groups: int | None) -> int:
    """Return how many regions there are; without `num_groups`, a GPU is waited for."""
    if num_groups is None:
        num_groups = int(groups.max()) + 1 if groups.numel() else 1
    return max(num_groups, 1)


def in_regions(groups: Tensor, regions: int) -> tuple[Tensor, Tensor | None]:
    """Return region numbers in range, and which voxels (B, N) are in a region, None if all are."""
    if groups.device.type == "cpu" and groups.numel() and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in groups.aminmax())
        if low >= 0 and high < regions:
            return groups, None
    most = min(regions - 1, torch.iinfo(groups.dtype).max)  # torch lets a number beyond a narrow dtype wrap round
    return groups.clamp(0, most), ((groups >= 0) & (groups <= most)).all(1)


def both_kept(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Return which voxels both masks keep; None keeps all."""
    return second if first is None else first if second is None else first & second


def saveable(values: Tensor) -> Tensor:
    """Return values that may be saved for the backward pass: those made in inference mode may not, but a copy may."""
    if torch.compiler.is_compiling():
        return values
    return values.clone() if values.is_inference() and torch.is_grad_enabled() else values


def plain(tensor: Tensor) -> Tensor:
    """Drop MONAI's MetaTensor, whose bookkeeping costs time in every operation."""
    return tensor if type(tensor) is Tensor else tensor.as_subclass(Tensor)


def surely_finite(values: Tensor) -> bool:
    """Return whether no value is NaN or infinite, where that is cheap to know: a CPU sums faster than it selects."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling() and bool(values.detach().sum().isfinite())


def sum_dtype(logits: Tensor) -> torch.dtype:
    """Return the dtype in which probabilities are computed and sums returned: float32 or better."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def total_dtype(logits: Tensor) -> torch.dtype:
    """Return the dtype in which a kernel adds up and hands over its totals: float64 where the device has it.

    Voxel counts stay exact in it, which the check of the labels relies on.
    """
    return torch.float32 if logits.device.type == "mps" else torch.float64
