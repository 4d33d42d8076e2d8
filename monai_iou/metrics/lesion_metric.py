"""The lesion scores as a MONAI metric."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from monai.utils.enums import MetricReduction

from monai_iou.checks import check_choice, check_ignore_empty
from monai_iou.metrics.base import PerClassMetric, row_device
from monai_iou.metrics.detection import DetectionScores
from monai_iou.metrics.inputs import ImagePair
from monai_iou.metrics.iou import IgnoreEmpty
from monai_iou.metrics.lesion import lesion_scores
from monai_iou.metrics.lesion_maps import check_components
from monai_iou.metrics.lesion_rules import Pairing, lesion_rule
from monai_iou.spacing import check_spacing

__all__ = ["LesionIoUMetric"]

_STATISTICS = ("references", "predictions", "tp", "iou_sum", "cc_iou", "cc_dice", "f1_area")


class LesionIoUMetric(PerClassMetric):
    """One lesion score of every image and class, (B, C); see `lesion_scores` for the definitions.

    Args:
        include_background: whether class 0 is scored; a single binary map has no background to leave out. None
            (default) leaves it out if it is a background, as in label maps and one-hot maps, but not in overlapping
            regions.
        reduction: name of one of MONAI's `MetricReduction`; an average over nothing is NaN.
        get_not_nans: whether `aggregate` returns a tuple of the score and the number of scores that were averaged.
        score: "pq", "sq", "rq" or "f1", "precision", "recall", "cc_iou", "cc_dice", or "f1_area", the area under the
            F1 over the IoU thresholds. `summary` returns all of them except "f1_area" and "rq", whatever the choice.
        threshold: smallest IoU at which two components can match; "any" asks for one shared voxel.
        connectivity: 6, 18 or 26 neighbours in 3D, 4 or 8 in 2D; None takes the largest number.
        ignore_empty: "both" (default): NaN where neither map has a lesion, and 0 if only the prediction has one. True:
            NaN where the reference has none. False: 1 where neither map has one, and 0 if only the prediction has one.
            Precision and recall stay NaN where they are undefined, which is where TP + FP or TP + FN is 0.
        num_classes: number of classes, including the background; required if both inputs are label maps.
        return_with_label: with "mean_batch", return a dict by "label_0", "label_1", ... or by the names given.
        ignore_index: reference label whose voxels belong to no lesion.
        match: "any", "iou:0.5" or "overlap:0.25" instead of `threshold`.
        pairing: "one-to-one" or "many-to-one".
        strict: whether a pair must exceed the threshold instead of reaching it.
        min_volume_mm3: smaller components are left out.
        dilation: number of dilations; reference components that join when they are dilated so often count as one
            lesion.
        spacing: voxel size in mm of all images; None takes that of MetaTensors, or 1 mm. A call may give another.

    Raises:
        TypeError: a volume is not a number, or a number of classes, an index or a width is not an integer.
        ValueError: an argument is not one of the above.

    Example:
        >>> reference = torch.zeros((1, 1, 8, 8)); reference[..., 1:3, 1:3] = 1; reference[..., 6, 6] = 1
        >>> prediction = torch.zeros((1, 1, 8, 8)); prediction[..., 1:3, 1:4] = 1
        >>> metric = LesionIoUMetric(score="f1")
        >>> metric(prediction, reference)
        tensor([[0.6667]])
    """

    def __init__(
        self,
        include_background: bool | None = None,
        reduction: MetricReduction | str = MetricReduction.MEAN,
        get_not_nans: bool = False,
        score: str = "pq",
        threshold: float | Literal["any"] = 0.5,
        connectivity: int | None = None,
        ignore_empty: IgnoreEmpty = "both",
        num_classes: int | None = None,
        return_with_label: bool | Sequence[str] = False,
        ignore_index: int | None = None,
        *,
        match: str | None = None,
        pairing: Pairing = "one-to-one",
        strict: bool = False,
        min_volume_mm3: float = 0.0,
        dilation: int = 0,
        spacing: Sequence[float] | float | None = None,
    ) -> None:
        super().__init__(include_background, reduction, get_not_nans, num_classes, return_with_label, ignore_index)
        names = ("pq", "sq", "rq", "f1", "precision", "recall", "cc_iou", "cc_dice", "f1_area")
        check_choice("score", score, names)
        check_ignore_empty(ignore_empty)
        self.score = score
        self.rule = lesion_rule(match, threshold, strict, pairing)
        self.threshold = self.rule.threshold
        check_components(connectivity, min_volume_mm3, dilation)
        self.connectivity = connectivity
        self.options: dict[str, Any] = {
            "match": match,
            "threshold": threshold,
            "strict": strict,
            "pairing": pairing,
            "connectivity": connectivity,
            "min_volume_mm3": min_volume_mm3,
            "dilation": dilation,
        }
        self.ignore_empty = ignore_empty
        self.spacing = check_spacing(spacing)

    def _image_row(self, pair: ImagePair, spacing: tuple[float, ...], first_class: int) -> torch.Tensor:
        rows = []
        for p, r in pair.masks(first_class):
            if pair.spatial_dims == 1:  # a line is an image of one row
                p, r, spacing = p[None], r[None], (1.0, *spacing)[-2:]
            scores = lesion_scores(p, r, spacing=spacing, **self.options)
            counts = (scores.tp + scores.fn, scores.tp + scores.fp, scores.tp)
            rows.append((*counts, scores.iou_sum, scores.cc_iou, scores.cc_dice, scores.curve().f1_area))
        return torch.tensor(rows, dtype=torch.float64, device=row_device(pair.reference))

    def _scores(self, rows: torch.Tensor) -> torch.Tensor:
        columns = dict(zip(_STATISTICS, rows.unbind(dim=-1), strict=True))
        references, predictions, tp = columns["references"], columns["predictions"], columns["tp"]
        f1 = 2 * tp / (references + predictions)
        sq = torch.where(tp > 0, columns["iou_sum"] / tp, f1)  # without a match both are 0, or NaN without a lesion
        known = {"f1": f1, "rq": f1, "sq": sq, "pq": sq * f1, "precision": tp / predictions, "recall": tp / references}
        scores = {**columns, **known}[self.score]
        if self.score in ("precision", "recall"):
            return scores.float()
        if self.ignore_empty is True:
            scores = scores.masked_fill(references == 0, math.nan)
        elif self.ignore_empty is False:
            scores = scores.masked_fill(references + predictions == 0, 1.0)
        return scores.float()

    def summary(self) -> list[dict[str, float]]:
        """Count the lesions of all images of all ranks together; every rank must call it.

        Returns:
            One dict for each class: "tp", "fp", "fn", "precision", "recall", "f1", "sq" and "pq" of the pooled lesions,
            "cc_iou" and "cc_dice" averaged over the images that have a score, "images", the number of images, and
            "both_empty", the number of images without a lesion in either map. `str(metric.rule)` states in words when a
            lesion counts as found.

        Raises:
            ValueError: no rank has scored an image yet.
        """
        return [_class_summary(column) for column in self._all_rows().unbind(dim=1)]


def _class_summary(rows: torch.Tensor) -> dict[str, float]:
    rows = rows[~rows[:, 0].isnan()]  # those annotated for this class
    references, predictions, tp, iou_sum, cc_iou, cc_dice, _ = rows.unbind(dim=-1)
    matched = int(tp.sum())
    total = DetectionScores(
        matched, int(predictions.sum()) - matched, int(references.sum()) - matched, float(iou_sum.sum())
    )
    return {
        **{name: float(getattr(total, name)) for name in ("tp", "fp", "fn", "precision", "recall", "f1", "sq", "pq")},
        "cc_iou": float(cc_iou.nanmean()),
        "cc_dice": float(cc_dice.nanmean()),
        "images": float(len(rows)),
        "both_empty": float((references + predictions == 0).sum()),
    }
