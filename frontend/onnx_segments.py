"""Cutting a graph into segments at the residual stream, and measuring moments inside it.

A segment holds the groups that must be measured together. Between two segments the graph is cut where the least has to
be carried over: for a transformer that is the residual stream, with what else is live there (an attention mask). Each
segment is a model of its own: :func:`extract` takes the nodes that its outputs need.

:func:`add_moments` appends, for an activation x [.., n], what the solver needs: the rows that are no padding (dropped
before anything is multiplied), their number, their column sums and X^T X, of which only the upper triangle of blocks is
computed. All of it stays inside the graph, on the device.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from liar_opt.frontend.graph_tensors import detached_tensors, is_constant, is_float, present
from liar_opt.frontend.records import ConsumerUse, StandIn, Window
from liar_opt.frontend.rules.numbers import slice_arguments
from liar_opt.frontend.rules.operators import has, operator
from liar_opt.frontend.rules.table import Trait
from liar_opt.frontend.walk import GraphWalk
from liar_opt.frontend.widen_graph import widen

ROWS = "liar_opt_rows"
"""Name of the input that says which rows count: bool [rows of one activation]; the layout is appended."""
OLDEST_OPSET = 9
"""The first opset that has what moments are computed with; parts of older graphs are run by it, results keep theirs."""
PROJECTION = 32
"""Random signs through which the variance of the residual stream is estimated."""
VARIANCE_FLOOR = 1e-5
Place = tuple[str, int, int, Window | None]
"""A tensor, its axis, the expert whose rows count (-1: all rows), and what slides over it."""
MOST_PLACES = 512
"""Places of a sample from which on not all are measured that a convolution slides to: they say the same as others."""
TRIANGLE_FROM = 512
"""Widths from here on compute X^T X by blocks of the upper triangle."""
BLOCKS = 6


@dataclass(frozen=True, eq=False)
class Segment:
    """Groups that are measured together, the node before which the graph is cut for them, and their last consumer."""

    first: gs.Node
    last: gs.Node
    groups: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Stream:
    """The residual stream t = x W + (other tensors) + (a constant) behind a consumer, seen through random signs R [m, k].

    What a change of y does to the model is judged by the normalisation that follows: relative to the variance of t.
    Without it a few tokens with huge activations (the first, separators) decide every mean and covariance. k columns
    estimate the variance well enough for a weight, at a fraction of the product's cost.

    Attributes:
        terms: the tensors [.., m] that are added to y.
        projection: R, float32 [m, k], its columns centred so that R sees the variance, not the mean.
        weight: W R, float32 [n, k].
        offset: the constants R, float32 [k].
    """

    terms: tuple[str, ...]
    projection: np.ndarray
    weight: np.ndarray
    offset: np.ndarray


@dataclass(frozen=True)
class Tap:
    """One activation to be measured.

    Attributes:
        tensor: its name.
        axis: the axis to be contracted.
        rank: its rank.
        width: its size along ``axis``, as it is now.
        layout: order of its rows against the batch: "bs", "sb", "b" (one row a sample), "b*" (several fixed rows a
            sample), "bs*" (several a token), "all" (rows cannot be told apart).
        repeat: rows a sample for layout "b*", rows a token for "bs*".
        stream: the residual stream behind the consumer, by whose size each row is weighted.
        numbers: the tensor with the expert of each row, where only those of one count.
        expert: the number of that one; -1 for all rows.
        window: what slides over the axes behind the channels: a row is what lies under its kernel, [places, channels].
        every: of the places that it slides to, one in so many is measured, for each axis.
        beside: a tensor whose channels are measured with these, behind them, row by row; "" for none.
        beside_width: how many they are; they are part of ``width``.
        whole: whether it is of a whole sublayer: it may lie behind the segment's last consumer.
    """

    tensor: str
    axis: int
    rank: int
    width: int
    layout: str = "all"
    repeat: int = 1
    stream: Stream | None = None
    numbers: str = ""
    expert: int = -1
    window: Window | None = None
    every: tuple[int, ...] = ()
    beside: str = ""
    beside_width: int = 0
    whole: bool = False

    @property
    def place(self) -> Place:
        """What it measures."""
        return _both(self.tensor, self.beside), self.axis, self.expert, self.window

    @property
    def reads(self) -> set[str]:
        """Names of the tensors that it needs."""
        terms = () if self.stream is None else self.stream.terms
        return {name for name in (self.tensor, self.beside, self.numbers, *terms) if name}

    @property
    def key(self) -> str:
        """A prefix for the names of the outputs."""
        if self.window is not None:
            numbers = (self.window.kernel, self.window.strides, self.window.dilations, self.window.pads)
            return f"liar_opt_moments/{self.tensor}/{'/'.join('x'.join(map(str, n)) for n in numbers)}"
        name = _both(self.tensor, self.beside)
        return f"liar_opt_moments/{name}/{self.axis}" + (f"/{self.expert}" if self.expert >= 0 else "")

    @property
    def bounds(self) -> list[int]:
        """Column bounds of the blocks of X^T X."""
        if self.width < TRIANGLE_FROM:
            return [0, self.width]
        return [round(i * self.width / BLOCKS) for i in range(BLOCKS + 1)]

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs: rows, count (the weights' sum), total, and the block rows of X^T X."""
        names = [f"{self.key}/rows", f"{self.key}/count", f"{self.key}/total"]
        names += [f"{self.key}/second{i}" for i in range(len(self.bounds) - 1)]
        return names


@dataclass
class Extracted:
    """A segment as a model, and the data of its larger initializers, which the model names as external."""

    model: onnx.ModelProto
    weights: dict[str, np.ndarray] = field(default_factory=dict)

    def serialise(self) -> bytes:
        """Returns the model as bytes."""
        data: bytes = widen(self.model).SerializeToString()
        return data


def plan_segments(walk: GraphWalk, groups: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Segment, ...]]:
    """Divides the groups into those that span others and the segments of the rest.

    Args:
        walk: the analysis.
        groups: channel groups.

    Returns:
        The groups that are used on both sides of another group (shared weights, a position bias that ties the heads of
        all layers): they are measured on the whole model first. Then the segments, in the order in which weights are used.
    """
    nodes = walk.model.graph.nodes
    order = {id(n): i for i, n in enumerate(nodes)}
    # Found anew: cuts of an earlier sweep have moved what the groups' own positions were taken from.
    uses = {id(g): sorted(order[id(r.node)] for r in g.readings) for g in groups}

    def spans(group: Any, other: Any) -> bool:
        return group is not other and uses[id(group)][0] <= uses[id(other)][-1] < uses[id(group)][-1]

    spanning = tuple(g for g in groups if any(spans(g, o) for o in groups))
    first, late = _first_weights(walk, order), len(order)
    places = [
        # A group without a dimension (a factor below zero) begins where it is read.
        (min(uses[id(g)][0], late if g.factor < 0 else first.get(walk.algebra.find(g.factor), late)), uses[id(g)][-1], g)
        for g in groups
        if g not in spanning
    ]
    merged: list[tuple[int, int, list[Any]]] = []
    for start, end, group in sorted(places, key=lambda place: place[:2]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end), [*merged[-1][2], group])
        else:
            merged.append((start, end, [group]))
    segments, low = [], 0
    reads = [names_read(n) for n in nodes]
    for start, end, members in merged:
        segments.append(Segment(nodes[_cheapest_cut(walk, reads, low, start)], nodes[end], tuple(members)))
        low = end + 1
    return spanning, tuple(segments)


def _first_weights(walk: GraphWalk, order: Mapping[int, int]) -> dict[int, int]:
    """Returns the position of the first node that reads a constant with a dimension, by leaf factor.

    Shapes are left out: an exporter asks for those of all caches at the top of the graph, long before any layer.
    """
    first: dict[int, int] = {}
    for use in walk.constant_uses:
        place = order.get(id(use.node), len(order))
        for leaf in {leaf for factor in use.axes for leaf in walk.algebra.leaves(factor)}:
            first[leaf] = min(first.get(leaf, place), place)
    return first


def _cheapest_cut(walk: GraphWalk, reads: Sequence[set[str]], low: int, high: int) -> int:
    """Returns the position in [low, high] where the live tensors are smallest, of equals the last (more is run once).

    ``reads`` are the names that each node reads.
    """
    if low == high:
        return low
    nodes = walk.model.graph.nodes
    alive = set(live_tensors(walk, low))
    remaining = Counter(name for names in reads[low:] for name in names)
    best, least = low, _elements(walk, alive)
    for position in range(low, high):
        for name in reads[position]:
            remaining[name] -= 1
            if not remaining[name]:
                alive.discard(name)
        alive.update(t.name for t in nodes[position].outputs if present(t) and remaining.get(t.name))
        size = _elements(walk, alive)
        if size <= least:
            best, least = position + 1, size
    return best


def _elements(walk: GraphWalk, names: set[str]) -> int:
    total = 0
    for name in names:
        axes = walk.axes.get(name)
        total += 1 << 40 if axes is None else int(np.prod(walk.shape(axes), dtype=np.int64))
    return total


def live_tensors(walk: GraphWalk, position: int, waiting: Collection[int] = ()) -> list[str]:
    """Returns the names of the tensors made before ``position`` and read from there on; graph inputs left out.

    The graph's outputs are no readers: what is returned is not measured, and a cache of every layer is large. The inputs
    of shape arithmetic are carried too: after a cut behind ``position`` the shape may have to be recomputed from them.

    Args:
        walk: the analysis.
        position: of the first node behind.
        waiting: leaf factors that are still to be cut. A tensor that has one of them (a cache that was cast on top of the
            graph), or a size computed from one, will have another shape then: the tensors that it is made of are carried
            instead, and :func:`extract` recomputes it.
    """
    nodes = walk.model.graph.nodes[:position]
    made = {t.name: n for n in nodes for t in n.outputs if present(t)}
    changing = _changing(walk, nodes, waiting)
    found: set[str] = set()
    pending = list(made.keys() & set().union(*(names_read(n) for n in walk.model.graph.nodes[position:])))
    while pending:
        name = pending.pop()
        if name in found:
            continue
        found.add(name)
        if name in changing:
            pending += made.keys() & names_read(made[name])
        elif name in walk.values:
            pending += (n for n in names_read(made[name]) if n in walk.values and n in made)
    return sorted(found - changing)


def _changing(walk: GraphWalk, nodes: Sequence[gs.Node], waiting: Collection[int]) -> set[str]:
    """Returns the names of the tensors made by ``nodes`` that have a leaf factor of ``waiting``, or count one."""
    if not waiting:
        return set()
    leaves = {walk.algebra.find(leaf) for leaf in waiting}

    def has_one(name: str) -> bool:
        return any(not leaves.isdisjoint(walk.algebra.leaves(f)) for f in walk.axes.get(name) or ())

    found: set[str] = set()
    for node in nodes:
        read = names_read(node)
        counts = not found.isdisjoint(read) or any(has_one(name) for name in read)
        found |= {t.name for t in node.outputs if present(t) and (has_one(t.name) or (counts and t.name in walk.values))}
    return found


def nodes_for(
    nodes: Sequence[gs.Node],
    start: int,
    stop: int,
    wanted: Collection[str],
    given: Collection[str],
    replaced: Mapping[str, StandIn] | None = None,
) -> list[gs.Node]:
    """Returns the nodes before ``stop`` that ``wanted`` needs, in order: of those before ``start`` only what is not given.

    Args:
        nodes: of the graph, in order.
        start: position of the first node behind what is given.
        stop: position behind the last node.
        wanted: names of tensors.
        given: names of tensors made before ``start`` that are at hand.
        replaced: what stands in for tensors: their nodes read its source alone.
    """
    needed, result = set(wanted), []
    for index in reversed(range(stop)):
        node = nodes[index]
        if any(t.name in needed and (index >= start or t.name not in given) for t in node.outputs):
            result.append(node)
            needed |= names_read(node, replaced)
    return result[::-1]


def extract(
    walk: GraphWalk,
    start: int,
    stop: int,
    outputs: Sequence[str],
    types: Mapping[str, int],
    taps: Sequence[Tap] = (),
    replaced: Mapping[str, StandIn] | None = None,
) -> Extracted:
    """Makes a model of the nodes [start, stop) that ``outputs`` and ``taps`` need.

    What they need that was made before ``start`` and is not at hand is made again, from what is at hand and the inputs.

    Args:
        walk: the analysis; the graph may have been cut since.
        start: position of the first node.
        stop: position behind the last node.
        outputs: tensors to return.
        types: ONNX element types of the tensors that were made before ``start`` and are at hand.
        taps: activations whose moments are computed and returned.
        replaced: what stands in for tensors, by name.
    """
    graph = walk.model.graph
    needed = {*outputs, *(name for t in taps for name in t.reads)}
    nodes = nodes_for(graph.nodes, start, stop, needed, types, replaced)
    needed = needed.union(*(names_read(n, replaced) for n in nodes))
    made = {t.name for n in nodes for t in n.outputs}
    constants = {t.name: t for t in graph.outputs if is_constant(t) and t.name in needed}
    constants |= {t.name: t for n in nodes if stand_in_of(n, replaced) is None for t in n.inputs if is_constant(t)}
    declared = {t.name: t for t in graph.inputs}
    tensors = {t.name: t for n in graph.nodes[:start] for t in n.outputs}
    inputs = []
    for name in sorted(needed - made - set(constants)):
        if name in declared:
            tensor = declared[name]
            inputs.append(
                helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype)), tensor.shape)
            )
        else:
            length = _length(walk, tensors[name])
            inputs.append(helper.make_tensor_value_info(name, types[name], None if length is None else [length]))
    protos: list[onnx.NodeProto] = []
    for node in nodes:
        stand_in = stand_in_of(node, replaced)
        own, stored = ([OnnxExporter.export_node(node)], []) if stand_in is None else stand_in_nodes(stand_in)
        protos += own
        constants |= {t.name: t for t in stored}
    initializers, weights = detached_tensors(constants.values())
    for layout in sorted({t.layout + str(t.repeat) for t in taps if t.layout != "all"}):
        inputs.append(helper.make_tensor_value_info(f"{ROWS}_{layout}", TensorProto.BOOL, [None]))
    for tap in taps:
        add_moments(tap, protos, initializers, max(walk.model.opset, OLDEST_OPSET))
    names = [*outputs, *(o for t in taps for o in t.outputs)]
    ends = [onnx.ValueInfoProto(name=name) for name in names]
    proto = helper.make_graph(protos, "segment", inputs, ends, initializers)
    imports = list(graph.import_domains)
    if not any(o.domain in ("", "ai.onnx") for o in imports):
        imports.append(helper.make_opsetid("", walk.model.opset))
    if walk.model.opset < OLDEST_OPSET:
        imports = [o for o in imports if o.domain not in ("", "ai.onnx")] + [helper.make_opsetid("", OLDEST_OPSET)]
        _as_oldest(proto)
    model = helper.make_model(proto, opset_imports=imports, ir_version=graph.ir_version or 8)
    return Extracted(model, weights)


def _as_oldest(graph: onnx.GraphProto) -> None:
    """Writes nodes of an opset before `OLDEST_OPSET` as that one has them, where it has them otherwise."""
    for node in graph.node:
        given = {a.name: a for a in node.attribute}
        if node.op_type == "BatchNormalization" and "spatial" in given and given["spatial"].i == 1:
            node.attribute.remove(given["spatial"])  # it is by channels since
        if node.op_type == "Upsample" and "scales" in given:
            scales = np.asarray(given["scales"].floats, np.float32)
            graph.initializer.append(onnx.numpy_helper.from_array(scales, f"liar_opt_scales/{node.output[0]}"))
            node.input.append(f"liar_opt_scales/{node.output[0]}")
            node.attribute.remove(given["scales"])


def _length(walk: GraphWalk, tensor: gs.Tensor) -> int | None:
    """Returns how many numbers a computed shape, or a part of one, has whatever the input; None where that is not seen.

    Without it ONNX Runtime takes sizes that come from outside a segment to be none at all.
    """
    if is_constant(tensor):
        return int(tensor.shape[0]) if len(tensor.shape) == 1 else None
    node = tensor.inputs[0] if tensor.inputs else None
    axes = None if node is None or not node.inputs else walk.axes.get(node.inputs[0].name)
    if node is None or is_float(tensor.dtype or np.int64):
        return None
    if node.op == "Shape" and axes is not None:
        return len(range(len(axes))[slice(node.attrs.get("start", 0), node.attrs.get("end"))])
    if node.op == "Unsqueeze" and axes == ():
        return 1
    if has(node, Trait.COPIES):
        return _length(walk, node.inputs[0])
    if node.op == "Slice":
        whole = _length(walk, node.inputs[0])
        known = slice_arguments([t.values if is_constant(t) else None for t in node.inputs], node.attrs)
        if whole is None or known is None:
            return None
        return len(range(whole)[slice(known[0][0], known[1][0], (known[3] or [1])[0])])
    if has(node, Trait.ARITHMETIC | Trait.EXTREMES) or node.op == "Mod":
        lengths = [_length(walk, source) for source in node.inputs if not _is_number(walk, source)]
        return None if None in lengths else max((n for n in lengths if n is not None), default=None)
    if node.op == "Concat":
        parts = [_length(walk, part) for part in node.inputs]
        return sum(p for p in parts if p is not None) if None not in parts else None
    return None


def _is_number(walk: GraphWalk, tensor: gs.Tensor) -> bool:
    """Returns whether a tensor is known to be one number, of no axes."""
    value = tensor.values if is_constant(tensor) else walk.values.get(tensor.name)
    return value is not None and np.ndim(value) == 0


def stand_in_of(node: gs.Node, replaced: Mapping[str, StandIn] | None) -> StandIn | None:
    """Returns what stands in for a tensor that a node makes."""
    return next((replaced[t.name] for t in node.outputs if t.name in replaced), None) if replaced else None


def stand_in_nodes(stand_in: StandIn) -> tuple[list[onnx.NodeProto], list[gs.Constant]]:
    """Returns the nodes that make a tensor from what stands in for it, and their constants."""
    name = f"liar_opt_stand_in/{stand_in.target}"
    bias = gs.Constant(f"{name}/bias", stand_in.bias)
    if stand_in.matrix is None:
        shape = helper.make_node("Shape", [stand_in.source], [f"{name}/shape"])
        return [shape, helper.make_node("Expand", [bias.name, f"{name}/shape"], [stand_in.target])], [bias]
    matrix = gs.Constant(f"{name}/map", np.ascontiguousarray(stand_in.matrix))
    product = helper.make_node("MatMul", [stand_in.source, matrix.name], [f"{name}/product"])
    return [product, helper.make_node("Add", [f"{name}/product", bias.name], [stand_in.target])], [matrix, bias]


def names_read(node: gs.Node, replaced: Mapping[str, StandIn] | None = None) -> set[str]:
    """Returns the names of the tensors that a node reads, its branches included; constants left out."""
    stand_in = stand_in_of(node, replaced)
    if stand_in is not None:
        return {stand_in.source}
    names = {t.name for t in node.inputs if present(t) and not is_constant(t)}
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            names |= _captured(value)
    return names


def _captured(graph: gs.Graph) -> set[str]:
    # Constants are written into the subgraph itself.
    read = [*(t for n in graph.nodes for t in n.inputs), *graph.outputs]
    names = {t.name for t in read if present(t) and not is_constant(t)}
    for node in graph.nodes:
        for value in node.attrs.values():
            if isinstance(value, gs.Graph):
                names |= _captured(value)
    # The body of a Loop or Scan has inputs of its own.
    return names - {t.name for n in graph.nodes for t in n.outputs} - {t.name for t in graph.inputs}


def place_of(use: Any, expert: int = -1) -> Place:
    """Returns what a record with ``activation`` and ``activation_axis`` measures, of one expert's rows or of all."""
    beside = getattr(use, "beside", None)
    name = _both(use.activation.name, "" if beside is None else beside.name)
    return name, use.activation_axis, expert, getattr(use, "window", None)


def _both(tensor: str, beside: str) -> str:
    return f"{tensor} and {beside}" if beside else tensor


def add_moments(tap: Tap, nodes: list[onnx.NodeProto], initializers: list[onnx.TensorProto], opset: int) -> None:
    """Appends the nodes that compute the moments of one activation, as an ``opset`` of 9 or more has them.

    x [.., n] -> rows [N, n] -> real rows [r, n] in float32, weighted by the stream -> count, column sums [n], X^T X by
    block rows [width of block i, n - bounds[i]].
    """
    _MomentNodes(tap, nodes, initializers, opset).add()


@dataclass(frozen=True, eq=False)
class _MomentNodes:
    """Writes what `add_moments` says; ``make`` returns the name of a node's result, with the tap's own before it."""

    tap: Tap
    nodes: list[onnx.NodeProto]
    initializers: list[onnx.TensorProto]
    opset: int

    def add(self) -> None:
        tap = self.tap
        source = tap.tensor if tap.window is None else self.under(tap.tensor, tap.window)
        x = self.rows(source, tap.axis, tap.rank, tap.width - tap.beside_width, "x")
        if tap.beside:
            x = self.make("Concat", [x, self.rows(tap.beside, tap.axis, tap.rank, tap.beside_width, "y")], "xy", axis=1)
        if tap.numbers:
            x = self.of_expert(x)
        rows_seen, count, total, *second = tap.outputs[: 3 + len(tap.bounds) - 1]
        shape = self.make("Shape", [x], "x_shape_now")
        self.append("Gather", [shape, self.constant("zero", np.asarray(0, np.int64))], rows_seen, axis=0)
        if tap.stream is None:
            ones = self.ones(rows_seen)
            self.append("Cast", [rows_seen], count, to=TensorProto.FLOAT)
        else:
            x, ones, gain = self.weighted(x, tap.stream)
            self.append("MatMul", [ones, gain], count)
        self.append("MatMul", [ones, x], total)
        self.products(x, second)

    def append(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> None:
        self.nodes.append(helper.make_node(op, list(inputs), [output], **attributes))

    def make(self, op: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        self.append(op, inputs, f"{self.tap.key}/{name}", **attributes)
        return f"{self.tap.key}/{name}"

    def constant(self, name: str, value: Any) -> str:
        self.initializers.append(onnx.numpy_helper.from_array(np.asarray(value), f"{self.tap.key}/{name}"))
        return f"{self.tap.key}/{name}"

    def part(self, source: str, axes: Any, starts: Any, ends: Any, name: str, steps: Any = None) -> str:
        bounds = [np.asarray(v, np.int64).reshape(-1) for v in (starts, ends, axes)]
        if self.opset >= 10:
            bounds += [] if steps is None else [steps]
            given = [self.constant(f"{name}_{i}", v) for i, v in enumerate(bounds)]
            return self.make("Slice", [source, *given], name)
        settings: dict[str, Any] = dict(zip(("starts", "ends", "axes"), (v.tolist() for v in bounds), strict=True))
        result = self.make("Slice", [source], name, **settings)
        if steps is None or not np.any(steps != 1):
            return result
        # A slice knew no steps; the largest of one number is itself.
        return self.make("MaxPool", [result], f"{name}_every", kernel_shape=[1] * len(steps), strides=steps.tolist())

    def under(self, source: str, window: Window) -> str:
        """[b, n, ...] -> [b, places n, ...]: each place under the kernel is a slice of the padded input."""
        around = np.zeros((2, 2 + len(window.kernel)), np.int64)
        around[:, 2:] = np.reshape(window.pads, (2, -1))
        plain = self.make("Cast", [source], "x_float", to=TensorProto.FLOAT)
        if self.opset < 11:
            padded = self.make("Pad", [plain], "x_padded", pads=around.reshape(-1).tolist())
        else:
            padded = self.make("Pad", [plain, self.constant("pads", around.reshape(-1))], "x_padded")
        steps = np.asarray(window.strides, np.int64) * np.asarray(self.tap.every, np.int64)
        dilations, last = np.asarray(window.dilations), np.asarray(window.kernel) - 1
        parts = []
        for number, place in enumerate(np.argwhere(np.ones(window.kernel))):
            left = (last - place) * dilations
            ends = np.where(left, -left, np.iinfo(np.int64).max)
            parts.append(self.part(padded, range(2, 2 + len(last)), place * dilations, ends, f"place{number}", steps))
        return self.make("Concat", parts, "x_under", axis=1)

    def rows(self, source: str, axis: int, rank: int, width: int, name: str) -> str:
        """[.., width, ..] -> [real rows, width], in float32."""
        if axis != rank - 1:
            perm = [i for i in range(rank) if i != axis] + [axis]
            source = self.make("Transpose", [source], f"{name}_last", perm=perm)
        shape = self.constant(f"{name}_shape", np.asarray([-1, width], np.int64))
        result = self.real(self.make("Reshape", [source, shape], f"{name}_all"), name)
        return self.make("Cast", [result], name, to=TensorProto.FLOAT)

    def real(self, source: str, name: str) -> str:
        """Leaves out the rows of padding."""
        if self.tap.layout == "all":
            return source
        return self.make("Compress", [source, f"{ROWS}_{self.tap.layout}{self.tap.repeat}"], f"{name}_real", axis=0)

    def of_expert(self, x: str) -> str:
        """Leaves the rows of one expert."""
        flat = self.constant("numbers_shape", np.asarray([-1], np.int64))
        numbers = self.real(self.make("Reshape", [self.tap.numbers, flat], "numbers_all"), "numbers")
        numbers = self.make("Cast", [numbers], "numbers", to=TensorProto.INT64)
        expert = self.constant("expert", np.asarray(self.tap.expert, np.int64))
        own = self.make("Equal", [numbers, expert], "own")
        return self.make("Compress", [x, own], "x_own", axis=0)

    def ones(self, rows_seen: str) -> str:
        """[1, rows]: a product with it is column sums at the speed of a matrix product, and valid at every opset."""
        one = self.constant("one", np.asarray([1], np.int64))
        vector = self.make("Reshape", [rows_seen, one], "rows_vector")
        shape = self.make("Concat", [one, vector], "ones_shape", axis=0)
        value = onnx.numpy_helper.from_array(np.ones(1, np.float32))
        return self.make("ConstantOfShape", [shape], "ones", value=value)

    def weighted(self, x: str, stream: Stream) -> tuple[str, str, str]:
        """Rows times g = 1 / sqrt(var t): moments of weight g^2; sums are g^T (g x), the count is g^T g.

        Returns:
            The weighted rows, g^T and g.
        """
        width, seen = stream.projection.shape
        sum_ = self.make("MatMul", [x, self.constant("stream_weight", stream.weight)], "stream0")
        sum_ = self.make("Add", [sum_, self.constant("stream_offset", stream.offset)], "stream1")
        projection = self.constant("projection", stream.projection)
        for i, term in enumerate(stream.terms):
            projected = self.make("MatMul", [self.rows(term, 1, 2, width, f"term{i}"), projection], f"projected{i}")
            sum_ = self.make("Add", [sum_, projected], f"sum{i}")
        mean = self.constant("mean", np.full((seen, 1), 1.0 / seen, np.float32))
        variance = self.make("MatMul", [self.make("Mul", [sum_, sum_], "square"), mean], "variance")
        floored = self.make("Add", [variance, self.constant("floor", np.asarray(VARIANCE_FLOOR, np.float32))], "floored")
        gain = self.make("Reciprocal", [self.make("Sqrt", [floored], "deviation")], "gain")
        x = self.make("Mul", [x, gain], "weighted")
        return x, self.make("Transpose", [gain], "ones", perm=[1, 0]), gain

    def products(self, x: str, second: Sequence[str]) -> None:
        """X^T X, of which only the upper triangle of blocks is computed."""
        bounds = self.tap.bounds
        if len(bounds) == 2 and self.opset >= 11:  # before, Gemm wants a bias
            self.append("Gemm", [x, x], second[0], transA=1)
            return
        # Blocks of columns lie together then, and a product is quicker than one that transposes.
        columns = self.make("Transpose", [x], "columns", perm=[1, 0])
        for i, name in enumerate(second):
            left = self.part(columns, 0, bounds[i], bounds[i + 1], f"left{i}") if len(bounds) > 2 else columns
            right = self.part(x, 1, bounds[i], self.tap.width, f"right{i}") if i else x
            self.append("MatMul", [left, right], name)


def _extents(algebra: Any, factor: Any) -> list[int]:
    """Returns the sizes whose product an axis is, without ones; what was concatenated is one of them."""
    if algebra.size(factor) == 1:
        return []
    refinement = algebra.refinement(factor)
    if refinement is None or refinement.kind == "concat":
        return [algebra.size(factor)]
    return [size for part in refinement.parts for size in _extents(algebra, part)]


def tap_for(walk: GraphWalk, use: Any, width: int, batch: tuple[int, ...]) -> Tap:
    """Returns the tap of an activation.

    Args:
        walk: the analysis.
        use: a record with ``activation`` and ``activation_axis``, such as a consumer's.
        width: size of the contracted axis as it is now.
        batch: probe sizes of (batch, sequence) or (batch,) by which the row mask is laid out.
    """
    window = getattr(use, "window", None)
    # What slides has a row for each place of its output.
    axes = walk.axes[use.activation.name if window is None else use.node.outputs[0].name] or ()
    sizes = [size for i, f in enumerate(axes) if i != use.activation_axis for size in _extents(walk.algebra, f)]
    every: tuple[int, ...] = ()
    if window is not None:
        slid = walk.shape(axes)[2:]
        every = (1,) * len(slid)
        tokens = len(batch) == 2 and any(size == batch[1] != 1 for size in slid)
        if not tokens and math.prod(slid) > MOST_PLACES:
            every = (math.ceil((math.prod(slid) / MOST_PLACES) ** (1 / len(slid))),) * len(slid)
            thinned = [-(-size // step) for size, step in zip(slid, every, strict=True)]
            sizes = [*_extents(walk.algebra, axes[0]), *(size for size in thinned if size != 1)]
    layout, repeat = "all", 1
    lookup, beside = getattr(use, "lookup", None), getattr(use, "beside", None)
    numbers = "" if lookup is None else str(lookup.numbers.name)
    wanted = [s for s in batch if s != 1]
    if not batch:
        pass
    elif sizes == wanted:
        layout = "bs" if len(batch) == 2 else "b"
    elif len(batch) == 2 and sizes == wanted[::-1]:
        layout = "sb"
    elif len(batch) == 2 and sizes[: len(wanted)] == wanted:
        layout, repeat = "bs*", int(np.prod(sizes[len(wanted) :], dtype=np.int64))
    elif sizes == [s for s in batch[:1] if s != 1]:
        layout = "b"
    elif sizes[: len([s for s in batch[:1] if s != 1])] == [s for s in batch[:1] if s != 1]:
        layout, repeat = "b*", int(np.prod(sizes, dtype=np.int64)) // batch[0]
    return Tap(
        use.activation.name,
        use.activation_axis,
        len(axes),
        width,
        layout,
        repeat,
        numbers=numbers,
        window=window,
        every=every,
        beside="" if beside is None else str(beside.name),
        beside_width=0 if beside is None else walk.algebra.size(use.width),
    )


def stream_at(walk: GraphWalk, tap: Tap, terms: Sequence[gs.Variable], seed: int = 0) -> Stream | None:
    """Returns the sum of some tensors as the residual stream by which the rows of a tap are weighted.

    None where one of them is made only behind the others.
    """
    order = {t.name: i for i, n in enumerate(walk.model.graph.nodes) for t in n.outputs}
    if order.get(terms[-1].name, -1) > order.get(terms[0].name, -1):
        return None
    columns = walk.algebra.size((walk.axes[terms[0].name] or ())[-1])
    signs = _signs(columns, seed)
    nothing = np.zeros((tap.width, PROJECTION), np.float32), np.zeros(PROJECTION, np.float32)
    return Stream(tuple(t.name for t in terms), signs, *nothing)


def _signs(columns: int, seed: int) -> np.ndarray:
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (columns, PROJECTION))
    return np.asarray((signs - signs.mean(axis=0)) / np.sqrt(columns), np.float32)


def stream_of(walk: GraphWalk, use: ConsumerUse, seed: int = 0) -> Stream | None:
    """Returns the residual stream behind a consumer, or None where its output is not added to one.

    From y the graph is followed through what is added to it, constants and tensors of its own shape, as long as nothing
    else reads the sum.
    """
    graph = walk.model.graph
    order = {id(n): i for i, n in enumerate(graph.nodes)}
    if len(use.weight.shape) != 2 or use.output_axis != -1:
        return None
    # The stream may have been cut since it was analysed: the values are those of now, sizes are compared as they were.
    values = np.moveaxis(np.asarray(use.holder.inputs[use.weight_position].values), use.weight_axis, 0).astype(np.float32)
    analysed, columns = use.weight.shape[1 - use.weight_axis], values.shape[1]
    constant = np.zeros(columns, np.float32)
    if use.bias[0] == "input" and len(use.node.inputs) > use.bias[1] and is_constant(use.node.inputs[use.bias[1]]):
        constant = (
            constant + np.asarray(use.node.inputs[use.bias[1]].values, np.float32).reshape(-1)[:columns] * use.bias_scale
        )
    terms: list[str] = []
    tensor, axes = use.node.outputs[0], walk.axes.get(use.node.outputs[0].name)
    while len(tensor.outputs) == 1 and not any(tensor is t for t in graph.outputs) and axes is not None:
        reader = tensor.outputs[0]
        skip = has(reader, Trait.SKIPS)
        added = has(reader, Trait.ADDS | Trait.SKIPS)
        if not added and not has(reader, Trait.HANDS_ON):
            break
        others = [
            t
            for i, t in enumerate(reader.inputs)
            if t is not tensor and present(t) and (i < 2 or (skip and i in operator(reader.domain, reader.op).bias_inputs))
        ]
        for other in others if added else ():
            if is_constant(other):
                if int(np.prod(other.shape)) not in (1, columns):
                    return None
                constant = constant + np.asarray(other.values, np.float32).reshape(-1)
                continue
            own = walk.axes.get(other.name)
            made = order[id(other.inputs[0])] if other.inputs else -1
            if own is None or walk.shape(own) != walk.shape(axes) or made > order[id(use.node)]:
                return None
            terms.append(other.name)
        tensor, axes = reader.outputs[0], walk.axes.get(reader.outputs[0].name)
        if skip or axes is None or walk.algebra.size(axes[-1]) != analysed:
            break
    if not terms:
        return None
    signs = _signs(columns, seed)
    return Stream(tuple(terms), signs, (values * np.float32(use.scale)) @ signs, constant @ signs)


def row_mask(mask: np.ndarray, layout: str, repeat: int) -> np.ndarray:
    """Lays a row mask [b, s] or [b] out as the rows of an activation, bool [rows]."""
    sample = mask if mask.ndim == 1 else np.asarray(mask.any(axis=1))
    if layout == "bs":
        return mask.reshape(-1)
    if layout == "bs*":
        return np.repeat(mask.reshape(-1), repeat)
    if layout == "sb":
        return mask.T.reshape(-1)
    return np.repeat(sample, repeat) if layout == "b*" else sample
