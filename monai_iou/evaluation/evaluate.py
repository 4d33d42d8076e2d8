"""Evaluate a folder of predictions: pairs of files -> one row per case and label, tables, a summary and a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from monai_iou import files as out
from monai_iou.evaluation import finished
from monai_iou.evaluation.cases import CASE_COLUMNS, LESION_COLUMNS, Settings, Structure, evaluate_files, scan_labels
from monai_iou.evaluation.pairing import Pair, pair_folders, read_pairs
from monai_iou.evaluation.schedule import Run, TaskError, runner
from monai_iou.evaluation.statistics import dataset_scores, describe

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
        ignore: reference voxels of this value count nowhere.
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


def evaluate_folders(request: Request, progress: Callable[[Progress], None] = lambda _: None) -> Evaluation:
    """Evaluate every pair and write cases.csv, lesions.csv, failures.csv, summary.json and report.html.

    A case that cannot be evaluated is a row of failures.csv and does not stop the others. Finished cases are kept in
    the folder `finished` of the output; starting again takes them from there unless a file or an option has changed.

    Args:
        request: what to evaluate.
        progress: called in this process after each task.

    Returns:
        The evaluation, as it was written.

    Raises:
        RequestError: options contradict each other or are out of range.
        PairingError: the folders or the CSV of pairs are unusable.
        OutputError: the output folder cannot be written.
        SchedulerError: the Dask cluster cannot be used.
        ValueError: no reference holds a label.
    """
    from monai_iou.evaluation.report import write_report

    _check_labels(request)
    _check_numbers_and_images(request)
    pairs = _pairs(request)
    out.prepare(request.output)
    failures = {pair.case: pair.problem for pair in pairs if pair.problem is not None}
    with runner(request.workers, request.scheduler) as run:
        known, broken = _scan(run, request, [pair for pair in pairs if pair.case not in failures], progress)
        failures.update(broken)
        structures = _structures(request, known, complete=not failures)
        if not structures:
            failures = {pair.case: failures.get(pair.case, NOTHING_TO_SCORE) for pair in pairs}
        allowed = tuple(sorted({*known, *_named(structures)}))
        settings = Settings(structures, allowed, request.ignore, request.tolerance, request.resample)
        todo = [pair for pair in pairs if pair.case not in failures]
        records, broken, reused = _evaluate(run, request, settings, todo, progress)
        failures.update(broken)
    evaluation = Evaluation(
        [records[pair.case] for pair in pairs if pair.case in records],
        [_failure(pair, failures[pair.case]) for pair in pairs if pair.case in failures],
        pairs,
        structures,
        request.ignore,
        reused,
    )
    evaluation.summary = summarise(evaluation, request)
    out.write_csv(request.output / "cases.csv", CASE_COLUMNS, evaluation.rows)
    out.write_csv(request.output / "lesions.csv", LESION_COLUMNS, evaluation.lesions)
    out.write_csv(request.output / "failures.csv", FAILURE_COLUMNS, evaluation.failures)
    out.write_json(request.output / "summary.json", evaluation.summary)
    write_report(request.output / "report.html", evaluation, evaluation.summary, request.images)
    return evaluation


def summarise(evaluation: Evaluation, request: Request) -> dict[str, Any]:
    """Everything summary.json holds, as plain values."""
    rows = evaluation.rows
    by_label = {name: [row for row in rows if row["label"] == name] for name in evaluation.names}
    ranked = sorted((row for row in rows if not math.isnan(row["iou"])), key=lambda row: (row["iou"], row["case"]))
    return {
        "cases": {
            "paired": len(evaluation.pairs),
            "evaluated": len(evaluation.records),
            "failed": len(evaluation.failures),
            "reused": evaluation.reused,
        },
        "labels": {
            name: {column: describe([row[column] for row in by_label[name]]) for column in CASE_COLUMNS[2:]}
            for name in evaluation.names
        },
        "dataset": dataset_scores(rows),
        "worst_cases": [{key: row[key] for key in ("case", "label", "iou", "dice")} for row in ranked[:WORST_CASES]],
        "failures": evaluation.failures,
        "notes": evaluation.notes,
        "options": {
            "predictions": str(request.predictions),
            "references": str(request.references),
            "structures": {structure.name: list(structure.values) for structure in evaluation.structures},
            "ignore": request.ignore,
            "tolerance_mm": request.tolerance,
            "resample": "reference" if request.resample else None,
        },
        "command": list(request.command),
        "versions": {name: metadata.version(name) for name in LIBRARIES},
        "inputs": {record["case"]: record["inputs"] for record in evaluation.records},
    }


def _check_labels(request: Request) -> None:
    if request.labels and request.regions:
        message = "Expected either `--labels` or `--regions`, but got both: keep one."
        raise RequestError(message)
    named = {*request.labels, *(value for values in request.regions.values() for value in values)}
    if 0 in named:
        message = "Expected labels of structures, but got 0, the background: leave it out."
        raise RequestError(message)
    again = next((value for i, value in enumerate(request.labels) if value in request.labels[:i]), None)
    if again is not None:
        message = f"Expected every label once in `--labels`, but got {again} again: remove it."
        raise RequestError(message)
    if request.ignore is not None and request.ignore in named:
        message = f"Expected `--ignore` to differ from the labels, but got {request.ignore} in both: keep one."
        raise RequestError(message)


def _check_numbers_and_images(request: Request) -> None:
    if not request.tolerance >= 0 or math.isinf(request.tolerance):
        message = f"Expected `--tolerance` to be 0 mm or more, but got {request.tolerance}: give a distance in mm."
        raise RequestError(message)
    if request.workers < 1:
        message = f"Expected `--workers` to be 1 or more, but got {request.workers}: give a number of processes."
        raise RequestError(message)
    if request.images is not None and not request.images.is_dir():
        message = f"Expected `--images` to be a folder of volumes, but got `{request.images}`: check the path."
        raise RequestError(message)


def _pairs(request: Request) -> list[Pair]:
    predictions, references = request.predictions.absolute(), request.references.absolute()
    if request.pairs is not None:
        return read_pairs(request.pairs, predictions, references)
    return pair_folders(predictions, references)


def _failure(pair: Pair, reason: str) -> dict[str, Any]:
    files = {"prediction": pair.prediction, "reference": pair.reference}
    return {"case": pair.case, "reason": reason, **{key: str(path or "") for key, path in files.items()}}


def _named(structures: Sequence[Structure]) -> Iterator[int]:
    return (value for structure in structures for value in structure.values)


def _structures(request: Request, known: Sequence[int], complete: bool) -> tuple[Structure, ...]:
    """What to score; nothing where cases failed and no other reference holds a label: the tables then say why."""
    if request.regions:
        return tuple(Structure(name, tuple(values)) for name, values in request.regions.items())
    values = request.labels or tuple(value for value in sorted(known) if value not in (0, request.ignore))
    if not values and complete:
        message = f"Expected labels in `{request.references}`, but got background only: name them with `--labels`."
        raise ValueError(message)
    return tuple(Structure(str(value), (value,)) for value in values)


def _scan(
    run: Run, request: Request, pairs: Sequence[Pair], progress: Callable[[Progress], None]
) -> tuple[list[int], dict[str, str]]:
    """The label values of all references, and the references that cannot be read with their reasons.

    This comes before any case, so that every case has a row for every label and a prediction's label can be checked
    against all references.
    """
    known: set[int] = set()
    broken: dict[str, str] = {}
    tasks: dict[str, tuple[Any, ...]] = {}
    for pair in pairs:
        record = finished.read(request.output, pair.case)
        if record is not None and finished.is_of(record, reference=_path(pair.reference)):
            known.update(record["reference_values"])
        else:
            tasks[pair.case] = (pair.reference,)
    for done, (case, result) in enumerate(run(scan_labels, tasks), start=1):
        if isinstance(result, TaskError):
            broken[case] = result.reason
        else:
            known.update(result)
        progress(Progress("labels", done, len(tasks), case, broken.get(case)))
    return sorted(known), broken


def _evaluate(
    run: Run, request: Request, settings: Settings, pairs: Sequence[Pair], progress: Callable[[Progress], None]
) -> tuple[dict[str, dict[str, Any]], dict[str, str], int]:
    """The records of the cases that worked, the reasons of those that failed, and how many records are old ones."""
    fingerprint = finished.fingerprint(settings)
    found: dict[str, dict[str, Any]] = {}
    failures: dict[str, str] = {}
    tasks: dict[str, tuple[Any, ...]] = {}
    for pair in pairs:
        old = finished.read(request.output, pair.case)
        inputs = {"prediction": _path(pair.prediction), "reference": _path(pair.reference)}
        if old is not None and old["fingerprint"] == fingerprint and finished.is_of(old, **inputs):
            found[pair.case] = old
        else:
            tasks[pair.case] = (pair.case, pair.prediction, pair.reference, settings)
    reused = len(found)
    for done, (case, result) in enumerate(run(evaluate_files, tasks), start=1):
        if isinstance(result, TaskError):
            failures[case] = result.reason
        else:
            found[case] = {**result, "fingerprint": fingerprint}
            finished.write(request.output, found[case])
        progress(Progress("cases", reused + done, len(pairs), case, failures.get(case)))
    return found, failures, reused


def _path(path: Path | None) -> Path:
    assert path is not None, "pairs with a missing file are failures and never get here"
    return path
