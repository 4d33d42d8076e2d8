"""The dataset.json that describes the references of an evaluation, and the names by which it knows their cases."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from monai_iou.datasets.description import description_places
from monai_iou.datasets.lists import case_names
from monai_iou.datasets.naming import names_of
from monai_iou.datasets.patients import group_of, paths_in
from monai_iou.evaluation.pairing import Pair
from monai_iou.evaluation.request import Request
from monai_iou.volumes.header import is_dangling
from monai_iou.volumes.names import case_name, composed, volumes_below

__all__ = ["Description", "description_of"]

LISTS = ("training", "validation", "test_labelled")


@dataclass(frozen=True)
class Description:
    """A dataset.json, as far as it can be read.

    Attributes:
        path: of the file.
        content: {} if there is no such file.
        problem: a sentence about a file that is there and cannot be read; "" if there is none.
    """

    path: Path
    content: Mapping[str, Any]
    problem: str = ""

    def names_of(self, pair: Pair) -> tuple[str, ...]:
        """The names by which the file may know a case, the surest first.

        A training calls a case by its image. An evaluation calls it by its reference, or as the table of pairs does.
        """
        listed = None if pair.reference is None else self._names_of_files.get(_place(pair.reference))
        names = (listed, pair.case, self._names_of_labels.get(pair.case))
        return tuple(dict.fromkeys(composed(name) for name in names if name is not None))

    def patient_of(self, pair: Pair, groups: Mapping[str, Sequence[str]]) -> str | None:
        """The patient to whom one of the names of a case belongs, by the rule of a training; None if nobody."""
        paths = self._paths_of(pair)
        return next(filter(None, (group_of(name, groups, paths) for name in self.names_of(pair))), None)

    def _paths_of(self, pair: Pair) -> tuple[str, ...]:
        """The paths by which the file may know a case; its own name with the extensions of its files, without any."""
        files = [file for file in (pair.reference, pair.prediction) if file is not None]
        own = [pair.case + composed(file.name)[len(case_name(file)) :] for file in files]
        known = self._files_of_names
        listed = next((known[name] for name in self.names_of(pair) if name in known), [])
        return (*paths_in(self.path.parent, listed), *own)

    @property
    def labelled(self) -> dict[str, Any]:
        """Name of a case -> the classes that were annotated in it, as they are written."""
        whole = self.content.get("labelled")
        own = {name: classes for name, _, _, classes in self._entries if classes is not None}
        every = {**own, **(whole if isinstance(whole, dict) else {})}  # in this order for a training as well
        return {composed(name): classes for name, classes in every.items()}

    @cached_property
    def _entries(self) -> list[tuple[str, list[Path], list[Path], Any]]:
        """The name, the images, the label files and the annotated classes of each case that is listed."""
        root, found = self.path.parent, []
        for key in LISTS:
            listed = self.content.get(key)
            entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
            files = [(_files(root, entry.get("image")), _files(root, entry.get("label"))) for entry in entries]
            whole = [i for i, (images, labels) in enumerate(files) if images and labels]
            names = case_names([files[i][0] for i in whole])
            found += [(name, *files[i], entries[i].get("labelled")) for name, i in zip(names, whole, strict=True)]
        return found

    @cached_property
    def _names_of_files(self) -> dict[str, str]:
        listed = {_place(file): name for name, _, labels, _ in self._entries for file in labels}
        return {**{_place(file): name for name, files in self._nnunet.items() for file in files}, **listed}

    @cached_property
    def _nnunet(self) -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = {}
        for name, files in _nnunet_files(self.path.parent, self.content):
            found.setdefault(name, []).extend(files)  # a name may stand for a case of both parts
        return found

    @cached_property
    def _names_of_labels(self) -> dict[str, str]:
        """The same by the labels' names, for references that are copies of the labels."""
        labels = names_of([labels[0] for _, _, labels, _ in self._entries])
        return {label: name for label, (name, *_) in zip(labels, self._entries, strict=True)}

    @cached_property
    def _files_of_names(self) -> dict[str, list[Path]]:
        """The files of each case by its name, those of nnU-Net's folders too."""
        listed = {name: [*images, *labels] for name, images, labels, _ in self._entries}
        return {**self._nnunet, **listed}


def description_of(request: Request) -> Description:
    """Read the dataset.json of a request; it is an extra, so that a damaged one is as good as none, and is noted.

    With `instances`, the files hold lesion numbers, which nothing that it says of labels is about.
    """
    references = request.references.parent if request.references.is_file() else request.references
    named = None if request.dataset is None else [request.dataset.absolute() / "dataset.json"]
    places = named or description_places(references)
    problem, of_labels = "", ("labels", "labelled") if request.instances else ()
    for path in places:
        try:
            content = json.loads(path.read_bytes())  # in each encoding in which a training reads it
        except (OSError, ValueError, RecursionError) as error:
            is_none = isinstance(error, (FileNotFoundError, NotADirectoryError)) and not is_dangling(path)
            problem = problem if is_none else problem or _left_out(path, " ".join(str(error).split()))
            continue
        if isinstance(content, dict):
            known = {key: value for key, value in content.items() if key not in of_labels}
            return Description(path, known, problem)
        problem = problem or _left_out(path, f"it holds no object but a {type(content).__name__}")
    return Description(places[0], {}, problem)


def _left_out(path: Path, reason: str) -> str:
    return (
        f"`{path}` cannot be read ({reason}): what it may say of regions, an ignored value, patients and names of "
        "labels was left out."
    )


def _nnunet_files(root: Path, content: Mapping[str, Any]) -> Iterator[tuple[str, list[Path]]]:
    """The name and the files of each case of nnU-Net's raw data, which lists none."""
    channels = content.get("channel_names")
    if "training" in content or not isinstance(channels, dict):
        return
    for part in ("Tr", "Ts"):
        for label in volumes_below(root / f"labels{part}", deep=False):
            name, file = case_name(label), composed(label.name)
            files = [f"{name}_{channel:04d}{file[len(name) :]}" for channel in range(len(channels))]
            yield name, [*(root / f"images{part}" / image for image in files), label]


def _files(root: Path, named: object) -> list[Path]:
    every = named if isinstance(named, list) else [named]
    return [root / name for name in every if isinstance(name, str)]


def _place(file: Path) -> str:
    """A file by the folder that it lies in, whatever links lead to the folder; a link to the file itself is kept."""
    return composed(str(file.parent.resolve() / file.name))
