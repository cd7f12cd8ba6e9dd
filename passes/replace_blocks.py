"""A run of blocks and what stands in its place: the graph without it, and the original with it that it must equal."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liar_opt.frontend.engine import AnyPatch, Patch
from liar_opt.frontend.leave_out import leave_out
from liar_opt.frontend.model import Model
from liar_opt.frontend.records import StandIn
from liar_opt.frontend.rewrite import Rewriter
from liar_opt.passes.base import State
from liar_opt.passes.choose_blocks import ChosenRun, LeftOut
from liar_opt.passes.sweep import first_samples
from liar_opt.runtime.compare import relative_difference, require_close
from liar_opt.runtime.errors import CheckError, InternalError

SAMPLES = 4
"""On which the result is compared with the original."""


class ReplacedBlocks:
    """What is known of one run that goes; the original is run first, as its graph is cut then.

    Args:
        state: the analysed model with its calibration data.
        chosen: the run.
        repair: what stands in its place.
    """

    def __init__(self, state: State, chosen: ChosenRun, repair: str) -> None:
        assert state.calibration is not None
        self.state, self.chosen, self.repair, self.gap = state, chosen, repair, chosen.gap
        self.walk, self.engine, fit = state.analysed(), state.engine(), chosen.fit
        self.precision = state.model.least_precision()
        axes = self.walk.axes[self.gap.target]
        assert axes is not None
        self.width = self.walk.algebra.size(axes[-1])
        self.kind = chosen.dtype
        self.weight: NDArray[Any] | None = None
        self.shift = np.zeros(self.width)
        self.stand_in: StandIn | None = None
        use = self.gap.use
        if use is None and fit.change is not None:
            self.stand_in = self._stand_in(np.eye(self.width) + fit.change, fit.shift)
        elif use is not None and fit.change is not None:
            value = np.asarray(use.node.inputs[use.weight_position].values)
            rows = use.matrix(value).astype(np.float64)
            self.weight = use.laid_out((rows + rows @ fit.change).astype(value.dtype), value.shape)
            self.shift = fit.shift / use.scale
        self.feeds = first_samples(state, state.calibration.batches[0], SAMPLES)
        self.outputs = [t.name for t in state.model.graph.outputs if t.name not in self.walk.unspecified]
        self.reference = self.engine.reference(self.walk, self.outputs, self.patches, None)
        self.expected = self.reference.run(self.feeds)

    @property
    def patches(self) -> list[AnyPatch]:
        """What makes of the original what is left: its blocks run, and nothing reads them."""
        found: list[AnyPatch] = [self.stand_in or self._stand_in(np.eye(self.width), np.zeros(self.width))]
        if self.weight is not None and self.gap.use is not None:
            found.append(Patch((self.gap.use,), self.weight, self.shift))
        return found

    def _stand_in(self, matrix: NDArray[Any], bias: NDArray[Any]) -> StandIn:
        return StandIn(self.gap.target, self.gap.source, matrix.astype(self.kind), bias.astype(self.kind))

    def fold(self) -> None:
        """Writes the change of the last product before the gap into the graph."""
        use = self.gap.use
        if use is None or self.weight is None:
            return
        rewriter = Rewriter(self.walk)
        rewriter.set_constant([(use.holder, use.weight_position)], self.state.model.settled(self.weight))
        if np.any(self.shift):
            rewriter.add_bias([use], self.shift)

    def cut(self) -> list[str]:
        """Takes the run out of the graph of the state; returns the caches that hold zeros since.

        Raises:
            ModelError: something in it is needed behind it.
        """
        self.fold()
        return leave_out(self.walk, self.gap.source, self.gap.target, self.stand_in)

    def checked(self, model: Model, caches: Collection[str], names: Mapping[str, str] | None = None) -> float:
        """Compares what is left with the original in which the map stands, in every way that it will be run.

        Args:
            model: what is left.
            caches: outputs that hold something else.
            names: by what names the original has its outputs, where others.

        Raises:
            CheckError: it is not the same.
        """
        self.engine.require_form(self.state.as_it_came(), model, self.walk.spared)
        theirs = {n: self.expected[(names or {}).get(n, n)] for n in names or self.outputs if n not in caches}
        worst = 0.0
        for how, load in self.engine.ways(model):
            try:
                ours = load().run(self.feeds, list(theirs), arrays=True)
            except (CheckError, InternalError):
                raise
            except Exception as err:
                raise CheckError(
                    f"the model without {self.chosen.gap.run.length} blocks fails {how}: {' '.join(str(err).split())[:300]}"
                ) from err
            what = f"the model without blocks against the original without them, {how}"
            try:
                found = require_close(ours, theirs, self.precision, what)
            except CheckError:
                if self.state.model.traced:  # its graph is cut by now
                    raise
                moved = self.reference.rounded(self.feeds)
                rounding = max(relative_difference(moved[(names or {}).get(n, n)], value) for n, value in theirs.items())
                found = require_close(ours, theirs, self.precision, what, rounding)
            worst = max(worst, found)
        return worst

    def entry(self, caches: list[str], difference: float | None) -> LeftOut:
        """Returns what the report says."""
        run, fit = self.gap.run, self.chosen.fit
        ridge = fit.ridge if fit.change is not None and fit.ridge is not None and np.isfinite(fit.ridge) else None
        return LeftOut(
            blocks=run.length,
            of=run.stack.blocks,
            first=run.first,
            source=self.gap.source,
            target=self.gap.target,
            repair=self.repair if fit.change is not None else "none",
            ridge=ridge,
            error=min(self.chosen.errors),
            error_none=self.chosen.plain,
            tried=list(self.chosen.errors),
            caches=caches,
            prunable=0,
            added=0 if self.stand_in is None else self.stand_in.parameters,
            exact_difference=difference,
        )
