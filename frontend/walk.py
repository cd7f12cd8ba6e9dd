"""The walk over a graph that says which axes are the same dimension.

:class:`GraphWalk` visits the nodes of a graph once, in topological order. It gives every axis of every tensor a factor
(see :mod:`liar_opt.frontend.axes`); a rule per operator (:mod:`liar_opt.frontend.rules`) says which factors are equal, how
axes are split, merged, cut and joined, and which are pinned. Symbolic dimensions of the graph's inputs are given distinct
prime sizes for the walk, so that every shape is concrete, and small tensors that are computed from shapes have known
values. Two symbols that an operator equates are merged and the walk starts again.

The walk records what a later rewrite has to touch:

* :class:`ConstantUse`: a constant, where it is used, and the factors of its axes;
* :class:`ConsumerUse`: a linear contraction of an activation with a constant, where a repair can be folded;
* :class:`SizeUse`: an attribute or an element of a shape tensor that must equal the size of some factors;
* :class:`ValueUse`: a number that was computed from shapes and enters the data (a scale): it must not change;
* in :attr:`GraphWalk.picks`, where a table that several layers share is read, each with heads of its own (`ties`);
* in :attr:`GraphWalk.others`, the same graph under other sizes of its symbolic dimensions: what holds in all holds;
* in :attr:`GraphWalk.mixed`, axes of a product of two activations: attention weights mix what such an axis holds;
* in :attr:`GraphWalk.batched`, axes along which such products stand side by side: attention heads are among them;
* in :attr:`GraphWalk.channels`, axes that are channels of a convolution or of a normalisation, of which runs are no heads;
* :class:`ProductUse`: a product of two activations, by the axis that is contracted: the width of queries and keys.

An operator without a rule pins every axis that it touches, and is named in :attr:`GraphWalk.unknown`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from liar_opt.frontend.axes import Axes, AxisAlgebra, Factor
from liar_opt.frontend.graph_tensors import constant_value, is_constant, is_float, present
from liar_opt.frontend.model import Model
from liar_opt.frontend.records import Cache, ConstantUse, ConsumerUse, Lookup, ProductUse, SizeUse, ValueUse
from liar_opt.frontend.rules.numbers import VALUE_LIMIT, Array
from liar_opt.frontend.rules.operators import has, operator
from liar_opt.frontend.rules.table import Trait
from liar_opt.frontend.shape_values import MOST_ELEMENTS, evaluate
from liar_opt.frontend.symbols import (
    GROWTH,
    LARGEST_PROBE,
    PATCHES,
    MergeSymbols,
    Misfit,
    Symbols,
    TooShort,
    dimension_key,
    image_axes,
    infer_shapes,
    primes,
    probe_symbols,
)
from liar_opt.frontend.ties import Pick, Tied, freed_reads, tied_reads
from liar_opt.runtime.errors import ModelError
from liar_opt.runtime.memory import free_memory
from liar_opt.runtime.signatures import InputSpec

SMALL = 100
"""Open sizes up to which what a graph makes is small beside what it makes in use."""
APART_LIMIT = 1 << 16
"""Tables of more elements are one where several nodes add them."""


def _inner(shape: Sequence[int | str | None]) -> set[int]:
    """Returns the axes of a cache that have a fixed size, but for the first and the last."""
    return {i for i, d in enumerate(shape[:-1]) if i and isinstance(d, int) and d >= 0}


@dataclass
class GraphWalk:
    """The state of the analysis of one graph; :func:`walk` makes and runs it."""

    model: Model
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
    gone: list[gs.Node] = field(default_factory=list)
    tied: Mapping[tuple[int, int], Tied] = field(default_factory=dict)
    picks: list[Pick] = field(default_factory=list)
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
        tensor, key = node.inputs[position], (id(node), position)
        if key in self._used:
            return self._used[key]
        if key in self.tied:
            return self._picked(node, position)
        if not is_constant(tensor):
            return self.axes.get(tensor.name)
        small = has(node, Trait.ARITHMETIC) and int(np.prod(tensor.shape, dtype=np.int64)) <= APART_LIMIT
        axes = self._constant_axes(tensor, tied=not small)
        self._used[key] = axes
        self.constant_uses.append(ConstantUse(node, position, tensor, axes))
        return axes

    def seen_axes(self, node: gs.Node, position: int) -> Axes:
        """Returns the factors of an input's axes as the walk saw them; none where it did not ask."""
        tensor = node.inputs[position]
        return self._used.get((id(node), position)) or (not is_constant(tensor) and self.axes.get(tensor.name)) or ()

    def axes_of(self, node: gs.Node, position: int = 0) -> Axes:
        """Returns the factors of an input's axes; no rule is asked of a node with an input of unknown shape."""
        axes = self.input_axes(node, position)
        assert axes is not None
        return axes

    def _picked(self, node: gs.Node, position: int) -> Axes | None:
        """Returns the axes of a table whose heads are, here, those of one layer alone."""
        tensor, (axis, heads, inner, _) = node.inputs[position], self.tied[id(node), position]
        axes = self._constant_axes(tensor, tied=True) if is_constant(tensor) else self.axes.get(tensor.name)
        if axes is None:
            return None
        outer = self.algebra.size(axes[axis]) // (heads * inner)
        parts = self.algebra.split(axes[axis], [outer, heads, inner])
        own = self.algebra.merge([self.algebra.fresh(heads), parts[2]])
        self.picks.append(Pick(node, position, axis, own))
        self._used[id(node), position] = (*axes[:axis], self.algebra.merge([parts[0], own]), *axes[axis + 1 :])
        return self._used[id(node), position]

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

    def is_open(self, size: int) -> bool:
        """Returns whether a probe size stands for one that the graph leaves open."""
        return size in self._dynamic

    def equate(self, a: int, b: int) -> None:
        """Starts the walk again where two sizes must be equal and are so if symbolic dimensions are chosen well."""
        if a == b or self._dynamic.isdisjoint((a, b)) or frozenset((a, b)) in self.apart or not self.merging:
            return
        if {a, b} <= self._dynamic | {x + y for x in self._dynamic for y in self._dynamic}:
            raise MergeSymbols(a, b)

    def alone(self, sizes: Sequence[int], target: Sequence[int]) -> None:
        """Raises ``MergeSymbols`` if setting one symbol to 1 makes prod(sizes) == prod(target): the walk starts again."""
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
        while root.inputs and has(root.inputs[0], Trait.KEEPS_ORDER) and not is_constant(root.inputs[0].inputs[0]):
            root = root.inputs[0].inputs[0]
        for known in self.lookups.values():
            if known.root is root and self.algebra.size(known.stack) == self.algebra.size(stack):
                self.algebra.unify(known.stack, stack)
        self.lookups[node.outputs[0].name] = Lookup(node, numbers, root, stack)

    def taken_from_weights(self, tensor: gs.Tensor) -> bool:
        """Returns whether a tensor is looked up in a constant."""
        return bool(tensor.inputs) and has(tensor.inputs[0], Trait.LOOKS_UP) and is_constant(tensor.inputs[0].inputs[0])

    def cache(self, past: gs.Tensor, present: gs.Tensor, axis: int) -> None:
        """Records that ``past`` comes back as ``present``, longer along ``axis``, if they are a graph input and output.

        Between them and the graph's ends nothing may be but Cast and Identity.
        """
        while past.inputs and has(past.inputs[0], Trait.COPIES):
            past = past.inputs[0].inputs[0]
        ends = {t.name for t in self.model.graph.outputs}
        copies = [present, *(o for n in present.outputs if has(n, Trait.COPIES) for o in n.outputs)]
        found = [t.name for t in copies if t.name in ends]
        axes = self.axes.get(past.name)
        if found and axes is not None and any(past is t for t in self.model.graph.inputs):
            self.caches[past.name] = Cache(past.name, found[0], axis % len(axes))

    def need(self, node: gs.Node, position: int, axis: int, size: int) -> None:
        """Says what the size of an axis of an input has to be, which the graph may not declare of its own inputs."""
        if not node.inputs[position].inputs:
            self.needed[node.inputs[position].name, axis] = size

    def forget(self, nodes: Sequence[gs.Node]) -> None:
        """Drops what was recorded of nodes that are in the graph no more."""
        gone = set(map(id, nodes))
        self.gone += nodes  # records are found by identity: none of theirs may be taken by another node
        self.constant_uses = [u for u in self.constant_uses if id(u.node) not in gone]
        self.consumers = [u for u in self.consumers if id(u.node) not in gone]
        self.size_uses = [u for u in self.size_uses if id(u.node) not in gone]
        self.value_uses = [u for u in self.value_uses if id(u.node) not in gone]
        self.products = [u for u in self.products if id(u.node) not in gone]

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
            self._require_room(node)
        self._spare()
        for what, tensors in (("input", self.model.graph.inputs), ("output", self.model.graph.outputs)):
            for tensor in tensors:
                axes = None if is_constant(tensor) else self.axes.get(tensor.name)
                if is_constant(tensor):  # a weight that is handed out keeps its shape wherever it is read
                    axes = tuple(f for use in self.constant_uses if use.constant.name == tensor.name for f in use.axes)
                pinned = [f for i, f in enumerate(axes or ()) if i not in self.spared.get(tensor.name, ())]
                self.pin(pinned, f"axis of graph {what} '{tensor.name}'")

    def _require_room(self, node: gs.Node) -> None:
        """Checks that a tensor could be held, where open sizes are small: a short chain doubles one to any size.

        Raises:
            ModelError: no machine like this one holds it.
        """
        if max(self.symbols.values(), default=1) > SMALL:
            return
        for tensor in node.outputs:
            made = math.prod(self.shape(self.axes.get(tensor.name) or ()))
            if made > MOST_ELEMENTS and made > free_memory():
                raise ModelError(
                    f"node '{node.name}' ({node.op}) makes a tensor of {made:,} elements, more than this machine holds; "
                    "export it for smaller inputs"
                )

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
        function = operator(node.domain, node.op, self.model.opset).rule
        opaque = any(present(t) and self.input_axes(node, i) is None for i, t in enumerate(node.inputs))
        if opaque and has(node, Trait.SHAPES):
            self.give_up(node, f"an input of unknown shape at {node.op}")
            return
        if function is None or any(isinstance(v, gs.Graph) for v in node.attrs.values()):
            self._note_values(node)
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
            self._note_values(node)
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
        self._note_values(node)

    def _note_values(self, node: gs.Node) -> None:
        """Records the inputs of a node that say numbers computed from shapes, but for those that are sizes of its own."""
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
            self._note_values(node)
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
        if has(node, Trait.SHAPES):
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
        has(node, Trait.LINEAR) and any(is_constant(t) and len(t.shape) > 1 for t in node.inputs) for node in graph.nodes
    )
    return own + sum(_products_inside(v) for n in graph.nodes for v in n.attrs.values() if isinstance(v, gs.Graph))


def shape_value(node: gs.Node, sizes: Sequence[int]) -> Array:
    """Returns what a Shape or Size node gives for an input of ``sizes``."""
    if node.op == "Size":
        return np.asarray(np.prod(sizes, dtype=np.int64))
    return np.asarray(sizes, np.int64)[slice(node.attrs.get("start", 0), node.attrs.get("end"))]


def walk(model: Model) -> GraphWalk:
    """Analyses a normalised graph, which is not changed, and returns the walk, run to its end."""
    symbols, apart = Symbols(probe_symbols(model)), set[frozenset[int]]()
    images = image_axes(model)
    plain, choosy = symbols, bool(images)
    tied: Mapping[tuple[int, int], Tied] | None = None
    while True:
        growing = 1 < max(symbols.free.values(), default=1) < LARGEST_PROBE
        state = GraphWalk(
            model, symbols.sizes(), apart=apart, growing=growing, choosy=choosy, images=bool(images), tied=tied or {}
        )
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
        found = {} if model.tied else tied_reads(state) if tied is None else freed_reads(state)
        if len(found) == len(state.tied):
            break
        tied = found  # once more, with heads of its own for each layer
    if symbols.free:
        _mark_dynamic(state, symbols)
    for tensor in model.graph.inputs:
        for axis, size in enumerate(state.input_sizes(tensor) if tensor.shape is not None else ()):
            if size == 1 and (not isinstance(tensor.shape[axis], int) or tensor.shape[axis] < 0):
                state.needed[tensor.name, axis] = 1
    return state


def _mark_dynamic(state: GraphWalk, symbols: Symbols) -> None:
    """Marks the numbers that change when the symbolic sizes do, by a second walk under other sizes, which is kept."""
    other = GraphWalk(state.model, symbols.renamed().sizes(), merging=False, tied=state.tied)
    other.run()
    state.others.append(other)
    sizes = {(id(u.node), u.where): u.value for u in other.size_uses}
    values = {(id(u.node), u.position): u.value for u in other.value_uses}
    state.size_uses = [replace(u, dynamic=sizes.get((id(u.node), u.where)) != u.value) for u in state.size_uses]
    state.value_uses = [
        replace(u, dynamic=not np.array_equal(u.value, values.get((id(u.node), u.position), ()))) for u in state.value_uses
    ]


def count_flops(model: Model, feeds: dict[str, Array]) -> int | None:
    """Returns the floating-point operations of all contractions for inputs of the shapes of ``feeds``.

    A multiplication and an addition are two operations; pointwise operators and softmax are not counted. None where the
    graph's inputs have other names or ranks.
    """
    state = walk_sized(model, feeds)
    return None if state is None else state.flops


def walk_sized(model: Model, feeds: Mapping[str, Array]) -> GraphWalk | None:
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
