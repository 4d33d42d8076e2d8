"""What a run checks once its data are known, before any work: where it writes, what lies there, and who else writes."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch.distributed as dist

from monai_iou.datasets.folder import is_dataset
from monai_iou.distributed import is_distributed
from monai_iou.files import OutputError, check_outputs, prepare
from monai_iou.planning.plan import Plan
from monai_iou.volumes.names import PROBABILITIES
from monai_iou.workflow.checkpoint_files import load_state
from monai_iou.workflow.config_record import other_settings
from monai_iou.workflow.data import BundleCases
from monai_iou.workflow.failures import TrainingError
from monai_iou.workflow.models import tell_keys_without_effect
from monai_iou.workflow.other_datasets import tell_other_channels
from monai_iou.workflow.records import differences, is_same
from monai_iou.workflow.result_files import check_results
from monai_iou.workflow.run_folder import open_run_folder
from monai_iou.workflow.run_lock import locked_for_run
from monai_iou.workflow.run_state import CHECKPOINTS, LAST_EPOCH
from monai_iou.workflow.settings import Settings, exit_with_message
from monai_iou.workflow.typed_words import output_key, switch_on

__all__ = ["check_evaluation", "check_inference", "check_training"]

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")  # where worker processes hand over their batches
BATCHES_PER_WORKER = 2  # what torch's loader lets each worker prepare ahead


def check_training(cases: BundleCases, plan: Plan, settings: Settings, rank: int = 0) -> None:
    """Check the outputs of a training and the memory for its workers, and take the folder of its checkpoints.

    The folder is locked before anything is written, and stays so for the training that follows in this process, see
    `monai_iou.workflow.failures.run`.

    Args:
        cases: the data; all of its files are inputs.
        plan: of the training.
        settings: `ckpt_dir`, `output_dir`, `cache_dir`, `resume`, `overwrite`, `num_workers` and the batch's size; also
            `epochs`, `val_interval`, `keep_weights` and whether it validates, for a warning.
        rank: of this process; one rank writes, and locks for all.

    Raises:
        OutputError: a folder cannot be written, is a folder of the dataset, is used by another run, or holds a training
            that would be replaced.
        TrainingError: there is too little shared memory. Under `python -m monai.bundle` the program ends with that
            sentence.
    """
    folders = {name: Path(getattr(settings, name)) for name in ("ckpt_dir", "output_dir")}
    if settings.cache_dir is not None:
        folders["cache_dir"] = Path(settings.cache_dir)
    with exit_with_message(), contextlib.ExitStack() as locked:
        _check_tuning(settings, cases)
        check_outputs(folders, cases.files)
        _check_shared_memory(cases, plan, settings)
        if rank == 0:
            prepare(folders["ckpt_dir"], "ckpt_dir")
            locked.enter_context(locked_for_run(folders["ckpt_dir"], "training"))
        _check_nothing_is_replaced(folders["ckpt_dir"], settings)
        _check_same_data(folders["ckpt_dir"] / LAST_EPOCH, cases, plan, settings)
        if rank == 0:
            for name, folder in folders.items():
                if name != "ckpt_dir":
                    prepare(folder, name)
            open_run_folder(settings.output_dir, getattr(settings, "bundle_root", None))
            _warn_of_no_validation(cases, settings)
    if is_distributed():
        dist.barrier()


def check_evaluation(cases: BundleCases, settings: Settings, models: Sequence[str], rank: int = 0) -> None:
    """Check the output folder of an evaluation.

    Raises:
        OutputError: it cannot be written, or is a folder of the dataset or of the models.
    """
    with exit_with_message():
        _check_output(cases, settings, models, write=rank == 0)
        if rank == 0:
            tell_keys_without_effect(models)


def check_inference(cases: BundleCases, plan: Plan, settings: Settings, models: Sequence[str]) -> None:
    """Check the output folder of inference and read every image once.

    Raises:
        OutputError: see `check_evaluation`.
        DatasetError: an image cannot be segmented.
    """
    with exit_with_message():
        if not settings.mask_suffix:  # else the masks may lie beside the images, under names of their own
            _check_output(cases, settings, models, write=False)
        masks = cases.result_files(settings.output_dir, settings.mask_suffix, settings.mask_format)
        results = [(f"the mask of {case}", path) for case, path in masks.items()]
        if settings.save_probabilities:
            maps = cases.result_files(settings.output_dir, PROBABILITIES, ".nii.gz")
            results += [(f"the probabilities of {case}", path) for case, path in maps.items()]
        check_results(results, cases.files)
        if models:
            tell_keys_without_effect(models)
        if getattr(settings, "images", None) is None and (cases.dataset_dir / "dataset.json").is_file():
            tell_other_channels(cases.folder, plan)
    cases.check_inference(plan, settings.mask_format)
    with exit_with_message():
        prepare(Path(settings.output_dir), "output_dir")


def _check_output(cases: BundleCases, settings: Settings, models: Sequence[str], *, write: bool) -> None:
    folder = Path(settings.output_dir)
    check_outputs({"output_dir": folder}, {**cases.files, "the trained model": [Path(path) for path in models]})
    if write:
        prepare(folder, "output_dir")


def _check_nothing_is_replaced(folder: Path, settings: Settings) -> None:
    checkpoints = [folder / name for name in CHECKPOINTS if (folder / name).is_file()]
    can_continue = [path.name for path in checkpoints[:1]] == [LAST_EPOCH]
    if not checkpoints or (settings.resume and can_continue) or (settings.overwrite and not settings.resume):
        return
    what = "is there" if can_continue else f"is there without a {LAST_EPOCH}, from which it could be continued"
    remedies = f"continue it with {switch_on('resume')}, " if can_continue else ""
    instead = " and without --resume" if settings.resume else ""
    message = (
        f"Expected `ckpt_dir` to be without a training, but {checkpoints[0]} {what}: {remedies}replace it with "
        f"{switch_on('overwrite')}{instead}, or choose another folder with {output_key('ckpt_dir')}."
    )
    raise OutputError(message)


def _check_tuning(settings: Settings, cases: BundleCases) -> None:
    if getattr(settings, "tune_postprocessing", False) and not cases.validation:
        message = (
            "Expected `tune_postprocessing` to be false without validation cases, but got true: keep some out of the "
            "training by `val_fraction` or `folds`, or list them as `validation`."
        )
        raise ValueError(message)


def _warn_of_no_validation(cases: BundleCases, settings: Settings) -> None:
    epochs, interval = getattr(settings, "epochs", 1), getattr(settings, "val_interval", 1)
    chooses = getattr(settings, "keep_weights", None) == "best" and settings.validates  # earlier versions do not tell
    resumed = settings.resume and (Path(settings.ckpt_dir) / LAST_EPOCH).is_file()  # with other scores, maybe
    given = is_dataset(cases.dataset_dir)  # MONAI Label brings its own data
    if epochs < interval and chooses and given and cases.validation and not resumed:
        logger.warning(
            "No epoch will be validated, because `epochs` is %d and `val_interval` is %d; the final weights will be "
            "stored even though `keep_weights` is best: lower --val_interval, or raise --epochs.",
            epochs, interval,
        )  # fmt: skip


def _check_same_data(path: Path, cases: BundleCases, plan: Plan, settings: Settings) -> None:
    if not settings.resume or not path.is_file():
        return
    stored, current = load_state(path, mmap=True).get("data", {}), cases.record(plan)
    changes = differences(stored, current)
    if changes and settings.overwrite:
        logger.warning("%s is continued on other data: %s.", path, "; ".join(changes))
    elif changes:
        sizes = {name: stored[name] for name in ("pixdim", "patch_size") if stored.get(name) and name in current}
        options = " and ".join(f'--{name} "{json.dumps(size, separators=(",", ":"))}"' for name, size in sizes.items())
        is_other = any(not is_same(name, size, current[name]) for name, size in sizes.items())
        earlier = f", give the earlier values with {options}" if is_other else ""
        message = (
            f"Expected {path} to be of a training on these data, but {'; '.join(changes)}: resume with the same "
            f"dataset, split and settings{earlier}, set `overwrite` as well as `resume` to continue it on these, or "
            "choose another folder."
        )
        raise OutputError(message)
    settings_changed = other_settings(stored.get("config", {}), current.get("config", {}))
    if settings_changed:
        logger.warning("%s is continued with other settings: %s.", path, settings_changed)


def _check_shared_memory(cases: BundleCases, plan: Plan, settings: Settings) -> None:
    if not settings.num_workers or not SHARED_MEMORY.is_dir():
        return
    # The two loaders hand over their batches one after the other.
    patches, volume = _batch_bytes(plan, settings), _volume_bytes(cases, plan, settings)
    what, one = ("volumes of validation", volume) if volume > patches else ("batches", patches)
    needed, free = settings.num_workers * BATCHES_PER_WORKER * one, shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        smaller = "" if volume > patches else ", `batch_size` or `patch_size`"
        message = (
            f"Expected {SHARED_MEMORY} to have room for the {what} of {settings.num_workers} workers, "
            f"{needed / 1e6:.1f} MB, but {free / 1e6:.1f} MB of shared memory are free: lower `num_workers` (0 needs "
            f"none){smaller}, or give the container more (docker run --shm-size=1g)."
        )
        raise TrainingError(message)


def _batch_bytes(plan: Plan, settings: Settings) -> int:
    """The patches of one batch: image and label leave the random transforms as float32."""
    channels = plan.in_channels + (plan.out_channels if plan.has_maps else 1)
    return 4 * channels * int(settings.batch_size * settings.num_samples) * math.prod(plan.patch_size)


def _volume_bytes(cases: BundleCases, plan: Plan, settings: Settings) -> int:
    """The largest prepared volume of the validation, a batch there; 0 without one."""
    if not settings.validates or not is_dataset(cases.dataset_dir):
        return 0
    validated = {item["case"] for item in cases.validation}
    facts = zip(cases.folder.labelled, cases.folder.training_facts, strict=True)
    sides = [np.multiply(fact.shape, fact.spacing) / plan.pixdim for case, fact in facts if case.name in validated]
    voxels = [np.prod(np.maximum(np.ceil(side - 1e-3), plan.patch_size)) for side in sides]
    return int(max(voxels, default=0)) * (4 * plan.in_channels + plan.label_bytes)
