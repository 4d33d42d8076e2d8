"""What an evaluation is asked for, and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monai_iou.evaluation.pairing import Pair
from monai_iou.evaluation.scoring import Structure

FAILURE_COLUMNS = ("case", "reason", "prediction", "reference")
WORST_CASES = 10
NOTHING_TO_SCORE = (
    "Expected labels in the references, but got background only in all that can be read: name them with `--labels`."
)
LIBRARIES = ("monai-iou", "monai", "torch", "numpy", "scipy", "connected-components-3d", "nibabel", "SimpleITK")


class RequestError(ValueError):
    """Options that contradict each other or are out of range."""


@dataclass(frozen=True)
class Request:
    """What to evaluate, how, and where the results go.

    Args:
        predictions: folder of predicted label maps.
        references: folder of reference label maps.
        output: folder for the results; created if it is not there.
        labels: label values to evaluate; empty means every value but 0 that a reference holds.
        regions: instead of labels, unions of label values by name.
        ignore: reference voxels of this value are excluded from all scores.
        tolerance: of the normalised surface distance, in mm.
        workers: processes of this machine.
        scheduler: address of a Dask scheduler, which replaces `workers`.
        resample: take predictions on other grids to the reference's, by nearest neighbour.
        images: folder of images to show under the contours in the report.
        pairs: CSV that says which files belong together.
        command: the command line, for the summary.
    """

    predictions: Path
    references: Path
    output: Path
    labels: tuple[int, ...] = ()
    regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    ignore: int | None = None
    tolerance: float = 1.0
    workers: int = 1
    scheduler: str | None = None
    resample: bool = False
    images: Path | None = None
    pairs: Path | None = None
    command: Sequence[str] = ()


@dataclass(frozen=True)
class Progress:
    """One task is done: `stage` is `labels` (reading the references' labels) or `cases`."""

    stage: str
    done: int
    total: int
    case: str = ""
    reason: str | None = None


@dataclass
class Evaluation:
    """What was found: the cases' records in order, and the failures, both as written to the output folder."""

    records: list[dict[str, Any]]
    failures: list[dict[str, Any]]
    pairs: list[Pair]
    structures: tuple[Structure, ...]
    ignore: int | None
    reused: int
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One row per case and label."""
        return [row for record in self.records for row in record["rows"]]

    @property
    def lesions(self) -> list[dict[str, Any]]:
        """One row per lesion."""
        return [row for record in self.records for row in record["lesions"]]

    @property
    def notes(self) -> list[str]:
        """What the reader should know before the scores."""
        absent = (
            [name for name in self.names if not any(row["reference_ml"] for row in self._of(name))] if self.rows else []
        )
        notes = [f"{name}: no reference holds it, so that only false positives count." for name in absent]
        return notes + [note for record in self.records for note in record["notes"]]

    @property
    def names(self) -> list[str]:
        """The structures' names, in the order of the rows."""
        return [structure.name for structure in self.structures]

    def _of(self, name: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["label"] == name]
