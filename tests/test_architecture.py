"""What docs/architecture.md and docs/contributing.md say of the tree, held against the tree."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from doc_commands import blocks
from places import DOCS, ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:  # an older Python reads the same file by the package that became tomllib
    tomllib = pytest.importorskip("tomli")

PACKAGE = ROOT / "monai_iou"
ARCHITECTURE = (DOCS / "architecture.md").read_text(encoding="utf-8")
CONTRIBUTING = (DOCS / "contributing.md").read_text(encoding="utf-8")


def section(page: str, title: str) -> str:
    return page.split(f"## {title}\n")[1].split("\n## ")[0]


def parts() -> list[str]:
    """The folders and modules directly in the package."""
    modules = [path.name for path in PACKAGE.glob("*.py") if path.name != "__init__.py"]
    return modules + [f"{path.name}/" for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))]


def test_the_table_names_every_part_once() -> None:
    rows = re.findall(r"^\| (`.*?) \|", section(ARCHITECTURE, "What is where"), re.MULTILINE)
    assert sorted(name for row in rows for name in re.findall(r"`([^`]+)`", row)) == sorted(parts())


def test_the_order_of_imports_is_that_of_the_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
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
    if name.endswith(("Loss", "Metric")):
        uses = re.compile(rf'^class {name}\b|^from .*\b{name}\b|^    "?{name}"?,', re.MULTILINE)
        using = {path for path in PACKAGE.rglob("*.py") if uses.search(path.read_text(encoding="utf-8"))}
        assert {str(path.relative_to(ROOT)) for path in using} == {f for f in files if f.startswith("monai_iou")}


def test_the_additions_are_those_that_contributors_ask_for() -> None:
    assert [name for name, _, _ in additions()] == ["FocalIoULoss", "BoundaryIoUMetric", "compiled"]


def test_pictures_name_the_losses_the_training_and_the_evaluation() -> None:
    pictures = blocks(section(ARCHITECTURE, "The way of the data"), "mermaid")
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
