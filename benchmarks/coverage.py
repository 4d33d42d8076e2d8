"""How often the intervals of `monai-iou evaluate` and `compare` cover the true value, in simulated studies.

    python -m benchmarks.coverage

Of normal scores, of scores like an IoU (beta distribution) and of skewed ones (exponential distribution), beside the
usual percentiles 2.5 and 97.5 of as many resamples; and how often the interval of a paired difference excludes 0 where
there is no difference.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from monai_iou.evaluation.statistics import interval, paired_test

Draw = Callable[[np.random.Generator, int], NDArray[np.float64]]
# Name -> what draws scores, their mean and their median.
SCORES: dict[str, tuple[Draw, float, float]] = {
    "normal": (lambda rng, n: rng.normal(0, 1, n), 0.0, 0.0),
    "beta": (lambda rng, n: rng.beta(5, 2, n), 5 / 7, 0.7355500),
    "exponential": (lambda rng, n: rng.exponential(1, n), 1.0, float(np.log(2))),
}
RESAMPLES = 2000


def usual(values: NDArray[np.float64], statistic: str, rng: np.random.Generator) -> tuple[float, float]:
    """Return the percentiles 2.5 and 97.5 of a statistic over resamples."""
    drawn = values[rng.integers(len(values), size=(RESAMPLES, len(values)))]
    low, high = np.percentile(getattr(np, statistic)(drawn, axis=1), [2.5, 97.5])
    return float(low), float(high)


def coverage(name: str, statistic: str, cases: int, studies: int) -> tuple[float, float]:
    """Return the shares of simulated studies whose interval covers the true value: ours, and the usual percentiles."""
    draw, *truths = SCORES[name]
    truth, rng, found = truths[statistic == "median"], np.random.default_rng(0), []
    for _ in range(studies):
        values = draw(rng, cases)
        bounds = interval(values, statistic), usual(values, statistic, rng)
        found.append([low <= truth <= high for low, high in bounds])
    ours, others = np.mean(found, axis=0)
    return float(ours), float(others)


def excluded(cases: int, studies: int) -> float:
    """Return the share of simulated studies without a difference whose interval excludes 0."""
    rng = np.random.default_rng(0)
    found = [paired_test(np.zeros(cases), rng.normal(0, 0.05, cases))["interval"] for _ in range(studies)]
    return float(np.mean([not low <= 0 <= high for low, high in found]))


def main(arguments: list[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--studies", type=int, default=3000, metavar="N", help="simulated studies for each number")
    parser.add_argument(
        "--cases", type=int, nargs="+", default=[8, 10, 11, 15, 30], metavar="N", help="cases of a study"
    )
    options = parser.parse_args(arguments)
    print("| scores | statistic | cases | covered, % | by the percentiles 2.5 and 97.5, % |")
    print("| --- | --- | --- | --- | --- |")
    for name in SCORES:
        for statistic in ("mean", "median"):
            for cases in options.cases:
                ours, others = coverage(name, statistic, cases, options.studies)
                print(f"| {name} | {statistic} | {cases} | {100 * ours:.1f} | {100 * others:.1f} |", flush=True)
    for cases in options.cases:
        print(
            f"No difference, {cases} cases: the interval excludes 0 in {100 * excluded(cases, options.studies):.1f} %"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
