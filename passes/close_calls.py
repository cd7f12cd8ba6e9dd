"""Which places are decided by rounding: of values that are equal but for their last digits, one is the largest.

A model may count with the place of its largest value (the second output of a MaxPool or a TopK, an ArgMax). Where the
same token stands twice, two values are equal in the mathematics, and the order of sums decides which is larger. A cut in
front of it changes that order: the cut is right, and the numbers that come out are others. It is tried: the last sum in
front of such an operator that a cut would shorten is moved by its rounding. Where other places come out, and with them
other outputs of the model, what is cut in front of it is left alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from liar_opt.frontend.engine import Engine, Part
from liar_opt.frontend.graph_tensors import present
from liar_opt.frontend.rules.operators import has
from liar_opt.frontend.rules.table import Trait
from liar_opt.frontend.walk import GraphWalk
from liar_opt.passes.groups import ChannelGroup
from liar_opt.runtime.compare import TOLERANCES, relative_difference
from liar_opt.runtime.errors import InternalError

Feeds = Mapping[str, Any]
ROUNDING = "rounding decides "
"""How the reasons begin: nothing is wrong with the cut."""
LAST_DIGITS = 8.0
"""A sum is moved by so many times the relative rounding of its type: sums of some dozen terms differ by as much."""


def close_calls(
    engine: Engine, walk: GraphWalk, outputs: Sequence[str], feeds: Sequence[Feeds], groups: Sequence[ChannelGroup]
) -> dict[str, str]:
    """Returns the groups that are cut in front of a choice that rounding makes, with the reason of each.

    Args:
        engine: runs the graph.
        walk: the analysis of the graph, which stays as it is.
        outputs: of the graph, which are compared.
        feeds: inputs; those of whole numbers are tried with each twice in a row, too, as words are repeated.
        groups: the groups.
    """
    nodes, choices = walk.model.graph.nodes, _choices(walk, groups)
    found: dict[str, str] = {}
    if not choices:
        return found
    sources = {last: nodes[last].outputs[0].name for last, _ in choices.values()}
    wanted = list(dict.fromkeys(sources.values()))
    part = engine.part(walk, 0, max(sources) + 1, wanted, {}, once=True)
    for own in (*feeds, *map(repeated, feeds)):
        try:
            values = _arrays(engine, part, wanted, own)
        except InternalError:  # a model that wants other numbers than these
            continue
        for position, (last, names) in choices.items():
            span, value = (last + 1, position + 1), values[sources[last]]
            if found.keys() >= set(names) or not _decided_by_rounding(engine, walk, span, outputs, own, value):
                continue
            name, op = nodes[position].name, nodes[position].op
            reason = (
                f"{ROUNDING}which of some nearly equal numbers is the largest, whose place node '{name}' ({op}) gives; "
                "a cut in front of it changes the order of sums"
            )
            found |= {group: reason for group in names if group not in found}
    return found


def _choices(walk: GraphWalk, groups: Sequence[ChannelGroup]) -> dict[int, tuple[int, list[str]]]:
    """Returns where places are made that are read: by position, the last sum in front that a cut shortens, and groups."""
    nodes, found = walk.model.graph.nodes, {}
    read = {t.name for node in nodes for t in node.inputs} | {t.name for t in walk.model.graph.outputs}
    for position, node in enumerate(nodes):
        if has(node, Trait.POINTS) and any(t.name in read for t in _places(node)):
            before = _nodes_before(node)
            cuts = {g.name: {id(r.node) for r in g.readings} & before for g in groups}
            sums = set[int]().union(*cuts.values())
            if sums:
                last = max(i for i, one in enumerate(nodes) if id(one) in sums)
                found[position] = last, [name for name, own in cuts.items() if own]
    return found


def repeated(feeds: Feeds) -> dict[str, Any]:
    """Returns inputs in which every second entry of whole numbers [b, s] is that before it."""
    result = dict(feeds)
    for name, value in feeds.items():
        array = np.asarray(value)
        if array.dtype.kind in "iu" and array.ndim == 2:
            result[name] = np.repeat(array[:, ::2], 2, axis=1)[:, : array.shape[1]]
    return result


def _places(node: gs.Node) -> list[gs.Tensor]:
    """Returns the output that may hold places: the last one, where there are two, and that of what gives nothing else."""
    return [t for t in node.outputs[-1:] if present(t) and (len(node.outputs) > 1 or node.op.lower().startswith("arg"))]


def _nodes_before(node: gs.Node) -> set[int]:
    """Returns the identities of the nodes that a node depends on."""
    found: set[int] = set()
    waiting = [maker for tensor in node.inputs for maker in tensor.inputs]
    while waiting:
        one = waiting.pop()
        if id(one) not in found:
            found.add(id(one))
            waiting += [maker for tensor in one.inputs for maker in tensor.inputs]
    return found


def _decided_by_rounding(
    engine: Engine, walk: GraphWalk, span: tuple[int, int], outputs: Sequence[str], feeds: Feeds, value: NDArray[Any]
) -> bool:
    """Returns whether other places and other outputs come out where a sum is moved by its rounding.

    Args:
        engine: runs the graph.
        walk: its analysis.
        span: the nodes behind the sum, up to what gives the places.
        outputs: of the graph.
        feeds: its inputs.
        value: the sum.
    """
    nodes = walk.model.graph.nodes
    source = nodes[span[0] - 1].outputs[0].name
    places = [t.name for t in _places(nodes[span[1] - 1])]
    moved = _moved(value)
    for stop, wanted in ((span[1], places), (len(nodes), [n for n in outputs if n != source])):
        before, after = (_run(engine, walk, (span[0], stop), wanted, feeds, {source: v}) for v in (value, moved))
        if all(relative_difference(after[n], before[n]) <= TOLERANCES["float32"] for n in wanted):
            return False
    return True


def _run(
    engine: Engine, walk: GraphWalk, span: tuple[int, int], wanted: Sequence[str], feeds: Feeds, given: Feeds
) -> dict[str, NDArray[Any]]:
    """Returns tensors that some nodes of the graph make."""
    return _arrays(engine, engine.part(walk, *span, wanted, given, once=True), wanted, {**feeds, **given})


def _arrays(engine: Engine, part: Part, wanted: Sequence[str], feeds: Feeds) -> dict[str, NDArray[Any]]:
    return {name: engine.array(value) for name, value in part.run(feeds, arrays=wanted).items()}


def _moved(value: NDArray[Any]) -> NDArray[Any]:
    """Returns an array moved by what sums in another order would move it."""
    digits = float(ml_dtypes.finfo(value.dtype).eps)  # type: ignore[no-untyped-call]
    step = LAST_DIGITS * digits * np.random.default_rng(0).uniform(-1.0, 1.0, value.shape)
    return np.asarray(value.astype(np.float64) * (1.0 + step)).astype(value.dtype)
