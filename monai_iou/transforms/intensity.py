"""Normalisation of intensities by modality."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config.type_definitions import KeysCollection
from monai.transforms.transform import MapTransform
from monai.utils.type_conversion import convert_to_dst_type, convert_to_tensor

from monai_iou import checks
from monai_iou.tables import counted

KINDS = ("ct", "zscore", "none")
STATISTICS = ("lower", "upper", "mean", "std")
SAME = 1e-5  # part of a value by which rounding may change it


class NormalizeModalitiesd(MapTransform):
    """Normalise each channel of an image according to its modality, as nnU-Net does.

    "ct": clip to the range from `lower` to `upper`, subtract `mean` and divide by `std`. All four are statistics of the
    foreground of the training data, because CT numbers (Hounsfield units) have an absolute meaning. "zscore": subtract
    the mean and divide by the standard deviation of the nonzero voxels of the image itself; voxels of exactly 0, such
    as those outside the brain after skull stripping, remain 0. If the others all have the same value, as in a mask,
    they become 1, and 0 if the image has no voxel of 0. "none": leave the values as they are. Source: Isensee et al.
    2021, https://doi.org/10.1038/s41592-020-01008-z.

    Args:
        keys: keys of images (C, *S).
        intensity: one dictionary per channel with "kind" and, for "ct", the four statistics, as in
            `monai_iou.planning.plan.Plan`.
        allow_missing_keys: whether keys may be absent from an item.

    Raises:
        TypeError: if `intensity` is not a list of dictionaries, or a statistic of "ct" is not a number.
        ValueError: if `intensity` is empty, a "kind" is none of the three, a statistic of "ct" is missing or not
            finite, "lower" exceeds "upper" or "std" is not positive; when called, if the number of channels of an image
            differs from that of `intensity`.

    Example:
        >>> import torch
        >>> from monai_iou.transforms import NormalizeModalitiesd
        >>> normalize = NormalizeModalitiesd("image", [{"kind": "zscore"}])
        >>> normalize({"image": torch.tensor([[[0.0, 1.0, 3.0]]])})["image"]
        tensor([[[ 0., -1.,  1.]]])
    """

    def __init__(
        self, keys: KeysCollection, intensity: Sequence[Mapping[str, Any]], allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        remedy = 'list one dictionary per channel, such as [{"kind": "zscore"}]'
        channels = checks.check_list("intensity", intensity, remedy)
        if not channels:
            message = f"Expected `intensity` to hold at least one channel, but got none: {remedy}."
            raise ValueError(message)
        self.intensity = [_checked(*each, remedy) for each in enumerate(channels)]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item with its images, tensors or NumPy arrays, normalised as float32."""
        items = dict(data)
        for key in self.key_iterator(items):
            image = items[key]
            if len(image) != len(self.intensity):
                message = (
                    f"Expected `{key}` to have {counted(len(self.intensity), 'channel')}, but got {len(image)}: "
                    "use images of the modalities that the model was trained on."
                )
                raise ValueError(message)
            plain = convert_to_tensor(image, dtype=torch.float32, track_meta=False)
            result = torch.stack([_normalize(*each) for each in zip(plain, self.intensity, strict=True)])
            items[key] = convert_to_dst_type(result, image, dtype=torch.float32)[0]
        return items


def _checked(channel: int, rule: Any, remedy: str) -> dict[str, Any]:
    """Return how a channel is normalised, as a dictionary of its own; raise unless it says so."""
    if not isinstance(rule, Mapping):
        message = f"Expected `intensity[{channel}]` to be a dictionary, but got {rule!r}: {remedy}."
        raise TypeError(message)
    checks.check_choice(f'intensity[{channel}]["kind"]', rule.get("kind"), KINDS)
    if rule["kind"] != "ct":
        return dict(rule)
    missing = [name for name in STATISTICS if name not in rule]
    if missing:
        message = (
            f"Expected `intensity[{channel}]` to have {', '.join(STATISTICS)}, but got no "
            f"{' and no '.join(missing)}: give the statistics of the foreground of the training data."
        )
        raise ValueError(message)
    lower, upper, mean, std = (
        checks.check_number(f'intensity[{channel}]["{name}"]', rule[name]) for name in STATISTICS
    )
    if not (lower <= upper and math.isfinite(mean) and 0 < std < math.inf):  # infinite bounds clip nothing
        message = (
            f"Expected `intensity[{channel}]` to have lower <= upper, and a finite mean and std > 0, but "
            f"got lower={lower}, upper={upper}, mean={mean}, std={std}: give those of the foreground of the training "
            "data."
        )
        raise ValueError(message)
    return dict(rule)


def _normalize(channel: torch.Tensor, rule: Mapping[str, Any]) -> torch.Tensor:
    if rule["kind"] == "ct":
        lower, upper, mean, std = (float(rule[name]) for name in STATISTICS)
        return (channel.clamp(lower, upper) - mean) / std
    if rule["kind"] == "none":
        return channel
    inside = channel != 0
    # In float64, because raw MR intensities reach 1e6, and sums of their squares exceed the precision of float32.
    values = channel[inside].double()
    if values.numel() == 0:
        return channel
    lowest, highest = values.amin(), values.amax()
    if highest - lowest <= SAME * max(abs(lowest), abs(highest)):  # a mask must not vanish
        return torch.zeros_like(channel) if inside.all() else inside.to(channel.dtype)
    return torch.where(inside, ((channel - values.mean()) / values.std(correction=0)).float(), channel)
