"""Bring a graph to the form that the analysis expects; see ``OnnxModel.normalise`` for the rules."""

from dataclasses import dataclass
from typing import ClassVar

from liar_opt.passes.base import Change, Pass, PassResult, State
from liar_opt.passes.groups import Refusal


@dataclass(frozen=True)
class NormaliseGraphPass(Pass[None]):
    """Fold constants, drop Identity and dead nodes, give every node a name.

    Before: ``Transpose(W) -> MatMul(x, .)``. After: ``MatMul(x, W_transposed)``.
    """

    name: ClassVar[str] = "normalise-graph"

    def plan(self, state: State) -> None:
        """Plans nothing: the rules are applied as they match."""

    def apply(self, state: State, plan: None) -> PassResult:
        """Normalises the graph in place."""
        nodes = len(state.model.graph.nodes)
        removed = state.model.normalise()
        changes = (Change("nodes folded or dropped", "graph", nodes, nodes - removed),) if removed else ()
        return PassResult(state, changes, tuple(Refusal(left.reason, (left.reader,)) for left in state.model.computed))
