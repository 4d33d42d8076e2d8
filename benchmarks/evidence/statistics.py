"""Paired differences between choices over seeds and patients: intervals, tests, effect sizes.

A choice has a score for every pair of a seed and a patient, d_sp is its difference from the baseline's, and both ways
vary: a training again with another seed, another patient. So neither seeds nor patients alone are the sample.

The interval is a two-way bootstrap: seeds and patients are drawn with replacement, n - 1 of n, which makes the variance
of a mean of seeds alone, or of patients alone, unbiased (Rao and Wu, JASA 1988); n of n would make it too small by
(n - 1) / n, a third for three seeds. Percentiles do not know how few seeds stand behind them: where the seeds differ
more than the patients, those of three seeds cover the truth in four studies of five. So their distances from the mean
are stretched by the ratio of Student's quantile, with one degree of freedom fewer than there are seeds (or patients, if
these are fewer), to the normal one: 2.2 for three seeds, 1.4 for five. The test uses the same degrees of freedom, and
for the variance of the mean that of the two-way table of d_sp,

    V = (MS_seeds + MS_patients - MS_rest) / (S P),   MS_seeds and MS_patients at least MS_rest.

Both err on the side of no decision where the seeds hardly differ. Satterthwaite's degrees of freedom would be more, but
they are an estimate from the same few seeds: over the 35 comparisons of a study with three seeds, a difference that is
none was called one in a third of the studies. A choice is called better or worse only where the interval excludes 0 and
the test agrees after Holm's correction over all comparisons that the study plans, so that no verdict falls when the
others are made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from monai_iou.evaluation.statistics import holm

RESAMPLES = 10_000
SEED = 0
SIGNIFICANT = 0.05
# Below so many seeds nothing is decided, whatever the numbers say.
FEWEST_SEEDS = 3
FEWEST_PATIENTS = 4  # for an interval of the effect, whose standard deviation is drawn from one fewer

Choice = tuple[str, str, str]  # data, loss, sampler
Table = NDArray[np.float64]  # seeds x patients


@dataclass(frozen=True)
class Scores:
    """The scores of one choice: `table` has a row for each of `seeds` and a column for each of `patients`."""

    seeds: tuple[int, ...]
    patients: tuple[str, ...]
    table: Table

    @property
    def mean(self) -> float:
        """The mean over seeds and patients."""
        return float(self.table.mean())

    @property
    def spread(self) -> float:
        """The standard deviation of the seeds' means; NaN for one seed."""
        return float(self.table.mean(axis=1).std(ddof=1)) if len(self.seeds) > 1 else math.nan


@dataclass(frozen=True)
class Comparison:
    """A choice against the baseline on the seeds and patients that both have."""

    choice: Choice
    baseline: Choice
    seeds: int
    patients: int
    difference: float
    interval: tuple[float, float]
    effect: float
    """The difference in standard deviations of the patients' mean differences (Cohen's d_z)."""
    effect_interval: tuple[float, float]
    p: float | None
    p_holm: float | None = None

    @property
    def verdict(self) -> str:
        """`better`, `worse`, `not decided`, or `too few seeds`."""
        if self.seeds < FEWEST_SEEDS:
            return "too few seeds"
        low, high = self.interval
        if self.p_holm is None or self.p_holm >= SIGNIFICANT or low <= 0 <= high:
            return "not decided"
        return "better" if self.difference > 0 else "worse"


def scores_of(rows: Sequence[Mapping[str, str]], column: str) -> dict[Choice, Scores]:
    """Return the scores of every choice; the labels of a case are averaged, then the cases of a patient.

    A score that is not defined (nothing in the reference and nothing found) leaves the mean. Seeds that lack a patient
    that another seed of the choice has, as where a study was stopped between two folds, are left out.
    """
    nested: dict[Choice, dict[int, dict[str, dict[str, list[float]]]]] = {}
    for row in rows:
        value = float(row[column] or "nan")
        choice = (row["data"], row["loss"], row["sampler"])
        patients = nested.setdefault(choice, {}).setdefault(int(row["seed"]), {})
        patients.setdefault(row["patient"], {}).setdefault(row["case"], []).append(value)
    return {choice: _scores(seeds) for choice, seeds in nested.items()}


def _scores(seeds: Mapping[int, Mapping[str, Mapping[str, Sequence[float]]]]) -> Scores:
    patients = tuple(sorted({patient for found in seeds.values() for patient in found}))
    complete = tuple(seed for seed in sorted(seeds) if len(seeds[seed]) == len(patients))
    means = [[_mean([_mean(case) for case in seeds[seed][name].values()]) for name in patients] for seed in complete]
    table = np.array(means, dtype=float).reshape(len(complete), len(patients))
    defined = np.isfinite(table).all(axis=0)
    names = tuple(name for name, kept in zip(patients, defined, strict=True) if kept)
    return Scores(complete, names, table[:, defined])


def _mean(values: Sequence[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


def differences(first: Scores, second: Scores) -> Table:
    """Return `second - first` on the seeds and patients that both have, shape (seeds, patients)."""
    seeds = [seed for seed in first.seeds if seed in second.seeds]
    patients = [patient for patient in first.patients if patient in second.patients]
    parts = [
        scores.table[np.ix_([scores.seeds.index(s) for s in seeds], [scores.patients.index(p) for p in patients])]
        for scores in (first, second)
    ]
    return np.asarray(parts[1] - parts[0])


def compare(
    scores: Mapping[Choice, Scores], baselines: Mapping[str, Choice], planned: int | None = None
) -> list[Comparison]:
    """Compare every choice with its data's baseline, and correct the p-values over all of them.

    Args:
        scores: from `scores_of`.
        baselines: data -> the choice to compare with; data whose baseline has no scores is left out.
        planned: how many comparisons the study will make; those without a p-value yet count with p = 1.
    """
    found = []
    for choice, second in scores.items():
        baseline = baselines[choice[0]]
        if choice != baseline and baseline in scores:
            table = differences(scores[baseline], second)
            if table.size:
                found.append(comparison(choice, baseline, table))
    waiting = [1.0] * max(0, (planned or 0) - sum(one.p is not None for one in found))
    corrected = holm([*(one.p for one in found), *waiting])[: len(found)]
    return [Comparison(**{**vars(one), "p_holm": p}) for one, p in zip(found, corrected, strict=True)]


def comparison(choice: Choice, baseline: Choice, table: Table) -> Comparison:
    """Return the comparison that a table of differences, seeds x patients, makes."""
    size, mean = standard_deviation_of_patients(table), float(table.mean())
    effect = mean / size if size else math.nan
    interval, of_effect = interval_of(table), effect_interval(table, effect)
    return Comparison(choice, baseline, *table.shape, mean, interval, effect, of_effect, p_value(table))


def interval_of(table: Table) -> tuple[float, float]:
    """Return the 95 % interval of the mean of a table, seeds x patients."""
    return _stretched(resampled_means(table), float(table.mean()), table.shape)


def effect_interval(table: Table, effect: float) -> tuple[float, float]:
    """Return the 95 % interval of the effect: mean and standard deviation of the patients are both drawn again."""
    if table.shape[1] < FEWEST_PATIENTS or not math.isfinite(effect):
        return math.nan, math.nan
    by_seed, by_patient = _drawn(table.shape, RESAMPLES)
    values = by_seed @ table
    mean = (values * by_patient).sum(axis=1)
    drawn = table.shape[1] - 1
    variance = (by_patient * (values - mean[:, None]) ** 2).sum(axis=1) * drawn / (drawn - 1)
    kept = variance > 0  # not where the same patient was drawn every time
    return _stretched(mean[kept] / np.sqrt(variance[kept]), effect, table.shape)


def _stretched(resampled: NDArray[np.float64], estimate: float, shape: tuple[int, ...]) -> tuple[float, float]:
    """Return the percentiles of resampled values, as far from the estimate as so few seeds and patients demand."""
    low, high = (float(end) for end in np.quantile(resampled, [0.025, 0.975]))
    factor = stretch(shape)
    return estimate + factor * (low - estimate), estimate + factor * (high - estimate)


def degrees_of_freedom(shape: tuple[int, ...]) -> int:
    """Return the fewer of seeds and patients, less one; one way that has a single level is left out."""
    return max(1, min([count for count in shape if count > 1], default=2) - 1)


def stretch(shape: tuple[int, ...]) -> float:
    """Return Student's 97.5 % quantile for a table of seeds x patients, divided by the normal one."""
    from scipy.stats import norm, t

    return float(t.ppf(0.975, degrees_of_freedom(shape)) / norm.ppf(0.975))


def standard_deviation_of_patients(table: Table) -> float:
    """Return the standard deviation over patients of their mean over the seeds; NaN for one patient."""
    return float(table.mean(axis=0).std(ddof=1)) if table.shape[1] > 1 else math.nan


def resampled_means(table: Table, resamples: int = RESAMPLES) -> NDArray[np.float64]:
    """Return the means of resampled tables, seeds and patients drawn each one less than there are.

    One seed, or one patient, cannot be resampled and stays: the interval then says nothing of other seeds.
    """
    by_seed, by_patient = _drawn(table.shape, resamples)
    return np.asarray(((by_seed @ table) * by_patient).sum(axis=1))


def _drawn(shape: tuple[int, ...], resamples: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the weights of the seeds and of the patients in every resample."""
    rng = np.random.default_rng(SEED)
    by_seed, by_patient = (_weights(rng, count, resamples) for count in shape)
    return by_seed, by_patient


def _weights(rng: np.random.Generator, count: int, resamples: int) -> NDArray[np.float64]:
    drawn = max(count - 1, 1)
    return rng.multinomial(drawn, np.full(count, 1 / count), size=resamples) / drawn


def p_value(table: Table) -> float | None:
    """Return the two-sided p-value of a mean of 0; None for fewer than two seeds or two patients.

    A table without any variance has p = 1 if its mean is 0, else 0.
    """
    from scipy.stats import t

    seeds, patients = table.shape
    if min(seeds, patients) < 2:
        return None
    mean, by_seed, by_patient = table.mean(), table.mean(axis=1), table.mean(axis=0)
    rest = table - by_seed[:, None] - by_patient[None] + mean
    of_rest = float((rest**2).sum()) / ((seeds - 1) * (patients - 1))
    of_seeds = max(patients * float(by_seed.var(ddof=1)), of_rest)
    of_patients = max(seeds * float(by_patient.var(ddof=1)), of_rest)
    squares = of_seeds + of_patients - of_rest
    if squares / (seeds * patients) < 1e-30:
        return float(abs(mean) < 1e-15)
    return float(2 * t.sf(abs(float(mean)) / math.sqrt(squares / (seeds * patients)), degrees_of_freedom(table.shape)))
