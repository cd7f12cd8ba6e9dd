"""Leave blocks out before widths are cut: what is left is a model like any other, and the rest of the run works on that.

The model as it came is kept (``WholeModel``): sizes, times and losses are compared with it.
"""

import time
from dataclasses import replace

from liar_opt.passes.backend import TIMED_SAMPLES, Backend
from liar_opt.passes.base import Change, Pipeline, State, WholeModel
from liar_opt.passes.calibrate import calibrate, fitted
from liar_opt.passes.choose_blocks import LeftOut, candidate_runs, choose_run
from liar_opt.passes.cut_vocabulary import WIDTHS, wants_words
from liar_opt.passes.express_widths import FinalFields
from liar_opt.passes.groups import parameters_left
from liar_opt.passes.open_model import model_sizes
from liar_opt.passes.options import BLOCK_REPAIRS, PruneOptions
from liar_opt.passes.plan_memory import TensorSizes
from liar_opt.passes.registry import lookup
from liar_opt.passes.report import SizesEntry, report_of
from liar_opt.passes.result import PruneResult
from liar_opt.passes.verify_model import (
    Verification,
    dense_session,
    first_samples,
    output_differences,
    require_runs,
    whole_session,
)
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.memory import MemoryWatch


def blocks_alone(options: PruneOptions) -> bool:
    """Returns whether nothing but blocks is asked for."""
    return options.blocks is not None and not wants_words(options) and not any(options.given(name) for name in WIDTHS)


def without_blocks(backend: Backend) -> Backend:
    """Returns a backend of what is left of a model without a run of blocks, analysed and checked.

    Its options ask for what is still to go.

    Raises:
        ModelError: no blocks are found, or they cannot be left out.
        OptionError: there are not so many, or options exclude each other.
        CheckError: the result is not the original in which the map stands.
    """
    state, options = backend.state, backend.options
    assert options.blocks is not None
    lookup("block-repair", dict.fromkeys(BLOCK_REPAIRS), options.block_repair)
    if options.blocks < 1:
        raise OptionError(f"blocks {options.blocks} is below 1; it is how many blocks are left out")
    if options.resume is not None:
        raise OptionError("resume keeps segments of widths, and blocks go before them; leave resume or blocks out")
    state.progress = options.progress
    began, notes = time.perf_counter(), list(state.model.notes)
    _analyse(backend)
    state.model.settle()
    repair = backend.block_repair()
    gaps = backend.gaps(candidate_runs(state, options.blocks), repair)
    data = calibrate(state, backend.calibration, options, backend.positions(state), backend.author(state))
    state.calibration = fitted(state, data, notes)
    require_runs(state, dense_session(state))
    chosen = choose_run(state, gaps, repair, options.ridge, options.weighting)
    whole = _prunable(state)
    left, entry = backend.leave_out(chosen, repair)
    _analyse(left)
    gone = whole - _prunable(left.state)
    left.state.add(replace(entry, prunable=gone), WholeModel(state.as_it_came(), data, whole, backend.same_outputs(left)))
    left.state.inherit(state, TensorSizes)
    left.state.calibration = state.calibration
    left.state.seconds = {**state.seconds, "leave-out-blocks": time.perf_counter() - began}
    rest, note = _rest(options, whole, gone)
    left.state.model.notes = [*notes, *note]
    return replace(left, options=rest)


def finish_blocks(backend: Backend, start: float, watch: MemoryWatch) -> PruneResult:
    """Says what was left out, compared and timed, where nothing else is asked for."""
    state, options = backend.state, backend.options
    assert state.calibration is not None
    report, entry = report_of(state), state.found(LeftOut)
    report.asked([], options, backend.calibration, backend.where, backend.device)
    report.groups, report.values = [], []
    report.refuse(())
    report.prunable = {"before": state.found(WholeModel).prunable, "after": _prunable(state)}
    report.calibrated(state.calibration)
    if not options.dry_run:
        batch = first_samples(state, state.calibration.batches[0], TIMED_SAMPLES)
        report.before.flops = backend.operations_before(state, batch)
        report.after = SizesEntry(**model_sizes(state.model), flops=backend.operations(state, batch))
        pruned = state.engine().whole(state.model, "the model without the blocks")
        meter = output_differences(state, pruned, whole_session(state), pruned.outputs)
        assert entry.exact_difference is not None
        checks = Verification(entry.exact_difference, state.model.least_precision(), meter.result())
        report.verification = checks
        state.add(checks, FinalFields(()))
        backend.complete(report, state)
        if options.latency:
            backend.note_times(report, state, batch)
        report.ended(state, watch, time.perf_counter() - start)
    return backend.result(state, report, (Change("blocks", entry.source, entry.of, entry.of - entry.blocks),), ())


def _analyse(backend: Backend) -> None:
    passes = [*backend.analysis(), *backend.narrowing(required=False)]
    Pipeline(passes=passes, observer=backend.options.observer)(backend.state)


def _prunable(state: State) -> int:
    """Returns the parameters of all widths that may be cut."""
    return round(parameters_left(state.groups))


def _rest(options: PruneOptions, whole: int, gone: int) -> tuple[PruneOptions, list[str]]:
    """Returns the options for what is left, a sparsity as the share that is still to go, and what there is to say of it."""
    if options.sparsity is None:
        return options, []
    rest = (options.sparsity * whole - gone) / max(whole - gone, 1)
    taken = f"the blocks held {100 * gone / max(whole, 1):.1f} % of the prunable parameters"
    if rest <= 0:
        return replace(options, sparsity=None), [
            f"{taken}, no less than the sparsity of {options.sparsity:g}: no width was cut"
        ]
    return replace(options, sparsity=rest), [
        f"{taken}; for a sparsity of {options.sparsity:g} a share of {rest:.3f} of the others went"
    ]
