"""What the configuration of DeciLM can say: a feed-forward width of each layer, and one number of heads."""

from dataclasses import dataclass
from typing import ClassVar

from liar_opt.frontend.decilm import deci_fields, reads_heads
from liar_opt.frontend.fx_module import FxWalk
from liar_opt.frontend.fx_rewrite import planned_state
from liar_opt.frontend.hf_checkpoint import FieldChange
from liar_opt.passes.base import Pass, PassResult, State
from liar_opt.passes.express_widths import FinalFields
from liar_opt.passes.groups import ChannelGroup, Refusal
from liar_opt.passes.open_module import module_of


@dataclass(frozen=True)
class ExpressDeciPass(Pass[tuple[ChannelGroup, ...]]):
    """Leave heads alone where nobody asked for them: half of what reads such a checkpoint does not load fewer.

    Steps and equal heads are what `passes.fit_runtime` gives.

    Attributes:
        heads: whether they may go.
    """

    name: ClassVar[str] = "express-deci"
    heads: bool = False

    def plan(self, state: State) -> tuple[ChannelGroup, ...]:
        """Returns the groups that are left alone."""
        return () if self.heads else tuple(g for g in state.groups if g.kind == "heads")

    def apply(self, state: State, plan: tuple[ChannelGroup, ...]) -> PassResult:
        """Drops them."""
        if not plan:
            return PassResult(state)
        state.groups = tuple(g for g in state.groups if g not in plan)
        state.model.notes.append(reads_heads())
        return PassResult(state, (), (Refusal(reads_heads(), tuple(g.name for g in plan)),))


@dataclass(frozen=True)
class StateDeciPass(Pass[tuple[FieldChange, ...]]):
    """Find what the configuration must say for the widths that were decided, before any of the work."""

    name: ClassVar[str] = "state-deci"

    def plan(self, state: State) -> tuple[FieldChange, ...]:
        """Returns the fields.

        Raises:
            OptionError: layers would not have as many heads.
        """
        walk = state.walk
        assert isinstance(walk, FxWalk)
        shapes, _ = planned_state(walk, {g.factor: state.keep[g.name] for g in state.groups})
        return deci_fields(module_of(state), shapes)

    def apply(self, state: State, plan: tuple[FieldChange, ...]) -> PassResult:
        """Adds them."""
        state.add(FinalFields(plan))
        return PassResult(state)
