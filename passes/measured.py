"""What is known of a consumer when its group is thinned: its weight, the moments of its input, and the new weights.

Scores read :class:`Measured`; a repair makes a :class:`Repaired` of it. Both are what a user's own function gets and gives.
Arrays of a :class:`Measured` are where the solver is; ``on_host`` has them as numpy's, as those functions get them.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liar_opt.runtime.arrays import HOST, AnyArray
from liar_opt.runtime.moments import CrossStatistics, FoldName, Moments, Statistics
from liar_opt.runtime.solve import sketched, unexplained
from liar_opt.runtime.subspaces import Basis


@dataclass(frozen=True, eq=False)
class Repaired:
    """New weights [u, m] and what to add to the bias [m] of one consumer, on the host, with what the report says of them.

    ``explained`` is what the new weights take off the error of the bias alone, ``gap`` the share of the error that more
    calibration rows would take off, where these are known.
    """

    weight: NDArray[np.float64]
    bias: NDArray[np.float64]
    ridge: float
    kind: str
    raised: bool = False
    explained: float | None = None
    gap: float | None = None


@dataclass(frozen=True, eq=False)
class Measured:
    """One consumer of a group with its moments.

    Attributes:
        weight: W, [n, m], float64 or the model's own type, where the moments are.
        owners: block of each channel, int64 [n]; -1 for one of no block. A score is given none of these.
        moments: of its input x [.., n], all uses pooled.
        target_scale: what the node multiplies x W by.
        aware: of the same input, with the dense model's target beside it (`passes.dense_target`); None where the repair
            does not ask for it, or there is none.
        channels: the channels of the moments that this is about; None for all.
        gradients: of a loss with respect to a mask on each block of the group, [samples, blocks]; None where the score does
            not ask for them (`passes.gradient_scores`).
        centred: whether the repair may change a bias; without, moments are about zero: min E|x W - x_U W'|^2.
        basis: the basis in which ``weight``, the statistics and the channels are; that of the moments where it is None.
        beside: channels of the moments that are of no block (other parts of a concatenation) and stay; see ``owned``.
    """

    weight: AnyArray
    owners: NDArray[np.int64]
    moments: Moments
    target_scale: float = 1.0
    aware: Moments | None = None
    channels: NDArray[np.int64] | None = None
    centred: bool = True
    gradients: NDArray[np.float64] | None = None
    basis: Basis | None = None
    beside: NDArray[np.int64] | None = None

    @property
    def blocks(self) -> int:
        """Number of blocks, k."""
        return int(self.owners.max()) + 1

    @functools.cached_property
    def statistics(self) -> Statistics:
        """Mean and covariance over all rows."""
        return self._of("all")

    @functools.cached_property
    def folds(self) -> tuple[Statistics, Statistics] | None:
        """The training and the held-back rows, or None where a fold is too small to say anything."""
        if min(self.moments.rows("training"), self.moments.rows("held_back")) < 2:
            return None
        return self._of("training"), self._of("held_back")

    def _of(self, fold: FoldName) -> Statistics:
        whole = self.moments.statistics(fold)
        if not self.centred:  # moments about zero: then a mean of zero keeps every bias as it is
            whole = Statistics(whole.count, 0.0 * whole.mean, whole.uncentred)
        if self.basis is not None:
            whole = self.basis.statistics(whole)
        if self.channels is None:
            return whole
        a, channels = self.moments.arrays, self.channels
        return Statistics(whole.count, a.take(whole.mean, channels), a.part(whole.covariance, channels, channels))

    def on_host(self) -> "Measured":
        """Returns the same with arrays of numpy; itself where they are."""
        if self.moments.arrays is HOST:
            return self
        aware = None if self.aware is None else self.aware.on_host()
        return replace(self, weight=self.moments.arrays.host(self.weight), moments=self.moments.on_host(), aware=aware)

    @functools.cached_property
    def covariance(self) -> AnyArray:
        """Of the channels, [n, n]: what is left of it where those ``beside`` explain the rest."""
        if self.beside is None:
            return self.statistics.covariance
        assert self.channels is not None
        whole = self.moments.statistics()
        return unexplained(whole.covariance if self.centred else whole.uncentred, self.channels, self.beside)

    def owned(self) -> "Measured":
        """Returns what is known of the channels of blocks alone, beside those of none: what a score is about."""
        inside = self.owners >= 0
        if inside.all():
            return self
        channels = np.arange(self.owners.size) if self.channels is None else self.channels
        weight, owners = self.moments.arrays.take(self.weight, np.flatnonzero(inside)), self.owners[inside]
        return replace(self, weight=weight, owners=owners, channels=channels[inside], beside=channels[~inside], aware=None)

    def with_target(self, fold: FoldName) -> tuple[Statistics, CrossStatistics] | None:
        """Returns the moments of one fold of ``aware``, about zero where no bias may change; None where there are none."""
        if self.aware is None:
            return None
        rows, cross = self.aware.statistics(fold), self.aware.cross_statistics(fold)
        if not self.centred:  # then the fit has no bias
            square = cross.target_variance + float(cross.target_mean @ cross.target_mean)
            about = cross.covariance + rows.mean[:, None] * cross.target_mean[None, :]
            rows = Statistics(rows.count, 0.0 * rows.mean, rows.uncentred)
            cross = CrossStatistics(about, 0.0 * cross.target_mean, square)
        return (rows, cross) if self.basis is None else (self.basis.statistics(rows), self.basis.cross(cross))

    def turned(self, basis: Basis) -> "Measured":
        """Returns the same consumer in another basis."""
        return replace(self, weight=basis.weight(self.weight), basis=basis)

    def part(self, first: int, count: int) -> "Measured":
        """Returns what is known of the blocks [first, first + count) alone, numbered from 0."""
        inside = np.flatnonzero((self.owners >= first) & (self.owners < first + count))
        channels = inside if self.channels is None else self.channels[inside]
        owners, scale = self.owners[inside] - first, self.target_scale
        weight = self.moments.arrays.take(self.weight, inside)
        return Measured(weight, owners, self.moments, scale, channels=channels, centred=self.centred)

    def by_block(self, channels: NDArray[Any]) -> NDArray[np.float64]:
        """Returns the sums over each block of one number a channel, [k]."""
        return np.bincount(self.owners, weights=channels, minlength=self.blocks).astype(np.float64)

    def errors(self, kept: NDArray[np.int64], removed: NDArray[np.int64], repaired: Repaired) -> dict[str, float]:
        """Returns the mean squared errors of y = x W over all rows, relative to E|y|^2.

        "none" leaves the kept weights alone, "bias" adds the mean of what is lost, "repair" is ``repaired``. They are
        reported, not computed with: in float32, and E|y|^2 is estimated (``solve.sketched``) where W is large.
        """
        a, mean = self.moments.arrays, self.statistics.mean
        low = a.xp.float32
        weight, lost = a.cast(self.weight, low), a.cast(a.take(self.weight, removed), low)
        covariance = a.cast(self.statistics.covariance, low)
        lost_covariance = a.part(covariance, removed, removed)
        few, whole_mean = sketched(weight), mean @ a.real(self.weight)
        power = a.inner(few, covariance @ few) + a.inner(whole_mean, whole_mean) or 1.0
        bias = a.inner(lost, lost_covariance @ lost)
        lost_mean = a.take(mean, removed) @ a.real(a.take(self.weight, removed))
        none = bias + a.inner(lost_mean, lost_mean)
        if repaired.explained is None:
            new = a.real(repaired.weight)
            change = -weight
            change[a.index(kept)] += a.cast(new, low)
            off = a.take(mean, kept) @ new - whole_mean + a.real(repaired.bias)
            error = a.inner(change, covariance @ change) + a.inner(off, off)
        elif repaired.kind == "none":
            error = none
        else:
            error = bias - repaired.explained
        return {"none": none / power, "bias": bias / power, "repair": max(error, 0.0) / power}
