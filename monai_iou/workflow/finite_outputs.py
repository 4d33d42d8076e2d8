"""Whether the output of a network and its weights can be used, and the sentence where they cannot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from monai_iou.workflow.failures import TrainingError
from monai_iou.workflow.settings import exit_with_message

__all__ = ["check_weights", "is_finite", "not_finite"]


def is_finite(output: Any) -> bool:
    """Return whether an output, a tensor or a list or dictionary of outputs, has neither NaN nor infinity.

    Example:
        >>> is_finite(torch.zeros(2)), is_finite([torch.zeros(2), [torch.tensor([0.0, float("nan")])]])
        (True, False)
    """
    if isinstance(output, Mapping):
        return is_finite(list(output.values()))
    if isinstance(output, (list, tuple)):
        return all(map(is_finite, output))
    return bool(torch.isfinite(output).all())


def check_weights(network: torch.nn.Module, folder: Path) -> None:
    """Check that weights can be stored: an infinite gradient ruins them one step before the loss shows it.

    Raises:
        TrainingError: some are NaN or infinite; `folder` has the last good ones.
    """
    if all(bool(torch.isfinite(weights).all()) for weights in network.parameters()):
        return
    message = (
        f"Expected finite weights at the end of an epoch, but some are NaN or infinite: lower `learning_rate`; "
        f"{folder} still holds the last good epoch."
    )
    with exit_with_message():
        raise TrainingError(message)


def not_finite(batch: Any, remedy: str) -> str:
    """Return what to say of a case whose output is not finite.

    Args:
        batch: an item of a dataset, or a batch of them, with its `image` or `case`.
        remedy: what to do besides looking at the intensities, and what follows.

    Example:
        >>> not_finite({"case": ["a"]}, "or set `amp` to false; no score is given")
        'Expected a finite network output for a, but it has NaN or infinity: look at its intensities, or set `amp` ...'
    """
    return (
        f"Expected a finite network output for {_name(batch)}, but it has NaN or infinity: look at its intensities, "
        f"{remedy}."
    )


def _name(batch: Any) -> str:
    image = batch.get("image") if isinstance(batch, dict) else None
    name = getattr(image, "meta", {}).get("filename_or_obj") or (batch.get("case") if isinstance(batch, dict) else None)
    names = name if isinstance(name, (list, tuple)) else [name]
    return " and ".join(str(each) for each in names if each) or "a volume without a name"
