"""Read and check the settings of the bundle's configs."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import sys
from collections.abc import Iterator
from numbers import Integral, Real
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from monai_iou.files import OutputError
from monai_iou.workflow.literal import PATHS
from monai_iou.workflow.log_file import log_failure
from monai_iou.workflow.mask_formats import MASK_ENDINGS
from monai_iou.workflow.typed_words import is_bundle_command, is_cut, misread, typed_text

__all__ = ["Settings", "amp_type", "check_device", "exit_with_message", "is_true", "optional"]


def is_true(value: object, key: str) -> bool:
    """Return a switch's value: `--resume true` on MONAI's command line arrives as the text "true".

    Args:
        value: true or false, as it is or as text; null, which is not true, for a switch of `OPEN`.
        key: the switch's name, also for the error.

    Example:
        >>> is_true("true", "resume"), is_true("false", "amp"), is_true(True, "amp"), is_true("null", "instance")
        (True, False, True, False)

    Raises:
        ValueError: the value is neither true nor false.
    """
    text = str(value).lower()
    if key in OPEN and optional(value) is None:
        return False
    with exit_with_message():
        if text not in ("true", "false", "1", "0"):
            kind = "true, false or null" if key in OPEN else "true or false"
            other = f", or leave --{key} out for null" if key in OPEN else ""
            message = f"Expected `{key}` to be {kind}, but got {value!r}: write --{key} true or --{key} false{other}."
            raise ValueError(message)
    return text in ("true", "1")


@contextlib.contextmanager
def exit_with_message() -> Iterator[None]:
    """Under `python -m monai.bundle`, end with the error's sentence: MONAI would bury it in chained tracebacks."""
    try:
        yield
    except (ValueError, OutputError) as error:
        if is_bundle_command():
            log_failure(error)
            sentence = f"monai_iou: {error}"
            raise SystemExit(sentence) from error
        raise


OPEN = ("instance",)  # null leaves it to the loss
SWITCHES = (
    "amp",
    "calibration",
    "full_resolution",
    "load_pretrain",
    "overwrite",
    "resume",
    "save_probabilities",
    "score_trained_cases",
    "tta_flips",
    "tune_postprocessing",
)
OPEN_PATHS = ("cache_dir", "start_from")  # may be null
SHARES = ("augmentation", "cache_rate", "crop_jitter", "flip_prob")
NOT_NEGATIVE = ("context_mm", "negative_crops", "positive_crops", "size_exponent", "weight_decay")
FROM_ZERO = ("cache_workers", "num_workers", "pictures", "seed", "split_seed")  # integers; all others are from 1
UNCHECKED = ("evaluate_on", "folds", "images", "keep_weights", "models", "pixdim")  # null, or checked by its reader
CHOICES: dict[str, tuple[Any, ...]] = {"raters": ("mean", "draw"), "spatial_dims": (None, 2, 3)}


class Settings(SimpleNamespace):
    """The keys of a run that a command line may give as text, each read and checked once.

    The configs make one object of it, `settings`, and take the keys' values from there.

    Args:
        given: key -> value. Switches are true or false; paths are text; `amp_dtype` is float16 or bfloat16;
            `learning_rate` is a positive number; `val_fraction` and `sw_overlap` are numbers from 0 to less than 1,
            `SHARES` from 0 to 1, `NOT_NEGATIVE` from 0; `ema_decay` is None or a number between 0 and 1; every other
            key is a positive integer, `FROM_ZERO` also 0.

    Raises:
        ValueError: one of them is something else, or `positive_crops` and `negative_crops` are both 0.

    Example:
        >>> settings = Settings(resume="true", cache_dir="null", epochs=10, amp_dtype="bfloat16")
        >>> settings.resume, settings.cache_dir, settings.epochs, settings.amp_dtype
        (True, None, 10, torch.bfloat16)
    """

    def __init__(self, **given: Any) -> None:
        super().__init__(**{name: _resolved(name, value) for name, value in given.items()})
        if getattr(self, "positive_crops", 1) == getattr(self, "negative_crops", 1) == 0:
            with exit_with_message():
                message = (
                    "Expected `positive_crops` or `negative_crops` to be above 0, but got 0 for both: give the ratio "
                    "of the two kinds of patches, such as --positive_crops 2 --negative_crops 1."
                )
                raise ValueError(message)

    @property
    def validates(self) -> bool:
        """Whether a training may hold cases out: a fraction of them, or a fold; also where it is not told."""
        # A train.json of an earlier version does not tell the fraction; `cases.validation` is empty if that is 0.
        return bool(getattr(self, "val_fraction", True)) or getattr(self, "folds", None) is not None


def _resolved(name: str, value: Any) -> Any:
    _check_typed(name, value)
    if name in SWITCHES:
        return is_true(value, name)
    if name in PATHS:
        return _path(name, value)
    if name == "amp_dtype":
        return amp_type(value)
    if name == "mask_suffix":
        return str(optional(value) or "")
    if name == "mask_format":
        return _mask_format(value)
    if name in UNCHECKED:
        return optional(value)
    if optional(value) in CHOICES.get(name, ()) and not isinstance(value, float):
        return optional(value)
    kind, usable = _kind(name, value)
    if not usable:
        as_integer = int(value) if isinstance(value, float) and value.is_integer() else None
        whole = as_integer is not None and (value in CHOICES.get(name, ()) or _kind(name, as_integer)[1])
        remedy = f"write --{name} {as_integer}" if whole else f"leave --{name} out for the default"
        with exit_with_message():
            message = f"Expected `{name}` to be {kind}, but got {value!r}: {remedy}."
            raise ValueError(message)
    return optional(value)


def _check_typed(name: str, value: object) -> None:
    """Refuse a path of which the command line made another one: `x#y` arrives as x, and 2024_01 as 202401."""
    typed = typed_text(name, sys.argv) if is_bundle_command() else None
    if typed is None or not (is_cut(value, typed) or (name in PATHS and misread(value, typed))):
        return
    remedy = "rename the folder, or make a link to it under another name"
    if not is_cut(value, typed):
        remedy = f"write --{name} ./NAME for a folder called by a number or a word such as None"
    with exit_with_message():
        message = f"Expected `{name}` to be {typed!r} as it was typed, but the command line read {value!r}: {remedy}."
        raise ValueError(message)


def _mask_format(value: object) -> str:
    ending = f".{str(value).lower().removeprefix('.')}"
    with exit_with_message():
        if ending not in MASK_ENDINGS:
            message = f"Expected `mask_format` to be among {', '.join(MASK_ENDINGS)}, but got {value!r}: choose one."
            raise ValueError(message)
    return ending


def _path(name: str, value: Any) -> str | None:
    if name in OPEN_PATHS and optional(value) is None:
        return None
    with exit_with_message():
        if isinstance(value, bool) or not isinstance(value, (str, int, os.PathLike)) or str(value) == "":
            message = (
                f"Expected `{name}` to be a path, but the command line read {value!r}, a {type(value).__name__}: "
                f"write --{name} ./NAME for a folder called by a number or a word such as None."
            )
            raise ValueError(message)
        if "::" in str(value):
            message = (
                f"Expected `{name}` to be a path without `#` and `::`, which MONAI's configs take for separators, but "
                f"got {str(value)!r}: rename the folder, or make a link to it under another name."
            )
            raise ValueError(message)
        try:
            Path(value if isinstance(value, os.PathLike) else str(value)).stat()
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            pass  # whoever reads or writes there says so
        except (OSError, ValueError) as error:  # too long a name, a loop of links, a zero byte
            message = f"Expected `{name}` to be a valid path, but got {str(value)!r} ({error}): name another one."
            raise ValueError(message) from error
    return str(value)


def _kind(name: str, value: object) -> tuple[str, bool]:
    """Return what a setting must be, in words, and whether it is."""
    if name in CHOICES:
        return " or ".join("null" if choice is None else str(choice) for choice in CHOICES[name]), False
    if name == "ema_decay":
        return "null or a number between 0 and 1", optional(value) is None or 0 < _number(value) < 1
    if name == "sw_overlap":
        sides = value if isinstance(value, (list, tuple)) and value else [value]
        return "a number from 0 to less than 1, or one for each axis", all(0 <= _number(side) < 1 for side in sides)
    number = _number(value)
    if name == "learning_rate":
        return "a positive number", 0 < number < math.inf
    if name == "val_fraction":
        return "a number from 0 to less than 1", 0 <= number < 1
    if name in SHARES:
        return "a number from 0 to 1", 0 <= number <= 1
    if name in NOT_NEGATIVE:
        return "a number of at least 0", 0 <= number < math.inf
    least = 0 if name in FROM_ZERO else 1
    return f"an integer of at least {least}", isinstance(value, Integral) and least <= number


def _number(value: object) -> float:
    """Return a value as a number, NaN for what is none."""
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan


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


def check_device(value: Any, key: str = "device", workers: int = 0) -> None:
    """Refuse a device that torch does not know or this machine does not have, before anything is moved to it.

    Args:
        value: a `torch.device`, or what makes one.
        key: of the bundle, for the error.
        workers: number of processes that are to use it, which cannot be a GPU if they are forked from this one.

    Example:
        >>> check_device("cpu")

    Raises:
        ValueError: it cannot be used. Under `python -m monai.bundle` that one sentence ends the program.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        device = torch.device(value)
        if device.type != "cuda":  # there it would take memory
            torch.empty(0, device=device)
        usable = device.type != "cuda" or (device.index or 0) < count
    except (AssertionError, ImportError, RuntimeError, TypeError):
        usable = False
    if not usable:
        known = {0: "cpu, as torch can use no CUDA GPU here", 1: "cpu or cuda"}
        message = (
            f"Expected `{key}` to be {known.get(count, f'cpu or cuda:0 to cuda:{count - 1}')}, but got {str(value)!r}: "
            f"write --{key} {'cuda' if count else 'cpu'}, or leave --{key} out for the default."
        )
        with exit_with_message():
            raise ValueError(message)
    if workers and torch.device(value).type == "cuda" and _forks():
        message = (
            f"Expected `{key}` to be cpu, as `num_workers` is {workers} and forked processes cannot use a GPU, but got "
            f"{str(value)!r}: set `num_workers` to 0, or leave --{key} out for the default."
        )
        with exit_with_message():
            raise ValueError(message)


def _forks() -> bool:
    # To ask for the default one would fix it.
    chosen = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    return chosen == "fork"
