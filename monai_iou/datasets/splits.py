"""Which cases train and which validate: the same way every time, the cases of one patient on one side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from monai_iou.datasets.cases import Case
from monai_iou.datasets.patients import patient_of

__all__ = ["check_folds", "count_patients", "fold_cases", "split_cases"]


def split_cases(
    cases: Sequence[Case], fraction: float, seed: int = 0, patient_groups: Mapping[str, Sequence[str]] | None = None
) -> tuple[list[Case], list[Case]]:
    """Split cases into training and validation, reproducibly, with all cases of a patient on the same side.

    Args:
        cases: the cases.
        fraction: fraction of the cases to validate on, in [0, 1); at least one patient if it is not 0.
        seed: seed of the split.
        patient_groups: patient -> parts of file names, see `group_of`.

    Returns:
        (training, validation) in the order of `cases`. If there is only one patient, its cases are used for both.

    Raises:
        ValueError: `fraction` is not in [0, 1).

    Example:
        >>> from pathlib import Path
        >>> cases = [Case(f"p{i}_{visit}", Path(f"p{i}_{visit}.nii.gz")) for i in range(5) for visit in "ab"]
        >>> training, validation = split_cases(cases, 0.2, patient_groups={f"p{i}": [f"p{i}_"] for i in range(5)})
        >>> len(training), len({case.name[:2] for case in validation})
        (8, 1)
    """
    if not 0 <= fraction < 1:
        message = f"Expected `val_fraction` to be in [0, 1), but got {fraction}: give for instance 0.1 for a tenth."
        raise ValueError(message)
    patients = _by_patient(cases, patient_groups)
    if fraction == 0:
        return list(cases), []
    if len(patients) < 2:
        return list(cases), list(cases)
    order = sorted(patients)
    np.random.default_rng(seed).shuffle(order)
    held_out: set[Case] = set()
    for patient in order[:-1]:  # the last patient always stays in training
        held_out.update(patients[patient])
        if len(held_out) >= fraction * len(cases):
            break
    return _sides(cases, held_out)


def fold_cases(
    cases: Sequence[Case],
    folds: int,
    fold: int,
    seed: int = 0,
    patient_groups: Mapping[str, Sequence[str]] | None = None,
) -> tuple[list[Case], list[Case]]:
    """Split cases for one fold of a cross-validation: over all folds every case is validated exactly once.

    The patients are assigned in a random order, those with the most cases first, each to the fold with the fewest
    cases. The folds therefore differ by at most the number of cases of the largest patient.

    Args:
        cases: the cases.
        folds: number of folds, from 2 to the number of patients.
        fold: the fold to validate on, counted from 0.
        seed: seed of the folds.
        patient_groups: patient -> parts of file names, see `group_of`.

    Returns:
        (training, validation) in the order of `cases`.

    Raises:
        ValueError: `folds` or `fold` is out of its range.

    Example:
        >>> from pathlib import Path
        >>> cases = [Case(f"c{i}", Path(f"c{i}.nii.gz")) for i in range(7)]
        >>> [len(fold_cases(cases, 3, fold)[1]) for fold in range(3)]
        [3, 2, 2]
    """
    patients = _by_patient(cases, patient_groups)
    check_folds(folds, fold, len(patients))
    order = sorted(patients)
    np.random.default_rng(seed).shuffle(order)
    order.sort(key=lambda patient: -len(patients[patient]))
    parts: list[set[Case]] = [set() for _ in range(folds)]
    for patient in order:
        min(parts, key=len).update(patients[patient])
    return _sides(cases, parts[fold])


def check_folds(folds: Any, fold: Any, patients: int) -> None:
    """Check the numbers of a cross-validation.

    Raises:
        ValueError: `folds` is not an integer from 2 to the number of patients, or `fold` is not one from 0 to folds -
            1; or `folds` is None, and `fold` is not 0.
    """
    if folds is None:
        if fold:
            message = f"Expected `folds` to be given with `fold` {fold}, but it is not: add it, or leave `fold` out."
            raise ValueError(message)
        return
    if isinstance(folds, bool) or not isinstance(folds, (int, np.integer)) or folds < 2:
        message = f"Expected `folds` to be an integer of at least 2, but got {folds!r}: give 2 or more, usually 5."
        raise ValueError(message)
    if folds > patients:
        remedy = f"take {patients} or fewer" if patients > 1 else "one patient cannot be cross-validated"
        message = (
            f"Expected `folds` to be at most {patients}, the number of patients to divide into folds, but got {folds}: "
            f"{remedy}."
        )
        raise ValueError(message)
    if isinstance(fold, bool) or not isinstance(fold, (int, np.integer)) or not 0 <= fold < folds:
        message = (
            f"Expected `fold` to be an integer from 0 to {folds - 1}, as `folds` is {folds}, but got {fold!r}: count "
            "folds from 0."
        )
        raise ValueError(message)


def count_patients(cases: Sequence[Case], patient_groups: Mapping[str, Sequence[str]] | None = None) -> int:
    """Return the number of patients; a case that belongs to no group is a patient of its own."""
    return len(_by_patient(cases, patient_groups))


def _by_patient(cases: Sequence[Case], groups: Mapping[str, Sequence[str]] | None) -> dict[str, list[Case]]:
    patients: dict[str, list[Case]] = {}
    for case in cases:
        patients.setdefault(patient_of(case, groups or {}), []).append(case)
    return patients


def _sides(cases: Sequence[Case], held_out: set[Case]) -> tuple[list[Case], list[Case]]:
    return [case for case in cases if case not in held_out], [case for case in cases if case in held_out]
