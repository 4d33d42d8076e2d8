"""One case: two label maps on one grid -> a row of scores per label, a row per lesion, and a picture per label."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from monai_iou.evaluation.columns import CASE_COLUMNS, LESION_COLUMNS, SCORE_COLUMNS
from monai_iou.metrics import (
    CHALLENGES,
    Challenge,
    Lesion,
    boundary_iou,
    challenge_scores,
    crop_to_union,
    lesion_scores,
    overlap_from_counts,
    surface_scores,
)
from monai_iou.metrics.lesion_rules import Pairing, lesion_rule
from monai_iou.scores import union
from monai_iou.volumes.grid import Grid

__all__ = [
    "CASE_COLUMNS",
    "LESION_COLUMNS",
    "SCORE_COLUMNS",
    "MaskPair",
    "Rules",
    "Structure",
    "evaluate_case",
    "mask_pairs",
    "score_pair",
]

Rows: TypeAlias = tuple[list[dict[str, Any]], list[dict[str, Any]]]


@dataclass(frozen=True)
class Structure:
    """A structure that is scored: one label value, or a region of several values."""

    name: str
    values: tuple[int, ...]


@dataclass(frozen=True)
class Rules:
    """By which rules a structure is scored.

    Args:
        tolerance: tolerance of the normalised surface Dice (NSD) in mm.
        tolerances: tolerances in mm for single structures by name, used instead of `tolerance`.
        boundary: width of the bands of the boundary IoU in mm, such as "2mm", or as a percentage of the diagonal of
            the image, such as "2%".
        match: when a lesion counts as found: "any", "iou:0.5" or "overlap:0.25".
        pairing: "one-to-one" or "many-to-one".
        connectivity: 6, 18 or 26 neighbours of a voxel in a volume, which are 4, 8 and 8 in a slice.
        min_volume_mm3: smaller lesions are left out.
        like: challenge whose columns are added by its own rule: a key of `monai_iou.metrics.CHALLENGES`.
    """

    tolerance: float = 1.0
    tolerances: Mapping[str, float] = field(default_factory=dict)
    boundary: str = "2mm"
    match: str = "iou:0.5"
    pairing: Pairing = "one-to-one"
    connectivity: int = 26
    min_volume_mm3: float = 0.0
    like: str | None = None

    @property
    def challenge(self) -> Challenge | None:
        """The challenge whose columns are added."""
        return None if self.like is None else CHALLENGES[self.like]

    @property
    def in_words(self) -> str:
        """The rule by which a lesion counts as found.

        >>> Rules(match="any").in_words
        'found: any overlap, one to one; components of 26 neighbours'
        """
        least = f" of {self.min_volume_mm3:g} mm³ or more" if self.min_volume_mm3 else ""
        rule = lesion_rule(self.match, pairing=self.pairing)
        return f"found: {rule}; components of {self.connectivity} neighbours{least}"

    def neighbours(self, dimensions: int) -> int:
        """The connectivity in an image of so many dimensions."""
        return self.connectivity if dimensions == 3 else {6: 4, 18: 8, 26: 8}[self.connectivity]

    def boundary_mm(self, shape: Sequence[int], spacing: Sequence[float]) -> float:
        """The width of the bands in mm, in an image of this shape and spacing."""
        number, unit = split_width(self.boundary)
        return number if unit == "mm" else number / 100 * float(np.linalg.norm(np.multiply(shape, spacing)))

    def tolerance_of(self, structure: Structure) -> float:
        """The tolerance of a structure in mm."""
        return self.tolerances.get(structure.name, self.tolerance)


def split_width(text: str) -> tuple[float, str]:
    """A width as its number and its unit, `mm` or `%`.

    Raises:
        ValueError: it is neither, or not above 0.

    >>> split_width("2mm"), split_width("0.5 %")
    ((2.0, 'mm'), (0.5, '%'))
    """
    found = re.fullmatch(r"\s*([0-9.]+)\s*(mm|%)\s*", text)
    number = float(found[1]) if found and found[1].count(".") < 2 and found[1] != "." else 0.0
    if found is None or not number > 0:
        message = f"Expected `--boundary` to be a width such as 2mm or 2%, but got {text}: correct it."
        raise ValueError(message)
    return number, found[2]


@dataclass(frozen=True, eq=False)
class MaskPair:
    """One structure's masks, cut to the box that holds them and what is scored about them.

    Args:
        structure: what the masks are of.
        prediction: bool.
        reference: bool, of the same shape.
        ignored: bool, of the same shape, or None.
        offset: the box's first voxel in the volume.
    """

    structure: Structure
    prediction: NDArray[np.bool_]
    reference: NDArray[np.bool_]
    ignored: NDArray[np.bool_] | None
    offset: tuple[int, ...]


def evaluate_case(
    prediction: NDArray[Any],
    reference: NDArray[Any],
    grid: Grid,
    structures: Sequence[Structure],
    ignore: int | None = None,
    tolerance: float = 1.0,
    rules: Rules | None = None,
) -> Rows:
    """Score two label maps on the same grid.

    Args:
        prediction: labels of any integer dtype, (X, Y, Z).
        reference: labels of the same shape.
        grid: position of the voxels, from which volumes and distances are computed; distances assume perpendicular
            axes.
        structures: the structures to score.
        ignore: reference voxels with this value are excluded from all scores.
        tolerance: tolerance of the normalised surface Dice (NSD) in mm.
        rules: all rules of scoring; replaces `tolerance`.

    Returns:
        One row per structure (`label`, the columns `SCORE_COLUMNS`, and the voxel counts `intersection` and `union`),
        and one row per lesion: each component of the reference (`tp` or `fn`) and each unmatched component of the
        prediction (`fp`). Undefined scores, such as all scores if both masks are empty, are NaN.

    >>> reference = np.zeros((8, 8, 8), np.uint8)
    >>> reference[2:6, 2:6, 2:6] = 1
    >>> rows, lesions = evaluate_case(reference, reference, Grid((8, 8, 8), np.eye(4)), [Structure("1", (1,))])
    >>> rows[0]["iou"], rows[0]["reference_ml"], lesions[0]["status"]
    (1.0, 0.064, 'tp')
    """
    rules = rules or Rules(tolerance)
    rows: list[dict[str, Any]] = []
    lesions: list[dict[str, Any]] = []
    for pair in mask_pairs(prediction, reference, structures, ignore, rules.like is not None):
        row, found = score_pair(pair, grid, counted_voxels(reference, ignore), rules)
        rows.append(row)
        lesions += found
    return rows, lesions


def counted_voxels(reference: NDArray[Any], ignore: int | None) -> int:
    """Voxels of a volume that are not ignored."""
    ignored = 0 if ignore is None else int(np.count_nonzero(reference == ignore))
    return int(reference.size) - ignored


def mask_pairs(
    prediction: NDArray[Any],
    reference: NDArray[Any],
    structures: Sequence[Structure],
    ignore: int | None,
    whole: bool = False,
) -> Iterator[MaskPair]:
    """The structures' masks one after the other, each cut to where either label map holds the structure.

    What lies beyond the box is in neither mask, as what lies beyond the image is, so that no score changes by it. With
    ignored voxels, which may lie beyond the box and are not background, and where `whole` asks for it (challenges count
    the background), the box is the whole volume.
    """
    ignored = None if ignore is None else reference == ignore
    boxes = [_boxes(labels) for labels in (prediction, reference)] if ignored is None and not whole else []
    for structure in structures:
        box = _box_of(structure, boxes) if boxes else (slice(None),) * reference.ndim
        cut = None if ignored is None else ignored[box]
        masks = [mask_of(labels[box], structure.values) for labels in (prediction, reference)]
        if cut is not None:
            masks = [mask & ~cut for mask in masks]
        yield MaskPair(structure, masks[0], masks[1], cut, tuple(part.start or 0 for part in box))


_Boxes: TypeAlias = Mapping[int, tuple[slice, ...]]


def _boxes(labels: NDArray[Any]) -> _Boxes | None:
    """Each value's box, from one pass over the volume; None where the values are too many or negative for it."""
    from scipy.ndimage import find_objects  # imported here: `import monai_iou` must not load scipy

    if labels.dtype != np.uint8:
        if not labels.size or labels.min() < 0 or labels.max() > 65535:
            return None
        labels = labels.astype(np.int32)
    return {value: box for value, box in enumerate(find_objects(labels), start=1) if box is not None}


def _box_of(structure: Structure, boxes: Sequence[_Boxes | None]) -> tuple[slice, ...]:
    """The box of a structure in both label maps: the whole volume if it is unknown, one voxel if it is in none."""
    if any(known is None for known in boxes):
        return (slice(None),) * 3
    found = [known[value] for known in boxes if known is not None for value in structure.values if value in known]
    if not found:
        return (slice(0, 1),) * 3
    return tuple(slice(min(p.start for p in parts), max(p.stop for p in parts)) for parts in zip(*found, strict=True))


def mask_of(labels: NDArray[Any], values: Sequence[int]) -> NDArray[np.bool_]:
    """Where `labels` holds one of `values`."""
    mask: NDArray[np.bool_] = labels == values[0]
    for value in values[1:]:
        mask |= labels == value
    return mask


def score_pair(pair: MaskPair, grid: Grid, voxels: int, rules: Rules) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The row of one structure and the rows of its lesions.

    Args:
        pair: its masks.
        grid: of the whole volume.
        voxels: of the whole volume that are not ignored.
        rules: of scoring.
    """
    plane = _plane(grid)
    whole = pair.prediction.squeeze(plane), pair.reference.squeeze(plane)
    hidden = None if pair.ignored is None else pair.ignored.squeeze(plane)
    spacing = tuple(np.delete(grid.spacing, plane))
    width = rules.boundary_mm(np.delete(grid.shape, plane).tolist(), spacing)
    crop = crop_to_union(*whole)
    masks = crop.prediction, crop.reference
    lesion = lesion_scores(
        *masks,
        spacing=spacing,
        match=rules.match,
        pairing=rules.pairing,
        connectivity=rules.neighbours(len(spacing)),
        min_volume_mm3=rules.min_volume_mm3,
    )
    surface = surface_scores(*masks, tolerances=(rules.tolerance_of(pair.structure),), spacing=spacing)
    row = {
        "label": pair.structure.name,
        **_overlap(pair, grid, voxels),
        "boundary_iou": boundary_iou(*whole, width=width, spacing=spacing, ignored=hidden),
        "hd95_mm": surface.hd95_mm,
        "nsd": surface.nsd[0],
        "assd_mm": surface.assd_mm,
        "lesion_tp": lesion.tp,
        "lesion_fp": lesion.fp,
        "lesion_fn": lesion.fn,
        "lesion_f1": lesion.f1,
        **{name: getattr(lesion, name) for name in ("pq", "sq", "rq", "cc_iou")},
    }
    if rules.like is not None:
        row |= challenge_scores(rules.like, pair.prediction, pair.reference, spacing=grid.spacing)
    # The lesions' volumes are of voxels with right angles, and of a slice of 1 mm.
    volume = grid.voxel_ml * 1000 / math.prod(spacing)
    first = np.delete(pair.offset, plane) + crop.offset
    rows = [_lesion_row(found, volume, first, plane, grid) for found in lesion.lesions]
    return row, [{"label": pair.structure.name, **lesion} for lesion in rows]


def _overlap(pair: MaskPair, grid: Grid, voxels: int) -> dict[str, Any]:
    """What the voxels' counts give."""
    predicted, referred = int(np.count_nonzero(pair.prediction)), int(np.count_nonzero(pair.reference))
    both = int(np.count_nonzero(pair.prediction & pair.reference))
    overlap = overlap_from_counts(both, predicted, referred)
    either = union(both, predicted, referred)
    return {
        **{name: getattr(overlap, name) for name in SCORE_COLUMNS[:4]},
        "reference_ml": referred * grid.voxel_ml,
        "prediction_ml": predicted * grid.voxel_ml,
        "voxels_tp": both,
        "voxels_fp": predicted - both,
        "voxels_fn": referred - both,
        "voxels_tn": voxels - either,
        "relative_volume_error": overlap.relative_volume_error,
        "diagonal_mm": diagonal_mm(grid),
        "intersection": both,
        "union": either,
    }


def diagonal_mm(grid: Grid) -> float:
    """Return the diagonal of the image in mm, between the outer corners of its voxels."""
    signs = np.array([(1, 1, 1), (1, 1, -1), (1, -1, 1), (1, -1, -1)])
    return float(np.linalg.norm(signs * grid.shape @ grid.affine[:3, :3].T, axis=1).max())


def _plane(grid: Grid) -> tuple[int, ...]:
    """The axis of a single slice, which is scored as the 2D image it is; nothing for volumes."""
    return tuple(axis for axis, size in enumerate(grid.shape) if size == 1)[:1]


def _lesion_row(
    lesion: Lesion, volume: float, first: NDArray[Any], plane: tuple[int, ...], grid: Grid
) -> dict[str, Any]:
    """A lesion as a row; `volume` scales its volume, `first` is the first voxel of what it was found in."""
    index = np.asarray(lesion.centroid_voxel) + first
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
