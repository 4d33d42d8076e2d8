"""Folders of labelled volumes: read what describes them, check every file before training starts, split by patient.

Three formats are read. The Medical Segmentation Decathlon's: `dataset.json` with `training` (pairs of image and label),
`modality` and `labels`, and optionally `validation` (pairs), `test` (images), `test_labelled` (pairs) and
`patient_groups` (patient -> parts of file names); an image may be a list of files, one per channel. nnU-Net v2's
raw data: `channel_names`, `labels` (name -> value or values), and the files of `imagesTr`, `labelsTr`, `imagesTs`. And
two folders of images and labels without any description.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np

from monai_iou.datasets.case_volumes import SOURCE, check_case, check_trainable
from monai_iou.datasets.cases import Case, CaseFacts, DatasetError, check_voxel_size, log_edges
from monai_iou.datasets.description import channels_key, read_description, read_label_scheme, read_modalities
from monai_iou.datasets.found_folders import (
    SPLITS,
    find_pair,
    read_found_cases,
    read_plain_cases,
    read_plain_scheme,
    read_splits,
)
from monai_iou.datasets.lists import check_labelled_names, read_groups, read_images, read_labelled_map, read_pairs
from monai_iou.datasets.naming import check_names
from monai_iou.datasets.patients import check_sides
from monai_iou.datasets.scheme import LabelScheme
from monai_iou.datasets.splits import check_folds, count_patients, fold_cases, split_cases

__all__ = ["SegmentationFolder", "is_dataset", "map_cases", "read_folder"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class SegmentationFolder:
    """A folder of labelled volumes, read but with its volumes not yet opened.

    Attributes:
        root: the folder.
        modalities: one name per channel, in channel order.
        labels: label value -> name, 0 first (the background).
        training, evaluation: labelled cases (`training` and `test_labelled` of dataset.json).
        test: images to segment (`test`, else those of `test_labelled`).
        patient_groups: patient -> parts of file names that belong to this patient, see `group_of`.
        validation: labelled cases to validate on (`validation`), empty if they are split off `training`.
        splits: names of the training and of the validation cases of each fold (nnU-Net's splits_final.json).
        regions: name -> label values of overlapping classes, empty without any.
        regions_order: the value that each region is written as, later ones over earlier ones.
        ignore: value of voxels that count neither way, None without one.
        soft: whether label files hold shares of the classes instead of values.
        layout: what the folder was taken for.
        listing: what lists the training cases: a key of dataset.json, or a folder.
        source: what names the channels: a key of dataset.json, or the first image.
    """

    root: Path
    modalities: tuple[str, ...]
    labels: dict[int, str]
    training: tuple[Case, ...]
    evaluation: tuple[Case, ...]
    test: tuple[Case, ...]
    patient_groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    validation: tuple[Case, ...] = ()
    splits: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = ()
    regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    regions_order: tuple[int, ...] = ()
    ignore: int | None = None
    soft: bool = False
    layout: str = "Decathlon"
    listing: str = "`training`"
    source: str = SOURCE

    @property
    def scheme(self) -> LabelScheme:
        """What the labels mean."""
        return LabelScheme(self.labels, self.regions, self.regions_order, self.ignore, self.soft)

    @property
    def has_raters(self) -> bool:
        """Whether a case of `training` or `validation` has the labels of several raters."""
        return any(case.raters for case in self.labelled)

    @property
    def is_partly_labelled(self) -> bool:
        """Whether a class was not annotated in some case of `training` or `validation`."""
        return any(case.labelled is not None for case in self.labelled)

    @property
    def labelled(self) -> tuple[Case, ...]:
        """The cases of `training` and `validation`."""
        return (*self.training, *self.validation)

    def split(
        self, fraction: float, seed: int = 0, folds: int | None = None, fold: int = 0
    ) -> tuple[list[Case], list[Case]]:
        """Return the cases to train and to validate on.

        With `folds` that is fold `fold` of splits_final.json, if it has so many, else of a cross-validation of all
        labelled cases. Without, it is the list `validation`, else a part of `training`.

        Args:
            fraction: see `split_cases`; 0 validates on nothing.
            seed: of the split or the folds.
            folds: number of folds, None for one split.
            fold: from 0.

        Raises:
            ValueError: see `split_cases` and `fold_cases`.
            DatasetError: splits_final.json or the list `validation` parts the cases of a patient.
        """
        check_folds(folds, fold, count_patients(self.labelled, self.patient_groups))
        if folds is not None:
            if len(self.splits) != folds:
                return fold_cases(self.labelled, folds, fold, seed, self.patient_groups)
            return self._given_folds()[fold]
        if self.validation and fraction:
            where = f"`training` and `validation` of {self.root / 'dataset.json'}"
            check_sides(self.training, self.validation, self.patient_groups, where)
            return list(self.training), list(self.validation)
        return split_cases(self.labelled, fraction, seed, self.patient_groups)

    def _given_folds(self) -> list[tuple[list[Case], list[Case]]]:
        """The folds of splits_final.json, checked together: the last is not refused when the first is trained."""
        folds = []
        for number, (trained, held_out) in enumerate(self.splits):
            training = [case for case in self.labelled if case.name in trained]
            validation = [case for case in self.labelled if case.name in held_out]
            check_sides(training, validation, self.patient_groups, f"fold {number} of {self.root / SPLITS}")
            folds.append((training, validation))
        return folds

    @cached_property
    def training_facts(self) -> tuple[CaseFacts, ...]:
        """Open and check every labelled case, those of `training` first, once.

        Raises:
            DatasetError: at the first file, in the order of dataset.json, that cannot be trained on.
        """
        self.need_training()
        facts = self.check(self.labelled)
        check_trainable(self.labelled, facts, self.scheme.ignore)
        self.need_foreground(facts[: len(self.training)])
        self.need_like_spacings(self.labelled, facts)
        return facts

    def need_training(self) -> None:
        """Raise DatasetError if there is no training case."""
        if not self.training:
            message = f"Expected {self.listing} to hold images with labels, but it has none: add at least one pair."
            raise DatasetError(message)

    def need_foreground(self, facts: Sequence[CaseFacts]) -> None:
        """Raise DatasetError if no training case has a foreground voxel."""
        if not any(case.foreground.shape[1] for case in facts):
            names = ", ".join(name for name, _ in self.scheme.classes)
            message = (
                f"Expected the labels of {self.listing} to have foreground, but all {len(facts)} are empty: add cases "
                f"with voxels of {names}."
            )
            raise DatasetError(message)

    def need_like_spacings(self, cases: Sequence[Case], facts: Sequence[CaseFacts]) -> None:
        """Raise DatasetError if a case's voxels are 50 times larger or smaller than those of the others."""
        edges = np.array([log_edges(case.shape, case.spacing) for case in facts])
        if len(edges) > 1:
            for index, (case, fact) in enumerate(zip(cases, facts, strict=True)):
                check_voxel_size(case.image, fact, np.delete(edges, index, axis=0), "the other cases")

    def check(self, cases: Sequence[Case]) -> tuple[CaseFacts, ...]:
        """Open and check `cases` in parallel; raise DatasetError for the first bad one in their order."""
        return tuple(map_cases(lambda case: check_case(case, self.scheme, self.modalities, self.source), cases))


def is_dataset(folder: Path) -> bool:
    """Whether a folder is described by a dataset.json, or is a plain pair of folders of images and labels."""
    return os.path.lexists(folder / "dataset.json") or find_pair(folder) is not None


def read_folder(dataset_dir: str | os.PathLike[str]) -> SegmentationFolder:
    """Read what describes a folder and check that every file that it names is there; the log names the format.

    Raises:
        DatasetError: nothing describes it, dataset.json is not JSON, lacks a key, or names a file that is missing,
            leaves the folder or is not a volume.
    """
    root = Path(dataset_dir).resolve()
    path = root / "dataset.json"
    if os.path.lexists(path):  # reading a link whose file is not there fails by its name
        content = read_description(path)
        is_found = "training" not in content and "channel_names" in content
        folder = _read_found(content, root) if is_found else _read_listed(content, root)
    else:
        folder = _read_plain(root)
    logger.info("%s is read as %s.", root, folder.layout)
    return folder


def _read_listed(content: Mapping[str, object], root: Path) -> SegmentationFolder:
    path = root / "dataset.json"
    modalities, scheme = read_modalities(content, path), read_label_scheme(content, path)
    channels = len(modalities)
    training = read_pairs(content, "training", root, channels, scheme, required=True)
    validation = read_pairs(content, "validation", root, channels, scheme, required=False)
    check_names([*training, *validation], f"`training` and `validation` of {path}")
    evaluation = read_pairs(content, "test_labelled", root, channels, scheme, required=False)
    check_labelled_names(content, (*training, *validation, *evaluation), path)
    test = read_images(content, root, channels)
    return SegmentationFolder(
        root=root,
        modalities=modalities,
        labels=scheme.labels,
        training=training,
        evaluation=evaluation,
        test=test or evaluation,
        patient_groups=read_groups(content, path, [*training, *validation, *evaluation, *test]),
        validation=validation,
        splits=read_splits(root, {case.name for case in (*training, *validation)}),
        regions=scheme.regions,
        regions_order=scheme.order,
        ignore=scheme.ignore,
        soft=scheme.soft,
        layout="a folder in the Medical Segmentation Decathlon's layout",
        listing=f"`training` in {path}",
        source=f"`{channels_key(content)}` in dataset.json",
    )


def _read_found(content: Mapping[str, object], root: Path) -> SegmentationFolder:
    path = root / "dataset.json"
    modalities, scheme = read_modalities(content, path), read_label_scheme(content, path)
    training, test = (
        read_labelled_map(content, read_found_cases(content, root, part, len(modalities)), scheme, root)
        for part in ("Tr", "Ts")
    )
    check_labelled_names(content, (*training, *test), path)
    return SegmentationFolder(
        root=root,
        modalities=modalities,
        labels=scheme.labels,
        training=training,
        evaluation=tuple(case for case in test if case.label is not None),
        test=test,
        patient_groups=read_groups(content, path, [*training, *test]),
        splits=read_splits(root, {case.name for case in training}),
        regions=scheme.regions,
        regions_order=scheme.order,
        ignore=scheme.ignore,
        soft=scheme.soft,
        layout="nnU-Net v2's raw data",
        listing=str(root / "imagesTr"),
        source=f"`{channels_key(content)}` in dataset.json",
    )


def _read_plain(root: Path) -> SegmentationFolder:
    pair = find_pair(root)
    if pair is None:
        message = (
            f"Expected {root / 'dataset.json'} to exist, but it does not: write one that lists the files, as "
            "docs/bundle.md shows, or name a folder in the Decathlon's or nnU-Net v2's layout, or one with the folders "
            "images and labels."
        )
        raise DatasetError(message)
    training = read_plain_cases(*pair)
    modalities, scheme = read_plain_scheme(training, pair[1])
    layout = f"a pair of folders, {pair[0].name} and {pair[1].name}, without a description"
    source = f"the first image, {training[0].image.name},"
    return SegmentationFolder(
        root, modalities, scheme.labels, training, (), (), layout=layout, listing=str(pair[0]), source=source
    )


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
