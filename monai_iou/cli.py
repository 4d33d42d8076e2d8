"""The `monai-iou` command; apart from `console.py` the only file that prints.

Loaded by path from `monai_iou_command`, so nothing at its top level may import `monai_iou`, torch or MONAI: each
command imports what it needs. Exit codes: 0 done, 1 the work failed, 2 the command line was wrong.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import click


class _Commands(click.Group):
    """A group that suggests the command nearest to a mistyped one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that the first argument names."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            known = ", ".join(self.list_commands(ctx))
            remedy = f"perhaps you meant {near[0]}" if near else f"choose one of {known}"
            message = f"Expected a command, but got {args[0]!r}: {remedy}."
            raise click.UsageError(message, ctx) from error


def _print_version(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    """Read the version from the package's text: importing the package takes seconds."""
    if value and not context.resilient_parsing:
        text = Path(__file__).with_name("__init__.py").read_text(encoding="utf-8")
        found = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
        click.echo(f"monai-iou {found[1] if found else 'of unknown version'}")
        context.exit()


def _console() -> ModuleType:
    """The module `console`, by its path as long as the package is not imported."""
    if "monai_iou" in sys.modules:
        from monai_iou import console

        return console
    spec = importlib.util.spec_from_file_location("monai_iou_console", Path(__file__).with_name("console.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version, help="Show the version."
)
def cli() -> None:
    """IoU losses, metrics and a bundle for MONAI: demo, plan, train, evaluate, compare."""


def _label_list(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...]:
    """`1,2` as (1, 2)."""
    try:
        return tuple(int(part) for part in value.split(",")) if value else ()
    except ValueError as error:
        message = f"Expected label values, but got {value!r}: separate whole numbers by commas, such as 1,2."
        raise click.BadParameter(message) from error


def _region_list(context: click.Context, parameter: click.Parameter, value: str | None) -> dict[str, tuple[int, ...]]:
    """`whole=1+2,core=2` as {"whole": (1, 2), "core": (2,)}."""
    try:
        parts = [part.split("=") for part in value.split(",")] if value else []
        regions = {name.strip(): tuple(int(label) for label in labels.split("+")) for name, labels in parts}
    except ValueError as error:
        message = f"Expected regions, but got {value!r}: write a name and its labels, such as whole=1+2,core=2."
        raise click.BadParameter(message) from error
    if len(regions) != len(parts) or "" in regions:
        message = f"Expected every region to have a name of its own, but got {value!r}: rename one."
        raise click.BadParameter(message)
    return regions


def _tolerance(context: click.Context, parameter: click.Parameter, value: str) -> tuple[float, dict[str, float]]:
    """`2` as (2, {}); `1=0.5,2=2` as (1, {"1": 0.5, "2": 2}), where 1 mm is for the others."""
    try:
        if "=" not in value:
            return float(value), {}
        parts = [part.split("=") for part in value.split(",")]
        return 1.0, {name.strip(): float(mm) for name, mm in parts}
    except ValueError as error:
        message = f"Expected a distance in mm, but got {value!r}: write one, or one per label such as 1=0.5,2=2."
        raise click.BadParameter(message) from error


_FOLDER = click.Path(path_type=Path)


def _check_folders(folders: Mapping[str, Path | None]) -> None:
    """Name a wrong path before anything that takes seconds is imported."""
    for option, path in folders.items():
        if path is not None and not _is_folder(path):
            message = f"Expected `{option}` to be a folder of volumes, but got `{path}`: check the path."
            raise click.UsageError(message)


def _check_tables(tables: Mapping[str, Path | None]) -> None:
    for option, path in tables.items():
        if path is not None and (_is_folder(path) or not os.path.exists(path)):  # noqa: PTH110
            message = f"Expected `{option}` to be a file, but got `{path}`: check the path."
            raise click.UsageError(message)


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112 - unlike Path's it is False for a name that is too long


@cli.command()
@click.option(
    "-p", "--predictions", required=True, type=_FOLDER, metavar="DIR", help="Folder of the predicted label maps."
)
@click.option(
    "-r", "--references", required=True, type=_FOLDER, metavar="DIR", help="Folder of the reference label maps."
)
@click.option(
    "-o", "--output", required=True, type=_FOLDER, metavar="DIR", help="Folder for the tables and the report."
)
@click.option(
    "-l", "--labels", callback=_label_list, metavar="1,2", help="Labels to score. Default: all in the references."
)
@click.option(
    "--regions", callback=_region_list, metavar="NAME=1+2,...", help="Score unions of labels instead of labels."
)
@click.option(
    "--ignore", type=int, metavar="LABEL", help="Reference voxels of this value are excluded from all scores."
)
@click.option(
    "--tolerance",
    callback=_tolerance,
    default="1",
    show_default=True,
    metavar="MM",
    help="Tolerance of the normalised surface distance (NSD) in mm, or one per label: 1=0.5,2=2.",
)
@click.option(
    "--boundary",
    default="2mm",
    show_default=True,
    metavar="2mm|2%",
    help="Width of the bands of boundary IoU, in mm or as a share of the image's diagonal.",
)
@click.option(
    "--like",
    type=click.Choice(["brats-mets", "isles22", "autopet", "ms"]),
    help="Add the columns of this challenge, by its own rules and under its own names.",
)
@click.option(
    "--match",
    default="iou:0.5",
    show_default=True,
    metavar="RULE",
    help="When a lesion counts as found: any, iou:0.1, or overlap:0.25 (of the reference lesion).",
)
@click.option(
    "--pairing",
    type=click.Choice(["one-to-one", "many-to-one"]),
    default="one-to-one",
    show_default=True,
    help="Whether fragments and merged lesions count as found (many-to-one).",
)
@click.option(
    "--connectivity",
    type=click.Choice(["6", "18", "26"]),
    callback=lambda context, parameter, value: int(value),
    default="26",
    show_default=True,
    help="Neighbours of a voxel that belong to its lesion.",
)
@click.option(
    "--min-volume",
    "min_volume_mm3",
    type=float,
    default=0.0,
    show_default=True,
    metavar="MM3",
    help="Leave out smaller lesions.",
)
@click.option(
    "--missing",
    type=click.Choice(["exclude", "penalty"]),
    default="exclude",
    show_default=True,
    help="Leave out what is missing, or count it as the worst score. Both means are always given.",
)
@click.option("--groups", type=_FOLDER, metavar="FILE", help="Which cases are of one patient (CSV or JSON).")
@click.option(
    "--workers", type=int, default=1, show_default=True, metavar="N", help="Number of processes on this machine."
)
@click.option(
    "--scheduler", metavar="ADDRESS", help="Run on the Dask cluster with this address, such as tcp://host:8786."
)
@click.option("--resample", type=click.Choice(["reference"]), help="Resample predictions to the grid of the reference.")
@click.option(
    "--images", type=_FOLDER, metavar="DIR", help="Folder of images, which the report shows under the contours."
)
@click.option(
    "--pictures",
    default="worst",
    show_default=True,
    metavar="all|worst|N",
    help="Cases to show slice by slice in the report.",
)
@click.option(
    "--pairs", type=_FOLDER, metavar="CSV", help="Table of pairs: columns prediction, reference and, if wanted, case."
)
def evaluate(**options: Any) -> int:
    """Score a folder of predictions against references.

    Files pair by relative name without the extension. NIfTI, MetaImage, NRRD and folders of DICOM slices are read.
    Writes cases.csv, lesions.csv, failures.csv, summary.json and report.html. Started again, it does only what is
    not done yet. Exit code 1 if a case failed.
    """
    _check_folders({f"--{name}": options[name] for name in ("predictions", "references", "images")})
    _check_tables({f"--{name}": options[name] for name in ("pairs", "groups")})
    from monai_iou.console import print_evaluation, progress
    from monai_iou.evaluation.evaluate import evaluate_folders
    from monai_iou.evaluation.request import Request, RequestError

    options["resample"] = options["resample"] is not None
    options["tolerance"], options["tolerances"] = options["tolerance"]
    try:
        with progress() as show:
            done = evaluate_folders(Request(**options, command=("monai-iou", *sys.argv[1:])), show)
    except RequestError as error:
        raise click.UsageError(str(error)) from error
    except (ValueError, RuntimeError, OSError) as error:
        raise click.ClickException(str(error)) from error
    print_evaluation(done, options["output"])
    return 1 if done.failures else 0


@cli.command()
@click.argument("folders", nargs=-1, required=True, type=_FOLDER, metavar="BASELINE OTHER...")
@click.option(
    "-o",
    "--output",
    type=_FOLDER,
    default=Path("comparison"),
    show_default=True,
    metavar="DIR",
    help="Folder for the tables and the page.",
)
@click.option("--metrics", metavar="iou,hd95_mm", help="Columns of cases.csv to test. Default: all that rank a method.")
@click.option(
    "--primary",
    metavar="METRIC",
    help="The metric that decides; the others are exploratory. Default: iou.",
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
        if not _is_folder(folder):
            message = f"Expected an evaluated folder, but got `{folder}`: check the path."
            raise click.UsageError(message)
    from monai_iou.console import print_comparison
    from monai_iou.evaluation.compare import METRICS, UnknownMetricError, compare_folders

    try:
        rows = compare_folders(folders, output, tuple(metrics.split(",")) if metrics else METRICS, primary)
    except UnknownMetricError as error:
        raise click.UsageError(str(error)) from error
    except (ValueError, RuntimeError, OSError) as error:
        raise click.ClickException(str(error)) from error
    print_comparison(rows, output)
    return 0


@cli.command("class-weights")
@click.argument("labels_dir", type=_FOLDER)
@click.option(
    "--method",
    type=click.Choice(["inverse", "median", "effective"]),
    default="inverse",
    show_default=True,
    help="Formula of the weights; `effective` is the mildest.",
)
@click.option(
    "--beta",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.9999,
    show_default=True,
    help="Parameter of the method `effective`.",
)
@click.option(
    "--labels",
    callback=_label_list,
    metavar="0,1,2",
    help="Labels to count. Default: those of dataset.json, else of the files.",
)
@click.option(
    "--output",
    type=_FOLDER,
    default=Path("class_weights.json"),
    show_default=True,
    metavar="FILE",
    help="JSON file for the weights.",
)
def class_weights(labels_dir: Path, method: str, beta: float, labels: tuple[int, ...], output: Path) -> int:
    """Compute class weights from a folder of label files: the rarer a class, the larger its weight.

    Prints a table and writes the weights as JSON, which a bundle's config reads by reference.
    """
    from monai_iou.datasets.label_counts import count_label_files
    from monai_iou.files import check_replaceable, prepare, write_json
    from monai_iou.weighting import class_weights as weights_of

    try:
        check_replaceable(output, "cases_with_class")
        prepare(output.parent)
        counts = count_label_files(labels_dir, labels or None)
        weights = weights_of(counts.voxels, method, beta)
        write_json(output, counts.as_json(weights, method))
    except (ValueError, RuntimeError, OSError) as error:
        raise click.ClickException(str(error)) from error
    voxels = counts.voxels.sum(0)
    click.echo(f"{len(counts.cases)} label files, weights: {method}")
    click.echo(f"{'class':>6}{'voxels':>14}{'%':>10}{'cases':>8}{'components':>12}{'weight':>12}")
    cases = (counts.voxels > 0).sum(0)
    for row in zip(counts.values, voxels, 100 * voxels / voxels.sum(), cases, counts.components, weights, strict=True):
        click.echo("{:>6}{:>14}{:>10.4f}{:>8}{:>12}{:>12.6f}".format(*row))
    click.echo(f'Written: {output}. In a config: "weight": "%{output.as_posix()}::weights"')
    return 0


@cli.command()
@click.argument("dataset_dir", type=_FOLDER)
@click.option(
    "--output",
    type=_FOLDER,
    default=Path("plan.json"),
    show_default=True,
    metavar="FILE",
    help="Config file for the decisions.",
)
@click.option("--folds", type=int, metavar="N", help="Number of folds of a cross-validation. Default: a single split.")
@click.option("--fold", type=int, show_default="0", metavar="K", help="Fold of --folds to validate on, counted from 0.")
@click.option("--memory-gb", type=float, metavar="GIB", help="Memory of the GPU, or RAM. Default: what is free now.")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Device to plan for; `auto` is a GPU if there is one.",
)
def plan(
    dataset_dir: Path, output: Path, folds: int | None, fold: int | None, memory_gb: float | None, device: str
) -> int:
    """Decide from a dataset how to train on it, and give the reason for each decision.

    Spacing, patch, batch, crops, loss and length are decided from the training cases of DATASET_DIR, a folder in the
    Decathlon layout. The cases of test_labelled are not read.

    Writes a config that `monai.bundle run` merges after train.json.
    """
    from monai_iou.console import print_tables, progress
    from monai_iou.datasets.folder import read_folder
    from monai_iou.datasets.splits import check_folds, count_patients
    from monai_iou.evaluation.request import Progress
    from monai_iou.files import check_replaceable, prepare, write_json
    from monai_iou.planning.fingerprint import compute_fingerprint
    from monai_iou.planning.hardware import detect_hardware
    from monai_iou.planning.rules import propose
    from monai_iou.planning.tables import plan_tables

    if fold is not None and folds is None:
        message = f"Expected `--folds` to be given with `--fold {fold}`, but it is not: add --folds 5 or drop --fold."
        raise click.UsageError(message)
    try:
        check_replaceable(output, "plan_report")
        machine = detect_hardware(device, memory_gb)
        folder = read_folder(dataset_dir)
        if folds is not None:  # before minutes of reading
            check_folds(folds, fold or 0, count_patients(folder.training, folder.patient_groups))
        prepare(output.parent)
        with progress() as show:
            fingerprint = compute_fingerprint(
                folder, lambda done, total, case: show(Progress("training", done, total, case))
            )
        proposal = propose(folder, fingerprint, machine, folds, fold or 0)
        write_json(output, proposal.as_json(fingerprint, machine))
    except (ValueError, RuntimeError, OSError) as error:
        raise click.ClickException(str(error)) from error
    print_tables(plan_tables(folder, fingerprint, proposal))
    click.echo(f"Written: {output}. Train with it, TRAIN.JSON being that of the folder `monai-iou init` wrote:")
    # In the config's text a backslash would be an escape.
    click.echo(_bundle_command(["TRAIN.JSON", output.as_posix()], dataset_dir.as_posix()))
    return 0


def _bundle_command(configs: Sequence[str], dataset_dir: str) -> str:
    """A command line that a shell, and then MONAI's reading of lists, take apart into these very paths."""
    import re
    import shlex

    files = str(list(configs)) if len(configs) > 1 else configs[0]
    if re.fullmatch(r"[\w./:+,'\[\] -]+", files) and len(configs) > 1 and '"' not in files:
        quoted = '"' + files.replace("', '", "','") + '"'
    else:
        quoted = shlex.quote(files)
    return f"python -m monai.bundle run --config_file {quoted} --dataset_dir {shlex.quote(dataset_dir)}"


@cli.command()
@click.option(
    "--output", type=_FOLDER, default=Path("demo"), show_default=True, metavar="DIR", help="New folder for the demo."
)
def demo(output: Path) -> int:
    """Train, evaluate and predict on generated volumes, in a few minutes on two cores.

    Writes 12 CT-like volumes with lesions of 4 to 14 mm as a Decathlon-layout folder, trains the shipped bundle on nine
    of them through MONAI's bundle commands, and scores it on the other three, together with an untrained network.
    """
    import warnings

    # MONAI and torch warn about their own coming changes; none concerns who runs a demo.
    warnings.simplefilter("ignore")
    from monai_iou.console import print_demo
    from monai_iou.demo import run_demo

    try:
        result = run_demo(output, click.echo)
    except (ValueError, RuntimeError, OSError) as error:
        raise click.ClickException(str(error)) from error
    print_demo(result)
    return 0


@cli.command()
@click.argument("folder", type=_FOLDER, metavar="DIR")
def init(folder: Path) -> int:
    """Copy the shipped bundle to the new folder DIR, where you can edit it and train it on your data."""
    from monai_iou.bundle_files import copy_bundle

    try:
        target = copy_bundle(folder)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"Copied the bundle to {target}. Train it on a folder in the Decathlon layout:")
    click.echo(_bundle_command([(target / "configs" / "train.json").as_posix()], "YOUR_FOLDER"))
    return 0


@cli.command()
@click.argument("bundle", type=_FOLDER, metavar="DIR")
def describe(bundle: Path) -> int:
    """Write the trained model's channels and classes into the metadata of the bundle in DIR.

    The shipped configs/metadata.json names one channel and one label. The model zoo's checks, MONAI Label and MONAI
    Deploy read that file.
    """
    from monai_iou.workflow.metadata import describe_model

    try:
        path = describe_model(bundle)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"Written: {path}")
    return 0


def _show(error: click.ClickException) -> None:
    """Print an error as click does, with what would steer the terminal escaped."""
    context = getattr(error, "ctx", None)
    if context is not None:
        click.echo(f"{context.get_usage()}\nTry '{context.command_path} -h' for help.\n", err=True)
    _console().say(f"Error: {error.format_message()}", error=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: `sys.argv[1:]`) and return its exit code."""
    try:
        result = cli.main(args=None if argv is None else list(argv), prog_name="monai-iou", standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.Abort:
        click.echo("Aborted.", err=True)
        return 130
    except click.ClickException as error:
        _show(error)
        return error.exit_code
    return int(result or 0)


if __name__ == "__main__":
    sys.exit(main())
