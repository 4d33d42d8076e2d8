"""The dataset.json that describes the references of an evaluation, and the names by which it knows their cases."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from monai_iou.datasets.description import description_places
from monai_iou.datasets.lists import case_names
from monai_iou.datasets.naming import names_of
from monai_iou.evaluation.pairing import Pair
from monai_iou.evaluation.request import Request
from monai_iou.volumes.names import composed

__all__ = ["Description", "description_of"]

LISTS = ("training", "validation", "test_labelled")


@dataclass(frozen=True)
class Description:
    """A dataset.json, as far as it can be read.

    Attributes:
        path: of the file.
        content: {} if there is no such file.
    """

    path: Path
    content: Mapping[str, Any]

    def names_of(self, pair: Pair) -> tuple[str, ...]:
        """The names by which the file may know a case, the surest first.

        A training calls a case by its image. An evaluation calls it by its reference, or as the table of pairs does.
        """
        listed = None if pair.reference is None else self._names_of_files.get(_place(pair.reference))
        names = (listed, pair.case, self._names_of_labels.get(pair.case))
        return tuple(dict.fromkeys(composed(name) for name in names if name is not None))

    @property
    def labelled(self) -> dict[str, Any]:
        """Name of a case -> the classes that were annotated in it, as they are written."""
        whole = self.content.get("labelled")
        own = {name: classes for name, _, classes in self._entries if classes is not None}
        every = {**own, **(whole if isinstance(whole, dict) else {})}  # in this order for a training as well
        return {composed(name): classes for name, classes in every.items()}

    @cached_property
    def _entries(self) -> list[tuple[str, list[Path], Any]]:
        """The name, the label files and the annotated classes of each case that is listed."""
        root, found = self.path.parent, []
        for key in LISTS:
            listed = self.content.get(key)
            entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
            files = [(_files(root, entry.get("image")), _files(root, entry.get("label"))) for entry in entries]
            whole = [i for i, (images, labels) in enumerate(files) if images and labels]
            names = case_names([files[i][0] for i in whole])
            found += [(name, files[i][1], entries[i].get("labelled")) for name, i in zip(names, whole, strict=True)]
        return found

    @cached_property
    def _names_of_files(self) -> dict[str, str]:
        return {_place(file): name for name, labels, _ in self._entries for file in labels}

    @cached_property
    def _names_of_labels(self) -> dict[str, str]:
        """The same by the labels' names, for references that are copies of the labels."""
        labels = names_of([labels[0] for _, labels, _ in self._entries])
        return {label: name for label, (name, _, _) in zip(labels, self._entries, strict=True)}


def description_of(request: Request) -> Description:
    """Read the dataset.json of a request; it is an extra, so that a damaged one is as good as none."""
    references = request.references.parent if request.references.is_file() else request.references
    named = None if request.dataset is None else [request.dataset.absolute() / "dataset.json"]
    places = named or description_places(references)
    for path in places:
        try:
            content = json.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(content, dict):
            return Description(path, content)
    return Description(places[0], {})


def _files(root: Path, named: object) -> list[Path]:
    every = named if isinstance(named, list) else [named]
    return [root / name for name in every if isinstance(name, str)]


def _place(file: Path) -> str:
    """A file by the folder that it lies in, whatever links lead to the folder; a link to the file itself is kept."""
    return composed(str(file.parent.resolve() / file.name))
