"""Boundary IoU as a MONAI metric; `boundary` has the definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.utils.enums import MetricReduction

from monai_iou.checks import check_choice, check_ignore_empty
from monai_iou.metrics.base import PerClassMetric, row_device
from monai_iou.metrics.boundary import DISTANCES, BoundaryDistance, boundary_counts, parse_width
from monai_iou.metrics.inputs import ImagePair
from monai_iou.metrics.iou import IgnoreEmpty, iou_from_counts
from monai_iou.spacing import check_spacing

__all__ = ["BoundaryIoUMetric"]


class BoundaryIoUMetric(PerClassMetric):
    """Boundary IoU of every image and class, (B, C); see `boundary_iou` for the definition.

    Args:
        include_background: whether class 0 is scored; a single binary map has no background to leave out. None
            (default) leaves it out if it is a background, as in label maps and one-hot maps, but not in overlapping
            regions.
        reduction: name of one of MONAI's `MetricReduction`; an average over nothing is NaN.
        get_not_nans: whether `aggregate` returns a tuple of the score and the number of scores that were averaged.
        width: thickness of the band in mm, or as a percentage of the diagonal of the image, such as "2%".
        ignore_empty: "both" (default): NaN where a class is in neither map, and 0 for a false positive. True: NaN where
            the reference is empty. False: 1 where both maps are empty, and 0 for a false positive.
        num_classes: number of classes, including the background; required if both inputs are label maps.
        return_with_label: with "mean_batch", return a dict by "label_0", "label_1", ... or by the names given.
        ignore_index: reference label whose voxels are ignored: they belong to no band and form no boundary.
        distance: "euclidean", or "chessboard", which the authors use.
        spacing: voxel size in mm of all images; None takes that of MetaTensors, or 1 mm. A call may give another.

    Raises:
        TypeError: `num_classes` or `ignore_index` is not an integer.
        ValueError: an argument is not one of the above.

    Example:
        >>> metric = BoundaryIoUMetric(width=1.0, num_classes=2)
        >>> metric(torch.tensor([[[0, 1, 1, 1, 1, 0, 0]]]), torch.tensor([[[0, 1, 1, 1, 1, 1, 0]]]), spacing=1.0)
        tensor([[0.3333]])
    """

    def __init__(
        self,
        include_background: bool | None = None,
        reduction: MetricReduction | str = MetricReduction.MEAN,
        get_not_nans: bool = False,
        width: float | str = 2.0,
        ignore_empty: IgnoreEmpty = "both",
        num_classes: int | None = None,
        return_with_label: bool | Sequence[str] = False,
        ignore_index: int | None = None,
        distance: BoundaryDistance = "euclidean",
        *,
        spacing: Sequence[float] | float | None = None,
    ) -> None:
        super().__init__(include_background, reduction, get_not_nans, num_classes, return_with_label, ignore_index)
        check_ignore_empty(ignore_empty)
        check_choice("distance", distance, DISTANCES)
        parse_width(width)
        self.width = width
        self.distance: BoundaryDistance = distance
        self.ignore_empty = ignore_empty
        self.spacing = check_spacing(spacing)

    def _image_row(self, pair: ImagePair, spacing: tuple[float, ...], first_class: int) -> torch.Tensor:
        ignored = None if pair.valid is None else ~pair.valid.cpu().numpy()
        options: dict[str, Any] = {"width": self.width, "distance": self.distance, "ignored": ignored}
        rows = [
            boundary_counts(p.cpu().numpy(), r.cpu().numpy(), spacing=spacing, **options)
            for p, r in pair.masks(first_class)
        ]
        return torch.tensor(rows, dtype=torch.float64, device=row_device(pair.reference))

    def _scores(self, rows: torch.Tensor) -> torch.Tensor:
        return iou_from_counts(rows[..., 0], rows[..., 1], rows[..., 2], self.ignore_empty)
