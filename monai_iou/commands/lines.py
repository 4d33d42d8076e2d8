"""Command lines that a user can copy and paste."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

__all__ = ["bundle_command"]


def bundle_command(configs: Sequence[str], dataset_dir: str) -> str:
    """A command line that a shell, and then MONAI's reading of lists, take apart into these very paths."""
    files = str(list(configs)) if len(configs) > 1 else configs[0]
    if re.fullmatch(r"[\w./:+,'\[\] -]+", files) and len(configs) > 1 and '"' not in files:
        quoted = '"' + files.replace("', '", "','") + '"'
    else:
        quoted = shlex.quote(files)
    return f"python -m monai.bundle run --config_file {quoted} --dataset_dir {shlex.quote(dataset_dir)}"
