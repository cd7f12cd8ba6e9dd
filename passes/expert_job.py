"""A run of ``prune`` in which experts go: these first, then what else is asked for, on a model that has fewer."""

import time
from collections.abc import Sequence
from dataclasses import replace

from liar_opt.passes.backend import TIMED_SAMPLES, Backend
from liar_opt.passes.base import Change, Pipeline, State
from liar_opt.passes.calibrate import calibrate, fitted
from liar_opt.passes.cut_experts import CutExperts, CutExpertsPass, planned_experts
from liar_opt.passes.cut_vocabulary import WIDTHS, wants_words
from liar_opt.passes.groups import Refusal
from liar_opt.passes.model_job import ModelJob
from liar_opt.passes.open_model import model_sizes
from liar_opt.passes.report import SizesEntry, report_of
from liar_opt.passes.result import PruneResult
from liar_opt.passes.sweep import held_batches
from liar_opt.passes.verify_model import Verification, dense_session, first_samples, require_runs
from liar_opt.runtime.calibration_data import CalibrationData
from liar_opt.runtime.compare import DifferenceMeter, OutputDifference
from liar_opt.runtime.memory import MemoryWatch

COMPARED_BATCHES, COMPARED_SAMPLES = 2, 8
"""On which the outputs of both models are compared, where nothing else is cut."""


def prune_experts(backend: Backend, start: float, watch: MemoryWatch) -> PruneResult:
    """Lets experts go, then what else is asked for; :func:`liar_opt.prune` calls this where experts are to go.

    Raises:
        ModelError: the model cannot be read, or no expert can go.
        OptionError: fewer experts would be left than are chosen, or an option does not fit.
        CheckError: the result is not what it has to be.
    """
    state, options = backend.state, backend.options
    assert options.experts is not None
    state.progress, state.fresh = options.progress, options.fresh
    analysis = backend.analyse(state, options.observer)
    step = CutExpertsPass(options.experts)
    step.requires(state)
    fields = backend.require_sayable(state.analysed(), options.experts)
    data = calibrate(state, backend.calibration, options, backend.positions(state), backend.author(state))
    state.calibration = fitted(state, data, state.model.notes)
    require_runs(state, dense_session(state))
    done = Pipeline(passes=[step], observer=options.observer)(state)
    fewer = backend.with_fewer_experts(state, fields)
    fewer.options = replace(options, experts=None)
    if any(getattr(options, name) is not None for name in WIDTHS):
        result = ModelJob(fewer, start, watch, data).run()
    elif wants_words(options):
        result = fewer.cut_words_alone(start, watch)
    else:
        fewer.state.calibration = state.calibration
        return _alone(fewer, step, done.changes, (*analysis.refusals, *done.refusals), start, watch)
    result.changes = (*done.changes, *result.changes)
    return result


def _alone(
    backend: Backend,
    step: CutExpertsPass,
    changes: tuple[Change, ...],
    refusals: Sequence[Refusal],
    start: float,
    watch: MemoryWatch,
) -> PruneResult:
    """Says what was cut, checked and timed; of a dry run what would be."""
    state, options = backend.state, backend.options
    data, cut = state.calibration, state.found(CutExperts)
    assert data is not None and cut.exact_difference is not None
    report = report_of(state)
    report.asked([step], options, backend.calibration, backend.where, backend.device)
    report.note(*backend.notes(state))
    report.calibrated(data)
    report.groups, report.values = [], []
    report.prunable = {"before": cut.parameters_before, "after": cut.parameters_after}
    report.refuse(refusals)
    if options.dry_run:
        report.note(*planned_experts(state))
        return backend.result(state, report, (), tuple(refusals))
    batch = first_samples(state, data.batches[0], TIMED_SAMPLES)
    report.before.flops = backend.operations_before(state, batch)
    state.model.normalise()
    report.after = SizesEntry(**model_sizes(state.model), flops=backend.operations(state, batch))
    backend.complete(report, state)
    report.verification = Verification(cut.exact_difference, state.model.least_precision(), _differences(state, data))
    if options.latency:
        backend.note_times(report, state, batch)
    report.ended(state, watch, time.perf_counter() - start)
    return backend.result(state, report, changes, tuple(refusals))


def _differences(state: State, data: CalibrationData) -> dict[str, OutputDifference]:
    """Returns how far the outputs are from those of the model as it came, on batches that were held back."""
    meter, dense = DifferenceMeter(), dense_session(state)
    fewer = state.engine().whole(state.model, "the model with fewer experts")
    for index in held_batches(len(data.batches))[:COMPARED_BATCHES]:
        some = first_samples(state, data.batches[index], COMPARED_SAMPLES)
        ours, theirs = fewer.run(some, arrays=True), dense.run(some, list(fewer.outputs), arrays=True)
        mask = data.row_masks[index]
        mask = mask if mask is None else mask[: max(len(v) for v in some.values() if v.ndim)]
        for name, value in theirs.items():
            meter.add(name, ours[name], value, mask)
    return meter.result()
