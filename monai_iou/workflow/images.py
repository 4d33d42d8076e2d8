"""Images that a command names one by one, instead of a dataset: files, folders, channels in files of their own."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai_iou.datasets.cases import Case, DatasetError
from monai_iou.datasets.naming import CHANNEL, check_names, is_first_channel, name_and_number, names_of
from monai_iou.volumes.names import (
    RESULTS,
    case_name,
    composed,
    find_spelling,
    is_png,
    is_volume,
    results_among,
    visible_entries,
    volumes_below,
    with_name,
)
from monai_iou.volumes.reading import VolumeError, channel_count

__all__ = ["find_images", "image_cases"]


def image_cases(images: object) -> list[Case]:
    """Read the bundle's key `images`.

    Args:
        images: a list with, for each image, its file, the list of the files of its channels, or a dictionary with
            `case` (its name) and `image` (one of these). A single path stands for a list of one.

    Raises:
        DatasetError: it is something else, a file is missing, or two images have one name.

    Example:
        >>> image_cases("no/such.nii.gz")
        Traceback (most recent call last):
            ...
        monai_iou.datasets.cases.DatasetError: Expected `images` to name images, but there is no no/such.nii.gz: ...
    """
    entries = [_entry(item) for item in _as_list(images)]
    missing = next((path for _, paths in entries for path in paths if not path.exists()), None)
    if missing is not None:
        message = f"Expected `images` to name images, but there is no {missing}: check the path."
        raise DatasetError(message)
    names = names_of(_case_paths([paths for _, paths in entries]))
    cases = [
        Case(given or name, first, None, tuple(others))
        for name, (given, (first, *others)) in zip(names, entries, strict=True)
    ]
    check_names(cases, "`images`")
    return cases


def find_images(paths: Sequence[Path], channels: int) -> list[Case]:
    """Find the images that a command line names.

    Args:
        paths: files, folders of images, and folders of the slices of a DICOM series. The files of the channels of one
            image are called `NAME_0000`, `NAME_0001`, ...; one of them stands for all that lie beside it. A file of
            several channels is an image of its own, whatever it is called. Of a folder,
            `NAME_mask` and `NAME_probabilities` beside NAME are results, and no images.
        channels: of the model.

    Returns:
        A case for each image, without its label, named so that no two have one name.

    Raises:
        DatasetError: a path is not there, a folder holds no image, a channel's file is missing, an image has files of
            more channels than the model, or a file that is named has the name of a result for another one.
    """
    images = [path for given in paths for path in _volumes(given)]
    for result in sorted(results_among(images)):  # `scans/*` names them as well
        message = (
            f"Expected images, but got {result}, which has the name of a result for another image of this command: "
            "leave it out, or name it in a command of its own."
        )
        raise DatasetError(message)
    groups = list(dict.fromkeys(tuple(_channel_files(path, channels)) for path in images))
    _check_all_used([files for files in groups if len(files) > 1])
    names = names_of(_case_paths(groups))
    cases = [Case(name, first, None, tuple(others)) for name, (first, *others) in zip(names, groups, strict=True)]
    check_names(cases, "the images")
    return cases


def _volumes(path: Path) -> list[Path]:
    if not path.exists():
        message = f"Expected an image or a folder of images, but there is no {path}: check the path."
        raise DatasetError(message)
    image = with_name(path)
    if path.is_dir() and not is_volume(image):
        volumes = list(volumes_below(path, deep=False, without=RESULTS))
        if not volumes:
            message = (
                f"Expected {path} to hold images (NIfTI, MetaImage, NRRD, PNG or DICOM series), but it has none: name "
                "a folder that holds some."
            )
            raise DatasetError(message)
        return volumes
    return [image]


def _channel_files(path: Path, channels: int) -> list[Path]:
    """The files of the image to which a file belongs: itself, or with its siblings."""
    match = CHANNEL.fullmatch(case_name(path))
    if channels == 1 or match is None or path.is_dir() or _has_channels(path):
        return [path]
    wanted = [path.with_name(f"{match[1]}_{number:04d}{_ending(path)}") for number in range(channels)]
    files = [find_spelling(file) or file for file in wanted]
    missing = next((file for file in files if not file.exists()), None)
    if missing is not None and is_png(path) and match[2] == "0000":
        return [path]  # meant to be of colours
    if missing is not None:
        message = (
            f"Expected a file for each of the {channels} channels that the model was trained on beside {path}, but "
            f"there is no {missing.name}: add it, or name an image that holds them all."
        )
        raise DatasetError(message)
    return files


def _check_all_used(groups: Sequence[tuple[Path, ...]]) -> None:
    """Raise DatasetError for the file of a further channel: the mask would be made without it.

    For a model of one channel there is no group: there, `case_0001` is as often the number of a case.
    """
    known = {(files[0].parent, CHANNEL.sub(r"\1", case_name(files[0])), _ending(files[0])): files for files in groups}
    entries = [entry for folder in dict.fromkeys(folder for folder, *_ in known) for entry in visible_entries(folder)]
    for entry in entries:
        match = CHANNEL.fullmatch(case_name(entry))
        files = known.get((entry.parent, match[1], _ending(entry)), ()) if match is not None else ()
        is_next = match is not None and int(match[2]) == len(files)  # others may number something else
        if files and is_next and entry not in files and not _has_channels(entry):
            message = (
                f"Expected {entry.parent} to have one file for each of the {len(files)} channels that the model was "
                f"trained on, but {entry.name} is there too: move it, or name a model that was trained on all of them."
            )
            raise DatasetError(message)


def _ending(path: Path) -> str:
    return composed(path.name)[len(case_name(path)) :]


def _has_channels(path: Path) -> bool:
    """Whether a file holds several channels, and so an image of its own, whatever its name and its neighbours."""
    try:
        return channel_count(path) > 1
    except VolumeError:  # a damaged file is named when all images are read
        return False


def _case_paths(groups: Sequence[Sequence[Path]]) -> list[Path]:
    """The paths that name the cases: of the first file of each, without the number of its channel.

    The number of a single file belongs to its name if files of other numbers lie beside it: it counts cases then. So
    does that of several files if it is the same for all of them, as with a folder for each channel.
    """
    single = {files[0].parent for files in groups if len(files) == 1 and name_and_number(files[0])[1] == "0000"}
    entries = [(folder, *name_and_number(entry)) for folder in single for entry in visible_entries(folder)]
    counted = {(folder, stem) for folder, stem, number in entries if number not in ("", "0000")}

    def is_channel(files: Sequence[Path], stem: str, number: str) -> bool:
        if len(files) > 1:
            return is_first_channel(files)
        return number == "0000" and (files[0].parent, stem) not in counted

    return [
        files[0].with_name(f"{stem}.nii.gz") if is_channel(files, stem, number) else files[0]
        for files, (stem, number) in ((files, name_and_number(files[0])) for files in groups)
    ]


def _as_list(images: object) -> list[Any]:
    if isinstance(images, str) and images.startswith("["):  # a list that the command line could not read
        try:
            images = ast.literal_eval(images)
        except (ValueError, SyntaxError):
            images = []
    if isinstance(images, str):
        images = [images]
    if not isinstance(images, (list, tuple)) or not images:
        message = f"Expected `images` to be a list of paths, but got {images!r}: write \"['a.nii.gz','b.nii.gz']\"."
        raise DatasetError(message)
    return list(images)


def _entry(item: object) -> tuple[str | None, list[Path]]:
    name, files = (item.get("case"), item.get("image")) if isinstance(item, Mapping) else (None, item)
    files = [files] if isinstance(files, str) else files
    usable = isinstance(files, (list, tuple)) and files and all(isinstance(file, str) and file for file in files)
    if not usable or not isinstance(name, (str, type(None))):
        message = (
            f"Expected each of `images` to be a path or a list of the paths of its channels, but got {item!r}: correct "
            "it."
        )
        raise DatasetError(message)
    if name is not None and (Path(name).anchor or ".." in Path(name).parts):
        message = (
            f"Expected `case` of `images` to name a file below `output_dir`, but got {name!r}: remove what leads to "
            "another folder."
        )
        raise DatasetError(message)
    return name, [with_name(Path(file)) for file in files]  # type: ignore[union-attr]
