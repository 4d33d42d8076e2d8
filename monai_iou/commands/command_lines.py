"""Command lines that a user can copy and paste."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["bundle_command", "bundle_line", "options_line", "words"]


def bundle_command(configs: Sequence[str], dataset_dir: str) -> str:
    """A command line that a shell, and then MONAI's reading of lists, take apart into these very paths."""
    return bundle_line(configs, {"dataset_dir": dataset_dir})


def bundle_line(configs: Sequence[str], keys: Mapping[str, Any]) -> str:
    """The line of `python -m monai.bundle run` with these configs and keys, quoted for a shell.

    >>> print(bundle_line(["train.json", "plan.json"], {"dataset_dir": "my data", "patch_size": [8, 8]}))
    python -m monai.bundle run --config_file "['train.json','plan.json']" --dataset_dir 'my data' --patch_size "[8, 8]"
    """
    from monai_iou.workflow.literal import with_literal_paths

    # Of a single path the command line would cut off what follows a `#`.
    files = list(configs) if len(configs) > 1 or "#" in configs[0] else configs[0]
    return f"python -m monai.bundle run --config_file {words(files)} {options_line(with_literal_paths(keys))}".rstrip()


def options_line(keys: Mapping[str, Any]) -> str:
    """Keys of the bundle as options, quoted for a shell.

    >>> print(options_line({"amp": False, "sw_batch_size": 1}))
    --amp false --sw_batch_size 1
    """
    return " ".join(f"--{name} {words(value)}" for name, value in keys.items())


def words(value: object) -> str:
    """A value as one word of a command line; lists within double quotes, as people write them."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, (list, tuple, dict)):
        return shlex.quote("null" if value is None else str(value))
    text = str(list(value) if isinstance(value, tuple) else value)
    if re.fullmatch(r"[\w./:+,'\[\]{} -]+", text):
        return '"' + text.replace("', '", "','") + '"'
    return shlex.quote(text)
