"""Which code made the runs: docs/results/commits.md and the list in docs/results.md, from the tables and the history.

Both need the history of the repository, and are left as they are where git does not have it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.evidence.studies import STUDIES, Study
from benchmarks.evidence.tables import COMPILED_SUMS, IN_HISTORY, OLDEST, git, is_in, key_of, runs_of, trains_as_now

Row = Mapping[str, str]
LIST = re.compile(r"(<!-- commits -->\n).*?(<!-- end -->)", re.DOTALL)
ONCE, TWICE = "once", "twice"
ELSEWHERE = "not ours"
HEAD = f"""# The commits of the trainings

Which code made each run of the [results](../results.md). This page is generated from the tables by
`python -m benchmarks.evidence.report`.

- **Patches**: since {OLDEST[:10]}, affine and elastic changes of a patch are interpolated once, and before it twice.
  "{ELSEWHERE}" means nnU-Net and the bare loop, which have transforms of their own, or none.
- **Sums**: since {COMPILED_SUMS[:10]}, compiled loops take the sums of our losses on a CPU, and before it
  operations of torch. The two round differently in the last digit.
- A commit in brackets stands in the history of this repository for the one that the rows name: that one was rebased,
  or differs in nothing but the lists of seeds in `benchmarks/evidence/studies.py`.
"""


def history_is_here() -> bool:
    """Return whether git knows the commits; it does not in a shallow clone or in an archive of the files."""
    return is_in(OLDEST, "HEAD") and git("rev-parse", "--is-shallow-repository") == "false\n"


def page(results: Path) -> str:
    """Return docs/results/commits.md: for every study, which seeds of which data and choices a commit made.

    Raises:
        ValueError: if the history does not hold a commit that the rows name.
    """
    parts = [HEAD]
    for study in STUDIES.values():
        if runs := _runs(study, results):
            parts.append(f"## {study.name}\n\n{_table(study, runs)}\n")
    return "\n".join(parts)


def fill_list(text: str, results: Path) -> str:
    """Return the page of results with its list of the studies whose patches were interpolated once, twice or both."""
    return LIST.sub(lambda found: found[1] + _list(results) + found[2], text)


def _runs(study: Study, results: Path) -> list[Row]:
    """Return the rows of the study's runs, after a look at their commits."""
    planned = {run.key for run in study.runs()}
    runs: list[Row] = [row for row in runs_of(results, study.name) if key_of(row) in planned]
    unknown = {row["commit"] for row in runs if not is_in(IN_HISTORY.get(row["commit"], row["commit"]), "HEAD")}
    if unknown:
        message = (
            f"Expected rows of {study.name} by commits that the history holds, but got {', '.join(sorted(unknown))}: "
            "name for each a commit with the same code in IN_HISTORY of benchmarks/evidence/tables.py."
        )
        raise ValueError(message)
    return runs


def _table(study: Study, runs: Sequence[Row]) -> str:
    heads = ["commit", "data", "seeds", "runs", "choices", "patches", "sums"]
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join(["---"] * len(heads)) + " |"]
    for commit in dict.fromkeys(row["commit"] for row in runs):
        known = IN_HISTORY.get(commit, commit)
        name = commit if known == commit else f"{commit} ({known})"
        sums = "compiled" if is_in(COMPILED_SUMS, known) else "torch"
        for data in study.data:
            rows = [row for row in runs if (row["commit"], row["data"]) == (commit, data)]
            for (seeds, patches), choices in _by_seeds(rows).items():
                count = sum((row["loss"], row["sampler"]) in choices for row in rows)
                cells = [name, data, seeds, str(count), _names(study, choices), patches, sums]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _by_seeds(rows: Iterable[Row]) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """Return the choices of the rows by their seeds, as text, and by how their patches were interpolated."""
    seeds: dict[tuple[str, str], set[str]] = {}
    patches: dict[tuple[str, str], str] = {}
    for row in rows:
        choice = (row["loss"], row["sampler"])
        seeds.setdefault(choice, set()).add(row["seed"])
        patches[choice] = _patches(row)  # the rows are of one commit
    grouped: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for choice, found in seeds.items():
        grouped.setdefault((", ".join(sorted(found, key=int)), patches[choice]), []).append(choice)
    return grouped


def _names(study: Study, choices: Sequence[tuple[str, str]]) -> str:
    if set(choices) == set(study.choices):
        return "all"
    several = len({sampler for _, sampler in study.choices}) > 1
    return "; ".join(
        f"{loss}, {sampler}" if several else loss for loss, sampler in study.choices if (loss, sampler) in choices
    )


def _patches(row: Row) -> str:
    """Return how code interpolated the patches of a run, if they are ours."""
    if row["sampler"] == "own" and row["loss"] != "ours":
        return ELSEWHERE
    return ONCE if trains_as_now(row["commit"]) else TWICE


def _list(results: Path) -> str:
    """Return the studies by how their patches were interpolated, and what has seeds of both kinds, as Markdown."""
    studies: dict[str, list[str]] = {TWICE: [], ONCE: []}
    both = ""
    for study in STUDIES.values():
        runs = [row for row in _runs(study, results) if _patches(row) != ELSEWHERE]
        once = sum(_patches(row) == ONCE for row in runs)
        if 0 < once < len(runs):
            both += f"  - `{study.name}`: {once} of {len(runs)} runs{_mixed(study, runs)}\n"
        elif runs:
            studies[ONCE if once else TWICE].append(f"`{study.name}`")
    lines = [f"- Interpolated {kind}: {', '.join(names)}.\n" for kind, names in studies.items() if names]
    title = "- Once in some runs, which are named where the other seeds of the same choice were interpolated twice:\n"
    return "".join(lines) + (title + both if both else "")


def _mixed(study: Study, runs: Sequence[Row]) -> str:
    """Return which seeds were interpolated once, of the choices that have others that were interpolated twice."""
    kinds: dict[tuple[str, str, str], dict[str, set[str]]] = {}
    for row in runs:
        choice = kinds.setdefault((row["data"], row["loss"], row["sampler"]), {ONCE: set(), TWICE: set()})
        choice[_patches(row)].add(row["seed"])
    counts: dict[tuple[str, str], int] = {}
    for (data, _, _), seeds in kinds.items():
        if seeds[ONCE] and seeds[TWICE]:
            place = (data, ", ".join(sorted(seeds[ONCE], key=int)))
            counts[place] = counts.get(place, 0) + 1
    data_of: dict[tuple[str, int], list[str]] = {}
    for data in study.data:
        for (place, seeds_there), count in counts.items():
            if place == data:
                data_of.setdefault((seeds_there, count), []).append(data)
    parts = [
        f"seeds {seeds_there} of {count} choice{'' if count == 1 else 's'}"
        + (f" on {'; '.join(names)}" if len(study.data) > 1 else "")
        for (seeds_there, count), names in data_of.items()
    ]
    return f" ({', and '.join(parts)})" if parts else ""
