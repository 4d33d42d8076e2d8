"""Per-class sums over voxels, from which every region loss and cross-entropy is computed."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from monai_iou.voxels.formulas import union
from monai_iou.voxels.spec import BACKGROUND_ENTROPY, CONFIDENCE, COUNT, CROSS_ENTROPY, INTERSECTION, PREDICTION, TARGET

_NO_VOXEL = 1e-20


@dataclass(frozen=True, eq=False)
class VoxelSums:
    """Sums over voxels for each image and class, (B, C), or (B, C, R) with R regions.

    They can be added over images, regions and ranks. p is the predicted probability of the class, y the label, and q
    the power.

    Attributes:
        rows: (7, B, C[, R]), the sums below in the order of :mod:`monai_iou.voxels.spec`.
        partly_labelled: whether a count of 0 means that a class was not annotated and is left out of the means. After a
            sum over ranks a tensor, () bool, because any rank may have said so and no GPU is waited for.
        intersection: I, sum of p y (or of min(p, y)).
        prediction: P, sum of p^q.
        target: T, sum of y^q.
        cross_entropy: E, sum of -ln p over the voxels of the class; with a sigmoid, or with one channel, sum of the
            binary cross-entropy over all voxels.
        foreground_entropy, background_entropy: the parts of a binary E from the voxels of the class and from the other
            voxels, if a loss requests them.
        confidence: Q, sum of p^(q+1); 0 if it was not requested.
        count: N, number of voxels that are not ignored.

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
    partly_labelled: bool | Tensor = False

    @property
    def _parts(self) -> Tensor | tuple[Tensor, ...]:
        return self.rows if torch.compiler.is_compiling() else self._unbound

    @functools.cached_property
    def _unbound(self) -> tuple[Tensor, ...]:
        return self.rows.unbind()  # whose gradients are joined at once; those of an index each by itself

    @property
    def intersection(self) -> Tensor:
        """I, sum of p y (or of min(p, y))."""
        return self._parts[INTERSECTION]

    @property
    def prediction(self) -> Tensor:
        """P, sum of p^q."""
        return self._parts[PREDICTION]

    @property
    def target(self) -> Tensor:
        """T, sum of y^q."""
        return self._parts[TARGET]

    @property
    def cross_entropy(self) -> Tensor:
        """E, sum of -ln p over the voxels of the class; with a sigmoid or one channel, of the binary cross-entropy."""
        return self._parts[CROSS_ENTROPY] + self._parts[BACKGROUND_ENTROPY]

    @property
    def foreground_entropy(self) -> Tensor:
        """Part of E from the voxels of the class, if it was requested separately; otherwise E."""
        return self._parts[CROSS_ENTROPY]

    @property
    def background_entropy(self) -> Tensor:
        """Part of E from the other voxels, if it was requested separately; otherwise 0."""
        return self._parts[BACKGROUND_ENTROPY]

    @property
    def confidence(self) -> Tensor:
        """Q, sum of p^(q+1); 0 if it was not requested."""
        return self._parts[CONFIDENCE]

    @property
    def count(self) -> Tensor:
        """N, number of voxels that are not ignored."""
        return self._parts[COUNT]

    @property
    def present(self) -> Tensor:
        """Which classes the reference has, bool; NaN, which wrong labels leave on a GPU, shows in what counts."""
        return ~(self.target <= 0)

    @property
    def annotated(self) -> Tensor:
        """Which classes were annotated, bool: all whose count is not 0, so that NaN shows here as well."""
        return ~(self.count <= 0)

    @property
    def labelled(self) -> Tensor | None:
        """Which classes are not left out of the means, bool; None if it is known without a look that all are in."""
        if isinstance(self.partly_labelled, Tensor):
            return self.annotated | ~self.partly_labelled
        return self.annotated if self.partly_labelled else None

    @property
    def union(self) -> Tensor:
        """U = P + T - I."""
        return union(self.intersection, self.prediction, self.target)

    def __add__(self, other: VoxelSums) -> VoxelSums:
        """Add the sums of other voxels of the same images.

        Raises:
            ValueError: the sums are of other numbers of images, classes or regions.
        """
        if not isinstance(other, VoxelSums):
            return NotImplemented
        if self.rows.shape != other.rows.shape:  # torch would count one image for each of several
            message = (
                f"Expected sums of the same images, classes and regions, shape {tuple(self.rows.shape[1:])}, but got "
                f"{tuple(other.rows.shape[1:])}: add over the images first, by `over_batch()`."
            )
            raise ValueError(message)
        return VoxelSums(self.rows + other.rows, self.partly_labelled | other.partly_labelled)

    def over_batch(self) -> VoxelSums:
        """Add over the images: (1, C[, R])."""
        return self if self.rows.shape[1] == 1 else replace(self, rows=self.rows.sum(1, keepdim=True))

    def over_groups(self) -> VoxelSums:
        """Add over the regions: (B, C)."""
        return replace(self, rows=self.rows.sum(3))

    def without_background(self) -> VoxelSums:
        """Return the sums without class 0."""
        return replace(self, rows=self.rows[:, :, 1:])

    def only(self, labelled: Tensor) -> VoxelSums:
        """Set the sums of pairs of image and class that were not annotated to 0; `labelled` is (B, C) bool."""
        return VoxelSums(torch.where(labelled, self.with_marks().rows, 0), partly_labelled=True)

    def with_marks(self) -> VoxelSums:
        """Give every annotated pair a tiny count, which tells it from others also where all of its voxels are ignored.

        It vanishes beside any voxel. Before a sum over ranks, every rank does so: another one may be partly labelled.
        """
        if self.partly_labelled is not False:
            return self  # done by `only`
        mark = torch.zeros_like(self.rows[:, :1, :1])
        mark[COUNT] = _NO_VOXEL
        return VoxelSums(self.rows + mark)
