"""Names of cases: those of their files, with folders where these make the difference."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from monai_iou.datasets.cases import Case, DatasetError
from monai_iou.volumes.names import case_name, composed

__all__ = ["CHANNEL", "check_names", "each_channel", "is_first_channel", "name_and_number", "names_of", "names_root"]

CHANNEL = re.compile(r"(.+)_(\d{4})")  # nnU-Net's names of the files of one image


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


def name_and_number(path: Path) -> tuple[str, str]:
    """Return the name of a file without a number such as 0000 at its end, and that number, "" if there is none."""
    name = case_name(path)
    match = CHANNEL.fullmatch(name)
    return (name, "") if match is None else (match[1], match[2])


def is_first_channel(files: Sequence[Path]) -> bool:
    """Return whether the 0000 of an image's first file counts channels, as a file of it without this number shows.

    With a folder for each channel, it counts cases.

    Example:
        >>> is_first_channel([Path("c_0000.nii.gz"), Path("c_0001.nii.gz")])
        True
        >>> is_first_channel([Path("CT/c_0000.nii.gz"), Path("PET/c_0000.nii.gz")])
        False
    """
    first, *others = (name_and_number(file)[1] for file in files)
    return first == "0000" and any(number != first for number in others)


def each_channel(number: int) -> str:
    """Return what stands for all channels of an image in a message."""
    return "the only channel" if number == 1 else f"each of {number} channels"


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
