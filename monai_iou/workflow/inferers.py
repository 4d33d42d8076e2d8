"""Sliding windows over flipped views and several models, with the mean of their probabilities."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from monai.inferers.inferer import SlidingWindowInferer
from torch import Tensor

from monai_iou.planning.intensity import shared_intensity

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
        count = len(network.members) if isinstance(network, Ensemble) else 1
        # The whole image is converted, not its windows: what is padded has to be 0 for each of the models.
        members = network.with_images(inputs) if isinstance(network, Ensemble) else [(network, inputs)]
        if len(views) == count == 1:
            ((member, image),) = members
            return super().__call__(image, member, *args, **kwargs)
        total: Any = 0
        for member, image in members:
            for view in views:
                logits: Any = super().__call__(image.flip(view) if view else image, member, *args, **kwargs)
                probabilities = probabilities_of(logits, self.sigmoid)
                total = total + (probabilities.flip(view) if view else probabilities)
        return mean_logits(total / (len(views) * count), self.sigmoid)


class Ensemble(torch.nn.Module):
    """Several trained networks of one architecture, for `MeanProbabilityInferer`.

    Args:
        networks: with their weights.
        intensities: how each one's images were normalised, as in `monai_iou.planning.Plan`. CT windows differ a
            little between folds: images come normalised by `shared_intensity`, which loses nothing that one of the
            networks knows, and are converted for each network.
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
        given = shared_intensity(intensities)
        self.members = torch.nn.ModuleList(networks)
        self._rules = [None if list(own) == given else list(zip(given, own, strict=True)) for own in intensities]

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

    def with_images(self, image: Tensor) -> Iterator[tuple[torch.nn.Module, Tensor]]:
        """Yield each network and images (B, channels, *S), normalised as in its own training."""
        for member, rules in zip(self.members, self._rules, strict=True):
            yield member, image if rules is None else _renormalized(image, rules)

    def forward(self, image: Tensor) -> Tensor:
        """Return what stands for the logits of the members' mean probabilities for a patch."""
        total: Any = sum(probabilities_of(member(own), self.sigmoid) for member, own in self.with_images(image))
        return mean_logits(total / len(self.members), self.sigmoid)


def _renormalized(image: Tensor, rules: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> Tensor:
    """Return images that were normalised by the first rule of each channel as they are by the second."""
    same = {"lower": -math.inf, "upper": math.inf, "mean": 0.0, "std": 1.0}

    def of_channels(place: int, name: str) -> Tensor:
        numbers = [(pair[place] if pair[place]["kind"] == "ct" else same)[name] for pair in rules]
        return torch.tensor(numbers, device=image.device).view(-1, *[1] * (image.ndim - 2))

    numbers = image.float() * of_channels(0, "std") + of_channels(0, "mean")
    clipped = numbers.clamp(of_channels(1, "lower"), of_channels(1, "upper"))
    moved: Tensor = ((clipped - of_channels(1, "mean")) / of_channels(1, "std")).to(image.dtype)
    return moved
