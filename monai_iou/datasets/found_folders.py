"""Datasets whose cases are what lies in their folders: nnU-Net v2's raw data, and a plain pair of folders."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai_iou.datasets.cases import Case, DatasetError, values_of
from monai_iou.datasets.description import MOST_CLASSES, read_description
from monai_iou.datasets.naming import each_channel
from monai_iou.datasets.scheme import LabelScheme
from monai_iou.volumes.header import is_dangling
from monai_iou.volumes.names import (
    PNG_EXTENSION,
    PREVIEW,
    RESULTS,
    case_name,
    composed,
    find_spelling,
    is_folder,
    visible_entries,
    volumes_below,
)
from monai_iou.volumes.reading import VolumeError, channel_count, read_labels

__all__ = [
    "SPLITS",
    "find_pair",
    "held_out_twice",
    "read_found_cases",
    "read_plain_cases",
    "read_plain_scheme",
    "read_splits",
]

PAIRS = (("imagesTr", "labelsTr"), ("images", "labels"), ("image", "label"), ("images", "masks"), ("imgs", "masks"))
SPLITS = "splits_final.json"
PICTURES = (".tif", ".tiff", ".jpg", ".jpeg", ".jp2", ".bmp")
# What is no volume by its name, but may be meant as one.
UNREAD = (*PICTURES, ".mgz", ".mgh", ".mnc", ".gipl", ".gipl.gz", ".npy", ".npz", ".dcm")


def read_found_cases(content: Mapping[str, Any], root: Path, part: str, channels: int) -> tuple[Case, ...]:
    """Find the cases of nnU-Net's `imagesTr` and `labelsTr`, or of `Ts`.

    Args:
        content: of dataset.json; `file_ending` says which files count.
        root: the dataset's folder.
        part: "Tr", or "Ts", whose labels may be missing.
        channels: number of channels; each case has the files `CASE_0000` and on.

    Raises:
        DatasetError: `file_ending` is that of pictures, a channel's file or a training label is missing, or a volume
            of the folders belongs to no case.
    """
    ending = str(content.get("file_ending", ".nii.gz"))
    folder, labels = root / f"images{part}", root / f"labels{part}"
    files = {entry.name: entry for entry in visible_entries(folder)}
    if files and ending.lower().endswith(PICTURES):
        _check_all_used((), folder, labels, ending, channels)  # where the volumes are right and `file_ending` is wrong
        message = (
            f"Expected `file_ending` in {root / 'dataset.json'} to be that of a format that states the spacing in mm, "
            f"but got {ending}: convert the files to .nii.gz, and correct `file_ending`."
        )
        raise DatasetError(message)
    if is_dangling(labels):
        message = f"Expected labels in {labels}, but the link leads nowhere: fetch what it stands for, or remove it."
        raise DatasetError(message)
    pattern = _image_pattern(ending)
    cases = []
    for name in dict.fromkeys(match[1] for file in files if (match := pattern.fullmatch(file))):
        first, *others = _channel_files(files, name, ending, channels)
        label = find_spelling(labels / f"{name}{ending}")
        if (part == "Tr" and (label is None or not label.is_file())) or (label is not None and is_dangling(label)):
            place = label or labels / f"{name}{ending}"
            message = f"Expected the label of {name} at {place}, but there is no such file: add it or move the image."
            raise DatasetError(message)
        label = label if label and label.is_file() else None
        cases.append(Case(composed(name), first, label, tuple(others), root=root))
    _check_all_used(cases, folder, labels, ending, channels)
    return tuple(cases)


def _image_pattern(ending: str) -> re.Pattern[str]:
    return re.compile(rf"(.+)_\d{{4}}{re.escape(ending)}")


def _channel_files(files: Mapping[str, Path], name: str, ending: str, channels: int) -> list[Path]:
    wanted = [f"{name}_{channel:04d}{ending}" for channel in range(channels)]
    if ending == PNG_EXTENSION and wanted[0] in files and wanted[-1] not in files:
        wanted = wanted[:1]  # colours in one file
    missing = next((file for file in wanted if file not in files), None)
    if missing is not None:
        message = (
            f"Expected {next(iter(files.values())).parent} to have a file for {each_channel(channels)} of {name}, "
            f"but {missing} is not there: add it, or correct `channel_names` in dataset.json."
        )
        raise DatasetError(message)
    return [files[file] for file in wanted]


def _check_all_used(cases: Sequence[Case], images: Path, labels: Path, ending: str, channels: int) -> None:
    """Raise DatasetError for a volume of the two folders that no case has: nobody leaves one out by its name."""
    used = {composed(str(path)) for case in cases for path in (*case.images, *case.labels)}
    found = [*volumes_below(images, deep=False, without=RESULTS), *volumes_below(labels, deep=False)]
    lost = next((path for path in found if composed(str(path)) not in used), None)
    if lost is None:
        return
    number = "_0000" if lost.parent == images else ""
    if not (_image_pattern(ending).fullmatch(lost.name) if number else lost.name.endswith(ending)):
        message = (
            f"Expected {lost} to be called CASE{number}{ending}, as `file_ending` in dataset.json says, but it is not: "
            "correct `file_ending`, or rename or move the file."
        )
    elif number:
        message = (
            f"Expected {images} to have one file for {each_channel(channels)} of a case, but {lost.name} is there "
            "too: name its channel in `channel_names` in dataset.json, or move the file."
        )
    else:
        name = lost.name.removesuffix(ending)
        message = f"Expected an image for {lost} at {images / name}_0000{ending}, but there is none: add or move one."
    raise DatasetError(message)


def find_pair(root: Path) -> tuple[Path, Path] | None:
    """Return the folders of images and of labels of a dataset without dataset.json, None if there are none."""
    pairs = ((root / images, root / labels) for images, labels in PAIRS)
    return next((pair for pair in pairs if pair[0].is_dir() and pair[1].is_dir()), None)


def read_plain_cases(images: Path, labels: Path) -> tuple[Case, ...]:
    """Pair images and labels by their names; `c_0000` pairs with c too.

    Raises:
        DatasetError: there is no pair, an image has no label, a label no image, two of one folder have the same name,
            or one of a pair is not read, because of its format or because it lies in a subfolder.
    """
    masks = _by_name(volumes_below(labels, deep=False), lambda name: name)
    named = set(masks)
    scans = volumes_below(images, deep=False, without=RESULTS)
    found = _by_name(scans, lambda name: name if name in masks else name.removesuffix("_0000"))
    passed_over = _passed_over(images, found.values()), _passed_over(labels, masks.values())
    _check_none_lost((found, masks), passed_over)
    cases = []
    for name, path in found.items():
        if name not in masks:
            _check_is_no_channel(name, path, named)
            message = f"Expected a label for {path} in {labels}, but there is none called {name}: add or rename it."
            raise DatasetError(message)
        cases.append(Case(name, path, masks.pop(name)))
    if masks:
        label = next(iter(masks.values()))
        message = f"Expected an image for {label} in {images}, but there is none of its name: add or rename it."
        raise DatasetError(message)
    if not cases:
        others = [entry for named in passed_over for entry in named.values()]
        message = f"Expected {images} to hold images with labels, but it has none: add at least one pair."
        raise _not_read(others[0]) if others else DatasetError(message)
    return tuple(cases)


def _passed_over(folder: Path, volumes: Iterable[Path]) -> dict[str, Path]:
    """What a folder has besides its volumes, but somebody may take for one: other formats and subfolders, by name."""
    named: dict[str, Path] = {}
    read = set(volumes)
    own = {case_name(path) for path in read}
    for entry in visible_entries(folder):
        ending = next((end for end in (*UNREAD, PNG_EXTENSION) if entry.name.lower().endswith(end)), "")
        if entry not in read and (ending or is_folder(entry)):
            name = composed(entry.name[: len(entry.name) - len(ending)])
            stem, _, kind = name.rpartition("_")
            if name in own or (kind in (*RESULTS, PREVIEW) and {stem, f"{stem}_0000"} & own):
                continue  # a picture of what is read, or a result for it
            for each in (name, name.removesuffix("_0000")):
                named.setdefault(each, entry)
    return named


def _check_none_lost(volumes: Sequence[Mapping[str, Path]], passed_over: Sequence[Mapping[str, Path]]) -> None:
    """Raise DatasetError if a pair of image and label is there that is not read; of one side alone it may be a note."""
    sides = list(zip(volumes, passed_over, strict=True))
    images, labels = (read.keys() | others.keys() for read, others in sides)
    for name in sorted((images & labels) - (volumes[0].keys() & volumes[1].keys())):
        for entry in (others[name] for read, others in sides if name not in read):
            if not is_folder(entry) or next(volumes_below(entry), None) is not None:
                raise _not_read(entry)


def _not_read(entry: Path) -> DatasetError:
    if is_folder(entry):
        message = (
            f"Expected {entry.parent} to hold the volumes themselves, but got the folder {entry.name}: move its files "
            "up, an image and its label under one name, write a dataset.json that lists them, as docs/bundle.md shows, "
            "or move the folder elsewhere if they are not meant."
        )
    else:
        message = (
            f"Expected {entry} to be a NIfTI, MetaImage or NRRD file, or a PNG where all files of its folder are, but "
            "it is not: convert it to .nii.gz or, if all are pictures, to .png, or move it elsewhere."
        )
    return DatasetError(message)


def _check_is_no_channel(name: str, path: Path, labels: Collection[str]) -> None:
    """Raise DatasetError for `c_0001` where the label is called c: such a name is that of another channel."""
    match = _image_pattern("").fullmatch(name)
    if match and match[1] in labels:
        message = (
            f"Expected one image for the label {match[1]}, as the folder has no dataset.json, but got {path} too, "
            "which has the name of a further channel: write a dataset.json that lists the channels, as docs/bundle.md "
            "shows, or move the file."
        )
        raise DatasetError(message)


def _by_name(files: Iterable[Path], rename: Callable[[str], str]) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for path in files:
        other = named.setdefault(rename(case_name(path)), path)
        if other is not path:
            message = f"Expected one file per case, but got {other} and {path}: keep one of them."
            raise DatasetError(message)
    return named


def read_plain_scheme(cases: tuple[Case, ...], labels: Path) -> tuple[tuple[str, ...], LabelScheme]:
    """Find what dataset.json would say: the number of channels from a header, the values from all label files.

    Raises:
        DatasetError: a label cannot be read, or they hold no value but 0, or so many that they are images.
    """
    values = {0}
    try:
        for case in cases:
            values.update(values_of(read_labels(case.label or case.image).array))
        channels = channel_count(cases[0].image)
    except VolumeError as error:
        raise DatasetError(str(error)) from error
    if not 1 < len(values) <= MOST_CLASSES or min(values) < 0:
        value_range = f"{len(values)} values from {min(values)} to {max(values)}" if len(values) > 1 else "only 0"
        message = (
            f"Expected {labels} to hold label maps with 0 and at least one more value, but got {value_range}: "
            "correct the labels, or name their values in a dataset.json."
        )
        raise DatasetError(message)
    names = tuple(f"channel {channel}" for channel in range(channels)) if channels > 1 else ("image",)
    return names, LabelScheme({value: "background" if value == 0 else str(value) for value in sorted(values)})


def read_splits(root: Path, names: set[str]) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]:
    """Read nnU-Net's splits_final.json: for each fold the names of its training and of its validation cases.

    Raises:
        DatasetError: it is not such a file, or names a case that the dataset has not.
    """
    path = root / SPLITS
    if not os.path.lexists(path):
        return ()
    content = read_description(path, list)
    folds = []
    for fold in content:
        sides = [fold.get(side) if isinstance(fold, dict) else None for side in ("train", "val")]
        if not all(isinstance(side, list) and all(isinstance(name, str) for name in side) for side in sides):
            message = f'Expected {path} to hold folds with "train" and "val", but got {fold!r:.200}: correct it.'
            raise DatasetError(message)
        training, validation = (tuple(composed(name) for name in side or ()) for side in sides)
        unknown = next((name for name in (*training, *validation) if name not in names), None)
        both = next((name for name in training if name in validation), None)
        if unknown is not None or both is not None:
            problem = f"{unknown}, which is none" if both is None else f"{both} on both sides"
            message = f"Expected {path} to name cases of {root}, each on one side, but got {problem}: correct it."
            raise DatasetError(message)
        folds.append((training, validation))
    return tuple(folds)


def held_out_twice(folds: Sequence[Iterable[str]]) -> tuple[str, int, int] | None:
    """Return the first case that two folds hold out, and the numbers of these folds; None if there is none.

    Args:
        folds: for each fold the names of the cases that it holds out.

    Example:
        >>> held_out_twice([["a", "b"], ["c"], ["d", "b"]])
        ('b', 0, 2)
    """
    known: dict[str, int] = {}
    for fold, names in enumerate(folds):
        for name in names:
            if known.setdefault(name, fold) != fold:
                return name, known[name], fold
    return None
