"""Names of cases: those of their files, with folders where these make the difference."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from monai_iou.datasets.cases import Case, DatasetError
from monai_iou.volumes.names import case_name, composed

__all__ = ["check_names", "names_of", "names_root"]


def names_root(images: Sequence[Path]) -> Path | None:
    """Return the folder that the images' names count from, None if their file names alone tell them apart.

    In `p1/image.nii.gz` and `p2/image.nii.gz` the folders make the difference: cases and masks are then called
    `p1/image` and `p2/image`.

    Example:
        >>> names_root([Path("d/p1/image.nii.gz"), Path("d/p2/image.nii.gz")]) == Path("d").absolute()
        True
        >>> names_root([Path("d/p1/a.nii.gz"), Path("d/p2/b.nii.gz")]) is None
        True
    """
    if len({case_name(image) for image in images}) == len(images):
        return None
    return Path(os.path.commonpath([_absolute(image.parent) for image in images]))


def names_of(images: Sequence[Path]) -> list[str]:
    """Return the name of each image's case."""
    root = names_root(images)
    if root is None:
        return [case_name(image) for image in images]
    return [composed((_absolute(image.parent).relative_to(root) / case_name(image)).as_posix()) for image in images]


def _absolute(path: Path) -> Path:
    """A path however it was written, from the file system's root and without `..`; links are kept."""
    return Path(os.path.abspath(path))  # noqa: PTH100 - `resolve` follows links


def check_names(cases: Iterable[Case], where: str) -> None:
    """Check that no two cases have one name: they would count as one patient, and share the file of their masks.

    Args:
        cases: the cases.
        where: for the error, the list or folder that they come from.

    Raises:
        DatasetError: two of them have; the message names both files.
    """
    known: dict[str, Case] = {}
    for case in cases:
        other = known.setdefault(case.name, case)
        if other is case:
            continue
        if _absolute(other.image) == _absolute(case.image):
            message = f"Expected {where} to list each image once, but {case.image} comes twice: remove one entry."
        else:
            message = (
                f"Expected the images in {where} to have names of their own, but {other.image} and {case.image} are "
                f"both called {case.name}: rename one of the files."
            )
        raise DatasetError(message)
