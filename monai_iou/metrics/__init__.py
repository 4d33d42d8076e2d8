"""Metrics of segmentations: pure functions, and MONAI metrics over them; and metrics of probabilities.

Pure functions take NumPy arrays or tensors, label maps or boolean masks as named, and spacing in mm for each axis (a
number, a sequence, or None for 1 mm). Everything is computed from statistics that the functions also return, so
that scores of a case, of a data set and of an interval come from the same counts.

    iou_counts(prediction, reference, num_classes, ignore_index=None)
        -> ClassCounts(intersection, prediction, reference; .union)
    iou_from_counts(intersection, prediction, reference, ignore_empty="both") -> float32 tensor
    fine_grained_iou(intersection, union, *, active=None, worst=(5, 10, 50), reference=None, labelled=None)
        -> dict: iou_d, iou_i, iou_c, iou_iq, iou_cq, iou_i_worst_5, ...

of one pair of binary masks (crop them once with `crop_to_union` where several of these follow; `crop.offset` is in
voxels):

    crop_to_union(prediction, reference, *, margin=0) -> Crop(prediction, reference, offset)
    overlap_scores(prediction, reference, *, spacing=None, ignore_empty="both")
        -> OverlapScores(iou, dice, precision, recall, reference_ml, prediction_ml, ...)
    overlap_from_counts(intersection, prediction, reference, *, spacing=None, ignore_empty="both") -> OverlapScores
    lesion_scores(prediction, reference, *, spacing=None, threshold=0.5, connectivity=None, affine=None, label=1,
                  match=None, pairing="one-to-one", strict=False, min_volume_mm3=0, dilation=0, instances=False)
        -> LesionScores(tp, fp, fn, precision, recall, f1, sq, rq, pq, cc_iou, cc_dice, both_empty, lesions, ...)
    challenge_scores(challenge, prediction, reference, *, spacing=None, voxels=None)
        -> dict, the challenge's own columns
    boundary_iou(prediction, reference, *, width=2.0, spacing=None, ignore_empty="both", ignored=None,
                 distance="euclidean") -> float
    surface_scores(prediction, reference, *, tolerances=(1.0,), spacing=None)
        -> SurfaceScores(hd95_mm, assd_mm, nsd: tuple)
"""

from monai_iou.metrics.base import reduce_scores
from monai_iou.metrics.boundary import boundary_counts, boundary_iou
from monai_iou.metrics.boundary_metric import BoundaryIoUMetric
from monai_iou.metrics.calibration import CalibrationMetric, ReliabilityDiagram
from monai_iou.metrics.challenges import CHALLENGES, Challenge, challenge_scores
from monai_iou.metrics.detection import DetectionScores, Lesion, VolumeBin, recall_by_volume
from monai_iou.metrics.fine_grained import fine_grained_iou
from monai_iou.metrics.iou import ClassCounts, IoUMetric, iou_counts, iou_from_counts
from monai_iou.metrics.lesion import LesionScores, lesion_scores
from monai_iou.metrics.lesion_metric import LesionIoUMetric
from monai_iou.metrics.overlap import Crop, OverlapScores, crop_to_union, overlap_from_counts, overlap_scores
from monai_iou.metrics.surface import SurfaceScores, surface_scores
from monai_iou.metrics.threshold import ThresholdCurves, ThresholdIoUMetric

__all__ = [
    "CHALLENGES",
    "BoundaryIoUMetric",
    "CalibrationMetric",
    "Challenge",
    "ClassCounts",
    "Crop",
    "DetectionScores",
    "IoUMetric",
    "Lesion",
    "LesionIoUMetric",
    "LesionScores",
    "OverlapScores",
    "ReliabilityDiagram",
    "SurfaceScores",
    "ThresholdCurves",
    "ThresholdIoUMetric",
    "VolumeBin",
    "boundary_counts",
    "boundary_iou",
    "challenge_scores",
    "crop_to_union",
    "fine_grained_iou",
    "iou_counts",
    "iou_from_counts",
    "lesion_scores",
    "overlap_from_counts",
    "overlap_scores",
    "recall_by_volume",
    "reduce_scores",
    "surface_scores",
]
