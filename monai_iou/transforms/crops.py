"""Random crops that can be centred on every lesion of a volume."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from monai.config.type_definitions import NdarrayOrTensor
from monai.data.meta_obj import get_track_meta
from monai.data.meta_tensor import MetaTensor
from monai.transforms.croppad.array import SpatialCrop
from monai.transforms.inverse import TraceableTransform
from monai.transforms.traits import MultiSampleTrait
from monai.transforms.transform import LazyTransform, Randomizable
from monai.utils.enums import TransformBackends
from monai.utils.misc import fall_back_tuple

from monai_iou import checks
from monai_iou.components import BACKGROUND, ComponentRuns, component_chances
from monai_iou.transforms.lesions import check_shape, check_unmoved, find_lesions, up_to_date
from monai_iou.transforms.shapes import spatial_shape

__all__ = ["RandCropByLesions"]


def window(size: int, jitter: float) -> tuple[int, int]:
    """Return the range of positions that a drawn voxel may have in a patch of `size` voxels: its start and length."""
    width = min(max(math.floor(jitter * size + 0.5), 1), size)
    return size // 2 - width // 2, width


class RandCropByLesions(Randomizable, TraceableTransform, LazyTransform, MultiSampleTrait):
    """Crop patches that can be centred on every lesion, whatever its size.

    For a positive patch, a class is drawn uniformly, then one of its connected components k with the probability

        n_k^q / sum_j n_j^q        (n: number of voxels, q: `size_exponent`),

    and then one of the voxels of this component, uniformly. Along every axis, the position of this voxel in the patch
    is drawn uniformly from the central fraction `jitter` of the patch. A patch that would extend beyond the volume is
    shifted back into it and still contains the voxel. A negative patch is centred on a uniformly drawn background
    voxel, as in MONAI's `RandCropByPosNegLabel`. Without foreground all patches are negative, and without background
    all are positive.

    In contrast, MONAI's transform draws a foreground voxel uniformly, so that the probability of a lesion is
    proportional to its volume, and centres the patch on it.

    Args:
        spatial_size: size of the patches in voxels; where it is not positive, the size of the volume.
        num_samples: number of patches.
        pos, neg: a patch is positive with the probability pos / (pos + neg).
        size_exponent: the exponent q above. With 0, all components of a class are equally likely; with 1, all voxels.
        jitter: fraction from 0 to 1. With 0, the voxel is exactly at the centre, `size // 2`; with 1, anywhere in the
            patch.
        labels: classes for positive patches: values of a label map (1, *S), or channels of per-class maps (C, *S). By
            default all above 0; use `range(C)` for overlapping maps without a background map.
        connectivity: 6, 18 or 26 neighbours in 3D, 4 or 8 in 2D; by default the largest.
        ignore_index: value of ignored voxels, on which no patch is centred; for per-class maps see `IoULoss`.
        image_threshold: if an image is given, negative patches are centred on voxels where it exceeds this value.
        allow_smaller: whether a volume that is smaller than the patch gives a smaller patch instead of an error.
        lazy: whether cropping is lazy, as in MONAI.

    Attributes:
        centers: the centres of the last patches, in voxels of the volume.

    Raises:
        TypeError: if a number or an integer is something else, or `labels` is not a list of integers.
        ValueError: if an argument is out of range; when called, if the label contains a value that is not a whole
            number, the volume is smaller than the patch or contains no voxel on which to centre a patch, an image and
            the label differ in spatial shape, or `lesions` are not where they were found.

    Example:
        >>> import torch
        >>> from monai_iou.transforms import RandCropByLesions
        >>> label = torch.zeros(1, 32, 32)
        >>> label[0, 4:20, 4:20], label[0, 30, 30] = 1, 1
        >>> crop = RandCropByLesions((8, 8), num_samples=100, pos=1, neg=0, size_exponent=0).set_random_state(0)
        >>> sum(bool(patch.sum() == 1) for patch in crop(label, label))  # patches with the lesion of one voxel
        52
    """

    backend: ClassVar[list[TransformBackends]] = [TransformBackends.TORCH]  # type: ignore[misc]

    def __init__(
        self,
        spatial_size: Sequence[int] | int,
        num_samples: int = 1,
        pos: float = 1.0,
        neg: float = 1.0,
        size_exponent: float = 0.5,
        jitter: float = 0.5,
        labels: Sequence[int] | None = None,
        connectivity: int | None = None,
        ignore_index: int | None = None,
        image_threshold: float = 0.0,
        allow_smaller: bool = False,
        lazy: bool = False,
    ) -> None:
        LazyTransform.__init__(self, lazy)
        self.spatial_size = spatial_size
        remedy = "give the number of patches to crop from each volume"
        self.num_samples: int = checks.check_count("num_samples", num_samples, remedy)
        pos, neg = (checks.check_positive(name, part, allow_zero=True) for name, part in (("pos", pos), ("neg", neg)))
        if pos + neg == 0:
            message = "Expected `pos` or `neg` to be above 0, but got 0 for both: give the ratio of the two kinds."
            raise ValueError(message)
        self.pos_ratio: float = pos / (pos + neg)
        self.size_exponent: float = checks.check_positive(
            "size_exponent",
            size_exponent,
            allow_zero=True,
            remedy="give 0 to draw all components equally often, or 1 to draw all voxels equally often",
        )
        self.jitter: float = checks.check_fraction(
            "jitter", jitter, allow_one=True, remedy="give a fraction of the patch, or 0 to centre it on the voxel"
        )
        self.labels: list[int] | None = checks.check_class_numbers("labels", labels)
        self.connectivity: int | None = checks.check_connectivity(connectivity)
        self.ignore_index: int | None = checks.check_ignore_index(ignore_index)
        self.image_threshold: float = checks.check_number("image_threshold", image_threshold)
        self.allow_smaller: bool = allow_smaller
        self.centers: list[list[int]] = []
        self._slices: list[list[slice]] = []
        self._shape: tuple[int, ...] = ()  # of the volume in which the patches lie

    @LazyTransform.lazy.setter  # type: ignore[attr-defined, untyped-decorator]
    def lazy(self, value: bool) -> None:
        """Set whether cropping is lazy."""
        self._lazy = value

    @property
    def requires_current_data(self) -> bool:
        """Whether pending lazy transforms of the image must be applied first: False, as in MONAI's crops."""
        return False

    def randomize(
        self,
        label: NdarrayOrTensor | None = None,
        lesions: Mapping[str, Any] | None = None,
        image: NdarrayOrTensor | None = None,
    ) -> None:
        """Draw the positions of the patches.

        Args:
            label: (C, *S); not needed with `lesions`, which are compared with it.
            lesions: the result of `LesionIndicesd` for the label; computed from `label` if None.
            image: (C, *S), see `image_threshold`; it has no effect on `lesions`.

        Raises:
            ValueError: if neither `label` nor `lesions` is given, or see the class.
        """
        if lesions is not None:
            runs = ComponentRuns.from_item(lesions)
            if label is not None:
                check_shape(label, runs.shape)
        elif label is None:
            message = (
                "Expected `label` or `lesions`, but got neither: pass one of them, from which the patches' positions "
                "are drawn."
            )
            raise ValueError(message)
        else:
            runs = find_lesions(label, image, self.image_threshold, self.labels, self.connectivity, self.ignore_index)
        size = self._patch_size(runs.shape)
        drawn = self._voxels(runs)
        if lesions is not None and label is not None:
            indices, classes = np.array(drawn).T
            check_unmoved(label, np.stack(np.unravel_index(indices, runs.shape), 1), classes, self.ignore_index)
        self._shape = runs.shape
        starts = [self._start(index, number == BACKGROUND, runs.shape, size) for index, number in drawn]
        self.centers = [[a + side // 2 for a, side in zip(start, size, strict=True)] for start in starts]
        self._slices = [[slice(a, a + side) for a, side in zip(start, size, strict=True)] for start in starts]

    def _patch_size(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        given = np.atleast_1d(self.spatial_size)
        if np.ndim(self.spatial_size) and len(given) != len(shape):
            message = (
                f"Expected `spatial_size` to be a number, or one for each axis of a volume {shape}, but got "
                f"{tuple(given.tolist())}: correct it, or add the channel dimension if the image and the label lack it."
            )
            raise ValueError(message)
        size = fall_back_tuple(self.spatial_size, default=shape)
        if not self.allow_smaller and any(side > length for side, length in zip(size, shape, strict=True)):
            message = (
                f"Expected a volume of at least the patch's size {tuple(size)}, but got {shape}: pad the volume or "
                "set allow_smaller=True."
            )
            raise ValueError(message)
        return tuple(min(int(side), length) for side, length in zip(size, shape, strict=True))

    def _voxels(self, runs: ComponentRuns) -> list[tuple[int, int]]:
        """Draw a voxel for each patch; return its flat index and its class."""
        sizes = runs.sizes
        lesions = int(runs.classes[:1].tolist() == [BACKGROUND])  # if there is background, it comes first
        if len(sizes) == 0:
            message = (
                "Expected a volume with a voxel to centre a patch on, but all voxels are ignored, or are background "
                "and do not exceed `image_threshold`: leave this volume out."
            )
            raise ValueError(message)
        chances = component_chances(sizes[lesions:], runs.classes[lesions:], self.size_exponent).cumsum()
        positive = 0.0 if len(chances) == 0 else self.pos_ratio if lesions else 1.0
        drawn = []
        for _ in range(self.num_samples):
            component = 0
            if self.R.rand() < positive:
                place = int(np.searchsorted(chances, self.R.rand() * chances[-1], side="right"))
                component = lesions + min(place, len(chances) - 1)
            number = int(runs.bounds[component]) + int(self.R.randint(int(sizes[component]), dtype=np.int64))
            drawn.append((runs.voxel(number), int(runs.classes[component])))
        return drawn

    def _start(self, index: int, centred: bool, shape: tuple[int, ...], size: tuple[int, ...]) -> list[int]:
        """Return the first voxel of a patch that contains the drawn voxel and lies inside the volume."""
        start = []
        for side, length, voxel in zip(size, shape, np.unravel_index(index, shape), strict=True):
            first, width = window(side, 0.0 if centred else self.jitter)
            start.append(min(max(int(voxel) - first - int(self.R.randint(width)), 0), length - side))
        return start

    def __call__(
        self,
        img: torch.Tensor,
        label: NdarrayOrTensor | None = None,
        lesions: Mapping[str, Any] | None = None,
        image: NdarrayOrTensor | None = None,
        randomize: bool = True,
        lazy: bool | None = None,
    ) -> list[torch.Tensor]:
        """Return the patches of an image, a list of (C, *size), each with memory of its own unless it is lazy.

        Args:
            img: the image to crop, (C, *S).
            label: see :meth:`randomize`.
            lesions: see :meth:`randomize`.
            image: see :meth:`randomize`.
            randomize: whether to draw new positions; False crops at the last ones.
            lazy: overrides the option of the transform.

        Raises:
            ValueError: see :meth:`randomize`, or if `img` has another spatial shape than the label or `lesions`.
        """
        if randomize:
            self.randomize(label, lesions, image)
        shape = spatial_shape(img)
        if self._slices and shape != self._shape:
            message = (
                f"Expected the image to have the shape {self._shape} of the label, in which the patches were drawn, "
                f"but got {shape}: put both on one grid, each with its channel dimension."
            )
            raise ValueError(message)
        lazy = self.lazy if lazy is None else lazy
        img = img if lazy else up_to_date(img)
        patches = []
        for number, (center, slices) in enumerate(zip(self.centers, self._slices, strict=True)):
            patch = SpatialCrop(roi_slices=slices, lazy=lazy)(img)
            patch = patch if lazy else patch.clone()  # a view would hold the volume, and change with it
            if get_track_meta() and isinstance(patch, MetaTensor):
                patch.meta["patch_index"], patch.meta["crop_center"] = number, center
                self.push_transform(patch, replace=True, lazy=lazy)
            patches.append(patch)
        return patches
