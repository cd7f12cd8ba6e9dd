"""Local search from a selection: swap a kept block for a removed one while the exact residual falls.

With U kept, M removed and the ridge of the selection, the residual after repair is (module docstring of
`liar_opt.runtime.solve`, penalised form)

    f(U) = tr(W^T S W) + lam |W|^2 - tr(C_U^T (S_UU + lam I)^-1 C_U)      C = (S + lam I) W

Putting block A back takes tr(R_A^T D_A^-1 R_A) off it, where D_A is the Schur complement of A and R_A what of C_A the
kept blocks do not explain; taking block B out then adds tr(V_B^T P_BB^-1 V_B), with P = (S_UU + lam I)^-1 and V the
repaired weights, both after A came back. OSSCAR (arXiv 2403.12983) searches so from its greedy solution, with a number
of blocks at a time; here it is one, and the search is bounded by the number of swaps tried.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from liar_opt.runtime.arrays import AnyArray, arrays_of
from liar_opt.runtime.errors import InternalError
from liar_opt.runtime.moments import Array
from liar_opt.runtime.solve import Problem, cheapest

TRIALS = 24
"""Removed blocks that are tried at the most, the most promising first."""
TIE = 1e-9
"""By how much gains and costs differ, relative, that count as the same."""


class _Searched:
    """One problem: S + lam I, C = (S + lam I) W, and which channels each block has."""

    def __init__(self, problem: Problem, ridge: float) -> None:
        self.arrays = a = arrays_of(problem.covariance)
        self.matrix: AnyArray = a.xp.asarray(a.real(problem.covariance), copy=True)
        diagonal = a.diagonal(self.matrix)
        diagonal += ridge * (float(diagonal.mean()) or 1.0)
        weight = a.real(problem.weight) * math.sqrt(problem.scale)
        if weight.shape[1] > weight.shape[0]:
            weight = a.narrowed(weight)  # the same W W^T with n columns
        self.target: AnyArray = self.matrix @ weight
        self.owners = problem.blocks

    def solve(self, kept: NDArray[np.bool_]) -> None:
        """Prepares P and V for a set of kept blocks."""
        a = self.arrays
        self.channels = np.flatnonzero(kept[self.owners])
        self.inverse = a.xp.linalg.inv(a.part(self.matrix, self.channels, self.channels))
        self.fitted = self.inverse @ a.take(self.target, self.channels)

    def gains(self, blocks: NDArray[np.int64]) -> Array:
        """What putting each block back takes off the residual."""
        a, result = self.arrays, np.empty(blocks.size)
        for i, block in enumerate(blocks):
            own = np.flatnonzero(self.owners == block)
            cross = a.part(self.matrix, own, self.channels)
            schur = a.part(self.matrix, own, own) - cross @ self.inverse @ cross.T
            left = a.take(self.target, own) - cross @ self.fitted
            result[i] = a.inner(left, a.xp.linalg.solve(schur, left))
        return result

    def costs(self, blocks: NDArray[np.int64]) -> Array:
        """What taking each kept block out adds to the residual."""
        a = self.arrays
        place = np.full(self.owners.size, -1)
        place[self.channels] = np.arange(self.channels.size)
        result = np.empty(blocks.size)
        for i, block in enumerate(blocks):
            own = place[np.flatnonzero(self.owners == block)]
            weight = a.take(self.fitted, own)
            result[i] = a.inner(weight, a.xp.linalg.solve(a.part(self.inverse, own, own), weight))
        return result


def swap_blocks(
    problems: Sequence[Problem], kept_blocks: NDArray[np.int64], ridge: float, trials: int = TRIALS
) -> NDArray[np.int64]:
    """Swaps single blocks while that lowers the residual summed over the problems; returns the kept ones, ascending.

    Args:
        problems: dimensions tied together, as for ``solve.select_greedy``.
        kept_blocks: where the search starts.
        ridge: relative ridge > 0.
        trials: removed blocks that are tried at the most.

    Raises:
        InternalError: no problem, or a ridge that is not positive.
    """
    if not problems or not ridge > 0.0:
        raise InternalError(f"local search among {len(problems)} problems with ridge {ridge}")
    searched = [_Searched(p, ridge) for p in problems]
    kept = np.zeros(int(problems[0].blocks.max()) + 1, dtype=bool)
    kept[kept_blocks] = True

    def solve() -> None:
        for one in searched:
            one.solve(kept)

    solve()
    tried = 0
    while tried < trials and not kept.all():
        outside = np.flatnonzero(~kept)
        gains = sum((one.gains(outside) for one in searched), np.zeros(outside.size))
        improved = False
        for choice in cheapest(-gains, min(outside.size, trials - tried), TIE):
            tried += 1
            kept[outside[choice]] = True
            solve()
            inside = np.flatnonzero(kept)
            costs = sum((one.costs(inside) for one in searched), np.zeros(inside.size))
            (least,) = cheapest(costs, 1, TIE)
            if inside[least] != outside[choice] and costs[least] < gains[choice] * (1.0 - 1e-9):
                kept[inside[least]] = False
                solve()
                improved = True
                break
            kept[outside[choice]] = False
        if not improved:
            break
    return np.flatnonzero(kept).astype(np.int64)
