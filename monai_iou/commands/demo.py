"""`monai-iou demo`."""

from __future__ import annotations

from pathlib import Path

import click

from .errors import reported
from .options import output_option

__all__ = ["demo"]


@click.command()
@output_option(default="demo", help="New folder for the demo.")
def demo(output: Path) -> int:
    """Train, evaluate and predict on generated volumes, in a few minutes on two cores.

    Writes 12 CT-like volumes with lesions of 4 to 14 mm as a Decathlon-layout folder, trains the shipped bundle on
    eight of them through MONAI's bundle commands, selects the checkpoint on a ninth, and scores it on the other three,
    together with an untrained network.
    """
    import warnings

    # MONAI and torch warn about their own coming changes; none concerns who runs a demo.
    warnings.simplefilter("ignore")
    from monai_iou.console import print_demo
    from monai_iou.demo import run_demo

    with reported():
        result = run_demo(output, click.echo)
    print_demo(result)
    return 0
