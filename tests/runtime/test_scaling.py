"""Mask tuning against plain least squares with one unknown a block."""

from __future__ import annotations

import numpy as np
import pytest

from liar_opt.runtime.moments import Moments, Statistics
from liar_opt.runtime.scaling import scale_blocks

OWNERS = np.array([0, 0, 0, 1, 1, 2, 2, 2, 3, 3])
KEPT = np.array([0, 1, 2, 5, 6, 7])
WEIGHT = np.random.default_rng(1).standard_normal((10, 4))


def rows_of(seed: int, count: int) -> np.ndarray:
    mixing = np.random.default_rng(3).standard_normal((10, 10))
    return np.random.default_rng(seed).standard_normal((count, 10)) @ mixing + 0.5


def statistics(x: np.ndarray) -> Statistics:
    moments = Moments(10)
    moments.add(len(x), x.sum(0), x.T @ x)
    return moments.statistics()


def error(x: np.ndarray, factors: np.ndarray) -> float:
    return float(((x @ WEIGHT - (x[:, KEPT] * factors) @ WEIGHT[KEPT]) ** 2).sum())


def test_the_factors_are_the_least_squares_fit() -> None:
    x = rows_of(0, 500)
    found = scale_blocks(statistics(x), None, WEIGHT, OWNERS, KEPT, 1e-12)
    columns = [x[:, OWNERS == b] @ WEIGHT[OWNERS == b] for b in (0, 2)]
    best = np.linalg.lstsq(np.stack([c.ravel() for c in columns], 1), (x @ WEIGHT).ravel(), rcond=None)[0]
    np.testing.assert_allclose(found.factors, best[[0, 0, 0, 1, 1, 1]], rtol=1e-6)
    assert error(x, found.factors) < error(x, np.ones(6))
    assert error(x, found.factors * 1.01) > error(x, found.factors)


def test_a_large_ridge_leaves_everything_alone() -> None:
    found = scale_blocks(statistics(rows_of(0, 500)), None, WEIGHT, OWNERS, KEPT, 1e12)
    np.testing.assert_allclose(found.factors, 1.0, atol=1e-9)


@pytest.mark.parametrize("count", [3, 10, 100])
def test_held_back_rows_guard_the_choice(count: int) -> None:
    worse = 0
    for seed in range(10):
        training, held, fresh = rows_of(seed, count), rows_of(seed + 100, count), rows_of(seed + 200, 4000)
        found = scale_blocks(statistics(training), (statistics(training), statistics(held)), WEIGHT, OWNERS, KEPT, None)
        worse += error(fresh, found.factors) > 1.02 * error(fresh, np.ones(6))
    assert worse <= {3: 4, 10: 2, 100: 0}[count]
