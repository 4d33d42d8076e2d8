"""What the tests of the integrations share: recipes of docs/integrations.md, and programs of other packages."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from places import DOCS

PAGE = DOCS / "integrations.md"

# torchvision has no build for a CPU torch on the package index: its import fails without its
# compiled operators, which nothing here calls. A working torchvision is left alone.
TORCHVISION = """\
import sys
try:
    import torchvision
except ImportError:
    pass
except RuntimeError:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    import torch
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
"""


def recipe(heading: str, language: str) -> list[str]:
    """Return the code blocks of a language under a heading of docs/integrations.md."""
    sections = re.split(r"^## (.+)$", PAGE.read_text(), flags=re.MULTILINE)
    section = dict(zip(sections[1::2], sections[2::2], strict=True))[heading]
    blocks = re.findall(rf"^```{language}\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert blocks, f"{PAGE.name}: no {language} block under {heading}"
    return blocks


def run(command: str, folder: Path, timeout: float = 1200.0, **variables: str) -> str:
    """Run shell commands in a folder with this environment's programs; return what they printed."""
    startup = folder / ".startup"
    startup.mkdir(exist_ok=True)
    (startup / "sitecustomize.py").write_text(TORCHVISION)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(startup),
        **variables,
    }
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder, env=environment, timeout=timeout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, f"{command}\n{result.stdout[-8000:]}"
    return result.stdout
