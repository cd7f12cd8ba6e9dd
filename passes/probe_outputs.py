"""What a cut of some groups would do to the outputs of the model, which stays as it is.

The cut is not made: the consumers of the groups get repaired weights with zeros in the removed rows
(`frontend.engine.Patch`), which computes the same.
"""

import bisect
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liar_opt.frontend.engine import AnyPatch, ConstantPatch, Part, Patch, Value
from liar_opt.frontend.graph_tensors import is_constant, is_float
from liar_opt.frontend.onnx_segments import live_tensors, plan_segments
from liar_opt.frontend.records import ConsumerUse, StandIn
from liar_opt.frontend.rules.operators import has
from liar_opt.frontend.rules.table import Trait
from liar_opt.frontend.walk import GraphWalk
from liar_opt.passes.groups import ChannelGroup, kept_positions
from liar_opt.passes.measured import Measured
from liar_opt.passes.prune_groups import GroupVisitor
from liar_opt.passes.sweep import Sweep, part_of_batch
from liar_opt.runtime.calibration_data import CalibrationData
from liar_opt.runtime.compare import common_part, output_rows

PROBE_BATCHES = 2
"""Held-back batches on which outputs are compared, at most."""
ENOUGH_ROWS = 1024
"""Real rows in those batches from which on no other is taken."""
PROBE_OUTPUTS = 4
"""Outputs that are compared, the first ones: a decoder has dozens of caches behind its logits."""
PROBE_ROWS = 256
"""Rows of each output and batch that are kept: those of a vocabulary are long."""

AT_ONCE = 1 << 16
"""Elements of rows that are compared at once: what stays in a cache."""

Rows = dict[str, NDArray[Any]]


class ProbeOutputs:
    """Runs the rest of the model behind what is changed, or the whole, on a few held-back samples.

    The dense model runs once, in parts, and its live tensors between them are kept. What runs again is the part that is
    changed, which is made anew, and the parts behind it, which are made once for all. A matrix that gives an output row by
    row, as that of a vocabulary does, is multiplied by the rows that are compared alone.

    Args:
        sweep: over the model, which stays as it is.
        groups: whose cuts are probed one by one: the model is divided where a sweep over them divides it. Without any it
            runs as a whole.
        rows: real rows to compare outputs on, about.
    """

    def __init__(self, sweep: Sweep, groups: Sequence[ChannelGroup] = (), rows: int = ENOUGH_ROWS) -> None:
        self.sweep, self.engine, self.nodes = sweep, sweep.engine, sweep.walk.model.graph.nodes
        self.data = probed_data(sweep, rows)
        segments = plan_segments(sweep.walk, groups)[1] if groups else ()
        self.places = sorted({0, len(self.nodes), *(sweep.position(s.first) for s in segments)})
        self.names = [live_tensors(sweep.walk, place) for place in self.places]
        self.live: list[list[dict[str, Value]]] = [[{} for _ in self.data.batches]]
        self.parts: dict[int, Part] = {}
        self.made = {t.name: i for i, node in enumerate(self.nodes) for t in node.outputs}
        ends = [
            t for t in sweep.walk.model.graph.outputs if getattr(t, "type", "") == "tensor_type"
        ]  # no sequence, and no constant
        self.outputs = [t.name for t in ends if is_float(t.dtype)][:PROBE_OUTPUTS]
        heads = {t.name: head_of(sweep.walk, t) for t in ends if t.name in self.outputs}
        self.heads = {name: head for name, head in heads.items() if head is not None}
        self.sources = {name: self.heads[name].activation.name if name in self.heads else name for name in self.outputs}
        self.head_parts: dict[str, Part] = {}

    @functools.cached_property
    def dense(self) -> list[Rows]:
        """Rows of the dense model's outputs, for each probed batch; it runs when they are first asked for."""
        return self._ends(0, 1)

    @functools.cached_property
    def power(self) -> dict[str, float]:
        """The sum of squares of those rows, for each output."""
        return {name: sum(square(rows[name]) for rows in self.dense) for name in self.outputs}

    def difference(self, patches: Sequence[AnyPatch]) -> float | None:
        """Returns the relative squared difference of the first output that the patches change at all.

        Rows are compared about their own means. Of logits that is what their softmax sees: for a vocabulary it is nearly
        proportional to the divergence, for all layers alike, where the plain difference says too little of late layers (in
        SmolLM2 by a factor of four). What a model is for comes first among its outputs, caches come after. None where no
        output changes.

        Args:
            patches: the consumers, constants and tensors that are changed.
        """
        changed = [position for patch in patches for position in self._changed(patch)]
        if not changed or not self.outputs:
            return None
        dense = self.dense
        # What stands in for a tensor reads another, which nothing that is changed has made.
        read = [self.made.get(patch.source, -1) + 1 for patch in patches if isinstance(patch, StandIn)]
        start = bisect.bisect_right(self.places, min([*changed, *read])) - 1
        ends = self._ends(start, bisect.bisect_right(self.places, max(changed)), together(patches))
        for name in self.outputs:
            if self.made.get(name, -1) < min(changed):
                continue
            lost = sum(squared_difference(x[name], y[name]) for x, y in zip(ends, dense, strict=True))
            if lost > 0:
                return lost / (self.power[name] or 1.0)
        return None

    def _changed(self, patch: AnyPatch) -> list[int]:
        """Returns the positions of the nodes that a patch changes."""
        if isinstance(patch, StandIn):
            return [self.made[patch.target]]
        if isinstance(patch, ConstantPatch):
            return [self.sweep.position(patch.place[0])]
        return [self.sweep.position(node) for use in patch.uses for node in (use.node, use.holder)]

    def _ends(self, start: int, stop: int, patches: Sequence[AnyPatch] = ()) -> list[Rows]:
        """Runs the model from a place on; returns the same rows of its outputs each time.

        Args:
            start: number of the place.
            stop: number of the place behind what is patched.
            patches: without any, the live tensors at every place are kept.
        """
        sources, masks, array = dict.fromkeys(self.sources.values()), self.data.row_masks, self.engine.array
        values = self.live[start]
        found = [
            {n: some_rows(array(own[n]), mask) for n in sources if n in own}
            for own, mask in zip(values, masks, strict=True)
        ]
        for begin, end in ((start, stop), *((i, i + 1) for i in range(stop, len(self.places) - 1))):
            part = self._part(begin, end, values[0], patches if begin == start else ())
            pairs = zip(self.data.batches, values, strict=True)
            ran = [{} if part is None else part.run({**feeds, **own}) for feeds, own in pairs]
            for rows, made, mask in zip(found, ran, masks, strict=True):
                rows.update({n: some_rows(array(made[n]), mask) for n in sources if n in made})
            both = [{**own, **made} for own, made in zip(values, ran, strict=True)]
            values = [{n: own[n] for n in self.names[end]} for own in both]
            if not patches:
                values = self._kept(values)
                self.live.append(values)
        return [self._behind_heads(rows, patches) for rows in found]

    def _behind_heads(self, rows: Rows, patches: Sequence[AnyPatch]) -> Rows:
        """Returns rows of outputs [r, c] from those of the tensors that they are taken from."""
        result: Rows = {}
        for name, source in self.sources.items():
            if source not in rows:
                continue
            if name not in self.heads:
                result[name] = rows[source]
                continue
            head, axes = self.heads[name], self.sweep.walk.axes[source] or ()
            given = {source: rows[source].reshape(*[1] * (len(axes) - 2), *rows[source].shape)}
            span = self.sweep.position(head.node), self.made[name] + 1
            changed = [p for p in patches if any(span[0] <= place < span[1] for place in self._changed(p))]
            part = self.head_parts.get(name)
            if part is None or changed:
                part = self.engine.part(self.sweep.walk, *span, [name], given, patches=changed, once=True)
            if not changed:
                self.head_parts[name] = part
            result[name] = some_rows(self.engine.array(part.run(given)[name]), None)
        return result

    def _part(self, begin: int, end: int, given: Mapping[str, Value], patches: Sequence[AnyPatch]) -> Part | None:
        """Returns what runs the nodes between two places, None where nobody needs them; without patches it is made once."""
        if not patches and begin in self.parts:
            return self.parts[begin]
        start, stop = self.places[begin], self.places[end]
        names = dict.fromkeys([*self.sources.values(), *self.names[end]])
        wanted = [n for n in names if start <= self.made.get(n, -1) < stop]
        if not wanted:
            return None
        part = self.engine.part(self.sweep.walk, start, stop, wanted, given, patches=patches, once=True)
        if not patches:
            self.parts[begin] = part
        return part

    def _kept(self, values: list[dict[str, Value]]) -> list[dict[str, Value]]:
        """Returns live tensors; where those of all places are large, what was not live before goes to the disk."""
        memory, array = self.sweep.memory, self.engine.array
        news = [{n for n, v in own.items() if old.get(n) is not v} for own, old in zip(values, self.live[-1], strict=True)]
        size = sum(array(own[n]).nbytes for own, names in zip(values, news, strict=True) for n in names) * len(self.places)
        if memory.keep(size):
            return values
        stored = [{n: memory.store.put(array(own[n])) for n in names} for own, names in zip(values, news, strict=True)]
        return [{**own, **on_disk} for own, on_disk in zip(values, stored, strict=True)]


def head_of(walk: GraphWalk, output: Any) -> ConsumerUse | None:
    """Returns the product with a constant matrix that gives an output, each row of it from one row of a tensor.

    A vector may be added behind it. None where the output is made in another way.
    """
    uses = {use.node.outputs[0].name: use for use in walk.consumers}
    while output.name not in uses:
        node = output.inputs[0] if output.inputs else None
        if node is None or not has(node, Trait.COPIES | Trait.ADDS):
            return None
        vectors = [t for t in node.inputs if is_constant(t) and len(t.shape) <= 1]
        rest = [t for t in node.inputs if all(t is not vector for vector in vectors)]
        if len(rest) != 1 or is_constant(rest[0]):
            return None
        output = rest[0]
    use = uses[output.name]
    axes, ends = walk.axes.get(use.activation.name), walk.axes.get(output.name)
    if axes is None or ends is None or len(axes) != len(ends) or len(axes) < 2 or len(use.weight.shape) != 2:
        return None
    last = -1, len(axes) - 1
    whole = use.window is None and use.lookup is None and use.activation.inputs
    return use if whole and use.activation_axis in last and use.output_axis in last else None


def probed_data(sweep: Sweep, rows: int) -> CalibrationData:
    """Returns the first samples of held-back batches, about so many real rows in all, as batches of their own."""
    data, places = sweep.data, probed_batches(sweep.data, sweep.held)
    each = -(-rows * data.samples // (max(data.tokens, 1) * len(places)))
    batches, masks = zip(*(part_of_batch(sweep.state, i, each) for i in places), strict=True)
    return replace(data, batches=batches, row_masks=masks)


def squared_difference(found: NDArray[Any], dense: NDArray[Any]) -> float:
    """Returns what rows of an output [r, c] have lost, each about its own mean, as far as both go."""
    x, y = common_part(found, dense)
    return sum(square(a.astype(np.float64) - b.astype(np.float64)) for a, b in zip(_pieces(x), _pieces(y), strict=True))


def square(rows: NDArray[Any]) -> float:
    """Returns the sum of squares of rows [r, c], each about its own mean: a softmax does not see what all logits share."""
    total = 0.0
    for piece in _pieces(rows):
        about = piece.astype(np.float64)
        if about.shape[1] > 1:
            about -= about.mean(axis=1, keepdims=True)
        total += float(np.square(about).sum())
    return total


def _pieces(rows: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Yields rows, as many at once as stay in a cache."""
    step = max(1, AT_ONCE // max(1, rows.shape[1]))
    return (rows[i : i + step] for i in range(0, len(rows), step))


def probed_batches(data: CalibrationData, held: Collection[int]) -> list[int]:
    """Returns the held-back batches that are enough to compare outputs on."""
    found, rows = [], 0
    for i in sorted(held)[:PROBE_BATCHES] or [0]:
        if rows < ENOUGH_ROWS:
            found.append(i)
            mask = data.row_masks[i]
            rows += next(iter(data.batches[i].values())).size if mask is None else int(mask.sum())
    return found


def repaired(
    visitor: GroupVisitor, group: ChannelGroup, measured: Sequence[Measured], blocks: NDArray[np.int64]
) -> list[Patch]:
    """Repairs the consumers of one group for a set of kept blocks."""
    patches: list[Patch] = []
    stacks: dict[int, NDArray[Any]] = {}
    for consumer, item in zip(group.consumers, measured, strict=True):
        kept = kept_positions(consumer.owners, blocks)
        if consumer.expert is not None:
            item = item.part(consumer.expert * group.size, group.size)
        found = visitor.repair(item, kept, np.setdiff1d(np.arange(consumer.width), kept), visitor.options.ridge)
        use = consumer.uses[0]
        if consumer.expert is not None:
            if id(use) not in stacks:
                stacks[id(use)] = np.zeros(use.weight.shape, use.weight.dtype)
                patches.append(Patch(consumer.uses, stacks[id(use)], np.zeros(found.bias.shape)))
            rows = np.moveaxis(stacks[id(use)][consumer.expert], use.weight_axis - 1, 0)
            rows[kept] = found.weight.reshape(rows[kept].shape).astype(rows.dtype)
            continue
        old = np.asarray(use.node.inputs[use.weight_position].values)
        flat = np.zeros((consumer.width, item.weight.shape[1]), old.dtype)
        flat[kept] = found.weight.astype(old.dtype)
        weight = use.laid_out(flat, old.shape)
        patches.append(Patch(consumer.uses, weight, found.bias))
    return patches


def together(patches: Sequence[AnyPatch]) -> list[AnyPatch]:
    """Returns patches of which those of one consumer, made for several of its groups, are one.

    Rows that any of them removes are zero, what they change of the others adds up: what they would be if one were repaired
    where the other was cut differs by a product of both changes.
    """
    result: list[AnyPatch] = []
    places: dict[int, int] = {}
    for patch in patches:
        if not isinstance(patch, Patch):
            result.append(patch)
            continue
        known = places.setdefault(id(patch.uses[0]), len(result))
        if known == len(result):
            result.append(patch)
            continue
        before, use = result[known], patch.uses[0]
        assert isinstance(before, Patch)
        dense = np.asarray(use.node.inputs[use.weight_position].values)
        first, second, rows = (use.matrix(value) for value in (before.weight, patch.weight, dense))
        both = np.where(first.any(axis=1, keepdims=True) & second.any(axis=1, keepdims=True), first + second - rows, 0)
        result[known] = Patch(patch.uses, use.laid_out(both.astype(dense.dtype), dense.shape), before.shift + patch.shift)
    return result


def some_rows(output: NDArray[Any], mask: NDArray[np.bool_] | None) -> NDArray[Any]:
    """Returns rows of an output, [r, c], the same each time."""
    return output.reshape(1, 1) if output.ndim == 0 else output_rows(output, mask, PROBE_ROWS)
