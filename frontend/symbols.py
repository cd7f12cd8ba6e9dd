"""Sizes for what is symbolic while a graph is walked: distinct primes, so that every shape is concrete."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import numpy as np
import onnx

from liar_opt.frontend.graph_tensors import is_float
from liar_opt.runtime.signatures import Signature

if TYPE_CHECKING:
    from liar_opt.frontend.model import Model
    from liar_opt.frontend.onnx_model import OnnxModel

PATCHES = 1344
"""Patches of 14, 16 and 64 pixels, and windows of 7, 8 and 12 of 4 pixels each, halved three times, divide it."""
GROWTH = 8
LARGEST_PROBE = 100_000
"""Symbolic sizes grow by so much, up to so many, where windows do not fit into them."""


class MergeSymbols(Exception):
    """Two sizes turned out to be equal, of which one at least is a symbolic dimension; the walk starts again with one.

    The other may be the sum of two symbols: a mask covers what is in the cache and what is new. It may be one, too: an
    exporter traced with batch 1 and hard-coded the 1 in a Reshape; then the symbolic batch must be 1.
    """

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"sizes {first} and {second}")
        self.sizes = (first, second)


class TooShort(Exception):
    """A window is longer than the axis that it slides over; the walk starts again with larger sizes of what is symbolic."""


class Misfit(Exception):
    """A shape does not fit the sizes tried: an image must be a multiple of patches and windows; the walk starts again."""


def primes(start: int = 5) -> Iterator[int]:
    """Yields the prime numbers from ``start``."""
    return (n for n in itertools.count(start) if all(n % d for d in range(2, int(n**0.5) + 1)))


def dimension_key(tensor: str, axis: int, dimension: object) -> str:
    """Returns the name under which a symbolic dimension of an input is known; anonymous ones get one of their own."""
    return str(dimension) if isinstance(dimension, str) and dimension else f"{tensor}[{axis}]"


def probe_symbols(model: Model) -> dict[str, int]:
    """Gives every symbolic dimension of the graph's inputs a prime size; all leading dimensions are one, the batch.

    Token inputs (integers or masks of rank two) of different dimension names but the same place are one as well, and so
    are the lengths of the caches of all layers.
    """
    used = {d for t in model.graph.inputs for d in (t.shape or ()) if isinstance(d, int)}
    source = (p for p in primes() if p not in used)
    symbols: dict[str, int] = {}
    by_place: dict[object, int] = {}
    for tensor in model.graph.inputs:
        rank = len(tensor.shape or ())
        for axis, dimension in enumerate(tensor.shape or ()):
            if isinstance(dimension, int) and dimension >= 0:
                continue
            key = dimension_key(tensor.name, axis, dimension)
            token = rank == 2 and not is_float(tensor.dtype or np.float32)
            place: object = "batch" if axis == 0 else key
            if axis and token and not isinstance(dimension, str):
                place = ("token", axis)
            elif axis and rank >= 3 and is_float(tensor.dtype or np.float32):
                place = ("past", rank, axis)
            if key not in symbols:
                symbols[key] = by_place[place] if place in by_place else next(source)
            by_place.setdefault(place, symbols[key])
    return symbols


def infer_shapes(model: Model, symbols: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes that onnx infers under the probe sizes, for operators that have no rule."""
    light = cast("OnnxModel", model).skeleton()
    for tensor in light.graph.input:
        for axis, dim in enumerate(tensor.type.tensor_type.shape.dim):
            if not dim.HasField("dim_value"):
                key = dimension_key(tensor.name, axis, dim.dim_param or None)
                if key in symbols:
                    dim.dim_value = symbols[key]
    for output in light.graph.output:
        output.type.tensor_type.ClearField("shape")
    try:
        inferred = onnx.shape_inference.infer_shapes(light, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        return {}
    result = {}
    for info in [*inferred.graph.value_info, *inferred.graph.output]:
        if info.type.tensor_type.HasField("shape"):
            dims = info.type.tensor_type.shape.dim
            if all(d.HasField("dim_value") for d in dims):
                result[info.name] = tuple(d.dim_value for d in dims)
    return result


def image_axes(model: Model) -> set[str]:
    """Returns the symbolic dimensions of images, all but the first: of inputs of rank 4 with floats that are no caches."""
    roles = Signature.read(model.inputs(), None).roles
    return {
        dimension_key(tensor.name, axis, d)
        for tensor in model.graph.inputs
        if len(tensor.shape or ()) == 4 and is_float(tensor.dtype or np.float32) and roles.get(tensor.name) != "past"
        for axis, d in enumerate(tensor.shape)
        if axis and (not isinstance(d, int) or d < 0)
    }


@dataclass(frozen=True)
class Symbols:
    """Sizes of the symbolic dimensions: ``free`` ones, by name, and those that are the ``sums`` of two free ones."""

    free: dict[str, int]
    sums: dict[str, tuple[str, str]] = field(default_factory=dict)

    def sizes(self) -> dict[str, int]:
        """Returns the size of every symbol."""
        return {**self.free, **{k: self.free[a] + self.free[b] for k, (a, b) in self.sums.items()}}

    def merged(self, first: int, second: int) -> Symbols | None:
        """Returns the symbols with two sizes made one; None where neither is that of a free symbol that may become it."""
        free = {1, *self.free.values()}  # of size one is what exporters took from their sample
        kept, gone = (first, second) if second in free and second > 1 else (second, first)
        if gone not in free:
            return None
        if kept in free:
            return Symbols({k: kept if v == gone else v for k, v in self.free.items()}, self.sums)
        names = [k for k, v in self.free.items() if v != gone]
        parts = next(((a, b) for a in names for b in names if self.free[a] + self.free[b] == kept), None)
        moved = {k for k, v in self.free.items() if v == gone}
        if parts is None or any(moved.intersection(pair) for pair in self.sums.values()):
            return None
        return Symbols({k: self.free[k] for k in names}, {**self.sums, **dict.fromkeys(moved, parts)})

    def renamed(self, factor: int = 1) -> Symbols:
        """Returns other sizes for the same symbols, larger by about ``factor``; what patches divide stays so."""
        times = {size: 1 if size % PATCHES else PATCHES for size in sorted(set(self.sizes().values()))}
        source = primes(factor * max(size // n for size, n in times.items()) + 1)
        other = {size: 1 if size == 1 else next(source) * n for size, n in times.items() if size in self.free.values()}
        return Symbols({k: other[v] for k, v in self.free.items()}, self.sums)

    def divisible(self, names: Set[str]) -> Symbols:
        """Returns the symbols with ``names`` at sizes that patches and windows divide."""
        return Symbols({k: v * PATCHES if k in names else v for k, v in self.free.items()}, self.sums)
