"""Weights that a graph computes from weights alone, folded before the graph is analysed.

Parametrisations are written so: weight_norm (v g / |v|), spectral_norm (W / sigma), LoRA (W + s B A), weights that are put
together from parts. What is computed from constants alone falls into parts that share no weight. A part is folded if one
of its results is the weight of a contraction, and if the file does not grow: its results, stored, take no more bytes than
the weights that nobody reads any more. Otherwise the part stays as it is, and the reason is said.

Before:  n = ReduceL2(v)   u = Div(v, n)   w = Mul(u, g)   y = MatMul(x, w).    After:  y = MatMul(x, w).
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from liar_opt.frontend.graph_tensors import STANDARD
from liar_opt.frontend.rules.numbers import Array, Attributes, Evaluator, Inputs
from liar_opt.frontend.rules.operators import has, operator
from liar_opt.frontend.rules.table import Trait
from liar_opt.frontend.shape_values import result_elements

MOVES = Trait.KEEPS_ORDER | Trait.TURNS | Trait.SHAPES
"""What gives a weight another layout or type. Where it alone reads that weight, ``OnnxModel.normalise`` folds it."""
LARGER = "folded, it would make the file larger"
LEAST_LIMIT = 1 << 12
"""Elements that a step on the way may have, however small the weights are; otherwise twice as many as they have."""


@dataclass(frozen=True)
class Left:
    """A weight that is computed and stays so.

    Attributes:
        reader: the node that contracts it.
        reason: why it is not folded.
    """

    reader: str
    reason: str


def _is_constant(tensor: object) -> bool:
    return isinstance(tensor, gs.Constant)


def _is_float(dtype: Any) -> bool:
    return bool(np.dtype(dtype).kind == "f" or np.dtype(dtype).name == "bfloat16")


def _is_matrix(tensor: gs.Constant) -> bool:
    return not isinstance(tensor.dtype, int) and _is_float(tensor.dtype) and bool(sum(int(n) > 1 for n in tensor.shape) > 1)


def _bytes(tensor: gs.Constant) -> int:
    width = 0 if isinstance(tensor.dtype, int) else np.dtype(tensor.dtype).itemsize  # of a type that numpy lacks
    return int(np.prod(tensor.shape, dtype=np.int64)) * width


def computed_by(name: str) -> Evaluator | None:
    """Returns what computes a standard operator of weights, or None."""
    op = operator("", name)
    return op.fold or op.evaluate


def _elements(op: str, inputs: Inputs, attributes: Attributes) -> int:
    """Returns how many elements the result has, at the most."""
    shapes = [np.asarray(i).shape for i in inputs if i is not None]
    if op == "Einsum":
        left, _, right = str(attributes["equation"]).replace(" ", "").partition("->")
        sizes = {
            c: n for term, shape in zip(left.split(","), shapes, strict=True) for c, n in zip(term, shape, strict=True)
        }
        return math.prod(sizes[c] for c in right)
    if op == "Sum":
        return math.prod(np.broadcast_shapes(*shapes))
    return result_elements(op, inputs, attributes)


class Grows(Exception):
    """A result has more elements than it may have; it was not made."""


def compute(op: str, inputs: Inputs, attributes: Attributes, limit: int) -> list[Array] | None:
    """Returns what a standard operator makes of arrays; None where it cannot be computed.

    Half precision is computed in float32 and rounded, as ONNX Runtime does.

    Raises:
        Grows: it would have more than ``limit`` elements.
    """
    evaluator = computed_by(op)
    if evaluator is None:
        return None
    half = next((np.asarray(i).dtype for i in inputs if i is not None and np.asarray(i).dtype.name in HALVES), None)
    wide = [i.astype(np.float32) if i is not None and i.dtype.name in HALVES else i for i in inputs]
    try:
        if _elements(op, wide, attributes) > limit:
            raise Grows
        with np.errstate(all="ignore"):
            results = [np.asarray(o) for o in evaluator(wide, attributes)]
    except (ValueError, IndexError, TypeError, KeyError, ZeroDivisionError, FloatingPointError, np.linalg.LinAlgError):
        return None
    return [o.astype(half) if half is not None and op != "Cast" and o.dtype == np.float32 else o for o in results]


HALVES = ("float16", "bfloat16")


# The graph ------------------------------------------------------------------------------------------------------------


def fold_weights(
    graph: gs.Graph,
    is_table: Callable[[gs.Node], bool],
    narrowed: Callable[[gs.Node, str, NDArray[Any], Any], gs.Constant],
    keep: Callable[[NDArray[Any]], NDArray[Any]],
) -> tuple[list[Left], set[int]]:
    """Folds computed weights in place; nodes are in topological order, and constants are constants already.

    Args:
        graph: the graph.
        is_table: whether a node moves a table that is looked up as well, which is seen through where it stays.
        narrowed: makes a constant of a node's result (its name, its values) that is stored in a type.
        keep: puts new weights where they stay.

    Returns:
        The weights that stay as they are computed, and the ids of the nodes none of which may be folded by itself, since
        its result would be stored beside the weight.
    """
    derived = _derived(graph)
    left: list[Left] = []
    untouched: set[int] = set()
    ends = {id(t) for t in graph.outputs}
    for part in _parts(derived):
        own = {id(n) for n in part}
        results = [t for n in part for t in n.outputs if any(id(r) not in own for r in t.outputs)]
        readers = [(r, t) for t in results for r in t.outputs if id(r) not in own and _contracts(r, t)]
        sources = list({id(t): t for n in part for t in n.inputs if _is_constant(t)}.values())
        if not readers or not any(map(_is_matrix, sources)):
            continue
        if all(has(n, MOVES) for n in part) and (any(map(is_table, part)) or _alone(part, sources, ends)):
            continue
        reason = _fold_part(part, results, sources, ends, narrowed, keep)
        if reason is None:
            continue
        untouched |= own if reason == LARGER else set()  # elsewhere single steps may be folded: the shapes behind are known
        for reader in {r.name: r for r, _ in readers}.values():
            node = next(t.inputs[0] for r, t in readers if r is reader)
            left.append(
                Left(reader.name, f"the weight of '{reader.name}' is computed (node '{node.name}', {node.op}): {reason}")
            )
    return left, untouched


def _derived(graph: gs.Graph) -> list[gs.Node]:
    """Returns the nodes, in order, whose results depend on constants alone and are no outputs of the graph."""
    outputs = {id(t) for t in graph.outputs}
    made: set[int] = set()
    result = []
    for node in graph.nodes:
        read = [t for t in node.inputs if _is_constant(t) or t.name]
        alone = bool(read) and all(_is_constant(t) or id(t) in made for t in read)
        plain = not has(node, Trait.RANDOM | Trait.DROPS) and not any(isinstance(v, gs.Graph) for v in node.attrs.values())
        if alone and plain and not any(id(t) in outputs for t in node.outputs):
            result.append(node)
            made |= {id(t) for t in node.outputs}
    return result


def _parts(nodes: Sequence[gs.Node]) -> Iterator[list[gs.Node]]:
    """Yields the nodes in parts: those that read one another, or one weight, are together."""
    parent = {id(n): id(n) for n in nodes}

    def find(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    first: dict[int, int] = {}
    for node in nodes:
        for tensor in node.inputs:
            if _is_constant(tensor):
                other = first.setdefault(id(tensor), id(node)) if _is_matrix(tensor) else id(node)
            else:
                other = id(tensor.inputs[0]) if tensor.inputs else id(node)
            parent[find(id(node))] = find(other)
    parts: dict[int, list[gs.Node]] = defaultdict(list)
    for node in nodes:
        parts[find(id(node))].append(node)
    yield from parts.values()


def _contracts(node: gs.Node, tensor: gs.Tensor) -> bool:
    places = operator(node.domain, node.op).contracts
    return any(i < len(node.inputs) and node.inputs[i] is tensor for i in places)


def _alone(part: Sequence[gs.Node], sources: Sequence[gs.Constant], ends: set[int]) -> bool:
    """Returns whether a part is one node that alone reads what it moves."""
    node = part[0]
    return len(part) == 1 and all(id(t) not in ends and all(r is node for r in t.outputs) for t in sources if _is_matrix(t))


def _fold_part(
    part: Sequence[gs.Node],
    results: Sequence[gs.Tensor],
    sources: Sequence[gs.Constant],
    ends: set[int],
    narrowed: Callable[[gs.Node, str, NDArray[Any], Any], gs.Constant],
    keep: Callable[[NDArray[Any]], NDArray[Any]],
) -> str | None:
    """Folds the nodes of a part, or returns why not."""
    foreign = next((n for n in part if n.domain not in STANDARD or computed_by(n.op) is None), None)
    if foreign is not None:
        return f"{foreign.op} of node '{foreign.name}' is not computed here; fold it with ONNX Runtime's optimizer first"
    own = {id(n) for n in part}
    gone = [t for t in sources if id(t) not in ends and all(id(r) in own for r in t.outputs)]
    room = sum(map(_bytes, gone))
    limit = max(LEAST_LIMIT, 2 * sum(int(np.prod(t.shape, dtype=np.int64)) for t in sources))
    known: dict[int, Array] = {}
    for node in part:
        inputs = [t.values if _is_constant(t) else known.get(id(t)) for t in node.inputs]
        try:
            values = compute(node.op, inputs, node.attrs, limit)
        except Grows:
            return LARGER
        if values is None or len(values) < len(node.outputs):
            return f"{node.op} of node '{node.name}' cannot be computed"
        known |= {id(t): v for t, v in zip(node.outputs, values, strict=False)}
    half = next((t.dtype for t in sources if not isinstance(t.dtype, int) and np.dtype(t.dtype).name in HALVES), None)
    made: list[tuple[Array, Any, list[gs.Tensor]]] = []
    for tensor in results:
        value = known[id(tensor)]
        same = next((m for m in made if m[0].dtype == value.dtype and np.array_equal(m[0], value)), None)
        if same is not None:
            same[2].append(tensor)
            continue
        with np.errstate(over="ignore"):
            exact = half is not None and value.dtype == np.float32 and np.array_equal(value.astype(half), value)
        made.append((value, half if exact else None, [tensor]))
    if sum(v.size * np.dtype(kind or v.dtype).itemsize for v, kind, _ in made) > room:
        return LARGER
    for value, kind, tensors in made:
        value = keep(np.ascontiguousarray(value).reshape(value.shape))
        node, name = tensors[0].inputs[0], tensors[0].name
        constant = gs.Constant(name, value) if kind is None else narrowed(node, name, value, kind)
        for tensor in tensors:
            for reader in list(tensor.outputs):
                for place, read in enumerate(reader.inputs):
                    if read is tensor:
                        reader.inputs[place] = constant
    for node in part:
        node.outputs.clear()
        node.inputs.clear()
    return None
