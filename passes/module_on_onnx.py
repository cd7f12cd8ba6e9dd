"""Measure a torch module in ONNX Runtime: the traced module's export is pruned, and what it became is written back.

The groups of both graphs are matched by their consumers' weights, which the export holds unchanged. The export goes through
the same pass as any ONNX graph; its kept sets, repaired weights and biases are those of the module then.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liar_opt.frontend.fx_module import FxModel
from liar_opt.frontend.fx_onnx import export_onnx, symbolic_axes
from liar_opt.passes.base import PassResult, Pipeline, State
from liar_opt.passes.find_groups import FindGroupsPass
from liar_opt.passes.groups import ChannelGroup, Consumer
from liar_opt.passes.normalise_graph import NormaliseGraphPass
from liar_opt.passes.open_model import load_state
from liar_opt.passes.open_module import OpenedModule
from liar_opt.passes.prune_groups import CutGroups, PruneGroupsPass
from liar_opt.passes.sweep import Sweep
from liar_opt.runtime.errors import ModelError


@dataclass(frozen=True)
class PruneExportedPass(PruneGroupsPass):
    """Cut every group of a traced module as ONNX Runtime cuts its export."""

    def apply(self, state: State, plan: tuple[tuple[ChannelGroup, ...], ...]) -> PassResult:
        """Prunes the export, and writes back what became of it."""
        visitor = CutGroups(Sweep(state, weighting=self.weighting, seed=self.seed), self)
        cut_on_onnx(visitor, [g for groups in plan for g in groups])
        state.model.graph.cleanup(remove_unused_node_outputs=False).toposort()
        visitor.note(state)
        return PassResult(state, tuple(visitor.changes), visitor.refusals())


def cut_on_onnx(visitor: CutGroups, groups: Sequence[ChannelGroup]) -> None:
    """Prunes the export, then does to the module what was done to it.

    Args:
        visitor: of the module.
        groups: of the module, those that lose blocks.

    Raises:
        ModelError: the module cannot be exported, or the export has other groups.
    """
    exported = _exported(visitor.state)
    exported.groups = (*exported.groups, *exported.values, *exported.queries)
    partners = _partners(groups, exported.groups)
    exported.keep = {g.name: g.size for g in exported.groups}
    exported.keep |= {theirs: visitor.state.keep[ours] for ours, theirs in partners.items()}
    step = PruneGroupsPass(**vars(visitor.options))
    step.requires(exported)
    there = step.visitor(exported)
    there.recording = True
    for together in step.plan(exported):
        there.sweep.over(there, together)
    # In the order of the export: a consumer that groups share was rewritten for each of them.
    ours, finished = {partners[g.name]: g for g in groups}, there.finished()
    done = [replace(kept, name=ours[kept.name].name) for kept in finished.groups]
    visitor.replay([ours[kept.name] for kept in finished.groups], replace(finished, groups=done))


def _exported(state: State) -> State:
    model = state.model
    assert isinstance(model, FxModel) and model.module is not None
    made = export_onnx(model.module, state.found(OpenedModule).example, symbolic_axes(model.signature))
    exported = load_state(made, state.memory.limit if state.memory.asked else None)
    exported.model.tied = model.tied
    exported.progress, exported.calibration = state.progress, state.calibration
    Pipeline(passes=[NormaliseGraphPass(), FindGroupsPass()])(exported)
    return exported


def _partners(ours: Sequence[ChannelGroup], theirs: tuple[ChannelGroup, ...]) -> dict[str, str]:
    """Returns the name of each group in the export, by its name in the traced module."""
    by_weights = {_weights(g): g for g in theirs}
    result = {}
    for group in ours:
        partner = by_weights.get(_weights(group))
        if partner is None:
            raise ModelError(
                f"group '{group.name}' ({group.kind}, {group.size} wide) is not in the module's ONNX export; measure it "
                "with backend 'torch'"
            )
        result[group.name] = partner.name
    return result


def _weights(group: ChannelGroup) -> tuple[Any, ...]:
    places = ((c.owners >= 0).tobytes() for c in group.consumers)  # other groups may have the same consumers
    operands = (s for operand in group.operands for s in operand.sources)
    sources = (np.ascontiguousarray(np.moveaxis(s.use.constant.values, s.axis, 0)).tobytes() for s in operands)
    return group.kind, group.size, *places, *(_laid_out(c).tobytes() for c in group.consumers), *sources


def _laid_out(consumer: Consumer) -> NDArray[Any]:
    """Returns a consumer's weight as [n, m]."""
    use = consumer.uses[0]
    return np.ascontiguousarray(use.matrix(np.asarray(use.holder.inputs[use.weight_position].values)))
