"""The form of every message in the package: what was expected, what was given, what to do; a period ends it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT

MODULES = sorted((ROOT / "monai_iou").rglob("*.py"))
# A remedy follows the last colon, after what was given or found instead.
FORM = re.compile(r"Expected .*[^:]: \S.*\.", re.DOTALL)


def text_of(node: ast.AST, constants: dict[str, str]) -> str | None:
    """The text of a string expression, with {} for what is only known when it runs; None if it is no string."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(value, constants) or "" for value in node.values)
    if isinstance(node, ast.FormattedValue):
        return constants.get(node.value.id, "{}") if isinstance(node.value, ast.Name) else "{}"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = text_of(node.left, constants), text_of(node.right, constants)
        return None if left is None else left + ("{}" if right is None else right)
    return None


def messages(source: str) -> Iterator[tuple[int, str]]:
    """The line and text of each message that starts with "Expected"."""
    tree = ast.parse(source)
    constants = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    inside: set[int] = set()
    for node in ast.walk(tree):  # outer expressions come before their parts
        if id(node) in inside:
            continue
        text = text_of(node, constants)
        if text is not None:
            inside |= {id(part) for part in ast.walk(node)}
            if text.startswith("Expected ") and len(text) > len("Expected "):
                yield node.lineno, text


def faults(source: str) -> list[str]:
    """The messages of a module that have no remedy or no period."""
    return [f"line {line}: {text}" for line, text in messages(source) if not FORM.fullmatch(text)]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_messages_name_a_remedy_and_end_in_a_period(path: Path) -> None:
    assert faults(path.read_text(encoding="utf-8")) == []


def test_no_text_installs_the_package_from_pypi() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "bundles").rglob("*.md")]
    from_pypi = re.compile(r"pip install [^&`\n]*monai[-_]iou")  # where it is not
    assert [str(path) for path in (*MODULES, *pages) if from_pypi.search(path.read_text(encoding="utf-8"))] == []


def test_the_package_has_messages() -> None:
    assert sum(len(list(messages(path.read_text(encoding="utf-8")))) for path in MODULES) > 200


@pytest.mark.parametrize(
    ("source", "right"),
    [
        ("m = 'Expected `x` to be 1, but got 2: write 1.'", True),
        ("m = f'Expected `x` to be 1, but got {x}: write 1.'", True),
        ("R = 'write 1.'\nm = f'Expected `x` to be 1, but got {x}: {R}'", True),
        ("m = 'Expected `x` to be 1, but got 2: write 1'", False),
        ("m = f'Expected `x` to be 1, but got {x}.'", False),
        ("m = f'Expected `x` to be 1, but got {x}: ' + remedy", False),
        ("m = f'Expected `x` to be 1, but got {x}: {remedy}'", False),
        ("raise ValueError('Expected `x`' + ' to be 1.')", False),
    ],
)
def test_the_check_of_messages_can_fail(source: str, right: bool) -> None:
    assert (faults(source) == []) is right
