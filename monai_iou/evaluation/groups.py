"""Patients of cases and names of labels: from a file, or from the dataset.json next to the references."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from monai_iou.datasets.description import read_label_scheme, read_labelled
from monai_iou.evaluation.dataset_description import Description, description_of
from monai_iou.evaluation.pairing import Pair, name_of_file
from monai_iou.evaluation.rendering import restored
from monai_iou.evaluation.request import Request, RequestError
from monai_iou.evaluation.rules import Structure
from monai_iou.tables import enumerated, read_csv, text_remedy
from monai_iou.volumes.names import composed

SHOWN = 3  # names in a message


def patients_of(pairs: Sequence[Pair], request: Request) -> dict[str, str]:
    """The patient of every case; a case that is named nowhere is a patient of its own.

    Args:
        pairs: the cases.
        request: with `groups`, a CSV with the columns case and patient, or JSON that maps cases to patients or patients
            to parts of their cases' names. Without it, `patient_groups` of dataset.json counts, by the rule of a
            training.

    Raises:
        RequestError: the file cannot be read as one of these, names none of the cases, or gives one two patients.
    """
    if request.groups is not None:
        named = _from_file(pairs, request.groups)
    else:
        dataset = description_of(request)
        groups = dataset.content.get("patient_groups")
        named = _by_parts(pairs, groups, dataset) if isinstance(groups, dict) else {}
    return {pair.case: named.get(pair.case, own_patient(pair.case)) for pair in pairs}


def patient_notes(patients: Mapping[str, str], request: Request) -> list[str]:
    """Say which cases have no patient in `--groups`: perhaps misspelt ones. A dataset.json need not name all."""
    alone = [case for case, patient in patients.items() if patient == own_patient(case)]
    if not alone or request.groups is None:
        return []
    return [
        f"Cases without a patient in `{request.groups}`: {len(alone)} of {len(patients)}, such as {alone[0]}. Each "
        "counts as a patient of its own: if it is not, name it there as cases.csv does, or the intervals are too "
        "narrow."
    ]


def own_patient(case: str) -> str:
    """The patient of a case that is named nowhere: its own."""
    return f"case {case}"


def label_names(dataset: Description) -> dict[str, str]:
    """Names of label values in dataset.json, in either layout.

    Decathlon maps values to names; nnU-Net maps names to values, or to lists of them, which are regions.
    """
    labels = dataset.content.get("labels")
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
    known = {} if request.regions else label_names(description_of(request))
    return {name: f"{name} ({known[name]})" if known.get(name, name) != name else name for name in names}


def with_dataset_labels(request: Request) -> Request:
    """The request with what the dataset.json of the references says of labels, where the options say nothing.

    That is the value to ignore and, if neither labels nor regions are named, the regions.

    Raises:
        RequestError: a region of the file holds the value that `--ignore` names.
    """
    dataset = description_of(request)
    try:
        scheme = read_label_scheme(dataset.content, dataset.path)
    except ValueError:  # an extra, as the rest of the file
        return request
    named = {*request.labels, *(value for values in request.regions.values() for value in values)}
    ignore = scheme.ignore if request.ignore is None and scheme.ignore not in named else request.ignore
    regions = request.regions if named else scheme.regions
    within = next((name for name, values in regions.items() if ignore in values), None)
    if within is not None:
        message = (
            f"Expected `--ignore` to differ from the labels of the regions in `{dataset.path}`, but got {ignore}, a "
            f"label of {within}: drop `--ignore`, or name what is scored with `--labels` or `--regions`."
        )
        raise RequestError(message)
    return replace(request, ignore=ignore, regions=regions)


def dataset_values(request: Request) -> set[int]:
    """The label values that the dataset.json of the references names, without the background and what is ignored."""
    dataset = description_of(request)
    try:
        return set(read_label_scheme(dataset.content, dataset.path).labels) - {0}
    except ValueError:  # an extra, as the rest of the file
        return set()


def dataset_notes(request: Request) -> list[str]:
    """Notes on what the dataset.json of the references says and could not be used: the scores may then be of others."""
    dataset = description_of(request)
    problem = dataset.problem or _label_problem(dataset)
    if problem and not request.references.is_absolute():  # as the user wrote it
        problem = problem.replace(f"{Path.cwd()}{os.sep}", "")
    return [problem] if problem else []


def _label_problem(dataset: Description) -> str:
    """A sentence about labels that the file describes and that cannot be used; "" if there are none."""
    if "labels" not in dataset.content:
        return ""
    try:
        scheme = read_label_scheme(dataset.content, dataset.path)
        for name, classes in dataset.labelled.items():
            read_labelled(classes, scheme, name)
    except ValueError as error:
        return f"What `{dataset.path}` says of labels was left out. {error}"
    return ""


def without_unlabelled(
    records: Mapping[str, dict[str, Any]], pairs: Sequence[Pair], request: Request, structures: Sequence[Structure]
) -> dict[str, dict[str, Any]]:
    """The records without the scores of structures with classes that dataset.json says were not annotated.

    What is predicted of such a class in such a case is neither right nor wrong.
    """
    lacking = _lacking(description_of(request), pairs, structures)
    return {
        case: record
        if case not in lacking
        else {
            **record,
            "not_annotated": sorted(lacking[case]),
            **{key: [row for row in record[key] if row["label"] not in lacking[case]] for key in ("rows", "lesions")},
        }
        for case, record in records.items()
    }


def _lacking(dataset: Description, pairs: Sequence[Pair], structures: Sequence[Structure]) -> dict[str, set[str]]:
    """Name of a case -> names of the structures that are not known in it."""
    named = dataset.labelled
    try:
        scheme = read_label_scheme(dataset.content, dataset.path) if named else None
        read = {name: read_labelled(classes, scheme, name) for name, classes in named.items()} if scheme else {}
    except ValueError:  # an extra, as the rest of the file
        return {}
    classes = () if scheme is None else scheme.classes
    found = {pair.case: next((read[n] for n in dataset.names_of(pair) if n in read), None) for pair in pairs if read}
    return {
        case: {structure.name for structure in structures if not _is_known(structure.values, labelled, classes)}
        for case, labelled in found.items()
        if labelled is not None
    }


def _is_known(values: Sequence[int], labelled: Sequence[int], classes: Sequence[tuple[str, tuple[int, ...]]]) -> bool:
    """Whether the voxels of a structure are known in a case of which only some classes were annotated.

    Values that the same annotated classes hold cannot be told from each other, and those that none holds cannot be told
    from the background.

    Args:
        values: of the structure.
        labelled: numbers of the annotated classes, from 1.
        classes: name and values of every class.

    >>> classes = (("liver", (1,)), ("tumour", (2,)))
    >>> [_is_known(values, (1,), classes) for values in ((1,), (2,), (1, 2))]
    [True, False, False]
    >>> regions = (("whole", (1, 2)), ("core", (2,)))
    >>> [_is_known(values, (1,), regions) for values in ((1, 2), (2,), (1,))]
    [True, False, False]
    """
    held = {number: set(of_class) for number, (_, of_class) in enumerate(classes, start=1)}
    annotated = [held[number] for number in labelled if number in held]
    chosen = set(values) & set().union(*held.values())
    if chosen in held.values() and chosen not in annotated:
        return False
    alike: dict[tuple[bool, ...], set[int]] = {}
    for value in set().union(*held.values()):
        alike.setdefault(tuple(value in of_class for of_class in annotated), set()).add(value)
    return all(any(owners) and part <= chosen for owners, part in alike.items() if part & chosen)


def _from_file(pairs: Sequence[Pair], file: Path) -> dict[str, str]:
    cases = [pair.case for pair in pairs]
    try:
        if file.suffix.lower() != ".json":
            rows = read_csv(file)
            columns = {name for row in rows for name in row}  # a row may be short
            if not {"case", "patient"} <= columns:
                raise _unusable(file, enumerated("column", sorted(columns)) if columns else "no row")
            return _by_name(cases, ((row.get("case", ""), row.get("patient", "")) for row in rows), file)
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, RequestError):
            raise
        raise _unusable(file, " ".join(str(error).split()), text_remedy(error, "correct it")) from error
    whole = content if isinstance(content, dict) and "patient_groups" in content else {}
    content = whole.get("patient_groups", content)
    if not isinstance(content, dict):
        raise _unusable(file, type(content).__name__)
    if all(isinstance(value, (str, int)) for value in content.values()):
        return _by_name(cases, ((case, str(patient)) for case, patient in content.items()), file)
    named = _by_parts(pairs, content, Description(file, whole))
    if not named:
        raise _strange(cases, [part for parts in content.values() for part in parts], file)
    return named


def _by_name(cases: Sequence[str], rows: Iterable[tuple[str, str]], source: Path) -> dict[str, str]:
    """The patients of the cases from rows that name both.

    A case may be named with the extension of its file, and with escapes for bytes that are no text, as in cases.csv.
    """
    known = {composed(case): case for case in cases}
    patients: dict[str, str] = {}
    strange: list[str] = []
    for written, patient in ((composed(case.strip()), patient.strip()) for case, patient in rows):
        names = (name for each in (written, restored(written)) for name in (each, name_of_file(each)))
        case = next((known[name] for name in names if name in known), "")
        if not case:
            strange += [written] if written else []
        elif patient and patients.setdefault(case, patient) != patient:
            message = (
                f"Expected every case to be of one patient, but `{source}` gives `{case}` to {patients[case]} and "
                f"{patient}: remove one row."
            )
            raise RequestError(message)
    if not patients:  # each case would count as a patient of its own, as without the file
        raise _strange(cases, strange, source)
    return patients


def _by_parts(pairs: Sequence[Pair], groups: Mapping[str, Any], dataset: Description) -> dict[str, str]:
    """The patient who has a part of a name or path of a case, by the rule of a training."""
    for patient, parts in groups.items():
        if not isinstance(parts, (list, tuple)) or not all(isinstance(part, str) and part for part in parts):
            raise _unusable(dataset.path, f"{parts!r} for {patient}")
    found = {pair.case: dataset.patient_of(pair, groups) for pair in pairs}
    return {case: patient for case, patient in found.items() if patient is not None}


def _strange(cases: Sequence[str], named: Sequence[str], source: Path) -> RequestError:
    return RequestError(
        f"Expected `{source}` to name cases that are evaluated, such as {cases[0]}, but got "
        f"{', '.join(named[:SHOWN]) or 'none'}: name the cases as cases.csv does, each with its patient."
    )


def _unusable(file: Path, content: str, remedy: str = "correct it") -> RequestError:
    return RequestError(
        f"Expected `{file}` to be a CSV with the columns case and patient, or JSON that maps patients to lists of "
        f"cases, but got {content}: {remedy}."
    )
