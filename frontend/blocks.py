"""The blocks of a model: where its residual stream is all that goes on, and what repeats between such places.

The *stream* is a tensor through which everything behind it goes: each way from it to an output passes the next such
tensor, of the same dimensions. What is made of sizes alone is no way (shapes can be taken elsewhere), and the caches of
keys and values that a decoder gives back are no output here. Between two such places lies a *stretch*: one sublayer with
its addition, or a normalisation behind one. What repeats of their kinds is a *block*: attention and feed-forward layer;
self-attention, cross-attention and feed-forward layer; all in one. Nothing is asked by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from liar_opt.frontend.graph_tensors import is_float, present
from liar_opt.frontend.onnx_segments import names_read
from liar_opt.frontend.records import ConsumerUse
from liar_opt.frontend.rules.operators import has
from liar_opt.frontend.rules.table import Trait
from liar_opt.frontend.walk import GraphWalk

Dimensions = tuple[tuple[int, ...], ...]
"""The leaf factors of each axis of a tensor."""
MIXES, WEIGHS, PLAIN = "m", "w", "."
"""Kinds of stretches: products of activations (attention), contractions with weights alone, neither (a normalisation)."""


@dataclass(frozen=True, eq=False)
class Stack:
    """Blocks in a row: ``streams`` are the tensors before, between and behind them, one more than blocks.

    Attributes:
        streams: names of tensors.
        stretches: the places of the stream in each block, by name, and what lies between: tensors, one more than kinds.
        kinds: of the stretches of one block.
        offset: which of the tensors is the first of ``streams``.
        tensors: all places of the stream in a row, those before the first block and behind the last among them.
    """

    streams: tuple[str, ...]
    kinds: str
    offset: int
    tensors: tuple[str, ...]

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return len(self.streams) - 1

    def runs(self, length: int) -> list[Run]:
        """Returns all runs of so many blocks."""
        return [Run(self, first, length) for first in range(self.blocks - length + 1)]


class Run(NamedTuple):
    """Consecutive blocks of a stack: ``first`` counts from 0."""

    stack: Stack
    first: int
    length: int

    @property
    def before(self) -> str:
        """The stream that the first of them reads."""
        return self.stack.streams[self.first]

    @property
    def behind(self) -> str:
        """The stream that the last of them gives."""
        return self.stack.streams[self.first + self.length]

    @property
    def sums(self) -> tuple[str, str] | None:
        """Both as they are before the normalisation that ends a block, where one does; None where nothing is before."""
        stack = self.stack
        plain = len(stack.kinds) - len(stack.kinds.rstrip(PLAIN))
        places = [stack.offset + k * len(stack.kinds) - plain for k in (self.first, self.first + self.length)]
        return None if places[0] < 0 else (stack.tensors[places[0]], stack.tensors[places[1]])


class _Flow:
    """Which node's output everything behind a node goes through: its immediate post-dominator.

    Places are numbers: first the graph's inputs, then its nodes in order, and the end.
    """

    def __init__(self, walk: GraphWalk) -> None:
        graph = walk.model.graph
        self.walk, self.nodes = walk, list(graph.nodes)
        self.first = len(graph.inputs)
        self.end = self.first + len(self.nodes)
        self.made: list[list[Any]] = [[t] for t in graph.inputs]
        self.made += [[t for t in n.outputs if present(t)] for n in self.nodes]
        readers: dict[str, list[int]] = {}
        for place, node in enumerate(self.nodes, self.first):
            if any(present(t) and t.name not in walk.values for t in node.outputs):  # else it is shape arithmetic
                for name in names_read(node):
                    readers.setdefault(name, []).append(place)
        presents = {c.present for w in (walk, *walk.others) for c in w.caches.values()}
        self.ends = {t.name for t in graph.outputs} - presents
        self.readers = {n: found for n, found in readers.items() if n not in walk.values}
        self.follows = [self._follows(tensors) for tensors in self.made]
        self.next = self._dominators()

    def _follows(self, tensors: Sequence[Any]) -> list[int]:
        found = {place for t in tensors for place in self.readers.get(t.name, ())}
        return sorted(found | ({self.end} if any(t.name in self.ends for t in tensors) else set()))

    def _dominators(self) -> list[int | None]:
        found: list[int | None] = [None] * self.end + [self.end]
        for place in reversed(range(self.end)):
            common: int | None = None
            for behind in self.follows[place]:
                if found[behind] is None:
                    continue  # nothing but caches comes of it
                common = behind if common is None else self._both(common, behind, found)
            found[place] = common
        return found

    @staticmethod
    def _both(a: int, b: int, found: Sequence[int | None]) -> int:
        while a != b:
            low = min(a, b)
            behind = found[low]
            assert behind is not None
            a, b = behind, max(a, b)
        return a

    def read(self, place: int) -> list[Any]:
        """Returns the tensors of a place that something reads, or that are outputs."""
        return [t for t in self.made[place] if t.name in self.readers or t.name in self.ends]

    def name(self, place: int) -> str:
        """Returns the name of the one tensor of a place."""
        return str(self.read(place)[0].name)

    def stream(self, place: int) -> Dimensions | None:
        """Returns the dimensions of the one tensor of a place that is read; None where there are several, or no rows."""
        read = self.read(place)
        if len(read) != 1 or (read[0].dtype is not None and not is_float(read[0].dtype)):
            return None
        axes = self.walk.axes.get(read[0].name)
        if axes is None or len(axes) < 2:
            return None
        return tuple(tuple(self.walk.algebra.leaves(f)) for f in axes)

    def between(self, before: int, behind: int) -> set[int]:
        """Returns the places that read, by any way, what one gives, without those that another is on the way to."""
        found: set[int] = set()
        pending = [before]
        while pending:
            new = {p for p in self.follows[pending.pop()] if p != behind and p != self.end} - found
            found |= new
            pending += new
        return found | ({behind} if behind < self.end else set())


def inside(walk: GraphWalk, before: str, behind: str) -> list[Any]:
    """Returns the nodes that read one tensor, by any way that leads not through another, and do not make the other.

    What is computed of shapes alone is not among them; what caches are made of is.
    """
    flow = _Flow(walk)
    places = {t.name: place for place, tensors in enumerate(flow.made) for t in tensors}
    found = flow.between(places[before], places[behind]) - {places[behind]}
    return [flow.nodes[p - flow.first] for p in sorted(found)]


def last_product(walk: GraphWalk, run: Run, total: str) -> ConsumerUse | None:
    """Returns the last product with a weight of the block before a run that is added to its stream, and read nowhere else.

    Args:
        walk: the analysis.
        run: the blocks behind.
        total: the sum that it is a part of.
    """
    if not run.first:
        return None
    graph = walk.model.graph
    order = {id(n): i for i, n in enumerate(graph.nodes)}
    makers = {t.name: n for n in graph.nodes for t in n.outputs if present(t)}
    products = {id(u.node): u for u in walk.consumers}
    start = makers.get(run.stack.streams[run.first - 1])
    ends = {t.name for t in graph.outputs}
    found: list[ConsumerUse] = []
    pending = [makers[total]]
    while pending:
        node = pending.pop()
        use = products.get(id(node))
        if use is not None:
            plain = use.lookup is None and use.window is None and use.output_axis == -1 and len(use.weight.shape) == 2
            found += [use] if plain else []
            continue
        if not has(node, Trait.ADDS | Trait.HANDS_ON):
            continue
        read = [t for t in node.inputs if present(t) and t.name in makers and len(t.outputs) == 1 and t.name not in ends]
        pending += [makers[t.name] for t in (read if has(node, Trait.ADDS) else read[:1])]
    behind = -1 if start is None else order[id(start)]
    return max((u for u in found if order[id(u.node)] > behind), key=lambda u: order[id(u.node)], default=None)


def find_stacks(walk: GraphWalk) -> list[Stack]:
    """Returns the stacks of two or more blocks, in the order of their first stream."""
    flow = _Flow(walk)
    known = [flow.stream(place) for place in range(flow.end)]
    following = _following(flow, known)
    kinds = _Kinds(walk, flow)
    stretches = {before: kinds.of(before, behind) for before, behind in following.items()}
    # Of the ways into one end that with most sublayers, and of equals the one that begins first: others begin inside one.
    depth: dict[int, int] = {}
    last: dict[int, int] = {}
    for place in sorted(following, reverse=True):
        behind = following[place]
        depth[place] = (stretches[place][0] != PLAIN) + depth.get(behind, 0)
        last[place] = last.get(behind, behind)
    starts: dict[int, int] = {}
    for place in sorted(depth):
        if last[place] not in starts or depth[place] > depth[starts[last[place]]]:
            starts[last[place]] = place
    stacks = []
    for start in sorted(starts.values()):
        row = [start]
        while row[-1] in following:
            row.append(following[row[-1]])
        contracted = set[tuple[int, ...]]().union(*(stretches[place][1] for place in row[:-1]))
        own = known[start]
        stack = _stack("".join(stretches[place][0] for place in row[:-1]), tuple(flow.name(place) for place in row))
        if stack is not None and own is not None and own[-1] in contracted:  # what products contract is the last axis
            stacks.append(stack)
    return stacks


def _following(flow: _Flow, known: Sequence[Dimensions | None]) -> dict[int, int]:
    """Returns for each place the next one that all goes through and that has its dimensions, where there is one."""
    found = {}
    for place, own in enumerate(known):
        behind = flow.next[place]
        while own is not None and behind is not None and behind != flow.end:
            if known[behind] == own:
                found[place] = behind
                break
            behind = flow.next[behind]
    return found


class _Kinds:
    """What lies between places of the stream."""

    def __init__(self, walk: GraphWalk, flow: _Flow) -> None:
        self.walk, self.flow = walk, flow
        self.mixing = {id(p.node) for p in walk.products}
        self.weighing = {id(u.node): u for u in walk.consumers}

    def of(self, before: int, behind: int) -> tuple[str, set[tuple[int, ...]]]:
        """Returns the kind of a stretch, and the widths that products with weights contract in it."""
        within = [self.flow.nodes[p - self.flow.first] for p in self.flow.between(before, behind)]
        uses = [self.weighing[id(n)] for n in within if id(n) in self.weighing]
        widths = {tuple(self.walk.algebra.leaves(use.width)) for use in uses}
        if any(id(n) in self.mixing or has(n, Trait.MIXES) for n in within):
            return MIXES, widths
        return WEIGHS if uses else PLAIN, widths


def _stack(kinds: str, tensors: tuple[str, ...]) -> Stack | None:
    """Returns the longest repetition in the kinds of stretches; None where there is none.

    Of equals the shortest block, then one that begins with attention: behind a normalisation that follows a sublayer
    (BERT), not before it.
    """
    best: tuple[tuple[int, int, bool, int], Stack] | None = None
    for length in range(1, len(kinds) // 2 + 1):
        for offset in range(len(kinds) - 2 * length + 1):
            block = kinds[offset : offset + length]
            count = 1
            while kinds.startswith(block, offset + count * length):
                count += 1
            if count < 2 or set(block) == {PLAIN}:
                continue
            rank = count * length, -length, block[0] == MIXES, -offset
            if best is None or rank > best[0]:
                streams = tuple(tensors[offset + i * length] for i in range(count + 1))
                best = rank, Stack(streams, block, offset, tensors)
    return None if best is None else best[1]
