"""`monai-iou init` and `describe`: a copy of the shipped bundle, and its metadata."""

from __future__ import annotations

from pathlib import Path

import click

from .command_lines import bundle_command
from .errors import reported
from .options import FOLDER, check_folder

__all__ = ["describe", "init"]


@click.command()
@click.argument("folder", type=FOLDER, metavar="DIR")
def init(folder: Path) -> int:
    """Copy the shipped bundle to the new folder DIR, where you can edit it and train it on your data."""
    from monai_iou.bundle_files import copy_bundle

    with reported():
        target = copy_bundle(folder, "DIR")
    click.echo(f"Copied the bundle to {target}. Train it on a dataset folder:")
    click.echo(bundle_command([(target / "configs" / "train.json").as_posix()], "YOUR_FOLDER"))
    return 0


@click.command()
@click.argument("bundle", type=FOLDER, metavar="DIR")
def describe(bundle: Path) -> int:
    """Write the trained model's channels, classes and input sizes into the metadata of the bundle in DIR.

    The shipped configs/metadata.json names one channel, one label, and input sizes that are multiples of 16. The model
    zoo's checks, MONAI Label and MONAI Deploy read that file.
    """
    check_folder("DIR", bundle, "the folder of a trained bundle")
    from monai_iou.workflow.metadata import describe_model

    with reported():
        path = describe_model(bundle)
    click.echo(f"Written: {path}")
    return 0
