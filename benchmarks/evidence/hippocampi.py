"""Compare the scores of the hippocampi of Task904 whose other side was trained on with the scores of the others.

    python -m benchmarks.evidence.hippocampi

The cases 2k - 1 and 2k of Task904 are the two hippocampi of one scan: in all pairs whose intensities were rescaled, so
that a scan has a step between grey values of its own, both have the same step. The data's split into training and test
does not keep them together, so that about half of the test volumes are of scans of which the other side was trained on.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from statistics import fmean

from benchmarks.evidence.data import DATA
from benchmarks.evidence.datasets import real_cases
from benchmarks.evidence.report import RESULTS, made
from benchmarks.evidence.studies import STUDIES

Choice = tuple[str, str, str, str]  # study, data, loss, sampler


def scan_of(case: str) -> int:
    """Return the number of the scan that a case of Task904 is a part of.

    >>> [scan_of(f"./imagesTr/hippocampus_{number}.nii.gz") for number in ("227", "228", "229")]
    [114, 114, 115]
    """
    (number,) = re.findall(r"\d+", Path(case).name)
    return (int(number) + 1) // 2


def means(rows: Iterable[Mapping[str, str]], trained: Collection[int], score: str) -> tuple[float, float, int]:
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


def main() -> int:
    """Print both means for each choice of each study on Task904, by the study's primary score."""
    _, content, _ = real_cases("Task904_Hippocampus")
    training = [scan_of(entry["image"]) for entry in content["training"]]
    print("| study | data | choice | score | other side was trained on | was not | volumes |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for study in STUDIES.values():
        groups: dict[Choice, list[Mapping[str, str]]] = {}
        for row in made(study, RESULTS)[1]:
            if row["data"].startswith("task904"):
                groups.setdefault((study.name, row["data"], row["loss"], row["sampler"]), []).append(row)
        for (name, data, loss, _), rows in groups.items():
            known, others, count = means(rows, training[: DATA[data].arguments["training"]], study.primary)
            print(f"| {name} | {data} | {loss} | {study.primary} | {known:.3f} | {others:.3f} | {count} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
