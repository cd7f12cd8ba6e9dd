"""Between the constants that make a width and those that read it: is everything linear along that width?

Indices of a width may go whatever happens between; its *basis* may change (x -> x T on one side, the inverse on the other)
only where every operator between treats the channels alike and mixes none of them: layouts, token mixing by a product with
something that has not the width, a factor without the width, sums of tensors that have it. :func:`sources_of` proves that
operator by operator and returns the constants that the change goes into, or says what stands between.

For queries and keys, whose widths are one dimension that two tensors have, :func:`operands_of` follows both inputs of their
product back: through the same operators, and through the Split or Slice of a packed projection, whose part is remembered.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from liar_opt.frontend.graph_tensors import STANDARD, is_constant, present
from liar_opt.frontend.records import ConstantUse, ProductUse
from liar_opt.frontend.rules.numbers import slice_arguments, slice_bounds, slices
from liar_opt.frontend.rules.operators import MOVERS, has, operator
from liar_opt.frontend.rules.table import ATEN, Trait
from liar_opt.frontend.walk import GraphWalk

if TYPE_CHECKING:
    from liar_opt.frontend.axes import Factor


LAYOUT = MOVERS | Trait.DROPS | Trait.JOINS | Trait.LOOKS_UP | Trait.SLICES | Trait.SPLITS
"""Operators that move elements about and compute nothing."""


@dataclass(frozen=True, eq=False)
class Source:
    """A constant that gives a width its channels: along ``axis`` of the constant, at the positions ``inside``, bool [n]."""

    use: ConstantUse
    axis: int
    inside: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Operand:
    """One input of a product of two activations, where heads and width are side by side in one axis.

    Attributes:
        node: the product.
        activation: the tensor to be measured.
        activation_axis: its axis that holds heads and width.
        width: that axis' factor; in a packed projection it holds more.
        inside: the positions of that axis that belong to this operand, bool [n].
        sources: the constants that its channels come from.
        relative: whether only differences between its rows matter: keys under a Softmax.
    """

    node: gs.Node
    activation: gs.Variable
    activation_axis: int
    width: Factor
    inside: NDArray[np.bool_]
    sources: tuple[Source, ...] = ()
    relative: bool = False


class Bent(Exception):
    """Something stands between that is not linear along the width; the message says what."""


def sources_of(walk: GraphWalk, leaf: Factor, nodes: Iterable[gs.Node], consumers: Iterable[gs.Node]) -> tuple[Source, ...]:
    """Returns the constants behind a width, in the walk's order; the weights that contract it are left out.

    Args:
        walk: the analysis.
        leaf: the width.
        nodes: all nodes that touch it.
        consumers: those that contract it with a weight.

    Raises:
        Bent: an operator between is not linear along it.
    """
    ends = {id(n) for n in consumers}
    for node in nodes:
        if id(node) not in ends:
            _require_linear(walk, leaf, node)
    found = []
    for use in walk.constant_uses:
        axes = [i for i, f in enumerate(use.axes) if leaf in walk.algebra.leaves(f)]
        if not axes:
            continue
        contracted = any(u.node is use.node and u.weight_position == use.position and [u.weight_axis] == axes
                         for u in walk.consumers)  # fmt: skip
        if contracted and id(use.node) in ends:
            continue
        if len(axes) > 1:
            raise Bent(f"constant '{use.constant.name}' has the width twice")
        found.append(Source(use, axes[0], walk.algebra.owners(use.axes[axes[0]], leaf) >= 0))
    return tuple(found)


def operands_of(
    walk: GraphWalk, product: ProductUse, leaf: Factor, outer: Factor | None, nodes: Iterable[gs.Node]
) -> tuple[Operand, Operand]:
    """Returns both sides of a product of queries and keys.

    Args:
        walk: the analysis.
        product: the product that contracts ``leaf``.
        leaf: the width of queries and keys.
        outer: counts the heads; None where there is one.
        nodes: all nodes that touch the width.

    Raises:
        Bent: an operator between is not linear along it, or the sides cannot be told apart.
    """
    sides = [_Side(walk, leaf, outer, product.node, tensor) for tensor in product.node.inputs[:2]]
    seen = {id(product.node)} | sides[0].seen | sides[1].seen
    for node in nodes:
        cuts_away = has(node, LAYOUT) and not any(_has(walk, leaf, walk.axes.get(t.name)) for t in node.outputs)
        if id(node) not in seen and not cuts_away and not _is_shape(walk, node):
            raise Bent(f"'{node.name}' ({node.op}) reads the same width")
    covered: dict[tuple[int, int], list[NDArray[np.bool_]]] = {}
    for source in (s for side in sides for s in side.sources):
        covered.setdefault((id(source.use.constant), source.axis), []).append(source.inside)
    for source in (s for side in sides for s in side.sources):
        everything = walk.algebra.owners(source.use.axes[source.axis], leaf) >= 0
        if not np.array_equal(np.sum(covered[id(source.use.constant), source.axis], axis=0), everything):
            raise Bent(f"queries and keys cannot be told apart in '{source.use.constant.name}'")
    return sides[0].operand(False), sides[1].operand(_is_relative(walk, product.node))


def _is_relative(walk: GraphWalk, node: gs.Node) -> bool:
    """Returns whether a Softmax runs over the rows of a product's second input, which does not see what they share."""
    if has(node, Trait.MIXES):
        return True
    if node.op.lower() == "einsum":
        return False
    tensor = node.outputs[0]
    while len(tensor.outputs) == 1:
        reader = tensor.outputs[0]
        if has(reader, Trait.SHARES):
            rank, default = len(walk.axes[tensor.name] or ()), -1 if walk.model.opset >= 13 else 1
            return int(reader.attrs.get("dim", reader.attrs.get("axis", default))) % max(rank, 1) == rank - 1
        if not has(reader, Trait.SUMS | Trait.SCALES | Trait.CHOOSES | Trait.COPIES):
            return False
        if has(reader, Trait.SCALES) and any(
            _last(walk, reader, i) > 1 for i, t in enumerate(reader.inputs) if t is not tensor
        ):
            return False  # a factor of each key: what the keys share is not shared by their logits
        tensor = reader.outputs[0]
    return False


def _last(walk: GraphWalk, node: gs.Node, position: int) -> int:
    """Returns the size of the last axis of an input, 1 where it has none."""
    axes = walk.input_axes(node, position) or ()
    return walk.algebra.size(axes[-1]) if axes else 1


@dataclass(frozen=True)
class _Window:
    """The part [start, stop) of a packed axis."""

    factor: Factor
    start: int
    stop: int


class _Side:
    """One side of a product, followed back to its constants."""

    def __init__(self, walk: GraphWalk, leaf: Factor, outer: Factor | None, product: gs.Node, tensor: gs.Tensor) -> None:
        self.walk, self.leaf, self.outer, self.product = walk, leaf, outer, product
        self.seen: set[int] = set()
        self.sources: list[Source] = []
        self.found: Operand | None = None
        self.mixed = False  # something that changes moments lies behind
        self._follow(tensor, None)

    def operand(self, relative: bool) -> Operand:
        if self.found is None:
            raise Bent("heads and width are never side by side in one axis")
        return replace(self.found, sources=tuple(self.sources), relative=relative)

    def _follow(self, tensor: gs.Tensor, window: _Window | None) -> None:
        if not tensor.inputs:
            raise Bent(f"the width comes from '{tensor.name}'")
        if self.found is None and not self.mixed:
            self.found = self._measurable(tensor, window)
        node = tensor.inputs[0]
        _require_linear(self.walk, self.leaf, node)
        self.seen.add(id(node))
        carrying = [(i, t) for i, t in enumerate(node.inputs) if present(t) and self._has(node, i)]
        scalar = has(node, Trait.SCALES) and all(
            self.walk.algebra.size(f) == 1 for i, t in enumerate(node.inputs) if i != carrying[0][0]
            for f in self.walk.input_axes(node, i) or ()
        )  # fmt: skip
        if not (has(node, LAYOUT) or scalar):
            self.mixed = True
        inner = self._cut(node, tensor, window)
        for position, source in carrying:
            if is_constant(source):
                self._add(node, position, inner)
            else:
                self._follow(source, inner)

    def _has(self, node: gs.Node, position: int) -> bool:
        return _has(self.walk, self.leaf, self.walk.input_axes(node, position))

    def _cut(self, node: gs.Node, tensor: gs.Tensor, window: _Window | None) -> _Window | None:
        """Returns the part of a packed axis that a Split or a Slice gives to ``tensor``; other nodes change nothing."""
        if not has(node, Trait.SPLITS | Trait.SLICES | Trait.LOOKS_UP | Trait.JOINS):
            return window
        axes, result = self.walk.input_axes(node, 0) or (), self.walk.axes[tensor.name] or ()
        places = [i for i, f in enumerate(axes) if self.leaf in self.walk.algebra.leaves(f)]
        if len(axes) == len(result) and all(self.walk.algebra.same(axes[i], result[i]) for i in places):
            return window
        if window is not None or len(places) != 1 or not has(node, Trait.SPLITS | Trait.SLICES):
            raise Bent(f"queries and keys are packed in a way that is not followed (node '{node.name}')")
        place = places[0]
        if has(node, Trait.SPLITS):
            made = [self.walk.axes[t.name] if present(t) else None for t in node.outputs]
            sizes = [0 if own is None else self.walk.algebra.size(own[place]) for own in made]
            index = next(i for i, t in enumerate(node.outputs) if t is tensor)
            return _Window(axes[place], sum(sizes[:index]), sum(sizes[: index + 1]))
        if node.domain == ATEN:
            bounds = slice_bounds(node.attrs)
        else:
            arguments = slice_arguments([None, *(self.walk.value(node, i) for i in range(1, 5))], node.attrs)
            assert arguments is not None  # the rule gave up otherwise
            bounds = slices(len(axes), *arguments)[place]
        start, stop, _ = bounds.indices(self.walk.algebra.size(axes[place]))
        return _Window(axes[place], start, stop)

    def _inside(self, factor: Factor, window: _Window | None) -> NDArray[np.bool_]:
        inside = self.walk.algebra.owners(factor, self.leaf) >= 0
        if window is not None:
            if not self.walk.algebra.same(factor, window.factor):
                raise Bent("queries and keys are packed in a way that is not followed")
            inside = inside & (np.arange(inside.size) >= window.start) & (np.arange(inside.size) < window.stop)
        return np.asarray(inside)

    def _add(self, node: gs.Node, position: int, window: _Window | None) -> None:
        uses = [u for u in self.walk.constant_uses if u.node is node and u.position == position]
        for use in uses:
            places = [i for i, f in enumerate(use.axes) if self.leaf in self.walk.algebra.leaves(f)]
            if len(places) != 1:
                raise Bent(f"constant '{use.constant.name}' has the width twice")
            self.sources.append(Source(use, places[0], self._inside(use.axes[places[0]], window)))

    def _measurable(self, tensor: gs.Tensor, window: _Window | None) -> Operand | None:
        """Returns where the operand can be measured: at this tensor, if one axis holds heads and width."""
        algebra = self.walk.algebra
        for axis, factor in enumerate(self.walk.axes[tensor.name] or ()):
            if self.leaf not in algebra.leaves(factor):
                continue
            packed = window is not None and algebra.same(factor, window.factor)
            inside = self._inside(factor, window if packed else None)
            beside = self.outer is None or bool(np.all(algebra.owners(factor, self.outer)[inside] >= 0))
            if beside and isinstance(tensor, gs.Variable):
                return Operand(self.product, tensor, axis, factor, inside)
        return None


def _has(walk: GraphWalk, leaf: Factor, axes: Sequence[Factor] | None) -> bool:
    return any(leaf in walk.algebra.leaves(f) for f in axes or ())


def _is_shape(walk: GraphWalk, node: gs.Node) -> bool:
    """Returns whether a node only asks for a shape."""
    return has(node, Trait.SHAPES) or all(t.name in walk.values for t in node.outputs if present(t))


def _require_linear(walk: GraphWalk, leaf: Factor, node: gs.Node) -> None:
    """Checks that a node keeps a width linear: that it mixes none of its channels and treats all alike.

    Raises:
        Bent: it does not, or is not known to.
    """
    if _is_shape(walk, node):
        return
    held = [_has(walk, leaf, walk.input_axes(node, i)) for i in range(len(node.inputs))]
    name = f"'{node.name}' ({node.op}) between"
    if has(node, Trait.LINEAR):
        # A constant with the width is a projection that makes it, or a bias that is added to its result.
        added = operator(node.domain, node.op).summand
        rest = [own for i, own in enumerate(held) if i != added]
        if added is not None and added < len(held) and present(node.inputs[added]) and not held[added]:
            raise Bent(f"{name} adds the same to all channels")
        if sum(rest) == 1 and any(_has(walk, leaf, walk.axes.get(t.name)) for t in node.outputs):
            return
        raise Bent(f"{name} contracts it, or has it on both sides")
    if node.domain not in (*STANDARD, ATEN):
        raise Bent(f"{name} is not known to be linear")
    if has(node, Trait.MIXES):
        if held[2] and not any(held[:2]) and not any(held[3:]):
            return
        raise Bent(f"{name} needs it whole")
    if has(node, LAYOUT):
        return
    if has(node, Trait.SUMS):
        if all(held) and "other" not in node.attrs:
            return
        raise Bent(f"{name} adds the same to all channels")
    if has(node, Trait.SCALES) and node.attrs.get("rounding_mode") is None:
        if sum(held) == 1 and (held[0] or node.op.lower() != "div"):
            return
        raise Bent(f"{name} scales each channel by its own")
    raise Bent(f"{name} is not linear")
