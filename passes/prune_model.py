"""The whole job behind one function: :func:`prune` takes a model and calibration data and gives a smaller model.

:func:`inspect` stops after the analysis. Both return plain data (:attr:`PruneResult.report`, schema version
:data:`SCHEMA`) beside the model, so that a report never needs the code that made it.
"""

import functools
import hashlib
import importlib.metadata
import math
import platform
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import onnx

from liar_opt.frontend.causal import is_causal, positions
from liar_opt.frontend.genai_config import write_config
from liar_opt.frontend.input_files import Inputs
from liar_opt.frontend.live_memory import live_bytes, tensor_sizes
from liar_opt.frontend.onnx_model import OnnxModel, Stored
from liar_opt.frontend.sound_model import why_invalid
from liar_opt.frontend.tables import looked_up, vocabulary
from liar_opt.frontend.walk import count_flops, walk_sized
from liar_opt.frontend.weight_files import MAP_FROM, completed, lightened, write_model
from liar_opt.passes.allocate_widths import NAMED, note_widths
from liar_opt.passes.base import (
    Change,
    DenseModel,
    Observer,
    Opened,
    Pass,
    PassResult,
    Pipeline,
    Progress,
    State,
    no_progress,
)
from liar_opt.passes.blank_cut import deployed
from liar_opt.passes.checkpoint import Checkpoint, Digests, digests_of
from liar_opt.passes.chosen_passes import passes_of_options, passes_of_text
from liar_opt.passes.curves import Curves
from liar_opt.passes.find_groups import FindGroupsPass
from liar_opt.passes.gradient_scores import Labelled, Loss, require_labels
from liar_opt.passes.groups import KINDS, ChannelGroup, Refusal, parameters_left
from liar_opt.passes.limit_drop import LimitDropPass, LimitedDrop, Metric
from liar_opt.passes.measure_curves import curve_report
from liar_opt.passes.meet_target import MeetTargetPass, MetTarget
from liar_opt.passes.normalise_graph import NormaliseGraphPass
from liar_opt.passes.plan_memory import TensorSizes, sizes_of
from liar_opt.passes.prove_groups import Faults, Proof, ProveGroupsPass, leave_alone, refusals_of
from liar_opt.passes.prune_groups import HELD_BACK, Cut, cut_arrays
from liar_opt.passes.registry import lookup
from liar_opt.passes.repairs import AWARE, RepairFunction
from liar_opt.passes.scores import ScoreFunction
from liar_opt.passes.search_widths import Searched
from liar_opt.passes.verify_model import (
    ComparedSessions,
    DenseSession,
    Verification,
    cannot_load,
    dense_session,
    first_samples,
    load_dense,
    require_runs,
)
from liar_opt.runtime.calibration_data import CalibrationData, load_calibration
from liar_opt.runtime.errors import CheckError, GroupFault, InternalError, ModelError, OptionError
from liar_opt.runtime.latency import CannotTime, measure_latency
from liar_opt.runtime.later import later
from liar_opt.runtime.memory import LARGE_MODEL, Memory, MemoryWatch, anonymous, show_size
from liar_opt.runtime.places import Places
from liar_opt.runtime.self_calibration import SELF, write_calibration
from liar_opt.runtime.sessions import custom_operators, device_unused, refusal_of, resolve_provider
from liar_opt.runtime.signatures import InputSpec
from liar_opt.runtime.synthetic_inputs import IMAGE_SIZES

SCHEMA = 1
PACKINGS = ("auto", "on", "off")
SPREAD = 0.02
"""Relative standard error of the ratio of two latencies at which they were timed long enough."""
TIMED_SAMPLES = 8
"""How many of a batch are timed, and counted in its FLOPs."""
SESSIONS = 3
"""So many hold the memory of a batch at a time, which ONNX Runtime keeps: of the dense model, and of two segments."""
BASE = 1 << 26
"""What a process has before the work is counted in steps of this."""
LEAST_BATCHES = 3
"""One to measure a loss on, one to choose the ridge on, and one to fit to."""
SIDE_BY_SIDE = 6
"""Batches that are made smaller leave room for so many: three sessions check the result, each takes about twice as much."""


@dataclass(frozen=True)
class CalibrationOptions:
    """Where the calibration data comes from and how it is batched; see ``calibration_batches.CalibrationJob``."""

    source: Any = None
    tokenizer: str | Path | None = None
    text_column: str | None = None
    samples: int = 512
    batch_size: int = 32
    sequence_length: int | None = None
    mask_input: str | None = None
    seed: int = 0
    packing: str = "auto"


@dataclass(eq=False)
class Inspection:
    """What an analysis found: groups in execution order and what does not qualify."""

    model: OnnxModel
    groups: tuple[ChannelGroup, ...]
    refusals: tuple[Refusal, ...]
    report: dict[str, Any]


@dataclass(eq=False)
class PruneResult:
    """A pruned model and what was done to it.

    Attributes:
        pruned: the pruned model; its weights stay in their files where they are long.
        report: plain data, ready for JSON: options, sizes before and after, groups, refusals, measured differences.
        changes: what the passes did.
        refusals: what did not qualify, and why.
        inputs: what the run read; no result is written there.
    """

    pruned: OnnxModel | Stored
    report: dict[str, Any]
    changes: tuple[Change, ...] = field(default_factory=tuple)
    refusals: tuple[Refusal, ...] = field(default_factory=tuple)
    inputs: Inputs = field(default_factory=Inputs)

    @functools.cached_property
    def model(self) -> onnx.ModelProto:
        """The pruned model as an ONNX proto, with all its weights in memory; made when it is first asked for."""
        return completed(*self.pruned.as_written())

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Writes the model, whole or not at all, with GenAI's configuration where the input has one beside it.

        Weights above 2 GiB are written beside it, as ``PATH.data``, or ``PATH.<8 digits>.data`` where there is such a file.

        Raises:
            OptionError: the path is that of a file that the input consists of (its external data, the calibration data),
                exists (without ``force``), is no plain file (links are not followed), or cannot be written.
        """
        path = Path(path)
        source = self.report["model"]["path"]
        check_output(path, Path(source) if source else None, force, self.inputs)
        # Whoever has asked for the proto may have changed it.
        parts = lightened(self.model) if "model" in vars(self) else self.pruned.as_written()
        try:
            write_model(*parts, path, keep=[file for file, _ in self.inputs.files()])
        except OSError as err:
            raise OptionError(
                f"'{path}' cannot be written ({err.strerror or err}); free space or choose another path; nothing was left"
            ) from err
        left = write_config(Path(source), path, self.report["groups"]) if source and "after" in self.report else None
        if left is not None:
            self.report["model"]["notes"].append(left)
        return path


def check_output(path: Path, source: Path | None, force: bool, inputs: Inputs | None = None) -> None:
    """Checks that a result may be written to ``path``.

    Raises:
        OptionError: it is the input or a file of it, exists without ``force``, is a folder, a link or no file, or its
            own folder does not exist.
    """
    known = Inputs(models=(source,)) if inputs is None else inputs
    Places(known.files).file(path, "output", replace=force, probe=False)


def load_state(model: str | Path | onnx.ModelProto | OnnxModel, memory: int | str | None = None) -> State:
    """Takes a model from a path or from memory; where its weights are is kept for the checks.

    Raises:
        ModelError: it cannot be read.
    """
    limit = Memory.of(memory)
    if isinstance(model, OnnxModel):
        loaded = model
    elif isinstance(model, onnx.ModelProto):
        loaded = OnnxModel.from_proto(model)
    elif isinstance(model, (str, Path)):
        # Of what is large beside the limit nothing is copied.
        loaded = OnnxModel.load(model, min(MAP_FROM, limit.limit // LARGE_MODEL))
    else:
        raise OptionError(f"a model is a path or an onnx.ModelProto, not {type(model).__name__}")
    if not loaded.graph.inputs:
        raise ModelError(f"'{loaded.source}' has no inputs; there is nothing to measure")
    state = State(loaded, memory=limit)
    source = loaded.source
    digest = later(lambda: _sha256(source)) if source is not None and source.is_file() else None
    state.memory.model = loaded.weight_bytes()
    stored = loaded.stored if loaded.stored is not None else Stored(*loaded.light())
    if state.memory.tight:
        loaded.align(state.memory.store)
        loaded.store = state.memory.store
    state.add(DenseModel(replace(stored, store=loaded.store)), Opened(_sizes(loaded), digest))
    return state


def is_module_source(model: Any) -> bool:
    """Returns whether a model is a torch module, the folder of a checkpoint, or a hub name, and no ONNX file."""
    if isinstance(model, (str, Path)):
        named = re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)) is not None and Path(model).suffix != ".onnx"
        return Path(model).is_dir() or (named and not Path(model).exists())
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(model, torch.nn.Module)


def inspect(
    model: Any,
    *,
    example: Any = None,
    allow_pickle: bool = False,
    custom_ops: str | Path | Sequence[str | Path] | None = None,
) -> Inspection:
    """Finds the channel groups of a model; changes and measures nothing.

    Args:
        model: as for :func:`prune`.
        example: a batch to trace a torch module with, if nothing else says what it takes.
        allow_pickle: whether the weights of a checkpoint may be read from pickle files.
        custom_ops: as for :func:`prune`.

    Raises:
        ModelError: the model cannot be read.
        OptionError: a library of operators cannot be loaded.
    """
    if custom_ops is not None:
        with custom_operators([custom_ops] if isinstance(custom_ops, (str, Path)) else custom_ops):
            return inspect(model, example=example, allow_pickle=allow_pickle)
    if is_module_source(model):
        from liar_opt.passes.prune_module import inspect_module

        return inspect_module(model, example=example, allow_pickle=allow_pickle)
    state = load_state(model)
    result = _analysed(state)
    report = _report_head(state)
    stored = state.found(DenseModel).stored
    reason = refusal_of(stored.detached()[0])
    if reason is not None:
        report["model"]["notes"].append(f"{cannot_load(stored, reason)}; until then it cannot be pruned")
    report["groups"] = [_group(g) for g in state.groups]
    report["values"] = [_group(g) for g in (*state.values, *state.queries)]
    report["prunable_parameters"] = round(parameters_left(state.groups))
    report["refusals"] = [asdict(r) for r in result.refusals]
    return Inspection(state.model, state.groups, result.refusals, report)


def prune(
    model: Any,
    calibration: Any = None,
    *,
    sparsity: float | None = None,
    ffn: float | None = None,
    heads: float | None = None,
    values: float | None = None,
    query_key: float | Literal["auto"] | None = None,
    recurrent: float | None = None,
    value_cut: str = "rotate",
    multiple_of: int = 8,
    target: str | None = None,
    max_drop: float | str | None = None,
    metric: Metric | None = None,
    allocate: str | None = None,
    search: float | None = None,
    passes: str | None = None,
    score: str | ScoreFunction = "greedy",
    repair: str | RepairFunction = "liar",
    ridge: float | None = None,
    weighting: str = "stream",
    tokenizer: str | Path | None = None,
    text_column: str | None = None,
    samples: int = 512,
    batch_size: int = 32,
    sequence_length: int | None = None,
    mask_input: str | None = None,
    example: Any = None,
    checkpoint: bool | None = None,
    uniform: bool | None = None,
    new_bias: bool | None = None,
    allow_pickle: bool = False,
    packing: str = "auto",
    backend: str = "torch",
    loss: Loss | None = None,
    labelled: Labelled | None = None,
    provider: str = "auto",
    memory: int | str | None = None,
    custom_ops: str | Path | Sequence[str | Path] | None = None,
    resume: str | Path | None = None,
    fresh: bool = False,
    seed: int = 0,
    latency: bool = True,
    dry_run: bool = False,
    progress: Progress = no_progress,
    observer: Observer | None = None,
) -> PruneResult:
    """Makes a trained transformer smaller: removes channels and heads, repairs the rest by least squares.

    Args:
        model: path of an ONNX file, a model in memory, a torch module, the folder of a transformers checkpoint or its hub
            name; it is not changed.
        calibration: a path (.txt, .jsonl, .csv, .npz, folder of .npy, saved dataset), a dataset name, texts, feeds,
            "self" (a decoder writes its own text), or None for synthetic inputs.
        sparsity: fraction of all prunable parameters to remove, in [0, 1); 0.3 if nothing is asked for.
        ffn: fraction of the feed-forward width, and of channels between convolutions, to remove, in [0, 1).
        heads: fraction of the attention heads to remove, in [0, 1).
        values: fraction of the width of values within each head to remove, in [0, 1); each head keeps its own.
        query_key: fraction of the width of queries and keys within each head to remove, in [0, 1), where no rotary
            embedding or normalisation stands between projection and product; "auto" lets them share in a sparsity,
            a target or max_drop, by error curves.
        recurrent: fraction of the units of RNN, GRU and LSTM, and of the channels that they read, to remove, in [0, 1).
        value_cut: "rotate" keeps the best subspace of the values, "select" some of their channels.
        multiple_of: kept feed-forward widths are multiples of this.
        target: what the result shall be, instead of a ratio: params=10M, size=40MB, flops=0.5x, latency=2x (twice as fast),
            or latency=5ms.
        max_drop: the largest loss, such as 1% or 0.01, instead of a ratio: as much is removed as it allows. Without a
            metric it is 1 - the mean cosine of the first output on held-back calibration batches.
        metric: a function that takes a model (an ONNX proto) and returns a number, the higher the better; max_drop is
            relative to its value on the dense model then.
        allocate: how a ratio is shared out over the layers: "uniform" takes it of each, "curves" by the error that each
            width leaves in the output after repair, "global" and "flap" by the scores; if None, "curves" for a sparsity
            where there is calibration data, else "uniform".
        search: seconds, at the most, to exchange widths between groups from there, by the measured error of the output.
        passes: the passes that run, with their options, as allocate-widths{ffn=0.5},prune-groups{repair=bias}, instead of
            the options that are theirs; the analysis and the check of the result always run.
        score: which blocks stay; see ``registry.SCORES``, or a function of your own: it gets the group's consumers
            (``registry.Measured``) and returns one number a block, the higher the more it is kept.
        repair: what the rest becomes; see ``registry.REPAIRS``, or a function: it gets a consumer, the kept and the removed
            channels, and returns the new weights [kept, m] and what to add to the bias [m].
        ridge: relative ridge of the repair; None chooses it on held-back calibration rows.
        weighting: "stream" weights calibration rows as the normalisation behind them will; "none" counts them alike.
        tokenizer: folder of a Hugging Face tokenizer, needed for texts.
        text_column: the column with the text, for .jsonl, .csv and datasets.
        samples: calibration samples at most.
        batch_size: samples a batch.
        sequence_length: tokens of a sample at most.
        mask_input: the input that is zero at padding; found by itself if None.
        example: a batch to trace a torch module with, if nothing else says what it takes.
        checkpoint: whether a pruned module must be one that stock transformers loads; true for its models if None.
        uniform: layers keep the same width; if None as a checkpoint needs it.
        new_bias: layers without a bias may get one for the repair; if None unless a checkpoint has no place for it.
        allow_pickle: read weights from pickle files, which can run code.
        packing: whether texts are written behind each other and cut into full windows: "on", "off", or "auto", which
            does so where the model is causal.
        loss: for the scores that need gradients (torch modules alone): takes the outputs by name and the labels, and
            returns a scalar tensor.
        labelled: pairs of the module's arguments, a batch by name, and the labels that the loss takes.
        backend: what measures a torch module: "torch", or "onnxruntime" on its export.
        provider: "auto", "cpu" or "cuda".
        memory: what the work may take beside the files that it maps, in bytes or as 2GB or 512MiB; half of what is free if
            None.
        custom_ops: shared libraries with operators that ONNX Runtime lacks and the model needs; they run code.
        resume: a folder in which finished segments are kept: a run that was interrupted goes on from the last one. It is
            made where it is not there, and removed when the run is done.
        fresh: measure error curves and latency tables again, instead of taking those that an earlier run on the same model
            and data has kept in the cache folder.
        seed: for all that is drawn.
        latency: whether to time the dense and the pruned model.
        dry_run: stop after the widths are decided; the result holds the unpruned model.
        progress: called with (stage, done, total).
        observer: called after each pass with the pass and its result.

    Returns:
        The pruned model with its report.

    Raises:
        ModelError: the model cannot be read or has nothing to prune.
        OptionError: an option or the calibration data does not fit.
        CheckError: the result failed a check.
    """
    arguments = dict(locals())
    if is_module_source(model):
        from liar_opt.passes.prune_module import prune_module

        return prune_module(**arguments)
    if custom_ops is not None:
        libraries = [custom_ops] if isinstance(custom_ops, (str, Path)) else custom_ops
        with custom_operators(libraries):
            return prune(**{**arguments, "custom_ops": None})
    require_labels(score, loss, labelled, torch_module=False)
    lookup("packing", dict.fromkeys(PACKINGS), packing)
    return _Job(arguments).run()


def inputs_of(arguments: Mapping[str, Any]) -> Inputs:
    """Returns what arguments of :func:`prune` name as the input."""
    more = (arguments.get("custom_ops"),)
    return Inputs((arguments["model"],), arguments["calibration"], (arguments["tokenizer"],), more)


class _Job:
    """One run of :func:`prune` on an ONNX model: it starts again without groups that a fault of ours lies in.

    Args:
        arguments: those of ``prune``, by name.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.arguments = arguments
        self.start, self.watch = time.perf_counter(), MemoryWatch()
        self.state = load_state(arguments["model"], arguments["memory"])
        self.state.progress, self.state.fresh = arguments["progress"], arguments["fresh"]
        self.state.device = resolve_provider(arguments["provider"])
        if arguments["passes"] is None:
            self.chosen = passes_of_options(arguments)
        else:
            self.chosen = passes_of_text(arguments["passes"], arguments, prune.__kwdefaults__ or {})
        self.target = self.chosen.widths.target if isinstance(self.chosen.widths, MeetTargetPass) else None
        self.limited = isinstance(self.chosen.widths, LimitDropPass)
        if arguments["resume"] is not None and (self.limited or self.chosen.cut.repair in AWARE):
            raise OptionError("resume works with ratios or a target, and with repairs that do not look at the dense model")
        named = ("tokenizer", "text_column", "samples", "batch_size", "sequence_length", "mask_input", "seed", "packing")
        self.options = CalibrationOptions(arguments["calibration"], **{name: arguments[name] for name in named})
        self.notes = list(self.state.model.notes)
        self.faults: dict[str, str] = {}
        self.data: CalibrationData | None = None
        self.dropped = 0

    def run(self) -> PruneResult:
        """Runs, and again without what turned out to be wrong.

        Raises:
            CheckError: nothing was left to cut.
        """
        while True:
            try:
                return self._attempt()
            except GroupFault as fault:
                news = {name: reason for name, reason in fault.reasons.items() if name not in self.faults}
                if not news:
                    raise
                self.faults |= news
                if self.state.checkpoint is not None:
                    self.state.checkpoint.remove()
            finally:
                if self.state.checkpoint is not None:
                    self.state.checkpoint.close()
            self.state = self._anew()

    def _anew(self) -> State:
        """Returns the state as it was when the model was loaded."""
        old = self.state
        model = old.found(DenseModel).stored.model()
        model.notes = list(self.notes)
        state = State(model, None, old.device, old.progress, memory=old.memory, fresh=old.fresh)
        state.inherit(old, Opened, DenseModel, DenseSession, Digests)
        state.seconds = old.seconds
        return state

    def _attempt(self) -> PruneResult:
        """Runs the passes once."""
        state, chosen, target, observer = self.state, self.chosen, self.target, self.arguments["observer"]
        report = self._head()
        analysis = _analysed(state, observer, load=not state.memory.tight)
        state.model.settle()
        refusals = [*analysis.refusals, *self._leave_alone()]  # asks for groups, before any work
        dense_session(state)
        resume, dry_run = self.arguments["resume"], self.arguments["dry_run"]
        early = chosen.curves is not None or target is not None or resume is not None
        if early:
            self._load_calibration(report)
        if resume is not None:
            seconds = None if chosen.search is None else chosen.search.search
            state.checkpoint = Checkpoint.open(Path(resume), _identity(state, report, seconds))
        flops = _flops(state, target)
        decided, proofs = self._decide(report, early)
        refusals += proofs
        report["refusals"] = [asdict(r) for r in refusals]
        if dry_run:
            report["groups"] = [{**_group(g), "after": state.keep[g.name]} for g in state.groups]
            report["prunable"] = prunable(state)
            return PruneResult(state.found(DenseModel).stored, report, (), tuple(refusals), inputs_of(self.arguments))
        if not early:
            flops = _flops(state, target)
        assert state.calibration is not None
        report["resumed"] = state.checkpoint.done if state.checkpoint is not None else 0
        try:
            done = _run(state, chosen.cutting, observer)
        except CheckError as err:
            raise GroupFault(self._culprits(err)) from err
        changes = (*decided, *done.changes)
        refusals += done.refusals
        report["refusals"] = [asdict(r) for r in refusals]
        self._finish(report, changes, flops)
        return PruneResult(state.model, report, changes, tuple(refusals), inputs_of(self.arguments))

    def _head(self) -> dict[str, Any]:
        """Returns the report's first part: what was asked for, and of what."""
        state, arguments = self.state, self.arguments
        report = _report_head(state)
        report["options"] = _options([self.chosen.widths, self.chosen.cut], self.options, arguments["provider"])
        report["seed"] = arguments["seed"]
        report["device"] = state.device
        if arguments["provider"] == "auto" and device_unused(state.device):
            report["model"]["notes"].append(
                "the CPU was used: this machine has a CUDA device, but the libraries that ONNX Runtime needs for it were "
                "not found; pip install 'onnxruntime-gpu[cuda,cudnn]' brings them"
            )
        return report

    def _leave_alone(self) -> tuple[Refusal, ...]:
        """Takes out the groups whose cut turned out to be wrong.

        Raises:
            CheckError: nothing is left.
        """
        leave_alone(self.state, self.faults)
        try:
            self.chosen.widths.requires(self.state)
        except ModelError as err:
            if not self.faults:
                raise
            name, reason = next(iter(self.faults.items()))
            raise CheckError(
                f"no group that could be cut is left: cutting '{name}' would be wrong ({reason}); nothing was written; "
                "please report the model's structure as a bug"
            ) from err
        return refusals_of(self.faults)

    def _culprits(self, error: CheckError) -> dict[str, str]:
        """Returns the groups whose cut fails the check of the result.

        What was cut is rehearsed on the samples that it failed on. Where that is right, the numbers are at fault, and not
        the cut: the groups that lost most go, twice as many each time.
        """
        cut, state = self.state, self._anew()
        Pipeline(passes=[NormaliseGraphPass(), FindGroupsPass()])(state)
        state.calibration = cut.calibration
        assert cut.calibration is not None
        proof = Proof(state, self.chosen.cut, [first_samples(state, cut.calibration.batches[0], 4)])
        done = cut.get(Cut)
        if done is None:
            raise error
        blocks = done.blocks
        faults = proof.faults({name: cut.keep[name] for name in blocks}, blocks)
        if faults:
            return faults
        self.dropped = 2 * self.dropped or 1
        worst = sorted(done.lost, key=lambda name: -done.lost[name])[: self.dropped]
        if not worst:
            raise error
        return dict.fromkeys(worst, str(error).partition(";")[0])

    def _load_calibration(self, report: dict[str, Any]) -> None:
        state, began = self.state, time.perf_counter()
        if self.data is None:
            self.data = _calibrate(state, self.options)
            if self.limited:  # what is lost is measured on rows that nothing is fitted to
                self.data = divided(self.data, state.analysed().input_specs())
        state.calibration = _fitted(state, self.data, report)
        require_runs(state, dense_session(state))
        state.seconds["load-calibration"] = state.seconds.get("load-calibration", 0.0) + time.perf_counter() - began
        report["calibration"] = _calibration_report(state.calibration)

    def _decide(self, report: dict[str, Any], early: bool) -> tuple[list[Change], list[Refusal]]:
        """Decides the widths of groups whose cut is proved; returns what was changed, and what is left alone."""
        state, chosen, observer = self.state, self.chosen, self.arguments["observer"]
        checkpoint = state.checkpoint
        if checkpoint is not None and checkpoint.decided is not None:
            self.faults |= checkpoint.decided.get("left alone", {})
            left = self._leave_alone()
            note_widths(state, {name: int(keep) for name, keep in checkpoint.decided["keep"].items()})
            report.update(checkpoint.decided["report"])
            return [], list(left)
        refusals: list[Refusal] = []
        if early:
            refusals += self._prove(ProveGroupsPass(chosen.cut))
        while True:
            state.groups = tuple(g for g in state.groups if g.kind in KINDS)  # values join them where they are cut
            decided = _run(state, chosen.deciding, observer)
            if state.calibration is None and not self.arguments["dry_run"]:
                self._load_calibration(report)
            proved = [] if self.limited else self._prove(ProveGroupsPass(chosen.cut, decided=True))
            if not proved:
                break
            refusals += proved
        known = report["model"]["notes"]
        known += [note for note in state.model.notes if note not in known]
        curves = state.get(Curves)
        if curves is not None:
            report["curves"] = curve_report(state.groups, curves.by_group)
        if curves is not None and curves.kept:
            report["model"]["notes"].append(
                "the error curves are those of an earlier run on the same data; --fresh measures them again"
            )
        met, searched = state.get(MetTarget) or state.get(LimitedDrop), state.get(Searched)
        report |= {name: asdict(found) for name, found in (("target", met), ("search", searched)) if found is not None}
        if checkpoint is not None:
            said = {fact: report[fact] for fact in ("curves", "target", "search") if fact in report}
            keep = {name: int(keep) for name, keep in state.keep.items()}
            checkpoint.decide({"keep": keep, "report": said, "left alone": self.faults})
        return list(decided.changes), refusals

    def _prove(self, step: ProveGroupsPass) -> list[Refusal]:
        """Leaves groups alone whose cut is wrong; returns why."""
        result = Pipeline(passes=[step], observer=self.arguments["observer"])(self.state)
        self.faults |= self.state.found(Faults).reasons
        self._leave_alone()
        return list(result.refusals)

    def _finish(self, report: dict[str, Any], changes: Sequence[Change], flops: int | None) -> None:
        """Fills in what is known when everything is done."""
        state, target = self.state, self.target
        details = {c.where: c for c in changes}
        report["groups"] = [_pruned_group(g, details.get(g.name)) for g in state.groups]
        report["prunable"] = prunable(state)
        report["model"]["notes"] += unrepaired(report, self.chosen.cut.repair)
        gaps = [c["calibration_gap"] for g in report["groups"] for c in g.get("repairs", ())]
        known = [gap for gap in gaps if gap is not None]
        report["calibration"]["gap"] = sum(known) / len(known) if known else None
        report["cache_shapes"] = state.model.resized_shapes(state.model.as_written()[0])
        report["before"]["flops"] = flops
        report["after"] = {**_sizes(state.model), "flops": _flops(state, target)}
        report["verification"] = state.found(Verification).to_json()
        if self.arguments["latency"] and state.memory.tight:
            report["model"]["notes"].append(
                f"latency was not measured: the models are too large for the memory of {show_size(state.memory.limit)}"
            )
        elif self.arguments["latency"]:
            began = time.perf_counter()
            batch = _one_batch(state, target)
            feeds = [batch, cut_arrays(batch, state.found(Cut).ends)]
            models = [deployed(model, state.device) for model in (state.found(DenseModel).stored, state.model)]
            try:
                times = measure_latency(models, feeds, budget=1.0 if target is None else 2.0, least=12, close=SPREAD)
            except CannotTime:
                compared = state.found(ComparedSessions)
                sessions = [session.as_deployed() for session in (compared.dense, compared.pruned)]
                times = measure_latency(sessions, feeds, budget=0.3, least=6)
            report["latency"] = {
                "dense_seconds": times.seconds[0],
                "pruned_seconds": times.seconds[1],
                "speedup": times.speedup,
                "runs": times.runs,
                "batch": times.batch,
                "spread": times.spread if math.isfinite(times.spread) else None,
                "apart": times.apart,
            }
            state.seconds["latency"] = time.perf_counter() - began
        report["memory"] = {
            "limit": state.memory.limit,
            "estimated_peak": state.memory.estimated,
            "anonymous_peak": self.watch.anonymous,
            "resident_peak": self.watch.resident,
            "on_disk": state.memory.store.bytes,
        }
        report["seconds"] = {**state.seconds, "total": time.perf_counter() - self.start}
        if state.checkpoint is not None:
            state.checkpoint.remove()


def _identity(state: State, report: dict[str, Any], search: float | None) -> dict[str, Any]:
    """Returns what must be the same for an interrupted run to go on."""
    digests = digests_of(state)
    options = {name: dict(values) for name, values in report["options"].items() if isinstance(values, dict)}
    for place in ("source", "tokenizer"):  # what was read from there is compared
        options["calibration"].pop(place, None)
    return {
        "model": digests["model"],
        "seed": report["seed"],
        "search": search,
        **options,
        "calibration data": digests["calibration data"],
        "device": state.device,
        "lean sessions": state.memory.tight,
        "liar-opt": report["liar_opt"],
    }


def _fitted(state: State, data: CalibrationData, report: dict[str, Any]) -> CalibrationData:
    """Returns the data in smaller batches where what is alive in the model, run on one, takes more than may be used."""
    dynamic = all(not i.shape or not isinstance(i.shape[0], int) for i in state.analysed().input_specs())
    whole = walk_sized(state.model, data.batches[0]) if dynamic else None
    if whole is None:
        return data
    sizes = tensor_sizes(whole)
    need = live_bytes(state.model.graph.nodes, sizes)
    samples = max((len(value) for value in data.batches[0].values() if value.ndim), default=1)
    room, sessions = state.memory.limit, 1
    if state.memory.asked:  # beside what the process has; in steps, so that a run that goes on makes the same batches
        room = max(room - -(-(anonymous() or 0) // BASE) * BASE, room // 4)
        sessions = SESSIONS
    if sessions * need <= room or samples == 1:
        state.add(TensorSizes(sizes))
        return data
    fits = max(1, samples * room // (SIDE_BY_SIDE * need))
    fitted = data.in_batches_of(1 << (fits.bit_length() - 1) if state.memory.asked else fits)
    report["model"]["notes"].append(
        f"calibration ran in {len(fitted.batches)} batches: one of {samples} samples takes {show_size(need)} of memory, "
        f"and {show_size(state.memory.limit)} may be used"
    )
    return fitted


def divided(data: CalibrationData, inputs: Sequence[InputSpec]) -> CalibrationData:
    """Returns data of few batches in smaller ones, some of which can be held back, where the batch axis is free."""
    free = all(not i.shape or not isinstance(i.shape[0], int) for i in inputs)
    if len(data.batches) >= LEAST_BATCHES or not free:
        return data
    samples = sum(max((len(v) for v in batch.values() if v.ndim), default=1) for batch in data.batches)
    return data.in_batches_of(max(1, samples // HELD_BACK))


def _calibrate(state: State, options: CalibrationOptions) -> CalibrationData:
    fields = {k: v for k, v in vars(options).items() if k not in ("source", "packing")}
    fields |= {"vocabulary": vocabulary(state.model), "positions": positions(state.model)}
    inputs = state.analysed().input_specs()
    if options.source is None:
        fields["rows"] = looked_up(state.model)
    if isinstance(options.source, str) and options.source == SELF:
        written = {k: v for k, v in fields.items() if k not in ("text_column", "mask_input")}
        progress = functools.partial(state.progress, "write")
        return write_calibration(lambda: dense_session(state), inputs, progress=progress, **written)
    packing = is_causal(state.model) if options.packing == "auto" else options.packing == "on"
    if options.source is None and any(len(i.shape) == 4 and not isinstance(i.shape[-1], int) for i in inputs):
        fields["image_size"] = _image_size(state, inputs, fields)
    return load_calibration(options.source, inputs, packing=packing, **fields)


def _image_size(state: State, inputs: Sequence[InputSpec], fields: Mapping[str, Any]) -> int | None:
    """Returns the first of the usual sizes that the model runs with: graphs leave open what their positions fix."""
    session = dense_session(state)
    for size in IMAGE_SIZES:
        one = load_calibration(None, inputs, **{**fields, "samples": 1}, image_size=size)
        try:
            session.run(one.batches[0], session.outputs)
        except Exception:  # of ONNX Runtime: a class of its own for each release
            continue
        return size
    return None


def _analysed(state: State, observer: Observer | None = None, load: bool = False) -> PassResult:
    """Runs the analysis; with ``load`` the original is loaded meanwhile.

    Raises:
        ModelError: it fails on a model that is no valid ONNX, or that ONNX Runtime refuses.
    """
    try:
        # What folds constants first refuses those that are too large, which ONNX Runtime makes while it loads.
        normalised = Pipeline(passes=[NormaliseGraphPass()], observer=observer)(state)
        if load and state.get(DenseSession) is None:
            state.add(DenseSession(later(lambda: load_dense(state))))
        found = Pipeline(passes=[FindGroupsPass()], observer=observer)(state)
        return replace(found, refusals=(*normalised.refusals, *found.refusals))
    except InternalError as err:
        dense = state.found(DenseModel).stored
        reason = why_invalid(dense.proto)
        if reason is not None:
            name = f"'{dense.source}'" if dense.source else "the model"
            raise ModelError(f"{name} is no valid ONNX ({reason}); export it again") from err
        reason = refusal_of(dense.detached()[0])
        if reason is not None:
            raise ModelError(cannot_load(dense, reason)) from err
        raise


def _run(state: State, passes: Sequence[Pass[Any]], observer: Observer | None) -> PassResult:
    """Runs passes that run parts of the model.

    Raises:
        ModelError: one fails, and so does the original on the same data; where that does not, the fault is ours.
    """
    try:
        return Pipeline(passes=passes, observer=observer)(state)
    except InternalError:
        if state.calibration is not None:
            require_runs(state, dense_session(state), every=True)
        raise


def _one_batch(state: State, target: str | None) -> dict[str, Any]:
    """What is timed, and whose FLOPs are counted; targets are met on a whole batch."""
    assert state.calibration is not None
    batch = state.calibration.batches[0]
    return batch if target is not None else first_samples(state, batch, TIMED_SAMPLES)


def _flops(state: State, target: str | None) -> int | None:
    if state.calibration is None or not sizes_of(state):
        return None
    return count_flops(state.model, _one_batch(state, target))


def _sizes(model: OnnxModel) -> dict[str, Any]:
    return {"parameters": model.parameters(), "bytes": model.weight_bytes(), "nodes": len(model.graph.nodes)}


def _report_head(state: State) -> dict[str, Any]:
    source, opened = state.model.source, state.found(Opened)
    packages = ("numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "onnx-graphsurgeon")
    versions = {p: v for p in packages if (v := _version(p)) is not None}
    return {
        "schema": SCHEMA,
        "liar_opt": _version("liar-opt"),
        "versions": {"python": platform.python_version(), **versions},
        "model": {
            "path": str(source) if source else None,
            "sha256": opened.digest.result() if opened.digest is not None else None,
            "opset": state.model.opset,
            "notes": list(state.model.notes),
        },
        "before": dict(opened.sizes),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _options(passes: list[Pass[Any]], calibration: CalibrationOptions, provider: str) -> dict[str, Any]:
    result: dict[str, Any] = {p.name: {k: _plain(v) for k, v in vars(p).items()} for p in passes}
    source = calibration.source
    shown = str(source) if isinstance(source, (str, Path)) or source is None else type(source).__name__
    plain = asdict(replace(calibration, source=None))
    result["calibration"] = {k: str(v) if isinstance(v, Path) else v for k, v in plain.items()} | {"source": shown}
    result["provider"] = provider
    return result


def _plain(option: Any) -> Any:
    """A user's function is reported by its name, a pass by its options."""
    if isinstance(option, Pass):
        return {k: _plain(v) for k, v in vars(option).items()}
    return getattr(option, "__name__", type(option).__name__) if callable(option) else option


def _calibration_report(data: CalibrationData) -> dict[str, Any]:
    return {
        "source": data.source,
        "samples": data.samples,
        "tokens": data.tokens,
        "batches": len(data.batches),
        "synthetic": data.synthetic,
        "warnings": list(data.warnings),
    }


def prunable(state: State) -> dict[str, int]:
    """Returns the parameters of all that may be cut together, before and after.

    Values, queries and keys hold weights of their layer's heads, and are cut within those that are left.
    """
    counted = [g for g in state.groups if g.kind in KINDS]
    before, after = parameters_left(counted), parameters_left(counted, state.keep)
    for group in (g for g in state.groups if g.kind not in KINDS):
        heads = next((g for g in counted if g.kind == "heads" and group.constants <= g.constants), None)
        left = 1.0 if heads is None else state.keep.get(heads.name, heads.size) / heads.size
        before += group.parameters if heads is None else 0
        after += group.parameters if heads is None else 0
        after -= left * group.parameters * (1.0 - state.keep.get(group.name, group.size) / group.size)
    return {"before": round(before), "after": round(after)}


def unrepaired(report: Mapping[str, Any], repair: str | RepairFunction) -> Iterator[str]:
    """Yields a note about weights whose repair was not written, if there are some."""
    told = {node for refusal in report["refusals"] for node in refusal["nodes"]}
    repairs = [c for g in report["groups"] for c in g.get("repairs", ())]
    alone = [c["node"] for c in repairs if c["repair"] == "none" and c["node"] not in told]
    if alone and repair != "none":
        named = ", ".join(f"'{node}'" for node in alone[:NAMED])
        named += f" and {len(alone) - NAMED} more" if len(alone) > NAMED else ""
        yield (
            f"{len(alone)} of {len(repairs)} repairs would be worse than none on held-back rows and were not written "
            f"({named}): the calibration data says too little; give more samples"
        )


def _group(group: ChannelGroup) -> dict[str, Any]:
    return {
        "name": group.name,
        "kind": group.kind,
        "before": group.size,
        "block_width": group.block_width,
        "queries_per_block": group.queries,
        "index_sets": group.sets,
        "parameters": group.parameters,
        "consumers": list(dict.fromkeys(r.node.name for r in group.readings)),
    }


def _pruned_group(group: ChannelGroup, change: Change | None) -> dict[str, Any]:
    result = _group(group)
    if change is None:
        return {**result, "after": group.size}
    return {**result, "after": change.after, "kept": change.details["kept"], "repairs": change.details["consumers"]}


__all__ = ["CalibrationOptions", "Inspection", "PruneResult", "check_output", "inspect", "prune"]
