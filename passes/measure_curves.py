"""Measure, on the dense model, what every width of every group would lose: its error after repair against blocks kept.

One streaming pass over the calibration data gives the moments of every consumer's input; one factorisation of each then
gives the whole curve, as blocks leave in the order of the greedy residual (`runtime.solve.select_greedy`). The score's
values of all blocks are taken in the same pass, for allocations that compare them.

The shape of a curve is the error relative to the variance of the residual stream behind the consumer, row by row: that is
what the normalisation behind it divides by. (Where a consumer's output is added to nothing, relative to the variance of
that output.) What such an error is worth at the end of the model differs by an order of magnitude between layers, so it is
measured: the group is cut to half of its blocks and repaired, alone, and the rest of the model runs on a few held-back
batches. The curve is scaled to the relative squared difference of the model's output that is found there. All curves are so
in one currency, the model's own output, in which errors of different layers and kinds are compared and added.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from liar_opt.frontend.onnx_model import is_float
from liar_opt.frontend.onnx_patch import patch_consumer
from liar_opt.frontend.onnx_segments import Extracted, extract, plan_segments, stream_of
from liar_opt.passes.base import Pass, PassResult, State
from liar_opt.passes.groups import ChannelGroup, kept_positions
from liar_opt.passes.prune_groups import PruneGroupsPass, SegmentRun, load_segment, run_segment
from liar_opt.passes.registry import Measured, ScoreFunction, score_named
from liar_opt.passes.scores import SELECTION_RIDGE
from liar_opt.runtime.compare import DifferenceMeter
from liar_opt.runtime.errors import InternalError
from liar_opt.runtime.moments import Moments
from liar_opt.runtime.sessions import as_array, element_type
from liar_opt.runtime.solve import Problem, Selection, select_greedy

SHOWN = 33
"""Points of a curve in the report."""
PROBE_BATCHES = 2
"""Held-back batches on which the worth of an error is measured."""


@dataclass(frozen=True, eq=False)
class GroupCurve:
    """What one group loses.

    Attributes:
        errors: with 0, 1, ... k blocks kept, [k + 1]; the last is zero. Relative squared differences of the output.
        values: the score of every block on the dense model, [k].
        worth: what an error of one, relative to the stream, does to the output.
    """

    errors: NDArray[np.float64]
    values: NDArray[np.float64]
    worth: float = 1.0

    def points(self, most: int = SHOWN) -> list[tuple[int, float]]:
        """Returns (blocks kept, error) at ``most`` places, evenly spread, both ends included."""
        places = np.unique(np.linspace(0, self.errors.size - 1, most).round().astype(np.int64))
        return [(int(p), float(self.errors[p])) for p in places]


@dataclass(frozen=True)
class MeasureCurvesPass(Pass[tuple[tuple[ChannelGroup, ...], tuple[Any, ...]]]):
    """Measure the error curve of every group on the dense model; nothing is changed.

    Attributes:
        score: whose values are taken beside the curves.
        seed: for all that is drawn.
    """

    name: ClassVar[str] = "measure-curves"
    score: str | ScoreFunction = "greedy"
    seed: int = 0

    def requires(self, state: State) -> None:
        """Checks that there is something to measure on.

        Raises:
            OptionError: unknown score.
        """
        score_named(self.score)
        if state.calibration is None or not state.calibration.batches:
            raise InternalError("no calibration data")

    def plan(self, state: State) -> tuple[tuple[ChannelGroup, ...], tuple[Any, ...]]:
        """Returns the groups that span others and the segments of the rest."""
        return plan_segments(state.analysed(), state.groups)

    def apply(self, state: State, plan: tuple[tuple[ChannelGroup, ...], tuple[Any, ...]]) -> PassResult:
        """Measures; the curves go to ``State.facts`` by group name."""
        run = _CurveRun(PruneGroupsPass(score=self.score, seed=self.seed, weighting="stream"), state, *plan)
        run.over_all()
        state.facts["curves"] = run.curves
        return PassResult(state)


class _CurveRun(SegmentRun):
    """Runs over the segments as pruning does, and leaves them as they are."""

    stage = "measure"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.curves: dict[str, GroupCurve] = {}
        self.probed = sorted(self.held)[:PROBE_BATCHES] or [0]
        self.outputs = [t.name for t in self.walk.model.graph.outputs if is_float(t.dtype)]
        self.dense = self.ends(extract(self.walk, 0, len(self.walk.model.graph.nodes), self.outputs, {}), self.outputs)

    def ends(self, segment: Extracted, outputs: list[str]) -> list[dict[str, NDArray[Any]]]:
        """Runs the rest of the model on the probed batches and returns the outputs."""
        session = load_segment(segment, self.state.device)
        feeds = ({**self.data.batches[i], **self.alive[i]} for i in self.probed)
        return [{n: as_array(v) for n, v in run_segment(session, f, outputs, outputs).items()} for f in feeds]

    def prune(self, group: ChannelGroup, moments: Mapping[tuple[str, int], Moments]) -> None:
        """Notes the curve of one group."""
        measured = [self.measured(c, dict(moments)) for c in group.consumers]
        # As `segment` asked for them: weighted by the stream, where there is one.
        weighted = [stream_of(self.walk, c.uses[0], self.options.seed) is not None for c in group.consumers]
        problems = [_in_stream_units(m, w) for m, w in zip(measured, weighted, strict=True)]
        selection = select_greedy(problems, 0, SELECTION_RIDGE)
        errors = np.concatenate([[0.0], np.maximum.accumulate(selection.errors)])[::-1].copy()
        values = np.empty(group.size)
        if self.options.score in ("greedy", "swaps"):  # the order is known already
            values[selection.removed_blocks] = np.maximum(np.diff(selection.errors, prepend=0.0), 0.0)
        else:
            values = self.score.values(measured, self.rng)
        worth = self.worth(group, measured, selection, errors)
        self.curves[group.name] = GroupCurve(errors * worth, values, worth)

    def worth(
        self, group: ChannelGroup, measured: list[Measured], selection: Selection, errors: NDArray[np.float64]
    ) -> float:
        """Returns the output's relative squared difference for each unit of error, with half of the blocks gone."""
        keep = group.size - group.size // 2
        blocks = np.setdiff1d(np.arange(group.size), selection.removed_blocks[: group.size - keep])
        graph = self.walk.model.graph
        made = {t.name for n in graph.nodes[group.end :] for t in n.outputs}
        outputs = [n for n in self.outputs if n in made]
        start = 0 if self.alive_at is None else self.position(self.alive_at)
        types = {name: element_type(value) for name, value in self.alive[0].items()}
        segment = extract(self.walk, start, len(graph.nodes), outputs, types)
        for consumer, item in zip(group.consumers, measured, strict=True):
            kept = kept_positions(consumer.owners, blocks)
            repaired = self.repair(item, kept, np.setdiff1d(np.arange(consumer.width), kept), self.options.ridge)
            use = consumer.uses[0]
            old = np.moveaxis(np.asarray(use.node.inputs[use.weight_position].values), use.weight_axis, 0)
            flat = np.zeros((consumer.width, item.weight.shape[1]), old.dtype)
            flat[kept] = repaired.weight.astype(old.dtype)
            patch_consumer(segment, consumer.uses, np.moveaxis(flat.reshape(old.shape), 0, use.weight_axis), repaired.bias)
        meter = DifferenceMeter()
        for index, dense, cut in zip(self.probed, self.dense, self.ends(segment, outputs), strict=True):
            for name in outputs:
                meter.add(name, cut[name], dense[name], self.data.row_masks[index])
        # The first output that the group changes at all: what a model is for comes first, caches come after.
        changed = [d.relative_rms**2 for d in meter.result().values() if d.relative_rms > 0]
        return changed[0] / errors[keep] if changed and errors[keep] > 0 and np.isfinite(changed[0]) else 1.0


def _in_stream_units(item: Measured, weighted: bool) -> Problem:
    """Returns the problem scaled so that an error of 1 is the variance of the stream (or of the output alone)."""
    statistics, columns = item.statistics, item.weight.shape[1]
    if weighted:
        # The moments are means over weighted rows, sum w x^2 / sum w with w = 1 / variance; the error is sum w e / rows.
        scale = item.target_scale**2 * statistics.count / (item.moments.count * columns)
    else:
        power = float(np.vdot(item.weight, statistics.covariance @ item.weight))
        scale = 1.0 / power if power > 0 else 0.0
    return Problem(statistics.covariance, [item.weight], item.owners, scale)


def curve_report(groups: Sequence[ChannelGroup], curves: Mapping[str, GroupCurve]) -> dict[str, Any]:
    """Returns the curves as plain data, by group name."""
    return {
        g.name: {"kind": g.kind, "size": g.size, "points": [list(p) for p in curves[g.name].points()]}
        for g in groups
        if g.name in curves
    }
