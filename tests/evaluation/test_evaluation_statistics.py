from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap, norm
from scipy.stats import t as student

from monai_iou.evaluation import statistics
from monai_iou.evaluation.statistics import describe, holm, interval, paired_test, percentiles, resamples

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
    assert (result["interval"] is None) == (n < 8)


def tail(n: int) -> float:
    """Hesterberg's share of the resamples beyond each end of an expanded percentile interval of 95 %."""
    return float(norm.cdf(-student.ppf(0.975, n - 1) * np.sqrt(n / (n - 1))))


@pytest.mark.parametrize("n", [8, 9, 30, 1000])
def test_percentiles_are_those_of_students_interval(n):
    assert percentiles(n) == pytest.approx([100 * tail(n), 100 - 100 * tail(n)])
    # Of means that are normal with the standard deviation of resamples, they are the ends of Student's interval.
    values = np.random.default_rng(n).normal(0, 1, n)
    ends = norm.ppf(np.array(percentiles(n)) / 100, values.mean(), values.std(ddof=0) / np.sqrt(n))
    assert ends == pytest.approx(student.interval(0.95, n - 1, values.mean(), values.std(ddof=1) / np.sqrt(n)))


@pytest.mark.parametrize("statistic", ["mean", "median"])
@pytest.mark.parametrize("n", [8, 13])
def test_intervals_are_scipys_percentile_bootstrap_of_the_expanded_level(statistic, n):
    values = np.random.default_rng(n).beta(5, 2, n)
    function = {"mean": np.mean, "median": np.median}[statistic]
    level = 1 - 2 * tail(n)
    assert level > 0.95
    expected = bootstrap(
        (values,), function, n_resamples=20_000, confidence_level=level, method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    found = interval(values, statistic)
    assert found == pytest.approx([expected.low, expected.high], abs=0.02)


def test_whole_patients_are_drawn():
    """Two patients' cases, copied: no more is known about the patients, so that the interval stays as wide."""
    rng = np.random.default_rng(3)
    values = rng.random(10)
    patients = [f"p{i}" for i in range(10)]
    assert interval(np.tile(values, 5), "mean", patients * 5) == pytest.approx(interval(values))
    narrow, wide = interval(np.tile(values, 5)), interval(values)
    assert narrow[1] - narrow[0] < 0.6 * (wide[1] - wide[0])
    assert interval(np.tile(values[:7], 5), "mean", patients[:7] * 5) is None


@pytest.mark.parametrize("n", [6, 20])
def test_whole_patients_are_swapped(n):
    rng = np.random.default_rng(n)
    first, second = rng.random(n), rng.random(n)
    patients = [f"p{i // 2}" for i in range(n)]
    by_patient = paired_test(first, second, patients)
    sums = (second - first).reshape(-1, 2).sum(axis=1)
    assert by_patient["p"] == pytest.approx(paired_test(np.zeros(n // 2), sums)["p"])
    assert by_patient["difference"] == pytest.approx((second - first).mean())


@pytest.mark.parametrize("scans", [1, 2])
def test_more_than_a_thousand_patients_are_tested(scans):
    """2^1024, the number of ways to exchange the results of 1024 patients, is beyond a float."""
    rng = np.random.default_rng(0)
    number = 1024 * scans
    first, patients = rng.random(number), [f"p{i // scans}" for i in range(number)]
    assert paired_test(first, first + rng.normal(0.01, 0.05, number), patients)["p"] == 1 / 10_000
    assert paired_test(first, first, patients)["p"] == 1


def test_intervals_cover_the_mean_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    bounds = [interval(rng.beta(5, 2, 40)) for _ in range(60)]
    covered = np.mean([low <= 5 / 7 <= high for low, high in bounds])
    assert 0.85 <= covered <= 1.0


# Of three times 1000 draws, 93.6, 94.2 and 90.4 % were covered, less 2 standard errors of 1000; `benchmarks.coverage`
# prints such shares, and those of the percentiles 2.5 and 97.5.
@pytest.mark.parametrize(("kind", "mean", "least"), [("normal", 0, 0.92), ("beta", 5 / 7, 0.927), ("skewed", 1, 0.885)])
def test_intervals_of_the_fewest_cases_cover_the_mean_almost_as_often_as_they_say(kind, mean, least):
    rng = np.random.default_rng(0)
    draw = {"normal": (rng.normal, 0, 1), "beta": (rng.beta, 5, 2), "skewed": (rng.gamma, 1, 1)}[kind]
    bounds = [interval(draw[0](*draw[1:], 8)) for _ in range(1000)]
    assert least <= np.mean([low <= mean <= high for low, high in bounds]) <= 0.97


def test_of_the_fewest_cases_a_difference_that_is_none_is_seldom_outside_the_interval():
    """In 5.4 % of 1000 draws, and by the percentiles 2.5 and 97.5 in 14.6 %."""
    rng = np.random.default_rng(0)
    found = [paired_test(np.zeros(8), rng.normal(0, 0.05, 8))["interval"] for _ in range(1000)]
    assert np.mean([not low <= 0 <= high for low, high in found]) <= 0.054 + 2 * np.sqrt(0.054 * 0.946 / 1000)


@given(st.lists(st.floats(0, 1), min_size=8, max_size=20))
@settings(deadline=None, max_examples=50)
def test_intervals_lie_within_the_values(values):
    for statistic in ("mean", "median"):
        low, high = interval(np.array(values), statistic)
        assert min(values) - 1e-12 <= low <= high <= max(values) + 1e-12


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("n", [8, 31])
def test_equal_values_have_an_interval_without_width(value, n):
    for statistic in ("mean", "median"):
        assert interval(np.full(n, value), statistic) == pytest.approx([value, value], abs=1e-15)


def test_nothing_and_one_value():
    assert describe([float("nan")]) == {
        "n": 0, "undefined": 1, "units": 0, "mean": None, "mean_interval": None, "sd": None, "median": None,
        "median_interval": None, "quartiles": None, "min": None, "max": None,
    }  # fmt: skip
    assert describe([0.5])["mean_interval"] is None
    assert describe([0.5])["sd"] is None
    assert paired_test(np.array([1.0]), np.array([2.0])) == {
        "n": 1, "first_mean": 1.0, "second_mean": 2.0, "difference": 1.0, "interval": None, "p": None,
    }  # fmt: skip
    assert set(paired_test(np.zeros(0), np.zeros(0)).values()) == {0, None}


@pytest.mark.parametrize("denominator", [3, 7, 10, 30])
def test_the_permutation_test_counts_as_whole_numbers_do(denominator):
    """Differences that cancel leave rounding, which must not make equal methods differ."""
    rng = np.random.default_rng(denominator)
    for n in (2, 5, 8, 8, 8):
        wins = rng.integers(0, denominator + 1, (2, n))
        wins[1] = rng.permutation(wins[0]) if n % 2 == 0 else wins[1]  # a sum of 0
        difference = wins[1] - wins[0]
        flips = [abs(np.dot(signs, difference)) for signs in itertools.product((-1, 1), repeat=n)]
        expected = np.mean([flip >= abs(difference.sum()) for flip in flips])
        assert paired_test(wins[0] / denominator, wins[1] / denominator)["p"] == expected
    first = rng.integers(0, denominator + 1, 20) / denominator
    assert paired_test(first, np.roll(first, 3))["p"] == 1, "drawn at random"


def test_spread_and_quartiles_are_numpys():
    values = np.random.default_rng(1).random(9)
    found = describe(values)
    assert found["sd"] == pytest.approx(values.std(ddof=1))
    assert found["quartiles"] == pytest.approx(np.percentile(values, [25, 75]).tolist())
    assert describe(values[:7])["mean_interval"] is None
    low, high = found["mean_interval"]
    assert low < found["mean"] < high


def all_resamples(number: int) -> np.ndarray:
    return np.concatenate(list(resamples(number)))


@pytest.mark.parametrize("number", [9, 40, 101])
@pytest.mark.parametrize("size", [1, 64_000, 100_001])
def test_resamples_in_parts_are_the_same_ones(number, size, monkeypatch):
    rng = np.random.default_rng(number)
    patients = [f"p{i // 3}" for i in range(3 * number)]
    values = rng.beta(5, 2, 3 * number)
    first = rng.random(number)
    second = first + rng.normal(0.02, 0.1, number)

    def found():
        return describe(values), describe(values, patients), paired_test(first, second), all_resamples(number).tolist()

    whole = found()
    monkeypatch.setattr(statistics, "_TABLE_BYTES", size)
    assert sum(1 for _ in resamples(number)) > 1
    assert found() == whole


def test_resamples_are_those_of_one_call():
    """Published intervals depend on them."""
    drawn = np.random.default_rng(0).multinomial(12, np.full(12, 1 / 12), size=2000)
    assert np.array_equal(all_resamples(12), drawn)
    values = np.random.default_rng(12).beta(5, 2, 12)
    expected = {
        "mean": drawn @ values / 12,
        "median": [np.median(np.repeat(values, times)) for times in drawn],
    }
    ends = [100 * tail(12), 100 - 100 * tail(12)]
    for statistic, statistics_of_draws in expected.items():
        assert interval(values, statistic) == pytest.approx(np.percentile(statistics_of_draws, ends), rel=1e-12)


def test_what_is_held_of_the_resamples_is_bounded():
    """2000 resamples of 20,000 cases would be 320 MB, and eight of them were kept."""
    number = 20_000
    parts = resamples(number)
    assert next(parts).nbytes <= 1 << 24
    tracemalloc.start()
    try:
        interval(np.random.default_rng(0).random(number)[:3000], "median")
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """The numbers of units of which resamples are drawn from now on, one entry for each part."""
    draw, drawn = statistics._drawn, []

    def counting(generator, number, count):
        drawn.append(number)
        return draw(generator, number, count)

    monkeypatch.setattr(statistics, "_drawn", counting)
    monkeypatch.setattr(statistics, "_KEPT", statistics._KeptTables())
    monkeypatch.setattr(statistics, "_TABLE_BYTES", 64_000)
    return drawn


def test_resamples_are_drawn_once_for_all_columns_of_a_label(counted):
    """2000 resamples of 20,000 cases take seconds to draw, and a label has 24 columns."""
    columns = [np.random.default_rng(seed).random(40) for seed in range(4)]
    first = [describe(column) for column in columns]
    parts = len(counted)
    assert parts == sum(1 for _ in resamples(40)) > 1
    assert [describe(column) for column in columns] == first
    describe(columns[0][:20])
    assert set(counted[parts:]) == {20}
    counted.clear()
    assert describe(columns[0]) == first[0], "another number of defined scores has not displaced them"
    assert counted == []


@pytest.mark.parametrize(("most", "kept"), [(2000 * 70, [40, 30]), (2000 * 69, [30]), (2000 * 39, [30]), (0, [])])
def test_what_is_kept_of_the_resamples_is_bounded(most, kept, counted, monkeypatch):
    monkeypatch.setattr(statistics, "_KEPT_BYTES", most)
    whole = all_resamples(40)
    all_resamples(30)
    assert list(statistics._KEPT._tables) == kept
    assert sum(table.nbytes for table in statistics._KEPT._tables.values()) <= most
    assert np.array_equal(all_resamples(40), whole)
