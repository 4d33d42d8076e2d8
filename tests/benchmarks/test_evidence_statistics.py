"""The statistics of the studies, on tables whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.evidence.statistics import (
    Comparison,
    Scores,
    _stretched,
    compare,
    comparison,
    degrees_of_freedom,
    differences,
    p_value,
    resampled_means,
    scores_of,
    stretch,
)

A, B, C = ("d", "a", "s"), ("d", "b", "s"), ("d", "c", "s")


def row(
    loss: str, seed: int, case: str, iou: float | str, label: int = 1, patient: str | None = None
) -> dict[str, str]:
    key = {"data": "d", "loss": loss, "sampler": "s", "seed": str(seed), "fold": "0"}
    return {**key, "patient": patient or case, "case": case, "label": str(label), "iou": str(iou)}


def crossed(
    rng: np.random.Generator, seeds: int, patients: int, by_seed: float, by_patient: float, rest: float
) -> np.ndarray:
    parts = [rng.normal(0, by_seed, (seeds, 1)), rng.normal(0, by_patient, (1, patients))]
    return sum(parts) + rng.normal(0, rest, (seeds, patients))


def test_scores_average_labels_then_cases_of_a_patient() -> None:
    rows = [
        row("a", 0, "x1", 0.2, label=1, patient="x"),
        row("a", 0, "x1", 0.4, label=2, patient="x"),
        row("a", 0, "x2", 0.9, patient="x"),
        row("a", 0, "y", 0.5),
    ]
    scores = scores_of(rows, "iou")[A]
    assert scores.patients == ("x", "y")
    np.testing.assert_allclose(scores.table, [[0.6, 0.5]])
    assert math.isnan(scores.spread)


def test_undefined_scores_and_unfinished_seeds_are_left_out() -> None:
    rows = [row("a", seed, case, 0.1 * seed + 0.5) for seed in (0, 1) for case in "xyz"]
    rows[1]["iou"] = "nan"
    rows.append(row("a", 2, "x", 1.0))  # stopped before the folds of y and z
    scores = scores_of(rows, "iou")[A]
    assert (scores.seeds, scores.patients) == ((0, 1), ("x", "z"))
    np.testing.assert_allclose(scores.table, [[0.5, 0.5], [0.6, 0.6]])
    assert scores.spread == pytest.approx(math.sqrt(0.005))


def test_pairs_are_of_the_same_seed_and_patient() -> None:
    first = Scores((0, 1, 2), ("x", "y"), np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    second = Scores((2, 0), ("y", "x"), np.array([[10.0, 20.0], [30.0, 40.0]]))
    np.testing.assert_allclose(differences(first, second), [[39.0, 28.0], [15.0, 4.0]])


def test_the_interval_of_the_bootstrap_has_the_unbiased_variance_of_crossed_means() -> None:
    """Cells that differ by seed alone: the variance of the mean is that of the seeds over their number."""
    seeds = np.array([0.1, 0.4, 0.2, -0.3])
    means = resampled_means(np.repeat(seeds[:, None], 5, axis=1), 200_000)
    assert means.mean() == pytest.approx(seeds.mean(), abs=1e-3)
    assert means.var() == pytest.approx(seeds.var(ddof=1) / 4, rel=0.02)
    patients = resampled_means(seeds[None].copy(), 200_000)
    assert patients.var() == pytest.approx(seeds.var(ddof=1) / 4, rel=0.02)


def test_one_cell_has_an_interval_of_no_width_and_no_test() -> None:
    one = comparison(B, A, np.array([[0.25]]))
    assert one.interval == (0.25, 0.25)
    assert (one.p, one.verdict) == (None, "too few seeds")


@pytest.mark.usefixtures("drawn_once")
@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("variances", [(0.0, 0.05, 0.05), (0.05, 0.02, 0.02), (0.03, 0.05, 0.05), (0.0, 0.0, 0.05)])
def test_the_interval_covers_and_the_test_rejects_as_they_should_where_nothing_differs(
    seeds: int, variances: tuple[float, float, float]
) -> None:
    rng = np.random.default_rng(5)
    tables = [crossed(rng, seeds, 24, *variances) for _ in range(400)]
    intervals = [_stretched(resampled_means(table, 400), table.mean(), table.shape) for table in tables]
    covered = np.mean([low <= 0 <= high for low, high in intervals])
    rejected = np.mean([(p_value(table) or 0.0) < 0.05 for table in tables])
    assert covered >= 0.93
    assert rejected <= 0.06


@pytest.mark.parametrize("planned", [8, 35])
def test_a_study_without_any_difference_seldom_finds_one(planned: int) -> None:
    """All choices share a baseline, whose own seeds and patients move all differences together."""
    rng, sizes, found = np.random.default_rng(1), (0.05, 0.02, 0.02), 0
    for _ in range(100):
        baseline = crossed(rng, 3, 24, *sizes)
        tables = [crossed(rng, 3, 24, *sizes) - baseline for _ in range(planned)]
        found += min(p_value(table) or 0.0 for table in tables) * planned < 0.05
    assert found <= 6


@pytest.mark.parametrize(
    ("shape", "degrees", "quantile"),
    [((3, 24), 2, 4.3027), ((5, 24), 4, 2.7764), ((5, 4), 3, 3.1824), ((1, 24), 23, 2.0687), ((1, 1), 1, 12.7062)],
)
def test_an_interval_is_stretched_as_students_quantile(shape: tuple[int, int], degrees: int, quantile: float) -> None:
    assert degrees_of_freedom(shape) == degrees
    assert stretch(shape) == pytest.approx(quantile / 1.959964, rel=1e-4)


def test_the_test_is_students_over_the_seeds_where_all_patients_agree() -> None:
    from scipy.stats import ttest_1samp

    seeds = np.random.default_rng(0).normal(0.1, 0.3, 5)
    assert p_value(np.repeat(seeds[:, None], 24, axis=1)) == pytest.approx(ttest_1samp(seeds, 0).pvalue)


@pytest.mark.usefixtures("drawn_once")
def test_the_interval_of_an_effect_covers_it() -> None:
    """Its standard deviation is drawn again, so that it is wider than the difference's over a constant."""
    rng, covered, wider = np.random.default_rng(8), 0, 0
    for _ in range(100):
        table = crossed(rng, 5, 24, 0.0, 0.05, 0.01) + 0.03
        one = comparison(B, A, table)
        covered += one.effect_interval[0] <= 0.6 <= one.effect_interval[1]
        width = (one.interval[1] - one.interval[0]) / (one.difference / one.effect)
        wider += one.effect_interval[1] - one.effect_interval[0] > width
    assert covered >= 93
    assert wider > 50
    assert all(math.isnan(end) for end in comparison(B, A, np.array([[0.1, 0.2, 0.3]])).effect_interval)


def test_the_test_does_not_jump_where_seeds_and_patients_differ_as_little_as_the_rest() -> None:
    """A change of the seeds by one part in a thousand must not change the p-value by more than a hundredth."""
    table = crossed(np.random.default_rng(2), 3, 24, 0.0, 0.0, 0.05) + 0.02
    shifts = np.array([[-1.0], [0.0], [1.0]])
    found = [p_value(table + size * shifts) or 0.0 for size in np.linspace(0, 0.02, 400)]
    assert np.abs(np.diff(found)).max() < 0.01
    assert all(p > 0.01 for p in found)


@pytest.mark.parametrize("patients", [6, 10])
def test_the_test_holds_its_level_with_few_patients(patients: int) -> None:
    rng = np.random.default_rng(7)
    for variances in ((0.0, 0.0, 0.05), (0.0, 0.05, 0.02), (0.02, 0.02, 0.05)):
        rejected = [(p_value(crossed(rng, 3, patients, *variances)) or 0.0) < 0.05 for _ in range(400)]
        assert np.mean(rejected) <= 0.08, variances


def test_comparisons_that_are_still_to_be_made_count_in_the_correction() -> None:
    base = crossed(np.random.default_rng(3), 3, 20, 0.01, 0.1, 0.02)
    patients = tuple(map(str, range(20)))
    noise = np.random.default_rng(4).normal(0, 0.05, base.shape)
    scores = {A: Scores((0, 1, 2), patients, base), B: Scores((0, 1, 2), patients, base + 0.02 + noise)}
    (alone,) = compare(scores, {"d": A}, 1)
    (first,) = compare(scores, {"d": A}, 10)
    assert alone.p is not None
    assert alone.p_holm == pytest.approx(alone.p)
    assert first.p_holm == pytest.approx(min(1.0, 10 * alone.p))


def test_tables_without_variance_have_a_p_of_0_or_1() -> None:
    assert p_value(np.zeros((3, 4))) == 1.0
    assert p_value(np.full((3, 4), 0.5)) == 0.0


def test_a_shift_is_found_and_holm_corrects_over_the_study() -> None:
    rng = np.random.default_rng(3)
    base = crossed(rng, 4, 20, 0.01, 0.1, 0.02)
    patients = tuple(map(str, range(20)))
    scores = {
        A: Scores((0, 1, 2, 3), patients, base),
        B: Scores((0, 1, 2, 3), patients, base + 0.2 + rng.normal(0, 0.02, base.shape)),
        C: Scores((0, 1, 2, 3), patients, base + rng.normal(0, 0.02, base.shape)),
    }
    better, same = compare(scores, {"d": A})
    assert (better.choice, better.verdict, same.choice, same.verdict) == (B, "better", C, "not decided")
    # Holm by hand: the smaller p twice, the larger once, and never below the smaller's.
    small, large = sorted([better.p or 0.0, same.p or 0.0])
    assert better.p_holm == pytest.approx(min(1.0, 2 * small))
    assert same.p_holm == pytest.approx(max(large, min(1.0, 2 * small)))
    assert better.effect == pytest.approx(better.difference / (scores[B].table - base).mean(axis=0).std(ddof=1))
    assert better.effect_interval[0] < better.effect < better.effect_interval[1]


@pytest.mark.parametrize(
    ("difference", "interval", "p_holm", "seeds", "verdict"),
    [
        (0.1, (0.05, 0.2), 0.01, 3, "better"),
        (-0.1, (-0.2, -0.05), 0.01, 3, "worse"),
        (0.1, (0.05, 0.2), 0.05, 3, "not decided"),
        (0.1, (-0.01, 0.2), 0.01, 3, "not decided"),
        (0.1, (0.05, 0.2), 0.01, 2, "too few seeds"),
    ],
)
def test_a_verdict_needs_interval_test_and_seeds(
    difference: float, interval: tuple[float, float], p_holm: float, seeds: int, verdict: str
) -> None:
    one = Comparison(B, A, seeds, 10, difference, interval, 1.0, (0.5, 1.5), p_holm, p_holm)
    assert one.verdict == verdict


def test_data_are_compared_with_their_own_baseline() -> None:
    table = np.array([[0.1, 0.2], [0.3, 0.4]])
    scores = {
        (data, loss, "s"): Scores((0, 1), ("x", "y"), table + shift)
        for data, loss, shift in (("d", "a", 0.0), ("d", "b", 0.1), ("e", "a", 0.5), ("e", "b", 0.9), ("f", "b", 0.0))
    }
    found = compare(scores, {data: (data, "a", "s") for data in "def"})
    assert [(one.choice[0], round(one.difference, 6)) for one in found] == [("d", 0.1), ("e", 0.4)]
