"""`monai-iou class-weights`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from .errors import reported
from .options import FOLDER, Choice, Number, check_folder, label_list, output_option

__all__ = ["class_weights"]


@click.command("class-weights")
@click.argument("labels_dir", type=FOLDER)
@click.option(
    "--method",
    type=Choice(["inverse", "median", "effective"]),
    default="inverse",
    show_default=True,
    help="Formula of the weights; `effective` is the mildest, and gives nearly equal weights to classes with very many "
    "voxels.",
)
@click.option(
    "--beta",
    type=Number("a number of at least 0 and below 1", lambda beta: 0 <= beta < 1, "give for instance 0.9999"),
    default=0.9999,
    show_default=True,
    metavar="BETA",
    help="Parameter of the method `effective`: weights level off at 1 / (1 - BETA) voxels per case, which is 10 000 "
    "by default.",
)
@click.option(
    "--labels",
    callback=label_list,
    metavar="0,1,2",
    help="Labels to count. Default: those of dataset.json, or else all that occur in the files.",
)
@output_option(default="class_weights.json", metavar="FILE", help="JSON file for the weights.")
def class_weights(labels_dir: Path, method: str, beta: float, labels: tuple[int, ...], output: Path) -> int:
    """Compute class weights from a folder of label files: the rarer a class, the larger its weight.

    Prints a table and writes the weights as JSON, which a bundle's config reads by reference.
    """
    check_folder("LABELS_DIR", labels_dir, "a folder of label files")
    from monai_iou.commands.replaceable import check_replaceable
    from monai_iou.console import say
    from monai_iou.datasets.label_counts import count_label_files
    from monai_iou.files import prepare, write_json
    from monai_iou.tables import counted, enumerated
    from monai_iou.weighting import class_weights as weights_of
    from monai_iou.workflow.literal import reference

    with reported():
        check_replaceable(output, "cases_with_class")
        prepare(output.parent)
        counts = count_label_files(labels_dir, labels or None)
        weights = weights_of(counts.voxels, method, beta)
        write_json(output, counts.as_json(weights, method))
    voxels = counts.voxels.sum(0)
    click.echo(f"{counted(len(counts.cases), 'label file')}, weights: {method}")
    click.echo(f"{'class':>6}{'voxels':>14}{'%':>10}{'cases':>8}{'components':>12}{'weight':>12}")
    cases = (counts.voxels > 0).sum(0)
    for row in zip(counts.values, voxels, 100 * voxels / voxels.sum(), cases, counts.components, weights, strict=True):
        click.echo("{:>6}{:>14}{:>10.4f}{:>8}{:>12}{:>12.6f}".format(*row))
    absent = [str(value) for value, number in zip(counts.values, voxels, strict=True) if number == 0]
    if absent:
        whose = "its weight is" if len(absent) == 1 else "their weights are"
        say(f"No file holds {enumerated('label', absent)}: {whose} 0.")
    if counts.regions:
        say(
            f"This dataset has regions instead of classes ({', '.join(counts.regions)}). The weights are those of the "
            "label values: do not give them to a loss of regions."
        )
    weight = json.dumps(reference(output.as_posix(), "weights"), ensure_ascii=False)
    say(f'Written: {output}. In a config: "weight": {weight}')
    return 0
