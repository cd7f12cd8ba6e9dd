"""Rounding with feedback: the oracle of one row, never far from the grid, better than the nearest point."""

import numpy as np
import pytest
from numpy.typing import NDArray

from liar_opt.runtime.feedback_rounding import lost, rounded_with_feedback

Array = NDArray[np.float64]


def problem(n: int, m: int, seed: int = 0) -> tuple[Array, Array, Array]:
    """A weight, the scales of each of its columns, and the moments of correlated rows."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4 * n, n)) @ (np.eye(n) + 0.7 * rng.standard_normal((n, n)) / np.sqrt(n))
    weight = rng.standard_normal((n, m))
    return weight, np.abs(weight).max(0) / 7.0, x.T @ x / len(x)


@pytest.mark.parametrize(("n", "m"), [(37, 11), (200, 30), (1, 4)])
def test_it_loses_less_than_the_nearest_point(n: int, m: int) -> None:
    weight, scale, moments = problem(n, m)
    nearest = np.clip(np.rint(weight / scale + 8), 0, 15)
    found = rounded_with_feedback(weight, scale, np.full(m, 8.0), (0, 15), moments)
    assert found.min() >= 0 and found.max() <= 15
    before, after = (lost(weight - (q - 8) * scale, moments) for q in (nearest, found))
    assert after < 0.9 * before if n > 1 else after == pytest.approx(before)


def test_rows_that_are_independent_are_rounded_to_the_nearest_point() -> None:
    weight, scale, _ = problem(150, 7)
    found = rounded_with_feedback(weight, scale, np.zeros(7), (-7, 7), np.diag(np.arange(1.0, 151.0)))
    np.testing.assert_array_equal(found, np.rint(weight / scale))


def test_what_is_left_is_fitted_to_the_first_row() -> None:
    """With a grid so fine that only the first row moves, the others become what least squares gives."""
    rng = np.random.default_rng(3)
    _, _, moments = problem(6, 2)
    first = int(np.argmax(np.diag(moments)))
    weight = rng.standard_normal((6, 2))
    scale = np.full((6, 2), 1e-7)
    scale[first] = 0.5
    found = rounded_with_feedback(weight, scale, np.zeros((6, 2)), (-(2**40), 2**40), moments, ridge=0.0) * scale
    rest = [i for i in range(6) if i != first]
    moved = weight[first] - found[first]
    wanted = weight[rest] + np.linalg.solve(moments[np.ix_(rest, rest)], moments[rest, first])[:, None] * moved
    np.testing.assert_allclose(found[rest], wanted, atol=1e-5)
    assert np.abs(found[first] - np.rint(weight[first] / 0.5) * 0.5).max() < 1e-12


def test_what_is_never_seen_and_what_is_zero_stay_on_the_grid() -> None:
    weight, scale, moments = problem(20, 5)
    moments[3] = moments[:, 3] = 0.0
    weight[:, 2], scale[2] = 0.0, 0.0
    found = rounded_with_feedback(weight, scale, np.full(5, 8.0), (0, 15), moments)
    assert (found[:, 2] == 8).all() and np.isfinite(found).all()
    none = rounded_with_feedback(weight, scale, np.full(5, 8.0), (0, 15), np.zeros((20, 20)))
    np.testing.assert_array_equal(none[:, [0, 1, 3, 4]], np.rint(weight / np.where(scale, scale, 1) + 8)[:, [0, 1, 3, 4]])
