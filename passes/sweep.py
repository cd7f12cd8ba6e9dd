"""The loop over the segments of a graph, whatever is done with its groups and whatever runs them.

The graph is cut into segments where the live tensors are smallest, at the residual stream: one just before each group's own
weights. A run goes from one such place, through the groups that were cut there, to the activations of the next groups, so
that moments are those of the inputs that will be seen when deployed; it leaves the live tensors at the next place. What
belongs to no group runs once, what does runs twice, as it was and as it is now. Groups that span others (shared weights,
heads tied over layers by a common position bias) come first, on the whole model.

A :class:`Sweep` has the graph, the data and the live tensors; a :class:`Visitor` gets the moments of each group and does
with it what it is for: cut it, note its error curve, make variants of it.
"""

import functools
import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from liar_opt.frontend.engine import NotFinite, Value
from liar_opt.frontend.graph_tensors import is_constant
from liar_opt.frontend.live_memory import live_bytes
from liar_opt.frontend.onnx_segments import Place, Tap, live_tensors, place_of, plan_segments, stream_at, stream_of, tap_for
from liar_opt.frontend.records import ConsumerUse
from liar_opt.frontend.rewrite import Rewriter
from liar_opt.frontend.sublayers import Sublayer
from liar_opt.frontend.walk import GraphWalk
from liar_opt.passes.base import State
from liar_opt.passes.checkpoint import Checkpoint, Finished
from liar_opt.passes.groups import UNCUT, ChannelGroup
from liar_opt.passes.plan_memory import SPARE, Need, Parts, measure_together, require_room, sizes_of
from liar_opt.runtime.array_store import ArrayStore
from liar_opt.runtime.calibration_data import CalibrationData
from liar_opt.runtime.errors import GroupFault, InternalError, LiarOptError, ModelError, OptionError
from liar_opt.runtime.memory import Memory, anonymous, trim
from liar_opt.runtime.moments import Moments
from liar_opt.runtime.ranks import current
from liar_opt.runtime.solve import half_the_threads

HELD_BACK = 10
"""One batch in this many is held back: the ridge is chosen on it, and losses are measured."""


class Visitor:
    """What is done with the groups of a sweep.

    Of several processes one does it with all groups of a segment, their *owner*. Where the graph changes, the others do the
    same again, from what that one finished; otherwise they go on, and owners work side by side.
    """

    cuts: ClassVar[bool] = False
    """Whether it changes the graph."""

    def owner(self, groups: Sequence[ChannelGroup]) -> int:
        """Returns which process does it with the groups of a segment; called once for each."""
        del groups
        return 0

    def before(self, groups: Sequence[ChannelGroup], stop: int, first: Any) -> None:
        """Gets ready for the groups of one segment, before they are measured.

        Args:
            groups: of the segment.
            stop: position behind the last node that has to run.
            first: the segment's first node; None for groups that span others.
        """

    def group(self, group: ChannelGroup, moments: Mapping[Place, Moments]) -> None:
        """Does it with one group, whose activations have these moments."""
        raise NotImplementedError

    def finished(self) -> Finished:
        """Returns what the groups came to since it was last asked, for the folder of a run that can be resumed."""
        raise InternalError("this sweep cannot be resumed")

    def replay(self, groups: Sequence[ChannelGroup], finished: Finished) -> None:
        """Does with the groups of a segment what an earlier run has done."""
        raise InternalError("this sweep cannot be resumed")


@dataclass(eq=False)
class Carry:
    """The live tensors between two segments.

    Attributes:
        values: for each batch, by name; empty before the first segment.
        at: the node before which they are live; None: the start of the graph.
    """

    values: list[dict[str, Value]]
    at: Any = None

    @property
    def given(self) -> dict[str, Value]:
        """Those of the first batch that has any here: names and types are the same for all."""
        return next((values for values in self.values if values), {})


class Sweep:
    """The graph as it is by now, the data, and the live tensors between segments.

    Args:
        state: the analysed model and its calibration data.
        stage: what progress is told of.
        weighting: of the calibration rows; see ``PruneGroupsPass``.
        seed: for all that is drawn.
        checkpoint: the folder of a run that can be resumed; None keeps nothing.
    """

    def __init__(
        self,
        state: State,
        stage: str = "calibrate",
        weighting: str = "stream",
        seed: int = 0,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        assert state.calibration is not None
        self.state, self.stage, self.weighting, self.seed = state, stage, weighting, seed
        self.checkpoint = checkpoint
        self.walk: GraphWalk = state.analysed()
        self.rewriter = Rewriter(self.walk)
        self.data: CalibrationData = state.calibration
        self.memory, self.engine = state.memory, state.engine()
        self.batch = probe_batch(self.walk, self.data)
        self.carry = self.fresh_carry()
        self.waiting: frozenset[int] = frozenset()  # leaf factors that this sweep is still to cut
        self.seen_at: dict[int, NDArray[np.bool_]] = {}
        self.number = self.step = self.steps = 0
        count, several = len(self.data.batches), len(self.data.batches) > 1
        self.ranks = current()
        self.own = self.ranks.own(count)
        self.queue: list[Callable[[], None]] = []
        self.queued: dict[int, int] = {}  # bytes of moments that wait, by process
        self.held = set(held_batches(len(self.data.batches))) if several else set()

    def fresh_carry(self) -> Carry:
        """Returns the live tensors at the start of the graph: none."""
        return Carry([{} for _ in self.data.batches])

    def over(self, visitor: Visitor, groups: Sequence[ChannelGroup]) -> None:
        """Goes over the model, as it is by now; what an earlier run finished is made again.

        Args:
            visitor: what is done.
            groups: with what.

        Raises:
            OptionError: there are fewer batches than processes.
        """
        require_shares(self.data)
        spanning, segments = plan_segments(self.walk, groups)
        parts = [*([(spanning, None, None)] if spanning else []), *((s.groups, s.first, s.last) for s in segments)]
        self.carry = self.fresh_carry()
        self.steps += len(parts) * len(self.own)
        if self.memory.asked:
            self.require_room([(own, first) for own, first, _ in parts])
        for index, (own, first, last) in enumerate(parts):
            self.waiting = frozenset(g.factor for later, _, _ in parts[index:] for g in later if g.factor != UNCUT)
            self.number += 1
            if self.checkpoint is not None and self.number <= self.checkpoint.done:
                self._replay(visitor, self.checkpoint, own, first)
                continue
            stop = len(self.walk.model.graph.nodes) if last is None else self.position(last) + 1
            finished = self.segment(visitor, own, stop, first)
            if self.checkpoint is not None:
                assert finished is not None
                self.checkpoint.save(self.number, finished, self._alive())
        self._work_off()

    def _alive(self) -> Iterator[dict[str, NDArray[Any]]]:
        """Yields the live tensors of every batch, in all processes."""
        for index, values in enumerate(self.carry.values):
            own = {n: self.engine.array(v) for n, v in values.items()} if index in self.own else {}
            yield self.ranks.from_owner(index % self.ranks.size, own)

    def _replay(self, visitor: Visitor, checkpoint: Checkpoint, groups: Sequence[ChannelGroup], first: Any) -> None:
        """Goes on behind a segment that an earlier run finished."""
        visitor.replay(groups, checkpoint.load(self.number))
        self.state.model.settle()
        self.carry.at = first if first is not None else self.carry.at
        self.step += len(self.own)
        if self.number == checkpoint.done:
            stream = ArrayStore(self.memory.store.folder)
            for index, values in checkpoint.alive(self.own):
                size = sum(v.nbytes for v in values.values()) * len(self.own)
                keep = self.memory.keep(size)
                self.carry.values[index] = {n: v if keep else stream.put(v) for n, v in values.items()}

    def position(self, node: Any) -> int:
        """Returns where a node, or what is behind it where it is gone, stands now; 0 for None, the start."""
        if node is None:
            return 0
        node = self.rewriter.now(node)
        return next(i for i, n in enumerate(self.walk.model.graph.nodes) if n is node)

    def segment(self, visitor: Visitor, groups: Sequence[ChannelGroup], stop: int, first: Any = None) -> Finished | None:
        """Measures the groups of one segment and hands them to the visitor; returns what is to be kept of it.

        Args:
            visitor: what is done.
            groups: what is measured together.
            stop: position behind the last node that has to run.
            first: the segment's first node: the live tensors there are kept for the next segment; None keeps nothing.
        """
        visitor.before(groups, stop, first)
        with blamed(groups):
            taps = self.taps(groups)
        self.seen_at = {f: self.rewriter.mask(f) for f in {c.uses[0].width for g in groups for c in g.consumers}}
        owner, parts = visitor.owner(groups), self.parts(groups, taps, first)
        moments: dict[Place, Moments] = {}
        waiting = ArrayStore(self.memory.store.folder)
        for part in parts.groups:
            keys = {k for i in part for k in places_of(groups[i])} - moments.keys()
            with blamed([groups[i] for i in part]):
                chosen = [tap for key, tap in taps.items() if key in keys]
                new = self.ranks.together(functools.partial(self.measure, chosen, stop, first))
            self.add_up(new, owner)
            if self.ranks.rank != owner:
                new = {}
            if parts.on_disk:
                for own in new.values():
                    own.store(waiting)
            moments.update(new)
        if visitor.cuts:
            return self._cut(visitor, groups, moments)
        if self.ranks.rank == owner:
            self.queue.append(functools.partial(self._visit, visitor, groups, moments))
        widths = (taps[k].width for k in {k for g in groups for k in places_of(g)})
        self.queued[owner] = self.queued.get(owner, 0) + sum(16 * w * w for w in widths)
        now = self.ranks.size == 1 or self.memory.asked or parts.on_disk
        if now or not self.memory.keep(max(self.queued.values())):
            self._work_off()
        return None

    def _cut(self, visitor: Visitor, groups: Sequence[ChannelGroup], moments: dict[Place, Moments]) -> Finished | None:
        """Has one process do with the groups what there is to do, and the others do it again."""

        def work() -> Finished | None:
            self._visit(visitor, groups, moments)
            return visitor.finished() if self.checkpoint is not None or self.ranks.size > 1 else None

        finished = self.ranks.once(work)
        if self.ranks.rank:
            assert finished is not None
            visitor.replay(groups, finished)
            self.state.model.settle()
        return finished

    def _visit(self, visitor: Visitor, groups: Sequence[ChannelGroup], moments: dict[Place, Moments]) -> None:
        for i, group in enumerate(groups):
            with blamed([group]), half_the_threads(max((c.width for c in group.consumers), default=group.size)):
                visitor.group(group, moments)
            for key in places_of(group) - {k for other in groups[i + 1 :] for k in places_of(other)}:
                moments.pop(key, None)
            self.state.model.settle()

    def _work_off(self) -> None:
        """Does what waits with groups that were measured, in all processes side by side."""
        queue, self.queue, self.queued = self.queue, [], {}

        def work() -> None:
            while queue:
                queue.pop(0)()

        self.ranks.together(work)

    # -- several processes ------------------------------------------------------------------------------------------

    def add_up(self, moments: Mapping[Any, Moments], owner: int) -> None:
        """Adds the moments of all processes up in one of them."""
        if self.ranks.size == 1:
            return
        crosses: dict[Any, dict[str, tuple[int, ...]]] = {}
        for found in self.ranks.gathered({k: own.crosses for k, own in moments.items() if own.crosses}):
            for key, shapes in found.items():
                crosses[key] = crosses.get(key, {}) | shapes
        for key, own in moments.items():
            own.add_up(lambda array: self.ranks.added(array, owner), crosses.get(key, {}))

    # -- measuring --------------------------------------------------------------------------------------------------

    def taps(self, groups: Sequence[ChannelGroup], streams: bool = True) -> dict[Place, Tap]:
        """Returns the activations to measure, by tensor and axis; with the residual streams that weight their rows."""
        taps: dict[Place, Tap] = {}
        for use, expert in (pair for g in groups for pair in g.taps):
            width = self.rewriter.size(use.width)
            if isinstance(use, Sublayer):
                width += 0 if use.source_width is None else self.rewriter.size(use.source_width)
            tap = replace(tap_for(self.walk, use, width, self.batch), expert=expert, whole=isinstance(use, Sublayer))
            if streams and self.weighting == "stream" and isinstance(use, Sublayer):
                tap = replace(tap, stream=stream_at(self.walk, tap, (use.target, use.like), self.seed))
            if streams and self.weighting == "stream" and isinstance(use, ConsumerUse):
                tap = replace(tap, stream=stream_of(self.walk, use, self.seed))
            taps[tap.place] = tap
        return taps

    def measure(self, taps: list[Tap], stop: int, first: Any) -> dict[Place, Moments]:
        """Runs from the segment before, as it is by now, to the activations, and adds their moments up in float64."""
        carry = self.carry
        names = [] if first is None else live_tensors(self.walk, self.position(first), self.waiting)
        made = [n for n in names if n not in carry.given]
        read = {name for tap in taps if tap.whole for name in tap.reads}
        nodes = self.walk.model.graph.nodes
        stop = max([stop, *(i + 1 for i, n in enumerate(nodes) if read and any(t.name in read for t in n.outputs))])
        part = self.engine.part(self.walk, self.position(carry.at), stop, made, carry.given, taps=taps)
        stream, in_memory = ArrayStore(self.memory.store.folder), True
        for index in self.own:
            feeds = cut_arrays(self.data.batches[index], self.rewriter.ends())
            with self._finite():
                values = part.run({**feeds, **carry.values[index]}, self.data.row_masks[index], index in self.held)
            if first is not None:
                carry.values[index] = {n: values[n] if n in values else carry.values[index][n] for n in names}
                if index == self.own[0]:
                    size = sum(self.engine.array(v).nbytes for v in carry.values[index].values()) * len(self.own)
                    in_memory = self.memory.keep(size)
                for name in () if in_memory else made:
                    carry.values[index][name] = stream.put(self.engine.array(values[name]))
            self.step += 1
            self.state.progress(self.stage, self.step, self.steps)
        if first is not None:
            carry.at = first
        with self._finite():
            return part.finish()

    @contextmanager
    def _finite(self) -> Iterator[None]:
        """Says which activation has NaN or Inf, and of which data."""
        try:
            yield
        except NotFinite as err:
            given = "random inputs; give real ones (--calibration), or" if self.data.synthetic else "the calibration data;"
            raise ModelError(
                f"activation '{err}' has NaN or Inf on {given} check the model in {self.engine.name} on that data (float16 "
                "may overflow)"
            ) from err

    # -- memory -----------------------------------------------------------------------------------------------------

    def parts(self, groups: Sequence[ChannelGroup], taps: Mapping[Place, Tap], first: Any = None) -> Parts:
        """Returns which groups are measured together, so that their moments stay under the limit."""
        if self.memory.low:
            gc.collect()  # graphs refer to themselves in circles
            trim()
        needs, fixed = self.needs(groups, taps, self.position(self.carry.at), first, self.memory)
        base = self.ranks.most(anonymous() or 0)
        parts = measure_together(needs, base + fixed, self.memory.limit)
        self.memory.estimated = max(self.memory.estimated, parts.need)
        self.steps += (len(parts.groups) - 1) * len(self.own)
        return parts

    def require_room(self, segments: Iterable[tuple[Sequence[ChannelGroup], Any]]) -> None:
        """Checks, before any work, that every group fits by itself.

        Args:
            segments: groups and first node, in order; None for the groups that span others.

        Raises:
            OptionError: one does not; the least that would do is said.
        """
        segments = list(segments)
        gc.collect()
        trim()
        base = self.ranks.most(anonymous() or 0)
        if self.memory.start is None:
            self.memory.start = base
        # By as much a process grows: what was enough before the work is enough in the middle of it.
        base = max(self.memory.start, base - SPARE)

        def needs_under(memory: Memory) -> list[tuple[Need, int]]:
            needs, start = [], 0
            for groups, first in segments:
                own, fixed = self.needs(groups, self.taps(groups, streams=False), start, first, memory)
                needs += [(need, base + fixed) for need in own]
                start = self.position(first)
            return needs

        under = functools.partial(replace, self.memory)
        require_room(needs_under(self.memory), self.memory.limit, lambda limit: needs_under(under(limit=limit)))

    def needs(
        self, groups: Sequence[ChannelGroup], taps: Mapping[Place, Tap], start: int, first: Any, memory: Memory
    ) -> tuple[list[Need], int]:
        """Returns what each group of a segment needs, and the bytes that are needed beside, whatever is measured.

        Args:
            groups: of the segment.
            taps: their activations.
            start: position of the first node that runs.
            first: the segment's first node; None where nothing is kept for the next.
            memory: the limit, and what follows from it.
        """
        elements = {g.name: sum(int(np.prod(w.shape)) for w in _weights(g)) for g in groups}
        needs = [Need(g.name, tuple(taps[k].width for k in places_of(g)), elements[g.name]) for g in groups]
        stop = max(self.position(r.node) for g in groups for r in g.readings)
        nodes = self.walk.model.graph.nodes[start : stop + 1]
        rows = max(int(np.prod(next(iter(feeds.values())).shape[:2])) for feeds in self.data.batches)
        sizes = sizes_of(self.state)
        widest = 4 * rows * max(t.width for t in taps.values())
        # The rows of an activation are laid out, and those that count taken, while it is measured.
        fixed = 2 * widest + (
            live_bytes(nodes, sizes) if sizes else widest + 4 * rows * sum(t.width for t in taps.values())
        )
        if first is not None:
            names = live_tensors(self.walk, self.position(first), self.waiting)
            between = -(-len(self.data.batches) // self.ranks.size) * sum(sizes.get(n, 0) for n in names)
            fixed += between if memory.keep(between) else 0
        if self.engine.copies_weights:
            fixed += sum(t.values.nbytes for t in {id(t): t for n in nodes for t in n.inputs if is_constant(t)}.values())
        return needs, fixed


def require_shares(data: CalibrationData) -> None:
    """Checks that there is a batch for every process of the run.

    Raises:
        OptionError: there are fewer.
    """
    ranks, count = current(), len(data.batches)
    if ranks.size > count:
        raise OptionError(
            f"{ranks.size} processes have {count} batch{'' if count == 1 else 'es'} of calibration data to share out: "
            "start fewer, or give more samples or a smaller batch size"
        )


@contextmanager
def blamed(groups: Sequence[ChannelGroup]) -> Iterator[None]:
    """Says of what raises no sentence of ours which groups it was done for: a run can go on without them."""
    try:
        yield
    except (LiarOptError, GroupFault, MemoryError, OSError):
        raise
    except Exception as err:
        reason = f"{type(err).__name__}: {' '.join(str(err).split())[:300]}"
        raise GroupFault(dict.fromkeys((g.name for g in groups), reason)) from err


def held_batches(batches: int) -> list[int]:
    """Returns which of so many batches are held back, at least one."""
    return [i for i in range(batches) if i % HELD_BACK == HELD_BACK // 2] or [batches - 1]


def first_samples(state: State, batch: Mapping[str, NDArray[Any]], samples: int) -> dict[str, NDArray[Any]]:
    """Returns the first samples of a batch, where the leading axis of all feeds is the (dynamic) batch."""
    leading = {v.shape[0] for v in batch.values() if v.ndim}
    dynamic = all(not i.shape or not isinstance(i.shape[0], int) for i in state.model.inputs())
    return {k: v[:samples] if dynamic and len(leading) == 1 and v.ndim else v for k, v in batch.items()}


def part_of_batch(state: State, index: int, samples: int) -> tuple[dict[str, NDArray[Any]], NDArray[np.bool_] | None]:
    """Returns the first samples of a calibration batch, and which of their rows count."""
    assert state.calibration is not None
    batch, mask = state.calibration.batches[index], state.calibration.row_masks[index]
    some = first_samples(state, batch, samples)
    whole = mask is None or all(some[name] is value for name, value in batch.items())
    return some, mask if whole or mask is None else mask[:samples]


def cut_arrays(arrays: dict[str, Any], ends: Mapping[str, Mapping[int, NDArray[np.int64]]]) -> dict[str, Any]:
    """Returns inputs or outputs of the original as the cut graph has them: caches lose the heads that went.

    Args:
        arrays: by name.
        ends: the positions that are left, by name and axis; see ``Rewriter.ends``.
    """
    result = dict(arrays)
    for name in result.keys() & ends.keys():
        for axis, left in ends[name].items():
            result[name] = np.take(result[name], left, axis)
    return result


def places_of(group: ChannelGroup) -> set[Place]:
    """Returns what is measured for a group."""
    return {place_of(r, expert) for r, expert in group.taps}


def _weights(group: ChannelGroup) -> list[Any]:
    """Returns the weights that are solved for, each once."""
    return list({id(c.uses[0].weight): c.uses[0].weight for c in group.consumers}.values())


def probe_batch(walk: GraphWalk, data: CalibrationData) -> tuple[int, ...]:
    """Returns the probe sizes of the axes that the row masks have: (batch, sequence) or (batch,); () without masks.

    Of inputs that the masks fit (token ids, or a mask over a cache's length), one is taken whose axes most consumers have.
    """
    mask = data.row_masks[0] if data.row_masks else None
    if mask is None:
        return ()
    fitting: dict[tuple[int, ...], int] = {}
    for tensor in sorted(walk.model.graph.inputs, key=lambda t: len(t.shape or ())):
        array = data.batches[0].get(tensor.name)
        if array is not None and array.shape[: mask.ndim] == mask.shape:
            sizes = tuple(walk.input_sizes(tensor)[: mask.ndim])
            fitting.setdefault(sizes, sum(tap_for(walk, u, 0, sizes).layout in ("bs", "sb") for u in walk.consumers))
    return max(fitting, key=lambda sizes: fitting[sizes], default=())
