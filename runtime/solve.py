"""Least-squares repair, its error, and the selection of what to remove: everything from second moments.

A dimension of width n is consumed by y = x W + b (W: [n, m]; activations in rows). With mean mu and covariance S of x,
a removed set M and a kept set U,

    x_M ~ x_U Q + p      Q = (S_UU + lam I)^-1 S_UM  [u, r]      p = mu_M - mu_U Q  [r]
    W' = W_U + Q W_M     b' = b + p W_M              lam = ridge * mean(diag(S_UU))

(LIAR, arXiv 2407.13331, eq. 6-9; the ridge is ours). The mean squared error of y, summed over its m columns, is

    err(M) = tr(W_M^T S_MM W_M) - 2 tr(Z^T S_UM W_M) + tr(Z^T S_UU Z)      Z = Q W_M

which for lam = 0 is tr(W_M^T (S_MM - S_MU S_UU^-1 S_UM) W_M), the Schur complement.

Greedy selection is structured OBS (Hassibi and Stork 1993; ZipLM, arXiv 2302.04089; OSSCAR, arXiv 2403.12983) with
P = (S + lam I)^-1, W the weight repaired so far, and G = sum over consumers of W W^T. Removing the block B costs
tr(P_BB^-1 G_BB). With P_BB = L L^T, V = P_:B L^-T, T = L^-1 W_B:, U = W T^T - V T T^T / 2, the removal is

    P <- P - V V^T        W <- W - V T        G <- G - V U^T - U V^T, of which the diagonal blocks are kept

P stays as it was and the V are collected: rows of the true P are made when they are needed. That is a Cholesky
factorisation, row by row, whose pivots the costs choose: 2 n r (r + 2 m) operations for r of n channels, m <= n.

Moments and weights are arrays of numpy or tensors of torch (`runtime.arrays`); what is computed stays where the covariance
is. Which blocks go is decided on the host, from one number a block.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import threadpoolctl
from numpy.typing import NDArray

from liar_opt.runtime.arrays import AnyArray, Arrays, Cholesky, Indices, arrays_of
from liar_opt.runtime.errors import InternalError
from liar_opt.runtime.moments import Array, CrossStatistics, Statistics

RepairKind = Literal["repair", "bias", "none"]

RIDGE_GRID: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Relative ridges tried by `choose_ridge`, ascending."""

BESIDE_RIDGE = 1e-3
"""Relative ridge with which channels that all stay explain others."""

_SMALLEST_RIDGE = 1e-10
_COMPACT_BELOW = 0.8
_ALONE_BELOW = 4096
_SINGLE_FROM = 1024
_SKETCH = 64
_AT_ONCE = 128
_TIES = (1e-9, 1e-6)
"""By how much costs differ, relative, that count as the same: in float64, and in float32."""


@dataclass(frozen=True)
class RidgeChoice:
    """What the held-back rows say about the repair of one dimension.

    Attributes:
        kind: "repair"; "bias" where every ridge does worse than the bias alone; "none" where even that does harm.
        ridge: The relative ridge; inf unless `kind` is "repair".
        error: Held-back error of the choice; nan where it was not made by them.
        training_error: Error of the choice on the rows that it was fitted to; nan unless `kind` is "repair".
    """

    kind: RepairKind
    ridge: float
    error: float = math.nan
    training_error: float = math.nan

    @property
    def gap(self) -> float:
        """What endlessly many rows would take off the error, as a share of it; nan where nothing was fitted.

        Of a least squares fit with u unknowns on N rows the error is about s (1 - u / N) on these rows and s (1 + u / N) on
        others: the mean of the two is what is left when N grows.
        """
        if not self.error > 0.0:
            return math.nan
        return max((self.error - self.training_error) / (2.0 * self.error), 0.0)


@dataclass(frozen=True)
class Problem:
    """One dimension to be thinned, for `select_greedy`.

    Attributes:
        covariance: S, [n, n].
        weight: W of the consumer of this dimension, [n, m].
        blocks: Block id of every channel, [n], 0..k-1; a block is removed whole.
        scale: Factor on this problem's error where several problems are summed.
    """

    covariance: AnyArray
    weight: AnyArray
    blocks: Indices
    scale: float = 1.0


@dataclass(frozen=True)
class Selection:
    """Outcome of `select_greedy`.

    Attributes:
        kept_blocks: Ids of the kept blocks, ascending.
        removed_blocks: Ids of the removed blocks in the order of removal.
        errors: Error after each removal, summed over the problems; lam (|Z|^2 + |W_M|^2) is part of it.
    """

    kept_blocks: NDArray[np.int64]
    removed_blocks: NDArray[np.int64]
    errors: Array


@dataclass(frozen=True)
class DenseFit:
    """A consumer fitted to a dense target, see `fit_dense_target`.

    Attributes:
        weight: W', [u, m].
        bias: b', [m]; the whole bias of the consumer, not an addition to it.
        ridge_used: The relative ridge that was used; inf where the local solution was kept.
        raised: Whether it had to rise because S_UU did not factor.
        explained: What `repair_weight` takes off the error of the bias alone, summed over the columns.
    """

    weight: AnyArray
    bias: AnyArray
    ridge_used: float
    raised: bool
    explained: float = 0.0

    def on_host(self) -> "DenseFit":
        """Return the same as arrays of numpy."""
        a = arrays_of(self.weight)
        return replace(self, weight=a.host(self.weight), bias=a.host(self.bias))


@contextlib.contextmanager
def half_the_threads(width: int) -> Iterator[None]:
    """Keeps numpy's and scipy's BLAS to half of their threads each: solve inside.

    The two have libraries of their own as a rule, whose threads wait for work by spinning: those of the one take the cores
    that the other wants, and a product of a hundred microseconds takes a time slice of the system's, 4 ms. On 16 cores a
    selection among 3,072 channels took 4.9 s with all threads, 0.4 s with half of them and 1.0 s with one. Of two threads
    one is left up to a width of `_ALONE_BELOW`, above which both are worth their quarrel.
    """
    threads = max((pool["num_threads"] for pool in _pools().info() if pool["user_api"] == "blas"), default=1)
    if threads <= 2 and width > _ALONE_BELOW:
        yield
        return
    with _pools().limit(limits=max(threads // 2, 1), user_api="blas"):
        yield


@functools.cache
def _pools() -> threadpoolctl.ThreadpoolController:
    return threadpoolctl.ThreadpoolController()


# Repair -------------------------------------------------------------------------------------------------------------


def repair_weight(
    covariance: AnyArray, mean: AnyArray, weight: AnyArray, kept: Indices, removed: Indices, choice: RidgeChoice
) -> DenseFit:
    """Repair one consumer without Q: Z = (S_UU + lam I)^-1 (S_UM W_M) is cheaper where W has fewer columns than M.

    Args:
        covariance: S, [n, n].
        mean: mu, [n].
        weight: W, [n, m].
        kept: Kept channels, [u].
        removed: Removed channels, [r].
        choice: What to do, see `choose_ridge`.

    Returns:
        W' = W_U + Z, [u, m], and mu_M W_M - mu_U Z, [m], to be added to the bias.

    Raises:
        InternalError: Shapes or index sets do not fit.
    """
    _require_sets(covariance, kept, removed, choice.ridge)
    _require_rows(weight, covariance.shape[0])
    if mean.shape != covariance.shape[:1]:
        raise InternalError(f"mean is {mean.shape}, covariance {covariance.shape}")
    a = arrays_of(covariance)
    weight, mean = a.there(weight), a.real(mean)
    same, lost = a.real(a.take(weight, kept)), a.real(a.take(weight, removed))
    if choice.kind == "none":
        return DenseFit(same, a.zeros((weight.shape[1],)), math.inf, False)
    if choice.kind == "bias" or kept.size == 0 or math.isinf(choice.ridge):
        return DenseFit(same, a.take(mean, removed) @ lost, math.inf, False)
    factor = _factor(_part(covariance, kept, kept), choice.ridge)
    target = _part(covariance, kept, removed) @ lost
    z = factor.solve(target)
    explained = a.inner(z, target) + factor.lam * a.inner(z, z)
    bias = a.take(mean, removed) @ lost - a.take(mean, kept) @ z
    return DenseFit(same + z, bias, factor.ridge, factor.raised, explained)


def choose_ridge(
    training: Statistics,
    held_back: Statistics,
    weight: AnyArray,
    kept: Indices,
    removed: Indices,
    grid: Sequence[float] = RIDGE_GRID,
) -> RidgeChoice:
    """Choose the ridge on the held-back rows, from their moments alone.

    The map is made of the training moments and its error taken on the held-back ones, S^h and mu^h, with
    delta = mu^h - mu:  tr(W_M^T S^h_MM W_M) - 2 tr(Z^T S^h_UM W_M) + tr(Z^T S^h_UU Z) + |delta_M W_M - delta_U Z|^2.
    The error falls and then rises along the grid, so the search walks downhill from the grid's middle. Where W_M is
    large its columns are mixed by random signs into a few: the errors are estimates then, the same for every ridge.

    Args:
        training: Moments of the training rows.
        held_back: Moments of the held-back rows.
        weight: W, [n, m].
        kept: Kept channels, [u].
        removed: Removed channels, [r].
        grid: Relative ridges, ascending.

    Raises:
        InternalError: Shapes or index sets do not fit, or the grid is empty.
    """
    if not grid:
        raise InternalError("no ridge to choose from")
    _require_sets(training.covariance, kept, removed, min(grid))
    _require_rows(weight, training.width)
    a = arrays_of(training.covariance)
    lost = sketched(a.real(a.take(a.there(weight), removed)))
    shift = held_back.mean - training.mean
    # A product with the whole covariance gives both of its parts.
    spread = _spread(a, lost, removed, training.width)
    held_lost = held_back.covariance @ spread
    held_mm = a.inner(lost, a.take(held_lost, removed))
    shift_m = a.take(shift, removed) @ lost
    bias_error = held_mm + a.inner(shift_m, shift_m)
    mean_m = a.take(held_back.mean, removed) @ lost
    none_error = held_mm + a.inner(mean_m, mean_m)
    fitted: dict[float, float] = {}
    candidates: list[tuple[float, RepairKind, float]] = [(none_error, "none", math.inf), (bias_error, "bias", math.inf)]
    if kept.size and removed.size:
        matrix = _part(training.covariance, kept, kept)
        lost_training = training.covariance @ spread
        target, training_mm = a.take(lost_training, kept), a.inner(lost, a.take(lost_training, removed))
        held_target, held_matrix = a.take(held_lost, kept), _part(held_back.covariance, kept, kept)

        def error_at(ridge: float) -> float:
            factor = _factor(matrix, ridge)
            z = factor.solve(target)
            fitted[ridge] = max(training_mm - a.inner(z, target) - factor.lam * a.inner(z, z), 0.0)
            off = shift_m - a.take(shift, kept) @ z
            return held_mm - 2.0 * a.inner(z, held_target) + _form(held_matrix, z) + a.inner(off, off)

        ridge, error = _descend(error_at, grid)
        candidates.append((error, "repair", ridge))
    # Last of equals wins: the more thorough repair where the rows cannot tell.
    best = min(reversed(candidates), key=lambda candidate: candidate[0])
    own = fitted[best[2]] if best[1] == "repair" else math.nan
    return RidgeChoice(best[1], best[2], max(best[0], 0.0), own)


def unexplained(covariance: AnyArray, inside: Indices, beside: Indices, ridge: float = BESIDE_RIDGE) -> AnyArray:
    """Returns the covariance of the channels ``inside`` that those ``beside``, which all stay, leave unexplained.

    S_II - S_IB (S_BB + lam I)^-1 S_BI: the residual of what goes is the same with it as with all channels.

    Args:
        covariance: S, [n, n].
        inside: channels, [i].
        beside: channels, [b].
        ridge: relative ridge > 0.
    """
    cross = _part(covariance, beside, inside)
    result = _part(covariance, inside, inside) - cross.T @ _factor(_part(covariance, beside, beside), ridge).solve(cross)
    result = (result + result.T) / 2.0
    arrays_of(covariance).floor_diagonal(result)
    return result


# Error-aware target -------------------------------------------------------------------------------------------------


def fit_dense_target(
    pruned: Statistics, cross: CrossStatistics, kept: Indices, local_weight: AnyArray, ridge: float
) -> DenseFit:
    """Fit the consumer to the dense model's output from the inputs of the pruned one.

    W' = argmin |Y - X~_U W' - b'|^2 / rows + lam |W' - W_local|^2, that is
    (S_UU + lam I) W' = C_U + lam W_local with C = E[(x~ - mu)^T (y - E y)], b' = E y - mu_U W'.

    Args:
        pruned: Moments of the inputs x~ that the pruned model produces, width n.
        cross: Cross moments of x~ with the dense target y, [n, m].
        kept: Kept channels, [u].
        local_weight: W_local, [u, m], from `repair_weight`.
        ridge: Relative ridge >= 0; inf keeps W_local and repairs the bias.

    Raises:
        InternalError: Shapes do not fit, or the ridge is negative or NaN.
    """
    a = arrays_of(pruned.covariance)
    target, weight = a.take(cross.covariance, kept), a.real(local_weight)
    if cross.covariance.shape[0] != pruned.width or weight.shape != target.shape or not ridge >= 0.0:
        raise InternalError(
            f"width {pruned.width}, cross {cross.covariance.shape}, local {local_weight.shape}, ridge {ridge}"
        )
    used, raised = math.inf, False
    if kept.size and not math.isinf(ridge):
        factor = _factor(_part(pruned.covariance, kept, kept), ridge)
        weight = factor.solve(target + factor.lam * weight)
        used, raised = factor.ridge, factor.raised
    return DenseFit(weight, cross.target_mean - a.take(pruned.mean, kept) @ weight, used, raised)


def dense_target_error(
    pruned: Statistics, cross: CrossStatistics, kept: Indices, weight: AnyArray, bias: AnyArray
) -> float:
    """E|y - x~_U W' - b'|^2, summed over the columns; arguments as in `fit_dense_target`, `bias` is b', [m]."""
    a = arrays_of(pruned.covariance)
    weight = a.real(weight)
    off = cross.target_mean - a.take(pruned.mean, kept) @ weight - a.real(bias)
    form = _form(_part(pruned.covariance, kept, kept), weight)
    return cross.target_variance - 2.0 * a.inner(weight, a.take(cross.covariance, kept)) + form + a.inner(off, off)


def choose_dense_ridge(
    training: tuple[Statistics, CrossStatistics],
    held_back: tuple[Statistics, CrossStatistics],
    kept: Indices,
    local_weight: AnyArray,
) -> float:
    """Choose the ridge of `fit_dense_target` on the held-back rows; inf where the local solution does best.

    Raises:
        InternalError: As `fit_dense_target`.
    """

    def error_at(ridge: float) -> float:
        fit = fit_dense_target(*training, kept, local_weight, ridge)
        return dense_target_error(*held_back, kept, fit.weight, fit.bias)

    ridge, error = _descend(error_at, RIDGE_GRID)
    return ridge if error <= error_at(math.inf) else math.inf


# Selection ----------------------------------------------------------------------------------------------------------


def select_greedy(problems: Sequence[Problem], keep: int, ridge: float) -> Selection:
    """Remove, one after the other, the block whose removal costs least after repair.

    The formulas are those of the module's docstring. Several problems are thinned by the same block ids; their
    costs add up. O(n^3) in all for each problem, whatever m. Where there are many blocks a
    few (1 in `_AT_ONCE`) go at a time: their costs are taken together when they are removed, only the order within
    such a few is that of the costs before.

    Args:
        problems: Dimensions tied together, at least one, with the same block ids 0..k-1.
        keep: Number of blocks that are kept.
        ridge: Relative ridge > 0: lam = ridge * mean(diag(S)) throughout the removal.

    Raises:
        InternalError: Shapes or block ids do not fit, `keep` is not within 0..k, or the ridge is not positive.
    """
    if not problems or not 0.0 < ridge < math.inf:
        raise InternalError(f"selection among {len(problems)} problems with ridge {ridge}")
    numbers = {_block_number(problem.blocks, problem.covariance.shape[0]) for problem in problems}
    number = max(numbers)
    if len(numbers) > 1 or not 0 <= keep <= number:
        raise InternalError(f"keep {keep} of the blocks {sorted(numbers)}")
    active = np.ones(number, dtype=bool)
    order = np.empty(number - keep, dtype=np.int64)
    steps = np.zeros(number - keep)
    states = [_Downdate(problem, number, number - keep, ridge) for problem in problems]
    at_once = max(1, number // _AT_ONCE)
    tie = max(state.tie for state in states)
    for step in range(0, number - keep, at_once):
        cost = states[0].costs()
        for state in states[1:]:
            cost = cost + state.costs()
        cost = states[0].arrays.host(cost)
        cost[~active] = np.inf
        count = min(at_once, number - keep - step)
        blocks = cheapest(cost, count, tie)
        active[blocks] = False
        order[step : step + count] = blocks
        for state in states:
            state.remove(blocks)
    for state in states:
        steps += state.steps()
    return Selection(np.flatnonzero(active).astype(np.int64), order, np.cumsum(steps))


def cheapest(cost: AnyArray, count: int, tie: float) -> NDArray[np.int64]:
    """Returns the blocks of least cost, the cheapest first; of those that cost the same, by a rounding error, the first.

    So numpy and torch, whose sums have other orders, take the same of blocks that are alike.

    Args:
        cost: of each block, [k]; inf for what is not to be taken.
        count: how many; that many costs are finite.
        tie: by how much costs may differ, relative, and count as the same.
    """
    if count == 1:
        least = float(np.min(cost))
        return np.flatnonzero(cost <= least + tie * abs(least))[:1].astype(np.int64)
    bound = float(np.partition(cost, count - 1)[count - 1])
    found = np.flatnonzero(cost <= bound + tie * abs(bound))
    found = found[np.argsort(cost[found], kind="stable")]
    values = cost[found]
    apart = np.diff(values) > tie * np.abs(values[1:])
    if not apart.all():
        found = found[np.lexsort((found, np.concatenate([[0], np.cumsum(apart)])))]
    return found[:count].astype(np.int64)


class _Downdate:
    """P, W and the diagonal blocks of G of one problem while blocks leave it; the rows are sorted by block.

    P lags behind: the truth is P - V V^T with the `used` first columns of V, [n, t].
    """

    def __init__(self, problem: Problem, number: int, removals: int, ridge: float) -> None:
        self.arrays = a = arrays_of(problem.covariance)
        rows = np.argsort(problem.blocks, kind="stable")
        sizes = np.bincount(problem.blocks, minlength=number)
        self.depth = int(sizes.max())
        # Row positions of each block, [k, depth]; a short block is padded with the position of its own first row.
        starts = np.cumsum(sizes) - sizes
        inside = np.arange(self.depth)[None, :] < sizes[:, None]
        self.positions = np.where(inside, starts[:, None] + np.arange(self.depth)[None, :], starts[:, None])
        self.inside = inside
        _require_rows(problem.weight, rows.size)
        weight = a.take(a.real(problem.weight), rows) * math.sqrt(problem.scale)
        sorted_already = np.array_equal(rows, np.arange(rows.size))
        factor = _factor(problem.covariance if sorted_already else _part(problem.covariance, rows, rows), ridge)
        # Costs are only compared; float32 halves the memory traffic that wide dimensions are bound by.
        dtype: Any = a.xp.float32 if rows.size >= _SINGLE_FROM else a.xp.float64
        self.tie = _TIES[rows.size >= _SINGLE_FROM]
        self.p: AnyArray = factor.inverse(dtype)
        self.w: AnyArray = _narrow(a.cast(weight, dtype))
        self._place()
        self.within = a.index(inside)
        self.p_blocks = self._diagonal_blocks(self.p)
        at = self.w[self.at] * self.within[:, :, None]
        self.g_blocks: AnyArray = at @ a.xp.permute_dims(at, (0, 2, 1))
        padded = np.arange(self.depth)[None, :] >= sizes[:, None]
        short, place = np.nonzero(padded)
        if short.size:
            self.p_blocks[a.index(short), a.index(place), a.index(place)] = 1.0
        self.alive = np.ones(rows.size, dtype=bool)
        largest = int(np.sort(sizes)[number - removals :].sum())
        self.v: AnyArray = a.empty((rows.size, largest), dtype)
        self.eye = a.eye(self.depth, dtype)
        self.used = 0
        self.costly: list[tuple[AnyArray, Any]] = []

    def costs(self) -> AnyArray:
        """Cost of removing each block, [k]; meaningless for those already removed."""
        if self.depth == 1:
            return self.g_blocks[:, 0, 0] / self.p_blocks[:, 0, 0]
        xp = self.arrays.xp
        return xp.linalg.trace(xp.linalg.solve(self.p_blocks, self.g_blocks))

    def steps(self) -> Array:
        """Returns what each block has cost that was removed, after those before it."""
        found = [
            np.add.reduceat(self.arrays.host(costs).astype(np.float64), np.cumsum(counts) - counts)
            for costs, counts in self.costly
        ]
        return np.asarray(np.maximum(np.concatenate([np.empty(0), *found]), 0.0))

    def remove(self, blocks: Indices) -> None:
        """Remove blocks together."""
        a = self.arrays
        inside = self.inside[blocks]
        rows, counts = self.positions[blocks][inside], inside.sum(axis=1)
        there, gone = a.index(rows), a.index(blocks)
        past = self.v[:, : self.used]
        p_rows = self.p[there] - past[there] @ past.T  # [d, n]
        # Few rows against many columns: a product with the small inverse is far quicker than trsm.
        inverse = a.small_inverse(p_rows[:, there])
        v, t = inverse @ p_rows, inverse @ self.w[there]  # [d, n], [d, m]
        inner = t @ t.T
        self._update_blocks(v, t @ self.w.T - 0.5 * (inner @ v))
        self.v[:, self.used : self.used + rows.size] = v.T
        self.used += rows.size
        a.subtract_product(self.w, v, t)
        self.alive[rows] = False
        # A removed block is given the cost of nothing, so that no division by a rounding residue is made for it.
        self.p_blocks[gone] = self.eye
        self.g_blocks[gone] = 0.0
        self.costly.append((a.diagonal(inner), counts))
        if self.alive.sum() < _COMPACT_BELOW * self.alive.size:
            self._compact()

    def _update_blocks(self, v: AnyArray, u: AnyArray) -> None:
        a = self.arrays
        if self.depth == 1:
            columns = self.at[:, 0]
            v_at, u_at = v[:, columns], u[:, columns]
            self.p_blocks[:, 0, 0] -= a.column_inner(v_at, v_at)
            self.g_blocks[:, 0, 0] -= 2.0 * a.column_inner(v_at, u_at)
            return
        xp = a.xp
        v_at = xp.permute_dims(xp.where(self.within, v[:, self.at], 0.0), (1, 2, 0))  # [k, depth, d]
        u_at = xp.permute_dims(xp.where(self.within, u[:, self.at], 0.0), (1, 2, 0))
        self.p_blocks -= v_at @ xp.permute_dims(v_at, (0, 2, 1))
        half = v_at @ xp.permute_dims(u_at, (0, 2, 1))
        self.g_blocks -= half + xp.permute_dims(half, (0, 2, 1))

    def _place(self) -> None:
        """Notes the positions where the arrays are."""
        self.at = self.arrays.index(self.positions)

    def _compact(self) -> None:
        """Drop the rows that left; positions of removed blocks point to the first row then, and mean nothing."""
        a = self.arrays
        alive = np.flatnonzero(self.alive)
        renumbered = np.zeros(self.alive.size, dtype=np.int64)
        renumbered[alive] = np.arange(alive.size)
        self.positions = renumbered[self.positions]
        self._place()
        self.p, self.w = a.part(self.p, alive, alive), a.take(self.w, alive)
        v = a.empty((alive.size, self.v.shape[1]), self.v.dtype)
        v[:, : self.used] = a.take(self.v[:, : self.used], alive)
        self.v, self.alive = v, np.ones(alive.size, dtype=bool)

    def _diagonal_blocks(self, matrix: AnyArray) -> AnyArray:
        blocks = matrix[self.at[:, :, None], self.at[:, None, :]]
        both = self.within[:, :, None] & self.within[:, None, :]
        return self.arrays.xp.where(both, blocks, 0.0)


# Private helpers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Factor:
    """Cholesky factor of S + lam I and the ridge it took."""

    cholesky: Cholesky
    lam: float
    ridge: float
    raised: bool

    def solve(self, right: AnyArray) -> AnyArray:
        return self.cholesky.solve(right)

    def inverse(self, dtype: Any) -> AnyArray:
        """(S + lam I)^-1 in float64 or float32."""
        return self.cholesky.inverse(dtype)


def _factor(matrix: AnyArray, ridge: float) -> _Factor:
    """Factor S + lam I; the ridge rises tenfold until it does, and not only by a rounding residue."""
    a = arrays_of(matrix)
    diagonal = a.host(a.diagonal(matrix))
    mean, largest = float(np.mean(diagonal)), float(np.max(diagonal))
    scale = mean if mean > 0.0 else 1.0
    tried = ridge
    # mean(diag) >= largest eigenvalue / n: this many tenfold steps make any symmetric S of finite entries factor.
    for _ in range(40):
        lam = tried * scale
        cholesky = a.factor(matrix, lam, largest)
        if cholesky is not None:
            return _Factor(cholesky, lam, tried, tried > ridge)
        tried = max(10.0 * tried, _SMALLEST_RIDGE)
    raise InternalError(f"a covariance of width {matrix.shape[0]} does not factor even with ridge {tried}")


def _descend(error_at: Callable[[float], float], grid: Sequence[float]) -> tuple[float, float]:
    """Walk downhill over the grid from its middle, towards larger ridges first; return ridge and error."""
    best = len(grid) // 2
    error = error_at(grid[best])
    for direction in (1, -1):
        moved = False
        while 0 <= best + direction < len(grid):
            tried = error_at(grid[best + direction])
            if tried >= error:
                break
            best, error, moved = best + direction, tried, True
        if moved:
            break
    return grid[best], error


def sketched(lost: AnyArray) -> AnyArray:
    """Return W_M times random signs, `_SKETCH` columns: errors keep their expectation, which is enough to compare them.

    A narrow or short W_M is given back exactly, as R with R R^T = W_M W_M^T and no more columns than rows.
    """
    if min(lost.shape) > 2 * _SKETCH:
        a = arrays_of(lost)
        signs = np.random.default_rng(0).choice([-1.0, 1.0], (lost.shape[1], _SKETCH))
        return lost @ a.cast(a.there(signs), lost.dtype) / math.sqrt(_SKETCH)
    return _narrow(lost)


def _narrow(weight: AnyArray) -> AnyArray:
    """R with R R^T = W W^T and no more columns than rows."""
    if weight.shape[1] <= weight.shape[0]:
        return weight
    return arrays_of(weight).narrowed(weight)


def _part(matrix: AnyArray, rows: Indices, columns: Indices) -> AnyArray:
    a = arrays_of(matrix)
    return a.real(a.part(matrix, rows, columns))


def _form(matrix: AnyArray, columns: AnyArray) -> float:
    """tr(columns^T matrix columns)."""
    return arrays_of(matrix).inner(columns, matrix @ columns)


def _spread(a: Arrays, rows: AnyArray, places: Indices, width: int) -> AnyArray:
    """Put rows at their places among `width` rows, zeros elsewhere."""
    full = a.zeros((width, rows.shape[1]), rows.dtype)
    full[a.index(places)] = rows
    return full


def _block_number(blocks: Indices, width: int) -> int:
    """Return the number of blocks.

    Raises:
        InternalError: The ids are not of this width, or some id of 0..k-1 is missing.
    """
    if blocks.shape != (width,) or width == 0 or int(blocks.min()) < 0:
        raise InternalError(f"block ids are {blocks.shape}, the dimension has width {width}")
    number = int(blocks.max()) + 1
    if number > width or not np.bincount(blocks, minlength=number).all():
        raise InternalError(f"not every block id of 0..{number - 1} has a channel")
    return number


def _require_rows(weight: AnyArray, width: int) -> None:
    if weight.ndim != 2 or weight.shape[0] != width:
        raise InternalError(f"weight {tuple(weight.shape)} on a dimension of width {width}")


def _require_sets(covariance: AnyArray, kept: Indices, removed: Indices, ridge: float) -> None:
    width = covariance.shape[0]
    if covariance.shape != (width, width) or not ridge >= 0.0:
        raise InternalError(f"covariance is {covariance.shape}, ridge {ridge}")
    both = np.concatenate([kept, removed]).astype(np.int64)
    if both.size != width or not np.array_equal(np.sort(both), np.arange(width)):
        raise InternalError(f"{kept.size} kept and {removed.size} removed channels do not share out width {width}")
