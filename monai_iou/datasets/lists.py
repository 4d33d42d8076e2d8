"""Datasets whose `dataset.json` lists its cases: the Decathlon's layout and its variants."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from monai_iou.datasets.cases import Case, DatasetError
from monai_iou.datasets.description import channels_key, read_labelled
from monai_iou.datasets.naming import check_names, each_channel, is_first_channel, names_of
from monai_iou.datasets.patients import check_groups
from monai_iou.datasets.scheme import LabelScheme
from monai_iou.volumes.names import EXTENSIONS, case_name, composed, find_spelling

FIRST = "_0000"  # of the first channel's file

__all__ = ["case_names", "check_labelled_names", "read_groups", "read_images", "read_labelled_map", "read_pairs"]


def read_pairs(
    content: Mapping[str, Any], key: str, root: Path, channels: int, scheme: LabelScheme, *, required: bool
) -> tuple[Case, ...]:
    """Read a list of pairs of image and label.

    An image may be a list of files, one per channel, and a label one of several raters' files. The key `labelled` of an
    entry names the classes that were annotated.

    Args:
        content: of dataset.json.
        key: of the list.
        root: the dataset's folder.
        channels: number of the images' channels.
        scheme: of the labels.
        required: whether the list must be there.

    Raises:
        DatasetError: it is not such a list, or a file is missing, leaves the folder or has an unknown extension.
    """
    entries = content.get(key)
    if entries is None and not required:
        return ()
    if not isinstance(entries, list):
        message = (
            f"Expected `{key}` in {root / 'dataset.json'} to be a list of pairs, but got {entries!r:.200}: add it."
        )
        raise DatasetError(message)
    images, labels, labelled, named = [], [], [], []
    for entry in entries:
        if not isinstance(entry, dict) or "image" not in entry or "label" not in entry:
            message = (
                f"Expected every entry of `{key}` in {root / 'dataset.json'} to have an image and a label, "
                f"but got {entry!r:.200}: add what is missing or remove the entry."
            )
            raise DatasetError(message)
        named.append(entry["image"])
        images.append(_images(root, entry["image"], f"the image in `{key}`", channels, channels_key(content)))
        listed = _shown(entry["image"][0] if isinstance(entry["image"], list) else entry["image"])
        labels.append(_labels(root, entry["label"], f"the label of {listed}"))
        where = f"{listed} in {root / 'dataset.json'}"
        labelled.append(read_labelled(entry.get("labelled"), scheme, where))
    names = case_names(images, named)
    return read_labelled_map(content, _cases(names, images, labels, labelled, key, root), scheme, root)


def read_images(content: Mapping[str, Any], root: Path, channels: int) -> tuple[Case, ...]:
    """Read the list `test`, of paths or of objects with an image; errors as `read_pairs`."""
    entries = content.get("test") or []
    if not isinstance(entries, list):
        value = f"{entries!r:.200}"
        message = f"Expected `test` in {root / 'dataset.json'} to be a list of images, but got {value}: correct it."
        raise DatasetError(message)
    named = [entry.get("image") if isinstance(entry, dict) else entry for entry in entries]
    images = [_images(root, each, "the image in `test`", channels, channels_key(content)) for each in named]
    return _cases(case_names(images, named), images, [()] * len(images), [None] * len(images), "test", root)


def read_groups(content: Mapping[str, Any], path: Path, cases: Sequence[Case]) -> dict[str, list[str]]:
    """Read `patient_groups`: patient -> parts of names or paths, see `group_of`.

    Args:
        content: of dataset.json.
        path: of it.
        cases: of all lists.

    Raises:
        DatasetError: it is something else, or a part of it claims no case, see `check_groups`.
    """
    groups = content.get("patient_groups") or {}
    lists = list(groups.values()) if isinstance(groups, dict) else [None]
    if not all(isinstance(parts, list) and all(isinstance(part, str) and part for part in parts) for parts in lists):
        message = (
            f"Expected `patient_groups` in {path} to name substrings of file names for each patient, as "
            f'{{"P1": ["P1_"]}}, but got {groups!r:.200}: correct or remove it.'
        )
        raise DatasetError(message)
    check_groups(groups, cases, path)
    return dict(groups)


def read_labelled_map(
    content: Mapping[str, Any], cases: Sequence[Case], scheme: LabelScheme, root: Path
) -> tuple[Case, ...]:
    """Read the key `labelled` of the whole dataset, name of a case -> classes, and give it to the cases.

    Raises:
        DatasetError: it is something else, or names a class that there is not.
    """
    labelled = content.get("labelled", {})
    if not isinstance(labelled, dict):
        expected = f'`labelled` in {root / "dataset.json"} to map names of cases to classes, as {{"c1": ["liver"]}}'
        message = f"Expected {expected}, but got {labelled!r:.200}: correct it."
        raise DatasetError(message)
    labelled = {composed(name): classes for name, classes in labelled.items()}
    where = f"in {root / 'dataset.json'}"
    return tuple(
        replace(case, labelled=read_labelled(labelled[case.name], scheme, f"{case.name} {where}"))
        if case.name in labelled
        else case
        for case in cases
    )


def check_labelled_names(content: Mapping[str, Any], cases: Iterable[Case], path: Path) -> None:
    """Raise DatasetError if the key `labelled` of the whole dataset names a case that there is not."""
    named = content.get("labelled")
    known = {case.name for case in cases}
    unknown = next((name for name in named if composed(name) not in known), None) if isinstance(named, dict) else None
    if unknown is not None:
        message = f"Expected `labelled` in {path} to name cases with labels, but got {unknown}: correct the name."
        raise DatasetError(message)


def _cases(
    names: Sequence[str],
    images: Sequence[tuple[Path, ...]],
    labels: Sequence[tuple[Path, ...]],
    labelled: Sequence[tuple[int, ...] | None],
    key: str,
    root: Path,
) -> tuple[Case, ...]:
    cases = tuple(
        Case(name, files[0], next(iter(maps), None), files[1:], maps[1:], classes, root)
        for name, files, maps, classes in zip(names, images, labels, labelled, strict=True)
    )
    check_names(cases, f"`{key}` of {root / 'dataset.json'}")
    return cases


def _labels(root: Path, named: object, what: str) -> tuple[Path, ...]:
    """The label file, or those of several raters."""
    if not isinstance(named, list):
        return (_inside(root, named, what),)
    if not named:
        message = (
            f"Expected {what} in {root / 'dataset.json'} to be a file or a list of files, but got an empty list: name "
            "at least one."
        )
        raise DatasetError(message)
    return tuple(_inside(root, each, what) for each in named)


def case_names(images: Sequence[Sequence[Path]], named: Sequence[object] | None = None) -> list[str]:
    """Return the names of cases; `c_0000`, with a `c_0001` in the same image or listed as c, is the case c.

    Args:
        images: the files of each case.
        named: what dataset.json calls them; their paths, if it is not given.

    >>> one, two = [Path("c_0000.nii.gz")], [Path("d_0000.nii.gz"), Path("d_0001.nii.gz")]
    >>> case_names([one, two]), case_names([one], ["./imagesTr/c.nii.gz"])
    (['c_0000', 'd'], ['c'])
    >>> case_names([[Path("CT/e_0000.nii.gz"), Path("PET/e_0000.nii.gz")]])
    ['e_0000']
    """
    names = names_of([files[0] for files in images])
    listed = [None] * len(images) if named is None else named
    return [
        name.removesuffix(FIRST) if is_first_channel(files) or _is_listed_without(files[0], word) else name
        for name, files, word in zip(names, images, listed, strict=True)
    ]


def _is_listed_without(file: Path, word: object) -> bool:
    """Whether dataset.json leaves the number of a file out."""
    return isinstance(word, str) and case_name(file) == f"{case_name(Path(word))}{FIRST}"


def _images(root: Path, named: object, what: str, channels: int, key: str) -> tuple[Path, ...]:
    """The files of an image; `key` names the channels in dataset.json."""
    if not isinstance(named, list):
        if isinstance(named, str) and find_spelling(root / named) is None:
            numbered = _numbered_files(root, named, f"{what} of {root / 'dataset.json'}", channels, key)
            return tuple(_inside(root, name, what) for name in numbered or [named])
        return (_inside(root, named, what),)
    if len(named) not in (1, channels):
        several = f" or one for {each_channel(channels)}" if channels > 1 else ""
        remedy = f"name every channel in `{key}`, or remove some of the files"
        if len(named) < channels:
            remedy = f"list a file for every channel, or correct `{key}`"
        message = (
            f"Expected {what} of {root / 'dataset.json'} to be one file{several}, but got {len(named)} files, "
            f"{named!r:.200}: {remedy}."
        )
        raise DatasetError(message)
    return tuple(_inside(root, each, what) for each in named)


def _numbered_files(root: Path, named: str, where: str, channels: int, key: str) -> list[str]:
    """The files of nnU-Net's raw data for a name of dataset.json, which leaves their `_0000` out; [] without any.

    Raises:
        DatasetError: there are fewer or more of them than channels.
    """
    extension = next((end for end in EXTENSIONS if named.lower().endswith(end)), "")
    stem = named[: len(named) - len(extension)]
    *numbered, further = [f"{stem}_{channel:04d}{named[len(stem) :]}" for channel in range(channels + 1)]
    missing = [name for name in numbered if find_spelling(root / name) is None]
    if len(missing) == channels:
        return []
    if missing:
        message = (
            f"Expected {where} to have a file for {each_channel(channels)} of {_shown(named)}, but "
            f"{_shown(missing[0])} is not there: add it, or correct `{key}`."
        )
        raise DatasetError(message)
    last = find_spelling(root / numbered[-1]) or root / numbered[-1]
    # Beside it, and so in the spelling of its name: to look for another one takes as long as the folder is large.
    ending = f"_{channels - 1:04d}{named[len(stem) :]}"
    beside = last.with_name(f"{last.name[: -len(ending)]}_{channels:04d}{named[len(stem) :]}")
    if os.path.lexists(beside):
        message = (
            f"Expected {where} to have one file for {each_channel(channels)} of {_shown(named)}, but "
            f"{_shown(further)} is there too: name its channel in `{key}`, or move the file."
        )
        raise DatasetError(message)
    return numbered


def _shown(text: object) -> str:
    """A name for a message; a line break would tear the sentence."""
    return str(text) if str(text).isprintable() else repr(str(text))


def _inside(root: Path, relative: object, what: str) -> Path:
    """Return the file that dataset.json names, refusing paths that leave the folder: the file may be from anywhere."""
    # Links are not followed: a folder may link to volumes on another disk, only the written path must stay inside.
    if not isinstance(relative, str) or "\0" in relative:
        expected = f"{what} of {root / 'dataset.json'} to be a path"
        message = f"Expected {expected}, but got {relative!r:.200}: write the file's path."
        raise DatasetError(message)
    path = Path(os.path.normpath(root / relative))
    if not path.is_relative_to(root):
        message = (
            f"Expected {what} of {root / 'dataset.json'} to lie inside the folder, but got {relative!r}: "
            "copy or link the file into the folder and name it relative to dataset.json."
        )
        raise DatasetError(message)
    shown = _shown(path)
    if not path.name.lower().endswith(EXTENSIONS):
        message = f"Expected {what} to be a NIfTI, MetaImage, NRRD or PNG file, but got {shown}: convert it to NIfTI."
        raise DatasetError(message)
    existing = find_spelling(path)
    if existing is None or not existing.is_file():
        state = "there is no such file" if existing is None or not existing.exists() else "it is no file"
        message = f"Expected {what} at {shown}, but {state}: add it or remove the entry from dataset.json."
        raise DatasetError(message)
    return existing
