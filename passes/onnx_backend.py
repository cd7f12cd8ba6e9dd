"""ONNX graphs as the job sees them: a stored file, run by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from liar_opt.frontend.causal import positions
from liar_opt.frontend.onnx_engine import cannot_load
from liar_opt.frontend.onnx_model import OnnxOriginal, onnx_graph
from liar_opt.frontend.onnx_quantise import require_quantiser
from liar_opt.frontend.sound_model import why_invalid
from liar_opt.frontend.walk import count_flops
from liar_opt.passes.backend import AIMED, PATIENCE, SPREAD, Backend, inputs_of
from liar_opt.passes.base import Change, DenseModel, Observer, Opened, Pass, PassResult, State, WholeModel
from liar_opt.passes.blank_cut import deployed
from liar_opt.passes.checkpoint import Digests
from liar_opt.passes.choose_blocks import ChosenRun, LeftOut
from liar_opt.passes.chosen_passes import Chosen, passes_of_options, passes_of_text
from liar_opt.passes.cut_experts import CutExperts
from liar_opt.passes.cut_vocabulary import ChosenWords, CutVocabularyPass, choose_words
from liar_opt.passes.find_groups import FindGroupsPass
from liar_opt.passes.fit_runtime import fit_runtime, require_fit
from liar_opt.passes.groups import Refusal
from liar_opt.passes.keep_scheme import KeptModel, keep_scheme, require_widths_alone
from liar_opt.passes.normalise_graph import NormaliseGraphPass
from liar_opt.passes.open_model import load_state
from liar_opt.passes.options import PruneOptions
from liar_opt.passes.plan_memory import sizes_of
from liar_opt.passes.prune_groups import Cut
from liar_opt.passes.quantise_result import QuantisedModel
from liar_opt.passes.replace_blocks import ReplacedBlocks
from liar_opt.passes.report import Report
from liar_opt.passes.result import PruneResult
from liar_opt.passes.sweep import cut_arrays
from liar_opt.passes.verify_model import ComparedSessions, DenseSession
from liar_opt.passes.vocabulary_job import cut_vocabulary
from liar_opt.runtime.errors import InternalError, ModelError
from liar_opt.runtime.latency import CannotTime, Latency, measure_latency
from liar_opt.runtime.later import later
from liar_opt.runtime.memory import MemoryWatch, show_size
from liar_opt.runtime.sessions import device_unused, refusal_of, resolve_provider


@dataclass(eq=False)
class OnnxBackend(Backend):
    """An ONNX graph."""

    cannot: ClassVar[Mapping[str, str]] = {
        "tune": "tune trains torch modules and checkpoints; of an ONNX file, --refit fits biases and gains in closed form",
    }
    opened = (Opened, DenseModel, WholeModel, DenseSession, Digests, ChosenWords, CutExperts, LeftOut)

    @classmethod
    def require_possible(cls, calibration: Any, options: PruneOptions) -> None:
        """Checks options that need no model."""
        super().require_possible(calibration, options)
        require_quantiser(options.quantize)
        require_fit(options, "onnx")

    @classmethod
    def open(cls, model: Any, calibration: Any, options: PruneOptions) -> OnnxBackend:
        """Takes a model from a path or from memory.

        Raises:
            ModelError: it cannot be read.
            OptionError: an option does not work here.
        """
        inputs = inputs_of(model, calibration, options)
        state = load_state(model, options.memory)
        require_widths_alone(state, options)
        state.device = resolve_provider(options.provider)
        return cls(state, calibration, options, inputs)

    def choose(self) -> Chosen:
        """Returns the passes behind the analysis."""
        if self.options.passes is None:
            return passes_of_options(self.options, self.calibration is not None)
        return passes_of_text(self.options.passes, self.options)

    def analysis(self) -> list[Pass[Any]]:
        """Returns the passes that find the groups."""
        return [NormaliseGraphPass(), FindGroupsPass()]

    def narrowing(self, required: bool = True) -> list[Pass[Any]]:
        """Returns the passes that say which widths groups may have: of weights in blocks, multiples of these."""
        reading = self.state.found(DenseModel).stored.reading
        return fit_runtime(self.options, 1 if reading is None else reading.block)

    def analyse(self, state: State, observer: Observer | None = None, load: bool = False) -> PassResult:
        """Runs the analysis; with ``load`` the original is loaded meanwhile.

        Raises:
            ModelError: it fails on a model that is no valid ONNX, or that ONNX Runtime refuses.
        """
        dense = state.found(DenseModel).stored
        try:
            if load and state.get(DenseSession) is None:
                state.add(DenseSession(later(lambda: state.engine().whole(dense))))
            return super().analyse(state, observer)
        except InternalError as err:
            reason = why_invalid(dense.proto)
            if reason is not None:
                name = f"'{dense.source}'" if dense.source else "the model"
                raise ModelError(f"{name} is no valid ONNX ({reason}); export it again") from err
            reason = refusal_of(dense.detached()[0])
            if reason is not None:
                raise ModelError(cannot_load(dense, reason)) from err
            raise

    def positions(self, state: State) -> int | None:
        """Returns for how many tokens the graph has positions."""
        return positions(state.model)

    @property
    def device(self) -> str:
        """Where ONNX Runtime computes."""
        return self.state.device

    def notes(self, state: State) -> Sequence[str]:
        """Says that a device is there which is not used."""
        if self.options.provider != "auto" or not device_unused(state.device):
            return ()
        return (
            "the CPU was used: this machine has a CUDA device, but the libraries that ONNX Runtime needs for it were "
            "not found; pip install 'onnxruntime-gpu[cuda,cudnn]' brings them",
        )

    def notes_of_inspection(self, state: State) -> Sequence[str]:
        """Says that ONNX Runtime does not take the model."""
        stored = state.found(DenseModel).stored
        reason = refusal_of(stored.detached()[0])
        return () if reason is None else (f"{cannot_load(stored, reason)}; until then it cannot be pruned",)

    def operations(self, state: State, batch: Mapping[str, Any]) -> int | None:
        """Returns the operations of all contractions."""
        return count_flops(state.model, dict(batch)) if sizes_of(state) else None

    def complete(self, report: Report, state: State) -> None:
        """Says which caches became narrower."""
        model = onnx_graph(state.model)
        report.cache_shapes = model.resized_shapes(model.as_written()[0])

    def timed(self, state: State, batch: Mapping[str, Any], aimed: bool) -> Latency | str:
        """Times both models, each in a process of its own where that works."""
        if state.memory.low:
            limit = show_size(state.memory.limit)
            return f"latency was not measured: the models are too large for the memory of {limit}"
        cut, words = state.get(Cut), state.get(ChosenWords)
        feeds = [dict(batch), dict(batch) if cut is None else cut_arrays(dict(batch), cut.ends)]
        if words is not None:
            feeds = words.beside(*feeds)
        kept = state.get(KeptModel)
        models = [deployed(m, state.device) for m in (_stored(state), state.model if kept is None else kept.model)]
        try:
            budget, patience = (2.0, AIMED * PATIENCE) if aimed else (0.5, PATIENCE)
            return measure_latency(models, feeds, budget=budget, least=12, close=SPREAD, patience=patience)
        except CannotTime:
            compared = state.get(ComparedSessions)
            if compared is None:
                return "latency was not measured: the models cannot be run in processes of their own"
            sessions = [session.as_deployed() for session in (compared.dense, compared.pruned)]
            return measure_latency(sessions, feeds, budget=0.3, least=6)

    def keep_scheme(self, report: Report, state: State) -> None:
        """Writes a graph that came quantised in its scheme, and says in the report what came of it."""
        found = keep_scheme(state)
        if found is not None:
            report.kept(found)
            state.seconds["keep-scheme"] = found.seconds

    def block_repair(self) -> str:
        """Returns what stands where blocks are left out; a merged decoder has each of them twice.

        Raises:
            ModelError: it is one.
        """
        if self.state.model.merged is not None:
            raise ModelError(
                "a merged decoder has its blocks twice, in both branches; give the decoder with past keys by itself"
            )
        return super().block_repair()

    def leave_out(self, chosen: ChosenRun, repair: str) -> tuple[Backend, LeftOut]:
        """Takes the nodes of the run out of the graph.

        Raises:
            ModelError: something in it is needed behind it.
            CheckError: the result is not the original in which the map stands.
        """
        old = self.state
        trial = ReplacedBlocks(old, chosen, repair)
        caches = trial.cut()
        original = OnnxOriginal(*onnx_graph(old.model).light(), old.model.source, old.model.store)
        state = State(original.model(), None, old.device, old.progress, memory=old.memory, fresh=old.fresh)
        state.add(old.found(Opened), DenseModel(original))
        difference = trial.checked(state.model, caches)
        return replace(self, state=state), trial.entry(caches, difference)

    def choose_words(self, state: State) -> ChosenWords:
        """Returns the words that are to stay."""
        return choose_words(state.model, self.calibration, self.options)

    def cutting_words(self) -> Pass[Any]:
        """Returns what cuts the graph's tables and heads."""
        return CutVocabularyPass()

    def cut_words_alone(self, watch: MemoryWatch) -> PruneResult:
        """Cuts the vocabulary of the graph, and no width."""
        return cut_vocabulary(self, watch)

    def with_fewer_experts(self, state: State, fields: Any) -> OnnxBackend:
        """Returns the cut graph as if it had come so."""
        fewer = self.again(state)
        fewer.state.inherit(state, Opened)
        return fewer

    def again(self, state: State) -> OnnxBackend:
        """Returns the graph as it is now, as if it had come so."""
        model = onnx_graph(state.model)
        cut = OnnxOriginal(*model.light(), model.source, model.store, model.merged)
        made = cut.model()
        made.notes = list(model.notes)
        made.resized = {name: dict(sizes) for name, sizes in model.resized.items()}
        new = State(made, None, state.device, state.progress, memory=state.memory, fresh=state.fresh)
        new.add(DenseModel(cut))
        new.seconds = state.seconds
        return replace(self, state=new)

    def as_graphs(self, state: State) -> tuple[OnnxOriginal, OnnxOriginal]:
        """Returns the file as it came, and what is left of it."""
        return _stored(state), OnnxOriginal(*onnx_graph(state.model).as_written())

    def result(
        self, state: State, report: Report, changes: tuple[Change, ...], refusals: tuple[Refusal, ...]
    ) -> PruneResult:
        """Returns the cut graph; of a dry run the original."""
        small = state.get(QuantisedModel) or state.get(KeptModel)
        pruned = onnx_graph(state.model) if small is None else small.model
        model = _stored(state) if self.options.dry_run else pruned
        words, sparse = state.get(ChosenWords), self.options.sparse_storage
        return PruneResult(model, report.to_json(), changes, refusals, self.inputs, words, sparse)


def _stored(state: State) -> OnnxOriginal:
    """Returns the file as it came."""
    original = state.as_it_came()
    assert isinstance(original, OnnxOriginal)
    return original
