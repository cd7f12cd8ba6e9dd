"""The best subspace of a width that lies between two linear maps, in closed form from second moments.

Values and output, y = z W with the context rows z [.., d] of one head (covariance C; moments about zero where no bias may
change) and W [d, m]. The rank-r matrix B that minimises E|z W - z B|^2 is W R R^T with R the r leading eigenvectors of
W^T C W (Eckart-Young on C^1/2 W = L S R^T), or B = U W' with U = C^-1/2 L_r, W' = L_r^T C^1/2 W (MoDeGPT, arXiv 2408.09632,
type III; here with the moments of z itself instead of those of the layer's input). What is lost is the sum of the
eigenvalues left out. Instead of U and W' a *change of basis* T is returned, whose first r columns span U and whose others
span what is lost, with T^T C T block diagonal: keeping the first r channels of z T is this projection, and any repair on
top of it (that looks at all heads at once) starts from there. No inverse of C is needed:

    K = C^1/2 L_r      first r columns: an orthonormal basis of M K, M = W W^T      others: one of what is orthogonal to K

Where g query heads share one value head, z_1 .. z_g share T. With M_i = W_i W_i^T and C_i there is no closed form for the
sum of the losses; C = sum C_i and M = sum M_i stand for all, which is exact where the C_i are proportional to each other.

Queries and keys, logits q k^T with second moments A = E[q^T q] and B = E[k^T k]. The rank-r form that minimises
E|q k^T - q U V^T k^T|^2 over independent q and k follows from A^1/2 B^1/2 = L S R^T:

    U = B^1/2 R_r S_r^-1/2      V = A^1/2 L_r S_r^-1/2      lost: the sum of the s^2 left out

It is exact for shared keys, too: with A = sum of A_i the optimum has one U for all query heads, as the stacked
A_i^1/2 B^1/2 have the Gram matrix B^1/2 A B^1/2. Softmax does not see what is the same for all keys of a query, so B is
taken about the mean of k where a Softmax over keys follows; A is about zero, since a mean query gives logits of its own.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liar_opt.runtime.arrays import AnyArray, Arrays, arrays_of
from liar_opt.runtime.moments import Array, CrossStatistics, Statistics

TINY = 1e-12
"""Eigenvalues below this part of the largest are rounding."""


def _root(matrix: AnyArray) -> AnyArray:
    """Symmetric square root of a symmetric positive semi-definite matrix [d, d]."""
    xp = arrays_of(matrix).xp
    values, vectors = xp.linalg.eigh((matrix + matrix.T) / 2.0)
    return (vectors * xp.sqrt(xp.clip(values, 0.0, None))) @ vectors.T


def turn_values(covariance: AnyArray, gram: AnyArray, rank: int) -> AnyArray:
    """Returns the change of basis T, [d, d], whose first ``rank`` channels lose least; see the module.

    Args:
        covariance: C, [d, d]; the sum over heads that share their values.
        gram: W W^T, [d, d]; the sum likewise.
        rank: r, in [1, d].
    """
    a, width = arrays_of(covariance), covariance.shape[0]
    scale = float(a.diagonal(covariance).sum()) or 1.0
    root = _root(covariance / scale)
    values, vectors = a.xp.linalg.eigh(root @ gram @ root)
    carried, leading = a.host(values)[::-1], a.xp.flip(vectors, axis=1)[:, :rank]
    # Directions that carry nothing are as good as any other: those orthogonal to what does.
    useful = int(np.count_nonzero(carried[:rank] > TINY * max(float(carried[0]), 0.0)))
    if not useful:
        return a.eye(width)
    seen = root @ leading[:, :useful]
    lost = a.xp.linalg.qr(seen, mode="complete")[0][:, useful:]
    kept = a.xp.linalg.qr(gram @ seen, mode="reduced")[0]
    return a.xp.concat([kept, lost], axis=1)


def logit_forms(queries: AnyArray, keys: AnyArray, rank: int) -> tuple[AnyArray, AnyArray, AnyArray]:
    """Returns U [d, r], V [d, r] and the spectrum s^2 [d], descending; see the module.

    Args:
        queries: A, [d, d]; the sum over query heads that share their keys.
        keys: B, [d, d].
        rank: r, in [1, d].
    """
    xp = arrays_of(queries).xp
    first, second = _root(queries), _root(keys)
    left, values, right = xp.linalg.svd(first @ second)
    strength = values[:rank]
    # A direction without logits gets none.
    seen = strength > TINY * (float(values[0]) or 1.0)
    inverse = xp.where(seen, 1.0 / xp.sqrt(xp.clip(strength, np.finfo(float).tiny, None)), 0.0)
    return second @ right[:rank].T * inverse, first @ left[:, :rank] * inverse, values**2


@dataclass(frozen=True, eq=False)
class Basis:
    """A change of basis x' = x T within parts of an axis of width n: (positions [d], T [d, d]) of each part.

    Positions of no part stay as they are. The T are on the host; what they are applied to, and the result, anywhere.
    """

    parts: tuple[tuple[NDArray[np.int64], Array], ...]

    def rows(self, values: AnyArray) -> AnyArray:
        """Returns x T for the last axis of ``values``, [.., n]."""
        a, result = _copy(values)
        for places, matrix in self.parts:
            at = a.index(places)
            result[..., at] = result[..., at] @ a.real(matrix)
        return result

    def columns(self, matrix: AnyArray) -> AnyArray:
        """Returns T^T applied to the first axis of a moment with x, [n, m]."""
        a, result = _copy(matrix)
        for places, turn in self.parts:
            at = a.index(places)
            result[at] = a.real(turn).T @ result[at]
        return result

    def statistics(self, of: Statistics) -> Statistics:
        """Returns the moments of x T."""
        return Statistics(of.count, self.rows(of.mean), self.rows(self.columns(of.covariance)))

    def cross(self, of: CrossStatistics) -> CrossStatistics:
        """Returns the moments of x T with a target."""
        return CrossStatistics(self.columns(of.covariance), of.target_mean, of.target_variance)

    def weight(self, weight: AnyArray) -> AnyArray:
        """Returns T^-1 W, [n, m]: x T (T^-1 W) = x W."""
        a, result = _copy(weight)
        for places, matrix in self.parts:
            at = a.index(places)
            result[at] = a.xp.linalg.solve(a.real(matrix), result[at])
        return result

    def back(self, kept: NDArray[np.integer[Any]], rows: AnyArray) -> Array:
        """Returns the weight on x, [n, m], that ``rows`` [u, m] are on the channels ``kept`` [u] of x T."""
        width = 1 + max((int(p.max()) for p, _ in self.parts), default=-1)
        result = np.zeros((max(width, 1 + int(kept.max())), rows.shape[1]))
        result[kept] = rows
        for places, matrix in self.parts:
            result[places] = matrix @ result[places]
        return result


def _copy(values: AnyArray) -> tuple[Arrays, AnyArray]:
    """Returns where an array is, and a copy of it in float64."""
    a = arrays_of(values)
    return a, a.xp.asarray(a.real(values), copy=True)


def copies(owners: NDArray[np.int64], size: int) -> list[tuple[int, NDArray[np.int64]]]:
    """Returns (index set, positions [size]) of every copy of a width in an axis, set by set.

    Args:
        owners: block of each position, int64 [n]: index set * size + channel; -1 for none.
        size: channels of a set, d. A set may occur several times: query heads that share their values.
    """
    result = []
    for number in np.unique(owners[owners >= 0] // size).tolist():
        places = np.flatnonzero((owners >= 0) & (owners // size == number))
        ordered = places[np.argsort(owners[places], kind="stable")]
        result += [(int(number), copy) for copy in ordered.reshape(size, -1).T]
    return result
