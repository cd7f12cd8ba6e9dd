"""The ONNX operator table of the axis algebra.

:class:`GraphWalk` visits the nodes of a graph once, in topological order. It gives every axis of every tensor a factor
(see :mod:`liar_opt.frontend.axes`); a rule per operator says which factors are equal, how axes are split, merged, cut and
joined, and which are pinned. Symbolic dimensions of the graph's inputs are given distinct prime sizes for the walk, so
that every shape is concrete, and small tensors that are computed from shapes have known values. Two symbols that an
operator equates are merged and the walk starts again.

The walk records what a later rewrite has to touch:

* :class:`ConstantUse`: a constant, where it is used, and the factors of its axes;
* :class:`ConsumerUse`: a linear contraction of an activation with a constant, where a repair can be folded;
* :class:`SizeUse`: an attribute or an element of a shape tensor that must equal the size of some factors;
* :class:`ValueUse`: a number that was computed from shapes and enters the data (a scale): it must not change;
* in :attr:`GraphWalk.others`, the same graph under other sizes of its symbolic dimensions: what holds in all holds;
* in :attr:`GraphWalk.mixed`, axes of a product of two activations: attention weights mix what such an axis holds;
* in :attr:`GraphWalk.batched`, axes along which such products stand side by side: attention heads are among them;
* in :attr:`GraphWalk.channels`, axes that are channels of a convolution or of a normalisation, of which runs are no heads;
* :class:`ProductUse`: a product of two activations, by the axis that is contracted: the width of queries and keys.

An operator without a rule pins every axis that it touches, and is named in :attr:`GraphWalk.unknown`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

import liar_opt.frontend.onnx_attention_rules
import liar_opt.frontend.onnx_fused_rules
import liar_opt.frontend.onnx_layout_rules
import liar_opt.frontend.onnx_normalisation_rules
import liar_opt.frontend.onnx_recurrent_rules  # noqa: F401 (these imports put their rules into the table)
from liar_opt.frontend.axes import AxisAlgebra, Factor
from liar_opt.frontend.onnx_model import MOVERS, OnnxModel, constant_value, is_constant, is_float, present
from liar_opt.frontend.onnx_rule_table import MICROSOFT, RULES, Axes, rule
from liar_opt.frontend.onnx_values import (
    Array,
    axes_of,
    evaluate,
    resolve_reshape,
    slice_arguments,
    slices,
    tensor_attribute,
)
from liar_opt.runtime.errors import InternalError
from liar_opt.runtime.signatures import InputSpec, Signature

COPIES = ("Cast", "Identity")
LOOK_UPS = ("Gather", "GatherND")
RELAYOUTS = (
    *("Cast Flatten Identity Reshape Squeeze Unsqueeze").split(),
    *("_to_copy _unsafe_view alias clone contiguous detach flatten reshape squeeze to unsqueeze view").split(),
)
"""Operators, of ONNX and of ATen, that keep the elements of their first input in order."""
ELEMENTWISE = ("Add", "Div", "Mul", "Sub")
APART_LIMIT = 1 << 16
"""Tables of more elements are one where several nodes add them."""
PATCHES = 1344
"""Patches of 14, 16 and 64 pixels, and windows of 7, 8 and 12 of 4 pixels each, halved three times, divide it."""
GROWTH = 8
LARGEST_PROBE = 100_000
"""Symbolic sizes grow by so much, up to so many, where windows do not fit into them."""
VALUE_LIMIT = 4096
"""Tensors with more elements than this are data, not shape arithmetic."""


@dataclass(frozen=True, eq=False)
class ConstantUse:
    """One use of a constant: input ``position`` of ``node``; ``axes`` are the factors of the constant's axes."""

    node: gs.Node
    position: int
    constant: gs.Constant
    axes: Axes


@dataclass(frozen=True, eq=False)
class Lookup:
    """Weights of experts in one constant, [experts, ..], of which each row of the data takes one.

    ``node`` looks them up, in its first input, by ``numbers``: the expert of each row. ``root`` is the tensor that the
    numbers were laid out from; lookups by the same root take the same expert for the same row. ``stack`` counts them.
    """

    node: gs.Node
    numbers: gs.Tensor
    root: gs.Tensor
    stack: Factor


BiasKind = Literal["after", "input", "none"]


@dataclass(frozen=True)
class Window:
    """How a convolution slides over its input: what lies under the kernel at one place is a row of its product.

    Attributes:
        kernel: sizes, one for each axis that is slid over; so are the others.
        strides: steps.
        dilations: steps within the kernel.
        pads: zeros before each axis, then behind each.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]

    @property
    def size(self) -> int:
        """Places under the kernel."""
        return math.prod(self.kernel)


@dataclass(frozen=True, eq=False)
class ConsumerUse:
    """A linear contraction y = x W (+ b).

    ``weight``, at input ``weight_position`` of ``node``, is contracted over its axis ``weight_axis`` with axis
    ``activation_axis`` of ``activation``; ``width`` is the contracted factor.

    ``bias`` says where b' belongs: ``("input", k)`` the node's own input k (scaled by ``bias_scale``),
    ``("after", 0)`` an addition behind the node, or ``("none", 0)`` nowhere. ``scale`` is what the node multiplies the
    product by (alpha).

    With a ``lookup`` each row has the weight of its own expert, and ``weight`` is that of all, contracted over
    ``weight_axis`` behind its first: an input of the node that looks it up.

    With a ``window`` the node is a convolution, and x what lies under its kernel: ``width`` is that of the kernel times the
    channels, ``channels`` the latter, and W [places, channels, outputs] as a matrix.
    """

    node: gs.Node
    activation: gs.Variable
    activation_axis: int
    weight: gs.Constant
    weight_position: int
    weight_axis: int
    width: Factor
    bias: tuple[BiasKind, int] = ("after", 0)
    scale: float = 1.0
    bias_scale: float = 1.0
    output_axis: int = -1
    lookup: Lookup | None = None
    window: Window | None = None
    channels: Factor | None = None

    def matrix(self, value: NDArray[Any]) -> NDArray[Any]:
        """Returns W, [n, m], of a value of the weight."""
        if self.window is None:
            rows = np.moveaxis(value, self.weight_axis, 0)
            return rows.reshape(len(rows), -1)
        rows = value.transpose(*range(2, value.ndim), 1, 0)
        return rows.reshape(-1, rows.shape[-1])

    def laid_out(self, matrix: NDArray[Any], shape: Sequence[int]) -> NDArray[Any]:
        """Returns the value of the weight, of ``shape``, whose W is ``matrix``."""
        if self.window is None:
            rest = [n for i, n in enumerate(shape) if i != self.weight_axis]
            return np.ascontiguousarray(np.moveaxis(matrix.reshape(-1, *rest), 0, self.weight_axis))
        rows = matrix.reshape(*self.window.kernel, -1, shape[0])
        return np.ascontiguousarray(rows.transpose(rows.ndim - 1, rows.ndim - 2, *range(rows.ndim - 2)))

    def cut_axis(self, rows: NDArray[np.int64], size: int) -> NDArray[np.int64]:
        """Returns the positions of the weight's axis, of ``size``, that rows of W are of."""
        return rows if self.window is None else np.unique(rows % size)

    @property
    def column_axes(self) -> tuple[int, ...]:
        """The axes of the weight that the columns of W are of."""
        return (0,) if self.window else tuple(i for i in range(len(self.weight.shape)) if i != self.weight_axis)

    @property
    def contracted(self) -> Factor:
        """The axis of the weight that is contracted; without the places under a kernel, which all stay."""
        return self.width if self.channels is None else self.channels

    @property
    def holder(self) -> gs.Node:
        """The node that has the weight among its inputs."""
        return self.node if self.lookup is None else self.lookup.node


@dataclass(frozen=True, eq=False)
class SizeUse:
    """A number that must equal the summed sizes of ``factors``.

    ``value`` is what it was, ``dynamic`` whether that depends on the sizes of the graph's inputs.

    A number that counts from the end of an axis depends on what is ``watched`` too.

    ``where`` is ``("input", position, element)`` for an element of a shape tensor, ``("attribute", name, element)`` for
    an attribute (``element`` -1 for a scalar), ``("split", "", element)`` for a part of a Split that says no sizes.
    """

    node: gs.Node
    where: tuple[str, int | str, int]
    factors: tuple[Factor, ...]
    value: int
    dynamic: bool = False
    watched: tuple[Factor, ...] = ()


@dataclass(frozen=True, eq=False)
class ValueUse:
    """Input ``position`` of ``node`` is a number computed from shapes that enters the data.

    ``value`` is what it was, ``dynamic`` whether that depends on the sizes of the graph's inputs.
    """

    node: gs.Node
    position: int
    value: Array
    dynamic: bool = False


@dataclass(frozen=True, eq=False)
class ProductUse:
    """A product of the two activations that ``node`` reads, contracted over ``width``."""

    node: gs.Node
    width: Factor


class MergeSymbols(Exception):
    """Two sizes turned out to be equal, of which one at least is a symbolic dimension; the walk starts again with one.

    The other may be the sum of two symbols: a mask covers what is in the cache and what is new. It may be one, too: the
    batch of the sample that was exported, written where nothing else fits.
    """

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"sizes {first} and {second}")
        self.sizes = (first, second)


class TooShort(Exception):
    """A window is longer than the axis that it slides over; the walk starts again with larger sizes of what is symbolic."""


class Misfit(Exception):
    """A shape does not fit the sizes tried: an image must be a multiple of patches and windows; the walk starts again."""


@dataclass(frozen=True)
class Cache:
    """Past keys or values: graph input ``past`` comes back as graph output ``present``, longer along ``axis``.

    Its other inner axes, its heads, may lose indices, with both shapes.
    """

    past: str
    present: str
    axis: int


def _inner(shape: Sequence[int | str | None]) -> set[int]:
    """Returns the axes of a cache that have a fixed size, but for the first and the last."""
    return {i for i, d in enumerate(shape[:-1]) if i and isinstance(d, int) and d >= 0}


def primes(start: int = 5) -> Iterator[int]:
    """Yields the prime numbers from ``start``."""
    return (n for n in itertools.count(start) if all(n % d for d in range(2, int(n**0.5) + 1)))


@dataclass
class GraphWalk:
    """The state of the analysis of one graph; :func:`walk` makes and runs it."""

    model: OnnxModel
    symbols: dict[str, int] = field(default_factory=dict)
    algebra: AxisAlgebra = field(default_factory=AxisAlgebra)
    axes: dict[str, Axes | None] = field(default_factory=dict)
    values: dict[str, Array] = field(default_factory=dict)
    constant_uses: list[ConstantUse] = field(default_factory=list)
    consumers: list[ConsumerUse] = field(default_factory=list)
    size_uses: list[SizeUse] = field(default_factory=list)
    value_uses: list[ValueUse] = field(default_factory=list)
    unknown: dict[str, list[str]] = field(default_factory=dict)
    caches: dict[str, Cache] = field(default_factory=dict)
    needed: dict[tuple[str, int], int] = field(default_factory=dict)
    unspecified: set[str] = field(default_factory=set)
    in_place: set[str] = field(default_factory=set)
    left: dict[str, list[str]] = field(default_factory=dict)
    spared: dict[str, set[int]] = field(default_factory=dict)
    mixed: list[Factor] = field(default_factory=list)
    batched: list[Factor] = field(default_factory=list)
    channels: list[Factor] = field(default_factory=list)
    lookups: dict[str, Lookup] = field(default_factory=dict)
    products: list[ProductUse] = field(default_factory=list)
    flops: int = 0
    apart: set[frozenset[int]] = field(default_factory=set)
    merging: bool = True
    growing: bool = False
    choosy: bool = False
    images: bool = False
    others: list[GraphWalk] = field(default_factory=list)
    _tied: dict[int, Axes] = field(default_factory=dict)
    _used: dict[tuple[int, int], Axes] = field(default_factory=dict)
    _dynamic: set[int] = field(default_factory=set)
    _unforeseen: list[int] = field(default_factory=list)
    _lost: dict[str, gs.Node] = field(default_factory=dict)

    @functools.cached_property
    def inferred(self) -> dict[str, tuple[int, ...]]:
        """Shapes that onnx infers under the probe sizes; asked for where an operator has no rule."""
        return infer_shapes(self.model, self.symbols)

    # -- what rules ask ---------------------------------------------------------------------------------------------

    def shape(self, axes: Sequence[Factor]) -> list[int]:
        """Returns the sizes of ``axes`` under the walk's probe sizes."""
        return [self.algebra.size(f) for f in axes]

    def input_axes(self, node: gs.Node, position: int) -> Axes | None:
        """Returns the factors of an input's axes; None where the input is absent or its shape is unknown.

        Constants get factors of their own at each use, so that a vector shared by chance (exporters deduplicate equal
        biases) ties nothing, nor does a small table that is added or multiplied (a bias by head and channel); matrices that
        are shared stay tied, since cutting them apart would store them twice.
        """
        if position >= len(node.inputs) or not present(node.inputs[position]):
            return None
        tensor = node.inputs[position]
        if not is_constant(tensor):
            return self.axes.get(tensor.name)
        key = (id(node), position)
        if key in self._used:
            return self._used[key]
        small = node.op in ELEMENTWISE and int(np.prod(tensor.shape, dtype=np.int64)) <= APART_LIMIT
        axes = self._constant_axes(tensor, tied=not small)
        self._used[key] = axes
        self.constant_uses.append(ConstantUse(node, position, tensor, axes))
        return axes

    def _constant_axes(self, tensor: gs.Constant, tied: bool) -> Axes:
        if tied and id(tensor) in self._tied:
            return self._tied[id(tensor)]
        axes = tuple(self.algebra.fresh(int(s)) for s in tensor.shape)
        if tied and sum(int(s) > 1 for s in tensor.shape) >= 2:
            self._tied[id(tensor)] = axes
        return axes

    def value(self, node: gs.Node, position: int) -> Array | None:
        """Returns the known value of an input, or None."""
        if position >= len(node.inputs) or not present(node.inputs[position]):
            return None
        return self.value_of(node.inputs[position])

    def value_of(self, tensor: gs.Tensor) -> Array | None:
        """Returns the value of a small integer or scalar constant, or of a tensor computed from shapes."""
        if not is_constant(tensor):
            return self.values.get(tensor.name)
        size = int(np.prod(tensor.shape, dtype=np.int64))
        if size <= 1 or (size <= VALUE_LIMIT and not is_float(tensor.dtype)):
            return np.asarray(tensor.values)
        return None

    def constant(self, node: gs.Node, position: int) -> gs.Constant | None:
        """Returns an input if it is a floating-point constant."""
        if position < len(node.inputs) and is_constant(node.inputs[position]) and is_float(node.inputs[position].dtype):
            return node.inputs[position]
        return None

    # -- what rules say ---------------------------------------------------------------------------------------------

    def output(self, node: gs.Node, axes: Axes | None, position: int = 0) -> None:
        """Sets the factors of an output's axes."""
        if position < len(node.outputs) and present(node.outputs[position]):
            self.axes[node.outputs[position].name] = axes

    def read(self, tensor: gs.Tensor) -> bool:
        """Returns whether a tensor is read, or handed out."""
        return present(tensor) and (bool(tensor.outputs) or any(tensor is t for t in self.model.graph.outputs))

    def pin(self, axes: Axes | Sequence[Factor] | None, reason: str) -> None:
        """Pins every factor of ``axes``."""
        for factor in axes or ():
            self.algebra.pin(factor, reason)

    def product(self, node: gs.Node, width: Factor) -> None:
        """Records a product of two activations; its contracted axis is pinned, but not firmly."""
        self.products.append(ProductUse(node, width))
        self.algebra.pin(width, f"contracted between two activations (node '{node.name}')", firm=False)

    def unify(self, a: Factor, b: Factor) -> None:
        """Equates two factors; different symbolic sizes are merged by starting the walk again."""
        self.equate(self.algebra.size(a), self.algebra.size(b))
        self.algebra.unify(a, b)

    def mix(self, left: Axes, right: Axes) -> None:
        """Records what a matrix product of two activations mixes: the rows of the left one and the columns of the right.

        A right side of one column weighs what is summed and mixes no rows: the channels of a state space model stay apart.
        """
        if len(right) > 1 and self.algebra.size(right[-1]) > 1:
            self.mixed += left[-2:-1]
        if len(right) > 1:
            self.mixed.append(right[-1])

    def equate(self, a: int, b: int) -> None:
        """Starts the walk again where two sizes must be equal and are so if symbolic dimensions are chosen well."""
        if a == b or self._dynamic.isdisjoint((a, b)) or frozenset((a, b)) in self.apart or not self.merging:
            return
        if {a, b} <= self._dynamic | {x + y for x in self._dynamic for y in self._dynamic}:
            raise MergeSymbols(a, b)

    def alone(self, sizes: Sequence[int], target: Sequence[int]) -> None:
        """Starts the walk again where ``sizes`` have as many elements as a ``target`` once a symbolic dimension is one."""
        total, made = (int(np.prod(n, dtype=np.int64)) for n in (sizes, target))
        spare = max(total, made) // min(total, made) if min(total, made) > 0 else 0
        known = frozenset((spare, 1)) in self.apart or not self.merging
        if spare in self._dynamic and spare * min(total, made) == max(total, made) and not known:
            raise MergeSymbols(spare, 1)

    def broadcast(self, *operands: Axes) -> Axes:
        """Unifies aligned axes as numpy broadcasting does and returns the axes of the result."""
        rank = max(len(a) for a in operands)
        result: list[Factor] = []
        for i in range(-rank, 0):
            aligned = [a[i] for a in operands if len(a) >= -i]
            full = [f for f in aligned if self.algebra.size(f) != 1]
            for other in full[1:]:
                self.unify(full[0], other)
            result.append(full[0] if full else aligned[0])
        return tuple(result)

    def concatenate(self, operands: Sequence[Axes], axis: int) -> Axes:
        """Unifies all axes but one of tensors of one rank, joins that one and returns the axes of the result."""
        result = list(operands[0])
        for other in operands[1:]:
            for i, factor in enumerate(other):
                if i != axis:
                    self.unify(result[i], factor)
        result[axis] = self.algebra.join([a[axis] for a in operands])
        return tuple(result)

    def strided(self, axis: Factor, indices: range, pin: str) -> Factor:
        """Returns the factor of what a slice with a step takes.

        Every step-th index of the whole axis, as gates and values of a feed-forward layer lie interleaved: the outer
        factor of n / step by step. Anything else pins the axis.
        """
        size, step = self.algebra.size(axis), indices.step
        if step > 1 and size % step == 0 and indices.start < step and len(indices) == size // step:
            outer, inner = self.algebra.split(axis, [size // step, step])
            self.pin([inner], pin)
            return outer
        self.pin([axis], pin)
        return self.fresh(len(indices), pin)

    def fresh(self, size: int, pin: str | None = None) -> Factor:
        """Returns a new factor."""
        return self.algebra.fresh(size, pin)

    def unforeseen(self) -> int:
        """Returns a probe size for an axis whose length depends on the data."""
        self._unforeseen.append(next(primes(max([4, *self._dynamic, *self._unforeseen]) + 1)))
        return self._unforeseen[-1]

    def size_use(
        self, node: gs.Node, where: tuple[str, int | str, int], *factors: Factor, watched: tuple[Factor, ...] = ()
    ) -> None:
        """Records that a number of ``node`` must follow the summed sizes of ``factors``, also when ``watched`` change."""
        size = sum(self.algebra.size(f) for f in factors)
        self.size_uses.append(SizeUse(node, where, factors, size, watched=watched))

    def consumer(
        self, node: gs.Node, activation: int, activation_axis: int, weight: int, weight_axis: int, **more: Any
    ) -> None:
        """Records a linear contraction of a variable input with a constant input; ``more`` are fields of `ConsumerUse`.

        What is contracted may be what the node makes, too, one step before: ``reads``.
        """
        tensor, constant = more.pop("reads", node.inputs[activation]), node.inputs[weight]
        axes = self.input_axes(node, weight)
        if not isinstance(tensor, gs.Variable) or axes is None or self.input_axes(node, activation) is None:
            return
        rank = len(self.axes[tensor.name] or ())
        width = more.pop("width", axes[weight_axis])
        self.consumers.append(
            ConsumerUse(node, tensor, activation_axis % rank, constant, weight, weight_axis % len(axes), width, **more)
        )

    def look_up(self, node: gs.Node, stack: Factor) -> None:
        """Records that a node looks weights up, one for each row; lookups by the same numbers are of the same experts."""
        numbers = node.inputs[1]
        root = numbers
        while root.inputs and root.inputs[0].op in RELAYOUTS and not is_constant(root.inputs[0].inputs[0]):
            root = root.inputs[0].inputs[0]
        for known in self.lookups.values():
            if known.root is root and self.algebra.size(known.stack) == self.algebra.size(stack):
                self.algebra.unify(known.stack, stack)
        self.lookups[node.outputs[0].name] = Lookup(node, numbers, root, stack)

    def cache(self, past: gs.Tensor, present: gs.Tensor, axis: int) -> None:
        """Records that ``past`` comes back as ``present``, longer along ``axis``, if they are a graph input and output.

        Between them and the graph's ends nothing may be but Cast and Identity.
        """
        while past.inputs and past.inputs[0].op in COPIES:
            past = past.inputs[0].inputs[0]
        ends = {t.name for t in self.model.graph.outputs}
        copies = [present, *(o for n in present.outputs if n.op in COPIES for o in n.outputs)]
        found = [t.name for t in copies if t.name in ends]
        axes = self.axes.get(past.name)
        if found and axes is not None and any(past is t for t in self.model.graph.inputs):
            self.caches[past.name] = Cache(past.name, found[0], axis % len(axes))

    def need(self, node: gs.Node, position: int, axis: int, size: int) -> None:
        """Says what the size of an axis of an input has to be, which the graph may not declare of its own inputs."""
        if not node.inputs[position].inputs:
            self.needed[node.inputs[position].name, axis] = size

    def input_specs(self) -> list[InputSpec]:
        """Returns the graph's inputs, with the sizes that operators need where none is declared."""
        return [
            InputSpec(
                i.name,
                i.dtype,
                tuple(self.needed.get((i.name, k), d) if not isinstance(d, int) else d for k, d in enumerate(i.shape)),
                in_place=i.name in self.in_place,
            )
            for i in self.model.inputs()
        ]

    def count(self, *factors: Factor) -> None:
        """Counts the multiplications and additions of a contraction over the index space of ``factors``."""
        self.flops += 2 * int(np.prod([self.algebra.size(f) for f in factors], dtype=np.int64))

    # -- the walk ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Visits every node."""
        self._dynamic = set(self.symbols.values()) - {1}
        for tensor in self.model.graph.inputs:
            self.axes[tensor.name] = None
            if tensor.shape is not None:
                sizes = self.input_sizes(tensor)
                perhaps_cache = is_float(tensor.dtype or np.float32) and len(sizes) >= 3
                reason = None if perhaps_cache else f"axis of graph input '{tensor.name}'"
                self.axes[tensor.name] = tuple(self.fresh(s, reason) for s in sizes)
        for node in self.model.graph.nodes:
            self._visit(node)
        self._spare()
        for what, tensors in (("input", self.model.graph.inputs), ("output", self.model.graph.outputs)):
            for tensor in tensors:
                axes = None if is_constant(tensor) else self.axes.get(tensor.name)
                if is_constant(tensor):  # a weight that is handed out keeps its shape wherever it is read
                    axes = tuple(f for use in self.constant_uses if use.constant.name == tensor.name for f in use.axes)
                pinned = [f for i, f in enumerate(axes or ()) if i not in self.spared.get(tensor.name, ())]
                self.pin(pinned, f"axis of graph {what} '{tensor.name}'")

    def _spare(self) -> None:
        """Notes which axes of inputs and outputs may lose indices: those of caches that count heads.

        What are two outputs here, and one of a merged decoder, must lose the same.
        """
        shapes = {t.name: t.shape or () for t in self.model.graph.inputs}
        for cache in self.caches.values():
            free = _inner(shapes[cache.past]) - {cache.axis}
            self.spared[cache.past] = self.spared[cache.present] = free
        merged = self.model.merged
        if merged is None:
            return
        self.spared |= {name: _inner(shape) for name, shape in merged.caches().items()}
        for pair in merged.twins:
            first, second = (self.axes.get(name) or () for name in pair)
            known = range(min(len(first), len(second)))
            free = self.spared.get(pair[1], self.spared.get(pair[0], set())).intersection(known)
            for axis in free:
                self.unify(first[axis], second[axis])
            self.spared[pair[0]] = self.spared[pair[1]] = free

    @functools.cached_property
    def of_first(self) -> set[int] | None:
        """The ids of the nodes that the first branch of a merged decoder needs; None where the model is none."""
        merged = self.model.merged
        return None if merged is None else merged.nodes_of_first(self.model.graph.nodes)

    def input_sizes(self, tensor: gs.Variable) -> list[int]:
        """Returns the probe sizes of a graph input."""
        return [
            self.symbols[dimension_key(tensor.name, i, d)] if not isinstance(d, int) or d < 0 else d
            for i, d in enumerate(tensor.shape)
        ]

    def _visit(self, node: gs.Node) -> None:
        if self._evaluate(node):
            return
        function = RULES.get((node.domain or "", node.op))
        if node.domain == "ai.onnx":
            function = RULES.get(("", node.op))
        opaque = any(present(t) and self.input_axes(node, i) is None for i, t in enumerate(node.inputs))
        if opaque and node.op in ("Shape", "Size"):
            self.give_up(node, f"an input of unknown shape at {node.op}")
            return
        if function is None or any(isinstance(v, gs.Graph) for v in node.attrs.values()):
            self.give_up(node, f"operator {node.op} has no rule")
            inside = sum(_products_inside(v) for v in node.attrs.values() if isinstance(v, gs.Graph))
            if inside:
                self.leave(
                    node,
                    f"{inside} products with weights inside the branches of {node.op} are left alone: only a merged "
                    "decoder is cut, where an input chooses between branches that make all outputs, one from a cache",
                )
            if node.op == "If" and self.value(node, 0) is not None:
                self._shape_of_branch(node)
            self.unknown.setdefault(f"{node.domain}::{node.op}" if node.domain else node.op, []).append(node.name)
            return
        if opaque:
            self.give_up(node, f"an input of unknown shape at {node.op}")
            if any((c := self.constant(node, i)) is not None and len(c.shape) > 1 for i in range(len(node.inputs))):
                root = next((self._lost[t.name] for t in node.inputs if t.name in self._lost), None)
                where = "of its input" if root is None else f"behind {root.op} (node '{root.name}')"
                self.leave(node, f"no shape is known {where}")
            return
        function(self, node)
        for i in range(len(node.outputs)):
            if present(node.outputs[i]):
                self.axes.setdefault(node.outputs[i].name, None)
        for i, tensor in enumerate(node.inputs):
            known = self.values.get(tensor.name) if isinstance(tensor, gs.Variable) else None
            sized = any(u.node is node and u.where[:2] == ("input", i) for u in self.size_uses[-16:])
            if known is not None and not sized:
                self.value_uses.append(ValueUse(node, i, known))

    def slid(self, node: gs.Node, extents: Sequence[int], before: Sequence[int] = ()) -> bool:
        """Returns whether windows fit into the axes that they slide over, of sizes ``before`` (none: it is padded).

        Raises:
            TooShort: they do not, or leave one pixel of an image of any size, which looks like a pooled one; and the walk
                may start again with larger sizes (a second of sound is 16,000 samples).
        """
        fit = all(n > 0 for n in extents)
        pooled = self.images and any(n == 1 < m for m, n in zip(before, extents, strict=False))
        if self.growing and (pooled or not fit):
            raise TooShort
        if fit:
            return True
        self.give_up(node, f"{node.op} over fewer elements than its window")
        return False

    def misfit(self, node: gs.Node, reason: str) -> None:
        """Gives a node up whose blocks do not divide the sizes tried.

        Raises:
            Misfit: the sizes of images are still to be chosen; the walk starts again with some that blocks divide.
        """
        if self.choosy:
            raise Misfit
        self.give_up(node, reason)

    def leave(self, node: gs.Node, reason: str) -> None:
        """Says why something inside an operator, which no axis of the graph shows, is not pruned."""
        self.left.setdefault(reason, []).append(node.name)

    def give_up(self, node: gs.Node, reason: str) -> None:
        """Pins all that a node touches; its outputs get the shapes that onnx can infer, pinned."""
        where = f"{reason} (node '{node.name}')"
        for i in range(len(node.inputs)):
            self.pin(self.input_axes(node, i), where)
        for value in node.attrs.values():
            if isinstance(value, gs.Graph):
                self._pin_captured(value, where)
        for tensor in node.outputs:
            if present(tensor):
                shape = self.inferred.get(tensor.name)
                self.axes[tensor.name] = None if shape is None else tuple(self.fresh(s, where) for s in shape)
                if shape is None:
                    self._lost[tensor.name] = next((self._lost[t.name] for t in node.inputs if t.name in self._lost), node)

    def _shape_of_branch(self, node: gs.Node) -> None:
        """Gives the outputs of an If the shapes, and the values if known, that its branch has under the probe sizes.

        A branch for sizes of one (torch writes them for ``squeeze``) is not taken then. Nothing inside is recorded.
        """
        branch = node.attrs["then_branch" if bool(np.all(self.value(node, 0))) else "else_branch"]
        records: list[list[Any]] = [self.constant_uses, self.consumers, self.size_uses, self.value_uses]
        records += [self.mixed, self.batched, self.channels, self.products]
        kept = [len(r) for r in records]
        where = f"operator If has no rule (node '{node.name}')"
        for inner in branch.nodes:
            value = constant_value(inner) if inner.op == "Constant" else None
            if value is None:
                self._visit(inner)
            else:
                self.axes[inner.outputs[0].name] = tuple(self.fresh(s, where) for s in value.shape)
                if value.size <= VALUE_LIMIT:
                    self.values[inner.outputs[0].name] = value
            for tensor in inner.outputs:
                self.pin(self.axes.get(tensor.name), where)
        for record, length in zip(records, kept, strict=True):
            del record[length:]
        for tensor, made in zip(node.outputs, branch.outputs, strict=True):
            axes = self.axes.get(made.name)
            if present(tensor) and self.axes.get(tensor.name) is None and axes is not None:
                self.axes[tensor.name] = tuple(self.fresh(s, where) for s in self.shape(axes))
                if made.name in self.values:
                    self.values[tensor.name] = self.values[made.name]

    def _pin_captured(self, graph: gs.Graph, reason: str) -> None:
        for node in graph.nodes:
            for i, tensor in enumerate(node.inputs):
                if is_constant(tensor):
                    self.pin(self.input_axes(node, i), reason)
                elif present(tensor):
                    self.pin(self.axes.get(tensor.name), reason)
            for value in node.attrs.values():
                if isinstance(value, gs.Graph):
                    self._pin_captured(value, reason)
        for tensor in graph.outputs:
            self.pin(self.axes.get(tensor.name), reason)

    def _evaluate(self, node: gs.Node) -> bool:
        """Computes the outputs of a node whose inputs are all known; they are shape arithmetic, not data."""
        if node.domain not in (None, "", "ai.onnx"):
            return False
        results: list[Array] | None
        if node.op in ("Shape", "Size"):
            axes = self.input_axes(node, 0)
            results = None if axes is None else [shape_value(node, self.shape(axes))]
        else:
            inputs = [self.value_of(t) if present(t) else None for t in node.inputs]
            if not inputs or any(v is None and present(t) for v, t in zip(inputs, node.inputs, strict=True)):
                return False
            if all(is_constant(t) for t in node.inputs):
                return False
            results = evaluate(node.op, inputs, node.attrs)
        if results is None or len(results) < len(node.outputs) or any(r.size > VALUE_LIMIT for r in results):
            return False
        if node.op in ("ConstantOfShape", "Expand") and any(
            r.size > 1 and (is_float(r.dtype) or (r.dtype == np.bool_ and r.ndim > 1)) for r in results
        ):
            return False  # data: zeros as a position bias, say, or a mask as wide as the scores
        for tensor, result in zip(node.outputs, results, strict=False):
            if present(tensor):
                self.values[tensor.name] = result
                self.axes[tensor.name] = tuple(self.fresh(s, "computed from shapes") for s in result.shape)
        return True


def _products_inside(graph: gs.Graph) -> int:
    """Returns how many nodes of a branch, and of those within, multiply by a weight."""
    own = sum(
        node.op in ("MatMul", "Gemm", "Conv") and any(is_constant(t) and len(t.shape) > 1 for t in node.inputs)
        for node in graph.nodes
    )
    return own + sum(_products_inside(v) for n in graph.nodes for v in n.attrs.values() if isinstance(v, gs.Graph))


def shape_value(node: gs.Node, sizes: Sequence[int]) -> Array:
    """Returns what a Shape or Size node gives for an input of ``sizes``."""
    if node.op == "Size":
        return np.asarray(np.prod(sizes, dtype=np.int64))
    return np.asarray(sizes, np.int64)[slice(node.attrs.get("start", 0), node.attrs.get("end"))]


def dimension_key(tensor: str, axis: int, dimension: object) -> str:
    """Returns the name under which a symbolic dimension of an input is known; anonymous ones get one of their own."""
    return str(dimension) if isinstance(dimension, str) and dimension else f"{tensor}[{axis}]"


def probe_symbols(model: OnnxModel) -> dict[str, int]:
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


def infer_shapes(model: OnnxModel, symbols: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes that onnx infers under the probe sizes, for operators that have no rule."""
    light = model.skeleton()
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


def walk(model: OnnxModel) -> GraphWalk:
    """Analyses a normalised graph, which is not changed, and returns the walk, run to its end."""
    symbols, apart = Symbols(probe_symbols(model)), set[frozenset[int]]()
    images = _image_axes(model)
    plain, choosy = symbols, bool(images)
    while True:
        growing = 1 < max(symbols.free.values(), default=1) < LARGEST_PROBE
        state = GraphWalk(model, symbols.sizes(), apart=apart, growing=growing, choosy=choosy, images=bool(images))
        try:
            state.run()
        except TooShort:
            symbols = symbols.renamed(GROWTH)
            apart.clear()
            continue
        except Misfit:
            tried = any(size % PATCHES == 0 for size in symbols.free.values())
            symbols, choosy = (plain, False) if tried else (plain.divisible(images), True)
            apart.clear()
            continue
        except MergeSymbols as merge:
            merged = symbols.merged(*merge.sizes)
            if merged is None:
                apart.add(frozenset(merge.sizes))
            symbols = merged or symbols
            continue
        break
    if symbols.free:
        _mark_dynamic(state, symbols)
    for tensor in model.graph.inputs:
        for axis, size in enumerate(state.input_sizes(tensor) if tensor.shape is not None else ()):
            if size == 1 and (not isinstance(tensor.shape[axis], int) or tensor.shape[axis] < 0):
                state.needed[tensor.name, axis] = 1
    return state


def _image_axes(model: OnnxModel) -> set[str]:
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


def _mark_dynamic(state: GraphWalk, symbols: Symbols) -> None:
    """Marks the numbers that change when the symbolic sizes do, by a second walk under other sizes, which is kept."""
    other = GraphWalk(state.model, symbols.renamed().sizes(), merging=False)
    other.run()
    state.others.append(other)
    sizes = {(id(u.node), u.where): u.value for u in other.size_uses}
    values = {(id(u.node), u.position): u.value for u in other.value_uses}
    state.size_uses = [replace(u, dynamic=sizes.get((id(u.node), u.where)) != u.value) for u in state.size_uses]
    state.value_uses = [
        replace(u, dynamic=not np.array_equal(u.value, values.get((id(u.node), u.position), ()))) for u in state.value_uses
    ]


def count_flops(model: OnnxModel, feeds: dict[str, Array]) -> int | None:
    """Returns the floating-point operations of all contractions for inputs of the shapes of ``feeds``.

    A multiplication and an addition are two operations; pointwise operators and softmax are not counted. None where the
    graph's inputs have other names or ranks.
    """
    state = walk_sized(model, feeds)
    return None if state is None else state.flops


def walk_sized(model: OnnxModel, feeds: Mapping[str, Array]) -> GraphWalk | None:
    """Walks with the sizes of ``feeds``; None where the graph's inputs have other names or ranks."""
    symbols: dict[str, int] = {}
    for tensor in model.graph.inputs:
        for axis, dimension in enumerate(tensor.shape or ()):
            if not isinstance(dimension, int) or dimension < 0:
                if tensor.name not in feeds or feeds[tensor.name].ndim <= axis:
                    return None
                symbols[dimension_key(tensor.name, axis, dimension)] = feeds[tensor.name].shape[axis]
    state = GraphWalk(model, symbols)
    try:
        state.run()
    except MergeSymbols:
        return None
    return state


INDEX_STEPS = (*MOVERS, *"Add Clip GreaterOrEqual Less Max Min Mod Mul Not Sub Where".split())
"""Operators between token ids and the table that they look up."""


def vocabulary(model: OnnxModel) -> int | None:
    """Returns the number of rows of the table that token ids look up: the largest of those read by a graph input."""
    roles = Signature.read(model.inputs(), None).roles
    inputs = {t.name for t in model.graph.inputs if roles.get(t.name) != "position"}
    sizes = []
    for node in model.graph.nodes:
        places = {"Gather": [(0, 1)], "EmbedLayerNormalization": [(2, 0)]}.get(node.op, [])
        for table, ids in places:
            rows, axis = node.inputs[table], 0
            if rows.inputs and rows.inputs[0].op == "Transpose":  # the weight of the head, turned round
                rows, axis = rows.inputs[0].inputs[0], 1
            if is_constant(rows) and len(rows.shape) == 2:
                sources = _sources(node.inputs[ids])
                sizes += [int(rows.shape[axis])] if len(sources) == 1 and sources <= inputs else []
    return max(sizes, default=None)


def looked_up(model: OnnxModel) -> dict[str, int]:
    """Returns the rows of the smallest table that each graph input of whole numbers looks up as it is."""
    inputs = {t.name for t in model.graph.inputs}
    rows: dict[str, int] = {}
    for node in model.graph.nodes:
        if node.op != "Gather" or not is_constant(node.inputs[0]) or is_constant(node.inputs[1]):
            continue
        table, index = node.inputs
        while index.inputs and index.inputs[0].op in MOVERS:
            index = index.inputs[0].inputs[0]
        if index.name in inputs:
            size = int(table.shape[int(node.attrs.get("axis", 0))])
            rows[index.name] = min(size, rows.get(index.name, size))
    return rows


def _sources(tensor: gs.Tensor) -> set[str]:
    """The tensors that indices come from, but for steps as those that add the length to negative ones (TensorFlow, JAX)."""
    found: set[str] = set()
    seen: set[int] = set()
    waiting = [tensor]
    while waiting:
        tensor = waiting.pop()
        if id(tensor) in seen or is_constant(tensor):
            continue
        seen.add(id(tensor))
        if tensor.inputs and tensor.inputs[0].op in INDEX_STEPS:
            moved = tensor.inputs[0].op in MOVERS
            waiting += tensor.inputs[0].inputs[: 1 if moved else None]
        else:
            found.add(tensor.name)
    return found


# -- pointwise ------------------------------------------------------------------------------------------------------


@rule(
    *(
        "Abs Acos Acosh Asin Asinh Atan Atanh BitCast BitwiseNot Cast Ceil Celu Cos Cosh Elu Erf Exp Floor Gelu HardSigmoid"
    ).split(),
    *(
        "HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin"
    ).split(),
    *("Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu").split(),
)
@rule("Gelu", "QuickGelu", domain=MICROSOFT)
def _unary(w: GraphWalk, node: gs.Node) -> None:
    w.output(node, w.input_axes(node, 0))


@rule("Clip", "CastLike", "Dropout")
def _unary_with_settings(w: GraphWalk, node: gs.Node) -> None:
    axes = w.input_axes(node, 0)
    w.output(node, axes)
    w.output(node, axes, 1)


@rule(
    *("Add And BitwiseAnd BitwiseOr BitwiseXor BitShift Div Greater GreaterOrEqual Less LessOrEqual Max Mean").split(),
    *("Min Mod Mul Or Pow PRelu Sub Sum Where Xor").split(),
)
@rule("BiasGelu", "FastGelu", "BiasAdd", domain=MICROSOFT)
def _pointwise(w: GraphWalk, node: gs.Node) -> None:
    operands = [a for i in range(len(node.inputs)) if (a := w.input_axes(node, i)) is not None]
    w.output(node, w.broadcast(*operands))


@rule("Equal")
def _equal(w: GraphWalk, node: gs.Node) -> None:
    """Whole numbers that are compared with many constant ones are a look-up written as a product: one row for each."""
    operands = [a for i in range(2) if (a := w.input_axes(node, i)) is not None]
    for axes, tensor in zip(operands, node.inputs, strict=True):
        if is_constant(tensor) and not is_float(tensor.dtype):
            w.pin([f for f in axes if w.algebra.size(f) > 1], f"looked up by Equal (node '{node.name}')")
    w.output(node, w.broadcast(*operands))


# -- contractions ---------------------------------------------------------------------------------------------------


def _matmul(w: GraphWalk, node: gs.Node, left: Axes, right: Axes, scale: float, swapped: tuple[bool, bool]) -> Axes:
    """Unifies batch and contracted axes; ``left`` and ``right`` are in multiplication order already."""
    vector_left, vector_right = len(left) == 1, len(right) == 1
    k_left, k_right = left[-1], right[0] if vector_right else right[-2]
    w.unify(k_left, k_right)
    if w.constant(node, 1) is not None and len(right) == 2:
        axis = -2 if swapped[0] else -1
        w.consumer(node, 0, axis, 1, 1 if swapped[1] else 0, scale=scale)
    elif w.constant(node, 0) is not None and len(left) == 2 and not vector_right:
        w.consumer(node, 1, -1 if swapped[1] else -2, 0, 0 if swapped[0] else 1, scale=scale, output_axis=-2)
    elif swapped == (False, False) and experts_product(w, node, left, right, scale):
        pass
    else:
        looked_up = any(t.inputs and t.inputs[0].op in LOOK_UPS and is_constant(t.inputs[0].inputs[0]) for t in node.inputs)
        if looked_up and w.algebra.pinned(k_left) is None:
            w.left.setdefault("weights are looked up for each token, as those of experts: their width stays", []).append(
                node.name
            )
        w.product(node, k_left)
        w.mix(left, right)
    batch_left, batch_right = left[: -2 if not vector_left else -1], right[:-2] if not vector_right else ()
    batch = w.broadcast(batch_left, batch_right) if batch_left or batch_right else ()
    if w.products and w.products[-1].node is node:
        w.batched += batch
    rows = () if vector_left else (left[-2],)
    columns = () if vector_right else (right[-1],)
    result = (*batch, *rows, *columns)
    w.count(k_left, *result)
    return result


def experts_product(w: GraphWalk, node: gs.Node, left: Axes, right: Axes, scale: float) -> bool:
    """Records the product of rows with the weights that were looked up for them, [rows, a, b]; says whether it is one."""
    found = [w.lookups.get(t.name) for t in node.inputs]
    side = 0 if found[0] is not None else 1
    lookup, tensor = found[side], node.inputs[1 - side]
    if lookup is None or found[1 - side] is not None or is_constant(tensor) or not len(left) == len(right) == 3:
        return False
    weight = lookup.node.inputs[0]
    if len(weight.shape) != 3:
        return False
    axes, width = (-2, left[-1]) if side == 0 else (-1, right[-2])
    use = ConsumerUse(
        node,
        tensor,
        axes % 3,
        weight,
        0,
        2 if side == 0 else 1,
        width,
        scale=scale,
        output_axis=-2 if side == 0 else -1,
        lookup=lookup,
    )
    w.consumers.append(use)
    return True


def _swap(axes: Axes, swap: bool) -> Axes:
    return (*axes[:-2], axes[-1], axes[-2]) if swap and len(axes) >= 2 else axes


@rule("MatMul")
def _matmul_rule(w: GraphWalk, node: gs.Node) -> None:
    left, right = w.input_axes(node, 0), w.input_axes(node, 1)
    assert left is not None and right is not None
    w.output(node, _matmul(w, node, left, right, 1.0, (False, False)))


@rule("FusedMatMul", "TransposeMatMul", domain=MICROSOFT)
def _fused_matmul(w: GraphWalk, node: gs.Node) -> None:
    left, right = w.input_axes(node, 0), w.input_axes(node, 1)
    assert left is not None and right is not None
    if node.attrs.get("transBatchA", 0) or node.attrs.get("transBatchB", 0):
        w.give_up(node, "FusedMatMul with transposed batch axes")
        return
    swapped = (bool(node.attrs.get("transA", 0)), bool(node.attrs.get("transB", 0)))
    alpha = float(node.attrs.get("alpha", 1.0))
    w.output(node, _matmul(w, node, _swap(left, swapped[0]), _swap(right, swapped[1]), alpha, swapped))


@rule("Gemm")
@rule("GemmFastGelu", "FusedGemm", domain=MICROSOFT)
def _gemm(w: GraphWalk, node: gs.Node) -> None:
    left, right = w.input_axes(node, 0), w.input_axes(node, 1)
    assert left is not None and right is not None
    swapped = (bool(node.attrs.get("transA", 0)), bool(node.attrs.get("transB", 0)))
    a, b = _swap(left, swapped[0]), _swap(right, swapped[1])
    w.unify(a[-1], b[-2])
    alpha = float(node.attrs.get("alpha", 1.0))
    has_bias = len(node.inputs) > 2 and present(node.inputs[2])
    if w.constant(node, 1) is not None:
        beta = float(node.attrs.get("beta", 1.0))
        w.consumer(
            node, 0, 0 if swapped[0] else 1, 1, 1 if swapped[1] else 0, bias=("input", 2), scale=alpha, bias_scale=beta
        )
        if node.op == "GemmFastGelu" and has_bias and w.constant(node, 2) is None:
            # An addition behind the node would come after the activation.
            w.pin([a[-1]], f"the bias of a fused activation is computed (node '{node.name}')")
    else:
        w.pin([a[-1]], f"contracted between two activations (node '{node.name}')")
    axes: Axes = (*a[:-1], b[-1])
    w.count(a[-1], *axes)
    bias = w.input_axes(node, 2) if has_bias else None
    w.output(node, axes if bias is None else w.broadcast(axes, bias))


def spelled_out(equation: str, ranks: Sequence[int]) -> tuple[list[str], str] | None:
    """Returns the terms and the result of an Einsum equation, with a letter for each axis.

    An ellipsis gets letters of its own, aligned at the right; a result that is not written has the letters that occur
    once, in alphabetical order, behind the ellipsis.

    Args:
        equation: as Einsum and ``torch.einsum`` take it.
        ranks: of the operands.

    Returns:
        None where a letter is repeated within a term (a diagonal), or the ranks do not fit.
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow:
        letters = left.replace(",", "").replace(".", "")
        right = "..." * ("..." in left) + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    if len(terms) != len(ranks):
        return None
    extra = max((rank - len(t) + 3 for t, rank in zip(terms, ranks, strict=True) if "..." in t), default=0)
    names = "".join(chr(0x2460 + i) for i in range(max(extra, 0)))
    full = [t.replace("...", names[len(names) - max(rank - len(t) + 3, 0) :]) for t, rank in zip(terms, ranks, strict=True)]
    result = right.replace("...", names)
    if [len(t) for t in full] != list(ranks) or any(len(set(t)) != len(t) for t in [*full, result]):
        return None
    return full, result


@rule("Einsum")
def _einsum(w: GraphWalk, node: gs.Node) -> None:
    einsum(w, node, lambda width: w.product(node, width))


def einsum(w: GraphWalk, node: gs.Node, contract: Callable[[Factor], None]) -> None:
    """The rule of an Einsum; ``contract`` is told of a width that is contracted between two activations."""
    operands = [w.input_axes(node, i) or () for i in range(len(node.inputs))]
    spelled = spelled_out(str(node.attrs["equation"]), [len(a) for a in operands])
    if spelled is None:
        w.give_up(node, f"{node.op} '{node.attrs['equation']}'")
        return
    terms, right = spelled
    factors: dict[str, Factor] = {}
    for term, axes in zip(terms, operands, strict=True):
        for letter, factor in zip(term, axes, strict=True):
            if letter in factors and w.algebra.size(factors[letter]) != 1 and w.algebra.size(factor) != 1:
                w.unify(factors[letter], factor)
            elif letter not in factors or w.algebra.size(factors[letter]) == 1:
                factors[letter] = factor
    summed = [letter for letter in factors if letter not in right]
    if len(terms) == 2:
        w.count(*factors.values())
    linear = len(terms) == 2 and len(summed) == 1 and all(summed[0] in t for t in terms)
    weight = next((i for i in (1, 0) if linear and w.constant(node, i) is not None and len(terms[i]) == 2), None)
    column = "" if weight is None else terms[weight].replace(summed[0], "")
    if weight is not None and right.endswith(column) and column not in terms[1 - weight]:
        w.consumer(node, 1 - weight, terms[1 - weight].index(summed[0]), weight, terms[weight].index(summed[0]))
    else:
        if linear and weight is None:
            contract(factors[summed[0]])
        else:
            w.pin([factors[s] for s in summed], f"summed over by {node.op} (node '{node.name}')")
        w.mixed += [f for letter, f in factors.items() if letter in right and sum(letter in t for t in terms) == 1]
        if not any(w.constant(node, i) is not None for i in range(len(terms))):
            w.batched += [f for letter, f in factors.items() if letter in right and sum(letter in t for t in terms) > 1]
    w.output(node, tuple(factors[letter] for letter in right))


@rule("Conv")
@rule("FusedConv", domain=MICROSOFT)
def _conv(w: GraphWalk, node: gs.Node) -> None:
    """X [b, n, ..], W [m, n / groups, ..], bias [m]; a fused one adds a tensor like the result, before an activation."""
    x, weight = w.input_axes(node, 0), w.input_axes(node, 1)
    assert x is not None and weight is not None
    where = f"(node '{node.name}')"
    kernel, groups = w.shape(weight)[2:], int(node.attrs.get("group", 1))
    if groups == 1:
        w.unify(x[1], weight[1])
        w.channels += [x[1], weight[0]]
        pointwise = all(k == 1 for k in kernel)
        window = None if pointwise else _window(node, kernel)
        if w.constant(node, 1) is None or (window is None and not pointwise):
            w.pin([x[1]], f"input channels of a convolution that is no matrix product {where}")
        else:
            under = None if window is None else w.algebra.merge([*weight[2:], weight[1]])
            more: dict[str, Any] = {} if under is None else {"window": window, "width": under, "channels": weight[1]}
            w.consumer(node, 0, 1, 1, 1, bias=("input", 2), output_axis=1 - len(x), **more)
    elif groups == w.algebra.size(x[1]) == w.algebra.size(weight[0]) and w.constant(node, 1) is not None:
        w.unify(x[1], weight[0])  # depthwise: every channel by itself
        w.size_use(node, ("attribute", "group", -1), x[1])
    else:
        w.pin([x[1], *weight], f"grouped convolution {where}")
    bias = w.input_axes(node, 2)
    if bias is not None:
        w.unify(weight[0], bias[0])
    w.pin([*x[2:], *weight[2:]], f"slid over by a convolution {where}")
    spatial = _conv_sizes(node, w.shape(x)[2:], kernel) or w.inferred.get(node.outputs[0].name, ())[2:]
    if len(spatial) != len(kernel):
        w.give_up(node, "convolution of unknown extent")
        return
    if not w.slid(node, spatial, w.shape(x)[2:]):
        return
    w.flops += 2 * int(np.prod([*w.shape((x[0], *weight)), *spatial], dtype=np.int64))
    result: Axes = (x[0], weight[0], *(w.fresh(s, f"slid over by a convolution {where}") for s in spatial))
    added = w.input_axes(node, 3)
    w.output(node, result if added is None else w.broadcast(result, added))


@rule("ConvTranspose")
def _conv_transpose(w: GraphWalk, node: gs.Node) -> None:
    """What it adds up where its outputs overlap is a matrix product [.., n] [n, m k] of its inputs, without a bias.

    W' is fitted to the addends (k of each output, at most), which bounds what the sums lose.
    """
    x, weight, bias = w.input_axes(node, 0), w.input_axes(node, 1), w.input_axes(node, 2)
    assert x is not None and weight is not None
    where = f"(node '{node.name}')"
    w.unify(x[1], weight[0])
    w.pin([*x[2:], *weight[2:]], f"slid over by a transposed convolution {where}")
    groups = int(node.attrs.get("group", 1))
    if groups > 1 or w.constant(node, 1) is None:
        w.pin(weight, f"{'grouped ' if groups > 1 else ''}transposed convolution {where}")
    else:
        w.consumer(node, 0, 1, 1, 0, bias=("none", 0), output_axis=1 - len(x))
    made = weight[1] if groups == 1 else w.fresh(groups * w.algebra.size(weight[1]), f"grouped convolution {where}")
    if bias is not None:
        w.unify(made, bias[0])
    kernel, sizes, n = w.shape(weight)[2:], w.shape(x)[2:], len(x) - 2
    spatial: Sequence[int] = w.inferred.get(node.outputs[0].name, ())[2:]
    if node.attrs.get("auto_pad", "NOTSET") == "NOTSET" and "output_shape" not in node.attrs:
        pads, more = node.attrs.get("pads", [0] * 2 * n), node.attrs.get("output_padding", [0] * n)
        strides, dilations = node.attrs.get("strides", [1] * n), node.attrs.get("dilations", [1] * n)
        spatial = [
            strides[i] * (sizes[i] - 1) + more[i] + (kernel[i] - 1) * dilations[i] + 1 - pads[i] - pads[n + i]
            for i in range(n)
        ]
    if len(spatial) != n:
        w.give_up(node, "transposed convolution of unknown extent")
        return
    w.flops += 2 * int(np.prod([*w.shape((x[0], *weight)), *sizes], dtype=np.int64))
    w.output(node, (x[0], made, *(w.fresh(s, f"slid over by a transposed convolution {where}") for s in spatial)))


def _window(node: gs.Node, kernel: Sequence[int]) -> Window | None:
    """Returns how a convolution slides; None where its padding depends on the size of the input."""
    n = len(kernel)
    strides, dilations = (tuple(node.attrs.get(name, [1] * n)) for name in ("strides", "dilations"))
    automatic = node.attrs.get("auto_pad", "NOTSET")
    pads = tuple(node.attrs.get("pads", [0] * 2 * n)) if automatic == "NOTSET" else (0,) * 2 * n
    if automatic in ("SAME_UPPER", "SAME_LOWER"):
        if max(strides) > 1:
            return None
        spread = [d * (k - 1) for k, d in zip(kernel, dilations, strict=True)]
        less, more = [s // 2 for s in spread], [s - s // 2 for s in spread]
        pads = (*less, *more) if automatic == "SAME_UPPER" else (*more, *less)
    return Window(tuple(kernel), strides, dilations, pads)


def _conv_sizes(node: gs.Node, sizes: Sequence[int], kernel: Sequence[int]) -> list[int]:
    n = len(kernel)
    if node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return []
    pads = list(node.attrs.get("pads", [0] * 2 * n))
    strides, dilations = list(node.attrs.get("strides", [1] * n)), list(node.attrs.get("dilations", [1] * n))
    return [(sizes[i] + pads[i] + pads[n + i] - dilations[i] * (kernel[i] - 1) - 1) // strides[i] + 1 for i in range(n)]


@rule("AveragePool", "LpPool", "MaxPool")
def _pool(w: GraphWalk, node: gs.Node) -> None:
    axes, shape = w.input_axes(node, 0), w.inferred.get(node.outputs[0].name)
    assert axes is not None
    if shape is None:
        w.give_up(node, f"{node.op} of unknown extent")
        return
    if not w.slid(node, shape[2:], w.shape(axes)[2:]):
        return
    where = f"slid over by {node.op} (node '{node.name}')"
    w.pin(axes[2:], where)
    if len(node.outputs) > 1 and w.read(node.outputs[1]):
        w.pin(axes[:2], f"counted by the indices of {node.op} (node '{node.name}')")
    for position in range(len(node.outputs)):
        w.output(node, (*axes[:2], *(w.fresh(s, where) for s in shape[2:])), position)


@rule("BatchNormalization", "InstanceNormalization")
def _channel_normalization(w: GraphWalk, node: gs.Node) -> None:
    axes = w.input_axes(node, 0)
    assert axes is not None
    if int(node.attrs.get("training_mode", 0)) or len(node.outputs) > 1:
        w.give_up(node, f"{node.op} in training mode")
        return
    if node.op == "InstanceNormalization":
        w.pin(axes[2:], f"{node.op} runs over it (node '{node.name}')")
        w.channels.append(axes[1])
    for position in range(1, len(node.inputs)):  # scale, shift, and mean and variance where they are given
        vector = w.input_axes(node, position)
        if vector is not None:
            w.unify(axes[1], vector[0])
    w.output(node, axes)


@rule("Resize", "Upsample")
def _resize(w: GraphWalk, node: gs.Node) -> None:
    axes = w.input_axes(node, 0)
    assert axes is not None
    places = [int(a) % len(axes) for a in node.attrs.get("axes") or range(len(axes))]
    sizes = w.shape([axes[a] for a in places])
    scales, written = w.constant(node, 1 if len(node.inputs) == 2 else 2), w.value(node, 3)
    target, same = None, np.zeros(len(places), bool)
    stretched = node.attrs.get("keep_aspect_ratio_policy", "stretch") == "stretch"
    if written is not None and len(written) == len(places) and stretched:
        target, same = written, written == np.asarray(sizes)
    elif written is None and scales is not None and scales.values.size == len(places):
        target, same = np.floor(np.asarray(sizes) * scales.values).astype(np.int64), scales.values == 1.0
    if target is None:
        w.give_up(node, f"{node.op} to a size that is not known")
        return
    if node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        same = np.zeros(len(places), bool)
    result, where = list(axes), f"{node.op} runs over it (node '{node.name}')"
    for element, place in enumerate(places):
        if not same[element]:
            w.pin([axes[place]], where)
            result[place] = w.fresh(int(target[element]), where)
        elif written is not None:
            w.size_use(node, ("input", 3, element), axes[place])
    w.output(node, tuple(result))


# -- layout ---------------------------------------------------------------------------------------------------------


@rule("Reshape")
def _reshape(w: GraphWalk, node: gs.Node) -> None:
    axes, target = w.input_axes(node, 0), w.value(node, 1)
    assert axes is not None
    if target is None:
        w.give_up(node, "Reshape to a target that is not known")
        return
    sizes = resolve_reshape([int(d) for d in target], w.shape(axes), bool(node.attrs.get("allowzero", 0)))
    if sizes is None or 0 in sizes:
        if w.choosy:
            raise Misfit
        w.alone(w.shape(axes), target.tolist())
        w.give_up(node, "Reshape to a target that does not fit")
        return
    result = tuple(w.algebra.reshape(axes, sizes))
    for i, factor in enumerate(result):
        w.size_use(node, ("input", 1, i), factor)
    w.output(node, result)


@rule("Flatten")
def _flatten(w: GraphWalk, node: gs.Node) -> None:
    axes = w.input_axes(node, 0)
    assert axes is not None
    axis = int(node.attrs.get("axis", 1))
    w.output(node, (w.algebra.merge(axes[:axis]), w.algebra.merge(axes[axis:])))


@rule("Transpose")
def _transpose(w: GraphWalk, node: gs.Node) -> None:
    axes = w.input_axes(node, 0)
    assert axes is not None
    w.output(node, tuple(axes[p] for p in node.attrs.get("perm") or range(len(axes))[::-1]))


@rule("Squeeze")
def _squeeze(w: GraphWalk, node: gs.Node) -> None:
    axes = w.input_axes(node, 0)
    assert axes is not None
    chosen = axes_of([None, w.value(node, 1)], node.attrs, 1)
    gone = {a % len(axes) for a in chosen} if chosen is not None else {i for i, s in enumerate(w.shape(axes)) if s == 1}
    w.output(node, tuple(f for i, f in enumerate(axes) if i not in gone))


@rule("Unsqueeze")
def _unsqueeze(w: GraphWalk, node: gs.Node) -> None:
    axes, chosen = w.input_axes(node, 0), axes_of([None, w.value(node, 1)], node.attrs, 1)
    assert axes is not None
    if chosen is None:
        w.give_up(node, "Unsqueeze of axes that are not known")
        return
    rank = len(axes) + len(chosen)
    places, source = {a % rank for a in chosen}, iter(axes)
    w.output(node, tuple(w.fresh(1) if i in places else next(source) for i in range(rank)))


@rule("Concat")
def _concat(w: GraphWalk, node: gs.Node) -> None:
    operands = [w.input_axes(node, i) for i in range(len(node.inputs))]
    known = [a for a in operands if a is not None]
    axis = int(node.attrs["axis"]) % len(known[0])
    w.output(node, w.concatenate(known, axis))
    for tensor in node.inputs:
        w.cache(tensor, node.outputs[0], axis)


@rule("Split")
def _split(w: GraphWalk, node: gs.Node) -> None:
    axes = w.input_axes(node, 0)
    assert axes is not None
    axis = int(node.attrs.get("axis", 0)) % len(axes)
    size, count = w.algebra.size(axes[axis]), len(node.outputs)
    given = node.attrs.get("split")
    where: tuple[str, int | str] | None = ("attribute", "split") if given is not None else None
    if given is None and len(node.inputs) > 1 and present(node.inputs[1]):
        given, where = w.value(node, 1), ("input", 1)
    if given is None:
        step = -(-size // count)
        given = [min(step, size - step * i) for i in range(count)]
        if where is not None:
            w.give_up(node, "Split into sizes that are not known")
            return
    pieces = w.algebra.cut(axes[axis], [int(g) for g in given])
    for i, piece in enumerate(pieces):
        # Equal parts by count: the operator itself divides; it is told the sizes where they differ after a cut.
        w.size_use(node, (*(where or ("split", "")), i), piece)
        w.output(node, (*axes[:axis], piece, *axes[axis + 1 :]), i)


@rule("Slice")
def _slice(w: GraphWalk, node: gs.Node) -> None:
    axes = w.input_axes(node, 0)
    assert axes is not None
    arguments = slice_arguments([None, *(w.value(node, i) for i in range(1, 5))], node.attrs)
    if len(node.inputs) > 3 and present(node.inputs[3]) and w.value(node, 3) is None:
        arguments = None
    if arguments is None:
        w.give_up(node, "Slice with bounds that are not known")
        return
    starts, ends, chosen, _ = arguments
    places = [a % len(axes) for a in (chosen if chosen is not None else range(len(starts)))]
    result = list(axes)
    for element, (axis, cut) in enumerate(zip(places, [slices(len(axes), *arguments)[p] for p in places], strict=True)):
        size = w.algebra.size(axes[axis])
        start, stop, step = cut.indices(size)
        if (start, stop, step) == (0, size, 1):
            continue
        if step != 1 or stop <= start:
            result[axis] = w.strided(axes[axis], range(start, stop, step), f"sliced with a step (node '{node.name}')")
            continue
        pieces = w.algebra.cut(axes[axis], [s for s in (start, stop - start, size - stop) if s])
        before, piece = (pieces[:1], pieces[1]) if start else ([], pieces[0])
        result[axis] = piece
        where = ("attribute", "starts", "ends") if "starts" in node.attrs else ("input", 1, 2)
        if start:
            watched = tuple(pieces) if starts[element] < 0 else ()
            w.size_use(node, (str(where[0]), where[1], element), *before, watched=watched)
        if stop < size:
            watched = tuple(pieces) if ends[element] < 0 else ()
            w.size_use(node, (str(where[0]), where[2], element), *before, piece, watched=watched)
    w.output(node, tuple(result))


@rule("Expand")
def _expand(w: GraphWalk, node: gs.Node) -> None:
    axes, target = w.input_axes(node, 0), w.value(node, 1)
    assert axes is not None
    if target is None:
        w.give_up(node, "Expand to a target that is not known")
        return
    sizes = [int(d) for d in target]
    rank = max(len(axes), len(sizes))
    padded: list[Factor | None] = [*([None] * (rank - len(axes))), *axes]
    result: list[Factor] = []
    for i in range(rank):
        factor = padded[i]
        element = i - (rank - len(sizes))
        size = sizes[element] if element >= 0 else 1
        if factor is None or (w.algebra.size(factor) == 1 and size > 1):
            factor = w.fresh(size)
        if element >= 0 and size > 1:
            if w.algebra.size(factor) != size:
                w.equate(w.algebra.size(factor), size)
                w.give_up(node, "Expand to a target that does not fit")
                return
            w.size_use(node, ("input", 1, element), factor)
        result.append(factor)
    w.output(node, tuple(result))


@rule("Tile")
def _tile(w: GraphWalk, node: gs.Node) -> None:
    axes, repeats = w.input_axes(node, 0), w.value(node, 1)
    assert axes is not None
    if repeats is None:
        w.give_up(node, "Tile by counts that are not known")
        return
    result = []
    for i, (factor, count) in enumerate(zip(axes, (int(r) for r in repeats), strict=True)):
        if count == 1:
            result.append(factor)
            continue
        outer = w.fresh(count)
        w.size_use(node, ("input", 1, i), outer)
        result.append(w.algebra.merge([outer, factor]))
    w.output(node, tuple(result))


@rule("Gather")
def _gather(w: GraphWalk, node: gs.Node) -> None:
    axes, indices = w.input_axes(node, 0), w.input_axes(node, 1)
    assert axes is not None and indices is not None
    axis = int(node.attrs.get("axis", 0)) % len(axes)
    chosen = _looked_up(w, node, axes[axis], len(indices))
    if axis == 0 and len(axes) > 1 and w.constant(node, 0) is not None and not is_constant(node.inputs[1]):
        w.look_up(node, axes[0])
    w.output(node, (*axes[:axis], *(indices if chosen is None else chosen), *axes[axis + 1 :]))


def _looked_up(w: GraphWalk, node: gs.Node, factor: Factor, rank: int) -> Axes | None:
    """Pins an axis that is looked up; where constant indices pick a run of it, it is cut there and the rest stays free.

    Returns:
        The axis that indices of ``rank`` 1 leave, no axis for a scalar; None for no such run.
    """
    where = f"looked up by {node.op} (node '{node.name}')"
    size = w.algebra.size(factor)
    chosen = _contiguous(node.inputs[1], size) if rank <= 1 else None
    if chosen is None or w.algebra.pinned(factor) is not None:
        w.pin([factor], where)
        return None
    start, count = chosen
    pieces = w.algebra.cut(factor, [s for s in (start, count, size - start - count) if s])
    before, piece = (pieces[:1], pieces[1]) if start else ([], pieces[0])
    w.pin([piece], where)
    for i, index in enumerate(np.asarray(node.inputs[1].values).reshape(-1).tolist()):
        watched = tuple(pieces) if index < 0 else ()
        w.size_use(node, ("input", 1, i), *before, *(w.fresh(1) for _ in range(i)), watched=watched)
    return (piece,) if rank else ()


def _contiguous(indices: gs.Tensor, size: int) -> tuple[int, int] | None:
    """Returns the first index and the number of constant indices that follow one another, a slice; else None."""
    if not is_constant(indices) or len([n for n in indices.shape if n != 1]) > 1 or indices.values.size > VALUE_LIMIT:
        return None
    values = [int(v) % size for v in np.asarray(indices.values).reshape(-1)]
    run = list(range(values[0], values[0] + len(values))) if values else []
    return (values[0], len(values)) if values and values == run and len(values) < size else None


@rule("GatherElements")
def _gather_elements(w: GraphWalk, node: gs.Node) -> None:
    axes, indices = w.input_axes(node, 0), w.input_axes(node, 1)
    assert axes is not None and indices is not None
    axis = int(node.attrs.get("axis", 0)) % len(axes)
    w.pin([axes[axis], indices[axis]], f"looked up by GatherElements (node '{node.name}')")
    for i, (a, b) in enumerate(zip(axes, indices, strict=True)):
        if i == axis:
            continue
        if w.algebra.size(a) == w.algebra.size(b):
            w.unify(a, b)
        else:
            w.pin([a, b], f"looked up by GatherElements (node '{node.name}')")
    w.output(node, indices)


@rule("GatherND")
def _gather_nd(w: GraphWalk, node: gs.Node) -> None:
    axes, indices = w.input_axes(node, 0), w.input_axes(node, 1)
    assert axes is not None and indices is not None
    batch, depth = int(node.attrs.get("batch_dims", 0)), w.algebra.size(indices[-1])
    chosen = _looked_up(w, node, axes[0], 1) if not batch and depth == 1 and len(indices) == 2 else None
    if chosen is not None:
        w.output(node, (*chosen, *axes[1:]))
        return
    if not batch and depth == 1 and w.constant(node, 0) is not None and not is_constant(node.inputs[1]):
        w.look_up(node, axes[0])
    w.pin(axes[: batch + depth], f"looked up by GatherND (node '{node.name}')")
    w.pin(indices[-1:], f"looked up by GatherND (node '{node.name}')")
    w.output(node, (*indices[:-1], *axes[batch + depth :]))


@rule("NonZero")
def _non_zero(w: GraphWalk, node: gs.Node) -> None:
    axes = w.input_axes(node, 0)
    assert axes is not None
    where = f"looked for what is not zero (node '{node.name}')"
    w.pin(axes, where)
    w.output(node, (w.fresh(len(axes), where), w.fresh(w.unforeseen(), where)))


@rule("Compress")
def _compress(w: GraphWalk, node: gs.Node) -> None:
    axes = w.input_axes(node, 0)
    assert axes is not None
    where = f"picked from by Compress (node '{node.name}')"
    picked = w.fresh(w.unforeseen(), where)
    if "axis" not in node.attrs:
        w.pin(axes, where)
        w.output(node, (picked,))
        return
    axis = int(node.attrs["axis"]) % len(axes)
    w.pin([axes[axis]], where)
    w.output(node, (*axes[:axis], picked, *axes[axis + 1 :]))


@rule("ScatterND")
def _scatter_nd(w: GraphWalk, node: gs.Node) -> None:
    data, indices, updates = (w.input_axes(node, i) for i in range(3))
    assert data is not None and indices is not None and updates is not None
    depth = w.algebra.size(indices[-1])
    where = f"written to by ScatterND (node '{node.name}')"
    w.pin([*data[:depth], *indices, *updates[: len(indices) - 1]], where)
    for a, b in zip(data[depth:], updates[len(indices) - 1 :], strict=True):
        w.unify(a, b)
    w.output(node, data)


@rule("ScatterElements", "Scatter")
def _scatter_elements(w: GraphWalk, node: gs.Node) -> None:
    data, indices, updates = (w.input_axes(node, i) for i in range(3))
    assert data is not None and indices is not None and updates is not None
    axis = int(node.attrs.get("axis", 0)) % len(data)
    where = f"written to by {node.op} (node '{node.name}')"
    for i, factors in enumerate(zip(data, indices, updates, strict=True)):
        if i == axis or len({w.algebra.size(f) for f in factors}) > 1:
            w.pin(factors, where)
            continue
        w.unify(factors[0], factors[1])
        w.unify(factors[0], factors[2])
    w.output(node, data)


@rule("OneHot")
def _one_hot(w: GraphWalk, node: gs.Node) -> None:
    axes, depth = w.input_axes(node, 0), w.value(node, 1)
    assert axes is not None
    if depth is None:
        w.give_up(node, "OneHot of a depth that is not known")
        return
    axis = int(node.attrs.get("axis", -1)) % (len(axes) + 1)
    classes = w.fresh(int(np.asarray(depth).reshape(-1)[0]), f"made by OneHot (node '{node.name}')")
    w.output(node, (*axes[:axis], classes, *axes[axis:]))


@rule("Pad")
def _pad(w: GraphWalk, node: gs.Node) -> None:
    axes, pads = w.input_axes(node, 0), w.value(node, 1)
    assert axes is not None
    pads = np.asarray(node.attrs["pads"]) if "pads" in node.attrs else pads
    chosen: Array | None = np.arange(len(axes))
    if len(node.inputs) > 3 and present(node.inputs[3]):  # the axes that are padded, in any order
        chosen = w.value(node, 3)
    if pads is None or chosen is None or len(pads) != 2 * len(chosen):
        w.give_up(node, "Pad by widths that are not known")
        return
    where = f"padded (node '{node.name}')"
    result = list(axes)
    for i, axis in enumerate(int(a) % len(axes) for a in chosen):
        factor, before, behind = axes[axis], int(pads[i]), int(pads[i + len(chosen)])
        if before or behind:
            if not w.slid(node, [w.algebra.size(factor) + before + behind]):
                return
            w.pin([factor], where)
            result[axis] = w.fresh(w.algebra.size(factor) + before + behind, where)
    w.output(node, tuple(result))


@rule("ConstantOfShape")
def _constant_of_shape(w: GraphWalk, node: gs.Node) -> None:
    target = w.value(node, 0)
    if target is None:
        w.give_up(node, "ConstantOfShape of a target that is not known")
        return
    result = tuple(w.fresh(int(s)) for s in target)
    for i, factor in enumerate(result):
        w.size_use(node, ("input", 0, i), factor)
    w.output(node, result)


@rule("EyeLike")
def _eye(w: GraphWalk, node: gs.Node) -> None:
    """The diagonal pairs the indices of one axis with those of the other."""
    axes = w.input_axes(node, 0)
    assert axes is not None
    w.pin(axes, f"paired by EyeLike (node '{node.name}')")
    w.output(node, axes)


@rule("Range")
def _range(w: GraphWalk, node: gs.Node) -> None:
    w.output(node, (w.fresh(w.unforeseen(), f"Range of numbers that are not known (node '{node.name}')"),))


@rule("RandomNormalLike", "RandomUniformLike", "Bernoulli")
def _random(w: GraphWalk, node: gs.Node) -> None:
    """Fewer numbers would be others, too."""
    axes = w.input_axes(node, 0)
    assert axes is not None
    w.pin(axes, f"random numbers are drawn for it (node '{node.name}')")
    w.output(node, axes)


# -- what needs the whole axis --------------------------------------------------------------------------------------


@rule("Softmax", "LogSoftmax", "Hardmax", "LpNormalization", "CumSum", "CumProd", "ArgMax", "ArgMin")
def _along_axis(w: GraphWalk, node: gs.Node) -> None:
    axes = w.input_axes(node, 0)
    assert axes is not None
    default = -1 if node.op in ("LpNormalization",) or (w.model.opset >= 13 and node.op not in ("ArgMax", "ArgMin")) else 1
    axis = int(node.attrs.get("axis", 0 if node.op.startswith("Arg") else default))
    if node.op in ("CumSum", "CumProd"):
        known = w.value(node, 1)
        if known is None:
            w.give_up(node, f"{node.op} over an axis that is not known")
            return
        axis = int(known)
    axis %= len(axes)
    coerced = w.model.opset < 13 and node.op in ("Softmax", "LogSoftmax", "Hardmax")
    w.pin(axes[axis:] if coerced else axes[axis : axis + 1], f"{node.op} runs over it (node '{node.name}')")
    if node.op.startswith("Arg"):
        tail = axes[axis + 1 :]
        axes = (*axes[:axis], *((w.fresh(1),) if node.attrs.get("keepdims", 1) else ()), *tail)
    w.output(node, axes)


@rule("TopK")
def _top_k(w: GraphWalk, node: gs.Node) -> None:
    axes, count = w.input_axes(node, 0), w.value(node, 1)
    assert axes is not None
    if count is None:
        w.give_up(node, "TopK of a number that is not known")
        return
    axis = int(node.attrs.get("axis", -1)) % len(axes)
    where = f"TopK runs over it (node '{node.name}')"
    w.pin([axes[axis]], where)
    chosen = w.fresh(int(np.asarray(count).reshape(-1)[0]), where)
    for position in (0, 1):
        w.output(node, (*axes[:axis], chosen, *axes[axis + 1 :]), position)


@rule(*(f"Reduce{kind}" for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")))
def _reduce(w: GraphWalk, node: gs.Node) -> None:
    axes = w.input_axes(node, 0)
    assert axes is not None
    if len(node.inputs) > 1 and present(node.inputs[1]) and w.value(node, 1) is None:
        w.give_up(node, "a reduction over axes that are not known")
        return
    chosen = axes_of([None, w.value(node, 1)], node.attrs, 1)
    if not chosen:
        if node.attrs.get("noop_with_empty_axes", 0):
            w.output(node, axes)
            return
        chosen = list(range(len(axes)))
    gone = {a % len(axes) for a in chosen}
    w.pin([axes[a] for a in gone], f"{node.op} runs over it (node '{node.name}')")
    keep = bool(node.attrs.get("keepdims", 1))
    w.output(node, tuple(w.fresh(1) if i in gone else f for i, f in enumerate(axes) if keep or i not in gone))


@rule("GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool")
def _global_pool(w: GraphWalk, node: gs.Node) -> None:
    axes = w.input_axes(node, 0)
    assert axes is not None
    w.pin(axes[2:], f"{node.op} runs over it (node '{node.name}')")
    w.output(node, (*axes[:2], *(w.fresh(1) for _ in axes[2:])))


@rule("LayerNormalization", "RMSNormalization")
@rule("SimplifiedLayerNormalization")
@rule("LayerNormalization", "SimplifiedLayerNormalization", domain=MICROSOFT)
def _layer_normalization(w: GraphWalk, node: gs.Node) -> None:
    axes = w.input_axes(node, 0)
    assert axes is not None
    axis = int(node.attrs.get("axis", -1)) % len(axes)
    where = f"{node.op} runs over it (node '{node.name}')"
    w.pin(axes[axis:], where)
    for i in range(1, len(node.inputs)):
        extra = w.input_axes(node, i)
        if extra is not None:
            w.broadcast(axes[axis:], extra)
    w.output(node, axes)
    for i in range(1, len(node.outputs)):
        w.output(node, (*axes[:axis], *(w.fresh(1) for _ in axes[axis:])), i)


@rule("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def _skip_layer_normalization(w: GraphWalk, node: gs.Node) -> None:
    x, skip = w.input_axes(node, 0), w.input_axes(node, 1)
    assert x is not None and skip is not None
    axes = w.broadcast(x, skip)
    w.pin(axes[-1:], f"{node.op} runs over it (node '{node.name}')")
    for i in range(2, len(node.inputs)):
        extra = w.input_axes(node, i)
        if extra is not None:
            w.unify(axes[-1], extra[-1])
    w.output(node, axes)
    for i in (1, 2):
        w.output(node, (*axes[:-1], w.fresh(1)), i)
    w.output(node, axes, 3)


@rule("EmbedLayerNormalization", domain=MICROSOFT)
def _embed_layer_normalization(w: GraphWalk, node: gs.Node) -> None:
    ids = w.input_axes(node, 0)
    tables = [w.input_axes(node, i) for i in range(2, 7)]
    assert ids is not None
    known = [t for t in tables if t is not None]
    where = f"{node.op} runs over it (node '{node.name}')"
    for table in known:
        w.pin(table, where)
    hidden = known[0][-1]
    axes = (*ids, hidden)
    w.output(node, axes)
    w.output(node, (ids[0],), 1)
    w.output(node, axes, 2)


__all__ = [
    "MICROSOFT",
    "RULES",
    "ConstantUse",
    "ConsumerUse",
    "GraphWalk",
    "InternalError",
    "SizeUse",
    "ValueUse",
    "experts_product",
    "rule",
    "tensor_attribute",
    "walk",
]
