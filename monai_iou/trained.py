"""What evaluation and inference need of a training: weights that can be read and fit the network."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from monai_iou.bundles import one_sentence
from monai_iou.cases import DatasetError

__all__ = ["need_model"]


def need_model(path: str, network: torch.nn.Module) -> None:
    """Check that a trained model is there and fits, before evaluation or inference reads any volume.

    Args:
        path: of `model.pt`, a state dictionary.
        network: the module that will load it.

    Raises:
        DatasetError: it is not there, or is of another network; under `python -m monai.bundle` the program ends with
            that sentence.
    """
    with one_sentence():
        if not Path(path).is_file():
            message = f"Expected a trained model at {path}, but there is no such file: train first or set `ckpt_dir`."
            raise DatasetError(message)
        if _shapes(_load_weights(path)) != _shapes(network.state_dict()):
            message = (
                f"Expected {path} to hold the weights of `network_def`, but they do not fit: override `network_def` as "
                "in training, by the same config file or option."
            )
            raise DatasetError(message)


def _load_weights(path: str) -> Mapping[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        message = f"Expected {path} to be a trained model, but it cannot be read: copy it again or train again."
        raise DatasetError(message) from error
    return dict(content.get("model", content))  # CheckpointLoader takes both forms


def _shapes(weights: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in weights.items() if hasattr(value, "shape")}
