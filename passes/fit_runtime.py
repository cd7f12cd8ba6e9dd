"""Have all widths fit what will run the result: multiples of what its kernels work on, equal where it knows one number.

What a runtime wants is its row in `passes.runtimes`. Here it becomes the step of each group, in blocks, which every
allocation works in, whatever set the goal: ratios, a target, a largest loss, a search.

    feed-forward    lcm(ffn, block) N channels, N parts of a tensor-parallel model
    convolutions    conv channels
    heads           lcm(heads, N), and so many that the block divides all that the output projection contracts
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np

from liar_opt.frontend.rules.operators import has
from liar_opt.frontend.rules.table import Trait
from liar_opt.passes.allocate_widths import NAMED, Expressible, step_of
from liar_opt.passes.base import Finding, Pass, PassResult, State
from liar_opt.passes.groups import ChannelGroup
from liar_opt.passes.meet_target import LatencyTable, latency_table
from liar_opt.passes.options import DECI, PruneOptions
from liar_opt.passes.registry import lookup
from liar_opt.passes.runtimes import BLOCK, RUNTIMES, Runtime, of_format
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.latency import CannotTime

CLEAR = 0.01
"""Share of the dense model's time by which a narrower width is faster."""
PLAIN = Runtime(ffn=1, conv=1, block=BLOCK, sources=())
"""What nobody says wants nothing."""


class Faster(NamedTuple):
    """Another width that would be faster by the latency table: of which group, and the seconds that it saves."""

    group: str
    width: int
    seconds: float


@dataclass(frozen=True)
class Fitted(Finding):
    """What was asked for the sake of a runtime, and what came of it, as the report has it.

    Attributes:
        runtime: its name; None where tensor parallelism or 4-bit weights alone were asked for.
        asked: what that means, a phrase each.
        whole_layers: whether it would load a model of which layers went as a whole.
        device: what measured here.
        speedup: by measurement here; None where nothing was timed.
        faster: whether it is.
        next: where it is not, the next width that would be, by the latency table; None where no narrower one was tried.
    """

    by: ClassVar[str] = "fit-runtime"
    runtime: str | None
    asked: list[str]
    whole_layers: bool
    device: str | None = None
    speedup: float | None = None
    faster: bool | None = None
    next: dict[str, Any] | None = None


def require_fit(options: PruneOptions, stored: str) -> None:
    """Checks that options do not contradict what will run the result.

    Args:
        options: of the run.
        stored: what the result is, "onnx" or "checkpoint".

    Raises:
        OptionError: they do, or the runtime is unknown.
    """
    parts, name = options.tensor_parallel, options.runtime
    if parts is not None and parts < 1:
        raise OptionError(f"tensor-parallel {parts} is below 1; give the number of parts that the model is split into")
    if name is None:
        return
    row = lookup("runtime", RUNTIMES, name)
    if stored not in row.reads:
        whole = "give the checkpoint that it was exported from, and write a checkpoint"
        way = whole if stored == "onnx" else "write ONNX with --format onnx"
        raise OptionError(f"{name} reads no {'ONNX' if stored == 'onnx' else stored}, and the result would be one; {way}")
    if name == "gguf" and options.checkpoint == DECI and options.heads:
        raise OptionError(
            "llama.cpp's converter takes the heads of DeciLM to be hidden_size / num_attention_heads wide, which fewer are "
            "not; leave heads out, or --format deci"
        )
    if options.given("multiple_of") and options.multiple_of % row.ffn:
        raise OptionError(
            f"multiple-of {options.multiple_of} excludes {name}, which wants feed-forward widths in multiples of {row.ffn};"
            " give a multiple of that, or leave multiple-of out"
        )
    if options.whole_layers == "on" and not row.whole_layers:
        raise OptionError(
            f"{name} counts the layers of a model by its caches, and takes none that went whole; leave whole-layers out"
        )
    if row.equal_widths and (options.values or options.query_key) and options.values != options.query_key:
        raise OptionError(
            f"{name} wants values as wide as queries and keys; leave values and query-key out, or give both one ratio"
        )


def fit_runtime(options: PruneOptions, stored: int = 1) -> list[Pass[Any]]:
    """Returns the pass that has widths fit, where something asks for it; ``stored``: the blocks that weights have."""
    block, deci = options.quantize == "int4", options.checkpoint == DECI
    if options.runtime is None and options.tensor_parallel is None and not block and not deci and stored == 1:
        return []
    asked = tuple(kind for kind, ratio in (("ffn", options.ffn), ("heads", options.heads)) if ratio)
    return [FitRuntimePass(options.runtime, options.tensor_parallel or 1, block, asked, stored, deci)]


@dataclass(frozen=True)
class FitRuntimePass(Pass[dict[str, int]]):
    """Give every group the step that what runs the result wants.

    Attributes:
        runtime: its name in ``runtimes.RUNTIMES``.
        tensor_parallel: parts that the model is split into.
        blocks: whether weights become blocks of 4 bits in this run.
        asked: kinds that were asked for by name; that none of them can be narrower is an error then.
        stored: the size of the blocks in which the model has its weights; 1 where there are none.
        deci: whether the result is a checkpoint of DeciLM.
    """

    name: ClassVar[str] = "fit-runtime"
    runtime: str | None = None
    tensor_parallel: int = 1
    blocks: bool = False
    asked: tuple[str, ...] = ()
    stored: int = 1
    deci: bool = False

    @property
    def row(self) -> Runtime:
        """What the runtime wants."""
        return of_format(PLAIN if self.runtime is None else RUNTIMES[self.runtime], self.deci)

    @property
    def block(self) -> int:
        """What must divide that which a matrix contracts."""
        return math.lcm(self.row.block if self.blocks or self.row.always else 1, self.stored)

    @property
    def wanting(self) -> str:
        """What wants the steps, for messages."""
        split = f"tensor-parallel {self.tensor_parallel}" if self.tensor_parallel > 1 else ""
        stored = f"the model's blocks of {self.stored}" if self.stored > 1 else ""
        names = (
            self.runtime or "",
            "the format deci" if self.deci else "",
            split,
            f"4-bit blocks of {self.block}" if self.blocks else stored,
        )
        return " and ".join(name for name in names if name) or "what runs it"

    def plan(self, state: State) -> dict[str, int]:
        """Returns the step of every group, in blocks.

        Raises:
            OptionError: the model as it is cannot be split into the parts.
        """
        return {g.name: self._step(g) for g in (*state.groups, *state.values, *state.queries)}

    def _step(self, group: ChannelGroup) -> int:
        row, parts = self.row, self.tensor_parallel
        if group.kind == "ffn":
            if _slides(group):
                return _of_blocks(row.conv, _channels(group))
            if group.size * _channels(group) % parts:
                raise OptionError(_unsplit(parts, f"the {group.size * _channels(group)} channels of '{group.name}'"))
            return _of_blocks(math.lcm(row.ffn, self.block) * parts, _channels(group))
        if group.kind != "heads":
            return 1
        if group.size * group.queries % parts:
            raise OptionError(_unsplit(parts, f"the {group.size * group.queries} heads of '{group.name}'"))
        if group.size % parts:  # fewer groups of heads than parts: each part has a copy, as long as all stay
            return group.size
        return math.lcm(row.heads, parts, _of_blocks(self.block * parts, group.block_width))

    def apply(self, state: State, plan: dict[str, int]) -> PassResult:
        """Gives the groups their steps, takes away what a configuration could say beside them, and adds a ``Fitted``.

        Raises:
            OptionError: nothing that was asked for can be narrower.
        """
        tied = self.row.equal_heads

        def fitted(group: ChannelGroup) -> ChannelGroup:
            step = math.lcm(group.step, plan[group.name])
            return replace(group, step=step, together=tied and group.kind == "heads")

        state.groups = tuple(g if g.fixed else fitted(g) for g in state.groups)
        state.values, state.queries = tuple(map(fitted, state.values)), tuple(map(fitted, state.queries))
        narrowed = [g for g in state.groups if not g.fixed]
        self._require_narrower(state, narrowed)
        expressible = state.get(Expressible)
        if expressible is not None:
            state.add(replace(expressible, allowed=_in_steps(state.groups, expressible)))
        state.add(Fitted(self.runtime, self._phrases(narrowed), self.row.whole_layers))
        return PassResult(state)

    def _require_narrower(self, state: State, groups: Sequence[ChannelGroup]) -> None:
        """Notes groups that no step leaves narrower.

        Raises:
            OptionError: there are none but these, or of a kind that was asked for.
        """
        whole = [g for g in groups if step_of(g, 1) == g.size > 1]
        for kind in self.asked:
            own = [g for g in groups if g.kind == kind]
            if own and all(g in whole for g in own):
                widest = max(own, key=lambda g: g.size)
                raise OptionError(
                    f"no narrower {kind} fits {self.wanting}: '{widest.name}' has {widest.size}, and what stays must be a "
                    f"multiple of {widest.step}; leave one of the two out"
                )
        if groups and len(whole) == len(groups):
            widest = max(whole, key=lambda g: g.size)
            raise OptionError(
                f"nothing fits {self.wanting}: no group is wider than the multiples that it wants ('{widest.name}', "
                f"{widest.kind}, has {widest.size}, what stays must be a multiple of {widest.step}); leave that out"
            )
        if whole:
            named = ", ".join(f"'{g.name}'" for g in whole[:NAMED])
            more = f" and {len(whole) - NAMED} more" if len(whole) > NAMED else ""
            note = f"{named}{more}: no narrower width fits {self.wanting}, so they are left whole"
            if note not in state.model.notes:
                state.model.notes.append(note)

    def _phrases(self, groups: Sequence[ChannelGroup]) -> list[str]:
        """Returns what was asked for, of the kinds of groups that there are."""
        found = []
        for said, chosen in (
            ("feed-forward widths", [g for g in groups if g.kind == "ffn" and not _slides(g)]),
            ("channels between convolutions", [g for g in groups if g.kind == "ffn" and _slides(g)]),
            ("heads", [g for g in groups if g.kind == "heads" and g.queries == 1]),
            ("groups of heads", [g for g in groups if g.kind == "heads" and g.queries > 1]),
        ):
            steps = sorted({g.step * (_channels(g) if g.kind == "ffn" else 1) for g in chosen})
            if steps and steps != [1]:
                found.append(f"{said} in multiples of {' or '.join(map(str, steps))}")
        if self.row.equal_heads and any(g.kind == "heads" for g in groups):
            found.append("as many heads in all layers")
        if self.row.equal_widths:
            found.append("values as wide as keys")
        return found


def _slides(group: ChannelGroup) -> bool:
    """Returns whether a group is of channels between convolutions."""
    return any(has(use.node, Trait.SLIDES) for consumer in group.consumers for use in consumer.uses)


def _channels(group: ChannelGroup) -> int:
    """Returns the channels of a block: a convolution contracts each of them as often as its kernel has places."""
    uses = [use for consumer in group.consumers[:1] for use in consumer.uses]
    window = next((use.window for use in uses if use.window is not None), None)
    return group.block_width // (1 if window is None else math.prod(window.kernel))


def _of_blocks(channels: int, width: int) -> int:
    """Returns the least number of blocks of a width that are a multiple of so many channels."""
    return channels // math.gcd(channels, max(width, 1))


def _unsplit(parts: int, what: str) -> str:
    return f"tensor-parallel {parts} does not divide {what}: the model as it is cannot be split so; give another number"


def _in_steps(groups: Sequence[ChannelGroup], expressible: Expressible) -> dict[str, tuple[int, ...]]:
    """Returns the widths that a configuration can say and steps allow, those of one field with each other."""
    allowed, steps = dict(expressible.allowed), {g.name: g.step for g in groups}
    linked = [name for name in allowed if name in expressible.linked]
    for length in {len(allowed[name]) for name in linked}:
        members = [name for name in linked if len(allowed[name]) == length]
        fits = [i for i in range(length) if all(allowed[n][i] % steps.get(n, 1) == 0 for n in members)]
        allowed |= {name: tuple(allowed[name][i] for i in fits) for name in members}
    others = (name for name in expressible.allowed if name not in expressible.linked)
    return allowed | {n: tuple(w for w in allowed[n] if w % steps.get(n, 1) == 0) for n in others}


def time_narrower(state: State, speedup: float, spread: float) -> None:
    """Times narrower widths where what was fitted is not faster, so that the report can say which would be."""
    found = state.get(Fitted)
    wanted = found is not None and found.runtime is not None and not _faster(speedup, spread)
    if wanted and state.get(LatencyTable) is None:
        with contextlib.suppress(CannotTime):
            state.add(latency_table(state))


def _faster(speedup: float, spread: float) -> bool:
    """Returns whether a result is faster by more than chance."""
    return speedup > 1.0 + 2.0 * spread


def measured_fit(state: State, device: str, speedup: float | None, spread: float) -> Fitted | None:
    """Returns what came of a fit, by the times of this run; None where nothing was to fit.

    Args:
        state: behind the checks.
        device: what measured.
        speedup: the dense model's time over that of the result; None where nothing was timed.
        spread: its relative standard error.
    """
    found = state.get(Fitted)
    if found is None:
        return None
    faster = None if speedup is None else _faster(speedup, spread)
    better = None if faster is None or faster else _next_faster(state)
    told = None if better is None else better._asdict()
    return replace(found, device=device, speedup=speedup, faster=faster, next=told)


def _next_faster(state: State) -> Faster | None:
    """Returns the next width that the latency table says to be faster, of the group that it is nearest in."""
    table = state.get(LatencyTable)
    found = []
    for group in (g for g in state.groups if table is not None and g.name in table.costs):
        assert table is not None
        widths, seconds = table.costs[group.name]
        width, step = state.keep.get(group.name, group.size), step_of(group, 1)
        for narrower in range(width - (width % step or step), 0, -step):
            now, then = np.interp([width, narrower], widths, seconds)
            if now - then >= CLEAR * table.dense:
                found.append((narrower / width, Faster(group.name, narrower, float(now - then))))
                break
    return max(found, key=lambda entry: entry[0])[1] if found else None
