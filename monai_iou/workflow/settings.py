"""Read and check the settings of the bundle's configs."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator
from numbers import Real
from typing import Any

import torch

__all__ = ["amp_type", "check_settings", "exit_with_message", "is_true", "optional"]


def is_true(value: object, key: str) -> bool:
    """Return a switch's value: `--resume true` on MONAI's command line arrives as the text "true".

    Args:
        value: true or false, as it is or as text.
        key: the switch's name, for the error.

    Example:
        >>> is_true("true", "resume"), is_true("false", "amp"), is_true(True, "amp")
        (True, False, True)

    Raises:
        ValueError: the value is neither true nor false.
    """
    text = str(value).lower()
    with exit_with_message():
        if text not in ("true", "false", "1", "0"):
            message = f"Expected `{key}` to be true or false, but got {value!r}: write --{key} true or --{key} false."
            raise ValueError(message)
    return text in ("true", "1")


@contextlib.contextmanager
def exit_with_message() -> Iterator[None]:
    """Under `python -m monai.bundle`, end with the error's sentence: MONAI would bury it in chained tracebacks."""
    try:
        yield
    except ValueError as error:
        specification = getattr(sys.modules.get("__main__"), "__spec__", None)
        if specification is not None and specification.name.startswith("monai.bundle"):
            sentence = f"monai_iou: {error}"
            raise SystemExit(sentence) from error
        raise


SWITCHES = ("resume", "tta_flips", "tune_postprocessing")


def check_settings(**settings: object) -> None:
    """Check settings of a run before anything is read.

    Args:
        settings: `learning_rate`, a positive number; `ema_decay`, None or a number between 0 and 1; switches, true or
            false; every other name a positive integer, `num_workers` also 0.

    Raises:
        ValueError: one of them is something else.

    Example:
        >>> check_settings(epochs=10, learning_rate=1e-3, num_workers=0, ema_decay=None)
    """
    for name, value in settings.items():
        if name in SWITCHES:
            is_true(value, name)
            continue
        kind, usable = _kind(name, value)
        if not usable:
            with exit_with_message():
                message = f"Expected `{name}` to be {kind}, but got {value!r}: leave --{name} out for the default."
                raise ValueError(message)


def _kind(name: str, value: object) -> tuple[str, bool]:
    """Return what a setting must be, in words, and whether it is."""
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if name == "learning_rate":
        return "a positive number", 0 < number < math.inf
    if name == "ema_decay":
        return "null or a number between 0 and 1", optional(value) is None or 0 < number < 1
    least = 0 if name == "num_workers" else 1
    return f"an integer of at least {least}", least <= number < math.inf and number == int(number)


def optional(value: Any) -> Any:
    """Return None for null, which arrives as text from MONAI's command line, else the value.

    Example:
        >>> optional("null"), optional(0.9)
        (None, 0.9)
    """
    return None if str(value).lower() in ("null", "none") else value


def amp_type(value: object) -> torch.dtype:
    """Return the type of mixed precision, from its name or as it is.

    Example:
        >>> amp_type("bfloat16"), amp_type(torch.float16)
        (torch.bfloat16, torch.float16)

    Raises:
        ValueError: it is neither.
    """
    types = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    name = str(value).removeprefix("torch.")
    if name not in types:
        with exit_with_message():
            message = f"Expected `amp_dtype` to be float16 or bfloat16, but got {value!r}: write --amp_dtype bfloat16."
            raise ValueError(message)
    return types[name]
