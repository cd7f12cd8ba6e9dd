"""First and second moments of the activations of one prunable dimension, added up in float64.

For rows x of a dimension of width n (activations of real, unpadded tokens) every batch hands in

    count = number of rows        total = sum_rows x  [n]        second = X^T X  [n, n]

and this module keeps their sums, apart for two *folds* of the calibration data: ``training``, and the ``held_back``
tenth on which the ridge is chosen (`liar_opt.runtime.solve.choose_ridge`). From the sums

    mean mu = total / count       uncentred = second / count       covariance S = uncentred - mu^T mu

The covariance divides by the count, not by count - 1: errors in `liar_opt.runtime.solve` are means over these rows.

For the error-aware target (the dense output y of the consumer fitted from the pruned input x~; K-prune,
arXiv 2308.03449, does so for BERT) the cross moments X~^T Y [n, m], the column sums of Y [m] and sum Y^2 are added
beside them.

The sums are where the solver is (`runtime.arrays`): on the host, or on the device where the activations are.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from liar_opt.runtime.array_store import ArrayStore
from liar_opt.runtime.arrays import HOST, PANEL, AnyArray, Arrays, arrays_of, solver
from liar_opt.runtime.errors import InternalError, OptionError

Array = NDArray[np.float64]
FoldName = Literal["all", "training", "held_back"]


@dataclass(frozen=True)
class CrossStatistics:
    """What the error-aware target needs of a dense output y [m], as means over the rows of one fold.

    Attributes:
        covariance: E[(x~ - mu)^T (y - E y)], [n, m].
        target_mean: E[y], [m].
        target_variance: E[|y - E y|^2], summed over the m columns.
    """

    covariance: AnyArray
    target_mean: AnyArray
    target_variance: float


@dataclass(frozen=True)
class Statistics:
    """The moments of one fold, as means over its rows.

    Attributes:
        count: Number of rows, or the sum of their weights.
        mean: E[x], [n].
        covariance: E[(x - mean)^T (x - mean)], [n, n], symmetric.
    """

    count: float
    mean: AnyArray
    covariance: AnyArray

    @property
    def width(self) -> int:
        """Width n of the dimension."""
        return int(self.mean.shape[0])

    @property
    def uncentred(self) -> AnyArray:
        """E[x^T x], [n, n]."""
        return self.covariance + self.mean[:, None] * self.mean[None, :]

    @property
    def mean_square(self) -> AnyArray:
        """E[x_j^2] of every channel, [n]: the diagonal of `uncentred`."""
        return arrays_of(self.covariance).diagonal(self.covariance) + self.mean**2


class _Fold:
    """Running sums of one fold; the cross sums have their own count, so that a batch without them is seen."""

    def __init__(self, width: int, arrays: Arrays) -> None:
        self.arrays = arrays
        self.count = 0.0
        self.seen = 0
        self.total: AnyArray = arrays.zeros((width,))
        self.second: AnyArray = arrays.zeros((width, width))
        self.cross: AnyArray | None = None
        self.target_total: AnyArray | None = None
        self.target_square = 0.0
        self.cross_count = 0.0

    def include(self, other: "_Fold") -> None:
        self.count += other.count
        self.seen += other.seen
        self.total += self.arrays.there(other.total)
        self.second += self.arrays.there(other.second)
        if other.cross is None or other.target_total is None:
            return
        self.include_cross(other.cross_count, other.cross, other.target_total, other.target_square)

    def include_cross(self, count: float, cross: AnyArray, target_total: AnyArray, target_square: float) -> None:
        if self.cross is None or self.target_total is None:
            self.cross = self.arrays.zeros(cross.shape)
            self.target_total = self.arrays.zeros(target_total.shape)
        if self.cross.shape != cross.shape:
            raise InternalError(f"cross moment is {tuple(cross.shape)}, those before it are {tuple(self.cross.shape)}")
        self.cross += self.arrays.there(cross)
        self.target_total += self.arrays.there(target_total)
        self.target_square += float(target_square)
        self.cross_count += count


class Moments:
    """Running moments of one dimension of width n, in float64, in a training and a held-back fold.

    Args:
        width: Width n of the dimension.
        arrays: Where the sums are; if None where this run solves.

    Raises:
        InternalError: `width` is below one.
    """

    def __init__(self, width: int, arrays: Arrays | None = None) -> None:
        if width < 1:
            raise InternalError(f"moments of width {width}, needs at least 1")
        self.width = width
        self.arrays = solver() if arrays is None else arrays
        self._folds: Mapping[str, _Fold] = {name: _Fold(width, self.arrays) for name in ("training", "held_back")}

    @classmethod
    def white(cls, width: int) -> "Moments":
        """Return what is assumed where nothing was seen: one row of mean zero, every channel by itself."""
        result = cls(width)
        result.add(1, np.zeros(width), np.eye(width))
        return result

    def add(self, count: int, total: AnyArray, second: AnyArray, held_back: bool = False) -> None:
        """Add one batch.

        Args:
            count: Rows in the batch.
            total: Column sums, [n], any float type.
            second: X^T X, [n, n], any float type.
            held_back: Whether the batch belongs to the held-back fold.

        Raises:
            InternalError: A shape does not fit the width, or `count` is negative.
            OptionError: NaN or Inf among the sums.
        """
        if count < 0:
            raise InternalError(f"batch of {count} rows")
        total, second = self.arrays.there(total), self.arrays.there(second)
        if total.shape != (self.width,) or second.shape != (self.width, self.width):
            raise InternalError(f"moments of width {self.width} were given {tuple(total.shape)} and {tuple(second.shape)}")
        _require_finite(total, second)
        fold = self._folds[_fold_name(held_back)]
        fold.count += float(count)
        fold.seen += int(count)
        fold.total += total
        fold.second += second

    def add_block_rows(
        self,
        count: float,
        total: AnyArray,
        rows: Sequence[AnyArray],
        bounds: Sequence[int],
        held_back: bool = False,
        seen: int | None = None,
    ) -> None:
        """Add one batch whose second moment comes as the upper block rows of a column partition.

        Nearly half of the multiplications are saved: X_i^T [X_i, X_i+1, ...] is all that is needed of row i.

        Args:
            count: Rows in the batch; the sum of the weights where rows are weighted (total and rows are then as well).
            total: Column sums, [n].
            rows: X_i^T [X_i, ..., X_p-1], [bounds[i + 1] - bounds[i], n - bounds[i]], for each part i.
            bounds: 0 = bounds[0] < ... < bounds[p] = n; part i holds the columns bounds[i]:bounds[i+1].
            held_back: Whether the batch belongs to the held-back fold.
            seen: Rows in the batch where `count` is a sum of weights.

        Raises:
            InternalError: The bounds do not increase from 0 to n, or the number or a shape of the rows does not fit.
            OptionError: NaN or Inf among the sums.
        """
        if count < 0:
            raise InternalError(f"batch of {count} rows")
        steps = list(pairwise(bounds))
        if not steps or bounds[0] != 0 or bounds[-1] != self.width or any(low >= high for low, high in steps):
            raise InternalError(f"partition bounds {list(bounds)} do not increase from 0 to {self.width}")
        expected = [(high - low, self.width - low) for low, high in steps]
        total, rows = self.arrays.there(total), [self.arrays.there(row) for row in rows]
        shapes = [tuple(row.shape) for row in rows]
        if total.shape != (self.width,) or shapes != expected:
            raise InternalError(f"block rows {shapes}, totals {tuple(total.shape)}; needed {expected}")
        _require_finite(total)  # a row that is not finite shows in its column sums
        fold = self._folds[_fold_name(held_back)]
        fold.count += float(count)
        fold.seen += int(count if seen is None else seen)
        fold.total += total
        for (low, high), row in zip(steps, rows, strict=True):
            fold.second[low:high, low:] += row

    def add_cross(
        self,
        count: float,
        cross: AnyArray,
        target_total: AnyArray,
        target_square: float,
        held_back: bool = False,
    ) -> None:
        """Add the cross moments of one batch; its `add` is called apart.

        Args:
            count: Rows in the batch; the sum of the weights where rows are weighted.
            cross: X~^T Y, [n, m].
            target_total: Column sums of Y, [m].
            target_square: Sum of all entries of Y, squared.
            held_back: Whether the batch belongs to the held-back fold.

        Raises:
            InternalError: A shape does not fit the width or the batches before.
            OptionError: NaN or Inf among the sums.
        """
        cross, target_total = self.arrays.there(cross), self.arrays.there(target_total)
        if cross.ndim != 2 or cross.shape[0] != self.width or target_total.shape != cross.shape[1:]:
            raise InternalError(
                f"cross moments of width {self.width} were given {tuple(cross.shape)}, {tuple(target_total.shape)}"
            )
        _require_finite(cross, target_total, np.asarray(target_square))
        self._folds[_fold_name(held_back)].include_cross(float(count), cross, target_total, target_square)

    def merge(self, other: "Moments") -> "Moments":
        """Return the pooled moments of both, fold by fold: for one weight that is used in several places.

        Raises:
            InternalError: The widths differ.
        """
        if other.width != self.width:
            raise InternalError(f"moments of width {self.width} cannot be pooled with width {other.width}")
        pooled = Moments(self.width, self.arrays)
        for name, fold in pooled._folds.items():
            fold.include(self._folds[name])
            fold.include(other._folds[name])
        return pooled

    @property
    def crosses(self) -> dict[str, tuple[int, ...]]:
        """The shape [n, m] of the cross moments, by fold; folds without any are left out."""
        return {name: tuple(fold.cross.shape) for name, fold in self._folds.items() if fold.cross is not None}

    def add_up(self, add: Callable[[AnyArray], object], crosses: Mapping[str, tuple[int, ...]]) -> None:
        """Have every sum become that over all who hold moments of the same activation.

        Args:
            add: does it with one array, in place; it is called with arrays of the same shapes wherever it is called.
            crosses: the cross moments that anybody has, as `crosses` says it.
        """
        for name, fold in self._folds.items():
            if name in crosses and fold.cross is None:
                shape = crosses[name]
                fold.include_cross(0.0, self.arrays.zeros(shape), self.arrays.zeros(shape[1:]), 0.0)
            scalars = np.asarray([fold.count, fold.seen, fold.target_square, fold.cross_count])
            add(scalars)
            fold.count, seen, fold.target_square, fold.cross_count = map(float, scalars)
            fold.seen = round(seen)
            for array in (fold.total, fold.second, fold.cross, fold.target_total):
                if array is None:
                    continue
                held = self.arrays.host(array)
                add(held)
                if held is not array:
                    array[...] = self.arrays.there(held)

    def on_host(self) -> "Moments":
        """Return the same sums as arrays of numpy."""
        result = Moments(self.width, HOST)
        for name, fold in result._folds.items():
            fold.include(self._folds[name])
        return result

    def part(self, channels: NDArray[np.int64]) -> "Moments":
        """Return the moments of some channels, ascending, [u]: what was measured before others went."""
        result = Moments(channels.size, self.arrays)
        for name, fold in result._folds.items():
            whole = self._folds[name]
            fold.count, fold.seen, fold.cross_count = whole.count, whole.seen, whole.cross_count
            a = self.arrays
            fold.total = a.take(whole.total, channels)
            second = whole.second  # on the host, where it was stored on disk
            fold.second = a.there(arrays_of(second).part(second, channels, channels))
            fold.cross = None if whole.cross is None else a.take(whole.cross, channels)
            fold.target_total, fold.target_square = whole.target_total, whole.target_square
        return result

    def shift_target(self, by: AnyArray) -> None:
        """Take ``by``, [m], off every row of the target, whose cross moments all rows have."""
        by = self.arrays.real(by)
        for fold in self._folds.values():
            if fold.cross is None or fold.target_total is None:
                continue
            fold.target_square += float(fold.cross_count * (by @ by) - 2.0 * (by @ fold.target_total))
            fold.cross = fold.cross - fold.total[:, None] * by[None, :]
            fold.target_total = fold.target_total - fold.cross_count * by

    def statistics(self, fold: FoldName = "all") -> Statistics:
        """Return count, mean and covariance of one fold, or of both together.

        Raises:
            InternalError: The fold has no rows.
        """
        folds = list(self._folds.values()) if fold == "all" else [self._folds[fold]]
        count = sum(sums.count for sums in folds)
        if count <= 0:
            raise InternalError(f"no rows in fold '{fold}'")
        a, xp = self.arrays, self.arrays.xp
        mean = folds[0].total / count if len(folds) == 1 else (folds[0].total + folds[1].total) / count
        covariance = a.empty((self.width, self.width), mean.dtype)
        for low in range(0, self.width, PANEL):
            high = min(low + PANEL, self.width)
            panel = a.there(folds[0].second[low:high, low:]) / count
            for sums in folds[1:]:
                panel += a.there(sums.second[low:high, low:]) / count
            panel -= mean[low:high, None] * mean[None, low:]
            # What lies below the diagonal may be missing (`add_block_rows`).
            square = xp.triu(panel[:, : high - low])
            panel[:, : high - low] = square + xp.triu(square, k=1).T
            covariance[low:high, low:] = panel
            covariance[low:, low:high] = panel.T
        # A constant channel gives a rounding residue of either sign here; a variance is never negative.
        a.floor_diagonal(covariance)
        return Statistics(count, mean, covariance)

    def cross_statistics(self, fold: FoldName = "all") -> CrossStatistics:
        """Return the cross moments of one fold, or of both together.

        Raises:
            InternalError: Not every row of the fold has cross moments.
        """
        sums = self._sums(fold)
        if sums.cross is None or sums.target_total is None or sums.cross_count != sums.count:
            raise InternalError(f"fold '{fold}' has {sums.count} rows and cross moments of {sums.cross_count}")
        mean = sums.total / sums.count
        target_mean = sums.target_total / sums.count
        variance = sums.target_square / sums.count - float(target_mean @ target_mean)
        covariance = sums.cross / sums.count - mean[:, None] * target_mean[None, :]
        return CrossStatistics(covariance, target_mean, max(variance, 0.0))

    def store(self, place: ArrayStore) -> None:
        """Moves the second moments to disk; nothing is added to them afterwards."""
        for fold in self._folds.values():
            fold.second = place.put(self.arrays.host(fold.second))

    def rows(self, fold: FoldName = "all") -> int:
        """Return the number of rows in one fold, or in both together."""
        if fold == "all":
            return sum(sums.seen for sums in self._folds.values())
        return self._folds[fold].seen

    @property
    def count(self) -> int:
        """Number of rows, both folds together."""
        return self.rows()

    @property
    def mean(self) -> AnyArray:
        """E[x], [n], both folds together."""
        return self.statistics().mean

    @property
    def covariance(self) -> AnyArray:
        """E[(x - mean)^T (x - mean)], [n, n], both folds together."""
        return self.statistics().covariance

    @property
    def uncentred(self) -> AnyArray:
        """E[x^T x], [n, n], both folds together."""
        return self.statistics().uncentred

    def _sums(self, fold: FoldName) -> _Fold:
        if fold != "all":
            return self._folds[fold]
        both = _Fold(self.width, self.arrays)
        for sums in self._folds.values():
            both.include(sums)
        return both


class MadeUpMoments(Moments):
    """Moments of no activation: seeded, of full rank, no two channels alike. A cut is rehearsed with them.

    Args:
        width: Width n of the dimension.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, HOST)

    def statistics(self, fold: FoldName = "all") -> Statistics:
        """Return a mean and a covariance, the same for every fold."""
        rng = np.random.default_rng(self.width)
        mean, factors = rng.standard_normal(self.width), rng.standard_normal((self.width, 4))
        return Statistics(float(self.rows()), mean, factors @ factors.T + np.diag(rng.uniform(0.5, 1.5, self.width)))

    def part(self, channels: NDArray[np.int64]) -> Moments:
        """Return others, of as many channels."""
        return MadeUpMoments(channels.size)

    def merge(self, other: Moments) -> Moments:
        """Return these: all of one width are alike."""
        return self

    def rows(self, fold: FoldName = "all") -> int:
        """Return a number that is enough for every rule."""
        return 100 * self.width


def _fold_name(held_back: bool) -> str:
    return "held_back" if held_back else "training"


def _require_finite(*arrays: AnyArray) -> None:
    # A sum is NaN or Inf when any entry is; it spares a temporary of the array's size.
    sums = (arrays_of(array).xp.sum(array, dtype=arrays_of(array).xp.float64) for array in arrays)
    if not all(math.isfinite(float(total)) for total in sums):
        raise OptionError("the activations hold NaN or Inf on the calibration data")
