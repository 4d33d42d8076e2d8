"""`monai-iou evaluate`."""

from __future__ import annotations

import sys
from typing import Any

import click

from .errors import reported
from .options import (
    FOLDER,
    Choice,
    check_folders,
    check_tables,
    is_file,
    label_list,
    output_option,
    region_list,
    tolerance_in_mm,
    with_options,
)

__all__ = ["evaluate"]


FILES = (
    click.option(
        "-p",
        "--predictions",
        required=True,
        type=FOLDER,
        metavar="DIR",
        help="Folder of predicted label maps, or a single file.",
    ),
    click.option(
        "-r",
        "--references",
        required=True,
        type=FOLDER,
        metavar="DIR",
        help="Folder of reference label maps, or a single file.",
    ),
    output_option(help="Folder for the tables and the report."),
)
LABELS = (
    click.option(
        "-l",
        "--labels",
        callback=label_list,
        metavar="1,2",
        help="Labels to score. Default: the regions of the dataset.json beside or above the references, or else all "
        "labels in the references, and those in predictions that dataset.json names.",
    ),
    click.option(
        "--regions", callback=region_list, metavar="NAME=1+2,...", help="Score unions of labels instead of labels."
    ),
    click.option(
        "--ignore",
        type=int,
        metavar="LABEL",
        help="Reference voxels of this value are excluded from all scores. Default: what dataset.json says to ignore.",
    ),
)
DISTANCES = (
    click.option(
        "--tolerance",
        callback=tolerance_in_mm,
        default="1",
        show_default=True,
        metavar="MM",
        help="Tolerance of the normalised surface Dice (NSD) in mm, or one per label: 1=0.5,2=2, and 1 mm for others.",
    ),
    click.option(
        "--boundary",
        default="2mm",
        show_default=True,
        metavar="2mm|2%",
        help="Width of the bands of boundary IoU, in mm or as a share of the image's diagonal.",
    ),
    click.option(
        "--boundary-distance",
        type=Choice(["euclidean", "chessboard"]),
        default="euclidean",
        show_default=True,
        help="How this width is measured: in a straight line, or by the largest distance along an axis, as the authors "
        "of boundary IoU do (chessboard).",
    ),
)
LESIONS = (
    click.option(
        "--like",
        type=Choice(["brats-mets", "isles22", "autopet", "ms"]),
        help="Add the columns of this challenge, by its own rules and under its own names.",
    ),
    click.option(
        "--match",
        default="iou:0.5",
        show_default=True,
        metavar="RULE",
        help="When a lesion counts as found: any, iou:0.1, or overlap:0.25 (of the reference lesion).",
    ),
    click.option(
        "--pairing",
        type=Choice(["one-to-one", "many-to-one"]),
        default="one-to-one",
        show_default=True,
        help="Whether fragments and merged lesions count as found (many-to-one).",
    ),
    click.option(
        "--connectivity",
        type=Choice(["6", "18", "26"]),
        callback=lambda context, parameter, value: int(value),
        default="26",
        show_default=True,
        help="Number of neighbours through which the voxels of a lesion are connected.",
    ),
    click.option("--strict", is_flag=True, help="The threshold of --match must be exceeded, as in panoptic quality."),
    click.option(
        "--dilation",
        type=int,
        default=0,
        show_default=True,
        metavar="N",
        help="Count as one lesion the components of the reference that join when dilated N times (BraTS).",
    ),
    click.option(
        "--instances", is_flag=True, help="The files are instance maps (one number per lesion) instead of label maps."
    ),
    click.option(
        "--min-volume",
        "min_volume_mm3",
        type=float,
        default=0.0,
        show_default=True,
        metavar="MM3",
        help="Ignore lesions below this volume in mm3.",
    ),
)
CASES = (
    click.option(
        "--missing",
        type=Choice(["both", "exclude", "penalty"]),
        default="both",
        show_default=True,
        help="How undefined scores and missing predictions count: as the worst score in the means (both), also in "
        "cases.csv (penalty), or not at all (exclude).",
    ),
    click.option(
        "--present",
        type=Choice(["reference", "either"]),
        default="reference",
        show_default=True,
        help="Which labels count in a case for IoU-I and IoU-C: those of its reference, or of either mask.",
    ),
    click.option(
        "--probabilities",
        type=FOLDER,
        metavar="DIR",
        help="Folder of probability maps (nnU-Net's npz, or volumes of any format), to score at every threshold.",
    ),
    click.option(
        "--groups",
        type=FOLDER,
        metavar="FILE",
        help="CSV or JSON file that assigns the cases to patients. Default: `patient_groups` of dataset.json.",
    ),
)
RUNNING = (
    click.option(
        "--workers", type=int, default=1, show_default=True, metavar="N", help="Number of processes on this machine."
    ),
    click.option(
        "--scheduler", metavar="ADDRESS", help="Run on the Dask cluster with this address, such as tcp://host:8786."
    ),
    click.option(
        "--resample",
        type=Choice(["reference"]),
        help="Resample predictions to the grid of the reference, by nearest neighbour. Default: refuse other grids.",
    ),
)
REPORT = (
    click.option(
        "--images", type=FOLDER, metavar="DIR", help="Folder of images, which the report shows under the contours."
    ),
    click.option(
        "--pictures",
        default="worst",
        show_default=True,
        metavar="all|worst|N",
        help="Cases to show slice by slice in the report.",
    ),
    click.option(
        "--export",
        type=Choice(["nnunet", "panoptica", "latex"]),
        multiple=True,
        help="Also write nnU-Net's summary, panoptica's table or a CSV for LaTeX; may be repeated.",
    ),
    click.option(
        "--pairs",
        type=FOLDER,
        metavar="CSV",
        help="Table of pairs: columns prediction, reference and, optionally, case.",
    ),
)


@click.command()
@with_options(*FILES, *LABELS, *DISTANCES, *LESIONS, *CASES, *RUNNING, *REPORT)
def evaluate(**options: Any) -> int:
    """Score a folder of predictions against references.

    A prediction and a reference form a pair if their relative names agree, without the extension. NIfTI, MetaImage,
    NRRD, PNG and folders of DICOM slices are read.

    Writes cases.csv, lesions.csv, failures.csv, summary.json and report.html. If the command is repeated, finished
    cases are not scored again unless their files or the options have changed. Exit code 1 if a case failed.
    """
    # Two files are one case, and so are a file and a folder of DICOM slices; other pairs of paths are refused later.
    given = [name for name in ("predictions", "references") if not is_file(options[name])]
    check_folders({f"--{name}": options[name] for name in (*given, "images", "probabilities")})
    check_tables({f"--{name}": options[name] for name in ("pairs", "groups")})
    from monai_iou.console import print_evaluation, progress
    from monai_iou.evaluation.evaluate import evaluate_folders
    from monai_iou.evaluation.request import Request, RequestError

    options["export"] = tuple(dict.fromkeys(options["export"]))
    options["resample"] = options["resample"] is not None
    options["tolerance"], options["tolerances"] = options["tolerance"]
    with reported(RequestError), progress() as show:
        done = evaluate_folders(Request(**options, command=("monai-iou", *sys.argv[1:])), show)
    print_evaluation(done, options["output"])
    return 1 if done.failures else 0
