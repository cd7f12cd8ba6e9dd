"""Leave only some experts in the layers that have them (`frontend.experts`): which ones, by what they add to the output.

An expert's score is what it adds where it is chosen, gate x |f(x)|: by ``mean`` over the tokens routed to it (REAP,
arXiv 2510.13999), or by ``sum``, which counts how often that is. Inside an operator (MoE) |f(x)| is not seen, and the
gate alone counts. The score whose choice changes the output least on held-back batches decides.

The router stays as it is: its softmax runs over those that are left, so that their gates have the share of those that went.
Experts go before any width is measured: what stays is repaired as it will be used.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from liar_opt.frontend.engine import ConstantPatch, Patch
from liar_opt.frontend.experts import (
    ExpertLayer,
    Unfit,
    cut_experts,
    find_experts,
    hidden,
    mass_by_expert,
    rows_by_expert,
)
from liar_opt.frontend.onnx_segments import row_mask, tap_for
from liar_opt.frontend.rewrite import CannotFollow
from liar_opt.frontend.walk import GraphWalk
from liar_opt.passes.base import Change, Finding, Pass, PassResult, State
from liar_opt.passes.groups import Refusal
from liar_opt.passes.options import PruneOptions
from liar_opt.passes.plan_memory import sizes_of
from liar_opt.passes.sweep import first_samples, held_batches, part_of_batch, probe_batch
from liar_opt.runtime.compare import DifferenceMeter, OutputDifference, require_close
from liar_opt.runtime.errors import ModelError, OptionError

SCORES = ("mean", "sum")
"""By what experts may be chosen; the first where nothing can be compared."""
SAMPLES = 4
"""On which the cut is compared with the original."""
HELD = 2
"""Batches on which choices are compared."""
SHARE = 8
"""What is measured of a batch takes at most this part of the memory."""


@dataclass(frozen=True, eq=False)
class FoundExperts(Finding):
    """The layers of experts of a model, and those of which none can go, as the analysis ``walk`` has them."""

    by: ClassVar[str] = "experts_of"
    walk: GraphWalk
    layers: tuple[ExpertLayer, ...]
    unfit: tuple[Unfit, ...]


Kept = Mapping[ExpertLayer, Sequence[int]]
Totals = Mapping[ExpertLayer, NDArray[np.float64]]


@dataclass(frozen=True)
class CutLayer:
    """One layer of experts, as the report has it.

    Attributes:
        name: the node that chooses.
        before: experts that there were.
        after: experts that are left.
        kept: which.
        top_k: of each token.
        groups: that are chosen from first.
        scores: of all experts, by the score that decided.
        unseen: how many were chosen for no calibration row.
    """

    name: str
    before: int
    after: int
    kept: list[int]
    top_k: int
    groups: int
    scores: list[float]
    unseen: int


@dataclass(frozen=True)
class CutExperts(Finding):
    """What was cut, as the report has it.

    Attributes:
        asked: the ratio.
        score: by which they were chosen.
        losses: the relative difference of the first output on held-back batches, by score; empty where none were compared.
        layers: in the graph's order.
        parameters_before: elements of all constants that have experts.
        parameters_after: the same.
        exact_difference: of the cut model and the original whose router never chooses the others; None of a dry run.
        gates: whether the gates alone counted, somewhere.
    """

    by: ClassVar[str] = "cut-experts"
    asked: float
    score: str
    losses: dict[str, float]
    layers: tuple[CutLayer, ...]
    parameters_before: int
    parameters_after: int
    exact_difference: float | None = None
    gates: bool = False


@dataclass(frozen=True)
class CutExpertsPass(Pass[Kept]):
    """Leave as many experts in each layer as a ratio says, with their columns of the router.

    Before: router [d, E], experts [E, ..]. After: router [d, K], experts [K, ..].

    Attributes:
        ratio: of the experts that go.
    """

    name: ClassVar[str] = "cut-experts"
    ratio: float = 0.0

    def requires(self, state: State) -> None:
        """Checks that there are experts, and enough.

        Raises:
            ModelError: none can go.
            OptionError: the ratio leaves fewer than are chosen, or all.
        """
        found = experts_of(state)
        layers, unfit = found.layers, found.unfit
        if not layers and unfit:
            raise ModelError(f"no expert can go: {unfit[0].reason} (node '{unfit[0].name}'); leave experts out")
        if not layers:
            raise ModelError(
                "no layer is found whose router chooses among experts by TopK, so that their weights are read by the "
                "numbers chosen, nor an operator MoE; experts that all run or are chosen otherwise stay; leave experts out"
            )
        _require_enough(layers, self.ratio)

    def plan(self, state: State) -> Kept:
        """Plans nothing: which experts stay is measured."""
        return {}

    def apply(self, state: State, plan: Kept) -> PassResult:
        """Chooses, compares with the original whose router never chooses the others, and cuts; adds a ``CutExperts``.

        Raises:
            CheckError: the cut model is not that.
            ModelError: a number in the graph depends on how many there are, in a way that cannot be followed.
        """
        walk, engine = state.analysed(), state.engine()
        refused = experts_refused(state)
        layers = experts_of(state).layers
        chosen = choose_experts(state, layers, self.ratio)
        assert state.calibration is not None
        outputs = [t.name for t in state.model.graph.outputs if t.name not in walk.unspecified]
        feeds = first_samples(state, state.calibration.batches[0], SAMPLES)
        store = state.memory.store if state.memory.low else None
        reference = engine.reference(walk, outputs, hidden(walk, chosen.kept), store)
        theirs = reference.run(feeds)
        before = sum(layer.parameters for layer in layers)
        after = sum(layer.left(kept) for layer, kept in chosen.kept.items())
        try:
            cut_experts(walk, chosen.kept)
        except CannotFollow as err:
            raise ModelError(f"experts cannot go: {err}; leave experts out") from err
        state.model.graph.cleanup(remove_unused_node_outputs=False).toposort()
        state.model.settle()
        session = engine.whole(state.model, "the model with fewer experts")
        ours = session.run(feeds, outputs, arrays=True)
        precision = state.model.least_precision()
        exact = require_close(ours, theirs, precision, "fewer experts against a router that never chooses the others")
        entries = tuple(_entry(layer, kept, chosen) for layer, kept in chosen.kept.items())
        gates = any(layer.scores for layer in layers)
        state.add(CutExperts(self.ratio, chosen.score, chosen.losses, entries, before, after, exact, gates))
        changes = tuple(Change("experts", e.name, e.before, e.after, {"kept": e.kept, "scores": e.scores}) for e in entries)
        return PassResult(state, changes, refused)


def experts_of(state: State) -> FoundExperts:
    """Returns the experts of an analysed model; they are looked for once."""
    found, walk = state.get(FoundExperts), state.analysed()
    if found is None or found.walk is not walk:
        found = FoundExperts(walk, *find_experts(walk))
        state.add(found)
    return found


def experts_refused(state: State) -> tuple[Refusal, ...]:
    """Returns why experts of some layers cannot go."""
    return tuple(Refusal(f"no expert can go: {u.reason}", (u.name,), u.size) for u in experts_of(state).unfit)


def planned_experts(state: State) -> Iterator[str]:
    """Yields a sentence on the experts that would be left, if some would go."""
    cut = state.get(CutExperts)
    for layer in () if cut is None else cut.layers:
        kept = ", ".join(map(str, layer.kept))
        yield f"{layer.after} of {layer.before} experts would be left (node '{layer.name}'): {kept}"


def require_experts_possible(options: PruneOptions) -> None:
    """Checks what the option excludes.

    Raises:
        OptionError: the ratio is none.
    """
    if options.experts is None:
        return
    if not 0.0 < options.experts < 1.0:
        raise OptionError(f"experts is {options.experts:g}; give the share that goes, above 0 and below 1")


def experts_left(layer: ExpertLayer, ratio: float) -> int:
    """Returns how many experts of a layer stay, as many of each group."""
    own = layer.size // layer.groups
    return (own - math.floor(own * ratio + 0.5)) * layer.groups


def _require_enough(layers: Sequence[ExpertLayer], ratio: float) -> None:
    """Checks that some experts go, and as many stay as are chosen.

    Raises:
        OptionError: it is not so; the ratios that would do are said.
    """
    for layer in layers:
        own, left = layer.size // layer.groups, experts_left(layer, ratio) // layer.groups
        if left < layer.least:
            most = min((one.size // one.groups - one.least + 0.4999) * one.groups / one.size for one in layers)
            way = f"give less than {math.floor(1000 * most) / 1000:g}" if most >= 0.5 / own else "leave experts out"
            of = "" if layer.groups == 1 else f" of each of {layer.groups} groups"
            raise OptionError(
                f"experts {ratio:g} would leave {left} of {own} experts{of} (node '{layer.name}'), and {layer.least} are "
                f"needed to choose {layer.top_k} for each token; {way}"
            )
    if all(experts_left(layer, ratio) == layer.size for layer in layers):
        least = min(0.5 * layer.groups / layer.size for layer in layers)
        raise OptionError(f"experts {ratio:g} leaves all of every layer; give at least {math.ceil(1000 * least) / 1000:g}")


@dataclass(frozen=True, eq=False)
class Chosen:
    """Which experts stay, by which score, what that loses, and the scores of all."""

    kept: Kept
    score: str
    losses: dict[str, float]
    totals: Totals


def choose_experts(state: State, layers: Sequence[ExpertLayer], ratio: float) -> Chosen:
    """Returns the experts that stay, by the score whose choice loses less on held-back batches."""
    assert state.calibration is not None
    batches = len(state.calibration.batches)
    held = held_batches(batches) if batches > 1 else []
    totals = measure_experts(state, layers, frozenset(held))
    choices = {score: {layer: _best(layer, totals[layer], score, ratio) for layer in layers} for score in SCORES}
    differ = [score for i, score in enumerate(SCORES) if all(choices[score] != choices[other] for other in SCORES[:i])]
    if len(differ) == 1 or not held:
        return Chosen(choices[SCORES[0]], SCORES[0], {}, totals)
    losses = {score: _loss(state, choices[score], held[:HELD]) for score in differ}
    best = min(differ, key=lambda score: losses[score])
    return Chosen(choices[best], best, losses, totals)


def measure_experts(state: State, layers: Sequence[ExpertLayer], held: frozenset[int] = frozenset()) -> Totals:
    """Returns, for each layer, the sum of gate x |f(x)| of each expert and the rows that it was chosen for, [2, E].

    Args:
        state: the analysed model and its calibration data.
        layers: of its experts.
        held: batches that are left out.
    """
    walk, data, nodes = state.analysed(), state.calibration, state.model.graph.nodes
    assert data is not None
    totals = {layer: np.zeros((2, layer.size)) for layer in layers}
    wanted = [name for layer in layers for term in layer.terms for name in (term.tensor, term.numbers)]
    wanted += [name for layer in layers for name in layer.given]
    wanted = list(dict.fromkeys([*wanted, *(layer.scores for layer in layers if layer.scores)]))
    sizes, probe = sizes_of(state), probe_batch(walk, data)
    need = sum(sizes.get(name, 0) for name in wanted)
    samples = max((len(v) for v in data.batches[0].values() if v.ndim), default=1)
    free = all(not i.shape or not isinstance(i.shape[0], int) for i in walk.input_specs())
    step = max(1, samples * state.memory.limit // (SHARE * max(need, 1))) if free else samples
    part = state.engine().part(walk, 0, len(nodes), wanted, {})
    for index, (feeds, mask) in enumerate(zip(data.batches, data.row_masks, strict=True)):
        if index in held:
            continue
        whole = len({len(v) for v in feeds.values() if v.ndim}) != 1
        count = samples if whole else max(len(v) for v in feeds.values() if v.ndim)
        for rows in (slice(k, k + step) for k in range(0, count, count if whole else step)):
            some = dict(feeds) if whole else {k: v[rows] if v.ndim else v for k, v in feeds.items()}
            own = mask if mask is None or whole else mask[rows]
            found = part.run(some, own, arrays=wanted)
            for layer in layers:
                _add(layer, totals[layer], found, own, walk, probe)
        state.progress("experts", index + 1, len(data.batches))
    return totals


def _add(
    layer: ExpertLayer,
    total: NDArray[np.float64],
    found: Mapping[str, Any],
    mask: NDArray[np.bool_] | None,
    walk: Any,
    probe: tuple[int, ...],
) -> None:
    """Adds the rows of one batch to the totals of a layer."""
    for term in layer.terms:
        tap = tap_for(walk, term.use, 0, probe)
        rows = None if mask is None or tap.layout == "all" else row_mask(mask, tap.layout, tap.repeat)
        total += rows_by_expert(found[term.tensor], found[term.numbers], layer.size, rows)
    for expert, name in enumerate(layer.given):
        norms = np.linalg.norm(np.asarray(found[name], np.float64), axis=-1).reshape(-1)
        norms = norms if mask is None or norms.size != mask.size else norms[mask.reshape(-1)]
        total[:, expert] += norms.sum(), np.count_nonzero(norms)
    if layer.scores:
        scores = found[layer.scores]
        tokens = math.prod(scores.shape[:-1])
        rows = mask.reshape(-1) if mask is not None and mask.size == tokens else None
        total += mass_by_expert(scores, layer.top_k, rows)


def _best(layer: ExpertLayer, total: NDArray[np.float64], score: str, ratio: float) -> tuple[int, ...]:
    """Returns the experts with the largest scores, as many of each group, ascending."""
    own, left = layer.size // layer.groups, experts_left(layer, ratio) // layer.groups
    values = _scores(total, score).reshape(layer.groups, own)
    order = np.argsort(-values, axis=1, kind="stable")[:, :left]
    return tuple(int(g * own + i) for g, row in enumerate(order) for i in sorted(row))


def _scores(total: NDArray[np.float64], score: str) -> NDArray[np.float64]:
    mean: NDArray[np.float64] = total[0] / np.maximum(total[1], 1.0)
    return total[0] if score == "sum" else mean


def _loss(state: State, kept: Kept, batches: Sequence[int]) -> float:
    """Returns how far the first output is from the original's where the router never chooses the others, relative."""
    patches = hidden(state.analysed(), kept)
    first = state.model.graph.outputs[0].name
    found = differences(state, [first], patches, batches).get(first)
    return math.inf if found is None or not math.isfinite(found.relative_rms) else found.relative_rms


def differences(
    state: State, outputs: Sequence[str], patches: Sequence[Patch | ConstantPatch], batches: Sequence[int]
) -> dict[str, OutputDifference]:
    """Returns how far outputs are from those of the model as it is where some constants are others.

    Args:
        state: the analysed model and its calibration data.
        outputs: their names.
        patches: the other constants.
        batches: on which.
    """
    assert state.calibration is not None
    meter, engine, walk = DifferenceMeter(), state.engine(), state.analysed()
    store = state.memory.store if state.memory.low else None
    reference, dense = engine.reference(walk, outputs, patches, store), engine.reference(walk, outputs, (), store)
    for index in batches:
        some, mask = part_of_batch(state, index, 2 * SAMPLES)
        theirs = dense.run(some)
        for name, value in reference.run(some).items():
            meter.add(name, value, theirs[name], mask)
    return meter.result()


def _entry(layer: ExpertLayer, kept: Sequence[int], chosen: Chosen) -> CutLayer:
    total = chosen.totals[layer]
    values = [float(v) for v in _scores(total, chosen.score)]
    unseen = int((total[1] == 0).sum())
    return CutLayer(layer.name, layer.size, len(kept), list(kept), layer.top_k, layer.groups, values, unseen)
