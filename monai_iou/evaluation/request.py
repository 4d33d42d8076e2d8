"""What an evaluation is asked for, checked before any work."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from monai_iou.evaluation.cluster import SchedulerError, host_and_port
from monai_iou.evaluation.rules import Rules, Structure, split_width
from monai_iou.files import OutputError, check_outputs
from monai_iou.metrics import CHALLENGES
from monai_iou.metrics.boundary import DISTANCES, BoundaryDistance
from monai_iou.metrics.lesion_rules import Pairing, lesion_rule

MISSING = ("both", "exclude", "penalty")
PRESENT = ("reference", "either")
EXPORTED = ("nnunet", "panoptica", "latex")
RESULTS = ("cases.csv", "lesions.csv", "failures.csv", "summary.json", "report.html")


class RequestError(ValueError):
    """Options that contradict each other or are out of range."""


@dataclass(frozen=True)
class Request:
    """What is evaluated, how it is scored, and where the results are written.

    Args:
        predictions: folder of predicted label maps.
        references: folder of reference label maps.
        output: folder for the results; created if it does not exist.
        labels: label values to evaluate; empty means the regions of the references' dataset.json or, without regions,
            every value except 0 that occurs in a reference, or in a prediction and is named in dataset.json.
        regions: unions of label values by name, evaluated instead of labels.
        ignore: reference voxels with this value are excluded from all scores.
        tolerance: tolerance of the normalised surface Dice (NSD) in mm.
        workers: number of processes on this machine, limited to the number of its processors.
        scheduler: address of a Dask scheduler, which replaces `workers`.
        resample: whether predictions on other grids are resampled to that of the reference by nearest neighbour.
        images: folder of images that the report shows under the contours.
        pairs: CSV that states which files belong together.
        command: the command line, stored in the summary.
        tolerances: tolerances in mm for single labels or regions by name, used instead of `tolerance`.
        missing: what is missing (undefined scores, cases without a usable prediction) counts as the worst score in all
            means with "both" (default), while cases.csv contains what was measured; "penalty" writes the penalties into
            cases.csv too; "exclude" leaves what is missing out of the means. Both means are always reported.
        groups: CSV or JSON that assigns the cases to patients.
        pictures: the cases that the report shows slice by slice: "worst" (the five worst, the median and the best
            case), a number N (the N worst, the median and the best; 0 for none), or "all".
        boundary: width of the bands of the boundary IoU: "2mm", or "2%" of the diagonal of the image.
        match: when a lesion counts as found: "any", "iou:0.5" or "overlap:0.25".
        pairing: "one-to-one", or "many-to-one", where fragments and merged lesions count as found.
        connectivity: voxel neighbourhood that defines a connected component (lesion): 6, 18 or 26.
        min_volume_mm3: smaller lesions are left out.
        like: challenge whose own columns are added: "brats-mets", "isles22", "autopet" or "ms".
        instances: whether the files hold a number for each lesion instead of labels; all are then scored as label 1.
        export: further files to write, of `EXPORTED`.
        probabilities: folder of probability maps, which are scored at every threshold.
        strict: whether the threshold of `match` must be exceeded, as in the panoptic quality of Kirillov et al.
        dilation: reference components that join when dilated so many times count as one lesion.
        present: when a label counts in a case for IoU-I and IoU-C: "reference" where the reference contains it, as in
            the paper, or "either" where one of the two does.
        dataset: folder whose dataset.json names labels, patients and what was annotated; None takes the dataset.json
            beside or above the references.
        boundary_distance: how the width of `boundary` is measured: "euclidean", or "chessboard" as its authors do.
    """

    predictions: Path
    references: Path
    output: Path
    labels: tuple[int, ...] = ()
    regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    ignore: int | None = None
    tolerance: float = 1.0
    workers: int = 1
    scheduler: str | None = None
    resample: bool = False
    images: Path | None = None
    pairs: Path | None = None
    command: Sequence[str] = ()
    tolerances: Mapping[str, float] = field(default_factory=dict)
    missing: str = "both"
    groups: Path | None = None
    pictures: str = "worst"
    boundary: str = "2mm"
    match: str = "iou:0.5"
    pairing: Pairing = "one-to-one"
    connectivity: int = 26
    min_volume_mm3: float = 0.0
    like: str | None = None
    present: str = "reference"
    probabilities: Path | None = None
    instances: bool = False
    export: tuple[str, ...] = ()
    strict: bool = False
    dilation: int = 0
    dataset: Path | None = None
    boundary_distance: BoundaryDistance = "euclidean"

    @property
    def rules(self) -> Rules:
        """The rules of scoring, which are called as here."""
        named = {rule.name: getattr(self, rule.name) for rule in fields(Rules)}
        return Rules(**named | {"tolerances": dict(self.tolerances)})

    @property
    def named_structures(self) -> tuple[Structure, ...]:
        """The structures named by labels or regions; empty if every value that is found is scored."""
        if self.instances:
            return (Structure("1", (1,)),)
        if self.regions:
            return tuple(Structure(name, tuple(values)) for name, values in self.regions.items())
        return tuple(Structure(str(value), (value,)) for value in self.labels)

    def as_typed(self, text: str) -> str:
        """A message with the paths as the user gave them: workers get absolute ones, which name the machine's folders.

        >>> request = Request(Path("p"), Path("r"), Path("out"))
        >>> request.as_typed(f"Expected `{Path('p').absolute()}/a.nii` to be a volume.")
        'Expected `p/a.nii` to be a volume.'
        """
        for folder in (self.predictions, self.references, self.images, self.probabilities):
            if folder is not None and not folder.is_absolute():
                # Not of a folder beside it, whose name only begins likewise: `/data/run` in `/data/run_2/a.nii`.
                whole = rf"(?<![\w./\\-]){re.escape(str(folder.absolute()))}(?=[/\\`'\s:,]|$)"
                text = re.sub(whole, str(folder).replace("\\", r"\\"), text)
        return text


@dataclass(frozen=True)
class Progress:
    """One task is done."""

    stage: str
    done: int
    total: int
    case: str = ""
    reason: str | None = None


def check_request(request: Request) -> None:
    """Check that the options are consistent and that no file that is read would be overwritten.

    Raises:
        RequestError: the options contradict each other, or the output would overwrite an input.
    """
    _check_labels(request)
    _check_numbers(request)
    _check_choices(request)
    _check_inputs(request)
    _check_output(request)


def _check_labels(request: Request) -> None:
    others: dict[str, object] = {
        "--labels": request.labels,
        "--regions": request.regions,
        "--like": request.like,
        "--ignore": request.ignore is not None,
        "--probabilities": request.probabilities,
        "--dilation": request.dilation,
    }
    beside = next((name for name, given in others.items() if given), None)
    if request.instances and beside is not None:
        message = (
            f"Expected `--instances` without `{beside}`, as files then hold lesion numbers, but got both: keep one."
        )
        raise RequestError(message)
    if request.labels and request.regions:
        message = "Expected either `--labels` or `--regions`, but got both: keep one."
        raise RequestError(message)
    named = {*request.labels, *(value for values in request.regions.values() for value in values)}
    if 0 in named:
        message = "Expected labels of structures, but got 0, the background: leave it out."
        raise RequestError(message)
    again = next((value for i, value in enumerate(request.labels) if value in request.labels[:i]), None)
    if again is not None:
        message = f"Expected every label once in `--labels`, but got {again} again: remove it."
        raise RequestError(message)
    if request.ignore is not None and request.ignore in named:
        message = f"Expected `--ignore` to differ from the labels, but got {request.ignore} in both: keep one."
        raise RequestError(message)


def _check_numbers(request: Request) -> None:
    for tolerance in (request.tolerance, *request.tolerances.values()):
        if not tolerance >= 0 or math.isinf(tolerance):
            message = f"Expected `--tolerance` to be 0 mm or more, but got {tolerance}: give a distance in mm."
            raise RequestError(message)
    if request.named_structures:  # otherwise dataset.json may name them
        check_names(request, request.named_structures)
    try:
        split_width(request.boundary)
        lesion_rule(request.match, pairing=request.pairing)
        if request.scheduler is not None:
            host_and_port(request.scheduler)
    except (ValueError, SchedulerError) as error:
        raise RequestError(str(error)) from error
    if request.workers < 1:
        message = f"Expected `--workers` to be 1 or more, but got {request.workers}: give a number of processes."
        raise RequestError(message)
    if isinstance(request.dilation, bool) or request.dilation < 0:
        message = f"Expected `--dilation` to be 0 or more, but got {request.dilation}: give 1 for BraTS-METS."
        raise RequestError(message)
    if request.connectivity not in (6, 18, 26):
        message = f"Expected `--connectivity` to be 6, 18 or 26, but got {request.connectivity}: choose one."
        raise RequestError(message)
    if not request.min_volume_mm3 >= 0 or math.isinf(request.min_volume_mm3):
        message = f"Expected `--min-volume` to be 0 mm3 or more, but got {request.min_volume_mm3}: give a volume."
        raise RequestError(message)
    if request.pictures not in ("all", "worst") and not request.pictures.isdecimal():
        message = f"Expected `--pictures` to be all, worst or a number, but got {request.pictures}: choose one."
        raise RequestError(message)


def check_names(request: Request, structures: Sequence[Structure]) -> None:
    """Check that the tolerances are those of structures that are scored.

    Args:
        request: the request.
        structures: what is scored; empty while only the files can say it, whose labels are whole numbers.

    Raises:
        RequestError: a name is none of theirs, so that its tolerance would be used nowhere.
    """
    names = [structure.name for structure in structures]
    unknown = next((name for name in request.tolerances if not (name in names if names else _is_label(name))), None)
    if unknown is not None:
        scored = f"structures that are scored ({', '.join(names)})" if names else "labels, which are whole numbers"
        otherwise = "" if request.named_structures else ", or name what is scored with `--labels` or `--regions`"
        message = f"Expected `--tolerance` to name {scored}, but got {unknown}: correct its name{otherwise}."
        raise RequestError(message)


def _is_label(name: str) -> bool:
    """Whether a structure that is found in the files can have this name.

    >>> _is_label("11"), _is_label("-1"), _is_label("0"), _is_label("01"), _is_label("liver")
    (True, True, False, False, False)
    """
    return re.fullmatch(r"-?[1-9][0-9]*", name) is not None


def _check_choices(request: Request) -> None:
    choices: tuple[tuple[str, Sequence[str | None], Sequence[str]], ...] = (
        ("--like", (request.like,), tuple(CHALLENGES)),
        ("--present", (request.present,), PRESENT),
        ("--boundary-distance", (request.boundary_distance,), DISTANCES),
        ("--missing", (request.missing,), MISSING),
        ("--export", request.export, EXPORTED),
    )
    for option, given, known in choices:
        wrong = next((name for name in given if name is not None and name not in known), None)
        if wrong is not None:
            near = difflib.get_close_matches(wrong, known, n=1)
            remedy = f"perhaps you meant {near[0]}" if near else "choose one"
            message = f"Expected `{option}` to be among {', '.join(known)}, but got {wrong}: {remedy}."
            raise RequestError(message)


def _check_inputs(request: Request) -> None:
    files = [path for path in (request.predictions, request.references) if path.is_file()]
    if request.pairs is not None and files:
        got, remedy = "two files, which are a pair", "drop `--pairs`, or name the folders"
        if len(files) == 1:
            got, remedy = f"the file `{files[0]}`", "name its folder"
        message = f"Expected two folders with `--pairs`, whose paths start at them, but got {got}: {remedy}."
        raise RequestError(message)
    for option, folder in (("--images", request.images), ("--probabilities", request.probabilities)):
        if folder is not None and not folder.is_dir():
            message = f"Expected `{option}` to be a folder of volumes, but got `{folder}`: check the path."
            raise RequestError(message)


def _check_output(request: Request) -> None:
    output = request.output
    folders = {
        "the predictions": request.predictions,
        "the references": request.references,
        "the images": request.images,
        "the probabilities": request.probabilities,
    }
    tables = {"the list of pairs": request.pairs, "the list of patients": request.groups}
    read, listed = ({what: [path] for what, path in inputs.items() if path is not None} for inputs in (folders, tables))
    try:
        check_outputs({"--output": output}, read)
        for name in RESULTS:
            check_outputs({"--output": output / name}, listed)
    except OutputError as error:
        raise RequestError(str(error)) from error
