"""What the channels of a file of probabilities are, in its header: `predict` writes it, and `evaluate` reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from monai_iou.volumes.header import VolumeError
from monai_iou.volumes.names import NIFTI_EXTENSIONS
from monai_iou.volumes.nifti import load_raw_header

__all__ = ["UNKNOWN_KIND", "ProbabilityKind", "description", "kind_of"]

_KINDS = {False: "monai_iou: classes share one probability", True: "monai_iou: regions have one probability each"}
_OTHER = ", of other values"  # more of them than the header has room for
_MOST = 10_000  # values that a file may name: a damaged digit would fill the memory
_LENGTH = 79  # characters of `descrip`, with a zero after them


@dataclass(frozen=True)
class ProbabilityKind:
    """What a file says of its channels.

    Attributes:
        separate: whether they are outputs by themselves; False if they are shares of one probability, the first for the
            background; None if the file does not say.
        values: the value of each channel in label files; None if that is its number; () if the file says that it is
            not, and had no room for them.
    """

    separate: bool | None = None
    values: tuple[int, ...] | None = None


UNKNOWN_KIND = ProbabilityKind()


def description(*, regions: bool, values: Sequence[int] = ()) -> str:
    """Return what stands in the header's `descrip`, at most 79 characters.

    Args:
        regions: whether each channel is a region, with a probability of its own.
        values: of the classes in label files, of the background too; they are named unless they are 0, 1, 2, ...

    >>> description(regions=True)
    'monai_iou: regions have one probability each'
    >>> description(regions=False, values=(0, 1, 2))
    'monai_iou: classes share one probability'
    >>> description(regions=False, values=(0, 2, 3, 4, 255))
    'monai_iou: classes share one probability, of 0 2-4 255'
    """
    text = _KINDS[regions]
    if regions or list(values) == list(range(len(values))):
        return text
    named = f"{text}, of {_ranges(values)}"
    return named if len(named) <= _LENGTH else text + _OTHER


def kind_of(path: Path) -> ProbabilityKind:
    """Return what the header of a file says of its channels."""
    if not path.name.lower().endswith(NIFTI_EXTENSIONS):
        return UNKNOWN_KIND
    try:
        told = bytes(load_raw_header(path)["descrip"].tobytes()).split(b"\0")[0].decode("ascii", "replace")
    except (VolumeError, OSError):
        return UNKNOWN_KIND
    for separate, text in _KINDS.items():
        if told == text:
            return ProbabilityKind(separate)
        if told.startswith(f"{text}, of "):
            return ProbabilityKind(separate, _numbers(told.removeprefix(f"{text}, of ")))
    return UNKNOWN_KIND


def _ranges(values: Sequence[int]) -> str:
    """Name the values, and those that follow each other by the first and the last."""
    parts = groupby(enumerate(values), key=lambda item: item[1] - item[0])
    ranges = [[value for _, value in part] for _, part in parts]
    return " ".join(f"{one[0]}-{one[-1]}" if len(one) > 1 else f"{one[0]}" for one in ranges)


def _numbers(text: str) -> tuple[int, ...]:
    """Return the values that a text of `_ranges` names; () if it names none, or more than a model has."""
    values: list[int] = []
    for part in text.split():
        first, _, last = part.partition("-")
        if not (first.isdecimal() and (last or first).isdecimal()):
            return ()
        if len(values) + int(last or first) - int(first) >= _MOST:
            return ()
        values += range(int(first), int(last or first) + 1)
    return tuple(values)
