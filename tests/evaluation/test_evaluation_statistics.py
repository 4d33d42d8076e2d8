from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monai_iou.evaluation.statistics import describe, holm, interval, paired_test

p_values = st.lists(st.floats(0, 1), min_size=1, max_size=8)


@given(p_values)
@settings(deadline=None)
def test_holm_is_the_largest_scaled_p_value_up_to_each_rank(values):
    ranked = sorted(values)
    expected = [min(1.0, max((len(values) - j) * ranked[j] for j in range(i + 1))) for i in range(len(values))]
    assert sorted(holm(values)) == pytest.approx(expected)
    assert all(corrected >= p for corrected, p in zip(holm(values), values, strict=True))


def test_holm_leaves_out_what_was_not_tested():
    assert holm([None, 0.02, None]) == [None, 0.02, None]


@pytest.mark.parametrize("n", [3, 6, 9])
def test_permutation_p_value_is_exact_for_few_cases(n):
    rng = np.random.default_rng(n)
    first = rng.random(n)
    second = first + rng.normal(0.1, 0.1, n)
    difference = second - first
    sums = [abs(float(np.dot(signs, difference))) for signs in itertools.product((-1, 1), repeat=n)]
    expected = np.mean([total >= abs(difference.sum()) - 1e-12 for total in sums])
    result = paired_test(first, second)
    assert result["p"] == pytest.approx(expected)
    assert result["difference"] == pytest.approx(difference.mean())
    low, high = result["interval"]
    assert low <= result["difference"] <= high


def test_intervals_cover_the_mean_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    bounds = [interval(rng.beta(5, 2, 40)) for _ in range(60)]
    covered = np.mean([low <= 5 / 7 <= high for low, high in bounds])
    assert 0.85 <= covered <= 1.0


def test_nothing_and_one_value():
    assert describe([float("nan")]) == {
        "n": 0, "undefined": 1, "mean": None, "mean_interval": None, "median": None, "median_interval": None,
        "min": None, "max": None,
    }  # fmt: skip
    assert describe([0.5])["mean_interval"] is None
    assert paired_test(np.array([1.0]), np.array([2.0]))["p"] is None
