"""Check the result before it is written: never break the model.

1. The ONNX checker accepts it, ONNX Runtime loads it, and its inputs and outputs have the names, types and shapes of the
   original's, but for the axes of caches whose heads went.
2. It computes what the original computes when every consumer's weight is the repaired one with zeros in the removed rows
   (removing an input and multiplying it by zero are the same): the cut itself lost and moved nothing. This is the oracle
   of the design, run on the user's model at every use. Where it fails, the model's own rounding decides: a model that was
   hurt badly may magnify the rounding of its weights beyond the tolerance (``compare.allowed_difference``).
3. Where it was a merged decoder, which is flat until it is written: folded again it meets 1, and each branch gives what the
   flat graph gives.
4. How far its outputs are from the dense model's is measured on calibration batches that were held back, and reported.
"""

import contextlib
import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from liar_opt.frontend.either_model import analysis_of
from liar_opt.frontend.graph_tensors import is_constant, like
from liar_opt.frontend.live_memory import live_bytes
from liar_opt.frontend.model import Model, Original
from liar_opt.frontend.onnx_engine import NO_MEMORY, run_session
from liar_opt.frontend.records import StandIn
from liar_opt.frontend.rewrite import Rewriter
from liar_opt.frontend.rules.operators import has
from liar_opt.frontend.rules.table import Trait
from liar_opt.frontend.tables import vocabulary
from liar_opt.frontend.walk import GraphWalk
from liar_opt.passes.base import DenseModel, Finding, OutputNames, Pass, PassResult, State, WholeModel
from liar_opt.passes.change_basis import QueryForm
from liar_opt.passes.choose_blocks import LeftOut
from liar_opt.passes.plan_memory import sizes_of
from liar_opt.passes.prune_groups import ConsumerRepair, Cut
from liar_opt.passes.sweep import cut_arrays, first_samples, held_batches, part_of_batch
from liar_opt.runtime.calibration_data import CalibrationData
from liar_opt.runtime.compare import (
    SIGMOID_STEP,
    DifferenceMeter,
    OutputDifference,
    holds_logits,
    relative_difference,
    require_close,
    require_repeatable,
)
from liar_opt.runtime.errors import CheckError, ModelError, OptionError
from liar_opt.runtime.later import later
from liar_opt.runtime.memory import anonymous, trim
from liar_opt.runtime.sessions import Runner
from liar_opt.runtime.signatures import told_by_runtime

COMPARED = 12
"""Bytes that comparing takes for each byte of an output in float32."""


@dataclass(frozen=True)
class Verification(Finding):
    """What the checks of the result found.

    Attributes:
        exact_difference: of the cut model and the masked original, relative.
        exact_dtype: the precision that decides how much of it is allowed.
        outputs: how far each output is from that of the model as it came.
        rounding: the difference that rounding alone makes, where it had to be asked for.
        folded_difference: of a merged decoder and its flat graph.
        not_compared: outputs that hold nothing that can be compared.
        uneven: outputs whose size is another now, compared as far as both go.
        attributes: of a module: those that were set.
    """

    by: ClassVar[str] = "verify-model"
    exact_difference: float
    exact_dtype: str
    outputs: Mapping[str, OutputDifference]
    rounding: float | None = None
    folded_difference: float | None = None
    not_compared: list[str] | None = None
    uneven: list[str] | None = None
    attributes: Sequence[Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns plain data; what was not asked for is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, eq=False)
class DenseSession(Finding):
    """A session of the model as it came, which may still be loading."""

    by: ClassVar[str] = "find-groups"
    session: Future[Runner]


@dataclass(frozen=True, eq=False)
class ComparedSessions(Finding):
    """The sessions whose outputs were compared."""

    by: ClassVar[str] = "verify-model"
    dense: Runner
    pruned: Runner


@dataclass(frozen=True)
class VerifyModelPass(Pass[None]):
    """Check the pruned model against the original.

    Attributes:
        batches: calibration batches on which the output difference is measured.
        samples: samples of each that are run, where the batch axis is free: long texts would cost more than they tell.
        exact: samples on which the cut is compared with the masked original. Where the memory is tight, as many of either
            as it holds, at least one.
    """

    name: ClassVar[str] = "verify-model"
    batches: int = 2
    samples: int = 8
    exact: int = 4

    def plan(self, state: State) -> None:
        """Plans nothing."""

    def apply(self, state: State, plan: None) -> PassResult:
        """Runs the checks; adds a ``Verification``.

        Raises:
            CheckError: one failed.
            ModelError: the model's outputs are not the same twice, or the data does not fit it.
        """
        dense, cut, engine = state.found(DenseModel).original, state.found(Cut), state.engine()
        engine.require_form(dense, state.model, state.analysed().spared)
        ends, low_memory = cut.ends, state.memory.low
        assert state.calibration is not None
        rounding = None
        batches = state.calibration.batches
        # Sessions load while the masked original is made, unless that is too much at a time.
        loading = later(functools.partial(engine.whole, state.model.loadable(), "the pruned model"))
        if low_memory:
            loading.result()
        reference = masked_reference(dense, state.repairs, cut.query_forms, cut.stand_ins)
        masked = engine.whole(reference, "the masked original")
        pruned = loading.result()
        # What an operator does not specify (rows of a cache behind what it holds) cannot be compared.
        whole = [o for o in pruned.outputs if o not in state.analysed().unspecified]
        room = _samples_that_fit(state) if low_memory else max(self.exact, self.samples)
        small = first_samples(state, batches[0], min(self.exact, room))
        # The original first: what does not fit it (an image of another size, say) is no fault of the cut.
        theirs = cut_arrays(run_session(masked, small, whole, whole, engine.name), ends)
        ours = pruned.run(cut_arrays(small, ends), arrays=True)
        # An optional that is empty, say; the parts of sequences and maps have names of their own.
        left_out = [o for o in whole if not any(name == o or name.startswith(f"{o}[") for name in theirs)]
        precision, what = state.model.least_precision(), "cut against masked original"
        try:
            exact = require_close(ours, theirs, precision, what)
        except CheckError:
            require_repeatable(theirs, cut_arrays(masked.run(small, whole, arrays=True), ends))
            if low_memory:  # a second set of weights would not fit
                raise
            # A model that was hurt badly can magnify rounding: ask it how much, before blaming the cut.
            nudged = engine.rounded(reference, "the masked original")
            moved = cut_arrays(nudged.run(small, whole, arrays=True), ends)
            rounding = max(relative_difference(moved[name], value) for name, value in theirs.items())
            # Where all probabilities are tiny, the steps of a sigmoid are large beside them.
            steps = {t.name: SIGMOID_STEP for t in state.model.graph.outputs if _made_by(t) == "Sigmoid"}
            exact = require_close(ours, theirs, precision, what, rounding, steps)
            del nudged
        del masked, reference, theirs
        folded = engine.require_written(state.model, cut_arrays(small, ends), ours, precision)
        del ours
        original = whole_session(state)
        meter = output_differences(state, pruned, original, whole, self.batches, min(self.samples, room), ends)
        outputs, uneven = meter.result(), sorted(meter.uneven)
        state.add(Verification(exact, precision, outputs, rounding, folded, left_out or None, uneven or None))
        state.add(ComparedSessions(original, pruned))
        return PassResult(state)


def output_differences(
    state: State,
    pruned: Runner,
    original: Runner,
    outputs: Collection[str],
    batches: int = VerifyModelPass.batches,
    samples: int = VerifyModelPass.samples,
    ends: Mapping[str, Any] | None = None,
) -> DifferenceMeter:
    """Compares the outputs of a cut model with those of the model as it came, on held-back batches.

    Args:
        state: with the calibration data.
        pruned: the cut model.
        original: the other.
        outputs: those that are compared.
        batches: so many.
        samples: of each.
        ends: what is left of inputs and outputs that became narrower.
    """
    assert state.calibration is not None
    data, left = state.calibration, ends or {}
    held = held_batches(len(data.batches))[:batches]
    empty = set() if (gone := state.get(LeftOut)) is None else set(gone.caches)
    meter, words = DifferenceMeter(), vocabulary(state.model)
    made_by = {t.name: _made_by(t) for t in state.model.graph.outputs}
    named = state.get(OutputNames)
    for done, i in enumerate(held):
        some, mask = part_of_batch(state, i, samples)
        x = pruned.run(cut_arrays(some, left), arrays=True)
        y = cut_arrays(original.run(some, [n for n in outputs if n not in empty], arrays=True), left)
        for name, value in y.items():
            shown = name if named is None else named.by_tensor.get(name, name)
            meter.add(shown, x[name], value, mask, holds_logits(shown, value.shape, words, made_by.get(name)))
        state.progress("verify", done + 1, len(held))
    return meter


def compared_again(state: State) -> None:
    """Measures how far the outputs are from those of the model as it came, of a model that was changed behind its check."""
    check, cut = state.found(Verification), state.found(Cut)
    pruned, original = state.engine().whole(state.model.loadable(), "the pruned model"), whole_session(state)
    outputs = [o for o in pruned.outputs if o not in state.analysed().unspecified]
    samples = min(VerifyModelPass.samples, _samples_that_fit(state)) if state.memory.low else VerifyModelPass.samples
    meter = output_differences(state, pruned, original, outputs, samples=samples, ends=cut.ends)
    state.add(replace(check, outputs=meter.result()), ComparedSessions(original, pruned))


def first_difference(
    pruned: Runner, original: Runner, data: CalibrationData, batches: Iterable[int], ends: Mapping[str, Any]
) -> OutputDifference | None:
    """Returns how far the first output of a cut model that holds numbers is from that of the model as it came.

    Args:
        pruned: the cut model.
        original: the other.
        data: the batches.
        batches: which of them.
        ends: what is left of inputs and outputs that became narrower.
    """
    meter = DifferenceMeter()
    for i in batches:
        x = pruned.run(cut_arrays(data.batches[i], ends), arrays=True)
        y = cut_arrays(original.run(data.batches[i], arrays=True), ends)
        for name, value in y.items():
            meter.add(name, x[name], value, data.row_masks[i])
    return next(iter(meter.result().values()), None)


def masked_reference(
    dense: Original,
    repairs: list[ConsumerRepair],
    query_forms: Sequence[QueryForm] = (),
    stand_ins: Sequence[StandIn] = (),
) -> Model:
    """Returns the original with the repaired weights at their old places, zeros in the removed rows, and the new biases.

    What stands in for a whole sublayer does so here, too: its own nodes are left out by the same few lines that tests hold
    against numpy.

    Where the basis of values was changed, the new weight is one of low rank; queries and keys are q U and k V with zeros
    behind, and what was repaired after that is in that basis. Made from the original file by node and input position,
    without the code that cuts.
    """
    model = dense.model()
    model.normalise()
    project_queries(model, query_forms)
    mask_model(analysis_of(model), repairs, stand_ins)
    return model


def project_queries(model: Model, query_forms: Sequence[QueryForm]) -> None:
    """Writes q U and k V, at the width that they had, over the constants of the queries and keys of an original."""
    nodes = {n.name: n for n in model.graph.nodes}
    for form in query_forms:
        node, position = nodes[form.source.use.node.name], form.source.use.position
        old = node.inputs[position]
        if not is_constant(old):
            raise CheckError(f"a constant of the queries or keys of node '{node.name}' was not found again in the original")
        value = np.array(old.values)
        value[np.ix_(*form.index)] = form.value
        node.inputs[position] = like(old, f"{old.name}/{node.name}/queries", value)


def mask_model(analysis: GraphWalk, repairs: list[ConsumerRepair], stand_ins: Sequence[StandIn] = ()) -> None:
    """Writes the repaired weights into an analysed original, zeros in the removed rows, new biases, and what stands in."""
    nodes = {n.name: n for n in analysis.model.graph.nodes}
    rewriter = Rewriter(analysis)
    by_place = {(u.node.name, u.weight_position): u for u in analysis.consumers}
    for parts in by_weight(repairs):
        repair = parts[0]
        places: list[tuple[gs.Node, int]] = [(nodes[u.holder.name], u.weight_position) for u in repair.uses]
        old = places[0][0].inputs[places[0][1]]
        if not is_constant(old) or not all(_inside(part, old.shape) for part in parts):
            raise CheckError(f"consumer '{repair.uses[0].node.name}' of the original was not found again")
        full = np.zeros(old.shape, old.dtype)
        for part in parts:
            full[np.ix_(*part.index)] = part.weight
        full = analysis.model.settled(full)
        rewriter.set_constant(places, full)
        if np.any(repair.bias):
            own = [by_place[u.node.name, u.weight_position] for u in repair.uses]
            rewriter.add_bias(own, spread_bias(repair, full.shape))
    for stand_in in stand_ins:
        rewriter.replace(stand_in)


def spread_bias(repair: ConsumerRepair, shape: Sequence[int]) -> np.ndarray:
    """Returns the bias [m] of a repair at the width that its weight, of ``shape``, had: zero where columns went."""
    axes = repair.uses[0].column_axes
    bias = np.zeros([shape[axis] for axis in axes])
    left = [repair.index[axis] for axis in axes]
    bias[np.ix_(*left)] = repair.bias.reshape([len(i) for i in left])
    return bias.reshape(-1)


def _inside(repair: ConsumerRepair, shape: Sequence[int]) -> bool:
    return all(not i.size or i[-1] < n for i, n in zip(repair.index, shape, strict=True))


def by_weight(repairs: Sequence[ConsumerRepair]) -> list[list[ConsumerRepair]]:
    """Returns the repairs in order, those of the experts that share a constant together."""
    result: list[list[ConsumerRepair]] = []
    stacks: dict[str, list[ConsumerRepair]] = {}
    for repair in repairs:
        if repair.expert is None:
            result.append([repair])
            continue
        name = repair.uses[0].holder.name
        if name not in stacks:
            stacks[name] = []
            result.append(stacks[name])
        stacks[name].append(repair)
    return result


def _made_by(tensor: Any) -> str | None:
    """Returns the operator that computes a tensor; None for an input of the graph."""
    while tensor.inputs and has(tensor.inputs[0], Trait.COPIES):
        tensor = tensor.inputs[0].inputs[0]
    return tensor.inputs[0].op if tensor.inputs else None


def _samples_that_fit(state: State) -> int:
    """Returns how many samples of the first batch the models may be run on under the memory's limit, at least one."""
    assert state.calibration is not None
    sizes = sizes_of(state)
    graph = state.model.graph
    outputs = {t.name for t in graph.outputs}
    made = sum(sizes.get(name, 0) for name in outputs)
    batch = max(v.shape[0] if v.ndim else 1 for v in state.calibration.batches[0].values())
    # The outputs of one model wait for those of the other; what compares them works in float64.
    need = (live_bytes(graph.nodes, sizes, outputs) + COMPARED * made) / batch
    trim()
    base = anonymous() or 0
    fit = max(1, int((state.memory.limit - base) / max(need, 1)))
    state.memory.estimated = max(state.memory.estimated, base + int(min(fit, batch) * need))
    return fit


def dense_session(state: State) -> Runner:
    """Returns a session of the model as it came: the one that there is, unless the memory is too tight to keep one.

    Raises:
        ModelError: it cannot be loaded; the message names the operator that is missing.
    """
    known = state.get(DenseSession)
    return state.engine().whole(state.as_it_came()) if known is None else known.session.result()


def _runs_otherwise(state: State, batch: Mapping[str, Any]) -> str | None:
    """Returns in which other way the original runs on a batch, in words; None where it runs in no way."""
    for how, load in state.engine().ways(state.found(DenseModel).original.model()):
        with contextlib.suppress(Exception):  # of ONNX Runtime: a class of its own for each release
            load().run(batch)
            return how
    return None


class _Renamed:
    """A model whose outputs have the names of another.

    Args:
        session: of the model.
        names: what it calls them.
    """

    def __init__(self, session: Runner, names: Mapping[str, str]) -> None:
        self.session, self.names = session, names
        self.inputs, self.outputs = session.inputs, list(names)

    def run(
        self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None, arrays: bool | Sequence[str] = False
    ) -> dict[str, Any]:
        """Runs it."""
        wanted = self.outputs if outputs is None else list(outputs)
        asked = arrays if isinstance(arrays, bool) else [self.names.get(n, n) for n in arrays]
        found = self.session.run(feeds, [self.names.get(n, n) for n in wanted], asked)
        return {name: found[self.names.get(name, name)] for name in wanted}

    def as_deployed(self) -> Runner:
        """Returns it as it is timed."""
        return self.session.as_deployed()


def whole_session(state: State) -> Runner:
    """Returns a session of the model as it came, blocks that were left out since among it.

    Raises:
        ModelError: it cannot be loaded; the message names the operator that is missing.
    """
    whole = state.get(WholeModel)
    if whole is None:
        return dense_session(state)
    session = state.engine().whole(whole.original)
    return _Renamed(session, whole.names) if whole.names else session


def require_runs(state: State, session: Runner, every: bool = False) -> None:
    """Runs the original on one sample of the calibration data, or on all of it.

    Raises:
        ModelError: it fails: the data does not fit the model.
        OptionError: there is no memory for it.
    """
    assert state.calibration is not None
    data = state.calibration
    for batch in data.batches if every else (first_samples(state, data.batches[0], 1), data.batches[0]):
        try:
            session.run(batch)
        except Exception as err:
            if batch is not data.batches[0] and not every:
                continue  # a graph that was made for batches of one size
            fed = ", ".join(f"'{name}' {list(value.shape)}" for name, value in batch.items())
            line = told_by_runtime(err)
            if any(text in line for text in NO_MEMORY):
                raise OptionError(
                    f"no memory is left to run the model on one batch ({fed}): {line}; give smaller ones (--batch-size, "
                    "--sequence-length), or other data where a size is computed from its numbers (--calibration)"
                ) from err
            made = "liar-opt made them up: give real ones (--calibration), or another sequence length (--sequence-length)"
            fits = (
                "is a size or a token id not what the model was made for (--calibration takes data that fits), or did the "
                "export fix a number that depends on the data (export it in another way)?"
            )
            how = _runs_otherwise(state, batch)
            if how is not None:
                raise ModelError(
                    f"{state.engine().name} loads the model as it came, and fails to run it ({fed}): {line}; the same data "
                    f"runs {how}, so the data is not the reason: export the model in another way, or take another release"
                ) from err
            raise ModelError(
                f"{state.engine().name} fails on the calibration data ({fed}): {line}; {made if data.synthetic else fits}"
            ) from err
        if not every:
            return
