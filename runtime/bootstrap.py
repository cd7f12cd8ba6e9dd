"""Intervals of differences: the paired percentile bootstrap (Efron 1979).

Both models were measured on the same samples, so both are measured again on the same draws of them, with replacement. What
the samples have in common (hard ones are hard for both) falls out of the difference, and the interval is as wide as the
difference is uncertain, not as the two scores are.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Statistic = Callable[[NDArray[np.int64]], float]
"""Takes rows of the evaluation set, some of them more than once, and returns the metric on them."""
LEVEL = 0.95
RESAMPLES = 1000


@dataclass(frozen=True)
class Interval:
    """A difference with its interval.

    Attributes:
        difference: on all samples.
        low: lower end.
        high: upper end.
    """

    difference: float
    low: float
    high: float


def mean_of(values: NDArray[np.float64]) -> Statistic:
    """Returns the metric that is the mean of one number a sample, [n]."""
    return lambda rows: float(values[rows].mean())


def paired_difference(
    reference: Statistic, other: Statistic, samples: int, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL
) -> Interval:
    """Measures other - reference.

    Args:
        reference: the metric of the model that is compared with.
        other: the metric of the model in question.
        samples: in the evaluation set.
        resamples: draws.
        seed: of the draws: metrics with the same seed and number of samples see the same draws.
        level: share of the draws inside the interval.
    """
    rng = np.random.default_rng(seed)
    everything = np.arange(samples)
    drawn = np.empty(resamples)
    for index in range(resamples):
        rows = rng.integers(samples, size=samples)
        drawn[index] = other(rows) - reference(rows)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(other(everything) - reference(everything), float(low), float(high))
