"""Change the basis of a width that lies between linear maps, so that its first channels are the subspace that is to stay.

    values             x -> x T in the constants that make the values, W -> T^-1 W in the output projection
    queries and keys   q -> q U, k -> k V in the constants of both; the product is q U V^T k^T then

T, U and V come from the moments, for each index set (each head, or each group of heads that share keys and values), in
closed form (`runtime.subspaces`). What is written here computes the same as before, or, for queries and keys, what it will
compute after the cut; the cut itself removes channels as everywhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liar_opt.frontend.linear import Bent, Source, sources_of
from liar_opt.frontend.onnx_segments import Place, place_of
from liar_opt.frontend.rewrite import Rewriter
from liar_opt.frontend.walk import GraphWalk
from liar_opt.passes.groups import ChannelGroup
from liar_opt.passes.measured import Measured
from liar_opt.runtime.arrays import arrays_of
from liar_opt.runtime.errors import InternalError
from liar_opt.runtime.moments import Array, Moments
from liar_opt.runtime.subspaces import Basis, copies, logit_forms, turn_values


@dataclass(frozen=True, eq=False)
class QueryForm:
    """What one constant of queries or keys became, for the check: q U or k V at the width that it had, zeros behind.

    Attributes:
        source: the constant.
        index: for each of its axes the positions, in the original, of ``value``.
        value: the new value there.
    """

    source: Source
    index: tuple[NDArray[np.int64], ...]
    value: NDArray[Any]


@dataclass(frozen=True, eq=False)
class LogitTurns:
    """Changes of basis of queries and keys, and what a cut loses of E|q k^T|^2.

    Attributes:
        queries: U with zeros behind it, [sets, d, d].
        keys: V with zeros behind it, [sets, d, d].
        lost: the share that the best forms of 0, 1, ... d channels lose, [d + 1].
        lost_channels: the share that is lost where as many channels of both are left out instead.
    """

    queries: Array
    keys: Array
    lost: Array
    lost_channels: float

    @property
    def form(self) -> Array:
        """U V^T, [sets, d, d]."""
        return self.queries @ self.keys.transpose(0, 2, 1)


def basis_of(owners: NDArray[np.int64], turn: Array) -> Basis:
    """Returns the changes of basis [sets, d, d] of the index sets at every place where an axis has them."""
    return Basis(tuple((places, turn[number]) for number, places in copies(owners, turn.shape[1])))


def value_turn(group: ChannelGroup, measured: Sequence[Measured], keep: int) -> Array:
    """Returns the change of basis of every index set, [sets, d, d], in which its first ``keep`` channels are to stay."""
    size, a = group.size, measured[0].moments.arrays
    covariances, grams = a.zeros((group.sets, size, size)), a.zeros((group.sets, size, size))
    for item in measured:
        covariance = item.statistics.covariance
        for number, places in copies(item.owners, size):
            rows = a.real(a.take(item.weight, places)) * item.target_scale
            covariances[number] += a.part(covariance, places, places)
            grams[number] += rows @ rows.T
    return np.stack([a.host(turn_values(covariances[i], grams[i], keep)) for i in range(group.sets)])


@dataclass(eq=False)
class BasisChange:
    """Writes changes of basis into a graph that is being cut.

    Attributes:
        walk: the analysis.
        rewriter: of the same graph.
        query_forms: what the queries became so far.
    """

    walk: GraphWalk
    rewriter: Rewriter
    query_forms: list[QueryForm] = field(default_factory=list)

    def logit_turns(self, group: ChannelGroup, moments: Mapping[Place, Moments], keep: int) -> LogitTurns:
        """Returns the best form of the products of queries and keys with ``keep`` channels a head."""
        size, seconds = group.size, []
        for operand in group.operands:
            statistics = moments[place_of(operand)].statistics()
            second = statistics.covariance if operand.relative else statistics.uncentred
            total = np.zeros((group.sets, size, size))
            a = arrays_of(second)
            for number, places in copies(self.owners(group, operand.width, operand.inside), size):
                total[number] += a.host(a.part(second, places, places))
            seconds.append(total)
        turns = np.zeros((2, group.sets, size, size))
        spectrum, channels = np.zeros(size), 0.0
        for number, (queries, keys) in enumerate(zip(*seconds, strict=True)):
            turns[0, number, :, :keep], turns[1, number, :, :keep], own = logit_forms(queries, keys, keep)
            spectrum += own
            weakest = np.argsort(np.diagonal(queries) * np.diagonal(keys))[: size - keep]
            channels += float(np.vdot(queries[np.ix_(weakest, weakest)], keys[np.ix_(weakest, weakest)]))
        whole = float(spectrum.sum()) or 1.0
        lost = np.append(np.cumsum(spectrum[::-1])[::-1], 0.0) / whole
        return LogitTurns(turns[0], turns[1], lost, channels / whole)

    def projected(self, group: ChannelGroup, form: Array) -> list[tuple[Source, NDArray[Any]]]:
        """Returns the constants of the queries under a form U V^T [sets, d, d]; they stay as they are in the graph."""
        return [(source, self._turned(group, source, form)) for source in group.operands[0].sources]

    def turn_values(self, group: ChannelGroup, turn: Array) -> None:
        """Writes a change of basis [sets, d, d] into the constants that give a group's dimension its channels."""
        ends = [u.node for c in group.consumers for u in c.uses]
        try:
            sources = sources_of(self.walk, group.factor, (), ends)
        except Bent as err:
            raise InternalError(f"group '{group.name}': {err}") from err
        self._turn(group, [(s, turn) for s in sources])

    def turn_logits(self, group: ChannelGroup, queries: Array, keys: Array) -> None:
        """Writes changes of basis, [sets, d, d] each, into the constants of queries and keys."""
        sides = zip(group.operands, (queries, keys), strict=True)
        turns = [(source, turn) for operand, turn in sides for source in operand.sources]
        for source, turn in turns:
            value = self._turned(group, source, turn)
            left = [np.flatnonzero(self.rewriter.mask(f)) for f in source.use.axes]
            inside = source.inside[left[source.axis]]
            left[source.axis] = left[source.axis][inside]
            self.query_forms.append(QueryForm(source, tuple(left), np.compress(inside, value, source.axis)))
        self._turn(group, turns)

    def owners(self, group: ChannelGroup, factor: int, inside: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Returns index set * size + channel for every position of an axis that is left, -1 where it is not the group's."""
        algebra = self.walk.algebra
        channels = algebra.owners(factor, group.factor)
        sets = np.zeros_like(channels) if group.outer is None else algebra.owners(factor, group.outer)
        owners = np.where(inside & (channels >= 0), sets * group.size + channels, -1)
        return np.asarray(owners[self.rewriter.mask(factor)])

    def _turn(self, group: ChannelGroup, turns: Sequence[tuple[Source, Array]]) -> None:
        """Changes the basis of constants; one that several nodes read alike stays one."""
        places: dict[tuple[int, bytes], list[tuple[Any, int]]] = {}
        entries: dict[tuple[int, bytes], tuple[Source, Array]] = {}
        for source, turn in turns:
            node, position = source.use.node, source.use.position
            key = (id(node.inputs[position]), source.inside.tobytes())
            places.setdefault(key, []).append((node, position))
            entries.setdefault(key, (source, turn))
        for key, (source, turn) in entries.items():
            self.rewriter.set_constant(places[key], self._turned(group, source, turn))

    def _turned(self, group: ChannelGroup, source: Source, turn: Array) -> NDArray[Any]:
        """Returns a constant, as it is now, in another basis."""
        value = np.asarray(source.use.node.inputs[source.use.position].values)
        basis = basis_of(self.owners(group, source.use.axes[source.axis], source.inside), turn)
        turned = np.moveaxis(basis.rows(np.moveaxis(value, source.axis, -1)), -1, source.axis)
        return np.ascontiguousarray(turned.astype(value.dtype))
