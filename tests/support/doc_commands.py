"""Read the commands out of a Markdown page and check each against the program that it would call."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import pydoc
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import click
from monai.bundle import scripts
from places import ROOT

from monai_iou.cli import cli
from monai_iou.workflow.named_networks import NETWORKS

CONFIGS = ROOT / "bundles" / "small_foreground_segmentation" / "configs"
SHELLS = ("sh", "bash", "console")
PLANS = ("plan.json",)  # what `monai-iou plan` writes: overrides of the keys of train.json
# Both fences in one expression: a closing fence can never be read as an opening one.
_FENCED = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)
_PROGRAM = re.compile(r"(?:\S*/)?(monai-iou|python3?|torchrun|pytest|\.ci/\w+)$")


def blocks(text: str, *languages: str) -> list[str]:
    """Return the contents of the fenced blocks in these languages."""
    return [body for language, body in _FENCED.findall(text) if language in languages]


def problems(text: str) -> list[str]:
    """Name everything that is wrong with the commands and options that a page shows."""
    wrong = [f"not in a fenced block: {line}" for line in _indented_commands(text)]
    for words, whole in commands(text):
        try:
            _check(words, whole)
        except (LookupError, ValueError, click.ClickException) as error:
            message = error.format_message() if isinstance(error, click.ClickException) else str(error)
            wrong.append(f"{shlex.join(words)}: {message}")
    wrong += [f"a shell would read the brackets: {code}" for code in _bare_brackets(text)]
    known = _known_options()
    return wrong + [f"no command has {name}" for name in _options_alone(text) if not _is_option(name, known)]


def commands(text: str) -> Iterator[tuple[list[str], bool]]:
    """Yield the words of each command of a page, and whether it is whole: inside a sentence it may be abridged."""
    for block in blocks(text, *SHELLS):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|\|\||[|;]", line.removeprefix("$ ")):
                yield from ((words, True) for words in _words(part))
    for block in blocks(text, "text"):  # what a program prints may name the command to go on with, on several lines
        for line in re.sub(r"\n(?=--)", " ", block).splitlines():
            yield from ((words, True) for words in _words(line))
    for code in re.findall(r"`([^`\n]+)`", _FENCED.sub("", text)):
        yield from ((words, False) for words in _words(code))


def _words(line: str) -> list[list[str]]:
    """Return the words of a line if it is a command that can be checked: none or one."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        return []
    while words and re.match(r"\w+=", words[0]):  # variables of the environment
        words = words[1:]
    return [words] if words and _PROGRAM.match(words[0]) else []


def _indented_commands(text: str) -> list[str]:
    return re.findall(r"^ {4,}(?:monai-iou|python|torchrun|pytest) .*$", _FENCED.sub("", text), re.MULTILINE)


def _bare_brackets(text: str) -> list[str]:
    """Return what a reader types into a shell in which a bracket stands outside of quotes, where it is a pattern."""
    typed = [line for block in blocks(text, "sh", "bash") for line in block.replace("\\\n", " ").splitlines()]
    typed += [line[2:] for block in blocks(text, "console") for line in block.splitlines() if line.startswith("$ ")]
    alone = re.findall(r"`([^`\n]+)`", _FENCED.sub("", text))
    typed += [code for code in alone if code.startswith("--") or _words(code)]
    return [code for code in typed if "[" in re.sub(r"\"[^\"]*\"|'[^']*'|#.*", "", code)]


def _options_alone(text: str) -> set[str]:
    """Return the options that sentences name by themselves, as `--epochs 100`."""
    code = re.findall(r"`(--[^`\n]+)`", _FENCED.sub("", text))
    return {name.split("=")[0] for item in code for name in re.findall(r"(?<!\S)--[\w:#-]+", item)}


def _known_options() -> set[str]:
    keys = {f"--{key}" for path in CONFIGS.glob("*.json") for key in json.loads(path.read_text())}
    options = {name for command in cli.commands.values() for parameter in command.params for name in parameter.opts}
    scripted = {name for path in (ROOT / "benchmarks").glob("*.py") for name in _declared(path)}
    return keys | options | scripted | {"--help", "--version", "--tracking_uri"}


def _is_option(name: str, known: set[str]) -> bool:
    """Whether an option that a sentence names is a command's, a key of the configs, or a key inside them."""
    name = name.replace("#", "::")  # MONAI takes both
    if "::" not in name:
        return name in known
    for config in ("train.json", "inference.json"):
        try:
            _check_key(name.removeprefix("--"), "monai_iou.IoULoss", _config(config))
        except LookupError:
            continue
        return True
    return False


def _check(words: Sequence[str], whole: bool) -> None:
    """Raise an error that says what is wrong with a command."""
    program = PurePosixPath(words[0]).name
    if program == "monai-iou":
        _check_ours(words[1:], whole)
    elif program == "pytest" or words[0].startswith(".ci/"):
        paths = [words[0], *words[1:]] if words[0].startswith(".ci/") else words[1:]
        _check_paths(path for path in paths if "/" in path)
    elif "-m" in words:
        module, *rest = words[words.index("-m") + 1 :]
        if module == "monai.bundle":
            _check_bundle(rest)
        elif module.startswith("benchmarks."):
            path = ROOT / module.replace(".", "/")
            _check_script(path / "__main__.py" if path.is_dir() else path.with_suffix(".py"), rest)
    elif len(words) > 1 and words[1].endswith(".py"):
        _check_script(ROOT / words[1], words[2:])


def _check_paths(paths: Iterator[str]) -> None:
    for path in paths:
        if not (ROOT / path.split("::")[0]).exists():
            message = f"there is no {path}"
            raise LookupError(message)


def _check_ours(words: Sequence[str], whole: bool) -> None:
    """Let click parse the command line, without running the command."""
    if not words or words[0] in ("--help", "-h"):
        return
    group = click.Context(cli, **cli.context_settings)
    command = cli.get_command(group, words[0])
    if command is None:
        message = f"monai-iou has no command {words[0]}"
        raise LookupError(message)
    arguments = list(words[1:])
    if not whole:  # only what stands there: an abridged command leaves out what the sentence is not about
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        _check_known({word for word in arguments if word.startswith("--")}, known | {"--help"})
        return
    command.make_context(words[0], arguments, parent=group)


def _check_known(names: set[str], known: set[str]) -> None:
    unknown = sorted({name.split("=")[0] for name in names} - known)
    if unknown:
        message = f"unknown: {', '.join(unknown)}"
        raise LookupError(message)


def _check_script(path: Path, words: Sequence[str]) -> None:
    """Check a script's options against those that its source declares."""
    _check_paths(iter([str(path)]))
    _check_known({word for word in words if word.startswith("--")}, _declared(path) | {"--help"})


def _declared(path: Path) -> set[str]:
    return set(re.findall(r"\"(--[\w-]+)\"", path.read_text(encoding="utf-8")))


def _check_bundle(words: Sequence[str]) -> None:
    """Check a command of `python -m monai.bundle`: its name, its own arguments, the configs and the overridden keys."""
    if not words:
        return
    function = getattr(scripts, words[0], None)
    if function is None:
        message = f"monai.bundle has no command {words[0]}"
        raise LookupError(message)
    own = inspect.signature(function).parameters
    options = _pairs(words[1:])
    config = {} if "config_file" not in options else _config(options["config_file"])
    tracked = {"tracking_uri"} if "tracking" in options else set()
    for name, value in options.items():
        if name not in own and name not in tracked:
            _check_key(name.replace("#", "::"), value, config)


def _pairs(words: Sequence[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for index, word in enumerate(words):
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            options[name] = value or (words[index + 1] if index + 1 < len(words) else "")
    return options


def _config(text: str) -> dict[str, Any]:
    """Return the merged content of the shipped configs that `--config_file` names."""
    paths = ast.literal_eval(text) if text.startswith("[") else [text]
    merged: dict[str, Any] = {}
    for name in (PurePosixPath(path).name for path in paths):
        if name in PLANS:
            continue
        if not (CONFIGS / name).is_file():
            message = f"the bundle has no config {name}"
            raise LookupError(message)
        merged.update(json.loads((CONFIGS / name).read_text(encoding="utf-8")))
    return merged


def _check_key(name: str, value: str, config: dict[str, Any]) -> None:
    """Check that an override reaches something: a key of the configs, or an argument of a component in them."""
    *parents, last = name.split("::")
    place: Any = config
    for part in parents:
        place = place.get(part) if isinstance(place, dict) else None
    if not isinstance(place, dict) or (last not in place and not _takes(place.get("_target_"), last)):
        message = f"the configs have no key {name}"
        raise LookupError(message)
    if last == "_target_" and pydoc.locate(value) is None:
        message = f"{value} cannot be imported"
        raise LookupError(message)


def _takes(target: str | None, argument: str) -> bool:
    """Whether a component has an argument; the bundle's `build_network` hands its options on to MONAI's networks."""
    if target is None:
        return False
    found = pydoc.locate(target)
    for module in ("monai.engines", "monai.networks.nets", "monai.inferers", "monai.data"):
        found = found or getattr(importlib.import_module(module), target, None)
    known: set[str] = set()
    for kind in found.__mro__ if isinstance(found, type) else [found] * (found is not None):
        parameters = inspect.signature(kind).parameters
        known |= set(parameters)
        if not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
            break  # otherwise it hands on what the class takes that it is derived from
    if target.endswith(".build_network"):
        known |= {name for kind, _ in NETWORKS.values() for name in inspect.signature(kind).parameters}
    return argument in known
