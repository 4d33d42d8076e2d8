"""Whether the folds of a run can be scored together, in one report, and if not, why and what to do."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from monai_iou.datasets.found_folders import held_out_twice
from monai_iou.tables import enumerated
from monai_iou.workflow.run_state import RunState, has_masks

__all__ = ["what_is_missing", "why_no_report"]

MASKS_DIFFER = (
    "Not scored together: the masks of the folds were made with different versions of inference.json: start the "
    "commands of the other folds again."
)


def what_is_missing(states: Sequence[RunState | None], folds: Sequence[int]) -> str:
    """Return when folds whose masks are not complete will have them, as the end of a sentence.

    >>> what_is_missing([None, RunState(Path(), {}, ["trained"])], [0, 1])
    'fold 0 is trained as well, and fold 1 has its masks: start the command of fold 1 again unless it is running'
    """
    trained = [fold for fold in folds if "trained" in getattr(states[fold], "done", ())]
    others = [fold for fold in folds if fold not in trained]
    parts, remedy = [], ""
    if others:
        parts += [f"{enumerated('fold', others)} {'is' if len(others) == 1 else 'are'} trained as well"]
    if trained:
        which, one = enumerated("fold", trained), len(trained) == 1
        parts += [f"{which} {'has its masks' if one else 'have their masks'}"]
        command, running = ("command", "it is running") if one else ("commands", "they are running")
        remedy = f": start the {command} of {which} again unless {running}"
    return ", and ".join(parts) + remedy


def why_no_report(states: Sequence[RunState | None], masks: Path, without: Collection[int] = ()) -> str:
    """Return why the folds of a run cannot be scored together, in a sentence; "" if they can.

    Args:
        states: of all folds.
        masks: the folder of all masks.
        without: folds whose masks could not all be made, and that are scored all the same.
    """
    lacking = [number for number, state in enumerate(states) if not has_masks(state, masks)]
    missing = [number for number in lacking if number not in without]
    if missing:
        return f"Not scored yet: the report follows when {what_is_missing(states, missing)}."
    held_out = [state.facts.get("held_out", ()) for state in states if state is not None]
    twice = held_out_twice([[item["case"] for item in items] for items in held_out])
    if twice is None:
        return "" if _masks_are_alike(states, masks) else MASKS_DIFFER
    case, first, second = twice
    return (
        f"Not scored together: folds {first} and {second} both hold out {case}, which a report can have only once. If "
        "the cases or the split changed between their trainings, replace all folds with --overwrite."
    )


def _masks_are_alike(states: Sequence[RunState | None], masks: Path) -> bool:
    """Whether one inference.json made the masks of all folds, as far as they have masks and a version noted it."""
    made = [state for state in states if state is not None and state.facts.get("held_out") and has_masks(state, masks)]
    return len({state.facts["inference"] for state in made if state.facts.get("inference") is not None}) <= 1
