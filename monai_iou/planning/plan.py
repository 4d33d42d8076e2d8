"""The decisions of a training run that depend on its data: spacing, patch, network size, normalisation.

`Plan` is plain data: the bundle's configs read it (`"$@plan.strides"`), and `model.json` stores it next to `model.pt`,
so that evaluation and inference prepare images exactly as training did, without the training data.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from monai_iou.datasets.cases import CaseFacts, DatasetError
from monai_iou.datasets.folder import SegmentationFolder

__all__ = ["Plan", "load_plan", "make_plan", "network_size"]


CT_PERCENTILES = (0.5, 99.5)
# Cone-beam, non-contrast, contrast-enhanced, low-dose, high-resolution, multi-detector, photon-counting and others, and
# what datasets put behind: angiography, perfusion, resampled.
CT_PREFIXES = ("CB", "NC", "NE", "NEC", "CE", "LD", "ULD", "ND", "SD", "FD", "HR", "MD", "MS", "DE", "DS", "PC", "Q")
CT_SUFFIXES = ("A", "AP", "C", "HU", "P", "RES", "SCAN", "SCANS", "V", "IMAGE", "IMAGES", "ANGIO", "ANGIOGRAPHY")
MAX_LEVELS = 4
MIN_BOTTLENECK = 5  # voxels per side: below it, instance normalisation averages over too few values
MAX_CHANNELS = 320
ANISOTROPIC = (
    3.0  # ratio of the longest to the shortest side of a voxel from which these axes are not rotated into each other
)


@dataclass(frozen=True)
class Plan:
    """The decisions of a training run.

    Attributes:
        modalities: one name per input channel.
        labels: value in the label files -> name, background 0 first, in the order of the network's classes.
        pixdim: target spacing in mm, in RAS order.
        patch_size: training crop and inference window in voxels; each side a multiple of the network's total stride.
        channels: number of channels of each level of the U-Net.
        strides: stride of each level, one number per axis.
        intensity: for each channel either {"kind": "zscore"} or {"kind": "ct", "lower", "upper", "mean", "std"}.
        trained: names of the cases that the model was trained on.
        trained_images: hashes that identify their image files, whatever their names; see `image_identity`.
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

    @property
    def in_channels(self) -> int:
        """Number of channels of an image."""
        return len(self.modalities)

    @property
    def out_channels(self) -> int:
        """Number of classes of the network, including the background."""
        return len(self.labels)

    @property
    def label_values(self) -> list[int]:
        """Values of the label files, in the order of the network's classes."""
        return list(self.labels)

    @property
    def classes(self) -> list[int]:
        """The network's classes 0, 1, ..., out_channels - 1."""
        return list(range(len(self.labels)))

    @property
    def is_anisotropic(self) -> bool:
        """Whether a voxel is at least 3 times as long along one axis as along another."""
        return max(self.pixdim) >= ANISOTROPIC * min(self.pixdim)

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
        if not self.is_anisotropic:
            return True
        short, middle, long = sorted(range(3), key=lambda axis: self.pixdim[axis])
        ratios = self.pixdim[middle] / self.pixdim[short], self.pixdim[long] / self.pixdim[middle]
        pair = {short, middle} if ratios[0] <= ratios[1] else {middle, long}
        return min(ratios) < ANISOTROPIC and {first, second} == pair

    def to_json(self) -> str:
        """Return the plan as JSON text."""
        return json.dumps(asdict(self), indent=2)


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Read the plan that a training stored as `model.json`.

    Raises:
        DatasetError: the file is damaged or is not a plan.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        plan = Plan(
            modalities=tuple(content["modalities"]),
            labels={int(value): name for value, name in content["labels"].items()},
            pixdim=tuple(content["pixdim"]),
            patch_size=tuple(content["patch_size"]),
            channels=tuple(content["channels"]),
            strides=tuple(tuple(stride) for stride in content["strides"]),
            intensity=tuple(content["intensity"]),
            trained=tuple(content.get("trained", ())),
            trained_images=tuple(content.get("trained_images", ())),
        )
        _check_values(plan)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"Expected {path} to be the plan that training stored, but it cannot be read ({error}): train again."
        raise DatasetError(message) from error
    return plan


def _check_values(plan: Plan) -> None:
    """Raise ValueError if a number of a stored plan is none that training stores."""
    sides = [*plan.patch_size, *plan.channels, *itertools.chain(*plan.strides)]
    usable = {
        "pixdim": len(plan.pixdim) == 3 and all(_is_number(side) and side > 0 for side in plan.pixdim),
        "patch_size": len(plan.patch_size) == 3,
        "patch_size, channels and strides": all(isinstance(side, int) and side > 0 for side in sides),
        "strides": bool(plan.strides) and all(len(stride) == 3 for stride in plan.strides),
        "channels": len(plan.channels) == len(plan.strides) + 1,
        "intensity": len(plan.intensity) == len(plan.modalities) > 0 and all(map(_is_rule, plan.intensity)),
        "labels": len(plan.labels) > 1 and next(iter(plan.labels)) == 0,
    }
    for name, right in usable.items():
        if not right:
            message = f"`{name}` has a value that no training stores"
            raise ValueError(message)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_rule(rule: dict[str, Any]) -> bool:
    """Whether this is how a channel can be normalised."""
    if rule["kind"] != "ct":
        return bool(rule["kind"] == "zscore")
    numbers = all(_is_number(rule[name]) for name in ("lower", "upper", "mean", "std"))
    return numbers and rule["lower"] <= rule["upper"] and rule["std"] > 0


def make_plan(
    folder: SegmentationFolder | None,
    facts: Sequence[CaseFacts],
    patch_size: Sequence[int],
    pixdim: Sequence[float] | None = None,
    base_channels: int = 16,
    *,
    full_resolution: bool = False,
) -> Plan:
    """Decide spacing, patch, network size and normalisation from the training cases.

    Args:
        folder: the dataset, or None for the plan of the shipped metadata (one channel, background and lesion).
        facts: facts of the training cases; see `SegmentationFolder.check`.
        patch_size: desired patch in voxels at the target spacing, 3 integers. No side exceeds that of the largest
            volume, and each is rounded up to a multiple of the network's total stride.
        pixdim: target spacing in mm in RAS order; None takes the median over the cases.
        base_channels: number of channels of the first level.
        full_resolution: see `network_size`.

    Raises:
        ValueError: `patch_size`, `pixdim` or `base_channels` cannot be used.
    """
    patch = _three("patch_size", patch_size, integers=True)
    if int(base_channels) != base_channels or base_channels < 1:
        message = f"Expected `base_channels` to be a positive integer, but got {base_channels!r}: take 16."
        raise ValueError(message)
    if pixdim is None or str(pixdim).lower() in ("null", "none"):  # `--pixdim null` arrives as text
        median = np.median([case.spacing for case in facts], axis=0) if facts else np.ones(3)
        pixdim = [float(f"{spacing:.6g}") for spacing in median]
    target = _three("pixdim", pixdim, integers=False)
    if facts:
        extents = np.array([np.multiply(case.shape, case.spacing) for case in facts]) / np.array(target)
        largest = np.maximum(np.ceil(extents.max(axis=0) - 1e-3), MIN_BOTTLENECK)
        patch = tuple(int(side) for side in np.minimum(patch, largest))
    channels, strides, window = network_size(patch, target, base_channels, full_resolution=full_resolution)
    modalities = folder.modalities if folder else ("unknown",)
    return Plan(
        modalities=modalities,
        labels=folder.labels if folder else {0: "background", 1: "lesion"},
        pixdim=target,
        patch_size=window,
        channels=channels,
        strides=strides,
        intensity=tuple(_intensity(name, [case.foreground[c] for case in facts]) for c, name in enumerate(modalities)),
    )


def network_size(
    patch_size: Sequence[int], pixdim: Sequence[float], base_channels: int = 16, *, full_resolution: bool = False
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """Return (channels, strides, patch_size rounded up) of a U-Net that fits the patch.

    An axis is halved as long as at least 5 voxels remain, at most four times, and only once the voxels along the other
    axes have become about as long as along this axis: pooling is in-plane until the spacing is nearly isotropic.

    Args:
        patch_size: desired patch in voxels.
        pixdim: spacing in mm along each axis.
        base_channels: number of channels of the first level; doubled at each further level, up to 320.
        full_resolution: add a first level without downsampling. Otherwise the first convolution has stride 2, which is
            faster but loses detail at boundaries.

    Example:
        >>> network_size((35, 50, 35), (1.0, 1.0, 1.0))
        ((16, 32, 64, 128), ((2, 2, 2), (2, 2, 2), (2, 2, 2)), (40, 56, 40))
        >>> network_size((64, 64, 16), (1.0, 1.0, 4.0))[1]
        ((2, 2, 1), (2, 2, 1), (2, 2, 2))
        >>> network_size((35, 50, 35), (1.0, 1.0, 1.0), 8, full_resolution=True)[:2]
        ((8, 16, 32, 64, 128), ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2)))
    """
    sides, lengths = np.array(patch_size), np.array(pixdim, dtype=float)
    strides: list[tuple[int, ...]] = []
    while len(strides) < MAX_LEVELS:
        possible = np.ceil(sides / 2) >= MIN_BOTTLENECK
        if not possible.any():
            break
        halved = possible & (lengths < 2 * lengths[possible].min() * (1 - 1e-6))
        strides.append(tuple(2 if h else 1 for h in halved))
        sides, lengths = np.where(halved, np.ceil(sides / 2), sides), np.where(halved, 2 * lengths, lengths)
    if full_resolution or not strides:
        strides.insert(0, (1, 1, 1))
    total = np.prod(strides, axis=0)
    channels = tuple(min(MAX_CHANNELS, base_channels * 2**level) for level in range(len(strides) + 1))
    window = tuple(int(side) for side in np.ceil(np.array(patch_size) / total) * total)
    return channels, tuple(strides), window


def is_ct(modality: str) -> bool:
    """Whether a channel's name is one of CT: `CT`, `CTA`, `NCCT`, `CECT`, `CTres`, `CT angiography`, and the like.

    Example:
        >>> [is_ct(name) for name in ("CT", "NCCT", "LDCT", "computed tomography", "SPECT", "OCT", "T1", "ct_1mm")]
        [True, True, True, True, False, False, False, True]
    """
    name = modality.upper()
    if re.search(r"EMISSION|COHERENCE", name):  # SPECT and OCT in full
        return False
    word = rf"(?<![A-Z])(?:{'|'.join(CT_PREFIXES)})?CT(?:{'|'.join(CT_SUFFIXES)})?(?![A-Z])"
    return re.search(rf"{word}|COMPUT[A-Z]*[\W_]*(?:AXIAL[\W_]*)?TOMOGRA", name) is not None


def _intensity(modality: str, samples: Sequence[np.ndarray]) -> dict[str, Any]:
    values = np.concatenate(samples) if samples else np.zeros(0)
    # CT numbers mean the same in every image, so one window serves them all; other modalities have no common scale.
    if not is_ct(modality) or values.size < 2:
        return {"kind": "zscore"}
    lower, upper = np.percentile(values, CT_PERCENTILES)
    clipped = np.clip(values, lower, upper).astype(np.float64)
    std = max(float(clipped.std()), 1e-3)
    return {"kind": "ct", "lower": float(lower), "upper": float(upper), "mean": float(clipped.mean()), "std": std}


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
