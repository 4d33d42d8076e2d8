"""`monai-iou plan`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .command_lines import bundle_command
from .errors import reported
from .options import FOLDER, Choice, check_fold, check_folder, output_option, positive, whole, with_options

if TYPE_CHECKING:
    from monai_iou.datasets.folder import SegmentationFolder

__all__ = ["FOLD_COUNT", "FOLD_NUMBER", "MACHINE", "MINUTES", "plan", "write_plan"]


MINUTES = positive("give minutes, such as 30")
FOLD_COUNT, FOLD_NUMBER = whole(2, "give 2 or more folds, usually 5"), whole(0, "count folds from 0")
# `monai-iou plan` takes no keys of the bundle, so that the remedy names the command that does.
LESS_MEMORY = (
    "give a smaller --memory-gb or, if a validation takes too much, give `monai-iou train` --minutes together with "
    "--sw_batch_size 1 and --validate#inferer#device cpu"
)
MACHINE = (
    click.option(
        "--memory-gb",
        type=positive("give GiB, such as 8"),
        metavar="GIB",
        help="Memory of the GPU, or RAM, in GiB (2^30 bytes). Default: what is free now.",
    ),
    click.option(
        "--device",
        type=Choice(["auto", "cpu", "cuda"]),
        default="auto",
        show_default=True,
        help="Device to plan for; `auto` is a GPU if there is one. With `cpu` or `cuda`, `monai-iou train` also trains "
        "there.",
    ),
)


@click.command()
@click.argument("dataset_dir", type=FOLDER, metavar="DATASET")
@output_option(default="plan.json", metavar="FILE", help="Config file for the decisions.")
@click.option(
    "--folds",
    type=FOLD_COUNT,
    metavar="N",
    help="Number of folds of a cross-validation. Default: a single split.",
)
@click.option(
    "--fold", type=FOLD_NUMBER, metavar="K", help="Fold of --folds to validate on, counted from 0. Default: 0."
)
@with_options(*MACHINE)
@click.option(
    "--minutes",
    type=MINUTES,
    metavar="M",
    help="Plan a training that ends within M minutes on this machine, timed here. Default: no limit.",
)
def plan(dataset_dir: Path, output: Path, folds: int | None, fold: int | None, **machine: Any) -> int:
    """Decide from a dataset how to train on it, and give the reason for each decision.

    Spacing, patch, batch, crops, loss and length are decided from the training cases of DATASET, a folder in the
    layout of the Decathlon or of nnU-Net v2, or one with the folders `images` and `labels`. The cases of test_labelled
    are not read.

    Writes a config that `monai.bundle run` merges after train.json.
    """
    check_fold(folds, fold)
    check_folder("DATASET", dataset_dir, "a folder of labelled volumes")
    with reported():
        write_plan(dataset_dir, output, folds, fold, machine)
    from monai_iou.console import say

    say(
        f"Written: {output}. To train with it, replace TRAIN.JSON by the path of configs/train.json in the folder that "
        "`monai-iou init` wrote:"
    )
    # In the config's text a backslash would be an escape.
    click.echo(bundle_command(["TRAIN.JSON", output.as_posix()], dataset_dir.as_posix()))
    return 0


def write_plan(
    dataset_dir: Path,
    output: Path,
    folds: int | None,
    fold: int | None,
    machine: Mapping[str, Any],
    asked: Mapping[str, Any] | None = None,
) -> None:
    """Write the plan for a dataset and show it.

    Args:
        dataset_dir: the dataset.
        output: the config file to write.
        folds: number of folds, None for one split.
        fold: the fold to validate on; None for all folds.
        machine: what the options in `MACHINE` gave, and `minutes`, None without a limit; perhaps also `keys`, those of
            the bundle that the training is given beside the plan.
        asked: stored in the plan's report, by which a later command knows what it was made for.

    Raises:
        ValueError: the dataset cannot be planned for.
        OutputError: the file cannot be written.
        click.UsageError: it has another extension than a config.
    """
    from monai_iou.commands.replaceable import check_replaceable
    from monai_iou.console import print_tables, progress
    from monai_iou.datasets.folder import read_folder
    from monai_iou.evaluation.request import Progress
    from monai_iou.files import prepare, write_json
    from monai_iou.planning.fingerprint import compute_fingerprint
    from monai_iou.planning.hardware import detect_hardware
    from monai_iou.planning.minutes import propose_within
    from monai_iou.planning.rules import propose
    from monai_iou.planning.tables import plan_tables
    from monai_iou.planning.timing import measure_timing
    from monai_iou.workflow.failures import explain_out_of_memory

    check_replaceable(output, "plan_report")
    hardware = detect_hardware(machine["device"], machine["memory_gb"])
    folder = read_folder(dataset_dir)
    _check_split(folder, folds, fold or 0)
    prepare(output.parent)
    with progress() as show:
        fingerprint = compute_fingerprint(
            folder, lambda done, total, case: show(Progress("training", done, total, case))
        )
    measured = folder, fingerprint, hardware, folds
    if machine["minutes"] is None:
        proposal = propose(*measured, fold or 0)
    else:
        given = machine.get("keys")
        timing: dict[str, Any] = {"measure": partial(measure_timing, given=given)} if given else {}
        with explain_out_of_memory(LESS_MEMORY):
            proposal = propose_within(machine["minutes"], *measured, fold, **timing)
    content = proposal.as_json(fingerprint, hardware)
    if asked is not None:
        content["plan_report"]["asked"] = dict(asked)
    write_json(output, content)
    print_tables(plan_tables(folder, fingerprint, proposal))


def _check_split(folder: SegmentationFolder, folds: int | None, fold: int) -> None:
    """Refuse folds that cannot be, and sides that part a patient, before the volumes are read."""
    folder.split(0.1, 0, folds, fold)
