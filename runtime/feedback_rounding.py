"""Rounding to a grid with error feedback: what one row of a weight loses, the rows behind it make up for.

For y = x W with second moments S = E[x^T x] (n x n) the error of a rounded weight is tr(D^T S D), D = W - W^. Rows are
rounded one after the other, those first that weigh most. The best that the rows left can do about the error e of row i is

    W_j <- W_j - U_ij / U_ii e,  j > i,        S^-1 = U^T U,  U upper triangular

which is what OBS gives for one row (GPTQ, arXiv 2210.17323, where rows are columns). U comes from the Cholesky factor of S
with its rows reversed, so that S is not inverted: with P the reversal, P S P = L L^T, and U^-1 = P L P. The grid, a scale
and a zero for each number, stays as it is: only which of its points are taken changes.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cholesky, solve_triangular

Array = NDArray[np.float64]
RIDGE = 0.01
"""Relative to the mean of the diagonal, as GPTQ has it."""
TOGETHER = 128
"""Rows whose errors are handed on to the rest at once."""


def rounded_with_feedback(
    weight: Array, scale: Array, zero: Array, ends: tuple[int, int], moments: Array, ridge: float = RIDGE
) -> NDArray[np.int64]:
    """Returns whole numbers q [n, m]; (q - zero) scale is the weight.

    Args:
        weight: [n, m].
        scale: of each number, [n, m], or what broadcasts to that; numbers of scale zero become their zero.
        zero: likewise.
        ends: the least and the largest whole number.
        moments: S, [n, n].
        ridge: what is added to its diagonal, relative to the mean of that.

    Raises:
        LinAlgError: the moments are not those of numbers.
    """
    n = len(weight)
    level = float(np.mean(np.diag(moments))) or 1.0
    order = np.argsort(-np.diag(moments), kind="stable")
    damped = moments[np.ix_(order, order)] + ridge * level * np.eye(n)
    reversed_factor = cholesky(damped[::-1, ::-1], lower=True)
    upper = solve_triangular(reversed_factor[::-1, ::-1], np.eye(n), lower=False)
    left = weight[order].astype(np.float64)
    scales, zeros = (np.broadcast_to(np.asarray(a, np.float64), weight.shape)[order] for a in (scale, zero))
    steps = np.where(scales == 0.0, 1.0, scales)
    result = np.empty(weight.shape, np.int64)
    for start in range(0, n, TOGETHER):
        stop = min(start + TOGETHER, n)
        errors = np.empty((stop - start, weight.shape[1]))
        for i in range(start, stop):
            q = np.clip(np.rint(left[i] / steps[i] + zeros[i]), *ends)
            q = np.where(scales[i] == 0.0, zeros[i], q)
            error = (left[i] - (q - zeros[i]) * scales[i]) / upper[i, i]
            left[i + 1 : stop] -= np.outer(upper[i, i + 1 : stop], error)
            errors[i - start], result[order[i]] = error, q
        left[stop:] -= upper[start:stop, stop:].T @ errors
    return result


def lost(difference: Array, moments: Array) -> float:
    """Returns tr(D^T S D) of a difference D [n, m]."""
    return float(np.sum(difference * (moments @ difference)))
