"""The decisions of a training run that depend on its data: spacing, patch, network size, normalisation.

`Plan` is plain data: the bundle's configs read it (`"$@plan.strides"`), and `model.json` stores it next to `model.pt`,
so that evaluation and inference prepare images exactly as training did, without the training data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from numbers import Integral
from typing import Any

import numpy as np

from monai_iou.datasets.cases import CaseFacts
from monai_iou.datasets.folder import SegmentationFolder
from monai_iou.datasets.scheme import LabelScheme
from monai_iou.planning.intensity import intensity_rule
from monai_iou.planning.levels import MIN_BOTTLENECK, network_size

__all__ = ["Plan", "make_plan", "network_size"]


ANISOTROPIC = (
    3.0  # ratio of the longest to the shortest side of a voxel from which these axes are not rotated into each other
)


@dataclass(frozen=True)
class Plan:
    """The decisions of a training run.

    Attributes:
        modalities: one name per input channel.
        labels: value in the label files -> name, background 0 first; without regions in the order of the network's
            classes.
        pixdim: target spacing in mm, in RAS order.
        patch_size: training crop and inference window in voxels; each side a multiple of the network's total stride.
        channels: number of channels of each level of the U-Net.
        strides: stride of each level, one number per axis.
        intensity: for each channel {"kind": "zscore"}, {"kind": "none"}, or
            {"kind": "ct", "lower", "upper", "mean", "std"}.
        trained: names of the cases that the model was trained on.
        trained_images: hashes that identify their image files, whatever their names; see `image_identity`.
        regions: name -> label values of classes that overlap, in the order of the network's classes from 1; empty if
            classes exclude each other.
        regions_order: the value that a mask gets for each region; later regions are written over earlier ones.
        ignore: label value of voxels that are left out; None if there is none.
        soft_labels: whether label files hold shares of the classes.
        mean_of_raters: whether the training's target is the mean of several raters' labels.
        partly_labelled: whether a class was not annotated in some case.
        spatial_dims: 3, or 2 for patches of one slice, which the network takes for images.
        network: values of the bundle's keys `network`, `deep_supervision` and `attention`, and the `definition` of the
            user's own `network_def`; {} until they are known.
    """

    modalities: tuple[str, ...]
    labels: dict[int, str]
    pixdim: tuple[float, ...]
    patch_size: tuple[int, ...]
    channels: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    intensity: tuple[dict[str, Any], ...]
    trained: tuple[str, ...] = ()
    trained_images: tuple[str, ...] = ()
    regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    regions_order: tuple[int, ...] = ()
    ignore: int | None = None
    soft_labels: bool = False
    mean_of_raters: bool = False
    partly_labelled: bool = False
    spatial_dims: int = 3
    network: Mapping[str, Any] = field(default_factory=dict)

    @property
    def flat_axis(self) -> int | None:
        """Axis along which the patches of two dimensions are one voxel thick, None with three dimensions."""
        return self.patch_size.index(1) if self.spatial_dims == 2 else None

    @property
    def in_channels(self) -> int:
        """Number of channels of an image."""
        return len(self.modalities)

    @property
    def out_channels(self) -> int:
        """Number of classes of the network, including the background."""
        return 1 + len(self.class_names)

    @property
    def label_values(self) -> list[int]:
        """Values of the label files; without regions, in the order of the network's classes."""
        return list(self.labels)

    @property
    def classes(self) -> list[int]:
        """The network's classes 0, 1, ..., out_channels - 1."""
        return list(range(self.out_channels))

    @property
    def scheme(self) -> LabelScheme:
        """What the values in label files mean."""
        return LabelScheme(self.labels, self.regions, self.regions_order, self.ignore, self.soft_labels)

    @property
    def class_names(self) -> list[str]:
        """Names of the foreground classes, in the order of the network's classes from 1."""
        return [name for name, _ in self.scheme.classes]

    @property
    def exclusive(self) -> bool:
        """Whether a voxel belongs to one class: softmax and argmax; else sigmoid and a threshold for each class."""
        return not self.regions

    @property
    def soft(self) -> bool:
        """Whether the training's target holds shares of the classes instead of whole voxels."""
        return self.soft_labels or self.mean_of_raters

    @property
    def has_maps(self) -> bool:
        """Whether the training's target is maps of all classes instead of a label map."""
        return self.soft or not self.exclusive

    @property
    def label_bytes(self) -> int:
        """Bytes of a voxel of the training's target: float32 where it is soft, else the smallest integer type."""
        number = 4 if self.soft else 1 if self.has_maps or len(self.labels) + (self.ignore is not None) <= 256 else 2
        return number * (self.out_channels if self.has_maps else 1)

    @property
    def ignore_index(self) -> int | None:
        """What losses, metrics and crops take for an ignored voxel: a number that is no class, None without any.

        A label map holds it there, and per-class maps are all 0 there.
        """
        return None if self.ignore is None else self.out_channels

    @property
    def label_mode(self) -> str:
        """How labels are interpolated."""
        return "bilinear" if self.soft_labels else "nearest"

    @property
    def is_anisotropic(self) -> bool:
        """Whether a voxel is at least 3 times as long along one axis as along another, of those that are trained on."""
        sides = [side for axis, side in enumerate(self.pixdim) if axis != self.flat_axis]
        return max(sides) >= ANISOTROPIC * min(sides)

    def rotations(self, largest: float) -> list[float]:
        """Return the largest rotation about each axis in radians; for anisotropic voxels only in the similar plane.

        MONAI rotates grids of voxels, so that a rotation out of the plane of thick slices would distort the anatomy.

        Example:
            >>> Plan((), {}, (1.0, 1.0, 5.0), (), (), (), ()).rotations(0.5)
            [0.0, 0.0, 0.5]
        """
        return [largest if self._mix(*plane) else 0.0 for plane in ((1, 2), (0, 2), (0, 1))]

    def shears(self, largest: float) -> list[float]:
        """Return MONAI's six shears (x by y and z, y by x and z, z by x and y), restricted as the rotations are."""
        pairs = ((0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1))
        return [largest if self._mix(*pair) else 0.0 for pair in pairs]

    def _mix(self, first: int, second: int) -> bool:
        """Whether two axes may be rotated into each other: any two, or of anisotropic voxels the two similar ones."""
        if self.flat_axis is not None:
            return not self.is_anisotropic and self.flat_axis not in (first, second)
        if not self.is_anisotropic:
            return True
        short, middle, long = sorted(range(3), key=lambda axis: self.pixdim[axis])
        ratios = self.pixdim[middle] / self.pixdim[short], self.pixdim[long] / self.pixdim[middle]
        pair = {short, middle} if ratios[0] <= ratios[1] else {middle, long}
        return min(ratios) < ANISOTROPIC and {first, second} == pair

    def to_json(self) -> str:
        """Return the plan as JSON text."""
        return json.dumps(asdict(self), indent=2)


def make_plan(
    folder: SegmentationFolder | None,
    facts: Sequence[CaseFacts],
    patch_size: Sequence[int],
    pixdim: Sequence[float] | None = None,
    base_channels: int = 16,
    *,
    full_resolution: bool = False,
    raters: str = "mean",
    spatial_dims: int | None = None,
    trained: Sequence[CaseFacts] | None = None,
) -> Plan:
    """Decide spacing, patch, network size and normalisation from the labelled cases.

    Args:
        folder: the dataset, or None for the plan of the shipped metadata (one channel, background and lesion).
        facts: facts of the labelled cases, see `SegmentationFolder.check`. All folds have them in common, so that their
            models have one network and can be an ensemble.
        patch_size: desired patch in voxels at the target spacing, 3 integers. No side exceeds that of the largest
            volume, and each is rounded up to a multiple of the network's total stride.
        pixdim: target spacing in mm in RAS order; None takes the median over the cases.
        base_channels: number of channels of the first level.
        full_resolution: see `network_size`.
        raters: "mean" trains on the mean of several raters' labels, "draw" on one of them, drawn for each epoch.
        spatial_dims: 2 trains on slices, those of one voxel or else along the axis with the longest voxels; 3 on
            volumes; None on slices if every volume is one.
        trained: those of `facts` that are trained on, from whose intensities images are normalised; None for all.

    Raises:
        ValueError: `patch_size`, `pixdim` or `base_channels` cannot be used; a patch of one voxel cannot, for instance.
    """
    if not isinstance(base_channels, Integral) or isinstance(base_channels, bool) or base_channels < 1:
        message = f"Expected `base_channels` to be a positive integer, but got {base_channels!r}: take 16."
        raise ValueError(message)
    if pixdim is None or str(pixdim).lower() in ("null", "none"):  # `--pixdim null` arrives as text
        median = np.median([case.spacing for case in facts], axis=0) if facts else np.ones(3)
        pixdim = [float(f"{spacing:.6g}") for spacing in median]
    target = _three("pixdim", pixdim, integers=False)
    flat = _flat_axis(facts, target, spatial_dims)
    if flat is not None and isinstance(patch_size, (list, tuple)) and len(patch_size) == 2:
        patch_size = [*patch_size[:flat], 1, *patch_size[flat:]]
    patch = _three("patch_size", patch_size, integers=True)
    if facts:
        extents = np.array([np.multiply(case.shape, case.spacing) for case in facts]) / np.array(target)
        largest = np.maximum(np.ceil(extents.max(axis=0) - 1e-3), MIN_BOTTLENECK)
        patch = tuple(int(side) for side in np.minimum(patch, largest))
    if flat is not None:
        patch = (*patch[:flat], 1, *patch[flat + 1 :])
    channels, strides, window = network_size(patch, target, base_channels, full_resolution=full_resolution)
    _check_coarsest_level(patch_size, window, strides)
    modalities = folder.modalities if folder else ("unknown",)
    return Plan(
        modalities=modalities,
        labels=folder.labels if folder else {0: "background", 1: "lesion"},
        pixdim=target,
        patch_size=window,
        channels=channels,
        strides=strides,
        intensity=tuple(
            intensity_rule(name, [case.foreground[c] for case in (facts if trained is None else trained)])
            for c, name in enumerate(modalities)
        ),
        spatial_dims=3 if flat is None else 2,
        **(_label_kinds(folder, raters) if folder else {}),
    )


def _check_coarsest_level(given: Sequence[float], window: Sequence[int], strides: Sequence[Sequence[int]]) -> None:
    """Refuse a patch of which the coarsest level is one voxel: instance normalisation takes the spread of several."""
    if math.prod(window) == math.prod(math.prod(stride) for stride in strides):
        message = (
            f"Expected `patch_size` to leave at least two voxels at the network's coarsest level, but got "
            f"{list(given)}, which leaves one: lengthen an axis."
        )
        raise ValueError(message)


def _flat_axis(facts: Sequence[CaseFacts], pixdim: Sequence[float], spatial_dims: int | None) -> int | None:
    """Return the axis of the slices that are trained on, None for volumes."""
    if spatial_dims == 3:
        return None
    shapes = np.array([case.shape for case in facts] or [(0, 0, 0)])
    single = np.flatnonzero((shapes == 1).all(axis=0))
    if len(single):
        return int(single[-1])
    # Of equal ones the last, which are the slices of most scans.
    return None if spatial_dims is None else 2 - int(np.argmax(pixdim[::-1]))


def _label_kinds(folder: SegmentationFolder, raters: str) -> dict[str, Any]:
    return {
        "regions": folder.regions,
        "regions_order": folder.regions_order,
        "ignore": folder.ignore,
        "soft_labels": folder.soft,
        "mean_of_raters": folder.has_raters and raters == "mean",
        "partly_labelled": folder.is_partly_labelled,
    }


def _three(name: str, values: Sequence[float], *, integers: bool) -> tuple[Any, ...]:
    what = "positive integers (voxels)" if integers else "positive numbers (mm)"
    numbers = list(values) if isinstance(values, (list, tuple)) else []
    usable = all(
        isinstance(v, (int, float)) and math.isfinite(v) and v > 0 and (not integers or v == int(v)) for v in numbers
    )
    if len(numbers) != 3 or not usable:
        message = f'Expected `{name}` to be 3 {what}, but got {values!r}: write it as --{name} "[a,b,c]".'
        raise ValueError(message)
    return tuple(int(v) if integers else float(v) for v in numbers)
