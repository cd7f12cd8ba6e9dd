"""One run of ``prune`` on a torch module: the same analysis, selection, repair and checks as for ONNX graphs, on its trace.

The module comes back with smaller weights (:attr:`ModuleResult.module`), with the traced graph
(:attr:`ModuleResult.program`), and for transformers models as a checkpoint.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liar_opt.frontend.causal import is_causal
from liar_opt.frontend.fx_module import Executor, to_torch
from liar_opt.frontend.fx_onnx import export_onnx, symbolic_axes
from liar_opt.frontend.hf_checkpoint import positions
from liar_opt.frontend.weight_files import lightened, write_model
from liar_opt.passes.allocate_widths import Expressible
from liar_opt.passes.base import Analysis, Pass, Pipeline, State
from liar_opt.passes.calibrate import divided
from liar_opt.passes.chosen_passes import Chosen, passes_of_options
from liar_opt.passes.cut_module_words import CutModuleWordsPass, choose_module_words
from liar_opt.passes.cut_vocabulary import ChosenWords, CutWords, planned_words, wants_words
from liar_opt.passes.express_widths import ExpressWidthsPass, FinalFields, final_fields
from liar_opt.passes.find_module_groups import FindModuleGroupsPass
from liar_opt.passes.gradient_scores import (
    GRADIENT_SCORES,
    KNOWLEDGE,
    Gradients,
    mask_gradients,
    own_samples,
    require_labels,
)
from liar_opt.passes.limit_drop import LimitDropPass
from liar_opt.passes.meet_target import MeetTargetPass, parse_target
from liar_opt.passes.model_job import TIMED_SAMPLES
from liar_opt.passes.module_on_onnx import PruneExportedPass
from liar_opt.passes.open_module import (
    OpenedModule,
    load_module_state,
    module_of,
    traced_model,
    vocabulary,
)
from liar_opt.passes.options import BACKENDS, OPTIONS, PACKINGS, PruneOptions
from liar_opt.passes.prove_module import ProveModuleGroupsPass
from liar_opt.passes.prune_groups import PruneGroupsPass
from liar_opt.passes.registry import lookup
from liar_opt.passes.report import report_of
from liar_opt.passes.result import Inspection, ModuleResult
from liar_opt.passes.verify_model import first_samples
from liar_opt.passes.verify_module import CutModule, VerifyModulePass
from liar_opt.passes.vocabulary_job import cut_module_vocabulary, cut_sizes, inputs_of, words_alone
from liar_opt.runtime.calibration_data import load_calibration
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.latency import Latency, measure_latency
from liar_opt.runtime.memory import MemoryWatch
from liar_opt.runtime.self_calibration import SELF

if TYPE_CHECKING:
    import torch

TIMED_SECONDS = 0.3
"""Seconds that timing may take beside a first run of each model, and one more where that takes longer."""


def inspect_module(model: torch.nn.Module | str | Path, *, example: Any = None, allow_pickle: bool = False) -> Inspection:
    """Finds the channel groups of a module; :func:`liar_opt.inspect` calls this.

    Of a folder those are listed whose widths the checkpoint can say that ``prune`` makes of it; others are refused with a
    reason.

    Raises:
        ModelError: it cannot be loaded or traced.
        OptionError: nothing says what its inputs are.
    """
    state, _ = load_module_state(model, None, example, allow_pickle)
    opened = state.found(OpenedModule)
    express_widths = [] if opened.folder is None else [ExpressWidthsPass(required=False)]
    result = Pipeline(passes=[FindModuleGroupsPass(traced=not opened.stock), *express_widths])(state)
    expressible = state.get(Expressible)
    report = report_of(state)
    if expressible is not None:
        report.note(*(expressible.describe(group) for group in state.groups if group.name in expressible.allowed))
    report.inspected(state)
    report.refuse(result.refusals)
    return Inspection(state.model, state.groups, result.refusals, report.to_json())


def prune_module(model: torch.nn.Module | str | Path, calibration: Any, options: PruneOptions) -> ModuleResult:
    """Makes a torch module smaller; :func:`liar_opt.prune` calls this for modules and for folders of checkpoints.

    Args:
        model: a module (it is not changed), a folder with a transformers checkpoint, or a hub name. Of what
            ``torch.compile``, DataParallel, DistributedDataParallel or AveragedModel hold, the module inside is pruned.
        calibration: see :func:`liar_opt.prune`.
        options: of the run; those that work on ONNX files alone must have their defaults.

    Raises:
        ModelError: the module cannot be traced or has nothing to prune.
        OptionError: an option or the calibration data does not fit.
        CheckError: the result failed a check.
    """
    start, watch = time.perf_counter(), MemoryWatch()
    _require_possible(calibration, options)
    inputs = inputs_of(model, calibration, options)
    state, calibration = load_module_state(
        model, calibration, options.example, options.allow_pickle, options.provider, options.batch_size
    )
    opened = state.found(OpenedModule)
    state.progress, state.fresh = options.progress, options.fresh
    options = replace(
        options,
        checkpoint=opened.stock if options.checkpoint is None else options.checkpoint,
        tokenizer=opened.folder if options.tokenizer is None else options.tokenizer,
    )
    if wants_words(options):
        state.add(choose_module_words(state, calibration, options))
    if words_alone(options):
        return cut_module_vocabulary(state, options, calibration, inputs)
    chosen = _chosen(options, calibration is not None)
    cut = chosen.cut
    asked = tuple(kind for kind, ratio in (("ffn", options.ffn), ("heads", options.heads)) if ratio)
    passes: list[Pass[Any]] = [
        FindModuleGroupsPass(traced=not options.checkpoint),
        ProveModuleGroupsPass(cut),
        *([ExpressWidthsPass(asked)] if options.checkpoint else []),
    ]
    analysis = Pipeline(passes=passes, observer=options.observer)(state)
    limited = isinstance(chosen.widths, LimitDropPass)
    if chosen.curves is not None or isinstance(chosen.widths, MeetTargetPass):
        _load_calibration(state, calibration, options, limited)
    if chosen.curves is not None and chosen.curves.score in GRADIENT_SCORES:
        _note_gradients(state, options)
    state.add(Analysis((passes[0], *passes[2:]), (OpenedModule,)))
    decided = Pipeline(passes=chosen.deciding, observer=options.observer)(state)
    if options.checkpoint:
        state.add(FinalFields(final_fields(state)))
    report = report_of(state)
    report.asked([chosen.widths, cut], options, calibration, options.backend, str(traced_model(state).device))
    report.refuse(analysis.refusals)
    report.decided(state)
    if options.dry_run:
        report.planned(state)
        report.note(*planned_words(state))
        return ModuleResult(state, report.to_json(), (), analysis.refusals, inputs)
    if state.calibration is None:
        _load_calibration(state, calibration, options, limited)
    assert state.calibration is not None
    report.calibrated(state.calibration)
    if state.get(Gradients) is None:
        _note_gradients(state, options)
    verify = VerifyModulePass(checkpoint=bool(options.checkpoint))
    done = Pipeline(passes=[*([] if limited else [cut]), verify], observer=options.observer)(state)
    changes = (*decided.changes, *done.changes)
    report.cut(state, changes, cut.repair)
    if wants_words(options):
        changes = (*changes, *Pipeline(passes=[CutModuleWordsPass()], observer=options.observer)(state).changes)
        report.vocabulary = state.found(CutWords)
    made = state.found(CutModule)
    report.after = cut_sizes(state)
    if made.traced is not None:
        report.note(f"the result is the traced graph: {made.traced}")
    if options.latency:
        began = time.perf_counter()
        report.timed(_latency(state))
        state.seconds["latency"] = time.perf_counter() - began
    report.ended(state, watch, time.perf_counter() - start)
    return ModuleResult(state, report.to_json(), changes, analysis.refusals, inputs)


def _require_possible(calibration: Any, options: PruneOptions) -> None:
    """Checks that options fit a module, and each other.

    Raises:
        OptionError: one is for ONNX files alone, or does not fit another.
    """
    require_labels(options.score, options.loss, options.labelled, torch_module=True)
    for name, what in OPTIONS.items():
        if what.onnx_only and options.given(name):
            raise OptionError(
                f"{name.replace('_', '-')} works on ONNX files alone; prune the exported module, or leave it out"
            )
    if options.target is not None and parse_target(options.target).kind in ("flops", "latency"):
        raise OptionError("targets of flops and latency work on ONNX files alone; give params= or size=, or export it")
    lookup("packing", dict.fromkeys(PACKINGS), options.packing)
    lookup("backend", dict.fromkeys(BACKENDS), options.backend)
    if (options.labelled is not None or options.score == KNOWLEDGE) and options.backend != "torch":
        raise OptionError(
            f"score '{options.score}' needs gradients; backend '{options.backend}' has none, give backend 'torch'"
        )
    if isinstance(calibration, str) and calibration == SELF:
        raise OptionError("calibration 'self' works on ONNX files alone; prune the exported module, or give data")


def _chosen(options: PruneOptions, calibrated: bool) -> Chosen:
    """Returns the passes: a checkpoint has one width for all layers, and no new biases.

    Raises:
        OptionError: they exclude each other.
    """
    checkpoint = bool(options.checkpoint)
    uniform = checkpoint if options.uniform is None else options.uniform
    new_bias = not checkpoint if options.new_bias is None else options.new_bias
    chosen = passes_of_options(replace(options, uniform=None, new_bias=new_bias), calibrated)
    if uniform and chosen.search is not None:
        raise OptionError(
            "a search exchanges widths between layers, and a configuration has one for all of a kind; leave search out, or "
            "write ONNX with --format onnx (in Python: checkpoint=False)"
        )
    pruning = PruneExportedPass if options.backend == "onnxruntime" else PruneGroupsPass
    cut, widths = pruning(**vars(chosen.cut)), replace(chosen.widths, uniform=uniform)
    if isinstance(widths, LimitDropPass):
        widths = replace(widths, cut=cut)
    curves = chosen.curves
    if curves is not None and options.score in GRADIENT_SCORES and widths.allocate == "curves":
        curves = replace(curves, score="greedy")  # curves alone are read, no values of that score
    return replace(chosen, widths=widths, cut=cut, curves=curves)


def _load_calibration(state: State, source: Any, options: PruneOptions, limited: bool) -> None:
    """Loads the calibration data; where a loss is ``limited``, some of it is held back."""
    began = time.perf_counter()
    fields, model = options.data(), traced_model(state)
    fields["packing"] = is_causal(model) if options.packing == "auto" else options.packing == "on"
    if source is None and options.sequence_length is None:  # inputs that are made up are no longer than there are positions
        fields["positions"] = positions(module_of(state))
    data = load_calibration(source, model.inputs(), vocabulary=vocabulary(model), **fields)
    state.calibration = divided(data, model.inputs()) if limited else data
    state.seconds["load-calibration"] = time.perf_counter() - began


def _note_gradients(state: State, options: PruneOptions) -> None:
    """Runs the labelled batches through the dense module, if the score asks for gradients.

    Outputs have the names that the module gives them.
    """
    labelled, loss = options.labelled, options.loss
    if options.score == KNOWLEDGE:
        assert state.calibration is not None
        labelled, loss = own_samples(state.calibration.batches, state.calibration.row_masks, options.seed)
    if loss is None or labelled is None:
        return
    asked = loss
    model = traced_model(state)
    names = state.found(OpenedModule).outputs
    groups = [g for g in state.groups if not state.keep or state.keep.get(g.name, g.size) < g.size]

    @functools.wraps(loss)
    def named(outputs: Mapping[str, Any], labels: Any) -> Any:
        return asked({names.get(n, n): v for n, v in outputs.items()}, labels)

    state.add(Gradients(mask_gradients(Executor(model, model.device), groups, labelled, named)))


def export_checkpoint(folder: Path, path: Path, *, allow_pickle: bool = False) -> None:
    """Writes a transformers checkpoint as ONNX, for what only reads ONNX.

    Raises:
        ModelError: it cannot be loaded, traced or exported.
        OptionError: nothing says what its inputs are.
    """
    state, _ = load_module_state(folder, None, None, allow_pickle)
    example, axes = state.found(OpenedModule).example, symbolic_axes(traced_model(state).signature)
    write_model(*lightened(export_onnx(module_of(state), example, axes)), path)


class _Runner:
    """A module behind the face of a session, for timing."""

    def __init__(self, module: torch.nn.Module, feeds: Mapping[str, Any], device: Any) -> None:
        self.inputs = list(feeds)
        self.module, self.arguments = module, {k: to_torch(v, device) for k, v in feeds.items()}

    def run(self, feeds: Mapping[str, Any]) -> None:
        import torch

        with torch.no_grad():
            self.module(**self.arguments)
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def _latency(state: State) -> Latency:
    """Times both modules in turns."""
    model, data = traced_model(state), state.calibration
    assert data is not None
    batch = first_samples(state, data.batches[0], TIMED_SAMPLES)
    feeds = {k: v for k, v in batch.items() if k in {s.name for s in model.signature}}
    words = state.get(ChosenWords)
    known = feeds if words is None else words.known(feeds)
    pairs = ((module_of(state), known), (state.found(CutModule).module, known if words is None else words.numbered(known)))
    runners = [_Runner(m, f, model.device) for m, f in pairs]
    return measure_latency(runners, feeds, budget=TIMED_SECONDS, least=1)
