"""The bundle's keys on a command line, `--epochs 3` or `--epochs=3`: a mistyped one is refused with a suggestion."""

from __future__ import annotations

import ast
import difflib
import itertools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from .errors import reported

__all__ = [
    "INFERENCE_SETS",
    "TRAINING_SETS",
    "CommandWithKeys",
    "check_values",
    "known_keys",
    "names_keys",
    "own_options",
    "plain_values",
    "read_config",
    "read_keys",
    "words_of_keys",
]

PACKAGE = Path(__file__).resolve().parent.parent
CONFIGS = Path("bundles") / "small_foreground_segmentation" / "configs"
MARK = "\ufeff"  # of the byte order, which editors of Windows may put before a text
WORDS, LISTS = "monai_iou.keys", "monai_iou.lists"  # of a context's meta
PATHS = ("bundle_root", "dataset_dir", "ckpt_dir", "output_dir", "cache_dir", "start_from")  # as of the bundle
SWITCH = ("true", "false")  # which the bundle's switches take, and flags do not
# Keys that a command sets itself, by what the user writes.
TRAINING_SETS = {
    "bundle_root": "--output", "ckpt_dir": "--output", "output_dir": "--output", "dataset_dir": "DATASET",
}  # fmt: skip
INFERENCE_SETS = {
    "bundle_root": "RUN", "ckpt_dir": "RUN", "models": "RUN and --folds", "model_files": "RUN and --folds",
    "images": "IMAGES", "dataset_dir": "IMAGES", "output_dir": "--output", "mask_suffix": "--output",
    "mask_format": "--format", "save_probabilities": "--save-probabilities", "tta_flips": "--tta",
}  # fmt: skip
STORED = ("patch_size", "pixdim", "base_channels", "full_resolution")  # with a model
# Options of MONAI's own command, which are no keys.
OF_MONAI = ("tracking", "tracking_uri", "experiment_name", "run_name")
SETS = {"train": TRAINING_SETS, "inference": INFERENCE_SETS}
# Whom to give a key of another shipped config; the first of several that have it is named.
TAKEN_BY = {
    "train": "`monai-iou train`",
    "inference": "`monai-iou predict`",
    "evaluate": "`python -m monai.bundle run` with evaluate.json",
}

# Parts of inference.json, which train.json and evaluate.json have under `validate`.
PARTS = ("dataloader", "dataset", "evaluator", "handlers", "inferer", "postprocessing", "preprocessing")


class CommandWithKeys(click.Command):
    """A command that takes keys of the bundle with their values, anywhere among its own options and arguments.

    Every long option that is not its own is taken for a key; a value follows it, or stands behind `=`.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Set the keys' words aside, for `words_of_keys`, and parse the rest."""
        own = {name: each for each in self.get_params(ctx) if isinstance(each, click.Option) for name in each.opts}
        left = list(args)
        rest: list[str] = []
        keys: list[str] = ctx.meta.setdefault(WORDS, [])
        while left and left[0] != "--":
            word = left.pop(0)
            name, equals, value = word.partition("=")
            if name in own and own[name].is_flag and (equals or (left and left[0].lower() in SWITCH)):
                raise click.UsageError(_flag_with_value(name, value if equals else left[0]))
            target = keys if name.startswith("--") and name not in own else rest
            target.append(word)
            takes_value = not equals and (target is keys or (word in own and not own[word].is_flag))
            target += [left.pop(0)] if takes_value and left else []
            if target is keys and (several := _several(value if equals else target[-1], left)):
                ctx.meta.setdefault(LISTS, {})[name] = several
        return super().parse_args(ctx, [*rest, *left])


def words_of_keys(context: click.Context) -> list[str]:
    """The words of the keys and their values, as `read_keys` takes them."""
    return list(context.meta.get(WORDS, ()))


def own_options(context: click.Context) -> list[str]:
    """The names of a command's own long options, without dashes."""
    return [name[2:] for parameter in context.command.params for name in parameter.opts if name.startswith("--")]


def known_keys(configs: Sequence[Path], shipped: str = "train", option: str = "--config") -> set[str]:
    """The keys of a shipped config, and of the user's own configs.

    The files are read as they lie: importing the package to ask for them takes seconds.

    Args:
        configs: of the user.
        shipped: name of the shipped config.
        option: that names these, for the message about one that cannot be read.
    """
    return {key for path in (_shipped(shipped), *configs) for key in _keys_in(path, option)}


def _shipped(name: str) -> Path:
    places = [folder / CONFIGS / f"{name}.json" for folder in (PACKAGE, PACKAGE.parent)]
    return next(path for path in places if path.is_file())


def check_values(given: Mapping[str, Any], shipped: str = "train") -> None:
    """Check settings and devices among the bundle's keys as it will, but before anything is read, planned or written.

    Args:
        given: key -> value; what MONAI resolves is left to it.
        shipped: name of the shipped config.

    Raises:
        click.UsageError: a setting is out of its range, or this machine does not have a device.
    """
    names = read_config(_shipped(shipped), "--config")["settings"]
    plain = plain_values(given)
    if not plain:
        return
    from monai_iou.workflow.devices import check_devices
    from monai_iou.workflow.settings import Settings

    with reported(ValueError):
        Settings(**{name: value for name, value in plain.items() if name in names})
        check_devices(plain)


def plain_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of which MONAI resolves nothing: their values are no lists, dictionaries, expressions or references."""
    return {name: value for name, value in given.items() if _is_plain(value)}


def _is_plain(value: object) -> bool:
    return not isinstance(value, (dict, list)) and not str(value).startswith(("$", "@", "%"))


def names_keys(given: Mapping[str, Any], configs: Sequence[Path]) -> set[str]:
    """The bundle's keys that a command line or the user's own configs give, also by a part such as `train#inferer`."""
    of_line = {_root(name.lstrip("+~")) for name in given}
    return of_line.union(*(_keys_in(path, "--config") for path in configs))


def read_config(path: Path, option: str) -> dict[str, Any]:
    """Read a user's config, as `monai_iou.workflow.config_files` does, which takes seconds to import.

    Args:
        path: of the file.
        option: that names it, for the message.

    Raises:
        click.UsageError: it cannot be read, or is no JSON object.
    """
    content, why, remedy = None, "it holds no object, {...}", "correct it"
    try:
        text = path.read_text(encoding="utf-8")
        if text.startswith(MARK):
            why, remedy = "it begins with a byte-order mark, which MONAI does not read", "save it without the mark"
        else:
            content = json.loads(text)
    except (OSError, ValueError) as error:
        from monai_iou.tables import text_remedy

        why, remedy = str(error), text_remedy(error, remedy)
    if isinstance(content, dict):
        return content
    message = f"Expected `{option}` to be a JSON file of the bundle's keys, but got `{path}` ({why}): {remedy}."
    raise click.UsageError(message)


def _keys_in(path: Path, option: str) -> set[str]:
    return {_root(key.lstrip("+~")) for key in read_config(path, option)}


def read_keys(
    words: Sequence[str], known: Collection[str], options: Collection[str], shipped: str = "train"
) -> dict[str, Any]:
    """The keys that a command line gives beyond the command's own options.

    Args:
        words: what is left of the command line.
        known: keys of the bundle.
        options: names of the command's own options, without dashes.
        shipped: name of the shipped config whose keys these are.

    Returns:
        Key -> value, read as MONAI's own command line reads it: Python's literals, and text; a path is text always.

    >>> read_keys(["--batch_size", "2", "--loss::_target_=IoULoss"], {"batch_size", "loss"}, [])
    {'batch_size': 2, 'loss::_target_': 'IoULoss'}
    """
    keys: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise click.UsageError(_word_alone(word))
        name, equals, value = word[2:].partition("=")
        _check(name, known, options, shipped)
        if not equals and not rest:
            message = f"Expected a value after --{name}, but the command line ends: add it."
            raise click.UsageError(message)
        keys[name] = _value(name, value if equals else rest.pop(0))
    return keys


def _flag_with_value(name: str, value: str) -> str:
    remedy = f"leave {name} out" if value.lower() == "false" else f"write {name} alone"
    return f"Expected {name} without a value, but got {value!r}: {remedy}."


def _several(value: str, words: Sequence[str]) -> list[str]:
    """The numbers of a list that was typed as several words, [] if it was not."""
    numbers = [word.strip("[](),") for word in [value, *itertools.takewhile(_is_number, words)]]
    return numbers if _is_number(value) and len(numbers) > 1 else []


def _is_number(word: str) -> bool:
    try:
        float(word.strip("[](),"))
    except ValueError:
        return False
    return True


def _word_alone(word: str) -> str:
    context = click.get_current_context(silent=True)
    for name, numbers in context.meta.get(LISTS, {}).items() if context is not None else ():
        if word.strip("[](),") not in numbers and any(Path(number).exists() for number in numbers[1:]):
            continue  # a folder that is called by a number
        return (
            f"Expected one value after {name}, but got {' '.join(numbers)}: write the list as one word, "
            f'"[{",".join(numbers)}]".'
        )
    return f"Expected options and keys with their values, but got {word!r}: write the name of its key before it."


def _check(name: str, known: Collection[str], options: Collection[str], shipped: str) -> None:
    root = _root(name.lstrip("+~"))
    sets = SETS.get(shipped, {})
    if root in sets:
        message = f"Expected a key that you may set, but the command sets `{root}` itself: use {sets[root]}."
        raise click.UsageError(message)
    if shipped == "inference" and root in STORED:
        message = f"Expected no key that is stored with the model, but got `{root}`: leave it out, or name another RUN."
        raise click.UsageError(message)
    if root in known:
        return
    if meant := _in_another_place(name.lstrip("+~"), known, shipped):
        message = f"Expected an option or a key of the bundle, but got --{name}: perhaps you meant --{meant}."
        raise click.UsageError(message)
    other = next((config for config in TAKEN_BY if config != shipped and root in known_keys([], config)), None)
    if other is not None and root not in PARTS:
        own = SETS.get(other, {}).get(root)
        remedy = f"give it to {TAKEN_BY[other]}" if own is None else f"use {own} of {TAKEN_BY[other]}"
        remedy = f"use --{root}s" if f"{root}s" in options else remedy  # `fold` of a training, of which several predict
        message = f"Expected a key of {shipped}.json, but got `{root}`, which is one of {other}.json: {remedy}."
        raise click.UsageError(message)
    if root.replace("-", "_") in OF_MONAI:
        message = (
            f"Expected an option or a key of the bundle, but got --{name}, which MONAI's own command takes: give it to "
            "`python -m monai.bundle run`, as docs/integrations.md describes."
        )
        raise click.UsageError(message)
    near = difflib.get_close_matches(root, sorted({*known, *options}), n=1)
    remedy = f"perhaps you meant --{near[0]}" if near else "docs/bundle.md lists the keys"
    message = f"Expected an option or a key of the bundle, but got --{name}: {remedy}."
    raise click.UsageError(message)


def _in_another_place(name: str, known: Collection[str], shipped: str) -> str | None:
    """The name in this config of what another has beside or below `validate`, such as `inferer#device`."""
    root, *rest = re.split("#|::", name)
    if shipped != "inference":
        return f"validate#{root}#{'#'.join(rest)}" if root in PARTS and rest else None
    return "#".join(rest) if root == "validate" and rest and rest[0] in known else None


def _root(name: str) -> str:
    return re.split("#|::", name)[0]


def _value(name: str, text: str) -> Any:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    # Python's number for the folder 2024_01 is 202401.
    return text if name.lstrip("+~") in PATHS and not isinstance(value, (str, type(None))) else value
