"""The channel groups of a traced module."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from liar_opt.frontend.fx_module import FxModel, FxWalk, analyse
from liar_opt.frontend.hf_checkpoint import expert_alignment
from liar_opt.passes.base import Finding, PassResult, State
from liar_opt.passes.find_groups import FindGroupsPass, find_groups, note_groups
from liar_opt.passes.groups import ChannelGroup, Refusal

RIGID = "torch.nn.MultiheadAttention holds one width for its heads and for the stream: no checkpoint can say fewer heads"
SHARED = "its weight is read elsewhere too, as a table of words is; a module holds it once, and the repair is for one place"


@dataclass(frozen=True)
class Poolers(Finding):
    """The poolers that may be cut where one field says their width and that of other layers."""

    by: ClassVar[str] = "find-groups"
    groups: tuple[ChannelGroup, ...]


@dataclass(frozen=True)
class FindModuleGroupsPass(FindGroupsPass):
    """Analyse the traced module and list its channel groups.

    Attributes:
        traced: whether the result may be the traced graph; else layers whose width is that of the stream stay whole.
    """

    traced: bool = True

    def apply(self, state: State, plan: None) -> PassResult:
        """Adds the analysis and the groups to the state."""
        assert isinstance(state.model, FxModel)
        state.walk = analyse(state.model)
        found = find_groups(state.walk)
        refused = note_groups(state, found)
        rigid = [] if self.traced else [g for g in found.groups if _rigid(state.walk, g)]
        shared = [g for g in found.groups if _shared(state.walk, g)]
        state.groups = tuple(_aligned(state.model, g) for g in found.groups if g not in rigid and g not in shared)
        if not self.traced:  # a configuration has one width for queries, keys and values
            state.values = state.queries = ()
        state.add(Poolers(tuple(g for g in found.poolers if self.traced or not _rigid(state.walk, g))))
        refusals = [Refusal(RIGID, (g.name,), g.size) for g in rigid]
        refusals += [Refusal(SHARED, (g.name,), g.size) for g in shared if g not in rigid]
        return PassResult(state, (), (*refused, *refusals))


def _aligned(model: FxModel, group: ChannelGroup) -> ChannelGroup:
    """Returns a group whose kept widths the module's own code can run: of stacked experts not any can be."""
    stacked = [c for c in group.consumers if c.expert is not None]
    if not stacked or model.module is None:
        return group
    size = np.asarray(stacked[0].uses[0].weight.values).dtype.itemsize
    step = max(1, expert_alignment(model.module) // size)
    step //= math.gcd(step, group.block_width)
    return group if group.size % step else replace(group, step=math.lcm(group.step, step))


def _rigid(walk: FxWalk, group: ChannelGroup) -> bool:
    """Returns whether a group's weights belong to a layer of torch whose width is that of the stream."""
    import torch

    assert isinstance(walk.model, FxModel) and walk.model.module is not None
    module = walk.model.module
    names = {u.constant.name for u in walk.constant_uses if id(u.constant) in group.constants}
    owners = [module.get_submodule(n.rpartition(".")[0]) for n in names if n in dict(module.named_parameters())]
    return any(isinstance(o, torch.nn.MultiheadAttention) for o in owners)


def _shared(walk: FxWalk, group: ChannelGroup) -> bool:
    """Returns whether a weight that is repaired is read by a node, too, where it is not."""
    uses = [use for consumer in group.consumers for use in consumer.uses]
    repaired = {id(node) for use in uses for node in (use.node, use.lookup and use.lookup.node)}
    weights = {id(use.weight) for use in uses}
    return any(id(use.constant) in weights and id(use.node) not in repaired for use in walk.constant_uses)
