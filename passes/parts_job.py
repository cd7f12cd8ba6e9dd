"""Experts and transformer blocks go before widths: what is left is a model like any other, and the rest works on that.

The model as it came is kept (``WholeModel``): sizes, times and losses are compared with it, and goals count what went.
"""

import time
from dataclasses import replace

from liar_opt.passes.backend import Backend
from liar_opt.passes.base import Change, DenseModel, Pipeline, WholeModel
from liar_opt.passes.calibrate import calibrate, divided, fitted
from liar_opt.passes.choose_blocks import LeftOut, candidate_runs, choose_run
from liar_opt.passes.cut_experts import CutExperts, CutExpertsPass, planned_experts
from liar_opt.passes.cut_vocabulary import WIDTHS, wants_words
from liar_opt.passes.express_widths import FinalFields
from liar_opt.passes.finish_run import finish_run, timed_batch
from liar_opt.passes.groups import Refusal, parameters_left
from liar_opt.passes.options import BLOCK_REPAIRS, PruneOptions
from liar_opt.passes.plan_memory import TensorSizes
from liar_opt.passes.registry import lookup
from liar_opt.passes.report import prunable, report_of
from liar_opt.passes.result import PruneResult
from liar_opt.passes.verify_model import Verification, dense_session, output_differences, require_runs, whole_session
from liar_opt.runtime.calibration_data import CalibrationData
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.memory import MemoryWatch


def require_blocks_possible(options: PruneOptions) -> None:
    """Checks what can be said of blocks before the model is opened.

    Raises:
        OptionError: there are less than one, the repair is unknown or given without them, or another option does not go
            with them.
    """
    lookup("block-repair", dict.fromkeys(BLOCK_REPAIRS), options.block_repair)
    if options.blocks is None:
        if options.given("block_repair"):
            raise OptionError("block-repair says what stands where blocks were; give --blocks N with it, or leave it out")
        return
    if options.blocks != "auto" and options.blocks < 1:
        raise OptionError(f"blocks {options.blocks} is below 1; it is how many blocks are left out")
    if options.blocks == "auto" and options.resume is not None:
        raise OptionError(
            "resume keeps one run, and blocks auto makes several; leave resume out, or give a number of blocks"
        )


def parts_alone(options: PruneOptions) -> bool:
    """Returns whether nothing but experts and blocks is asked for."""
    return not wants_words(options) and not any(options.given(name) for name in WIDTHS)


def without_parts(backend: Backend, blocks: int) -> Backend:
    """Returns a backend of what is left of a model without experts and blocks, analysed and checked.

    Its options ask for what is still to go.

    Args:
        backend: of the model as it came, or of what `without_experts` has left of it.
        blocks: how many go.

    Raises:
        ModelError: no experts or blocks are found, or they cannot go.
        OptionError: there are not so many, or options exclude each other.
        CheckError: the result is not the original in which they do nothing.
    """
    began, notes = time.perf_counter(), list(backend.state.model.notes)
    left = backend if backend.state.get(WholeModel) else without_experts(backend)
    if blocks:
        left, more = _without_blocks(left, blocks)
        notes += more
    if left.state.walk is None:
        _analysed(left)
    options, whole = left.options, left.state.found(WholeModel)
    rest, note = _rest(options, whole.prunable, whole.prunable - prunable(left.state)["after"], whole.went)
    left.state.seconds = {**backend.state.seconds, "leave-out": time.perf_counter() - began}
    left.state.model.notes = [*notes, *note]
    return replace(left, options=replace(rest, experts=None, blocks=None))


def finish_parts(backend: Backend, watch: MemoryWatch) -> PruneResult:
    """Says what went, compared and timed, where nothing else is asked for; of a dry run what would go."""
    state, options, data = backend.state, backend.options, backend.state.calibration
    whole, experts, blocks = state.found(WholeModel), state.get(CutExperts), state.get(LeftOut)
    assert data is not None
    report = report_of(state)
    passes = [] if experts is None else [CutExpertsPass(experts.asked)]
    report.asked(passes, options, backend.calibration, backend.where, backend.device)
    report.note(*backend.notes(state))
    report.groups, report.values = [], []
    report.refuse(whole.refusals)
    report.prunable = prunable(state)
    report.calibrated(data)
    if options.dry_run:
        report.note(*planned_experts(state))
        return finish_run(backend, (report, (), whole.refusals), watch)
    report.before.flops = backend.operations_before(state, timed_batch(state))
    pruned = state.engine().whole(state.model, "what is left of the model")
    meter = output_differences(state, pruned, whole_session(state), pruned.outputs)
    exact = max(part.exact_difference or 0.0 for part in (experts, blocks) if part is not None)
    report.verification = Verification(exact, state.model.least_precision(), meter.result())
    state.add(report.verification, FinalFields(()))
    return finish_run(backend, (report, whole.changes, whole.refusals), watch)


def _analysed(backend: Backend) -> tuple[Refusal, ...]:
    """Analyses the model; returns what is left alone."""
    state, options = backend.state, backend.options
    state.progress, state.fresh = options.progress, options.fresh
    found = backend.analyse(state, options.observer)
    Pipeline(passes=backend.narrowing(required=False), observer=options.observer)(state)
    return found.refusals


def _read(backend: Backend) -> CalibrationData:
    """Gives the state its calibration data, and returns it as it was read.

    Raises:
        ModelError: the model fails on it.
        OptionError: it does not fit the model.
    """
    state, options, whole = backend.state, backend.options, backend.state.get(WholeModel)
    if whole is not None:
        data = whole.data
    else:
        data = calibrate(state, backend.calibration, options, backend.positions(state), backend.author(state))
        if options.max_drop is not None:
            data = divided(data, state.analysed().input_specs())
    state.calibration = fitted(state, data, state.model.notes)
    require_runs(state, dense_session(state))
    return data


def without_experts(backend: Backend) -> Backend:
    """Returns a backend of the model without the experts that are asked to go, if any, analysed, with its data.

    Raises:
        ModelError: no experts are found, or they cannot go.
        OptionError: there are not so many.
        CheckError: the result is not the original that never chooses them.
    """
    state, options = backend.state, backend.options
    refusals = _analysed(backend)
    if options.experts is None:
        data = _read(backend)
        state.add(WholeModel(state.found(DenseModel).original, data, round(parameters_left(state.groups))))
        return backend
    step = CutExpertsPass(options.experts)
    step.requires(state)
    fields = backend.require_sayable(state, options.experts)
    data, whole = _read(backend), round(parameters_left(state.groups))
    done = Pipeline(passes=[step], observer=options.observer)(state)
    left = backend.with_fewer_experts(state, fields)
    _analysed(left)
    left.state.inherit(state, CutExperts)
    left.state.calibration = state.calibration
    original, names = state.found(DenseModel).original, backend.same_outputs(left)
    refused = (*refusals, *done.refusals)
    left.state.add(WholeModel(original, data, whole, names, ("experts",), done.changes, refused))
    return left


def _without_blocks(backend: Backend, count: int) -> tuple[Backend, list[str]]:
    """Returns a backend of what is left without so many blocks, and what there is to say of the choice."""
    state, options = backend.state, backend.options
    if state.walk is None:
        _analysed(backend)
    if state.calibration is None:
        _read(backend)
    state.model.settle()
    repair, known = backend.block_repair(), len(state.model.notes)
    gaps = backend.gaps(candidate_runs(state, count), repair)
    notes = state.model.notes[known:]
    unseen = (
        options.max_drop is not None and options.metric is None
    )  # its loss is measured on rows that nothing is fitted to
    chosen = choose_run(state, gaps, repair, options.ridge, options.weighting, "training" if unseen else "all")
    before = round(parameters_left(state.groups))
    left, entry = backend.leave_out(chosen, repair)
    _analysed(left)
    left.state.inherit(state, CutExperts, TensorSizes)
    left.state.calibration = state.calibration
    gone = before - round(parameters_left(left.state.groups))
    change = Change("blocks", entry.source, entry.of, entry.of - entry.blocks)
    whole = state.found(WholeModel)
    names = {ours: whole.names.get(theirs, theirs) for ours, theirs in backend.same_outputs(left).items()}
    went, changes = (*whole.went, "blocks"), (*whole.changes, change)
    whole = replace(whole, names=names or whole.names, went=went, changes=changes, added=entry.added)
    left.state.add(replace(entry, prunable=gone), whole)
    return left, notes


def _rest(options: PruneOptions, whole: int, gone: int, went: tuple[str, ...]) -> tuple[PruneOptions, list[str]]:
    """Returns the options for what is left, a sparsity as the share that is still to go, and what there is to say of it."""
    if options.sparsity is None or not went:
        return options, []
    rest = (options.sparsity * whole - gone) / max(whole - gone, 1)
    taken = f"the {' and '.join(went)} held {100 * gone / max(whole, 1):.1f} % of the prunable parameters"
    if rest <= 0:
        return replace(options, sparsity=None), [
            f"{taken}, no less than the sparsity of {options.sparsity:g}: no width was cut"
        ]
    return replace(options, sparsity=rest), [
        f"{taken}; for a sparsity of {options.sparsity:g} a share of {rest:.3f} of the others went"
    ]
