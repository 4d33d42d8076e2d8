"""One case: two label maps on one grid -> a row of scores per label and a row per lesion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monai_iou.metrics import (
    Lesion,
    boundary_iou,
    crop_to_union,
    lesion_scores,
    overlap_from_counts,
    surface_scores,
)
from monai_iou.scores import union
from monai_iou.volumes.grid import SHEAR_DEGREES, Grid, align, reorient, resample
from monai_iou.volumes.reading import Volume, VolumeError, file_hash, read_labels

SCORE_COLUMNS = (
    "iou", "dice", "precision", "recall", "reference_ml", "prediction_ml", "boundary_iou", "hd95_mm", "nsd", "assd_mm",
    "lesion_tp", "lesion_fp", "lesion_fn", "lesion_f1", "pq", "sq", "rq", "cc_iou",
)  # fmt: skip
CASE_COLUMNS = ("case", "label", *SCORE_COLUMNS)
LESION_COLUMNS = (
    "case", "label", "lesion", "kind", "status", "volume_ml", "centroid_x_mm", "centroid_y_mm", "centroid_z_mm",
    "matched_iou",
)  # fmt: skip
# Both belong to the definition of the columns; changing one changes the records' version too.
LESION_THRESHOLD = 0.5
BOUNDARY_MM = 2.0
# A label map of more values than this is an image that was passed by mistake.
MAX_LABELS = 256
# Values are counted in pieces: a count of the whole volume would cast it to 8 bytes per voxel.
PIECE = 1 << 20


@dataclass(frozen=True)
class Structure:
    """What is scored as one: a label value, or a region of several."""

    name: str
    values: tuple[int, ...]


@dataclass(frozen=True)
class Settings:
    """How to score a case.

    Args:
        structures: what to score.
        known: label values a prediction may hold besides 0 and `ignore`.
        ignore: reference voxels of this value are excluded from all scores.
        tolerance: of the normalised surface distance, in mm.
        resample: take a prediction on another grid to the reference's by nearest neighbour.
    """

    structures: tuple[Structure, ...]
    known: tuple[int, ...]
    ignore: int | None = None
    tolerance: float = 1.0
    resample: bool = False


def evaluate_case(
    prediction: NDArray[Any],
    reference: NDArray[Any],
    grid: Grid,
    structures: Sequence[Structure],
    ignore: int | None = None,
    tolerance: float = 1.0,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Score two label maps on one grid.

    Args:
        prediction: labels of any integer dtype, shape (X, Y, Z).
        reference: labels of the same shape.
        grid: where the voxels lie; gives volumes, and the spacing that distances are taken along right angles with.
        structures: what to score.
        ignore: reference voxels of this value are excluded from all scores.
        tolerance: of the normalised surface distance, in mm.

    Returns:
        One row per structure (`label`, the columns `SCORE_COLUMNS`, and the voxel counts `intersection` and `union`),
        and one row per lesion: each component of the reference (`tp` or `fn`) and each unmatched one of the
        prediction (`fp`). Scores that are undefined, as all are where both masks are empty, are NaN.

    >>> reference = np.zeros((8, 8, 8), np.uint8)
    >>> reference[2:6, 2:6, 2:6] = 1
    >>> rows, lesions = evaluate_case(reference, reference, Grid((8, 8, 8), np.eye(4)), [Structure("1", (1,))])
    >>> rows[0]["iou"], rows[0]["reference_ml"], lesions[0]["status"]
    (1.0, 0.064, 'tp')
    """
    rows: list[dict[str, Any]] = []
    lesions: list[dict[str, Any]] = []
    ignored = None if ignore is None else reference == ignore
    for structure in structures:
        masks = [mask_of(labels, structure.values) for labels in (prediction, reference)]
        if ignored is not None:
            masks = [mask & ~ignored for mask in masks]
        row, found = _score(masks[0], masks[1], ignored, grid, tolerance)
        rows.append({"label": structure.name, **row})
        lesions += [{"label": structure.name, **lesion} for lesion in found]
    return rows, lesions


def evaluate_files(case: str, prediction: Path, reference: Path, settings: Settings) -> dict[str, Any]:
    """Read one pair and score it; the task that workers run.

    Returns:
        The case's record: plain values that go to JSON and back unchanged.

    Raises:
        VolumeError: a file cannot be read, or the prediction holds a label nobody named.
        GridError: the files lie on different grids and `settings.resample` is false.
    """
    reference_volume = read_labels(reference)
    values = label_values(reference_volume)
    predicted = read_labels(prediction)
    allowed = {0, settings.ignore, *settings.known}
    _refuse_unnamed(predicted, [value for value in label_values(predicted) if value not in allowed], settings.known)
    array, notes = on_reference(case, predicted, reference_volume, settings.resample)
    notes += _shear_notes(case, reference_volume.grid)
    rows, lesions = evaluate_case(
        array, reference_volume.array, reference_volume.grid, settings.structures, settings.ignore, settings.tolerance
    )
    return {
        "case": case,
        "inputs": {"prediction": file_hash(prediction), "reference": file_hash(reference)},
        "reference_values": values,
        "rows": [{"case": case, **row} for row in rows],
        "lesions": [{"case": case, **lesion} for lesion in lesions],
        "notes": notes,
    }


def scan_labels(path: Path) -> list[int]:
    """The label values of one reference, sorted.

    Raises:
        VolumeError: the file cannot be read, or holds so many values that it is an image.
    """
    values = label_values(read_labels(path))
    if len(values) > MAX_LABELS:
        message = (
            f"Expected `{path}` to be a label map, but got {len(values)} different values: pass labels, not images."
        )
        raise VolumeError(message)
    return values


def label_values(volume: Volume) -> list[int]:
    """The values of a label map, sorted.

    >>> label_values(Volume(np.array([[[3, 0, 3]]]), Grid((1, 1, 3), np.eye(4)), Path("x")))
    [0, 3]
    """
    flat = volume.array.reshape(-1, order="A")
    if flat.dtype != np.uint8:
        return [int(value) for value in np.unique(flat)]
    counts = np.zeros(256, dtype=np.int64)
    for start in range(0, flat.size, PIECE):
        counts += np.bincount(flat[start : start + PIECE], minlength=256)
    return [int(value) for value in np.flatnonzero(counts)]


def on_reference(
    case: str, predicted: Volume, reference_volume: Volume, resampling: bool
) -> tuple[NDArray[Any], list[str]]:
    """The prediction's voxels on the reference's grid, and a note if they had to be resampled.

    Raises:
        GridError: the grids differ and `resampling` is false.
    """
    if not resampling:
        return align(predicted.array, predicted.grid, reference_volume.grid), []
    try:
        return align(predicted.array, predicted.grid, reference_volume.grid), []
    except ValueError:
        array, grid = reorient(predicted.array, predicted.grid, reference_volume.grid)
        note = f"{case}: the prediction was resampled by nearest neighbour from {grid} to {reference_volume.grid}."
        return resample(array, grid, reference_volume.grid), [note]


def _shear_notes(case: str, grid: Grid) -> list[str]:
    """Distances need right angles: the distance transforms know spacings only."""
    if grid.shear < SHEAR_DEGREES:
        return []
    return [
        f"{case}: the reference's axes are {grid.shear:.3g} degrees off right angles (gantry tilt): volumes and "
        "overlaps are exact, but HD95, NSD, ASSD, boundary IoU and CC-IoU take the angles as right: resample both "
        "files first."
    ]


def _refuse_unnamed(volume: Volume, unnamed: Sequence[int], known: Sequence[int]) -> None:
    if unnamed:
        voxels = int(np.isin(volume.array, unnamed).sum())
        named = ", ".join(str(value) for value in known if value)
        message = (
            f"Expected `{volume.path}` to hold the labels {named}, but got {', '.join(map(str, unnamed[:5]))} in "
            f"{voxels} voxels: name them in `--labels` or `--regions`, or renumber the prediction."
        )
        raise VolumeError(message)


def mask_of(labels: NDArray[Any], values: Sequence[int]) -> NDArray[np.bool_]:
    """Where `labels` holds one of `values`."""
    mask: NDArray[np.bool_] = labels == values[0]
    for value in values[1:]:
        mask |= labels == value
    return mask


def _score(
    prediction: NDArray[np.bool_],
    reference: NDArray[np.bool_],
    ignored: NDArray[np.bool_] | None,
    grid: Grid,
    tolerance: float,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    predicted, reference_volume = int(np.count_nonzero(prediction)), int(np.count_nonzero(reference))
    intersection = int(np.count_nonzero(prediction & reference))
    overlap = overlap_from_counts(intersection, predicted, reference_volume)
    plane = _plane(grid)
    whole = prediction.squeeze(plane), reference.squeeze(plane)
    hidden = None if ignored is None else ignored.squeeze(plane)
    spacing = tuple(np.delete(grid.spacing, plane))
    crop = crop_to_union(*whole)
    masks = crop.prediction, crop.reference
    lesion = lesion_scores(*masks, spacing=spacing, threshold=LESION_THRESHOLD)
    # The lesions' volumes are of voxels with right angles, and of a slice of 1 mm.
    volume = grid.voxel_ml * 1000 / math.prod(spacing)
    surface = surface_scores(*masks, tolerances=(tolerance,), spacing=spacing)
    row = {
        **{name: getattr(overlap, name) for name in SCORE_COLUMNS[:4]},
        "reference_ml": reference_volume * grid.voxel_ml,
        "prediction_ml": predicted * grid.voxel_ml,
        "boundary_iou": boundary_iou(*whole, width=BOUNDARY_MM, spacing=spacing, ignored=hidden),
        "hd95_mm": surface.hd95_mm,
        "nsd": surface.nsd[0],
        "assd_mm": surface.assd_mm,
        "lesion_tp": lesion.tp,
        "lesion_fp": lesion.fp,
        "lesion_fn": lesion.fn,
        "lesion_f1": lesion.f1,
        **{name: getattr(lesion, name) for name in ("pq", "sq", "rq", "cc_iou")},
        "intersection": intersection,
        "union": union(intersection, predicted, reference_volume),
    }
    return row, [_lesion_row(found, volume, crop.offset, plane, grid) for found in lesion.lesions]


def _plane(grid: Grid) -> tuple[int, ...]:
    """The axis of a single slice, which is scored as the 2D image it is; nothing for volumes."""
    return tuple(axis for axis, size in enumerate(grid.shape) if size == 1)[:1]


def _lesion_row(
    lesion: Lesion, volume: float, offset: tuple[int, ...], plane: tuple[int, ...], grid: Grid
) -> dict[str, Any]:
    """A lesion as a row; `volume` scales its volume."""
    index = np.asarray(lesion.centroid_voxel) + offset
    for axis in plane:
        index = np.insert(index, axis, 0.0)
    x, y, z = (float(value) for value in grid.affine[:3, :3] @ index + grid.affine[:3, 3])
    return {
        "lesion": lesion.component,
        "kind": "prediction" if lesion.outcome == "fp" else "reference",
        "status": lesion.outcome,
        "volume_ml": lesion.volume_ml * volume,
        "centroid_x_mm": x,
        "centroid_y_mm": y,
        "centroid_z_mm": z,
        "matched_iou": lesion.iou,
    }
