"""By which rules a case is scored, and what is scored as one structure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from monai_iou.metrics import CHALLENGES, Challenge
from monai_iou.metrics.boundary import BoundaryDistance
from monai_iou.metrics.lesion_rules import LesionRule, Pairing, lesion_rule
from monai_iou.tables import counted

__all__ = ["Rules", "Structure", "split_width"]


@dataclass(frozen=True)
class Structure:
    """A structure that is scored: one label value, or a region of several values."""

    name: str
    values: tuple[int, ...]


@dataclass(frozen=True)
class Rules:
    """By which rules a structure is scored.

    Args:
        tolerance: tolerance of the normalised surface Dice (NSD) in mm.
        tolerances: tolerances in mm for single structures by name, used instead of `tolerance`.
        boundary: width of the bands of the boundary IoU in mm, such as "2mm", or as a percentage of the diagonal of
            the image, such as "2%".
        match: when a lesion counts as found: "any", "iou:0.5" or "overlap:0.25".
        pairing: "one-to-one" or "many-to-one".
        connectivity: 6, 18 or 26 neighbours of a voxel in a volume, which are 4, 8 and 8 in a slice.
        min_volume_mm3: smaller lesions are left out.
        like: challenge whose columns are added by its own rule: a key of `monai_iou.metrics.CHALLENGES`.
        instances: whether the maps hold a number for each lesion, so that no components are looked for.
        strict: whether a threshold of `match` must be exceeded, not only reached.
        dilation: reference components that join when dilated so many times are one lesion, as in BraTS.
        boundary_distance: "euclidean", or "chessboard" as the authors of the boundary IoU measure the width.
    """

    tolerance: float = 1.0
    tolerances: Mapping[str, float] = field(default_factory=dict)
    boundary: str = "2mm"
    match: str = "iou:0.5"
    pairing: Pairing = "one-to-one"
    connectivity: int = 26
    min_volume_mm3: float = 0.0
    like: str | None = None
    instances: bool = False
    strict: bool = False
    dilation: int = 0
    boundary_distance: BoundaryDistance = "euclidean"

    @property
    def challenge(self) -> Challenge | None:
        """The challenge whose columns are added."""
        return None if self.like is None else CHALLENGES[self.like]

    @property
    def in_words(self) -> str:
        """The rule by which a lesion counts as found.

        >>> Rules(match="any").in_words
        'found: any overlap, one to one; components of 26 neighbours (8 in a slice)'
        """
        least = f" of {self.min_volume_mm3:g} mm³ or more" if self.min_volume_mm3 else ""
        near = f"{self.connectivity} neighbours ({self.neighbours(2)} in a slice)"
        lesions = "lesions as numbered" if self.instances else f"components of {near}"
        joined = f", joined by {self.dilation} dilation{'s' if self.dilation > 1 else ''}" if self.dilation else ""
        return f"found: {self.lesion_rule}; {lesions}{joined}{least}"

    @property
    def lesion_in_words(self) -> str:
        """What one lesion of the reference is.

        >>> Rules().lesion_in_words, Rules(instances=True).lesion_in_words
        ('a connected component of the reference', 'what has one number in the reference')
        >>> Rules(dilation=2).lesion_in_words
        'a connected component of the reference, or several that are joined by 2 dilations'
        """
        if self.instances:
            return "what has one number in the reference"
        joined = f", or several that are joined by {counted(self.dilation, 'dilation')}" if self.dilation else ""
        return f"a connected component of the reference{joined}"

    @property
    def lesion_rule(self) -> LesionRule:
        """The rule by which components match."""
        return lesion_rule(self.match, strict=self.strict, pairing=self.pairing)

    def neighbours(self, dimensions: int) -> int:
        """The connectivity in an image of so many dimensions."""
        return self.connectivity if dimensions == 3 else {6: 4, 18: 8, 26: 8}[self.connectivity]

    @property
    def whole(self) -> bool:
        """Whether masks are needed in the whole image: challenges count the background, rounded bands take its size."""
        return self.like is not None or self._rounds

    @property
    def _rounds(self) -> bool:
        """Whether the bands are rounded to whole voxels, as the authors do, which `boundary_iou` does by itself."""
        return self.boundary_distance == "chessboard" and split_width(self.boundary)[1] == "%"

    def boundary_width(self, shape: Sequence[int], spacing: Sequence[float]) -> float | str:
        """The width of the bands in an image of this shape and spacing, in mm or as `boundary_iou` takes it."""
        number, unit = split_width(self.boundary)
        if self._rounds:
            return f"{number}%"
        return number if unit == "mm" else number / 100 * float(np.linalg.norm(np.multiply(shape, spacing)))

    def tolerance_of(self, structure: Structure) -> float:
        """The tolerance of a structure in mm."""
        return self.tolerances.get(structure.name, self.tolerance)


def split_width(text: str) -> tuple[float, str]:
    """A width as its number and its unit, `mm` or `%`.

    Raises:
        ValueError: it is neither, or not above 0.

    >>> split_width("2mm"), split_width("0.5 %")
    ((2.0, 'mm'), (0.5, '%'))
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*(mm|%)\s*", text)
    number = float(match[1]) if match and match[1].count(".") < 2 and match[1] != "." else 0.0
    if match is None or not number > 0:
        message = f"Expected `--boundary` to be a width such as 2mm or 2%, but got {text}: correct it."
        raise ValueError(message)
    return number, match[2]
