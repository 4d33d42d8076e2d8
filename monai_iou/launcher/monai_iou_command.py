"""The `monai-iou` command's entry point, installed as a module of its own.

Importing anything from the package `monai_iou` imports MONAI, which takes seconds. The entry point therefore lives
outside the package and loads `monai_iou/cli.py` by its path, so that `monai-iou --help` answers at once; the
commands import the package when they run.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: `sys.argv[1:]`) and return its exit code."""
    package = importlib.util.find_spec("monai_iou")  # finds a top-level package without running it
    if package is None or package.origin is None:
        message = "Expected the package `monai_iou` beside its command, but it is not installed: pip install monai-iou."
        raise ImportError(message)
    spec = importlib.util.spec_from_file_location("monai_iou_cli", Path(package.origin).with_name("cli.py"))
    assert spec is not None
    assert spec.loader is not None
    cli = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = cli
    spec.loader.exec_module(cli)
    return int(cli.main(argv))


if __name__ == "__main__":
    sys.exit(main())
