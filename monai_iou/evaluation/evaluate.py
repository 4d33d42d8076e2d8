"""Evaluate a folder of predictions: pairs of files -> one row per case and label, tables, a summary and a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai_iou import files as out
from monai_iou.evaluation import resume
from monai_iou.evaluation.case_files import Settings, evaluate_files, hash_files, structures_of, values_of
from monai_iou.evaluation.columns import FAILURE_COLUMNS, LESION_COLUMNS, columns_of
from monai_iou.evaluation.earlier import check_earlier, earlier_exports, replaced_note
from monai_iou.evaluation.exports import EXPORTS
from monai_iou.evaluation.groups import (
    dataset_notes,
    dataset_values,
    patient_notes,
    patients_of,
    with_dataset_labels,
    without_unlabelled,
)
from monai_iou.evaluation.map_records import MapRecords
from monai_iou.evaluation.pairing import Pair, pair_folders, pair_volumes, pairing_notes, read_pairs
from monai_iou.evaluation.report import report_text
from monai_iou.evaluation.request import Progress, Request, RequestError, check_names, check_request
from monai_iou.evaluation.results import Evaluation
from monai_iou.evaluation.rules import Structure
from monai_iou.evaluation.summary import summarise
from monai_iou.evaluation.workers import Runner, TaskError, end_unguarded_child, runner
from monai_iou.locks import folder_lock
from monai_iou.tables import counted, enumerated

__all__ = ["Evaluation", "Progress", "Request", "RequestError", "evaluate_folders"]

NOTHING_TO_SCORE = (
    "Expected labels in the references, but got background only in all that can be read: name them with `--labels`."
)


def evaluate_folders(
    request: Request, progress: Callable[[Progress], None] = lambda _: None, *, notes: Sequence[str] = ()
) -> Evaluation:
    """Evaluate every pair and write cases.csv, lesions.csv, failures.csv, summary.json and report.html.

    Every file is hashed and then read once; only with tolerances of labels, where nothing names the labels, are
    references read before. A case that cannot be evaluated becomes a row of failures.csv and does not stop the other
    cases. Finished cases are kept in the folder `finished` of the output; a later run takes them from
    there unless a file or an option has changed.

    Args:
        request: what to evaluate.
        progress: called in this process after each task.
        notes: what the reader of the report should know before the scores.

    Returns:
        The evaluation, with the content of the files that were written.

    Raises:
        RequestError: options contradict each other, are out of range or name a structure that is not scored, or a file
            of something else would be replaced.
        PairingError: the folders or the CSV of pairs cannot be used.
        OutputError: the output folder cannot be written.
        SchedulerError: the Dask cluster cannot be used.
        ValueError: no reference contains a label.
    """
    if request.workers > 1:
        end_unguarded_child()
    check_request(request)
    check_earlier(request)
    request = with_dataset_labels(request)
    check_names(request, request.named_structures)
    pairs = _pairs(request)
    patients = patients_of(pairs, request)
    if request.tolerances and not request.named_structures:
        check_names(request, _labels_for_tolerances(request, pairs, progress))
    out.prepare(request.output)
    with folder_lock(request.output, "an evaluation"), runner(request.workers, request.scheduler) as run:
        replaced = replaced_note(request)
        named = request.named_structures
        settings = Settings(named or None, request.ignore, request.resample, request.rules)
        maps = MapRecords(request, settings, {pair.case: pair.prediction for pair in pairs})
        evaluation = _evaluate(run, request, settings, pairs, maps, progress)
        evaluation.patients = patients if len(set(patients.values())) < len(patients) else None
        evaluation.maps = maps.finish(run, evaluation, progress)
        own = [*pairing_notes(pairs, request), *patient_notes(patients, request), *dataset_notes(request)]
        evaluation.run_notes += [*notes, *run.notes, *replaced, *own]
        evaluation.summary = summarise(evaluation)
        _write(evaluation)
    return evaluation


def _labels_for_tolerances(
    request: Request, pairs: Sequence[Pair], progress: Callable[[Progress], None]
) -> tuple[Structure, ...]:
    """The labels of as many references as it takes to find all that have a tolerance: a wrong one ends all at once.

    Those that dataset.json names are scored, too, where predictions hold them.
    """
    files = {pair.case: pair.reference for pair in pairs if pair.reference is not None}
    found: tuple[Structure, ...] = ()
    values = set(dataset_values(request))
    for done, (case, reference) in enumerate(files.items(), start=1):
        values |= values_of(reference)
        found = structures_of(values, request.ignore)
        progress(Progress("references", done, len(files), case))
        if request.tolerances.keys() <= {structure.name for structure in found}:
            break
    return found


def _write(evaluation: Evaluation) -> None:
    """Write all results or, where one cannot be written, none: tables of two runs must never lie side by side."""
    output, summary = evaluation.request.output, out.json_text(evaluation.summary)
    tables = {
        "cases.csv": (("case", "label", *columns_of(evaluation.request.rules.challenge)), evaluation.rows),
        "lesions.csv": (LESION_COLUMNS, evaluation.lesions),
        "failures.csv": (FAILURE_COLUMNS, evaluation.failures),
    }
    texts = {name: out.table_text(columns, rows) for name, (columns, rows) in tables.items()}
    texts |= {"summary.json": summary, "report.html": report_text(evaluation)}
    texts |= {EXPORTS[kind].file: EXPORTS[kind].text(evaluation) for kind in evaluation.request.export}
    stale = [name for name in earlier_exports(output) if name not in texts]
    out.write_texts({output / name: text for name, text in texts.items()})
    for name in stale:
        (output / name).unlink(missing_ok=True)


def _evaluate(
    run: Runner,
    request: Request,
    settings: Settings,
    pairs: Sequence[Pair],
    maps: MapRecords,
    progress: Callable[[Progress], None],
) -> Evaluation:
    records, failures, reused = _records(run, request, settings, pairs, maps, progress)
    records.update(_without_prediction(run, settings, pairs, failures))
    known = {value for record in records.values() for value in record["reference_values"]}
    named = dataset_values(request)
    predicted = {value for record in records.values() for value, _ in record["prediction_values"]}
    structures = settings.structures or structures_of(known | (named & predicted), request.ignore)
    if not structures:
        failures = _without_labels(request, pairs, records, failures)
        records = {}
    allowed = known | named | {value for structure in structures for value in structure.values}
    records.update(_refuse_unnamed(run, settings, pairs, records, allowed))
    records = without_unlabelled(records, pairs, request, structures)
    failures |= {case: record["problem"] for case, record in records.items() if record["problem"]}
    ordered = [records[pair.case] for pair in pairs if pair.case in records]
    scored = [record for record in ordered if not record["problem"]]
    return Evaluation(
        request,
        scored,
        [record for record in ordered if record["problem"]],
        [_failure(pair, failures[pair.case]) for pair in pairs if pair.case in failures],
        list(pairs),
        structures,
        reused & {record["case"] for record in scored},
    )


def _without_labels(
    request: Request, pairs: Sequence[Pair], records: Mapping[str, Mapping[str, Any]], failures: Mapping[str, str]
) -> dict[str, str]:
    """Why each case has no score where no reference that can be read holds a label."""
    if not failures and all(record["problem"] is None for record in records.values()):
        message = f"Expected labels in `{request.references}`, but got background only: name them with `--labels`."
        raise ValueError(message)
    problems = {**failures, **{case: record["problem"] for case, record in records.items()}}
    return {pair.case: problems.get(pair.case) or NOTHING_TO_SCORE for pair in pairs}


def _records(
    run: Runner,
    request: Request,
    settings: Settings,
    pairs: Sequence[Pair],
    maps: MapRecords,
    progress: Callable[[Progress], None],
) -> tuple[dict[str, dict[str, Any]], dict[str, str], set[str]]:
    """The records of all cases with a readable reference, the others' reasons, and the cases whose records are old."""
    fingerprint = resume.settings_hash(settings)
    records: dict[str, dict[str, Any]] = {}
    failures: dict[str, str] = {}
    tasks: dict[str, tuple[Any, ...]] = {}
    for pair in pairs:
        if pair.reference is None:
            failures[pair.case] = pair.problem or ""
            continue
        old = resume.read(request.output, pair.case)
        hashes = _hashes(pair, pair.reference) if old is not None else None
        if hashes is not None:
            maps.reuse(pair.case, hashes["reference"])
        if old is not None and old["fingerprint"] == fingerprint and old["inputs"] == hashes:
            records[pair.case] = {**old, "problem": pair.problem}
        else:
            files = _absolute(pair.prediction), _absolute(pair.reference)
            tasks[pair.case] = (pair.case, *files, settings, hashes, pair.problem, maps.wanted(pair.case))
    reused, total = set(records), len(records) + len(tasks)
    for done, (case, result) in enumerate(run(evaluate_files, tasks), start=1):
        if isinstance(result, TaskError):
            failures[case] = request.as_typed(result.reason)
        else:
            maps.keep(case, result.pop("maps"))
            records[case] = {**result, "fingerprint": fingerprint}
            records[case]["problem"] = result["problem"] and request.as_typed(result["problem"])
            read = result["problem"] is None and result["inputs"]["prediction"] is not None
            if read or tasks[case][1] is None:  # what failed is tried again
                resume.write(request.output, records[case])
            del records[case]["pictures"]
        problem = failures.get(case) or records[case]["problem"]
        progress(Progress("cases", len(reused) + done, total, case, problem))
    return records, failures, reused


def _hashes(pair: Pair, reference: Path) -> dict[str, str | None] | None:
    """The hashes of a case's files; None if one cannot be read, which is the case's failure, told by its task."""
    try:
        hashes = hash_files(pair.prediction, reference)
    except OSError:
        return None
    # Of an unreadable prediction the hash is None, as in the record of a case that had no prediction at all.
    return hashes if (hashes["prediction"] is None) == (pair.prediction is None) else None


def _without_prediction(
    run: Runner, settings: Settings, pairs: Sequence[Pair], failures: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """The records of cases whose scoring failed, as for want of memory, scored as empty predictions.

    A case fails again, and has no record, where the reference cannot be read.
    """
    failed = [pair for pair in pairs if pair.case in failures and pair.prediction and pair.reference]
    tasks = {pair.case: _empty_task(pair, settings, None, failures[pair.case]) for pair in failed}
    outcomes = _score_empty(run, tasks).items()
    return {case: outcome for case, outcome in outcomes if not isinstance(outcome, TaskError)}


def _empty_task(
    pair: Pair, settings: Settings, hashes: Mapping[str, str | None] | None, problem: str
) -> tuple[Any, ...]:
    """The arguments that score a case as an empty prediction."""
    return pair.case, None, _absolute(pair.reference), settings, hashes, problem


def _score_empty(run: Runner, tasks: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """The outcomes of such tasks by case, without the pictures: those of a report are read from the kept records."""
    outcomes: dict[str, Any] = {}
    for case, outcome in run(evaluate_files, tasks):
        if not isinstance(outcome, TaskError):
            del outcome["pictures"]  # at once: those of many cases would fill the memory
        outcomes[case] = outcome
    return outcomes


def _refuse_unnamed(
    run: Runner,
    settings: Settings,
    pairs: Sequence[Pair],
    records: Mapping[str, Mapping[str, Any]],
    allowed: set[int],
) -> dict[str, dict[str, Any]]:
    """The records of predictions with labels that nobody named, scored as empty predictions."""
    tasks: dict[str, tuple[Any, ...]] = {}
    for pair in pairs:
        record = records.get(pair.case)
        held = {int(value): int(voxels) for value, voxels in record["prediction_values"]} if record else {}
        more = sorted(held.keys() - allowed - {0, settings.ignore})
        if record and more and not record["problem"]:
            named = enumerated("label", [value for value in sorted(allowed) if value])
            problem = (
                f"Expected `{pair.prediction}` to hold only {named}, but got {', '.join(map(str, more[:5]))} in "
                f"{counted(sum(held[v] for v in more), 'voxel')}: name all in `--labels` or `--regions`, or correct it."
            )
            tasks[pair.case] = _empty_task(pair, settings, record["inputs"], problem)
    outcomes = _score_empty(run, tasks)
    return {
        case: {**records[case], "problem": outcome.reason, "rows": [], "lesions": []}
        if isinstance(outcome, TaskError)
        else outcome
        for case, outcome in outcomes.items()
    }


def _absolute(path: Path | None) -> Path | None:
    """For workers of other machines, which have folders of their own; links are kept as they are."""
    return None if path is None else path.absolute()


def _failure(pair: Pair, reason: str) -> dict[str, Any]:
    files = {"prediction": pair.prediction, "reference": pair.reference}
    return {"case": pair.case, "reason": reason, **{key: str(path or "") for key, path in files.items()}}


def _pairs(request: Request) -> list[Pair]:
    named = request.predictions, request.references
    if request.pairs is not None and request.predictions.is_dir():
        return read_pairs(request.pairs, *named)
    return pair_volumes(*named) or pair_folders(*named)
