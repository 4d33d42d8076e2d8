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
from monai_iou.tables import counted
from monai_iou.volumes.probability_kind import UNKNOWN_KIND, ProbabilityKind

__all__ = ["channels_of", "check_range"]

_ROUNDED = 1 / 255  # how far a sum may be from 1 for each channel: they may be written in eight bits
_UNIT = 1e-3  # by which probabilities in half precision may leave [0, 1]
_SEEN = 0.1  # probability from which on a voxel may hold a structure: only these tell what the channels are
_NEARLY_ALL = 0.99  # of these voxels
_PART = 0.3  # of the smaller structure that may lie in another one, if both are labels
_BACKGROUND = 0.25  # mean distance of a background from what the most probable structure leaves to it


def channels_of(
    path: Path, channels: NDArray[Any], structures: Sequence[Structure], *, kind: ProbabilityKind = UNKNOWN_KIND
) -> dict[Structure, NDArray[np.floating[Any]]]:
    """Return the probabilities of each structure.

    Args:
        path: of the file, for messages.
        channels: (C, *S), of one case.
        structures: what is scored; where channels and structures go together by their order, all of them.
        kind: what the file says of its channels.

    Raises:
        ValueError: the channels are no probabilities, or cannot be told to be those of the structures.

    >>> one, two, both = Structure("1", (1,)), Structure("5", (5,)), Structure("both", (1, 2))
    >>> shares = np.array([[0.7], [0.2], [0.1]])
    >>> {structure.name: float(p[0]) for structure, p in channels_of(Path("a"), shares, (one, two)).items()}
    {'1': 0.2, '5': 0.1}
    >>> round(float(channels_of(Path("a"), shares, (both,))[both][0]), 6)
    0.3
    >>> kind = ProbabilityKind(False, (0, 5, 7))
    >>> float(channels_of(Path("a"), shares, (two,), kind=kind)[two][0])
    0.2
    >>> regions = np.array([[0.1], [0.9], [0.8]])
    >>> {structure.name: float(p[0]) for structure, p in channels_of(Path("a"), regions, (both, two)).items()}
    {'both': 0.9, '5': 0.8}
    """
    count, first = len(channels), len(channels) - len(structures)
    separate, values = kind.separate, [value for structure in structures for value in structure.values]
    held = range(count) if kind.values is None else kind.values
    channel = {value: i for i, value in enumerate(held)} if len(held) == count else {}
    are_channels = all(value in channel for value in values)
    if separate is False and kind.values and channel and not are_channels:
        missing = ", ".join(str(value) for value in dict.fromkeys(values) if value not in channel)
        message = (
            f"Expected `{path}` to have a channel for every scored label, but got those of "
            f"{', '.join(map(str, held))}, and none of {missing}: name labels that the model has in `--labels` or "
            "`--regions`."
        )
        raise ValueError(message)
    known = _telling_voxels(path, channels)
    # Files that say what they hold have a background, unless somebody removed it.
    in_order = first == 1 or (first == 0 and (separate is None or count == 1 or not _has_background(known)))
    same = in_order and len(values) == len(structures) and sorted(values) == sorted(channel)[first:]
    are_shares = _are_shares(known) if separate is None else not separate
    if are_channels and not same and (are_shares or (are_shares is None and not in_order)):
        return {
            structure: np.minimum(channels[sorted({channel[v] for v in structure.values})].sum(axis=0), 1)
            for structure in structures
        }
    names = ", ".join(structure.name for structure in structures)
    if are_shares is None and are_channels and not same:
        message = (
            f"Expected the {counted(count, 'channel')} of `{path}` to be shares of 1, as those of labels, or one "
            f"output for each of {names}, but got sums that tell neither: write one file for each, named CASE_LABEL."
        )
        raise ValueError(message)
    if not in_order:
        wanted = f"`{path}` to have one channel for each of {names}, with or without a background before them"
        if are_channels:
            wanted = f"the channels of `{path}` to add up to 1 as those of labels do, or to be one for each of {names}"
        message = (
            f"Expected {wanted}, but got {count}{' that do not add up to 1' if are_channels else ''}: name all of them "
            "in `--labels` or `--regions`, in the order of the channels."
        )
        raise ValueError(message)
    if first and separate is None and not are_shares and not _has_background(known):
        message = (
            f"Expected the first of the {count} channels of `{path}` to be the background, because there is one more "
            f"than structures ({names}), but it is not: name all of them in `--labels` or `--regions`, in the order of "
            "the channels."
        )
        raise ValueError(message)
    labels = all(structure.name == str(structure.values[0]) for structure in structures)
    if len(values) == len(structures) > 1 and (_overlap(known[first:]) > _PART or (separate and labels)):
        message = (
            f"Expected the channels of `{path}` to exclude each other, because each of {names} is one label, but got "
            "outputs of regions that overlap: name these in `--regions`, in the order of the channels, or write one "
            "file for each label, named CASE_LABEL."
        )
        raise ValueError(message)
    if same:
        return {structure: channels[channel[structure.values[0]]] for structure in structures}
    return {structure: channels[first + i] for i, structure in enumerate(structures)}


def _telling_voxels(path: Path, channels: NDArray[Any]) -> NDArray[Any]:
    """Return the channels (C, N) where none is NaN and one is not 0: a margin of zeros tells nothing.

    Raises:
        ValueError: a value is outside 0 to 1, infinite or not.
    """
    known = channels.reshape(len(channels), -1)
    check_range(path, known)
    return known[:, ~np.isnan(known).any(axis=0) & (known != 0).any(axis=0)]  # NaN is refused where it is counted


def check_range(path: Path, values: NDArray[Any]) -> None:
    """Raise ValueError if a value of a file is outside 0 to 1; NaN is not looked at."""
    low, high = (
        (float(np.fmin.reduce(values.ravel())), float(np.fmax.reduce(values.ravel()))) if values.size else (0, 0)
    )
    if low < -_UNIT or high > 1 + _UNIT:
        message = (
            f"Expected `{path}` to hold probabilities between 0 and 1, but got {low if low < -_UNIT else high:.6g}: "
            "write the outputs of a softmax or a sigmoid instead of logits."
        )
        raise ValueError(message)


def _are_shares(known: NDArray[Any]) -> bool | None:
    """Return whether the channels share one probability, as those of a softmax do; None if they do not tell.

    Shares add up to 1 in nearly all voxels. Where they were interpolated and clipped, voxels that may hold two
    structures tell: the background is what all of them leave or, for regions, what the most probable one leaves.
    One channel has nothing to share with.
    """
    if len(known) < 2:
        return False
    most = known[1:].max(axis=0, initial=0)
    seen = (most > _SEEN) | (known[0] < 1 - _SEEN)
    here = known[:, seen] if seen.any() else known
    near = (np.abs(here.sum(axis=0) - 1) <= len(known) * _ROUNDED).mean() if here.size else 1.0
    if near >= _NEARLY_ALL:
        return True
    all_of_them = known[1:].sum(axis=0)
    two = all_of_them - most > _SEEN
    if two.any():
        left = 1 - known[0, two]
        return bool(np.abs(left - all_of_them[two]).mean() < np.abs(left - most[two]).mean())
    return None if seen.any() and _has_background(known) else False


def _overlap(structures: NDArray[Any]) -> float:
    """Return the largest part of a structure of (n, N) that lies in another one."""
    inside = structures > 0.5
    sizes = np.count_nonzero(inside, axis=1)
    parts = [
        np.count_nonzero(inside[i] & inside[j]) / min(sizes[i], sizes[j])
        for i in range(len(inside))
        for j in range(i)
        if sizes[i] and sizes[j]
    ]
    return float(max(parts, default=0))


def _has_background(known: NDArray[Any]) -> bool:
    """Return whether the first channel is large where all others are small, and the reverse; one alone is no such."""
    if len(known) < 2:
        return False
    return not known.size or bool(np.abs(1 - known[0] - known[1:].max(axis=0)).mean() <= _BACKGROUND)
