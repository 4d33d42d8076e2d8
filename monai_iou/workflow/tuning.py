"""Choose thresholds and the smallest components that raise the mean IoU of the validation cases.

Where nothing raises it, nothing is done. Sizes are in mm^3, so that they mean the same on every image's own grid.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from monai_iou.components import label_components
from monai_iou.metrics.iou import iou_from_counts
from monai_iou.scores import iou
from monai_iou.voxels.probability_bins import probability_histograms

__all__ = [
    "CONNECTIVITY",
    "Postprocessing",
    "compact_prediction",
    "labels_of",
    "threshold_scores",
    "tune",
    "tune_classes",
]

THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(2, 19))
REGION_THRESHOLD = 0.5  # where no other is given
RESOLUTION = 4000  # nodes of the histograms, the thresholds among them: a probability is rounded by 1/8000 at most
MAX_SIZES = 64
CONNECTIVITY = 26

Threshold: TypeAlias = float | Sequence[float] | None
# Of a class in a case: the components' sizes, their overlaps with the reference, and the size of the reference, in
# voxels; None where the class was not annotated.
_Counted: TypeAlias = tuple[NDArray[Any], NDArray[Any], int] | None


@dataclass(frozen=True)
class Postprocessing:
    """How labels are made of probabilities.

    Attributes:
        threshold: least probability of the foreground, for one foreground class; for several, one number for each of
            them, see :func:`labels_of`. None takes the most probable class, or regions above 1/2.
        min_size_mm3: for each foreground class, the volume below which a component is background.
    """

    threshold: Threshold = None
    min_size_mm3: tuple[float, ...] = ()

    def to_json(self) -> str:
        """Return it as JSON text."""
        return json.dumps(asdict(self), indent=2)


def labels_of(probabilities: torch.Tensor, threshold: Threshold = None, exclusive: bool = True) -> torch.Tensor:
    """Return the label map (1, *S) that probabilities (C, *S) give, or of regions that overlap their maps (C, *S).

    Without a threshold, a voxel belongs to the most probable class, and to every region above 1/2. With thresholds t of
    the foreground classes, it belongs to the class with the largest p / t among those with p > t, else to the
    background; and to every region with p > t. The map of the regions' background is always that above 1/2.

    Raises:
        ValueError: the number of thresholds is not that of the foreground classes.

    Example:
        >>> probabilities = torch.tensor([[0.5, 0.8], [0.3, 0.1], [0.2, 0.1]])
        >>> labels_of(probabilities).tolist(), labels_of(probabilities, (0.25, 0.15)).tolist()
        ([[0, 0]], [[2, 0]])
    """
    if threshold is None and exclusive:
        return probabilities.argmax(0, keepdim=True)
    foreground = probabilities[1:]
    if threshold is None:
        limits: Sequence[float] = (REGION_THRESHOLD,) * len(foreground)
    else:
        limits = threshold if isinstance(threshold, Sequence) else (threshold,)
    if len(limits) != len(foreground):
        message = (
            f"Expected a threshold for each foreground class, {len(foreground)} of them, but got {threshold}: give as "
            "many numbers, or None for none."
        )
        raise ValueError(message)
    pairs = list(zip(foreground, limits, strict=True))
    if not exclusive:
        return torch.stack([probabilities[0] > REGION_THRESHOLD, *(values > limit for values, limit in pairs)])
    largest = torch.zeros_like(probabilities[0])
    labels = torch.zeros_like(largest, dtype=torch.int64)
    for number, (values, limit) in enumerate(pairs, start=1):
        share = values / limit
        wins = (values > limit) & (share > largest)
        largest, labels = torch.where(wins, share, largest), labels.masked_fill(wins, number)
    return labels[None]


def compact_prediction(probabilities: torch.Tensor) -> NDArray[Any]:
    """Return what `tune` needs of a case's probabilities (C, *S), a fraction of their memory.

    Returns:
        The probability of the foreground, (*S) float32, for two classes; else the most probable class, (*S).
    """
    if len(probabilities) == 2:
        return np.asarray(probabilities[1].to("cpu", torch.float32, copy=True).numpy())
    most_probable = probabilities.argmax(0)
    return np.asarray(most_probable.to(torch.uint8 if len(probabilities) <= 256 else torch.int32).cpu().numpy())


def tune(
    cases: Sequence[tuple[NDArray[Any], NDArray[Any]]], voxel_mm3: float, classes: int
) -> tuple[Postprocessing, float, float]:
    """Choose the threshold of a single foreground class, and smallest sizes.

    With more classes, which are then label maps already, only sizes are chosen; `tune_classes` chooses both.

    Args:
        cases: for each validation case what `compact_prediction` keeps of its probabilities, and its label map (*S),
            NaN throughout where a single foreground class was not annotated.
        voxel_mm3: volume of their voxels.
        classes: with the background.

    Returns:
        The settings, and the mean IoU without and with them. The mean is over the foreground classes of a case, then
        over cases; a class in neither map is left out, as in `IoUMetric`.
    """

    def counted(threshold: float | None) -> list[list[_Counted]]:
        limit = 0.5 if threshold is None else threshold
        maps = [prediction if classes > 2 else prediction > limit for prediction, _ in cases]
        return [
            [_counted(prediction == value, label, value) for prediction, (_, label) in zip(maps, cases, strict=True)]
            for value in range(1, classes)
        ]

    thresholds = (None, *(THRESHOLDS if classes == 2 else ()))
    return _choose(((threshold, counted(threshold)) for threshold in thresholds), voxel_mm3)


def tune_classes(
    cases: Iterable[tuple[torch.Tensor, torch.Tensor]], voxel_mm3: float, exclusive: bool = True
) -> tuple[Postprocessing, float, float]:
    """Choose a threshold and a smallest size for each of several foreground classes, or of regions that overlap.

    Each threshold is chosen for its class against the rest: that with the highest mean IoU over the cases in which the
    class counts. All of them together are kept only if they raise the mean IoU of the labels that they give.

    The probabilities of all cases may not fit into memory together. So the cases are gone through twice, and what is
    kept of each is its IoU at every threshold and the sizes of its components.

    Args:
        cases: for each validation case its probabilities (C, *S), and its label map (1, *S) or maps (C, *S), NaN
            throughout where a class was not annotated. An iterator would be empty the second time.
        voxel_mm3: volume of their voxels.
        exclusive: whether a voxel belongs to one class.

    Returns:
        See `tune`.
    """

    # Functions, as a loop would keep the volumes of one case while the next one is predicted.
    def counted(case: tuple[torch.Tensor, torch.Tensor], threshold: Threshold = None) -> list[_Counted]:
        probabilities, label = case
        return _counted_classes(labels_of(probabilities, threshold, exclusive), label, len(probabilities))

    def first_look(case: tuple[torch.Tensor, torch.Tensor]) -> tuple[NDArray[np.float64], list[_Counted]]:
        return threshold_scores(*case), counted(case)

    curves, plain = zip(*map(first_look, cases), strict=True)
    candidates: list[tuple[Threshold, list[list[_Counted]]]] = [(None, _by_class(plain))]
    chosen = _best_thresholds(curves)
    if exclusive or any(threshold != REGION_THRESHOLD for threshold in chosen):
        candidates.append((chosen, _by_class([*map(partial(counted, threshold=chosen), cases)])))
    return _choose(candidates, voxel_mm3)


def threshold_scores(probabilities: torch.Tensor, label: torch.Tensor) -> NDArray[np.float64]:
    """Return the IoU of each foreground class at each of `THRESHOLDS`, from one pass over the voxels.

    It is that of `ThresholdIoUMetric`, which cannot be asked here: every rank would have to call it.

    Args:
        probabilities: (C, *S).
        label: label map (1, *S) or maps (C, *S), NaN throughout where a class was not annotated.

    Returns:
        (C - 1, T); NaN where a class is in neither map, or was not annotated.
    """
    target = (label.nan_to_num() if label.is_floating_point() else label).to(probabilities.device)
    histograms = probability_histograms(probabilities[None], target[None], activation=None, resolution=RESOLUTION)
    above = histograms.counts[0, 1:].cpu().flip(-1).cumsum(-1).flip(-1)
    outside, inside = above[..., [round(threshold * RESOLUTION) for threshold in THRESHOLDS]].unbind(1)
    found = iou_from_counts(inside, inside + outside, above[:, 1, :1].expand_as(inside)).double()
    if len(label) > 1:
        found[label[1:].flatten(1)[:, 0].isnan().cpu()] = torch.nan
    return np.asarray(found.numpy())


def _best_thresholds(curves: Sequence[NDArray[np.float64]]) -> tuple[float, ...]:
    """The threshold with the highest mean of the cases' IoU (C - 1, T) for each class; of equal ones nearest to 1/2."""
    table = np.stack(curves)
    counts = (~np.isnan(table)).sum(0)
    means = np.where(counts > 0, np.nansum(table, 0) / np.maximum(counts, 1), -1.0)
    order = sorted(range(len(THRESHOLDS)), key=lambda index: abs(THRESHOLDS[index] - 0.5))
    return tuple(THRESHOLDS[order[place]] for place in means[:, order].argmax(1))


def _choose(
    candidates: Iterable[tuple[Threshold, list[list[_Counted]]]], voxel_mm3: float
) -> tuple[Postprocessing, float, float]:
    """Return the best settings and the scores without and with them.

    Args:
        candidates: thresholds, None first, with what was counted of each class in each case.
        voxel_mm3: volume of the voxels.
    """
    best, before, best_score = Postprocessing(), -np.inf, -np.inf
    for threshold, classes in candidates:
        tables = [_class_scores(cases) for cases in classes]
        if threshold is None:
            best = Postprocessing(None, (0.0,) * len(tables))
            before = best_score = _mean([scores[0] for _, scores in tables])
        chosen = [_best_size(scores) for _, scores in tables]
        for indices in ([0] * len(chosen), chosen):
            score = _mean([scores[index] for index, (_, scores) in zip(indices, tables, strict=True)])
            if score > best_score:  # a tie keeps what does less
                limits = [sizes[index] for index, (sizes, _) in zip(indices, tables, strict=True)]
                best = Postprocessing(threshold, tuple(float(limit) * voxel_mm3 for limit in limits))
                best_score = score
    return best, float(before), float(best_score)


def _mean(scores: Sequence[NDArray[Any]]) -> float:
    """Mean of (cases,) scores of each class, NaN left out; -inf without any."""
    table = np.stack(scores, 1)
    rows = table[~np.isnan(table).all(1)]
    return float(np.nanmean(rows, 1).mean()) if len(rows) else -np.inf


def _best_size(scores: NDArray[Any]) -> int:
    return int(np.argmax([_mean([row]) for row in scores]))  # the first of equal ones: the smallest


def _class_scores(counted: Sequence[_Counted]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return smallest sizes in voxels to try, 0 first, and the IoU (sizes, cases) with each of them."""
    present = np.unique(np.concatenate([np.zeros(0, np.int64), *(case[0] for case in counted if case is not None)]))
    # A limit at a component's own size keeps it; one past the largest would remove everything.
    wanted = np.concatenate([[0], present[1:]])
    wanted = np.unique(wanted[np.linspace(0, len(wanted) - 1, min(len(wanted), MAX_SIZES)).astype(int)])
    scores = np.full((len(wanted), len(counted)), np.nan)
    for number, case in enumerate(counted):
        if case is None:
            continue
        sizes, overlaps, true = case
        for row, smallest in enumerate(wanted):
            kept = sizes >= smallest
            scores[row, number] = iou(overlaps[kept].sum(), sizes[kept].sum(), true, empty=np.nan)
    return wanted, scores


def _counted_classes(labels: torch.Tensor, label: torch.Tensor, classes: int) -> list[_Counted]:
    """Return what is counted of each foreground class, from maps of all classes (C, *S) or from label maps (1, *S)."""
    predicted, true = (np.asarray(maps.cpu()) for maps in (labels, label))
    counted = []
    for value in range(1, classes):
        reference, inside = (true[value], 1) if len(true) > 1 else (true[0], value)
        counted.append(_counted(predicted[value] if len(predicted) > 1 else predicted[0] == value, reference, inside))
    return counted


def _by_class(cases: Sequence[list[_Counted]]) -> list[list[_Counted]]:
    return [list(of_class) for of_class in zip(*cases, strict=True)]


def _counted(prediction: NDArray[np.bool_], label: NDArray[Any], value: int) -> _Counted:
    if np.isnan(label.flat[0]):  # then all of it
        return None
    true = label == value
    components, count = label_components(prediction, CONNECTIVITY)
    flat = components.ravel()
    sizes = np.bincount(flat, minlength=count + 1)[1:]
    overlaps = np.bincount(flat[true.ravel()], minlength=count + 1)[1:]
    return sizes, overlaps, int(true.sum())
