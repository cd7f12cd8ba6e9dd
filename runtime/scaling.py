"""Mask tuning: one scale for each kept block instead of new weights.

With a scale d_j + 1 for block j, y is approximated by sum_j (1 + d_j) x_j W_j over the kept blocks. For uncentred second
moments E = E[x^T x] and G = W W^T the least squares problem has one unknown a block:

    A_jk = sum of (E * G) over the channels of j and k, both kept       b_j = the same over j and all channels
    d = argmin E|y - sum_j (1 + d_j) x_j W_j|^2 + lam |d|^2 = (A + lam I)^-1 (b - A 1)

Kwon et al. 2022 (arXiv 2204.09656) tune the masks of BERT's heads and filters so, with the damping 1, from
the pruned layer's input to the dense layer's output. We differ: the target is the layer's own output on the input that it
sees, and the ridge is chosen on held-back rows. The bias is not touched, as there.
"""

import math
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from liar_opt.runtime.arrays import AnyArray
from liar_opt.runtime.moments import Array, Statistics
from liar_opt.runtime.solve import RIDGE_GRID


@dataclass(frozen=True)
class Scaling:
    """A factor for each kept channel [u], and the relative ridge that was used; inf where all factors are one."""

    factors: Array
    ridge: float


@dataclass(frozen=True)
class _System:
    matrix: Array
    """A, [j, j]."""
    right: Array
    """b - A 1, [j]."""

    def fit(self, ridge: float) -> Array:
        size = self.matrix.shape[0]
        lam = ridge * (float(np.trace(self.matrix)) / size or 1.0)
        return np.asarray(scipy.linalg.solve(self.matrix + lam * np.eye(size), self.right, assume_a="sym"))

    def change(self, d: Array) -> float:
        """What d adds to the error."""
        return float(d @ self.matrix @ d - 2.0 * self.right @ d)


def scale_blocks(
    statistics: Statistics,
    folds: tuple[Statistics, Statistics] | None,
    weight: AnyArray,
    owners: NDArray[np.int64],
    kept: NDArray[np.int64],
    ridge: float | None,
) -> Scaling:
    """Returns the scales of the kept channels; those of one block are the same.

    Args:
        statistics: moments of all rows, width n.
        folds: training and held-back moments, or None to take the largest ridge of the grid below 1.
        weight: W, [n, m].
        owners: block of each channel, [n].
        kept: kept channels, [u].
        ridge: relative ridge; None chooses it on the held-back rows. With either there is no scaling where it is worse
            there.
    """
    gram = weight.astype(np.float64) @ weight.T.astype(np.float64)
    blocks, index = np.unique(owners[kept], return_inverse=True)
    ones = np.zeros((blocks.size, owners.size))
    ones[index, kept] = 1.0

    def system(moments: Statistics) -> _System:
        product = ones @ (moments.uncentred * gram)
        matrix = product @ ones.T
        return _System((matrix + matrix.T) / 2.0, product.sum(axis=1) - matrix.sum(axis=1))

    if folds is not None:
        training, held = system(folds[0]), system(folds[1])
        grid = RIDGE_GRID if ridge is None else [ridge]
        errors = [held.change(training.fit(tried)) for tried in grid]
        best = int(np.argmin(errors))
        ridge = grid[best] if errors[best] < 0.0 else math.inf
    used = 1e-1 if ridge is None else ridge
    if math.isinf(used):
        return Scaling(np.ones(kept.size), math.inf)
    return Scaling(1.0 + system(statistics).fit(used)[index], used)
