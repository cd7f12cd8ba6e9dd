"""Measure, select, repair and cut, one segment of the graph after the other.

The graph is cut into segments where the least is alive, at the residual stream: one just before each group's own
weights. A run goes from one such place, through the groups that were cut there, to the activations of the next groups,
so that moments are those of the inputs that will be seen when deployed; it leaves what is alive at the next place. What
belongs to no group runs once, what does runs twice, dense and cut. Groups that span others (shared weights, heads tied
over layers by a common position bias) are measured first, on the whole model.

Where a width lies between two linear maps its basis is changed before it is cut, so that what goes is a subspace instead of
some of its channels (`passes.change_basis`): values, and queries with keys. These are swept on their own: queries and keys
before the rest, values behind it, within the heads that are left.
"""

import functools
import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from liar_opt.frontend.engine import NotFinite
from liar_opt.frontend.graph_tensors import is_constant
from liar_opt.frontend.live_memory import live_bytes
from liar_opt.frontend.onnx_segments import (
    Place,
    Tap,
    live_tensors,
    place_of,
    plan_segments,
    stream_of,
    tap_for,
)
from liar_opt.frontend.records import ConsumerUse
from liar_opt.frontend.rewrite import Rewriter
from liar_opt.frontend.walk import GraphWalk
from liar_opt.passes.base import Change, Finding, Pass, PassResult, State
from liar_opt.passes.change_basis import BasisChange, basis_of, value_turn
from liar_opt.passes.checkpoint import Checkpoint, Finished, KeptGroup
from liar_opt.passes.groups import QUERY_KEY, VALUES, ChannelGroup, Consumer, Refusal, kept_positions
from liar_opt.passes.measured import Measured, Repaired
from liar_opt.passes.plan_memory import SPARE, Need, Parts, measure_together, require_room, sizes_of
from liar_opt.passes.registry import lookup, repair_named, score_named
from liar_opt.passes.repairs import AWARE, RepairFunction
from liar_opt.passes.scores import ScoreFunction
from liar_opt.runtime.array_store import ArrayStore
from liar_opt.runtime.calibration_data import CalibrationData
from liar_opt.runtime.errors import GroupFault, InternalError, LiarOptError, ModelError, OptionError
from liar_opt.runtime.memory import Memory, anonymous, trim
from liar_opt.runtime.moments import Moments
from liar_opt.runtime.solve import half_the_threads
from liar_opt.runtime.subspaces import Basis

Sweep = tuple[tuple[ChannelGroup, ...], tuple[Any, ...]]
"""Groups that span others, and the segments of the rest."""
Groups = tuple[ChannelGroup, ...]
WEIGHTINGS = ("stream", "none")
VALUE_CUTS = ("rotate", "select")
LEAST_ROWS = 32
"""Calibration rows that an expert must have seen to be measured at all."""
HELD_BACK = 10
"""One batch in this many is held back to choose the ridge."""


@dataclass(frozen=True, eq=False)
class ConsumerRepair:
    """What one consumer's weight became, for the check against the masked original.

    Attributes:
        uses: every use of the weight.
        index: for each axis of the weight the positions, in the original, of what is left.
        weight: the new weight, cut.
        bias: what was added to x W, [what is left of m].
    """

    uses: tuple[ConsumerUse, ...]
    index: tuple[NDArray[np.int64], ...]
    weight: NDArray[Any]
    bias: NDArray[np.float64]

    @property
    def expert(self) -> int | None:
        """The expert that it is of, where the weight holds several."""
        return None if self.uses[0].lookup is None else int(self.index[0][0])


@dataclass(frozen=True, eq=False)
class Cut(Finding):
    """What was cut.

    Attributes:
        ends: by name of an input or output that became narrower, what stays of it (`cut_arrays`).
        blocks: the kept blocks of each group.
        lost: by group the largest error that is left behind its repair, relative to the output.
        query_forms: the products of queries and keys that were turned.
    """

    by: ClassVar[str] = "prune-groups"
    ends: Mapping[str, Any]
    blocks: Mapping[str, list[int]]
    lost: Mapping[str, float]
    query_forms: Sequence[Any]


@dataclass(frozen=True)
class PruneGroupsPass(Pass[tuple[Groups, ...]]):
    """Cut every group to the width allocated to it and fold the repair into its consumers.

    With kept U and removed M of a consumer y = x W + b:  W <- W_U + Q W_M,  b <- b + p W_M  (LIAR, arXiv 2407.13331).

    Attributes:
        score: which blocks stay; a name in ``registry.SCORES``, or a function of your own (``scores.ScoreFunction``).
        repair: what happens to the rest; a name in ``registry.REPAIRS``, or a function (``repairs.RepairFunction``).
        ridge: relative ridge; None chooses it on held-back calibration rows.
        seed: for all that is drawn.
        weighting: "stream" weights every calibration row by the inverse variance of the residual stream there, as the
            normalisation behind it will: a few rows of huge activations do not decide alone then; "none" counts rows alike.
        new_bias: whether a consumer without a bias may get one; if not, it is repaired without one (the problem is solved
            with moments about zero).
        value_cut: "rotate" keeps the best subspace of the values of each head, where everything between value and output
            projection is linear; "select" keeps some of their channels, as it is done where something is not.
    """

    name: ClassVar[str] = "prune-groups"
    score: str | ScoreFunction = "greedy"
    repair: str | RepairFunction = "liar"
    ridge: float | None = None
    seed: int = 0
    weighting: str = "stream"
    new_bias: bool = True
    value_cut: str = "rotate"

    def requires(self, state: State) -> None:
        """Checks the options and that there is something to measure on.

        Raises:
            OptionError: unknown score, repair, weighting or value cut, a negative ridge.
        """
        score_named(self.score)
        repair_named(self.repair)
        lookup("weighting", dict.fromkeys(WEIGHTINGS), self.weighting)
        lookup("value-cut", dict.fromkeys(VALUE_CUTS), self.value_cut)
        if self.ridge is not None and not self.ridge >= 0:
            raise OptionError(f"ridge {self.ridge:g} is negative; give 0 or more, or leave it out to have it chosen")
        if state.calibration is None or not state.calibration.batches:
            raise InternalError("no calibration data")
        state.analysed()

    def plan(self, state: State) -> tuple[Groups, ...]:
        """Returns the groups that lose blocks, by sweep: of queries and keys, of all else, of values."""
        groups = [g for g in state.groups if state.keep.get(g.name, g.size) < g.size]
        apart = {QUERY_KEY: 0, VALUES: 2}
        sweeps = [tuple(g for g in groups if apart.get(g.kind, 1) == turn) for turn in range(3)]
        return tuple(sweep for sweep in sweeps if sweep)

    def apply(self, state: State, plan: tuple[Groups, ...]) -> PassResult:
        """Measures and cuts segment by segment; each sweep's are planned on the graph that the one before has left."""
        walk = state.analysed()
        run = self._run(state, plan_segments(walk, plan[0] if plan else ()))
        run.over_all()
        for sweep in plan[1:]:
            run.again(*plan_segments(walk, sweep))
        run.walk.model.graph.cleanup(remove_unused_node_outputs=False).toposort()
        state.repairs = run.repairs
        blocks = {change.where: change.details["kept"] for change in run.changes}
        lost = {
            change.where: max((c["error_repair"] for c in change.details.get("consumers", ()) if c), default=0.0)
            for change in run.changes
        }
        state.add(Cut(run.rewriter.ends(), blocks, lost, run.bases.query_forms))
        return PassResult(state, tuple(run.changes), run.refusals())

    def _run(self, state: State, sweep: Sweep) -> "SegmentRun":
        if self.repair in AWARE:
            from liar_opt.passes.dense_twin import TwinRun  # it builds on this module

            return TwinRun(self, state, *sweep)
        run = SegmentRun(self, state, *sweep)
        run.checkpoint = state.checkpoint
        return run


class SegmentRun:
    """The loop's state: what is alive between segments for each batch, and what has been done."""

    stage = "calibrate"

    def __init__(
        self, options: PruneGroupsPass, state: State, wide: tuple[ChannelGroup, ...], segments: tuple[Any, ...]
    ) -> None:
        assert state.calibration is not None
        self.wide, self.segments = wide, segments
        self.options = options
        self.score, self.repair = score_named(options.score), repair_named(options.repair)
        self.state = state
        self.walk: GraphWalk = state.analysed()
        self.rewriter = Rewriter(self.walk)
        self.data: CalibrationData = state.calibration
        self.memory, self.engine = state.memory, state.engine()
        self.batch = _probe_batch(self.walk, self.data)
        self.alive: list[dict[str, Any]] = [{} for _ in self.data.batches]
        self.alive_at: Any = None
        self.waiting: frozenset[int] = frozenset()  # leaf factors that this sweep is still to cut
        self.changes: list[Change] = []
        self.repairs: list[ConsumerRepair] = []
        self.bases = BasisChange(self.walk, self.rewriter)
        self.selected: dict[str, list[str]] = {}
        self.checkpoint: Checkpoint | None = None
        self.number = 0
        self.kept: list[KeptGroup] = []
        self.stack: Any = None
        self.unseen: dict[str, list[int]] = {}
        self.seen_at: dict[int, NDArray[np.bool_]] = {}
        self.written: list[tuple[NDArray[Any], NDArray[Any]]] = []
        self.rng = np.random.default_rng(options.seed)
        self.steps, self.step = (len(segments) + bool(wide)) * len(self.data.batches), 0
        held = {i for i in range(len(self.data.batches)) if i % HELD_BACK == HELD_BACK // 2}
        self.held = held or ({len(self.data.batches) - 1} if len(self.data.batches) > 1 else set())

    def over_all(self) -> None:
        """Goes over the groups that span others, then over the segments; what an earlier run finished is made again."""
        parts = (*((None,) if self.wide else ()), *self.segments)
        if self.memory.asked:
            self.require_room(parts)
        for index, segment in enumerate(parts):
            groups, first = (self.wide, None) if segment is None else (segment.groups, segment.first)
            to_come = (self.wide if s is None else s.groups for s in parts[index:])
            self.waiting = frozenset(g.factor for own in to_come for g in own)
            self.number += 1
            if self.checkpoint is not None and self.number <= self.checkpoint.done:
                self.replay(self.checkpoint, groups, first)
                continue
            stop = len(self.walk.model.graph.nodes) if segment is None else self.position(segment.last) + 1
            self.segment(groups, stop, first)
            if self.checkpoint is not None:
                finished = Finished(self.kept, dict(self.rng.bit_generator.state))
                alive = ({n: self.engine.array(v) for n, v in values.items()} for values in self.alive)
                self.checkpoint.save(self.number, finished, alive)
                self.kept = []

    def replay(self, checkpoint: Checkpoint, groups: Sequence[ChannelGroup], first: Any) -> None:
        """Cuts the groups of a finished segment as it was done, and goes on behind it."""
        finished = checkpoint.load(self.number)
        for group, kept in zip(groups, finished.groups, strict=True):
            if group.name != kept.name:
                raise InternalError(f"group '{kept.name}' of the resume folder is '{group.name}' now")
            blocks = np.asarray(kept.blocks, np.int64)
            if group.kind == QUERY_KEY:
                self.bases.turn_logits(group, *kept.turns)
            turn = kept.turns[0] if kept.turns and group.consumers else None
            for consumer, (weight, bias) in zip([self.left(c) for c in group.consumers], kept.consumers, strict=True):
                basis = None if turn is None else basis_of(consumer.owners, turn)
                done = Repaired(weight, bias, np.inf, "resumed")
                self.write(consumer, kept_positions(consumer.owners, blocks), done, basis)
            if turn is not None:
                self.bases.turn_values(group, turn)
            self.cut(group, blocks, kept.details, kept.turns)
        self.kept = []
        self.state.model.settle()
        self.rng.bit_generator.state = finished.generator
        self.alive_at = first if first is not None else self.alive_at
        self.step += len(self.data.batches)
        if self.number == checkpoint.done:
            stream = ArrayStore(self.memory.store.folder)
            for index, values in enumerate(checkpoint.alive()):
                size = sum(v.nbytes for v in values.values()) * len(self.alive)
                keep = self.memory.keep(size)
                self.alive[index] = {n: v if keep else stream.put(v) for n, v in values.items()}

    def again(self, wide: tuple[ChannelGroup, ...], segments: tuple[Any, ...]) -> None:
        """Goes over the model, as it was cut, a second time: for groups that share weights with those before."""
        self.wide, self.segments = wide, segments
        self.alive, self.alive_at = [{} for _ in self.data.batches], None
        self.steps += (len(segments) + bool(wide)) * len(self.data.batches)
        self.over_all()

    def position(self, node: Any) -> int:
        """Returns where a node stands now."""
        return next(i for i, n in enumerate(self.walk.model.graph.nodes) if n is node)

    def tick(self) -> None:
        """Reports one batch done."""
        self.step += 1
        self.state.progress(self.stage, self.step, self.steps)

    # -- measuring --------------------------------------------------------------------------------------------------

    def segment(self, groups: Sequence[ChannelGroup], stop: int, first: Any = None) -> None:
        """Measures, repairs and cuts the groups of one segment.

        Args:
            groups: what is measured together.
            stop: position behind the last node that has to run.
            first: the segment's first node: what is alive there is kept for the next segment; None keeps nothing.
        """
        with blamed(groups):
            taps = self.taps(groups)
        self.seen_at = {f: self.rewriter.mask(f) for f in {c.uses[0].width for g in groups for c in g.consumers}}
        parts = self.parts(groups, taps, first)
        moments: dict[Place, Moments] = {}
        waiting = ArrayStore(self.memory.store.folder)
        for part in parts.groups:
            keys = {k for i in part for k in _keys(groups[i])} - moments.keys()
            with blamed([groups[i] for i in part]):
                new = self.measure([tap for key, tap in taps.items() if key in keys], stop, first)
            if parts.on_disk:
                for own in new.values():
                    own.store(waiting)
            moments.update(new)
        for i, group in enumerate(groups):
            with blamed([group]), half_the_threads(max((c.width for c in group.consumers), default=group.size)):
                self.prune(group, moments)
            for key in _keys(group) - {k for other in groups[i + 1 :] for k in _keys(other)}:
                moments.pop(key, None)
            self.state.model.settle()

    def taps(self, groups: Sequence[ChannelGroup], streams: bool = True) -> dict[Place, Tap]:
        """Returns the activations to measure, by tensor and axis; with the residual streams that weight their rows."""
        taps: dict[Place, Tap] = {}
        for use, expert in (pair for g in groups for pair in g.taps):
            tap = replace(tap_for(self.walk, use, self.rewriter.size(use.width), self.batch), expert=expert)
            if streams and self.options.weighting == "stream" and isinstance(use, ConsumerUse):
                tap = replace(tap, stream=stream_of(self.walk, use, self.options.seed))
            taps[tap.place] = tap
        return taps

    def parts(self, groups: Sequence[ChannelGroup], taps: Mapping[Place, Tap], first: Any = None) -> Parts:
        """Returns which groups are measured together, so that their moments stay under the limit."""
        if self.memory.tight:
            gc.collect()  # graphs refer to themselves in circles
            trim()
        start = 0 if self.alive_at is None else self.position(self.alive_at)
        needs, fixed = self.needs(groups, taps, start, first, self.memory)
        parts = measure_together(needs, (anonymous() or 0) + fixed, self.memory.limit)
        self.memory.estimated = max(self.memory.estimated, parts.need)
        self.steps += (len(parts.groups) - 1) * len(self.data.batches)
        return parts

    def require_room(self, segments: Sequence[Any]) -> None:
        """Checks, before any work, that every group fits by itself.

        Args:
            segments: in order; None for the groups that span others.

        Raises:
            OptionError: one does not; the least that would do is said.
        """
        gc.collect()
        trim()
        base = anonymous() or 0
        if self.memory.start is None:
            self.memory.start = base
        # By as much a process grows: what was enough before the work is enough in the middle of it.
        base = max(self.memory.start, base - SPARE)

        def needs_under(memory: Memory) -> list[tuple[Need, int]]:
            needs, start = [], 0
            for segment in segments:
                groups, first = (self.wide, None) if segment is None else (segment.groups, segment.first)
                own, fixed = self.needs(groups, self.taps(groups, streams=False), start, first, memory)
                needs += [(need, base + fixed) for need in own]
                start = 0 if segment is None else self.position(segment.first)
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
        needs = [Need(g.name, tuple(taps[k].width for k in _keys(g)), elements[g.name]) for g in groups]
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
            between = len(self.data.batches) * sum(sizes.get(n, 0) for n in names)
            fixed += between if memory.keep(between) else 0
        if not memory.tight:
            fixed += sum(t.values.nbytes for t in {id(t): t for n in nodes for t in n.inputs if is_constant(t)}.values())
        return needs, fixed

    def measure(self, taps: list[Tap], stop: int, first: Any) -> dict[Place, Moments]:
        """Runs from the segment before, as it was cut, to the activations, and adds their moments up in float64."""
        start = 0 if self.alive_at is None else self.position(self.alive_at)
        names = [] if first is None else live_tensors(self.walk, self.position(first), self.waiting)
        made = [n for n in names if n not in self.alive[0]]
        part = self.engine.part(self.walk, start, stop, made, self.alive[0], taps=taps)
        stream, in_memory = ArrayStore(self.memory.store.folder), True
        for index, feeds in enumerate(self.data.batches):
            feeds = cut_arrays(feeds, self.rewriter.ends())
            with self.finite():
                values = part.run({**feeds, **self.alive[index]}, self.data.row_masks[index], index in self.held)
            if first is not None:
                self.alive[index] = {n: values[n] if n in values else self.alive[index][n] for n in names}
                if not index:
                    size = sum(self.engine.array(v).nbytes for v in self.alive[0].values()) * len(self.alive)
                    in_memory = self.memory.keep(size)
                for name in () if in_memory else made:
                    self.alive[index][name] = stream.put(self.engine.array(values[name]))
            self.tick()
        if first is not None:
            self.alive_at = first
        with self.finite():
            return part.finish()

    @contextmanager
    def finite(self) -> Iterator[None]:
        """Says which activation has NaN or Inf, and of which data."""
        try:
            yield
        except NotFinite as err:
            given = "random inputs; give real ones (--calibration), or" if self.data.synthetic else "the calibration data;"
            raise ModelError(
                f"activation '{err}' has NaN or Inf on {given} check the model in {self.engine.name} on that data (float16 "
                "may overflow)"
            ) from err

    # -- cutting ----------------------------------------------------------------------------------------------------

    def prune(self, group: ChannelGroup, moments: dict[Place, Moments]) -> None:
        """Selects, repairs and cuts one group."""
        if group.kind == QUERY_KEY:
            self.prune_logits(group, moments)
            return
        options = self.options
        consumers = [self.left(c) for c in group.consumers]
        measured = [self.measured(c, moments) for c in consumers]
        keep = self.state.keep[group.name]
        turn = None
        if group.kind == VALUES and options.value_cut == "rotate":
            if group.bent is None:
                turn = value_turn(group, measured, keep)
            else:
                self.selected.setdefault(group.bent, []).append(group.name)
        if turn is None:
            blocks = self.select(group, measured, keep)
        else:
            owners = np.concatenate([c.owners for c in consumers])
            sets = np.unique(owners[owners >= 0] // group.size)
            blocks = (sets[:, None] * group.size + np.arange(keep)).reshape(-1)
        rows = [moments[key].count for key in _keys(group)]  # all of an activation, or those of each expert
        details: dict[str, Any] = {"kind": group.kind, "kept": blocks.tolist(), "rotated": turn is not None}
        details["rows"] = measured[0].moments.count if consumers[0].expert is None else sum(rows)
        for consumer, item in zip(consumers, measured, strict=True):
            basis = None if turn is None else basis_of(consumer.owners, turn)
            item = item if basis is None else item.turned(basis)
            item = item if consumer.expert is None else item.part(consumer.expert * group.size, group.size)
            kept = kept_positions(consumer.owners, blocks)
            removed = np.setdiff1d(np.arange(consumer.width), kept)
            repaired: Repaired = self.repair(item, kept, removed, options.ridge)
            self.write(consumer, kept, repaired, basis)
            details.setdefault("consumers", []).append(self.described(consumer, item, kept, removed, repaired))
        if turn is not None:
            self.bases.turn_values(group, turn)
        self.cut(group, blocks, details, [] if turn is None else [turn])

    def described(
        self, consumer: Consumer, item: Measured, kept: NDArray[np.int64], removed: NDArray[np.int64], repaired: Repaired
    ) -> dict[str, Any]:
        """Returns what the report says of one consumer."""
        return {
            "node": consumer.uses[0].node.name,
            "ridge": repaired.ridge if np.isfinite(repaired.ridge) else None,
            "ridge_raised": repaired.raised,
            "repair": repaired.kind,
            "calibration_gap": repaired.gap,
            **{f"error_{name}": error for name, error in item.errors(kept, removed, repaired).items()},
        }

    def cut(
        self,
        group: ChannelGroup,
        blocks: NDArray[np.int64],
        details: dict[str, Any],
        turns: Sequence[NDArray[np.float64]] = (),
    ) -> None:
        """Removes the other blocks, and notes it."""
        self.rewriter.cut(group.cut(blocks.tolist()))
        self.changes.append(Change("blocks removed", group.name, group.size, self.state.keep[group.name], details))
        if self.checkpoint is not None:
            self.kept.append(KeptGroup(group.name, blocks.tolist(), details, self.written, list(turns)))
            self.written = []

    def refusals(self) -> tuple[Refusal, ...]:
        """Returns what was cut in another way than it was asked for, and why."""
        bent = [
            Refusal(f"values are cut by channels, not by a subspace: {reason}", tuple(names))
            for reason, names in self.selected.items()
        ]
        unseen = [
            Refusal(
                f"experts {', '.join(map(str, experts))} saw fewer than {LEAST_ROWS} calibration rows: their channels were "
                "chosen by magnitude and nothing is repaired; give more samples",
                (name,),
            )
            for name, experts in self.unseen.items()
        ]
        return (*bent, *unseen)

    def prune_logits(self, group: ChannelGroup, moments: dict[Place, Moments]) -> None:
        """Cuts the width of queries and keys to the best form of their products."""
        keep = self.state.keep[group.name]
        turns = self.bases.logit_turns(group, moments, keep)
        blocks = (np.arange(group.sets)[:, None] * group.size + np.arange(keep)).reshape(-1)
        queries = group.operands[0]
        found = {
            "node": queries.node.name,
            "ridge": None,
            "ridge_raised": False,
            "repair": "rotate",
            "calibration_gap": None,
        }
        # Without a change of basis as many channels of both would go; a bias has no part in it.
        errors = {
            "error_none": turns.lost_channels,
            "error_bias": turns.lost_channels,
            "error_repair": float(turns.lost[keep]),
        }
        rows = moments[place_of(queries)].count
        details = {
            "kind": group.kind,
            "kept": blocks.tolist(),
            "rows": rows,
            "rotated": True,
            "consumers": [{**found, **errors}],
        }
        self.bases.turn_logits(group, turns.queries, turns.keys)
        self.cut(group, blocks, details, [turns.queries, turns.keys])

    # -- what is left -----------------------------------------------------------------------------------------------

    def still(self, consumer: Consumer, moments: Moments) -> Moments:
        """Returns the moments of a consumer's input without what has gone, of other groups, since it was measured."""
        width = consumer.uses[0].width
        now = self.rewriter.mask(width)
        if now.sum() == moments.width:
            return moments
        return moments.part(np.flatnonzero(now[self.seen_at[width]]))

    def left(self, consumer: Consumer) -> Consumer:
        """Returns a consumer without the positions that went with a group before."""
        mask = self.rewriter.mask(consumer.uses[0].width)
        return consumer if mask.all() else replace(consumer, owners=consumer.owners[mask])

    def select(self, group: ChannelGroup, measured: Sequence[Measured], keep: int) -> NDArray[np.int64]:
        """Returns the blocks that stay: ``keep`` of each index set that has any left."""
        kept = []
        for first, parts in by_set(group, measured):
            blocks = self.score.select(parts, keep, self.rng)
            if len(blocks) != keep or len(set(blocks.tolist())) != keep:
                raise InternalError(f"score '{self.options.score}' kept {len(blocks)} of {keep} blocks")
            kept.append(first + blocks)
        return np.concatenate(kept)

    def measured(self, consumer: Consumer, moments: dict[Place, Moments]) -> Measured:
        """Pools the moments of a consumer's uses and lays its weight out as [n, m]."""
        use = consumer.uses[0]
        pooled = None
        for u in consumer.measured:
            own = moments[place_of(u, -1 if consumer.expert is None else consumer.expert)]
            pooled = own if pooled is None else pooled.merge(own)
        assert pooled is not None
        pooled = self.still(consumer, pooled)
        value = np.asarray(use.holder.inputs[use.weight_position].values)
        if consumer.expert is not None:
            weight = np.moveaxis(value[consumer.expert], use.weight_axis - 1, 0)
            if pooled.count < LEAST_ROWS or min(pooled.rows("training"), pooled.rows("held_back")) < 2:
                found = self.unseen.setdefault(use.node.name, [])
                if consumer.expert not in found:
                    found.append(consumer.expert)
                pooled = Moments.white(consumer.width)  # magnitudes choose, and there is nothing to repair with
            values = weight.reshape(consumer.width, -1).astype(np.float64)
            return Measured(values, consumer.owners, pooled, use.scale, centred=False)
        biased = self.options.new_bias or all(self.rewriter.has_bias(u) for u in consumer.uses)
        centred = biased and all(u.bias[0] != "none" for u in consumer.uses)
        return Measured(use.matrix(value).astype(np.float64), consumer.owners, pooled, use.scale, centred=centred)

    def write(self, consumer: Consumer, kept: NDArray[np.int64], repaired: Repaired, basis: Basis | None = None) -> None:
        """Writes the repaired rows, which are in ``basis``, and the bias; the cut removes the other rows."""
        if consumer.expert is not None:
            self.write_expert(consumer, consumer.expert, kept, repaired)
            return
        use = consumer.uses[0]
        old = use.node.inputs[use.weight_position].values
        flat = np.array(use.matrix(old))
        flat[kept] = repaired.weight.astype(old.dtype)
        self._check_written(use, flat[kept], repaired)
        places = [(u.node, u.weight_position) for u in consumer.uses]
        value = use.laid_out(flat, old.shape)
        if not np.array_equal(value, old):  # written, a weight that others read would be stored twice
            self.rewriter.set_constant(places, value)
        if np.any(repaired.bias):
            if use.bias[0] == "none":
                raise OptionError(
                    f"repair '{repaired.kind}' gives node '{use.node.name}' ({use.node.op}) a bias; return zeros"
                )
            self.rewriter.add_bias(consumer.uses, repaired.bias)
        left = [np.flatnonzero(self.rewriter.mask(f)) for f in self.walk.input_axes(use.node, use.weight_position) or ()]
        if basis is None:
            stays = use.cut_axis(kept, old.shape[use.weight_axis])
            cut = np.take(value, stays, use.weight_axis)
            left[use.weight_axis] = left[use.weight_axis][stays]
        else:  # in the original's basis these rows are a matrix of low rank
            cut = use.laid_out(basis.back(kept, flat[kept].astype(np.float64)), old.shape).astype(old.dtype)
        if self.memory.tight:
            cut = self.memory.store.put(cut)
        self.repairs.append(ConsumerRepair(consumer.uses, tuple(left), cut, repaired.bias))

    def write_expert(self, consumer: Consumer, expert: int, kept: NDArray[np.int64], repaired: Repaired) -> None:
        """Writes the repaired rows of one expert into the constant that holds all of them; no expert gets a bias."""
        use = consumer.uses[0]
        constant = use.holder.inputs[use.weight_position]
        if constant is not self.stack:
            places = [(u.holder, u.weight_position) for u in consumer.uses]
            self.stack = constant = self.rewriter.set_constant(places, np.array(constant.values))
        rows = np.moveaxis(constant.values[expert], use.weight_axis - 1, 0)
        rows[kept] = repaired.weight.reshape(rows[kept].shape).astype(rows.dtype)
        flat = rows[kept].reshape(len(kept), -1)
        self._check_written(use, flat, repaired)
        left = [np.flatnonzero(self.rewriter.mask(f)) for f in self.walk.input_axes(use.holder, use.weight_position) or ()]
        left[0], left[use.weight_axis] = np.asarray([expert]), left[use.weight_axis][kept]
        cut = np.take(constant.values[expert : expert + 1], kept, use.weight_axis)
        if self.memory.tight:
            cut = self.memory.store.put(cut)
        self.repairs.append(ConsumerRepair(consumer.uses, tuple(left), cut, np.zeros(repaired.bias.shape)))

    def _check_written(self, use: ConsumerUse, flat: NDArray[Any], repaired: Repaired) -> None:
        """Notes new rows for a checkpoint.

        Raises:
            ModelError: they are not finite in the model's type.
        """
        if self.checkpoint is not None:
            plain = flat.dtype if flat.dtype.kind != "V" else np.float32  # numpy's files know no bfloat16
            self.written.append((flat.astype(plain), repaired.bias))
        if not np.isfinite(flat).all():
            raise ModelError(
                f"the repaired weight of node '{use.node.name}' overflows {flat.dtype}; use repair 'bias' or float32"
            )


@contextmanager
def blamed(groups: Sequence[ChannelGroup]) -> Iterator[None]:
    """Says of what raises no sentence of ours which groups it was done for: a run can go on without them."""
    try:
        yield
    except (LiarOptError, GroupFault, MemoryError, OSError):
        raise
    except Exception as err:
        reason = f"{type(err).__name__}: {_line(err)}"
        raise GroupFault(dict.fromkeys((g.name for g in groups), reason)) from err


def by_set(group: ChannelGroup, measured: Sequence[Measured]) -> Iterator[tuple[int, Sequence[Measured]]]:
    """Yields for each index set of a group the number of its first block, and what is known of its consumers there.

    Channels of no block are left out.
    """
    if group.sets == 1:
        yield 0, [item.owned() for item in measured]
        return
    for first in range(0, group.sets * group.size, group.size):
        parts = [part for part in (item.part(first, group.size) for item in measured) if part.owners.size]
        if parts:
            yield first, parts


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


def _keys(group: ChannelGroup) -> set[Place]:
    return {place_of(r, expert) for r, expert in group.taps}


def _weights(group: ChannelGroup) -> list[Any]:
    """Returns the weights that are solved for, each once."""
    return list({id(c.uses[0].weight): c.uses[0].weight for c in group.consumers}.values())


def _line(err: Exception) -> str:
    return " ".join(str(err).split())[:300]


def _probe_batch(walk: GraphWalk, data: CalibrationData) -> tuple[int, ...]:
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
