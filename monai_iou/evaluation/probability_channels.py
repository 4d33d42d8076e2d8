"""Which channels of a probability map stand for a structure: those of its labels, or the output of a region.

The labels of a softmax share one probability, so that their channels add up to 1, and a region is the sum of its
labels. The outputs of a sigmoid do not: each is a structure by itself, in the order of the structures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monai_iou.evaluation.rules import Structure

__all__ = ["channels_of"]

_ROUNDED = 1 / 255  # how far a sum may be from 1 for each channel: they may be written in eight bits
_OVERLAP = 0.5  # above 1: two structures are in one voxel
_BACKGROUND = 0.25  # mean distance of a background from what the most probable structure leaves to it


def channels_of(
    path: Path, channels: NDArray[Any], structures: Sequence[Structure]
) -> dict[Structure, NDArray[np.floating[Any]]]:
    """Return the probabilities of each structure.

    Args:
        path: of the file, for messages.
        channels: (C, *S), of one case.
        structures: what is scored; where channels and structures go together by their order, all of them.

    Raises:
        ValueError: the channels cannot be told to be those of the structures.

    >>> one, two, both = Structure("1", (1,)), Structure("5", (5,)), Structure("both", (1, 2))
    >>> shares = np.array([[0.7], [0.2], [0.1]])
    >>> {structure.name: float(p[0]) for structure, p in channels_of(Path("a"), shares, (one, two)).items()}
    {'1': 0.2, '5': 0.1}
    >>> round(float(channels_of(Path("a"), shares, (both,))[both][0]), 6)
    0.3
    >>> regions = np.array([[0.1], [0.9], [0.8]])
    >>> {structure.name: float(p[0]) for structure, p in channels_of(Path("a"), regions, (both, two)).items()}
    {'both': 0.9, '5': 0.8}
    """
    count, first = len(channels), len(channels) - len(structures)
    values = [value for structure in structures for value in structure.values]
    are_channels = min(values) >= 0 and max(values) < count
    known = channels.reshape(count, -1)
    finite = np.isfinite(known).all(axis=0)
    known = known if finite.all() else known[:, finite]  # what is not finite is refused where it is counted
    low, high = _sums(known)
    shares = max(1 - low, high - 1) <= count * _ROUNDED
    if are_channels and shares:
        return {
            structure: np.minimum(channels[sorted(set(structure.values))].sum(axis=0), 1) for structure in structures
        }
    names = ", ".join(structure.name for structure in structures)
    if first not in (0, 1):
        wanted = f"`{path}` to have one channel for each of {names}, with or without a background before them"
        found = str(count)
        if are_channels:
            wanted = f"the channels of `{path}` to add up to 1 as those of labels do, or to be one for each of {names}"
            found = f"{count} that add up to {high if high - 1 > 1 - low else low:.3g} in a voxel"
        message = (
            f"Expected {wanted}, but got {found}: name all of them in `--labels` or `--regions`, in the order of the "
            "channels."
        )
        raise ValueError(message)
    if first and not shares and not _has_background(known):
        message = (
            f"Expected the first of the {count} channels of `{path}` to be the background, because there is one more "
            f"than structures ({names}), but it is not: name all of them in `--labels` or `--regions`, in the order of "
            "the channels."
        )
        raise ValueError(message)
    are_labels = len(values) == len(structures)
    if are_labels and high > 1 + _OVERLAP:
        message = (
            f"Expected the channels of `{path}` to exclude each other, because each of {names} is one label, but they "
            f"add up to {high:.3g} in a voxel: name the regions in `--regions`, in the order of the channels, or write "
            "one file for each label, named CASE_LABEL."
        )
        raise ValueError(message)
    if are_labels and sorted(values) == list(range(first, count)):
        return {structure: channels[structure.values[0]] for structure in structures}
    return {structure: channels[first + i] for i, structure in enumerate(structures)}


def _sums(known: NDArray[Any]) -> tuple[float, float]:
    """The smallest and the largest sum over the channels."""
    total = known.sum(axis=0)
    return (float(total.min()), float(total.max())) if total.size else (1.0, 1.0)


def _has_background(known: NDArray[Any]) -> bool:
    """Whether the first channel is large where all others are small, and the reverse."""
    return not known.size or bool(np.abs(1 - known[0] - known[1:].max(axis=0)).mean() <= _BACKGROUND)
