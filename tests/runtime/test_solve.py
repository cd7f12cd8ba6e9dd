"""Repair, errors and selection against plain least squares on the rows themselves."""

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import threadpoolctl
from numpy.typing import NDArray

from liar_opt.runtime import solve
from liar_opt.runtime.errors import InternalError
from liar_opt.runtime.moments import CrossStatistics, Moments, Statistics
from liar_opt.runtime.solve import half_the_threads

N, M = 11, 5
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


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


def mean_square(error: Floats) -> float:
    return float((error**2).sum() / error.shape[0])


# Repair


@pytest.mark.parametrize("seed", range(6))
def test_repair_is_the_least_squares_fit(seed: int) -> None:
    x, w = rows_of(seed, 97), weight_of(seed)
    kept, removed = split(seed, 1 + seed)
    s = statistics_of(x)
    repair = solve.repair_map(s.covariance, s.mean, kept, removed, 0.0)
    design = np.concatenate([x[:, kept], np.ones((97, 1))], axis=1)
    expected = np.linalg.lstsq(design, x[:, removed], rcond=None)[0]
    np.testing.assert_allclose(repair.Q, expected[:-1], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(repair.p, expected[-1], rtol=1e-6, atol=1e-8)
    assert (repair.ridge_used, repair.raised) == (0.0, False)
    w_new, b_add = solve.fold(w, kept, removed, repair)
    best = np.linalg.lstsq(design, x @ w, rcond=None)[0]
    np.testing.assert_allclose(w_new, best[:-1], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(b_add, best[-1], rtol=1e-6, atol=1e-8)


def test_the_residual_of_what_goes_is_the_same_beside_what_stays() -> None:
    """Of channels that others explain, only the rest of the covariance decides which of them go."""
    x = rows_of(3, 60)
    statistics, weight = statistics_of(x), weight_of(4)
    inside, kept = np.asarray([0, 2, 3, 5]), np.asarray([0, 3])
    beside = np.setdiff1d(np.arange(N), inside)
    rest = solve.unexplained(statistics.covariance, inside, beside, 1e-12)
    removed = np.setdiff1d(np.arange(inside.size), kept)
    alone = solve.residual_error(rest, weight[inside], kept, removed, 1e-12)
    left = np.sort(np.concatenate([beside, inside[kept]]))
    together = solve.residual_error(statistics.covariance, weight, left, inside[removed], 1e-12)
    assert alone == pytest.approx(together, rel=1e-6)
    assert alone < 0.9 * solve.residual_error(
        statistics.covariance[np.ix_(inside, inside)], weight[inside], kept, removed, 1e-12
    )
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
    w_new, b_add = solve.fold(w, kept, removed, solve.repair_map(s.covariance, s.mean, kept, removed, ridge))
    measured = mean_square(x @ w - x[:, kept] @ w_new - b_add)
    predicted = solve.residual_error(s.covariance, w, kept, removed, ridge)
    assert predicted == pytest.approx(measured, rel=1e-8)
    w_new[0, 0] += 0.01  # the oracle can fail
    assert mean_square(x @ w - x[:, kept] @ w_new - b_add) != pytest.approx(predicted, rel=1e-6)
    masked = mean_square(x[:, removed] @ w[removed])
    assert solve.masked_error(s.uncentred, w, removed) == pytest.approx(masked)
    centred = mean_square((x - x.mean(0))[:, removed] @ w[removed])
    assert solve.bias_only_error(s.covariance, w, removed) == pytest.approx(centred)
    assert predicted <= centred * (1 + 1e-12) <= masked * (1 + 1e-9)


def test_permuting_the_channels_permutes_the_map() -> None:
    s = statistics_of(rows_of(2, 61))
    kept, removed = split(2, 4)
    order = np.random.default_rng(9).permutation(N)
    place = np.argsort(order)
    plain = solve.repair_map(s.covariance, s.mean, kept, removed, 1e-2)
    moved = solve.repair_map(s.covariance[np.ix_(order, order)], s.mean[order], place[kept], place[removed], 1e-2)
    np.testing.assert_allclose(moved.Q, plain.Q, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(moved.p, plain.p, rtol=1e-9, atol=1e-12)


def test_a_copied_channel_is_repaired_exactly() -> None:
    x = rows_of(5, 71)
    x[:, 3] = 2.0 * x[:, 8] - x[:, 1] + 0.25
    w = weight_of(5)
    s = statistics_of(x)
    removed = np.array([3])
    kept = np.delete(np.arange(N), 3)
    repair = solve.repair_map(s.covariance, s.mean, kept, removed, 0.0)
    w_new, b_add = solve.fold(w, kept, removed, repair)
    np.testing.assert_allclose(x[:, kept] @ w_new + b_add, x @ w, atol=1e-8)
    assert solve.residual_error(s.covariance, w, kept, removed, 0.0) < 1e-8


def test_dead_channels_cost_nothing_and_break_nothing() -> None:
    x = rows_of(6, 53)
    x[:, [2, 7]] = [0.0, 1.5]
    w = weight_of(6)
    s = statistics_of(x)
    removed = np.array([2, 7])
    kept = np.delete(np.arange(N), removed)
    assert solve.residual_error(s.covariance, w, kept, removed, 1e-4) == pytest.approx(0.0, abs=1e-10)
    repair = solve.repair_map(s.covariance, s.mean, removed, kept, 0.0)  # kept channels all dead: S_UU = 0
    assert repair.raised and np.isfinite(repair.Q).all()
    np.testing.assert_allclose(repair.p, s.mean[kept] - s.mean[removed] @ repair.Q)
    selection = solve.select_greedy([solve.Problem(s.covariance, [w], np.arange(N))], N - 2, 1e-4)
    assert set(selection.removed_blocks.tolist()) == {2, 7}


def test_a_singular_covariance_raises_the_ridge() -> None:
    s = statistics_of(rows_of(7, 4))  # rank 3
    kept, removed = split(7, 4)
    repair = solve.repair_map(s.covariance, s.mean, kept, removed, 0.0)
    assert repair.raised and 0.0 < repair.ridge_used < 1e-3
    assert np.isfinite(repair.Q).all() and np.abs(repair.Q).max() < 1e3
    assert not solve.repair_map(s.covariance, s.mean, kept, removed, 1e-2).raised


def test_everything_or_nothing_removed() -> None:
    s, w = statistics_of(rows_of(8, 31)), weight_of(8)
    nothing, everything = np.arange(0), np.arange(N)
    repair = solve.repair_map(s.covariance, s.mean, nothing, everything, 1e-3)
    w_new, b_add = solve.fold(w, nothing, everything, repair)
    assert w_new.shape == (0, M)
    np.testing.assert_allclose(b_add, s.mean @ w)
    kept_all = solve.repair_map(s.covariance, s.mean, everything, nothing, 1e-3)
    np.testing.assert_array_equal(solve.fold(w, everything, nothing, kept_all)[0], w)
    assert solve.residual_error(s.covariance, w, everything, nothing, 1e-3) == 0.0


@pytest.mark.parametrize(
    ("kept", "removed", "ridge"), [([0, 1], [1, 2], 0.0), ([0], [2], 0.0), ([0, 1], [2], -1.0), ([0, 1], [2], np.nan)]
)
def test_sets_that_do_not_share_out_the_width_are_refused(kept: list[int], removed: list[int], ridge: float) -> None:
    with pytest.raises(InternalError):
        solve.repair_map(np.eye(3), np.zeros(3), np.array(kept), np.array(removed), ridge)


def test_shapes_that_do_not_fit_are_refused() -> None:
    kept, removed = np.array([0, 2]), np.array([1])
    with pytest.raises(InternalError, match="mean is"):
        solve.repair_map(np.eye(3), np.zeros(4), kept, removed, 0.0)
    with pytest.raises(InternalError, match="repair map is"):
        solve.fold(np.ones((3, 2)), kept, removed, solve.no_repair_map(removed, kept))
    with pytest.raises(InternalError, match="weights"):
        solve.select_greedy([solve.Problem(np.eye(3), [np.ones((4, 2))], np.arange(3))], 1, 1e-3)


# Ridge


@pytest.mark.parametrize("columns", [M, 40])
@pytest.mark.parametrize("rows", [6, 25, 550])
def test_the_ridge_is_the_best_of_the_grid_on_held_back_rows(rows: int, columns: int) -> None:
    x, held = rows_of(1, rows), rows_of(2, 37)
    w = [weight_of(1, columns=columns), weight_of(2, columns=3)]
    kept, removed = split(3, 5)
    s = statistics_of(x)
    choice = solve.choose_ridge(s, statistics_of(held), w, kept, removed)

    def held_error(repair: solve.RepairMap) -> float:
        folded = [(wi, *solve.fold(wi, kept, removed, repair)) for wi in w]
        return sum(mean_square(held @ wi - held[:, kept] @ new - add) for wi, new, add in folded)

    of_grid = {r: held_error(solve.repair_map(s.covariance, s.mean, kept, removed, r)) for r in solve.RIDGE_GRID}
    bias = held_error(solve.repair_map(s.covariance, s.mean, kept, removed, np.inf))
    none = held_error(solve.no_repair_map(kept, removed))
    assert choice.bias_error == pytest.approx(bias) and choice.masked_error == pytest.approx(none)
    chosen = solve.map_of_choice(choice, s.covariance, s.mean, kept, removed)
    assert choice.error == pytest.approx(held_error(chosen), rel=1e-7)
    assert choice.error <= min(bias, none) * (1 + 1e-9)
    assert choice.error == pytest.approx(min([*of_grid.values(), bias, none]), rel=1e-6)


def test_more_rows_choose_a_smaller_ridge() -> None:
    held = statistics_of(rows_of(2, 400))
    kept, removed = split(3, 5)
    few, many = (
        solve.choose_ridge(statistics_of(rows_of(1, rows)), held, [weight_of(1)], kept, removed).ridge for rows in (8, 5000)
    )
    assert many < few


def test_a_repair_that_does_harm_is_not_chosen() -> None:
    kept, removed = np.array([0, 1]), np.array([2])
    covariance = np.array([[1.0, 0.0, 0.9], [0.0, 1.0, 0.0], [0.9, 0.0, 1.0]])
    opposite = covariance.copy()
    opposite[0, 2] = opposite[2, 0] = -0.9
    training = Statistics(100, np.zeros(3), covariance)
    held = Statistics(10, np.zeros(3), opposite)
    choice = solve.choose_ridge(training, held, [np.ones((3, 2))], kept, removed)
    assert (choice.kind, choice.ridge) == ("bias", np.inf)
    shifted = replace(training, mean=np.array([0.0, 0.0, 5.0]))
    choice = solve.choose_ridge(shifted, held, [np.ones((3, 2))], kept, removed)
    assert choice.kind == "none" and choice.error == choice.masked_error
    repair = solve.map_of_choice(choice, covariance, shifted.mean, kept, removed)
    assert not repair.Q.any() and not repair.p.any()


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
    local, _ = solve.fold(w, kept, removed, solve.repair_map(pruned.covariance, pruned.mean, kept, removed, 1e-3))
    fit = solve.fit_dense_target(pruned, cross, kept, local, ridge)
    centred = noisy[:, kept] - noisy[:, kept].mean(0)
    lam = ridge * (centred**2).mean(axis=0).mean()
    design = np.concatenate([centred, np.sqrt(301 * lam) * np.eye(kept.size)])
    target = np.concatenate([y - y.mean(0), np.sqrt(301 * lam) * local])
    expected = np.linalg.lstsq(design, target, rcond=None)[0]
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


def channels(blocks: Ints, ids: Ints) -> tuple[Ints, Ints]:
    inside = np.isin(blocks, ids)
    return np.flatnonzero(inside), np.flatnonzero(~inside)


def total_error(problems: list[solve.Problem], gone: Ints, ridge: float) -> float:
    total = 0.0
    for problem in problems:
        removed, kept = channels(np.asarray(problem.blocks), gone)
        lam = ridge * float(np.mean(np.diagonal(problem.covariance)))
        stacked = np.concatenate(problem.weights, axis=1)
        total += problem.scale * solve.penalised_error(problem.covariance, stacked, kept, removed, lam)
    return total


def greedy_by_force(problems: list[solve.Problem], keep: int, ridge: float) -> list[int]:
    left = set(range(int(problems[0].blocks.max()) + 1))
    gone: list[int] = []
    while len(left) > keep:
        best = min(left, key=lambda b: total_error(problems, np.array([*gone, b]), ridge))
        left.remove(best)
        gone.append(best)
    return gone


def problem_of(seed: int, blocks: list[int], scale: float = 1.0, columns: tuple[int, ...] = (5, 3)) -> solve.Problem:
    width = len(blocks)
    covariance = statistics_of(rows_of(seed, 6 * width, width)).covariance
    weights = [weight_of(seed + i, width, m) for i, m in enumerate(columns)]
    return solve.Problem(covariance, weights, np.array(blocks), scale)


BLOCKS = {
    "single": [list(range(13))],
    "pairs, mixed up": [[3, 0, 1, 2, 0, 3, 4, 1, 2, 4]],
    "uneven": [[0, 1, 1, 1, 2, 3, 3, 4, 4, 4, 4]],
    "two problems": [[0, 1, 2, 3, 4], [1, 1, 0, 0, 2, 2, 3, 3, 4, 4, 4]],
}


@pytest.mark.parametrize("layout", BLOCKS)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("compact", [0.0, 1.0])
@pytest.mark.parametrize("columns", [(5, 3), (9, 21)])
def test_greedy_removes_what_costs_least_after_repair(
    layout: str, seed: int, compact: float, columns: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solve, "_COMPACT_BELOW", compact)
    problems = [problem_of(seed + 7 * i, blocks, 1.0 + 2.5 * i, columns) for i, blocks in enumerate(BLOCKS[layout])]
    number = int(problems[0].blocks.max()) + 1
    selection = solve.select_greedy(problems, 2, 1e-3)
    assert selection.removed_blocks.tolist() == greedy_by_force(problems, 2, 1e-3)
    assert sorted([*selection.kept_blocks, *selection.removed_blocks]) == list(range(number))
    assert selection.kept_blocks.tolist() == sorted(selection.kept_blocks)
    for step, error in enumerate(selection.errors):
        assert error == pytest.approx(total_error(problems, selection.removed_blocks[: step + 1], 1e-3), rel=1e-8)


def test_the_error_is_nearly_the_residual_at_a_small_ridge() -> None:
    problem = problem_of(1, list(range(13)))
    selection = solve.select_greedy([problem], 5, 1e-9)
    removed = np.sort(selection.removed_blocks)
    weight = np.concatenate(problem.weights, axis=1)
    exact = solve.residual_error(problem.covariance, weight, selection.kept_blocks, removed, 0.0)
    assert selection.errors[-1] == pytest.approx(exact, rel=1e-5)
    weight[removed[0], 0] += 1.0  # the oracle can fail
    exact = solve.residual_error(problem.covariance, weight, selection.kept_blocks, removed, 0.0)
    assert selection.errors[-1] != pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("rows", [150, 900])
def test_long_removals_stay_exact(rows: int) -> None:
    width = 301
    covariance = statistics_of(rows_of(3, rows, width)).covariance
    problem = solve.Problem(covariance, [weight_of(3, width, 17)], np.arange(width))
    selection = solve.select_greedy([problem], 90, 1e-4)
    assert selection.errors[-1] == pytest.approx(total_error([problem], selection.removed_blocks, 1e-4), rel=1e-6)
    assert (np.diff(selection.errors) >= 0).all()


def test_greedy_beats_the_scores() -> None:
    width, ridge = 64, 1e-4
    x = rows_of(4, 2000, width)
    s, w = statistics_of(x), weight_of(4, width, 9)
    blocks = np.arange(width)
    scored = (
        solve.score_magnitude([w], blocks),
        solve.score_activation_weighted(s.mean_square, [w], blocks),
    )
    greedy = solve.select_greedy([solve.Problem(s.covariance, [w], blocks)], 32, ridge).kept_blocks
    error = solve.residual_error(s.covariance, w, *channels(blocks, greedy), ridge)
    for score in scored:
        kept = np.sort(np.argsort(score)[32:])
        assert error < solve.residual_error(s.covariance, w, *channels(blocks, kept), ridge)


def test_a_fast_removal_is_fast() -> None:
    width = 768
    covariance = statistics_of(rows_of(5, 1000, width)).covariance
    start = time.process_time()
    solve.select_greedy([solve.Problem(covariance, [weight_of(5, width, 384)], np.arange(width))], 384, 1e-3)
    assert time.process_time() - start < 10.0  # 0.1 s by itself; plain down-dating takes minutes


@pytest.mark.parametrize(
    ("blocks", "keep", "ridge"),
    [([0, 2, 2], 1, 1e-3), ([0, -1, 1], 1, 1e-3), ([0, 1], 1, 1e-3), ([0, 1, 2], 4, 1e-3), ([0, 1, 2], 1, 0.0)],
)
def test_selections_that_make_no_sense_are_refused(blocks: list[int], keep: int, ridge: float) -> None:
    with pytest.raises(InternalError):
        solve.select_greedy([solve.Problem(np.eye(3), [np.ones((3, 2))], np.array(blocks))], keep, ridge)


def test_tied_problems_need_the_same_blocks() -> None:
    problems = [solve.Problem(np.eye(3), [np.ones((3, 2))], np.array(b)) for b in ([0, 1, 2], [0, 1, 1])]
    with pytest.raises(InternalError, match="blocks"):
        solve.select_greedy(problems, 1, 1e-3)
    with pytest.raises(InternalError, match="0 problems"):
        solve.select_greedy([], 1, 1e-3)


def test_scores_are_norms_per_block() -> None:
    w = [np.array([[3.0, 0.0], [4.0, 0.0], [0.0, 1.0]]), np.array([[0.0], [0.0], [1.0]])]
    blocks = np.array([1, 1, 0])
    np.testing.assert_allclose(solve.score_magnitude(w, blocks), [np.sqrt(2.0), 5.0])
    weighted: NDArray[Any] = solve.score_activation_weighted(np.array([1.0, 4.0, 9.0]), w, blocks)
    np.testing.assert_allclose(weighted, [np.sqrt(18.0), np.sqrt(9.0 + 64.0)])


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
