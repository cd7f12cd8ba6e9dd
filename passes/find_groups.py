"""Find the channel groups of a graph: what is left unpinned by the axis algebra and ends in weights.

A leaf factor qualifies when it is not pinned, when every contraction over it that reads data is linear with a constant
weight (the operator rules pin it otherwise), and when no axis holds it twice. The kind follows from the layout of the
contracted axis: the leaf alone is a feed-forward width ("ffn"); with other leaves inside it, it counts attention heads
("heads"), or the heads of one group ("grouped") where another such factor is outside it; with others only outside, it is
the width of a head ("value"). A width that has one row a sample where others have one a token is a "pooler". The last
three are reported and left alone.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from liar_opt.frontend.onnx_rewrite import Rewriter
from liar_opt.frontend.onnx_rules import ConsumerUse, GraphWalk, walk
from liar_opt.passes.axes import AxisAlgebra
from liar_opt.passes.base import Pass, PassResult, State
from liar_opt.passes.groups import KINDS, ChannelGroup, Consumer, Refusal

LEAST_SIZE = 2
NOT_PRUNED = {
    "value": "the width within a head is not pruned yet (each head needs its own index set)",
    "grouped": "the heads of a group that shares keys and values are pruned with their group",
    "pooler": "the hidden layer of a pooler is measured once a sample, too seldom to repair it, and holds little",
}


@dataclass(frozen=True)
class Found:
    """The groups of a graph in execution order, and what did not qualify."""

    groups: tuple[ChannelGroup, ...]
    refusals: tuple[Refusal, ...]


@dataclass(frozen=True)
class FindGroupsPass(Pass[None]):
    """Analyse the graph and list its channel groups."""

    name: ClassVar[str] = "find-groups"

    def plan(self, state: State) -> None:
        """Plans nothing: finding is pure."""

    def apply(self, state: State, plan: None) -> PassResult:
        """Adds the analysis and the groups to the state."""
        state.walk = walk(state.model, AxisAlgebra)
        found = find_groups(state.walk)
        state.groups = found.groups
        return PassResult(state, (), found.refusals)


def find_groups(walk: GraphWalk) -> Found:
    """Returns the channel groups of an analysed graph and the refusals.

    Args:
        walk: the analysis, run to its end.
    """
    algebra = walk.algebra
    order = {id(node): i for i, node in enumerate(walk.model.graph.nodes)}
    consumers: dict[int, list[ConsumerUse]] = defaultdict(list)
    refused: dict[tuple[str, int], list[str]] = defaultdict(list)
    for use in walk.consumers:
        for leaf in dict.fromkeys(algebra.leaves(use.width)):
            reason = algebra.pinned(leaf)
            if reason is not None:
                refused[reason, algebra.size(leaf)].append(use.node.name)
            else:
                consumers[leaf].append(use)
    touching = _touching(walk)
    rewriter = Rewriter(walk)
    most_rows = max((_rows(walk, u) for uses in consumers.values() for u in uses), default=0)
    # Hierarchical models have stages of fewer rows; a pooler has at most one a sample.
    samples = max((walk.input_sizes(t)[0] for t in walk.model.graph.inputs if t.shape), default=1)
    groups: list[ChannelGroup] = []
    others: list[ChannelGroup] = []
    for leaf, uses in consumers.items():
        size = algebra.size(leaf)
        constant_uses = [u for u in walk.constant_uses if any(leaf in algebra.leaves(f) for f in u.axes)]
        axes = [f for u in constant_uses for f in u.axes] + [u.width for u in uses]
        if any(algebra.repeats(f, leaf) for f in axes):
            refused["it occurs twice in one axis", size].append(uses[0].node.name)
            continue
        kind = _kind(algebra.leaves(uses[0].width), leaf, set(consumers))
        if kind == "ffn" and max(_rows(walk, u) for u in uses) < min(most_rows, samples + 1):
            kind = "pooler"
        if size < LEAST_SIZE:
            continue
        positions = [order[id(n)] for n in touching[leaf]]
        group = ChannelGroup(
            name=uses[0].node.name,
            kind=kind,
            factor=leaf,
            size=size,
            consumers=_consumers(walk, leaf, uses),
            parameters=sum(
                int(np.prod(c.shape, dtype=np.int64)) for c in {id(u.constant): u.constant for u in constant_uses}.values()
            ),
            start=min(positions),
            end=max(order[id(u.node)] for u in uses),
            constants=frozenset(id(u.constant) for u in constant_uses),
        )
        shared = any(np.any(c.owners < 0) for c in group.consumers)
        if kind in KINDS and shared:
            refused["its consumer reads other dimensions in the same axis", size].append(group.name)
            continue
        unfollowed = rewriter.check({leaf: range(1)}) if kind in KINDS else None
        if unfollowed is not None:
            refused[unfollowed, size].append(group.name)
            continue
        (groups if kind in KINDS else others).append(group)
    refusals = [Refusal(reason, tuple(dict.fromkeys(nodes)), size) for (reason, size), nodes in refused.items()]
    for kind, reason in NOT_PRUNED.items():
        left = [g for g in others if g.kind == kind]
        for size in sorted({g.size for g in left}):
            refusals.append(Refusal(reason, tuple(g.name for g in left if g.size == size), size))
    refusals += [Refusal(f"operator {op} has no rule", tuple(nodes)) for op, nodes in walk.unknown.items()]
    refusals += [Refusal(reason, tuple(nodes)) for reason, nodes in walk.left.items()]
    walk.model.graph.cleanup(remove_unused_node_outputs=False)
    groups.sort(key=lambda g: (g.end, g.start))
    return Found(tuple(groups), tuple(refusals))


def _rows(walk: GraphWalk, use: ConsumerUse) -> int:
    """Returns how many rows a contraction sees under the probe sizes."""
    sizes = walk.shape(walk.axes[use.activation.name] or ())
    return int(np.prod([s for i, s in enumerate(sizes) if i != use.activation_axis], dtype=np.int64))


def _kind(leaves: list[int], leaf: int, free: set[int]) -> str:
    if len(leaves) == 1:
        return "ffn"
    if leaves[-1] == leaf:
        return "value"
    return "heads" if free.isdisjoint(leaves[: leaves.index(leaf)]) else "grouped"


def _consumers(walk: GraphWalk, leaf: int, uses: list[ConsumerUse]) -> tuple[Consumer, ...]:
    by_weight: dict[tuple[int, int], list[ConsumerUse]] = defaultdict(list)
    for use in uses:
        by_weight[id(use.weight), use.weight_axis].append(use)
    return tuple(Consumer(tuple(u), walk.algebra.owners(u[0].width, leaf)) for u in by_weight.values())


def _touching(walk: GraphWalk) -> dict[int, list[Any]]:
    """Maps each leaf factor to the nodes that have it on an input or output axis."""
    result: dict[int, list[Any]] = defaultdict(list)
    leaves: dict[int, list[int]] = {}
    for node in walk.model.graph.nodes:
        found: set[int] = set()
        for tensor in [*node.inputs, *node.outputs]:
            for factor in walk.axes.get(tensor.name) or ():
                root = walk.algebra.find(factor)
                if root not in leaves:
                    leaves[root] = walk.algebra.leaves(root)
                found.update(leaves[root])
        for leaf in found:
            result[leaf].append(node)
    return result
