"""Cuts the groups of a traced module, measured in torch or on the module's export."""

from dataclasses import dataclass

from liar_opt.passes.base import PassResult, State
from liar_opt.passes.groups import ChannelGroup
from liar_opt.passes.prune_groups import PruneGroupsPass
from liar_opt.passes.repairs import AWARE
from liar_opt.runtime.errors import OptionError


@dataclass(frozen=True)
class PruneModulePass(PruneGroupsPass):
    """Cut every group of a traced module, measured in torch, and fold the repair into its consumers."""

    def requires(self, state: State) -> None:
        """Checks the options.

        Raises:
            OptionError: as for ONNX graphs, or a repair that asks for the dense model beside the cut one.
        """
        super().requires(state)
        if self.repair in AWARE:
            raise OptionError(f"repair '{self.repair}' works on ONNX files alone; export the module, or give repair 'liar'")


@dataclass(frozen=True)
class PruneExportedPass(PruneModulePass):
    """The same, measured in ONNX Runtime on the module's export."""

    def apply(self, state: State, plan: tuple[tuple[ChannelGroup, ...], ...]) -> PassResult:
        """Prunes the export, and writes back what became of it."""
        from liar_opt.passes.module_on_onnx import cut_on_onnx

        visitor = self.visitor(state)
        cut_on_onnx(visitor, [g for groups in plan for g in groups])
        state.model.graph.cleanup(remove_unused_node_outputs=False).toposort()
        visitor.note(state)
        return PassResult(state, tuple(visitor.changes), visitor.refusals())
