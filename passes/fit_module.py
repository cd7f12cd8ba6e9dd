"""The module with its smaller weights: its own code where attributes make it fit, else the traced graph."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from liar_opt.frontend.fx_rewrite import cut_graph_module, cut_module
from liar_opt.passes.base import Finding, Pass, PassResult, State
from liar_opt.passes.express_widths import FinalFields
from liar_opt.passes.open_module import OpenedModule, traced_model
from liar_opt.passes.verify_model import Verification
from liar_opt.runtime.compare import TOLERANCES
from liar_opt.runtime.errors import ModelError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class CutModule(Finding):
    """The module with its smaller weights.

    Attributes:
        module: the module, or the traced graph where no attributes make its code fit.
        traced: why it is the traced graph; None where it is not.
    """

    by: ClassVar[str] = "fit-module"
    module: torch.nn.Module
    traced: str | None = None


@dataclass(frozen=True)
class FitModulePass(Pass[None]):
    """Give the module the weights of its cut graph, and set the attributes with which its code computes the same.

    Attributes:
        checkpoint: whether the module's own code must fit.
    """

    name: ClassVar[str] = "fit-module"
    checkpoint: bool = False

    def plan(self, state: State) -> None:
        """Plans nothing."""

    def apply(self, state: State, plan: None) -> PassResult:
        """Adds the ``CutModule``, and to the ``Verification`` the attributes that were set.

        Where no attributes make the module's own code fit, the result is the traced graph.

        Raises:
            ModelError: a checkpoint was asked for, and the module's own code cannot be made to fit.
        """
        model, fields = traced_model(state), state.get(FinalFields)
        example, tolerance = state.found(OpenedModule).example, TOLERANCES[model.least_precision()]
        try:
            module, attributes = cut_module(model, example, tolerance, () if fields is None else fields.changes)
            state.add(CutModule(module))
        except ModelError as err:
            if self.checkpoint:
                raise
            # What its code computes from other sizes no attribute can say; the graph is cut and has been checked.
            module, attributes = cut_graph_module(model).to(model.device), ()
            state.add(CutModule(module, str(err).partition("; write")[0]))
        state.add(replace(state.found(Verification), attributes=list(attributes)))
        return PassResult(state)
