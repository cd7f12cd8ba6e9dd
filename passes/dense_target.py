"""Repairs that look at the dense model: it runs along, segment by segment.

By the time a consumer is repaired, the layers before it have been pruned: it sees x~ where the dense model has x. With
y = x W its dense output, s the other terms of the residual stream behind it, and s~ the same in the pruned model, the new
weights are fitted to

    dense       Y = y              the error-aware target: what the layer should have put out  (K-prune, arXiv 2308.03449)
    residual    Y = y + s - s~     what the stream should be, less what it carries already

as Y ~ x~_U W' + b', by the cross moments E[x~^T Y] and a ridge that pulls towards the local solution
(`runtime.solve.fit_dense_target`). Both models run on the same batches; rows of inputs and outputs are taken to the host.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liar_opt.frontend.either_model import analysis_of
from liar_opt.frontend.onnx_segments import (
    VARIANCE_FLOOR,
    Tap,
    live_tensors,
    row_mask,
    stream_of,
    tap_for,
)
from liar_opt.frontend.records import ConsumerUse
from liar_opt.frontend.walk import GraphWalk
from liar_opt.passes.base import DenseModel
from liar_opt.passes.groups import ChannelGroup, Consumer
from liar_opt.passes.measured import Repaired
from liar_opt.passes.sweep import Sweep, cut_arrays
from liar_opt.runtime.moments import Moments

SAME = 1e-2
"""How far y may be from x W plus a constant, relative, for rows of both to be taken as the same."""

Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class _Aim:
    """One use of a consumer: what is read of both models."""

    use: ConsumerUse
    tap: Tap
    terms: tuple[str, ...]
    weight: Array
    output: str

    def alike(self, pruned: dict[str, Any], dense: dict[str, Any]) -> bool:
        """Says whether what is read of both models has one shape; not where the stream itself was cut."""
        return all(pruned[n].shape == dense[n].shape for n in (self.output, *self.terms))

    def rows(self, values: dict[str, Any], name: str, axis: int, mask: NDArray[np.bool_] | None) -> Array:
        """Lays a tensor out as the rows that count."""
        array = np.asarray(values[name], np.float32)
        if axis != -1:
            array = np.moveaxis(array, axis, -1)
        laid: Array = array.reshape(-1, self.tap.width if name == self.tap.tensor else self.weight.shape[1])
        if mask is None or self.tap.layout == "all":
            return laid
        real: Array = laid[row_mask(mask, self.tap.layout, self.tap.repeat)]
        return real


class DenseTargets:
    """The dense model beside the one that is cut: moments of its outputs with the inputs of the other.

    Args:
        sweep: over the model that is cut.
        repair: "dense" or "residual": which target.
    """

    def __init__(self, sweep: Sweep, repair: str) -> None:
        self.sweep, self.repair, self.data, self.engine = sweep, repair, sweep.data, sweep.engine
        model = sweep.state.found(DenseModel).original.model()
        model.normalise()
        self.dense: GraphWalk = analysis_of(model)
        self.carry, self.beside = sweep.fresh_carry(), sweep.carry
        self.moments: dict[str, Moments] = {}

    def measure(self, groups: Sequence[ChannelGroup], stop: int, first: Any) -> None:
        """Measures the targets of one segment; arguments as ``Visitor.before``."""
        if self.beside is not self.sweep.carry:  # the sweep begins again
            self.carry, self.beside = self.sweep.fresh_carry(), self.sweep.carry
        found = (self.aim(u) for g in groups if not g.whole for c in g.consumers for u in c.measured)
        aims = [aim for aim in found if aim is not None]
        self.moments = self.targets(aims, stop, first) if aims else {}

    def of(self, consumer: Consumer) -> Moments | None:
        """Returns the moments of a consumer's input with its target, all uses pooled; None where one use has none."""
        found = [self.moments.get(u.node.name) for u in consumer.measured]
        pooled = found[0]
        for own in found[1:]:
            pooled = None if pooled is None or own is None else pooled.merge(own)
        return pooled

    def written(self, consumer: Consumer, repaired: Repaired) -> None:
        """Takes a new bias off the target: another group of the consumer is fitted to what is missing then."""
        for moments in {u.node.name: self.moments.get(u.node.name) for u in consumer.uses}.values():
            if moments is not None:
                moments.shift_target(repaired.bias)

    def aim(self, use: ConsumerUse) -> _Aim | None:
        """Returns what to read for one use; None where its output cannot be laid out beside its input."""
        if use.lookup is not None:
            return None
        tap = tap_for(self.sweep.walk, use, self.sweep.rewriter.size(use.width), self.sweep.batch)
        stream = stream_of(self.sweep.walk, use, self.sweep.seed)
        value = np.asarray(use.node.inputs[use.weight_position].values)
        if use.output_axis != -1 and value.ndim != 2:
            return None
        terms = () if stream is None else stream.terms
        # If an earlier cut appended an Add for the bias, the Add's output took over the node's output name; so the name is
        # looked up in the dense model.
        output = next(n for n in self.dense.model.graph.nodes if n.name == use.node.name).outputs[0].name
        rows = use.matrix(value).astype(np.float32) * np.float32(use.scale)
        return _Aim(use, tap, terms, rows, str(output))

    def targets(self, aims: list[_Aim], stop: int, first: Any) -> dict[str, Moments]:
        """Runs both models over the segment and adds up x~^T x~ and x~^T Y, by node name."""
        wanted = sorted({n for a in aims for n in (a.tap.tensor, a.output, *a.terms)})
        makers = {t.name: i for i, n in enumerate(self.sweep.walk.model.graph.nodes) for t in n.outputs}
        stop = max(stop, *(makers[a.output] + 1 for a in aims))
        result = {a.use.node.name: Moments(a.tap.width) for a in aims}
        broken: set[str] = set()
        ranks, own = self.sweep.ranks, self.sweep.own

        def run() -> None:
            both = zip(self.pruned_values(wanted, stop), self.dense_values(wanted, stop, first), strict=True)
            for index, (pruned, dense) in zip(own, both, strict=True):
                for aim in aims:
                    name = aim.use.node.name
                    if name not in broken and not self.add(result[name], aim, index, pruned, dense):
                        broken.add(name)

        ranks.together(run)
        broken.update(*ranks.gathered(broken))
        found = {n: m for n, m in result.items() if n not in broken}
        self.sweep.add_up(found, 0)
        return found

    def add(self, moments: Moments, aim: _Aim, index: int, pruned: dict[str, Any], dense: dict[str, Any]) -> bool:
        """Adds one batch of one use; says whether its rows could be laid side by side."""
        if not aim.alike(pruned, dense):
            return False
        mask, axis = self.data.row_masks[index], aim.use.output_axis
        x = aim.rows(pruned, aim.tap.tensor, aim.tap.axis, mask)  # [r, n]
        now, then = (aim.rows(v, aim.output, axis, mask) for v in (pruned, dense))  # [r, m]
        local = x @ aim.weight
        if now.shape != local.shape or now.shape != then.shape:
            return False
        constant = (now - local).mean(axis=0)
        if float(np.square(now - local - constant).sum()) > SAME**2 * float(np.square(now - now.mean(axis=0)).sum()):
            return False
        missed, stream = then - now, now
        for term in aim.terms:
            before, after = (aim.rows(v, term, -1, mask) for v in (dense, pruned))
            stream = stream + after
            if self.repair == "residual":
                missed = missed + before - after
        gain = np.ones((x.shape[0], 1), np.float32)
        if self.sweep.weighting == "stream" and aim.terms:
            gain = 1.0 / np.sqrt(stream.var(axis=1, keepdims=True) + VARIANCE_FLOOR)
        target = (local + missed) / np.float32(aim.use.scale)
        x, target, square = x * gain, target * gain, gain * gain
        held, count = index in self.sweep.held, float(square.sum())
        moments.add_block_rows(count, (x * gain).sum(axis=0), [x.T @ x], [0, x.shape[1]], held, x.shape[0])
        moments.add_cross(count, x.T @ target, (target * gain).sum(axis=0), float(np.square(target).sum()), held)
        return True

    def pruned_values(self, wanted: list[str], stop: int) -> Iterator[dict[str, Any]]:
        """The model as it is cut by now."""
        sweep, carry = self.sweep, self.sweep.carry
        fresh = [n for n in wanted if n not in carry.given]
        part = self.engine.part(sweep.walk, sweep.position(carry.at), stop, fresh, carry.given)
        for index in sweep.own:
            feeds, alive = self.data.batches[index], carry.values[index]
            values = {**alive, **part.run({**cut_arrays(feeds, sweep.rewriter.ends()), **alive}, arrays=fresh)}
            yield {n: self.engine.array(values[n]) for n in wanted}

    def dense_values(self, wanted: list[str], stop: int, first: Any) -> Iterator[dict[str, Any]]:
        """The dense model over the same nodes; the live tensors at the segment's first node are kept for the next."""
        nodes, carry = self.dense.model.graph.nodes, self.carry
        place = {n.name: i for i, n in enumerate(nodes)}
        start = 0 if carry.at is None else place[carry.at]
        last = next(n for n in reversed(self.sweep.walk.model.graph.nodes[:stop]) if n.name in place)
        at = None if first is None else self.counterpart(first, place)
        names = [] if at is None else live_tensors(self.dense, place[at])
        fresh = [n for n in dict.fromkeys([*wanted, *names]) if n not in carry.given]
        part = self.engine.part(self.dense, start, place[last.name] + 1, fresh, carry.given)
        for index in self.sweep.own:
            feeds, alive = self.data.batches[index], carry.values[index]
            values = {**alive, **part.run({**feeds, **alive}, arrays=[n for n in fresh if n in wanted])}
            yield {n: self.engine.array(values[n]) for n in wanted}
            if at is not None:
                carry.values[index] = {n: values[n] for n in names}
        if at is not None:
            carry.at = at

    def counterpart(self, first: Any, place: Mapping[str, int]) -> str:
        """Returns the dense model's node where a segment begins; an earlier sweep may have put ``first`` in."""
        behind = self.sweep.walk.model.graph.nodes[self.sweep.position(first) :]
        return next(str(n.name) for n in behind if n.name in place)
