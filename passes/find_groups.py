"""Find the channel groups of a graph: what is left unpinned by the axis algebra and ends in weights.

A leaf factor qualifies when it is not pinned, when every contraction over it that reads data is linear with a constant
weight (the operator rules pin it otherwise), and when no axis holds it twice. The kind follows from the layout of the
contracted axis: the leaf alone is a feed-forward width ("ffn"; so are channels between convolutions, of which each place
under the kernel has all); with other leaves inside it, it counts attention heads ("heads"), or runs of channels that go
together ("ffn" too, with a run for a block), where it is a part of the channels of a convolution or of a normalisation by
groups, or changes places with another one in a channel shuffle, and no products of activations stand side by side along
it; where another such factor is outside it, the heads of one group ("grouped"); with another that can be cut only outside,
or mixed by a product of activations, it is the width of values within a head ("values"). A width that has one row a sample
where others have one a token is a "pooler". "grouped" and "pooler" are reported and left alone. What a recurrent operator
reads, its own units of the step before among it, is "recurrent".

Of a concatenation each part is a dimension of its own: its layout is that of the part, and a consumer of the whole loses
the rows of the part alone.

Of the values each head may keep channels of its own, as many as the others: wherever the width is, the head must be too.
Where that is not so (a weight that all heads share) all heads keep the same channels.

Experts whose weights are one constant keep channels of their own in the same way, as many each, where each row stays that
of its expert from the first weight to the last. Each is a consumer of its own.

The width of queries and keys ("query-key") ends in no weight: a product of two activations contracts it. It is a group
where it is pinned for that reason alone and both sides are linear along it (`frontend.linear`).
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from liar_opt.frontend.axes import AxisAlgebra
from liar_opt.frontend.graph_tensors import is_constant
from liar_opt.frontend.linear import Bent, operands_of, sources_of
from liar_opt.frontend.records import ConstantUse, ConsumerUse
from liar_opt.frontend.rewrite import Rewriter
from liar_opt.frontend.rules.operators import POINTWISE, has
from liar_opt.frontend.rules.table import Trait
from liar_opt.frontend.sublayers import Sublayer, find_sublayer, with_members
from liar_opt.frontend.walk import GraphWalk, walk
from liar_opt.passes.base import Finding, Pass, PassResult, State
from liar_opt.passes.groups import KINDS, QUERY_KEY, RECURRENT, VALUES, ChannelGroup, Consumer, Refusal

NOT_WHOLE = "it cannot go whole"
LEAST_SIZE = 2
BESIDE = "its consumer reads other dimensions in the same axis"
NO_WEIGHT = "no weight makes this part of a concatenation: the frequencies of positions are such a part"
STEM = "the first convolution over an input is left alone: it holds little, and all that follows is made of it"
NOT_PRUNED = {
    "grouped": "the heads of a group that shares keys and values are pruned with their group",
    "pooler": "the hidden layer of a pooler is measured once a sample, too seldom to repair it, and holds little",
}


@dataclass(frozen=True)
class Found:
    """The groups of a graph in execution order, and what did not qualify.

    ``values`` and ``queries`` are cut when asked for alone; ``whole`` says why other products of queries and keys are left.
    ``poolers`` are reported among the refusals; they may be cut where a width that is cut elsewhere must be theirs too.
    ``sublayers`` says why groups cannot go with their whole sublayers.
    """

    groups: tuple[ChannelGroup, ...]
    refusals: tuple[Refusal, ...]
    values: tuple[ChannelGroup, ...] = ()
    queries: tuple[ChannelGroup, ...] = ()
    whole: tuple[Refusal, ...] = ()
    poolers: tuple[ChannelGroup, ...] = ()
    sublayers: tuple[Refusal, ...] = ()


@dataclass(frozen=True)
class WholeSublayers(Finding):
    """Why sublayers cannot go whole."""

    by: ClassVar[str] = "find-groups"
    refusals: tuple[Refusal, ...]


@dataclass(frozen=True)
class WholeQueries(Finding):
    """Why products of queries and keys keep their widths."""

    by: ClassVar[str] = "find-groups"
    refusals: tuple[Refusal, ...]


@dataclass(frozen=True)
class FindGroupsPass(Pass[None]):
    """Analyse the graph and list its channel groups."""

    name: ClassVar[str] = "find-groups"

    def plan(self, state: State) -> None:
        """Plans nothing: finding is pure."""

    def apply(self, state: State, plan: None) -> PassResult:
        """Adds the analysis and the groups to the state."""
        state.walk = walk(state.model)
        return PassResult(state, (), note_groups(state, find_groups(state.walk)))


def note_groups(state: State, found: Found) -> tuple[Refusal, ...]:
    """Adds the groups to the state, and returns the refusals."""
    state.groups, state.values, state.queries = found.groups, found.values, found.queries
    state.add(WholeQueries(found.whole))
    state.add(WholeSublayers(found.sublayers))
    return found.refusals


def find_groups(walk: GraphWalk, known: bool = False) -> Found:
    """Returns the channel groups of an analysed graph and the refusals.

    Args:
        walk: the analysis, run to its end.
        known: whether the same graph was looked at before: that the numbers follow a cut of each group is not asked again.
    """
    return _Grouping(walk, known).found()


class _Grouping:
    """Sorts the leaf factors that consumers contract into groups and refusals."""

    def __init__(self, walk: GraphWalk, known: bool) -> None:
        self.walk, self.known, self.algebra = walk, known, walk.algebra
        self.order = {id(node): i for i, node in enumerate(walk.model.graph.nodes)}
        self.refused: dict[tuple[str, int], list[str]] = defaultdict(list)
        self.left_whole: dict[str, list[str]] = defaultdict(list)
        self.consumers = self._consumers()
        self.places, self.constants = _places(walk), _constants(walk)
        self.mixed = {leaf for f in walk.mixed for leaf in self.algebra.leaves(f)}
        heads = {leaf for f in walk.batched for leaf in self.algebra.leaves(f)}
        self.runs = ({leaf for f in walk.channels for leaf in self.algebra.leaves(f)} | _shuffled(walk)) - heads
        self.rewriter = Rewriter(walk)
        plain = (u for uses in self.consumers.values() for u in uses if u.window is None)
        most_rows = max((_rows(walk, u) for u in plain), default=0)
        # Hierarchical models have stages of fewer rows; a pooler has at most one a sample.
        samples = max((walk.input_sizes(t)[0] for t in walk.model.graph.inputs if t.shape), default=1)
        self.least_rows = min(most_rows, samples + 1)

    def _consumers(self) -> dict[int, list[ConsumerUse]]:
        """Returns the contractions of each leaf factor that may go, in the graph's order."""
        found: dict[int, list[ConsumerUse]] = defaultdict(list)
        for use in self.walk.consumers:
            for leaf in dict.fromkeys(self.algebra.leaves(use.contracted)):
                reason, size = self.algebra.pinned(leaf), self.algebra.size(leaf)
                if reason is None:
                    found[leaf].append(use)
                elif size >= LEAST_SIZE:
                    self.refused[reason, size].append(use.node.name)
        return found

    def found(self) -> Found:
        """Returns what there is."""
        walk = self.walk
        groups: list[ChannelGroup] = []
        values: list[ChannelGroup] = []
        others: list[ChannelGroup] = []
        for leaf in self.consumers:
            group = self.group(leaf)
            if isinstance(group, ChannelGroup):
                group = self.checked(group)
            if isinstance(group, str):
                self.refused[group, self.algebra.size(leaf)].append(self.name)
            elif group is not None:
                kind = group.kind
                (groups if kind in KINDS else values if kind in (VALUES, RECURRENT) else others).append(group)
        queries = _queries(walk, self.rewriter, self.places, self.constants, self.known)
        refusals = [Refusal(r, tuple(dict.fromkeys(nodes)), size) for (r, size), nodes in self.refused.items()]
        for kind, reason in NOT_PRUNED.items():
            left = [g for g in others if g.kind == kind]
            for size in sorted({g.size for g in left}):
                refusals.append(Refusal(reason, tuple(g.name for g in left if g.size == size), size))
        refusals += [Refusal(f"operator {op} has no rule", tuple(nodes)) for op, nodes in walk.unknown.items()]
        refusals += [Refusal(reason, tuple(nodes)) for reason, nodes in walk.left.items()]
        walk.model.graph.cleanup(remove_unused_node_outputs=False)
        for members in (groups, values):
            members.sort(key=lambda g: (g.end, g.start))
        groups, values = self.in_sublayers(_named_apart(groups)), _named_apart(values)
        poolers = [g for g in others if g.kind == "pooler" and self.rewriter.check({g.factor: range(1)}) is None]
        whole = (Refusal(f"{NOT_WHOLE}: {reason}", tuple(names)) for reason, names in self.left_whole.items())
        return Found(tuple(groups), tuple(refusals), tuple(values), *queries, tuple(poolers), tuple(whole))

    def group(self, leaf: int) -> ChannelGroup | str | None:
        """Returns the group of a leaf factor, why it is none, or None where nothing is to be said; notes its name."""
        walk, algebra, uses = self.walk, self.algebra, self.consumers[leaf]
        size, constant_uses, nodes = algebra.size(leaf), self.constants[leaf], self.places[leaf].nodes
        self.name = uses[0].node.name
        axes = [f for u in constant_uses for f in u.axes] + [u.width for u in uses]
        if any(algebra.repeats(f, leaf) for f in axes):
            return "it occurs twice in one axis"
        leaves = layout(algebra, uses[0].contracted, leaf)
        kind = _kind(leaves, leaf, set(self.consumers), self.mixed, self.runs)
        if kind in KINDS and any(has(u.node, Trait.RECURS) for u in uses):
            kind = RECURRENT
        if kind == "ffn" and max(_rows(walk, u) for u in uses) < self.least_rows:
            kind = "pooler"
        if size < LEAST_SIZE:
            return None
        if _is_stem(nodes[0]):
            return STEM
        outer = None
        if any(u.lookup is not None for u in uses):
            outer = _experts_of(walk, uses, constant_uses, nodes, leaf)
            if outer is None:
                return "not everything between the weights of experts is looked up by the same numbers"
        if kind == VALUES and any(u.window is not None for u in uses):
            return "its consumer is a convolution over a window"
        if kind == VALUES:
            outer = _heads_of(walk, leaf, [u.axes for u in constant_uses], self.places[leaf].axes, within=True)
        inner = leaves[leaves.index(leaf) + 1 :]
        elements = _elements(walk, leaf, constant_uses)
        width = next((i for i, other in enumerate(inner) if other in self.mixed), len(inner) - 1)
        self.name = _name(uses[0], kind)
        return ChannelGroup(
            name=self.name,
            kind=kind,
            factor=leaf,
            size=size,
            consumers=_consumers(walk, leaf, uses, outer),
            parameters=_parameters(elements),
            start=min(self.order[id(n)] for n in nodes),
            end=max(self.order[id(u.node)] for u in uses),
            constants=frozenset(id(u.constant) for u in constant_uses),
            elements=elements,
            outer=outer,
            sets=1 if outer is None else algebra.size(outer),
            queries=math.prod(algebra.size(i) for i in inner[:width]) if kind == "heads" else 1,
            bent=_bent(walk, leaf, nodes, uses) if kind == VALUES else None,
        )

    def in_sublayers(self, groups: Sequence[ChannelGroup]) -> list[ChannelGroup]:
        """Returns the groups with the sublayers that they may go with as a whole; notes why others cannot."""
        found: dict[str, tuple[Sublayer, list[ChannelGroup]]] = {}
        for group in groups:
            sublayer = find_sublayer(self.walk, self.consumers[group.factor], group.factor, self.order)
            if isinstance(sublayer, str):
                self.left_whole[sublayer].append(group.name)
            else:
                found.setdefault(sublayer.target.name, (sublayer, []))[1].append(group)
        own: dict[str, Sublayer] = {}
        for sublayer, members in found.values():
            dead = sublayer.constants
            held = (size * share for g in members for (key, _), (size, share) in g.elements.items() if key not in dead)
            whole = with_members(sublayer, [g.name for g in members], float(sum(held)))
            own |= {g.name: whole for g in members}
        return [replace(g, sublayer=own.get(g.name)) for g in groups]

    def checked(self, group: ChannelGroup) -> ChannelGroup | str:
        """Returns the group as it can be cut, or why it cannot."""
        uses = self.consumers[group.factor]
        shared = any(np.any(c.owners < 0) for c in group.consumers)
        if shared and group.outer is not None and group.kind != VALUES:
            return BESIDE
        given = [u for u in self.constants[group.factor] if not any(u.constant is use.weight for use in uses)]
        joined = (self.algebra.refinement(u.contracted) for u in uses)
        joins = any(part is not None and part.kind == "concat" for part in joined)
        if (shared or joins) and not any(sum(n > 1 for n in u.constant.shape) > 1 for u in given):
            return NO_WEIGHT
        if shared and group.kind == VALUES:  # the basis of what lies beside may change, too
            group = replace(group, bent=group.bent or BESIDE)
        cut = group.kind in (*KINDS, VALUES, RECURRENT)
        unfollowed = self.rewriter.check({group.factor: range(1)}) if cut and not self.known else None
        return group if unfollowed is None else unfollowed


def _is_stem(node: Any) -> bool:
    """Returns whether a node is a convolution over a window, and no weight comes before its own."""
    if not has(node, Trait.SLIDES) or not is_constant(node.inputs[1]) or max(node.inputs[1].shape[2:], default=1) == 1:
        return False
    waiting, seen = [t for t in node.inputs if not is_constant(t)], set()
    while waiting:
        for maker in waiting.pop().inputs:
            if id(maker) in seen:
                continue
            seen.add(id(maker))
            if any(is_constant(t) and sum(n > 1 for n in t.shape) > 1 for t in maker.inputs):
                return False
            waiting += [t for t in maker.inputs if not is_constant(t)]
    return True


def _bent(walk: GraphWalk, leaf: int, nodes: Sequence[Any], uses: Sequence[ConsumerUse]) -> str | None:
    """Returns why the basis of a width cannot be changed, or None."""
    try:
        sources_of(walk, leaf, nodes, [u.node for u in uses])
    except Bent as err:
        return str(err)
    return None


def _queries(
    walk: GraphWalk,
    rewriter: Rewriter,
    places: dict[int, "_Places"],
    constants: dict[int, list[ConstantUse]],
    known: bool,
) -> tuple[tuple[ChannelGroup, ...], tuple[Refusal, ...]]:
    """Returns the widths of queries and keys that can be cut, in execution order, and why others cannot."""
    algebra = walk.algebra
    order = {id(node): i for i, node in enumerate(walk.model.graph.nodes)}
    groups: list[ChannelGroup] = []
    refused: dict[tuple[str, int], list[str]] = defaultdict(list)
    by_leaf: dict[int, list[Any]] = defaultdict(list)
    for product in walk.products:
        leaf, *more = algebra.leaves(product.width) or (None,)
        if leaf is None or not constants.get(leaf):
            continue
        if more:
            parted = "it is taken apart before the product, as a rotary embedding does", algebra.size(product.width)
            refused[parted].append(product.node.name)
        elif algebra.size(leaf) >= LEAST_SIZE:
            by_leaf[leaf].append(product)
    for leaf, products in by_leaf.items():
        size, node = algebra.size(leaf), products[0].node
        reason = algebra.pinned(leaf) if algebra.firm(leaf) else None
        if len(products) > 1:
            reason = reason or "several products contract it"
        axes = [f for u in constants[leaf] for f in u.axes]
        outer = _heads_of(walk, leaf, [u.axes for u in constants[leaf]], [a for a in places[leaf].axes if a])
        try:
            if reason is not None or any(algebra.repeats(f, leaf) for f in axes):
                raise Bent(reason or "it occurs twice in one axis")
            sides = operands_of(walk, products[0], leaf, outer, places[leaf].nodes)
            unfollowed = None if known else rewriter.check({leaf: range(1)})
            if unfollowed is not None:
                raise Bent(unfollowed)
        except Bent as err:
            refused[str(err), size].append(node.name)
            continue
        sources = [s for side in sides for s in side.sources]
        groups.append(
            ChannelGroup(
                name=f"{node.name} ({QUERY_KEY})",
                kind=QUERY_KEY,
                factor=leaf,
                size=size,
                consumers=(),
                parameters=sum(int(np.prod(s.use.constant.shape) * s.inside.mean()) for s in sources),
                start=min(order[id(n)] for n in places[leaf].nodes),
                end=order[id(node)],
                constants=frozenset(id(s.use.constant) for s in sources),
                outer=outer,
                sets=1 if outer is None else algebra.size(outer),
                operands=sides,
            )
        )
    groups.sort(key=lambda g: (g.end, g.start))
    return tuple(groups), tuple(Refusal(reason, tuple(names), size) for (reason, size), names in refused.items())


def _experts_of(
    walk: GraphWalk, uses: Sequence[ConsumerUse], constants: Sequence[ConstantUse], nodes: Sequence[Any], leaf: int
) -> int | None:
    """Returns the leaf that counts the experts which have channels of their own along ``leaf``; None where it is not so.

    Each row must stay that of its expert from the first weight to the last: every constant that has the channels is looked
    up by the same numbers, and every operator between keeps the rows in order.
    """
    algebra = walk.algebra
    found = [u.lookup for u in uses]
    first = found[0]
    if first is None or any(other is None or other.root is not first.root for other in found):
        return None
    stack = algebra.find(first.stack)
    lookups = {id(one.node): one for one in walk.lookups.values() if one.root is first.root}
    for constant in constants:
        own = [f for f in constant.axes if leaf in algebra.leaves(f)]
        alone = len(own) == 1 and all(part == leaf or algebra.pinned(part) for part in algebra.leaves(own[0]))
        if id(constant.node) not in lookups or algebra.find(constant.axes[0]) != stack or not alone:
            return None
    products = {id(u.node) for u in walk.consumers if u.lookup is not None and id(u.lookup.node) in lookups}
    kept = (id(node) in lookups or id(node) in products or _keeps_rows(walk, node, leaf) for node in nodes)
    return stack if all(kept) else None


def _keeps_rows(walk: GraphWalk, node: Any, leaf: int) -> bool:
    """Returns whether an operator leaves every axis but that of ``leaf`` as it is."""
    if has(node, POINTWISE | Trait.KEEPS_ORDER | Trait.TURNS | Trait.SHAPES):
        return True
    if not has(node, Trait.JOINS | Trait.SLICES | Trait.SPLITS):
        return False
    inputs = [walk.input_axes(node, i) for i in range(len(node.inputs) if has(node, Trait.JOINS) else 1)]
    outputs = [walk.axes.get(t.name) for t in node.outputs]
    known = [axes for axes in (*inputs, *outputs) if axes is not None]
    if len(known) != len(inputs) + len(outputs) or len({len(axes) for axes in known}) != 1:
        return False
    algebra = walk.algebra
    return all(
        any(leaf in algebra.leaves(f) for f in aligned) or all(algebra.same(aligned[0], f) for f in aligned)
        for aligned in zip(*known, strict=True)
    )


def _rows(walk: GraphWalk, use: ConsumerUse) -> int:
    """Returns how many rows a contraction sees under the probe sizes."""
    sizes = walk.shape(walk.axes[use.activation.name] or ())
    return int(np.prod([s for i, s in enumerate(sizes) if i != use.activation_axis], dtype=np.int64))


def _name(use: ConsumerUse, kind: str) -> str:
    """Returns the name of a group by its first consumer; one node may contract what it reads, and what it made before."""
    if kind == VALUES:
        return f"{use.node.name} (values)"
    return f"{use.node.name} (units)" if use.activation in use.node.outputs else str(use.node.name)


def layout(algebra: AxisAlgebra, factor: int, leaf: int) -> list[int]:
    """Returns the leaves of a factor, outermost first; of a concatenation those of the first part that has ``leaf``."""
    refinement = algebra.refinement(factor)
    if refinement is None or leaf not in algebra.leaves(factor):
        return algebra.leaves(factor)
    if refinement.kind == "concat":
        own = next((p for p in refinement.parts if leaf in algebra.leaves(p)), None)
        return [leaf] if own is None else layout(algebra, own, leaf)  # a part of one element has no leaves
    return [other for part in refinement.parts for other in layout(algebra, part, leaf)]


def _named_apart(groups: Sequence[ChannelGroup]) -> list[ChannelGroup]:
    """Numbers the groups that would have one name: parts of one concatenation, in the order of its axis."""
    together: dict[str, list[ChannelGroup]] = defaultdict(list)
    for group in groups:
        together[group.name].append(group)
    names: dict[int, str] = {}
    for name, same in together.items():
        same.sort(key=lambda g: int(np.argmax(g.consumers[0].owners >= 0)))
        for number, group in enumerate(same, 1):
            names[group.factor] = name if len(same) == 1 else f"{name} (part {number})"
    return [replace(g, name=names[g.factor]) for g in groups]


def _kind(leaves: list[int], leaf: int, free: set[int], mixed: set[int], runs: set[int]) -> str:
    alone = free.isdisjoint(leaves[: leaves.index(leaf)])
    if leaves[-1] == leaf:
        return "ffn" if alone and leaf not in mixed else VALUES
    return ("ffn" if leaf in runs else "heads") if alone else "grouped"


def _shuffled(walk: GraphWalk) -> set[int]:
    """Returns the leaves that lie outside another one in a constant and inside it in a second: channels are shuffled."""
    outside: set[tuple[int, int]] = set()
    for factor in dict.fromkeys(walk.algebra.find(f) for use in walk.constant_uses for f in use.axes):
        refinement = walk.algebra.refinement(factor)
        if refinement is not None and refinement.kind == "product":
            outside |= set(itertools.combinations(walk.algebra.leaves(factor), 2))
    return {leaf for a, b in outside if a != b and (b, a) in outside for leaf in (a, b)}


def _consumers(walk: GraphWalk, leaf: int, uses: list[ConsumerUse], outer: int | None) -> tuple[Consumer, ...]:
    if outer is not None and uses[0].lookup is not None:
        size = walk.algebra.size(leaf)
        return tuple(
            Consumer((use,), _of_expert(walk.algebra.owners(use.width, leaf), expert * size), expert)
            for use in uses
            for expert in range(walk.algebra.size(outer))
        )
    by_weight: dict[tuple[int, int], list[ConsumerUse]] = defaultdict(list)
    for use in uses:
        by_weight[id(use.weight), use.weight_axis].append(use)
    result = []
    for same in by_weight.values():
        owners = walk.algebra.owners(same[0].width, leaf)
        if outer is not None:
            heads = walk.algebra.owners(same[0].width, outer)
            owners = np.where(owners < 0, -1, heads * walk.algebra.size(leaf) + owners)
        # The two branches of a merged decoder read the same tokens, and one of them with nothing in its cache.
        told = [] if walk.of_first is None else [u for u in same if id(u.node) in walk.of_first]
        result.append(Consumer(tuple(same), owners, measured_uses=tuple(told)))
    return tuple(result)


def _of_expert(owners: NDArray[np.int64], first: int) -> NDArray[np.int64]:
    """Returns the blocks of one expert's channels, of which the first has the number ``first``."""
    return np.where(owners < 0, -1, owners + first)


@dataclass
class _Places:
    """Where a leaf is: the nodes that touch it and, for each tensor that is no constant, the factors of its axes."""

    nodes: list[Any] = field(default_factory=list)
    axes: list[tuple[int, ...]] = field(default_factory=list)


def _places(walk: GraphWalk) -> dict[int, _Places]:
    result: dict[int, _Places] = defaultdict(_Places)
    seen: set[str] = set()
    for node in walk.model.graph.nodes:
        found: set[int] = set()
        for tensor in [*node.inputs, *node.outputs]:
            axes = walk.axes.get(tensor.name) or ()
            leaves = {leaf for factor in axes for leaf in walk.algebra.leaves(factor)}
            found |= leaves
            if tensor.name not in seen:
                seen.add(tensor.name)
                for leaf in leaves:
                    result[leaf].axes.append(axes)
        for leaf in found:
            result[leaf].nodes.append(node)
    return result


def _constants(walk: GraphWalk) -> dict[int, list[ConstantUse]]:
    """Maps each leaf factor to the uses of constants that have it."""
    result: dict[int, list[ConstantUse]] = defaultdict(list)
    for use in walk.constant_uses:
        for leaf in {leaf for factor in use.axes for leaf in walk.algebra.leaves(factor)}:
            result[leaf].append(use)
    return result


def _elements(walk: GraphWalk, leaf: int, uses: Sequence[ConstantUse]) -> dict[tuple[object, int], tuple[int, float]]:
    """Returns the elements of each constant that has a dimension, and the share of the axis, for each axis that has it."""
    result: dict[tuple[object, int], tuple[int, float]] = {}
    for use in uses:
        count = int(np.prod(use.constant.shape, dtype=np.int64))
        for axis, factor in enumerate(use.axes):
            if leaf in walk.algebra.leaves(factor):
                result[id(use.constant), axis] = count, float(np.mean(walk.algebra.owners(factor, leaf) >= 0))
    return result


def _parameters(elements: Mapping[tuple[object, int], tuple[int, float]]) -> int:
    """Returns how many elements of constants have a dimension."""
    counts: dict[object, list[float]] = defaultdict(list)
    for (constant, _), (count, share) in elements.items():
        counts[constant].append(count * share)
    return sum(round(min(own)) for own in counts.values())


def _heads_of(
    walk: GraphWalk,
    leaf: int,
    constants: Sequence[tuple[int, ...]],
    tensors: Sequence[tuple[int, ...]],
    within: bool = False,
) -> int | None:
    """Returns the leaf that says, for every index of ``leaf`` wherever it is, in which head it is; None if there is none.

    In a constant it must be on the same axis, to be cut with it; in other tensors it may be on another one. With ``within``
    the indices of each head must lie side by side in the constants, so that each head may lose others.
    """
    algebra = walk.algebra

    def beside(axes: tuple[int, ...], elsewhere: bool) -> set[int]:
        result: set[int] | None = None
        for factor in axes:
            if leaf not in algebra.leaves(factor):
                continue
            here = algebra.owners(factor, leaf) >= 0
            found = {
                other
                for other in set(algebra.leaves(factor)) - {leaf}
                if not algebra.repeats(factor, other) and np.all(algebra.owners(factor, other)[here] >= 0)
                if elsewhere or not within or algebra.encloses(factor, other, leaf)
            }
            for factor_ in axes if elsewhere else ():
                if factor_ != factor:
                    leaves = set(algebra.leaves(factor_))
                    found |= {
                        other
                        for other in leaves
                        if not algebra.repeats(factor_, other) and np.all(algebra.owners(factor_, other) >= 0)
                    }
            result = found if result is None else result & found
        return result or set()

    common: set[int] | None = None
    for elsewhere, many in ((False, constants), (True, tensors)):
        for axes in dict.fromkeys(many):
            found = beside(axes, elsewhere)
            common = found if common is None else common & found
            if not common:
                return None
    return max(common or (), key=lambda o: (algebra.size(o), -o), default=None)
