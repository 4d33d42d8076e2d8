"""What probability maps say over all cases: the scores at every threshold, calibration, and the FROC curve."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from monai_iou.evaluation.probabilities import OPERATING_POINTS, RESOLUTION
from monai_iou.metrics import CalibrationMetric, ThresholdIoUMetric
from monai_iou.scores import ratio

__all__ = ["dense", "sparse", "stored", "summarise_maps"]

THRESHOLDS = 200  # k / 200
RATES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # false positives per case, as in LUNA16


_Row = tuple[NDArray[np.uint16], NDArray[np.int64]]


def sparse(histogram: NDArray[np.int64]) -> list[_Row]:
    """Return the places and numbers of what is not 0 in a histogram, (2, `RESOLUTION` + 1): few nodes of a sure model.

    >>> histogram = np.zeros((2, RESOLUTION + 1), np.int64)
    >>> histogram[1, [0, 4000]] = 5, 2
    >>> rows = sparse(histogram)
    >>> [[part.tolist() for part in row] for row in rows], np.array_equal(dense(rows), histogram)
    ([[[], []], [[0, 4000], [5, 2]]], True)
    """
    return [stored(places := np.flatnonzero(row), row[places]) for row in histogram]


def stored(places: ArrayLike, numbers: ArrayLike) -> _Row:
    """Return a row of `sparse` from what it holds."""
    return np.asarray(places, np.uint16), np.asarray(numbers, np.int64)


def dense(rows: Sequence[_Row]) -> NDArray[np.int64]:
    """Return the histogram of which `sparse` was made."""
    histogram: NDArray[np.int64] = np.zeros((2, RESOLUTION + 1), np.int64)
    for row, (places, numbers) in zip(histogram, rows, strict=True):
        row[places] = numbers
    return histogram


def summarise_maps(counted: Sequence[Mapping[str, Mapping[str, Any]]], name: str) -> dict[str, Any]:
    """Return the scores of one structure over the cases.

    Args:
        counted: of each case, the `counts` of `count_maps` with their histograms made `sparse`: those of thousands of
            cases would take gigabytes.
        name: of the structure.

    Returns:
        `cases`; `thresholds`, `iou`, `dice` (means over the cases) and `pooled_iou` (of all voxels); `best_threshold`,
        `best_iou`, `iou_at_half`; `average_precision`, `ece`, `ace` and `mce` of all voxels; `reliability` with
        `edges`, `counts`, `confidence` and `frequency`; `froc` with, for each threshold, `sensitivity` and
        `false_positives` per case, and `sensitivity_at` the rates of `RATES`.
    """
    curve, calibration = ThresholdIoUMetric(resolution=THRESHOLDS), CalibrationMetric()
    voxels = np.zeros((2, RESOLUTION + 1), np.int64)
    for case in counted:
        histogram = dense(case[name]["histogram"])
        voxels += histogram
        curve.add_histograms(torch.from_numpy(_at_thresholds(histogram))[None, None])
        calibration.add_histograms(torch.from_numpy(histogram)[None, None])
    curves, diagram = curve.curves(), calibration.reliability()
    return {
        "cases": len(counted),
        "best_threshold": _plain(curves.best_threshold)[0],
        "best_iou": _plain(curves.best_iou)[0],
        "iou_at_half": _plain(curves.iou)[0][THRESHOLDS // 2],
        "average_precision": _average_precision(voxels),
        **{key: _finite(value) for key, value in calibration.summary()[0].items()},
        "thresholds": _plain(curves.thresholds),
        **{key: _plain(getattr(curves, key))[0] for key in ("iou", "dice", "pooled_iou")},
        "reliability": {
            "edges": _plain(diagram.edges),
            **{key: _plain(getattr(diagram, key))[0] for key in ("counts", "confidence", "frequency")},
        },
        "froc": _froc(np.array([case[name]["lesions"] for case in counted])),
    }


def _average_precision(voxels: NDArray[np.int64]) -> float | None:
    """Of all voxels, at all nodes: of fewer thresholds, a sure model's voxels lie between the same two."""
    fine = ThresholdIoUMetric(resolution=RESOLUTION)
    fine.add_histograms(torch.from_numpy(voxels)[None, None])
    return _finite(float(fine.curves().average_precision[0]))


def _at_thresholds(histogram: NDArray[np.int64]) -> NDArray[np.int64]:
    """The histogram on the nodes k / 200: what lies between two of them counts at the lower one, which it reaches."""
    inner = histogram[:, :-1].reshape(2, THRESHOLDS, RESOLUTION // THRESHOLDS).sum(-1)
    joined: NDArray[np.int64] = np.concatenate([inner, histogram[:, -1:]], axis=-1)
    return joined


def _froc(lesions: np.ndarray) -> dict[str, Any]:
    """The operating points, from true positives, false positives and false negatives, (cases, points, 3)."""
    detected, false, missed = lesions.sum(0).T
    sensitivity = [
        _finite(ratio(int(tp), int(tp + fn), empty=math.nan)) for tp, fn in zip(detected, missed, strict=True)
    ]
    rates = [float(fp) / len(lesions) for fp in false]

    def best(rate: float) -> float | None:
        """The highest sensitivity of the points with no more false positives: nothing is read between points."""
        held = [s for s, fp in zip(sensitivity, rates, strict=True) if s is not None and fp <= rate]
        return max(held, default=None)

    return {
        "thresholds": list(OPERATING_POINTS),
        "sensitivity": sensitivity,
        "false_positives": rates,
        "sensitivity_at": {f"{rate:g}": best(rate) for rate in RATES},
    }


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _plain(values: torch.Tensor) -> Any:
    """Plain numbers, None for NaN."""
    if values.ndim > 1:
        return [_plain(row) for row in values]
    return [_finite(value) if isinstance(value, float) else value for value in values.tolist()]
