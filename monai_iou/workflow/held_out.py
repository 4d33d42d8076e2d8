"""The cases that a training held out: which of them its model has not seen, and what is scored and said of them."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monai_iou.datasets.folder import read_folder
from monai_iou.evaluation.request import RESULTS, Request
from monai_iou.evaluation.results import Evaluation
from monai_iou.evaluation.summary import part_of
from monai_iou.files import OutputError, write_csv
from monai_iou.planning.plan import Plan
from monai_iou.planning.stored import load_plan
from monai_iou.workflow.extra_files import extra_file
from monai_iou.workflow.records import seen_cases
from monai_iou.workflow.references import with_label_maps
from monai_iou.workflow.run_state import RunState
from monai_iou.workflow.run_summary import write_summary

if TYPE_CHECKING:
    from monai_iou.workflow.data import BundleCases
    from monai_iou.workflow.settings import Settings

__all__ = [
    "failure_notes",
    "has_scores",
    "held_out_facts",
    "left_out_notes",
    "remove_scores",
    "report_failures",
    "score_request",
    "scored_cases",
    "seen_before",
    "seen_notes",
    "tell_removed",
    "to_stderr",
    "write_summaries",
]

MOST_NAMED = 3


def seen_before(cases: BundleCases, plan: Plan, model: Path) -> list[str]:
    """Return the held-out cases that a model has seen before: with another split, or in the model of `start_from`.

    Cases that the present split trains on and validates, as it does with a single patient, are not among them.

    Args:
        cases: of the training.
        plan: of the training, with what it trains on now.
        model: the `model.json` beside the weights.
    """
    if not model.is_file():
        return []
    stored = load_plan(model)
    if {*stored.trained} <= {*plan.trained} and {*stored.trained_images} <= {*plan.trained_images}:
        return []
    names = {item["case"] for item in cases.validation} - {*plan.trained}
    held_out = [case for case in cases.folder.labelled if case.name in names]
    return [case.name for case in seen_cases(held_out, cases.folder.labelled, [stored], cases.folder.patient_groups)]


def held_out_facts(cases: BundleCases, settings: Settings, seen: Sequence[str], keep_weights: str) -> dict[str, Any]:
    """Return what the state of a training says of the cases that it held out, with what its model knows of them.

    Args:
        cases: of the training.
        settings: of the training.
        seen: the cases that are not scored, from `seen_before`.
        keep_weights: the config's own key, which the settings of an earlier copy of the bundle lack.
    """
    items = [item for item in cases.validation if item["case"] not in seen] if settings.validates else []
    trained = {item["case"] for item in cases.training}
    # Without a validated epoch, the final weights are stored.
    is_chosen = getattr(settings, "epochs", 1) >= getattr(settings, "val_interval", 1)
    return {
        "held_out": [{name: item[name] for name in ("case", "image", "label")} for item in items],
        "left_out": list(seen),
        "trained_on": [item["case"] for item in items if item["case"] in trained],
        "chose_weights": is_chosen and keep_weights == "best",
    }


def left_out_notes(states: Sequence[RunState]) -> list[str]:
    """Say of each training which cases it holds out and are not scored, because its model was trained on them.

    >>> left_out_notes([RunState(Path("run"), {}, facts={"left_out": ["a", "b"]}), RunState(Path("other"), {})])
    ['Left out: a, b. The model in run has already been trained on them: on another split, or through the model that it
    started from.']
    """
    return [
        f"Left out: {_some(names)}. The model in {state.folder} has already been trained on them: on another split, "
        "or through the model that it started from."
        for state in states
        if (names := state.facts.get("left_out"))
    ]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def seen_notes(states: Sequence[RunState]) -> list[str]:
    """Say which cases are scored although a model was trained on them, or they chose its weights or post-processing.

    >>> facts = {"held_out": [{"case": "a"}], "trained_on": ["a"], "chose_weights": True}
    >>> for note in seen_notes([RunState(Path("run"), {}, facts=facts)]):
    ...     print(note)
    Not held out: a. All cases are of one patient, and the model in run was trained on them: score other patients.
    The weights (run/models/model.pt) were chosen by the scores of these very cases: score others before you report any.
    """
    scored = [state for state in states if state.facts.get("held_out")]
    notes = [
        f"Not held out: {_some(names)}. All cases are of one patient, and the model in {state.folder} was trained on "
        "them: score other patients."
        for state in scored
        if (names := state.facts.get("trained_on"))
    ]
    chosen = [str(state.folder / "models" / "model.pt") for state in scored if state.facts.get("chose_weights")]
    if chosen:
        notes.append(
            f"The weights ({', '.join(chosen)}) were chosen by the scores of these very cases: score others before you "
            "report any."
        )
    files = [state.folder / "models" / "postprocessing.json" for state in scored]
    tuned = [str(path) for path in files if path.is_file()]
    if tuned:
        notes.append(
            f"The post-processing ({', '.join(tuned)}) was tuned on these very cases: score others before you report "
            "what it gains."
        )
    return notes


def scored_cases(states: Sequence[RunState]) -> str:
    """Return how many cases are scored and what they are to the training, for a sentence.

    >>> facts = {"held_out": [{"case": "a"}]}
    >>> scored_cases([RunState(Path(), {}, facts=facts)])
    'case that was held out'
    """
    number = sum(len(state.facts.get("held_out", ())) for state in states)
    was = "case that was" if number == 1 else f"{number} cases that were"
    is_trained = any(state.facts.get("trained_on") for state in states)
    return f"{was} {'trained and validated on' if is_trained else 'held out'}"


def failure_notes(failed: Mapping[Path, str], dataset: Path) -> list[str]:
    r"""Say of each training whose masks could not all be made why that is.

    Args:
        failed: folder of a training -> the reason.
        dataset: its folder as the user gave it; so the notes name its files, too.

    Example:
        >>> why = f"Expected `{Path('data').absolute()}/a.nii` to be read.\nExpected two."
        >>> failure_notes({Path("run"): why}, Path("data"))
        ['Not all masks of run could be made. Expected `data/a.nii` to be read. Expected two.']
    """
    places = sorted({str(dataset.absolute()), str(dataset.resolve())}, key=len, reverse=True)
    named = re.compile(rf"(?<![\w./\\-])(?:{'|'.join(map(re.escape, places))})(?=[/\\`'\s:,]|$)")
    reasons = {folder: " ".join(named.sub(lambda _: str(dataset), why).split()) for folder, why in failed.items()}
    return [f"Not all masks of {folder} could be made. {reason}" for folder, reason in reasons.items()]


def to_stderr(line: str) -> None:
    """Write a line to stderr, if there is one."""
    if sys.stderr is not None:
        sys.stderr.write(f"{line}\n")


def report_failures(failed: Mapping[Path, str], scores: Evaluation | None, warn: Callable[[str], None]) -> None:
    """Say why masks could not be made; an error unless the scores have failures, with which the command ends as well.

    Args:
        failed: folder of a training -> the reason.
        scores: of all held-out cases, if there are any.
        warn: called with each reason.

    Raises:
        OutputError: there are masks that could not be made.
    """
    if failed and (scores is None or not scores.failures):
        raise OutputError("\n".join(dict.fromkeys(failed.values())))
    for line in dict.fromkeys(line for reason in failed.values() for line in reason.splitlines()):
        warn(line)


def remove_scores(folder: Path) -> None:
    """Remove the scores of earlier weights, where there are none of the weights that have taken their place."""
    for name in RESULTS:
        (folder / name).unlink(missing_ok=True)


def has_scores(folder: Path) -> bool:
    """Whether a folder holds scores, with their report."""
    return (folder / "report.html").is_file()


def tell_removed(folder: Path, had_scores: bool, warn: Callable[[str], None]) -> None:
    """Say so if the scores that a folder had before are gone, and no others have taken their place."""
    if had_scores and not has_scores(folder):
        warn(f"Removed, because they were of earlier weights or masks: the scores in {folder}")


def write_summaries(folders: Sequence[Path], scores: Evaluation | None) -> None:
    """Write each training's page, with the scores of the cases that this training held out."""
    for folder in folders:
        state = RunState.read(folder)
        if state is not None and (folder / "epochs.csv").is_file():
            cases = [item["case"] for item in state.facts.get("held_out", ())]
            with extra_file(folder / "summary.html"):
                part = None if scores is None else part_of(scores, cases)
                notes = [*left_out_notes([state]), *seen_notes([state])]
                write_summary(folder, evaluation=part, notes=notes, trained=bool(state.facts.get("trained_on")))


def score_request(dataset: Path, run: Path, masks: Path, output: Path, states: Sequence[RunState]) -> Request:
    """Return how the cases that trainings held out are scored, and write the list of their files.

    The report, which people send to others, has the files of the dataset in the form in which the user gave its folder.

    Args:
        dataset: its folder.
        run: the folder of one of the trainings, whose model tells how labels are read.
        masks: the folder of all masks.
        output: of the scores.
        states: of the trainings.
    """
    folder = read_folder(dataset)
    held_out = [
        _where_it_is(item, str(state.request.get("dataset")), folder.root)
        for state in states
        for item in state.facts["held_out"]
    ]
    items = with_label_maps(held_out, folder, run / "models", output / "references")
    # Links are kept: what they lead to may have any name.
    labels = [_as_given(item["label"], folder.root, dataset) for item in items]
    if len({label.is_absolute() for label in labels}) > 1:  # as of a dataset that was moved between two folds
        labels = [label.absolute() for label in labels]
    references = Path(os.path.commonpath([label.parent for label in labels]))
    rows = [
        {"prediction": f"{item['case']}.nii.gz", "reference": label.relative_to(references), "case": item["case"]}
        for item, label in zip(items, labels, strict=True)
    ]
    write_csv(output / "pairs.csv", ("prediction", "reference", "case"), rows)
    return Request(
        masks,
        references,
        output,
        labels=() if folder.regions else tuple(states[0].facts["labels"]),
        regions=folder.regions,
        ignore=folder.ignore,
        images=_common_folder([item["image"] for item in items], folder.root, dataset),
        pairs=output / "pairs.csv",
        command=("monai-iou", "train", str(dataset)),
        dataset=dataset,
    )


def _where_it_is(item: Mapping[str, Any], earlier: str, root: Path) -> dict[str, Any]:
    """A case whose files are looked for where the dataset is now, if they are no longer where it was.

    >>> item = {"case": "c0", "label": "/gone/labels/c0.nii", "image": ["/gone/images/c0.nii", "/other/c0.nii"]}
    >>> sorted(_where_it_is(item, "/gone", Path("/data")).items())
    [('case', 'c0'), ('image', ['/data/images/c0.nii', '/other/c0.nii']), ('label', '/data/labels/c0.nii')]
    """

    def found(file: Any) -> Any:
        if isinstance(file, list):
            return [found(each) for each in file]
        path = Path(file)
        moved = path.is_relative_to(earlier) and not path.exists()
        return str(root / path.relative_to(earlier)) if moved else file

    return {name: found(value) if name in ("image", "label") else value for name, value in item.items()}


def _as_given(file: str, root: Path, dataset: Path) -> Path:
    """A file of the dataset below the folder as the user gave it and not as it was found; another file as it is.

    >>> root = Path("/home/alice/study/data")
    >>> [str(_as_given(f"{place}/c0.nii", root, Path("data"))) for place in (f"{root}/labels", "run/references")]
    ['data/labels/c0.nii', 'run/references/c0.nii']
    """
    path = Path(file)
    return dataset / path.relative_to(root) if path.is_relative_to(root) else path


def _common_folder(images: Sequence[Any], root: Path, dataset: Path) -> Path | None:
    """The one folder of the images, for the report's pictures."""
    files = [_as_given(image[0] if isinstance(image, list) else image, root, dataset) for image in images]
    folders = {file.parent for file in files}
    return folders.pop() if len(folders) == 1 else None
