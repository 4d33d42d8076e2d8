"""Write the tables and pictures of docs/results.md from the studies' CSV files.

    python -m benchmarks.evidence.report
    python -m benchmarks.evidence.report --study compound --results runs/evidence-quick    # print one study's table
    python -m benchmarks.evidence.report --study imbalance --volumes    # what each run marked and cost
    python -m benchmarks.evidence.report --study real --patients        # the score of each patient
    python -m benchmarks.evidence.report --study longer --baseline dice+ce voxels    # compared with another choice
    python -m benchmarks.evidence.report --study imbalance --seeds 0 1 2             # of these seeds alone

The page's prose is written by hand; what stands between the lines `<!-- study: NAME -->` or `<!-- commits -->` and
`<!-- end -->` is not, nor is docs/results/commits.md.
A study without a row is named there with its command. Rows that other settings made than those the study has now are
left out, everywhere; `--any-settings` prints them too.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.evidence.commits import fill_list, history_is_here
from benchmarks.evidence.commits import page as commits_page
from benchmarks.evidence.curves import Point, draw_curves
from benchmarks.evidence.pictures import Line, draw
from benchmarks.evidence.statistics import FEWEST_SEEDS, Choice, Comparison, Scores, compare, interval_of, scores_of
from benchmarks.evidence.studies import STUDIES, Study, settings
from benchmarks.evidence.tables import cases_of, key_of, runs_of

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "results.md"
RESULTS = ROOT / "docs" / "results"
TITLES = {"iou": "IoU", "dice": "Dice", "lesion_f1": "lesion F1"}
Row = Mapping[str, str]
BLOCK = re.compile(r"(<!-- study: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(page: str, results: Path) -> str:
    """Return the page with every study's block made from its tables."""
    return BLOCK.sub(lambda found: found[1] + block(STUDIES[found[2]], results) + found[3], page)


def block(study: Study, results: Path) -> str:
    """Return one study as Markdown: its question, its state, its table and its picture."""
    runs, _ = made(study, results)
    planned = len(study.runs())
    command = f"```sh\npython -m benchmarks.evidence --study {study.name} --results runs/again\n```\n"
    if not runs:
        return f"{study.question} Not run yet ({planned} runs):\n\n{command}"
    text = f"{study.question} {len(runs)} of {planned} runs are done.\n\n{command}\n{table(study, results)}\n"
    text += f"\n![{study.question}](results/{study.name}.svg)\n"
    if study.amounts:
        text += f"\n![The scores over the share of foreground](results/{study.name}-curves.svg)\n"
    return text + f"\n{circumstances(runs)} [Commits](results/commits.md#{study.name}).\n"


def made(study: Study, results: Path, *, any_settings: bool = False) -> tuple[Sequence[Row], Sequence[Row]]:
    """Return the rows of the study's runs, and of their cases, without those that other settings made than it has now.

    `any_settings` takes these as well.
    """
    planned = {run.key: settings(run) for run in study.runs()}
    runs = [row for row in runs_of(results, study.name) if key_of(row) in planned]
    kept = [row for row in runs if any_settings or row["settings"] == planned[key_of(row)]]
    keys = {key_of(row) for row in kept}
    return kept, [row for row in cases_of(results, study.name) if key_of(row) in keys]


def analysed(
    study: Study, results: Path, *, any_settings: bool = False
) -> tuple[dict[Choice, Scores], dict[Choice, Comparison]]:
    """Return scores and comparisons of every choice in the study's own order; choices without a seed are left out."""
    found = scores_of(made(study, results, any_settings=any_settings)[1], study.primary)
    order = [(data, loss, sampler) for data in study.data for loss, sampler in study.choices]
    scores = {choice: found[choice] for choice in order if choice in found and found[choice].table.size}
    comparisons = compare(scores, {data: (data, *study.baseline) for data in study.data}, len(order) - len(study.data))
    return scores, {one.choice: one for one in comparisons}


def table(study: Study, results: Path, *, any_settings: bool = False) -> str:
    """Return the study's table as Markdown; the primary score decides, the others are shown."""
    scores, comparisons = analysed(study, results, any_settings=any_settings)
    cases = made(study, results, any_settings=any_settings)[1]
    others = {name: scores_of(cases, name) for name in TITLES if name != study.primary}
    lesions = _lesions(cases, scores)
    title = TITLES[study.primary]
    heads = [*_columns(study), f"{title} of each seed", "mean", "spread of seeds", *(TITLES[name] for name in others)]
    heads += ["lesions found", "false lesions per case"] if study.primary != "dice" else []
    heads += [f"{title} - baseline (95 %)", "effect", "p, Holm", "verdict"]
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join(["---"] * len(heads)) + " |"]
    for choice, one in scores.items():
        seeds = ", ".join(f"{value:.3f}" for value in one.table.mean(axis=1))
        cells = [*_names(study, choice), seeds, f"{one.mean:.3f}", _number(one.spread)]
        cells += [_number(found[choice].mean) for found in others.values()]
        cells += lesions[choice] if study.primary != "dice" else []
        word = "baseline" if choice[1:] == study.baseline else "no baseline yet"
        lines.append("| " + " | ".join([*cells, *_difference(comparisons.get(choice), word)]) + " |")
    return "\n".join(lines)


def _lesions(cases: Sequence[Mapping[str, str]], scores: Mapping[Choice, Scores]) -> dict[Choice, list[str]]:
    """Return, for every choice, the share of the reference's lesions that were found, and the false ones per case.

    They are of the seeds that the scores are of, and of all labels together.
    """
    sums: dict[Choice, list[int]] = {}
    tested: dict[Choice, set[tuple[str, str, str]]] = {}  # a case has a row for each label
    for row in cases:
        choice = (row["data"], row["loss"], row["sampler"])
        if choice not in scores or int(row["seed"]) not in scores[choice].seeds:
            continue
        tested.setdefault(choice, set()).add((row["seed"], row["fold"], row["case"]))
        one = sums.setdefault(choice, [0, 0, 0])
        for index, value in enumerate((row["found"], row["lesions"], row["invented"])):
            one[index] += int(value)
    return {
        choice: [f"{100 * found / lesions:.0f} %" if lesions else "", f"{false / len(tested[choice]):.1f}"]
        for choice, (found, lesions, false) in sums.items()
    }


def _columns(study: Study) -> list[str]:
    many = {"data": len(study.data) > 1, "choice": True, "crops": _has_crops(study)}
    return [name for name, shown in many.items() if shown]


def _has_crops(study: Study) -> bool:
    return len({sampler for _, sampler in study.choices}) > 1


def _names(study: Study, choice: Choice) -> list[str]:
    kept = [len(study.data) > 1, True, _has_crops(study)]
    return [name for name, shown in zip(choice, kept, strict=True) if shown]


def _difference(one: Comparison | None, otherwise: str) -> list[str]:
    if one is None:
        return [otherwise, "", "", ""]
    low, high = one.interval
    p = "" if one.p_holm is None else f"{one.p_holm:.3f}" if one.p_holm >= 0.0005 else "below 0.001"
    start, end = one.effect_interval
    effect = "" if math.isnan(one.effect) else f"{one.effect:+.2f} ({start:+.2f} to {end:+.2f})"
    return [f"{one.difference:+.3f} ({low:+.3f} to {high:+.3f})", effect, p, one.verdict]


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"


def volumes(study: Study, results: Path, *, any_settings: bool = False) -> str:
    """Return every run's scores and times, and over all cases the lesions found and the marked share of the volume."""
    runs, cases = made(study, results, any_settings=any_settings)
    sums: dict[tuple[str, str, str, int, int], list[int]] = {}
    for row in cases:
        added = sums.setdefault(key_of(row), [0, 0, 0])
        for place, name in enumerate(("predicted_voxels", "reference_voxels", "found")):
            added[place] += int(row[name])
    heads = ["data", "loss", "crops", "seed", "fold", "IoU", "lesion F1", "found", "marked / reference"]
    heads += ["steps", "CPU s", "training s", "other s"]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for row in runs:
        marked, reference, found = sums[key_of(row)]
        scores = [f"{float(row[name]):.3f}" for name in ("iou", "lesion_f1")]
        times = [row[name] for name in ("steps", "cpu_seconds", "train_seconds", "evaluate_seconds")]
        cells = [*map(str, key_of(row)), *scores, str(found), f"{marked / reference:.2f}", *times]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def patients(study: Study, results: Path, *, any_settings: bool = False) -> str:
    """Return the study's score of every patient, with each seed and their mean."""
    title = TITLES[study.primary]
    heads = f"| data | choice | crops | patient | {title} of each seed | mean |"
    lines = [heads, "| --- " * 6 + "|"]
    for choice, one in analysed(study, results, any_settings=any_settings)[0].items():
        for name, values in zip(one.patients, one.table.T, strict=True):
            cells = [*choice, name, ", ".join(f"{value:.3f}" for value in values), f"{values.mean():.3f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(study: Study, results: Path) -> str:
    """Return the study's picture as SVG text."""
    scores, comparisons = analysed(study, results)
    lines = []
    for choice, one in scores.items():
        found = comparisons.get(choice)
        difference = None if found is None else (found.difference, *found.interval)
        lines.append(Line(", ".join(_names(study, choice)), one.table.mean(axis=1).tolist(), difference))
    return draw(lines, TITLES[study.primary], study.baseline[0])


def curves(study: Study, results: Path) -> str:
    """Return the scores over the study's amounts as SVG text."""
    panels: dict[str, dict[str, list[Point]]] = {}
    for name in ("iou", "lesion_f1"):
        scores = scores_of(made(study, results)[1], name)
        panel = panels[TITLES[name]] = {}
        for loss in study.losses:
            found = [
                Point(amount, scores[choice].mean, _band(scores[choice]))
                for data, amount in sorted(zip(study.data, study.amounts, strict=True), key=lambda pair: pair[1])
                if (choice := (data, loss, study.samplers[0])) in scores and scores[choice].table.size
            ]
            if found:
                panel[loss] = found
    return draw_curves(panels, "foreground, % of the voxels")


def _band(scores: Scores) -> tuple[float, float] | None:
    """Return the interval of the mean, none for few seeds: it would leave out how they differ."""
    return interval_of(scores.table) if len(scores.seeds) >= FEWEST_SEEDS else None


def pictures(study: Study, results: Path) -> dict[str, str]:
    """Return the pictures of a study by the names of their files; none if it has no row."""
    if not made(study, results)[0]:
        return {}
    drawn = {f"{study.name}.svg": picture(study, results)}
    return drawn | ({f"{study.name}-curves.svg": curves(study, results)} if study.amounts else {})


def circumstances(runs: Sequence[Mapping[str, str]]) -> str:
    """Return what the runs shared, in one paragraph."""

    def every(column: str) -> str:
        return ", ".join(sorted({row[column] for row in runs}))

    def numbers(column: str) -> str:
        values = sorted({row[column] for row in runs if row[column]}, key=float)
        return " to ".join(dict.fromkeys((values[0], values[-1]))) if values else ""

    seeds: dict[Choice, set[str]] = {(row["data"], row["loss"], row["sampler"]): set() for row in runs}
    for row in runs:
        seeds[row["data"], row["loss"], row["sampler"]].add(row["seed"])
    few = [len(found) < FEWEST_SEEDS for found in seeds.values()]
    warning = f" **Fewer than {FEWEST_SEEDS} seeds: nothing here decides anything.**" if all(few) else ""
    if any(few) and not all(few):
        warning = f" **Rows with fewer than {FEWEST_SEEDS} seeds decide nothing.**"
    hours = sum(float(row["cpu_seconds"]) for row in runs) / 3600
    threads = f"{numbers('threads')} thread" + ("" if numbers("threads") == "1" else "s")
    machine = f"{threads} on {every('device')}, load {numbers('load')}, {hours:.1f} hours of CPU time in all"
    versions = f"torch {every('torch')}, MONAI {every('monai')}, Python {every('python')}"
    epochs = f"{numbers('epochs')} epochs, " if any(row["epochs"] for row in runs) else ""
    trained = f"{epochs}{numbers('steps')} steps, {numbers('cases')} test cases a run"
    return f"{trained}; {machine}; {versions}.{warning}"


def main(arguments: list[str] | None = None) -> int:
    """Write the page and the pictures, or print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=list(STUDIES), metavar="NAME", help="print its table and write nothing")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--volumes",
        action="store_true",
        help="with --study: what each run found, marked, cost",
    )
    kind.add_argument("--patients", action="store_true", help="with --study: each patient's score")
    parser.add_argument("--baseline", nargs=2, metavar=("LOSS", "SAMPLER"), help="with --study: what to compare with")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="with --study: the seeds to take")
    parser.add_argument("--any-settings", action="store_true", help="with --study: rows that other settings made, too")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.study:
        shown = volumes if options.volumes else patients if options.patients else table
        study = STUDIES[options.study]
        if options.baseline:
            if tuple(options.baseline) not in study.choices:
                parser.error(f"--baseline must be a choice of {study.name}, but is {' '.join(options.baseline)}")
            study = replace(study, baseline=tuple(options.baseline))
        if options.seeds:
            study = replace(study, seeds=tuple(options.seeds), more_seeds={})
        print(shown(study, options.results, any_settings=options.any_settings))
        return 0
    if options.volumes or options.patients or options.baseline or options.seeds or options.any_settings:
        parser.error("--volumes, --patients, --baseline, --seeds and --any-settings need --study NAME")
    for study in STUDIES.values():
        for name, text in pictures(study, options.results).items():
            (options.results / name).write_text(text, encoding="utf-8")
    text = fill(PAGE.read_text(encoding="utf-8"), options.results)
    if history_is_here():
        text = fill_list(text, options.results)
        (options.results / "commits.md").write_text(commits_page(options.results), encoding="utf-8")
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
