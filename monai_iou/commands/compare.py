"""`monai-iou compare`."""

from __future__ import annotations

from pathlib import Path

import click

from .errors import reported
from .options import FOLDER, is_folder, output_option

__all__ = ["compare"]


@click.command()
@click.argument("folders", nargs=-1, required=True, type=FOLDER, metavar="BASELINE OTHER...")
@output_option(default="comparison", help="Folder for the tables and the page.")
@click.option(
    "--metrics",
    metavar="iou,hd95_mm",
    help="Scores of cases.csv to compare (no counts, volumes or columns of a challenge), in addition to that of "
    "--primary. Default: all for which higher or lower is better, except rq.",
)
@click.option(
    "--primary",
    metavar="METRIC",
    help="The metric that decides; the others are exploratory. Default: iou, or the first of --metrics without iou.",
)
def compare(folders: tuple[Path, ...], output: Path, metrics: str | None, primary: str | None) -> int:
    """Compare evaluated folders in pairs, case by case.

    Writes comparison.csv, paired.csv and comparison.html: mean paired differences with 95 % bootstrap intervals and
    permutation tests. The primary metric's p-values are corrected (Holm) over labels and pairs of folders. With three
    or more folders, ranking.csv ranks them.
    """
    if len(folders) < 2:
        message = f"Expected two or more evaluated folders, but got {len(folders)}: name a baseline and another one."
        raise click.UsageError(message)
    for folder in folders:
        if not is_folder(folder):
            message = f"Expected an output folder of `monai-iou evaluate`, but got `{folder}`: check the path."
            raise click.UsageError(message)
    from monai_iou.console import print_comparison, say
    from monai_iou.evaluation.compare import METRICS, UnknownMetricError, compare_folders

    with reported(UnknownMetricError):
        rows = compare_folders(
            folders,
            output,
            METRICS if metrics is None else tuple(metric.strip() for metric in metrics.split(",")),
            primary,
            lambda text: say(f"Note: {text}", error=True),
        )
    print_comparison(rows, output)
    return 0
