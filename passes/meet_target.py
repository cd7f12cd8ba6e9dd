"""Decide widths by what the result shall be: parameters, file size, operations or measured latency.

    params=10M  params=0.5x     floating-point weights of the whole model
    size=40MB   size=0.5x       bytes of its file
    flops=3G    flops=0.5x      operations of all contractions on the first calibration batch
    latency=5ms latency=2x      median time of that batch in ONNX Runtime, or torch; 2x is twice as fast

What one block of a group costs is found on blank cuts (`passes.blank_cut`) of one group of every shape; the allocation
then picks the widths whose costs add up to the target. The model cut to them is looked at as a whole, and what it misses
the target by is added to the goal, a few times, until it lands.

Latency is not linear in the width. All groups of one shape are cut together to a few widths, and the time that is saved,
shared among them, gives the table of that shape on this machine, provider and batch, each model in a process of its own
(`runtime.latency`), a module and what is cut of it in this one, in turns. What is noise in it is evened out, so that the
error decides among what the clock cannot tell apart:

    line      saved(w) = b (n - w), b by weighted least squares, where no point is further than two standard errors from it
    rate      b is the pooled time of one operation, for all shapes whose own is within two standard errors of that
    otherwise the weighted isotonic regression of the points

Widths by that table and widths by parameters are both brought to the target, and those are taken that lose less. The
table is kept in the user's cache (`runtime.kept_results`).
"""

import hashlib
import json
import math
import os
import platform
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from liar_opt.frontend.model import Original
from liar_opt.frontend.onnx_model import OnnxOriginal
from liar_opt.frontend.onnx_quantise import RefusedError, Scheme, quantised
from liar_opt.frontend.vocabulary import cut_words, find_words
from liar_opt.passes.allocate_widths import (
    Cost,
    Expressible,
    Meaning,
    candidates_together,
    meant,
    note_widths,
    require_allocatable,
    require_sharing,
    step_of,
)
from liar_opt.passes.allocations import ALLOCATIONS, Candidates
from liar_opt.passes.base import DenseModel, Finding, Pass, PassResult, State, WholeModel
from liar_opt.passes.blank_cut import blank_cut, clock_of, deployed, in_one_form, operations
from liar_opt.passes.curves import Curves
from liar_opt.passes.cut_vocabulary import ChosenWords
from liar_opt.passes.groups import GONE, ChannelGroup
from liar_opt.passes.runtimes import BLOCK
from liar_opt.passes.sweep import cut_arrays
from liar_opt.runtime.errors import ModelError, OptionError
from liar_opt.runtime.kept_results import file_of, load_result, store_result
from liar_opt.runtime.latency import Latency, measure_latency
from liar_opt.runtime.one_at_a_time import WAITING, one_at_a_time
from liar_opt.runtime.ranks import current

Kind = Literal["params", "size", "flops", "latency"]
UNITS: dict[Kind, dict[str, float]] = {
    "params": {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9},
    "size": {
        "": 1, "B": 1, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30,
    },
    "flops": {"": 1, "M": 1e6, "G": 1e9, "T": 1e12},
    "latency": {"s": 1, "ms": 1e-3, "us": 1e-6},
}  # fmt: skip
NAMES = {"params": "parameters", "size": "bytes on disk", "flops": "FLOPs", "latency": "seconds"}
CLOSE = {"params": 2e-3, "size": 2e-3, "flops": 2e-3, "latency": 0.02}
"""How near is near enough, relative to the target."""
CLEARLY = 0.8
"""What widths by a latency table must lose less than this times what those of a ratio lose, to be taken: a few percent of
time, which no clock on a shared machine tells apart, are some ten percent of error."""
ROUNDS = 6
FRACTIONS = (0.75, 0.5, 0.25)
"""Widths of the latency table between all and the least."""
TABLE_SECONDS = 1.0
CHECK_SECONDS = 2.0
SPREAD = 0.01
"""Relative standard error of a ratio of times at which it was measured long enough."""


@dataclass(frozen=True)
class Target:
    """What is asked for: ``value`` in the unit of its kind, or as a factor of the dense model."""

    kind: Kind
    value: float
    relative: bool

    def absolute(self, dense: float) -> float:
        """Returns the value that the result shall have."""
        if not self.relative:
            return self.value
        return dense / self.value if self.kind == "latency" else dense * self.value


def parse_target(text: str) -> Target:
    """Reads a target such as ``size=40MB``.

    Raises:
        OptionError: it is not one.
    """
    match = re.fullmatch(r"\s*(\w+)\s*=\s*([0-9.eE+]+)\s*([A-Za-z]*)\s*", text)
    if match is None or match[1] not in UNITS:
        raise OptionError(
            f"target '{text}' is not understood; give params=, size=, flops= or latency= with 0.5x or a number"
        )
    kind = cast(Kind, match[1])
    try:
        number = float(match[2])
    except ValueError as err:
        raise OptionError(f"target '{text}' has no number; give for example {kind}=0.5x") from err
    relative = match[3] in ("x", "X")
    if not relative and match[3] not in UNITS[kind]:
        units = ", ".join(["x", *(u for u in UNITS[kind] if u)])
        raise OptionError(f"target '{text}' has unit '{match[3]}'; choose one of {units}")
    value = number if relative else number * UNITS[kind][match[3]]
    if not 0.0 < value < math.inf:
        raise OptionError(f"target '{text}' is not above zero")
    if relative and ((kind == "latency") == (value < 1.0)):
        way = "2x is twice as fast" if kind == "latency" else "0.5x is half of it"
        raise OptionError(f"target '{text}' asks for more than the model has now; {way}")
    return Target(kind, value, relative)


class MetAlreadyError(OptionError):
    """The model meets the target as it is."""


class UnreachableError(OptionError):
    """No widths meet the target."""


@dataclass(frozen=True)
class MetTarget(Finding):
    """How a target was met, as the report has it.

    Attributes:
        asked: the option, as it was given.
        kind: params, size, flops or latency.
        wanted: the value that the result shall have, in elements, bytes, operations or seconds.
        dense: that of the model as it came.
        found: that of the result.
        tried: those of the widths that were tried.
        table: where latencies come from.
    """

    by: ClassVar[str] = "meet-target"
    asked: str
    kind: Kind
    wanted: float
    dense: float
    found: float
    tried: list[float]
    table: str


@dataclass(frozen=True)
class LatencyTable(Finding):
    """What widths take by the clock.

    Attributes:
        dense: seconds of the whole model.
        costs: by group name widths, ascending, and the seconds that they take, over those of the narrowest.
    """

    by: ClassVar[str] = "meet-target"
    dense: float
    costs: Mapping[str, tuple[list[int], list[float]]]


@dataclass(frozen=True)
class MeetTargetPass(Pass[Target]):
    """Decide the widths at which the model meets a target.

    Attributes:
        target: what the result shall be: params=10M, size=40MB, flops=0.5x or latency=2x (twice as fast).
        multiple_of: kept feed-forward widths are multiples of this.
        allocate: how it is shared out over the layers; a name in ``allocations.ALLOCATIONS``.
        query_key: "auto" lets the width of queries and keys within each head share in it, by error curves.
        uniform: groups of one kind and width keep the same width, as one configuration for all layers says it.
        quantize: how the result will be quantised; a size is that of the quantised file then.
        block: of 4-bit weights.
    """

    name: ClassVar[str] = "meet-target"
    target: str = "params=0.7x"
    multiple_of: int = 8
    allocate: str = "curves"
    query_key: Literal["auto"] | None = None
    uniform: bool = False
    quantize: str | None = None
    block: int = BLOCK

    def requires(self, state: State) -> None:
        """Checks the options.

        Raises:
            OptionError: the target is not understood, ``multiple_of`` is below one, or queries and keys cannot share in it.
            ModelError: there is nothing to prune.
        """
        parse_target(self.target)
        require_allocatable(state, self.allocate, self.multiple_of)
        require_sharing(self.query_key, self.allocate)

    def plan(self, state: State) -> Target:
        """Returns the target; what widths come to is only known of models that are cut to them."""
        return parse_target(self.target)

    def apply(self, state: State, plan: Target) -> PassResult:
        """Notes the widths, and how they meet the target: the goal is corrected until the model that is cut to it does.

        Raises:
            MetAlreadyError: the target is met already.
            UnreachableError: it cannot be.
        """
        met, keep = current().once(lambda: self._met(state, plan))
        state.add(met)
        note_widths(state, keep)
        return PassResult(state)

    def _met(self, state: State, target: Target) -> tuple[MetTarget, dict[str, int]]:
        """Returns how the target is met, and the widths."""
        scheme = None if self.quantize is None else Scheme(self.quantize, self.block)
        gauge = _Gauge(target.kind, state, scheme)
        groups, known = state.groups, state.get(Curves)
        curves = {} if known is None else known.by_group
        queries = state.queries if self.query_key == "auto" else ()
        whole = {name: sorted(curve.whole) for name, curve in curves.items() if curve.whole}
        costs = gauge.costs((*groups, *queries), self.multiple_of, whole)
        if gauge.table:
            state.add(LatencyTable(gauge.dense, {g.name: gauge.table[_shape(g)] for g in groups}))
        expressible = state.get(Expressible)
        candidates, meaning = candidates_together(
            groups, queries, self.multiple_of, curves, costs, self.uniform, expressible
        )
        fixed = gauge.whole - sum(float(m.costs[-1]) for m in candidates)
        wanted = target.absolute(gauge.given)
        if wanted >= gauge.whole:
            has = f"{gauge.whole:,.6g} {NAMES[target.kind]}" + (
                "".join(f" without the {what} that go" for what in gauge.without)
            )
            has += " once it is quantised" if gauge.scheme else ""
            raise MetAlreadyError(f"target '{self.target}' is met already: the model has {has}; ask for less")
        narrowest = meant({m.name: int(m.widths[0]) for m in candidates}, meaning)
        if wanted < fixed + sum(float(m.costs[0]) for m in candidates) * 1.1:  # near the end: look, before refusing
            least = gauge.value(narrowest)
            if wanted < least * (1.0 - CLOSE[target.kind]):
                raise UnreachableError(_unreachable(self.target, target, least, gauge.given, groups, state))
        search = _Search(self, gauge, wanted, candidates, meaning)
        search.run(wanted - fixed)
        if target.kind == "latency" and self.allocate == "curves" and curves:
            # Never worse than the ratio that reaches the same time: a table is only as good as the clock.
            plain, plain_meaning = candidates_together(
                groups, queries, self.multiple_of, curves, uniform=self.uniform, expressible=expressible
            )
            other = _Search(self, gauge, wanted, plain, plain_meaning)
            everything = sum(float(m.costs[-1]) for m in plain)
            other.run(everything * (1.0 - search.removed))
            search = other if preferred(other.best, search.best) else search
        best = search.best
        met = MetTarget(self.target, target.kind, wanted, gauge.given, best.value, search.tried, gauge.source)
        return met, best.keep


class Landed(NamedTuple):
    """Widths, what they come to, how far that is from the target, how far it may be, and what they lose by the curves."""

    keep: dict[str, int]
    value: float
    miss: float
    slack: float
    error: float

    @property
    def landed(self) -> bool:
        """Whether it meets the target, as far as that can be told."""
        return self.miss <= self.slack


def preferred(plain: Landed, table: Landed) -> bool:
    """Returns whether the widths that a ratio gives are taken instead of those that a table of latencies gives.

    A table measured beside other work is wrong in ways that its own errors do not show, and widths by it then lose more at
    the same time. So they must be clearly better by the curves, which do not depend on the clock.
    """
    if plain.landed != table.landed:
        return plain.landed
    return plain.error * CLEARLY <= table.error if plain.landed else plain.miss <= table.miss


class _Search:
    """Brings one allocation to the target: the goal is corrected by what the model that is cut to it comes to."""

    def __init__(
        self, options: MeetTargetPass, gauge: "_Gauge", wanted: float, candidates: Sequence[Candidates], meaning: Meaning
    ) -> None:
        self.allocate, self.kind = ALLOCATIONS[options.allocate], gauge.kind
        self.gauge, self.wanted, self.candidates, self.meaning = gauge, wanted, candidates, meaning
        self.least, self.most = (sum(float(m.costs[i]) for m in candidates) for i in (0, -1))
        self.tried: list[float] = []
        self.landed: list[Landed] = []
        self.goals: list[float] = []

    @property
    def best(self) -> Landed:
        """Where it came nearest to the target."""
        return min(self.landed, key=lambda one: one.miss)

    @property
    def removed(self) -> float:
        """The share of the costs that went at the best."""
        at = self.landed.index(self.best)
        return (self.most - self.goals[at]) / (self.most or 1.0)

    def run(self, goal: float) -> None:
        """Starts from a goal in the currency of the candidates."""
        narrowest = meant({m.name: int(m.widths[0]) for m in self.candidates}, self.meaning)
        for _ in range(ROUNDS):
            goal = min(max(goal, self.least), self.most)
            chosen = self.allocate(self.candidates, goal)
            keep = meant(chosen, self.meaning)
            value = self.gauge.value(keep)
            error = sum(float(m.errors[np.searchsorted(m.widths, chosen[m.name])]) for m in self.candidates)
            slack = max(CLOSE[self.kind], 2.0 * self.gauge.spread)
            self.landed.append(Landed(keep, value, abs(value / self.wanted - 1.0), slack, error))
            self.tried.append(value)
            self.goals.append(goal)
            if self.best.landed or keep == narrowest:
                return
            if self.kind != "latency":
                goal += self.wanted - value
            elif value < self.gauge.dense:  # from the whole model in a straight line
                goal = self.most - (self.most - goal) * (self.gauge.dense - self.wanted) / (self.gauge.dense - value)
            else:
                goal = (goal + self.least) / 2


def _unreachable(
    asked: str, target: Target, least: float, dense: float, groups: Sequence[ChannelGroup], state: State
) -> str:
    if target.kind == "latency":
        best = f"latency={dense / least:.2f}x ({1000 * least:.2f} ms)"
    else:
        best = f"{target.kind}={least / dense:.3f}x ({least:,.0f} {NAMES[target.kind]})"
    all_, prunable = state.model.parameters(), sum(g.parameters for g in groups)
    return (
        f"target '{asked}' cannot be reached: with every group at its narrowest the best is {best}; what cannot be pruned "
        f"(embeddings, the width of the residual stream) holds {max(all_ - prunable, 0):,} of {all_:,} parameters"
    )


def latency_table(state: State) -> LatencyTable:
    """Times narrower widths of every group of a model, without repairing anything; from the cache where that is known.

    Raises:
        CannotTime: no process could be started.
    """
    gauge = _Gauge("latency", state)
    gauge.costs(state.groups, 1, {})
    return LatencyTable(gauge.dense, {g.name: gauge.table[_shape(g)] for g in state.groups})


class _Gauge:
    """Measures one quantity of models cut to given widths."""

    def __init__(self, kind: Kind, state: State, scheme: Scheme | None = None) -> None:
        assert state.calibration is not None
        self.kind = kind
        self.scheme = scheme if kind == "size" else None
        self.dense_model = state.found(DenseModel).original
        self.device, self.fresh = state.device, state.fresh
        self.waiting = lambda: state.progress(WAITING, 0, 1)
        self.feeds = state.calibration.batches[0]
        self.source = "counted"
        self.spread = 0.0  # relative standard error of the last value
        self.original: Any = None
        self.words: ChosenWords | None = None
        self.table: dict[str, tuple[list[int], list[float]]] = {}
        """Of latencies: by shape the widths that were timed, and seconds."""
        if kind == "latency":
            self.source = "measured"
            model, _ = blank_cut(self.dense_model, {})
            self.clock = clock_of(model, self.device)
            self.digest = hashlib.sha256(model.structure()).hexdigest()
            self.original = deployed(model, self.device)
            self.dense = measure_latency([self.original], self.feeds, budget=TABLE_SECONDS).seconds[0]
        elif self.scheme is not None:
            self.dense = blank_cut(self.dense_model, {})[0].file_bytes()
        else:
            self.dense = self.value({})
        self.words = state.get(ChosenWords)
        same = kind == "latency" or (self.words is None and self.scheme is None)
        self.whole = self.dense if same else self.value({})
        whole = state.get(WholeModel)
        self.given = self.dense if whole is None else self._given(whole.original)
        self.without = [*([] if self.words is None else ["words"]), *(() if whole is None else whole.went)]
        if not self.dense > 0:
            raise ModelError(f"the {NAMES[kind]} of this model cannot be counted; give another target")

    def _given(self, original: Original) -> float:
        """Returns the quantity of the model as it came, with the experts and blocks that went since."""
        model, _ = blank_cut(original, {})
        if self.kind == "latency":
            return self.dense / self._beside(model, self.feeds, CHECK_SECONDS).speedup
        return self._counted(model, self.feeds)

    def _counted(self, model: Any, feeds: Mapping[str, Any]) -> float:
        if self.kind == "params":
            return float(model.parameters())
        if self.kind == "size" and self.scheme is not None:
            return float(self._quantised_bytes(model, feeds))
        return float(model.file_bytes() if self.kind == "size" else operations(model, feeds))

    def value(self, keep: Mapping[str, int]) -> float:
        """Returns the quantity at widths; seconds are those of the dense model, scaled by a ratio taken in turns."""
        model, ends = blank_cut(self.dense_model, keep)
        if self.words is not None and self.kind != "latency":  # a table of ids and logits at full width are hardly timed
            cut_words(model, find_words(model), self.words.kept, self.words.unknown, not self.words.renumbered)
        feeds = cut_arrays(dict(self.feeds), ends)
        if self.kind != "latency":
            return self._counted(model, feeds)
        found = self._beside(model, feeds, CHECK_SECONDS)
        self.spread = found.spread if math.isfinite(found.spread) else SPREAD
        return self.dense / found.speedup

    def _quantised_bytes(self, model: Any, feeds: Mapping[str, Any]) -> float:
        """Returns the bytes of a model's file once it is quantised: that is done, whatever its numbers.

        Raises:
            OptionError: the quantiser does not take it.
        """
        assert self.scheme is not None
        try:
            return quantised(OnnxOriginal(*model.as_written()), self.scheme, [feeds])[1]
        except RefusedError as err:
            raise OptionError(f"the quantiser refuses the graph ({err}); leave quantize out, or give another") from err

    def _beside(self, model: Any, feeds: Mapping[str, Any], budget: float) -> Latency:
        """Times a model and the dense one in turns."""
        models = in_one_form([self.original, deployed(model, self.device)])
        return measure_latency(models, [self.feeds, feeds], budget=budget, most=2000, close=SPREAD)

    def costs(self, groups: Sequence[ChannelGroup], multiple_of: int, whole: Mapping[str, Collection[int]]) -> Cost:
        """Returns what a group costs at each width, up to a constant.

        Args:
            groups: the groups.
            multiple_of: kept feed-forward widths are multiples of this.
            whole: by group name what may stand in for its whole sublayer, where it may go.
        """
        shapes: dict[str, list[ChannelGroup]] = defaultdict(list)
        for group in groups:
            shapes[_shape(group)].append(group)
        if self.kind != "latency":
            slopes = {s: self._slope(members[0]) for s, members in shapes.items()}

            def counted(group: ChannelGroup, widths: NDArray[np.int64]) -> NDArray[np.float64]:
                return slopes[_shape(group)] * np.maximum(widths, 0).astype(np.float64)

            return self._or_whole(counted)
        table = self.table = self._table(shapes, multiple_of, whole)

        def timed(group: ChannelGroup, widths: NDArray[np.int64]) -> NDArray[np.float64]:
            return np.interp(widths, *table[_shape(group)]).astype(np.float64)

        return timed

    def _or_whole(self, cost: Cost) -> Cost:
        """Returns what a group costs at each width, that of its sublayer gone whole among them, up to the same constant."""
        known: dict[tuple[str, int], float] = {}

        def spent(group: ChannelGroup, widths: NDArray[np.int64]) -> NDArray[np.float64]:
            found = cost(group, widths)
            first, *others = ("",) if group.sublayer is None else group.sublayer.members
            for place in np.flatnonzero(widths <= GONE) if group.name == first else ():  # the first one's is that of all
                keep = int(widths[place])
                key = f"{_shape(group)} {len(others)}", keep
                if key not in known:
                    gone = self.whole - self.value(dict.fromkeys(others, GONE) | {first: keep})
                    whole = float(cost(group, np.asarray([group.size]))[0])
                    known[key] = whole - gone
                found[place] = known[key]
            return found

        return spent

    def _slope(self, group: ChannelGroup) -> float:
        keep = group.size // 2
        return (self.whole - self.value({group.name: keep})) / (group.size - keep)

    def _table(
        self, shapes: Mapping[str, list[ChannelGroup]], multiple_of: int, whole: Mapping[str, Collection[int]]
    ) -> dict[str, tuple[list[int], list[float]]]:
        """Returns widths and seconds of each shape; from the cache where the same was measured before.

        Widths of zero and below are what stands in for whole sublayers (`groups.FORMS`).
        """
        given = {
            "graph": self.digest,
            "batch": sorted((k, list(v.shape), str(v.dtype)) for k, v in self.feeds.items()),
            "machine": [platform.node(), platform.machine(), _processor(), os.cpu_count()],
            **self.clock,
            "multiple_of": multiple_of,
            "steps": sorted({(s, members[0].step) for s, members in shapes.items()}),
            "fractions": FRACTIONS,
            "whole": sorted((name, list(forms)) for name, forms in whole.items()),
        }
        path = file_of("latency", given, ".json")
        with one_at_a_time(path, self.waiting):
            kept = None if self.fresh else load_result(path, lambda stream: _read_table(stream, shapes))
            if kept is not None:
                self.source = f"cache {path}"
                return kept
            points = {s: self._points(members, multiple_of) for s, members in shapes.items()}
            evened = zip(points.items(), smoothed(list(points.values())), strict=True)
            table = {s: (own.widths.tolist(), times.tolist()) for (s, own), times in evened}
            for shape, members in shapes.items():
                for form, saved in sorted(self._saved_whole(members, whole).items(), reverse=True):
                    widths, times = table[shape]
                    table[shape] = [form, *widths], [times[-1] - saved, *times]
            store_result(path, lambda stream: stream.write(f"{json.dumps(table)}\n".encode()))
        return table

    def _saved_whole(self, members: Sequence[ChannelGroup], whole: Mapping[str, Collection[int]]) -> dict[int, float]:
        """Returns the seconds that each group of one shape saves where its whole sublayer goes, by what stands in."""
        saved = {}
        for form in sorted({form for g in members for form in whole.get(g.name, ())}):
            going = [g for g in members if form in whole.get(g.name, ()) and g.sublayer is not None]
            keep = {name: GONE for g in going if g.sublayer is not None for name in g.sublayer.members}
            model, ends = blank_cut(self.dense_model, keep | {g.name: form for g in going})
            found = self._beside(model, cut_arrays(dict(self.feeds), ends), TABLE_SECONDS)
            saved[form] = self.dense / len(going) * (1.0 - 1.0 / found.speedup)
        return saved

    def _points(self, members: Sequence[ChannelGroup], multiple_of: int) -> "Points":
        """Times models in which all groups of one shape are cut to a few widths."""
        size = members[0].size
        step = step_of(members[0], multiple_of)
        widths = sorted({max(step, step * round(size * f / step)) for f in FRACTIONS} | {step})
        saved, errors, operations_saved = [], [], []
        whole = operations(blank_cut(self.dense_model, {})[0], self.feeds)
        for width in (w for w in widths if w < size):
            model, ends = blank_cut(self.dense_model, {g.name: width for g in members})
            feeds = cut_arrays(dict(self.feeds), ends)
            found = self._beside(model, feeds, TABLE_SECONDS)
            each = self.dense / len(members)
            saved.append(each * (1.0 - 1.0 / found.speedup))
            known = found.spread if math.isfinite(found.spread) else SPREAD
            errors.append(each * max(known, SPREAD / 2) / found.speedup)
            operations_saved.append((whole - operations(model, feeds)) / len(members))
        kept = np.asarray([w for w in widths if w < size] + [size])
        return Points(kept, np.asarray(saved), np.asarray(errors), np.asarray(operations_saved, dtype=np.float64))


class Points(NamedTuple):
    """What groups of one shape save at a few widths.

    Attributes:
        widths: ascending, [w]; the last is the whole, at which nothing is saved.
        saved: seconds for each group at the others, [w - 1].
        errors: their standard errors, [w - 1].
        operations: that go for each group, [w - 1].
    """

    widths: NDArray[np.int64]
    saved: NDArray[np.float64]
    errors: NDArray[np.float64]
    operations: NDArray[np.float64]


def smoothed(shapes: Sequence[Points]) -> list[NDArray[np.float64]]:
    """Returns what a group of each shape costs at its widths, seconds [w] over that of the narrowest; never falling.

    Args:
        shapes: what was measured.
    """
    from scipy.optimize import isotonic_regression  # slow to import

    slopes: list[tuple[float, float, bool]] = []  # seconds of a block, its standard error, whether a line fits
    for own in shapes:
        gone, weights = (own.widths[-1] - own.widths[:-1]).astype(np.float64), own.errors**-2.0
        power = float(weights @ gone**2)
        slope = float(weights @ (gone * own.saved)) / power
        slopes.append((slope, power**-0.5, bool(np.all(np.abs(own.saved - slope * gone) <= 2 * own.errors))))
    # Seconds of one operation, of each shape that is a line and of all.
    each = [float(np.mean(own.operations / (own.widths[-1] - own.widths[:-1]))) for own in shapes]
    lines = [i for i, (_, _, fits) in enumerate(slopes) if fits and each[i] > 0]
    weight = {i: (each[i] / slopes[i][1]) ** 2 for i in lines}
    rate = sum(weight[i] * slopes[i][0] / each[i] for i in lines) / (sum(weight.values()) or 1.0)
    result = []
    for i, (own, (slope, error, fits)) in enumerate(zip(shapes, slopes, strict=True)):
        if fits:
            slope = rate * each[i] if i in weight and abs(slope - rate * each[i]) <= 2 * error else slope
            times = max(slope, 0.0) * (own.widths - own.widths[0])
        else:
            falling = isotonic_regression(own.saved, weights=own.errors**-2.0, increasing=False).x
            times = falling[0] - np.append(np.maximum(falling, 0.0), 0.0)
            times = np.maximum.accumulate(times - times[0])
        result.append(np.asarray(times, np.float64))
    return result


def _shape(group: ChannelGroup) -> str:
    """Groups of one shape cost the same."""
    consumers = [(c.width, len(c.uses), list(c.uses[0].weight.shape), c.uses[0].node.op) for c in group.consumers]
    return json.dumps([group.kind, group.size, group.parameters, consumers])


def _read_table(stream: IO[bytes], shapes: Collection[str]) -> dict[str, tuple[list[int], list[float]]]:
    """Reads a latency table of these shapes; raises anything where it is none."""
    found = {s: ([int(n) for n in w], [float(x) for x in t]) for s, (w, t) in json.load(stream).items()}
    if set(found) != set(shapes) or not all(len(w) == len(t) > 0 and np.isfinite(t).all() for w, t in found.values()):
        raise ValueError("the table is of other shapes, or has no numbers")
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
