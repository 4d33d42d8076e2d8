"""The report: one HTML file with everything in it, from an evaluation's rows and summary."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from monai_iou.evaluation import charts
from monai_iou.evaluation.pairing import Pair, PairingError, find_volumes
from monai_iou.evaluation.results import Evaluation
from monai_iou.evaluation.scoring import CASE_COLUMNS, LESION_THRESHOLD, Structure, mask_of, on_reference
from monai_iou.evaluation.thumbnails import make_slice_image
from monai_iou.files import write_text
from monai_iou.volumes.reading import VolumeError, read_labels

WORST_SHOWN = 5


@dataclass(frozen=True)
class Column:
    """How a column of cases.csv is shown: its title, the digits after the point, and whether it is a 0-1 score."""

    title: str
    digits: int = 3
    bounded: bool = True


COLUMNS = {
    "iou": Column("IoU"),
    "dice": Column("Dice"),
    "precision": Column("Precision"),
    "recall": Column("Recall"),
    "reference_ml": Column("Reference, ml", bounded=False),
    "prediction_ml": Column("Prediction, ml", bounded=False),
    "boundary_iou": Column("Boundary IoU"),
    "hd95_mm": Column("HD95, mm", 2, bounded=False),
    "nsd": Column("NSD"),
    "assd_mm": Column("ASSD, mm", 2, bounded=False),
    "lesion_tp": Column("Lesions TP", 0, bounded=False),
    "lesion_fp": Column("Lesions FP", 0, bounded=False),
    "lesion_fn": Column("Lesions FN", 0, bounded=False),
    "lesion_f1": Column("Lesion F1"),
    "pq": Column("PQ"),
    "sq": Column("SQ"),
    "rq": Column("RQ"),
    "cc_iou": Column("CC-IoU"),
}
HEADLINE = ("iou", "dice", "precision", "recall", "boundary_iou", "nsd", "hd95_mm", "lesion_f1")
DISTRIBUTIONS = ("iou", "nsd", "hd95_mm", "lesion_f1")


def write_report(path: Path, evaluation: Evaluation, summary: Mapping[str, Any], images: Path | None) -> None:
    """Write the report as one file that needs no network.

    Args:
        path: where to.
        evaluation: the rows, lesions and pairs.
        summary: as `monai_iou.evaluation.evaluate.summarise` makes it.
        images: folder of images named as the cases; their grey values lie under the contours.

    Raises:
        OutputError: the file cannot be written.
    """
    labels = list(summary["labels"])
    context = {
        "cases": summary["cases"],
        "labels": labels,
        "failures": summary["failures"],
        "notes": summary["notes"],
        "tiles": _tiles(summary, evaluation.lesions),
        "headline": [COLUMNS[name] for name in HEADLINE],
        "score_rows": [{"label": name, "cells": _score_cells(summary["labels"][name])} for name in labels],
        "distributions": _distributions(evaluation.rows, labels),
        "recall": _recall(evaluation.lesions),
        "agreement": _agreement(evaluation.rows, labels),
        "lesion_threshold": LESION_THRESHOLD,
        "worst": _worst(evaluation, images),
        "columns": _table_columns(),
        "table": [[_cell(row, name) for name in CASE_COLUMNS] for row in evaluation.rows],
        "options": summary["options"],
        "command": summary["command"],
        "versions": summary["versions"],
    }
    write_text(path, render("report.html", context))


def render(template: str, context: Mapping[str, Any]) -> str:
    """Fill one of the package's templates; every value is escaped unless it is markup made here."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("monai_iou.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(context)


def number(value: float | None, digits: int = 3) -> str:
    """A number for people: fixed digits, a dash where it is undefined.

    >>> number(0.12345), number(float("nan")), number(float("inf"))
    ('0.123', '-', '∞')
    """
    if value is None or math.isnan(value):
        return "-"
    return "∞" if math.isinf(value) else f"{value:.{digits}f}"


def _tiles(summary: Mapping[str, Any], lesions: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    dataset, cases = summary["dataset"], summary["cases"]
    failed = f"{cases['failed']} failed" if cases["failed"] else "none failed"
    status = [row["status"] for row in lesions]
    found, missed, false = (status.count(name) for name in ("tp", "fn", "fp"))
    return [
        {"what": "Cases", "value": str(cases["evaluated"]), "note": f"of {cases['paired']}; {failed}"},
        {
            "what": "IoU, mean over cases",
            "value": number(dataset["iou_i"]),
            "note": f"95 % interval {_interval(dataset['iou_i_interval'], 3)}",
        },
        {
            "what": "IoU, worst 10 % of cases",
            "value": number(dataset["iou_i_worst_10"]),
            "note": "mean of the lowest, at least one case",
        },
        {
            "what": "IoU, voxels pooled",
            "value": number(dataset["iou_d"]),
            "note": f"large structures count most; mean over labels {number(dataset['iou_c'])}",
        },
        {"what": "Lesions found", "value": f"{found} of {found + missed}", "note": f"{false} false positives"},
    ]


def _interval(bounds: Sequence[float] | None, digits: int) -> str:
    return "needs two cases" if bounds is None else f"{number(bounds[0], digits)} to {number(bounds[1], digits)}"


def _score_cells(scores: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    cells = []
    for name in HEADLINE:
        score, digits = scores[name], COLUMNS[name].digits
        count = f", n = {score['n']}" if score["undefined"] else ""
        interval = "" if score["mean_interval"] is None else _interval(score["mean_interval"], digits)
        cells.append(
            {
                "main": number(score["mean"], digits),
                "interval": interval,
                "median": f"median {number(score['median'], digits)}{count}",
            }
        )
    return cells


def _distributions(rows: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> list[dict[str, Any]]:
    result = []
    for name in DISTRIBUTIONS:
        column = COLUMNS[name]
        groups = {
            label: [
                charts.Point(row[name], 0.0, f"{row['case']}: {number(row[name], column.digits)}")
                for row in rows
                if row["label"] == label and math.isfinite(row[name])
            ]
            for label in labels
        }
        svg = charts.distribution(groups, column.title, column.bounded)
        result.append({"title": column.title, "svg": svg})
    return result


def _recall(lesions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found = [(row["volume_ml"] * 1000, row["status"] == "tp") for row in lesions if row["kind"] == "reference"]
    svg = charts.recall_chart(found, "Lesion volume, mm³")
    return {"svg": svg, "found": sum(hit for _, hit in found), "total": len(found)}


def _agreement(rows: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> dict[str, Any]:
    groups: dict[str, list[charts.Point]] = {label: [] for label in labels}
    for row in rows:
        mean, difference = (row["reference_ml"] + row["prediction_ml"]) / 2, row["prediction_ml"] - row["reference_ml"]
        groups[row["label"]].append(charts.Point(mean, difference, f"{row['case']}: {difference:+.3f} ml"))
    keys = [{"label": label, "svg": charts.legend_marker(i)} for i, label in enumerate(labels)]
    return {"svg": charts.bland_altman(groups), "legend": keys}


def _worst(evaluation: Evaluation, images: Path | None) -> list[dict[str, Any]]:
    pairs = {pair.case: pair for pair in evaluation.pairs}
    structures = {structure.name: structure for structure in evaluation.structures}
    images_by_case, problem = _images(images)
    ranked = sorted((row for row in evaluation.rows if not math.isnan(row["iou"])), key=lambda row: row["iou"])
    shown = []
    for row in ranked[:WORST_SHOWN]:
        case = row["case"]
        image = images_by_case.get(case, images_by_case.get(f"{case}_0000"))  # nnU-Net numbers the channels of a case
        note = problem if image or images is None else problem or f"No image named {case} in the images folder."
        crop, error = _crop(pairs[case], structures[row["label"]], image, evaluation.ignore)
        if crop is not None:
            cut = "The structures reach beyond this crop around their largest disagreement. " if crop["cut"] else ""
            text = {"iou": number(row["iou"]), "dice": number(row["dice"]), "note": f"{cut}{error or note}".strip()}
            shown.append({"case": case, "label": row["label"], "crop": crop, **text})
    return shown


def _images(folder: Path | None) -> tuple[dict[str, Path], str]:
    try:
        return (find_volumes(folder, "--images") if folder is not None else {}), ""
    except PairingError as error:
        return {}, str(error)


def _crop(
    pair: Pair, structure: Structure, image: Path | None, ignore: int | None
) -> tuple[dict[str, Any] | None, str]:
    """The crop as plain values, and what went wrong with it: pictures are extras and never fail an evaluation."""
    assert pair.prediction is not None
    assert pair.reference is not None
    try:
        reference, prediction = read_labels(pair.reference), read_labels(pair.prediction)
        array, _ = on_reference(pair.case, prediction, reference, True)
    except VolumeError as error:
        return None, str(error)
    masks = [mask_of(labels, structure.values) for labels in (array, reference.array)]
    if ignore is not None:
        masks = [mask & (reference.array != ignore) for mask in masks]
    try:
        crop, reason = make_slice_image(masks[0], masks[1], reference.grid, image), ""
    except VolumeError as error:
        crop, reason = make_slice_image(masks[0], masks[1], reference.grid, None), str(error)
    return (None if crop is None else asdict(crop)), reason


def _table_columns() -> list[dict[str, str]]:
    names = [{"title": title, "kind": "text"} for title in ("Case", "Label")]
    return names + [{"title": column.title, "kind": "number"} for column in COLUMNS.values()]


def _cell(row: Mapping[str, Any], name: str) -> dict[str, str]:
    value = row[name]
    if name not in COLUMNS:
        return {"value": value, "text": value}
    undefined = math.isnan(value)
    # JavaScript reads "Infinity", not Python's "inf".
    plain = "" if undefined else "Infinity" if math.isinf(value) else repr(float(value))
    return {"value": plain, "text": number(value, COLUMNS[name].digits)}
