"""The counts of probability maps, kept case by case beside the records of the scores, and made where they are not yet.

A case that is scored anew has its maps counted in the same task, so that its reference is read once. Counts that are
kept need hashing only. What is left over is counted at the end: maps that were added to finished cases, and maps whose
channels go by the order of labels that nobody named, which are known only when all references were read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from monai_iou.evaluation import resume
from monai_iou.evaluation.case_files import Settings
from monai_iou.evaluation.map_files import GRID, find_maps, is_archive
from monai_iou.evaluation.probabilities import count_files, hash_maps
from monai_iou.evaluation.request import Progress, Request
from monai_iou.evaluation.results import Evaluation
from monai_iou.evaluation.thresholds import sparse, stored
from monai_iou.evaluation.workers import Runner, TaskError

__all__ = ["MapRecords"]


class MapRecords:
    """What is known of the probability maps of each case.

    Args:
        request: of the evaluation; without `probabilities` there are no maps.
        settings: of its tasks.
        predictions: of all cases, by their names; None where there is none.

    Raises:
        PairingError: the folder of maps has none of any case.
    """

    def __init__(self, request: Request, settings: Settings, predictions: Mapping[str, Path | None]) -> None:
        self._output = request.output
        self._settings = settings
        self._folder = request.probabilities
        self._files = {} if self._folder is None else find_maps(self._folder, list(predictions))
        # Archives that were moved away from their masks.
        alone = [case for case, files in self._files.items() if is_archive(files) and GRID not in files]
        self._alone = [case for case in alone if predictions[case] is not None]
        for case in self._alone:
            self._files[case] = {**self._files[case], GRID: cast("Path", predictions[case])}
        self._fingerprint = resume.settings_hash(settings)
        self._found: dict[str, Mapping[str, Any]] = {}
        self._problems: dict[str, str] = {}

    def reuse(self, case: str, reference: str | None) -> None:
        """Take the counts of an earlier run, if neither the maps nor the reference, given by its hash, have changed."""
        kept = resume.read_maps(self._output, case) if case in self._files else None
        if kept is None or kept["fingerprint"] != self._fingerprint or kept["inputs"][""] != reference:
            return
        try:
            inputs = {"": reference, **hash_maps(self._files[case])}
        except OSError:
            return  # the task that reads the file says why
        if kept["inputs"] == inputs:
            self._found[case] = {**kept, "counts": {name: _compact(count) for name, count in kept["counts"].items()}}

    def wanted(self, case: str) -> dict[str, Path] | None:
        """The files of a case whose maps are to be counted, or None."""
        if case in self._found or case not in self._files:
            return None
        return {name: path.absolute() for name, path in self._files[case].items()}

    def keep(self, case: str, counted: Mapping[str, Any] | None) -> None:
        """Keep what a task counted, or why it could not."""
        if counted is None:
            return
        if "problem" in counted:
            self._problems[case] = _sentence(counted["problem"])
            return
        counts = {name: {**count, "histogram": sparse(count["histogram"])} for name, count in counted["counts"].items()}
        self._found[case] = {**counted, "counts": counts}
        plain = {name: _plain(count) for name, count in counts.items()}
        kept = {**counted, "case": case, "counts": plain, "fingerprint": self._fingerprint}
        resume.write_maps(self._output, case, kept)

    def finish(
        self, run: Runner, evaluation: Evaluation, progress: Callable[[Progress], None]
    ) -> dict[str, dict[str, Any]]:
        """Count what is left over, and return the counts of all evaluated cases; a case without them is noted."""
        request, structures = evaluation.request, evaluation.structures
        names = [structure.name for structure in structures]
        references = {pair.case: pair.reference for pair in evaluation.pairs}
        cases = [record["case"] for record in evaluation.records] if self._files else []
        tasks: dict[str, tuple[Any, ...]] = {}
        for case in cases:
            reference = references[case]
            if reference is not None and case in self._files and not self._fits(case, names):
                files = {name: path.absolute() for name, path in self._files[case].items()}
                rest = structures, self._settings.ignore, self._settings.rules
                tasks[case] = (files, reference.absolute(), *rest)
        for done, (case, result) in enumerate(run(count_files, tasks) if tasks else (), start=1):
            problem = result.reason if isinstance(result, TaskError) else None
            self._found.pop(case, None)
            self._problems.pop(case, None)
            self.keep(case, result if problem is None else {"problem": problem})
            progress(Progress("cases", done, len(tasks), case, problem and request.as_typed(problem)))
        evaluation.run_notes += [
            f"{case}: there is no probability map of this name in {self._folder}."
            for case in cases
            if case not in self._files
        ]
        moved = [case for case in cases if case in self._alone and case in self._found]
        evaluation.run_notes += [
            f"Archives of probabilities without their masks beside them: {len(moved)}, such as {case}.npz. They were "
            "read as probabilities of the scored predictions, with the same axes."
            for case in moved[:1]
        ]
        evaluation.run_notes += [
            f"{case}: its probabilities are left out. {request.as_typed(self._problems[case])}"
            for case in cases
            if case in self._problems
        ]
        lacking = {record["case"]: record.get("not_annotated", ()) for record in evaluation.records}
        return {
            case: {name: count for name, count in self._found[case]["counts"].items() if name not in lacking[case]}
            for case in cases
            if case in self._found
        }

    def _fits(self, case: str, names: Sequence[str]) -> bool:
        """Whether nothing is left to do: the counts are of these structures, or cannot be made."""
        if case in self._problems:  # perhaps those of a map that no label of the references asks for
            return self._settings.structures is not None
        found = self._found.get(case)
        if found is None or not found["counts"].keys() >= set(names):
            return False
        return bool(found["independent"]) or list(found["counts"]) == list(names)


def _sentence(problem: str) -> str:
    """A problem as a sentence: the error of a library alone would not say what it ended.

    >>> _sentence("KeyError: 'x'")
    "Expected probabilities that can be scored, but got the error KeyError: 'x': check files and free memory."
    """
    if problem.startswith("Expected "):
        return problem
    error = problem.rstrip(" :.")
    return f"Expected probabilities that can be scored, but got the error {error}: check files and free memory."


def _plain(count: Mapping[str, Any]) -> dict[str, Any]:
    """A count as JSON holds it."""
    return {**count, "histogram": [[part.tolist() for part in row] for row in count["histogram"]]}


def _compact(count: Mapping[str, Any]) -> dict[str, Any]:
    """A count as it is kept in memory, from JSON: its lists of numbers would take many times as much."""
    return {**count, "histogram": [stored(*row) for row in count["histogram"]]}
