"""Prove every group on the graph itself before anything is measured: doubt costs sparsity, never the run.

The cut is rehearsed on a copy of the graph with made-up moments: blocks of every group go, what stays gets other weights
and a bias, by the very code that cuts later. The copy must be a valid model with the same interface, load in every way in
which it will be run (in ONNX Runtime with its optimizer on and off), and compute what the original computes when the
removed rows of every consumer are zero, at several sets of input sizes that differ in batch and in length (of a module: at
those of its example, and where the trace has left sizes open at smaller ones). Where that fails, the groups at fault are
found by bisection; they are left alone, each with its reason, and the rest is proved without them.

    failure(G)   None where the cut of all groups of G together is right, else what is wrong
    proved(A, C) A + C where failure(A + C) is None; A where C is one group, which is at fault; else the halves of C in turn

Each group at fault costs about log2 of their number in rehearsals, however many cause a failure together.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from liar_opt.frontend.causal import positions
from liar_opt.frontend.either_model import analysis_of
from liar_opt.frontend.engine import AnyPatch, ConstantPatch, Patch, Reference
from liar_opt.frontend.onnx_segments import plan_segments
from liar_opt.frontend.tables import looked_up, vocabulary
from liar_opt.frontend.walk import GraphWalk
from liar_opt.passes.base import DenseModel, Finding, Pass, PassResult, Probes, State
from liar_opt.passes.close_calls import ROUNDING, close_calls
from liar_opt.passes.find_groups import find_groups
from liar_opt.passes.groups import GONE, MAPPED, ChannelGroup, Consumer, Refusal
from liar_opt.passes.measured import Measured, Repaired
from liar_opt.passes.prune_groups import CutGroups, PruneGroupsPass
from liar_opt.passes.sweep import Sweep, cut_arrays, first_samples
from liar_opt.passes.verify_model import by_weight, dense_session, spread_bias
from liar_opt.runtime.array_store import ArrayStore
from liar_opt.runtime.calibration_data import CalibrationData, load_calibration
from liar_opt.runtime.compare import REPEATED, allowed_difference, relative_difference
from liar_opt.runtime.errors import LiarOptError, OptionError
from liar_opt.runtime.moments import MadeUpMoments
from liar_opt.runtime.ranks import current
from liar_opt.runtime.sessions import Runner
from liar_opt.runtime.signatures import InputSpec, Signature

BATCHES = (2, 3, 1)
"""Samples of each probe; the last one is a single token, as a decoder is run."""
LENGTHS = (5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
"""Lengths to choose from: primes, of which those are taken that no axis of a weight has."""
OPTIMIZED = 2
"""Probes that run with ONNX Runtime's optimizer, too."""
SHRUNK = 0.96875
"""What stays is multiplied by this in a rehearsal, so that a weight that was not written is seen."""


class Failure(NamedTuple):
    """What is wrong with a cut, and the group at fault, where that is known."""

    reason: str
    group: str | None = None


class RaisedAt(Exception):
    """Cutting a group raised an exception."""

    def __init__(self, group: str, error: Exception) -> None:
        super().__init__(_line(error))
        self.group = group


@dataclass(frozen=True)
class Faults(Finding):
    """The groups whose cut would be wrong, or to be doubted, with the reason of each."""

    by: ClassVar[str] = "prove-groups"
    reasons: Mapping[str, str]


@dataclass(frozen=True)
class AskedBlocks(Finding):
    """The blocks that a rehearsal keeps, by group; of others it draws them."""

    by: ClassVar[str] = "Proof"
    by_group: Mapping[str, Sequence[int]]


@dataclass(frozen=True, eq=False)
class Rehearsed(Finding):
    """A rehearsal that is done."""

    by: ClassVar[str] = "rehearse-cut"
    run: "Rehearsal"


@dataclass(frozen=True)
class ProveGroupsPass(Pass[Mapping[str, int]]):
    """Rehearse the cut of every group, and leave those alone whose cut is wrong.

    Attributes:
        cut: how groups are cut.
        decided: whether each group is cut to the width that was decided for it; otherwise it loses one block.
        whole: whether sublayers may go whole, which is rehearsed, too.
    """

    name: ClassVar[str] = "prove-groups"
    cut: PruneGroupsPass = field(default_factory=PruneGroupsPass)
    decided: bool = False
    whole: bool = False

    def plan(self, state: State) -> Mapping[str, int]:
        """Returns how many blocks of each group are to stay in the rehearsal."""
        if self.decided:
            found = {g.name: g.size for g in (*state.groups, *state.values, *state.queries)}
            return {name: keep for name, keep in state.keep.items() if keep < found.get(name, 0)}
        cut = list(state.groups)  # what is cut when asked for alone is proved when it was
        return {g.name: g.size - 1 for g in cut if g.size > 1}

    def apply(self, state: State, plan: Mapping[str, int]) -> PassResult:
        """Proves the groups; those at fault are no groups any more."""
        proof = Proof(state, self.cut)
        calls = current().once(lambda: proof.close_calls((*state.groups, *state.values, *state.queries)))
        leave_alone(state, calls)
        left = self._prove_whole(state, proof)
        faults = current().once(lambda: proof.faults({name: keep for name, keep in plan.items() if name not in calls}))
        faults |= calls
        leave_alone(state, faults)
        state.add(Faults(faults))
        return PassResult(state, (), (*refusals_of(faults), *left))

    def _prove_whole(self, state: State, proof: "Proof") -> tuple[Refusal, ...]:
        """Rehearses that sublayers go whole, where that is not decided yet; those at fault do not, and it is said why."""
        first = [g for g in state.groups if g.sublayer is not None and g.name == g.sublayer.members[0]]
        if self.decided or not self.whole or not first:
            return ()
        keep: dict[str, int] = {}
        for number, group in enumerate(first):
            assert group.sublayer is not None
            keep[group.name] = MAPPED if number % 2 and group.sublayer.maps else GONE
        wrong = current().once(lambda: proof.faults(keep))
        at_fault = {name for g in first if g.sublayer is not None and g.name in wrong for name in g.sublayer.members}
        state.groups = tuple(replace(g, sublayer=None) if g.name in at_fault else g for g in state.groups)
        return refusals_of(wrong)


def leave_alone(state: State, reasons: Mapping[str, str]) -> None:
    """Takes groups out of the state: they stay whole."""
    state.groups = tuple(g for g in state.groups if g.name not in reasons)
    state.values = tuple(g for g in state.values if g.name not in reasons)
    state.queries = tuple(g for g in state.queries if g.name not in reasons)
    for name in reasons:
        state.keep.pop(name, None)


def refusals_of(reasons: Mapping[str, str]) -> tuple[Refusal, ...]:
    """Returns why groups are left alone, those of one reason together."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    ours = "left alone, for cutting it would be wrong here (a fault of liar-opt; please report it): "
    return tuple(
        Refusal(f"{'left alone: ' if reason.startswith(ROUNDING) else ours}{reason}", tuple(names))
        for reason, names in by_reason.items()
    )


def groups_at_fault(keep: Mapping[str, int], failure: Callable[[dict[str, int]], Failure | None]) -> dict[str, str]:
    """Returns the groups that cannot be cut together with the others, with the reason of each, found by bisection.

    Args:
        keep: how many blocks of each group stay, in the order in which they are cut.
        failure: says of some of them what is wrong with cutting all of these together.
    """
    faults: dict[str, str] = {}
    # In the order in which they are cut: halves are neighbours in the graph.
    proved: list[str] = []
    waiting = [list(keep)]
    while waiting:
        names = waiting.pop()
        found = failure({n: keep[n] for n in [*proved, *names]}) if names else None
        if found is None:
            proved += names
        elif found.group in names:
            faults[str(found.group)] = found.reason
            waiting.append([n for n in names if n != found.group])
        elif len(names) == 1:
            faults[names[0]] = found.reason
        else:
            half = len(names) // 2
            waiting += [names[half:], names[:half]]
    return faults


class Proof:
    """Rehearsals on one model.

    Args:
        state: the analysed model, not cut yet.
        cut: how groups are cut; score and repair are those of a rehearsal.
        feeds: inputs to compare on; None takes those of the state, or makes some up.
    """

    def __init__(self, state: State, cut: PruneGroupsPass, feeds: Sequence[dict[str, Any]] | None = None) -> None:
        self.state, self.engine = state, state.engine()
        self.original = state.found(DenseModel).original
        self.cut = rehearsal_of(cut)
        self.precision = state.model.least_precision()
        # What an operator leaves open cannot be compared.
        self.outputs = [t.name for t in state.model.graph.outputs if t.name not in state.analysed().unspecified]
        known = state.get(Probes)
        if feeds is None:
            feeds = probe_feeds(state, dense_session(state)) if known is None else known.feeds
        self.feeds = list(feeds)

    def faults(self, keep: Mapping[str, int], blocks: Mapping[str, Sequence[int]] | None = None) -> dict[str, str]:
        """Returns the groups that cannot be cut, with the reason of each.

        Args:
            keep: how many blocks of each group stay; groups that are not named stay whole.
            blocks: which; None draws them.
        """
        if not self.feeds or not keep:
            return {}
        return groups_at_fault(keep, lambda some: self.failure(some, blocks or {}))

    def close_calls(self, groups: Sequence[ChannelGroup]) -> dict[str, str]:
        """Returns the groups that are cut in front of a choice that rounding makes, with the reason of each."""
        return close_calls(self.engine, self.state.analysed(), self.outputs, self.feeds, groups)

    def failure(self, keep: Mapping[str, int], blocks: Mapping[str, Sequence[int]]) -> Failure | None:
        """Returns what is wrong with the cut of some groups together, or None."""
        analysed, memory = self.state.analysed(), self.state.memory
        try:
            rehearsal = self._rehearse(keep, blocks)
            model = rehearsal.state.model
            self.engine.require_form(self.original, model, rehearsal.walk.spared)
            patches = masked_patches(analysed, rehearsal)
            store = ArrayStore(memory.store.folder) if memory.low else None
            reference = self.engine.reference(analysed, self.outputs, patches, store)
        except RaisedAt as err:
            return Failure(str(err), err.group)
        except (MemoryError, OSError):
            raise
        except Exception as err:
            return Failure(_line(err))
        ends = rehearsal.rewriter.ends()
        expected: dict[int, dict[str, Any]] = {}
        for turn, (how, load) in enumerate(self.engine.ways(model)):
            try:
                session = load()
            except Exception as err:
                return Failure(f"{how} the cut graph cannot be loaded: {_line(err)}")
            for number, feeds in enumerate(self.feeds[:OPTIMIZED] if turn else self.feeds):
                try:
                    if number not in expected:
                        expected[number] = cut_arrays(reference.run(feeds), ends)
                except Exception as err:
                    return Failure(f"the masked original fails ({_line(err)}) at {sizes_of(feeds)}, {how}")
                wrong = self._wrong(session, feeds, reference, ends, expected[number], turn > 0)
                if wrong is not None:
                    return Failure(f"{wrong} at {sizes_of(feeds)}, {how}")
        return None

    def _rehearse(self, keep: Mapping[str, int], blocks: Mapping[str, Sequence[int]]) -> "Rehearsal":
        """Cuts a copy of the model."""
        model = self.original.model()
        model.normalise()
        analysed = analysis_of(model)
        found = find_groups(analysed, known=True)
        data = CalibrationData(tuple(self.feeds), (None,) * len(self.feeds), 0, 0, "probes", (), True)
        # What a rehearsal writes goes from the disk with it.
        memory = replace(self.state.memory, store=ArrayStore(self.state.memory.store.folder))
        model.store = memory.store if memory.low else None
        state = State(model, data, self.state.device, memory=memory, walk=analysed)
        state.groups = tuple(g for g in (*found.groups, *found.values, *found.queries) if g.name in keep)
        state.keep = dict(keep)
        state.add(AskedBlocks(blocks))
        self.cut.apply(state, self.cut.plan(state))
        return state.found(Rehearsed).run

    def _wrong(
        self,
        session: Runner,
        feeds: dict[str, Any],
        reference: Reference,
        ends: Mapping[str, Any],
        expected: Mapping[str, Any],
        again: bool,
    ) -> str | None:
        """Returns how a cut model differs from the masked original on a probe, or None; ``again`` in another way."""
        try:
            found = session.run(cut_arrays(feeds, ends), self.outputs, arrays=True)
        except Exception as err:
            return f"the cut graph fails ({_line(err)})"
        for name, value in expected.items():
            apart = relative_difference(found[name], value)
            if apart <= allowed_difference(self.precision, 0.0):
                continue
            # A model may magnify rounding by itself, or draw random numbers: ask it, before blaming the cut.
            moved = relative_difference(cut_arrays(reference.rounded(feeds), ends)[name], value)
            if again:
                other = cut_arrays(reference.reordered(feeds), ends)[name]
                moved, apart = (
                    max(moved, relative_difference(other, value)),
                    min(apart, relative_difference(found[name], other)),
                )
            repeated = relative_difference(cut_arrays(reference.run(feeds), ends)[name], value)
            if not apart <= allowed_difference(self.precision, moved) and repeated <= REPEATED:
                return f"output '{name}' differs by {apart:.1e}"
        return None


def masked_patches(analysed: GraphWalk, rehearsal: "Rehearsal") -> list[AnyPatch]:
    """Returns what makes a graph of it that nothing was cut out of: zeros in the removed rows, new biases, what stands in.

    Args:
        analysed: the graph as it was.
        rehearsal: of a copy of it.
    """
    memory, nodes = rehearsal.memory, {n.name: n for n in analysed.model.graph.nodes}
    uses = {(u.node.name, u.weight_position): u for u in analysed.consumers}
    # A weight that was repaired again is what it became last; biases were added to those before.
    patches: dict[tuple[str, int], Patch] = {}
    for parts in by_weight(rehearsal.repairs):
        repair = parts[0]
        own = tuple(uses[u.node.name, u.weight_position] for u in repair.uses)
        old = own[0].holder.inputs[own[0].weight_position]
        full = np.zeros(old.shape, old.dtype)
        for part in parts:
            full[np.ix_(*part.index)] = part.weight
        full = memory.store.put(full) if memory.low else full
        bias, place = spread_bias(repair, full.shape), (own[0].node.name, own[0].weight_position)
        patches[place] = Patch(own, full, bias + patches[place].shift if place in patches else bias)
    forms: dict[tuple[str, int], NDArray[Any]] = {}
    for form in rehearsal.bases.query_forms:
        use = form.source.use
        value = forms.setdefault((use.node.name, use.position), np.array(nodes[use.node.name].inputs[use.position].values))
        value[np.ix_(*form.index)] = form.value
    repaired = {(use.holder.name, use.weight_position) for patch in patches.values() for use in patch.uses}
    # What was repaired later is in that basis.
    left = [ConstantPatch((nodes[n], at), value) for (n, at), value in forms.items() if (n, at) not in repaired]
    return [*left, *patches.values(), *rehearsal.stand_ins]


def probe_feeds(state: State, session: Runner) -> list[dict[str, Any]]:
    """Returns inputs of several sizes on which the original runs.

    They differ in batch and in length where these are open, and no length is the size of an axis of a weight. A decoder
    with a cache takes a step behind some tokens. Where the model does not run on made-up inputs, calibration samples serve.
    """
    taken = {int(n) for c in state.model.constants() for n in c.shape}
    inputs, words, limit = state.analysed().input_specs(), vocabulary(state.model), positions(state.model)
    lengths = [n for n in LENGTHS if n not in taken and n <= (limit or n)] or [max(1, limit or 1)]
    candidates = []
    for samples, length in zip(BATCHES, (lengths[0], lengths[min(1, len(lengths) - 1)], 1), strict=True):
        try:
            data = load_calibration(
                None,
                inputs,
                samples=samples,
                batch_size=samples,
                seed=length,
                sequence_length=length,
                image_size=_image_size(state),
                vocabulary=words,
                positions=limit,
                rows=looked_up(state.model),
            )
        except OptionError:
            continue
        candidates.append(data.batches[0])
    step = _decoding_step(inputs, words, lengths[0])
    if step is not None:
        candidates.insert(2, step)
    if state.calibration is not None:
        candidates.append(first_samples(state, state.calibration.batches[0], BATCHES[0]))
    found: list[dict[str, Any]] = []
    shapes: list[dict[str, tuple[int, ...]]] = []
    for feeds in candidates:
        own = {name: np.shape(value) for name, value in feeds.items()}
        if own in shapes or len(found) == len(BATCHES):
            continue
        try:
            session.run(feeds)
        except Exception:  # of ONNX Runtime: a class of its own for each release
            continue
        found.append(feeds)
        shapes.append(own)
    return found


def _decoding_step(inputs: Sequence[InputSpec], words: int | None, cached: int) -> dict[str, Any] | None:
    """Returns one token for each of two samples, behind a cache of some tokens; None where there is no open cache."""
    signature = Signature.read(inputs, None)
    if not signature.past or signature.seen or signature.ids is None:
        return None
    rng = np.random.default_rng(cached)
    samples = BATCHES[0]
    ids = rng.integers(words or 2, size=(samples, 1))
    feeds = signature.feed(ids, np.ones(ids.shape, np.bool_), cached=cached)
    for name in signature.past:
        spec = signature.inputs[name]
        lead = (samples,) if len(spec.shape) == 4 else (2, samples)
        inner = [dim if isinstance(dim, int) else cached for dim in spec.shape[-3:]]
        feeds[name] = rng.standard_normal((*lead, *inner)).astype(spec.dtype)
    return feeds


def _image_size(state: State) -> int | None:
    """Returns the size of the pictures of the calibration data; None where there are none."""
    feeds = {} if state.calibration is None else state.calibration.batches[0]
    return next((v.shape[-1] for v in feeds.values() if v.ndim == 4 and v.dtype.kind == "f"), None)


def rehearsal_of(cut: PruneGroupsPass) -> "RehearseCutPass":
    """Returns the pass that rehearses a cut: its options, but for what needs moments."""
    return RehearseCutPass(**{**vars(cut), "score": "random", "repair": moved_weights, "ridge": None})


def sizes_of(feeds: Mapping[str, Any]) -> str:
    """Returns names and shapes of a probe, for a reason."""
    return ", ".join(f"{name} {list(value.shape)}" for name, value in feeds.items())[:200]


def _line(error: Exception) -> str:
    """Returns what an exception says in one line, with its class where it is no sentence of ours."""
    text = " ".join(str(error).split())[:200]
    return text if isinstance(error, LiarOptError) else f"{type(error).__name__}: {text}"


@dataclass(frozen=True)
class RehearseCutPass(PruneGroupsPass):
    """Cut a copy with made-up moments."""

    name: ClassVar[str] = "rehearse-cut"

    def apply(self, state: State, plan: tuple[tuple[ChannelGroup, ...], ...]) -> PassResult:
        """Cuts without measuring."""
        visitor = Rehearsal(Sweep(state, weighting=self.weighting, seed=self.seed), self)
        visitor.rehearse(plan)
        visitor.note(state)
        state.add(Rehearsed(visitor))
        return PassResult(state, tuple(visitor.changes))


class Rehearsal(CutGroups):
    """Cuts without measuring: what a group is cut to is drawn, or given."""

    measuring = False

    def rehearse(self, plan: Sequence[Sequence[ChannelGroup]]) -> None:
        """Cuts the groups of every sweep, with made-up moments, in the order in which they are measured.

        Raises:
            RaisedAt: cutting one raises an exception.
        """
        for planned in plan:
            spanning, segments = plan_segments(self.walk, planned)
            for group in (*spanning, *(g for s in segments for g in s.groups)):
                try:
                    taps = self.sweep.taps([group], streams=False)
                    self.group(group, {place: MadeUpMoments(tap.width) for place, tap in taps.items()})
                    self.state.model.settle()
                except (MemoryError, OSError):
                    raise
                except Exception as err:
                    raise RaisedAt(group.name, err) from err
        self.walk.model.graph.cleanup(remove_unused_node_outputs=False).toposort()

    def select(self, group: ChannelGroup, measured: Sequence[Measured], keep: int) -> NDArray[np.int64]:
        """Returns the blocks that were asked for, or draws some."""
        asked = self.state.found(AskedBlocks).by_group.get(group.name)
        return super().select(group, measured, keep) if asked is None else np.asarray(asked, np.int64)

    def described(
        self, consumer: Consumer, item: Measured, kept: NDArray[np.int64], removed: NDArray[np.int64], repaired: Repaired
    ) -> dict[str, Any]:
        """Returns nothing: no error was measured."""
        return {}


def moved_weights(
    consumer: Measured, kept: NDArray[np.int64], removed: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns other weights for what stays, and a bias where there may be one: a repair that knows nothing."""
    weight = consumer.weight[kept].astype(np.float64) * SHRUNK
    scale = float(np.sqrt(np.mean(np.square(weight)))) if weight.size and consumer.centred else 0.0
    return weight, scale * np.linspace(-1.0, 1.0, consumer.weight.shape[1])
