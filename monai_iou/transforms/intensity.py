"""Intensities as a model needs them, for each modality."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config.type_definitions import KeysCollection
from monai.transforms.transform import MapTransform


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
