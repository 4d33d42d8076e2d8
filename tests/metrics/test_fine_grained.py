"""IoU over a data set, against a slow loop over the paper's definitions, and what takes part in it."""

from __future__ import annotations

import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monai_iou.metrics import IoUMetric, fine_grained_iou, iou_from_counts, overlap_from_counts

CLASSES = 4


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def worst(values: list[float], percent: float) -> float:
    ordered = sorted(values)
    return mean(ordered[: max(1, math.floor(Fraction(percent) * len(ordered) / 100))])


def slow_definitions(pairs: list[tuple[np.ndarray, np.ndarray]], rule: str) -> dict[str, float]:
    """Section 3 of Wang et al. 2023, image by image and class by class, from label maps."""
    by_image: list[dict[int, float]] = []
    inside, outside = [0] * CLASSES, [0] * CLASSES
    for prediction, reference in pairs:
        row = {}
        for c in range(CLASSES):
            both = int(((prediction == c) & (reference == c)).sum())
            either = int(((prediction == c) | (reference == c)).sum())
            inside[c], outside[c] = inside[c] + both, outside[c] + either
            counts = (reference == c).any() if rule == "reference" else either > 0
            if counts:
                row[c] = both / either
        by_image.append(row)
    images = [mean(list(row.values())) for row in by_image if row]
    classes = [[row[c] for row in by_image if c in row] for c in range(CLASSES)]
    classes = [column for column in classes if column]
    tenths = range(10, 101, 10)
    result = {
        "iou_d": mean([inside[c] / outside[c] for c in range(CLASSES) if outside[c]]),
        "iou_i": mean(images),
        "iou_c": mean([mean(column) for column in classes]),
        "iou_iq": mean([worst(images, q) for q in tenths]),
        "iou_cq": mean([mean([worst(column, q) for column in classes]) for q in tenths]),
    }
    for q in (5, 10, 50):
        result[f"iou_i_worst_{q}"] = worst(images, q)
        result[f"iou_c_worst_{q}"] = mean([worst(column, q) for column in classes])
    return result


def dataset(seed: int, images: int = 23) -> list[tuple[np.ndarray, np.ndarray]]:
    """Label maps in which most classes are rare, so that they are often in one map only, or in none."""
    generator = np.random.default_rng(seed)
    weights = np.array([0.8, 0.12, 0.06, 0.02])
    pairs = []
    for _ in range(images):
        reference = generator.choice(CLASSES, (7, 6), p=weights)
        changed = generator.random((7, 6)) < generator.random() * 0.5
        pairs.append((np.where(changed, generator.choice(CLASSES, (7, 6), p=weights), reference), reference))
    return pairs


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), rule=st.sampled_from(["reference", "either"]), images=st.integers(1, 23))
def test_summary_equals_the_papers_definitions(seed: int, rule: str, images: int) -> None:
    pairs = dataset(seed, images)
    metric = IoUMetric(num_classes=CLASSES)
    for prediction, reference in pairs:
        metric(torch.from_numpy(prediction)[None, None], torch.from_numpy(reference)[None, None])
    expected = slow_definitions(pairs, rule)
    got = metric.summary(present=rule)
    assert {name: got[name] for name in expected} == pytest.approx(expected, rel=1e-12, nan_ok=True)
    if rule == "reference":
        assert str(metric.summary()) == str(got)
        counts = metric.get_counts()
        direct = fine_grained_iou(counts.intersection, counts.union, reference=counts.reference)
        assert direct == pytest.approx(expected, rel=1e-12, nan_ok=True)


def test_the_two_rules_differ_where_a_class_is_only_predicted() -> None:
    metric = IoUMetric(num_classes=3)
    metric(torch.tensor([[[0, 1, 1, 2]]]), torch.tensor([[[0, 1, 1, 1]]]))
    assert metric.summary()["iou_i"] == pytest.approx((1 + 2 / 3) / 2)
    assert metric.summary(present="either")["iou_i"] == pytest.approx((1 + 2 / 3) / 3)


def test_nan_is_absent_only_where_nothing_is_there() -> None:
    nan = math.nan
    inside, union = torch.tensor([[1.0, nan], [2, 3]]), torch.tensor([[2.0, nan], [2, 4]])
    got = fine_grained_iou(inside, union, worst=(50,))
    assert all(math.isnan(value) for value in got.values())
    rest = fine_grained_iou(inside, union, worst=(50,), labelled=torch.tensor([[True, False], [True, True]]))
    assert (rest["iou_d"], rest["iou_i"]) == pytest.approx(((3 / 4 + 3 / 4) / 2, (1 / 2 + (1 + 3 / 4) / 2) / 2))
    absent = fine_grained_iou(torch.tensor([[1, 0]]), torch.tensor([[2, 0]]), worst=(50,))
    assert absent == pytest.approx(dict.fromkeys(absent, 0.5))
    nothing = fine_grained_iou(torch.tensor([[0]]), torch.tensor([[0]]))
    assert all(math.isnan(value) for value in nothing.values())


def test_counts_that_cannot_be_are_refused() -> None:
    text = "Expected `intersection` to be at least 0 and at most `union`, but got 3 beside 2: count both over the same"
    with pytest.raises(ValueError, match=re.escape(text)):
        fine_grained_iou(torch.tensor([[3]]), torch.tensor([[2]]))
    with pytest.raises(ValueError, match="but got -1 beside 2"):
        fine_grained_iou(torch.tensor([[-1]]), torch.tensor([[2]]))
    with pytest.raises(ValueError, match="but got 3 beside 2"):
        iou_from_counts(torch.tensor([3]), torch.tensor([2]), torch.tensor([4]))
    with pytest.raises(ValueError, match="but got 3 beside 2"):
        overlap_from_counts(3, 4, 2)
    with pytest.raises(ValueError, match=re.escape("`intersection` and `labelled` to have the same shape (N, C)")):
        fine_grained_iou(torch.ones(1, 2), torch.ones(1, 2), labelled=torch.ones(1, 1) > 0)
    with pytest.raises(ValueError, match="Expected `present` to be one of 'reference', 'either', but got 'both'"):
        IoUMetric().summary(present="both")
    assert math.isnan(iou_from_counts(torch.tensor(math.nan), torch.tensor(2.0), torch.tensor(4.0)))


@pytest.mark.parametrize(("percent", "images"), [(70, 90), (70, 170), (29, 100), (0.7, 1000), (55, 100), (100, 7)])
def test_a_share_of_the_images_is_not_cut_by_a_rounding_error(percent: float, images: int) -> None:
    expected = round(percent * images / 100)  # a whole number, which 70 / 100 * 90 = 62.99999999999999 is not
    inside = torch.arange(images).unsqueeze(1)
    got = fine_grained_iou(inside, torch.full_like(inside, images), worst=(percent,))
    assert got[f"iou_i_worst_{percent:g}"] == pytest.approx((expected - 1) / 2 / images)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), dtype=st.sampled_from([np.uint8, np.int16, np.uint16, np.int64, np.float64]))
def test_counts_may_be_arrays_lists_or_tensors(seed: int, dtype: type) -> None:
    generator = np.random.default_rng(seed)
    inside = generator.integers(0, 120, (5, 3))
    predicted, true = (inside + generator.integers(0, 120, (5, 3)) for _ in range(2))
    active, labelled = (generator.random((5, 3)) < 0.7 for _ in range(2))
    counts = [torch.from_numpy(each) for each in (inside, predicted, true)]
    expected = iou_from_counts(*counts)
    means = fine_grained_iou(
        counts[0],
        counts[1] + counts[2] - counts[0],
        active=torch.from_numpy(active),
        reference=counts[2],
        labelled=torch.from_numpy(labelled),
    )
    union = predicted + true - inside
    for form in (
        lambda each: each.astype(dtype),
        lambda each: each.tolist(),
        lambda each: torch.from_numpy(each).int(),
    ):
        assert torch.equal(iou_from_counts(*map(form, (inside, predicted, true))).nan_to_num(2), expected.nan_to_num(2))
    rows = [inside, union, active, true, labelled]
    for forms in (
        rows,
        [each.astype(np.uint16 if each.dtype != bool else bool) for each in rows],
        [each.tolist() for each in rows],
    ):
        given_inside, given_union, chosen, given_true, known = forms
        got = fine_grained_iou(given_inside, given_union, active=chosen, reference=given_true, labelled=known)
        assert got == pytest.approx(means, nan_ok=True)


@pytest.mark.parametrize(
    ("counts", "found"),
    [
        ("3", "str"),
        ([[1], [1, 2]], "list"),
        (None, "NoneType"),
        (np.array(["3"]), "<U1"),
        (np.array([1j]), "complex128"),
    ],
)
def test_counts_that_are_no_numbers_are_named(counts: object, found: str) -> None:
    text = f"Expected `prediction` to hold numbers, but got {found}: pass a tensor, an array or a list of numbers."
    with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
        iou_from_counts(1, counts, 2)
    with pytest.raises(TypeError, match=r"^Expected `union` to hold numbers, but got "):
        fine_grained_iou([[1]], counts)


def test_soft_counts_keep_their_gradient_and_lists_of_flags_are_read() -> None:
    counts = torch.tensor([2.0, 1.0], requires_grad=True)
    iou_from_counts(counts, torch.tensor([4.0, 2.0]), torch.tensor([4.0, 2.0])).sum().backward()
    torch.testing.assert_close(counts.grad, torch.tensor([8 / 36, 4 / 9]))
    inside, union = [[9, 1], [0, 2]], [[10, 2], [1, 4]]
    flags = [[1, 0], [1, 1]]
    expected = fine_grained_iou(inside, union, active=np.array(flags, bool), labelled=np.array(flags, bool))
    assert fine_grained_iou(inside, union, active=flags, labelled=flags) == expected
