"""The paired bootstrap: seeded, paired, and right about as often as it says."""

import numpy as np
import pytest

from liar_opt.runtime.bootstrap import mean_of, paired_difference


def test_the_interval_holds_the_difference() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal(80), rng.standard_normal(80) + 0.5
    found = paired_difference(mean_of(x), mean_of(y), 80)
    assert found.difference == pytest.approx(y.mean() - x.mean())
    assert found.low < found.difference < found.high


def test_seeded() -> None:
    x, y = np.random.default_rng(0).standard_normal((2, 40))
    first, again, other = (paired_difference(mean_of(x), mean_of(y), 40, 100, seed) for seed in (3, 3, 4))
    assert first == again
    assert (first.low, first.high) != (other.low, other.high)


def test_paired_what_both_share_falls_out() -> None:
    rng = np.random.default_rng(0)
    common = 10 * rng.standard_normal(60)
    found = paired_difference(mean_of(common), mean_of(common + 0.25), 60, 200)
    assert (found.low, found.high) == pytest.approx((0.25, 0.25))


def test_it_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(300):
        x = rng.standard_normal(50)
        y = x + 0.3 + rng.standard_normal(50)
        found = paired_difference(mean_of(x), mean_of(y), 50, 200, seed=trial)
        covered += found.low <= 0.3 <= found.high
    assert 0.90 <= covered / 300 <= 0.98


def test_as_wide_as_theory_says() -> None:
    difference = np.random.default_rng(2).standard_normal(400)
    found = paired_difference(mean_of(np.zeros(400)), mean_of(difference), 400, 2000)
    wanted = 2 * 1.96 * difference.std() / np.sqrt(400)
    assert found.high - found.low == pytest.approx(wanted, rel=0.06)


def test_a_higher_level_is_wider() -> None:
    x, y = np.random.default_rng(0).standard_normal((2, 40))
    narrow, wide = (paired_difference(mean_of(x), mean_of(y), 40, 400, level=level) for level in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high
