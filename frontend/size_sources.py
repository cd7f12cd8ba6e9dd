"""Numbers that say sizes: what they are under several sizes of the graph's inputs, and which operands make them so.

Exporters write ``[batch x heads, -1, width / heads]`` as arithmetic on shapes. Once heads have gone, such a number must be
another one, for inputs of any size. :class:`Probe` says what it is under one choice of the symbolic sizes; a claim about a
number is made for all probes of a graph, which share no size, so that none holds by coincidence.

:func:`operands` walks back from a number to the operands that make it: of a product the factor, of a quotient the dividend
or the divisor, of a sum the other part, through whatever only moves elements about. Nothing else is a size: not the index
of a Gather, not an axis, not the bounds of a Slice that selects from a shape, whatever their values are.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from liar_opt.frontend.graph_tensors import is_constant, present
from liar_opt.frontend.records import SizeUse
from liar_opt.frontend.rules.numbers import Array
from liar_opt.frontend.rules.operators import MOVERS, has
from liar_opt.frontend.rules.table import Trait
from liar_opt.frontend.shape_values import evaluate
from liar_opt.frontend.walk import GraphWalk, shape_value

Mask = NDArray[np.bool_]
Place = tuple[int, int]
"""Identity of a node and position of an input."""
Number = int | float
Wanted = Mapping[int, tuple[Number, ...]]
"""For elements of a tensor what they must be, under each probe."""

MOVED = MOVERS | Trait.LOOKS_UP | Trait.SLICES
"""Operators that move the elements of their first input about."""
DEEPEST = 64
"""Arithmetic on sizes of more steps is not followed."""


class Probe:
    """The sizes of one analysis as they are after some cuts; the analysis itself stays as it was.

    Attributes:
        walk: the analysis, under one choice of the symbolic sizes.
        kept: of leaves that were cut, which indices stay: [size], or [heads, size] where each head has its own.
        cutting: those of them that are being cut now.
    """

    def __init__(self, walk: GraphWalk, kept: dict[int, Mask] | None = None) -> None:
        self.walk = walk
        self.kept: dict[int, Mask] = {} if kept is None else kept
        self.cutting: set[int] = set()

    def before(self) -> "Probe":
        """Returns the sizes without what is being cut now."""
        return Probe(self.walk, {leaf: kept for leaf, kept in self.kept.items() if leaf not in self.cutting})

    def size(self, factor: int) -> int:
        """Returns how many indices of ``factor`` are left."""
        algebra = self.walk.algebra
        root = algebra.find(factor)
        if root in self.kept:
            return int(self.kept[root].reshape(-1, algebra.size(root))[0].sum())
        refinement = algebra.refinement(root)
        if refinement is None:
            return algebra.size(root)
        sizes = [self.size(part) for part in refinement.parts]
        return int(np.prod(sizes)) if refinement.kind == "product" else sum(sizes)

    def sizes(self, node: gs.Node, position: int) -> list[int] | None:
        """Returns the shape of an input of a node, or None where it is not known."""
        axes = self.walk.input_axes(node, position)
        return None if axes is None else [self.size(f) for f in axes]

    def touched(self, use: SizeUse) -> bool:
        """Returns whether what is being cut now changes what a number must be."""
        leaves = self.walk.algebra.leaves
        return any(not self.cutting.isdisjoint(leaves(f)) for f in (*use.factors, *use.watched))

    @cached_property
    def _uses(self) -> dict[tuple[int, str, int | str], dict[int, SizeUse]]:
        result: dict[tuple[int, str, int | str], dict[int, SizeUse]] = defaultdict(dict)
        for use in self.walk.size_uses:
            kind, place, element = use.where
            result[id(use.node), kind, place][element] = use
        return result

    def uses(self, node: gs.Node, place: int) -> dict[int, SizeUse]:
        """Returns the records of the elements of a shape tensor, by element."""
        return self._uses.get((id(node), "input", place), {})

    def evaluate(
        self, tensor: gs.Tensor, known: dict[int, Array | None], overrides: Mapping[Place, Array] | None = None
    ) -> Array | None:
        """Returns the value of a tensor computed from shapes, under the sizes that are left, or None.

        Args:
            tensor: the tensor.
            known: values found before, by the identity of the tensor; it is added to.
            overrides: other values of inputs of nodes behind it.
        """
        if is_constant(tensor):
            return np.asarray(tensor.values)
        if id(tensor) not in known:
            known[id(tensor)] = self._computed(tensor, known, overrides or {}) if tensor.inputs else None
        return known[id(tensor)]

    def _computed(
        self, tensor: gs.Tensor, known: dict[int, Array | None], overrides: Mapping[Place, Array]
    ) -> Array | None:
        node = tensor.inputs[0]
        if has(node, Trait.SHAPES):
            source = node.inputs[0]
            axes = self.walk.axes.get(source.name)
            if is_constant(source):
                return shape_value(node, list(source.shape))
            return None if axes is None else shape_value(node, [self.size(f) for f in axes])
        inputs: list[Array | None] = []
        for position, source in enumerate(node.inputs):
            value = overrides.get((id(node), position))
            if value is None and present(source):
                value = self.evaluate(source, known, overrides)
                if value is None:
                    return None
            inputs.append(value)
        outputs = evaluate(node.op, inputs, node.attrs)
        return None if outputs is None else outputs[next(i for i, t in enumerate(node.outputs) if t is tensor)]


def counterparts(walk: GraphWalk, other: GraphWalk) -> Callable[[int], int | None]:
    """Returns what finds the leaf of another analysis of the same graph that is a leaf of this one.

    They are the same where every constant that has the one has the other, at the same positions of the same axis.
    """
    mine: dict[int, list[tuple[Place, int, int]]] = defaultdict(list)
    for use in walk.constant_uses:
        for axis, factor in enumerate(use.axes):
            for leaf in set(walk.algebra.leaves(factor)):
                mine[leaf].append(((id(use.node), use.position), axis, factor))
    theirs = {(id(use.node), use.position): use.axes for use in other.constant_uses}

    def counterpart(leaf: int) -> int | None:
        result: set[int | None] = set()
        for place, axis, factor in mine[leaf]:
            if place not in theirs or walk.algebra.repeats(factor, leaf):
                return None
            twin = theirs[place][axis]
            owners = walk.algebra.owners(factor, leaf)
            alike = {
                found
                for found in set(other.algebra.leaves(twin))
                if not other.algebra.repeats(twin, found) and np.array_equal(other.algebra.owners(twin, found), owners)
            }
            result |= alike if len(alike) == 1 else {None}
        return result.pop() if len(result) == 1 else None

    return counterpart


def is_written(probe: Probe, tensor: gs.Tensor, element: int) -> bool:
    """Returns whether an element of a shape tensor is a constant of the graph and not computed."""
    if is_constant(tensor):
        return True
    node = tensor.inputs[0] if tensor.inputs else None
    if node is None or not has(node, Trait.KEEPS_ORDER | Trait.JOINS):
        return False
    if not has(node, Trait.JOINS):
        return is_written(probe, node.inputs[0], element)
    for piece in node.inputs:
        value = probe.evaluate(piece, {})
        if value is None or value.ndim != 1:
            return False
        if element < value.size:
            return is_written(probe, piece, element)
        element -= value.size
    return False


def operands(probes: Sequence[Probe], tensor: gs.Tensor, wanted: Wanted) -> dict[Place, Array] | None:
    """Returns which inputs of nodes behind ``tensor`` to replace by constants so that its elements are what is wanted.

    Args:
        probes: the sizes to hold under.
        tensor: computed from shapes.
        wanted: what some of its elements must be; the others may be anything.

    Returns:
        The new constants, or None where there are none that hold under all probes. What several numbers behind the tensor
        share may be replaced for all: the caller evaluates the whole once more.
    """
    return _Solver(probes).solve(tensor, wanted, 0)


class _Solver:
    """Walks back from a number, operator by operator, to operands that can be constants."""

    def __init__(self, probes: Sequence[Probe]) -> None:
        self.probes = probes
        self.known: list[dict[int, Array | None]] = [{} for _ in probes]

    def values(self, tensor: gs.Tensor) -> list[Array] | None:
        found = [p.evaluate(tensor, known) for p, known in zip(self.probes, self.known, strict=True)]
        values = [v for v in found if v is not None]
        return values if len(values) == len(found) and len({v.shape for v in values}) == 1 else None

    def solve(self, tensor: gs.Tensor, wanted: Wanted, depth: int) -> dict[Place, Array] | None:
        if is_constant(tensor) or not tensor.inputs or depth > DEEPEST:
            return None
        node = tensor.inputs[0]
        if has(node, Trait.SHAPES) or len(node.outputs) != 1:
            return None
        inputs = [self.values(t) if present(t) else [] for t in node.inputs]
        if any(values is None for values in inputs):
            return None
        choices = list(_choices(node, [v or [] for v in inputs], wanted))
        # A constant is replaced rather than what is computed beside it.
        choices.sort(key=lambda choice: not all(is_constant(node.inputs[p]) for p in choice))
        for choice in choices:
            result: dict[Place, Array] = {}
            for position, inner in choice.items():
                part = self._meet(node, position, inner, depth)
                if part is None or any(k in result and not np.array_equal(result[k], v) for k, v in part.items()):
                    break
                result |= part
            else:
                return result
        return None

    def _meet(self, node: gs.Node, position: int, wanted: Wanted, depth: int) -> dict[Place, Array] | None:
        source = node.inputs[position]
        values = self.values(source)
        if values is None:
            return None
        flat = [v.reshape(-1) for v in values]
        if all(v[e] == n for e, numbers in wanted.items() for v, n in zip(flat, numbers, strict=True)):
            return {}
        others = [np.delete(v, list(wanted)) for v in flat]
        static = all(len(set(numbers)) == 1 for numbers in wanted.values())
        if static and all(np.array_equal(others[0], o) for o in others[1:]):
            new = np.array(flat[0])
            for element, numbers in wanted.items():
                new[element] = numbers[0]
            if all(new[e] == numbers[0] for e, numbers in wanted.items()):
                return {(id(node), position): new.reshape(values[0].shape)}
        return self.solve(source, wanted, depth + 1)


def _choices(node: gs.Node, inputs: list[list[Array]], wanted: Wanted) -> Iterator[dict[int, Wanted]]:
    """Yields, for each way to make the outputs of a node what is wanted, what its inputs must be."""
    if has(node, MOVED):
        yield from _moved(node, inputs, wanted)
    elif node.op in ("Ceil", "Floor", "Round"):
        yield {0: wanted}
    elif node.op == "Concat" and all(v[0].ndim == 1 for v in inputs):
        ends = np.cumsum([v[0].size for v in inputs])
        parts: dict[int, dict[int, tuple[Number, ...]]] = defaultdict(dict)
        for element, numbers in wanted.items():
            piece = int(np.searchsorted(ends, element, side="right"))
            parts[piece][element - int(ends[piece]) + inputs[piece][0].size] = numbers
        yield dict(parts)
    elif has(node, Trait.ARITHMETIC | Trait.EXTREMES) and len(inputs) == 2:
        for position in (1, 0):
            yield from _factor(node.op, position, inputs, wanted)
    elif node.op == "ReduceProd" and set(wanted) == {0}:
        for element in range(inputs[0][0].size):
            others = [np.prod(np.delete(v.reshape(-1), element)) for v in inputs[0]]
            quotients = [_exact(w, int(o)) for w, o in zip(wanted[0], others, strict=True)]
            if None not in quotients:
                yield {0: {element: tuple(q for q in quotients if q is not None)}}
    elif node.op == "Where":
        yield from _chosen(inputs, wanted)


def _moved(node: gs.Node, inputs: list[list[Array]], wanted: Wanted) -> Iterator[dict[int, Wanted]]:
    """Follows elements through an operator that moves them, by moving their positions."""
    sources: list[NDArray[np.int64]] = []
    for k, data in enumerate(inputs[0]):
        positions = np.arange(data.size).reshape(data.shape)
        rest = [values[k] if values else None for values in inputs[1:]]
        found = [positions] if node.op == "Cast" else evaluate(node.op, [positions, *rest], node.attrs)
        if found is None:
            return
        sources.append(found[0].reshape(-1))
    result: dict[int, tuple[Number, ...]] = {}
    for element, numbers in wanted.items():
        places = {int(s[element]) for s in sources}
        if len(places) != 1 or result.setdefault(places.pop(), numbers) != numbers:
            return
    yield {0: result}


def _aligned(arrays: Sequence[Array]) -> list[NDArray[np.int64]]:
    """Returns, for each operand of a pointwise operator, which of its elements each element of the result is made of."""
    shape = np.broadcast_shapes(*(a.shape for a in arrays))
    return [np.broadcast_to(np.arange(a.size).reshape(a.shape), shape).reshape(-1) for a in arrays]


def _exact(number: Number, divisor: Number) -> Number | None:
    """Returns the quotient, or None where it is no whole number."""
    if divisor == 0 or number % divisor:
        return None
    return number // divisor


def _factor(op: str, position: int, inputs: list[list[Array]], wanted: Wanted) -> Iterator[dict[int, Wanted]]:
    """Solves a op b = wanted for the operand at ``position``."""
    places = _aligned([values[0] for values in inputs])
    result: dict[int, tuple[Number, ...]] = {}
    for element, numbers in wanted.items():
        solved: list[Number] = []
        for k, number in enumerate(numbers):
            other = inputs[1 - position][k].reshape(-1)[places[1 - position][element]].item()
            found: Number | None
            if op == "Mul":
                found = _exact(number, other)
            elif op == "Div":
                found = number * other if position == 0 else _exact(other, number)
            elif op in ("Max", "Min"):
                found = number
            elif op == "Sub" and position == 1:
                found = other - number
            else:
                found = number - other if op == "Add" else number + other
            if found is None:
                return
            solved.append(found)
        if result.setdefault(int(places[position][element]), tuple(solved)) != tuple(solved):
            return
    yield {position: result}


def _chosen(inputs: list[list[Array]], wanted: Wanted) -> Iterator[dict[int, Wanted]]:
    """Follows the elements that a Where takes, as its condition is."""
    places = _aligned([values[0] for values in inputs])
    result: dict[int, dict[int, tuple[Number, ...]]] = defaultdict(dict)
    for element, numbers in wanted.items():
        sides = {1 if c.reshape(-1)[places[0][element]] else 2 for c in inputs[0]}
        if len(sides) != 1:
            return
        side = sides.pop()
        if result[side].setdefault(int(places[side][element]), numbers) != numbers:
            return
    yield dict(result)
