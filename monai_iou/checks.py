"""Checks of arguments and tensors that several modules share, and their messages.

A message says what was expected, what was given, and what to do: "Expected `x` to be ..., but got ...: ...". The tests
verify that every message of the package has this form.

Checks of tensors only look at shapes and dtypes. Label values are checked after the voxel pass, from its sums
(:mod:`monai_iou.voxels.labels`), so that they need no pass of their own.
"""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

ACTIVATIONS = ("softmax", "sigmoid", None)
OVERLAPS = ("product", "min_max")
EMPTY_RULES = ("smooth", "skip", "suppress")
REDUCTIONS = ("mean", "sum", "none")
_STACKED = "wrap the loss in a MultiScaleLoss for the stacked outputs of a DynUNet"
ROUNDING = 1e-4  # by which values may miss 0 or 1: resampling and scale factors of files leave such values


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """Raise ValueError if `value` is not one of `choices`."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        message = f"Expected `{name}` to be one of {listed}, but got {value!r}: choose one of these."
        raise ValueError(message)


def check_positive(
    name: str, value: float, *, allow_zero: bool = False, remedy: str = "choose a value in this range"
) -> float:
    """Return `value` as a float; raise ValueError unless it is finite and positive, or 0 with `allow_zero`."""
    number = check_number(name, value)
    if number != number or number in (float("inf"), float("-inf")) or number < 0 or (number == 0 and not allow_zero):
        bound = "at least 0" if allow_zero else "above 0"
        message = f"Expected `{name}` to be a finite number {bound}, but got {value!r}: {remedy}."
        raise ValueError(message)
    return number


def check_number(name: str, value: Any) -> float:
    """Return `value` as a float; raise TypeError if it is not a number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        message = f"Expected `{name}` to be a number, but got {type(value).__name__}: pass an int or a float."
        raise TypeError(message)
    return float(value)


def check_fraction(
    name: str, value: float, *, allow_one: bool = False, remedy: str = "choose a value in this range"
) -> float:
    """Return `value` as a float; raise ValueError unless it is at least 0 and below 1, or 1 with `allow_one`."""
    number = check_number(name, value)
    if not (0 <= number < 1 or (allow_one and number == 1)):
        bound = "from 0 to 1" if allow_one else "at least 0 and below 1"
        message = f"Expected `{name}` to be {bound}, but got {value!r}: {remedy}."
        raise ValueError(message)
    return number


def check_module(name: str, module: Any) -> nn.Module:
    """Return `module`; raise TypeError if it is not a torch module."""
    if isinstance(module, nn.Module):
        return module
    message = f"Expected `{name}` to be a torch module, but got {type(module).__name__}: pass a loss such as IoULoss()."
    raise TypeError(message)


def check_activation(sigmoid: bool, softmax: bool, other_act: Callable[[Tensor], Tensor] | None) -> None:
    """Raise ValueError if more than one activation is requested, or TypeError if `other_act` is not callable."""
    if other_act is not None and not callable(other_act):
        message = (
            f"Expected `other_act` to be None or callable, but got {type(other_act).__name__}: pass a function of the "
            "logits, such as torch.sigmoid."
        )
        raise TypeError(message)
    options = {"sigmoid": sigmoid, "softmax": softmax, "other_act": other_act is not None}
    chosen = [name for name, on in options.items() if on]
    if len(chosen) > 1:
        message = (
            "Expected at most one of `sigmoid`, `softmax` and `other_act`, "
            f"but got {' and '.join(chosen)}: keep the one that your classes need."
        )
        raise ValueError(message)


def check_ignore_empty(ignore_empty: object) -> None:
    """Raise ValueError unless `ignore_empty` is True, False or "both"."""
    if ignore_empty is not True and ignore_empty is not False and ignore_empty != "both":
        message = (
            f'Expected `ignore_empty` to be True, False or "both", but got {ignore_empty!r}: choose "both" to leave '
            "out classes that are absent from both maps."
        )
        raise ValueError(message)


def check_ignore_index(ignore_index: Any) -> int | None:
    """Return `ignore_index`; raise TypeError unless it is None or an integer."""
    if ignore_index is None:
        return None
    if isinstance(ignore_index, numbers.Integral) and not isinstance(ignore_index, bool):
        return int(ignore_index)
    message = (
        f"Expected `ignore_index` to be None or an integer, but got {type(ignore_index).__name__}: pass the value of "
        "the label to ignore, such as 255."
    )
    raise TypeError(message)


def is_integer(value: object) -> TypeGuard[int]:
    """Return whether a value is an integer, of Python or NumPy, and no bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_integer(name: str, value: Any, remedy: str) -> int:
    """Return `value` as an int; raise TypeError unless it is an integer."""
    if not is_integer(value):
        message = f"Expected `{name}` to be an integer, but got {type(value).__name__}: {remedy}."
        raise TypeError(message)
    return int(value)


def check_count(name: str, value: Any, remedy: str, least: int = 1) -> int:
    """Return `value` as an int; raise TypeError unless it is an integer, and ValueError if it is below `least`."""
    count = check_integer(name, value, remedy)
    if count < least:
        message = f"Expected `{name}` to be at least {least}, but got {count}: {remedy}."
        raise ValueError(message)
    return count


def check_list(name: str, value: Any, remedy: str, kind: str = "a list") -> list[Any]:
    """Return the items of `value` as a list; raise TypeError if it is text, or a single thing."""
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping) and getattr(value, "ndim", 1) != 0:
        return list(value)
    message = f"Expected `{name}` to be {kind}, but got {type(value).__name__}: {remedy}."
    raise TypeError(message)


def check_class_numbers(name: str, value: Any) -> list[int] | None:
    """Return a list of class numbers, or None; raise TypeError for anything else: "1" would be a class of no voxel."""
    if value is None:
        return None
    remedy, kind = f"name the classes by their numbers, such as {name}=[1, 2]", "a list of class numbers"
    found = check_list(name, value.tolist() if isinstance(value, Tensor) else value, remedy, kind)
    wrong = [item for item in found if not is_integer(item)]
    if wrong:
        message = f"Expected `{name}` to be {kind}, but got {wrong[0]!r} in it: {remedy}."
        raise TypeError(message)
    return [int(item) for item in found]


def check_connectivity(connectivity: Any) -> int | None:
    """Return `connectivity`; raise ValueError unless it is None or fits 2 or 3 dimensions, which are not known yet."""
    if connectivity is None or (is_integer(connectivity) and connectivity in (4, 8, 6, 18, 26)):
        return None if connectivity is None else int(connectivity)
    message = (
        f"Expected `connectivity` to be 6, 18 or 26 in 3D, or 4 or 8 in 2D, but got {connectivity!r}: choose one of "
        "these, or None for the largest."
    )
    raise ValueError(message)


def check_tensor(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        message = f"Expected `{name}` to be a tensor, but got {type(value).__name__}: convert it with torch.as_tensor."
        raise TypeError(message)


def check_device(name: str, value: Tensor, input: Tensor) -> None:
    """Raise ValueError unless `value` is on the device of `input`."""
    if value.device != input.device:
        message = (
            f"Expected `{name}` on {input.device}, the device of `input`, but got {value.device}: move it with "
            f"{name}.to(input.device)."
        )
        raise ValueError(message)


def check_dimensions(
    name: str,
    shape: Sequence[int],
    form: str = "(B, C, *S)",
    *,
    expected: str = "have shape",
    too_many: str = "remove a dimension",
) -> None:
    """Raise ValueError unless a shape is of a form, with 1 to 3 spatial dimensions.

    Args:
        name: what has the shape, as the message names it.
        shape: the shape.
        form: "(B, C, *S)", "(C, *S)" or "(1, *S)".
        expected: what is expected of the form.
        too_many: the remedy for a dimension too many.
    """
    leading = form.count(",")
    if leading < len(shape) <= leading + 3:
        return
    missing = "the batch dimension, the channel dimension or both" if leading == 2 else "the channel dimension"
    remedy = f"add {missing}" if len(shape) <= leading else too_many
    message = f"Expected {name} to {expected} {form} with 1 to 3 spatial dimensions, but got {tuple(shape)}: {remedy}."
    raise ValueError(message)


def check_input(input: Tensor) -> None:
    """Raise TypeError or ValueError unless `input` is a float tensor (B, C, *S) with 1 to 3 spatial dimensions."""
    if isinstance(input, (list, tuple)):
        message = (
            f"Expected `input` to be a tensor, but got a {type(input).__name__} of {len(input)}: wrap the loss in a "
            "MultiScaleLoss for outputs at several scales, or in an AttentionSupervisionLoss for (logits, maps)."
        )
        raise TypeError(message)
    check_tensor("input", input)
    if not input.is_floating_point():
        message = f"Expected `input` to be floating point, but got {input.dtype}: pass logits or probabilities."
        raise TypeError(message)
    check_dimensions("`input`", input.shape, too_many=f"{_STACKED}, or remove a dimension")
    if input.shape[1] == 0:
        message = (
            f"Expected `input` to have at least one channel, but got shape {tuple(input.shape)}: give one channel per "
            "class."
        )
        raise ValueError(message)


def label_tolerance(values: Any, more: float = 0.0) -> Any:
    """Return by how much labels, an array or a tensor, may miss whole numbers: `ROUNDING` and four float32 steps."""
    return (ROUNDING + more + 2**-21 * abs(values)).clip(max=0.05)  # up to there, the nearest one is certain


def digits(value: float) -> str:
    """Return a number that is not whole with as many digits as show it: 0.7, or 2035.00012."""
    return next((text for text in (f"{value:g}", f"{value:.9g}") if float(text) % 1 != 0), repr(float(value)))


def check_real(name: str, labels: Tensor) -> None:
    """Raise TypeError if labels are complex numbers."""
    if labels.is_complex():
        message = f"Expected `{name}` to hold labels, but got {labels.dtype}: pass integers, booleans or fractions."
        raise TypeError(message)


def check_target(input: Tensor, target: Tensor) -> None:
    """Raise unless `target` is a label map (B, 1, *S) or per-class maps (B, C, *S) for an `input` (B, C, *S) there."""
    check_tensor("target", target)
    check_real("target", target)
    classes = input.shape[1]
    fits = target.ndim == input.ndim and target.shape[0] == input.shape[0] and target.shape[2:] == input.shape[2:]
    if fits and target.shape[1] in (1, classes):
        check_device("target", target, input)
        return
    space = tuple(input.shape[2:])
    remedies = []
    if tuple(target.shape) == (input.shape[0], *space):
        remedies.append("add the channel dimension, target.unsqueeze(1)")
    # A stack of outputs of 2D images has the dimensions of a 3D input, and per-class maps those of labels without one.
    same_batch = target.ndim == 4 == input.ndim - 1 and target.shape[0] == input.shape[0]
    if same_batch and target.shape[2:] == input.shape[3:] and target.shape[1] in (1, input.shape[2]):
        remedies.append(_STACKED)
    remedy = ", or ".join(remedies) or "pass both with the same batch and on the same grid"
    message = (
        f"Expected `target` to be a label map {(input.shape[0], 1, *space)} or per-class maps "
        f"{(input.shape[0], classes, *space)} for an input {tuple(input.shape)}, but got {tuple(target.shape)}: "
        f"{remedy}."
    )
    raise ValueError(message)


def warn_ignored(option: str, *, stacklevel: int) -> None:
    """Warn, as MONAI does, that an option has no effect on a single channel.

    torch.compile would break its graph here.
    """
    if not torch.compiler.is_compiling():
        warnings.warn(f"single channel prediction, `{option}` ignored.", stacklevel=stacklevel + 1)


def check_onehot_request(input: Tensor, target: Tensor, to_onehot_y: bool, *, stacklevel: int = 4) -> None:
    """Raise ValueError if `to_onehot_y` contradicts the target's shape; warn, as MONAI does, for a single channel."""
    if not to_onehot_y:
        return
    if input.shape[1] == 1:
        warn_ignored("to_onehot_y=True", stacklevel=stacklevel)
    elif target.shape[1] != 1:
        message = (
            f"Expected `target` to be a label map with one channel because to_onehot_y=True, but got {target.shape[1]} "
            "channels: leave to_onehot_y out, because the shape of the target decides."
        )
        raise ValueError(message)
