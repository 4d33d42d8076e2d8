"""What the `monai-iou` command shows of its work: progress and tables.

Nothing from the package is imported at the top: the command loads this file by its path to name a wrong option at once.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.table import Table

    from monai_iou.demo import DemoResult
    from monai_iou.evaluation.request import Progress
    from monai_iou.evaluation.results import Evaluation

__all__ = ["print_comparison", "print_demo", "print_evaluation", "print_tables", "printable", "progress", "say"]

MANY_LABELS = 12
NOTED_ONE_BY_ONE = 3  # cases of which the same is said
STAGES = {"cases": "Scoring cases", "references": "Reading references", "training": "Reading training cases"}


def printable(text: str) -> str:
    r"""Text with every character escaped that would steer a terminal instead of being shown.

    File names may hold escape sequences, line breaks, marks that turn the direction of writing, and bytes that are no
    text. Line breaks of our own are written by separate calls.

    >>> printable("a\x1b[31mb\rc\n") == "a\\x1b[31mb\\rc\\n"
    True
    """
    shown = (c if unicodedata.category(c) not in {"Cc", "Cf", "Cs", "Zl", "Zp"} else _escaped(c) for c in text)
    return "".join(shown)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")


def say(text: str, error: bool = False) -> None:
    """Print a line, on stderr if it is an error; the one way that this command writes text."""
    stream = sys.stderr if error else sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    click.echo(printable(text).encode(encoding, "backslashreplace").decode(encoding), err=error)


def print_evaluation(done: Evaluation, output: Path) -> None:
    """Say what was evaluated, what failed and why, and the means of every label, with and without what is missing."""
    old = f" ({done.reused} from before)" if done.reused else ""
    say(f"Evaluated {len(done.records)} of {len(done.pairs)} cases{old}.")
    for note in _grouped(done.notes, {pair.case for pair in done.pairs}):
        say(f"Note: {note}")
    for failure in done.failures:
        say(f"Failed: {failure['case']}: {failure['reason']}", error=True)
    labels, titles = done.summary["labels"], done.summary["titles"]
    for label, scores in list(labels.items())[:MANY_LABELS]:
        say(f"Label {titles[label]}: mean IoU {_mean(scores['iou'])}")
        distance = scores["hd95_mm"]
        if distance["n_penalty"] != distance["n_defined"]:
            say(f"Label {titles[label]}: mean HD95 {_both(distance, 2, ' mm')}")
    for label, maps in list(done.summary["probabilities"].items())[:MANY_LABELS]:
        if maps["best_iou"] is not None:
            best, half, ece = (_number(maps[name], d) for name, d in (("best_iou", 3), ("iou_at_half", 3), ("ece", 4)))
            at = f"{maps['best_threshold']:g}"
            say(f"Label {titles[label]}: best mean IoU {best} at {at}, {half} at 0.5, ECE {ece}")
    if len(labels) > MANY_LABELS:
        say(f"... and {len(labels) - MANY_LABELS} more labels: see the report.")
    say(f"Report: {output / 'report.html'}")


def _grouped(notes: Sequence[str], cases: Collection[str]) -> list[str]:
    """The notes with one for all cases of which the same is said, but for names and numbers; the report has each.

    >>> cases = [f"c{i}" for i in range(4)]
    >>> _grouped([f"{case}: `{case}.nii`: off by {i - 1} mm." for i, case in enumerate(cases)], cases)
    ['in 4 cases, such as c0: `c0.nii`: off by -1 mm. (the report lists each)']
    """
    alike: dict[str, list[tuple[str, str]]] = {}
    for note in notes:
        case, _, said = note.partition(": ")
        kind = re.sub(r"`[^`]*`|[+-]?\d[\d.e+-]*", "#", said) if case in cases else note
        alike.setdefault(kind, []).append((case, note))
    shown: list[str] = []
    for same in alike.values():
        count = len({case for case, _ in same})
        one = f"in {count} cases, such as {same[0][1]} (the report lists each)"
        shown += [one] if count > NOTED_ONE_BY_ONE else [note for _, note in same]
    return shown


def _number(value: float | None, digits: int = 3, unit: str = "") -> str:
    return "undefined" if value is None else f"{value:.{digits}f}{unit}"


def _mean(score: Mapping[str, Any]) -> str:
    """A mean with its interval, or both means where something is missing, of which one has the interval."""
    bounds = score["mean_interval"]
    interval = f" (95 % interval {bounds[0]:.3f} to {bounds[1]:.3f})" if bounds else ""
    if score["n_penalty"] == score["n_defined"]:
        return _number(score["mean"]) + interval
    return _both(score, 3, interval=interval)


def _both(score: Mapping[str, Any], digits: int, unit: str = "", interval: str = "") -> str:
    penalty, defined = (_number(score[name], digits, unit) for name in ("mean_penalty", "mean_defined"))
    # The main mean, whose interval it is, has as many cases as the one or the other.
    own, other = (interval, "") if score["n"] == score["n_penalty"] else ("", interval)
    from monai_iou.tables import counted  # noqa: PLC0415 - see above

    lacking = score["n_penalty"] - score["n_defined"]
    scores, them = counted(lacking, "undefined or missing score"), "it" if lacking == 1 else "them"
    return f"{penalty}{own}, counting {scores} as the worst; {defined}{other} without {them}"


def print_comparison(rows: Sequence[Mapping[str, Any]], output: Path) -> None:
    """Say every difference, with its interval and p-value, and where the page is."""
    for row in rows:
        if row["difference"] is None:
            continue
        (first, second), (label, metric) = row["names"], row["titles"]
        few = f"no interval with fewer than 8 {row['unit']}"
        bounds = few if row["low"] is None else f"{row['low']:+.4f} to {row['high']:+.4f}"
        p = "no p-value for a single case"
        if row["p"] is not None:
            primary = row["family"] == "primary"
            p = "p = " + (f"{row['p_holm']:.4g} corrected" if primary else f"{row['p']:.4g} exploratory")
        what = f"{second} against {first}, label {label}, {metric}"
        say(f"{what}: {row['difference']:+.4f} ({bounds}), {p}")
    say(f"Report: {output / 'comparison.html'}")


@contextmanager
def progress() -> Iterator[Callable[[Progress], None]]:
    """A bar with the time left on a terminal, a line for each case elsewhere."""
    from monai_iou.streams import is_terminal  # noqa: PLC0415 - see above

    if not is_terminal(sys.stderr):
        yield lambda step: say(
            f"{STAGES[step.stage]} {step.done}/{step.total}: {step.case}"
            f"{f' failed: {step.reason}' if step.reason else ''}",
            error=True,
        )
        return
    from rich import progress as bars
    from rich.console import Console

    columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), bars.MofNCompleteColumn())
    times = (bars.TimeElapsedColumn(), bars.TimeRemainingColumn())
    with bars.Progress(*columns, *times, console=Console(stderr=True)) as bar:
        tasks: dict[str, Any] = {}

        def show(step: Progress) -> None:
            if step.stage not in tasks:
                tasks[step.stage] = bar.add_task(STAGES[step.stage], total=step.total)
            bar.update(tasks[step.stage], completed=step.done)

        yield show


def print_tables(tables: list[Table]) -> None:
    """Print tables, in a log without a terminal's width as wide as their lines."""
    from rich.console import Console

    console = Console()
    wide = console if console.is_terminal else Console(width=220)
    for table in tables:
        wide.print(table)


def print_demo(result: DemoResult) -> None:
    """Print the scores of the held-out volumes and where everything is."""
    from rich.console import Console
    from rich.table import Table

    table = Table("held-out volume", "IoU", "Dice", "untrained IoU", "untrained Dice")
    for row in result.scores:
        scores = (row.iou, row.dice, row.untrained_iou, row.untrained_dice)
        table.add_row(row.case, *(f"{score:.3f}" for score in scores))
    Console().print(table)
    say(f"Mean IoU {result.mean_iou:.3f}, mean Dice {result.mean_dice:.3f}, {result.seconds:.0f} s in all.")
    say(f"Masks: {result.masks}")
    say("The same training by MONAI's own command, which trains again and replaces the model:")
    click.echo(result.command)
    say(f"Report: {result.report}")
    say(f"Curves: {result.curves}")
