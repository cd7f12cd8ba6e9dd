"""Search from the allocated widths, by forward passes alone: whatever lowers the true error of the whole model is kept.

One streaming pass over the dense model makes *variants* of every group: its repaired weights at the allocated width and at
a few widths around it. Any combination of variants is a model whose output difference on a few held-back calibration
batches is measured directly, interactions between layers included, without pruning anything. From the start one group is
widened and another narrowed by as many parameters, the exchanges first that the error curves promise most of; an exchange
stays if the measured error falls. It ends with its time, or when nothing is left to try, and is never worse than its start.

Tyr-the-Pruner (arXiv 2503.09657) searches so over local pruning variants, by evolution; here it is a local search.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from liar_opt.frontend.engine import Patch
from liar_opt.frontend.onnx_segments import Place
from liar_opt.passes.allocate_widths import step_of
from liar_opt.passes.base import Finding, Pass, PassResult, State
from liar_opt.passes.curves import Curves, GroupCurve
from liar_opt.passes.groups import KINDS, ChannelGroup
from liar_opt.passes.probe_outputs import ProbeOutputs, repaired
from liar_opt.passes.prune_groups import GroupVisitor, PruneGroupsPass, by_set
from liar_opt.passes.repairs import AWARE, RepairFunction
from liar_opt.passes.scores import SELECTION_RIDGE, problems_of
from liar_opt.passes.sweep import Sweep
from liar_opt.runtime.errors import InternalError, OptionError
from liar_opt.runtime.moments import Moments
from liar_opt.runtime.ranks import current
from liar_opt.runtime.solve import select_greedy

REACH = 2
"""Variants on either side of the allocated width."""
SHARE = 16
"""A step of a width is this part of it, or one block."""


@dataclass(frozen=True)
class Searched(Finding):
    """What the search came to: the error where it started and where it ended, the trials, and the seconds."""

    by: ClassVar[str] = "search-widths"
    start: float
    found: float
    tried: int
    seconds: float


@dataclass(frozen=True)
class SearchWidthsPass(Pass[list[int]]):
    """Exchange widths between groups while that lowers the measured error of the output.

    Attributes:
        search: seconds to spend on measuring, at the most.
        same_kind: whether only groups of one kind exchange, because each kind has its own ratio.
        multiple_of: kept feed-forward widths are multiples of this.
        repair: how the variants are repaired; a name in ``registry.REPAIRS``.
        weighting: of the calibration rows; see ``PruneGroupsPass``.
        seed: for all that is drawn.
    """

    name: ClassVar[str] = "search-widths"
    search: float = 60.0
    same_kind: bool = False
    multiple_of: int = 8
    repair: str | RepairFunction = "liar"
    weighting: str = "stream"
    seed: int = 0

    def requires(self, state: State) -> None:
        """Checks the options and what was measured.

        Raises:
            OptionError: there is no time to search in.
        """
        if not self.search > 0:
            raise OptionError(f"search {self.search:g} is not above zero; give the seconds that it may take")
        if state.calibration is None or state.get(Curves) is None:
            raise InternalError("nothing was measured to search by")

    def plan(self, state: State) -> list[int]:
        """Returns the positions of the groups that may exchange: those that are wider than one step."""
        measured = state.found(Curves).by_group
        found = ((i, g) for i, g in enumerate(state.groups) if g.kind in KINDS and g.name in measured and not g.together)
        return [i for i, g in found if g.size > step_of(g, self.multiple_of)]

    def apply(self, state: State, plan: list[int]) -> PassResult:
        """Makes the variants and searches; the widths are those of the least error that was measured."""
        groups = [state.groups[i] for i in plan]
        ladders = {g.name: self._ladder(g, state.keep[g.name]) for g in groups}
        repair = "liar" if self.repair in AWARE else self.repair  # a variant stands alone: what is before it is dense
        options = PruneGroupsPass(repair=repair, weighting=self.weighting, seed=self.seed)
        sweep = Sweep(state, "variants", self.weighting, self.seed)
        run = MakeVariants(sweep, options, ladders)
        sweep.over(run, groups)
        keep, found = current().once(lambda: self._searched(state, groups, run, ladders))
        state.keep = {**state.keep, **keep}
        state.add(found)
        return PassResult(state)

    def _searched(
        self, state: State, groups: Sequence[ChannelGroup], run: "MakeVariants", ladders: dict[str, list[int]]
    ) -> tuple[dict[str, int], Searched]:
        """Returns the widths of the least error that was measured."""
        curves = state.found(Curves).by_group
        keep = {g.name: state.keep[g.name] for g in groups}
        start = best = run.error(keep)
        began, tried, seen = time.perf_counter(), 0, {tuple(keep.values())}
        improved = True
        while improved:
            improved = False
            for trial in self._exchanges(groups, keep, ladders, curves):
                if time.perf_counter() - began > self.search:
                    break
                if tuple(trial.values()) in seen:
                    continue
                seen.add(tuple(trial.values()))
                tried += 1
                error = run.error(trial)
                state.progress("search", min(int(time.perf_counter() - began), int(self.search)), int(self.search) or 1)
                if error < best:
                    keep, best, improved = trial, error, True
                    break
        return keep, Searched(start, best, tried, time.perf_counter() - began)

    def _ladder(self, group: ChannelGroup, width: int) -> list[int]:
        """Widths around the allocated one, ascending."""
        least = step_of(group, self.multiple_of)
        step = max(least, least * round(group.size / SHARE / least))
        around = (width + step * i for i in range(-REACH, REACH + 1))
        return sorted({w for w in around if least <= w <= group.size} | {width})

    def _exchanges(
        self,
        groups: Sequence[ChannelGroup],
        keep: dict[str, int],
        ladders: dict[str, list[int]],
        curves: Mapping[str, GroupCurve],
    ) -> Iterator[dict[str, int]]:
        """Yields widths that cost no more than they do now, the most promising first."""
        total = sum(g.parameters * keep[g.name] / g.size for g in groups)
        found: list[tuple[float, int, dict[str, int]]] = []
        for wider in groups:
            above = [w for w in ladders[wider.name] if w > keep[wider.name]]
            for narrower in groups:
                if not above or narrower is wider or (self.same_kind and narrower.kind != wider.kind):
                    continue
                for width in reversed([w for w in ladders[narrower.name] if w < keep[narrower.name]]):
                    trial = {**keep, wider.name: above[0], narrower.name: width}
                    if sum(g.parameters * trial[g.name] / g.size for g in groups) > total * (1 + 1e-9):
                        continue
                    change = sum(curves[g.name].errors[trial[g.name]] - curves[g.name].errors[keep[g.name]] for g in groups)
                    found.append((float(change), len(found), trial))
                    break
        for _, _, trial in sorted(found, key=lambda f: f[:2]):
            yield trial


class MakeVariants(GroupVisitor):
    """Makes the variants of every group on the dense model, and measures combinations of them.

    Args:
        sweep: over the dense model.
        options: how is repaired.
        ladders: the widths of every group.
    """

    def __init__(self, sweep: Sweep, options: PruneGroupsPass, ladders: Mapping[str, list[int]]) -> None:
        super().__init__(sweep, options)
        self.ladders, self.probes = ladders, ProbeOutputs(sweep)
        self.patches: dict[tuple[str, int], list[Patch]] = {}

    def group(self, group: ChannelGroup, moments: Mapping[Place, Moments]) -> None:
        """Repairs one group at every width of its ladder."""
        measured = [self.measured(c, moments) for c in group.consumers]
        ladder = self.ladders[group.name]
        orders = {
            first: select_greedy(problems_of(own), ladder[0], SELECTION_RIDGE).removed_blocks
            for first, own in by_set(group, measured)
        }
        for width in ladder:
            kept = [f + np.setdiff1d(np.arange(group.size), o[: group.size - width]) for f, o in orders.items()]
            blocks = np.concatenate(kept)
            self.patches[group.name, width] = repaired(self, group, measured, blocks)

    def error(self, keep: dict[str, int]) -> float:
        """Relative squared difference of the output at these widths."""
        return self.probes.difference([p for name, width in keep.items() for p in self.patches[name, width]]) or 0.0
