"""The bundle's key `start_from`: a training that starts from the weights of a trained model."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from monai_iou.datasets.cases import DatasetError
from monai_iou.planning.plan import Plan
from monai_iou.planning.stored import load_plan
from monai_iou.workflow.models import check_finite, load_weights
from monai_iou.workflow.optimization import WeightAverage, inner_module
from monai_iou.workflow.run_state import LAST_EPOCH, MODEL
from monai_iou.workflow.settings import Settings, exit_with_message
from monai_iou.workflow.trained_models import why_none
from monai_iou.workflow.typed_words import is_bundle_command

__all__ = ["check_start", "model_file", "start_from", "with_seen"]

logger = logging.getLogger(__name__)

PLAN = "model.json"  # which a training writes beside its model


def model_file(start: str) -> Path:
    """Return the file that `start_from` names: itself, or the model in the folder of a training.

    Raises:
        DatasetError: there is none.
    """
    path = Path(start)
    found = [path, path / MODEL, path / "models" / MODEL]
    file = next((each for each in found if each.is_file()), None)
    if file is None:
        folds = sorted(each.parents[1] for each in path.glob(f"fold*/models/{MODEL}"))
        what, remedy = "there is no such file", "check the path"
        if path.is_dir():
            what, remedy = f"that folder has no {MODEL} and no models/{MODEL}", "name the folder of a training"
        if folds:
            remedy = f"name one fold, such as {folds[0]}"
        why, remedy = why_none(path, f"got {path}, and {what}", remedy)
        message = f"Expected `start_from` to be a trained model, but {why}: {remedy}."
        raise DatasetError(message)
    return file


def check_start(network: torch.nn.Module, settings: Settings) -> None:
    """Check that the model of `start_from` fits, before volumes are prepared.

    Args:
        network: that is to be trained.
        settings: `start_from`; and `resume` and `ckpt_dir`, as a training that is resumed has its own weights.

    Raises:
        DatasetError: there is no such model, or it is of another network. Under `python -m monai.bundle` the program
            ends with that sentence.
    """
    resumed = settings.resume and (Path(settings.ckpt_dir) / LAST_EPOCH).is_file()
    if settings.start_from is not None and not resumed:
        with exit_with_message():
            _fitting_weights(model_file(settings.start_from), network)


def start_from(start: str | None, network: torch.nn.Module, average: WeightAverage, plan: Plan | None) -> Plan | None:
    """Load the weights of a trained model, and return the plan with the cases that these have seen.

    Args:
        start: see `model_file`; None loads nothing.
        network: it takes the weights.
        average: it starts from them.
        plan: of the training.

    Raises:
        DatasetError: see `check_start`.
    """
    if start is None:
        return plan
    with exit_with_message():
        file = model_file(start)
        inner_module(network).load_state_dict(_fitting_weights(file, network))
        average.load_state_dict({})
        logger.info("The training starts from the weights of %s.", file)
        return plan if plan is None else with_seen(plan, *_seen_by(file))


def with_seen(plan: Plan, trained: Iterable[str], images: Iterable[str]) -> Plan:
    """Return a plan that also has the cases on which the weights were trained before, behind its own."""
    return replace(
        plan,
        trained=(*plan.trained, *(name for name in dict.fromkeys(trained) if name not in plan.trained)),
        trained_images=(
            *plan.trained_images,
            *(image for image in dict.fromkeys(images) if image not in plan.trained_images),
        ),
    )


def _seen_by(file: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The cases that a model was trained on, as far as a plan lies beside it or it is a training's checkpoint."""
    if file.name == LAST_EPOCH:
        state = torch.load(file, map_location="cpu", weights_only=True)  # its weights were read before
        if "trained" in state:
            return tuple(state["trained"]), tuple(state.get("trained_images", ()))
    for stored in (file.with_suffix(".json"), file.parent / PLAN):
        with contextlib.suppress(DatasetError):
            plan = load_plan(stored)
            return plan.trained, plan.trained_images
    logger.warning(
        "No plan lies beside %s: the cases that it was trained on are not known and may be scored as unseen.", file
    )
    return (), ()


def _fitting_weights(file: Path, network: torch.nn.Module) -> Mapping[str, Any]:
    weights, own = load_weights(str(file)), inner_module(network).state_dict()
    difference = _difference(weights, own)
    if difference:
        untimed = "" if is_bundle_command() else " (with --epochs instead of --minutes)"
        message = (
            f"Expected `start_from` to be a model of the network that is trained here, but in {file} {difference}: "
            "train with the channels, classes, `network`, `network_def`, `base_channels`, `full_resolution`, "
            f"`patch_size` and `pixdim` of that model{untimed}, or leave --start_from out."
        )
        raise DatasetError(message)
    check_finite(str(file), weights)
    return weights


def _difference(weights: Mapping[str, Any], own: Mapping[str, torch.Tensor]) -> str:
    """Say what is the first that differs, "" if nothing does."""
    for name, value in own.items():
        if not torch.is_tensor(weights.get(name)):
            return f"there is no `{name}`"
        if weights[name].shape != value.shape:
            return f"`{name}` has the shape {tuple(weights[name].shape)} instead of {tuple(value.shape)}"
    more = next((name for name in weights if name not in own), None)
    return "" if more is None else f"there is `{more}`, which this network lacks"
