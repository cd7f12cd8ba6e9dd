"""The scale and the shift of each channel that bring one array nearest to another, by least squares from moments.

With u and y [rows, n], channel by channel,  y ~ alpha u + beta:

    scale and shift     alpha = cov(u, y) / var(u)      beta = E[y] - alpha E[u]
    scale alone         alpha = E[u y] / E[u^2]         beta = 0
    shift alone         alpha = 1                       beta = E[y - u]

A channel of u that does not vary (is zero, for a scale alone) keeps its scale.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
SMALL = 1e-12
"""Of the power of a channel, its variance below which it does not vary."""


class ChannelMoments:
    """Sums over rows of u, y, u^2, u y and y^2, in float64.

    Args:
        width: the number of channels.
    """

    def __init__(self, width: int) -> None:
        self.rows = 0
        self.u, self.y, self.uu, self.uy, self.yy = (np.zeros(width) for _ in range(5))

    def add(self, u: NDArray[Any], y: NDArray[Any]) -> None:
        """Adds rows [n, width] of both."""
        u, y = u.astype(np.float64), y.astype(np.float64)
        self.rows += len(u)
        self.u += u.sum(axis=0)
        self.y += y.sum(axis=0)
        self.uu += np.square(u).sum(axis=0)
        self.uy += (u * y).sum(axis=0)
        self.yy += np.square(y).sum(axis=0)

    def fit(self, scale: bool, shift: bool) -> tuple[Vector, Vector]:
        """Returns alpha and beta, [width] each; without a scale alpha is 1, without a shift beta is 0."""
        rows = max(self.rows, 1)
        mean_u, mean_y = (self.u / rows, self.y / rows) if shift else (np.zeros_like(self.u),) * 2
        alpha = np.ones_like(self.u)
        if scale:
            spread, common = self.uu / rows - mean_u**2, self.uy / rows - mean_u * mean_y
            varies = spread > SMALL * (self.uu / rows)
            alpha[varies] = common[varies] / spread[varies]
        return alpha, mean_y - alpha * mean_u

    def error(self, alpha: Vector | float = 1.0, beta: Vector | float = 0.0) -> float:
        """Returns sum |y - alpha u - beta|^2 over all rows and channels."""
        a, b = np.broadcast_to(alpha, self.u.shape), np.broadcast_to(beta, self.u.shape)
        linear = -2 * a * self.uy - 2 * b * self.y + 2 * a * b * self.u
        return float((self.yy + a**2 * self.uu + self.rows * b**2 + linear).sum())
