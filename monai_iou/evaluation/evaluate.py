"""Evaluate a folder of predictions: pairs of files -> one row per case and label, tables, a summary and a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from monai_iou import files as out
from monai_iou.evaluation import resume
from monai_iou.evaluation.pairing import Pair, pair_folders, read_pairs
from monai_iou.evaluation.report import write_report
from monai_iou.evaluation.results import (
    FAILURE_COLUMNS,
    LIBRARIES,
    NOTHING_TO_SCORE,
    WORST_CASES,
    Evaluation,
    Progress,
    Request,
    RequestError,
)
from monai_iou.evaluation.scoring import CASE_COLUMNS, LESION_COLUMNS, Settings, Structure, evaluate_files, scan_labels
from monai_iou.evaluation.statistics import dataset_scores, describe
from monai_iou.evaluation.workers import Run, TaskError, runner


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
        record = resume.read(request.output, pair.case)
        if record is not None and resume.matches_inputs(record, reference=_path(pair.reference)):
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
    fingerprint = resume.settings_hash(settings)
    found: dict[str, dict[str, Any]] = {}
    failures: dict[str, str] = {}
    tasks: dict[str, tuple[Any, ...]] = {}
    for pair in pairs:
        old = resume.read(request.output, pair.case)
        inputs = {"prediction": _path(pair.prediction), "reference": _path(pair.reference)}
        if old is not None and old["fingerprint"] == fingerprint and resume.matches_inputs(old, **inputs):
            found[pair.case] = old
        else:
            tasks[pair.case] = (pair.case, pair.prediction, pair.reference, settings)
    reused = len(found)
    for done, (case, result) in enumerate(run(evaluate_files, tasks), start=1):
        if isinstance(result, TaskError):
            failures[case] = result.reason
        else:
            found[case] = {**result, "fingerprint": fingerprint}
            resume.write(request.output, found[case])
        progress(Progress("cases", reused + done, len(pairs), case, failures.get(case)))
    return found, failures, reused


def _path(path: Path | None) -> Path:
    assert path is not None, "pairs with a missing file are failures and never get here"
    return path
