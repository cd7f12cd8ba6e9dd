"""One run of ``prune``, whatever the model is: choose, analyse, prove, decide, cut, verify, report; the analysis alone.

What depends on the model is its backend's (`passes.backend`).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from liar_opt.passes.allocate_widths import note_widths, why_whole
from liar_opt.passes.backend import Backend
from liar_opt.passes.base import Change, Observer, Pass, PassResult, Pipeline, Probes, State, WholeModel
from liar_opt.passes.calibrate import calibrate, divided, fitted
from liar_opt.passes.checkpoint import Checkpoint, digests_of
from liar_opt.passes.close_calls import ROUNDING
from liar_opt.passes.cut_experts import CutExperts, CutExpertsPass, experts_refused, planned_experts
from liar_opt.passes.cut_vocabulary import ChosenWords, CutWords, planned_words, wants_words
from liar_opt.passes.find_groups import NOT_WHOLE, WholeSublayers
from liar_opt.passes.finish_run import Done, finish_run, timed_batch
from liar_opt.passes.groups import KINDS, Refusal
from liar_opt.passes.meet_target import MeetTargetPass, MetTarget
from liar_opt.passes.options import PruneOptions
from liar_opt.passes.pattern_job import pattern_behind
from liar_opt.passes.pattern_weights import require_fitting
from liar_opt.passes.prove_groups import Faults, Proof, ProveGroupsPass, leave_alone, refusals_of
from liar_opt.passes.prune_groups import Cut
from liar_opt.passes.quantise_result import require_room
from liar_opt.passes.repairs import AWARE
from liar_opt.passes.report import Report, report_of
from liar_opt.passes.result import Inspection, PruneResult
from liar_opt.passes.search_widths import Searched
from liar_opt.passes.sweep import first_samples, require_shares
from liar_opt.passes.verify_model import dense_session, require_runs
from liar_opt.runtime.calibration_data import CalibrationData
from liar_opt.runtime.errors import CheckError, GroupFault, InternalError, ModelError, OptionError
from liar_opt.runtime.memory import MemoryWatch
from liar_opt.runtime.patterns import Pattern
from liar_opt.runtime.ranks import current


def inspect_model(backend: Backend) -> Inspection:
    """Finds the channel groups of a model; :func:`liar_opt.inspect` calls this.

    Of a checkpoint those are listed whose widths the checkpoint can say that ``prune`` makes of it; others are refused with
    a reason.

    Raises:
        ModelError: it cannot be analysed.
    """
    state = backend.state
    found = [backend.analyse(state), Pipeline(passes=backend.narrowing(required=False))(state)]
    refusals = tuple(refusal for result in found for refusal in result.refusals) + experts_refused(state)
    report = report_of(state)
    report.note(*backend.notes_of_inspection(state))
    report.inspected(state)
    report.refuse(refusals)
    return Inspection(state.model, state.groups, refusals, report.to_json())


T = TypeVar("T")


class ModelJob:
    """One run of ``prune``: it starts again without groups that a fault of ours lies in.

    Args:
        backend: the opened model, the calibration data and the options.
        watch: looks at the memory and the clock since the run began.
        decided: the widths that another run on the same model has decided, its ``decided``; None decides them.

    Raises:
        OptionError: options exclude each other.
    """

    def __init__(self, backend: Backend, watch: MemoryWatch, decided: dict[str, Any] | None = None) -> None:
        self.watch, self.backend = watch, backend
        self.ranks = current()
        self.state.progress, self.state.fresh = self.options.progress, self.options.fresh
        self.chosen = backend.choose()
        self.target = self.chosen.widths.target if isinstance(self.chosen.widths, MeetTargetPass) else None
        self.limited = self.chosen.limited
        if self.options.resume is not None and (self.limited or self.chosen.cut.repair in AWARE):
            raise OptionError("resume works with ratios or a target, and with repairs that do not look at the dense model")
        self.notes = list(self.state.model.notes)
        self.faults: dict[str, str] = {}
        self.data: CalibrationData | None = None
        self.dropped, self.decided = 0, decided

    @property
    def state(self) -> State:
        """That of the backend; a run that starts again has another."""
        return self.backend.state

    @property
    def options(self) -> PruneOptions:
        """Those of the backend."""
        return self.backend.options

    def run(self) -> PruneResult:
        """Runs, and again without what turned out to be wrong.

        Raises:
            CheckError: nothing was left to cut.
            ModelError: the original fails on the data, too.
        """
        return self._until_right(self.finish)

    def checked(self) -> Done:
        """Runs until the result is checked; `finish` is still to come. See `run`."""
        return self._until_right(lambda done: done)

    def _until_right(self, last: Callable[[Done], T]) -> T:
        while True:
            try:
                return self._attempt(last)
            except GroupFault as fault:
                if self.state.calibration is not None:  # a batch that the model itself fails on is no fault of a group
                    require_runs(self.state, dense_session(self.state), every=True)
                news = {name: reason for name, reason in fault.reasons.items() if name not in self.faults}
                if not news:
                    raise
                self.faults |= news
                self.decided = None
                if self.state.checkpoint is not None:
                    self.state.checkpoint.remove()
            finally:
                if self.state.checkpoint is not None:
                    self.state.checkpoint.close()
            self.backend = replace(self.backend, state=self._anew())

    def _anew(self) -> State:
        """Returns the state as it was when the model was loaded."""
        return self.backend.anew(self.state, self.notes)

    def _attempt(self, last: Callable[[Done], T]) -> T:
        """Runs the passes once, and then what comes last."""
        state, chosen, options, backend = self.state, self.chosen, self.options, self.backend
        report = self._begun()
        analysis = backend.analyse(state, options.observer, load=not state.memory.low)
        state.model.settle()
        if wants_words(options) and state.get(ChosenWords) is None:
            state.add(backend.choose_words(state))
        require_room(state, options)
        refusals = [*analysis.refusals, *self._leave_alone()]  # asks for groups, before any work
        if options.pattern is not None:
            require_fitting(state.analysed(), Pattern.parse(options.pattern), state.groups)
        probed = state.get(Probes) is not None  # nothing but the model is needed
        refusals += self._left_whole(report)
        if probed:
            refusals += self._prove(ProveGroupsPass(chosen.cut, whole=chosen.whole))
        refusals += Pipeline(passes=backend.narrowing(), observer=options.observer)(state).refusals
        state.add(backend.analysed_so())
        if chosen.widths.query_key == "auto" and not state.queries:
            report.note(f"queries and keys keep their width: {why_whole(state)}")
        if not probed:
            dense_session(state)
        said = options.resume is not None or self.decided is not None
        early = chosen.curves is not None or self.target is not None or said
        if early:
            self._load_calibration(report)
        if options.resume is not None:
            state.checkpoint = Checkpoint.open(Path(options.resume), self._identity(report))
        report.before.flops = self._flops_before()
        decided, proofs = self._decide(report, early and not probed)
        refusals += proofs
        report.refuse(refusals)
        if options.dry_run:
            report.planned(state)
            report.note(*planned_experts(state), *planned_words(state))
            return self.ranks.kept(lambda: last((report, (), refusals)))
        if not early:
            report.before.flops = self._flops_before()
        report.resumed = state.checkpoint.done if state.checkpoint is not None else 0
        done = _run(state, chosen.cutting, options.observer)
        changes = (*decided, *done.changes)
        refusals += done.refusals
        report.shared_out(self.ranks, state, self.watch)
        return self.ranks.kept(lambda: last(self._checked(report, changes, refusals)))

    def _checked(self, report: Report, changes: tuple[Change, ...], refusals: list[Refusal]) -> Done:
        """Checks what was cut; one process does it."""
        state, chosen, options, backend = self.state, self.chosen, self.options, self.backend
        try:
            done = _run(state, chosen.checking, options.observer)
        except CheckError as err:
            raise GroupFault(self._culprits(err)) from err
        changes = (*changes, *done.changes)
        refusals += done.refusals
        report.refuse(refusals)
        report.cut(state, changes, chosen.cut.repair)
        if options.pattern is not None:
            changes = (*changes, *pattern_behind(backend, state, report, self._one_batch()))
        if wants_words(options):
            changes = (*changes, *_run(state, [backend.cutting_words()], options.observer).changes)
            report.vocabulary = state.found(CutWords)
        return report, changes, refusals

    def finish(self, done: Done) -> PruneResult:
        """Times and quantises what was cut and checked, and returns it; of a dry run the original."""
        result = finish_run(self.backend, done, self.watch, aimed=self.target is not None)
        if not self.options.dry_run and self.state.checkpoint is not None:
            self.state.checkpoint.remove()
        return result

    def _begun(self) -> Report:
        """Returns the report's first part: what was asked for, and of what."""
        report, backend = report_of(self.state), self.backend
        experts = self.state.get(CutExperts)
        passes: list[Pass[Any]] = [] if experts is None else [CutExpertsPass(experts.asked)]
        passes += [self.chosen.widths, self.chosen.cut, *self.chosen.training]
        report.asked(passes, self.options, backend.calibration, backend.where, backend.device)
        report.note(*backend.notes(self.state))
        return report

    def _leave_alone(self) -> tuple[Refusal, ...]:
        """Takes out the groups whose cut turned out to be wrong.

        Raises:
            CheckError: nothing is left, by a fault of ours.
            ModelError: nothing is left.
        """
        leave_alone(self.state, self.faults)
        try:
            self.chosen.widths.requires(self.state)
        except ModelError as err:
            if not self.faults:
                raise
            name, reason = next(iter(self.faults.items()))
            if all(why.startswith(ROUNDING) for why in self.faults.values()):
                raise ModelError(f"no group that was asked for is left: {reason}") from err
            raise CheckError(
                f"no group that could be cut is left: cutting '{name}' would be wrong ({reason}); nothing was written; "
                "please report the model's structure as a bug"
            ) from err
        return refusals_of(self.faults)

    def _left_whole(self, report: Report) -> tuple[Refusal, ...]:
        """Returns why layers cannot go whole, where it was asked for that they may.

        Raises:
            ModelError: none can.
        """
        if self.options.whole_layers != "on":
            return ()
        refusals = self.state.found(WholeSublayers).refusals
        whole = [g.sublayer for g in self.state.groups if g.sublayer is not None]
        if not whole:
            why = f": {refusals[0].reason.removeprefix(f'{NOT_WHOLE}: ')}" if refusals else ""
            raise ModelError(f"no layer can go whole{why}; leave whole-layers out, and widths alone go")
        if any(sublayer.cached for sublayer in whole):
            report.note("attention that goes whole still computes its keys and values: they are outputs of the model")
        return refusals

    def _culprits(self, error: CheckError) -> dict[str, str]:
        """Returns the groups whose cut fails the check of the result.

        What was cut is rehearsed on the samples that it failed on. Where that is right, the numbers are at fault, and not
        the cut: the groups that lost most go, twice as many each time.
        """
        cut, state = self.state, self._anew()
        Pipeline(passes=self.backend.analysis())(state)
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
            backend = self.backend
            limit, author, whole = backend.positions(state), backend.author(state), state.get(WholeModel)
            read = None if whole is None else whole.data
            self.data = read or calibrate(state, backend.calibration, self.options, limit, author)
            if self.limited:  # what is lost is measured on rows that nothing is fitted to
                self.data = divided(self.data, state.analysed().input_specs())
        state.calibration = fitted(state, self.data, report.model.notes)
        if self.ranks.size > 1:
            require_shares(state.calibration)
            digests = digests_of(state)
            self.ranks.require_same({"device": self.backend.device, **digests})
        require_runs(state, dense_session(state))
        state.seconds["load-calibration"] = state.seconds.get("load-calibration", 0.0) + time.perf_counter() - began
        report.calibrated(state.calibration)

    def _decide(self, report: Report, unproved: bool) -> tuple[list[Change], list[Refusal]]:
        """Decides the widths of groups whose cut is proved; returns what was changed, and what is left alone.

        Raises:
            GroupFault: what is left alone had to have the width of others.
        """
        state, chosen, checkpoint = self.state, self.chosen, self.state.checkpoint
        before = self.decided if checkpoint is None else checkpoint.decided
        if before is not None:
            return [], self._decided_before(report, before)
        refusals: list[Refusal] = []
        if unproved:
            refusals += self._prove(ProveGroupsPass(chosen.cut, whole=chosen.whole))
        while True:
            state.groups = tuple(g for g in state.groups if g.kind in KINDS)  # values join them where they are cut
            decided = _run(state, chosen.deciding, self.options.observer)
            if state.calibration is None and not self.options.dry_run:
                self._load_calibration(report)
            proved = [] if self.limited else self._prove(ProveGroupsPass(chosen.cut, decided=True))
            if not proved:
                break
            if chosen.stating is not None:  # which widths can be said depends on the groups that are left
                raise GroupFault(state.found(Faults).reasons)
            refusals += proved
        report.decided(state)
        said = {name: value for name, value in report.to_json().items() if name in ("curves", "target", "search")}
        keep = {name: int(keep) for name, keep in state.keep.items()}
        self.decided = {"keep": keep, "report": said, "left alone": dict(self.faults)}
        if checkpoint is not None:
            checkpoint.decide(self.decided)
        return list(decided.changes), refusals

    def _decided_before(self, report: Report, decided: dict[str, Any]) -> list[Refusal]:
        """Takes the widths that an interrupted run had decided; returns what it left alone."""
        self.faults |= decided.get("left alone", {})
        left = self._leave_alone()
        note_widths(self.state, {name: int(keep) for name, keep in decided["keep"].items()})
        if self.chosen.stating is not None:
            self.chosen.stating(self.state)
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

    def _identity(self, report: Report) -> dict[str, Any]:
        """Returns what must be the same for an interrupted run to go on: experts and blocks go again as they went."""
        state, digests, words = self.state, digests_of(self.state), self.state.get(ChosenWords)
        assert report.options is not None
        options = {name: dict(values) for name, values in report.options.items() if isinstance(values, dict)}
        for place in ("source", "tokenizer"):  # what was read from there is compared
            options["calibration"].pop(place, None)
        whole = state.get(WholeModel)
        went = () if whole is None else whole.changes
        return {
            "model": digests["model"] if whole is None else whole.original.digest(),
            "what went first": [[c.what, c.where, c.before, c.after, c.details.get("kept")] for c in went],
            "seed": report.seed,
            "search": None if self.chosen.search is None else self.chosen.search.search,
            **options,
            "calibration data": digests["calibration data"],
            "words": None if words is None else words.kept.tolist(),
            "device": self.backend.device,
            "lean sessions": state.memory.low,
            "liar-opt": report.liar_opt,
        }

    def _one_batch(self) -> dict[str, Any]:
        """What is timed, and whose FLOPs are counted."""
        return timed_batch(self.state, aimed=self.target is not None)

    def _flops_before(self) -> int | None:
        """Returns the operations of the model as it came; None without data, or where none are counted."""
        if self.state.calibration is None:
            return None
        return self.backend.operations_before(self.state, self._one_batch())


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
