"""The order of the package's parts, which pyproject.toml writes down and import-linter checks."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

pytest.importorskip("importlinter", reason="import-linter is in the extra `dev`, and needs Python 3.11")

_spec = importlib.util.find_spec("monai_iou")  # finds the package without importing it
assert _spec is not None
assert _spec.origin is not None
PACKAGE = Path(_spec.origin).parent
IMPORT_IN_A_FUNCTION = "\n\ndef hidden() -> None:\n    from monai_iou.{module} import {name}\n\n    print({name})\n"


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter on the package in `folder`."""
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    options = ["--config", str(ROOT / "pyproject.toml"), "--no-cache", "--no-logo"]
    return subprocess.run([sys.executable, "-c", command, *options], cwd=folder, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder with a copy of the package's modules."""
    shutil.copytree(PACKAGE, tmp_path / "monai_iou", ignore=shutil.ignore_patterns("bundles", "__pycache__"))
    return tmp_path


def test_imports_point_one_way() -> None:
    result = lint(PACKAGE.parent)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


@pytest.mark.parametrize(
    ("path", "text", "broken"),
    [
        ("checks.py", IMPORT_IN_A_FUNCTION.format(module="losses.iou", name="IoULoss"), "Imports point one way BROKEN"),
        ("evaluation/pairing.py", "\nfrom monai_iou.handlers import IoUHandler\n", "Imports point one way BROKEN"),
        ("voxels/spec.py", IMPORT_IN_A_FUNCTION.format(module="voxels.sums", name="VoxelSums"), "any depth BROKEN"),
        ("losses/iou.py", "\nimport monai_iou\n", "own __init__ BROKEN"),
        ("losses/lovasz.py", "\nfrom monai_iou.voxels.tiling import tile_size\n", "Losses know no kernel BROKEN"),
        ("stray.py", "", "monai_iou.stray"),
    ],
    ids=["backward", "sideways", "circle", "root", "kernel", "stray"],
)
def test_the_contract_can_fail(copy: Path, path: str, text: str, broken: str) -> None:
    with (copy / "monai_iou" / path).open("a", encoding="utf-8") as file:
        file.write(text)
    result = lint(copy)
    assert result.returncode == 1
    assert broken in result.stdout + result.stderr
