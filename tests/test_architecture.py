"""What docs/architecture.md and docs/contributing.md say of the tree, held against the tree."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
import torch
from doc_commands import blocks
from places import DOCS, ROOT

from monai_iou import voxel_sums

if sys.version_info >= (3, 11):
    import tomllib
else:  # an older Python reads the same file by the package that became tomllib
    tomllib = pytest.importorskip("tomli")

PACKAGE = ROOT / "monai_iou"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
ARCHITECTURE = (DOCS / "architecture.md").read_text(encoding="utf-8")
CONTRIBUTING = (DOCS / "contributing.md").read_text(encoding="utf-8")


def section(page: str, title: str) -> str:
    return page.split(f"## {title}\n")[1].split("\n## ")[0]


def parts() -> list[str]:
    """The folders and modules directly in the package."""
    modules = [path.name for path in PACKAGE.glob("*.py") if path.name != "__init__.py"]
    return modules + [f"{path.name}/" for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))]


def test_the_table_names_every_part_once() -> None:
    rows = re.findall(r"^\| (`.*?) \|", section(ARCHITECTURE, "Where to find what"), re.MULTILINE)
    assert sorted(name for row in rows for name in re.findall(r"`([^`]+)`", row)) == sorted(parts())


def test_the_order_of_imports_is_that_of_the_contract() -> None:
    contracts = PROJECT["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    (shown,) = blocks(section(ARCHITECTURE, "Which part may import which"), "text")
    assert shown.splitlines() == layers
    named = {name for layer in layers for name in re.split(r" [|:] ", layer)} | {"launcher"}
    assert named == {part.removesuffix(".py").rstrip("/") for part in parts()}


@pytest.mark.parametrize("page", [ARCHITECTURE, CONTRIBUTING], ids=["architecture", "contributing"])
def test_every_file_that_a_page_names_exists(page: str) -> None:
    names = set(re.findall(r"[\w./-]+\.(?:py|toml|md)\b", page)) | set(re.findall(r"`([\w/]+/)`", page))
    assert [name for name in names if not any((root / name).exists() for root in (ROOT, PACKAGE, DOCS))] == []


def additions() -> list[tuple[str, int, list[str]]]:
    """The rows of the table of additions: the example's name, the number of files, and the files."""
    rows = re.findall(r"^\| a \w+, such as `(\w+)` \| (\d) \| (.+) \|$", CONTRIBUTING, re.MULTILINE)
    return [(name, int(count), re.findall(r"`([^`]+)`", files)) for name, count, files in rows]


@pytest.mark.parametrize(
    ("name", "count", "files"), additions(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_an_addition_touches_the_files_that_are_listed(name: str, count: int, files: list[str]) -> None:
    assert len(files) == count
    assert [file for file in files if not re.search(rf"\b{name}\b", (ROOT / file).read_text(encoding="utf-8"))] == []
    uses = re.compile(rf'^class {name}\b|^from .*\b{name}\b|^    "?{name}"?,|voxels\.{name}\b', re.MULTILINE)
    places = [*PACKAGE.rglob("*.py"), ROOT / "pyproject.toml", *(ROOT / "benchmarks").glob("*.py")]
    using = {str(path.relative_to(ROOT)) for path in places if uses.search(path.read_text(encoding="utf-8"))}
    listed = {file for file in files if not file.startswith("tests/")}
    assert using | {file for file in listed if Path(file).stem == name} == listed


def test_the_additions_are_those_that_contributors_ask_for() -> None:
    assert [name for name, _, _ in additions()] == ["FocalIoULoss", "BoundaryIoUMetric", "compiled"]


def test_pictures_name_the_losses_the_training_and_the_evaluation() -> None:
    pictures = blocks(section(ARCHITECTURE, "How the data flow"), "mermaid")
    assert len(pictures) == 3
    for picture, folder in zip(pictures, ("losses/", "workflow/", "evaluation/"), strict=True):
        assert folder in picture
        for name in re.findall(r"[\w/]+/(?=[<\" ])", picture):
            assert (PACKAGE / name).is_dir(), name


def test_one_formula_of_the_iou() -> None:
    assert "written once, in `scores.iou`" in re.sub(r"\s+", " ", ARCHITECTURE)
    assert len(re.findall(r"^def iou\(", (PACKAGE / "scores.py").read_text(encoding="utf-8"), re.MULTILINE)) == 1


@pytest.mark.parametrize("folder", sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()))
def test_every_folder_says_what_it_is(folder: str) -> None:
    assert (PACKAGE / folder / "__init__.py").read_text(encoding="utf-8").startswith('"""')


def test_the_bundle_holds_no_python() -> None:
    assert list(Path(ROOT / "bundles").rglob("*.py")) == []


def printing(source: str) -> list[int]:
    """The lines of a module that write to the terminal."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    names = [(call.lineno, call.func.attr if isinstance(call.func, ast.Attribute) else call.func) for call in calls]
    found = [(line, name.id if isinstance(name, ast.Name) else name) for line, name in names]
    return [line for line, name in found if name in ("print", "echo", "Console")]


def test_only_the_parts_that_the_table_names_print() -> None:
    allowed = {"cli.py", "console.py", "workflow/progress.py"}
    paths = [path for path in PACKAGE.rglob("*.py") if printing(path.read_text(encoding="utf-8"))]
    assert paths
    names = {path.relative_to(PACKAGE).as_posix() for path in paths}
    assert {name for name in names if not name.startswith("commands/")} <= allowed
    assert "except the progress display in `workflow/progress.py`" in ARCHITECTURE


def test_the_check_of_printing_can_fail() -> None:
    assert printing("import click\nprint(1)\nclick.echo('2')\nfingerprint(3)\n") == [2, 3]


def test_heavy_packages_are_those_that_ruff_checks() -> None:
    sentence = re.search(r"Heavy\s+packages \(([^)]*) and others\)", ARCHITECTURE)
    assert sentence is not None
    banned = PROJECT["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-module-level-imports"]
    assert {name.strip().lower() for name in sentence[1].split(",")} <= {name.lower() for name in banned}


@pytest.mark.parametrize("power", [1.0, 1.3, 2.0])
@pytest.mark.parametrize("soft", [False, True])
def test_the_union_does_not_cancel(power: float, soft: bool) -> None:
    assert "for every `power` from 1 to 2" in re.sub(r"\s+", " ", ARCHITECTURE)
    generator = torch.Generator().manual_seed(0)
    found = torch.rand(200, 1, 3, generator=generator, dtype=torch.float64)
    target = torch.rand(200, 1, 3, generator=generator, dtype=torch.float64)
    target = target if soft else target.round()
    sums = voxel_sums(found, target, activation=None, power=power)
    assert (sums.union >= (sums.prediction + sums.target) / 2 - 1e-12).all()
