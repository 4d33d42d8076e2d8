"""What one pass over the voxels computes, and the order of its rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

from monai_iou import checks

INTERSECTION, PREDICTION, TARGET, CROSS_ENTROPY, CONFIDENCE, COUNT, BACKGROUND_ENTROPY = range(7)
ROWS = 7


@dataclass(frozen=True)
class PassSpec:
    """What one pass computes; losses whose specifications agree share a pass.

    `overlap=None` leaves out intersection and prediction, for losses that are functions of the cross-entropy alone.
    With `split`, a binary cross-entropy (of a sigmoid, or of one channel) comes in two rows: of the voxels of a class,
    and of the others.
    `bins` asks for histograms of errors of that resolution as well, for the Lovasz losses.
    """

    activation: str | None = "softmax"
    overlap: str | None = "product"
    power: float = 1.0
    cross_entropy: bool = False
    focal: float = 0.0
    label_smoothing: float = 0.0
    confidence: bool = False
    bins: int | None = None
    split: bool = False

    @property
    def has_sums(self) -> bool:
        """Whether more than volumes and counts is summed."""
        return self.overlap is not None or self.cross_entropy

    def rows(self) -> list[int]:
        """Return the rows that :func:`statistics` yields, in its order."""
        rows = [] if self.overlap is None else [INTERSECTION, PREDICTION]
        rows += [TARGET, *([CROSS_ENTROPY] if self.cross_entropy else [])]
        rows += [BACKGROUND_ENTROPY] if self.split else []
        return [*rows, CONFIDENCE] if self.confidence else rows


def checked_spec(
    activation: str | None,
    overlap: str,
    power: float,
    cross_entropy: bool,
    gamma: float,
    label_smoothing: float,
    confidence: bool,
) -> PassSpec:
    """Check the options of a pass and put them together."""
    checks.check_choice("activation", activation, checks.ACTIVATIONS)
    checks.check_choice("overlap", overlap, checks.OVERLAPS)
    power = checks.check_positive("power", power)
    if power < 1:
        message = (
            f"Expected `power` to be at least 1, but got {power}: choose 1 or more, because below 1 the gradient is "
            "infinite at p = 0."
        )
        raise ValueError(message)
    if overlap == "min_max" and power != 1:
        message = (
            f"Expected `power` to be 1 with the soft-label (min_max) overlap, but got {power}: choose one of them."
        )
        raise ValueError(message)
    gamma = checks.check_positive("gamma", gamma, allow_zero=True)
    smoothing = checks.check_fraction("label_smoothing", label_smoothing)
    return PassSpec(activation, overlap, power, cross_entropy, gamma, smoothing, confidence)


def joined(first: PassSpec, second: PassSpec, *, hard: bool) -> PassSpec | None:
    """Return a specification that serves both, or None if there is none.

    With `hard` labels y^q = y, so that a cross-entropy, which divides by the sum of y, accepts any power.
    """
    if first.activation != second.activation:
        return None
    region, other = (first, second) if first.overlap is not None else (second, first)
    if other.overlap is not None:
        if (region.overlap, region.power) != (other.overlap, other.power):
            return None
    elif region.power != 1 and not hard:
        return None
    entropy = first if first.cross_entropy else second
    if (
        first.cross_entropy
        and second.cross_entropy
        and (first.focal, first.label_smoothing) != (second.focal, second.label_smoothing)
    ):
        return None
    if None not in (first.bins, second.bins) and first.bins != second.bins:
        return None
    return replace(
        region,
        cross_entropy=entropy.cross_entropy,
        focal=entropy.focal,
        label_smoothing=entropy.label_smoothing,
        confidence=first.confidence or second.confidence,
        bins=second.bins if first.bins is None else first.bins,
        split=first.split or second.split,
    )
