"""The tables of a study, NAME.csv and NAME-cases.csv: rows are appended whole, and what a kill left is not read."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import functools
import io
import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence.studies import STUDIES, Run, settings

KEY = ("data", "loss", "sampler", "seed", "fold")
RUN_COLUMNS = (
    *KEY, "cases", "iou", "dice", "lesion_f1", "first_loss", "last_loss", "epochs", "steps", "train_seconds",
    "evaluate_seconds", "cpu_seconds", "threads", "device", "load", "python", "torch", "monai", "monai_iou", "commit",
    "finished", "settings",
)  # fmt: skip
CASE_COLUMNS = (
    *KEY, "patient", "case", "label", "iou", "dice", "lesion_f1", "lesions", "found", "invented", "missed",
    "reference_voxels", "predicted_voxels",
)  # fmt: skip

# Since this commit a patch is interpolated once. On Task901 that alone moved a lesion F1 by more than losses differ.
OLDEST = "13f6fce60735f3d02916970a70c463a9d9245679"
# Up to the parent of this commit, operations of torch took the sums of the losses on a CPU.
COMPILED_SUMS = "50bf58022860803c689bdd4ac33d017418d30f4a"
# Commits of rows that the history does not hold, and those that it holds for them: the first three differ from these in
# the lists of seeds alone, the others were rebased.
IN_HISTORY = {
    "00106da617": "853948d32f",
    "1f6a66b551": "3e1ea1448d",
    "382437a9b5": "9d576a4cb6",
    "3e6cb9ad89": "f8fe863696",
    "acf7567563": "f8fe863696",
}

Row = Mapping[str, Any]


def trains_as_now(commit: str) -> bool:
    """Return whether code of a commit changes patches as the present one does; False if git does not know it."""
    return is_in(OLDEST, IN_HISTORY.get(commit, commit))


@functools.cache
def is_in(commit: str, later: str) -> bool:
    """Return whether the history of a later commit contains a commit; False if git does not know one of them."""
    return git("merge-base", "--is-ancestor", commit, later) is not None


def git(*words: str) -> str | None:
    """Return what git prints about this repository; None if it fails or is not there."""
    try:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file, which ends with the process whatever ends that; yield whether it could be had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def append(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Append rows to a CSV under a lock and in one write, behind the last complete line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.seek(0)
        kept = stream.read()
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        if b"\n" not in kept:
            writer.writeheader()
        writer.writerows(rows)
        stream.truncate(kept.rfind(b"\n") + 1)
        stream.write(text.getvalue().encode())
        stream.flush()
        os.fsync(stream.fileno())


def key_of(row: Row) -> tuple[str, str, str, int, int]:
    """Return the run that a row belongs to."""
    return (row["data"], row["loss"], row["sampler"], int(row["seed"]), int(row["fold"]))


def read(path: Path) -> list[dict[str, str]]:
    """Return the complete rows of a CSV; none if there is no such file."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))


def runs_of(results: Path, study: str) -> list[dict[str, str]]:
    """Return a row for every finished run of a study, in the order of finishing."""
    return list({key_of(row): row for row in read(results / f"{study}.csv")}.values())


def cases_of(results: Path, study: str) -> list[dict[str, str]]:
    """Return a row for every case and label of every finished run, those of its last training if it was made again.

    They end the run's rows: they were appended at once, hold no case and label twice, and the cases that its row tells.
    What a run left that never finished is not among them; one that ended between its two tables has to be made again.
    """
    counts = {key_of(row): int(row["cases"] or 0) for row in runs_of(results, study)}
    rows = read(results / f"{study}-cases.csv")
    first: dict[tuple[str, str, str, int, int], int] = {}  # place of the first row that is taken
    seen: dict[tuple[str, str, str, int, int], dict[str, set[str]]] = {key: {} for key in counts}  # labels by case
    taken = []
    for place, row in reversed(list(enumerate(rows))):
        key, case, label = key_of(row), row["case"], row["label"]
        if key not in counts or first.get(key, place + 1) != place + 1:
            continue
        is_one_too_many = case not in seen[key] and 0 < counts[key] <= len(seen[key])
        if not is_one_too_many and label not in seen[key].get(case, ()):
            seen[key].setdefault(case, set()).add(label)
            first[key] = place
            taken.append(row)
    return taken[::-1]


def missing(results: Path, runs: Iterable[Run]) -> list[Run]:
    """Return the runs that no table has yet, or only as other settings made them."""
    runs = list(runs)
    done = {
        study: {(key_of(row), row["settings"]) for row in runs_of(results, study)}
        for study in {run.study for run in runs}
    }
    return [run for run in runs if (run.key, settings(run)) not in done[run.study]]


def copy_runs_of_other_studies(results: Path, runs: Iterable[Run]) -> None:
    """Append the runs that another study has made by the same overrides, with all their cases and from a clean commit.

    The commit may be an older one that trains as the present one does; the rows name it.
    """
    todo = missing(results, runs)
    for study in STUDIES:
        made = {key_of(row): row for row in runs_of(results, study) if not row["commit"].endswith("+")}
        same = [run for run in todo if run.key in made and made[run.key]["settings"] == settings(run)]
        same = [run for run in same if trains_as_now(made[run.key]["commit"])]
        cases = cases_of(results, study) if same else []
        for run in missing(results, same):
            own = [row for row in cases if key_of(row) == run.key]
            if len({row["case"] for row in own}) == int(made[run.key]["cases"]):
                add_run(results, run, made[run.key], own)


def add_run(results: Path, run: Run, summary: Row, cases: Iterable[Row]) -> None:
    """Append a finished run: its cases first, so that a run in NAME.csv has them all."""
    key = dict(zip(KEY, run.key, strict=True))
    append(results / f"{run.study}-cases.csv", CASE_COLUMNS, [{**key, **row} for row in cases])
    append(results / f"{run.study}.csv", RUN_COLUMNS, [{**key, **summary, "settings": settings(run)}])
