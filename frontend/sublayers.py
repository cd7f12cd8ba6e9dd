"""Sublayers that can go whole: y = f(x), added to the residual stream, is one tensor behind which all of f lies.

From the consumers of a group the graph is followed forwards to the first tensor y through which everything goes that they
make, and which is only added to tensors that f has no part in. Something else can stand in for y then (`records.StandIn`):
a constant, or a map of x, the activation that the first weights of the group read, where it has the rows of y. What goes
with it is what nothing else reads.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from liar_opt.frontend.axes import Factor
from liar_opt.frontend.graph_tensors import is_constant, is_float, present
from liar_opt.frontend.records import ConsumerUse, StandIn
from liar_opt.frontend.rules.operators import has
from liar_opt.frontend.rules.table import Trait
from liar_opt.frontend.walk import GraphWalk

TIED = "it is of several layers, tied by weights or by a position bias that they share"
MOST_NODES = 512
"""Nodes between the consumers of a group and what is added to the stream, at most."""


@dataclass(frozen=True, eq=False)
class Sublayer:
    """What goes whole, as a record of what is measured: x beside y.

    Attributes:
        target: y, [.., m].
        source: x, [.., n]; None where no activation has its rows.
        like: what y is added to.
        node: what makes y.
        constants: identities of the constants that nothing else reads.
        dtype: of its weights.
        width: the factor of the channels of y, its last axis.
        source_width: that of x.
        rank: of y and x.
        columns: channels of y, m.
        rows: channels of x, n.
        cached: whether keys and values of it are outputs of the graph, which stay.
        members: names of the groups of widths within it, in execution order.
        left: elements of their weights that stay when it goes.
        bare: whether nothing stands in for it: what it adds to the stream is zero then.
    """

    target: gs.Variable
    source: gs.Variable | None
    like: gs.Variable
    node: gs.Node
    constants: frozenset[int]
    dtype: np.dtype[np.generic]
    width: Factor
    source_width: Factor | None
    rank: int
    columns: int
    rows: int
    cached: bool = False
    members: tuple[str, ...] = ()
    left: float = 0.0
    bare: bool = False

    @property
    def maps(self) -> bool:
        """Whether a map of x may stand in for it."""
        return self.source is not None and not self.bare

    @property
    def activation(self) -> gs.Variable:
        """What is measured."""
        return self.target if self.source is None else self.source

    @property
    def activation_axis(self) -> int:
        """The axis of its channels."""
        return self.rank - 1

    @property
    def beside(self) -> gs.Variable | None:
        """What is measured with it, row by row."""
        return None if self.source is None else self.target

    @property
    def map_parameters(self) -> int:
        """Elements of a map that stands in for it."""
        return self.rows * self.columns

    def stand_in(self, matrix: NDArray[np.float64] | None, bias: NDArray[np.float64]) -> StandIn:
        """Returns what stands in for y."""
        alike = self.source is not None and self.rows == self.columns
        source = self.source if self.source is not None and (matrix is not None or alike) else self.like
        return StandIn(
            self.target.name,
            source.name,
            None if matrix is None else matrix.astype(self.dtype),
            (np.zeros_like(bias) if self.bare else bias).astype(self.dtype),
        )


def find_sublayer(walk: GraphWalk, uses: Sequence[ConsumerUse], leaf: Factor, order: Mapping[int, int]) -> Sublayer | str:
    """Returns the sublayer that a width is in, or why it cannot go whole.

    Args:
        walk: the analysis.
        uses: the contractions of the width.
        leaf: its factor.
        order: position of each node, by identity.
    """
    found = _added(walk, uses, order)
    if isinstance(found, str):
        return found
    target, like = found
    (node,) = target.inputs
    axes = walk.axes.get(target.name) or ()
    makes = [t for t in node.outputs if present(t) and (t.outputs or _is_output(walk, t))]
    if len(makes) != 1 or len(axes) < 2:
        return "what it adds to the residual stream is one of several tensors that a node makes"
    plain = (u for u in walk.consumers if u.output_axis == -1 and u.window is None and id(u.node) in order)
    made = (walk.axes.get(u.node.outputs[0].name) for u in plain)
    if walk.algebra.find(axes[-1]) not in {walk.algebra.find(own[-1]) for own in made if own}:
        return "its channels are not the last axis of what it adds to the residual stream"
    weights = [u for u in walk.constant_uses if any(leaf in walk.algebra.leaves(f) for f in u.axes)]
    source, width = _source(walk, target, leaf, order)
    if source is None:
        first = min(order[id(u.node)] for u in weights)
        source, width = _entry(walk, target, _dead(walk, node, None, order, ()), first, order)
    other = width is None or walk.algebra.size(width) != walk.algebra.size(axes[-1])
    if other and any(order.get(id(n), -1) > order[id(node)] for n in like.inputs):
        return "no tensor of the shape of what it adds is made before it"
    dead = _dead(walk, node, source, order, ())
    cached = any(id(u.node) not in dead for u in weights)
    if cached:
        caches = [c.present for c in walk.caches.values()]
        if any(id(u.node) not in _dead(walk, node, source, order, caches) for u in weights):
            return "something else reads what is computed in it"
    held = {id(t): t for n in dead.values() for t in n.inputs if is_constant(t)}
    own = {key for key, t in held.items() if all(id(r) in dead for r in t.outputs)}
    sizes = walk.shape(axes)
    return Sublayer(
        target,
        source,
        like,
        node,
        frozenset(own),
        np.dtype(uses[0].weight.dtype),
        axes[-1],
        width,
        len(axes),
        sizes[-1],
        sizes[-1] if width is None else walk.algebra.size(width),
        cached,
    )


def _is_output(walk: GraphWalk, tensor: gs.Tensor) -> bool:
    return any(tensor is t for t in walk.model.graph.outputs)


def _added(walk: GraphWalk, uses: Sequence[ConsumerUse], order: Mapping[int, int]) -> tuple[gs.Variable, gs.Variable] | str:
    """Returns the first tensor behind contractions that is only added to others, and what it is added to."""
    front = {id(t): t for u in uses for t in u.node.outputs if present(t)}
    reached = {t.name for t in front.values()}
    passed: set[int] = set()
    for _ in range(MOST_NODES):
        if any(_is_output(walk, t) for t in front.values()):
            return "its output is one of the model's" if len(uses) == 1 else TIED
        readers = {id(t): [r for r in t.outputs if id(r) not in passed] for t in front.values()}
        if len(front) == 1:
            (tensor,) = front.values()
            others = [_other(walk, r, tensor, reached) for r in tensor.outputs]
            if others and all(o is not None for o in others):
                return tensor, others[0]
        waiting = [r for own in readers.values() for r in own]
        if not waiting or any(id(r) not in order for r in waiting):
            return "it is added to no residual stream"
        node = min(waiting, key=lambda r: order[id(r)])
        passed.add(id(node))
        made = [t for t in node.outputs if present(t) and (t.outputs or _is_output(walk, t))]
        front |= {id(t): t for t in made}
        reached |= {t.name for t in made}
        front = {key: t for key, t in front.items() if _is_output(walk, t) or any(id(r) not in passed for r in t.outputs)}
    return "it is added to no residual stream nearby"


def _other(walk: GraphWalk, reader: gs.Node, tensor: gs.Tensor, reached: Collection[str]) -> gs.Variable | None:
    """Returns what a node adds a tensor to, where it has its shape and no part of the tensor in it."""
    if not has(reader, Trait.ADDS | Trait.SKIPS) or sum(t is tensor for t in reader.inputs) != 1:
        return None
    others = [t for t in reader.inputs[:2] if t is not tensor]
    if len(others) != 1 or is_constant(others[0]) or not present(others[0]) or others[0].name in reached:
        return None
    shapes = [walk.axes.get(t.name) for t in (tensor, others[0])]
    same = None not in shapes and walk.shape(shapes[0] or ()) == walk.shape(shapes[1] or ())
    return others[0] if same else None


def _source(
    walk: GraphWalk, target: gs.Variable, leaf: Factor, order: Mapping[int, int]
) -> tuple[gs.Variable | None, Factor | None]:
    """Returns the activation that the first weights with a factor read, and its channels, where it has the rows of y."""
    rows = walk.shape(walk.axes.get(target.name) or ())[:-1]
    making = []
    for use in walk.consumers:
        axes = walk.input_axes(use.holder, use.weight_position) or ()
        others = [f for i, f in enumerate(axes) if i != use.weight_axis]
        if id(use.node) in order and any(leaf in walk.algebra.leaves(f) for f in others) and use.lookup is None:
            making.append(use)
    for use in sorted(making, key=lambda u: order[id(u.node)]):
        tensor = use.activation
        while True:
            axes = walk.axes.get(tensor.name) or ()
            if walk.shape(axes)[:-1] == rows and len(axes) == len(rows) + 1 and not walk.taken_from_weights(tensor):
                return tensor, axes[-1]
            if not tensor.inputs or not has(tensor.inputs[0], Trait.KEEPS_ORDER) or is_constant(tensor.inputs[0].inputs[0]):
                break
            tensor = tensor.inputs[0].inputs[0]
    return None, None


def _entry(
    walk: GraphWalk, target: gs.Variable, dead: Mapping[int, gs.Node], first: int, order: Mapping[int, int]
) -> tuple[gs.Variable | None, Factor | None]:
    """Returns the last tensor of the shape of y that a layer reads before its weights, which lay the rows out anew.

    Args:
        walk: the analysis.
        target: y.
        dead: the nodes of the layer.
        first: position of the first node that reads a weight of it.
        order: positions by identity.
    """
    shape = walk.shape(walk.axes.get(target.name) or ())
    read = {t.name: t for n in dead.values() for t in n.inputs if present(t) and not is_constant(t)}
    alike = (t for t in read.values() if walk.shape(walk.axes.get(t.name) or ()) == shape)
    given = [t for t in alike if t.dtype is None or is_float(t.dtype)]
    made = {t.name: order.get(id(t.inputs[0]), first) if t.inputs else -1 for t in given}
    last = max((t for t in given if made[t.name] < first), key=lambda t: made[t.name], default=None)
    return (None, None) if last is None else (last, (walk.axes[last.name] or ())[-1])


def _dead(
    walk: GraphWalk, node: gs.Node, source: gs.Variable | None, order: Mapping[int, int], spared: Collection[str]
) -> dict[int, gs.Node]:
    """Returns what nothing needs where something stands in for what a node makes; ``spared`` outputs need nothing."""
    outputs = {t.name for t in walk.model.graph.outputs} - set(spared)
    dead: dict[int, gs.Node] = {}
    waiting, seen = [(-order[id(node)], id(node), node)], {id(node)}
    while waiting:
        _, _, own = heapq.heappop(waiting)
        needed = any(t.name in outputs or any(id(r) not in dead for r in t.outputs) for t in own.outputs if present(t))
        if own is not node and (needed or (source is not None and any(t is source for t in own.outputs))):
            continue
        dead[id(own)] = own
        for maker in (m for t in own.inputs if not is_constant(t) for m in t.inputs):
            if id(maker) in order and id(maker) not in seen:
                seen.add(id(maker))
                heapq.heappush(waiting, (-order[id(maker)], id(maker), maker))
    return dead


def with_members(sublayer: Sublayer, members: Sequence[str], left: float) -> Sublayer:
    """Returns a sublayer with the groups in it."""
    return replace(sublayer, members=tuple(members), left=left)
