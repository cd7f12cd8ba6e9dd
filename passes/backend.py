"""What a run asks of an ONNX graph and of a torch module alike: the job is one (`passes.model_job`), and this is the rest.

What a backend cannot do is said by its ``cannot``, before any work, and nowhere else.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from liar_opt.frontend.blocks import Run
from liar_opt.frontend.input_files import Inputs
from liar_opt.frontend.onnx_model import OnnxOriginal
from liar_opt.passes.base import (
    Analysis,
    Change,
    DenseModel,
    Finding,
    Observer,
    Pass,
    PassResult,
    Pipeline,
    State,
    WholeModel,
)
from liar_opt.passes.choose_blocks import ChosenRun, Gap, LeftOut, gaps_of
from liar_opt.passes.chosen_passes import Chosen
from liar_opt.passes.cut_vocabulary import ChosenWords, wants_words
from liar_opt.passes.fit_runtime import fit_runtime
from liar_opt.passes.gradient_scores import Gradients, require_labels
from liar_opt.passes.groups import Refusal
from liar_opt.passes.options import PACKINGS, WHOLE_LAYERS, PruneOptions
from liar_opt.passes.plan_memory import TensorSizes
from liar_opt.passes.quantise_result import quantise_result, require_quantisable, scheme_of
from liar_opt.passes.registry import lookup
from liar_opt.passes.report import Report
from liar_opt.passes.result import PruneResult
from liar_opt.passes.tune_module import require_tuning
from liar_opt.passes.verify_model import dense_session
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.latency import Latency
from liar_opt.runtime.memory import MemoryWatch
from liar_opt.runtime.self_calibration import Author, Writer
from liar_opt.runtime.signatures import Signature

SPREAD = 0.02
"""Relative standard error of the ratio of two latencies at which they were timed long enough."""
PATIENCE = 4.0
"""Seconds for each model that its runs may take where they are slow."""
AIMED = 2.5
"""Times as long, where a time was the target."""
TIMED_SAMPLES = 8
"""How many of a batch are timed, and counted in its FLOPs."""


def inputs_of(model: Any, calibration: Any, options: PruneOptions) -> Inputs:
    """Returns what a run reads."""
    return Inputs((model,), calibration, (options.tokenizer,), (options.custom_ops, options.vocabulary))


@dataclass(eq=False)
class Backend(ABC):
    """An opened model, with what differs between kinds of them.

    Attributes:
        state: the model as it was opened, on which nothing ran yet.
        calibration: what was given as calibration data, with the names of the model's inputs.
        options: of the run; what the model itself says is filled in.
        inputs: what the run reads.
    """

    cannot: ClassVar[Mapping[str, str]] = {}
    """Why an option does not work, by its name."""
    opened: ClassVar[tuple[type[Finding], ...]] = ()
    """What was found when it was opened: a run that starts again needs it, too."""
    gradients: ClassVar[bool] = False
    """Whether scores may need gradients."""

    state: State
    calibration: Any
    options: PruneOptions
    inputs: Inputs

    @classmethod
    @abstractmethod
    def open(cls, model: Any, calibration: Any, options: PruneOptions) -> Backend:
        """Opens a model, for options that are possible.

        Raises:
            ModelError: it cannot be read.
            OptionError: an option does not fit it.
        """

    @classmethod
    def require_possible(cls, calibration: Any, options: PruneOptions) -> None:
        """Checks options that need no model.

        Raises:
            OptionError: one does not work here, is unknown, or does not fit another.
        """
        require_labels(options.score, options.loss, options.labelled, cls.gradients)
        lookup("packing", dict.fromkeys(PACKINGS), options.packing)
        if options.small_tokenizer and not wants_words(options):
            raise OptionError("small-tokenizer goes with --vocabulary or --vocabulary-coverage, which say what words stay")
        lookup("whole-layers", dict.fromkeys(WHOLE_LAYERS), options.whole_layers)
        require_quantisable(options)
        for name, reason in cls.cannot.items():
            if options.given(name):
                raise OptionError(reason)
        require_tuning(options, calibration)

    @abstractmethod
    def choose(self) -> Chosen:
        """Returns the passes behind the analysis.

        Raises:
            OptionError: options exclude each other.
        """

    @abstractmethod
    def analysis(self) -> list[Pass[Any]]:
        """Returns the passes that find the groups, in a model as it was opened."""

    def narrowing(self, required: bool = True) -> list[Pass[Any]]:
        """Returns the passes that say which widths groups may have; ``required``: of a run, not of an inspection."""
        return fit_runtime(self.options)

    def analyse(self, state: State, observer: Observer | None = None, load: bool = False) -> PassResult:
        """Runs the analysis; with ``load`` the original is loaded meanwhile, where that takes long.

        Raises:
            ModelError: the model is at fault.
        """
        return Pipeline(passes=self.analysis(), observer=observer)(state)

    def analysed_so(self) -> Analysis:
        """Returns how copies of the model are analysed."""
        return Analysis((*self.analysis(), *self.narrowing()), (*self.opened, Gradients))

    @abstractmethod
    def positions(self, state: State) -> int | None:
        """Returns how long made-up inputs may be; None where nothing limits them."""

    def author(self, state: State) -> tuple[Callable[[], Any], Callable[[Any, Signature], Author]]:
        """Returns what loads the model that may write its own calibration text, and what makes a writer of it."""
        return lambda: dense_session(state), Writer.of

    def anew(self, old: State, notes: Sequence[str]) -> State:
        """Returns the state as it was when the model was opened; ``notes`` are those of then."""
        model = old.found(DenseModel).original.model()
        model.notes = list(notes)
        state = State(model, None, old.device, old.progress, memory=old.memory, fresh=old.fresh)
        state.inherit(old, *self.opened)
        state.seconds = old.seconds
        return state

    def block_repair(self) -> str:
        """Returns what stands where blocks are left out: "map", "fold" or "none".

        Raises:
            OptionError: it is not possible.
        """
        asked = self.options.block_repair
        return asked if asked != "auto" else "none" if self.options.repair == "none" else "map"

    def gaps(self, runs: Sequence[Run], repair: str) -> list[Gap]:
        """Returns where each run of blocks would go, of those that can.

        Raises:
            ModelError: none can.
        """
        return gaps_of(self.state, runs, repair)

    @abstractmethod
    def leave_out(self, chosen: ChosenRun, repair: str) -> tuple[Backend, LeftOut]:
        """Returns a backend of the model without a run of blocks, which was checked, and what the report says of them.

        Raises:
            ModelError: it cannot be left out.
            CheckError: the result is not the original in which the map stands.
        """

    def same_outputs(self, left: Backend) -> dict[str, str]:
        """Returns by what names the original has the outputs of what is left of it; none where they are the same."""
        return {}

    def operations_before(self, state: State, batch: Mapping[str, Any]) -> int | None:
        """Returns the operations of the model as it came; None where they cannot be counted."""
        if state.get(WholeModel) is None:
            return self.operations(state, batch)
        model = state.as_it_came().model()
        model.normalise()
        whole = State(model, state.calibration, state.device)
        whole.inherit(state, TensorSizes)
        return self.operations(whole, batch)

    @abstractmethod
    def choose_words(self, state: State) -> ChosenWords:
        """Returns the words that are to stay, where a vocabulary is to be cut.

        Raises:
            ModelError: the model has no table that token ids look up.
            OptionError: the vocabulary cannot be read or does not fit the model, or nothing would be left, or nothing go.
        """

    @abstractmethod
    def cutting_words(self) -> Pass[Any]:
        """Returns the pass that cuts them."""

    @abstractmethod
    def cut_words_alone(self, watch: MemoryWatch) -> PruneResult:
        """Cuts the vocabulary, and no width; see `passes.vocabulary_job`."""

    def require_sayable(self, state: State, ratio: float) -> Any:
        """Returns what a configuration must say of fewer experts, if there is one.

        Raises:
            OptionError: it has no field for that.
        """
        return None

    @abstractmethod
    def with_fewer_experts(self, state: State, fields: Any) -> Backend:
        """Returns a backend of the model whose experts were cut, as if it had come so.

        Args:
            state: behind the cut.
            fields: what ``require_sayable`` has returned.

        Raises:
            ModelError: the module's own code does not fit fewer experts, and a checkpoint is asked for.
        """

    @abstractmethod
    def again(self, state: State) -> Backend:
        """Returns what goes on with the model as it is now, as if it had come so.

        Raises:
            ModelError: a module cannot be traced again.
        """

    def fitting(self) -> list[Pass[Any]]:
        """Returns the passes that give a module the weights of its graph; they add to a ``Verification``."""
        return []

    @property
    @abstractmethod
    def device(self) -> str:
        """What measures."""

    @property
    def where(self) -> str:
        """What was asked to measure."""
        return self.options.provider

    def notes(self, state: State) -> Sequence[str]:
        """Returns what a user should know of how the run is made."""
        return ()

    def notes_of_inspection(self, state: State) -> Sequence[str]:
        """Returns what a user should know before a run."""
        return ()

    @abstractmethod
    def operations(self, state: State, batch: Mapping[str, Any]) -> int | None:
        """Returns the floating-point operations of the model as it is now; None where they cannot be counted."""

    @abstractmethod
    def complete(self, report: Report, state: State) -> None:
        """Says of the result what this kind of model has beside."""

    @abstractmethod
    def timed(self, state: State, batch: Mapping[str, Any], aimed: bool) -> Latency | str:
        """Times the dense and the pruned model side by side; returns a sentence where that is not possible.

        Args:
            state: behind the checks.
            batch: what they run on.
            aimed: whether a time was the target: it is measured longer then.
        """

    def note_times(self, report: Report, state: State, batch: Mapping[str, Any], aimed: bool = False) -> None:
        """Times both models for the report, or says there why not; see `timed`."""
        began = time.perf_counter()
        times = self.timed(state, batch, aimed)
        if isinstance(times, str):
            report.note(times)
            return
        report.timed(times)
        state.seconds["latency"] = time.perf_counter() - began

    def keep_scheme(self, report: Report, state: State) -> None:
        """Writes a model that came quantised in its scheme, and says in the report what came of it; no other does."""
        del report, state

    @abstractmethod
    def as_graphs(self, state: State) -> tuple[OnnxOriginal, OnnxOriginal]:
        """Returns the dense and the pruned model as ONNX, as they would be written."""

    def quantise(self, report: Report, state: State, batch: Mapping[str, Any]) -> None:
        """Quantises the result where that was asked for, and says in the report what came of it; see `quantise_result`."""
        scheme = scheme_of(self.options)
        if scheme is not None:
            dense, pruned = self.as_graphs(state)
            report.quantised = quantise_result(state, scheme, dense, pruned, batch, self.options.latency)
            state.seconds["quantise"] = report.quantised.seconds

    @abstractmethod
    def result(
        self, state: State, report: Report, changes: tuple[Change, ...], refusals: tuple[Refusal, ...]
    ) -> PruneResult:
        """Returns what the user gets; without changes of a dry run the model as it came."""
