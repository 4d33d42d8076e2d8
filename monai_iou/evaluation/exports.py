"""The scores in the formats of others: nnU-Net's summary.json, panoptica's table, and a CSV that LaTeX reads."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from monai_iou.evaluation.dataset_description import description_of
from monai_iou.evaluation.results import Evaluation
from monai_iou.files import table_text
from monai_iou.scores import ratio
from monai_iou.tables import csv_text

__all__ = ["EXPORTS", "Export"]

LATEX_COLUMNS = ("iou", "dice", "precision", "recall", "boundary_iou", "nsd", "hd95_mm", "assd_mm", "lesion_f1", "pq")


@dataclass(frozen=True)
class Export:
    """A further file of an evaluation: its name in the output folder, and what makes its text."""

    file: str
    text: Callable[[Evaluation], str]


def nnunet_text(evaluation: Evaluation) -> str:
    """Return what `nnUNetv2_evaluate_folder` writes: metrics per case, their means per label and of the foreground.

    As there, a score without a voxel in either mask is NaN and left out of its label's mean, and a region is named by
    the list of its values, or by its value where dataset.json writes no list. Cases that could not be evaluated are
    left out, and of a structure that was not annotated in a case, all metrics and counts are NaN.
    """
    names = _nnunet_names(evaluation)
    rows = {(row["case"], row["label"]): row for row in evaluation.measured}
    files = {pair.case: pair for pair in evaluation.pairs}
    cases: list[dict[str, Any]] = []
    for record in evaluation.records:
        pair = files[record["case"]]
        metrics = {shown: _nnunet_metrics(rows[record["case"], name]) for name, shown in names.items()}
        cases.append(
            {"metrics": metrics, "prediction_file": str(pair.prediction), "reference_file": str(pair.reference)}
        )
    means = {shown: _means([case["metrics"][shown] for case in cases]) for shown in names.values()}
    # An ordinary mean there, so that a label without a score makes it NaN.
    foreground = {key: _mean([mean[key] for mean in means.values()]) for key in _METRICS}
    content = {"foreground_mean": foreground, "mean": means, "metric_per_case": cases}
    return json.dumps(content, indent=4, sort_keys=True) + "\n"


def _nnunet_names(evaluation: Evaluation) -> dict[str, str]:
    """What each structure is called there: a list of one value in dataset.json is a region too."""
    content = description_of(evaluation.request).content if evaluation.request.regions else {}
    regions = content.get("regions", content.get("labels"))
    lists = {name for name, values in regions.items() if isinstance(values, list)} if isinstance(regions, dict) else ()
    return {
        structure.name: str(structure.values)
        if len(structure.values) > 1 or structure.name in lists
        else str(structure.values[0])
        for structure in evaluation.structures
    }


_METRICS = ("Dice", "FN", "FP", "IoU", "TN", "TP", "n_pred", "n_ref")


def _nnunet_metrics(row: Mapping[str, Any]) -> dict[str, float]:
    tp, fp, fn, tn = (_count(row, f"voxels_{name}") for name in ("tp", "fp", "fn", "tn"))
    scores = {"Dice": _dice(tp, fp, fn), "IoU": row["iou"]}
    return {**scores, "FN": fn, "FP": fp, "TN": tn, "TP": tp, "n_pred": tp + fp, "n_ref": tp + fn}


def _count(row: Mapping[str, Any], column: str) -> float:
    """A number of voxels or lesions; NaN where the structure was not annotated."""
    return math.nan if math.isnan(row[column]) else int(row[column])


def _dice(tp: float, fp: float, fn: float) -> float:
    """Of voxels: the column of this name may be that of a challenge, which is 1 where both masks are empty."""
    return ratio(2 * tp, 2 * tp + fp + fn, empty=math.nan)


def _means(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: _mean([case[key] for case in metrics if not math.isnan(case[key])]) for key in _METRICS}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def panoptica_text(evaluation: Evaluation) -> str:
    """Return the table that panoptica's aggregator writes: a row per case, and a column per label and score.

    Columns are called `LABEL-SCORE` after the keys of `PanopticaResult.to_dict()`, so that
    `Panoptica_Statistic.from_file` reads them. Matched lesions and their IoU follow the rule of the evaluation; as
    there, a case with lesions of which none is matched has RQ, SQ and PQ 0, standard deviations are of the population,
    volumes count voxels, and the fragments that many-to-one pairing gives to one lesion are one predicted instance.
    Cases that could not be evaluated are left out; the cells of a structure that was not annotated are empty.
    """
    rows = {(row["case"], row["label"]): row for row in evaluation.measured}
    matched: dict[tuple[str, str], list[float]] = {}
    for record in evaluation.records:
        for lesion in record["lesions"]:
            if lesion["status"] == "tp":
                matched.setdefault((record["case"], lesion["label"]), []).append(lesion["matched_iou"])
    groups = _panoptica_groups(evaluation.names)
    table: list[list[Any]] = [["subject_name", *(f"{g}-{key}" for g in groups.values() for key in PANOPTICA_KEYS)]]
    for record in evaluation.records:
        line = [record["case"]]
        for name in groups:
            key = record["case"], name
            scores = _panoptica_scores(rows[key], matched.get(key, []))
            line += [scores[score] for score in PANOPTICA_KEYS]
        table.append(line)
    return csv_text(table, separator="\t")


def _panoptica_groups(names: Sequence[str]) -> dict[str, str]:
    """What each structure is called there, where a name may not hold the separator.

    >>> _panoptica_groups(["core", "a-b", "a_b"])
    {'core': 'core', 'a-b': 'a_b_', 'a_b': 'a_b'}
    """
    groups = {name: name for name in names if "-" not in name}
    for name in names:
        group = name.replace("-", "_")
        while "-" in name and group in groups.values():
            group += "_"
        groups[name] = group
    return {name: groups[name] for name in names}


PANOPTICA_KEYS = (
    *("n_ref_instances", "n_pred_instances", "tp", "fp", "fn", "prec", "rec", "rq"),
    *("sq", "sq_std", "pq", "sq_dsc", "sq_dsc_std", "pq_dsc"),
    *("global_bin_volume_pred", "global_bin_volume_ref", "global_bin_dsc", "global_bin_iou"),
)


def _panoptica_scores(row: Mapping[str, Any], ious: Sequence[float]) -> dict[str, float]:
    """The scores of one case and label, from its row and the IoU of each matched lesion."""
    tp, fp, fn = (_count(row, f"lesion_{kind}") for kind in ("tp", "fp", "fn"))
    voxels_tp, voxels_fp, voxels_fn = (_count(row, f"voxels_{kind}") for kind in ("tp", "fp", "fn"))
    rq = ratio(2 * tp, 2 * tp + fp + fn, empty=math.nan)
    iou, dice = np.array(ious), 2 * np.array(ious) / (1 + np.array(ious))
    nothing = math.nan if math.isnan(rq) else 0.0
    sq, sq_dsc = (float(values.mean()) if ious else nothing for values in (iou, dice))
    sq_std, sq_dsc_std = (float(values.std()) if ious else math.nan for values in (iou, dice))
    return {
        "n_ref_instances": tp + fn,
        "n_pred_instances": tp + fp,
        "tp": tp,
        "fp": fp,
        "fn": fn,
        "prec": ratio(tp, tp + fp, empty=math.nan),
        "rec": ratio(tp, tp + fn, empty=math.nan),
        "rq": rq,
        "sq": sq,
        "sq_std": sq_std,
        "pq": sq * rq,
        "sq_dsc": sq_dsc,
        "sq_dsc_std": sq_dsc_std,
        "pq_dsc": sq_dsc * rq,
        "global_bin_volume_pred": voxels_tp + voxels_fp,
        "global_bin_volume_ref": voxels_tp + voxels_fn,
        "global_bin_dsc": _dice(voxels_tp, voxels_fp, voxels_fn),
        "global_bin_iou": row["iou"],
    }


_LATEX_ESCAPES = str.maketrans(
    {
        **{character: f"\\{character}" for character in "_&%#${}"},
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "\\": r"\textbackslash{}",
    }
)


def latex_text(evaluation: Evaluation) -> str:
    r"""Return one row per label: mean, and the ends of its interval, of the usual scores.

    Column names are letters only, as `\csvreader` and `pgfplotstable` make commands of them, and in the labels the
    characters that mean something to LaTeX are escaped.
    """
    columns = ["label", "cases"]
    columns += [f"{_letters(name)}{end}" for name in LATEX_COLUMNS for end in ("", "low", "high")]
    rows = []
    for label, scores in evaluation.summary["labels"].items():
        row: dict[str, Any] = {"label": label.translate(_LATEX_ESCAPES), "cases": scores["iou"]["n"]}
        for name in LATEX_COLUMNS:
            low, high = scores[name]["mean_interval"] or (None, None)
            values = zip(("", "low", "high"), (scores[name]["mean"], low, high), strict=True)
            row |= {f"{_letters(name)}{end}": "" if value is None else f"{value:.4f}" for end, value in values}
        rows.append(row)
    return table_text(columns, rows)


def _letters(name: str) -> str:
    """A column's name without what LaTeX does not allow in a command.

    >>> _letters("hd95_mm"), _letters("boundary_iou")
    ('hdmm', 'boundaryiou')
    """
    return "".join(character for character in name if character.isalpha())


EXPORTS = {
    "nnunet": Export("nnunet_summary.json", nnunet_text),
    "panoptica": Export("panoptica.tsv", panoptica_text),
    "latex": Export("latex.csv", latex_text),
}
