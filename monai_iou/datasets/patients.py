"""Which patient a case is of, by `patient_groups` of dataset.json, and that no patient is parted unnoticed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from monai_iou.datasets.cases import Case, DatasetError
from monai_iou.volumes.names import EXTENSIONS, case_name, composed, volumes_below

__all__ = ["check_groups", "check_sides", "group_of", "paths_in", "patient_of"]

Groups = Mapping[str, Sequence[str]]


def patient_of(case: Case, groups: Groups) -> str:
    """Return the patient of a case: its group, or itself where no group claims it."""
    patient = _group_of_case(case, groups)
    return f"case {case.name}" if patient is None else f"group {patient}"


def group_of(name: str, groups: Groups, paths: Sequence[str] = ()) -> str | None:
    """Return the patient to whom a case belongs: the first with a part of its name or path, None if nobody has one.

    Args:
        name: of the case.
        groups: patient -> parts. A part that begins or ends with a number matches this whole number only.
        paths: of the case's files, see `paths_in`. A part with a folder or an extension is looked for in them as well,
            but not from within a word. A part that is the name of a folder claims the files in it.

    Example:
        >>> group_of("P14_a", {"P1": ["P1"], "P14": ["P14"]}), group_of("P2_a", {"P1": ["P1"]})
        ('P14', None)
        >>> group_of("P2_a", {"P2": ["images/P2_"]}, ["images/P2_a.nii.gz"]), group_of("a", {"P": ["P3"]}, ["P3/a.nii"])
        ('P2', 'P')
        >>> group_of("rescan", {"A": ["scan.nii"], "B": ["rescan.nii"]}, ["images/rescan.nii"])
        'B'
    """
    everywhere = "\n".join((composed(name), *paths))  # looked through first, as most parts are in none of these
    for patient, parts in groups.items():
        if any(_read(part)[0] in everywhere and _claims(part, name, paths) for part in parts):
            return patient
    return None


def paths_in(root: Path, files: Iterable[Path]) -> tuple[str, ...]:
    """Return the paths of files as a dataset.json in `root` may write them: also without the `_0000` of a channel.

    Example:
        >>> paths_in(Path("d"), [Path("d/images/a_0000.nii.gz")])
        ('images/a_0000.nii.gz', 'images/a.nii.gz')
    """
    base = composed(str(root))
    written = [os.path.relpath(composed(str(file)), base).replace(os.sep, "/") for file in files]
    return tuple(dict.fromkeys([*written, *(re.sub(r"_0000(?=\.[^/]*$)", "", path) for path in written)]))


def check_groups(groups: Groups, cases: Sequence[Case], path: Path) -> None:
    """Check that every part of `patient_groups` claims a case, as a misspelt one would part a patient's cases.

    A part is no mistake where no harm can come of it, because every labelled case has a patient, or where it claims a
    volume of the folder that is in no list.

    Args:
        groups: patient -> parts.
        cases: of all lists.
        path: of dataset.json.

    Raises:
        DatasetError: a part claims none; the message names it and its patient.
    """
    alone = next((case for case in cases if case.label is not None and _group_of_case(case, groups) is None), None)
    if alone is None:
        return
    known = [(case.name, _paths(case)) for case in cases]
    idle = _idle([(patient, part) for patient, parts in groups.items() for part in parts], known)
    if idle and (idle := _idle(idle, _unlisted(path.parent, known))):
        patient, part = idle[0]
        message = (
            f"Expected every part in `patient_groups` of {path} to be in the name or path of a case, but got {part!r} "
            f"of {patient}, which is in none, while {alone.name} has no patient: correct the part, in "
            "which capital letters count, or remove it if the dataset has no such case."
        )
        raise DatasetError(message)


def check_sides(training: Sequence[Case], validation: Sequence[Case], groups: Groups, where: str) -> None:
    """Check that sides which the user has chosen keep the cases of every patient together.

    Args:
        training: the cases on one side.
        validation: those on the other.
        groups: patient -> parts.
        where: what chose the sides, for the error.

    Raises:
        DatasetError: a patient has cases on both sides; the message names two of them.
    """
    trained = {_group_of_case(case, groups): case for case in reversed(training)}
    for case in validation if groups else ():
        patient = _group_of_case(case, groups)
        if patient is not None and patient in trained:
            message = (
                f"Expected {where} to keep the cases of a patient on one side, but {patient} has "
                f"{trained[patient].name} in training and {case.name} in validation: put both on one side there or, "
                f"if you do want to split this patient, take {patient} out of `patient_groups` in dataset.json."
            )
            raise DatasetError(message)


def _group_of_case(case: Case, groups: Groups) -> str | None:
    return group_of(case.name, groups, _paths(case)) if groups else None


def _paths(case: Case) -> tuple[str, ...]:
    return () if case.root is None else paths_in(case.root, (*case.images, *case.labels))


def _idle(parts: Sequence[tuple[str, str]], known: Sequence[tuple[str, Sequence[str]]]) -> list[tuple[str, str]]:
    """The parts, with their patients, that claim none of the names and paths."""
    return [(patient, part) for patient, part in parts if not any(_claims(part, *each) for each in known)]


def _unlisted(root: Path, known: Sequence[tuple[str, Sequence[str]]]) -> list[tuple[str, tuple[str, ...]]]:
    """The volumes below a folder that belong to none of the cases: those that the user has left out."""
    listed = {path for _, paths in known for path in paths}
    found = [(case_name(file), paths_in(root, [file])) for file in volumes_below(root)]
    return [(name, paths) for name, paths in found if paths[0] not in listed]


def _claims(part: str, name: str, paths: Sequence[str]) -> bool:
    part, is_path = _read(part)
    if is_path:
        return any(_occurs(part, text, whole_words=True) for text in (composed(name), *paths))
    return _occurs(part, composed(name)) or any(part in path.split("/")[:-1] for path in paths)


@lru_cache(maxsize=65536)  # each is compared with every case
def _read(part: str) -> tuple[str, bool]:
    """A part as paths are written, and whether it has a folder or an extension."""
    part = composed(part).removeprefix("./")
    return part, "/" in part or part.lower().endswith(EXTENSIONS)


def _occurs(part: str, text: str, *, whole_words: bool = False) -> bool:
    if not part or part not in text:
        return False
    # A number ends where its digits end, so that "P1" does not claim "P14". Nor does "scan.nii" claim "rescan.nii".
    before = r"(?<!\d)" if part[:1].isdigit() else ""
    before = r"(?<![^\W_])" if whole_words and part[:1].isalnum() else before
    after = r"(?!\d)" if part[-1:].isdigit() else ""
    return re.search(before + re.escape(part) + after, text) is not None
