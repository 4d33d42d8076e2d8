"""What the `monai-iou` command shows of its work: progress and tables."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich import progress as bars
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from monai_iou.demo import DemoResult
    from monai_iou.evaluation.results import Evaluation, Progress

__all__ = ["print_demo", "print_evaluation", "print_tables", "progress"]


def print_evaluation(done: Evaluation, output: Path) -> None:
    """Say what was evaluated, what failed and why, and the mean IoU of every label."""
    old = f" ({done.reused} from before)" if done.reused else ""
    click.echo(f"Evaluated {len(done.records)} of {len(done.pairs)} cases{old}.")
    for note in done.notes:
        click.echo(f"Note: {note}")
    for failure in done.failures:
        click.echo(f"Failed: {failure['case']}: {failure['reason']}", err=True)
    for label, scores in done.summary["labels"].items():
        iou, bounds = scores["iou"]["mean"], scores["iou"]["mean_interval"]
        interval = f" (95 % interval {bounds[0]:.3f} to {bounds[1]:.3f})" if bounds else ""
        click.echo(f"Label {label}: mean IoU {'undefined' if iou is None else f'{iou:.3f}'}{interval}")
    click.echo(f"Report: {output / 'report.html'}")


@contextmanager
def progress() -> Iterator[Callable[[Progress], None]]:
    """A bar with the time left on a terminal, a line for each case elsewhere."""
    if not sys.stderr.isatty():
        yield lambda step: click.echo(
            f"{step.stage} {step.done}/{step.total}: {step.case}{f' failed: {step.reason}' if step.reason else ''}",
            err=True,
        )
        return
    columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), bars.MofNCompleteColumn())
    times = (bars.TimeElapsedColumn(), bars.TimeRemainingColumn())
    with bars.Progress(*columns, *times, console=Console(stderr=True)) as bar:
        names = {"labels": "Reading labels", "cases": "Scoring cases", "training": "Reading training cases"}
        tasks: dict[str, Any] = {}

        def show(step: Progress) -> None:
            if step.stage not in tasks:
                tasks[step.stage] = bar.add_task(names[step.stage], total=step.total)
            bar.update(tasks[step.stage], completed=step.done)

        yield show


def print_tables(tables: list[Table]) -> None:
    """Print tables, in a log without a terminal's width as wide as their lines."""
    console = Console()
    wide = console if console.is_terminal else Console(width=220)
    for table in tables:
        wide.print(table)


def print_demo(result: DemoResult) -> None:
    """Print the scores of the held-out volumes and where everything is."""
    table = Table("held-out volume", "IoU", "Dice", "untrained IoU", "untrained Dice")
    for row in result.scores:
        scores = (row.iou, row.dice, row.untrained_iou, row.untrained_dice)
        table.add_row(row.case, *(f"{score:.3f}" for score in scores))
    Console().print(table)
    click.echo(f"Mean IoU {result.mean_iou:.3f}, mean Dice {result.mean_dice:.3f}, {result.seconds:.0f} s in all.")
    click.echo(f"Masks: {result.masks}")
    click.echo(f"The same training by MONAI's own command:\n{result.command}")
