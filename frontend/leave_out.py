"""Leave out what lies between two places of a graph's stream: the second is the first then, or a linear map of it.

Inputs and outputs stay. The cache of an attention that went holds zeros, as many as it would hold keys and values, and
sizes that were read of a tensor in the gap are read of another of the same dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from liar_opt.frontend.blocks import inside
from liar_opt.frontend.graph_tensors import present
from liar_opt.frontend.records import Cache, StandIn
from liar_opt.frontend.rewrite import CannotFollow, Rewriter
from liar_opt.frontend.walk import GraphWalk
from liar_opt.runtime.errors import ModelError


def leave_out(walk: GraphWalk, source: str, target: str, stand_in: StandIn | None = None) -> list[str]:
    """Takes out the nodes between two tensors of one shape; the graph is in need of a new analysis then.

    Args:
        walk: the analysis.
        source: the tensor before.
        target: the tensor behind.
        stand_in: the map of ``source`` that ``target`` becomes; None: it is the same.

    Returns:
        The caches that hold zeros now.

    Raises:
        ModelError: something that was made in between is needed behind it.
    """
    graph = walk.model.graph
    gone = inside(walk, source, target)
    tensors = {t.name: t for n in graph.nodes for t in n.outputs if present(t)} | {t.name: t for t in graph.inputs}
    _read_sizes_elsewhere(walk, gone, tensors, source)
    caches = _empty_caches(walk, gone, tensors, source)
    try:
        if stand_in is not None:
            Rewriter(walk).replace(stand_in)
        else:
            hand_on(graph, tensors[source], tensors[target])
    except CannotFollow as err:
        raise ModelError(f"the blocks between '{source}' and '{target}' cannot be left out: {err}") from err
    graph.cleanup(remove_unused_node_outputs=False).toposort()
    left = {id(n) for n in graph.nodes}
    kept = next((n for n in gone if id(n) in left), None)
    if kept is not None:
        raise ModelError(
            f"the blocks between '{source}' and '{target}' cannot be left out: what node '{kept.name}' makes is needed "
            "behind them"
        )
    walk.model.settle()
    return caches


def hand_on(graph: gs.Graph, source: gs.Variable, target: gs.Variable) -> None:
    """Has all that reads one tensor read another; an output of the graph keeps its name."""
    if any(target is t for t in graph.outputs):
        (producer,) = target.inputs
        place = next(i for i, n in enumerate(graph.nodes) if n is producer)
        producer.outputs.clear()
        graph.nodes.insert(place, gs.Node("Identity", f"{target.name}_left_out", {}, [source], [target]))
        return
    for reader in list(target.outputs):
        for i, tensor in enumerate(reader.inputs):
            if tensor is target:
                reader.inputs[i] = source


def _read_sizes_elsewhere(walk: GraphWalk, gone: Sequence[Any], tensors: dict[str, Any], source: str) -> None:
    """Has shape arithmetic that reads tensors of ``gone`` nodes read others of the same dimensions."""
    graph, algebra = walk.model.graph, walk.algebra
    order = {id(n): i for i, n in enumerate(graph.nodes)}
    made = {t.name for n in gone for t in n.outputs if present(t)}
    first = min((order[id(n)] for n in gone), default=0)

    def dimensions(name: str) -> tuple[tuple[int, ...], ...] | None:
        axes = walk.axes.get(name)
        return None if axes is None else tuple(tuple(algebra.leaves(f)) for f in axes)

    for node in graph.nodes:
        if not all(t.name in walk.values for t in node.outputs if present(t)):
            continue
        for i, tensor in enumerate(node.inputs):
            if not present(tensor) or tensor.name not in made or tensor.name in walk.values:
                continue
            wanted = dimensions(tensor.name)
            before = (n for n, t in tensors.items() if not t.inputs or order[id(t.inputs[0])] < first)
            other = next((n for n in (source, *before) if wanted is not None and dimensions(n) == wanted), None)
            if other is not None:
                node.inputs[i] = tensors[other]


def _empty_caches(walk: GraphWalk, gone: Sequence[Any], tensors: dict[str, Any], source: str) -> list[str]:
    """Gives the caches that ``gone`` nodes make zeros, as long as they would be: past, and one for each new token."""
    graph = walk.model.graph
    made = {t.name for n in gone for t in n.outputs if present(t)}
    caches = [c for w in (walk, *walk.others) for c in w.caches.values() if c.present in made]
    for cache in caches:
        token = _token_axis(walk, source, cache)
        past, present_ = tensors[cache.past], tensors[cache.present]
        rank, name = len(past.shape), f"{cache.present}_left_out"

        def made_here(op: str, end: str, inputs: list[Any], name: str = name, **attributes: Any) -> gs.Variable:
            out = gs.Variable(f"{name}_{end}", np.dtype(np.int64))
            graph.nodes.append(gs.Node(op, f"{name}_{end}", attributes, inputs, [out]))
            return out

        def numbers(end: str, values: Sequence[int], name: str = name) -> gs.Constant:
            return gs.Constant(f"{name}_{end}", np.asarray(values, np.int64))

        whole = made_here("Shape", "past", [past])
        new = made_here(
            "Gather", "new", [made_here("Shape", "stream", [tensors[source]]), numbers("token", [token])], axis=0
        )
        parts = [made_here("Gather", "before", [whole, numbers("axes", range(cache.axis))], axis=0), new]
        if cache.axis + 1 < rank:
            rest = numbers("rest", range(cache.axis + 1, rank))
            parts.append(made_here("Gather", "behind", [whole, rest], axis=0))
        shape = made_here("Concat", "shape", parts, axis=0)
        zero = gs.Constant(f"{name}_zero", np.zeros(1, past.dtype))
        zeros = made_here("Expand", "zeros", [zero, shape])
        zeros.dtype = past.dtype
        present_.inputs[0].outputs[present_.inputs[0].outputs.index(present_)] = gs.Variable(f"{name}_was", past.dtype)
        graph.nodes.append(gs.Node("Concat", name, {"axis": cache.axis}, [past, zeros], [present_]))
    return [c.present for c in caches]


def _token_axis(walk: GraphWalk, source: str, cache: Cache) -> int:
    """Returns the axis of a stream [b, s, d] or [s, b, d] that counts tokens.

    Raises:
        ModelError: it has another form.
    """
    axes, past = walk.axes.get(source), walk.axes.get(cache.past)
    if axes is not None and past is not None and len(axes) == 3:
        others = [i for i in (0, 1) if walk.algebra.leaves(axes[i]) != walk.algebra.leaves(past[0])]
        if len(others) == 1:
            return others[0]
    raise ModelError(
        f"the blocks whose cache is '{cache.present}' cannot be left out: nothing says how many tokens it gets (stream "
        f"'{source}')"
    )
