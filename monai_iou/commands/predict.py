"""`monai-iou predict`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from .command_lines import bundle_line
from .errors import reported
from .keys import CommandWithKeys, check_values, known_keys, own_options, read_keys, words_of_keys
from .options import FOLDER, Choice, fold_list, is_file, is_folder, with_options

__all__ = ["predict"]

SHIPPED_MODELS = ("hippocampus_mr",)  # TRAINED_MODELS of bundle_files.py, which a wrong line need not import
RESULTS = (
    click.option(
        "-o",
        "--output",
        type=FOLDER,
        metavar="DIR",
        help="Folder for the masks, which get the names of their images. Default: each beside its image, as NAME_mask.",
    ),
    click.option(
        "--format",
        "ending",
        type=Choice([".nii.gz", ".nii", ".mha", ".nrrd", ".png", "same"]),
        default=".nii.gz",
        show_default=True,
        help="Format of the masks; `same` is the image's.",
    ),
    click.option("--save-probabilities", is_flag=True, help="Also write the probabilities of all classes, as NIfTI."),
    click.option("--preview", is_flag=True, help="Also write a picture of each mask over its image."),
    click.option("--overwrite", is_flag=True, help="Replace all existing results of an image, but never an image."),
)
MODELS = (
    click.option(
        "--folds",
        callback=fold_list,
        metavar="all|0,1",
        help="Numbers of the folds, counted from 0, whose models are averaged: 2 takes the model of fold 2 alone. "
        "Default: all, if RUN has folds.",
    ),
    click.option("--tta", is_flag=True, help="Average over the eight flips of each image: eight times the work."),
)


@click.command(cls=CommandWithKeys)
@click.argument("run", type=FOLDER)
@click.argument("images", type=FOLDER, nargs=-1, metavar="IMAGES...")
@with_options(*RESULTS, *MODELS)
@click.pass_context
def predict(
    context: click.Context, /, run: Path, images: tuple[Path, ...], output: Path | None, ending: str, **options: Any
) -> int:
    """Segment images with the model in RUN, the folder that `monai-iou train` wrote.

    RUN may also be `hippocampus_mr`, the trained model that is shipped with the package.

    IMAGES are files (NIfTI, MetaImage, NRRD, PNG), folders of them, and folders of the slices of a DICOM series. Where
    the channels of an image are files of their own, they are called NAME_0000, NAME_0001, ...; name one of them or
    their folder. In a folder, NAME_mask and NAME_probabilities beside NAME are treated as results and are not
    segmented. A mask lies on exactly the grid of its image. Existing results are replaced only with --overwrite; images
    never are.

    Every key of the bundle's inference.json is an option too, such as --sw_batch_size 1 or --device cpu: docs/bundle.md
    lists them.
    """
    run = _model_folder(run)
    keys = _keys(context, run)
    _check_paths(run, images)
    check_values(keys, "inference")
    from monai_iou.console import say
    from monai_iou.workflow.config_files import OF_INFERENCE, check_configs
    from monai_iou.workflow.prediction import plan_predictions, run_all
    from monai_iou.workflow.previews import write_preview
    from monai_iou.workflow.result_files import check_new
    from monai_iou.workflow.trained_models import find_models, fold_notes

    wanted = {"probabilities": options["save_probabilities"], "preview": options["preview"]}
    keys |= {"save_probabilities": True} if options["save_probabilities"] else {}
    keys |= {"tta_flips": True} if options["tta"] else {}
    with reported():
        models = find_models(run, options["folds"])
        check_configs(models.config.parents[1], OF_INFERENCE)
        for note in fold_notes(run, options["folds"]):
            say(note, error=True)
        runs = plan_predictions(models, images, output, ending, **wanted)
        items = [item for each in runs for item in each.items]
        if not options["overwrite"]:
            check_new(path for item in items for path in item.files.values())
        for each in runs:
            click.echo(bundle_line([str(models.config)], each.keys(keys)))

        def done(item: Any) -> None:
            say(f"Written: {item.mask}")
            if item.probabilities is not None:
                say(f"Written: {item.probabilities}")
            if item.preview is not None:
                write_preview(item.case.images, item.mask, item.preview)
                say(f"Written: {item.preview}")

        run_all(runs, keys, done, say)
    return 0


def _model_folder(run: Path) -> Path:
    """Return the folder of a shipped model if RUN is its name and no folder; a folder of the user's comes first."""
    if is_folder(run) or str(run) not in SHIPPED_MODELS:
        return run
    from monai_iou.bundle_files import trained_model_path

    return trained_model_path(str(run)) or run


def _keys(context: click.Context, run: Path) -> dict[str, Any]:
    """Check the bundle's keys in the command line, and return them; the run may have a config with keys of its own."""
    configs = [folder / "configs" / "inference.json" for folder in (run, run.parent)]
    own = [path for path in configs if is_file(path)][:1]
    known = known_keys(own, "inference", "configs/inference.json of RUN")
    return read_keys(words_of_keys(context), known, own_options(context), "inference")


def _check_paths(run: Path, images: tuple[Path, ...]) -> None:
    """Name a wrong path before anything that takes seconds is imported."""
    if not is_folder(run):
        message = (
            "Expected RUN to be the folder of a training or the name of a shipped model "
            f"({', '.join(SHIPPED_MODELS)}), but got `{run}`: check the path."
        )
        raise click.UsageError(message)
    if not images:
        message = "Expected IMAGES after RUN, but got none: name files or folders of images."
        raise click.UsageError(message)
    missing = next((path for path in images if not os.path.exists(path)), None)  # noqa: PTH110 - any length of name
    if missing is not None:
        message = f"Expected an image or a folder of images, but there is no `{missing}`: check the path."
        raise click.UsageError(message)
