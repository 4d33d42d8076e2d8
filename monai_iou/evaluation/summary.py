"""What summary.json holds: statistics over cases per label and column, the data set's scores, and how it was made."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from monai_iou.evaluation.columns import columns_of
from monai_iou.evaluation.groups import label_titles
from monai_iou.evaluation.penalties import with_and_without
from monai_iou.evaluation.results import Evaluation, Request
from monai_iou.evaluation.scoring import CURVE
from monai_iou.evaluation.statistics import MIN_UNITS, dataset_scores, describe
from monai_iou.evaluation.thresholds import summarise_maps
from monai_iou.versions import version_of

WORST_CASES = 10
LIBRARIES = ("monai-iou", "monai", "torch", "numpy", "scipy", "connected-components-3d", "nibabel", "SimpleITK")


def summarise(evaluation: Evaluation) -> dict[str, Any]:
    """Everything summary.json holds, as plain values."""
    rows, request = evaluation.rows, evaluation.request
    labels, curves = _labels(evaluation)
    ranked = sorted((row for row in rows if not math.isnan(row["iou"])), key=lambda row: (row["iou"], row["case"]))
    return {
        "cases": {
            "paired": len(evaluation.pairs),
            "evaluated": len(evaluation.records),
            "failed": len(evaluation.failures),
            "reused": evaluation.reused,
        },
        "labels": labels,
        "titles": label_titles(request, evaluation.names),
        "lesion_f1_curves": curves,
        "dataset": dataset_scores(evaluation.averaged, evaluation.patients, request.present),
        "dataset_defined": dataset_scores(evaluation.measured, evaluation.patients, request.present),
        "probabilities": {
            name: summarise_maps(counted, name)
            for name in evaluation.names
            if (counted := [maps for maps in evaluation.maps.values() if name in maps])
        },
        "worst_cases": [{key: row[key] for key in ("case", "label", "iou", "dice")} for row in ranked[:WORST_CASES]],
        "failures": evaluation.failures,
        "scored_as_empty": [record["case"] for record in evaluation.missing],
        "notes": evaluation.notes,
        "options": _options(evaluation),
        "command": list(request.command),
        "versions": {name: version_of(name) for name in LIBRARIES},
        "patients": evaluation.patients,
        "inputs": {record["case"]: record["inputs"] for record in [*evaluation.records, *evaluation.missing]},
    }


def _options(evaluation: Evaluation) -> dict[str, Any]:
    """What the scores depend on, as the command's options name it."""
    request = evaluation.request
    return {
        "predictions": str(request.predictions),
        "references": str(request.references),
        "probabilities": None if request.probabilities is None else str(request.probabilities),
        "structures": {structure.name: list(structure.values) for structure in evaluation.structures},
        "ignore": request.ignore,
        "tolerance_mm": request.tolerance,
        "tolerances_mm": dict(request.tolerances),
        "boundary": request.boundary,
        "boundary_distance": request.boundary_distance,
        "missing": request.missing,
        "present": request.present,
        "lesion_rule": request.rules.in_words,
        "like": request.like,
        "like_rule": None if request.rules.challenge is None else request.rules.challenge.rule,
        "intervals": f"95 % expanded percentile bootstrap over cases or patients; null below {MIN_UNITS} of them",
        "unit": "case" if evaluation.patients is None else "patient",
        "patients": None if evaluation.patients is None else len(set(evaluation.patients.values())),
        "resample": "reference" if request.resample else None,
        "export": list(request.export),
    }


def part_of(evaluation: Evaluation, cases: Collection[str]) -> Evaluation:
    """The evaluation of some of its cases, with a summary of their own; nothing is written.

    Args:
        evaluation: of all cases.
        cases: names of those that are kept.
    """
    kept = set(cases)
    records, missing, failures = (
        [each for each in rows if each.get("case") in kept]
        for rows in (evaluation.records, evaluation.missing, evaluation.failures)
    )
    maps = {case: counted for case, counted in evaluation.maps.items() if case in kept}
    pairs = [pair for pair in evaluation.pairs if pair.case in kept]
    part = replace(evaluation, records=records, missing=missing, failures=failures, maps=maps, pairs=pairs)
    part.summary = summarise(part)
    return part


def _labels(evaluation: Evaluation) -> tuple[dict[str, Any], dict[str, Any]]:
    """The statistics and the F1 curve of every structure."""
    averaged, measured, every = map(_by_label, (evaluation.averaged, evaluation.measured, evaluation.penalised))
    labels = {name: _label(evaluation, averaged[name], measured[name], every[name]) for name in evaluation.names}
    return labels, {name: _f1_curve(evaluation.request, averaged[name]) for name in evaluation.names}


def _by_label(rows: Sequence[Mapping[str, Any]]) -> defaultdict[str, list[Mapping[str, Any]]]:
    """The rows of each label, in one pass over all of them."""
    found: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        found[row["label"]].append(row)
    return found


def _f1_curve(request: Request, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean F1 of lesions at each threshold over the cases with lesions, and the area under it."""
    curves = [row["f1_curve"] for row in rows]
    counted = [curve for curve in curves if not math.isnan(curve[0])]
    means = np.mean(counted, axis=0) if counted else np.zeros(2)
    measure = "overlap" if request.match.startswith("overlap") else "iou"
    area = float((means[1:] + means[:-1]).mean() / 2) if counted else None
    return {"measure": measure, "thresholds": list(CURVE), "f1": means.tolist() if counted else None, "area": area}


def _label(
    evaluation: Evaluation,
    averaged: Sequence[Mapping[str, Any]],
    measured: Sequence[Mapping[str, Any]],
    every: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The statistics of one structure, by column, from its rows in the evaluation's tables of these names."""
    units = None if evaluation.patients is None else [evaluation.patients[row["case"]] for row in averaged]
    return {
        column: {**describe([row[column] for row in averaged], units), **with_and_without(measured, every, column)}
        for column in columns_of(evaluation.request.rules.challenge)
    }
