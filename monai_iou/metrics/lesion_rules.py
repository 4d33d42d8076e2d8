"""When a lesion counts as found: how much two components must overlap, and how many may be matched with one.

    "any"            one shared voxel
    "iou:0.5"        |p ∩ r| / |p ∪ r| of at least 0.5 (above it with `strict`)
    "overlap:0.25"   |p ∩ r| / |r|, the share of the reference component that is covered

With one-to-one pairing, as many pairs as possible are matched and each component is used once, so that a remaining
fragment is a false positive. With many-to-one pairing, a reference component is found if any predicted component
reaches the threshold with it, and a predicted component is correct if it reaches the threshold with any reference
component. For "overlap", all components that touch the other one are taken together. Fragments and merged lesions then
count as found.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from monai_iou.checks import check_choice
from monai_iou.metrics.components import Overlaps, match_one_to_one

__all__ = ["LesionRule", "Matching", "Pairing", "lesion_rule", "match_components"]

Pairing: TypeAlias = Literal["one-to-one", "many-to-one"]

PAIRINGS = ("one-to-one", "many-to-one")
_MEASURES = ("any", "iou", "overlap")

_IntArray = npt.NDArray[np.int64]
_FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LesionRule:
    """The rule that decides when a reference component counts as found; `str` states it in words."""

    measure: Literal["any", "iou", "overlap"] = "iou"
    threshold: float = 0.5
    strict: bool = False
    pairing: Pairing = "one-to-one"

    def __str__(self) -> str:
        """Return the rule in words.

        >>> str(LesionRule()), str(LesionRule("any", pairing="many-to-one"))
        ('IoU of at least 0.5, one to one', 'any overlap, many to one')
        """
        pairing = self.pairing.replace("-", " ")
        if self.measure == "any" or (self.threshold == 0 and not self.strict):
            return f"any overlap, {pairing}"
        least = "above" if self.strict else "of at least"
        name = "IoU" if self.measure == "iou" else "share of the reference lesion covered"
        return f"{name} {least} {self.threshold:g}, {pairing}"

    def reached(self, values: _FloatArray) -> npt.NDArray[np.bool_]:
        """Return which of the shares of overlapping components reach the threshold, as bool."""
        if self.measure == "any":
            return values > 0
        return values > self.threshold if self.strict else (values >= self.threshold) & (values > 0)


def lesion_rule(
    match: str | None,
    threshold: float | Literal["any"] = 0.5,
    strict: bool = False,
    pairing: Pairing = "one-to-one",
) -> LesionRule:
    """Return the rule that the arguments describe.

    Args:
        match: "any", "iou:0.5" or "overlap:0.25"; None takes `threshold` instead.
        threshold: an IoU from 0 to 1, or "any"; used only without `match`.
        strict: whether the threshold must be exceeded, as in the panoptic quality of Kirillov et al.
        pairing: "one-to-one" or "many-to-one".

    Raises:
        ValueError: an argument is not one of the above.

    Example:
        >>> lesion_rule("overlap:0.25").threshold
        0.25
    """
    check_choice("pairing", pairing, PAIRINGS)
    if match is None:
        limit = iou_threshold(threshold)
        return LesionRule("any" if limit == 0 and not strict else "iou", limit, strict, pairing)
    measure, _, number = str(match).partition(":")
    try:
        limit = float(number) if number else 0.0
    except ValueError:
        limit = -1.0
    if measure not in _MEASURES or (measure == "any") == bool(number) or not 0 <= limit <= 1:
        message = (
            f'Expected `match` to be "any", "iou:0.5" or "overlap:0.25", but got {match!r}: name what the components '
            "must share, and how much, from 0 to 1."
        )
        raise ValueError(message)
    return LesionRule("any" if measure == "any" else "iou" if measure == "iou" else "overlap", limit, strict, pairing)


def iou_threshold(threshold: float | Literal["any"]) -> float:
    """Return the IoU that a pair must reach; 0 for "any"."""
    if threshold == "any":
        return 0.0
    if not isinstance(threshold, Real) or not 0 <= threshold <= 1:
        message = (
            f'Expected `threshold` to be an IoU in [0, 1] or "any", but got {threshold!r}: choose 0.5, the usual '
            'IoU, or "any" for one shared voxel.'
        )
        raise ValueError(message)
    return float(threshold)


class Matching(NamedTuple):
    """The matched components."""

    pairs: _IntArray
    """Indices into the overlaps, one for each reference component that is found: the overlap with its best partner."""
    right: npt.NDArray[np.bool_]
    """Which predicted components are not false positives."""


def match_components(overlaps: Overlaps, rule: LesionRule) -> Matching:
    """Match the predicted and the reference components by a rule."""
    shares = overlaps.iou if rule.measure != "overlap" else overlaps.covered
    right = np.zeros(len(overlaps.prediction_sizes), dtype=bool)
    if rule.pairing == "one-to-one":
        pairs = match_one_to_one(overlaps, np.flatnonzero(rule.reached(shares)))
        right[overlaps.prediction[pairs]] = True
        return Matching(pairs, right)
    if rule.measure == "overlap":
        detected = rule.reached(_covered(overlaps.reference, overlaps.intersection, overlaps.reference_sizes))
        right = rule.reached(_covered(overlaps.prediction, overlaps.intersection, overlaps.prediction_sizes))
        return Matching(_best_pairs(overlaps, np.flatnonzero(detected[overlaps.reference])), right)
    candidates = np.flatnonzero(rule.reached(shares))
    right[overlaps.prediction[candidates]] = True
    return Matching(_best_pairs(overlaps, candidates), right)


def _covered(component: _IntArray, intersection: _IntArray, sizes: _IntArray) -> _FloatArray:
    """Share of each component that the other side's components cover together."""
    return np.bincount(component, weights=intersection, minlength=len(sizes)) / sizes


def _best_pairs(overlaps: Overlaps, candidates: _IntArray) -> _IntArray:
    """The candidate of largest IoU for each reference component that has one."""
    order = candidates[np.lexsort((-overlaps.iou[candidates], overlaps.reference[candidates]))]
    _, first = np.unique(overlaps.reference[order], return_index=True)
    return np.sort(order[first])
