"""Compare the scores of the hippocampi of Task904 whose other side was trained on with the scores of the others.

    python -m benchmarks.evidence.hippocampi

The cases 2k - 1 and 2k of Task904 are the two hippocampi of one scan: where the intensities were rescaled, so that a
scan has a step between grey values of its own, both have the same step, which the command counts first. The data's
split into training and test does not keep them together, so that about half of the test volumes are of scans of which
the other side was trained on. The others are what a split by scan would leave to test, and the last column compares the
choices on these alone.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.evidence.data import DATA
from benchmarks.evidence.datasets import real_cases
from benchmarks.evidence.report import RESULTS, made
from benchmarks.evidence.statistics import Choice, comparison, differences, scores_of
from benchmarks.evidence.studies import STUDIES, Study
from monai_iou.tables import counted

Rows = Iterable[Mapping[str, str]]


def number_of(case: str) -> int:
    """Return the number in the name of a case."""
    (number,) = re.findall(r"\d+", Path(case).name)
    return int(number)


def scan_of(case: str) -> int:
    """Return the number of the scan that a case of Task904 is a part of.

    >>> [scan_of(f"./imagesTr/hippocampus_{number}.nii.gz") for number in ("227", "228", "229")]
    [114, 114, 115]
    """
    return (number_of(case) + 1) // 2


def grey_step(values: NDArray[Any]) -> float | None:
    """Return the step of which all grey values are multiples; None if it is 1, as of unscaled values, or there is none.

    >>> grey_step(np.array([0, 2.5, 5, 12.5])), grey_step(np.array([0, 1, 3])), grey_step(np.array([0, 1, 2.4, 3.9]))
    (2.5, None, None)
    """
    present = np.unique(values.astype(np.float64))
    steps = np.sort(np.diff(present))
    steps = steps[steps > 1e-9 * np.abs(present).max()]
    step = float(np.median(steps[: max(5, len(steps) // 10)])) if len(steps) else 1.0
    counts = np.rint(present / step)
    step = float((present * counts).sum() / (counts**2).sum())  # of all values, as each is rounded
    fits = np.abs(present / step - counts).max() < 0.05
    return step if fits and abs(step - 1) > 1e-6 else None


def pairs_alike(steps: Mapping[int, float | None], first: int) -> tuple[int, int]:
    """Return the number of neighbours of which both have a step of their own, and how many have the same.

    >>> pairs_alike({1: 2.5, 2: 2.5, 3: 7.0, 4: None}, 1), pairs_alike({1: 2.5, 2: 2.5, 3: 7.0, 4: None}, 2)
    ((1, 1), (1, 0))
    """
    numbers = [number for number in steps if number % 2 == first % 2 and steps[number] and steps.get(number + 1)]
    alike = [abs(steps[number] / steps[number + 1] - 1) < 1e-5 for number in numbers]  # type: ignore[operator]
    return len(alike), sum(alike)


def means(rows: Rows, trained: Collection[int], score: str) -> tuple[float, float, int]:
    """Return the mean score of the volumes whose scan was trained on, that of the others, and the number of the others.

    >>> case = lambda number, dice: {"case": f"hippocampus_{number}", "dice": dice}
    >>> means([case("001", "0.5"), case("002", "0.7"), case("003", "0.75")], {1}, "dice")
    (0.6, 0.75, 1)
    """
    parts: dict[bool, dict[str, list[float]]] = {True: {}, False: {}}
    for row in rows:
        parts[scan_of(row["case"]) in trained].setdefault(row["case"], []).append(float(row[score]))
    of_case = {known: [fmean(values) for values in part.values()] for known, part in parts.items()}
    known, others = (fmean(of_case[known]) if of_case[known] else math.nan for known in (True, False))
    return known, others, len(of_case[False])


def differences_on_new_scans(study: Study, rows: Rows, trained: Mapping[str, Collection[int]]) -> dict[Choice, str]:
    """Return every choice's difference from the study's baseline, with its 95 % interval, on scans not trained on.

    The arguments are the study, the rows of its cases, and for each data set the scans that were trained on.
    """
    new = [row for row in rows if scan_of(row["case"]) not in trained[row["data"]]]
    scores = {choice: one for choice, one in scores_of(new, study.primary).items() if one.table.size}
    found = {}
    for choice, one in scores.items():
        baseline = (choice[0], *study.baseline)
        if choice == baseline:
            found[choice] = "baseline"
        elif baseline in scores and (table := differences(scores[baseline], one)).size:
            compared = comparison(choice, baseline, table)
            low, high = compared.interval
            found[choice] = f"{compared.difference:+.3f} ({low:+.3f} to {high:+.3f}), {counted(compared.seeds, 'seed')}"
    return found


def main() -> int:
    """Print how many pairs have the same step, and both means for each choice of each study on Task904."""
    import nibabel

    source, content, entries = real_cases("Task904_Hippocampus")
    images = {number_of(entry["image"]): source / entry["image"] for entry in entries}
    steps = {number: grey_step(np.asanyarray(nibabel.load(path).dataobj)) for number, path in sorted(images.items())}
    for first, what in ((1, "2k - 1 and 2k"), (2, "2k and 2k + 1")):
        both, alike = pairs_alike(steps, first)
        print(f"Cases {what} with a step of their own: {both} pairs, {alike} with the same step")
    tested = [scan_of(entry["image"]) for entry in content["test_labelled"]]
    print(f"The {len(tested)} test volumes are of {len(set(tested))} scans.")
    training = [scan_of(entry["image"]) for entry in content["training"]]
    trained = {name: training[: one.arguments["training"]] for name, one in DATA.items() if name.startswith("task904")}
    print(
        "| study | data | choice | score | other side was trained on | was not | volumes | difference on the latter |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for study in STUDIES.values():
        rows = [row for row in made(study, RESULTS)[1] if row["data"] in trained]
        compared = differences_on_new_scans(study, rows, trained)
        for choice in dict.fromkeys((row["data"], row["loss"], row["sampler"]) for row in rows):
            data, loss, _ = choice
            own = [row for row in rows if (row["data"], row["loss"], row["sampler"]) == choice]
            known, others, count = means(own, trained[data], study.primary)
            cells = [study.name, data, loss, study.primary, f"{known:.3f}", f"{others:.3f}", str(count)]
            print(f"| {' | '.join(cells)} | {compared.get(choice, 'no baseline')} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
