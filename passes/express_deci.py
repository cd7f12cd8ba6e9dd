"""What the configuration of DeciLM can say: a feed-forward width of each layer, and one number of heads."""

from dataclasses import dataclass, replace
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

    Attention may go whole, with nothing in its place. A feed-forward layer may not: llama.cpp leaves out the attention of a
    layer that has none. Steps and equal heads are what `passes.fit_runtime` gives.

    Attributes:
        heads: whether they may go.
        whole: whether attention may.
    """

    name: ClassVar[str] = "express-deci"
    heads: bool = False
    whole: bool = False

    def plan(self, state: State) -> tuple[ChannelGroup, ...]:
        """Returns the groups that are left."""
        found = []
        for group in state.groups:
            own = group.sublayer if self.whole and group.kind == "heads" else None
            group = replace(group, sublayer=None if own is None else replace(own, bare=True))
            if group.kind != "heads" or self.heads:
                found.append(group)
            elif own is not None:
                found.append(replace(group, fixed=True))
        return tuple(found)

    def apply(self, state: State, plan: tuple[ChannelGroup, ...]) -> PassResult:
        """Takes them."""
        left = {g.name: g for g in plan}
        gone = tuple(g.name for g in state.groups if g.name not in left)
        narrow = all(g.kind != "heads" or (g.name in left and not left[g.name].fixed) for g in state.groups)
        state.groups = plan
        if narrow:
            return PassResult(state)
        state.model.notes.append(reads_heads())
        return PassResult(state, (), (Refusal(reads_heads(), gone),) if gone else ())


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
