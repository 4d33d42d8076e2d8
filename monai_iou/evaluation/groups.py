"""Patients of cases and names of labels: from a file, or from the dataset.json next to the references."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from monai_iou.datasets.description import read_label_scheme, read_labelled
from monai_iou.evaluation.request import Request, RequestError
from monai_iou.files import read_csv
from monai_iou.volumes.names import case_name


def patients_of(cases: Sequence[str], references: Path, file: Path | None) -> dict[str, str]:
    """The patient of every case; a case that is named nowhere is a patient of its own.

    Args:
        cases: their names.
        references: folder of the references; without `file`, `patient_groups` of its dataset.json or of the one in the
            folder above counts.
        file: a CSV with the columns case and patient, or JSON that maps cases to patients or patients to parts of
            their cases' names.

    Raises:
        RequestError: the file cannot be read as one of these, or gives a case two patients.
    """
    if file is None:
        groups = _dataset(references).get("patient_groups")
        named = _by_parts(cases, groups, references) if isinstance(groups, dict) else {}
    else:
        named = _from_file(cases, file)
    return {case: named.get(case, f"case {case}") for case in cases}


def label_names(references: Path) -> dict[str, str]:
    """Names of label values in the dataset.json next to or above the references, in either layout; none without it.

    Decathlon maps values to names; nnU-Net maps names to values, or to lists of them, which are regions.
    """
    labels = _dataset(references).get("labels")
    if not isinstance(labels, dict):
        return {}
    names: dict[str, str] = {}
    for key, value in labels.items():
        if isinstance(value, str):
            names[str(key).strip()] = value
        elif isinstance(value, int) and not isinstance(value, bool):
            names[str(value)] = str(key)
    return names


def label_titles(request: Request, names: Sequence[str]) -> dict[str, str]:
    """How a page calls each structure: by its name, and a label by its value with its name in dataset.json."""
    known = {} if request.regions else label_names(request.references)
    return {name: f"{name} ({known[name]})" if known.get(name, name) != name else name for name in names}


def with_dataset_labels(request: Request) -> Request:
    """The request with what the dataset.json of the references says of labels, where the options say nothing.

    That is the value to ignore and, if neither labels nor regions are named, the regions.
    """
    if request.instances:  # the files hold lesion numbers, which no scheme of labels is about
        return request
    dataset = _dataset(request.references)
    try:
        scheme = read_label_scheme(dataset, request.references)
    except ValueError:  # an extra, as the rest of the file
        return request
    named = {*request.labels, *(value for values in request.regions.values() for value in values)}
    ignore = scheme.ignore if request.ignore is None and scheme.ignore not in named else request.ignore
    regions = request.regions if named else scheme.regions
    return replace(request, ignore=ignore, regions=regions)


def without_unlabelled(records: Mapping[str, dict[str, Any]], references: Path) -> dict[str, dict[str, Any]]:
    """The records without the scores of classes that the dataset.json of the references says were not annotated.

    What is predicted of such a class in such a case is neither right nor wrong.
    """
    lacking = _lacking(_dataset(references), references)
    return {
        case: record
        if case not in lacking
        else {
            **record,
            **{key: [row for row in record[key] if row["label"] not in lacking[case]] for key in ("rows", "lesions")},
        }
        for case, record in records.items()
    }


def _lacking(content: Mapping[str, Any], references: Path) -> dict[str, set[str]]:
    """Name of a case -> names of the structures that were not annotated in it."""
    whole = content.get("labelled")
    named = dict(whole) if isinstance(whole, dict) else {}
    for key in ("training", "validation", "test_labelled"):
        for entry in content.get(key) or []:
            if isinstance(entry, dict) and "labelled" in entry and isinstance(entry.get("label"), str):
                named[case_name(Path(entry["label"]))] = entry["labelled"]
    try:
        scheme = read_label_scheme(content, references) if named else None
        read = {case: read_labelled(classes, scheme, case) for case, classes in named.items()} if scheme else {}
    except ValueError:  # an extra, as the rest of the file
        return {}
    structures = {} if scheme is None else dict(enumerate(scheme.classes, start=1))
    names = {n: name if scheme and scheme.regions else str(values[0]) for n, (name, values) in structures.items()}
    return {
        case: {name for number, name in names.items() if number not in labelled}
        for case, labelled in read.items()
        if labelled is not None
    }


def _dataset(references: Path) -> dict[str, Any]:
    """The content of dataset.json; it is an extra, so that a damaged one is as good as none."""
    for path in (references / "dataset.json", references.absolute().parent / "dataset.json"):
        try:
            content = json.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(content, dict):
            return content
    return {}


def _from_file(cases: Sequence[str], file: Path) -> dict[str, str]:
    try:
        if file.suffix.lower() != ".json":
            rows = read_csv(file)
            columns = set(rows[0]) if rows else set()
            if not {"case", "patient"} <= columns:
                raise _unusable(file, f"the columns {', '.join(sorted(columns)) or 'nothing'}")
            return {row["case"]: row["patient"] for row in rows if row["patient"]}
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, RequestError):
            raise
        raise _unusable(file, " ".join(str(error).split())) from error
    content = content.get("patient_groups", content) if isinstance(content, dict) else content
    if not isinstance(content, dict):
        raise _unusable(file, type(content).__name__)
    if all(isinstance(value, (str, int)) for value in content.values()):
        return {str(case): str(patient) for case, patient in content.items()}
    return _by_parts(cases, content, file)


def _by_parts(cases: Sequence[str], groups: Mapping[str, Any], source: Path) -> dict[str, str]:
    """The patient whose list holds the case's name or a part of it."""
    patients: dict[str, str] = {}
    for patient, parts in groups.items():
        if not isinstance(parts, (list, tuple)) or not all(isinstance(part, str) and part for part in parts):
            raise _unusable(source, f"{parts!r} for {patient}")
        for case in cases:
            if any(part in case for part in parts):
                if case in patients:
                    message = (
                        f"Expected every case to be of one patient, but `{source}` gives `{case}` to {patients[case]} "
                        f"and {patient}: name longer parts of the cases' names."
                    )
                    raise RequestError(message)
                patients[case] = str(patient)
    return patients


def _unusable(file: Path, content: str) -> RequestError:
    return RequestError(
        f"Expected `{file}` to be a CSV with the columns case and patient, or JSON that maps patients to lists of "
        f"cases, but got {content}: correct it."
    )
