"""`monai-iou train`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .command_lines import bundle_line, options_line
from .errors import reported
from .keys import (
    CommandWithKeys,
    check_values,
    known_keys,
    names_keys,
    own_options,
    plain_values,
    read_config,
    read_keys,
    words_of_keys,
)
from .options import FOLDER, check_fold, check_folder, check_tables, whole, with_options
from .plan import FOLD_COUNT, FOLD_NUMBER, MACHINE, MINUTES, write_plan

if TYPE_CHECKING:
    from monai_iou.evaluation.results import Evaluation
    from monai_iou.workflow.training_runs import Training, TrainingRun

__all__ = ["train"]

VALIDATIONS = 20  # of a training whose number of epochs the user gives
# Keys that change the length of a training, or the time of its steps and validations.
UNTIMED = (
    "epochs", "case_repeats", "val_interval", "val_fraction", "batch_size", "num_samples", "patch_size", "pixdim",
    "spatial_dims", "network", "network_def", "net", "plan", "base_channels", "full_resolution", "deep_supervision",
    "attention", "instance", "training_loss", "augmentation", "cache_rate", "transform_device", "memory_format", "amp",
    "amp_dtype", "sw_overlap", "tune_postprocessing", "calibration",
)  # fmt: skip

LENGTH = (
    click.option(
        "-o",
        "--output",
        type=FOLDER,
        metavar="RUN",
        help="Folder for the training. Default: DATASET's name and `_run`.",
    ),
    click.option(
        "--minutes", type=MINUTES, metavar="M", help="Plan trainings that end within M minutes, all folds together."
    ),
    click.option(
        "--epochs",
        type=whole(1, "leave --epochs out for the plan's"),
        metavar="N",
        help="Number of epochs. Default: the plan's.",
    ),
)
FOLDS = (
    click.option(
        "--folds",
        type=FOLD_COUNT,
        metavar="N",
        help="Number of folds of a cross-validation, all of which are trained: 5 trains the folds 0 to 4.",
    ),
    click.option("--fold", type=FOLD_NUMBER, metavar="K", help="Train fold K of --folds alone, counted from 0."),
)
CONFIGS = (
    click.option(
        "--config",
        "configs",
        type=FOLDER,
        multiple=True,
        metavar="EXTRA.json",
        help="Config to merge after the plan; may be repeated.",
    ),
)
AGAIN = (
    click.option("--resume", is_flag=True, help="Continue the training in RUN, also with other keys or more epochs."),
    click.option(
        "--overwrite",
        is_flag=True,
        help="Replace the training in RUN; together with --resume, continue it even if the data have changed.",
    ),
)


@click.command(cls=CommandWithKeys, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.argument("dataset", type=FOLDER)
@with_options(*LENGTH, *FOLDS, *CONFIGS, *MACHINE, *AGAIN)
@click.pass_context
def train(context: click.Context, /, dataset: Path, output: Path | None, **options: Any) -> int:
    """Train on the folder DATASET: plan, train, and score the cases that were held out.

    Every key of the bundle's train.json is an option too, such as --batch_size 2: docs/bundle.md lists them. With
    --folds, each fold is trained in a folder of its own and scored on the cases that it held out, and one report joins
    all cases.
    To continue a run that was stopped, give the same command again.
    """
    run_folder = output if output is not None else Path(f"{dataset.resolve().name}_run")
    continues = options["resume"] or not options["overwrite"]
    keys = _keys(context, dataset, options, begun=continues and _is_begun(run_folder))
    given = {**_content(options["configs"]), **keys}
    if options["device"] == "cuda":
        _check_gpu()
    check_values(given)
    _check_cells(given)
    from monai_iou.console import say
    from monai_iou.workflow.run_preparation import plan_request, prepared

    resume, overwrite = options["resume"], options["overwrite"]
    with reported():
        run = _run(run_folder, dataset, keys, options)
        asked = plan_request(run, options)

        def plan(path: Path) -> None:
            own = {**options, "minutes": asked["minutes"], "keys": plain_values(given)}
            write_plan(dataset, path, run.folds, None, own, asked)

        with prepared(run, asked, plan, say, resume=resume, overwrite=overwrite):
            scores = _train(run)
    _tell_results(run, scores)
    return 0


def _train(run: TrainingRun) -> Evaluation | None:
    """Do the trainings in a folder that is prepared for them."""
    from monai_iou.console import progress, say
    from monai_iou.workflow.training_runs import PLAN

    click.echo(f"Plan: {run.folder / PLAN}")
    for training in run.trainings:
        if not training.is_done("trained"):
            click.echo(bundle_line([path.as_posix() for path in training.configs], training.bundle_keys))
    try:
        with progress() as show:
            return run.run(say, show, partial(say, error=True))
    except SystemExit:
        say(_how_to_go_on(run, sys.argv[1:]), error=True)
        raise


def _how_to_go_on(run: TrainingRun, words: Sequence[str]) -> str:
    """Say what was lost and how to go on, after a command with these words was stopped."""
    replaces = "--overwrite" in words and "--resume" not in words
    if replaces and not any(training.has_started for training in run.trainings):
        command = shlex.join(["monai-iou", *words])
        told = "Stopped before the first checkpoint: any earlier results have been restored."
        return f"{told} To replace them, run: {command}"
    kept = [word for word in words if not (replaces and word == "--overwrite")]
    return f"Stopped. To continue, run the same command again: {shlex.join(['monai-iou', *kept])}"


def _is_begun(folder: Path) -> bool:
    """Whether a training has reached a checkpoint: its plan stands, and the same command goes on."""
    return any(next(folder.glob(f"{place}models/last_epoch.pt"), None) for place in ("", "fold*/"))


def _keys(context: click.Context, dataset: Path, options: Mapping[str, Any], *, begun: bool = False) -> dict[str, Any]:
    """Check the command line, before anything that takes seconds is imported, and return the bundle's keys in it."""
    for path in options["configs"]:
        check_tables({"--config": path})
    given = [*context.args, *words_of_keys(context)]
    keys = read_keys(given, known_keys(options["configs"]), own_options(context))
    check_folder("DATASET", dataset, "a folder of labelled volumes")
    check_fold(options["folds"], options["fold"])
    if options["resume"] and options["overwrite"]:  # as of the bundle: continue, whatever has changed
        keys = {**keys, "overwrite": True}
    if options["device"] != "auto":  # not only planned for
        keys = {**keys, "device": options["device"]}
    if options["epochs"] is None:
        if options["minutes"] is not None and not begun:
            _check_timed(keys, options["configs"])
        return keys
    if options["minutes"] is not None:
        message = "Expected either `--minutes` or `--epochs`, but got both: keep one."
        raise click.UsageError(message)
    interval = {}
    if "val_interval" not in names_keys({}, options["configs"]):  # the plan's is for the plan's length
        interval = {"val_interval": max(1, options["epochs"] // VALIDATIONS)}
    return {"epochs": options["epochs"], **interval, **keys}


def _check_gpu() -> None:
    """Refuse `--device cuda` without a GPU, also where --memory-gb lets a plan be made for one."""
    import torch

    if not torch.cuda.is_available():
        message = (
            "Expected a GPU for `--device cuda`, but torch finds none: write `--device cpu`, or leave `--device` out; "
            "`monai-iou plan` can plan for another machine."
        )
        raise click.UsageError(message)


def _check_cells(given: Mapping[str, Any]) -> None:
    """Refuse what `monai-iou evaluate` takes for regions: a plan takes minutes, and the bundle reads the key later."""
    if "regions" not in given:
        return
    from monai_iou.workflow.variants import check_cells

    with reported(ValueError):
        check_cells(given["regions"])


def _check_timed(keys: Mapping[str, Any], configs: Sequence[Path]) -> None:
    """Refuse, beside --minutes, what another length or network would need: the plan's own is what is timed."""
    given = names_keys(keys, configs)
    name = next((name for name in UNTIMED if name in given), None)
    if name is not None:
        message = (
            f"Expected no key beside `--minutes` that changes how long a training takes, but got `{name}`: leave it "
            "out, because the plan is what is timed, or give --epochs instead of --minutes."
        )
        raise click.UsageError(message)


def _run(folder: Path, dataset: Path, keys: Mapping[str, Any], options: Mapping[str, Any]) -> TrainingRun:
    """The trainings that the command line asks for."""
    from monai_iou.workflow.training_runs import PLAN, Training, TrainingRun
    from monai_iou.workflow.versions import about_this_run

    configs = (folder / "configs" / "train.json", folder / PLAN, *options["configs"])
    folds, fold = options["folds"], options["fold"]
    chosen: Sequence[int | None] = [None] if folds is None else [fold] if fold is not None else range(folds)
    asked = {
        "dataset": str(dataset.resolve()),
        "folds": folds,
        "minutes": options["minutes"],
        "memory_gb": options["memory_gb"],
        "device": None if options["device"] == "auto" else options["device"],
        "configs": [str(path) for path in options["configs"]],
        "config_keys": _content(options["configs"]),
    }
    about = about_this_run(("monai-iou", *sys.argv[1:]))

    def training(number: int | None) -> Training:
        own = {} if number is None else {"folds": folds, "fold": number}
        return Training(
            folder if number is None else folder / f"fold{number}",
            configs,
            {"dataset_dir": str(dataset.absolute()), **own, **keys},
            {**asked, "fold": number, "keys": {name: value for name, value in keys.items() if name != "overwrite"}},
            about,
        )

    return TrainingRun(folder, dataset, tuple(training(number) for number in chosen), folds)


def _content(configs: Sequence[Path]) -> dict[str, Any]:
    """The keys that the user's own configs give, later ones over earlier ones."""
    return {name: value for path in configs for name, value in read_config(path, "--config").items()}


def _tell_results(run: TrainingRun, scores: Evaluation | None) -> None:
    from monai_iou.console import print_evaluation, say
    from monai_iou.workflow.inference_keys import keys_for_inference

    if scores is not None:
        print_evaluation(scores, scores.request.output)
    for training in run.trainings:
        files = {"Model": "models/model.pt", "Curves": "progress.png", "Summary": "summary.html"}
        model, *_ = paths = [training.folder / name for name in files.values()]
        if not model.is_file():
            message = (
                f"Expected the training to store its weights in {model}, but it ended without: give its "
                "CheckpointHandler the `ckpt_dir` of the train.json that `monai-iou init` copies."
            )
            raise click.ClickException(message)
        for what, path in zip(files, paths, strict=True):
            if path.is_file():
                say(f"{what}: {path}")
    say("Next, masks of your own images:")
    options = options_line(keys_for_inference(run.trainings[0].configs, run.trainings[0].keys))
    click.echo(f"monai-iou predict {shlex.quote(str(run.folder))} YOUR_IMAGES {options}".rstrip())
    if scores is not None and scores.failures:
        held_out = f"all {len(scores.pairs)} held-out cases" if len(scores.pairs) > 1 else "the held-out case"
        message = (
            f"Expected {held_out} to be scored, but {len(scores.failures)} could not be: "
            f"see the reasons in {scores.request.output / 'failures.csv'}."
        )
        raise click.ClickException(message)
