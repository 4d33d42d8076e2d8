"""Sliding windows over flipped views and several models, with the mean of their probabilities."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.inferers.inferer import SlidingWindowInferer
from torch import Tensor

__all__ = ["Ensemble", "MeanProbabilityInferer"]

PROBABILITY_ROUNDING = 1e-7


def probabilities_of(logits: Tensor, sigmoid: bool) -> Tensor:
    """Return probabilities (B, C, *S) of logits, in float32; NaN where a logit is NaN or infinite."""
    logits = logits.float()
    probabilities = logits.sigmoid() if sigmoid else logits.softmax(1)
    # An infinite logit has a probability of 0 or 1, which would hide in a mean that the network's output is unusable.
    return torch.where(logits.isfinite(), probabilities, torch.nan)


def mean_logits(probabilities: Any, sigmoid: bool) -> Tensor:
    """Return finite logits whose sigmoid or softmax is the probabilities; NaN stays NaN."""
    # Clamped, because a probability that rounds to 0 or 1 has no finite logit.
    if sigmoid:
        logits: Tensor = probabilities.logit(PROBABILITY_ROUNDING)
    else:
        logits = probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
    return logits


class MeanProbabilityInferer(SlidingWindowInferer):
    """MONAI's sliding window; several models and flipped views give the mean of their probabilities.

    The result stands for logits: the logarithm of the mean, whose softmax is the mean itself; with `sigmoid`, the logit
    of the mean. It is finite however sure the models are, and NaN where one of their outputs is NaN or infinite. One
    model without flips gives its own logits, exactly as MONAI's class.

    Args:
        args, kwargs: as for `monai.inferers.SlidingWindowInferer`.
        sigmoid: whether each class has its own probability instead of a share of one.
        flips: also take the volume flipped along every combination of axes: eight times the work in 3D.

    Example:
        >>> layer = torch.nn.Conv3d(1, 2, 1)
        >>> mean = MeanProbabilityInferer(roi_size=(4, 4, 4), flips=True)
        >>> mean(torch.ones(1, 1, 6, 6, 6), layer).exp().sum(1).allclose(torch.tensor(1.0))
        True
    """

    def __init__(self, *args: Any, flips: bool = False, sigmoid: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.flips, self.sigmoid = flips, sigmoid

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the logits (B, C, *S) of images (B, channels, *S)."""
        axes = range(2, inputs.ndim) if self.flips else range(0)
        views = [view for count in range(len(axes) + 1) for view in itertools.combinations(axes, count)]
        members = list(network.members) if isinstance(network, Ensemble) else [network]
        if len(views) == len(members) == 1:
            return super().__call__(inputs, members[0], *args, **kwargs)
        total: Any = 0
        for member, view in itertools.product(members, views):
            logits: Any = super().__call__(inputs.flip(view) if view else inputs, member, *args, **kwargs)
            probabilities = probabilities_of(logits, self.sigmoid)
            total = total + (probabilities.flip(view) if view else probabilities)
        return mean_logits(total / (len(views) * len(members)), self.sigmoid)


class Ensemble(torch.nn.Module):
    """Several trained networks of one architecture, for `MeanProbabilityInferer`.

    Args:
        networks: with their weights.
        intensities: how each one's images were normalised, as in `monai_iou.planning.Plan`; images come
            normalised as the first one's. CT windows differ a little between folds: images are converted from
            one to the other.
        sigmoid: whether each class has its own probability instead of a share of one.

    Example:
        >>> layers = [torch.nn.Conv3d(1, 2, 1) for _ in range(2)]
        >>> Ensemble(layers, [[{"kind": "zscore"}]] * 2)(torch.ones(1, 1, 2, 2, 2)).shape
        torch.Size([1, 2, 2, 2, 2])
    """

    def __init__(
        self,
        networks: Sequence[torch.nn.Module],
        intensities: Sequence[Sequence[Mapping[str, Any]]],
        sigmoid: bool = False,
    ) -> None:
        super().__init__()
        self.sigmoid = sigmoid
        self.members = torch.nn.ModuleList(
            network if list(own) == list(intensities[0]) else _Renormalized(network, intensities[0], own)
            for network, own in zip(networks, intensities, strict=True)
        )

    @classmethod
    def of_weights(
        cls,
        network: torch.nn.Module,
        weights: Sequence[Mapping[str, Tensor]],
        intensities: Sequence[Sequence[Mapping[str, Any]]],
        sigmoid: bool = False,
    ) -> Ensemble:
        """Make one of an architecture and each model's weights; `network` becomes the first member."""
        networks = [network, *(copy.deepcopy(network) for _ in weights[1:])]
        for member, own in zip(networks, weights, strict=True):
            member.load_state_dict(own)
        return cls(networks, intensities, sigmoid)

    def forward(self, image: Tensor) -> Tensor:
        """Return what stands for the logits of the members' mean probabilities for a patch."""
        total: Any = sum(probabilities_of(member(image), self.sigmoid) for member in self.members)
        return mean_logits(total / len(self.members), self.sigmoid)


class _Renormalized(torch.nn.Module):
    """A network that gets its images normalised by one rule and was trained on another."""

    def __init__(
        self, network: torch.nn.Module, given: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]]
    ) -> None:
        super().__init__()
        self.network, self.rules = network, list(zip(given, own, strict=True))

    def forward(self, image: Tensor) -> Tensor:
        channels = [_moved(channel, *rules) for channel, rules in zip(image.unbind(1), self.rules, strict=True)]
        result: Tensor = self.network(torch.stack(channels, 1))
        return result


def _moved(channel: Tensor, given: Mapping[str, Any], own: Mapping[str, Any]) -> Tensor:
    if given["kind"] != "ct":
        return channel
    number = channel * given["std"] + given["mean"]
    moved: Tensor = (number.clamp(own["lower"], own["upper"]) - own["mean"]) / own["std"]
    return moved
