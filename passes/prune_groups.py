"""Select, repair and cut the groups of a sweep (`passes.sweep`), one after the other.

Where a width lies between two linear maps its basis is changed before it is cut, so that what goes is a subspace instead of
some of its channels (`passes.change_basis`): values, and queries with keys. These are swept on their own: queries and keys
before the rest, values behind it, within the heads that are left.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from liar_opt.frontend.onnx_segments import Place, place_of
from liar_opt.frontend.records import ConsumerUse, StandIn
from liar_opt.frontend.sublayers import Sublayer
from liar_opt.passes.base import Change, Finding, Pass, PassResult, State
from liar_opt.passes.change_basis import BasisChange, basis_of, value_turn
from liar_opt.passes.checkpoint import Finished, KeptGroup
from liar_opt.passes.dense_target import DenseTargets
from liar_opt.passes.gradient_scores import Gradients
from liar_opt.passes.groups import FORMS, GONE, MAPPED, QUERY_KEY, VALUES, ChannelGroup, Consumer, Refusal, kept_positions
from liar_opt.passes.measured import Measured, Repaired
from liar_opt.passes.registry import lookup, repair_named, score_named
from liar_opt.passes.repairs import AWARE, RepairFunction
from liar_opt.passes.scores import ScoreFunction
from liar_opt.passes.sweep import Sweep, Visitor, places_of
from liar_opt.runtime.errors import InternalError, ModelError, OptionError
from liar_opt.runtime.moments import Moments
from liar_opt.runtime.subspaces import Basis

Groups = tuple[ChannelGroup, ...]
WEIGHTINGS = ("stream", "none")
VALUE_CUTS = ("rotate", "select")
LEAST_ROWS = 32
"""Calibration rows that an expert must have seen to be measured at all."""


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
        stand_ins: what stands in for sublayers that went whole.
    """

    by: ClassVar[str] = "prune-groups"
    ends: Mapping[str, Any]
    blocks: Mapping[str, list[int]]
    lost: Mapping[str, float]
    query_forms: Sequence[Any]
    stand_ins: Sequence[StandIn] = ()


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
        gone = [g.sublayer for g in state.groups if g.sublayer is not None and state.keep.get(g.name, g.size) <= GONE]
        groups = [
            replace(g, whole="alone") if state.keep[g.name] <= GONE else g
            for g in state.groups
            if state.keep.get(g.name, g.size) < g.size and not within(g, gone)
        ]
        apart = {QUERY_KEY: 0, VALUES: 2}
        sweeps = [tuple(g for g in groups if apart.get(g.kind, 1) == turn) for turn in range(3)]
        return tuple(sweep for sweep in sweeps if sweep)

    def apply(self, state: State, plan: tuple[Groups, ...]) -> PassResult:
        """Measures and cuts segment by segment; each sweep's are planned on the graph that the one before has left."""
        visitor = self.visitor(state)
        for groups in plan:
            visitor.sweep.over(visitor, groups)
        visitor.sweep.walk.model.graph.cleanup(remove_unused_node_outputs=False).toposort()
        visitor.note(state)
        return PassResult(state, tuple(visitor.changes), visitor.refusals())

    def visitor(self, state: State) -> "CutGroups":
        """Returns what cuts the groups."""
        sweep = Sweep(state, "calibrate", self.weighting, self.seed, state.checkpoint)
        targets = DenseTargets(sweep, str(self.repair)) if self.repair in AWARE else None
        return CutGroups(sweep, self, targets)


class GroupVisitor(Visitor):
    """Knows of a group's consumers what scores and repairs ask for.

    Args:
        sweep: the graph and its data.
        options: score, repair and what they are given.
    """

    def __init__(self, sweep: Sweep, options: PruneGroupsPass) -> None:
        self.sweep, self.options, self.state = sweep, options, sweep.state
        self.walk, self.rewriter, self.memory = sweep.walk, sweep.rewriter, sweep.memory
        self.score, self.repair = score_named(options.score), repair_named(options.repair)
        self.bases = BasisChange(self.walk, self.rewriter)
        self.rng = np.random.default_rng(options.seed)
        self.unseen: dict[str, list[int]] = {}
        self.gradients: NDArray[np.float64] | None = None

    def begin(self, group: ChannelGroup) -> None:
        """Takes up the gradients of a group, where there are any, for ``measured``."""
        gradients = self.state.get(Gradients)
        self.gradients = None if gradients is None else gradients.by_group.get(group.name)

    def still(self, consumer: Consumer, moments: Moments) -> Moments:
        """Returns the moments of a consumer's input without what has gone, of other groups, since it was measured."""
        width = consumer.uses[0].width
        now = self.rewriter.mask(width)
        if now.sum() == moments.width:
            return moments
        return moments.part(np.flatnonzero(now[self.sweep.seen_at[width]]))

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

    def measured(self, consumer: Consumer, moments: Mapping[Place, Moments]) -> Measured:
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
            values = pooled.arrays.real(weight.reshape(consumer.width, -1))
            return Measured(values, consumer.owners, pooled, use.scale, centred=False, gradients=self.gradients)
        biased = self.options.new_bias or all(self.rewriter.has_bias(u) for u in consumer.uses)
        centred = biased and all(u.bias[0] != "none" for u in consumer.uses)
        weight = pooled.arrays.real(use.matrix(value))
        return Measured(weight, consumer.owners, pooled, use.scale, centred=centred, gradients=self.gradients)


def within(group: ChannelGroup, gone: Sequence[Sublayer]) -> bool:
    """Returns whether a group goes with a sublayer that goes whole; the first of its groups stands for it."""
    if group.sublayer is not None and any(group.name in s.members[1:] for s in gone):
        return True
    return group.kind in (VALUES, QUERY_KEY) and any(not group.constants.isdisjoint(s.constants) for s in gone)


def _sides(sublayer: Sublayer) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the channels of x and those of y, as they are measured together."""
    rows = 0 if sublayer.source is None else sublayer.rows
    return np.arange(rows), np.arange(rows, rows + sublayer.columns)


def whole_of(sublayer: Sublayer, moments: Moments) -> Measured:
    """Returns a sublayer as a consumer of x and y whose output is y: without y it is to be had of x."""
    kept, removed = _sides(sublayer)
    weight = np.zeros((kept.size + removed.size, removed.size))
    weight[removed] = np.eye(removed.size)
    return Measured(moments.arrays.real(weight), np.zeros(len(weight), np.int64), moments)


def whole_repair(item: Measured, sublayer: Sublayer, form: int, ridge: float | None) -> Repaired:
    """Returns what stands in for y: a map of x and a bias, the ridge chosen on held-back rows, or the bias alone."""
    kept, removed = _sides(sublayer)
    named = repair_named("liar" if form == MAPPED else "bias")
    return named(item, kept, removed, ridge)


class CutGroups(GroupVisitor):
    """Selects, repairs and cuts.

    Args:
        sweep: the graph and its data.
        options: score, repair and what they are given.
        targets: of repairs that look at the dense model; None for others.
    """

    def __init__(self, sweep: Sweep, options: PruneGroupsPass, targets: DenseTargets | None = None) -> None:
        super().__init__(sweep, options)
        self.targets = targets
        self.changes: list[Change] = []
        self.repairs: list[ConsumerRepair] = []
        self.selected: dict[str, list[str]] = {}
        self.stand_ins: list[StandIn] = []
        self.stack: Any = None
        # What is cut is noted, so that it can be done again.
        self.recording = sweep.checkpoint is not None or sweep.ranks.size > 1
        self.kept: list[KeptGroup] = []
        self.written: list[tuple[NDArray[Any], NDArray[Any]]] = []

    cuts = True
    measuring = True
    """Whether moments are of activations, so that errors can be told."""

    def before(self, groups: Sequence[ChannelGroup], stop: int, first: Any) -> None:
        """Measures the dense targets, where there are any."""
        if self.targets is not None:
            self.targets.measure(groups, stop, first)

    def group(self, group: ChannelGroup, moments: Mapping[Place, Moments]) -> None:
        """Selects, repairs and cuts one group."""
        if group.whole == "alone":
            self.replace_whole(group, moments)
            return
        if group.kind == QUERY_KEY:
            self.cut_logits(group, moments)
            return
        self.begin(group)
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
        rows = [moments[key].count for key in places_of(group)]  # all of an activation, or those of each expert
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

    def measured(self, consumer: Consumer, moments: Mapping[Place, Moments]) -> Measured:
        """Adds the moments with the dense targets."""
        item = super().measured(consumer, moments)
        targets = None if self.targets is None else self.targets.of(consumer)
        return item if targets is None else replace(item, aware=self.still(consumer, targets))

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
        if self.recording:
            self.kept.append(KeptGroup(group.name, blocks.tolist(), details, self.written, list(turns)))
            self.written = []

    def replace_whole(self, group: ChannelGroup, moments: Mapping[Place, Moments]) -> None:
        """Has a constant, or a map of its input, stand in for the sublayer of a group."""
        assert group.sublayer is not None
        form, item = self.state.keep[group.name], whole_of(group.sublayer, moments[place_of(group.sublayer)])
        kept, removed = _sides(group.sublayer)
        found = whole_repair(item, group.sublayer, form, self.options.ridge)
        details: dict[str, Any] = {"kind": group.kind, "kept": [], "rows": item.moments.count, "stand_in": FORMS[form]}
        described = {
            "node": group.sublayer.node.name,
            "ridge": found.ridge if np.isfinite(found.ridge) else None,
            "ridge_raised": found.raised,
            "repair": FORMS[form],
            "calibration_gap": found.gap,
            **{f"error_{name}": error for name, error in item.errors(kept, removed, found).items()},
        }
        details["consumers"] = [described if self.measuring else {}]
        self.stand_in(group, found.weight if form == MAPPED else None, found.bias, details)

    def stand_in(
        self, group: ChannelGroup, matrix: NDArray[Any] | None, bias: NDArray[np.float64], details: dict[str, Any]
    ) -> None:
        """Replaces the sublayer of a group, and notes it."""
        assert group.sublayer is not None
        made = group.sublayer.stand_in(matrix, bias)
        if not all(np.isfinite(a).all() for a in (made.bias, *(() if made.matrix is None else (made.matrix,)))):
            raise ModelError(f"what stands in for '{made.target}' overflows {made.bias.dtype}; use --whole-layers off")
        if self.memory.low and made.matrix is not None:
            made = replace(made, matrix=self.memory.store.put(made.matrix))
        self.rewriter.replace(made)
        self.stand_ins.append(made)
        self.changes.append(Change("sublayer replaced", group.name, group.size, GONE, details))
        if self.recording:
            numbers = np.zeros((0, 0)) if matrix is None else np.asarray(matrix, np.float64)
            self.kept.append(KeptGroup(group.name, [], details, [(numbers, np.asarray(bias, np.float64))]))

    def cut_logits(self, group: ChannelGroup, moments: Mapping[Place, Moments]) -> None:
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

    def write(self, consumer: Consumer, kept: NDArray[np.int64], repaired: Repaired, basis: Basis | None = None) -> None:
        """Writes the repaired rows, which are in ``basis``, and the bias; the cut removes the other rows."""
        if consumer.expert is not None:
            self.write_expert(consumer, consumer.expert, kept, repaired)
            return
        if self.targets is not None:
            self.targets.written(consumer, repaired)
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
        if self.memory.low:
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
        if self.memory.low:
            cut = self.memory.store.put(cut)
        self.repairs.append(ConsumerRepair(consumer.uses, tuple(left), cut, np.zeros(repaired.bias.shape)))

    def _check_written(self, use: ConsumerUse, flat: NDArray[Any], repaired: Repaired) -> None:
        """Notes new rows for what does the same again.

        Raises:
            ModelError: they are not finite in the model's type.
        """
        if self.recording:
            plain = flat.dtype if flat.dtype.kind != "V" else np.float32  # numpy's files know no bfloat16
            self.written.append((flat.astype(plain), repaired.bias))
        if not np.isfinite(flat).all():
            raise ModelError(
                f"the repaired weight of node '{use.node.name}' overflows {flat.dtype}; use repair 'bias' or float32"
            )

    # -- a cut that is made again -----------------------------------------------------------------------------------

    def finished(self) -> Finished:
        """Returns what was cut since it was last asked."""
        finished = Finished(self.kept, dict(self.rng.bit_generator.state))
        self.kept = []
        return finished

    def replay(self, groups: Sequence[ChannelGroup], finished: Finished) -> None:
        """Cuts the groups as it was done."""
        for group, kept in zip(groups, finished.groups, strict=True):
            if group.name != kept.name:
                raise InternalError(f"group '{kept.name}' of the resume folder is '{group.name}' now")
            if group.whole == "alone":
                ((matrix, bias),) = kept.consumers
                self.stand_in(group, matrix if matrix.size else None, bias, kept.details)
                continue
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
        self.rng.bit_generator.state = finished.generator

    # -- what is said of it -----------------------------------------------------------------------------------------

    def note(self, state: State) -> None:
        """Notes what the check of the result and the report ask for."""
        state.repairs = self.repairs
        blocks = {change.where: change.details["kept"] for change in self.changes}
        lost = {
            change.where: max((c["error_repair"] for c in change.details.get("consumers", ()) if c), default=0.0)
            for change in self.changes
        }
        state.add(Cut(self.rewriter.ends(), blocks, lost, self.bases.query_forms, self.stand_ins))

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
