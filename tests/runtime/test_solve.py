"""Repair, errors and selection against plain least squares on the rows themselves."""

import time
from dataclasses import replace

import numpy as np
import pytest
import threadpoolctl
from formulas import Floats, Ints, mean_square, penalised, regression, residual

from liar_opt.passes.measured import Measured
from liar_opt.passes.scores import SCORES
from liar_opt.runtime import solve
from liar_opt.runtime.errors import InternalError
from liar_opt.runtime.moments import CrossStatistics, Moments, Statistics
from liar_opt.runtime.solve import half_the_threads

N, M = 11, 5


def rows_of(seed: int, count: int, width: int = N) -> Floats:
    """Correlated rows with a mean; the mixing depends on the width alone, so that folds agree on it."""
    mixing = np.random.default_rng(width).standard_normal((width, width)) * np.geomspace(1.0, 0.1, width)[:, None]
    rng = np.random.default_rng(seed)
    return np.asarray(rng.standard_normal((count, width)) @ mixing + np.linspace(-1.0, 2.0, width))


def statistics_of(x: Floats) -> Statistics:
    moments = Moments(x.shape[1])
    moments.add(x.shape[0], x.sum(axis=0), x.T @ x)
    return moments.statistics()


def split(seed: int, removed: int, width: int = N) -> tuple[Ints, Ints]:
    order = np.random.default_rng(seed).permutation(width)
    return np.sort(order[removed:]), np.sort(order[:removed])


def weight_of(seed: int, width: int = N, columns: int = M) -> Floats:
    return np.random.default_rng(1000 + seed).standard_normal((width, columns))


# Repair


def repaired(s: Statistics, weight: Floats, kept: Ints, removed: Ints, ridge: float) -> solve.DenseFit:
    return solve.repair_weight(s.covariance, s.mean, weight, kept, removed, solve.RidgeChoice("repair", ridge))


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.3])
@pytest.mark.parametrize("seed", range(6))
def test_repair_is_the_least_squares_fit(seed: int, ridge: float) -> None:
    """W_U + Q W_M and p W_M, with x_M ~ x_U Q + p by least squares on the rows."""
    x, w = rows_of(seed, 97), weight_of(seed)
    kept, removed = split(seed, 1 + seed)
    fit = repaired(statistics_of(x), w, kept, removed, ridge)
    q, p = regression(x[:, kept], x[:, removed], ridge)
    np.testing.assert_allclose(fit.weight, w[kept] + q @ w[removed], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(fit.bias, p @ w[removed], rtol=1e-6, atol=1e-8)
    assert (fit.ridge_used, fit.raised) == (ridge, False)
    if ridge == 0.0:
        best, offset = regression(x[:, kept], x @ w)
        np.testing.assert_allclose(fit.weight, best, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(fit.bias, offset, rtol=1e-6, atol=1e-8)


def test_the_residual_of_what_goes_is_the_same_beside_what_stays() -> None:
    """Of channels that others explain, only the rest of the covariance decides which of them go."""
    x = rows_of(3, 60)
    statistics, weight = statistics_of(x), weight_of(4)
    inside, kept = np.asarray([0, 2, 3, 5]), np.asarray([0, 3])
    beside = np.setdiff1d(np.arange(N), inside)
    rest = solve.unexplained(statistics.covariance, inside, beside, 1e-12)
    removed = np.setdiff1d(np.arange(inside.size), kept)
    alone = residual(rest, weight[inside], kept, removed)
    left = np.sort(np.concatenate([beside, inside[kept]]))
    together = residual(statistics.covariance, weight, left, inside[removed])
    assert alone == pytest.approx(together, rel=1e-6)
    assert alone < 0.9 * residual(statistics.covariance[np.ix_(inside, inside)], weight[inside], kept, removed)
    copied = np.concatenate([x, x[:, :2]], axis=1)  # wholly explained, however singular
    again = solve.unexplained(statistics_of(copied).covariance, np.asarray([N, N + 1]), np.arange(N))
    assert np.abs(again).max() < 1e-2 * statistics.covariance.diagonal().max()
    assert (np.diagonal(again) >= 0).all()


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.3, np.inf])
@pytest.mark.parametrize("seed", range(3))
def test_errors_are_those_of_the_rows(seed: int, ridge: float) -> None:
    x, w = rows_of(seed, 83), weight_of(seed)
    kept, removed = split(seed, 4)
    s = statistics_of(x)
    fit = repaired(s, w, kept, removed, ridge)
    measured = mean_square(x @ w - x[:, kept] @ fit.weight - fit.bias)
    centred = mean_square((x - x.mean(0))[:, removed] @ w[removed])
    predicted = centred - fit.explained
    assert predicted == pytest.approx(measured, rel=1e-8)
    if ridge == 0.0:
        assert predicted == pytest.approx(residual(s.covariance, w, kept, removed), rel=1e-8)
    if np.isfinite(ridge):
        choice = solve.choose_ridge(s, s, w, kept, removed, [ridge])
        assert (choice.kind, choice.ridge) == ("repair", ridge)
        assert (choice.error, choice.training_error) == pytest.approx((measured, measured), rel=1e-8)
    fit.weight[0, 0] += 0.01  # the oracle can fail
    assert mean_square(x @ w - x[:, kept] @ fit.weight - fit.bias) != pytest.approx(predicted, rel=1e-6)
    assert predicted <= centred * (1 + 1e-12) <= mean_square(x[:, removed] @ w[removed]) * (1 + 1e-9)


def test_permuting_the_channels_permutes_the_repair() -> None:
    s, w = statistics_of(rows_of(2, 61)), weight_of(2)
    kept, removed = split(2, 4)
    order = np.random.default_rng(9).permutation(N)
    place = np.argsort(order)
    plain = repaired(s, w, kept, removed, 1e-2)
    turned = Statistics(s.count, s.mean[order], s.covariance[np.ix_(order, order)])
    moved = repaired(turned, w[order], place[kept], place[removed], 1e-2)
    np.testing.assert_allclose(moved.weight, plain.weight, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(moved.bias, plain.bias, rtol=1e-9, atol=1e-12)


def test_a_copied_channel_is_repaired_exactly() -> None:
    x = rows_of(5, 71)
    x[:, 3] = 2.0 * x[:, 8] - x[:, 1] + 0.25
    w = weight_of(5)
    kept = np.delete(np.arange(N), 3)
    fit = repaired(statistics_of(x), w, kept, np.array([3]), 0.0)
    np.testing.assert_allclose(x[:, kept] @ fit.weight + fit.bias, x @ w, atol=1e-8)


def test_dead_channels_cost_nothing_and_break_nothing() -> None:
    x = rows_of(6, 53)
    x[:, [2, 7]] = [0.0, 1.5]
    w = weight_of(6)
    s = statistics_of(x)
    removed = np.array([2, 7])
    kept = np.delete(np.arange(N), removed)
    fit = repaired(s, w, kept, removed, 1e-4)
    np.testing.assert_allclose(x[:, kept] @ fit.weight + fit.bias, x @ w, atol=1e-10)
    assert solve.choose_ridge(s, s, w, kept, removed).error == pytest.approx(0.0, abs=1e-10)
    dead = repaired(s, w, removed, kept, 0.0)  # kept channels all dead: S_UU = 0
    assert dead.raised and np.isfinite(dead.weight).all()
    np.testing.assert_allclose(dead.bias, s.mean[kept] @ w[kept] - s.mean[removed] @ (dead.weight - w[removed]))
    selection = solve.select_greedy([solve.Problem(s.covariance, w, np.arange(N))], N - 2, 1e-4)
    assert set(selection.removed_blocks.tolist()) == {2, 7}


def test_a_singular_covariance_raises_the_ridge() -> None:
    s = statistics_of(rows_of(7, 4))  # rank 3
    kept, removed = split(7, 4)
    fit = repaired(s, np.eye(N), kept, removed, 0.0)  # so that Q are its last columns
    q = fit.weight[:, removed]
    assert fit.raised and 0.0 < fit.ridge_used < 1e-3
    assert np.isfinite(q).all() and 0.0 < np.abs(q).max() < 1e3
    assert not repaired(s, np.eye(N), kept, removed, 1e-2).raised


def test_everything_or_nothing_removed() -> None:
    s, w = statistics_of(rows_of(8, 31)), weight_of(8)
    nothing, everything = np.arange(0), np.arange(N)
    fit = repaired(s, w, nothing, everything, 1e-3)
    assert fit.weight.shape == (0, M)
    np.testing.assert_allclose(fit.bias, s.mean @ w)
    kept_all = repaired(s, w, everything, nothing, 1e-3)
    np.testing.assert_array_equal(kept_all.weight, w)
    assert not kept_all.bias.any() and kept_all.explained == 0.0
    assert solve.choose_ridge(s, s, w, everything, nothing).error == 0.0


@pytest.mark.parametrize("kind", ["repair", "bias", "none"])
@pytest.mark.parametrize(
    ("kept", "removed", "ridge"), [([0, 1], [1, 2], 0.0), ([0], [2], 0.0), ([0, 1], [2], -1.0), ([0, 1], [2], np.nan)]
)
def test_sets_that_do_not_share_out_the_width_are_refused(
    kept: list[int], removed: list[int], ridge: float, kind: solve.RepairKind
) -> None:
    sets = np.array(kept), np.array(removed)
    with pytest.raises(InternalError):
        solve.repair_weight(np.eye(3), np.zeros(3), np.ones((3, 2)), *sets, solve.RidgeChoice(kind, ridge))
    s = Statistics(9, np.zeros(3), np.eye(3))
    with pytest.raises(InternalError):
        solve.choose_ridge(s, s, np.ones((3, 2)), *sets, [ridge])


def test_shapes_that_do_not_fit_are_refused() -> None:
    sets = np.array([0, 2]), np.array([1])
    choice, s = solve.RidgeChoice("repair", 0.0), Statistics(9, np.zeros(3), np.eye(3))
    with pytest.raises(InternalError, match="mean is"):
        solve.repair_weight(np.eye(3), np.zeros(4), np.ones((3, 2)), *sets, choice)
    with pytest.raises(InternalError, match=r"weight \(4, 2\) on a dimension of width 3"):
        solve.repair_weight(np.eye(3), np.zeros(3), np.ones((4, 2)), *sets, choice)
    with pytest.raises(InternalError, match="weight"):
        solve.choose_ridge(s, s, np.ones((4, 2)), *sets)
    with pytest.raises(InternalError, match="weight"):
        solve.select_greedy([solve.Problem(np.eye(3), np.ones((4, 2)), np.arange(3))], 1, 1e-3)
    with pytest.raises(InternalError, match="no ridge"):
        solve.choose_ridge(s, s, np.ones((3, 2)), *sets, [])


# Ridge


@pytest.mark.parametrize("columns", [M, 40])
@pytest.mark.parametrize("rows", [6, 25, 550])
def test_the_ridge_is_the_best_of_the_grid_on_held_back_rows(rows: int, columns: int) -> None:
    x, held = rows_of(1, rows), rows_of(2, 37)
    w = weight_of(1, columns=columns)
    kept, removed = split(3, 5)
    s = statistics_of(x)
    choice = solve.choose_ridge(s, statistics_of(held), w, kept, removed)

    def held_error(choice: solve.RidgeChoice) -> float:
        fit = solve.repair_weight(s.covariance, s.mean, w, kept, removed, choice)
        return mean_square(held @ w - held[:, kept] @ fit.weight - fit.bias)

    of_grid = {r: held_error(solve.RidgeChoice("repair", r)) for r in solve.RIDGE_GRID}
    bias, none = (held_error(solve.RidgeChoice(kind, np.inf)) for kind in ("bias", "none"))
    assert bias == pytest.approx(mean_square((held - x.mean(0))[:, removed] @ w[removed]))
    assert none == pytest.approx(mean_square(held[:, removed] @ w[removed]))
    assert choice.error == pytest.approx(held_error(choice), rel=1e-7)
    assert choice.error <= min(bias, none) * (1 + 1e-9)
    assert choice.error == pytest.approx(min([*of_grid.values(), bias, none]), rel=1e-6)


def test_more_rows_choose_a_smaller_ridge() -> None:
    held = statistics_of(rows_of(2, 400))
    kept, removed = split(3, 5)
    few, many = (
        solve.choose_ridge(statistics_of(rows_of(1, rows)), held, weight_of(1), kept, removed).ridge for rows in (8, 5000)
    )
    assert many < few


def test_a_repair_that_does_harm_is_not_chosen() -> None:
    kept, removed, w = np.array([0, 1]), np.array([2]), np.ones((3, 2))
    covariance = np.array([[1.0, 0.0, 0.9], [0.0, 1.0, 0.0], [0.9, 0.0, 1.0]])
    opposite = covariance.copy()
    opposite[0, 2] = opposite[2, 0] = -0.9
    training = Statistics(100, np.array([0.0, 0.0, 0.5]), covariance)
    held = Statistics(10, np.array([0.0, 0.0, 0.125]), opposite)
    choice = solve.choose_ridge(training, held, w, kept, removed)
    # Two columns of weight 1: twice the variance of x_2 and the square of how far its mean is from what is added.
    assert (choice.kind, choice.ridge) == ("none", np.inf)
    assert choice.error == pytest.approx(2 * (1.0 + 0.125**2))
    nearer = replace(held, mean=np.array([0.0, 0.0, 0.375]))
    choice = solve.choose_ridge(training, nearer, w, kept, removed)
    assert (choice.kind, choice.ridge) == ("bias", np.inf)
    assert choice.error == pytest.approx(2 * (1.0 + 0.125**2))
    fit = solve.repair_weight(covariance, training.mean, w, kept, removed, choice)
    np.testing.assert_array_equal(fit.weight, w[kept])
    np.testing.assert_array_equal(fit.bias, [0.5, 0.5])
    shifted = replace(training, mean=np.array([0.0, 0.0, 5.0]))
    choice = solve.choose_ridge(shifted, held, w, kept, removed)
    assert choice.kind == "none" and np.isnan(choice.training_error) and np.isnan(choice.gap)
    fit = solve.repair_weight(covariance, shifted.mean, w, kept, removed, choice)
    np.testing.assert_array_equal(fit.weight, w[kept])
    assert not fit.bias.any() and fit.explained == 0.0


# Error-aware target


@pytest.mark.parametrize("ridge", [0.0, 0.2])
def test_dense_target_is_the_ridge_regression_from_pruned_inputs(ridge: float) -> None:
    x, w = rows_of(1, 301), weight_of(1)
    y = x @ w + 0.7
    noisy = x + 0.3 * rows_of(2, 301)
    kept, removed = split(4, 4)
    moments = Moments(N)
    moments.add(301, noisy.sum(axis=0), noisy.T @ noisy)
    moments.add_cross(301, noisy.T @ y, y.sum(axis=0), float((y**2).sum()))
    pruned, cross = moments.statistics(), moments.cross_statistics()
    local = repaired(pruned, w, kept, removed, 1e-3).weight
    fit = solve.fit_dense_target(pruned, cross, kept, local, ridge)
    expected, _ = regression(noisy[:, kept], y, ridge, local)
    np.testing.assert_allclose(fit.weight, expected, rtol=1e-7, atol=1e-9)
    error = mean_square(y - noisy[:, kept] @ fit.weight - fit.bias)
    assert solve.dense_target_error(pruned, cross, kept, fit.weight, fit.bias) == pytest.approx(error, rel=1e-8)
    stay = solve.fit_dense_target(pruned, cross, kept, local, np.inf)
    np.testing.assert_array_equal(stay.weight, local)
    assert error <= solve.dense_target_error(pruned, cross, kept, local, stay.bias)


def test_dense_ridge_is_the_best_of_the_grid() -> None:
    w, kept = weight_of(1), split(4, 4)[0]
    folds: list[tuple[Statistics, CrossStatistics]] = []
    for seed, rows in ((1, 19), (2, 43)):
        x = rows_of(seed, rows)
        y, noisy = x @ w, x + 0.3 * rows_of(seed + 10, rows)
        moments = Moments(N)
        moments.add(rows, noisy.sum(axis=0), noisy.T @ noisy)
        moments.add_cross(rows, noisy.T @ y, y.sum(axis=0), float((y**2).sum()))
        folds.append((moments.statistics(), moments.cross_statistics()))
    local = w[kept]
    errors = {}
    for ridge in (*solve.RIDGE_GRID, np.inf):
        fit = solve.fit_dense_target(*folds[0], kept, local, ridge)
        errors[ridge] = solve.dense_target_error(*folds[1], kept, fit.weight, fit.bias)
    chosen = solve.choose_dense_ridge(folds[0], folds[1], kept, local)
    assert errors[chosen] == pytest.approx(min(errors.values()), rel=1e-9)
    with pytest.raises(InternalError, match="local"):
        solve.fit_dense_target(*folds[0], kept, w, 0.1)


# Selection


def without(problems: list[solve.Problem], gone: Ints, ridge: float) -> float:
    """What the blocks that are gone cost, by the formula."""
    return penalised(problems, np.setdiff1d(np.asarray(problems[0].blocks), gone), ridge)


def greedy_by_force(problems: list[solve.Problem], keep: int, ridge: float) -> list[int]:
    left = set(range(int(problems[0].blocks.max()) + 1))
    gone: list[int] = []
    while len(left) > keep:
        best = min(left, key=lambda b: without(problems, np.array([*gone, b]), ridge))
        left.remove(best)
        gone.append(best)
    return gone


def problem_of(seed: int, blocks: list[int], scale: float = 1.0, columns: int = 8) -> solve.Problem:
    width = len(blocks)
    covariance = statistics_of(rows_of(seed, 6 * width, width)).covariance
    return solve.Problem(covariance, weight_of(seed, width, columns), np.array(blocks), scale)


BLOCKS = {
    "single": [list(range(13))],
    "pairs, mixed up": [[3, 0, 1, 2, 0, 3, 4, 1, 2, 4]],
    "uneven": [[0, 1, 1, 1, 2, 3, 3, 4, 4, 4, 4]],
    "two problems": [[0, 1, 2, 3, 4], [1, 1, 0, 0, 2, 2, 3, 3, 4, 4, 4]],
}


@pytest.mark.parametrize("layout", BLOCKS)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("compact", [0.0, 1.0])
@pytest.mark.parametrize("columns", [8, 30])
def test_greedy_removes_what_costs_least_after_repair(
    layout: str, seed: int, compact: float, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solve, "_COMPACT_BELOW", compact)
    problems = [problem_of(seed + 7 * i, blocks, 1.0 + 2.5 * i, columns) for i, blocks in enumerate(BLOCKS[layout])]
    number = int(problems[0].blocks.max()) + 1
    selection = solve.select_greedy(problems, 2, 1e-3)
    assert selection.removed_blocks.tolist() == greedy_by_force(problems, 2, 1e-3)
    assert sorted([*selection.kept_blocks, *selection.removed_blocks]) == list(range(number))
    assert selection.kept_blocks.tolist() == sorted(selection.kept_blocks)
    for step, error in enumerate(selection.errors):
        assert error == pytest.approx(without(problems, selection.removed_blocks[: step + 1], 1e-3), rel=1e-8)


def test_the_error_is_nearly_the_residual_at_a_small_ridge() -> None:
    problem = problem_of(1, list(range(13)))
    selection = solve.select_greedy([problem], 5, 1e-9)
    removed = np.sort(selection.removed_blocks)
    weight = np.asarray(problem.weight)
    exact = residual(problem.covariance, weight, selection.kept_blocks, removed)
    assert selection.errors[-1] == pytest.approx(exact, rel=1e-5)
    weight[removed[0], 0] += 1.0  # the oracle can fail
    exact = residual(problem.covariance, weight, selection.kept_blocks, removed)
    assert selection.errors[-1] != pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("rows", [150, 900])
def test_long_removals_stay_exact(rows: int) -> None:
    width = 301
    covariance = statistics_of(rows_of(3, rows, width)).covariance
    problem = solve.Problem(covariance, weight_of(3, width, 17), np.arange(width))
    selection = solve.select_greedy([problem], 90, 1e-4)
    assert selection.errors[-1] == pytest.approx(without([problem], selection.removed_blocks, 1e-4), rel=1e-6)
    assert (np.diff(selection.errors) >= 0).all()


def test_greedy_beats_the_scores() -> None:
    width = 64
    x = rows_of(4, 2000, width)
    moments = Moments(width)
    moments.add(len(x), x.sum(axis=0), x.T @ x)
    s, w = moments.statistics(), weight_of(4, width, 9)
    consumer = Measured(w, np.arange(width), moments)
    error = {}
    for name in ("greedy", "swaps", "magnitude", "activation-weighted"):
        kept = SCORES[name].select([consumer], 32, np.random.default_rng(0))
        removed = np.setdiff1d(np.arange(width), kept)
        fit = repaired(s, w, kept, removed, 1e-4)
        error[name] = mean_square(x @ w - x[:, kept] @ fit.weight - fit.bias)
    assert max(error["greedy"], error["swaps"]) < min(error["magnitude"], error["activation-weighted"])


def test_a_fast_removal_is_fast() -> None:
    width = 768
    covariance = statistics_of(rows_of(5, 1000, width)).covariance
    start = time.process_time()
    solve.select_greedy([solve.Problem(covariance, weight_of(5, width, 384), np.arange(width))], 384, 1e-3)
    assert time.process_time() - start < 10.0  # 0.1 s by itself; plain down-dating takes minutes


@pytest.mark.parametrize(
    ("blocks", "keep", "ridge"),
    [([0, 2, 2], 1, 1e-3), ([0, -1, 1], 1, 1e-3), ([0, 1], 1, 1e-3), ([0, 1, 2], 4, 1e-3), ([0, 1, 2], 1, 0.0)],
)
def test_selections_that_make_no_sense_are_refused(blocks: list[int], keep: int, ridge: float) -> None:
    with pytest.raises(InternalError):
        solve.select_greedy([solve.Problem(np.eye(3), np.ones((3, 2)), np.array(blocks))], keep, ridge)


def test_tied_problems_need_the_same_blocks() -> None:
    problems = [solve.Problem(np.eye(3), np.ones((3, 2)), np.array(b)) for b in ([0, 1, 2], [0, 1, 1])]
    with pytest.raises(InternalError, match="blocks"):
        solve.select_greedy(problems, 1, 1e-3)
    with pytest.raises(InternalError, match="0 problems"):
        solve.select_greedy([], 1, 1e-3)


@pytest.mark.parametrize("width", [8, 10_000])
def test_half_of_the_threads_solve(width: int) -> None:
    """The libraries of numpy and scipy would wait for each other's cores with all of them."""

    def threads() -> list[int]:
        return [pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]

    before = threads()
    with half_the_threads(width):
        inside = threads()
    assert threads() == before
    if width == 8 or max(before) > 2:
        assert set(inside) == {max(max(before) // 2, 1)}
