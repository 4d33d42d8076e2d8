"""Decathlon-layout folders: read `dataset.json`, check every file before training starts, split by patient.

A folder in this layout holds `dataset.json` with `training` (pairs of image and label), `modality` and `labels`, and
optionally `test` (images), `test_labelled` (pairs) and `patient_groups` (patient -> fragments of file names). Images
are NIfTI, 3D, or 4D with the channels last.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from monai_iou.datasets.cases import Case, CaseFacts, DatasetError, check_case
from monai_iou.volumes.names import case_name

__all__ = ["SegmentationFolder", "case_name", "check_names", "map_cases", "names_root", "read_folder"]


NIFTI_SUFFIXES = (".nii", ".nii.gz")

T = TypeVar("T")


@dataclass(frozen=True)
class SegmentationFolder:
    """A Decathlon-layout folder, read but with its volumes not yet opened.

    Attributes:
        root: the folder.
        modalities: one name a channel, in channel order.
        labels: label value -> name, 0 first (the background).
        training, evaluation: labelled cases (`training` and `test_labelled` of dataset.json).
        test: images to segment (`test`, else those of `test_labelled`).
        patient_groups: patient -> fragments of file names that belong to this patient.
    """

    root: Path
    modalities: tuple[str, ...]
    labels: dict[int, str]
    training: tuple[Case, ...]
    evaluation: tuple[Case, ...]
    test: tuple[Case, ...]
    patient_groups: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @cached_property
    def training_facts(self) -> tuple[CaseFacts, ...]:
        """Open and check every training case, once.

        Raises:
            DatasetError: at the first file, in the order of dataset.json, that cannot be trained on.
        """
        self.need_training()
        facts = self.check(self.training)
        self.need_foreground(facts)
        return facts

    def need_training(self) -> None:
        """Raise DatasetError if `training` is empty."""
        if not self.training:
            message = (
                f"Expected `training` in {self.root / 'dataset.json'} to list images with labels, "
                "but it is empty: add at least one pair."
            )
            raise DatasetError(message)

    def need_foreground(self, facts: Sequence[CaseFacts]) -> None:
        """Raise DatasetError if no training case has a foreground voxel."""
        if not any(case.foreground.shape[1] for case in facts):
            message = (
                f"Expected the labels of `training` in {self.root / 'dataset.json'} to have foreground, but all "
                f"{len(facts)} are empty: add cases with voxels of {', '.join(list(self.labels.values())[1:])}."
            )
            raise DatasetError(message)

    def check(self, cases: Sequence[Case]) -> tuple[CaseFacts, ...]:
        """Open and check `cases` in parallel; raise DatasetError for the first bad one in their order."""
        return tuple(map_cases(lambda case: check_case(case, tuple(self.labels), self.modalities), cases))


def read_folder(dataset_dir: str | os.PathLike[str]) -> SegmentationFolder:
    """Read `dataset.json` of a Decathlon-layout folder and check that every file it names is there.

    Raises:
        DatasetError: dataset.json is missing, is not JSON, lacks a key, or names a file that is missing, leaves the
            folder or is not NIfTI.
    """
    root = Path(dataset_dir).resolve()
    path = root / "dataset.json"
    if not path.is_file():
        message = f"Expected {path} to exist, but it does not: set `dataset_dir` to a folder in the Decathlon layout."
        raise DatasetError(message)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        message = f"Expected {path} to be JSON, but it cannot be read ({error}): correct the file."
        raise DatasetError(message) from error
    if not isinstance(content, dict):
        message = f"Expected {path} to hold a JSON object, but got {type(content).__name__}: see docs/bundle.md."
        raise DatasetError(message)
    evaluation = _read_pairs(content, "test_labelled", root, required=False)
    return SegmentationFolder(
        root=root,
        modalities=_read_modalities(content, path),
        labels=_read_labels(content, path),
        training=_read_pairs(content, "training", root, required=True),
        evaluation=evaluation,
        test=_read_images(content, root) or evaluation,
        patient_groups=_read_groups(content, path),
    )


def _read_modalities(content: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    found = content.get("modality", content.get("channel_names"))
    channels = sorted(found, key=lambda key: (len(key), key)) if isinstance(found, dict) else []
    if not channels or channels != [str(channel) for channel in range(len(channels))]:
        message = (
            f'Expected `modality` in {path} to name the channels by number, as {{"0": "CT"}}, but got {found!r}: '
            "correct it."
        )
        raise DatasetError(message)
    return tuple(str(found[key]) for key in channels)


def _read_labels(content: Mapping[str, Any], path: Path) -> dict[int, str]:
    found = content.get("labels")
    try:
        labels = {int(value): str(name) for value, name in found.items()}  # type: ignore[union-attr]
    except (AttributeError, ValueError):
        labels = {}
    if len(labels) < 2 or 0 not in labels or min(labels) < 0:
        message = (
            f"Expected `labels` in {path} to name the background 0 and at least one more value, as "
            f'{{"0": "background", "1": "lesion"}}, but got {found!r}: correct it.'
        )
        raise DatasetError(message)
    return dict(sorted(labels.items()))


def _read_groups(content: Mapping[str, Any], path: Path) -> dict[str, list[str]]:
    found = content.get("patient_groups") or {}
    lists = list(found.values()) if isinstance(found, dict) else [None]
    if not all(isinstance(parts, list) and all(isinstance(part, str) and part for part in parts) for parts in lists):
        message = (
            f'Expected `patient_groups` in {path} to name parts of file names for each patient, as {{"P1": ["P1_"]}}, '
            f"but got {found!r}: correct or remove it."
        )
        raise DatasetError(message)
    return dict(found)


def _read_pairs(content: Mapping[str, Any], key: str, root: Path, *, required: bool) -> tuple[Case, ...]:
    entries = content.get(key)
    if entries is None and not required:
        return ()
    if not isinstance(entries, list):
        message = f"Expected `{key}` in {root / 'dataset.json'} to be a list of pairs, but got {entries!r}: add it."
        raise DatasetError(message)
    pairs = []
    for entry in entries:
        if not isinstance(entry, dict) or "image" not in entry or "label" not in entry:
            message = (
                f"Expected every entry of `{key}` in {root / 'dataset.json'} to have an image and a label, "
                f"but got {entry!r}: add what is missing or remove the entry."
            )
            raise DatasetError(message)
        image = _inside(root, entry["image"], f"the image in `{key}`")
        pairs.append((image, _inside(root, entry["label"], f"the label of {image.name}")))
    names = _names([image for image, _ in pairs])
    cases = tuple(Case(name, *pair) for name, pair in zip(names, pairs, strict=True))
    check_names(cases, f"`{key}` of {root / 'dataset.json'}")
    return cases


def _read_images(content: Mapping[str, Any], root: Path) -> tuple[Case, ...]:
    entries = content.get("test") or []
    if not isinstance(entries, list):
        message = f"Expected `test` in {root / 'dataset.json'} to be a list of images, but got {entries!r}: correct it."
        raise DatasetError(message)
    paths = [entry.get("image") if isinstance(entry, dict) else entry for entry in entries]
    images = [_inside(root, path, "the image in `test`") for path in paths]
    cases = tuple(Case(name, image) for name, image in zip(_names(images), images, strict=True))
    check_names(cases, f"`test` of {root / 'dataset.json'}")
    return cases


def names_root(images: Sequence[Path]) -> Path | None:
    """Return the folder that the images' names count from, None if their file names alone tell them apart.

    In `p1/image.nii.gz` and `p2/image.nii.gz` the folders make the difference: cases and masks are then called
    `p1/image` and `p2/image`.

    Example:
        >>> str(names_root([Path("d/p1/image.nii.gz"), Path("d/p2/image.nii.gz")]))
        'd'
        >>> names_root([Path("d/p1/a.nii.gz"), Path("d/p2/b.nii.gz")]) is None
        True
    """
    if len({case_name(image) for image in images}) == len(images):
        return None
    return Path(os.path.commonpath([image.parent for image in images]))


def _names(images: Sequence[Path]) -> list[str]:
    root = names_root(images)
    if root is None:
        return [case_name(image) for image in images]
    return [(image.parent.relative_to(root) / case_name(image)).as_posix() for image in images]


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
        if other.image == case.image:
            message = f"Expected {where} to list each image once, but {case.image} comes twice: remove one entry."
        else:
            message = (
                f"Expected the images in {where} to have names of their own, but {other.image} and {case.image} are "
                f"both called {case.name}: rename one of the files."
            )
        raise DatasetError(message)


def _inside(root: Path, relative: object, what: str) -> Path:
    """Return the file that dataset.json names, refusing paths that leave the folder: the file may be from anywhere."""
    # Links are not followed: a folder may link to volumes on another disk, only the written path must stay inside.
    if not isinstance(relative, str):
        message = (
            f"Expected {what} of {root / 'dataset.json'} to be a path, but got {relative!r}: write the file's path."
        )
        raise DatasetError(message)
    path = Path(os.path.normpath(root / relative))
    if not path.is_relative_to(root):
        message = (
            f"Expected {what} of {root / 'dataset.json'} to lie inside the folder, but got {relative!r}: "
            "copy or link the file into the folder and name it relative to dataset.json."
        )
        raise DatasetError(message)
    if not path.name.endswith(NIFTI_SUFFIXES):
        message = f"Expected {what} to be .nii or .nii.gz, but got {path}: convert it to NIfTI."
        raise DatasetError(message)
    if not path.is_file():
        message = f"Expected {what} at {path}, but there is no such file: add it or remove the entry from dataset.json."
        raise DatasetError(message)
    return path


def map_cases(function: Callable[[Case], T], cases: Iterable[Case]) -> list[T]:
    """Return the function of each case, in order; the first failure in this order is raised and cancels the rest."""
    # Reading is decompression, which releases the interpreter's lock.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        futures = [pool.submit(function, case) for case in cases]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
