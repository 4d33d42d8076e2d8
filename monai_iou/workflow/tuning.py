"""Choose a threshold and the smallest components that raise the mean IoU of the validation cases.

Where nothing raises it, nothing is done. Sizes are in mm^3, so that they mean the same on every image's own grid.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from monai_iou.components import label_components
from monai_iou.scores import iou

__all__ = ["CONNECTIVITY", "Postprocessing", "compact_prediction", "tune"]

THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(2, 19))
MAX_SIZES = 64
CONNECTIVITY = 26


@dataclass(frozen=True)
class Postprocessing:
    """How labels are made of probabilities.

    Attributes:
        threshold: least probability of the foreground, for one foreground class; None takes the largest
            probable class (argmax).
        min_size_mm3: for each foreground class, the volume below which a component is background.
    """

    threshold: float | None = None
    min_size_mm3: tuple[float, ...] = ()

    def to_json(self) -> str:
        """Return it as JSON text."""
        return json.dumps(asdict(self), indent=2)


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
    """Choose threshold and smallest sizes.

    Args:
        cases: for each validation case what `needed` keeps of its probabilities, and its label map (*S).
        voxel_mm3: volume of their voxels.
        classes: with the background.

    Returns:
        The settings, and the mean IoU without and with them. The mean is over the foreground classes of a case, then
        over cases; a class in neither map is left out, as in `IoUMetric`.
    """
    nothing = Postprocessing(None, (0.0,) * (classes - 1))
    best, before, best_score = nothing, 0.0, -np.inf
    for threshold in (None, *(THRESHOLDS if classes == 2 else ())):
        maps = [
            prediction if classes > 2 else prediction > (0.5 if threshold is None else threshold)
            for prediction, _ in cases
        ]
        labels = [(prediction, label) for prediction, (_, label) in zip(maps, cases, strict=True)]
        candidates = [_class_scores(labels, value) for value in range(1, classes)]
        if threshold is None:
            before = best_score = _mean([scores[0] for _, scores in candidates])
        chosen = [_best_size(scores) for _, scores in candidates]
        for indices in ([0] * len(chosen), chosen):
            score = _mean([scores[index] for index, (_, scores) in zip(indices, candidates, strict=True)])
            if score > best_score:  # a tie keeps what does less
                limits = [sizes[index] for index, (sizes, _) in zip(indices, candidates, strict=True)]
                best = Postprocessing(threshold, tuple(float(limit) * voxel_mm3 for limit in limits))
                best_score = score
    return best, before, float(best_score)


def _mean(scores: Sequence[NDArray[Any]]) -> float:
    """Mean of (cases,) scores of each class, NaN left out; -inf without any."""
    table = np.stack(scores, 1)
    rows = table[~np.isnan(table).all(1)]
    return float(np.nanmean(rows, 1).mean()) if len(rows) else -np.inf


def _best_size(scores: NDArray[Any]) -> int:
    return int(np.argmax([_mean([row]) for row in scores]))  # the first of equal ones: the smallest


def _class_scores(maps: Sequence[tuple[NDArray[Any], NDArray[Any]]], value: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return smallest sizes in voxels to try, 0 first, and the IoU (sizes, cases) with each of them."""
    counted = [_components(prediction == value, label == value) for prediction, label in maps]
    present = np.unique(np.concatenate([sizes for sizes, _, _ in counted]))
    # A limit at a component's own size keeps it; one past the largest would remove everything.
    wanted = np.concatenate([[0], present[1:]])
    wanted = np.unique(wanted[np.linspace(0, len(wanted) - 1, min(len(wanted), MAX_SIZES)).astype(int)])
    scores = np.empty((len(wanted), len(maps)))
    for case, (sizes, overlaps, true) in enumerate(counted):
        for row, smallest in enumerate(wanted):
            kept = sizes >= smallest
            scores[row, case] = iou(overlaps[kept].sum(), sizes[kept].sum(), true, empty=np.nan)
    return wanted, scores


def _components(prediction: NDArray[np.bool_], true: NDArray[np.bool_]) -> tuple[NDArray[Any], NDArray[Any], int]:
    """Return each component's size, its overlap with the reference, and the reference's size, in voxels."""
    components, count = label_components(prediction, CONNECTIVITY)
    flat = components.ravel()
    sizes = np.bincount(flat, minlength=count + 1)[1:]
    overlaps = np.bincount(flat[true.ravel()], minlength=count + 1)[1:]
    return sizes, overlaps, int(true.sum())
