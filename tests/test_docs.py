"""The documents' examples: Python blocks run, commands exist, docstrings hold."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import shlex
import warnings
from pathlib import Path

import click
import pytest
from places import ROOT

import monai_iou
from monai_iou.cli import cli

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Loaded by path, or importing packages that only their users have.
ELSEWHERE = ("monai_iou.launcher", "monai_iou.integrations.", "monai_iou.voxels.triton_kernels")
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(monai_iou.__path__, "monai_iou.", onerror=lambda name: None)
    if not module.name.startswith(ELSEWHERE)
)


def _blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    module = importlib.import_module(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in _blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)


def test_the_readme_has_a_python_block_and_both_commands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert _blocks(ROOT / "README.md", "python")
    setup = "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt"
    assert f"{setup} . && .venv/bin/monai-iou demo" in readme
    assert f"{setup} '.[test]' && .venv/bin/pytest" in readme


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_their_options_exist(page: Path) -> None:
    lines = "\n".join(_blocks(page, "(?:sh|bash|console|text)?")).replace("\\\n", " ").splitlines()
    for line in lines:
        found = re.search(r"(?:^\s*\$?\s*|/bin/|&& )monai-iou ([a-z-]+)([^|>&#]*)", line)
        if found is None:
            continue
        command = cli.get_command(click.Context(cli), found[1])
        assert command is not None, f"{page.name}: monai-iou {found[1]} is no command"
        known = {name for parameter in command.params for name in parameter.opts} | {"--help", "-h"}
        options = {word.split("=")[0] for word in shlex.split(found[2].replace("[", " ").replace("]", " "))}
        unknown = {option for option in options if option.startswith("--")} - known
        assert not unknown, f"{page.name}: monai-iou {found[1]} has no {unknown}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_inside_the_repository_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert missing == []
