"""Moments against those of the stacked rows."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from liar_opt.runtime.errors import InternalError, OptionError
from liar_opt.runtime.moments import Moments

N, M = 7, 3


def rows_of(seed: int, count: int, width: int = N) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((count, width)) @ rng.standard_normal((width, width))
    return np.asarray(mixed + rng.standard_normal(width))


def add(moments: Moments, x: NDArray[Any], held_back: bool = False) -> None:
    moments.add(x.shape[0], x.sum(axis=0), x.T @ x, held_back)


@pytest.mark.parametrize("seed", range(5))
def test_batches_add_up_to_the_moments_of_all_rows(seed: int) -> None:
    batches = [rows_of(seed + 100 * i, count) for i, count in enumerate((5, 11, 1))]
    moments = Moments(N)
    for i, x in enumerate(batches):
        add(moments, x, held_back=i == 1)
    for fold, x in (
        ("all", np.concatenate(batches)),
        ("training", np.concatenate([batches[0], batches[2]])),
        ("held_back", batches[1]),
    ):
        statistics = moments.statistics(fold)  # type: ignore[arg-type]
        assert statistics.count == moments.rows(fold) == x.shape[0]  # type: ignore[arg-type]
        np.testing.assert_allclose(statistics.mean, x.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(statistics.covariance, np.cov(x.T, bias=True), rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(statistics.uncentred, x.T @ x / x.shape[0], rtol=1e-11)
        np.testing.assert_allclose(statistics.mean_square, (x**2).mean(axis=0), rtol=1e-11)
    assert moments.count == 17
    np.testing.assert_array_equal(moments.mean, moments.statistics().mean)
    np.testing.assert_array_equal(moments.covariance, moments.statistics().covariance)
    np.testing.assert_array_equal(moments.uncentred, moments.statistics().uncentred)


def test_the_oracle_sees_a_lost_row() -> None:
    x = rows_of(0, 13)
    moments = Moments(N)
    add(moments, x[:-1])
    assert np.abs(moments.covariance - np.cov(x.T, bias=True)).max() > 1e-3


def test_float32_batches_do_not_lose_what_float64_sums_keep() -> None:
    moments = Moments(1)
    for _ in range(2**8):
        moments.add(2**20, np.full(1, 2**20, np.float32), np.full((1, 1), 2**20, np.float32))
    moments.add(1, np.ones(1, np.float32), np.ones((1, 1), np.float32))  # 2^28 + 1 is no float32
    assert moments.statistics().uncentred[0, 0] == 1.0
    assert moments.covariance.dtype == np.float64


def test_variance_of_a_constant_channel_is_not_negative() -> None:
    x = rows_of(3, 29).astype(np.float32)
    x[:, 2] = 1234.567
    moments = Moments(N)
    add(moments, x)
    assert np.diagonal(moments.covariance).min() >= 0.0


@pytest.mark.parametrize("bounds", [(0, 7), (0, 2, 7), (0, 1, 4, 7)])
def test_block_rows_make_the_whole(bounds: tuple[int, ...]) -> None:
    x, y = rows_of(1, 19), rows_of(2, 11)
    whole, halves = Moments(N), Moments(N)
    for batch in (x, y):
        add(whole, batch)
        rows = [batch[:, low:high].T @ batch[:, low:] for low, high in pairwise(bounds)]
        halves.add_block_rows(len(batch), batch.sum(axis=0), rows, bounds)
    np.testing.assert_allclose(halves.covariance, whole.covariance, rtol=1e-11)
    assert np.array_equal(halves.covariance, halves.covariance.T)


def test_block_rows_that_do_not_fit_are_refused() -> None:
    x = rows_of(1, 19)
    moments, total, second = Moments(N), x.sum(axis=0), x.T @ x
    with pytest.raises(InternalError, match="do not increase"):
        moments.add_block_rows(19, total, [second], (1, 7))
    with pytest.raises(InternalError, match="needed"):
        moments.add_block_rows(19, total, [second], (0, 3, 7))
    with pytest.raises(InternalError, match="needed"):
        moments.add_block_rows(19, total, [second[:3], second[3:]], (0, 3, 7))
    with pytest.raises(OptionError, match="NaN or Inf"):
        moments.add_block_rows(19, total * np.nan, [second], (0, 7))
    assert moments.count == 0


def test_merge_pools_the_folds() -> None:
    a, b = rows_of(4, 13), rows_of(5, 17)
    left, right = Moments(N), Moments(N)
    add(left, a)
    add(right, b, held_back=True)
    pooled = left.merge(right)
    np.testing.assert_allclose(pooled.covariance, np.cov(np.concatenate([a, b]).T, bias=True), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(pooled.statistics("held_back").mean, b.mean(axis=0), rtol=1e-12)
    assert (left.count, right.count) == (13, 17)
    with pytest.raises(InternalError, match="width 7 cannot be pooled with width 5"):
        left.merge(Moments(5))


def test_cross_moments_with_a_dense_target() -> None:
    x, y = rows_of(6, 23), rows_of(7, 23, M)
    moments = Moments(N)
    for part in (slice(0, 9), slice(9, 23)):
        add(moments, x[part])
        moments.add_cross(len(x[part]), x[part].T @ y[part], y[part].sum(axis=0), float((y[part] ** 2).sum()))
    cross = moments.merge(Moments(N)).cross_statistics()
    np.testing.assert_allclose(cross.covariance, (x - x.mean(0)).T @ (y - y.mean(0)) / 23, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(cross.target_mean, y.mean(axis=0), rtol=1e-12)
    assert cross.target_variance == pytest.approx(y.var(axis=0).sum())


def test_cross_moments_must_cover_every_row() -> None:
    x, y = rows_of(6, 23), rows_of(7, 23, M)
    moments = Moments(N)
    add(moments, x)
    with pytest.raises(InternalError, match="cross moments of 0"):
        moments.cross_statistics()
    with pytest.raises(InternalError, match="width 7 were given"):
        moments.add_cross(23, x.T @ y, y.sum(axis=1), 1.0)
    moments.add_cross(23, x.T @ y, y.sum(axis=0), 1.0)
    with pytest.raises(InternalError, match="those before it"):
        moments.add_cross(23, x.T @ x, x.sum(axis=0), 1.0)


def test_some_channels_are_those_that_were_measured_alone() -> None:
    x, y, left = rows_of(0, 23), rows_of(1, 23)[:, :M], np.asarray([0, 2, 3, 6])
    whole, alone = Moments(N), Moments(left.size)
    for moments, rows in ((whole, x), (alone, x[:, left])):
        for held, part in ((False, slice(0, 17)), (True, slice(17, 23))):
            add(moments, rows[part], held)
            moments.add_cross(
                len(rows[part]), rows[part].T @ y[part], y[part].sum(0), float(np.square(y[part]).sum()), held
            )
    whole._folds["training"].second = np.triu(whole._folds["training"].second)  # as block rows leave it
    found = whole.part(left)
    for fold in ("all", "training", "held_back"):
        assert found.rows(fold) == alone.rows(fold)
        assert np.allclose(found.statistics(fold).covariance, alone.statistics(fold).covariance)
        assert np.allclose(found.statistics(fold).mean, alone.statistics(fold).mean)
        assert np.allclose(found.cross_statistics(fold).covariance, alone.cross_statistics(fold).covariance)


def test_a_target_that_is_partly_met_is_what_is_left_of_it() -> None:
    x, y, by = rows_of(0, 23), rows_of(1, 23)[:, :M], np.asarray([0.5, -2.0, 3.0])
    weights = np.random.default_rng(2).uniform(0.5, 2.0, (23, 1))
    shifted, made = Moments(N), Moments(N)
    for moments, target in ((shifted, y), (made, y - by)):
        total, second = (weights * x).sum(axis=0), (weights * x).T @ x
        moments.add_block_rows(float(weights.sum()), total, [second], [0, N], seen=23)
        square = float((weights * target * target).sum())
        moments.add_cross(float(weights.sum()), (weights * x).T @ target, (weights * target).sum(axis=0), square)
    shifted.shift_target(by)
    found, wanted = shifted.cross_statistics(), made.cross_statistics()
    assert np.allclose(found.covariance, wanted.covariance)
    assert np.allclose(found.target_mean, wanted.target_mean)
    assert found.target_variance == pytest.approx(wanted.target_variance)
    assert shifted._folds["training"].target_square == pytest.approx(made._folds["training"].target_square)


def test_shapes_that_do_not_fit_are_refused() -> None:
    moments = Moments(N)
    with pytest.raises(InternalError, match="no rows in fold 'held_back'"):
        moments.statistics("held_back")
    with pytest.raises(InternalError, match="width 7 were given"):
        moments.add(5, np.zeros(N), np.zeros((N, N - 1)))
    with pytest.raises(InternalError, match="-1 rows"):
        moments.add(-1, np.zeros(N), np.zeros((N, N)))
    with pytest.raises(InternalError, match="width 0"):
        Moments(0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_activations_that_are_not_finite_are_reported(bad: float) -> None:
    second = np.eye(N)
    second[2, 5] = bad
    with pytest.raises(OptionError, match="NaN or Inf"):
        Moments(N).add(5, np.zeros(N), second)
    with pytest.raises(OptionError, match="NaN or Inf"):
        Moments(N).add_cross(5, np.zeros((N, M)), np.zeros(M), bad)
