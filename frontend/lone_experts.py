"""Experts that lie apart: each has weights of its own, and what the router says of it is taken out by its place.

A *selection* takes the number of one expert out of the scores of all: an index of Gather, a part of Slice or Split, an
input of the Concat that lines the experts up, or the comparison of the chosen numbers with its own. For an expert that is
never chosen the number is zero, and so is all that it multiplies, down to where that is added to what the others give: the
addition goes (a *join*), and the rest is left. Or no row is found that has chosen it, and what is made of no rows is
written nowhere.

What else reads the number is not followed, and keeps all experts of its layer.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx_graphsurgeon as gs

from liar_opt.frontend.graph_tensors import is_constant, is_float, present
from liar_opt.frontend.leave_out import hand_on
from liar_opt.frontend.rewrite import Rewriter
from liar_opt.frontend.rules.operators import has
from liar_opt.frontend.rules.table import Trait
from liar_opt.frontend.walk import GraphWalk

ALL = -1
State = Literal["zero", "none"]
"""What is known of a tensor where an expert is never chosen: all zeros, or without a row."""
TIMES = frozenset({"Mul", "And", "MatMul", "Einsum"})
"""Operators that give zero where anything that they read is."""
PLUS = frozenset({"Add", "Sum", "Sub", "Or"})
"""Operators to which zero is as good as nothing; of Sub what is taken away."""
WRITES = frozenset({"ScatterND", "ScatterElements"})
"""Operators that write rows (input 2) to places (input 1) of their first input."""
KEEPS_ZERO = frozenset({"ReduceSum", "ReduceMax", "ReduceMean", "ReduceL1", "Abs", "Neg", "Relu", "GatherElements"})
MOVES = Trait.KEEPS_ORDER | Trait.COPIES | Trait.TURNS | Trait.REPEATS | Trait.SPLITS | Trait.SLICES | Trait.LOOKS_UP


@dataclass(frozen=True, eq=False)
class Selection:
    """Where one expert is taken out.

    Attributes:
        expert: its place among all; ``ALL`` where the chosen numbers are compared with those of all.
        node: what takes it out.
        output: what is zero where it is never chosen; None where the node lines up what experts give.
        position: the input that says its place; None where the cut of the axis says it. Of what lines up, that of the
            expert, of a slice that of its start, behind which that of its end is.
    """

    expert: int
    node: gs.Node
    output: gs.Tensor | None
    position: int | None = None


@dataclass(eq=False)
class Silenced:
    """What is left where some experts are never chosen.

    Attributes:
        joins: nodes that go, each with the input that stands for what it made, in the graph's order.
        drops: by id of a node, it and the positions of inputs that go.
        terms: what experts give where it is added to the others, and so shows how much that is.
        ends: all that is read of theirs where a node goes, or loses inputs.
        refused: why it is not known; "" where it is.
    """

    joins: list[tuple[gs.Node, gs.Tensor]] = field(default_factory=list)
    drops: dict[int, tuple[gs.Node, set[int]]] = field(default_factory=dict)
    terms: list[gs.Tensor] = field(default_factory=list)
    ends: list[gs.Tensor] = field(default_factory=list)
    refused: str = ""


def selections(walk: GraphWalk, axis: int, chosen: Collection[gs.Tensor]) -> list[Selection]:
    """Returns where single experts are taken out.

    Args:
        walk: the analysis.
        axis: the factor of the experts, one leaf or as many as there are experts.
        chosen: the numbers of those that are chosen.
    """
    algebra, size = walk.algebra, walk.algebra.size(axis)
    leaves = algebra.leaves(axis)
    numbers = set(map(id, moved(chosen)))
    found: list[Selection] = []
    for node in walk.model.graph.nodes:
        if node.op == "Equal" and any(id(t) in numbers for t in node.inputs):
            position = next(i for i, t in enumerate(node.inputs) if id(t) not in numbers)
            value = walk.value(node, position)
            if value is not None and value.size == 1 and 0 <= int(value.reshape(-1)[0]) < size:
                found.append(Selection(int(value.reshape(-1)[0]), node, node.outputs[0], position))
            elif counted(walk, node, position, size) is not None:
                found.append(Selection(ALL, node, None, position))
        elif node.op in ("Gather", "Slice", "Split", "Concat"):
            found += _taken(walk, node, leaves, size)
    return found


def counted(walk: GraphWalk, node: gs.Node, position: int, size: int) -> int | None:
    """Returns the axis of a constant input along which it says 0, 1, .., size - 1; None where it does not."""
    tensor = node.inputs[position]
    value = walk.value(node, position) if is_constant(tensor) else None
    if value is None or value.size != size or not np.array_equal(value.reshape(-1), np.arange(size)):
        return None
    return next((i for i, n in enumerate(value.shape) if n == size), None)


def in_modules(walk: GraphWalk, axis: int, chosen: Collection[gs.Tensor]) -> bool:
    """Returns whether the graph of a module takes the number of each expert out, as `selections` finds it in ONNX."""
    size, leaves, count = walk.algebra.size(axis), walk.algebra.leaves(axis), 0
    numbers = set(map(id, moved(chosen)))
    for node in walk.model.graph.nodes:
        if node.op == "eq":
            count += any(id(t) in numbers for t in node.inputs)
        elif node.op in ("select", "slice", "unbind", "split", "split_with_sizes"):
            data = walk.axes.get(node.inputs[0].name) or ()
            count += len(node.outputs) * any(walk.algebra.leaves(f) == leaves for f in data if walk.algebra.size(f) == size)
    return count >= size


def moved(tensors: Collection[gs.Tensor]) -> Iterator[gs.Tensor]:
    """Yields tensors, and what only lays them out anew."""
    waiting = list(tensors)
    while waiting:
        tensor = waiting.pop()
        yield tensor
        for node in tensor.outputs:
            if has(node, Trait.KEEPS_ORDER | Trait.TURNS) and tensor is node.inputs[0]:
                waiting += node.outputs


def _taken(walk: GraphWalk, node: gs.Node, leaves: Sequence[int], size: int) -> Iterator[Selection]:
    """Yields what a node takes out of an axis with these leaves, or lines up along it."""
    algebra, place = walk.algebra, {leaf: i for i, leaf in enumerate(leaves)}
    joins = node.op == "Concat"
    axes = (walk.axes.get(node.outputs[0].name) if joins else walk.input_axes(node, 0)) or ()
    own = [i for i, f in enumerate(axes) if algebra.size(f) == size and algebra.leaves(f) == leaves]
    if not own or is_constant(node.inputs[0]):
        return
    (axis, *_) = own
    if node.op == "Gather":
        index = node.inputs[1]
        if int(node.attrs.get("axis", 0)) % len(axes) == axis and is_constant(index) and index.values.size == 1:
            yield Selection(int(index.values.reshape(-1)[0]) % size, node, node.outputs[0], 1)
        return
    bounds = node.op == "Slice"
    if bounds and not all(is_constant(t) and t.values.size == 1 for t in node.inputs[1:3]):
        return
    if len(leaves) != size or (joins and int(node.attrs["axis"]) % len(axes) != axis):
        return
    for position, tensor in enumerate(node.inputs if joins else node.outputs):
        part = (walk.axes.get(tensor.name) or ()) if present(tensor) else ()
        expert = place.get(algebra.find(part[axis])) if len(part) == len(axes) else None
        if expert is not None:
            yield Selection(expert, node, None if joins else tensor, position if joins else 1 if bounds else None)


def silenced(walk: GraphWalk, order: Mapping[int, int], gone: Collection[Selection]) -> Silenced:
    """Follows what experts give that are never chosen, to where it is added to the rest.

    Args:
        walk: the analysis.
        order: of the graph's nodes, by id.
        gone: all selections of these experts.
    """
    result, states = Silenced(), dict[str, State]()
    ends = {t.name for t in walk.model.graph.outputs}
    nodes: dict[int, gs.Node] = {}
    waiting: list[int] = []

    def note(tensor: gs.Tensor, state: State) -> None:
        states[tensor.name] = state
        for reader in tensor.outputs:
            if order[id(reader)] not in nodes:
                nodes[order[id(reader)]] = reader
                heapq.heappush(waiting, order[id(reader)])

    for one in gone:
        if one.output is not None:
            note(one.output, "zero")
        elif one.position is not None:
            result.drops.setdefault(id(one.node), (one.node, set()))[1].add(one.position)
            result.ends.append(one.node.inputs[one.position])
    while waiting:
        node = nodes[heapq.heappop(waiting)]
        quiet = {i: states[t.name] for i, t in enumerate(node.inputs) if t.name in states}
        if id(node) in result.drops and set(quiet) <= result.drops[id(node)][1]:
            continue
        state, left = _goes_on(walk, node, quiet)
        if left is not None:
            result.joins.append((node, left))
            result.terms += _given(node, max(quiet))
            result.ends += [node.inputs[i] for i in quiet]
        elif state == "drop":
            result.drops.setdefault(id(node), (node, set()))[1].update(quiet)
            result.terms += [node.inputs[i] for i in quiet]
            result.ends += [node.inputs[i] for i in quiet]
        elif state is None or any(t.name in ends for t in node.outputs):
            result.refused = f"{node.op} reads what the router says of one expert (node '{node.name}')"
            return result
        else:
            for tensor in node.outputs:
                note(tensor, state)
    return result


def _given(node: gs.Node, position: int) -> list[gs.Tensor]:
    """Returns what an expert adds where a node goes; nothing where rows that were read are written back with it."""
    tensor = node.inputs[position]
    if node.op not in WRITES or node.attrs.get("reduction") == "add" or _made(node.inputs[0], "ConstantOfShape"):
        return [tensor]
    while tensor.inputs and has(tensor.inputs[0], Trait.KEEPS_ORDER):
        tensor = tensor.inputs[0].inputs[0]
    parts = tensor.inputs[0].inputs if _made(tensor, "Add") else []
    read = [t for t in parts if t.inputs and has(t.inputs[0], Trait.LOOKS_UP) and t.inputs[0].inputs[0] is node.inputs[0]]
    own = [t for t in parts if all(t is not r for r in read)]
    return own if len(own) == len(parts) - 1 else []


def _made(tensor: gs.Tensor, op: str) -> bool:
    return bool(tensor.inputs) and tensor.inputs[0].op == op


def _goes_on(
    walk: GraphWalk, node: gs.Node, quiet: Mapping[int, State]
) -> tuple[State | Literal["drop"] | None, gs.Tensor | None]:
    """Returns what a node makes of ``quiet`` inputs, or the input that stands for what it makes; None is unknown."""
    others = [t for i, t in enumerate(node.inputs) if present(t) and i not in quiet]
    adds = node.attrs.get("reduction") == "add"
    if node.op in WRITES and (quiet.get(1) == "none" or (quiet.get(2) == "zero" and adds)):
        return ("zero", None) if 0 in quiet else (None, node.inputs[0])
    if "none" in quiet.values():
        return (None if node.op.startswith("Reduce") or node.op in WRITES else "none"), None
    if node.op == "NonZero":
        return "none", None
    if node.op in TIMES or (node.op == "Div" and 0 in quiet):
        return "zero", None
    if node.op in PLUS and (node.op != "Sub" or 0 not in quiet):
        rest = [t for t in others if not _is_zero(walk, t)]
        if not rest:
            return "zero", None
        if len(others) > 1:
            return "drop", None
        return None, rest[0] if _alike(walk, rest[0], node.outputs[0]) else None
    if node.op == "Where":
        if 0 in quiet:
            other = node.inputs[2]
            if 2 in quiet or _is_zero(walk, other):
                return "zero", None
            return None, other if _alike(walk, other, node.outputs[0]) else None
        return ("zero" if all(_is_zero(walk, t) for t in others[1:]) else None), None
    if node.op == "Greater" and 0 in quiet:
        value = walk.value(node, 1)
        return ("zero" if value is not None and bool(np.all(value >= 0)) else None), None
    if node.op == "Concat":
        if not others:
            return "zero", None
        return ("drop" if _is_summed(node) else None), None
    keeps = node.op in KEEPS_ZERO or has(node, MOVES)
    return ("zero" if keeps and set(quiet) == {0} else None), None


def _is_zero(walk: GraphWalk, tensor: gs.Tensor) -> bool:
    """Returns whether a tensor is a constant of zeros, or one that is spread."""
    if is_constant(tensor):
        return bool(np.all(np.asarray(tensor.values) == 0))
    made = tensor.inputs[0] if tensor.inputs else None
    if made is not None and made.op == "ConstantOfShape":
        value = made.attrs.get("value")
        return value is None or not np.any(np.asarray(getattr(value, "values", value)))
    known = walk.value_of(tensor)
    return known is not None and not np.any(known)


def _alike(walk: GraphWalk, first: gs.Tensor, second: gs.Tensor) -> bool:
    """Returns whether two tensors are known to have one shape."""
    axes = [walk.axes.get(t.name) for t in (first, second)]
    return not is_constant(first) and None not in axes and walk.shape(axes[0] or ()) == walk.shape(axes[1] or ())


def _is_summed(node: gs.Node) -> bool:
    """Returns whether all that reads what a Concat makes is a sum along it."""
    rank, axis = len(node.outputs[0].shape or ()), int(node.attrs["axis"])
    readers = node.outputs[0].outputs

    def sums(reader: gs.Node) -> bool:
        given = reader.attrs.get("axes")
        if given is None and len(reader.inputs) > 1 and is_constant(reader.inputs[1]):
            given = reader.inputs[1].values.reshape(-1).tolist()
        return reader.op == "ReduceSum" and given in ([axis], [axis % rank if rank else axis])

    return bool(readers) and all(map(sums, readers))


def only_theirs(order: Mapping[int, int], nodes: Sequence[gs.Node], found: Silenced) -> list[gs.Constant]:
    """Returns the weights that nothing reads where what experts give is not added."""
    leaves = {id(node) for node, _ in found.joins} | set(found.drops)
    ended = {id(t) for t in found.ends}
    dead: set[int] = set()

    def unread(tensor: gs.Tensor) -> bool:
        readers = map(id, tensor.outputs)
        return bool(tensor.outputs) and all(r in dead or (r in leaves and id(tensor) in ended) for r in readers)

    waiting = [-order[id(n)] for t in found.ends for n in t.inputs]
    heapq.heapify(waiting)
    weights: dict[int, gs.Constant] = {}
    while waiting:
        node = nodes[-heapq.heappop(waiting)]
        if id(node) in dead or not all(map(unread, node.outputs)):
            continue
        dead.add(id(node))
        for tensor in node.inputs:
            if is_constant(tensor) and is_float(tensor.dtype):
                weights[id(tensor)] = tensor
            for maker in [] if is_constant(tensor) else tensor.inputs:
                heapq.heappush(waiting, -order[id(maker)])
    return [t for t in weights.values() if unread(t)]


def leave_out_experts(walk: GraphWalk, found: Silenced) -> None:
    """Takes out the nodes and the weights of experts that are never chosen; their places in the scores stay."""
    graph = walk.model.graph
    known: dict[int, Any] = {}
    for node, left in found.joins:
        while id(left) in known:
            left = known[id(left)]
        known[id(node.outputs[0])] = left
        hand_on(graph, left, node.outputs[0])
    for node, positions in found.drops.values():
        node.inputs = [t for i, t in enumerate(node.inputs) if i not in positions]
    before = list(graph.nodes)
    graph.cleanup(remove_unused_node_outputs=False).toposort()
    left_nodes = {id(node) for node in graph.nodes}
    for one in (walk, *walk.others):
        one.forget([node for node in before if id(node) not in left_nodes])


def renumber(rewriter: Rewriter, taken: Collection[Selection], kept: Sequence[int]) -> None:
    """Has selections of the experts that stay say their new places, and drops outputs of Split that nothing reads."""
    rank = {expert: i for i, expert in enumerate(kept)}
    for one in taken:
        if one.expert == ALL and one.position is not None:
            value = np.asarray(one.node.inputs[one.position].values)
            numbers = np.arange(value.size, dtype=value.dtype).reshape(value.shape)
            rewriter.set_constant([(one.node, one.position)], numbers)
        if one.expert not in rank or one.output is None or one.position is None:
            continue
        for step in range(2 if one.node.op == "Slice" else 1):
            value, place = one.node.inputs[one.position + step].values, (one.node, one.position + step)
            rewriter.set_constant([place], np.full(value.shape, rank[one.expert] + step, value.dtype))
    for node in {id(one.node): one.node for one in taken if one.node.op == "Split" and one.expert in rank}.values():
        stay = [i for i, t in enumerate(node.outputs) if t.outputs]
        if "split" in node.attrs:
            node.attrs["split"] = [node.attrs["split"][i] for i in stay]
        else:
            rewriter.set_constant([(node, 1)], np.asarray(node.inputs[1].values)[stay])
        node.outputs = [node.outputs[i] for i in stay]
