"""What can be cut: a :class:`ChannelGroup` is one coupled set of indices, with everything that has them.

A group has ``size`` blocks (a channel of a feed-forward layer, an attention head). Cutting block i removes, from every
member, the positions whose owner is i. A :class:`Consumer` is a weight that contracts the dimension: y = x W with x in
R^n; n is a multiple of the number of blocks where a block is wider than one channel. Several uses of one consumer (a
weight shared by layers) pool their moments; several consumers of one group are scored together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from liar_opt.frontend.linear import Operand
from liar_opt.frontend.rewrite import Cut, Within
from liar_opt.frontend.sublayers import Sublayer

KINDS = ("ffn", "heads")
"""Kinds of groups that ``sparsity`` prunes; "grouped" (heads within a group) and "pooler" are found and reported only."""
VALUES = "values"
"""Kind of the width of values within a head: pruned when asked for. It shares its weights with the layer's heads."""
RECURRENT = "recurrent"
"""Kind of the units of a recurrent operator, and of what it reads: pruned when asked for, since what one unit loses comes
back in every step."""
PATTERN = "pattern"
"""Kind of what is measured together for a pattern of zeros: weights that read one tensor. Nothing of it is cut."""
UNCUT = -1
"""Stands for the factor of a group that has none to be cut."""
QUERY_KEY = "query-key"
"""Kind of the width of queries and keys within a head: pruned when asked for, by a change of basis."""


GONE, MAPPED = 0, -1
"""What is kept of a group that goes with its whole sublayer: nothing but a constant, or a map of the sublayer's input."""
FORMS = {GONE: "constant", MAPPED: "map"}
"""What stands in for a sublayer, by what is kept."""


@dataclass(frozen=True, eq=False)
class Consumer:
    """A weight that contracts the group's dimension.

    Attributes:
        uses: the frontend's records of the contractions (one weight, one or more nodes).
        owners: int64 [n], the block that each position of the contracted axis belongs to (-1: none, always kept).
        expert: the expert, where the weight holds those of several: this is its part, for the rows that are routed to it.
        measured_uses: measure only these; the other uses see the same inputs (the second branch of a merged decoder).
            Empty: measure all.
    """

    uses: tuple[Any, ...]
    owners: NDArray[np.int64]
    expert: int | None = None
    measured_uses: tuple[Any, ...] = ()

    @property
    def measured(self) -> tuple[Any, ...]:
        """The uses whose inputs are measured."""
        return self.measured_uses or self.uses

    @property
    def width(self) -> int:
        """Number of contracted positions, n."""
        return len(self.owners)


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """One prunable dimension.

    Attributes:
        name: the first consumer's node, with the kind; unique within a graph.
        kind: "ffn" (each block one channel, or a run of them that goes together), "heads" (a block is all channels of a
            head), "values" (a block is one channel of a head), "grouped" or "pooler".
        factor: the leaf factor of the axis algebra; ``UNCUT`` where none is to be cut.
        size: number of blocks; of each head for "values".
        consumers: the weights that contract the dimension.
        parameters: elements of all constants that have the dimension (they shrink in proportion).
        start: position of the first node that touches the dimension, in the graph's order.
        end: position of the last consumer.
        constants: identities of the constants that have the dimension.
        elements: (id(constant), axis) -> (number of elements of the constant, fraction of that axis that belongs to this
            group); empty where groups share no constant.
        outer: the leaf factor that counts the heads of "values", or the experts, each with an index set of its own; None
            for one set.
        sets: number of index sets. Block j of set i has number i * size + j; each set keeps as many.
        queries: query heads in a block of kind "heads": more than one where they share keys and values.
        bent: for "values", why their basis cannot be changed; None where it can.
        operands: for "query-key", the queries and the keys; there are no consumers then.
        sublayer: what the group may go with as a whole; None where it cannot.
        whole: whether the sublayer is measured: "too", or "alone" where it goes.
        step: kept widths are multiples of so many blocks, as what runs the result wants it (`passes.fit_runtime`).
        together: whether groups of its kind and size keep one width, likewise.
        fixed: whether it keeps its width, or goes with its whole sublayer.
    """

    name: str
    kind: str
    factor: int
    size: int
    consumers: tuple[Consumer, ...]
    parameters: int
    start: int
    end: int
    constants: frozenset[int] = field(default_factory=frozenset)
    elements: Mapping[tuple[object, int], tuple[int, float]] = field(default_factory=dict)
    outer: int | None = None
    sets: int = 1
    queries: int = 1
    bent: str | None = None
    operands: tuple[Operand, ...] = ()
    sublayer: Sublayer | None = None
    whole: Literal["", "too", "alone"] = ""
    step: int = 1
    together: bool = False
    fixed: bool = False

    @property
    def block_width(self) -> int:
        """Channels per block, in the first consumer."""
        return int(np.sum(self.consumers[0].owners == 0)) if self.consumers else 1

    @property
    def readings(self) -> tuple[Any, ...]:
        """What is measured: records with ``node``, ``activation``, ``activation_axis`` and ``width``."""
        return (*(u for c in self.consumers for u in c.uses), *self.operands)

    @property
    def taps(self) -> tuple[tuple[Any, int], ...]:
        """Each of ``readings`` with the expert whose rows count, -1 for all rows."""
        sublayer = (self.sublayer,) if self.whole else ()
        whole = tuple((record, -1) for record in (*self.operands, *sublayer))
        if self.whole == "alone":
            return whole
        return (*((u, -1 if c.expert is None else c.expert) for c in self.consumers for u in c.measured), *whole)

    def cut(self, blocks: Sequence[int]) -> dict[int, Cut]:
        """Returns what ``Rewriter.cut`` is to keep of the group's factor when ``blocks`` stay."""
        if self.outer is None:
            return {self.factor: [int(b) for b in blocks]}
        kept = [[int(b) % self.size for b in blocks if int(b) // self.size == i] for i in range(self.sets)]
        # Heads that went before have no blocks; what is noted for them has no effect.
        most = max(len(k) for k in kept)
        return {self.factor: Within(self.outer, [k or list(range(most)) for k in kept])}


@dataclass(frozen=True)
class Refusal:
    """Something that does not qualify, and why."""

    reason: str
    nodes: tuple[str, ...] = ()
    size: int = 0


def parameters_left(groups: Sequence[ChannelGroup], keep: Mapping[str, int] | None = None) -> float:
    """Returns what is left of all elements of weights that have a dimension of a group, each counted once.

    A weight between two groups (of a 1x1 convolution, say) shrinks with both, and one whose axes are both of one group (the
    stream of a voice's decoder) twice.

    Args:
        groups: the groups.
        keep: number of blocks by group name; groups that are not named stay whole.
    """
    sizes: dict[object, int] = {}
    held: dict[tuple[object, int], float] = {}
    left: dict[tuple[object, int], float] = {}
    for group in groups:
        share_left = 1.0 if keep is None else max(keep.get(group.name, group.size), 0) / group.size
        for place, (size, share) in (group.elements or {(group.name, 0): (group.parameters, 1.0)}).items():
            sizes[place[0]] = size
            held[place] = held.get(place, 0.0) + share
            left[place] = left.get(place, 0.0) + share * share_left
    whole = dict.fromkeys(sizes, 1.0)
    others = dict.fromkeys(sizes, 1.0)  # elements of no group
    for place, share in held.items():
        whole[place[0]] *= 1.0 - share + left[place]
        others[place[0]] *= 1.0 - share
    stays = sum(size * (whole[constant] - others[constant]) for constant, size in sizes.items())
    return stays + stood_in(groups, keep or {})


def stood_in(groups: Sequence[ChannelGroup], keep: Mapping[str, int]) -> float:
    """Returns the elements that stay, or are new, where sublayers went whole: keys and values of a cache, and maps."""
    total = 0.0
    for group in groups:
        sublayer, kept = group.sublayer, keep.get(group.name, group.size)
        if sublayer is not None and kept <= GONE and group.name == sublayer.members[0]:
            total += sublayer.left + (sublayer.map_parameters if kept == MAPPED else 0)
    return total


def kept_positions(owners: NDArray[np.int64], kept: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the positions that stay when only the blocks ``kept`` do: their own and those of no block."""
    return np.flatnonzero((owners < 0) | np.isin(owners, np.asarray(kept)))
