"""The `monai-iou` command's entry point, installed as a module of its own.

Importing anything from the package `monai_iou` imports MONAI, which takes seconds. The entry point therefore lies
outside the package and loads the folder `monai_iou/commands` by its path, under a name of its own, so that
`monai-iou --help` answers at once; the commands import the package when they run.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

COMMANDS = "monai_iou_commands"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: `sys.argv[1:]`) and return its exit code."""
    package = importlib.util.find_spec("monai_iou")  # finds a top-level package without running it
    if package is None or package.origin is None:
        message = (
            "Expected the package `monai_iou` beside its command, but it is not installed: run `pip install .` in a "
            "clone of the repository."
        )
        raise ImportError(message)
    folder = Path(package.origin).with_name("commands")
    spec = importlib.util.spec_from_file_location(
        COMMANDS, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[COMMANDS] = module
    spec.loader.exec_module(module)
    return int(importlib.import_module(f"{COMMANDS}.group").main(argv))


if __name__ == "__main__":
    sys.exit(main())
