"""The scores of evaluated folders side by side: every case that both were asked for, what is missing as the worst."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from monai_iou.evaluation.columns import COLUMNS
from monai_iou.evaluation.earlier import MARKS, begins_with
from monai_iou.evaluation.groups import own_patient
from monai_iou.evaluation.penalties import OF_LESIONS, empty_prediction, penalised
from monai_iou.evaluation.rendering import readable, restored
from monai_iou.files import read_csv
from monai_iou.metrics import CHALLENGES, Challenge

Scores = dict[tuple[str, str], dict[str, float]]


class CompareError(ValueError):
    """The folders cannot be compared; the message says why."""


@dataclass(frozen=True)
class Evaluated:
    """The output of an evaluation, as far as comparing needs it.

    Args:
        folder: as the user named it.
        name: short and its own among the folders compared.
        scores: by case and label, with penalties for what is undefined although there was something to find.
        failed: the cases of failures.csv.
        unscored: those of them that were not even scored as empty predictions, such as cases without a reference.
        patients: the patient of every case, where one of the evaluations that are compared knew them.
        titles: how the report calls each label, where it has another name than its value.
        options: by what rules the scores were computed, as summary.json has them.
        references: the hash of the reference of every case.
        columns: of cases.csv; an earlier version wrote fewer.
        known: by case and label, a row that says what is in the reference: of any of the folders that are compared.
    """

    folder: Path
    name: str
    scores: Scores
    failed: frozenset[str]
    unscored: frozenset[str]
    patients: Mapping[str, str]
    titles: Mapping[str, str]
    options: Mapping[str, Any]
    references: Mapping[str, str]
    columns: frozenset[str]
    known: Scores

    def patient(self, case: str) -> str:
        """The patient of a case; its own where nobody is named."""
        return self.patients.get(case, own_patient(case))

    @property
    def unit(self) -> str:
        """What intervals and tests resample."""
        return "patients" if self.patients else "cases"

    @property
    def challenge(self) -> Challenge | None:
        """The challenge whose columns the folder has; None if there is none, or an earlier version did not write it."""
        return CHALLENGES.get(str(self.options.get("like")))

    @cached_property
    def labels(self) -> list[str]:
        """The labels in the order of the table; of a folder where every case failed, those that it was asked for."""
        return list(dict.fromkeys(label for _, label in self.scores)) or list(_table(self.options.get("structures")))


def read_evaluated(folders: Sequence[Path]) -> list[Evaluated]:
    """Read evaluated folders.

    Raises:
        CompareError: a cases.csv is not readable or not of one evaluation, or labels, cases or patients do not match.
    """
    names = short_names(folders)
    evaluated = [_read(folder, name) for folder, name in zip(folders, names, strict=True)]
    known = _known(evaluated)
    evaluated = [replace(one, known=known) for one in evaluated]
    first = evaluated[0]
    for other in evaluated[1:]:
        if not set(first.labels) & set(other.labels):
            message = (
                f"Expected the same labels in `{first.folder}` and `{other.folder}`, but got {_listed(first.labels)} "
                f"and {_listed(other.labels)}: evaluate both with the same `--labels` or `--regions`."
            )
            raise CompareError(message)
        if not paired_keys(first, other):
            message = (
                f"Expected cases in common, but got none in `{first.folder}` and `{other.folder}`: "
                "evaluate the same cases."
            )
            raise CompareError(message)
    patients = _patients(evaluated)
    return [replace(one, patients=patients) for one in evaluated]


def _known(evaluated: Sequence[Evaluated]) -> Scores:
    """What is in the references: from the first folder with a score, or else with a row of `--missing penalty`."""
    known: Scores = {}
    for one in reversed(evaluated):
        known |= one.known
    for one in reversed(evaluated):
        known |= one.scores
    return known


def _patients(evaluated: Sequence[Evaluated]) -> dict[str, str]:
    """The patient of every case that one of the folders names, so that all comparisons have the same unit."""
    named: dict[str, tuple[str, Evaluated]] = {}
    for one in evaluated:
        for case, patient in one.patients.items():
            if patient == own_patient(case):
                continue
            known, source = named.setdefault(case, (patient, one))
            if known != patient:
                message = (
                    f"Expected every case to be of one patient, but got `{case}` of {known} in `{source.folder}` and "
                    f"of {patient} in `{one.folder}`: evaluate both with the same `--groups`."
                )
                raise CompareError(message)
    return {case: patient for case, (patient, _) in named.items()}


def short_names(folders: Sequence[Path]) -> list[str]:
    """Names for headings: the folders' own where they differ, else as many parts of the path as tell them apart.

    >>> short_names([Path("a/results"), Path("b/results")]), short_names([Path("x/a"), Path("x/b")])
    (['a/results', 'b/results'], ['a', 'b'])
    """
    parts = [folder.parts for folder in folders]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(path[-length:]) or "." for path in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{folder} ({i})" for i, folder in enumerate(map(str, folders), start=1)]


def paired_keys(*evaluated: Evaluated) -> list[tuple[str, str]]:
    """Cases and labels of which every folder has a score, and of which any compared folder knows the reference."""
    return sorted(key for key in evaluated[0].known if all(is_in(one, key) for one in evaluated))


def unknown_cases(first: Evaluated, second: Evaluated, label: str) -> list[str]:
    """The cases that two folders failed at, and of which no compared folder knows the reference."""
    return sorted(case for case in first.failed & second.failed if (case, label) not in first.known)


def scores_of(evaluated: Sequence[Evaluated], key: tuple[str, str], metric: str) -> list[float]:
    """The score in each folder, of those that failed at the case that of an empty prediction.

    NaN in all of them where there is nothing to find and none of them predicts anything.
    """
    scores = [score_of(one, key, metric) for one in evaluated]
    if not any(map(math.isfinite, scores)):
        return scores
    return [
        _against_false_positive(one, key, metric) if math.isnan(score) else score
        for one, score in zip(evaluated, scores, strict=True)
    ]


def _against_false_positive(one: Evaluated, key: tuple[str, str], metric: str) -> float:
    """The score of a folder that has none, while another predicts what is not there.

    The best score for a prediction that is rightly empty, and the worst for a case that failed.
    """
    is_distance = COLUMNS[metric].better == "lower"
    if key not in one.scores:
        return one.known[key]["diagonal_mm"] if is_distance else 0.0
    counts = ("lesion_tp", "lesion_fp", "lesion_fn") if metric in OF_LESIONS else ("reference_ml", "prediction_ml")
    if metric not in one.columns or any(one.scores[key][name] != 0 for name in counts):
        return math.nan
    return 0.0 if is_distance else 1.0


def score_of(evaluated: Evaluated, key: tuple[str, str], metric: str) -> float:
    """A score; of a failed case that of an empty prediction, for which any compared folder knows the reference."""
    if key in evaluated.scores:
        return evaluated.scores[key][metric]
    return float(penalised(empty_prediction(evaluated.known[key], evaluated.challenge))[metric])


def is_in(evaluated: Evaluated, key: tuple[str, str]) -> bool:
    """Whether a folder has a score of a case and label: its own, or that of an empty prediction where it failed."""
    failed = key[0] in evaluated.failed and key[0] not in evaluated.unscored
    return key in evaluated.scores or (failed and key[1] in evaluated.labels)


def _read(folder: Path, name: str) -> Evaluated:
    summary = _summary(folder)
    patients, titles = (_texts(summary.get(key)) for key in ("patients", "titles"))
    options, inputs = (_table(summary.get(key)) for key in ("options", "inputs"))
    failures = [row["case"] for row in _rows(summary.get("failures")) if isinstance(row.get("case"), str)]
    # Tables have bytes that are no text as escapes.
    named = {readable(case): case for case in (*patients, *inputs, *failures)}
    failed = {named.get(row["case"], restored(row["case"])): row for row in _failed(folder)}
    try:
        rows = read_csv(folder / "cases.csv")
        columns = frozenset(rows[0] if rows else ())
        absent = {column: math.nan for column in COLUMNS if column not in columns}  # and not penalised either
        known = {
            (named.get(row["case"], restored(row["case"])), row["label"]): {
                **penalised({column: float(row[column]) if row.get(column) else math.nan for column in COLUMNS}),
                **absent,
            }
            for row in rows
        }
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise _unreadable(folder) from error
    if mixed := {*failed, *failures} & {case for (case, _), row in known.items() if row["prediction_ml"] > 0}:
        message = (
            f"Expected one evaluation in `{folder}`, but `{min(mixed)}` has a score in cases.csv and is a failure in "
            "other tables, as after an evaluation that was killed: evaluate into this folder again."
        )
        raise CompareError(message)
    references = _texts({case: files.get("reference") for case, files in inputs.items() if isinstance(files, dict)})
    # With `--missing penalty` failed cases have rows too, of which nobody could tell that they failed.
    scores = {key: row for key, row in known.items() if key[0] not in failed}
    unscored = _unscored(failed, summary, {case for case, _ in known})
    return Evaluated(
        folder, name, scores, frozenset(failed), unscored, patients, titles, options, references, columns, known
    )


def _unreadable(folder: Path) -> CompareError:
    """Why there are no scores: no evaluation, or one whose table was changed since."""
    path = folder / "cases.csv"
    if begins_with(path, MARKS[path.name]):
        message = (
            f"Expected `{path}` as `monai-iou evaluate` wrote it, but got a table that another program has saved in a "
            "format of its own, as a spreadsheet with decimal commas does: evaluate into this folder again."
        )
    else:
        message = (
            f"Expected the output of `monai-iou evaluate` in `{folder}`, but got no readable cases.csv: evaluate first."
        )
    return CompareError(message)


def _failed(folder: Path) -> list[dict[str, str]]:
    """The rows of failures.csv that name a case; none where it cannot be read."""
    try:
        return [row for row in read_csv(folder / "failures.csv") if "case" in row]
    except (OSError, ValueError):
        return []


def _unscored(
    failed: Mapping[str, Mapping[str, str]], summary: Mapping[str, Any], in_table: Set[str]
) -> frozenset[str]:
    """The failed cases of which the evaluation has no score, so that they are no failures of the method.

    An earlier version did not list the others: there, they are those without a reference and, with `--missing penalty`,
    those without a row in cases.csv.
    """
    scored = summary.get("scored_as_empty")
    if isinstance(scored, list):
        return frozenset(failed).difference(case for case in scored if isinstance(case, str))
    with_rows = _table(summary.get("options")).get("missing") == "penalty"
    return frozenset(
        case
        for case, row in failed.items()
        if (row.get("prediction") and not row.get("reference")) or (with_rows and case not in in_table)
    )


def _summary(folder: Path) -> dict[str, Any]:
    """The content of summary.json; empty where there is none that can be read."""
    try:
        return _table(json.loads((folder / "summary.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return {}


def _table(content: object) -> dict[str, Any]:
    """A table in summary.json; empty where an evaluation wrote none."""
    return content if isinstance(content, dict) else {}


def _rows(content: object) -> list[dict[str, Any]]:
    """A list of tables likewise."""
    return [row for row in content if isinstance(row, dict)] if isinstance(content, list) else []


def _texts(content: object) -> dict[str, str]:
    """A table of texts likewise."""
    return {str(name): str(text) for name, text in _table(content).items()}


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(labels[:8]) + (", ..." if len(labels) > 8 else "") if labels else "none"
