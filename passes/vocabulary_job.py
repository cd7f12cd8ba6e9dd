"""A run of ``prune`` that cuts the vocabulary alone: no width is touched, and nothing is measured for it."""

from collections.abc import Mapping
from typing import Any

from liar_opt.frontend.causal import positions
from liar_opt.frontend.fx_module import to_numpy
from liar_opt.frontend.model import Model
from liar_opt.frontend.tables import looked_up, vocabulary
from liar_opt.frontend.vocabulary import find_words
from liar_opt.frontend.walk import walk
from liar_opt.passes.backend import Backend
from liar_opt.passes.base import Change, Pipeline
from liar_opt.passes.cut_vocabulary import (
    SAMPLES,
    ChosenWords,
    CutWords,
    cut_words_entry,
)
from liar_opt.passes.express_widths import FinalFields
from liar_opt.passes.finish_run import Done, finish_run
from liar_opt.passes.normalise_graph import NormaliseGraphPass
from liar_opt.passes.open_module import OpenedModule
from liar_opt.passes.options import PruneOptions
from liar_opt.passes.report import Report, report_of
from liar_opt.passes.result import ModuleResult, PruneResult
from liar_opt.passes.verify_model import Verification
from liar_opt.runtime.calibration_data import CalibrationData, load_calibration
from liar_opt.runtime.memory import MemoryWatch

LENGTH = 16
"""Tokens of the samples on which the result is compared."""


def cut_vocabulary(backend: Backend, watch: MemoryWatch) -> PruneResult:
    """Cuts the vocabulary of an ONNX model; :func:`liar_opt.prune` calls this where no width is asked for.

    Raises:
        ModelError: the model cannot be read, or has no vocabulary that is found.
        OptionError: the vocabulary cannot be read, does not fit the model, or leaves nothing.
        CheckError: the result is not what the original is.
    """
    state, options, calibration = backend.state, backend.options, backend.calibration
    Pipeline(passes=[NormaliseGraphPass()], observer=options.observer)(state)
    state.add(backend.choose_words(state))
    state.calibration = _few_samples(state.model, calibration, options)
    report = _begun(backend)
    done = Pipeline(passes=[backend.cutting_words()], observer=options.observer)(state)
    changes = () if options.dry_run else done.changes
    return _ended(backend, (report, changes, ()), state.found(CutWords), state.calibration.batches[0], watch)


def cut_module_vocabulary(backend: Backend, watch: MemoryWatch) -> ModuleResult:
    """Cuts the vocabulary of a torch module.

    Raises:
        ModelError: its code does not fit fewer words.
        OptionError: the vocabulary cannot be read, does not fit the module, or leaves nothing.
        CheckError: the result is not what the original is.
    """
    state, options = backend.state, backend.options
    state.add(backend.choose_words(state))
    report, changes = _begun(backend), tuple[Change, ...]()
    if options.dry_run:
        cut = cut_words_entry(state.found(ChosenWords), find_words(state.model), None)
    else:
        changes = Pipeline(passes=[backend.cutting_words()], observer=options.observer)(state).changes
        state.add(FinalFields(()))
        cut = state.found(CutWords)
    batch = {name: to_numpy(value) for name, value in state.found(OpenedModule).example.items()}
    result = _ended(backend, (report, changes, ()), cut, batch, watch)
    assert isinstance(result, ModuleResult)
    return result


def _begun(backend: Backend) -> Report:
    """Returns the report's first part."""
    report = report_of(backend.state)
    report.asked([backend.cutting_words()], backend.options, backend.calibration, backend.where, backend.device)
    report.groups, report.values = [], []
    report.refuse(())
    return report


def _ended(backend: Backend, done: Done, cut: CutWords, batch: Mapping[str, Any], watch: MemoryWatch) -> PruneResult:
    """Says what was cut, checked and timed on a batch; of a dry run what would be."""
    state, report = backend.state, done[0]
    report.prunable = {"before": cut.parameters_before, "after": cut.parameters_after}
    report.vocabulary = cut
    if not backend.options.dry_run:
        assert cut.exact_difference is not None
        report.verification = Verification(cut.exact_difference, state.model.least_precision(), {})
    return finish_run(backend, done, watch, batch)


def _few_samples(model: Model, calibration: Any, options: PruneOptions) -> CalibrationData:
    """Returns some short samples to compare on: of the calibration data, if there is some, or made up."""
    known = positions(model)
    short = LENGTH if known is None else min(LENGTH, max(1, known // 2))  # some tables of positions begin with padding
    fields = {name: value for name, value in options.data().items() if name != "packing"}
    fields |= {"samples": SAMPLES, "sequence_length": options.sequence_length or short, "vocabulary": vocabulary(model)}
    if calibration is None:
        fields["rows"] = looked_up(model)
    return load_calibration(calibration, walk(model).input_specs(), **fields)
