"""What evaluation and inference need of a training: weights that can be read and fit, of one model or several."""

from __future__ import annotations

import ast
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from monai_iou.datasets.cases import DatasetError
from monai_iou.planning.intensity import shared_intensity
from monai_iou.planning.plan import Plan
from monai_iou.planning.stored import load_plan
from monai_iou.workflow.checkpoint_files import UNREADABLE, check_content
from monai_iou.workflow.inferers import Ensemble
from monai_iou.workflow.keys import calling_workflow
from monai_iou.workflow.records import is_same
from monai_iou.workflow.settings import Settings, exit_with_message, optional

__all__ = [
    "check_finite",
    "check_models",
    "image_intensity",
    "load_network",
    "load_plans",
    "load_weights",
    "model_files",
    "report_missing_plan",
    "sibling_path",
    "tell_keys_without_effect",
    "trained_plan",
]


logger = logging.getLogger(__name__)

SAME_IN_ALL = (
    "modalities", "labels", "regions", "regions_order", "spatial_dims", "pixdim", "patch_size", "network", "intensity",
)  # fmt: skip

# Keys that a model's plan has decided, with their values in the shipped configs.
DECIDED: dict[str, Any] = {"patch_size": [64, 64, 64], "pixdim": None, "base_channels": 16, "full_resolution": False}


def model_files(models: object, ckpt_dir: str) -> list[str]:
    """Return the paths of the models to use.

    Args:
        models: folders of trained models, or their `model.pt`; None takes the one in `ckpt_dir`.
        ckpt_dir: folder of the one model.

    Example:
        >>> model_files(None, "models"), model_files(["fold0", "fold1/model.pt"], "models")
        (['models/model.pt'], ['fold0/model.pt', 'fold1/model.pt'])

    Raises:
        ValueError: `models` is not a list of paths.
    """
    if optional(models) is None:
        return [f"{ckpt_dir}/model.pt"]
    paths = _as_list(models)
    if not paths:
        with exit_with_message():
            message = f"Expected `models` to be null or a list of folders, but got {models!r}: write \"['a','b']\"."
            raise ValueError(message)
    return [path if path.endswith(".pt") else f"{path}/model.pt" for path in paths]


def _as_list(models: object) -> list[str]:
    if isinstance(models, str):  # a list with quotes that the command line could not read, or one folder
        try:
            models = ast.literal_eval(models)
        except (ValueError, SyntaxError):
            models = [models]
    usable = isinstance(models, (list, tuple)) and all(isinstance(path, str) and path for path in models)
    return [str(path) for path in models] if usable else []  # type: ignore[attr-defined]


def sibling_path(files: Sequence[str], name: str) -> str:
    """Return the path of a file in the first model's folder.

    Example:
        >>> sibling_path(["models/model.pt"], "model.json")
        'models/model.json'
    """
    return str(Path(files[0]).parent / name)


def trained_plan(settings: Settings) -> Plan | None:
    """Return the plan of the model in `ckpt_dir`, None where a training may start or go on there.

    Where it may not, the config gives the network for that model's weights, as `monai.bundle.load` asks for.

    Raises:
        DatasetError: the plan is damaged.
    """
    files = [Path(settings.ckpt_dir) / name for name in ("model.pt", "model.json")]
    if settings.resume or settings.overwrite or not all(file.is_file() for file in files):
        return None
    with exit_with_message():
        plan = load_plan(files[1])
    tell_keys_without_effect([str(files[0])])
    return plan


def tell_keys_without_effect(files: Sequence[str]) -> None:
    """Warn of keys of the run that calls this which were given, but which the first model's plan has decided otherwise.

    Args:
        files: see `load_plans`.
    """
    path, workflow = Path(files[0]).with_suffix(".json"), calling_workflow()
    if workflow is None or not path.is_file():
        return
    plan, config = load_plan(path), workflow.parser
    stored = {
        "patch_size": list(plan.patch_size),
        "pixdim": list(plan.pixdim),
        "base_channels": plan.channels[0],
        "full_resolution": set(plan.strides[0]) == {1},
    }
    given = {name: optional(config.get_parsed_content(name)) for name in stored if name in config.get()}
    given = {name: value for name, value in given.items() if value is not None and not _is_like(value, DECIDED[name])}
    other = [f"`{name}` {value} (it has {stored[name]})" for name, value in given.items()
             if not _is_like(value, stored[name]) and not _is_flat_patch(value, plan)]  # fmt: skip
    if other:
        logger.warning("The model follows its plan %s, and these keys have no effect: %s.", path, "; ".join(other))


def _is_like(given: Any, value: Any) -> bool:
    """Whether a key's value, perhaps as text, is another, but for rounding."""
    if isinstance(given, (list, tuple)) and isinstance(value, list):
        return len(given) == len(value) and all(_is_like(one, other) for one, other in zip(given, value, strict=True))
    try:
        return math.isclose(float(given), float(value), rel_tol=1e-4)
    except (TypeError, ValueError):
        return str(given).lower() == str(value).lower()


def _is_flat_patch(given: Any, plan: Plan) -> bool:
    """Whether this is the patch of a plan of slices, without the axis of one voxel."""
    axis = plan.flat_axis
    return axis is not None and _is_like(given, [*plan.patch_size[:axis], *plan.patch_size[axis + 1 :]])


def check_models(files: Sequence[str], network: torch.nn.Module) -> None:
    """Check that trained models are there and fit, before evaluation or inference reads any volume.

    Args:
        files: paths of `model.pt`, state dictionaries; each has its plan, `model.json`, beside it.
        network: the module that will load them.

    Raises:
        DatasetError: one is not there, or is of another network, or their plans differ where they must not; under
            `python -m monai.bundle` the program ends with that sentence.
    """
    with exit_with_message():
        for path in files:
            if not Path(path).is_file():
                message = (
                    f"Expected a trained model at {path}, but there is no such file: train first or set `ckpt_dir`."
                )
                raise DatasetError(message)
            weights = load_weights(path)
            check_finite(path, weights)
            if _shapes(weights) != _shapes(network.state_dict()):
                message = (
                    f"Expected {path} to hold the weights of `network_def`, but they do not fit: override "
                    "`network_def` as in training, by the same config file or option."
                )
                raise DatasetError(message)
        if len(files) > 1:
            _check_same_plans(files)


def load_plans(files: Sequence[str], plan: Plan) -> list[Plan]:
    """Return the plans of several models, or `plan`, that of the one."""
    paths = [Path(path).with_suffix(".json") for path in files]
    with exit_with_message():
        return [load_plan(path) for path in paths if path.is_file()] if len(paths) > 1 else [plan]


def image_intensity(files: Sequence[str], plan: Plan) -> list[dict[str, Any]]:
    """Return how images are normalised for the models, which `load_network` gives each its own normalisation of.

    Args:
        files: see `load_plans`.
        plan: of the first model.
    """
    plans = load_plans(files, plan)
    # Others than the first are refused if they do not fit it, but this may be asked for before.
    fitting = [each.intensity for each in plans if _kinds(each) == _kinds(plan)]
    return shared_intensity(fitting or [plan.intensity])


def _kinds(plan: Plan) -> list[str]:
    return [rule["kind"] for rule in plan.intensity]


def report_missing_plan(path: Path, dataset_dir: Path | None) -> None:
    """Say that there is no stored plan; raise DatasetError if there is a model that it belongs to.

    Args:
        path: of the plan.
        dataset_dir: what the network is planned from instead, None for nothing.
    """
    model = path.with_suffix(".pt")
    if model.is_file():
        message = (
            f"Expected {path} beside {model.name}, as it holds how images are prepared, but there is no such file: "
            "copy it from where the model was trained."
        )
        raise DatasetError(message)
    if dataset_dir is None:
        logger.warning(
            "There is no %s: the network is planned for one channel and one label. Is `bundle_root` right?", path
        )
    else:
        logger.info("There is no %s: the network is planned from %s, as training would.", path, dataset_dir)


def _check_same_plans(files: Sequence[str]) -> None:
    first, *others = [load_plan(Path(path).with_suffix(".json")) for path in files]
    for path, plan in zip(files[1:], others, strict=True):
        for name in SAME_IN_ALL:
            expected, other = getattr(first, name), getattr(plan, name)
            if name == "intensity":  # windows of CT may differ
                expected, other = _kinds(first), _kinds(plan)
            if not is_same(name, other, expected):
                what = f"their `{name}` is {other} and {expected}"
                if name == "network" and "definition" in {**expected, **other}:  # it may be a whole program
                    what = "their `network_def` differs"
                message = (
                    f"Expected {path} to be planned as {files[0]}, but {what}: train the models of an ensemble on one "
                    "dataset, with the same network, `pixdim` and `patch_size`."
                )
                raise DatasetError(message)


def load_network(network: torch.nn.Module, files: Sequence[str]) -> torch.nn.Module:
    """Return the network itself for one model, whose weights a CheckpointLoader reads; else an ensemble, loaded.

    Raises:
        DatasetError: see `need_models`.
    """
    if len(files) == 1:
        return network
    check_models(files, network)
    plans = [load_plan(Path(path).with_suffix(".json")) for path in files]
    weights, intensities = [load_weights(path) for path in files], [plan.intensity for plan in plans]
    return Ensemble.of_weights(network, weights, intensities, sigmoid=not plans[0].exclusive)


def load_weights(path: str) -> Mapping[str, Any]:
    """Read the weights of a trained model, checked against its checksum.

    Raises:
        DatasetError: the file is damaged, or is no model.
    """
    try:
        check_content(Path(path))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'torch.load' received a zip file", UserWarning)  # TorchScript is refused
            content = torch.load(path, map_location="cpu", weights_only=True)
        return dict(content.get("model", content))  # CheckpointLoader takes both forms
    except (*UNREADABLE, AttributeError) as error:
        message = f"Expected {path} to be a trained model, but it cannot be read: copy it again or train again."
        raise DatasetError(message) from error


def check_finite(path: str, weights: Mapping[str, Any]) -> None:
    """Raise DatasetError if weights of a file are NaN or infinite."""
    for name, value in weights.items():
        if torch.is_tensor(value) and not bool(torch.isfinite(value).all()):
            message = (
                f"Expected {path} to hold finite weights, but `{name}` has NaN or infinity: take another checkpoint or "
                "train again."
            )
            raise DatasetError(message)


def _shapes(weights: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in weights.items() if hasattr(value, "shape")}
