"""The report's figures of probability maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from monai_iou.evaluation.charts import curve
from monai_iou.evaluation.svg import Point

__all__ = ["probability_charts"]


def probability_charts(scores: Mapping[str, Any]) -> dict[str, str]:
    """Return the figures of one structure by their titles.

    Args:
        scores: of `summarise_maps`.
    """
    thresholds, reliability, froc = scores["thresholds"], scores["reliability"], scores["froc"]
    by_threshold = {name: _points(thresholds, scores[key]) for name, key in (("IoU", "iou"), ("Dice", "dice"))}
    calibrated = {
        "this model": _points(reliability["confidence"], reliability["frequency"]),
        "calibrated": [Point(0.0, 0.0, ""), Point(1.0, 1.0, "")],
    }
    order = sorted(range(len(froc["thresholds"])), key=lambda i: froc["false_positives"][i])
    notes = [f"threshold {froc['thresholds'][i]:g}" for i in order]
    rates, shares = ([froc[key][i] for i in order] for key in ("false_positives", "sensitivity"))
    operating = _points(rates, shares, notes)
    return {
        "IoU and Dice at every threshold": curve(by_threshold, "Threshold", "Mean over cases", "Scores by threshold"),
        "Reliability": curve(calibrated, "Mean probability of a bin", "Share of the label", "Reliability diagram"),
        "Lesions found (FROC)": curve(
            {"operating points": operating}, "False positives per case", "Share of lesions found", "FROC curve"
        ),
    }


def _points(x: Sequence[float | None], y: Sequence[float | None], notes: Sequence[str] = ()) -> list[Point]:
    texts = notes or [""] * len(x)
    points = []
    for a, b, text in zip(x, y, texts, strict=True):
        if a is not None and b is not None:
            points.append(Point(a, b, text or f"{b:.3f} at {a:.3f}"))
    return points
