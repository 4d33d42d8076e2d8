"""Errors of a user's config in one sentence: MONAI buries them under its own, and names no cause."""

from __future__ import annotations

import difflib
import importlib
import re
import traceback
from collections.abc import Sequence
from pathlib import Path

from monai_iou.planning.own_errors import chain

__all__ = ["ConfigError", "explained"]

COMPONENT = re.compile(r"Failed to instantiate component '([^']+)' with keywords: ([^\n\\]*)")
EXPRESSION = re.compile(r"Failed to evaluate ConfigExpression:\s*(.+)", re.DOTALL)
NOT_FOUND = re.compile(r"Cannot locate class or function path: '([^']+)'")
NOT_OURS = re.compile(r"module '(monai_iou[\w.]*)' has no attribute '(\w+)'")
UNDEFINED = re.compile(r"the referring item `@([^`]+)` is not defined")
# What torch makes of an error in a loader's process: its traceback as text, with that of its cause, if any, before it.
OF_WORKER = re.compile(r"Original Traceback \(most recent call last\):\n((?:[ \t][^\n]*\n)*)(\S.*)", re.DOTALL)
FRAME = re.compile(r'File "([^"\n]+)", line (\d+)')
NEXT_TRACEBACK = re.compile(r"\n\n(?:The above exception was|During handling of the above) [^\n]*\n\nTraceback")
OURS = "$monai_iou.workflow."  # of an expression of the shipped configs, which is not the user's to correct
MOST_SHOWN = 200


class ConfigError(RuntimeError):
    """A config cannot be run; the message says in one sentence what in it, and why."""


def explained(error: BaseException, remedy: str) -> ConfigError:
    """Return an error of this package's kind for one that MONAI, torch or a user's own code raised in a run.

    Args:
        error: it.
        remedy: what to do about one that no config is to blame for.
    """
    causes = list(chain(error))
    missing = next((match for each in causes if (match := NOT_FOUND.search(str(each)))), None)
    if missing is not None:
        return ConfigError(_not_found(missing[1]))
    undefined = next((match for each in causes if (match := UNDEFINED.search(str(each)))), None)
    if undefined is not None:  # MONAI raises it from a list of all keys, which says nothing
        name = undefined[1].replace("::", "#")
        return ConfigError(f"Expected `@{name}` to refer to a key of the config, but there is none: define it.")
    of_worker = next((found for each in reversed(causes) if (found := _of_worker(each))), None)
    kind, said, place = of_worker or _of_this_process(causes[-1])
    if of_worker and said.startswith("Expected ") and (kind == "ValueError" or kind.startswith("monai_iou.")):
        return ConfigError(said)
    name, words = kind.rpartition(".")[2], _one_line(said)
    root = f"{name}: {words}{place}" if words else f"{name}{place}"
    for each in reversed(causes):
        if match := COMPONENT.search(str(each)):
            arguments = match[2].replace(",", ", ") or "no arguments"
            return ConfigError(f"Expected {match[1]} to take {arguments}, but got {root}: correct its keys.")
        if (match := EXPRESSION.search(str(each))) and OURS not in match[1]:
            expression = _expression(match[1])
            return ConfigError(f"Expected the config's {expression} to have a value, but got {root}: correct it.")
    if "<string>" in place and (gone := NOT_OURS.search(said)):  # what an expression of a shipped config names
        message = (
            f"Expected the config to be of this version of monai_iou, but {gone[1]} has no `{gone[2]}`: copy the "
            "bundle anew with `monai-iou init`."
        )
        return ConfigError(message)
    return ConfigError(f"Expected the run to go on, but got {root}: {remedy}.")


def _of_worker(error: BaseException) -> tuple[str, str, str] | None:
    """The class, words and place of what went wrong first in a loader's process; None for an error of this one."""
    match = OF_WORKER.search(str(error))
    if match is None:
        return None
    kind, _, said = NEXT_TRACEBACK.split(match[2])[0].strip().partition(": ")
    return kind, said, _line([(file, int(line)) for file, line in FRAME.findall(match[1])])


def _of_this_process(error: BaseException) -> tuple[str, str, str]:
    frames = [(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)]
    return type(error).__name__, str(error), _line(frames)


def _expression(text: str) -> str:
    """An expression as MONAI quotes it, in quotation marks and for a long one in parentheses too."""
    line = _one_line(text)
    return (line[1:-1] if line.startswith("(") and line.endswith(")") else line).strip("\"'")


def _not_found(name: str) -> str:
    module, _, attribute = name.rpartition(".")
    try:
        near = difflib.get_close_matches(attribute, dir(importlib.import_module(module)), n=1)
    except (ImportError, ValueError):
        near = []
    made = "copy the bundle anew with `monai-iou init` if another version made the config"
    otherwise = f"correct its name, or {made if name.startswith('monai_iou.') else 'install its package'}"
    remedy = f"perhaps you meant {module}.{near[0]}" if near else otherwise
    return f"Expected `_target_` to name a class or function, but {name} cannot be found: {remedy}."


def _line(frames: Sequence[tuple[str, int]]) -> str:
    """The line that raised an error, of any file but those of MONAI's and torch's libraries."""
    own = [(file, line) for file, line in frames if "site-packages" not in file]
    return f" (line {own[-1][1]} of {Path(own[-1][0]).name})" if own else ""


def _one_line(text: str) -> str:
    line = " ".join(text.split()).rstrip(".")
    return line if len(line) <= MOST_SHOWN else f"{line[:MOST_SHOWN]}..."
