"""Measure, on the dense model, what every width of every group would lose: its error after repair against blocks kept.

One streaming pass over the calibration data gives the moments of every consumer's input; one factorisation of each then
gives the whole curve, as blocks leave in the order of the greedy residual (`runtime.solve.select_greedy`). The score's
values of all blocks are taken in the same pass, for allocations that compare them.

The shape of a curve is the error relative to the variance of the residual stream behind the consumer, row by row: that is
what the normalisation behind it divides by. (Where a consumer's output is added to nothing, relative to the variance of
that output.) What such an error is worth at the end of the model differs by an order of magnitude between layers, so it is
measured: the group is cut to half of its blocks and repaired, alone, and the rest of the model runs on a few held-back
samples. The curve is scaled to the relative squared difference of the model's output that is found there
(`ProbeOutputs.difference`). All curves are so in one currency, the model's own output, in which errors of different layers
and kinds are compared and added.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import numpy as np

from liar_opt.frontend.engine import ConstantPatch
from liar_opt.frontend.onnx_segments import Place, place_of, stream_of
from liar_opt.frontend.records import StandIn
from liar_opt.passes.base import Pass, PassResult, State
from liar_opt.passes.choosable import choosable
from liar_opt.passes.curves import Curves, GroupCurve, file_of_curves, load_curves, store_curves
from liar_opt.passes.groups import FORMS, GONE, MAPPED, QUERY_KEY, ChannelGroup
from liar_opt.passes.measured import Measured
from liar_opt.passes.probe_outputs import ProbeOutputs, repaired
from liar_opt.passes.prune_groups import GroupVisitor, PruneGroupsPass, by_set, whole_of, whole_repair
from liar_opt.passes.registry import score_named
from liar_opt.passes.scores import SELECTION_RIDGE, ScoreFunction
from liar_opt.passes.sweep import Sweep
from liar_opt.runtime.errors import InternalError
from liar_opt.runtime.moments import Array, Moments
from liar_opt.runtime.one_at_a_time import WAITING, one_at_a_time
from liar_opt.runtime.ranks import current
from liar_opt.runtime.solve import Problem, select_greedy


@dataclass(frozen=True)
class MeasureCurvesPass(Pass[tuple[ChannelGroup, ...]]):
    """Measure the error curve of every group on the dense model; nothing is changed.

    Attributes:
        score: whose values are taken beside the curves.
        seed: for all that is drawn.
        queries: whether the widths of queries and keys are measured, too.
        worth: whether what an error is worth at the end of the model is measured, one run of the rest of it a group; else
            errors are relative to the stream.
        whole: whether it is measured what is lost where the whole sublayer of a group goes ("on", "off", or "auto": but for
            those whose keys and values are outputs of the graph).
    """

    name: ClassVar[str] = "measure-curves"
    score: str | ScoreFunction = "greedy"
    seed: int = 0
    queries: bool = False
    worth: bool = True
    whole: str = "off"

    def requires(self, state: State) -> None:
        """Checks that there is something to measure on.

        Raises:
            OptionError: unknown score.
        """
        score_named(self.score)
        if state.calibration is None or not state.calibration.batches:
            raise InternalError("no calibration data")

    def plan(self, state: State) -> tuple[ChannelGroup, ...]:
        """Returns the groups whose curves are measured."""
        groups = (replace(g, whole="too") if self._goes_whole(g) else g for g in state.groups)
        return (*groups, *(state.queries if self.queries else ()))

    def _goes_whole(self, group: ChannelGroup) -> bool:
        """Returns whether a group stands for its sublayer, and may go with it."""
        sublayer = group.sublayer
        if sublayer is None or group.name != sublayer.members[0] or not self.worth:
            return False
        return self.whole == "on" or (self.whole == "auto" and not sublayer.cached)

    def apply(self, state: State, plan: tuple[ChannelGroup, ...]) -> PassResult:
        """Measures, or takes what an earlier run found on the same; adds ``Curves``."""
        ranks, place = current(), file_of_curves(state, {f.name: getattr(self, f.name) for f in fields(self)})
        with one_at_a_time(None if ranks.rank else place, lambda: state.progress(WAITING, 0, 1)):
            kept = ranks.once(lambda: None if place is None or state.fresh else load_curves(place))
            if kept is not None and all(g.name in kept and kept[g.name].errors.shape == (g.size + 1,) for g in plan):
                state.add(Curves(kept, kept=True))
                return PassResult(state)
            sweep = Sweep(state, "measure", "stream", self.seed)
            probes = ProbeOutputs(sweep, plan) if self.worth else None
            visitor = NoteCurves(sweep, PruneGroupsPass(score=self.score, seed=self.seed), probes)
            sweep.over(visitor, plan)
            found = {name: curve for own in ranks.gathered(visitor.curves) for name, curve in own.items()}
            curves = {g.name: found[g.name] for g in plan}
            curves |= visitor.probed_whole(plan, curves)
            state.add(Curves(curves))
            if place is not None and not ranks.rank:
                store_curves(place, curves)
        return PassResult(state)


class NoteCurves(GroupVisitor):
    """Notes the curve of every group.

    Args:
        sweep: over the dense model.
        options: the score, and how is repaired.
        probes: what runs the rest of the model, to scale the curve; None leaves it as it is.
    """

    def __init__(self, sweep: Sweep, options: PruneGroupsPass, probes: ProbeOutputs | None) -> None:
        super().__init__(sweep, options)
        self.probes = probes
        self.curves: dict[str, GroupCurve] = {}
        self.stand_ins: dict[str, list[tuple[int, StandIn, float]]] = {}
        self.loads = [0] * sweep.ranks.size

    def owner(self, groups: Sequence[ChannelGroup]) -> int:
        """Returns the process with the least to do so far; where something is drawn, the first, so that it is the same."""
        if self.options.score not in ("greedy", "swaps"):
            return 0
        owner = self.loads.index(min(self.loads))
        self.loads[owner] += sum(c.width**3 for g in groups for c in g.consumers)
        return owner

    def group(self, group: ChannelGroup, moments: Mapping[Place, Moments]) -> None:
        """Notes the curve of one group."""
        if group.kind == QUERY_KEY:
            self.note_logits(group, moments)
            return
        self.begin(group)
        measured = [self.measured(c, moments) for c in group.consumers]
        # As the sweep asked for them: weighted by the stream, where there is one.
        weighted = [stream_of(self.walk, c.uses[0], self.options.seed) is not None for c in group.consumers]
        errors, values, half = np.zeros(group.size + 1), np.zeros(group.size), []
        keep = group.size - group.size // 2
        for first, own in by_set(group, measured):  # what experts lose adds up; nothing of theirs is weighted
            marks = weighted if group.sets == 1 else [False] * len(own)
            wholes = measured if group.sets == 1 else own
            problems = [_in_stream_units(*items) for items in zip(own, wholes, marks, strict=True)]
            selection = select_greedy(problems, 0, SELECTION_RIDGE)
            errors += np.concatenate([[0.0], np.maximum.accumulate(selection.errors)])[::-1]
            worth_of = np.empty(group.size)
            if self.options.score in ("greedy", "swaps"):  # the order is known already
                worth_of[selection.removed_blocks] = np.maximum(np.diff(selection.errors, prepend=0.0), 0.0)
            else:
                worth_of = self.score.of_blocks(own, self.rng)
            values += worth_of if group.sets == 1 else np.sort(worth_of)
            half.append(first + np.setdiff1d(np.arange(group.size), selection.removed_blocks[: group.size - keep]))
        deviation = self.score.deviation([m.owned() for m in measured], values) if group.sets == 1 else None
        patches = repaired(self, group, measured, np.concatenate(half)) if self.probes else []
        del measured, own, wholes, problems, selection  # the rest of the model runs now
        lost = self.probes.difference(patches) if self.probes else None
        if self.probes and group.whole:
            self.stand_ins[group.name] = list(self.whole_of_group(group, moments))
        self.note(group, errors, values, lost, errors[keep], deviation)

    def whole_of_group(self, group: ChannelGroup, moments: Mapping[Place, Moments]) -> Iterator[tuple[int, StandIn, float]]:
        """Yields what may stand in for the whole sublayer of a group: a form, it, and what is lost of all that is added.

        That is the share of the variance of what the sublayer adds to the stream.
        """
        sublayer = group.sublayer
        assert sublayer is not None
        item = whole_of(sublayer, moments[place_of(sublayer)])
        for form in (GONE, MAPPED) if sublayer.maps else (GONE,):
            repaired = whole_repair(item, sublayer, form, None)
            if form == MAPPED and repaired.kind != "repair":
                continue  # on held-back rows no map is better than the constant
            rows, columns = item.weight.shape
            errors = item.errors(np.arange(rows - columns), np.arange(rows - columns, rows), repaired)
            share = errors["repair"] / errors["bias"] if form == MAPPED and errors["bias"] > 0 else 1.0
            made = sublayer.stand_in(repaired.weight if form == MAPPED else None, repaired.bias)
            if made.matrix is not None and not self.sweep.memory.keep(len(self.stand_ins) * made.matrix.nbytes):
                made = replace(made, matrix=self.sweep.memory.store.put(made.matrix))
            yield form, made, share if len(sublayer.members) == 1 else 0.0

    def probed_whole(self, groups: Sequence[ChannelGroup], curves: Mapping[str, GroupCurve]) -> dict[str, GroupCurve]:
        """Measures what is lost in the output where a sublayer goes whole, of those that a budget could choose.

        Large differences of the output saturate, and with others beside them they do not add up as small ones do: what is
        lost without the sublayer counts as no less than what the curve says of nothing kept.

        Args:
            groups: of the model.
            curves: of all of them; this process has what stands in for the sublayers that it owns.

        Returns:
            The curves of those groups, by name.
        """
        own = {
            name: {form: share * float(curves[name].errors[0]) for form, _, share in found}
            for name, found in self.stand_ins.items()
        }
        least = {name: found for part in self.sweep.ranks.gathered(own) for name, found in part.items()}
        measured: dict[str, dict[int, float]] = {}
        while self.probes is not None:
            known = {n: replace(c, whole=measured.get(n, least.get(n, {}))) for n, c in curves.items()}
            news = sorted(choosable(groups, known) - measured.keys())
            if not news:
                break
            found = {name: self._lost(name, least[name]) for name in news if name in self.stand_ins}
            measured |= {name: lost for part in self.sweep.ranks.gathered(found) for name, lost in part.items()}
        return {name: replace(curves[name], whole=lost) for name, lost in measured.items()}

    def _lost(self, name: str, least: Mapping[int, float]) -> dict[int, float]:
        """Runs the model with what stands in for a sublayer, each form of it."""
        assert self.probes is not None
        lost = {form: self.probes.difference([made]) or 0.0 for form, made, _ in self.stand_ins[name]}
        return {form: max(value, least[form]) for form, value in lost.items() if np.isfinite(value)}

    def note_logits(self, group: ChannelGroup, moments: Mapping[Place, Moments]) -> None:
        """Notes the curve of queries and keys: the shape is what their products lose."""
        keep = group.size - group.size // 2
        turns = self.bases.logit_turns(group, moments, keep)
        patches = [
            ConstantPatch((s.use.node, s.use.position), value) for s, value in self.bases.projected(group, turns.form)
        ]
        lost = self.probes.difference(patches) if self.probes else None
        self.note(group, turns.lost, np.zeros(group.size), lost, turns.lost[keep])

    def note(
        self,
        group: ChannelGroup,
        errors: Array,
        values: Array,
        lost: float | None,
        predicted: float,
        deviation: float | None = None,
    ) -> None:
        """Stores the curve times (measured output error at the probed width) / (``predicted`` error there)."""
        worth = 1.0 if lost is None or not np.isfinite(lost) or predicted <= 0 else float(lost / predicted)
        self.curves[group.name] = GroupCurve(errors * worth, values, worth, deviation)


def _in_stream_units(item: Measured, whole: Measured, weighted: bool) -> Problem:
    """Returns the problem scaled so that an error of 1 is the variance of the stream (or of the output alone).

    Args:
        item: the channels of blocks.
        whole: with those of none.
        weighted: whether the moments are, by the stream.
    """
    statistics, columns = whole.statistics, whole.weight.shape[1]
    if weighted:
        # The moments are means over weighted rows, sum w x^2 / sum w with w = 1 / variance; the error is sum w e / rows.
        scale = item.target_scale**2 * statistics.count / (item.moments.count * columns)
    else:
        a = whole.moments.arrays
        weight = a.real(whole.weight)
        power = a.inner(weight, statistics.covariance @ weight)
        scale = 1.0 / power if power > 0 else 0.0
    return Problem(item.covariance, item.weight, item.owners, scale)


def curve_report(groups: Sequence[ChannelGroup], curves: Mapping[str, GroupCurve]) -> dict[str, Any]:
    """Returns the curves as plain data, by group name: [blocks kept, relative squared difference of the output]."""
    found = ((g, curves[g.name]) for g in groups if g.name in curves)
    return {
        g.name: {
            "kind": g.kind,
            "size": g.size,
            "worth": c.worth,
            "points": [list(p) for p in c.points()],
            **({"whole": {FORMS[form]: error for form, error in c.whole.items()}} if c.whole else {}),
        }
        for g, c in found
    }
