"""The documents' examples: Python blocks run, commands exist, docstrings hold."""

from __future__ import annotations

import doctest
import importlib
import inspect
import json
import math
import pkgutil
import pydoc
import re
import warnings
from pathlib import Path

import pytest
from doc_commands import blocks, problems
from places import ROOT

import monai_iou
from monai_iou import metrics
from monai_iou.cli import cli
from monai_iou.evaluation import case_table, report, statistics
from monai_iou.planning import minutes
from monai_iou.workflow import curves

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "bundles").rglob("*.md"))]
# Loaded by path, or importing packages that only their users have.
ELSEWHERE = ("monai_iou.launcher", "monai_iou.integrations.", "monai_iou.voxels.triton_")
MOST_WORDS = 95  # in a cell of a table, whose column is narrow where a page is shown
IN_WORDS = {10: "ten"}
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(monai_iou.__path__, "monai_iou.", onerror=lambda name: None)
    if not module.name.startswith(ELSEWHERE)
)


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
    for block in blocks(page.read_text(encoding="utf-8"), "python"):
        exec(compile(block, str(page), "exec"), names)


def test_the_readme_has_a_python_block_and_both_commands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert blocks(readme, "python")
    setup = "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt"
    assert f"{setup} . && .venv/bin/monai-iou demo" in readme
    assert f"{setup} '.[test]' && .venv/bin/pytest" in readme


def test_the_readme_names_the_environment_by_its_path_only_where_it_makes_one() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    named = [line for line in lines if ".venv/bin/" in line]
    assert [line for line in named if not line.startswith(("python3 -m venv .venv && ", "On Windows, "))] == []


def test_the_readme_links_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)\)", readme))
    assert linked == {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}


@pytest.mark.parametrize("name", [name for name in monai_iou.__all__ if callable(getattr(monai_iou, name))])
def test_every_public_name_has_an_example(name: str) -> None:
    assert ">>>" in (getattr(monai_iou, name).__doc__ or "")


@pytest.mark.parametrize("challenge", metrics.CHALLENGES.values(), ids=lambda challenge: challenge.title)
def test_the_function_of_every_challenge_has_an_example(challenge: metrics.Challenge) -> None:
    assert ">>>" in (challenge.score.__doc__ or "")


def test_the_metrics_are_listed_with_their_own_arguments() -> None:
    listed = re.findall(r"^ {4}(\w+)\(((?:[^()]|\([^()]*\))*)\)", metrics.__doc__ or "", flags=re.MULTILINE)
    assert len(listed) == 10
    for name, arguments in listed:
        own, written = (inspect.signature(f) for f in (getattr(metrics, name), eval(f"(lambda {arguments}: None)")))
        assert [(p.name, p.kind, p.default) for p in written.parameters.values()] == [
            (p.name, p.kind, p.default) for p in own.parameters.values()
        ], name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    assert problems(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("right", "wrong", "problem"),
    [
        ("monai-iou plan path/to/TaskNNN --output", "monai-iou plam path/to/TaskNNN --outptu", "no command plam"),
        ("--output plan.json", "--outptu plan.json", "No such option"),
        ("evaluate --predictions DIR --references DIR", "evaluate --predictions DIR", "'--references'"),
        ("['my_bundle/configs/train.json'", "['my_bundle/configs/trian.json'", "no config trian.json"),
        ("--dataset_dir path/to/TaskNNN", "--datset_dir path/to/TaskNNN", "no key datset_dir"),
        ("monai.bundle run", "monai.bundle rum", "no command rum"),
        ("--epochs 100", "--epoch 100", "no key epoch"),
        ("`--resume true`", "`--resmue true`", "no command has --resmue"),
        ("`--resume true`", "`--patch_size [64,64,32]`", "read the brackets: --patch_size [64,64,32]"),
        ("\"['my_bundle/configs/train.json'", "['my_bundle/configs/train.json'", "read the brackets: python -m"),
        ("`--resume true`", "`--train::trainer::compiel true`", "no command has --train::trainer::compiel"),
        ("`--resume true`", "`--inferer#devise cpu`", "no command has --inferer#devise"),
    ],
)
def test_the_check_of_commands_can_fail(right: str, wrong: str, problem: str) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert right in readme
    assert problem in "\n".join(problems(readme.replace(right, wrong)))


def test_the_check_of_commands_sees_every_form() -> None:
    page = "```sh\n{0}\n```\nprose\n```python\n```\n    {1}\n`{2}`\n```text\nprinted\n{3}\n--no_key 1\n```\n"
    commands = ("monai-iou one && monai-iou two", "monai-iou three", "pytest tests/four", "python -m monai.bundle run")
    found = "\n".join(problems(page.format(*commands)))
    for part in ("no command one", "no command two", "not in a fenced block", "no tests/four", "no key no_key"):
        assert part in found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_configs_name_what_can_be_imported(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8"), "json"):
        json.loads(block if block.lstrip().startswith("{") else f"{{{block}}}")
        names = re.findall(r'"_target_": "(monai_iou[\w.]*)"', block)
        assert [name for name in names if pydoc.locate(name) is None] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_inside_the_repository_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_cell_of_a_table_is_a_page_of_its_own(page: Path) -> None:
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [re.sub(r"\]\([^)]*\)", "]", cell) for row in rows for cell in row.strip("|").split(" | ")]
    assert [cell for cell in cells if len(cell.split()) > MOST_WORDS] == []


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("planning.md", f"fewer than {minutes.MIN_STEPS} steps fit, or less than one pass over the cases"),
        ("commands.md", f"as curves, at most {IN_WORDS[curves.MAX_LINES]} in each plot"),
        ("evaluation.md", f"more than {case_table.MOST_ROWS:,} rows".replace(",", " ")),
        ("evaluation.md", f"shows the {report.HEAT_CASES} cases with the lowest mean IoU"),
        ("evaluation.md", f"({report.HEAT_CELLS:,} cells at most)".replace(",", " ")),
        ("evaluation.md", f"exact for {math.floor(math.log2(statistics.PERMUTATIONS))} cases or fewer"),
    ],
)
def test_the_pages_have_the_limits_of_the_code(page: str, text: str) -> None:
    assert text in " ".join((ROOT / "docs" / page).read_text(encoding="utf-8").split())


def test_the_page_of_evaluate_states_the_default_of_each_option() -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    rows = {name: row for row in page.splitlines() for name in re.findall(r"^\| `(--[\w-]+)` ", row)}
    defaults = {each.opts[0]: each.default for each in cli.commands["evaluate"].params}
    numbers = {name: f"{value:g}" for name, value in defaults.items() if type(value) in (int, float)}
    words = {name: value for name, value in defaults.items() if isinstance(value, str)}
    assert {"--workers", "--dilation"} <= {*numbers}
    assert {"--boundary", "--pictures"} <= {*words}
    for name, value in (numbers | words).items():
        assert "default" in rows[name], name
        assert value in rows[name], name


def headings(text: str) -> set[str]:
    """Return the names by which links reach the headings of a page, as GitHub makes them."""
    plain = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", plain, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_headings_lead_to_one(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]*)#([^)]*)\)", page.read_text(encoding="utf-8"))
    targets = [((page.parent / target) if target else page, name) for target, name in links]
    lost = [f"{path.name}#{name}" for path, name in targets if name not in headings(path.read_text(encoding="utf-8"))]
    assert lost == []


def test_headings_are_named_as_github_does() -> None:
    page = "# One: two, three\n```sh\n# no heading\n```\n## `a_b` and 1x2x128^3\n"
    assert headings(page) == {"one-two-three", "a_b-and-1x2x1283"}
