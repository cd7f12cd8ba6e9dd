"""What ties the heads of layers to each other: a table with an axis of heads that several layers read.

T5 and MPNet add one position bias to the scores of every layer, BLOOM and MPT one table of slopes. Its axis of heads is
that of each layer, so the walk finds one dimension where the layers could choose for themselves. :func:`tied_reads` finds
the places where such a table meets a layer's own numbers. The walk gives each of them an axis of heads of its own
(:class:`Pick`), and the rewriter puts a Gather there once a layer has lost heads: nothing is added where nothing is cut.
What weights compute (queries, keys, a residual stream) is no table; nor is what one layer alone reads.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from liar_opt.frontend.axes import Factor
from liar_opt.frontend.graph_tensors import present

if TYPE_CHECKING:
    from liar_opt.frontend.walk import GraphWalk

LEAST_LAYERS = 2


class Tied(NamedTuple):
    """How a table is laid out along the axis that counts heads: outer x heads x inner, outermost first.

    ``dimension`` is what the reads of one table, or of several that are tied, have in common.
    """

    axis: int
    heads: int
    inner: int
    dimension: Factor


class Pick(NamedTuple):
    """A read of a table, input ``position`` of ``node``, that takes its layer's heads alone.

    ``factor`` is the innermost part of ``axis`` that has the layer's heads; what is outside it (a batch) stays whole.
    """

    node: gs.Node
    position: int
    axis: int
    factor: Factor


class Taken(NamedTuple):
    """Which indices of a table stay.

    Attributes:
        axis: of the table.
        rank: of the table.
        kept: int64, those that stay, of ``size``.
        size: how many there were.
        apart: whether the axis is a product of something else, which stays, and of ``size``.
    """

    axis: int
    rank: int
    kept: NDArray[np.int64]
    size: int
    apart: bool


def tied_reads(walk: GraphWalk) -> dict[tuple[int, int], Tied]:
    """Returns the reads that tie the heads of several layers, by (identity of the node, input position).

    Args:
        walk: the analysis, run to its end.
    """
    algebra = walk.algebra
    weights: dict[int, set[int]] = defaultdict(set)
    for use in walk.consumers:
        for leaf in algebra.leaves(use.contracted):
            weights[leaf].add(id(use.weight))
    heads = {leaf for factor in walk.batched for leaf in algebra.leaves(factor)}
    found: dict[tuple[int, int], Tied] = {}
    for leaf in sorted(heads & weights.keys()):
        if len(weights[leaf]) >= LEAST_LAYERS and algebra.pinned(leaf) is None:
            found |= _Leaf(walk, leaf).reads()
    return found


def freed_reads(walk: GraphWalk) -> dict[tuple[int, int], Tied]:
    """Returns those of the walk's tied reads by which layers have come apart; others are still tied by something else.

    Args:
        walk: the analysis with these reads, run to its end.
    """
    apart: dict[Factor, set[tuple[Factor, ...]]] = defaultdict(set)
    for pick in walk.picks:
        dimension = walk.tied[id(pick.node), pick.position].dimension
        apart[dimension].add(tuple(walk.algebra.leaves(pick.factor)))
    return {read: tied for read, tied in walk.tied.items() if len(apart[tied.dimension]) >= LEAST_LAYERS}


class _Leaf:
    """Where one leaf factor is: the tensors that have it on an axis."""

    def __init__(self, walk: GraphWalk, leaf: Factor) -> None:
        self.walk, self.leaf = walk, leaf
        self.contracted = {(id(u.node), u.activation.name): id(u.weight) for u in walk.consumers if self._in(u.contracted)}
        self.products = {id(node) for u in walk.consumers for node in (u.node, u.holder)}
        self.weights = {(id(u.holder), u.weight_position) for u in walk.consumers}
        self.nodes = [n for n in walk.model.graph.nodes if any(True for _ in self._inputs(n))]

    def reads(self) -> dict[tuple[int, int], Tied]:
        """Returns the reads of tables that several layers share."""
        shared = {name for name, layers in self._layers().items() if len(layers) >= LEAST_LAYERS}
        own: set[str] = set()  # what weights have computed
        found: dict[tuple[int, int], Tied] = {}
        for node in self.nodes:
            inputs = list(self._inputs(node))
            outputs = self._outputs(node)
            computes = id(node) in self.products
            if computes or any(name in own for _, name in inputs):
                own.update(outputs)
                for position, name in inputs if outputs else ():
                    table = name in shared and name not in own and (id(node), position) not in self.weights
                    tied = self._laid_out(node, position) if table else None
                    if tied is not None:
                        found[id(node), position] = tied
            elif any(name in shared for _, name in inputs):
                shared.update(outputs)
        return found

    def _in(self, factor: Factor) -> bool:
        return self.leaf in self.walk.algebra.leaves(factor)

    def _inputs(self, node: gs.Node) -> Iterator[tuple[int, str]]:
        """Yields position and name of the inputs that have the leaf."""
        for position, tensor in enumerate(node.inputs):
            if present(tensor) and any(self._in(f) for f in self.walk.seen_axes(node, position)):
                yield position, tensor.name

    def _outputs(self, node: gs.Node) -> list[str]:
        """Returns the names of the outputs that have the leaf."""
        return [t.name for t in node.outputs if any(self._in(f) for f in self.walk.axes.get(t.name) or ())]

    def _layers(self) -> dict[str, set[int]]:
        """Returns, for each tensor, the weights that contract the leaf of what is made of it: one for each layer."""
        result: dict[str, set[int]] = defaultdict(set)
        for node in reversed(self.nodes):
            behind = set().union(*(result[name] for name in self._outputs(node)))
            for _, name in self._inputs(node):
                result[name] |= behind
                if (id(node), name) in self.contracted:
                    result[name].add(self.contracted[id(node), name])
        return result

    def _laid_out(self, node: gs.Node, position: int) -> Tied | None:
        """Returns the layout of a table that is read; None where its heads cannot be picked out."""
        algebra, axes = self.walk.algebra, self.walk.seen_axes(node, position)
        places = [i for i, factor in enumerate(axes) if self._in(factor)]
        factor = axes[places[0]]
        leaves = algebra.leaves(factor)
        sizes = [algebra.size(leaf) for leaf in leaves]
        plain = len(places) == 1 and leaves.count(self.leaf) == 1 and math.prod(sizes) == algebra.size(factor)
        inner = sizes[leaves.index(self.leaf) + 1 :]
        if not plain or any(self.walk.is_open(size) for size in inner):
            return None
        return Tied(places[0], algebra.size(self.leaf), math.prod(inner), self.leaf)
