"""The columns of cases.csv and lesions.csv: their names, titles, definitions, and which way is better."""

from __future__ import annotations

from dataclasses import dataclass

from monai_iou.metrics import Challenge


@dataclass(frozen=True)
class Column:
    """How a column of cases.csv is shown and ranked.

    Args:
        title: its heading.
        definition: one sentence for the tooltip and the documents.
        digits: after the point.
        bounded: whether it is a score from 0 to 1.
        better: `higher`, `lower`, or nothing for counts and volumes, which rank no method.
    """

    title: str
    definition: str
    digits: int = 3
    bounded: bool = True
    better: str = "higher"


def _count(title: str, definition: str) -> Column:
    return Column(title, definition, 0, bounded=False, better="")


def _distance(title: str, definition: str) -> Column:
    return Column(title, definition, 2, bounded=False, better="lower")


COLUMNS = {
    "iou": Column("IoU", "Voxels in both masks divided by voxels in either."),
    "dice": Column("Dice", "Twice the voxels in both masks divided by the sum of the voxels of each."),
    "precision": Column("Precision", "Share of the predicted voxels that the reference holds."),
    "recall": Column("Recall", "Share of the reference's voxels that the prediction holds."),
    "reference_ml": Column("Reference, ml", "Volume of the reference.", bounded=False, better=""),
    "prediction_ml": Column("Prediction, ml", "Volume of the prediction.", bounded=False, better=""),
    "boundary_iou": Column("Boundary IoU", "IoU of the bands of voxels next to the two boundaries."),
    "hd95_mm": _distance("HD95, mm", "Larger of the two 95th percentiles of the distances between the surfaces."),
    "nsd": Column("NSD", "Share of both surfaces within the tolerance of the other, by area."),
    "assd_mm": _distance("ASSD, mm", "Mean of all distances from either surface to the other."),
    "lesion_tp": _count("Lesions TP", "Lesions of the reference that the prediction finds."),
    "lesion_fp": _count("Lesions FP", "Predicted lesions without a partner in the reference."),
    "lesion_fn": _count("Lesions FN", "Lesions of the reference that the prediction misses."),
    "lesion_f1": Column("Lesion F1", "TP / (TP + FP/2 + FN/2) over lesions."),
    "pq": Column("PQ", "Panoptic quality over lesions, SQ x RQ."),
    "sq": Column("SQ", "Mean IoU of the matched lesions."),
    "rq": Column("RQ", "Recognition quality: lesion F1 by another name."),
    "cc_iou": Column("CC-IoU", "Mean IoU inside the region that is nearest to each reference lesion."),
    "fragments": _count(
        "Fragments", "Predicted lesions beyond the first that overlap the same lesion of the reference."
    ),
    "merges": _count("Merges", "Lesions of the reference beyond the first that the same predicted lesion overlaps."),
    "voxels_tp": _count("Voxels TP", "Voxels in both masks."),
    "voxels_fp": _count("Voxels FP", "Voxels in the prediction alone."),
    "voxels_fn": _count("Voxels FN", "Voxels in the reference alone."),
    "voxels_tn": _count("Voxels TN", "Voxels in neither mask; ignored voxels are left out."),
    "relative_volume_error": Column(
        "Volume error", "(Prediction minus reference) divided by the reference's volume.", bounded=False, better=""
    ),
    "diagonal_mm": Column(
        "Diagonal, mm", "Diagonal of the image: what an undefined distance counts as.", 1, bounded=False, better=""
    ),
}
SCORE_COLUMNS = tuple(COLUMNS)
CASE_COLUMNS = ("case", "label", *SCORE_COLUMNS)
LESION_COLUMNS = (
    "case", "label", "lesion", "kind", "status", "volume_ml", "centroid_x_mm", "centroid_y_mm", "centroid_z_mm",
    "matched_iou",
)  # fmt: skip
FAILURE_COLUMNS = ("case", "reason", "prediction", "reference")


def columns_of(challenge: Challenge | None) -> dict[str, Column]:
    """The columns of cases.csv: those above, and a challenge's own by the names it gives them."""
    if challenge is None:
        return COLUMNS
    # ISLES'22 calls its Dice as ours is called: the column is then theirs, 1 where both masks are empty.
    own = {
        name: Column(
            COLUMNS[name].title if name in COLUMNS else name,
            f"{challenge.title}: {name} ({challenge.source}).",
            bounded=name in COLUMNS,
            better=COLUMNS[name].better if name in COLUMNS else "",
        )
        for name in challenge.columns
    }
    return {**COLUMNS, **own}
