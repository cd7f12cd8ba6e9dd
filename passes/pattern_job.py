"""Patterns of zeros in a run of ``prune``: alone, or behind the widths, on the model that is left then.

What is left is opened again, as if it had come so: it is analysed and measured anew, and a solver that looks at the dense
model's outputs looks at those of the model without the pattern.
"""

from dataclasses import replace
from typing import Any

from liar_opt.frontend.either_model import analysis_of
from liar_opt.frontend.engine import ConstantPatch
from liar_opt.frontend.pattern_places import find_places
from liar_opt.passes.backend import Backend
from liar_opt.passes.base import Change, DenseModel, Pipeline, State, WholeModel
from liar_opt.passes.calibrate import calibrate, fitted
from liar_opt.passes.cut_vocabulary import WIDTHS, wants_words
from liar_opt.passes.express_widths import FinalFields
from liar_opt.passes.finish_run import Done, finish_run, timed_batch
from liar_opt.passes.fit_module import CutModule
from liar_opt.passes.groups import Refusal
from liar_opt.passes.options import PruneOptions
from liar_opt.passes.pattern_weights import Patterned, PatternWeightsPass, planned_pattern, require_ridge, timed_alone
from liar_opt.passes.prune_groups import Cut
from liar_opt.passes.registry import lookup
from liar_opt.passes.report import Report, report_of
from liar_opt.passes.result import PruneResult
from liar_opt.passes.sweep import cut_arrays, first_samples
from liar_opt.passes.verify_model import Verification, compared_again, dense_session, output_differences, require_runs
from liar_opt.runtime.compare import require_close
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.latency import Latency
from liar_opt.runtime.memory import MemoryWatch
from liar_opt.runtime.patterns import SOLVERS, Pattern
from liar_opt.runtime.ranks import current

COMPARED = 4
"""Samples on which the result is held against the original with the same weights."""


def pattern_alone(options: PruneOptions) -> bool:
    """Returns whether nothing but a pattern is asked for."""
    return options.pattern is not None and not any(options.given(name) for name in WIDTHS)


def require_pattern_possible(options: PruneOptions) -> None:
    """Checks what can be said of a pattern before the model is opened.

    Raises:
        OptionError: it is not understood, or another option does not go with it.
    """
    lookup("pattern-solver", SOLVERS, options.pattern_solver)
    if options.pattern is None:
        for name in ("pattern_solver", "sparse_storage"):
            if options.given(name):
                shown = name.replace("_", "-")
                raise OptionError(f"{shown} says how zeros are made or stored; give a --pattern, or leave it out")
        return
    pattern = Pattern.parse(options.pattern)
    require_ridge(options.ridge)
    if current().size > 1:
        raise OptionError("a pattern is made in one process; run it without torchrun, on the result")
    if options.resume is not None:
        raise OptionError("resume keeps segments of widths, and a pattern comes behind them; leave resume or pattern out")
    if options.quantize is not None:
        raise OptionError(
            "quantize rounds weights anew, zeros among them; leave it out, and quantise the result, or leave pattern out"
        )
    if options.backend != "torch":
        raise OptionError(f"backend '{options.backend}' cuts widths alone; leave it or pattern out")
    if pattern_alone(options):
        beside = [name for name in ("experts", "blocks") if options.given(name)]
        beside += ["vocabulary"] if wants_words(options) else []
        if beside:
            raise OptionError(f"a pattern comes behind widths; give a sparsity (0 cuts none) beside {' and '.join(beside)}")
        return
    step = max(pattern.inputs, pattern.rows)
    if options.multiple_of % pattern.inputs or options.multiple_of % pattern.rows:
        raise OptionError(
            f"pattern {pattern.text} would not fit widths that are cut to multiples of {options.multiple_of}; give "
            f"multiple-of {step}"
        )


def prune_pattern(backend: Backend, watch: MemoryWatch) -> PruneResult:
    """Puts a pattern into a model, and cuts nothing; :func:`liar_opt.prune` calls this.

    Raises:
        ModelError: the model cannot be read, or no weight can have a pattern.
        OptionError: a weight does not fit it, or an option does not fit.
        CheckError: the result is not what it has to be.
    """
    return finish_run(backend, patterned(backend), watch)


def patterned(backend: Backend) -> Done:
    """Puts the pattern into the model and checks it; of a dry run says where it would be. Raises as `prune_pattern`."""
    state, options, whole = backend.state, backend.options, backend.state.get(WholeModel)
    state.progress, state.fresh = options.progress, options.fresh
    analysis = backend.analyse(state, options.observer)
    state.model.settle()
    step = pattern_step(options)
    step.requires(state)  # before any work
    report = report_of(state)
    report.asked([step], options, backend.calibration, backend.where, backend.device)
    report.note(*backend.notes(state))
    report.groups, report.values = [], []
    report.prunable = {"before": 0, "after": 0}
    report.refuse(analysis.refusals)
    if options.dry_run:
        report.note(planned_pattern(state.analysed(), Pattern.parse(step.pattern)))
        return report, (), analysis.refusals
    if whole is None:
        data = calibrate(state, backend.calibration, options, backend.positions(state), backend.author(state))
    else:
        data = whole.data
    state.calibration = fitted(state, data, report.model.notes)
    require_runs(state, dense_session(state))
    report.calibrated(state.calibration)
    report.before.flops = backend.operations_before(state, timed_batch(state))
    changes, refusals = put_pattern(backend)
    state.add(FinalFields(()))
    report.refuse((*analysis.refusals, *refusals))
    report.verification = state.found(Verification)
    return report, changes, (*analysis.refusals, *refusals)


def pattern_behind(backend: Backend, state: State, report: Report, batch: dict[str, Any]) -> tuple[Change, ...]:
    """Puts a pattern into a model whose widths were cut and checked, and says so in the report.

    Args:
        backend: of the run.
        state: behind the checks; it has the new weights afterwards.
        report: of the run; what the outputs lose is measured again.
        batch: what is timed.

    Raises:
        OptionError: a weight does not fit the pattern.
        CheckError: the result is not what it has to be.
    """
    assert state.calibration is not None
    ends = state.found(Cut).ends
    again = backend.again(state)
    new, data = again.state, state.calibration
    new.calibration = replace(data, batches=tuple(cut_arrays(b, ends) for b in data.batches))
    analysis = [*again.analysis()]
    Pipeline(passes=analysis, observer=backend.options.observer)(new)
    changes, refusals = put_pattern(again)
    report.refusals = [*(report.refusals or ())]
    report.refusals += [vars(refusal) for refusal in refusals]
    if backend.options.latency:
        times = again.timed(new, cut_arrays(batch, ends), False)
        speed = (times.speedup, times.spread) if isinstance(times, Latency) else None
    else:
        speed = None
    report.patterned = timed_alone(new.found(Patterned), speed, backend.device)
    state.model, state.walk = new.model, new.walk
    made, before = new.get(CutModule), state.get(CutModule)
    if made is not None and before is not None:
        state.add(replace(before, module=made.module))
    compared_again(state)
    report.verification = state.found(Verification)
    return changes


def pattern_step(options: PruneOptions) -> PatternWeightsPass:
    """Returns the pass that options mean."""
    assert options.pattern is not None
    return PatternWeightsPass(options.pattern, options.pattern_solver, options.ridge, options.weighting, options.seed)


def put_pattern(backend: Backend) -> tuple[tuple[Change, ...], tuple[Refusal, ...]]:
    """Puts the pattern into an analysed model, holds the result against the original with the same weights, and fits it.

    Adds a ``Patterned`` and a ``Verification``.

    Raises:
        OptionError: a weight does not fit the pattern.
        CheckError: the result is not that.
    """
    state, observer = backend.state, backend.options.observer
    done = Pipeline(passes=[pattern_step(backend.options)], observer=observer)(state)
    state.add(_verified(state))
    fitted_ = Pipeline(passes=backend.fitting(), observer=observer)(state)
    return (*done.changes, *fitted_.changes), done.refusals


def _verified(state: State) -> Verification:
    """Compares the model with the original in which the same weights stand, and with the original.

    Raises:
        CheckError: it is not the former.
    """
    assert state.calibration is not None
    engine, walk = state.engine(), state.analysed()
    dense = state.found(DenseModel).original.model()
    dense.normalise()
    theirs_walk = analysis_of(dense)
    nodes = {n.name: n for n in dense.graph.nodes}
    patches = [
        ConstantPatch((nodes[use.node.name], use.weight_position), place.constant.values)
        for place in find_places(walk)[0]
        for use in place.uses
    ]
    session = engine.whole(state.model.loadable(), "the model with the pattern")
    outputs = [o for o in session.outputs if o not in walk.unspecified]
    small = first_samples(state, state.calibration.batches[0], COMPARED)
    reference = engine.reference(theirs_walk, outputs, patches, state.memory.store if state.memory.low else None)
    theirs, ours = reference.run(small), session.run(small, outputs, arrays=True)
    precision = state.model.least_precision()
    exact = require_close(ours, theirs, precision, "the pattern against the original with the same weights")
    del reference
    meter = output_differences(state, session, dense_session(state), outputs)
    return Verification(exact, precision, meter.result())
