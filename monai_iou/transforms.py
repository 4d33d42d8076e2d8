"""Dictionary transforms of the bundle that MONAI does not have."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config.type_definitions import KeysCollection
from monai.data.meta_tensor import MetaTensor
from monai.transforms.spatial.dictionary import Spacingd
from monai.transforms.transform import MapTransform

from monai_iou.components import FIRST_REGION, component_regions
from monai_iou.spacing import image_spacings

__all__ = ["ComponentRegionsd", "CropIndicesd", "NormalizeModalitiesd", "ResampleSpacingd"]


class NormalizeModalitiesd(MapTransform):
    """Normalise each channel as its modality needs.

    "ct": clip to [lower, upper], subtract mean, divide by std, all taken from the training data's foreground, because
    CT numbers have a fixed meaning. "zscore": subtract the mean and divide by the standard deviation of the image's own
    nonzero voxels; voxels of exactly 0 (outside a stripped skull or a field of view) stay 0.

    Args:
        keys: images of shape (C, *S).
        intensity: one dictionary per channel, as in `monai_iou.planning.plan.Plan`.
        allow_missing_keys: do not fail where a key is absent.

    Raises:
        ValueError: the image has another number of channels than `intensity`.

    Example:
        >>> normalize = NormalizeModalitiesd("image", [{"kind": "zscore"}])
        >>> normalize({"image": torch.tensor([[[0.0, 1.0, 3.0]]])})["image"]
        tensor([[[ 0., -1.,  1.]]])
    """

    def __init__(
        self, keys: KeysCollection, intensity: Sequence[Mapping[str, Any]], allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.intensity = [dict(channel) for channel in intensity]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item with its images normalised."""
        items = dict(data)
        for key in self.key_iterator(items):
            image = items[key]
            if len(image) != len(self.intensity):
                message = (
                    f"Expected `{key}` to have {len(self.intensity)} channels, but got {len(image)}: "
                    "use images of the modalities that the model was trained on."
                )
                raise ValueError(message)
            result = image.clone().float()
            for channel, rule in zip(result, self.intensity, strict=True):
                channel.copy_(_normalize(torch.as_tensor(channel), rule))
            items[key] = result
        return items


def _normalize(channel: torch.Tensor, rule: Mapping[str, Any]) -> torch.Tensor:
    if rule["kind"] == "ct":
        lower, upper, mean, std = (float(rule[name]) for name in ("lower", "upper", "mean", "std"))
        return (channel.clamp(lower, upper) - mean) / std
    inside = channel != 0
    # float64: raw MR intensities reach 1e6, whose squares summed over a volume exceed float32's digits.
    values = channel[inside].double()
    if values.numel() == 0:
        return channel
    average, deviation = values.mean(), values.std(correction=0)
    return torch.where(inside, ((channel - average) / (deviation if deviation > 0 else 1.0)).float(), channel)


class CropIndicesd(MapTransform):
    """Store where crops may be centred, once per volume, for `RandCropByPosNegLabeld`.

    MONAI's `FgBgToIndicesd` keeps the index of every background voxel, 8 bytes each: 600 MB for a whole-body CT. Here
    at most `max_samples` are kept: evenly spaced voxels of each foreground class, so that a class of 50 voxels is
    centred as often as one of 50 000, and evenly spaced background voxels.

    Args:
        keys: label maps of shape (1, *S), 0 the background.
        fg_postfix, bg_postfix: appended to the key for the flat indices of foreground and background voxels.
        max_samples: indices kept for each class.
        allow_missing_keys: do not fail where a key is absent.

    Example:
        >>> crop = CropIndicesd("label")({"label": torch.tensor([[[0, 0, 1], [2, 2, 0]]])})
        >>> crop["label_fg_indices"], crop["label_bg_indices"]
        (array([2, 3, 2, 4]), array([0, 1, 5]))
    """

    def __init__(
        self,
        keys: KeysCollection,
        fg_postfix: str = "_fg_indices",
        bg_postfix: str = "_bg_indices",
        max_samples: int = 10_000,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.fg_postfix, self.bg_postfix, self.max_samples = fg_postfix, bg_postfix, max_samples

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item with the two arrays of indices added."""
        items = dict(data)
        for key in self.key_iterator(items):
            label = np.asarray(items[key]).ravel()
            classes = [self._spaced(np.flatnonzero(label == value)) for value in np.unique(label[label > 0])]
            # The same number of each class: repeat the few of a rare one.
            most = max((len(found) for found in classes), default=0)
            repeated = [np.resize(found, most) for found in classes]
            items[f"{key}{self.fg_postfix}"] = np.stack(repeated, 1).ravel() if classes else np.zeros(0, dtype=np.int64)
            items[f"{key}{self.bg_postfix}"] = self._spaced(np.flatnonzero(label == 0))
        return items

    def _spaced(self, indices: np.ndarray) -> np.ndarray:
        return indices[:: max(1, -(-len(indices) // self.max_samples))]


class ResampleSpacingd(Spacingd):
    """MONAI's `Spacingd`, for items that also hold text, such as the `image_path` that MONAI Label adds.

    MONAI 1.6 takes every entry whose key starts with `image_` for the image's metadata, which text is not.

    Args:
        keys, pixdim, mode and the rest: as for `monai.transforms.Spacingd`; `pixdim` in mm.

    Example:
        >>> from monai.data import MetaTensor
        >>> item = {"image": MetaTensor(torch.zeros(1, 4, 4, 4)), "image_path": "a.nii.gz"}
        >>> resampled = ResampleSpacingd("image", pixdim=(2.0, 2.0, 2.0))(item)
        >>> tuple(resampled["image"].shape), resampled["image_path"]
        ((1, 2, 2, 2), 'a.nii.gz')
    """

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> dict[Hashable, Any]:
        """Return the item with its images resampled."""
        text = {key: value for key, value in data.items() if isinstance(value, str)}
        rest = {key: value for key, value in data.items() if key not in text}
        return {**text, **super().__call__(rest, lazy)}


class ComponentRegionsd(MapTransform):
    """Append to a label map the Voronoi regions of its components, for :class:`monai_iou.InstanceIoULoss`.

    One channel for each foreground class: at every voxel the number of the region it lies in, from 2, the same for all
    voxels that are nearest in mm to the same component of that class; 2 everywhere if there is none. The channels are
    part of the label, so that crops, flips and other spatial transforms (with nearest interpolation) keep them in step;
    computed once, before random transforms, they also know components that a crop leaves out. Voxel sizes are those of
    a MetaTensor, so put the transform after `Spacingd` and before `EnsureTyped(track_meta=False)`.

    Args:
        keys: label maps (1, *S) with class numbers from 0, the background.
        num_classes: number of classes C with the background; the result has C channels.
        connectivity: 6, 18 or 26 neighbours in 3D, 4 or 8 in 2D; the most by default.
        spacing: voxel size in mm, instead of the MetaTensor's.
        allow_missing_keys: do not fail where a key is absent.

    Raises:
        ValueError: a label has several channels, or `num_classes` is below 2.

    Example:
        >>> import torch
        >>> from monai_iou import ComponentRegionsd
        >>> label = torch.tensor([[[1, 0, 0, 0, 0, 1]]])
        >>> ComponentRegionsd("label")({"label": label})["label"]
        tensor([[[1, 0, 0, 0, 0, 1]],
        <BLANKLINE>
                [[2, 2, 2, 3, 3, 3]]], dtype=torch.int32)
    """

    def __init__(
        self,
        keys: KeysCollection,
        num_classes: int = 2,
        connectivity: int | None = None,
        spacing: Sequence[float] | float | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if num_classes < 2:
            message = (
                f"Expected `num_classes` to count the background and at least one class, but got {num_classes}: 2 is "
                "for one foreground class."
            )
            raise ValueError(message)
        self.num_classes, self.connectivity, self.spacing = num_classes, connectivity, spacing

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item with its labels (1, *S) as int32 (C, *S): class numbers, then regions of each class."""
        items = dict(data)
        for key in self.key_iterator(items):
            items[key] = self._with_regions(str(key), items[key])
        return items

    def _with_regions(self, key: str, label: Any) -> torch.Tensor:
        if label.ndim < 2 or label.shape[0] != 1:
            message = f"Expected `{key}` to be a label map (1, *S), but got {tuple(label.shape)}: append regions once."
            raise ValueError(message)
        plain = torch.as_tensor(label).as_subclass(torch.Tensor)
        numbers = plain[0].cpu().numpy()
        spacing = image_spacings(None, [label], self.spacing, 1, numbers.ndim)[0]
        channels = [numbers.astype(np.int32)]
        for index in range(1, self.num_classes):
            regions, _ = component_regions(numbers == index, "voronoi", spacing, self.connectivity)
            # One region without a component, where there is none: a crop of zeros alone could be per-class maps.
            channels.append((regions.clip(1) + FIRST_REGION - 1).astype(np.int32))
        result = torch.as_tensor(np.stack(channels), device=plain.device)
        return (
            MetaTensor(result, meta=label.meta, applied_operations=label.applied_operations)
            if isinstance(label, MetaTensor)
            else result
        )
