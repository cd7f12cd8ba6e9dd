"""Find the largest sparsity whose loss stays inside a limit, by few evaluations.

The error curves say what every sparsity loses, up to a factor: the sum of the errors of the widths that the allocation
picks. An evaluation prunes the model to one sparsity and measures the loss; the quotient of the two is carried to the next
guess, between the largest sparsity that was inside and the smallest that was not.

The loss is 1 - the mean cosine of the model's first output to the dense model's on calibration batches that nothing is
fitted to, or what a user's metric loses, relative to its value on the dense model:
(metric(dense) - metric(pruned)) / |metric(dense)|.
"""

import math
import re
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np

from liar_opt.frontend.either_model import as_given
from liar_opt.passes.allocate_widths import (
    Expressible,
    Meaning,
    candidates_together,
    meant,
    note_widths,
    require_allocatable,
    require_sharing,
)
from liar_opt.passes.allocations import ALLOCATIONS, Candidates
from liar_opt.passes.base import Analysis, Change, DenseModel, Finding, Pass, PassResult, State, WholeModel
from liar_opt.passes.curves import Curves
from liar_opt.passes.find_groups import FindGroupsPass
from liar_opt.passes.groups import parameters_left
from liar_opt.passes.normalise_graph import NormaliseGraphPass
from liar_opt.passes.plan_memory import TensorSizes
from liar_opt.passes.prune_groups import Cut, PruneGroupsPass
from liar_opt.passes.sweep import held_batches
from liar_opt.passes.verify_model import first_difference, whole_session
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.ranks import current
from liar_opt.runtime.sessions import Runner

Metric = Callable[[Any], float]
"""A user's own: a model (an ONNX proto, or a module) -> a number, the higher the better."""
GRID = tuple(i / 50 for i in range(1, 50))
"""Sparsities between which the search interpolates nothing: one of them is the result."""
EVALUATIONS = 6
NEAR = 0.9
"""A loss above this share of the limit is near enough to stop."""


def parse_drop(drop: float | str) -> float:
    """Reads a limit such as ``1%`` or 0.01.

    Raises:
        OptionError: it is not one, or not between 0 and 1.
    """
    text = str(drop).strip()
    match = re.fullmatch(r"([0-9.eE+-]+)\s*(%?)", text)
    try:
        value = float(match[1]) / (100.0 if match[2] else 1.0) if match else math.nan
    except ValueError:
        value = math.nan
    if not 0.0 < value < 1.0:
        raise OptionError(f"max-drop '{text}' is not between 0 and 100 %; give for example 1% or 0.01")
    return value


class CannotKeepError(OptionError):
    """No sparsity loses as little as is allowed."""


@dataclass(frozen=True)
class LimitedDrop(Finding):
    """How much could go, as the report has it.

    Attributes:
        asked: the option, as it was given.
        wanted: the largest loss that is allowed.
        found: the loss of the result.
        sparsity: its share of the prunable parameters that are gone.
        tried: pairs of a sparsity and its loss.
        stopped: the traceback of the metric where that failed.
        held_back: whether the loss was measured on rows that nothing was fitted to.
        kind: always "drop".
    """

    by: ClassVar[str] = "limit-drop"
    asked: str
    wanted: float
    found: float
    sparsity: float
    tried: list[list[float]]
    stopped: str | None
    held_back: bool
    kind: str = "drop"


@dataclass(frozen=True)
class LimitDropPass(Pass[tuple[list[Candidates], Meaning]]):
    """Prune as much as a limit on the loss allows.

    Attributes:
        max_drop: the largest loss, such as 1% or 0.01: of 1 - the cosine of the output, or of the metric.
        metric: a function of a model (an ONNX proto, or a module) that returns a number, the higher the better.
        multiple_of: kept feed-forward widths are multiples of this.
        allocate: how a sparsity is shared out over the layers; a name in ``allocations.ALLOCATIONS``.
        query_key: "auto" lets the width of queries and keys within each head share in it, by error curves.
        cut: how each candidate is pruned.
        uniform: groups of one kind and width keep the same width, as one configuration for all layers says it.
    """

    name: ClassVar[str] = "limit-drop"
    max_drop: float | str = 0.01
    metric: Metric | None = None
    multiple_of: int = 8
    allocate: str = "curves"
    query_key: Literal["auto"] | None = None
    cut: PruneGroupsPass = field(default_factory=PruneGroupsPass)
    uniform: bool = False

    def requires(self, state: State) -> None:
        """Checks the options.

        Raises:
            OptionError: the limit is not understood, or queries and keys cannot share in it.
            ModelError: there is nothing to prune.
        """
        parse_drop(self.max_drop)
        require_allocatable(state, self.allocate, self.multiple_of)
        require_sharing(self.query_key, self.allocate)

    def plan(self, state: State) -> tuple[list[Candidates], Meaning]:
        """Returns what each group may become, and what widths of joined candidates stand for."""
        curves = state.found(Curves).by_group
        queries = state.queries if self.query_key == "auto" else ()
        expressible = state.get(Expressible)
        return candidates_together(
            state.groups, queries, self.multiple_of, curves, uniform=self.uniform, expressible=expressible
        )

    def apply(self, state: State, plan: tuple[list[Candidates], Meaning]) -> PassResult:
        """Searches; the state becomes that of the last candidate that was inside.

        Raises:
            OptionError: the metric fails before anything was inside.
            CannotKeepError: nothing is.
        """
        search = _Search(self, state, *plan)
        search.run()
        if search.best is None:
            tried = ", ".join(f"{search.gone[s]:.0%} loses {loss:.2%}" for s, loss in sorted(search.losses.items()))
            raise CannotKeepError(
                f"max-drop '{self.max_drop}' cannot be kept: {tried}; allow more, give more calibration samples, or prune "
                "one kind alone (--ffn, --heads)"
            )
        trial, changes, sparsity = search.best
        trial.model.notes = state.model.notes
        if not search.unseen:
            trial.model.notes.append(
                "max-drop was measured on the rows that the repair was fitted to, since there is nothing to hold back: the "
                "loss on other data is larger; give more calibration samples, or a metric of your own"
            )
        state.model, state.walk, state.groups = trial.model, trial.walk, trial.groups
        state.keep, state.repairs = trial.keep, trial.repairs
        state.inherit(trial, Cut)
        state.add(
            LimitedDrop(
                asked=f"max-drop {self.max_drop}",
                wanted=parse_drop(self.max_drop),
                found=search.losses[sparsity],
                sparsity=search.gone[sparsity],
                tried=[[search.gone[s], loss] for s, loss in search.losses.items()],
                stopped=search.stopped,
                held_back=search.unseen,
            )
        )
        return PassResult(state, changes)


class _Search:
    """The bracket, what has been evaluated, and the best candidate."""

    def __init__(self, options: LimitDropPass, state: State, candidates: list[Candidates], meaning: Meaning) -> None:
        assert state.calibration is not None
        self.options, self.state, self.candidates, self.meaning = options, state, candidates, meaning
        self.limit = parse_drop(options.max_drop)
        self.data = state.calibration
        self.dense, self.whole = state.found(DenseModel).original, state.as_it_came()
        self.analysis = state.get(Analysis) or Analysis((NormaliseGraphPass(), FindGroupsPass()))
        everything = sum(float(m.costs[-1]) for m in candidates)
        least = sum(float(m.costs[0]) for m in candidates)
        self.widths = {
            s: ALLOCATIONS[options.allocate](candidates, (1.0 - s) * everything)
            for s in GRID
            if (1.0 - s) * everything >= least
        }
        before = state.get(WholeModel)
        stays = 1.0 if before is None else (parameters_left(state.groups) + before.added) / before.prunable
        self.gone = {s: 1.0 - stays * self._summed("costs", keep) / everything for s, keep in self.widths.items()}
        """What goes by widths that there are, for each sparsity; layers that share a width have few of them."""
        self.predicted = {s: self._summed("errors", keep) for s, keep in self.widths.items()}
        self.losses: dict[float, float] = {}
        self.best: tuple[State, tuple[Change, ...], float] | None = None
        self.stopped: str | None = None
        self.reference: float | None = None
        self.held = held_batches(len(self.data.batches))
        self.unseen = options.metric is not None or len(self.held) < len(self.data.batches)
        """Whether the loss is measured on rows that nothing was fitted to."""
        self.fitted = self.data
        if options.metric is None and self.unseen:
            rest = [i for i in range(len(self.data.batches)) if i not in self.held]
            batches, masks = tuple(self.data.batches[i] for i in rest), tuple(self.data.row_masks[i] for i in rest)
            self.fitted = replace(self.data, batches=batches, row_masks=masks)
        self.original: Runner | None = None
        if options.metric is None:
            self.original = whole_session(state)

    def run(self) -> None:
        """Evaluates a few sparsities, each chosen by what those before it lost."""
        low, high, factor = 0.0, 1.0, 0.5  # 1 - cosine is about half of the relative squared difference
        if self.options.metric is not None:
            self.reference = self._metric(self.whole.as_given(), None)
            assert self.reference is not None
        for _ in range(EVALUATIONS):
            inside = [s for s in self.widths if low < s < high]
            if not inside:
                return
            fits = [s for s in inside if factor * self.predicted[s] <= self.limit]
            # Without a model of the loss left to trust, the middle.
            chosen = fits[-1] if fits else inside[0]
            if len(self.losses) >= 3:
                chosen = inside[len(inside) // 2]
            loss = self._evaluate(chosen)
            if loss is None:
                return
            if loss <= self.limit:
                low = chosen
                if loss >= NEAR * self.limit:
                    return
            else:
                high = chosen
            if loss > 0 and self.predicted[chosen] > 0:
                factor = loss / self.predicted[chosen]

    def _summed(self, what: str, keep: dict[str, int]) -> float:
        return sum(float(getattr(m, what)[np.searchsorted(m.widths, keep[m.name])]) for m in self.candidates)

    def _evaluate(self, sparsity: float) -> float | None:
        """Prunes to one sparsity; returns what it loses, None where the metric failed."""
        trial = State(self.dense.model(), self.fitted, self.state.device, self.state.progress, memory=self.state.memory)
        # The first batch is the same, and so is the plan of the memory.
        trial.inherit(self.state, DenseModel, WholeModel, TensorSizes, *self.analysis.reads)
        for step in self.analysis.passes:
            step(trial)
        note_widths(trial, meant(self.widths[sparsity], self.meaning))
        result = self.options.cut(trial)
        if self.options.metric is None:
            loss = current().once(lambda: self._difference(trial))
        else:
            value = self._metric(as_given(trial.model), self.best)
            if value is None:
                return None
            assert self.reference is not None
            loss = (self.reference - value) / (abs(self.reference) or 1.0)
        self.losses[sparsity] = loss
        if loss <= self.limit and (self.best is None or sparsity > self.best[2]):
            self.best = (trial, result.changes, sparsity)
        return loss

    def _difference(self, trial: State) -> float:
        """1 - the mean cosine of the first output that has any."""
        assert self.original is not None
        pruned = trial.engine().whole(trial.model, "the pruned model")
        first = first_difference(pruned, self.original, self.data, self.held, trial.found(Cut).ends)
        if first is None:
            raise OptionError("the model has no floating-point output to compare; give a metric of your own")
        return 1.0 - first.cosine

    def _metric(self, model: Any, best: Any) -> float | None:
        """Calls the user's function; an error stops the search where something good is there to keep."""
        metric = self.options.metric
        assert metric is not None
        name = getattr(metric, "__name__", type(metric).__name__)
        try:
            value = current().once(lambda: float(metric(model)))
            if not math.isfinite(value):
                raise ValueError(f"it returned {value}")
        except Exception as err:
            if best is None:
                raise OptionError(
                    f"metric function '{name}' failed ({type(err).__name__}: {err}); nothing was pruned"
                ) from err
            self.stopped = traceback.format_exc()
            warnings.warn(
                f"metric function '{name}' failed; the last model that was inside is kept\n{self.stopped}", stacklevel=2
            )
            return None
        return value
