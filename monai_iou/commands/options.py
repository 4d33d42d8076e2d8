"""What the options of several commands have in common: their types, readers, checks and decorators."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

__all__ = [
    "FOLDER",
    "Choice",
    "Number",
    "check_fold",
    "check_folder",
    "check_folders",
    "check_tables",
    "fold_list",
    "is_file",
    "is_folder",
    "label_list",
    "output_option",
    "positive",
    "region_list",
    "tolerance_in_mm",
    "whole",
    "with_options",
]

_Command = TypeVar("_Command", bound=Callable[..., Any])


class _Place(click.Path):
    """A path; an empty one, as of a variable that is not set, would be the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path, or end with a usage error."""
        if value == "":
            self.fail("Expected a path, but got an empty one: write `.` for the current folder.", param, ctx)
        return super().convert(value, param, ctx)


FOLDER = _Place(path_type=Path)

if TYPE_CHECKING:
    _Words = click.Choice[str]
    _Type = click.ParamType[Any]
else:
    _Words = click.Choice  # which takes no type before click 8.2
    _Type = click.ParamType  # likewise


def output_option(*, help: str, default: str | None = None, metavar: str = "DIR") -> Callable[[_Command], _Command]:
    """`-o` or `--output` of a command, with a default or required."""
    given: dict[str, Any] = {"required": True} if default is None else {"default": Path(default), "show_default": True}
    return click.option("-o", "--output", type=FOLDER, metavar=metavar, help=help, **given)


class Choice(_Words):
    """One of some words; the one nearest to a mistyped word is suggested."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the word, or end with a usage error."""
        if value not in self.choices:
            near = [] if str(value).isdecimal() else difflib.get_close_matches(str(value), self.choices, n=1)
            remedy = f"perhaps you meant {near[0]}" if near else "choose one"
            known = f"{'one of ' if len(self.choices) > 1 else ''}{', '.join(self.choices)}"
            self.fail(f"Expected {known}, but got {value!r}: {remedy}.", param, ctx)
        return super().convert(value, param, ctx)


class Number(_Type):
    """A number of some kind; NaN and infinity are of none, unlike for the ranges of click."""

    name = "number"

    def __init__(self, kind: str, is_kind: Callable[[float], bool], remedy: str, read: type = float) -> None:
        self.kind, self.is_kind, self.remedy, self.read = kind, is_kind, remedy, read

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number, or end with a usage error."""
        try:
            number = self.read(value)
        except ValueError:
            number = math.nan
        if not self.is_kind(number):
            self.fail(f"Expected {self.kind}, but got {value!r}: {self.remedy}.", param, ctx)
        return number


def positive(remedy: str) -> Number:
    """Numbers above 0."""
    return Number("a positive number", lambda number: 0 < number < math.inf, remedy)


def whole(least: int, remedy: str) -> Number:
    """Whole numbers from `least`."""
    return Number(f"a whole number of at least {least}", lambda number: number >= least, remedy, int)


def with_options(*options: Callable[[_Command], _Command]) -> Callable[[_Command], _Command]:
    """Decorate a command with options, in the order in which the help lists them."""

    def decorated(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorated


def label_list(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...]:
    """`1,2` as (1, 2)."""
    try:
        return () if value is None else tuple(int(part) for part in value.split(","))
    except ValueError as error:
        message = f"Expected label values, but got {value!r}: separate whole numbers by commas, such as 1,2."
        raise click.BadParameter(message) from error


def region_list(context: click.Context, parameter: click.Parameter, value: str | None) -> dict[str, tuple[int, ...]]:
    """`whole=1+2,core=2` as {"whole": (1, 2), "core": (2,)}."""
    try:
        parts = [] if value is None else [part.split("=") for part in value.split(",")]
        regions = {name.strip(): tuple(int(label) for label in labels.split("+")) for name, labels in parts}
    except ValueError as error:
        message = f"Expected regions, but got {value!r}: write a name and its labels, such as whole=1+2,core=2."
        raise click.BadParameter(message) from error
    twice = next((name for name, labels in regions.items() if len(set(labels)) < len(labels)), None)
    if twice is not None:
        message = f"Expected every label of a region once, but got {value!r}: remove one from {twice}."
        raise click.BadParameter(message)
    if len(regions) != len(parts) or "" in regions:
        message = f"Expected every region to have a name of its own, but got {value!r}: rename one."
        raise click.BadParameter(message)
    return regions


def fold_list(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """`all`, or numbers of folds such as `0,2`, as they are."""
    if value is not None and not re.fullmatch(r"all|\d+(,\d+)*", value):
        message = f"Expected all or numbers of folds, but got {value!r}: write for instance 0,1,2."
        raise click.BadParameter(message)
    return value


def tolerance_in_mm(context: click.Context, parameter: click.Parameter, value: str) -> tuple[float, dict[str, float]]:
    """`2` as (2, {}); `1=0.5,2=2` as (1, {"1": 0.5, "2": 2}), where 1 mm is for the others."""
    try:
        if "=" not in value:
            return float(value), {}
        parts = [part.split("=") for part in value.split(",")]
        tolerances = {name.strip(): float(mm) for name, mm in parts}
    except ValueError as error:
        message = f"Expected a distance in mm, but got {value!r}: write one, or one per label such as 1=0.5,2=2."
        raise click.BadParameter(message) from error
    if len(tolerances) != len(parts):
        message = f"Expected one distance for each label, but got {value!r}: remove one."
        raise click.BadParameter(message)
    return 1.0, tolerances


def check_folder(name: str, path: Path, content: str) -> None:
    """Name a wrong path before anything that takes seconds is imported."""
    if not is_folder(path):
        message = f"Expected {name} to be {content}, but got `{path}`: check the path."
        raise click.UsageError(message)


def check_folders(folders: Mapping[str, Path | None]) -> None:
    """Check the folders of volumes that options name."""
    for option, path in folders.items():
        if path is not None:
            check_folder(f"`{option}`", path, "a folder of volumes")


def check_tables(tables: Mapping[str, Path | None]) -> None:
    """Name a wrong file likewise."""
    for option, path in tables.items():
        if path is not None and (is_folder(path) or not os.path.exists(path)):  # noqa: PTH110
            message = f"Expected `{option}` to be a file, but got `{path}`: check the path."
            raise click.UsageError(message)


def check_fold(folds: int | None, fold: int | None) -> None:
    """Check the fold that a command is to train or to plan alone."""
    if fold is None:
        return
    if folds is None:
        message = f"Expected `--folds` to be given with `--fold {fold}`, but it is not: add --folds 5 or drop --fold."
        raise click.UsageError(message)
    if fold >= folds:
        message = f"Expected `--fold` to be below `--folds {folds}`, but got {fold}: count from 0."
        raise click.UsageError(message)


def is_folder(path: Path) -> bool:
    """Whether a path is a folder's, whatever its length."""
    return os.path.isdir(path)  # noqa: PTH112 - unlike Path's it is False for a name that is too long


def is_file(path: Path) -> bool:
    """Whether a path is a file's, whatever its length."""
    return os.path.isfile(path)  # noqa: PTH113 - see `is_folder`
