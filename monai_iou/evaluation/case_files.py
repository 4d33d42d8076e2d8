"""One case from its files: hashes, labels, grids, and everything that is kept of it. This is the task that workers run.

Each file is hashed and then read, once. A file that is replaced between the two is therefore scored under the hash of
its earlier content, which the next run does not find, so that the case is scored again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monai_iou.evaluation.masks import counted_voxels, mask_pairs
from monai_iou.evaluation.probabilities import count_maps
from monai_iou.evaluation.rules import Rules, Structure
from monai_iou.evaluation.scoring import diagonal_mm, score_pair
from monai_iou.evaluation.thumbnails import take_picture
from monai_iou.volumes.grid import SHEAR_DEGREES, GridError, align, offset_note, reorient, resample
from monai_iou.volumes.names import is_png
from monai_iou.volumes.png import of_slice
from monai_iou.volumes.reading import Volume, VolumeError, file_hash, read_labels

# A label map of more values than this is an image that was passed by mistake.
MAX_LABELS = 1000
# Values are counted in pieces: a count of the whole volume would cast it to 8 bytes per voxel.
PIECE = 1 << 20


@dataclass(frozen=True)
class Settings:
    """How to score a case.

    Args:
        structures: what to score; None for every value that either file holds, but 0 and `ignore`.
        ignore: reference voxels of this value are excluded from all scores.
        resample: take a prediction on another grid to the reference's by nearest neighbour.
        rules: of scoring.
    """

    structures: tuple[Structure, ...] | None = None
    ignore: int | None = None
    resample: bool = False
    rules: Rules = field(default_factory=Rules)


def evaluate_files(
    case: str,
    prediction: Path | None,
    reference: Path,
    settings: Settings,
    hashes: Mapping[str, str | None] | None = None,
    problem: str | None = None,
    maps: Mapping[str, Path] | None = None,
) -> dict[str, Any]:
    """Read one pair and score it.

    A case whose prediction is missing or cannot be used is scored as an empty prediction, and its record says why:
    what is missing counts as missed where the penalties are asked for.

    Args:
        case: its name.
        prediction: the file, or None.
        reference: the file.
        settings: how to score.
        hashes: of the two files, where they are known already.
        problem: why there is no prediction.
        maps: the files of its probability maps, where they are to be counted too.

    Returns:
        The case's record: plain values that go to JSON and back unchanged; and `maps`, what was counted in them or why
        they could not be, None if they were not asked for.

    Raises:
        VolumeError: the reference cannot be read, or holds so many values that it is an image.
    """
    hashes = hashes or hash_files(prediction, reference)
    referred, numbers = _read(reference, settings)
    values = label_counts(referred)
    predicted: dict[int, int] = {}
    array, notes = np.zeros(referred.array.shape, np.uint8), _header_notes(case, referred, settings.rules.like)
    try:
        if prediction is not None:
            volume = read_labels(prediction)
            array, resampled = on_reference(case, volume, referred, settings.resample)
            if numbers is not None:
                numbers = [array, numbers[1]]
                array, volume = (array > 0).astype(np.uint8), _as_mask(volume)
            predicted = label_counts(volume)
            notes = resampled + notes + [f"{case}: {note}" for note in volume.notes]
    except (ValueError, OSError, MemoryError) as error:
        problem, predicted = describe_error(error), {}
        array, notes = np.zeros(referred.array.shape, np.uint8), []
        numbers = None if numbers is None else [array, numbers[1]]
    structures = settings.structures or structures_of({*values, *predicted}, settings.ignore)
    return {
        "case": case,
        "inputs": dict(hashes),
        "problem": problem,
        "reference_values": sorted(values),
        "prediction_values": sorted(predicted.items()),
        "voxels": counted_voxels(referred.array, settings.ignore),
        "diagonal_mm": diagonal_mm(referred.grid),
        **_scores(case, array, referred, structures, settings, numbers),
        "notes": notes,
        "maps": None if maps is None or problem else _maps(maps, referred, hashes["reference"], settings),
    }


def _maps(files: Mapping[str, Path], reference: Volume, digest: str | None, settings: Settings) -> dict[str, Any]:
    """What is counted in the probability maps; their faults are their own, not the case's."""
    try:
        return count_maps(files, reference, digest, settings.structures, settings.ignore, settings.rules)
    except Exception as error:  # of whatever kind: the libraries raise errors of any type for damaged files
        return {"problem": describe_error(error)}


def _read(reference: Path, settings: Settings) -> tuple[Volume, list[NDArray[Any]] | None]:
    """The labels of a reference; of lesion numbers the mask, and the numbers of an empty prediction and its own."""
    volume = read_labels(reference)
    if not settings.rules.instances:
        return volume, None
    return _as_mask(volume), [np.zeros(volume.array.shape, np.uint8), volume.array]


def _as_mask(volume: Volume) -> Volume:
    """Every lesion as label 1."""
    if volume.array.size and volume.array.min() < 0:
        message = (
            f"Expected `{volume.path}` to hold lesion numbers from 0 for `--instances`, but got {volume.array.min()}: "
            "number the lesions from 1."
        )
        raise VolumeError(message)
    return replace(volume, array=(volume.array > 0).astype(np.uint8))


def _scores(
    case: str,
    array: NDArray[Any],
    reference: Volume,
    structures: Sequence[Structure],
    settings: Settings,
    numbers: Sequence[NDArray[Any]] | None = None,
) -> dict[str, Any]:
    voxels = counted_voxels(reference.array, settings.ignore)
    rows, lesions, pictures = [], [], {}
    for pair in mask_pairs(array, reference.array, structures, settings.ignore, settings.rules.whole):
        row, pair_lesions = score_pair(pair, reference.grid, voxels, settings.rules, numbers)
        rows.append({"case": case, **row})
        lesions += [{"case": case, **lesion} for lesion in pair_lesions]
        picture = take_picture(pair, reference.grid)
        if picture is not None:
            pictures[pair.structure.name] = picture
    return {"rows": rows, "lesions": lesions, "pictures": pictures}


def hash_files(prediction: Path | None, reference: Path) -> dict[str, str | None]:
    """The hashes of a case's files; None for a missing or unreadable prediction, whose reading says why."""
    try:
        predicted = None if prediction is None else file_hash(prediction)
    except OSError:
        predicted = None
    return {"prediction": predicted, "reference": file_hash(reference)}


def describe_error(error: BaseException) -> str:
    """One line that says what went wrong: messages of this package are sentences, others need their type."""
    reason = " ".join(str(error).split())
    return reason if reason.startswith("Expected ") else f"{type(error).__name__}: {reason}"


def structures_of(values: set[int], ignore: int | None) -> tuple[Structure, ...]:
    """A structure for each label value but the background and the ignored one, in ascending order.

    >>> structures_of({2, 0, 1, 255}, 255)
    (Structure(name='1', values=(1,)), Structure(name='2', values=(2,)))
    """
    return tuple(Structure(str(value), (value,)) for value in sorted(values - {0, ignore}))


def values_of(reference: Path) -> set[int]:
    """The values of a reference; none of one that cannot be read, which fails where it is scored."""
    try:
        return set(label_counts(read_labels(reference)))
    except Exception:  # of whatever kind: the libraries raise errors of any type for damaged files
        return set()


def label_counts(volume: Volume) -> dict[int, int]:
    """Voxels by label value, in ascending order.

    Raises:
        VolumeError: there are so many values that the volume is an image.

    >>> from monai_iou.volumes.grid import Grid
    >>> label_counts(Volume(np.array([[[3, 0, 3]]]), Grid((1, 1, 3), np.eye(4)), Path("x")))
    {0: 1, 3: 2}
    """
    flat = volume.array.reshape(-1, order="A")
    if flat.dtype == np.uint8:
        counts = np.zeros(256, dtype=np.int64)
        for start in range(0, flat.size, PIECE):
            piece = flat[start : start + PIECE]
            counts += np.bincount(piece[piece != 0], minlength=256)  # most voxels are background
        counts[0] = flat.size - counts.sum()
        return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}
    values, voxels = np.unique(flat, return_counts=True)
    if len(values) > MAX_LABELS:
        message = (
            f"Expected `{volume.path}` to be a label map, but got {len(values)} different values: "
            "pass labels, not images."
        )
        raise VolumeError(message)
    return {int(value): int(count) for value, count in zip(values, voxels, strict=True)}


def on_reference(case: str, predicted: Volume, reference: Volume, resampling: bool) -> tuple[NDArray[Any], list[str]]:
    """The prediction's voxels on the reference's grid, and a note if they had to be resampled.

    A PNG states no place: its pixels are the voxels of the reference, as `monai-iou predict --format .png` writes them.

    Raises:
        GridError: the grids differ and `resampling` is false, or the reference is a PNG.
        VolumeError: the prediction is a PNG with other sides.
    """
    if is_png(predicted.path):
        note = f"{case}: the prediction is a PNG, which states no place: its pixels count as the reference's voxels."
        array = of_slice(predicted.array, reference.grid.shape, predicted.path)
        return array, [] if is_png(reference.path) else [note]
    array, grid = reorient(predicted.array, predicted.grid, reference.grid)
    try:
        apart = offset_note(grid, reference.grid)
        return align(predicted.array, predicted.grid, reference.grid), [f"{case}: {apart}."] if apart else []
    except ValueError as error:
        if is_png(reference.path):
            message = (
                f"Expected the prediction as a PNG, because the reference `{reference.path}` is one and states no "
                f"place, but got {predicted.grid}: write the prediction as a PNG too."
            )
            raise GridError(message) from error
        if not resampling:
            raise
    note = f"{case}: the prediction was resampled by nearest neighbour from {grid} to {reference.grid}."
    return resample(array, grid, reference.grid), [note]


def _header_notes(case: str, reference: Volume, like: str | None) -> list[str]:
    """What the reference's header says that a reader of the scores should know; distances need right angles."""
    notes = [f"{case}: {note}" for note in reference.notes]
    if reference.grid.shear < SHEAR_DEGREES:
        return notes
    inexact = ["HD95", "NSD", "ASSD", "boundary IoU", "CC-IoU", *([f"the columns of `--like {like}`"] if like else [])]
    return [
        *notes,
        f"{case}: the reference's axes are {reference.grid.shear:.3g} degrees off right angles (gantry tilt): volumes "
        f"and overlaps are exact, but {', '.join(inexact[:-1])} and {inexact[-1]} assume right angles: resample "
        "both files first.",
    ]
