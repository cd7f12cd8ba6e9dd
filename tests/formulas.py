"""What the solver shall find, in plain numpy: the formulas of `runtime.solve` one by one, and least squares on the rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from liar_opt.runtime.solve import Problem

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def mean_square(error: Floats) -> float:
    """|e|^2 of a row, mean over the rows."""
    return float(np.square(error).sum() / error.shape[0])


def relative(covariance: Floats, ridge: float) -> float:
    """lam = ridge * mean(diag(S))."""
    return ridge * float(np.diagonal(covariance).mean())


def residual(covariance: Floats, weight: Floats, kept: Ints, removed: Ints) -> float:
    """tr(W_M^T (S_MM - S_MU S_UU^-1 S_UM) W_M), the error after repair without a ridge."""
    lost, cross = weight[removed], covariance[np.ix_(kept, removed)]
    schur = covariance[np.ix_(removed, removed)] - cross.T @ np.linalg.solve(covariance[np.ix_(kept, kept)], cross)
    return float(np.trace(lost.T @ schur @ lost))


def penalised(problems: Sequence[Problem], kept_blocks: Ints, ridge: float) -> float:
    """min over Z of err(Z) + lam (|Z|^2 + |W_M|^2), summed over the problems: the residual with S + lam I for S."""
    total = 0.0
    for p in problems:
        inside = np.isin(p.blocks, kept_blocks)
        covariance = p.covariance + relative(p.covariance, ridge) * np.eye(inside.size)
        total += p.scale * residual(covariance, p.weight, np.flatnonzero(inside), np.flatnonzero(~inside))
    return total


def regression(x: Floats, y: Floats, ridge: float = 0.0, centre: Floats | float = 0.0) -> tuple[Floats, Floats]:
    """(V, b) = argmin |Y - X V - b|^2 / rows + lam |V - centre|^2, by numpy's least squares."""
    moved, target = x - x.mean(axis=0), y - y.mean(axis=0)
    root = np.sqrt(len(x) * ridge * np.square(moved).mean(axis=0).mean())
    pulled = root * np.broadcast_to(centre, (x.shape[1], y.shape[1]))
    design = np.concatenate([moved, root * np.eye(x.shape[1])])
    fitted = np.linalg.lstsq(design, np.concatenate([target, pulled]), rcond=None)[0]
    return fitted, y.mean(axis=0) - x.mean(axis=0) @ fitted
