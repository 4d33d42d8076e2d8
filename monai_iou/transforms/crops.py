"""Random crops that reach every lesion of a volume."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral
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
from numpy.typing import NDArray

from monai_iou import checks
from monai_iou.components import BACKGROUND, ComponentRuns, component_chances, component_runs

__all__ = ["RandCropByLesions", "as_array", "find_lesions"]


def find_lesions(
    label: NdarrayOrTensor,
    image: NdarrayOrTensor | None = None,
    image_threshold: float = 0.0,
    labels: Sequence[int] | None = None,
    connectivity: int | None = None,
    ignore_index: int | None = None,
) -> ComponentRuns:
    """Return the voxels of a label's components, and of its background where the image exceeds the threshold.

    Args:
        label: (C, *S), see :func:`monai_iou.components.component_runs`.
        image: (C, *S); the background is where any of its channels exceeds `image_threshold`. None for everywhere.
        image_threshold: see `image`.
        labels: see :func:`monai_iou.components.component_runs`, as the next two.
        connectivity: neighbours that connect.
        ignore_index: value of ignored voxels.

    Raises:
        ValueError: as :func:`monai_iou.components.component_runs`.
    """
    inside = None if image is None else np.any(as_array(image) > image_threshold, axis=0)
    return component_runs(as_array(label), labels, connectivity, ignore_index, inside)


def as_array(values: NdarrayOrTensor) -> NDArray[Any]:
    """Return an image as NumPy's array, which shares its memory where that can be."""
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def window(size: int, jitter: float) -> tuple[int, int]:
    """Return where in a patch a drawn voxel may lie along an axis: the first position, and how many there are."""
    width = min(max(math.floor(jitter * size + 0.5), 1), size)
    return size // 2 - width // 2, width


class RandCropByLesions(Randomizable, TraceableTransform, LazyTransform, MultiSampleTrait):
    """Crop patches so that every lesion can be in the middle of one, whatever its size.

    A positive patch draws a class, each with the same chance, then one of its connected components k with the chance

        n_k^q / sum_j n_j^q        n the number of voxels, q = `size_exponent`,

    then one of its voxels, each with the same chance. Along every axis the voxel comes to lie anywhere in the middle
    `jitter` share of the patch, each position with the same chance; a patch that leaves the volume is moved back into
    it, and still holds the voxel. A negative patch has a background voxel in the middle, each with the same chance, as
    in MONAI's `RandCropByPosNegLabel`. Without foreground all patches are negative, without background all positive.

    MONAI's draws a foreground voxel, so that a lesion is drawn in proportion to its volume, and centres on it.

    Args:
        spatial_size: size of the patches in voxels; where it is not positive, the volume's.
        num_samples: number of patches.
        pos, neg: a patch is positive with the chance pos / (pos + neg).
        size_exponent: q above; 0, every component of a class alike; 1, every voxel of a class alike.
        jitter: 0, the voxel lies exactly in the middle, at `size // 2`; 1, anywhere in the patch.
        labels: classes that positive patches draw: values of a label map (1, *S), channels of per-class maps (C, *S).
            All above 0 by default; `range(C)` for overlapping maps without a map of the background.
        connectivity: 6, 18 or 26 neighbours in 3D, 4 or 8 in 2D; the most by default.
        ignore_index: value of ignored voxels, which no patch is centred on; for maps see `IoULoss`.
        image_threshold: negative patches are centred where an image exceeds it, if one is given.
        allow_smaller: whether a volume smaller than the patch gives a smaller patch instead of an error.
        lazy: whether cropping is lazy, as in MONAI.

    Attributes:
        centers: of the last patches, in voxels of the volume.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is out of its range; when called, the label holds a value that is not a whole number,
            the volume is smaller than the patch, or every voxel of it is ignored.

    Example:
        >>> import torch
        >>> from monai_iou.transforms import RandCropByLesions
        >>> label = torch.zeros(1, 32, 32)
        >>> label[0, 4:20, 4:20], label[0, 30, 30] = 1, 1
        >>> crop = RandCropByLesions((8, 8), num_samples=100, pos=1, neg=0, size_exponent=0).set_random_state(0)
        >>> sum(bool(patch.sum() == 1) for patch in crop(label, label))  # that show the lesion of one voxel
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
        if isinstance(num_samples, bool) or not isinstance(num_samples, Integral) or num_samples < 1:
            message = (
                f"Expected `num_samples` to be a whole number of at least 1, but got {num_samples!r}: it is the number "
                "of patches to cut from a volume."
            )
            raise ValueError(message)
        pos, neg = (checks.check_positive(name, part, allow_zero=True) for name, part in (("pos", pos), ("neg", neg)))
        if pos + neg == 0:
            message = "Expected `pos` or `neg` to be above 0, but got 0 for both: give the ratio of the two kinds."
            raise ValueError(message)
        self.num_samples: int = int(num_samples)
        self.pos_ratio: float = pos / (pos + neg)
        self.size_exponent: float = checks.check_positive(
            "size_exponent", size_exponent, allow_zero=True, remedy="0 draws all components alike, 1 all voxels"
        )
        self.jitter: float = checks.check_fraction(
            "jitter", jitter, allow_one=True, remedy="it is a share of the patch, 0 keeps the voxel in the middle"
        )
        self.labels: list[int] | None = None if labels is None else list(labels)
        self.connectivity: int | None = connectivity
        self.ignore_index: int | None = checks.check_ignore_index(ignore_index)
        self.image_threshold: float = image_threshold
        self.allow_smaller: bool = allow_smaller
        self.centers: list[list[int]] = []
        self._slices: list[list[slice]] = []

    @LazyTransform.lazy.setter  # type: ignore[attr-defined, untyped-decorator]
    def lazy(self, value: bool) -> None:
        """Set whether cropping is lazy."""
        self._lazy = value

    @property
    def requires_current_data(self) -> bool:
        """Whether pending lazy transforms of the image must be applied first: no, as in MONAI's crops."""
        return False

    def randomize(
        self,
        label: NdarrayOrTensor | None = None,
        lesions: Mapping[str, Any] | None = None,
        image: NdarrayOrTensor | None = None,
    ) -> None:
        """Draw the patches' places.

        Args:
            label: (C, *S); not needed with `lesions`.
            lesions: what `LesionIndicesd` stored of the label; found from `label` if None.
            image: (C, *S), see `image_threshold`; without effect on `lesions`.
        """
        if lesions is not None:
            runs = ComponentRuns.from_item(lesions)
            _check_shape(label, runs.shape)
        elif label is None:
            message = "Expected `label` or `lesions`, but got neither: the patches' places are drawn from one of them."
            raise ValueError(message)
        else:
            runs = find_lesions(label, image, self.image_threshold, self.labels, self.connectivity, self.ignore_index)
        size = self._patch_size(runs.shape)
        starts = [self._start(number, center, runs.shape, size) for number, center in self._voxels(runs)]
        self.centers = [[a + side // 2 for a, side in zip(start, size, strict=True)] for start in starts]
        self._slices = [[slice(a, a + side) for a, side in zip(start, size, strict=True)] for start in starts]

    def _patch_size(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        size = fall_back_tuple(self.spatial_size, default=shape)
        if not self.allow_smaller and any(side > length for side, length in zip(size, shape, strict=True)):
            message = (
                f"Expected a volume of at least the patch's size {tuple(size)}, but got {shape}: pad the volume, or "
                "set allow_smaller=True."
            )
            raise ValueError(message)
        return tuple(min(int(side), length) for side, length in zip(size, shape, strict=True))

    def _voxels(self, runs: ComponentRuns) -> list[tuple[int, bool]]:
        """Draw a voxel for each patch: its flat index, and whether it is to be exactly in the middle."""
        sizes = runs.sizes
        lesions = int(runs.classes[:1].tolist() == [BACKGROUND])  # where the background is, it comes first
        if len(sizes) == 0:
            message = (
                "Expected a volume with a voxel to centre a patch on, but all of them are ignored or, as background, "
                "not above `image_threshold`: leave this volume out."
            )
            raise ValueError(message)
        chances = component_chances(sizes[lesions:], runs.classes[lesions:], self.size_exponent).cumsum()
        positive = 0.0 if len(chances) == 0 else self.pos_ratio if lesions else 1.0
        drawn = []
        for _ in range(self.num_samples):
            component, centred = 0, True
            if self.R.rand() < positive:
                place = int(np.searchsorted(chances, self.R.rand() * chances[-1], side="right"))
                component, centred = lesions + min(place, len(chances) - 1), False
            number = int(runs.bounds[component]) + int(self.R.randint(int(sizes[component]), dtype=np.int64))
            drawn.append((runs.voxel(number), centred))
        return drawn

    def _start(self, index: int, centred: bool, shape: tuple[int, ...], size: tuple[int, ...]) -> list[int]:
        """Return the first voxel of the patch in which a drawn voxel lies, inside the volume."""
        start = []
        for side, length, at in zip(size, shape, np.unravel_index(index, shape), strict=True):
            first, width = window(side, 0.0 if centred else self.jitter)
            start.append(min(max(int(at) - first - int(self.R.randint(width)), 0), length - side))
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
        """Return the patches of `img` (C, *S).

        Args:
            img: what is cropped.
            label: see :meth:`randomize`, as the next two.
            lesions: what `LesionIndicesd` stored.
            image: where the background may be.
            randomize: whether to draw new places; False crops at the last ones.
            lazy: overrides the transform's own.
        """
        if randomize:
            self.randomize(label, lesions, image)
        lazy = self.lazy if lazy is None else lazy
        patches = []
        for number, (center, slices) in enumerate(zip(self.centers, self._slices, strict=True)):
            patch = SpatialCrop(roi_slices=slices, lazy=lazy)(img)
            if get_track_meta() and isinstance(patch, MetaTensor):
                patch.meta["patch_index"], patch.meta["crop_center"] = number, center
                self.push_transform(patch, replace=True, lazy=lazy)
            patches.append(patch)
        return patches


def _check_shape(label: NdarrayOrTensor | None, shape: tuple[int, ...]) -> None:
    if label is None:
        return
    found = tuple(label.peek_pending_shape() if isinstance(label, MetaTensor) else label.shape[1:])
    if found != shape:
        message = (
            f"Expected the label to have the shape {shape} that its lesions were found in, but got {found}: put "
            "LesionIndicesd behind all transforms that change the shape."
        )
        raise ValueError(message)
