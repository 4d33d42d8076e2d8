"""What one pass over the voxels computes, and the order of its rows."""

from __future__ import annotations

from dataclasses import dataclass

INTERSECTION, PREDICTION, TARGET, CROSS_ENTROPY, CONFIDENCE, COUNT = range(6)
ROWS = 6


@dataclass(frozen=True)
class PassSpec:
    """What one pass computes; losses whose specifications agree share a pass.

    `overlap=None` leaves out intersection and prediction, for losses that are functions of the cross-entropy alone.
    """

    activation: str | None = "softmax"
    overlap: str | None = "product"
    power: float = 1.0
    cross_entropy: bool = False
    focal: float = 0.0
    label_smoothing: float = 0.0
    confidence: bool = False

    def rows(self) -> list[int]:
        """Return the rows that :func:`statistics` yields, in its order."""
        rows = [] if self.overlap is None else [INTERSECTION, PREDICTION]
        rows += [TARGET, *([CROSS_ENTROPY] if self.cross_entropy else [])]
        return [*rows, CONFIDENCE] if self.confidence else rows
