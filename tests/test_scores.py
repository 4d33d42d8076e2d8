"""The scores as functions: of every kind of number, exact, undefined where nothing is, and written once."""

from __future__ import annotations

import ast
import math
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from places import ROOT

from monai_iou import scores, voxel_sums

COUNTS = st.integers(0, 2**40)


@given(inside=COUNTS, missed=COUNTS, wrong=COUNTS)
def test_every_kind_of_number_gives_the_exact_fraction(inside: int, missed: int, wrong: int) -> None:
    prediction, target = inside + wrong, inside + missed
    union = inside + missed + wrong
    for name, exact in (
        ("iou", float(Fraction(inside, union)) if union else math.nan),
        ("dice", float(Fraction(2 * inside, prediction + target)) if union else math.nan),
    ):
        formula = getattr(scores, name)
        whole = formula(inside, prediction, target, empty=math.nan)
        array = formula(*(np.array([n]) for n in (inside, prediction, target)), empty=math.nan)
        tensor = formula(*(torch.tensor([n]) for n in (inside, prediction, target)), empty=math.nan)
        assert array.dtype == np.float64
        assert tensor.dtype == torch.float64
        assert [whole, array.item(), tensor.item()] == pytest.approx([exact] * 3, rel=1e-15, nan_ok=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_floating_sums_keep_their_type_and_have_gradients(dtype: torch.dtype) -> None:
    numbers = [torch.tensor([1.0, 0.0], dtype=dtype, requires_grad=True) for _ in range(3)]
    iou = scores.iou(*numbers)
    assert iou.dtype == dtype
    assert iou.tolist() == [1, 1]
    iou.sum().backward()
    assert all(number.grad is not None and number.grad.isfinite().all() for number in numbers)


@pytest.mark.parametrize("kind", [float, np.array, torch.tensor])
def test_nan_is_never_a_score(kind) -> None:
    nan = math.nan
    for part, whole in ((nan, 1.0), (1.0, nan), (nan, 0.0), (nan, nan), (0.0, nan)):
        assert math.isnan(float(scores.ratio(kind(part), kind(whole)))), (part, whole)
    assert math.isnan(float(scores.iou(kind(nan), kind(nan), kind(0.0))))
    assert float(scores.ratio(kind(0.0), kind(0.0))) == 1
    assert float(scores.ratio(kind(0.0), kind(0.0), empty=0.5)) == 0.5


def test_tversky_lies_between() -> None:
    sums = voxel_sums(torch.randn(2, 3, 40), torch.randint(0, 3, (2, 1, 40)))
    numbers = sums.intersection, sums.prediction, sums.target
    torch.testing.assert_close(scores.tversky(*numbers, 1, 1), scores.iou(*numbers))
    torch.testing.assert_close(scores.tversky(*numbers, 0.5, 0.5), scores.dice(*numbers))
    assert scores.tversky(50, 100, 100, 1, 1) == scores.iou(50, 100, 100)
    torch.testing.assert_close(sums.union, scores.union(*numbers))


COMMON = re.compile(r"inter|both|overlap|common|inside|hit|shared|\btp\b|\bi\b")
EITHER = re.compile(r"union|either")


def written_formulas(source: str) -> list[str]:
    """Every P + T - I, in any order and under any name, and every quotient of an intersection and a union."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.BinOp):
            continue
        terms = signed_terms(node)
        minus = [text for sign, text in terms if sign < 0]
        if len(terms) == 3 and len(minus) == 1 and COMMON.search(minus[0].lower()):
            found.append(ast.unparse(node))
        if isinstance(node.op, ast.Div):
            part, whole = (ast.unparse(side).lower() for side in (node.left, node.right))
            if COMMON.search(part) and EITHER.search(whole):
                found.append(ast.unparse(node))
    return found


def signed_terms(node: ast.expr, sign: int = 1) -> list[tuple[int, str]]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)):
        right = sign if isinstance(node.op, ast.Add) else -sign
        return signed_terms(node.left, sign) + signed_terms(node.right, right)
    return [(sign, ast.unparse(node))]


def formulas_of_the_package(folder: Path) -> list[str]:
    return [
        f"{path.relative_to(folder)}: {formula}"
        for path in sorted(folder.rglob("*.py"))
        for formula in written_formulas(path.read_text(encoding="utf-8"))
    ]


def test_the_formula_of_the_iou_is_written_once() -> None:
    assert formulas_of_the_package(ROOT / "monai_iou") == [
        "voxels/formulas.py: prediction + target - intersection",  # `scores.iou` divides by this `union`
    ]


@pytest.mark.parametrize(
    "line",
    [
        "iou = I / (P + T - I)",
        "iou = both / union",
        "iou = both.sum() / (sizes[kept].sum() + true - both.sum())",
        "return inter / (p - inter + t)",
        "union = self.prediction.sum(0) + self.reference.sum(0) - self.intersection.sum(0)",
        "defined = np.where(union > 0, intersection / np.maximum(union, 1), np.nan)",
    ],
)
def test_the_search_for_a_second_formula_can_fail(line: str, tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(f"def f():\n    {line}\n")
    assert formulas_of_the_package(tmp_path)


@pytest.mark.parametrize("line", ["x = a + b - 1", "width = stop - start + 1", "p = 1 - (a + b)", "q = a / b"])
def test_the_search_for_a_second_formula_passes_other_lines(line: str) -> None:
    assert not written_formulas(line)
