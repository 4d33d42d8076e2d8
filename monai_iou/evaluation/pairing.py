"""Which prediction belongs to which reference: by relative name without the extension, or by a CSV."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from monai_iou.evaluation.label_maps import is_image, is_label_map
from monai_iou.evaluation.rendering import restored
from monai_iou.evaluation.request import Request, RequestError
from monai_iou.tables import read_csv, text_remedy
from monai_iou.volumes.header import VolumeError
from monai_iou.volumes.names import (
    MASK,
    PROBABILITIES,
    RESULTS,
    case_name,
    composed,
    dicom_slices,
    find_spelling,
    is_volume,
    volumes_below,
)

# nnU-Net's numbers behind the names of the files of one image, one for each channel.
CHANNEL = re.compile(r"_\d{4}$")


class PairingError(ValueError):
    """The folders or the CSV do not say which files belong together."""


@dataclass(frozen=True)
class Pair:
    """One case: its name and its two files; a missing one is None, and `lost` if a table of pairs names its path."""

    case: str
    prediction: Path | None
    reference: Path | None
    lost: tuple[Path, ...] = ()

    @property
    def problem(self) -> str | None:
        """Why the pair cannot be evaluated, in one sentence; None if it can."""
        if self.prediction is not None and self.reference is not None:
            return None
        paths = " and ".join(f"`{path}`" for path in self.lost)
        none, remedy = (f"none at {paths}", "correct the path in `--pairs`, or ") if self.lost else ("none", "")
        if self.reference is not None:
            what, remedy = f"a prediction for the reference `{self.reference}`", f"{remedy}predict this case"
        elif self.prediction is not None:
            what, remedy = f"a reference for the prediction `{self.prediction}`", f"{remedy}add or remove the case"
        else:
            what, remedy = f"two files for the case `{self.case}`", f"{remedy}remove the case"
        return f"Expected {what}, but got {none}: {remedy}."

    @property
    def is_mask_of_image(self) -> bool:
        """Whether the prediction has the name that `monai-iou predict` gives to a mask beside the image of the case."""
        if self.prediction is None or self.reference is None:
            return False
        return case_name(self.prediction) == f"{Path(self.case).name}_{MASK}"

    @property
    def is_one_file(self) -> bool:
        """Whether the prediction is the reference itself, by whatever link or name."""
        if self.prediction is None or self.reference is None:
            return False
        try:  # a folder of slices may hold links to those of the other
            one, other = (
                next(dicom_slices(path), path) if path.is_dir() else path for path in (self.prediction, self.reference)
            )
            return one.samefile(other)
        except (OSError, VolumeError):
            return False


def pair_folders(predictions: Path, references: Path) -> list[Pair]:
    """Pair the volumes in two folders by their relative names without extensions, sorted by name.

    `a/b.nii.gz` is paired with `a/b.mha`, or with the DICOM folder `a/b`. Where predictions lie beside their images, as
    `monai-iou predict` writes them, `a/b_mask` is that of `a/b`.

    Raises:
        PairingError: a folder is missing or contains no volume, two files in one folder have the same name, or images
            have the names of the predictions.
    """
    predicted, found_references = find_volumes(predictions, "--predictions"), find_volumes(references, "--references")
    predicted = _without_images(predicted, predictions, found_references)
    _check_not_images(predicted, found_references, references)
    names = sorted(predicted.keys() | found_references.keys())
    if not predicted.keys() & found_references.keys():
        message = (
            f"Expected predictions named as the references, but got `{next(iter(predicted))}` in `{predictions}` and "
            f"`{next(iter(found_references))}` in `{references}`: rename them, or pair them in a CSV with `--pairs`."
        )
        raise PairingError(message)
    return [Pair(name, predicted.get(name), found_references.get(name)) for name in names]


def _without_images(predicted: dict[str, Path], folder: Path, references: Mapping[str, Path]) -> dict[str, Path]:
    """The predictions with the masks of `monai-iou predict` under the names of the images that they lie beside.

    What has the name of a reference itself is no such mask, and no channel of an image. Of the first pair is read
    whether the other file is an image at all: masks of a brain may lie beside predictions.

    Raises:
        PairingError: it is a label map.
    """
    if not any(name.endswith(f"_{MASK}") for name in predicted):
        return predicted
    masks = predicted.keys() - find_volumes(folder, "--predictions", RESULTS).keys() - set(references)
    of_images = {name.removesuffix(f"_{MASK}"): predicted[name] for name in masks}
    pair = next((name for name in sorted(of_images) if name in predicted and name in references), None)
    if pair is not None and is_label_map(predicted[pair], of_images[pair], references[pair]):
        message = (
            f"Expected `{folder}` to hold one prediction for `{pair}`, but got the label map `{predicted[pair].name}` "
            f"with `{of_images[pair].name}` beside it: keep one of the two, or name the predictions in a CSV with "
            "`--pairs`."
        )
        raise PairingError(message)
    channels = {name for name in predicted if CHANNEL.sub("", name) in of_images} - set(references)
    return {name: path for name, path in predicted.items() if name not in masks | channels} | of_images


def _check_not_images(predicted: Mapping[str, Path], references: Mapping[str, Path], folder: Path) -> None:
    """Refuse references under the names of predictions that are images, whose label maps lie beside them.

    One is read to find out, from a folder in which at least as many references have no prediction.

    Raises:
        PairingError: it is an image.
    """
    paired = [path for name, path in references.items() if name in predicted]
    alone = [path for name, path in references.items() if name not in predicted]
    of_pairs, others = (Counter(path.parent for path in paths) for paths in (paired, alone))
    path = next((path for path in paired if of_pairs[path.parent] <= others[path.parent]), None)
    if path is not None and is_image(path):
        beside = next(other.name for other in alone if other.parent == path.parent)
        message = (
            f"Expected `{folder}` to hold label maps under the names of the predictions, but got the image `{path}` "
            f"with `{beside}` beside it: pair the predictions with the label maps in a CSV with `--pairs`."
        )
        raise PairingError(message)


def pairing_notes(pairs: Sequence[Pair], request: Request) -> list[str]:
    """Say which masks were found beside images, and that masks were compared with themselves, which no score shows."""
    named = request.predictions if request.pairs is None else None
    if named is not None and named.resolve() == request.references.resolve():
        return [f"--predictions and --references are the same, {named}: each mask was compared with itself."]
    beside = [pair for pair in pairs if named not in (None, pair.prediction) and pair.is_mask_of_image]
    own = [pair.case for pair in pairs if pair.is_one_file]
    return [
        *(
            "Masks beside their images, as `monai-iou predict` writes them, were scored as the predictions of these "
            f"images: {len(beside)} of {len(pairs)}, such as `{pair.prediction}`."
            for pair in beside[:1]
        ),
        *(
            f"Cases whose prediction is the file of the reference itself, or a link to it: {len(own)} of {len(pairs)}, "
            f"such as `{case}`. Each was compared with itself."
            for case in own[:1]
        ),
    ]


def pair_volumes(predictions: Path, references: Path) -> list[Pair]:
    """Pair two files or two folders of DICOM slices, which are one case; no pair if both are folders of volumes.

    Raises:
        RequestError: one is a volume, and the other a folder of volumes; a PairingError if that holds none.
    """
    folders = {"--predictions": predictions, "--references": references}
    alone = [option for option, path in folders.items() if _is_one_volume(path)]
    if len(alone) == 2:
        return [Pair(case_name(_absolute(references)), predictions, references)]
    if alone:
        (other,) = folders.keys() - set(alone)
        find_volumes(folders[other], other)  # is there anything?
        message = (
            f"Expected `--predictions` and `--references` to be two folders or two volumes, but got the volume "
            f"`{folders[alone[0]]}` and the folder `{folders[other]}`: name the folder above the volume, or one volume "
            "of the folder."
        )
        raise RequestError(message)
    return []


def _absolute(path: Path) -> Path:
    """The path with a name, also of `.`; links are kept, as their names are those of the cases."""
    return Path(os.path.abspath(path))  # noqa: PTH100 - `resolve` follows links


def _is_one_volume(path: Path) -> bool:
    """Whether a path is a file, or a folder of DICOM slices with no volume below it."""
    if path.is_file():
        return True
    return path.is_dir() and is_volume(_absolute(path)) and next(volumes_below(path), None) is None


def find_volumes(folder: Path, argument: str, without: Sequence[str] = (PROBABILITIES,)) -> dict[str, Path]:
    """Every volume below `folder`, by relative name without the extension, sorted; errors name `argument`.

    `without` as for `volumes_below`.
    """
    if not folder.is_dir():
        message = f"Expected `{argument}` to be a folder of volumes, but got `{folder}`: check the path."
        raise PairingError(message)
    volumes: dict[str, Path] = {}
    for path in volumes_below(folder, without=without):
        # Composed, so that a file from a Mac (NFD) pairs with one from elsewhere (NFC).
        name = composed(path.parent.relative_to(folder).joinpath(case_name(path)).as_posix())
        if name in volumes:
            message = f"Expected one file per case, but got `{volumes[name]}` and `{path}`: keep one, or use `--pairs`."
            raise PairingError(message)
        volumes[name] = path
    if not volumes:
        message = (
            f"Expected volumes in `{folder}`, but got none: name a folder with NIfTI, MetaImage, NRRD or PNG files "
            "or DICOM series."
        )
        raise PairingError(message)
    return dict(sorted(volumes.items()))


def read_pairs(path: Path, predictions: Path, references: Path) -> list[Pair]:
    """Read pairs from a CSV with the columns prediction, reference and, optionally, case.

    Relative paths start at the two folders. Blanks around a path are left out, and escapes for bytes that are no text
    are read as these bytes, unless a file has the very name. An empty cell or a file that does not exist is a missing
    partner; the path of the latter is kept for the failure of the case.

    Raises:
        PairingError: the file is missing, is not such a CSV, or names a case twice.
    """
    try:
        rows = read_csv(path)
    except (OSError, ValueError) as error:
        remedy = text_remedy(error, "save it as CSV")
        message = f"Expected `--pairs` to be a CSV file in UTF-8, but got `{path}` ({error}): {remedy}."
        raise PairingError(message) from error
    columns = {name for row in rows for name in row}  # a row may be short
    if not {"prediction", "reference"} <= columns:
        message = (
            f"Expected `{path}` to have the columns prediction and reference and at least one row, but got "
            f"{', '.join(sorted(str(column) for column in columns)) or 'nothing'}: add them."
        )
        raise PairingError(message)
    pairs: dict[str, Pair] = {}
    for line, row in enumerate(rows, start=2):
        prediction, reference = _spelled(predictions, row.get("prediction")), _spelled(references, row.get("reference"))
        named = reference or prediction
        if not named:
            message = f"Expected every row of `{path}` to name a file, but got empty cells in row {line}: remove it."
            raise PairingError(message)
        name = composed(_case(row.get("case"), (prediction, reference)) or name_of_file(named))
        if name in pairs:
            message = f"Expected every row of `{path}` to name a case of its own, but got `{name}` again: rename it."
            raise PairingError(message)
        pairs[name] = _pair(name, _path(predictions, prediction), _path(references, reference))
    return list(pairs.values())


def name_of_file(named: str) -> str:
    """Return the name of a case from a relative path of its file.

    >>> name_of_file("site/c1.nii.gz")
    'site/c1'
    """
    return Path(named).parent.joinpath(case_name(Path(named))).as_posix()


def _pair(case: str, prediction: Path | None, reference: Path | None) -> Pair:
    """A case of a table, from the paths that its row names."""
    paths = prediction, reference
    files = [None if path is None else find_spelling(path) for path in paths]
    lost = tuple(path for path, file in zip(paths, files, strict=True) if path is not None and file is None)
    return Pair(case, files[0], files[1], lost)


def _spelled(folder: Path, cell: str | None) -> str:
    """The path in a cell as it leads to a file; without the blanks around it if none of its spellings does."""
    plain = (cell or "").strip()
    spellings = dict.fromkeys((cell or "", plain, restored(cell or ""), restored(plain))) if plain else {}
    return next((each for each in spellings if find_spelling(folder / each) is not None), plain)


def _case(cell: str | None, files: Sequence[str]) -> str:
    """The name in a cell; blanks around it, and escapes as such, count only where a file of the case is called so."""
    named, whole = [name_of_file(file) for file in files if file], restored(cell or "")
    return next((name for name in (cell, whole) if name in named), whole.strip())


def _path(folder: Path, name: str) -> Path | None:
    return folder / name if name else None
