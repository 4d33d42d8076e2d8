"""The user's own network, the bundle's key `network_def`: kept with the model, and built from it again.

A training stores the config of `network_def`, with every key that it refers to and the text of the user's file, as the
`definition` in the plan's `network`. Evaluation and inference build the network from there.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import linecache
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from monai_iou.datasets.cases import DatasetError
from monai_iou.planning.plan import Plan
from monai_iou.workflow.architecture import BUILD_NETWORK, OWN
from monai_iou.workflow.failures import TrainingError, explain_out_of_memory
from monai_iou.workflow.keys import calling_parser
from monai_iou.workflow.settings import exit_with_message

__all__ = ["FROM_FILE", "build_definition", "check_network", "definition", "encoded", "from_file"]

KEY = "network_def"
DEFAULT = {"_target_": BUILD_NETWORK, "plan": "@plan"}
FROM_FILE = "monai_iou.workflow.own_network.from_file"
MOST_SHOWN = 300


def definition() -> dict[str, Any] | None:
    """Return `network_def` of the config that is being resolved, and the keys that it refers to.

    Returns:
        Key -> config, in which every `from_file` has the text of its file; None for the bundle's own network.

    Raises:
        DatasetError: a file of the user's is not there.
    """
    parser = calling_parser()
    config = parser.get() if parser is not None else None
    if not isinstance(config, Mapping) or config.get(KEY, DEFAULT) == DEFAULT:
        return None
    found: dict[str, Any] = {}
    wanted = [KEY]
    while wanted:
        key = wanted.pop()
        if key not in found and key in config and key != "plan":
            with exit_with_message():
                found[key] = _with_source(config[key])
            wanted += re.findall(r"@(\w+)", json.dumps(found[key], default=str))
    imports = config.get("imports", ())
    others = [line for line in imports if "monai_iou" not in str(line)] if isinstance(imports, list) else []
    needed = _needed(others, re.sub('"source": "[^"]*"', "", json.dumps(found, default=str)))
    return {**({"imports": needed} if needed else {}), **found}


def _needed(lines: Sequence[Any], text: str) -> list[Any]:
    """Return which lines of a config's `imports` the text of a definition needs, and whatever is not an import.

    >>> _needed(["$import numpy as np", "$from torch import nn", "$print(nn)"], "{'_target_': 'nn.Conv3d'}")
    ['$from torch import nn', '$print(nn)']
    """
    text += "".join(str(line) for line in lines if _bound_names(line) is None)
    words = set(re.findall(r"\w+", text))
    return [line for line in lines if (names := _bound_names(line)) is None or names & words]


def _bound_names(line: Any) -> set[str] | None:
    """Return the names that a line such as `$import numpy as np` binds; None if it is no import, or imports all."""
    try:
        (statement,) = ast.parse(str(line).removeprefix("$")).body
    except (SyntaxError, ValueError):
        return None
    if not isinstance(statement, (ast.Import, ast.ImportFrom)) or any(each.name == "*" for each in statement.names):
        return None
    return {each.asname or each.name.partition(".")[0] for each in statement.names}


def _with_source(config: Any) -> Any:
    """A copy in which each `from_file` has the file's text; only plain values, for model.json."""
    if isinstance(config, list):
        return [_with_source(each) for each in config]
    if not isinstance(config, Mapping):
        return config if isinstance(config, (str, int, float, bool, type(None))) else str(config)
    copied = {str(name): _with_source(value) for name, value in config.items()}
    if copied.get("_target_") == FROM_FILE and "source" not in copied:
        path = Path(str(copied.get("file")))
        return {**copied, "file": path.name, "source": encoded(_read(path))}
    return copied


def encoded(text: str) -> str:
    """Return a program in base64: MONAI's parser would take a part such as `@x` or `%#x` for a reference to a key."""
    return base64.b64encode(text.encode()).decode("ascii")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        as_seen = "write its path as it is seen from the folder in which the command is run"
        message = (
            f"Expected `file` of `network_def` to be a Python file, but {path} cannot be read ({error}): "
            f"{'save it in UTF-8' if isinstance(error, UnicodeError) else as_seen}."
        )
        raise DatasetError(message) from error


def from_file(file: str, name: str, source: str | None = None, **arguments: Any) -> Any:
    r"""Make an object of a class, or call a function, of a Python file.

    Args:
        file: its path.
        name: of the class or function.
        source: the file's text, `encoded`, which a stored model brings; None reads it.
        arguments: of the class or function.

    Raises:
        DatasetError: the file cannot be read or run, or has no such name. Under `python -m monai.bundle` the program
            ends with that sentence.

    Example:
        >>> text = "from torch import nn\nclass Mine(nn.Conv3d):\n    pass"
        >>> from_file("mine.py", "Mine", encoded(text), in_channels=1, out_channels=2, kernel_size=1)
        Mine(1, 2, kernel_size=(1, 1, 1), stride=(1, 1, 1))
    """
    with exit_with_message():
        module = _module(file, _read(Path(file)) if source is None else base64.b64decode(source).decode())
        made = getattr(module, str(name), None)
        if not callable(made):
            known = ", ".join(each for each, value in vars(module).items() if isinstance(value, type))
            message = (
                f"Expected `name` of `network_def` to be a class or function of {file}, but got {name!r}, and the file "
                f"has {known or 'no class'}: correct the name."
            )
            raise DatasetError(message)
    return made(**arguments)


def _module(file: str, source: str) -> ModuleType:
    """The file as a module, made once: classes of one file are the same for all networks of a process."""
    name = f"own_network_{hashlib.sha256(source.encode()).hexdigest()[:12]}"
    if name not in sys.modules:
        module = ModuleType(name)
        module.__file__ = f"{file} as {name}"
        sys.modules[name] = module  # dataclasses and pickle look for it there
        # TorchScript and tracebacks read the lines, also where the file is gone.
        linecache.cache[module.__file__] = (len(source), None, source.splitlines(keepends=True), module.__file__)
        try:
            exec(compile(source, module.__file__, "exec"), module.__dict__)
        except Exception as error:
            del sys.modules[name]
            line = f" in line {error.lineno}" if isinstance(error, SyntaxError) else ""
            message = f"Expected `file` of `network_def`, {file}, to run, but got {_short(error)}{line}: correct it."
            raise DatasetError(message) from error
    return sys.modules[name]


def build_definition(plan: Plan) -> nn.Module:
    """Build the network that a plan holds the definition of.

    Raises:
        DatasetError: it cannot be built; the message says why. Under `python -m monai.bundle` the program ends with
            that sentence.
    """
    from monai.bundle.config_parser import ConfigParser

    stored = dict(plan.network)
    content = dict(stored.pop("definition"))
    imports = ["$import monai_iou", "$import monai_iou.workflow.variants", *content.pop("imports", [])]
    parser = ConfigParser({**content, "imports": imports})
    parser["plan"] = replace(plan, network=stored)
    try:
        network = parser.get_parsed_content(KEY)
    except Exception as error:
        cause = error.__cause__ or error
        message = (
            f"Expected the network that is stored with the model to be built again, but got {_short(cause)}: its "
            f"`network_def` is {_short(content[KEY])}; run the command where that can be imported."
        )
        with exit_with_message():
            raise DatasetError(message) from error
    return _checked(network)


def check_network(network: Any, plan: Plan, device: torch.device | str = "cpu") -> None:
    """Check by one patch that the user's own network fits the data, before a training starts.

    Args:
        network: what `network_def` is.
        plan: its channels and patch, and whether `deep_supervision` and `attention` are set.
        device: where the training runs it; the network is moved there.

    Raises:
        DatasetError: it is no network, or gives no tensor of shape (B, classes, *patch). Under `python -m monai.bundle`
            the program ends with that sentence.
        TrainingError: the patch does not fit into memory, or the network lacks in training what these two supervise.
    """
    patch = torch.zeros(1, plan.in_channels, *plan.patch_size, device=device)
    expected = (1, plan.out_channels, *plan.patch_size)
    output = _output(_checked(network), patch, training=False)
    if not isinstance(output, torch.Tensor) or tuple(output.shape) != expected:
        flat = " and, for slices, wrap a 2D network in monai_iou.workflow.flat.SliceNetwork" * (plan.spatial_dims == 2)
        message = (
            f"Expected `network_def` to give a tensor of shape {expected} in evaluation for a patch of shape "
            f"{tuple(patch.shape)}, but got {_described(output)}: set its channels and dimensions by @plan, and "
            f"`patch_size` to what it takes{flat}."
        )
        with exit_with_message():
            raise DatasetError(message)
    _check_supervised(network, plan.network, patch)


def _check_supervised(network: nn.Module, keys: Mapping[str, Any], patch: torch.Tensor) -> None:
    """Check that the user's network returns in training what the keys supervise: a loss takes plain logits as well."""
    scales, maps = bool(keys.get("deep_supervision")), bool(keys.get("attention"))
    if keys.get("network") != OWN or not (scales or maps):  # one of ours may have a single scale for a small patch
        return
    output = _output_in_training(network, patch)
    if maps and not (isinstance(output, (list, tuple)) and len(output) == 2):
        _refuse("attention", "(logits, maps)", output, "its attention maps as well, as AttentionMapUnet does")
    logits = output[0] if maps else output
    is_stack = isinstance(logits, torch.Tensor) and logits.ndim == patch.ndim + 1 and logits.shape[1] > 1
    if scales and not (is_stack or (isinstance(logits, (list, tuple)) and len(logits) > 1)):
        _refuse("deep_supervision", "logits of several scales", logits, "a list of them, the finest first")


def _output_in_training(network: nn.Module, patch: torch.Tensor) -> Any:
    """Return what a network gives for two patches in training; its buffers and the random state stay as they were."""
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in network.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    with torch.random.fork_rng([patch.device] if patch.is_cuda else []):
        output = _output(network, torch.cat([patch, patch]), training=True)  # a batch norm takes no mean of one voxel
    with torch.no_grad():
        for module, name, buffer, values in buffers:
            setattr(module, name, buffer)
            if not torch.equal(buffer, values):
                buffer.copy_(values)
    return output


def _output(network: nn.Module, patch: torch.Tensor, *, training: bool) -> Any:
    """Return what a network gives for a patch, or the error."""
    was_training = network.training
    try:
        with torch.no_grad(), explain_out_of_memory():
            return network.to(patch.device).train(training)(patch)
    except TrainingError:
        raise
    except Exception as error:
        return error
    finally:
        network.train(was_training)


def _described(output: Any) -> str:
    if isinstance(output, torch.Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    if isinstance(output, (list, tuple)):
        return f"a {type(output).__name__} of {len(output)}"
    return f"the error {_short(output)}" if isinstance(output, Exception) else _short(type(output))


def _refuse(key: str, wanted: str, output: Any, remedy: str) -> None:
    message = (
        f"Expected `network_def` to give {wanted} in training with --{key} true, but got {_described(output)}: return "
        f"{remedy}, or leave --{key} out."
    )
    with exit_with_message():
        raise TrainingError(message)


def _checked(network: Any) -> nn.Module:
    if not isinstance(network, nn.Module):
        message = (
            f"Expected `network_def` to be a torch.nn.Module, but got {_short(type(network))}: name a class of a "
            "network in its `_target_`."
        )
        with exit_with_message():
            raise DatasetError(message)
    return network


def _short(value: object) -> str:
    text = " ".join((f"{type(value).__name__}: {value}" if isinstance(value, Exception) else str(value)).split())
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
