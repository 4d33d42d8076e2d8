"""What an evaluation gives back: every case's rows, with and without what is missing."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from monai_iou.evaluation.columns import FAILURE_COLUMNS, columns_of
from monai_iou.evaluation.groups import label_titles
from monai_iou.evaluation.pairing import Pair
from monai_iou.evaluation.penalties import penalised, without_prediction
from monai_iou.evaluation.request import Progress, Request, RequestError
from monai_iou.evaluation.rules import Rules, Structure
from monai_iou.evaluation.scoring import evaluate_case
from monai_iou.metrics import Challenge
from monai_iou.volumes.grid import Grid

__all__ = ["FAILURE_COLUMNS", "Evaluation", "Progress", "Request", "RequestError"]


@dataclass
class Evaluation:
    """The results of an evaluation, as written to the output folder.

    Args:
        request: the request.
        records: records of the evaluated cases, in order.
        missing: records of the cases without a usable prediction, scored as empty predictions.
        failures: rows of failures.csv.
        pairs: all cases.
        structures: the structures that were scored.
        kept: the evaluated cases whose records were taken from an earlier run.
        patients: the patient of every case; None if every case is a patient of its own.
        run_notes: notes for the reader about how the evaluation was run.
        maps: by case, what `count_maps` counted in the probability maps of each structure.
        summary: content of summary.json.
        rows: rows of cases.csv; with penalties if they were requested.
        measured: rows of the evaluated cases with the measured scores.
        missing_rows: rows of the missing cases with the scores of empty predictions.
    """

    request: Request
    records: list[dict[str, Any]]
    missing: list[dict[str, Any]]
    failures: list[dict[str, Any]]
    pairs: list[Pair]
    structures: tuple[Structure, ...]
    kept: Collection[str]
    patients: dict[str, str] | None = None
    run_notes: list[str] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    maps: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(init=False)
    measured: list[dict[str, Any]] = field(init=False)
    missing_rows: list[dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        """Give every case a row for every structure."""
        rules = self.request.rules
        absent = {structure.name: _absent(structure, rules) for structure in self.structures}
        self.measured, self.missing_rows = (
            [row for record in records for row in _complete(record, absent, rules.challenge)]
            for records in (self.records, self.missing)
        )
        self.rows = self.measured
        if self.request.missing == "penalty":
            order = {pair.case: i for i, pair in enumerate(self.pairs)}
            self.rows = sorted(self.penalised, key=lambda row: order[row["case"]])  # stable: labels keep their order

    @property
    def reused(self) -> int:
        """How many of the evaluated cases were evaluated by an earlier run."""
        return sum(record["case"] in self.kept for record in self.records)

    @property
    def averaged(self) -> list[dict[str, Any]]:
        """The rows that means, intervals and quartiles are taken over: with penalties unless they were excluded."""
        return self.measured if self.request.missing == "exclude" else self.penalised

    @cached_property
    def penalised(self) -> list[dict[str, Any]]:
        """The rows of all cases with a penalty for every score that is undefined."""
        challenge = self.request.rules.challenge
        missing = [without_prediction(row, challenge) for row in self.missing_rows]
        return [penalised(row, challenge) for row in [*self.measured, *missing]]

    @property
    def with_missing(self) -> list[dict[str, Any]]:
        """The rows of all cases, missing ones as empty predictions."""
        return [*self.measured, *self.missing_rows]

    @property
    def lesions(self) -> list[dict[str, Any]]:
        """The rows of lesions.csv, one per lesion, of the cases that cases.csv has."""
        return self._lesions_of([*self.records, *self.missing] if self.request.missing == "penalty" else self.records)

    @property
    def counted_lesions(self) -> list[dict[str, Any]]:
        """The lesions of the cases that the means count: those of a missing case are missed unless it is excluded."""
        return self._lesions_of(self.records if self.request.missing == "exclude" else [*self.records, *self.missing])

    @property
    def missing_lesions(self) -> list[dict[str, Any]]:
        """The lesions of the missing cases."""
        return self._lesions_of(self.missing)

    def _lesions_of(self, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        names = set(self.names)
        return [row for record in records for row in record["lesions"] if row["label"] in names]

    @property
    def notes(self) -> list[str]:
        """Notes that the reader should see before the scores."""
        held = {row["label"] for row in self.with_missing if row["reference_ml"] > 0}
        known = {row["label"] for row in self.with_missing if not math.isnan(row["reference_ml"])}
        absent = [name for name in self.names if name not in held] if self.rows else []
        titles = label_titles(self.request, absent)
        notes = [
            f"{titles[name]}: no reference holds it, so that only false positives count."
            if name in known
            else f"{titles[name]}: it was annotated in no case and has no scores."
            for name in absent
        ]
        return [*self.run_notes, *notes, *(note for record in self.records for note in record["notes"])]

    @property
    def names(self) -> list[str]:
        """The structures' names, in the order of the rows."""
        return [structure.name for structure in self.structures]


def _absent(structure: Structure, rules: Rules) -> dict[str, Any]:
    """The row of a case in which neither label map holds the structure."""
    nothing = np.zeros((1, 1, 1), np.uint8)
    rows, _ = evaluate_case(nothing, nothing, Grid((1, 1, 1), np.eye(4)), [structure], rules=rules)
    return rows[0]


def _complete(
    record: Mapping[str, Any], absent: Mapping[str, Mapping[str, Any]], challenge: Challenge | None
) -> list[dict[str, Any]]:
    """The rows of a case for all structures: those that it lacks as in neither map, unannotated ones without scores."""
    known = {row["label"]: row for row in record["rows"]}
    unknown = record.get("not_annotated", ())
    everywhere = {
        "case": record["case"],
        "voxels_tn": record["voxels"],
        "diagonal_mm": record["diagonal_mm"],
    }
    # What is in neither map is right, but of this structure nobody knows whether it is there: not even 0 is known.
    undefined = dict.fromkeys(columns_of(challenge), math.nan)
    others = {name: {**row, **everywhere, **(undefined if name in unknown else {})} for name, row in absent.items()}
    return [dict(known.get(name, row)) for name, row in others.items()]
