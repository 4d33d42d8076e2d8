"""The cases that a training held out: which of them its model has not seen, and what is scored and said of them."""

from __future__ import annotations

import os
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

__all__ = [
    "failure_notes",
    "left_out_notes",
    "remove_scores",
    "report_failures",
    "score_request",
    "seen_before",
    "to_stderr",
    "tuning_notes",
    "write_summaries",
]

MOST_NAMED = 3


def seen_before(cases: BundleCases, plan: Plan, model: Path) -> list[str]:
    """Return the held-out cases that a model has seen in an earlier part of its training, which had another split.

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


def left_out_notes(states: Sequence[RunState]) -> list[str]:
    """Say of each training which cases it holds out and are not scored, because its model was trained on them.

    >>> left_out_notes([RunState(Path("run"), {}, facts={"left_out": ["a", "b"]}), RunState(Path("other"), {})])
    ['Left out: a, b. The training in run now holds out what it was trained on before, with another split.']
    """
    return [
        f"Left out: {_some(names)}. The training in {state.folder} now holds out what it was trained on before, with "
        "another split."
        for state in states
        if (names := state.facts.get("left_out"))
    ]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def tuning_notes(states: Sequence[RunState]) -> list[str]:
    """Say whether the post-processing of some training was chosen on the very cases that are scored."""
    files = [state.folder / "models" / "postprocessing.json" for state in states if state.facts.get("held_out")]
    tuned = [str(path) for path in files if path.is_file()]
    if not tuned:
        return []
    return [
        f"The post-processing ({', '.join(tuned)}) was tuned on these very cases: score others before you report what "
        "it gains."
    ]


def failure_notes(failed: Mapping[Path, str]) -> list[str]:
    r"""Say of each training whose masks could not all be made why that is.

    >>> failure_notes({Path("run"): "Expected one.\nExpected two."})
    ['Not all masks of run could be made. Expected one. Expected two.']
    """
    return [f"Not all masks of {folder} could be made. {' '.join(why.split())}" for folder, why in failed.items()]


def to_stderr(line: str) -> None:
    """Write a line to stderr."""
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


def write_summaries(folders: Sequence[Path], scores: Evaluation | None) -> None:
    """Write each training's page, with the scores of the cases that this training held out."""
    for folder in folders:
        state = RunState.read(folder)
        if state is not None and (folder / "epochs.csv").is_file():
            cases = [item["case"] for item in state.facts.get("held_out", ())]
            with extra_file(folder / "summary.html"):
                write_summary(folder, evaluation=None if scores is None else part_of(scores, cases))


def score_request(dataset: Path, run: Path, masks: Path, output: Path, states: Sequence[RunState]) -> Request:
    """Return how the cases that trainings held out are scored, and write the list of their files.

    Args:
        dataset: its folder.
        run: the folder of one of the trainings, whose model tells how labels are read.
        masks: the folder of all masks.
        output: of the scores.
        states: of the trainings.
    """
    folder = read_folder(dataset)
    held_out = [item for state in states for item in state.facts["held_out"]]
    items = with_label_maps(held_out, folder, run / "models", output / "references")
    # Links are kept: what they lead to may have any name.
    rows = [
        {"prediction": f"{item['case']}.nii.gz", "reference": Path(item["label"]).absolute(), "case": item["case"]}
        for item in items
    ]
    write_csv(output / "pairs.csv", ("prediction", "reference", "case"), rows)
    return Request(
        masks,
        Path(os.path.commonpath([Path(item["label"]).absolute().parent for item in items])),
        output,
        labels=() if folder.regions else tuple(states[0].facts["labels"]),
        regions=folder.regions,
        ignore=folder.ignore,
        images=_common_folder([item["image"] for item in items]),
        pairs=output / "pairs.csv",
        command=("monai-iou", "train", str(dataset)),
        dataset=folder.root,
    )


def _common_folder(images: Sequence[Any]) -> Path | None:
    """The one folder of the images, for the report's pictures."""
    files = [Path(image[0] if isinstance(image, list) else image) for image in images]
    folders = {file.parent for file in files}
    return folders.pop() if len(folders) == 1 else None
