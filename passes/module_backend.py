"""torch modules as the job sees them: a trace of ATen operators, run by torch where the module's parameters are.

The module comes back with smaller weights (:attr:`ModuleResult.module`), with the traced graph
(:attr:`ModuleResult.program`), and for transformers models as a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from liar_opt.frontend.blocks import Run
from liar_opt.frontend.decilm import is_deci
from liar_opt.frontend.either_model import flops_of
from liar_opt.frontend.fx_engine import TimedModule
from liar_opt.frontend.fx_module import FxModel, FxOriginal, FxWalk
from liar_opt.frontend.fx_onnx import export_onnx, symbolic_axes
from liar_opt.frontend.fx_rewrite import cut_graph_module, cut_module, planned_state
from liar_opt.frontend.hf_checkpoint import FieldChange, express, positions
from liar_opt.frontend.onnx_model import OnnxOriginal
from liar_opt.frontend.onnx_quantise import require_quantiser
from liar_opt.frontend.own_text import GenerateWriter
from liar_opt.frontend.weight_files import lightened, write_model
from liar_opt.passes.allocate_widths import Expressible
from liar_opt.passes.allocations import MEASURED
from liar_opt.passes.backend import SPREAD, Backend, inputs_of
from liar_opt.passes.base import Change, DenseModel, Opened, OutputNames, Pass, Probes, State, WholeModel
from liar_opt.passes.blank_cut import deployed, in_one_form
from liar_opt.passes.checkpoint import Digests
from liar_opt.passes.choose_blocks import ChosenRun, Gap, LeftOut
from liar_opt.passes.chosen_passes import Chosen, passes_of_options, passes_of_text
from liar_opt.passes.cut_experts import CutExperts, experts_left, experts_of
from liar_opt.passes.cut_module_blocks import leave_out_of_module, listed_runs
from liar_opt.passes.cut_module_words import CutModuleWordsPass, choose_module_words
from liar_opt.passes.cut_vocabulary import ChosenWords, CutWords
from liar_opt.passes.express_deci import ExpressDeciPass, StateDeciPass
from liar_opt.passes.express_widths import ExpressWidthsPass, StateFieldsPass
from liar_opt.passes.find_module_groups import FindModuleGroupsPass
from liar_opt.passes.fit_module import CutModule, FitModulePass
from liar_opt.passes.fit_runtime import require_fit
from liar_opt.passes.gradient_scores import GRADIENT_SCORES, KNOWLEDGE
from liar_opt.passes.groups import QUERY_KEY, RECURRENT, VALUES, Refusal
from liar_opt.passes.limit_drop import LimitDropPass
from liar_opt.passes.module_on_onnx import PruneExportedPass
from liar_opt.passes.note_gradients import NoteGradientsPass
from liar_opt.passes.open_module import OpenedModule, load_module_state, module_of, opened_again, traced_model
from liar_opt.passes.options import BACKENDS, DECI, PruneOptions
from liar_opt.passes.prune_groups import PruneGroupsPass
from liar_opt.passes.quantise_module import ELSEWHERE, quantise_module, require_form
from liar_opt.passes.registry import lookup
from liar_opt.passes.report import Report
from liar_opt.passes.result import ModuleResult
from liar_opt.passes.tune_module import TuneModulePass
from liar_opt.passes.vocabulary_job import cut_module_vocabulary
from liar_opt.runtime.compare import TOLERANCES
from liar_opt.runtime.errors import ModelError, OptionError
from liar_opt.runtime.latency import Latency, measure_latency
from liar_opt.runtime.memory import MemoryWatch
from liar_opt.runtime.self_calibration import Author, is_own_text
from liar_opt.runtime.signatures import Signature
from liar_opt.runtime.text_tokenizer import has_tokenizer

if TYPE_CHECKING:
    import torch

ONE_WIDTH = "a configuration has one width for the queries, keys and values of all layers"
UNSAID = {VALUES: ONE_WIDTH, QUERY_KEY: ONE_WIDTH, RECURRENT: "no configuration says the units of recurrent layers alone"}
TIMED_SECONDS = 0.3
"""Seconds that timing may take beside a first run of each model, and one more where that takes longer."""


@dataclass(eq=False)
class TorchBackend(Backend):
    """A traced module."""

    cannot: ClassVar[Mapping[str, str]] = {
        "custom_ops": "custom-ops are libraries of ONNX Runtime, and a module runs in torch; leave them out",
    }
    outputs: dict[str, str] = field(default_factory=dict, init=False, repr=False)
    opened = (
        *(Opened, DenseModel, WholeModel, Digests, OpenedModule, OutputNames, Probes),
        *(ChosenWords, CutExperts, LeftOut),
    )
    gradients = True

    @classmethod
    def require_possible(cls, calibration: Any, options: PruneOptions) -> None:
        """Checks options that need no model."""
        super().require_possible(calibration, options)
        lookup("backend", dict.fromkeys(BACKENDS), options.backend)
        if isinstance(options.checkpoint, str):
            lookup("checkpoint", {DECI: None}, options.checkpoint)
        if options.checkpoint is False:
            require_quantiser(options.quantize)
        elif options.checkpoint is not None:  # else the model says whether it has one
            require_form(options)
        if options.quantize is not None and (options.target or "").strip().startswith("size"):
            raise OptionError("the size of a quantised file is a target of ONNX files alone; export first, and prune that")
        if options.sparse_storage and options.checkpoint:
            raise OptionError(f"sparse-storage is a form of ONNX, and a checkpoint has none; leave it out, or {ELSEWHERE}")
        require_fit(options, "onnx" if options.checkpoint is False else "checkpoint")
        if options.backend == "torch":
            return
        if options.tune is not None:
            raise OptionError(f"tune trains in torch; leave it or backend '{options.backend}' out")
        if options.labelled is not None or options.score == KNOWLEDGE:
            raise OptionError(
                f"score '{options.score}' needs gradients; backend '{options.backend}' has none, give backend 'torch'"
            )
        if options.resume is not None:
            raise OptionError(f"resume keeps what torch measured; leave it or backend '{options.backend}' out")

    @classmethod
    def open(cls, model: torch.nn.Module | str | Path, calibration: Any, options: PruneOptions) -> TorchBackend:
        """Takes a module from memory or from a checkpoint, and traces it.

        Args:
            model: a module (it is not changed), a folder with a transformers checkpoint, or a hub name. Of what
                ``torch.compile``, DataParallel, DistributedDataParallel or AveragedModel hold, the module inside is pruned.
            calibration: see :func:`liar_opt.prune`.
            options: of the run.

        Raises:
            ModelError: the module cannot be loaded or traced.
            OptionError: an option does not work here, or nothing says what the module's inputs are.
        """
        inputs = inputs_of(model, calibration, options)
        state, calibration = load_module_state(model, calibration, options)
        opened = state.found(OpenedModule)
        readable = opened.folder is not None and (not is_own_text(calibration) or has_tokenizer(opened.folder))
        checkpoint = opened.stock if options.checkpoint is None else options.checkpoint
        if checkpoint and is_deci(module_of(state)):
            checkpoint = DECI
        if options.quantize is not None and options.checkpoint is None and not checkpoint:
            raise OptionError(
                f"quantize makes ONNX, or a checkpoint, and {type(module_of(state)).__name__} has none; {ELSEWHERE}"
            )
        options = replace(
            options,
            checkpoint=checkpoint,
            tokenizer=opened.folder if options.tokenizer is None and readable else options.tokenizer,
        )
        if options.checkpoint:
            require_form(options)
            _tie(state)
        require_fit(options, "checkpoint" if options.checkpoint else "onnx")
        return cls(state, calibration, options, inputs)

    def choose(self) -> Chosen:
        """Returns the passes: a checkpoint has one width for all layers, and no new biases."""
        options, checkpoint = self.options, bool(self.options.checkpoint)
        deci = options.checkpoint == DECI
        uniform = checkpoint and not deci if options.uniform is None else options.uniform
        if options.passes is None:
            new_bias = not checkpoint if options.new_bias is None else options.new_bias
            whole = "off" if options.whole_layers == "auto" and uniform else options.whole_layers
            given = replace(options, uniform=None, new_bias=new_bias, whole_layers=whole)
            chosen = passes_of_options(given, self.calibration is not None)
        else:
            chosen = passes_of_text(options.passes, options)
            uniform, new_bias = uniform or chosen.widths.uniform, chosen.cut.new_bias and not checkpoint
        if uniform and chosen.search is not None:
            raise OptionError(
                "a search exchanges widths between layers, and a configuration has one for all of a kind; leave search "
                f"out, or {ELSEWHERE}"
            )
        if checkpoint and not deci and options.uniform is None and chosen.widths.allocate in set(MEASURED) - {"curves"}:
            raise OptionError(
                f"allocation '{chosen.widths.allocate}' gives each layer a width of its own, and a configuration has one "
                f"for all of a kind; leave allocate out, or {ELSEWHERE}"
            )
        if options.whole_layers == "on" and ((checkpoint and not deci) or uniform):
            raise OptionError(
                "whole-layers works on a traced graph: stock code of a checkpoint runs every layer that its configuration "
                f"counts, and all alike; leave it out, or {ELSEWHERE}"
            )
        asked = {VALUES: "values", QUERY_KEY: "query_key", RECURRENT: "recurrent"}
        for kind, name in asked.items():
            if checkpoint and getattr(chosen.widths, name, None):
                raise OptionError(f"{kind} works on a traced graph: {UNSAID[kind]}; leave it out, or {ELSEWHERE}")
        pruning = PruneExportedPass if options.backend == "onnxruntime" else PruneGroupsPass
        cut, widths = pruning(**{**vars(chosen.cut), "new_bias": new_bias}), replace(chosen.widths, uniform=uniform)
        if isinstance(widths, LimitDropPass):
            widths = replace(widths, cut=cut)
        curves = chosen.curves
        if curves is not None and cut.score in GRADIENT_SCORES and widths.allocate == "curves":
            curves = replace(curves, score="greedy")  # curves alone are read, no values of that score
        if curves is not None and (checkpoint or uniform) and not (deci and options.whole_layers == "on"):
            curves = replace(curves, whole="off")
        gradients = None
        if cut.score in GRADIENT_SCORES:
            gradients = NoteGradientsPass(str(cut.score), options.loss, options.labelled, options.seed)
        stating: Pass[Any] | None = StateDeciPass() if deci else StateFieldsPass() if checkpoint else None
        tune = None if options.tune is None else TuneModulePass(options.tune, options.tune_what, options.seed)
        made = replace(chosen, gradients=gradients, stating=stating, tune=tune, fit=FitModulePass(checkpoint))
        return replace(made, widths=widths, cut=cut, curves=curves)

    def analysis(self) -> list[Pass[Any]]:
        """Returns the passes that find the groups."""
        return [FindModuleGroupsPass(traced=not self.options.checkpoint)]

    def narrowing(self, required: bool = True) -> list[Pass[Any]]:
        """Returns what asks a checkpoint's configuration which widths it can say."""
        options = self.options
        asked = tuple(kind for kind, ratio in (("ffn", options.ffn), ("heads", options.heads)) if ratio)
        stored = self.state.found(OpenedModule).folder is not None
        said: list[Pass[Any]] = []
        if options.checkpoint == DECI:
            said = [ExpressDeciPass("heads" in asked, options.whole_layers == "on")]
        elif options.checkpoint and (required or stored):
            said = [ExpressWidthsPass(asked, required)]
        return [*said, *super().narrowing(required)]

    def positions(self, state: State) -> int | None:
        """Returns for how many tokens the configuration has positions, where nothing else says how long inputs are."""
        made_up = self.calibration is None and self.options.sequence_length is None
        return positions(module_of(state)) if made_up or is_own_text(self.calibration) else None

    def author(self, state: State) -> tuple[Callable[[], Any], Callable[[Any, Signature], Author]]:
        """Returns the module, which writes through its own ``generate``."""
        return lambda: module_of(state), GenerateWriter.of

    @property
    def device(self) -> str:
        """Where the module's parameters are."""
        return str(traced_model(self.state).device)

    @property
    def where(self) -> str:
        """Whether torch measures, or ONNX Runtime on an export."""
        return self.options.backend

    def notes_of_inspection(self, state: State) -> Sequence[str]:
        """Says which widths the configuration can say."""
        expressible = state.get(Expressible)
        if expressible is None:
            return ()
        return [expressible.describe(group) for group in state.groups if group.name in expressible.allowed]

    def operations(self, state: State, batch: Mapping[str, Any]) -> int | None:
        """Returns those of the trace; none where words went, of which the trace does not know."""
        return None if state.get(CutWords) is not None else flops_of(state.model, batch)

    def complete(self, report: Report, state: State) -> None:
        """Counts the module's own parameters, and says where its code does not fit them."""
        made, words = state.found(CutModule), state.get(CutWords)
        assert report.after is not None
        report.after.parameters = sum(p.numel() for p in made.module.parameters())  # each counted once
        if words is not None:
            report.after.bytes -= words.bytes_before - words.bytes_after
        if made.traced is not None:
            report.note(f"the result is the traced graph: {made.traced}")

    def timed(self, state: State, batch: Mapping[str, Any], aimed: bool) -> Latency | str:
        """Times both modules in turns; a result that meets a target as long as it takes to tell."""
        made = state.found(CutModule)
        dense = deployed(state.as_it_came().model(), state.device)
        models = in_one_form([dense, TimedModule(traced_model(state), made.module, made.traced is None)])
        feeds, words = [dict(batch)] * 2, state.get(ChosenWords)
        if words is not None:
            feeds = words.beside(batch, batch)
        if aimed:
            return measure_latency(models, feeds, budget=2.0, least=12, close=SPREAD)
        return measure_latency(models, feeds, budget=TIMED_SECONDS, least=1)

    def block_repair(self) -> str:
        """Returns what stands where blocks are left out; a checkpoint cannot say a map of its own.

        Raises:
            OptionError: it was asked to.
        """
        if self.options.checkpoint and self.options.block_repair == "map":
            raise OptionError(f"block-repair map is a layer that no configuration can say; give fold, or {ELSEWHERE}")
        found = super().block_repair()
        return "fold" if found == "map" and self.options.checkpoint else found

    def gaps(self, runs: Sequence[Run], repair: str) -> list[Gap]:
        """Returns where each run would go: as entries of a list of modules, or as nodes of the traced graph."""
        if repair != "map":
            runs = listed_runs(self.state, runs, bool(self.options.checkpoint))
        return super().gaps(runs, repair)

    def leave_out(self, chosen: ChosenRun, repair: str) -> tuple[Backend, LeftOut]:
        """Takes the entries out of the list of modules, or the nodes out of the traced graph."""
        state, entry, self.outputs = leave_out_of_module(self.state, chosen, repair, bool(self.options.checkpoint))
        return replace(self, state=state), entry

    def same_outputs(self, left: Backend) -> dict[str, str]:
        """Returns by what names the original has the outputs of what is left of it."""
        return self.outputs

    def choose_words(self, state: State) -> ChosenWords:
        """Returns the words that are to stay, those that its configurations name among them."""
        return choose_module_words(state, self.calibration, self.options)

    def cutting_words(self) -> Pass[Any]:
        """Returns what cuts the module's embeddings and heads."""
        return CutModuleWordsPass()

    def cut_words_alone(self, watch: MemoryWatch) -> ModuleResult:
        """Cuts the vocabulary of the module, and no width."""
        return cut_module_vocabulary(self, watch)

    def require_sayable(self, state: State, ratio: float) -> tuple[FieldChange, ...] | None:
        """Returns the fields of a checkpoint that say how many experts there are; None where none is asked for."""
        if not self.options.checkpoint:
            return None
        module: Any = module_of(state)
        walk, found = state.analysed(), experts_of(state)
        assert isinstance(walk, FxWalk)
        layers, unfit = found.layers, found.unfit
        keep = {layer.factor: experts_left(layer, ratio) // layer.groups for layer in layers}
        shapes, sizes = planned_state(walk, keep)
        fields = None if unfit else express(module, shapes, sizes, ())
        if fields is None:
            raise OptionError(
                f"the configuration of {type(module).__name__} ({module.config.model_type}) has no field that says fewer "
                f"experts of these layers; {ELSEWHERE}"
            )
        return fields

    def with_fewer_experts(self, state: State, fields: tuple[FieldChange, ...] | None) -> TorchBackend:
        """Returns the module with fewer experts, traced again: in its own code, or as the traced graph."""
        model, opened = traced_model(state), state.found(OpenedModule)
        tolerance, traced = TOLERANCES[model.least_precision()], None
        try:
            module, _ = cut_module(model, opened.example, tolerance, fields or ())
        except ModelError as err:
            if self.options.checkpoint:
                raise
            module, traced = cut_graph_module(model).to(model.device), str(err).partition("; write")[0]
        before = state.found(DenseModel).original.model()
        assert isinstance(before, FxModel)
        fewer = opened_again(state, module)
        fewer.add(CutModule(module, traced))
        self.outputs = dict(zip(traced_model(fewer).results, before.results, strict=True))
        return replace(self, state=fewer)

    def again(self, state: State) -> TorchBackend:
        """Returns the module as it is now, traced again."""
        new = opened_again(state, state.found(CutModule).module)
        new.seconds = state.seconds
        return replace(self, state=new)

    def fitting(self) -> list[Pass[Any]]:
        """Returns what gives the module its new weights."""
        return [FitModulePass(bool(self.options.checkpoint))]

    def quantise(self, report: Report, state: State, batch: Mapping[str, Any]) -> None:
        """Quantises a checkpoint by torchao, and what becomes ONNX as ONNX."""
        if self.options.quantize is None or not self.options.checkpoint:
            super().quantise(report, state, batch)
            return
        report.quantised = quantise_module(state, batch, self.options.latency)
        state.seconds["quantise"] = report.quantised.seconds

    def as_graphs(self, state: State) -> tuple[OnnxOriginal, OnnxOriginal]:
        """Returns the module, and what is left of it, exported."""
        example, axes = state.found(OpenedModule).example, symbolic_axes(traced_model(state).signature)
        came = state.as_it_came()
        assert isinstance(came, FxOriginal)
        modules = (came.module, state.found(CutModule).module)
        dense, pruned = (OnnxOriginal(*lightened(export_onnx(module, example, axes))) for module in modules)
        return dense, pruned

    def result(
        self, state: State, report: Report, changes: tuple[Change, ...], refusals: tuple[Refusal, ...]
    ) -> ModuleResult:
        """Returns the cut module; of a dry run the module as it came."""
        if self.options.dry_run and state.get(WholeModel) is not None:
            whole = self.anew(state, ())
            whole.model = state.as_it_came().model()
            whole.groups, state = state.groups, whole
        return ModuleResult(state, report.to_json(), changes, refusals, self.inputs, self.options.sparse_storage)


def _tie(state: State) -> None:
    """Keeps the heads of layers tied that share a table by heads, since a configuration cannot say others for each."""
    original = traced_model(state).original
    state.model.tied = True
    state.add(DenseModel(replace(original, tied=True)))


def export_checkpoint(folder: Path, path: Path, *, allow_pickle: bool = False) -> None:
    """Writes a transformers checkpoint as ONNX, for what only reads ONNX.

    Raises:
        ModelError: it cannot be loaded, traced or exported.
        OptionError: nothing says what its inputs are.
    """
    state, _ = load_module_state(folder, None, PruneOptions(allow_pickle=allow_pickle, provider="cpu"))
    example, axes = state.found(OpenedModule).example, symbolic_axes(traced_model(state).signature)
    write_model(*lightened(export_onnx(module_of(state), example, axes)), path)
