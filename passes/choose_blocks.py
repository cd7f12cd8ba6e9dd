"""Which run of blocks goes, and what repairs the place where it was: chosen by the error of the model's output.

Of a run the stream before it is x_l, that behind it x_r. What stands in for x_r is x_l + z M + b, least squares with a
ridge that pulls towards leaving x_l alone, chosen on held-back rows. As a map of its own z is x_l itself, T = I + M
(Ghosted Layers, arXiv 2605.15491); folded, z is what the last layer before the gap puts out without its bias, y = f W,
whose weight becomes W (I + M) (ReplaceMe, arXiv 2505.02819). Where a normalisation stands behind each sublayer, the sums
before it are compared instead, so that the one behind x_r stays.

Each run is tried: the rest of the model behind it runs on a few held-back batches, with the map of the other rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from liar_opt.frontend.blocks import Run, find_stacks, last_product
from liar_opt.frontend.graph_tensors import is_float
from liar_opt.frontend.onnx_segments import VARIANCE_FLOOR
from liar_opt.frontend.records import ConsumerUse
from liar_opt.frontend.rewrite import Rewriter
from liar_opt.passes.base import Finding, State
from liar_opt.passes.measured import Measured
from liar_opt.passes.probe_outputs import PROBE_OUTPUTS, probed_batches, some_rows, square, squared_difference
from liar_opt.passes.repairs import DEFAULT_RIDGE
from liar_opt.passes.sweep import held_batches
from liar_opt.runtime.errors import ModelError, OptionError
from liar_opt.runtime.moments import Moments
from liar_opt.runtime.solve import choose_dense_ridge, dense_target_error, fit_dense_target

SHARE = 4
"""One part in so many of the memory may be taken by the moments of runs that are measured together."""

Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Gap:
    """A run that may go: ``target`` becomes ``source``, plus the change of ``use`` where the map is folded into it.

    Attributes:
        run: the blocks.
        source: the stream before the gap; the sum before its normalisation where the map is folded.
        target: that behind it.
        use: the last product before the gap; None where the map is one of its own, of the source.
    """

    run: Run
    source: str
    target: str
    use: ConsumerUse | None = None

    @property
    def input(self) -> str:
        """The tensor that is read for z."""
        return self.source if self.use is None else str(self.use.activation.name)


@dataclass(frozen=True, eq=False)
class Fit:
    """What is added: z ``change`` + ``shift``, [n, m] and [m]; None leaves the stream alone. ``ridge`` is relative."""

    change: NDArray[np.float64] | None
    shift: NDArray[np.float64]
    ridge: float | None = None


@dataclass(frozen=True)
class LeftOut(Finding):
    """The blocks that were left out, as the report has it.

    Attributes:
        blocks: how many.
        of: how many there are in their row.
        first: the first of them, from 0.
        source: the stream before them.
        target: that behind them.
        repair: what stands there: "map", "fold" or "none".
        ridge: of the map, relative; None without one.
        error: relative squared difference of the output, on held-back batches.
        error_none: that without repair.
        tried: the error of each run that was tried, in order; a map is folded only where a block is before the run.
        caches: outputs that hold zeros since.
        prunable: parameters that widths could have been cut of, which went.
        added: parameters of the map that stands there.
        exact_difference: of the result and of the original in which the map stands; None in a dry run.
    """

    by: ClassVar[str] = "leave-out-blocks"
    blocks: int
    of: int
    first: int
    source: str
    target: str
    repair: str
    ridge: float | None
    error: float
    error_none: float
    tried: list[float]
    caches: list[str]
    prunable: int
    added: int
    exact_difference: float | None


@dataclass(frozen=True)
class TriedBlocks:
    """One number of blocks beside widths, as the report has it.

    Attributes:
        blocks: how many went.
        first: the first of them, from 0; None where none went.
        error: relative squared difference of the output on batches that nothing was fitted to; None of a goal not met.
        parameters: of what is left; likewise.
        seconds: that it took.
        why: why the goal was not met.
    """

    blocks: int
    first: int | None
    error: float | None
    parameters: int | None
    seconds: float
    why: str | None = None


@dataclass(frozen=True)
class ComparedBlocks(Finding):
    """How many blocks go, where they share a goal with widths, as the report has it.

    Attributes:
        chosen: how many.
        decided_by: "error", or "parameters" where a largest loss is the goal.
        tried: each number that was tried.
    """

    by: ClassVar[str] = "prune_auto"
    chosen: int
    decided_by: str
    tried: list[TriedBlocks]


@dataclass(frozen=True, eq=False)
class ChosenRun:
    """The run that goes.

    Attributes:
        gap: where.
        fit: what repairs it, of all rows.
        errors: of each candidate, in their order: the relative squared difference of the output, on held-back batches.
        plain: that of this run without repair.
        dtype: the type of the stream.
    """

    gap: Gap
    fit: Fit
    errors: tuple[float, ...]
    plain: float
    dtype: np.dtype[Any]


def candidate_runs(state: State, length: int) -> list[Run]:
    """Returns all runs of so many blocks.

    Raises:
        ModelError: no blocks are found.
        OptionError: there are not so many of them.
    """
    stacks = find_stacks(state.analysed())
    name = f"'{state.model.source}'" if state.model.source else "the model"
    if not stacks:
        raise ModelError(
            f"no blocks are found in {name}: nowhere is one tensor all that goes on between parts that repeat; leave "
            "--blocks out"
        )
    most = max(stack.blocks for stack in stacks) - 1
    if length > most:
        rows = " and ".join(str(stack.blocks) for stack in stacks)
        raise OptionError(f"blocks {length} is too many: {name} has {rows} blocks in a row; give {most} at most")
    return [run for stack in stacks for run in stack.runs(length)]


def gaps_of(state: State, runs: Sequence[Run], repair: str) -> list[Gap]:
    """Returns where each run would go; of a map that is folded only those that have a product before them.

    Raises:
        ModelError: none has.
    """
    if repair != "fold":
        return [Gap(run, run.before, run.behind) for run in runs]
    found = []
    for run in runs:
        sums = run.sums
        use = None if sums is None else last_product(state.analysed(), run, sums[0])
        if sums is not None and use is not None:
            found.append(Gap(run, *sums, use))
    if not found:
        raise ModelError("no run has a product with a weight of its own before it that a map can be folded into")
    return found


def choose_run(
    state: State, gaps: Sequence[Gap], repair: str, ridge: float | None, weighting: str, fold: str = "all"
) -> ChosenRun:
    """Returns the run whose repair leaves the least error at the output.

    Args:
        state: analysed, with its calibration data.
        gaps: the candidates.
        repair: "map", "fold" or "none".
        ridge: relative; None chooses it on held-back rows.
        weighting: of the rows; see ``PruneGroupsPass``.
        fold: the rows that the repair is fitted to in the end: "all", or "training" where others are to judge it.
    """
    trials = Trials(state, gaps, weighting)
    errors: list[float] = []
    fits: list[Fit] = []
    for gap, moments in trials.measured(repair != "none"):
        tried = alone(gap, trials.width(gap)) if moments is None else fitted(moments, trials.biased(gap), ridge, "training")
        errors.append(trials.error(gap, tried))
        # Moments are large: of the runs only those that may still win keep what is fitted to all rows.
        best = errors[-1] == min(errors)
        fits.append(tried if moments is None or not best else fitted(moments, trials.biased(gap), ridge, fold))
        state.progress("choose blocks", len(errors), len(gaps))
    place = int(np.argmin(errors))
    gap = gaps[place]
    plain = trials.error(gap, alone(gap, trials.width(gap)))
    kept = trials.kept[trials.probed[0]]
    return ChosenRun(gap, fits[place], tuple(errors), plain, kept[gap.target].dtype)


def alone(gap: Gap, width: int) -> Fit:
    """Returns what adds nothing."""
    return Fit(None, np.zeros(width))


def fitted(moments: Moments, biased: bool, ridge: float | None, fold: str) -> Fit:
    """Returns the change that is fitted to the rows of a fold ("training" or "all"); its ridge is chosen on the others.

    Args:
        moments: of z, with the cross moments of x_r - x_l.
        biased: whether there is a bias.
        ridge: relative; None chooses it.
        fold: whose rows are fitted to.
    """
    cross = moments.cross_statistics("all").covariance
    kept, nothing = np.arange(moments.width), np.zeros(cross.shape)
    item = Measured(nothing, kept, moments, aware=moments, centred=biased)
    used = DEFAULT_RIDGE if ridge is None else ridge
    if min(moments.rows("training"), moments.rows("held_back")) >= 2:
        training, held_back = item.with_target("training"), item.with_target("held_back")
        assert training is not None and held_back is not None
        if ridge is None:
            used = choose_dense_ridge(training, held_back, kept, nothing)
        tried = fit_dense_target(*training, kept, nothing, used)
        shift = np.zeros(cross.shape[1])
        if dense_target_error(*held_back, kept, tried.weight, tried.bias) > dense_target_error(
            *held_back, kept, nothing, shift
        ):
            return Fit(None, shift)
        if fold == "training":
            tried = tried.on_host()
            return Fit(tried.weight, tried.bias, tried.ridge_used)
    everything = item.with_target("all")
    assert everything is not None
    found = fit_dense_target(*everything, kept, nothing, used).on_host()
    return Fit(found.weight, found.bias, found.ridge_used)


class Trials:
    """Measures and tries runs of blocks on the model as it came.

    Args:
        state: analysed, with its calibration data.
        gaps: the candidates.
        weighting: of the rows.
    """

    def __init__(self, state: State, gaps: Sequence[Gap], weighting: str) -> None:
        assert state.calibration is not None
        self.state, self.gaps, self.weighting = state, gaps, weighting
        self.walk, self.engine, self.data = state.analysed(), state.engine(), state.calibration
        self.nodes = self.walk.model.graph.nodes
        self.made = {t.name: i for i, n in enumerate(self.nodes) for t in n.outputs}
        several = len(self.data.batches) > 1
        self.held = set(held_batches(len(self.data.batches))) if several else set()
        self.probed = probed_batches(self.data, self.held)
        presents = {c.present for c in self.walk.caches.values()}
        ends = [t for t in self.walk.model.graph.outputs if getattr(t, "type", "") == "tensor_type" and is_float(t.dtype)]
        self.outputs = [t.name for t in ends if t.name not in presents][:PROBE_OUTPUTS]
        self.rewriter = Rewriter(self.walk)
        self.kept: dict[int, dict[str, NDArray[Any]]] = {}

    def width(self, gap: Gap) -> int:
        """Returns the width of the stream."""
        axes = self.walk.axes[gap.target]
        assert axes is not None
        return self.walk.algebra.size(axes[-1])

    def biased(self, gap: Gap) -> bool:
        """Returns whether what repairs a gap may have a bias."""
        return gap.use is None or self.rewriter.has_bias(gap.use)

    def measured(self, moments: bool) -> Iterator[tuple[Gap, Moments | None]]:
        """Yields each gap with its moments, of all batches; keeps what trials need."""
        each = 4 * 8 * max(self.width(gap) for gap in self.gaps) ** 2
        together = max(1, self.state.memory.limit // SHARE // each)
        for gaps in (self.gaps[i : i + together] for i in range(0, len(self.gaps), together)):
            found = {id(gap): Moments(self.width(gap)) for gap in gaps}
            self._run(gaps, found if moments else {})
            for gap in gaps:
                yield gap, found[id(gap)] if moments else None

    def _run(self, gaps: Sequence[Gap], found: Mapping[int, Moments]) -> None:
        tensors = {name for gap in gaps for name in (gap.source, gap.target, gap.input)}
        given = {t.name for t in self.walk.model.graph.inputs}
        ends = [] if self.kept else self.outputs
        wanted = sorted({*tensors, *ends} - given)
        batches = range(len(self.data.batches)) if found else self.probed
        stop = max(self.made[name] for name in wanted) + 1
        part = self.engine.part(self.walk, 0, stop, wanted, {})
        for index in batches:
            feeds = self.data.batches[index]
            ran = part.run(feeds, arrays=wanted)
            values = {name: self.engine.array(value) for name, value in ran.items()} | {
                n: feeds[n] for n in tensors & given
            }
            for gap in gaps if found else ():
                self._add(found[id(gap)], gap, values, index)
            if index in self.probed:
                self.kept.setdefault(index, {}).update(values)

    def _add(self, moments: Moments, gap: Gap, values: Mapping[str, NDArray[Any]], index: int) -> None:
        mask = self.data.row_masks[index]
        source, target = (stream_rows(values[name], mask) for name in (gap.source, gap.target))
        z = self.read(gap, values, mask)
        gain = np.ones((len(z), 1), np.float32)
        if self.weighting == "stream":
            gain = 1.0 / np.sqrt(target.var(axis=1, keepdims=True) + VARIANCE_FLOOR)
        square = gain * gain
        x, goal = z * gain, (target - source) * gain
        held, count = index in self.held, float(square.sum())
        moments.add_block_rows(count, (x * gain).sum(axis=0), [x.T @ x], [0, x.shape[1]], held, len(x))
        moments.add_cross(count, x.T @ goal, (goal * gain).sum(axis=0), float(np.square(goal).sum()), held)

    def read(self, gap: Gap, values: Mapping[str, NDArray[Any]], mask: NDArray[np.bool_] | None) -> Array:
        """Returns the rows of z, [r, n]."""
        rows = stream_rows(values[gap.input], mask)
        return rows if gap.use is None else rows @ weight_of(gap.use)

    def error(self, gap: Gap, fit: Fit) -> float:
        """Returns the relative squared difference of the first output that the gap changes."""
        behind = self.made[gap.target] + 1
        later = {t.name for n in self.nodes[behind:] for t in n.outputs}
        outputs = [n for n in self.outputs if n in later or n == gap.target]
        part = None
        lost, power = dict.fromkeys(outputs, 0.0), dict.fromkeys(outputs, 0.0)
        for index in self.probed:
            kept, mask = self.kept[index], self.data.row_masks[index]
            value = self.stood_in(gap, fit, kept)
            wanted = [n for n in outputs if n != gap.target]
            if part is None and wanted:
                part = self.engine.part(self.walk, behind, len(self.nodes), wanted, {gap.target: value}, once=True)
            ran = {} if part is None else part.run({**self.data.batches[index], gap.target: value}, arrays=wanted)
            ends = {name: self.engine.array(v) for name, v in ran.items()} | {gap.target: value}
            for name in outputs:
                found, dense = some_rows(ends[name], mask), some_rows(kept[name], mask)
                lost[name] += squared_difference(found, dense)
                power[name] += square(dense)
        return next((lost[n] / (power[n] or 1.0) for n in outputs if lost[n] > 0), 0.0)

    def stood_in(self, gap: Gap, fit: Fit, values: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """Returns what stands in for the target of a gap."""
        source = values[gap.source]
        if fit.change is None:
            return source
        z = self.read(gap, values, None)
        added = z @ fit.change.astype(np.float32) + fit.shift.astype(np.float32)
        return np.asarray((source.astype(np.float32) + added.reshape(source.shape)).astype(source.dtype))


def weight_of(use: ConsumerUse) -> Array:
    """Returns the weight of a product, with its scale, [n, m]."""
    value = np.asarray(use.node.inputs[use.weight_position].values)
    return np.asarray(use.matrix(value), np.float32) * np.float32(use.scale)


def stream_rows(value: NDArray[Any], mask: NDArray[np.bool_] | None) -> Array:
    """Returns the rows of a stream that are real, [r, n]; all where the mask has another layout."""
    rows = np.asarray(value, np.float32)
    if mask is not None:
        if rows.shape[: mask.ndim] == mask.shape:
            rows = rows[mask]
        elif rows.shape[: mask.ndim] == mask.shape[::-1]:
            rows = rows[mask.T]
        elif rows.size == mask.size * rows.shape[-1]:
            rows = rows.reshape(-1, rows.shape[-1])[mask.reshape(-1)]
    return np.asarray(rows.reshape(-1, rows.shape[-1]))
