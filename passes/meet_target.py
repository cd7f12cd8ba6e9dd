"""Decide widths by what the result shall be: parameters, file size, operations or measured latency.

    params=10M  params=0.5x     floating-point weights of the whole model
    size=40MB   size=0.5x       bytes of its file
    flops=3G    flops=0.5x      operations of all contractions on the first calibration batch
    latency=5ms latency=2x      median time of that batch in ONNX Runtime; 2x is twice as fast

What one block of a group costs is found on blank cuts (`passes.blank_cut`) of one group of every shape; the allocation
then picks the widths whose costs add up to the target. The model cut to them is looked at as a whole, and what it misses
the target by is added to the goal, a few times, until it lands.

Latency is not linear in the width. All groups of one shape are cut together to a few widths, and the time that is saved,
shared among them, gives the table of that shape on this machine, provider and batch. The table is kept in the user's cache.
"""

import hashlib
import json
import math
import os
import platform
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np

from liar_opt.frontend.onnx_model import Stored
from liar_opt.passes.allocate_widths import (
    Cost,
    joined,
    meant,
    menus_of,
    note_widths,
    require_allocatable,
    require_sharing,
    step_of,
)
from liar_opt.passes.allocations import ALLOCATIONS
from liar_opt.passes.base import Pass, PassResult, State
from liar_opt.passes.blank_cut import blank_cut, file_bytes, operations, session_of
from liar_opt.passes.groups import ChannelGroup
from liar_opt.passes.prune_groups import cut_arrays
from liar_opt.runtime.errors import ModelError, OptionError
from liar_opt.runtime.latency import measure_latency
from liar_opt.runtime.user_cache import cache_folder
from liar_opt.runtime.whole_file import write_whole

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
ROUNDS = 6
FRACTIONS = (0.75, 0.5, 0.25)
"""Widths of the latency table between all and the least."""
TABLE_SECONDS = 1.0
CHECK_SECONDS = 2.0


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


@dataclass(frozen=True)
class MeetTargetPass(Pass[tuple[dict[str, int], dict[str, Any]]]):
    """Decide the widths at which the model meets a target.

    Attributes:
        target: what the result shall be: params=10M, size=40MB, flops=0.5x or latency=2x (twice as fast).
        multiple_of: kept feed-forward widths are multiples of this.
        allocate: how it is shared out over the layers; a name in ``allocations.ALLOCATIONS``.
        query_key: "auto" lets the width of queries and keys within each head share in it, by error curves.
    """

    name: ClassVar[str] = "meet-target"
    target: str = "params=0.7x"
    multiple_of: int = 8
    allocate: str = "curves"
    query_key: Literal["auto"] | None = None

    def requires(self, state: State) -> None:
        """Checks the options.

        Raises:
            OptionError: the target is not understood, ``multiple_of`` is below one, or queries and keys cannot share in it.
            ModelError: there is nothing to prune.
        """
        parse_target(self.target)
        require_allocatable(state, self.allocate, self.multiple_of)
        require_sharing(self.query_key, self.allocate)

    def plan(self, state: State) -> tuple[dict[str, int], dict[str, Any]]:
        """Returns the number of blocks that stay, by group name, and what the report says of the search.

        The goal is corrected until the model that is cut to it meets the target.
        """
        target = parse_target(self.target)
        gauge = _Gauge(target.kind, state)
        groups, curves = state.groups, state.facts.get("curves", {})
        queries = state.queries if self.query_key == "auto" else ()
        costs = gauge.costs((*groups, *queries), self.multiple_of)
        menus = menus_of(groups, self.multiple_of, curves, costs)
        menus, meaning = joined(menus, groups, queries, self.multiple_of, curves, costs)
        fixed = gauge.dense - sum(float(m.costs[-1]) for m in menus)
        wanted = target.absolute(gauge.dense)
        if wanted >= gauge.dense:
            has = f"{gauge.dense:,.6g} {NAMES[target.kind]}"
            raise OptionError(f"target '{self.target}' is met already: the model has {has}; ask for less")
        narrowest = meant({m.name: int(m.widths[0]) for m in menus}, meaning)
        if wanted < fixed + sum(float(m.costs[0]) for m in menus) * 1.1:  # near the end: look, before refusing
            least = gauge.value(narrowest)
            if wanted < least * (1.0 - CLOSE[target.kind]):
                raise OptionError(_unreachable(self.target, target, least, gauge.dense, groups, state))
        goal, best, tried = wanted - fixed, None, []
        for _ in range(ROUNDS):
            keep = meant(ALLOCATIONS[self.allocate](menus, max(goal, sum(float(m.costs[0]) for m in menus))), meaning)
            value = gauge.value(keep)
            tried.append(value)
            miss = abs(value / wanted - 1.0)
            if best is None or miss < best[0]:
                best = (miss, keep, value)
            if miss <= CLOSE[target.kind] or keep == narrowest:
                break
            goal += wanted - value
        assert best is not None
        facts = {"asked": self.target, "kind": target.kind, "wanted": wanted, "dense": gauge.dense, "found": best[2]}
        return best[1], {**facts, "tried": tried, "table": gauge.source}

    def apply(self, state: State, plan: tuple[dict[str, int], dict[str, Any]]) -> PassResult:
        """Notes the widths; the rest goes to ``State.facts``."""
        keep, state.facts["target"] = plan
        note_widths(state, keep)
        return PassResult(state)


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


class _Gauge:
    """Measures one quantity of models cut to given widths."""

    def __init__(self, kind: Kind, state: State) -> None:
        assert state.calibration is not None
        self.kind = kind
        self.stored: Stored = state.facts["dense"]
        self.device, self.fresh = state.device, state.fresh
        self.feeds = state.calibration.batches[0]
        self.source = "counted"
        self.session: Any = None
        if kind == "latency":
            self.source = "measured"
            model, _ = blank_cut(self.stored, {})
            self.digest = hashlib.sha256(model.skeleton().SerializeToString()).hexdigest()
            self.session = session_of(model, self.device)
            self.dense = measure_latency([self.session], self.feeds, budget=TABLE_SECONDS).seconds[0]
        else:
            self.dense = self.value({})
        if not self.dense > 0:
            raise ModelError(f"the {NAMES[kind]} of this model cannot be counted; give another target")

    def value(self, keep: Mapping[str, int]) -> float:
        """Returns the quantity at widths; seconds are those of the dense model, scaled by a ratio taken in turns."""
        model, ends = blank_cut(self.stored, keep)
        if self.kind == "params":
            return model.parameters()
        if self.kind == "size":
            return file_bytes(model)
        feeds = cut_arrays(dict(self.feeds), ends)
        if self.kind == "flops":
            return operations(model, feeds)
        return self.dense / self._speedup(model, feeds, CHECK_SECONDS)

    def _speedup(self, model: Any, feeds: Mapping[str, Any], budget: float) -> float:
        sessions = [self.session, session_of(model, self.device)]
        return measure_latency(sessions, [self.feeds, feeds], budget=budget, most=2000).speedup

    def costs(self, groups: Sequence[ChannelGroup], multiple_of: int) -> Cost:
        """Returns what a group costs at each width, up to a constant."""
        shapes: dict[str, list[ChannelGroup]] = defaultdict(list)
        for group in groups:
            shapes[_shape(group)].append(group)
        if self.kind != "latency":
            slopes = {s: self._slope(members[0]) for s, members in shapes.items()}
            return lambda group, widths: slopes[_shape(group)] * widths.astype(np.float64)
        table = self._table(shapes, multiple_of)
        return lambda group, widths: np.interp(widths, *table[_shape(group)]).astype(np.float64)

    def _slope(self, group: ChannelGroup) -> float:
        keep = group.size // 2
        return (self.dense - self.value({group.name: keep})) / (group.size - keep)

    def _table(
        self, shapes: Mapping[str, list[ChannelGroup]], multiple_of: int
    ) -> dict[str, tuple[list[int], list[float]]]:
        """Returns widths and seconds of each shape; from the cache where the same was measured before."""
        import onnxruntime

        given = {
            "graph": self.digest,
            "batch": sorted((k, list(v.shape), str(v.dtype)) for k, v in self.feeds.items()),
            "machine": [platform.node(), platform.machine(), _processor(), os.cpu_count()],
            "runtime": [onnxruntime.__version__, self.device],
            "multiple_of": multiple_of,
            "fractions": FRACTIONS,
        }
        key = hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:32]
        path = cache_folder() / "latency" / f"{key}.json"
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if set(stored) == set(shapes) and not self.fresh:
                self.source = f"cache {path}"
                return {s: (list(w), list(t)) for s, (w, t) in stored.items()}
        except (OSError, ValueError):
            pass
        table = {s: self._saved(members, multiple_of) for s, members in shapes.items()}
        _store(path, table)
        return table

    def _saved(self, members: Sequence[ChannelGroup], multiple_of: int) -> tuple[list[int], list[float]]:
        size = members[0].size
        step = step_of(members[0], multiple_of)
        widths = sorted({max(step, step * round(size * f / step)) for f in FRACTIONS} | {step, size})
        seconds = []
        for width in widths:
            if width == size:
                seconds.append(0.0)
                continue
            model, ends = blank_cut(self.stored, {g.name: width for g in members})
            ratio = self._speedup(model, cut_arrays(dict(self.feeds), ends), TABLE_SECONDS)
            seconds.append(-self.dense * (1.0 - 1.0 / ratio) / len(members))
        # More is never faster: what noise says against it is evened out. The narrowest costs nothing, by convention.
        rising = np.maximum.accumulate(np.asarray(seconds) - seconds[0])
        return widths, rising.tolist()


def _shape(group: ChannelGroup) -> str:
    """Groups of one shape cost the same."""
    consumers = [(c.width, len(c.uses), list(c.uses[0].weight.shape), c.uses[0].node.op) for c in group.consumers]
    return json.dumps([group.kind, group.size, group.parameters, consumers])


def _store(path: Path, table: Mapping[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(table) + "\n")
    except OSError:
        return  # a cache that cannot be written costs seconds, nothing else


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


__all__ = ["MeetTargetPass", "Target", "parse_target"]
