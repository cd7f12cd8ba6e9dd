"""One run of ``prune`` on an ONNX model: open, choose, run, report; and the analysis alone."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from liar_opt.frontend.onnx_engine import cannot_load
from liar_opt.frontend.sound_model import why_invalid
from liar_opt.frontend.walk import count_flops
from liar_opt.passes.allocate_widths import note_widths
from liar_opt.passes.base import Change, DenseModel, Observer, Opened, Pass, PassResult, Pipeline, State
from liar_opt.passes.blank_cut import deployed
from liar_opt.passes.calibrate import calibrate, divided, fitted
from liar_opt.passes.checkpoint import Checkpoint, Digests, digests_of
from liar_opt.passes.chosen_passes import passes_of_options, passes_of_text
from liar_opt.passes.cut_vocabulary import (
    ChosenWords,
    CutVocabularyPass,
    CutWords,
    choose_words,
    planned_words,
    wants_words,
)
from liar_opt.passes.find_groups import FindGroupsPass
from liar_opt.passes.groups import KINDS, Refusal
from liar_opt.passes.limit_drop import LimitDropPass
from liar_opt.passes.meet_target import MeetTargetPass, MetTarget
from liar_opt.passes.normalise_graph import NormaliseGraphPass
from liar_opt.passes.open_model import load_state, model_sizes
from liar_opt.passes.options import PruneOptions
from liar_opt.passes.plan_memory import sizes_of
from liar_opt.passes.prove_groups import Faults, Proof, ProveGroupsPass, leave_alone, refusals_of
from liar_opt.passes.prune_groups import Cut
from liar_opt.passes.repairs import AWARE
from liar_opt.passes.report import Report, SizesEntry, report_of
from liar_opt.passes.result import Inspection, PruneResult
from liar_opt.passes.search_widths import Searched
from liar_opt.passes.sweep import cut_arrays
from liar_opt.passes.verify_model import (
    ComparedSessions,
    DenseSession,
    dense_session,
    first_samples,
    require_runs,
)
from liar_opt.passes.vocabulary_job import inputs_of
from liar_opt.runtime.calibration_data import CalibrationData
from liar_opt.runtime.errors import CheckError, GroupFault, InternalError, ModelError, OptionError
from liar_opt.runtime.latency import CannotTime, measure_latency
from liar_opt.runtime.later import later
from liar_opt.runtime.memory import MemoryWatch, show_size
from liar_opt.runtime.sessions import device_unused, refusal_of, resolve_provider

SPREAD = 0.02
"""Relative standard error of the ratio of two latencies at which they were timed long enough."""
TIMED_SAMPLES = 8
"""How many of a batch are timed, and counted in its FLOPs."""


def inspect_model(model: Any) -> Inspection:
    """Finds the channel groups of an ONNX model; :func:`liar_opt.inspect` calls this.

    Raises:
        ModelError: it cannot be read.
    """
    state = load_state(model)
    result = _analysed(state)
    report = report_of(state)
    stored = state.found(DenseModel).stored
    reason = refusal_of(stored.detached()[0])
    if reason is not None:
        report.note(f"{cannot_load(stored, reason)}; until then it cannot be pruned")
    report.inspected(state)
    report.refuse(result.refusals)
    return Inspection(state.model, state.groups, result.refusals, report.to_json())


class ModelJob:
    """One run of ``prune`` on an ONNX model: it starts again without groups that a fault of ours lies in.

    Args:
        model: a path, or a model in memory.
        calibration: where the data comes from; None makes some up.
        options: of the run.

    Raises:
        ModelError: the model cannot be read.
        OptionError: options exclude each other.
    """

    def __init__(self, model: Any, calibration: Any, options: PruneOptions) -> None:
        self.start, self.watch = time.perf_counter(), MemoryWatch()
        self.options, self.calibration = options, calibration
        self.inputs = inputs_of(model, calibration, options)
        self.state = load_state(model, options.memory)
        self.state.progress, self.state.fresh = options.progress, options.fresh
        self.state.device = resolve_provider(options.provider)
        if options.passes is None:
            self.chosen = passes_of_options(options, calibration is not None)
        else:
            self.chosen = passes_of_text(options.passes, options)
        self.target = self.chosen.widths.target if isinstance(self.chosen.widths, MeetTargetPass) else None
        self.limited = isinstance(self.chosen.widths, LimitDropPass)
        if options.resume is not None and (self.limited or self.chosen.cut.repair in AWARE):
            raise OptionError("resume works with ratios or a target, and with repairs that do not look at the dense model")
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
        state.inherit(old, Opened, DenseModel, DenseSession, Digests, ChosenWords)
        state.seconds = old.seconds
        return state

    def _attempt(self) -> PruneResult:
        """Runs the passes once."""
        state, chosen, options = self.state, self.chosen, self.options
        report = self._begun()
        analysis = _analysed(state, options.observer, load=not state.memory.low)
        state.model.settle()
        if wants_words(options) and state.get(ChosenWords) is None:
            state.add(choose_words(state.model, self.calibration, options))
        refusals = [*analysis.refusals, *self._leave_alone()]  # asks for groups, before any work
        dense_session(state)
        early = chosen.curves is not None or self.target is not None or options.resume is not None
        if early:
            self._load_calibration(report)
        if options.resume is not None:
            state.checkpoint = Checkpoint.open(Path(options.resume), self._identity(report))
        report.before.flops = self._flops()
        decided, proofs = self._decide(report, early)
        refusals += proofs
        report.refuse(refusals)
        if options.dry_run:
            report.planned(state)
            report.note(*planned_words(state))
            return self._result(state.found(DenseModel).stored, report, (), refusals)
        if not early:
            report.before.flops = self._flops()
        report.resumed = state.checkpoint.done if state.checkpoint is not None else 0
        try:
            done = _run(state, chosen.cutting, options.observer)
        except CheckError as err:
            raise GroupFault(self._culprits(err)) from err
        changes = (*decided, *done.changes)
        refusals += done.refusals
        report.refuse(refusals)
        report.cut(state, changes, chosen.cut.repair)
        if wants_words(options):
            changes = (*changes, *_run(state, [CutVocabularyPass()], options.observer).changes)
            report.vocabulary = state.found(CutWords)
        report.cache_shapes = state.model.resized_shapes(state.model.as_written()[0])
        report.after = SizesEntry(**model_sizes(state.model), flops=self._flops())
        if options.latency:
            self._time(report)
        report.ended(state, self.watch, time.perf_counter() - self.start)
        if state.checkpoint is not None:
            state.checkpoint.remove()
        return self._result(state.model, report, changes, refusals)

    def _result(self, model: Any, report: Report, changes: tuple[Change, ...], refusals: list[Refusal]) -> PruneResult:
        words = self.state.get(ChosenWords)
        return PruneResult(model, report.to_json(), changes, tuple(refusals), self.inputs, words)

    def _begun(self) -> Report:
        """Returns the report's first part: what was asked for, and of what."""
        state, options = self.state, self.options
        report = report_of(state)
        passes = [self.chosen.widths, self.chosen.cut]
        report.asked(passes, options, self.calibration, options.provider, state.device)
        if options.provider == "auto" and device_unused(state.device):
            report.note(
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

    def _load_calibration(self, report: Report) -> None:
        state, began = self.state, time.perf_counter()
        if self.data is None:
            self.data = calibrate(state, self.calibration, self.options)
            if self.limited:  # what is lost is measured on rows that nothing is fitted to
                self.data = divided(self.data, state.analysed().input_specs())
        state.calibration = fitted(state, self.data, report.model.notes)
        require_runs(state, dense_session(state))
        state.seconds["load-calibration"] = state.seconds.get("load-calibration", 0.0) + time.perf_counter() - began
        report.calibrated(state.calibration)

    def _decide(self, report: Report, early: bool) -> tuple[list[Change], list[Refusal]]:
        """Decides the widths of groups whose cut is proved; returns what was changed, and what is left alone."""
        state, chosen, checkpoint = self.state, self.chosen, self.state.checkpoint
        if checkpoint is not None and checkpoint.decided is not None:
            return [], self._decided_before(report, checkpoint.decided)
        refusals: list[Refusal] = []
        if early:
            refusals += self._prove(ProveGroupsPass(chosen.cut))
        while True:
            state.groups = tuple(g for g in state.groups if g.kind in KINDS)  # values join them where they are cut
            decided = _run(state, chosen.deciding, self.options.observer)
            if state.calibration is None and not self.options.dry_run:
                self._load_calibration(report)
            proved = [] if self.limited else self._prove(ProveGroupsPass(chosen.cut, decided=True))
            if not proved:
                break
            refusals += proved
        report.decided(state)
        if checkpoint is not None:
            said = {name: value for name, value in report.to_json().items() if name in ("curves", "target", "search")}
            keep = {name: int(keep) for name, keep in state.keep.items()}
            checkpoint.decide({"keep": keep, "report": said, "left alone": self.faults})
        return list(decided.changes), refusals

    def _decided_before(self, report: Report, decided: dict[str, Any]) -> list[Refusal]:
        """Takes the widths that an interrupted run had decided; returns what it left alone."""
        self.faults |= decided.get("left alone", {})
        left = self._leave_alone()
        note_widths(self.state, {name: int(keep) for name, keep in decided["keep"].items()})
        said = decided["report"]
        report.curves = said.get("curves")
        report.target = MetTarget(**said["target"]) if "target" in said else None
        report.search = Searched(**said["search"]) if "search" in said else None
        return list(left)

    def _prove(self, step: ProveGroupsPass) -> list[Refusal]:
        """Leaves groups alone whose cut is wrong; returns why."""
        result = Pipeline(passes=[step], observer=self.options.observer)(self.state)
        self.faults |= self.state.found(Faults).reasons
        self._leave_alone()
        return list(result.refusals)

    def _time(self, report: Report) -> None:
        """Times the dense and the pruned model side by side, each in a process of its own where that works."""
        state, target = self.state, self.target
        if state.memory.low:
            limit = show_size(state.memory.limit)
            report.note(f"latency was not measured: the models are too large for the memory of {limit}")
            return
        began = time.perf_counter()
        batch = self._one_batch()
        feeds = [batch, cut_arrays(batch, state.found(Cut).ends)]
        words = state.get(ChosenWords)
        if words is not None:
            feeds = [words.known(feeds[0]), words.numbered(words.known(feeds[1]))]
        models = [deployed(model, state.device) for model in (state.found(DenseModel).stored, state.model)]
        try:
            times = measure_latency(models, feeds, budget=1.0 if target is None else 2.0, least=12, close=SPREAD)
        except CannotTime:
            compared = state.found(ComparedSessions)
            sessions = [session.as_deployed() for session in (compared.dense, compared.pruned)]
            times = measure_latency(sessions, feeds, budget=0.3, least=6)
        report.timed(times)
        state.seconds["latency"] = time.perf_counter() - began

    def _identity(self, report: Report) -> dict[str, Any]:
        """Returns what must be the same for an interrupted run to go on."""
        state, digests, words = self.state, digests_of(self.state), self.state.get(ChosenWords)
        assert report.options is not None
        options = {name: dict(values) for name, values in report.options.items() if isinstance(values, dict)}
        for place in ("source", "tokenizer"):  # what was read from there is compared
            options["calibration"].pop(place, None)
        return {
            "model": digests["model"],
            "seed": report.seed,
            "search": None if self.chosen.search is None else self.chosen.search.search,
            **options,
            "calibration data": digests["calibration data"],
            "words": None if words is None else words.kept.tolist(),
            "device": state.device,
            "lean sessions": state.memory.low,
            "liar-opt": report.liar_opt,
        }

    def _one_batch(self) -> dict[str, Any]:
        """What is timed, and whose FLOPs are counted; targets are met on a whole batch."""
        assert self.state.calibration is not None
        batch = self.state.calibration.batches[0]
        return batch if self.target is not None else first_samples(self.state, batch, TIMED_SAMPLES)

    def _flops(self) -> int | None:
        """Returns the operations of the model as it is now; None without data, or where they cannot be counted."""
        if self.state.calibration is None or not sizes_of(self.state):
            return None
        return count_flops(self.state.model, self._one_batch())


def _analysed(state: State, observer: Observer | None = None, load: bool = False) -> PassResult:
    """Runs the analysis; with ``load`` the original is loaded meanwhile.

    Raises:
        ModelError: it fails on a model that is no valid ONNX, or that ONNX Runtime refuses.
    """
    try:
        # What folds constants first refuses those that are too large, which ONNX Runtime makes while it loads.
        normalised = Pipeline(passes=[NormaliseGraphPass()], observer=observer)(state)
        if load and state.get(DenseSession) is None:
            stored = state.found(DenseModel).stored
            state.add(DenseSession(later(lambda: state.engine().whole(stored))))
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
