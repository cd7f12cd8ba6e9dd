"""Whole numbers that stand for a weight: how they are read, and how a weight that was cut is written on them again.

    w = (q - z) s      one s and z for all, for each index of an axis, or for each block along it

A weight that was cut is taken apart into *units*, as many numbers as share one s and z. A unit that the grid it had says
to the last bit keeps its s, z and q; any other (its numbers were repaired, or a block lost some) gets a grid of its own, by
the rule of the quantiser: the largest number, or the range with zero in it, over the whole numbers in use.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
SAMPLED = 16
"""Numbers of a channel that are looked at before all are."""
CHUNK = 256
"""Scales that are tried at a time."""


@dataclass(frozen=True, eq=False)
class Grid:
    """A weight in whole numbers.

    Attributes:
        numbers: q, of the weight's shape.
        scale: s: of rank 0 (one for all), [n] along ``axis``, or with blocks along ``axis`` of the weight's rank.
        zero: z, of the shape of ``scale``; None where all are 0.
        axis: along which scales differ; None where there is one.
        block: numbers along ``axis`` that share one; 0 where each index has its own.
        ends: the least and the largest q.
        symmetric: whether all z are one number, which new ones are, too.
        signed: whether a new s may be negative, so that the number of the largest magnitude lies at the longer end.
        dtype: of the weight.
    """

    numbers: Array
    scale: Array
    zero: Array | None
    axis: int | None
    block: int
    ends: tuple[int, int]
    symmetric: bool
    signed: bool
    dtype: np.dtype[Any]

    @classmethod
    def read(
        cls,
        numbers: Array,
        scale: Array,
        zero: Array | None,
        axis: int | None = None,
        block: int = 0,
        *,
        bits: int = 8,
        signed: bool = False,
    ) -> Grid:
        """Returns the grid of a weight as it is stored; the whole numbers in use are seen from its own.

        Raises:
            ValueError: the shapes do not fit each other.
        """
        scale = np.asarray(scale)
        if scale.size == 1 and not block:
            axis, scale, zero = None, scale.reshape(()), None if zero is None else zero.reshape(())
        elif not block:
            if axis is None:
                raise ValueError("scales along no axis")
            scale, zero = scale.reshape(-1), None if zero is None else zero.reshape(-1)
        shape = _scale_shape(numbers.shape, axis, block)
        if scale.shape != shape or (zero is not None and zero.shape != shape):
            raise ValueError(f"scales {list(scale.shape)}, expected {list(shape)}")
        if zero is None and numbers.dtype.kind == "u":
            zero = np.zeros(shape, numbers.dtype)
        symmetric = zero is None or zero.size <= 1 or bool((zero == zero.flat[0]).all())
        centred = zero is None or bool(zero.size and zero.flat[0] == (0 if numbers.dtype.kind == "i" else 1 << (bits - 1)))
        symmetric = symmetric and centred
        return cls(
            numbers,
            scale,
            zero,
            axis,
            block,
            _ends(numbers, bits, symmetric and not signed),
            symmetric,
            signed,
            scale.dtype,
        )

    @functools.cached_property
    def values(self) -> Array:
        """The weight."""
        return _weight(self.numbers, self._wide(self.scale), self._wide(self.zero), self.dtype)

    @property
    def beside(self) -> tuple[Array, Array]:
        """Scales and zeros, laid out beside the numbers (they broadcast)."""
        zero = np.zeros(()) if self.zero is None else self._wide(self.zero)
        return np.asarray(self._wide(self.scale), np.float64), np.asarray(zero, np.float64)

    def steps(self, values: Array) -> float:
        """Returns how far a weight of this shape is from the grid's at the most, in steps."""
        if not values.size:
            return 0.0
        apart = np.abs(values.astype(np.float64) - self.values.astype(np.float64))
        step = np.abs(np.broadcast_to(np.asarray(self._wide(self.scale), np.float64), apart.shape))
        noise = np.abs(values.astype(np.float64)) * float(np.finfo(self.dtype).eps)  # of the float type itself
        return float(np.max(np.maximum(apart - noise, 0.0) / np.where(step > 0, step, 1.0)))

    def moved(self, axes: Sequence[int]) -> Grid:
        """Returns the grid of the transposed weight, whose axis i is axis ``axes[i]`` of this one."""
        if tuple(axes) == tuple(range(len(axes))):
            return self
        blocks = [a if a is None or not self.block else a.transpose(axes) for a in (self.scale, self.zero)]
        axis = None if self.axis is None else list(axes).index(self.axis)
        assert blocks[0] is not None
        return replace(self, numbers=laid_out(self.numbers.transpose(axes)), scale=blocks[0], zero=blocks[1], axis=axis)

    def widened(self, cut: Grid, index: Sequence[NDArray[np.int64]]) -> Grid:
        """Returns a cut weight at the width of this one: the number of zero where nothing is left.

        Args:
            cut: the grid of what is left, by scales along the same axis.
            index: for each axis the positions that are left.
        """
        scale, zero = cut.scale, cut.zero
        if self.axis is not None:
            kept, scale = index[self.axis], np.array(self.scale)
            scale[kept] = cut.scale
            if zero is not None:
                zero = np.zeros_like(scale, zero.dtype) if self.zero is None else np.array(self.zero)
                zero[kept] = cut.zero
        made = replace(self, scale=scale, zero=zero)
        nothing = 0 if zero is None else made._wide(zero)
        numbers = np.array(np.broadcast_to(nothing, self.numbers.shape), cut.numbers.dtype)
        numbers[np.ix_(*index)] = cut.numbers
        return replace(made, numbers=numbers)

    def at_scale(self, values: Array, scale: Array) -> Grid:
        """Returns values on a grid whose scales are given, without zeros."""
        made = replace(self, scale=scale.astype(self.scale.dtype), zero=None, axis=0 if scale.ndim else None)
        wide = np.asarray(made._wide(made.scale), np.float64)
        limit = np.iinfo(self.numbers.dtype)
        numbers = np.clip(np.rint(values / np.where(wide == 0, 1, wide)), limit.min, limit.max)
        return replace(made, numbers=numbers.astype(self.numbers.dtype))

    def refitted(self, values: Array) -> tuple[Grid, int, int]:
        """Returns the grid of a weight that this one became, how many units kept theirs, and how many there are."""
        if values.shape == self.numbers.shape and np.array_equal(values, self.values):
            units = int(self.scale.size)
            return self, units, units
        if self.axis is None:
            return self._refitted_whole(values)
        if self.block:
            return self._refitted_blocks(values)
        return self._refitted_channels(values)

    # -- one scale for all ----------------------------------------------------------------------------------------------

    def _refitted_whole(self, values: Array) -> tuple[Grid, int, int]:
        zero = None if self.zero is None else np.asarray(self.zero)
        numbers, exact = self._on(
            values.reshape(1, -1), self.scale.reshape(1, 1), None if zero is None else zero.reshape(1, 1)
        )
        if exact[0]:
            return replace(self, numbers=numbers.reshape(values.shape)), 1, 1
        scale, new_zero = self._new(values.reshape(1, -1))
        numbers = self._rounded(values.reshape(1, -1), scale[:, None], None if new_zero is None else new_zero[:, None])
        made = replace(
            self,
            numbers=numbers.reshape(values.shape),
            scale=scale.reshape(()),
            zero=None if new_zero is None else new_zero.reshape(()),
        )
        return made, 0, 1

    # -- one for each index of an axis ----------------------------------------------------------------------------------

    def _refitted_channels(self, values: Array) -> tuple[Grid, int, int]:
        assert self.axis is not None
        moved = np.moveaxis(values, self.axis, 0)
        rows = laid_out(moved).reshape(len(moved), -1)
        found = self._places(rows)
        scale, zero = self._new(rows)
        kept = found >= 0
        scale[kept] = self.scale[found[kept]]
        if zero is not None and self.zero is not None:
            zero[kept] = self.zero[found[kept]]
        numbers = self._rounded(rows, scale[:, None], None if zero is None else zero[:, None])
        shaped = laid_out(np.moveaxis(numbers.reshape(moved.shape), 0, self.axis))
        return replace(self, numbers=shaped, scale=scale, zero=zero), int(kept.sum()), len(rows)

    def _places(self, rows: Array) -> NDArray[np.int64]:
        """Returns for each channel the one, of those before the cut, whose grid says it to the last bit; -1 where none."""
        zero = np.zeros(self.scale.shape, self.numbers.dtype) if self.zero is None else self.zero
        if len(rows) == len(self.scale):
            exact = self._on(rows, self.scale[:, None], zero[:, None])[1]
            if exact.any():
                return np.where(exact, np.arange(len(rows)), -1)
        found = np.full(len(rows), -1, np.int64)
        width = rows.shape[1]
        sample = rows[:, np.unique(np.linspace(0, max(width - 1, 0), SAMPLED).astype(int))] if width else rows
        start = 0
        for place, row in enumerate(rows):
            for near in (start, *range(start + 1, len(self.scale), CHUNK)):
                some = slice(near, near + (1 if near == start else CHUNK))
                near_fit = self._on(
                    np.broadcast_to(sample[place], (len(self.scale[some]), sample.shape[1])),
                    self.scale[some, None],
                    zero[some, None],
                )[1]
                hit = next(
                    (
                        near + int(k)
                        for k in np.flatnonzero(near_fit)
                        if self._on(row[None], self.scale[near + k].reshape(1, 1), zero[near + k].reshape(1, 1))[1][0]
                    ),
                    None,
                )
                if hit is not None:
                    found[place], start = hit, hit + 1
                    break
            if start >= len(self.scale):
                break
        return found

    # -- blocks along an axis -------------------------------------------------------------------------------------------

    def _refitted_blocks(self, values: Array) -> tuple[Grid, int, int]:
        old, new = self._units(self.values), self._units(values)
        known = {unit.tobytes(): place for place, unit in enumerate(old)}
        found = np.asarray([known.get(unit.tobytes(), -1) for unit in new], np.int64)
        kept = found >= 0
        scale, zero = self._new(new)
        flat = [None if a is None else self._along(a).reshape(-1) for a in (self.scale, self.zero)]
        assert flat[0] is not None
        scale[kept] = flat[0][found[kept]]
        if zero is not None and flat[1] is not None:
            zero[kept] = flat[1][found[kept]]
        numbers = self._rounded(new, scale[:, None], None if zero is None else zero[:, None])
        if kept.any():  # what fills up a last block, too
            numbers[kept] = self._units(self.numbers)[found[kept]]
        assert self.axis is not None
        lead = np.moveaxis(values, self.axis, -1).shape
        blocks = -(-lead[-1] // self.block)
        laid = numbers.reshape(*lead[:-1], blocks * self.block)[..., : lead[-1]]
        shape = (*lead[:-1], blocks)
        back = [None if a is None else laid_out(np.moveaxis(a.reshape(shape), -1, self.axis)) for a in (scale, zero)]
        assert back[0] is not None
        made = replace(self, numbers=laid_out(np.moveaxis(laid, -1, self.axis)), scale=back[0], zero=back[1])
        return made, int(kept.sum()), len(new)

    def _along(self, values: Array) -> Array:
        assert self.axis is not None
        return laid_out(np.moveaxis(values, self.axis, -1))

    def _units(self, values: Array) -> Array:
        """Returns the blocks of a tensor, [blocks, block]; a last one that is not full is filled up with zeros."""
        along = self._along(values)
        short = -along.shape[-1] % self.block
        padded = np.pad(along, [*[(0, 0)] * (along.ndim - 1), (0, short)]) if short else along
        return padded.reshape(-1, self.block)

    # -- numbers --------------------------------------------------------------------------------------------------------

    def _on(self, rows: Array, scale: Array, zero: Array | None) -> tuple[Array, NDArray[np.bool_]]:
        """Returns the whole numbers nearest to rows on given grids, and of which rows they say every bit."""
        limit = np.iinfo(self.numbers.dtype)
        numbers = _nearest(rows, scale, zero)
        inside = (numbers >= max(limit.min, self.ends[0] - 1)) & (numbers <= self.ends[1])
        whole = np.clip(numbers, limit.min, limit.max).astype(self.numbers.dtype)
        same = _weight(whole, scale, zero, self.dtype) == rows
        exact: NDArray[np.bool_] = (same & inside).all(axis=1)
        return whole, exact

    def _rounded(self, rows: Array, scale: Array, zero: Array | None) -> Array:
        """Returns the whole numbers nearest to rows, within the ends."""
        low = np.iinfo(self.numbers.dtype).min if self.numbers.dtype.kind == "i" else 0
        least = self.ends[0] - 1 if self.ends[0] - 1 >= low and self.symmetric and not self.signed else self.ends[0]
        return np.clip(_nearest(rows, scale, zero), least, self.ends[1]).astype(self.numbers.dtype)

    def _new(self, rows: Array) -> tuple[Array, Array | None]:
        """Returns scales and zeros of rows by themselves, by the rule of the quantiser."""
        low, high = self.ends
        wide = rows.astype(np.float64)
        least, most = (wide.min(axis=1, initial=0.0), wide.max(axis=1, initial=0.0))
        if self.symmetric:
            middle = 0 if self.zero is None else int(np.asarray(self.zero).flat[0])
            if self.signed:
                largest = np.where(-least > most, least, most)
                scale = largest / (low - middle) if middle - low > high - middle else largest / (high - middle)
            else:
                scale = np.maximum(-least, most) / min(high - middle, middle - low)
            zero = None if self.zero is None else np.full(len(rows), middle, self.zero.dtype)
        else:
            scale = (most - least) / (high - low)
            assert self.zero is not None
            start = low - least / np.where(scale == 0, 1.0, scale)
            zero = np.clip(np.rint(start), low, high).astype(self.zero.dtype)
        scale = scale.astype(self.scale.dtype)
        return np.where(scale == 0, np.asarray(1, scale.dtype), scale), zero

    def _wide(self, values: Array | None) -> Any:
        """Returns scales or zeros laid out beside the numbers."""
        if values is None or self.axis is None:
            return values
        if self.block:
            repeated = np.repeat(values, self.block, axis=self.axis)
            return repeated[tuple(slice(n) for n in self.numbers.shape)]
        return values.reshape([-1 if i == self.axis else 1 for i in range(self.numbers.ndim)])


def laid_out(values: Array) -> Array:
    """Returns an array in C order; unlike numpy's own it keeps a rank of 0."""
    return np.asarray(values, order="C")


def _scale_shape(shape: Sequence[int], axis: int | None, block: int) -> tuple[int, ...]:
    if axis is None:
        return ()
    if not block:
        return (shape[axis],)
    return tuple(-(-n // block) if i == axis else n for i, n in enumerate(shape))


def _ends(numbers: Array, bits: int, even: bool) -> tuple[int, int]:
    """Returns the least and the largest whole number in use: of a range of 7 bits where none is beyond it."""
    kind = np.iinfo(numbers.dtype)
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if kind.min < 0 else (0, (1 << bits) - 1)
    if kind.bits > 8:
        return int(kind.min), int(kind.max)
    least, most = (int(numbers.min()), int(numbers.max())) if numbers.size else (low, high)
    if bits == 8 and kind.min < 0 and -64 <= least and most <= 64:
        return (-64, 64) if even else (-64, 63)
    if bits == 8 and kind.min == 0 and most <= 127:
        return 0, 127
    if kind.min < 0 and even and least > low:
        return low + 1, high
    return low, high


def _nearest(rows: Array, scale: Array, zero: Array | None) -> Array:
    wide = np.asarray(scale, np.float64)
    numbers = np.rint(rows.astype(np.float64) / np.where(wide == 0, 1.0, wide))
    return numbers if zero is None else np.rint(numbers + np.asarray(zero, np.float64))


def _weight(numbers: Array, scale: Array, zero: Array | None, dtype: np.dtype[Any]) -> Array:
    """Returns (q - z) s in float32, or wider, as a type."""
    kind = np.float64 if dtype == np.float64 else np.float32
    whole = numbers.astype(kind)
    if zero is not None and np.any(zero):
        whole = whole - np.asarray(zero, kind)
    result: Array = (whole * np.asarray(scale, kind)).astype(dtype)
    return result
