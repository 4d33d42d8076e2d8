"""Parts of the bundle's training that MONAI does not have: a learning rate, averaged weights, a comparison."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from monai_iou.workflow.cpu_layers import use_fast_layers
from monai_iou.workflow.settings import exit_with_message, optional
from monai_iou.workflow.typed_words import switch_on

__all__ = [
    "PolynomialDecay",
    "WeightAverage",
    "averages_of",
    "has_updated",
    "inner_module",
    "is_better",
    "is_parallel",
    "load_averages",
    "restore_weights",
    "with_weights_in",
]

KIND = "class"  # of an optimizer, in its state


def is_better(current: float, best: float) -> bool:
    """Return whether a validation score beats the best so far; NaN (nothing to score) never does, and is always beaten.

    MONAI's own comparison keeps a first NaN as the best for ever.

    Example:
        >>> is_better(0.5, float("nan")), is_better(float("nan"), 0.5)
        (True, False)
    """
    return current > best or (math.isnan(best) and not math.isnan(current))


def inner_module(network: torch.nn.Module) -> torch.nn.Module:
    """Return the module inside a DistributedDataParallel, DataParallel or compiled module, else the network itself."""
    within = _within(network)
    return network if within is None else inner_module(within)


def is_parallel(network: torch.nn.Module) -> bool:
    """Return whether a DistributedDataParallel is the network or inside what `torch.compile` made of it."""
    within = _within(network)
    return isinstance(network, DistributedDataParallel) or (within is not None and is_parallel(within))


def _within(network: torch.nn.Module) -> torch.nn.Module | None:
    is_shared = isinstance(network, (DistributedDataParallel, torch.nn.DataParallel))
    # The other is that of torch.compile, whose class takes seconds to import.
    within: object = getattr(network, "module" if is_shared else "_orig_mod", None)
    return within if isinstance(within, torch.nn.Module) else None


def restore_weights(network: torch.nn.Module, average: WeightAverage, state: Mapping[str, Any], path: Path) -> None:
    """Load the weights of a checkpoint, and their average.

    Args:
        network: the trained module.
        average: of its weights.
        state: the checkpoint's `model` and `average`; earlier versions kept the names of compiled and parallel modules.
        path: of the checkpoint, for the error.

    Raises:
        ValueError: they are of another network.
    """
    try:
        inner_module(network).load_state_dict(_plain_names(state["model"]))
        average.load_state_dict(state.get("average", {}))
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        message = (
            f"Expected {path} to hold the network that this run trains, but its weights do not fit: "
            "resume with the same data, `patch_size`, `base_channels`, `full_resolution` and `network_def`, or "
            f"start anew with {switch_on('overwrite')} and without --resume."
        )
        raise ValueError(message) from error


def _plain_names(weights: Mapping[str, Any]) -> Mapping[str, Any]:
    """Weights by the names that the network itself gives them, without those of what torch wraps around it.

    >>> _plain_names({"_orig_mod.module.a": 1, "_orig_mod.module.b": 2}), _plain_names({"module.a": 1, "b": 2})
    ({'a': 1, 'b': 2}, {'module.a': 1, 'b': 2})
    """
    for prefix in ("_orig_mod.", "module."):
        if weights and all(name.startswith(prefix) for name in weights):
            return _plain_names({name.removeprefix(prefix): value for name, value in weights.items()})
    return weights


def has_updated(engine: Any) -> bool:
    """Return whether the last step's gradients are in the weights: MONAI's `accumulation_steps` sums those of some."""
    steps, length = int(getattr(engine, "accumulation_steps", 1)), int(engine.state.epoch_length or 0)
    done = int(engine.state.iteration)
    return (done % length if length else done) % steps == 0


def averages_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return an optimizer's state for a checkpoint, with the class that it is of."""
    return {**optimizer.state_dict(), KIND: _kind(optimizer)}


def load_averages(optimizer: torch.optim.Optimizer, state: dict[str, Any], source: object = "the checkpoint") -> None:
    """Load the moving averages of an optimizer's state; learning rate, decay and the like stay the optimizer's own.

    Args:
        optimizer: it takes the state over.
        state: see `averages_of`; those of earlier versions do not say the class.
        source: for the error, the file of the state.

    Raises:
        ValueError: the state is of another optimizer, or of one with options by which it keeps less.
    """
    own = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    cause: Exception | None = None
    fits = state.get(KIND, _kind(optimizer)) == _kind(optimizer)
    try:
        if fits:
            optimizer.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        fits, cause = False, error
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)
    if not fits or not all(_finds_its_state(optimizer, group) for group in optimizer.param_groups):
        message = (
            f"Expected {source} to hold the state of this run's `optimizer`, but it is of another one: resume with the "
            f"`optimizer` of the training and its options, or start anew with {switch_on('overwrite')} and without "
            "--resume."
        )
        raise ValueError(message) from cause


def _kind(optimizer: torch.optim.Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def _finds_its_state(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether the next step finds in a state what it reads, tried on a copy of one parameter's state."""
    weights = next((each for each in group["params"] if each in optimizer.state), None)
    if weights is None:
        return True
    trial = torch.zeros_like(weights, requires_grad=True)  # of the same shape, as what is kept may depend on it
    trial.grad = torch.zeros_like(weights)
    kind: Any = type(optimizer)
    try:
        tried = kind([{**group, "params": [trial]}], lr=1e-3)
        tried.state[trial] = copy.deepcopy(optimizer.state[weights])
        tried.step()
    except KeyError:
        return False
    except Exception:  # an optimizer of the user's own may be made or called in another way
        return True
    return True


def with_weights_in(memory_format: torch.memory_format | str, network: torch.nn.Module) -> torch.nn.Module:
    """Return the network, its 3D kernels in a memory format; convolutions on a CPU are faster in `channels_last_3d`.

    In that format, layers get their form of `monai_iou.workflow.cpu_layers`. Kernels that lie in that format as they
    are, having no second channel or voxel, keep their strides: with the others that `Module.to` would give them, torch
    refuses to load what MONAI's federated client took from the network.

    Args:
        memory_format: torch's, or its name such as "channels_last_3d".
        network: changed in place.

    Raises:
        ValueError: there is no such format. Under `python -m monai.bundle` that one sentence ends the program.

    Example:
        >>> network = torch.nn.Sequential(torch.nn.Conv3d(1, 4, 3), torch.nn.Conv3d(4, 2, 3))
        >>> [layer.weight.stride() for layer in with_weights_in(torch.channels_last_3d, network)]
        [(27, 27, 9, 3, 1), (108, 1, 36, 12, 4)]
    """
    layout = memory_format
    if isinstance(layout, str):
        layout = getattr(torch, layout.removeprefix("torch."), layout)
    has_volumes = any(weights.dim() == 5 for weights in network.parameters())
    known = layout in (torch.contiguous_format, torch.channels_last_3d)
    if not isinstance(layout, torch.memory_format) or (has_volumes and not known):
        with exit_with_message():
            message = (
                f"Expected `memory_format` to be contiguous_format or channels_last_3d, but got {memory_format!r}: "
                "leave --memory_format out for the default."
            )
            raise ValueError(message)
    for weights in network.parameters():
        if weights.dim() == 5 and not weights.is_contiguous(memory_format=layout):
            weights.data = weights.data.contiguous(memory_format=layout)
    return use_fast_layers(network) if layout == torch.channels_last_3d else network


class WeightAverage:
    """Exponential moving average of a network's weights, taken after each step of its optimizer.

    The decay of step t is min(`decay`, (1 + t) / (10 + t)), so that a short run is not held at its first weights.
    Buffers are copied.

    Args:
        network: it is trained; of a DistributedDataParallel the inner module is averaged.
        optimizer: its steps are followed. One that a gradient scaler skips does not count.
        decay: between 0 and 1, near 1; None averages nothing.

    Attributes:
        network: the average, to validate and to store; without `decay` the trained network itself.

    Example:
        >>> layer = torch.nn.Linear(1, 1)
        >>> WeightAverage(layer, torch.optim.SGD(layer.parameters(), lr=0.1)).network is layer
        True
    """

    def __init__(self, network: torch.nn.Module, optimizer: torch.optim.Optimizer, decay: float | None = None) -> None:
        self.decay, self.steps, self.network = optional(decay), 0, network
        if self.decay is None:
            return
        self._source = inner_module(network)
        self.network = copy.deepcopy(self._source).requires_grad_(False).eval()
        optimizer.register_step_post_hook(lambda optimizer, *_: self._update() if _has_stepped(optimizer) else None)

    def _update(self) -> None:
        decay = min(float(self.decay), (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        averages, weights = list(self.network.parameters()), list(self._source.parameters())
        get_ema_multi_avg_fn(decay)(averages, weights, self.steps)
        for average, buffer in zip(self.network.buffers(), self._source.buffers(), strict=True):
            average.copy_(buffer)

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs: nothing without `decay`."""
        return {} if self.decay is None else {"steps": self.steps, "network": self.network.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up an average; a run that had none starts from its weights.

        Raises:
            RuntimeError: it is of another network.
        """
        if self.decay is not None:
            self.network.load_state_dict(_plain_names(state["network"]) if state else self._source.state_dict())
            self.steps = int(state["steps"]) if state else 0


def _has_stepped(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a call of `step` was one: a gradient scaler calls a fused optimizer, which skips by itself.

    This waits for the GPU, as the scaler does for optimizers that are not fused.
    """
    found_inf = getattr(optimizer, "found_inf", None)  # the scaler's, there only during such a call
    return found_inf is None or not bool(found_inf)


class PolynomialDecay(torch.optim.lr_scheduler.LambdaLR):
    """Learning rate `base * (1 - step / total_iters) ** power`, 0 from `total_iters` on.

    torch's PolynomialLR multiplies the last rate, so that a run that ended at 0 could never be made longer.

    Args:
        optimizer: its learning rate is the base.
        total_iters: steps of the whole run.
        power: of the polynomial.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        >>> PolynomialDecay(optimizer, total_iters=4, power=1.0).move_to(3)
        >>> optimizer.param_groups[0]["lr"]
        0.025
    """

    def __init__(self, optimizer: torch.optim.Optimizer, total_iters: int, power: float = 0.9) -> None:
        self.total_iters, self.power = total_iters, power
        super().__init__(optimizer, self.factor)

    def factor(self, step: int) -> float:
        """Return what the base is multiplied by at a step."""
        return float(max(0.0, 1 - step / self.total_iters) ** self.power)

    def move_to(self, step: int) -> None:
        """Set the step, and the optimizer's learning rate to that of this step."""
        self.last_epoch = step
        self._last_lr = [base * self.factor(step) for base in self.base_lrs]
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate
